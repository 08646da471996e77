"""`mlx-grpo train-rm`."""

from typing import Any

from mlx_grpo.cli.options import Quiet, class_flags, with_flags
from mlx_grpo.config.settings import RewardTrainConfig
from mlx_grpo.config.sources import typed_flags
from mlx_grpo.console.output import Console
from mlx_grpo.core.commands import command


@with_flags(class_flags(RewardTrainConfig))
def train_reward_model(flags: dict[str, Any], quiet: Quiet = False) -> None:
    """Train a reward model on preference pairs: LoRA and scalar head, Bradley-Terry loss."""
    from mlx_grpo.reward_modeling.quality import show_quality
    from mlx_grpo.reward_modeling.train import train_rm

    ui = Console(quiet)
    config = RewardTrainConfig(**typed_flags(RewardTrainConfig, flags))
    with ui.working("training the reward model"):
        quality = train_rm(config, ui.say, warn=ui.warn)
    show_quality(ui, quality)
    use = command("mlx-grpo", "train", "--rm-model", config.output)
    ui.say(f"written to {config.output}; use it with: {use}")
