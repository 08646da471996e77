"""Flags win over the file; every mistake is named with its place and a remedy."""

import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from mlx_grpo.config.checks import AT_LEAST_ZERO, POSITIVE, check, check_reward_training
from mlx_grpo.config.settings import (
    SETTINGS,
    RewardTrainConfig,
    TrainConfig,
    flat_values,
    train_config,
)
from mlx_grpo.config.sources import (
    build_config,
    field_help,
    read_toml,
    setting_help,
    setting_types,
    to_toml,
    typed_flags,
)
from mlx_grpo.core.errors import InputError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text('K = 8\nseed = 1\nepochs = 2\n[kl]\ncontrol = "lr"\nlr-max = 0.5\n')
    return path


def test_flags_win_over_the_file(file: Path) -> None:
    config = build_config(file, {"seed": "3"})
    assert (config.rollout.K, config.optimizer.epochs, config.run.seed) == (8, 2, 3)
    assert config.data.batch_size == TrainConfig().data.batch_size


def test_without_anything_the_defaults_hold() -> None:
    assert build_config() == TrainConfig()


def test_a_table_and_a_prefix_mean_the_same(file: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat.toml"
    flat.write_text('K = 8\nseed = 1\nepochs = 2\nkl_control = "lr"\nkl.lr_max = 0.5\n')
    assert build_config(file) == build_config(flat)
    assert build_config(file).kl.control == "lr"


@pytest.mark.parametrize(
    "text",
    [
        "[evaluation]\nevery = 7",
        "[evaluation]\neval_every = 7",
        "[eval]\nevery = 7",
        "[anything]\neval_every = 7",
        "evaluation.every = 7",
        "eval_every = 7",
        "eval-every = 7",
    ],
)
def test_a_setting_is_read_by_its_section_or_by_its_flag(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text + "\n")
    assert build_config(path).evaluation.every == 7


def test_lists_come_from_arrays_and_from_commas(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("kl_targets = [0.5, 1]\n")
    assert build_config(path).kl.targets == (0.5, 1.0)
    assert build_config(flags={"kl_targets": "0.5,1"}).kl.targets == (0.5, 1.0)
    assert build_config(flags={"kl_targets": 0.5}).kl.targets == (0.5,)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("K", "six", "--K: must be a whole number, not 'six'"),
        ("K", "6.5", "--K: must be a whole number, not '6.5'"),
        ("learning_rate", "fast", "--learning-rate: must be a finite number, not 'fast'"),
        ("learning_rate", "nan", "--learning-rate: must be a finite number, not 'nan'"),
        ("learning_rate", "inf", "--learning-rate: must be a finite number, not 'inf'"),
        ("kl_control", "best", "--kl-control: must be one of decay, reward, lr, none, not 'best'"),
        ("kl_targets", "1,x", "--kl-targets: must be a finite number, not 'x'"),
        (
            "K",
            "1" + 50 * "0",
            f"--K: must be a number that 64-bit integers can hold, not 1{39 * '0'}",
        ),
        (
            "seed",
            str(2**63),
            f"--seed: must be a number that 64-bit integers can hold, not {2**63}",
        ),
        (
            "lora_scale",
            "1e39",
            "--lora-scale: must be a number that 32-bit floats can hold, not 1e+39",
        ),
        (
            "temperature",
            "1e-40",
            "--temperature: must be a number that 32-bit floats can hold, not 1e-40",
        ),
        ("output", "runs/\udcff", "--output: must be a text in UTF-8, not 'runs/\\udcff'"),
        ("reward", ["a:\udcff"], "--reward: must be a text in UTF-8, not 'a:\\udcff'"),
    ],
)
def test_a_wrong_value_is_refused_by_flag(name: str, value: str, message: str) -> None:
    with pytest.raises(InputError) as refusal:
        build_config(flags={name: value})
    assert str(refusal.value) == message


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("K = 6.5", "K: must be a whole number, not 6.5"),
        ("K = true", "K: must be a whole number, not True"),
        ("learning_rate = false", "learning_rate: must be a finite number, not False"),
        ("learning_rate = inf", "learning_rate: must be a finite number, not inf"),
        ("prompts = 3", "prompts: must be a text, not 3"),
        ("K = [3]", "K: must be a whole number, not [3]"),
        ("kl_control = 1", "kl_control: must be one of decay, reward, lr, none, not 1"),
        ("reward = [1]", "reward: must be a text, not 1"),
        ("[kl]\ncontroll = 1", "unknown setting 'kl.controll'; did you mean 'kl_control'?"),
        ("clip_rnage = 0.1", "unknown setting 'clip_rnage'; did you mean 'clip_range'?"),
        ("zzzzz = 1", "unknown setting 'zzzzz'; see mlx-grpo train --help"),
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


@pytest.mark.parametrize(
    "content", ["a = " + "[" * 100_000, "seed = " + "9" * 10_000], ids=["nesting", "digits"]
)
def test_a_file_without_end_of_some_kind_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "endless.toml").write_text(content)
    with pytest.raises(InputError, match=r"endless\.toml: not valid TOML"):
        read_toml(tmp_path / "endless.toml")


def test_a_device_and_a_pipe_are_refused_and_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.toml")
    for place in (tmp_path / "pipe.toml", Path("/dev/zero")):
        with pytest.raises(InputError, match="a pipe or a device; give a regular file"):
            read_toml(place)


def test_a_file_from_windows_is_read(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_bytes(b"\xef\xbb\xbfK = 5\r\nseed = 3\r\n")
    assert build_config(tmp_path / "run.toml") == train_config(K=5, seed=3)


def test_a_wrong_flag_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"--lora-rank: must be a whole number"):
        typed_flags(RewardTrainConfig, {"lora_rank": "x"})


def test_whole_floats_are_whole_numbers() -> None:
    assert build_config(flags={"K": 4.0, "seed": "7"}) == train_config(K=4, seed=7)


KINDS = setting_types()
COUNTS = [name for name, kind in KINDS.items() if kind is int and name not in AT_LEAST_ZERO]
NOT_NEGATIVE = [name for name in KINDS if name in AT_LEAST_ZERO]
OUT_OF_RANGE: list[tuple[str, dict[str, Any]]] = [
    *((name, {name: 0}) for name in COUNTS),
    *((name, {name: 0.0}) for name in KINDS if name in POSITIVE),
    *((name, {name: -1}) for name in NOT_NEGATIVE),
    ("K", {"K": 1}),
    ("update_rows", {"update_rows": 1}),
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
        check(train_config(**values))
    assert str(refusal.value).endswith(repr(flat_values(train_config(**values))[field]))


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
    check(train_config(**values))


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5])
def test_a_reward_model_needs_held_out_and_training_prompts(fraction: float) -> None:
    check_reward_training(RewardTrainConfig(valid_fraction=0.0))
    with pytest.raises(InputError, match="--test-fraction: must be between 0 and 1"):
        check_reward_training(RewardTrainConfig(test_fraction=fraction))


@pytest.mark.parametrize("fraction", [1.0, -0.5])
def test_the_share_that_chooses_the_weights_leaves_some_to_train_on(fraction: float) -> None:
    with pytest.raises(InputError, match="--valid-fraction: must be at least 0 and below 1"):
        check_reward_training(RewardTrainConfig(valid_fraction=fraction))


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"K": 3, "learning_rate": 1e-06, "kl_targets": (0.3, 1e-7), "kl_beta": 0.1 + 0.2},
        {"reward": ("a.py:f", "m:g"), "reward_weights": (0.5, 2.0), "rm_model": "none"},
        {"output": 'C:\\runs\\"mine"\t#1', "prompts": "données/été.jsonl"},
        {"output": "runs/\N{SPARKLES}\x7f"},
        {"seed": 2**53 + 1},
        {"seed": 2**63 - 1, "num_iterations": 2**63 - 1},
    ],
)
def test_a_written_configuration_reads_back_the_same(
    tmp_path: Path, values: dict[str, Any]
) -> None:
    config = train_config(**values)
    path = tmp_path / "config.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    assert build_config(path) == config


def test_the_written_configuration_explains_each_field() -> None:
    text = " ".join(to_toml(TrainConfig()).replace("#", " ").split())
    for help_text in setting_help().values():
        assert " ".join(help_text.split()) in text


def test_every_setting_has_help() -> None:
    assert list(setting_help()) == list(SETTINGS)
    own = field_help(RewardTrainConfig)
    assert list(own) == [f.name for f in fields(RewardTrainConfig)]
    assert all(text.strip().endswith(".") for text in (*setting_help().values(), *own.values()))


def test_flat_names_are_unique_and_every_section_is_a_table() -> None:
    sections = [f.name for f in fields(TrainConfig)]
    count = sum(len(fields(getattr(TrainConfig(), name))) for name in sections)
    assert len(SETTINGS) == count
    assert [line for line in to_toml(TrainConfig()).splitlines() if line.startswith("[")] == [
        f"[{name}]" for name in sections
    ]


def test_alpha_sets_the_scale_as_alpha_by_rank() -> None:
    model = build_config(flags={"lora_alpha": "48", "lora_rank": "8"}).model
    assert (model.lora_scale, model.lora_alpha) == (6.0, 48.0)


def test_alpha_and_a_scale_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(InputError, match=r"--lora-scale: must be 6, which is --lora-alpha / --lor"):
        build_config(flags={"lora_alpha": 48, "lora_rank": 8, "lora_scale": 2})
    with pytest.raises(InputError, match="--lora-scale: must be 3"):
        check(train_config(lora_alpha=48.0))


@pytest.mark.parametrize(
    "text",
    [
        "chat_template_kwargs = '{\"enable_thinking\": true}'",
        "chat_template_kwargs = {enable_thinking = true}",
        "[model]\nchat_template_kwargs = {enable_thinking = true}",
        "[model.chat-template-kwargs]\nenable_thinking = true",
    ],
)
def test_arguments_of_the_template_are_json_or_a_table(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.toml").write_text(text + "\n")
    found = build_config(tmp_path / "run.toml").model.chat_template_kwargs
    assert found == '{"enable_thinking": true}'


@pytest.mark.parametrize("text", ["{", "[1]", "true", '{"a": NaN}', "'x'"])
def test_arguments_of_the_template_that_are_no_json_object_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="--chat-template-kwargs: must be a JSON object"):
        build_config(flags={"chat_template_kwargs": text})


@pytest.mark.parametrize("system", [None, "", "Answer in verse."])
def test_no_system_prompt_an_empty_one_and_a_text_survive_the_file(
    tmp_path: Path, system: str | None
) -> None:
    config = train_config(system_prompt=system)
    (tmp_path / "run.toml").write_text(to_toml(config))
    assert build_config(tmp_path / "run.toml") == config


def test_rewards_that_are_normalised_each_are_not_scaled_again() -> None:
    gdpo = {"multi_objective_aggregation": "normalize_then_sum"}
    assert build_config(flags=gdpo)
    with pytest.raises(InputError, match="--scale-advantages: must be none with --multi-obj"):
        build_config(flags={**gdpo, "scale_advantages": "group"})
