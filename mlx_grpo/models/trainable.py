"""Whether a model can be trained: asked before any work, by the planner and by `doctor`."""

import mlx.nn as nn

from mlx_grpo.models.check import check_batches
from mlx_grpo.models.decoder import Decoder


def check_trainable(model: nn.Module) -> None:
    """Take a model apart, lazily: no weight is read. `models/check.py` compares numbers at load.

    Raises:
        InputError: it cannot be taken apart; with the name of its family.
    """
    check_batches(Decoder(model))
