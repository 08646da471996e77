"""Values that a family of mlx-lm keeps in the dtype they are stored in, whatever the rest is cast
to: biases that choose the experts of a token, decay rates of a recurrence.

A family says so in its `cast_predicate`, by a parameter's name. All of them look at parts or ends
of names, so a name within a block serves as well.
"""

from collections.abc import Callable

import mlx.nn as nn


def may_cast(model: nn.Module) -> Callable[[str], bool]:
    """Whether the parameter of a name may be cast to 16 bits.

    Asks every module of the tree: the family of a multimodal model's text part has the say too.
    """
    found = (getattr(module, "cast_predicate", None) for _, module in model.named_modules())
    predicates = [predicate for predicate in found if predicate is not None]

    def allowed(name: str) -> bool:
        return all(predicate(name) for predicate in predicates)

    return allowed
