"""How far apart a rollout's log-probs and those of the training forward may be."""

from mlx_grpo.backend.device import device_name
from mlx_grpo.backend.precision import DTYPES, precision_for

APART = {"fp32": 1e-3, "bf16": 0.15, "fp16": 0.02}
"""In nats on a GPU, where decoding and scoring take kernels that round differently. An H200 showed
0.017 in bf16 and 0.0023 in fp16; one wrong position or mask moves a log-prob by far more."""


def apart(exact: float) -> float:
    """`exact` on a CPU, which computes both in the same way, and `APART` on a GPU."""
    if device_name() == "cpu":
        return exact
    computed = precision_for(dense=False).dtype
    return next(APART[name] for name, dtype in DTYPES.items() if dtype == computed)
