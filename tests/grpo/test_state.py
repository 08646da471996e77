"""The rule of the best checkpoint: the KL gate first, then the perplexity."""

import math

import pytest

from mlx_grpo.grpo.state import Best


@pytest.mark.parametrize(
    ("kl", "perplexity", "passes"),
    [
        (0.01, 7.9, True),
        (0.02, 7.9, False),  # on the target is not below it
        (0.03, 1.0, False),
        (0.01, 8.0, False),  # as good as the best is not better
        (0.01, 8.1, False),
        (math.nan, 1.0, False),
        (0.01, math.nan, False),
    ],
)
def test_the_gate_wants_kl_below_target_and_a_better_perplexity(
    kl: float, perplexity: float, passes: bool
) -> None:
    assert (not Best(50, 8.0).refusal(kl, perplexity, gate=0.02)) == passes


def test_the_first_to_pass_the_gate_is_best_whatever_its_perplexity() -> None:
    assert Best().step is None
    assert Best().refusal(0.01, 1e9, gate=0.02) == ""
    assert Best().refusal(0.5, 1.0, gate=0.02) == "KL above its gate of 0.02"


def test_the_gate_is_named_before_the_perplexity() -> None:
    assert Best(50, 8.0).refusal(0.03, 9.0, gate=0.02).startswith("KL above")
    assert Best(50, 8.0).refusal(0.01, 9.0, gate=0.02) == "perplexity not better"
