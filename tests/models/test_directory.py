"""A model directory is read as one model, or not at all."""

import shutil
from pathlib import Path

import pytest

from mlx_grpo.core.errors import InputError
from mlx_grpo.models.directory import load_lazily


@pytest.mark.parametrize("copy", ["model-old.safetensors", "model.bak.safetensors"])
def test_a_second_file_of_the_same_weights_is_refused(copy: str, sft: Path, tmp_path: Path) -> None:
    shutil.copytree(sft, tmp_path / "sft")
    load_lazily(tmp_path / "sft")
    shutil.copy(tmp_path / "sft" / "model.safetensors", tmp_path / "sft" / copy)
    with pytest.raises(InputError, match=r"tensor '.+' is in model\S+ too; move the file"):
        load_lazily(tmp_path / "sft")
