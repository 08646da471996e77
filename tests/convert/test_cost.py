"""Texts to measure on are there, or that is said in a line."""

from pathlib import Path

import pytest

from mlx_grpo.convert.cost import MAX_PROMPT, check_pairs, policy_rows
from mlx_grpo.core.errors import InputError
from mlx_grpo.models.backbone import Backbone
from tests.helpers.tiny import write_jsonl


def test_a_file_without_pairs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"empty\.jsonl: it is empty; give --pairs"):
        check_pairs(write_jsonl(tmp_path / "empty.jsonl", []))


def test_texts_of_which_none_is_short_enough_are_refused(
    tmp_path: Path, backbone: Backbone
) -> None:
    rows = [{"prompt": "x" * MAX_PROMPT, "response": "yes"}, {"prompt": "short"}]
    with pytest.raises(InputError, match=f"no row with a 'response' has a prompt of {MAX_PROMPT}"):
        policy_rows(backbone.tokenizer, write_jsonl(tmp_path / "long.jsonl", rows))
