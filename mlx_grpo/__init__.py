"""GRPO (Group Relative Policy Optimization, Shao et al. 2024, arXiv:2402.03300) with MLX.

The way of the data: prompts -> rollout -> reward -> advantage -> log-probs -> loss -> update ->
checkpoint. One module per stage; `trainer.py` is the only place where the order is visible.
"""

from typing import TYPE_CHECKING, Any

from mlx_grpo.backend import device as device
from mlx_grpo.backend.open_files import allow_few

if TYPE_CHECKING:
    from mlx_grpo.api import GRPOConfig, Run, iterate, train

allow_few()

__all__ = ["GRPOConfig", "Run", "__version__", "iterate", "train"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """The Python interface, imported when it is used: mlx-lm takes two seconds."""
    if name in ("GRPOConfig", "Run", "iterate", "train"):
        from mlx_grpo import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
