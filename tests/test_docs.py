"""The documentation is true: pages of flags are current, commands that are shown run, links lead
somewhere.

A fence ```sh is run, line by line, in one directory per file, on tiny models in the places that the
text names; iterations and lengths are cut short. A fence ```sh (reason) is not run.
"""

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import pytest

from docs.generate import PAGES, commands, page
from mlx_grpo import cli
from tests.helpers.paths import WITHOUT_TORCH
from tests.helpers.tiny import write_jsonl, write_model

ROOT = Path(__file__).parent.parent
FILES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
REASONS = (
    "needs a network",
    "trains a real model",
    "runs until stopped",
    "needs a checkout",
    "installs",
)
SHORT = {
    "train": "--num-iterations 2 --batch-size 4 --minibatch-size 2 --K 2 --max-completion-length 6"
    " --lora-rank 2 --eval-every 1 --eval-limit 4",
    "convert": "--group-size 32 --force",
    "mlx_lm.lora": "--iters 2 --batch-size 2 --num-layers 1 --val-batches 1",
    "mlx_lm.generate": "--max-tokens 4",
}
"""Put behind a command, where the last of two equal flags counts."""


SHORT_ANSWERS = "def short(completions):\n    return [-len(text) for text in completions]\n"


@dataclass(frozen=True)
class Fence:
    """A block of code in a text."""

    place: str
    language: str
    reason: str
    """Why it is not run."""
    body: str


def fences(file: Path) -> Iterator[Fence]:
    text = file.read_text(encoding="utf-8")
    for m in re.finditer(r"^```(\w*) ?(?:\((.*)\))?\n(.*?)^```$", text, re.M | re.S):
        line = text[: m.start()].count("\n") + 1
        yield Fence(f"{file.relative_to(ROOT)}:{line}", m[1], m[2] or "", m[3])


def shell_lines(body: str) -> list[str]:
    """Commands of a block, continued lines joined, comments dropped."""
    joined = body.replace("\\\n", " ")
    return [c for line in joined.splitlines() if (c := re.sub(r"(^|\s)# .*$", "", line).strip())]


@pytest.mark.parametrize("name", commands())
def test_the_flags_of_each_page_are_those_of_the_program(name: str) -> None:
    now = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    assert page(name, commands()[name], now) == now, "run: python docs/generate.py"


def test_no_page_is_of_a_command_that_is_gone() -> None:
    assert {f.stem for f in PAGES.glob("*.md")} == set(commands())


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_links_lead_to_files_and_headings_that_are_there(file: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", file.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        path, _, heading = target.partition("#")
        linked = (file.parent / path) if path else file
        assert linked.exists(), f"{file.name}: {target}"
        if heading:
            titles = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.M)
            anchors = {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles}
            assert heading in anchors, f"{file.name}: {target}"


def test_pictures_are_there_and_small_and_no_other_is_kept() -> None:
    shown = {
        (file.parent / target).resolve()
        for file in FILES
        for target in re.findall(r"[\w/.-]+\.(?:png|svg)\b", file.read_text(encoding="utf-8"))
    }
    kept = set((ROOT / "docs" / "img").iterdir())
    assert shown == kept
    sizes = [picture.stat().st_size for picture in kept]
    assert max(sizes) < 150_000 and sum(sizes) < 1_000_000


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_files_of_the_repository_that_are_named_are_there(file: Path) -> None:
    named = r"\b((?:mlx_grpo|tests|bench|docs|examples|data)/[\w/.-]+\.(?:py|md|jsonl|toml))\b"
    for path in re.findall(named, file.read_text(encoding="utf-8")):
        assert (ROOT / path).exists(), f"{file.name}: {path}"


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_a_command_stands_in_a_fence_that_is_run_or_says_why_not(file: Path) -> None:
    for fence in fences(file):
        if fence.language == "sh":
            assert not fence.reason or fence.reason.startswith(REASONS), fence.place
        else:
            assert not re.search(r"^(mlx-grpo|mlx_lm|make|pip|python) ", fence.body, re.M), (
                f"{fence.place}: commands belong into a ```sh fence"
            )


@pytest.fixture(scope="module")
def template(
    finished_run: Path,
    sft: Path,
    reward_model: Path,
    pair_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A directory with everything the texts speak of."""
    root = tmp_path_factory.mktemp("docs")
    write_model(root / "my-model")
    write_model(root / "my-reward-model", seed=1)
    head = {"weight": mx.random.normal((1, 32), key=mx.random.key(3))}
    mx.save_safetensors(str(root / "my-reward-model" / "reward_head.safetensors"), head)
    write_model(root / "weights" / "sft-4bit")
    shutil.copytree(reward_model, root / "weights" / "rm-4bit")
    rows = [{"prompt": f"say {w}", "response": f"{w}."} for w in ("tea", "rain", "bees", "figs")]
    names = ["prompts.jsonl", "held_out.jsonl", "fresh.jsonl"]
    names += ["data/rl_prompts.jsonl", "data/eval_prompts.jsonl", "sft/train.jsonl"]
    for name in [*names, "sft/valid.jsonl"]:
        (root / name).parent.mkdir(exist_ok=True)
        chat = [
            {"messages": [_turn("user", r["prompt"]), _turn("assistant", r["response"])]}
            for r in rows
        ]
        write_jsonl(root / name, chat if name.startswith("sft/") else rows)
    (root / "my_rewards.py").write_text(SHORT_ANSWERS)
    shutil.copytree(ROOT / "examples", root / "examples")
    for name in ("pairs.jsonl", "data/preference_pairs.jsonl"):
        shutil.copyfile(pair_file, root / name)
    shutil.copytree(finished_run, root / "runs" / "seed-42")
    return root


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


RUN_FILES = [f for f in FILES if any(x.language in ("sh", "python") for x in fences(f))]


@pytest.mark.parametrize("file", RUN_FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_every_command_that_is_shown_runs(
    file: Path, template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = tmp_path / "d"
    shutil.copytree(template, where)
    monkeypatch.chdir(where)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for fence in fences(file):
        if fence.reason:
            continue
        if fence.language == "python":
            code = re.sub(r"(num_iterations|max_completion_length)=\d+", r"\1=2", fence.body)
            (where / "example.py").write_text(code)
            shell(f"{sys.executable} example.py", fence.place)
        for line in shell_lines(fence.body) if fence.language == "sh" else ():
            run(line, fence.place, monkeypatch)


def run(line: str, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line as a user types it; this program in this process, which saves its start."""
    program, *arguments = shlex.split(line)
    if program == "mlx-grpo":
        if "--resume" not in arguments:
            arguments += SHORT.get(arguments[0], "").split()
        monkeypatch.setattr(sys, "argv", ["mlx-grpo", *arguments])
        with contextlib.redirect_stdout(None):
            assert cli.main() == 0, f"{place}: {line}"
    elif program.startswith("mlx_lm."):
        module = f"-m mlx_lm {program.removeprefix('mlx_lm.')}"
        rest = f"{line.split(' ', 1)[1]} {SHORT.get(program, '')}"
        shell(f"{sys.executable} {module} {rest}", place)
    else:
        shell(line, place)


def shell(line: str, place: str) -> None:
    packages = f"{WITHOUT_TORCH}{os.pathsep}{ROOT}"  # of this checkout, not what is installed
    path = {"PYTHONPATH": packages, "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    done = subprocess.run(
        line, shell=True, capture_output=True, text=True, timeout=300, env={**os.environ, **path}
    )
    assert done.returncode == 0, f"{place}: {line}\n{done.stderr[-2000:]}"
