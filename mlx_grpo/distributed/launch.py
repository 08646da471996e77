"""The ranks that `mlx.launch` has started, from the first handshake to the last word."""

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import mlx.core as mx

from mlx_grpo.console.output import Console
from mlx_grpo.core.errors import InputError, one_line
from mlx_grpo.distributed.heartbeat import Address, Heartbeat, RankLost, meet
from mlx_grpo.distributed.ranks import ALONE, Ranks

LAUNCHED = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
"""Set by mlx.launch, or by the MPI that it calls."""
CONNECT_SECONDS = 60
"""For MLX to connect ranks of which all are there."""


@contextmanager
def launched(ui: Console) -> Iterator[Ranks]:
    """The ranks of this launch, or the only one; those that do not lead are silent in the block.

    However the block ends, the other ranks learn of it.

    Raises:
        InputError: the ranks do not come together; or the block raised it on the rank that leads.
        SystemExit: with 2, where another rank has said why.
    """
    if not any(name in os.environ for name in LAUNCHED):
        yield ALONE
        return
    ranks = _together(ui)
    if not ranks.leads:
        ui.mute()
    try:
        yield ranks
    except RankLost:
        _leave(ranks, "done")
        raise SystemExit(2) from None
    except BaseException as e:
        _leave(ranks, "failed", one_line(e) or type(e).__name__)
        if isinstance(e, InputError) and not ranks.leads:
            raise SystemExit(2) from e
        raise
    _leave(ranks, "done")


def _leave(ranks: Ranks, kind: Literal["done", "failed"], why: str = "") -> None:
    if ranks.heartbeat:
        ranks.heartbeat.leave(kind, why)


def _together(ui: Console) -> Ranks:
    addresses = _ring()
    if len(addresses) < 2:
        if "MLX_HOSTFILE" in os.environ:  # a ring of one
            return ALONE
        group = _connect("any")
        if group.size() > 1 and group.rank() == 0:
            ui.warn("only --backend ring is watched: here a rank that hangs holds up the others")
        return Ranks(group.rank(), group.size())
    rank = int(os.environ["MLX_RANK"])
    neighbours = meet(addresses, rank)
    ui.share_errors()  # MLX says "[ring] Socket 4 was closed by the peer" in six pieces
    group = _connect("ring")
    return Ranks(group.rank(), group.size(), Heartbeat(rank, neighbours, ui.error))


def _ring() -> list[Address]:
    """Where each rank of a ring listens first, from the host file of mlx.launch."""
    file = os.environ.get("MLX_HOSTFILE")
    text = Path(file).read_text(encoding="utf-8").strip() if file else ""
    found = []
    for addresses in json.loads(text or "[]"):
        host, _, port = addresses[0].rpartition(":")
        found.append((host, int(port)))
    return found


def _connect(backend: str) -> mx.distributed.Group:
    # MLX holds the interpreter while it connects, so only the operating system can end it
    signal.alarm(CONNECT_SECONDS)
    try:
        return mx.distributed.init(strict=True, backend=backend)
    except RuntimeError as e:
        raise InputError(f"rank {os.environ.get('MLX_RANK', '?')}: {one_line(e)}") from e
    finally:
        signal.alarm(0)
