"""AdamW (arXiv:1711.05101): one clipped step, and its state as named arrays."""

import math
from collections.abc import Iterator

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from mlx_grpo.core.types import Parameters

STEP_BYTES = 4 << 20
"""Of parameters that a step evaluates at a time."""


def new_optimizer(learning_rate: float, weight_decay: float) -> optim.AdamW:
    """AdamW (arXiv:1711.05101) with bias correction, which MLX leaves out unless told."""
    return optim.AdamW(learning_rate=learning_rate, weight_decay=weight_decay, bias_correction=True)


def optimizer_arrays(optimizer: optim.Optimizer) -> Parameters:
    """The optimizer's state by full name, sorted: equal states make equal files."""
    state = {n: v for n, v in tree_flatten(optimizer.state) if isinstance(v, mx.array)}
    return dict(sorted(state.items()))


def set_optimizer_arrays(optimizer: optim.Optimizer, arrays: Parameters) -> None:
    """Put such a state in place."""
    optimizer.state = tree_unflatten(list(arrays.items()))


def adamw_step(
    optimizer: optim.AdamW, gradients: Parameters, parameters: Parameters, max_norm: float
) -> tuple[Parameters, float]:
    """Clip the gradient to a global norm and step: (new parameters, norm before clipping).

    A few arrays at a time, so that no second set of gradients and moments is alive; empties
    `gradients`. A norm that is not finite returns the parameters as they were and leaves the
    optimizer alone.
    """
    squares = mx.stack([mx.square(g.astype(mx.float32)).sum() for g in gradients.values()])
    norm = float(mx.sqrt(squares.sum()).item())
    if not math.isfinite(norm):
        return parameters, norm
    factor = min(1.0, max_norm / (norm + 1e-6))
    scaled = tree_unflatten([(name, g * factor) for name, g in gradients.items()])
    # nested trees, so that the optimizer's state survives flattening into a file and back
    updated = optimizer.apply_gradients(scaled, tree_unflatten(list(parameters.items())))
    flat, state = dict(tree_flatten(updated)), dict(tree_flatten(optimizer.state))
    gradients.clear()
    del scaled
    for names in _groups(flat):
        mx.eval([(flat[n], state[f"{n}.m"], state[f"{n}.v"]) for n in names])
    mx.eval(optimizer.state)
    return flat, norm


def _groups(arrays: Parameters) -> Iterator[list[str]]:
    """Names whose arrays take about `STEP_BYTES` together: a GPU would wait longer for each single
    array than it works on it."""
    names: list[str] = []
    size = 0
    for name, value in arrays.items():
        names.append(name)
        size += value.nbytes
        if size >= STEP_BYTES:
            yield names
            names, size = [], 0
    if names:
        yield names
