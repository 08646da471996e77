"""What comes from elsewhere is bounded: pipes, sizes, nesting, counts."""

import json
import os
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_grpo.convert.source import locate
from mlx_grpo.convert.tensors import tensor_files
from mlx_grpo.core.errors import InputError
from mlx_grpo.core.limits import read_bounded, time_limit
from mlx_grpo.data.prompts import read_prompts
from mlx_grpo.files.atomic import read_json
from mlx_grpo.files.safetensors import safetensors_header
from mlx_grpo.models.backbone import load_backbone
from mlx_grpo.models.directory import load_lazily
from tests.helpers import sources
from tests.helpers.tiny import write_model


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    """A test that waits for ever ends with a failure."""
    with time_limit(60):
        yield


def test_a_block_is_ended_on_time_and_the_alarm_is_off_afterwards() -> None:
    with pytest.raises(TimeoutError, match=r"not done within 0\.05 s"), time_limit(0.05):
        while True:
            pass
    with time_limit(0.05):
        pass
    time.sleep(0.1)


@pytest.mark.parametrize("read", [read_json, safetensors_header, read_prompts])
def test_a_pipe_in_the_place_of_a_file_is_refused_not_waited_for(
    tmp_path: Path, read: Callable[[Path], Any]
) -> None:
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(InputError, match=f"{place}: a pipe or a device; give a regular file"):
            read(place)


@pytest.mark.parametrize(
    "name",
    [
        *("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"),
        *("model.safetensors", "model-00002-of-00002.safetensors", "chat_template.jinja"),
    ],
)
def test_a_pipe_in_a_model_directory_is_refused_not_waited_for(tmp_path: Path, name: str) -> None:
    model = write_model(tmp_path / "model")
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    with pytest.raises(InputError, match=r"a pipe or a device|config\.json is missing"):
        load_backbone(model)


def test_a_file_larger_than_any_of_its_kind_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "small").write_bytes(b"12345")
    assert read_bounded(tmp_path / "small", 5) == b"12345"
    with pytest.raises(InputError, match="small: larger than"):
        read_bounded(tmp_path / "small", 4)
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(1 << 40)  # a hole: it takes no space
    with pytest.raises(InputError, match=r"large\.json: larger than 268 MB"):
        read_json(tmp_path / "large.json")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, '{"a": ' + "9" * 5000 + "}"])
def test_json_that_python_cannot_hold_is_a_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "deep.json").write_text(text)
    with pytest.raises(InputError, match=r"deep\.json: not valid JSON"):
        read_json(tmp_path / "deep.json")
    (tmp_path / "deep.safetensors").write_bytes(len(text).to_bytes(8, "little") + text.encode())
    with pytest.raises(InputError, match=r"not a whole safetensors file"):
        safetensors_header(tmp_path / "deep.safetensors")


@pytest.mark.parametrize(
    ("header", "complaint"),
    [
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}, "outside of the data"),
        ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}, "outside of the data"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4]}}, "not a whole"),
    ],
)
def test_offsets_of_a_header_stay_inside(
    tmp_path: Path, header: dict[str, Any], complaint: str
) -> None:
    text = json.dumps(header).encode()
    file = tmp_path / "m.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 8)
    with pytest.raises(InputError, match=complaint):
        safetensors_header(file)


def test_a_header_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    with file.open("wb") as f:
        f.write((1 << 33).to_bytes(8, "little"))
        f.truncate(1 << 34)
    with pytest.raises(InputError, match=r"header of 8,589,934,592 bytes"):
        safetensors_header(file)


@pytest.mark.parametrize("count", [2_000, 10**9, 1e12])
@pytest.mark.parametrize("nested", [False, True])
def test_a_model_of_countless_layers_is_refused_before_it_is_built(
    tmp_path: Path, count: float, nested: bool
) -> None:
    model = write_model(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    changed = {"text_config": {"num_hidden_layers": count}} if nested else {}
    config |= changed or {"num_hidden_layers": count}
    (model / "config.json").write_text(json.dumps(config))
    for load in (load_lazily, convert):
        with pytest.raises(
            InputError, match=r"field 'num_hidden_layers' is .*; a model has at most"
        ):
            load(model)


def convert(model: Path) -> None:
    from mlx_grpo.convert.reader import open_source

    open_source(locate(str(model)), None, model.parent)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """A checkpoint in PyTorch's format."""
    pytest.importorskip("torch")
    sources.causal(tmp_path / "bin", "llama")
    sources.pickle(tmp_path / "bin")
    return tmp_path / "bin" / "pytorch_model.bin"


def test_an_archive_that_unpacks_to_more_than_it_is_is_refused(archive: Path) -> None:
    bomb = archive.with_name("bomb.zip")
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.infolist():
            new.writestr(member.filename, old.read(member))
        new.writestr("archive/data/999", b"\0" * (50 << 20))
    shutil.move(bomb, archive)
    with pytest.raises(InputError, match=r"pytorch_model\.bin: unpacks to \d+,.* bytes"):
        tensor_files(archive.parent, "model", archive.parent)


def test_tensors_larger_than_what_is_stored_of_them_are_refused(archive: Path) -> None:
    import torch

    huge = torch.zeros(1).expand(1 << 20, 1 << 20)  # four terabytes in four bytes
    shared = torch.zeros(1 << 16)
    for content in ({"a": huge}, {f"t{i}": shared for i in range(1000)}):
        torch.save(content, archive)
        with pytest.raises(InputError, match=r"\.bin: tensor '.*' is larger than what"):
            tensor_files(archive.parent, "model", archive.parent)
    tied = torch.zeros(1 << 16)
    torch.save({"embed": tied, "head": tied}, archive)
    (found,) = tensor_files(archive.parent, "model", archive.parent)
    assert set(mx.load(str(found.path))) == {"embed", "head"}
