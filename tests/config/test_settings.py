"""Flags win over --set, --set over the file; every mistake is named with its place and a remedy."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from mlx_grpo.config.checks import AT_LEAST_ZERO, POSITIVE, check, check_ranges
from mlx_grpo.config.settings import RewardTrainConfig, TrainConfig
from mlx_grpo.config.sources import (
    build_config,
    field_help,
    field_types,
    read_toml,
    to_toml,
    typed_flags,
)
from mlx_grpo.core.errors import InputError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text('K = 8\nseed = 1\nepochs = 2\n[kl]\ncontrol = "lr"\nlr-max = 0.5\n')
    return path


def test_flags_win_over_set_and_set_over_the_file(file: Path) -> None:
    config = build_config(file, ["seed=2", "epochs=3"], {"seed": "3"})
    assert (config.K, config.epochs, config.seed) == (8, 3, 3)
    assert config.batch_size == TrainConfig().batch_size


def test_without_anything_the_defaults_hold() -> None:
    assert build_config() == TrainConfig()


def test_the_last_of_several_assignments_holds() -> None:
    assert build_config(assignments=["K=4", "K=5"]).K == 5


def test_a_table_and_a_prefix_mean_the_same(file: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat.toml"
    flat.write_text('K = 8\nseed = 1\nepochs = 2\nkl_control = "lr"\nkl.lr_max = 0.5\n')
    assert build_config(file) == build_config(flat)
    assert build_config(file).kl_control == "lr"


@pytest.mark.parametrize("key", ["kl.control", "kl_control", "kl-control", " kl.control "])
def test_an_assignment_may_be_dotted(key: str) -> None:
    assert build_config(assignments=[f"{key}= none"]).kl_control == "none"


def test_a_value_may_hold_an_equals_sign() -> None:
    assert build_config(assignments=["output=runs/a=b"]).output == "runs/a=b"


def test_lists_come_from_arrays_and_from_commas(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("kl_targets = [0.5, 1]\n")
    assert build_config(path).kl_targets == (0.5, 1.0)
    assert build_config(assignments=["kl_targets=0.5,1"]).kl_targets == (0.5, 1.0)
    assert build_config(flags={"kl_targets": 0.5}).kl_targets == (0.5,)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("clip_rnage=0.1", "--set clip_rnage=0.1: unknown key 'clip_rnage'; did you mean 'clip_r"),
        ("kl.contrl=lr", "unknown key 'kl.contrl'; did you mean 'kl_control'?"),
        ("zzzzz=1", "unknown key 'zzzzz'; see --help"),
        ("K", "--set K: write it as key=value"),
        ("K=six", "field 'K' must be a whole number, not 'six'"),
        ("K=6.5", "field 'K' must be a whole number, not '6.5'"),
        ("learning_rate=fast", "field 'learning_rate' must be a finite number, not 'fast'"),
        ("learning_rate=nan", "field 'learning_rate' must be a finite number, not 'nan'"),
        ("learning_rate=inf", "field 'learning_rate' must be a finite number, not 'inf'"),
        (
            "kl_control=best",
            "field 'kl_control' must be one of decay, reward, lr, none, not 'best'",
        ),
        ("kl_targets=1,x", "field 'kl_targets' must be a finite number, not 'x'"),
    ],
)
def test_a_wrong_assignment_is_refused(assignment: str, message: str) -> None:
    with pytest.raises(InputError) as refusal:
        build_config(assignments=[assignment])
    assert message in str(refusal.value)
    assert str(refusal.value).startswith(f"--set {assignment}: ")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("K = 6.5", "field 'K' must be a whole number, not 6.5"),
        ("K = true", "field 'K' must be a whole number, not True"),
        ("learning_rate = false", "field 'learning_rate' must be a finite number, not False"),
        ("learning_rate = inf", "field 'learning_rate' must be a finite number, not inf"),
        ("prompts = 3", "field 'prompts' must be a text, not 3"),
        ("K = [3]", "field 'K' must be a whole number, not [3]"),
        ("kl_control = 1", "field 'kl_control' must be one of decay, reward, lr, none, not 1"),
        ("reward = [1]", "field 'reward' must be a text, not 1"),
        ("[kl]\ncontroll = 1", "unknown key 'kl.controll'; did you mean 'kl_control'?"),
        ("K 6", "not valid TOML"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text(line + "\n")
    with pytest.raises(InputError) as refusal:
        build_config(path)
    assert str(refusal.value).startswith(f"{path}: ")
    assert message in str(refusal.value)


def test_a_missing_file_and_a_file_of_bytes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        build_config(tmp_path / "absent.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not valid TOML"):
        read_toml(tmp_path / "bytes.toml")


def test_a_wrong_flag_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"--lora-rank: field 'lora_rank' must be a whole number"):
        typed_flags(RewardTrainConfig, {"lora_rank": "x"})


def test_whole_floats_are_whole_numbers() -> None:
    assert build_config(flags={"K": 4.0, "seed": "7"}) == TrainConfig(K=4, seed=7)


KINDS = field_types(TrainConfig)
COUNTS = [name for name, kind in KINDS.items() if kind is int and name not in AT_LEAST_ZERO]
NOT_NEGATIVE = [name for name in KINDS if name in AT_LEAST_ZERO]
OUT_OF_RANGE: list[tuple[str, dict[str, Any]]] = [
    *((name, {name: 0}) for name in COUNTS),
    *((name, {name: 0.0}) for name in KINDS if name in POSITIVE),
    *((name, {name: -1}) for name in NOT_NEGATIVE),
    ("K", {"K": 1}),
    ("clip_range", {"clip_range": 0.0}),
    ("clip_range", {"clip_range": 1.0}),
    ("reward_alpha", {"reward_alpha": -0.1}),
    ("reward_alpha", {"reward_alpha": 1.0}),
    ("kl_targets", {"kl_targets": ()}),
    ("kl_targets", {"kl_targets": (0.1, 0.0)}),
    ("kl_phases", {"kl_phases": (1.0, 1.0)}),
    ("kl_phases", {"kl_phases": (1.0, 0.0, 1.0)}),
    ("kl_beta_min", {"kl_beta_min": 0.0}),
    ("kl_beta_min", {"kl_beta_min": 11.0}),
    ("kl_beta_min", {"kl_beta_max": 9.0}),
    ("kl_lr_min", {"kl_lr_min": 0.0}),
    ("kl_lr_min", {"kl_lr_min": 1.0}),
    ("reward_weights", {"reward_weights": (1.0,)}),
    ("rm_model", {"rm_model": "none"}),
]


@pytest.mark.parametrize(("field", "values"), OUT_OF_RANGE)
def test_a_value_out_of_range_is_refused_by_flag(field: str, values: dict[str, Any]) -> None:
    flag = field if field == "K" else field.replace("_", "-")
    with pytest.raises(InputError, match=f"^--{flag}: must be .+, not ") as refusal:
        check(replace(TrainConfig(), **values))
    assert str(refusal.value).endswith(repr(getattr(replace(TrainConfig(), **values), field)))


@pytest.mark.parametrize(
    "values",
    [
        {"K": 2},
        {"reward_alpha": 0.0},
        {"kl_targets": (0.1,)},
        {"kl_phases": (1.0, 2.0, 3.0)},
        {"kl_beta": 0.1, "kl_beta_max": 0.1},
        {"rm_model": "none", "reward": ("m:f",)},
        {"reward": ("m:f",), "reward_weights": (-1.0,)},
        dict.fromkeys(NOT_NEGATIVE, 0),
    ],
)
def test_values_at_the_edge_are_accepted(values: dict[str, Any]) -> None:
    check(replace(TrainConfig(), **values))


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5])
def test_a_reward_model_needs_held_out_and_training_prompts(fraction: float) -> None:
    check_ranges(RewardTrainConfig(valid_fraction=0.0))
    with pytest.raises(InputError, match="--test-fraction: must be between 0 and 1"):
        check_ranges(RewardTrainConfig(test_fraction=fraction))


@pytest.mark.parametrize("fraction", [1.0, -0.5])
def test_the_share_that_chooses_the_weights_leaves_some_to_train_on(fraction: float) -> None:
    with pytest.raises(InputError, match="--valid-fraction: must be at least 0 and below 1"):
        check_ranges(RewardTrainConfig(valid_fraction=fraction))


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"K": 3, "learning_rate": 1e-06, "kl_targets": (0.3, 1e-7), "kl_beta": 0.1 + 0.2},
        {"reward": ("a.py:f", "m:g"), "reward_weights": (0.5, 2.0), "rm_model": "none"},
        {"output": 'C:\\runs\\"mine"\t#1', "prompts": "données/été.jsonl"},
        {"output": "runs/\N{SPARKLES}\x7f"},
    ],
)
def test_a_written_configuration_reads_back_the_same(
    tmp_path: Path, values: dict[str, Any]
) -> None:
    config = replace(TrainConfig(), **values)
    path = tmp_path / "config.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    assert build_config(path) == config


def test_the_written_configuration_explains_each_field() -> None:
    text = " ".join(to_toml(TrainConfig()).replace("#", " ").split())
    for help_text in field_help(TrainConfig).values():
        assert " ".join(help_text.split()) in text


@pytest.mark.parametrize("cls", [TrainConfig, RewardTrainConfig])
def test_every_field_has_help(cls: type) -> None:
    help_texts = field_help(cls)
    assert list(help_texts) == [f.name for f in fields(cls)]
    assert all(text.strip().endswith(".") for text in help_texts.values())
