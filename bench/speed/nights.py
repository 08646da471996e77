"""Hours of 800 iterations on Macs, by the planner; nothing is measured.

usage: python -m bench.speed.nights

Prompts and answers of 256 tokens, K = 6, a reward adapter. `defaults` is what `mlx-grpo train`
does, `everything` the preset gemma-2b-reference: 16 prompts an iteration, all completions in the
update, the KL of all of them. The memory is what MLX plans with on a Mac of that size
(bench/memory/macs.py), and 2.5 GB.
"""

import mlx_grpo  # noqa: F401  isort: skip  (first: it loads OpenBLAS before MLX)


from bench.memory.macs import limit_of
from bench.memory.measure import sizes_of
from mlx_grpo.config.presets import PRESETS
from mlx_grpo.config.settings import TrainConfig, with_settings
from mlx_grpo.config.sources import build_config
from mlx_grpo.plan.devices import device
from mlx_grpo.plan.footprint import Footprint
from mlx_grpo.plan.memory import RewardFootprint
from mlx_grpo.plan.planner import Planner

EVERYTHING = PRESETS / "gemma-2b-reference.toml"
MACS = (("m1", 8), ("m2", 16), ("m2-pro", 16), ("m3-pro", 36), ("m4", 24), ("m4-max", 48))
SHAPES = ("qwen2.5-0.5b", "llama-3.2-1b", "gemma-2b", "llama-3.2-3b")


def hours(model: Footprint, config: TrainConfig, mac: str, limit: int) -> str:
    """Of a whole run, or a dash where it does not fit."""
    config = with_settings(config, memory_limit=f"{limit / 1e9:.3f}GB")
    planner = Planner(config, model, RewardFootprint(model.lora_bytes(8)), here=False, ranks=1)
    plan = planner.plan()
    if not plan.fits:
        return "-"
    seconds = sum(t.expected for t in planner.times(plan, device(mac)).values())
    return f"{config.run.num_iterations * seconds / 3600:.1f} h"


def main() -> None:
    print("| Mac | MLX may take | model | defaults | everything |\n|---|---|---|---|---|")
    models = {shape: sizes_of(shape, 0) for shape in SHAPES}
    limits = [(mac, gib, limit_of(gib)) for mac, gib in MACS]
    limits.insert(3, ("m2-pro", 16, 2_500_000_000))
    for mac, gib, limit in limits:
        for shape, model in models.items():
            configs = (TrainConfig(), build_config(EVERYTHING))
            found = (hours(model, config, mac, limit) for config in configs)
            print(f"| {mac}, {gib} GB | {limit / 1e9:.1f} GB | {shape} | {' | '.join(found)} |")


if __name__ == "__main__":
    main()
