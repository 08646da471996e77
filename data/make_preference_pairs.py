"""Make `data/preference_pairs.jsonl`: the SFT model's own answers, labelled by the rubric.

usage: python data/make_preference_pairs.py [--model weights/sft-4bit] [--samples FILE]

1. Sample K answers to every prompt of `data/rl_prompts.jsonl` in each of the three WAYS: as in
   training, cooler, and to the prompt with BRIEFLY behind it, for few of the others end by
   themselves (kept in --samples; an existing file is used as it is).
2. Judge each with `mlx_grpo.rubric`, and pair answers to the same prompt whose scores differ by at
   least MARGIN: most of them answers that both ended by themselves, for whether an answer ends is
   soon learned.

About 30 minutes on two CPU cores. The seed is fixed, so the same model gives the same file on the
same backend.
"""

import argparse
import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import mlx_grpo  # noqa: F401  (loads OpenBLAS before MLX)
from mlx_grpo.data.pairs import SIDES
from mlx_grpo.data.prompts import read_prompts, tokenize_prompts
from mlx_grpo.data.tables import read_rows
from mlx_grpo.files.atomic import write_text
from mlx_grpo.grpo.rollout import Sampling, rollout
from mlx_grpo.models.backbone import Backbone, load_backbone
from mlx_grpo.rubric import judge

HERE = Path(__file__).parent
SEED, K, MAX_TOKENS, WAVE = 2024, 4, 96, 24
BRIEFLY = " Answer in one or two short sentences."
WAYS = ((1.0, ""), (0.6, ""), (1.0, BRIEFLY))
"""Temperature, and what is added to the prompt."""
MARGIN, BOTH_END, OTHERS = 0.12, 5, 2
"""Least difference of the scores; most pairs of each kind to a prompt."""


def draw_samples(model: Path, out: Path) -> None:
    """Sample K answers per prompt and way, and write one row per answer."""
    backbone = load_backbone(model)
    rows = [row for way in WAYS for row in _drawn(backbone, *way)]
    write_text(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _drawn(backbone: Backbone, temperature: float, added: str) -> list[dict]:
    file = HERE / "rl_prompts.jsonl"
    asked = read_prompts(file)
    texts = {row.id: row.messages[-1]["content"] for row in asked}
    asked = [
        replace(row, messages=({"role": "user", "content": texts[row.id] + added},))
        for row in asked
    ]
    prompts, _ = tokenize_prompts(file, asked, backbone.tokenizer, 256)
    groups = rollout(
        backbone.model,
        backbone.tokenizer,
        backbone.stop_ids,
        prompts,
        Sampling(K, MAX_TOKENS, temperature=temperature, decode_rows=K * WAVE),
        SEED,
        f"pairs at {temperature:g}{added}",
        on_token=lambda done, total, _: print(f"\rsampled {done}/{total} prompts", end=""),
    )
    return [
        {
            "id": g.prompt.id,
            "prompt": texts[g.prompt.id],
            "answer": c.text,
            "finish_reason": c.finish_reason,
        }
        for g in groups
        for c in g.completions
    ]


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
    both_end = [p for p in found if {p[f"{s}_finish_reason"] for s in SIDES} == {"stop"}]
    others = [p for p in found if p not in both_end]
    return both_end[:BOTH_END] + others[:OTHERS]


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
