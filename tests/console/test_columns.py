"""Texts stand side by side as far as there is room, in rows of like length."""

import pytest

from mlx_grpo.console.columns import side_by_side


@pytest.mark.parametrize(
    ("texts", "width", "rows"),
    [
        (3, 120, [3]),
        (4, 120, [2, 2]),
        (3, 80, [2, 1]),
        (3, 40, [1, 1, 1]),
        (2, 1, [1, 1]),
        (7, 400, [4, 3]),
    ],
)
def test_as_many_stand_beside_one_another_as_fit(texts: int, width: int, rows: list[int]) -> None:
    tables = side_by_side([(f"label {i}", f"text {i}") for i in range(texts)], width)
    shown = [
        [str(cell) for column in table.columns for cell in list(column.cells)[1:] if str(cell)]
        for table in tables
    ]
    assert [len(row) for row in shown] == rows
    assert [text for row in shown for text in row] == [f"text {i}" for i in range(texts)]
    assert len({len(table.columns) for table in tables}) == 1  # columns stand under one another


def test_labels_and_texts_steer_no_terminal() -> None:
    (table,) = side_by_side([("a\x1b[2J", "b\x07\nc")], 80)
    (column,) = table.columns
    assert [str(cell) for cell in column.cells] == [r"a\x1b[2J", "b\\x07\nc"]
