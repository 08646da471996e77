"""Families that mlx-lm runs through kernels of Metal without a gradient, in train mode as well."""

import mlx.nn as nn

from mlx_grpo.backend.device import device_name
from mlx_grpo.models.stand_ins import family, refusal

ON_METAL = frozenset({"bitnet", "rwkv7"})


def check_gradient(model: nn.Module) -> None:
    """Raise InputError where a model can be run on this device and not be trained."""
    if family(model) in ON_METAL and device_name() == "metal":
        raise refusal(model, "its kernels on Metal have no gradient")
