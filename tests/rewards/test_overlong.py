"""The soft overlong punishment grows from the beginning of its zone to the limit."""

import pytest

from mlx_grpo.config.settings import train_config
from mlx_grpo.config.sources import build_config
from mlx_grpo.core.errors import InputError
from mlx_grpo.core.types import Completion, Group, Prompt
from mlx_grpo.rewards.overlong import soft_overlong_punishment


@pytest.mark.parametrize(
    ("tokens", "reward"), [(1, 0.0), (16, 0.0), (17, -0.25), (18, -0.5), (20, -1.0)]
)
def test_it_is_zero_before_its_zone_and_minus_one_at_the_limit(tokens: int, reward: float) -> None:
    answer = Completion((5,) * tokens, "x", "stop", (0.0,) * tokens)
    prompt = Prompt("p", ({"role": "user", "content": "say"},), (1,))
    assert soft_overlong_punishment(20, 4)(Group(prompt, (answer,))) == [reward]


def test_a_zone_longer_than_a_completion_is_refused() -> None:
    flags = {"soft_punish_cache": "300", "max_completion_length": "256"}
    with pytest.raises(InputError, match="--soft-punish-cache: must be 0, or at most"):
        build_config(flags=flags)
    assert train_config().reward.soft_punish_cache == 0
