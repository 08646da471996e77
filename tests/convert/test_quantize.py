"""What a conversion leaves behind: a whole directory with its card, or nothing at all."""

import errno
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_grpo.cli import main
from mlx_grpo.convert import quantize as weights
from mlx_grpo.convert.convert import convert_rm, convert_sft
from mlx_grpo.convert.quantize import Quantization
from mlx_grpo.convert.source import locate
from mlx_grpo.files.atomic import atomic_directory
from mlx_grpo.files.safetensors import load_arrays, save_arrays
from tests.helpers.gguf_writer import write_tiny
from tests.helpers.tiny import write_jsonl, write_model

PACKED = Quantization(4, 32)
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    """`mlx-grpo convert` in a directory of its own: (exit code, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        flags = ["--group-size", "32", "--output", "w", *arguments]
        monkeypatch.setattr(sys, "argv", ["mlx-grpo", "convert", *flags])
        capsys.readouterr()
        return main(), *capsys.readouterr()

    return run


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below a directory, hidden ones included."""
    files = (p for p in directory.rglob("*") if p.is_file())
    return {str(p.relative_to(directory)): p.read_bytes() for p in files}


def no_space(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", "w/model.safetensors")


def interrupted(*_: Any) -> None:
    raise KeyboardInterrupt  # what Python makes of SIGINT where it is not ignored


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("after", [0, 1, 3])
@pytest.mark.parametrize(("failure", "code"), [(no_space, 2), (interrupted, 130)])
def test_a_full_disk_or_ctrl_c_midway_leaves_what_was_there(
    failure: Callable[..., None],
    code: int,
    after: int,
    force: bool,
    sft: Path,
    tmp_path: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if force:
        assert command("--sft", str(sft), "--no-verify")[0] == 0
    before, calls = contents(tmp_path), []

    def save(path: Path, arrays: Any) -> None:
        calls.append(path)
        if len(calls) > after:
            path.write_bytes(b"half")  # as much as there was room for
            failure()
        save_arrays(path, arrays)

    monkeypatch.setattr(weights, "SHARD_BYTES", 5_000)  # several files
    monkeypatch.setattr(weights, "save_arrays", save)
    found, _, err = command("--sft", str(sft), "--no-verify", *(["--force"] if force else []))
    assert found == code and len(calls) == after + 1
    assert len(err.strip().splitlines()) == 1
    assert ("No space left" if code == 2 else "interrupted") in err
    assert contents(tmp_path) == before
    assert force or not (tmp_path / "w").exists()


def test_with_force_the_old_directory_stays_until_the_new_one_is_whole(
    sft: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = write_model(tmp_path / "other", seed=5)
    assert command("--sft", str(sft), "--no-verify")[0] == 0
    out = tmp_path / "w" / "sft-4bit"
    old, seen = contents(out), []

    def save(path: Path, arrays: Any) -> None:
        save_arrays(path, arrays)
        seen.append(contents(out) == old)

    monkeypatch.setattr(weights, "save_arrays", save)
    code, _, err = command("--sft", str(other), "--no-verify")
    assert code == 2 and "already exists" in err and contents(out) == old and not seen
    assert command("--sft", str(other), "--no-verify", "--force")[0] == 0
    assert seen == [True]
    assert contents(out).keys() == old.keys() and contents(out) != old
    assert [p.name for p in (tmp_path / "w").iterdir()] == ["sft-4bit"]


def test_force_does_not_replace_what_is_no_converted_model(
    sft: Path, tmp_path: Path, command: Command
) -> None:
    (tmp_path / "w" / "sft-4bit").mkdir(parents=True)
    (tmp_path / "w" / "sft-4bit" / "thesis.tex").write_text("mine")
    code, _, err = command("--sft", str(sft), "--no-verify", "--force")
    assert code == 2 and len(err.splitlines()) == 1 and "has no manifest.json" in err
    assert (tmp_path / "w" / "sft-4bit" / "thesis.tex").read_text() == "mine"


def test_both_sources_are_looked_at_before_either_is_converted(
    sft: Path, tmp_path: Path, command: Command
) -> None:
    code, _, err = command("--sft", str(sft), "--rm", str(sft), "--no-verify")
    assert code == 2 and "not a reward model" in err
    assert not (tmp_path / "w").exists()


def test_a_group_that_does_not_divide_a_layer_is_refused(
    sft: Path, tmp_path: Path, command: Command
) -> None:
    code, _, err = command("--sft", str(sft), "--no-verify", "--group-size", "64")
    assert code == 2 and len(err.splitlines()) == 1
    assert re.search(r"layer '\S+' is 32 wide, which --group-size 64 does not divide; choose", err)
    assert not (tmp_path / "w").exists()


def test_a_source_that_is_quantized_already_is_kept_and_said_to_be(
    sft: Path, tmp_path: Path, command: Command
) -> None:
    assert command("--sft", str(sft), "--no-verify", "--bits", "8")[0] == 0
    code, _, err = command("--sft", "w/sft-8bit", "--no-verify")
    assert code == 0 and "the source is quantized already and was kept as it is" in err
    names = ("sft-4bit", "sft-8bit")
    kept, source = (load_arrays(tmp_path / "w" / n / "model.safetensors") for n in names)
    assert kept.keys() == source.keys()
    assert all(mx.array_equal(kept[n], source[n]).item() for n in source)


def test_what_a_quantized_source_left_whole_stays_whole(
    sft: Path, tmp_path: Path, command: Command
) -> None:
    assert command("--sft", str(sft), "--no-verify", "--bits", "8")[0] == 0
    made = tmp_path / "w" / "sft-8bit"
    arrays = load_arrays(made / "model.safetensors")
    layer = "model.layers.0.mlp.up_proj"
    packed = [arrays.pop(f"{layer}.{leaf}") for leaf in ("weight", "scales", "biases")]
    arrays[f"{layer}.weight"] = mx.dequantize(*packed, group_size=32, bits=8)
    save_arrays(made / "model.safetensors", arrays)
    (made / "manifest.json").unlink()  # as mlx-lm writes it, whose loader goes by the scales
    assert command("--sft", "w/sft-8bit", "--no-verify")[0] == 0
    kept = load_arrays(tmp_path / "w" / "sft-4bit" / "model.safetensors")
    assert kept.keys() == arrays.keys()
    assert all(mx.array_equal(kept[n], arrays[n]).item() for n in arrays)


def test_without_texts_it_measures_on_those_that_ship_wherever_it_runs(
    sft: Path, tmp_path: Path, command: Command
) -> None:
    code, _, err = command("--sft", str(sft))
    assert code == 0, err
    assert re.search(r"KL 0\.\d+ nats/token", (tmp_path / "w/sft-4bit/README.md").read_text())


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--sft", "{sft}", "--texts", "no.jsonl"), r"no\.jsonl: no such file; give --texts FILE"),
        (("--rm", "{sft}", "--pairs", "no.jsonl"), r"no\.jsonl: no such file; give --pairs FILE"),
        (("--sft", "{sft}", "--texts", "one.jsonl"), r"one\.jsonl: 1 rows have a 'response', two"),
        (
            ("--rm", "{sft}", "--pairs", "one.jsonl"),
            r"one\.jsonl:1: field 'chosen' is missing; the row has",
        ),
        (("--sft", "{sft}", "--bits", "3"), r"--bits: must be 4, 8 or 16, not 3"),
        (("--sft", "{sft}", "--group-size", "48"), r"--group-size: must be 32, 64 or 128, not 48"),
        (("--sft", "{sft}", "--rm-as", "lora"), r"--rm-as: must be auto, full or adapter, not 'lo"),
        (("--rm", "./gone", "--sft", "{sft}", "--no-verify"), r"\./gone: no such directory"),
    ],
)
def test_a_wrong_flag_is_told_before_anything_is_written(
    arguments: tuple[str, ...], complaint: str, sft: Path, tmp_path: Path, command: Command
) -> None:
    write_jsonl(tmp_path / "one.jsonl", [{"prompt": "a", "response": "b"}])
    code, _, err = command(*(a.format(sft=sft) for a in arguments))
    assert code == 2 and re.match(rf"error: {complaint}", err), err
    assert not (tmp_path / "w").exists()


def test_the_table_has_what_it_cost(
    sft: Path, tmp_path: Path, command: Command, prompt_files: tuple[Path, Path], pair_file: Path
) -> None:
    rm = shutil.copytree(sft, tmp_path / "reward")
    write_head(rm)
    measured = ("--texts", str(prompt_files[1]), "--pairs", str(pair_file))
    code, out, err = command("--sft", str(sft), "--rm", str(rm), "--rm-as", "full", *measured)
    assert code == 0, err
    words = " ".join(re.sub(r"[│┃|]", " ", out).split())
    for column in ("directory", "form", "parameters", "bits/weight", "size", "what it cost"):
        assert column in words, column
    assert re.search(r"KL 0\.\d{4}", words) and re.search(r"perplexity [+-]\d+\.\d%", words)
    assert "Pearson" in words and "Spearman" in words and "ordered alike" in words


def write_head(directory: Path) -> None:
    """Make a language model a reward model."""
    import mlx.core as mx

    head = {"weight": mx.random.normal((1, 32), key=mx.random.key(3))}
    save_arrays(directory / "reward_head.safetensors", head)


def test_the_card_says_where_it_comes_from_and_no_local_path(
    sft: Path, tmp_path: Path, prompt_files: tuple[Path, Path], pair_file: Path
) -> None:
    source = Path(shutil.copytree(sft, tmp_path / "my-model"))
    (source / "README.md").write_text("---\ntags: [x]\nlicense: apache-2.0\n---\nA model.\n")
    row = convert_sft(locate(str(source)), tmp_path / "w" / "sft-4bit", PACKED, prompt_files[1])
    write_head(source)
    full = convert_rm(
        locate(str(source)), tmp_path / "w" / "rm-4bit", sft, PACKED, pair_file, "full"
    )
    for converted in (row, full):
        card = (converted.path / "README.md").read_text()
        assert card.startswith("---\nlibrary_name: mlx\nlicense: apache-2.0\n---\n")
        assert "| source | `my-model` |" in card and "| licence | apache-2.0 |" in card
        assert "| architecture | llama |" in card
        assert f"| what it cost | {converted.cost.describe()} |" in card
        assert f"| bits per weight | {converted.bits_per_weight:.2f} |" in card
        assert re.search(r"mlx-grpo \d+\.\d+.*, mlx \d+\.\d+.*, mlx-lm \d+\.\d+", card)
        assert "mlx-grpo train" in card and converted.path.name in card
        assert str(tmp_path) not in card and "/tmp" not in card


def test_a_licence_file_or_metadata_serves_where_there_is_no_card(
    sft: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(sft, tmp_path / "my-model"))
    (source / "LICENSE").write_text("\n  MIT License\n\nCopyright\n")
    write_tiny(tmp_path / "m.gguf", "F16", **{"general.license": "mit"})
    sources = {"named": source, "unknown": sft, "gguf": tmp_path / "m.gguf"}
    cards = {}
    for name, place in sources.items():
        convert_sft(locate(str(place)), tmp_path / name, PACKED, None)
        cards[name] = (tmp_path / name / "README.md").read_text()
    assert "| licence | MIT License |" in cards["named"]
    assert "| licence | unknown: ask where the source came from |" in cards["unknown"]
    assert "| licence | mit |" in cards["gguf"] and "`m.gguf`" in cards["gguf"]
    assert all("not measured" in card for card in cards.values())


def test_a_directory_that_appears_meanwhile_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with (
        pytest.raises(ValueError, match="already exists"),
        atomic_directory(tmp_path / "out"),
    ):
        pass
    assert contents(tmp_path) == {"out/mine": b"mine"}
