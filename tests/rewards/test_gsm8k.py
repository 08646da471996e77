"""The reward of GSM8K reads the final number, however it is written."""

import pytest

from mlx_grpo.rewards.gsm8k import correct

ANSWER = "She sold 1000 + 200 = <<1000+200=1200>>1200 clips.\n#### 1,200"


@pytest.mark.parametrize(
    "text",
    [
        "#### 1200",
        "So it is 1,200.",
        "1000 + 200 = 1200.00",
        "#### $1200 in 2 months",
        "The answer is 1200!",
    ],
)
def test_the_right_number_counts_however_it_is_written(text: str) -> None:
    assert correct([text], ANSWER) == [1.0]


@pytest.mark.parametrize("text", ["", "no number", "1200, or 1300", "#### 12", "-1200", "#### ?"])
def test_another_number_or_none_does_not(text: str) -> None:
    assert correct([text], ANSWER) == [0.0]


def test_a_row_without_a_number_is_an_error() -> None:
    with pytest.raises(ValueError, match="field 'answer' holds no number"):
        correct(["1"], "none")
