"""The largest shape that the planner accepts on Macs of some sizes; nothing is measured.

usage: python bench/memory/macs.py

The run's defaults: 6 prompts x 6 answers, three of them learned from, of 256 tokens behind prompts
of 256, LoRA rank 16, a reward adapter of rank 8 or a reward model of the policy's own size. What
Metal recommends a program to stay below is taken as two thirds of the memory, three quarters from
48 GB on; MLX plans with 0.85 of it, less 0.6 GB for the process.
"""

import mlx_grpo  # noqa: F401  isort: skip  (first: it loads OpenBLAS before MLX)

from bench.memory.measure import sizes_of
from bench.shapes import SHAPES
from mlx_grpo.backend.device import share_for_mlx
from mlx_grpo.config.settings import TrainConfig
from mlx_grpo.models.decoder import Sizes
from mlx_grpo.plan.memory import Choice, Plan, RewardFootprint, choose
from mlx_grpo.plan.planner import Planner

MACS = (8, 16, 24, 32, 48, 64)


def limit_of(gib: int) -> int:
    """Bytes that MLX plans with on a Mac of so many GiB."""
    return share_for_mlx((gib << 30) * 3 // 4 if gib >= 48 else (gib << 30) * 2 // 3)


def describe(plan: Plan) -> str:
    """The choice in a few words."""
    sizes = plan.choice.sizes
    parts = [f"{plan.choice.decode_rows} rows"]
    parts += [f"{sizes.rows} a pass"] if sizes.rows else []
    parts += [f"MLP {sizes.mlp_tokens}"] if sizes.mlp_tokens else []
    parts += ["swapped"] if plan.choice.swap else []
    return ", ".join(parts)


def main() -> None:
    models = {shape: sizes_of(shape, 0) for shape in SHAPES if shape != "tiny"}
    ordered = sorted(models.items(), key=lambda item: item[1].parameters)
    for gib in MACS:
        for kind in ("adapter", "full"):
            best = "none"
            for shape, model in ordered:
                reward = (
                    RewardFootprint(model.lora_bytes(8))
                    if kind == "adapter"
                    else RewardFootprint(model=model)
                )
                work = Planner(TrainConfig(), model, reward, here=False, ranks=1).work
                given = Choice(dense=False, value_bytes=2, decode_rows=0, sizes=Sizes())
                plan = choose(model, reward, work, limit_of(gib), [given])
                if plan.fits:
                    best = f"{shape}: {plan.peak / 1e9:.2f} GB ({describe(plan)})"
            print(f"{gib:3} GB, limit {limit_of(gib) / 1e9:5.2f} GB, {kind:7}  {best}")


if __name__ == "__main__":
    main()
