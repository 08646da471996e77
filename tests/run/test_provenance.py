"""What shapes the numbers must not change within a run; all else is free."""

from pathlib import Path
from typing import Any

import pytest

from mlx_grpo.config.settings import (
    BY_CONTENT,
    FREE,
    ROUNDING,
    SETTINGS,
    TrainConfig,
    train_config,
    with_settings,
)
from mlx_grpo.run import provenance
from mlx_grpo.run.provenance import (
    EVALUATED_BY,
    changed_fields,
    differences,
    evaluates_otherwise,
    hints,
    input_digests,
    recorded,
)

INPUTS = {"--prompts": "a" * 64}


def about(**changes: Any) -> dict[str, Any]:
    return recorded(train_config(**changes), INPUTS, "dense fp32")


@pytest.mark.parametrize("name", list(SETTINGS))
def test_every_field_is_free_or_rounding_or_an_input_or_shapes_the_numbers(name: str) -> None:
    value = SETTINGS[name].default
    changed = about(**{name: (1.0, 2.0) if isinstance(value, tuple) else f"{value}x"})
    harmless = FREE + ROUNDING + BY_CONTENT
    assert changed_fields(about(), changed) == ([] if name in harmless else [name])
    assert len(differences(about(), changed)) == (name not in harmless)
    assert len(hints(about(), changed)) == (name in ROUNDING)


def test_a_difference_names_the_flag_and_both_values() -> None:
    new = about(K=8, learning_rate=0.1 + 0.2, kl_targets=(0.1, 0.05))
    assert differences(about(), new) == [
        "--K 6 -> 8",
        "--kl-targets 0.05,0.02,0.01 -> 0.1,0.05",
        "--learning-rate 0.0001 -> 0.30000000000000004",
    ]


def test_other_contents_and_a_missing_input_are_named() -> None:
    new = {**about(), "inputs": {"--prompts": "b" * 64, "--reward f": "c" * 64}}
    assert differences(about(), new) == [
        "--prompts other content (sha256 aaaaaaaa -> bbbbbbbb)",
        "--reward f other content (sha256 none -> cccccccc)",
    ]


@pytest.mark.parametrize(
    ("settings", "inputs", "otherwise"),
    [
        ({"eval_limit": 3}, {}, True),
        ({"rm_weight": 0.5}, {}, True),
        ({"learning_rate": 1e-3, "K": 4, "kl_targets": (0.1,)}, {}, False),
        ({}, {"--prompts": "b"}, False),
        ({}, {"--test-prompts more": "b"}, False),
        ({}, {"--eval-prompts": "b"}, True),
        ({}, {"--reward short": "b"}, True),
    ],
)
def test_evaluations_compare_unless_something_they_are_made_of_has_changed(
    settings: dict[str, Any], inputs: dict[str, str], otherwise: bool
) -> None:
    new = about(**settings)
    new = {**new, "inputs": {**new["inputs"], **inputs}}
    assert evaluates_otherwise(about(), new) is otherwise


def test_every_setting_that_evaluations_depend_on_is_one() -> None:
    assert set(SETTINGS) >= EVALUATED_BY
    assert not EVALUATED_BY & {*FREE, *ROUNDING, *BY_CONTENT}


def test_library_versions_only_warn() -> None:
    new = {**about(), "versions": {**provenance.versions(), "mlx": "9.9"}}
    assert differences(about(), new) == []
    assert hints(about(), new) == [f"mlx {provenance.versions()['mlx']} -> 9.9"]


def test_inputs_are_known_by_content_not_by_place(
    train_arguments: dict[str, Any], tmp_path: Path
) -> None:
    config = train_config(**train_arguments)
    digests = input_digests(config, ())
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in Path(config.model.actor).iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    assert input_digests(with_settings(config, actor_model=str(moved)), ()) == digests
    (moved / "tokenizer_config.json").write_text("{}")  # the tokenizer shapes the numbers, too
    changed = input_digests(with_settings(config, actor_model=str(moved)), ())
    assert {n for n in digests if digests[n] != changed[n]} == {"--actor-model"}
    assert input_digests(with_settings(config, rm_model="none"), ())["--rm-model"] == "none"


def test_a_checkpoint_from_before_a_setting_existed_goes_on_at_its_default() -> None:
    older = about()
    del older["config"]["eval_reward"], older["config"]["decode_rows"]
    assert differences(older, about()) == hints(older, about()) == []
    assert differences(older, about(eval_reward=("m:f",))) == ["--eval-reward  -> m:f"]


def test_a_default_that_does_something_new_is_told_to_a_checkpoint_from_before_it() -> None:
    older = about()
    del older["config"]["update_rows"], older["config"]["kl_share"]
    assert differences(older, about()) == ["--kl-share 1.0 -> 0.125", "--update-rows 0 -> 3"]
    assert differences(older, about(update_rows=0, kl_share=1.0)) == []


def test_weights_held_in_another_form_are_told() -> None:
    packed = recorded(TrainConfig(), INPUTS, "packed bf16")
    assert differences(about(), packed) == [
        "weights dense fp32 -> packed bf16 (--precision, --weights, their MLX_GRPO_ variables, "
        "--memory-limit or the machine)"
    ]
    older = {k: v for k, v in packed.items() if k != "weights"}
    assert differences(older, packed) == []
