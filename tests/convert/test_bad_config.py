"""config.json with fields of wrong types: refused in one line, or without effect."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")
from tests.helpers.damage import fields

WRONG = ("seven", None, -1, 0, 2.5, [], {}, True)
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
OTHERS = {
    "rms_norm_eps": ("small", [], {}),
    "rope_theta": ("big", [], {}),
    "rope_parameters": ("x", 5, [1], {"rope_theta": "x"}, {"rope_theta": 1.0, "rope_type": 7}),
    "architectures": (5, {"a": 1}, True),
    "model_type": (7, [], {}, None, "../llama"),
    "quantization": (5, "x", [1], {}, {"bits": 4}, {"bits": 3.5, "group_size": 32}),
    "quantization_config": (5, "x", [1]),
    "tie_word_embeddings": ("yes", [1]),
    "num_key_value_heads": ("two", 3, -2, [1]),
    "eos_token_id": ("x", {"a": 1}, 1.5),
    "pad_token_id": ("x", [1], {"a": 1}),
}
FIELDS = [(f, WRONG) for f in SIZES] + list(OTHERS.items())


@pytest.mark.parametrize("role", ["sft", "rm"])
@pytest.mark.parametrize(("field", "values"), FIELDS)
def test_a_field_of_a_wrong_type_is_refused_or_of_no_effect(
    field: str,
    values: tuple[Any, ...],
    role: str,
    convert_damaged: Callable[..., str | None],
    source_copy: Callable[[str], Path],
) -> None:
    for x in values:
        source = source_copy(role)
        fields(**{field: x})(source)
        found = convert_damaged(role, source, accepted="harmless")
        if field in SIZES and not (field == "vocab_size" and x == 0):
            assert found is not None, x


def test_an_activation_that_would_not_be_computed_is_refused(
    convert_damaged: Callable[..., str | None], source_copy: Callable[[str], Path]
) -> None:
    source = source_copy("sft")
    fields(hidden_act="relu")(source)
    found = convert_damaged("sft", source)
    assert found is not None and "hidden_act 'relu' is not what mlx-lm computes for llama" in found
