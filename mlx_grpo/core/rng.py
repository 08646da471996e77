"""The only source of randomness in the package: a key for every draw.

A key depends on the seed and on what the draw is for, never on what was drawn before. So sampling
does not depend on batching, and a resumed run draws what the uninterrupted one would have drawn.
"""

import hashlib

import mlx.core as mx
import numpy as np


def _digest(seed: int, path: tuple[str | int, ...]) -> bytes:
    # repr keeps 1 and "1" apart, and the separator keeps ("a", "bc") and ("ab", "c") apart
    text = "\x1f".join([str(int(seed)), *map(repr, path)])
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def key(seed: int, *path: str | int) -> mx.array:
    """MLX key, uint32 [2], for `path` (purpose, iteration, prompt id, sample, position, ...) under
    `seed`."""
    return mx.array(np.frombuffer(_digest(seed, path), dtype="<u4"))


def uniforms(seed: int, paths: list[tuple[str | int, ...]]) -> mx.array:
    """One uniform number in [0, 1) per path, fp32 [len(paths)]; each equals
    `mx.random.uniform(key=key(seed, *path))`."""
    keys_N2 = mx.array(
        np.frombuffer(b"".join(_digest(seed, p) for p in paths), "<u4").reshape(-1, 2)
    )
    return mx.vmap(lambda k: mx.random.uniform(key=k))(keys_N2)


def permutation(seed: int, *path: str | int, n: int) -> list[int]:
    """A permutation of range(n)."""
    return [int(i) for i in mx.random.permutation(n, key=key(seed, *path)).tolist()]
