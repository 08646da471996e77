"""Make `data/preference_pairs.jsonl`: the SFT model's own answers, labelled by the rubric.

usage: python data/make_preference_pairs.py [--model weights/sft-4bit] [--samples FILE]

1. Sample K answers to every prompt of `data/rl_prompts.jsonl` (kept in --samples; an existing file
   is used as it is).
2. Judge each with `mlx_grpo.rubric`, and pair answers to the same prompt whose scores differ by at
   least MARGIN.

About 15 minutes on two CPU cores. The seed is fixed, so the same model gives the same file on the
same backend.
"""

import argparse
import json
from itertools import combinations
from pathlib import Path

import mlx_grpo  # noqa: F401  (loads OpenBLAS before MLX)
from mlx_grpo.data.prompts import load_prompts
from mlx_grpo.data.tables import read_rows
from mlx_grpo.files.atomic import write_text
from mlx_grpo.grpo.rollout import Sampling, rollout
from mlx_grpo.models.backbone import load_backbone
from mlx_grpo.rubric import judge

HERE = Path(__file__).parent
SEED, K, MAX_TOKENS, MARGIN, PAIRS_PER_PROMPT, WAVE = 2024, 4, 64, 0.12, 4, 24


def draw_samples(model: Path, out: Path) -> None:
    """Sample K answers per prompt and write one row per answer."""
    backbone = load_backbone(model)
    prompts, _ = load_prompts(HERE / "rl_prompts.jsonl", backbone.tokenizer, 256)
    sampling = Sampling(K, MAX_TOKENS, decode_rows=K * WAVE)
    groups = rollout(
        backbone.model,
        backbone.tokenizer,
        backbone.stop_ids,
        prompts,
        sampling,
        SEED,
        "pairs",
        on_token=lambda done, total, _: print(f"\rsampled {done}/{total} prompts", end=""),
    )
    rows = [
        {
            "id": g.prompt.id,
            "prompt": g.prompt.messages[-1]["content"],
            "answer": c.text,
            "finish_reason": c.finish_reason,
        }
        for g in groups
        for c in g.completions
    ]
    write_text(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def pairs_of(rows: list[dict]) -> list[dict]:
    """The pairs of one prompt with the widest margins."""
    scored = [
        (round(judge(r["prompt"], r["answer"], r["finish_reason"]).score, 4), r)
        for r in rows
        if r["answer"].strip()
    ]
    found = []
    for (score_a, a), (score_b, b) in combinations(scored, 2):
        (high, chosen), (low, rejected) = (
            ((score_a, a), (score_b, b)) if score_a > score_b else ((score_b, b), (score_a, a))
        )
        if high - low >= MARGIN:
            found.append(
                {
                    "prompt": chosen["prompt"],
                    "chosen": chosen["answer"],
                    "rejected": rejected["answer"],
                    "chosen_finish_reason": chosen["finish_reason"],
                    "rejected_finish_reason": rejected["finish_reason"],
                    "chosen_score": high,
                    "rejected_score": low,
                }
            )
    found.sort(key=lambda p: p["rejected_score"] - p["chosen_score"])
    return found[:PAIRS_PER_PROMPT]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("weights/sft-4bit"))
    parser.add_argument("--samples", type=Path, default=Path("runs/pair_samples.jsonl"))
    parser.add_argument("--out", type=Path, default=HERE / "preference_pairs.jsonl")
    args = parser.parse_args()
    if not args.samples.exists():
        args.samples.parent.mkdir(parents=True, exist_ok=True)
        draw_samples(args.model, args.samples)
    known = {row["id"] for _, row in read_rows(HERE / "rl_prompts.jsonl")}
    by_prompt: dict[str, list[dict]] = {}
    for _, row in read_rows(args.samples):
        if row["id"] in known:
            by_prompt.setdefault(row["id"], []).append(row)
    pairs = [pair for rows in by_prompt.values() for pair in pairs_of(rows)]
    numbered = [{"id": f"pair-{i + 1:04d}", **pair} for i, pair in enumerate(pairs)]
    write_text(args.out, "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in numbered))
    print(f"{args.out}: {len(pairs)} pairs from {len(by_prompt)} prompts")


if __name__ == "__main__":
    main()
