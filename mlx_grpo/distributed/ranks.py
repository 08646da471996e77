"""Data parallelism over the ranks of `mlx.launch`: the prompts of an iteration are split, and what
depends on all of them goes through the collectives of `mx.distributed`.

The number of ranks is not part of the mathematics. Position p of a batch belongs to rank p modulo
the number of ranks, a sample's random numbers belong to its prompt, and figures are put together in
the order of positions; only the gradient's sum is taken in another order.
"""

import json
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

from mlx_grpo.core.finite import NotFinite, Skip
from mlx_grpo.core.stopping import SafePoint
from mlx_grpo.core.types import Parameters
from mlx_grpo.distributed.heartbeat import Heartbeat

PIECE_BYTES = 32 << 20
"""Of gradients that are summed at a time."""

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together; a single one needs no communication."""

    rank: int = 0
    size: int = 1
    heartbeat: Heartbeat | None = None

    @property
    def leads(self) -> bool:
        """Whether this rank writes the run and speaks."""
        return self.rank == 0

    @property
    def host(self) -> str:
        """Name of this machine."""
        return socket.gethostname()

    @property
    def share(self) -> slice:
        """Which positions of a batch are this rank's."""
        return slice(self.rank, None, self.size)

    def own(self, positions: range) -> slice:
        """Which entries of this rank's share lie at these positions of the batch."""
        before = [len(range(stop)[self.share]) for stop in (positions.start, positions.stop)]
        return slice(*before)

    def gather(self, mine: Any) -> list[Any]:
        """What each rank has, by rank; anything that JSON can hold."""
        if self.size == 1:
            return [mine]
        data = json.dumps(mine).encode()
        lengths = self._result(mx.distributed.all_gather, mx.array([len(data)]))
        width = int(lengths.max().item())
        row = mx.array(np.frombuffer(data.ljust(width), np.uint8))
        rows = np.asarray(self._result(mx.distributed.all_gather, row[None]))
        return [json.loads(bytes(r)) for r in rows]

    def merged(self, mine: Sequence[T]) -> list[T]:
        """A value for each position of the batch, from each rank's values for its share."""
        shares = self.gather(list(mine))
        merged: list[T] = [None] * sum(map(len, shares))  # type: ignore[list-item]
        for rank, values in enumerate(shares):
            merged[rank :: self.size] = values
        return merged

    def sum(self, arrays: Parameters) -> Parameters:
        """Sums over the ranks of arrays that have the same names and shapes everywhere, fp32; uses
        up `arrays`."""
        if self.size == 1:
            return arrays
        total: Parameters = {}
        for names in _pieces(arrays):
            parts = [arrays.pop(name) for name in names]
            flat = mx.concatenate([p.reshape(-1).astype(mx.float32) for p in parts])
            flat = self._result(mx.distributed.all_sum, flat)
            ends = np.cumsum([p.size for p in parts])[:-1].tolist()
            for name, part, value in zip(names, parts, mx.split(flat, ends), strict=True):
                total[name] = value.reshape(part.shape)
            mx.eval([total[name] for name in names])
        return total

    def lead(self, arrays: Parameters) -> Parameters:
        """Rank 0's arrays on every rank, bit for bit."""
        if self.size == 1:
            return arrays
        about = [[n, list(v.shape), str(v.dtype).split(".")[-1]] for n, v in arrays.items()]
        result: Parameters = {}
        for name, shape, kind in self.gather(about)[0]:
            dtype: mx.Dtype = getattr(mx, kind)
            mine = arrays[name] if self.leads else mx.zeros(shape, dtype)
            sent = mine.reshape(-1).view(mx.uint8)  # as bytes: a sum with zeros changes no bit
            received = self._result(mx.distributed.all_sum, sent)
            result[name] = received.view(dtype).reshape(shape)
        mx.eval(list(result.values()))
        return result

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Values that are not finite on one rank end the block on all of them.

        Raises:
            NotFinite: that of the first position in the batch.
        """
        skip = None
        try:
            yield
        except NotFinite as e:
            skip = e.skip
        found = [
            Skip(s["stage"], tuple(s["positions"]), tuple(s["values"]))
            for s in self.gather(skip and asdict(skip))
            if s
        ]
        if found:
            raise NotFinite(min(found, key=lambda s: s.positions))

    def watching(self, safe_point: SafePoint) -> SafePoint:
        """A safe point that also stops where another rank has left."""
        if not self.heartbeat:
            return safe_point
        heartbeat = self.heartbeat

        def look() -> None:
            heartbeat.check()
            safe_point()

        return look

    def stopped(self) -> None:
        """Tell the others that this rank was asked to stop."""
        if self.heartbeat:
            self.heartbeat.leave("stopped")

    def _result(self, collective: Callable[[mx.array], mx.array], mine: mx.array) -> mx.array:
        # collectives run on the CPU: a GPU must not wait for them within its own work
        mx.eval(mine)
        if self.heartbeat:
            self.heartbeat.check()
        try:
            result = collective(mine)
            mx.eval(result)
        except RuntimeError as e:
            if self.heartbeat:
                self.heartbeat.explain(e)
            raise
        return result


ALONE = Ranks()


def _pieces(arrays: Parameters) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name in sorted(arrays):
        names.append(name)
        size += arrays[name].nbytes
        if size >= PIECE_BYTES:
            yield names
            names, size = [], 0
    if names:
        yield names
