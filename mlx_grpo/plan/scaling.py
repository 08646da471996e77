"""What more ranks would save, on paper: each works on its share of the prompts, and all sum their
gradients over the slowest link.

At every optimizer step a ring sends 2 (R - 1) / R of the gradient from each of R ranks (Patarasuk &
Yuan 2009, doi:10.1016/j.jpdc.2008.09.002), and every rank learns of all answers. Nothing here has
been measured between Macs.
"""

import re
from dataclasses import dataclass

from mlx_grpo.core.errors import InputError
from mlx_grpo.plan.footprint import Footprint
from mlx_grpo.plan.memory import Workload

TOKEN_BYTES = 32
"""Of a sampled token on its way to the other ranks: id, log-prob and text, as JSON."""
HOP_SECONDS = 1e-3
"""Of a message to the next rank, beside its bytes; a guess on the safe side for TCP."""
EXCHANGES = 8
"""Of figures in an iteration, two collectives each, beside those of the optimizer steps."""
WORTH = 0.9
"""More ranks pay where an iteration takes less than this part of its time."""


@dataclass(frozen=True)
class Scaled:
    """An iteration with some ranks."""

    ranks: int
    prompts: int
    """Of the rank that has most."""
    traffic: float
    """Bytes that a rank sends."""
    working: float
    """Seconds."""
    exchanging: float
    """Seconds."""

    @property
    def seconds(self) -> float:
        return self.working + self.exchanging


def link_speed(text: str) -> float:
    """Bytes per second of a text such as 10Gb/s or 600Mb/s.

    Raises:
        InputError: it is no such text.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([MG])b(?:/s|ps)\s*", text)
    if not found or not float(found[1]):
        raise InputError(f"--link: must be bits per second such as 10Gb/s or 600Mb/s, not {text!r}")
    return float(found[1]) * {"M": 1e6, "G": 1e9}[found[2]] / 8


def exchange(
    model: Footprint, whole: Workload, ranks: int, bytes_per_second: float
) -> tuple[float, float]:
    """(bytes that a rank sends, seconds of exchange) in an iteration.

    Args:
        whole: the work of all ranks.
    """
    if ranks == 1:
        return 0.0, 0.0
    others = (ranks - 1) / ranks
    adapter = model.lora_bytes(whole.lora_rank, whole.lora_layers, whole.expert_rank)
    gradients = whole.steps * 2 * others * adapter
    answers = others * whole.prompts * whole.k * whole.completion_tokens * TOKEN_BYTES
    hops = (ranks - 1) * (2 * EXCHANGES + 4 * whole.steps)  # a step: figures, and a sum of two ways
    traffic = gradients + answers
    return traffic, traffic / bytes_per_second + hops * HOP_SECONDS


def pays_up_to(scaled: list[Scaled]) -> int:
    """The number of ranks after which none that is larger pays; `scaled` grows from 1."""
    best = scaled[0]
    for s in scaled[1:]:
        if s.seconds < WORTH * best.seconds:
            best = s
    return best.ranks
