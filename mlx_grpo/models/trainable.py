"""Whether a model can be trained: asked before any work, by the planner and by `doctor`."""

import mlx.nn as nn

from mlx_grpo.core.errors import InputError, one_line
from mlx_grpo.models.decoder import Decoder


def check_trainable(model: nn.Module) -> None:
    """Take a model apart, lazily: no weight is read.

    Raises:
        InputError: it cannot be taken apart; with the name of its family.
    """
    try:
        Decoder(model)
    except InputError:
        raise
    except Exception as e:  # the model code of mlx-lm asserts and raises what it likes
        raise InputError(f"model type '{family(model)}' is not supported: {one_line(e)}") from e


def family(model: nn.Module) -> str:
    """The name that mlx-lm gives a model's family."""
    return type(model).__module__.rsplit(".", 1)[-1]
