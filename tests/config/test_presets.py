"""Every preset is a configuration that works; --config takes its name."""

from pathlib import Path

import pytest

from mlx_grpo.config.presets import PRESETS, config_file, preset_names
from mlx_grpo.config.sources import build_config
from mlx_grpo.core.errors import InputError


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_is_accepted_by_its_name_and_says_how_its_time_was_planned(name: str) -> None:
    assert build_config(Path(name)) == build_config(PRESETS / f"{name}.toml")
    assert (
        "mlx-grpo plan --config" in (PRESETS / f"{name}.toml").read_text()
        or "planned" in (PRESETS / f"{name}.toml").read_text()
    )


def test_the_presets_that_the_documentation_names_are_there() -> None:
    assert {"gsm8k", "constraints", "gemma-2b-reference", "qwen3.5-0.8b-16gb"} <= {*preset_names()}


def test_a_file_of_that_name_wins_over_the_preset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gsm8k").write_text("K = 3\n")
    assert build_config(Path("gsm8k")).rollout.K == 3


@pytest.mark.parametrize("given", ["gsm9k", "presets/gsm8k", "gsm8k.toml"])
def test_an_unknown_preset_is_refused_with_those_that_there_are(given: str) -> None:
    with pytest.raises(InputError, match=rf"{given}: no such file, and no preset.*gsm8k"):
        config_file(Path(given))
