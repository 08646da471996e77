"""The soft overlong punishment: completions lose reward towards the limit, not all at once at it.

With a limit of L tokens and a zone of C before it, a completion of n tokens gets

    0 for n <= L - C,  (L - C - n) / C beyond it: -1 at the limit

Yu et al. 2025 (DAPO), arXiv:2503.14476, eq. 13.
"""

from typing import Any

from mlx_grpo.core.stopping import SafePoint
from mlx_grpo.rewards.functions import CustomReward, Scores

NAME = "soft_overlong_punishment"


def soft_overlong_punishment(limit: int, cache: int) -> CustomReward:
    """A reward between -1 and 0, added to the others.

    Args:
        limit: longest completion, in tokens.
        cache: tokens before it in which the punishment grows.
    """

    def punish(arguments: dict[str, Any], safe_point: SafePoint) -> Scores:
        safe_point()
        lengths = [len(ids) for ids in arguments["completion_ids"]]
        return [min(0.0, (limit - cache - n) / cache) for n in lengths]

    return CustomReward(NAME, punish)
