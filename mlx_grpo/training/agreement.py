"""Ranks that train together work with the same: inputs, versions, state, adapter."""

import hashlib
from typing import Any

import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from mlx_grpo.core.errors import InputError
from mlx_grpo.distributed.ranks import Ranks
from mlx_grpo.grpo.state import RunState
from mlx_grpo.models.lora import lora_parameters, set_parameters
from mlx_grpo.models.optimizer import optimizer_arrays, set_optimizer_arrays
from mlx_grpo.run.provenance import differences, hints

CHECK_EVERY = 10
"""Iterations between two comparisons of the adapters."""


def check_inputs(ranks: Ranks, about: dict[str, Any]) -> None:
    """Compare settings, contents of the inputs and library versions.

    Args:
        about: this rank's provenance, see `provenance.recorded`.

    Raises:
        InputError: on all ranks, naming the first that differs from rank 0.
    """
    for rank, (host, other) in enumerate(ranks.gather((ranks.host, about))):
        if rank == 0:
            first = other
        elif found := differences(first, other) + hints(first, other):
            raise InputError(f"rank {rank} on {host}: not what rank 0 has: {'; '.join(found)}")


def check_adapter(ranks: Ranks, actor: nn.Module, iteration: int) -> None:
    """Compare the adapters every `CHECK_EVERY` iterations.

    Raises:
        InputError: on all ranks, naming the first whose adapter is another than rank 0's.
    """
    if ranks.size == 1 or iteration % CHECK_EVERY:
        return
    digests = ranks.gather((ranks.host, _digest(actor)))
    for rank, (host, digest) in enumerate(digests):
        if digest != digests[0][1]:
            raise InputError(
                f"rank {rank} on {host}: after {iteration} iterations its adapter is another than "
                "rank 0's; do both compute alike, with equal chips and the same macOS?"
            )


def _digest(actor: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in lora_parameters(actor).items():
        digest.update(name.encode() + np.asarray(value).tobytes())
    return digest.hexdigest()


def share_state(
    ranks: Ranks, state: RunState, actor: nn.Module, optimizer: optim.Optimizer
) -> RunState:
    """Give every rank what rank 0 has, and may have read from a checkpoint that others cannot."""
    if ranks.size == 1:
        return state
    set_parameters(actor, ranks.lead(lora_parameters(actor)))
    set_optimizer_arrays(optimizer, ranks.lead(optimizer_arrays(optimizer)))
    return state.with_json(ranks.gather(state.to_json())[0])
