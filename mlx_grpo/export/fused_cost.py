"""What fusing changed: a quantized layer rounds the sum of weight and adapter, and an adapter is
small beside a step of 4 bits."""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.nn as nn

from mlx_grpo.convert.cost import policy_cost, policy_rows
from mlx_grpo.convert.reader import open_source
from mlx_grpo.convert.source import locate
from mlx_grpo.data.chat import load_chat_tokenizer
from mlx_grpo.models.lora import load_adapter

MUCH = 0.2
"""Share of what training changed; beyond it the fused model is another one."""


@dataclass(frozen=True)
class FusedCost:
    """KL in nats per token, on the reference answers to held-out prompts."""

    fused: float
    """KL(adapter || fused)."""
    trained: float
    """KL(SFT || adapter): what training changed, to compare with."""
    texts: int

    def describe(self) -> str:
        """One line."""
        return (
            f"KL {self.fused:.4f} nats/token to the adapter; training moved the SFT model by "
            f"{self.trained:.4f} ({self.texts} reference answers)"
        )

    def advice(self) -> str | None:
        """What to do where rounding changed much of what was learned."""
        if self.fused <= MUCH * self.trained:
            return None
        return (
            f"rounding changed the model by {self.fused:.4f} nats/token where training changed it "
            f"by {self.trained:.4f}; --dequantize keeps the adapter's work, in 16 bits"
        )


def fused_cost(
    sft: Path,
    adapter: Path,
    fused: Path,
    texts: Path,
    columns: Mapping[str, str] | None = None,
) -> FusedCost:
    """Measure a fused model against the adapter it was made of, one block in memory at a time."""
    rows = policy_rows(load_chat_tokenizer(sft), texts, columns)
    with tempfile.TemporaryDirectory(prefix="mlx-grpo-") as scratch:
        plain, new = (_opener(path, Path(scratch)) for path in (sft, fused))

        def adapted() -> nn.Module:
            return load_adapter(plain(), adapter)

        rounding = policy_cost(adapted, new, rows)
        training = policy_cost(plain, adapted, rows)
    return FusedCost(rounding.kl_per_token or 0.0, training.kl_per_token or 0.0, rounding.texts)


def _opener(path: Path, scratch: Path) -> Callable[[], nn.Module]:
    return lambda: open_source(locate(str(path)), None, scratch).backbone()
