"""What a reward model learns from human preference pairs, beside what their lengths alone tell.

usage: python bench/learning/reward_model.py [--pairs FILE] [--max-length N] [--epochs N]
                                    [--valid-fraction X] [--json FILE]
       python bench/learning/reward_model.py --measure weights/smollm2-rm [--write]

The first trains on FILE (by default human pairs kept outside of the repository, beside the
checkout), with `mlx-grpo train-rm`'s own code. The second measures a reward model that `train-rm`
wrote on the pairs it was not trained on; --write puts the figures into its `reward_model.json`.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import mlx_grpo  # noqa: F401  (loads OpenBLAS before MLX)
from mlx_grpo.config.settings import RewardTrainConfig
from mlx_grpo.console.output import Console
from mlx_grpo.core.errors import InputError
from mlx_grpo.data.chat import end_of_turn
from mlx_grpo.data.pairs import group_pairs, load_pairs, split_groups
from mlx_grpo.data.tables import read_rows
from mlx_grpo.files.atomic import read_json, write_json
from mlx_grpo.files.manifest import MANIFEST, sha256, write_manifest
from mlx_grpo.models.backbone import load_backbone
from mlx_grpo.models.reward_model import LEARNING_CURVE, REWARD_CONFIG, load_reward_model
from mlx_grpo.reward_modeling.quality import Quality, judged_pairs, quality, show_quality
from mlx_grpo.reward_modeling.train import train_rm
from mlx_grpo.run.provenance import versions

CHECKOUT = Path(__file__).parents[2]
HUMAN_PAIRS = CHECKOUT.parent / "shared" / "data" / "preference_pairs.jsonl"
# Short pairs, the last blocks, one pass: about five minutes of one CPU core.
SETTINGS = RewardTrainConfig(
    max_length=160, lora_blocks=8, epochs=1, batch_size=1, eval_every=24, valid_fraction=0.06
)


def train_and_record(settings: RewardTrainConfig, pairs: Path, out: Path, ui: Console) -> None:
    """Train, show, and write settings, figures and learning curve."""
    started = time.process_time()
    rows = [row for _, row in read_rows(pairs)]
    usable = [row for row in rows if not _has_empty_answer(row)]
    with tempfile.TemporaryDirectory() as place:
        file = Path(place, "pairs.jsonl")
        file.write_text("".join(json.dumps(row) + "\n" for row in usable))
        config = replace(settings, pairs=str(file), output=f"{place}/rm")
        found = train_rm(config, ui.say)
        curve = [row for _, row in read_rows(Path(place, "rm", LEARNING_CURVE))]
    show_quality(ui, found)
    kept = {n: v for n, v in asdict(config).items() if n not in ("model", "pairs", "output")}
    record: dict[str, Any] = {
        "cpu_minutes": round((time.process_time() - started) / 60, 1),
        "settings": kept,
        "pairs_sha256": sha256(pairs),
        "rows": len(rows),
        "rows_with_an_empty_answer": len(rows) - len(usable),
        "held_out": asdict(found),
        "learning_curve": curve,
        "versions": versions(),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, record)
    ui.say(f"{record['cpu_minutes']} CPU minutes; written to {out}")


def _has_empty_answer(row: dict[str, Any]) -> bool:
    """`train-rm` refuses these; among human pairs there are some."""
    answers = (row.get("chosen"), row.get("rejected"))
    return any(isinstance(text, str) and not text.strip() for text in answers)


def measure(directory: Path, model: Path, ui: Console) -> Quality:
    """Figures on the pairs that the reward model in `directory` was not trained on."""
    training = read_json(directory / REWARD_CONFIG)["training"]
    backbone = load_backbone(model)
    reward_model = load_reward_model(directory, backbone)
    file, seed = Path(training["pairs"]), training["seed"]
    pairs, _ = load_pairs(file, backbone.tokenizer, training["max_length"])
    # before there was a share of its own for the figures, `valid_fraction` was that share
    valid, test = training["valid_fraction"], training.get("test_fraction")
    split = split_groups(
        group_pairs(pairs), *((0.0, valid) if test is None else (valid, test)), seed
    )
    found = quality(judged_pairs(reward_model, split.test, end_of_turn(backbone.tokenizer)))
    show_quality(ui, found)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("weights/sft-4bit"))
    parser.add_argument("--pairs", type=Path, default=HUMAN_PAIRS)
    parser.add_argument("--max-length", type=int, default=SETTINGS.max_length)
    parser.add_argument("--epochs", type=int, default=SETTINGS.epochs)
    parser.add_argument("--valid-fraction", type=float, default=SETTINGS.valid_fraction)
    parser.add_argument("--json", type=Path, default=CHECKOUT / "bench/results/reward_model.json")
    parser.add_argument("--measure", type=Path)
    parser.add_argument("--write", action="store_true")
    args, ui = parser.parse_args(), Console()
    try:
        if args.measure:
            found = measure(args.measure, args.model, ui)
            if args.write:
                about = read_json(args.measure / REWARD_CONFIG)
                figures = {"temperature": found.temperature, "held_out": asdict(found)}
                write_json(args.measure / REWARD_CONFIG, about | figures)
                if (args.measure / MANIFEST).exists():
                    write_manifest(args.measure)
        elif args.pairs.is_file():
            settings = replace(
                SETTINGS,
                model=str(args.model),
                max_length=args.max_length,
                epochs=args.epochs,
                valid_fraction=args.valid_fraction,
            )
            train_and_record(settings, args.pairs, args.json, ui)
        else:
            ui.say(f"{args.pairs}: not there; nothing measured")
    except InputError as e:
        ui.error(str(e))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
