"""Bad input through the real command: exit code 2, one line that names place and remedy, no file
touched."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_grpo.cli import main
from tests.helpers.paths import WITHOUT_TORCH
from tests.helpers.tiny import write_jsonl, write_model, write_tokenizer

GOOD_LINES = "".join(f'{{"prompt": "say {i}"}}\n' for i in range(16))
NO_TEMPLATE = r"^error: \S*bare/tokenizer_config\.json: no chat template; use an instruction-tuned"
TRAIN = (
    *("train", "--actor-model", "{sft}", "--rm-model", "{rm}", "--prompts", "{prompts}"),
    *("--eval-prompts", "{held_out}", "--output", "runs/one", "--num-iterations", "2"),
    *("--batch-size", "2", "--K", "2", "--max-completion-length", "4", "--lora-rank", "2"),
)
CONVERT = ("convert", "--no-verify", "--group-size", "32", "--output", "weights")
TRAIN_RM = ("train-rm", "--model", "{sft}", "--output", "weights/rm", "--pairs")


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def process(inputs: dict[str, str], tmp_path: Path) -> Run:
    """The command as a user types it, in a directory of its own: (exit code, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        given = {k: v for k, v in os.environ.items() if k not in ("FORCE_COLOR", "LD_PRELOAD")}
        site = {"PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [sys.executable, "-m", "mlx_grpo", *(a.format(**inputs) for a in arguments)],
            cwd=tmp_path,
            env={**given, **site, "PYTHONPATH": WITHOUT_TORCH},
            capture_output=True,
            text=True,
            timeout=120,
        )
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.fixture
def entry_point(
    inputs: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    """The same entry point in this process, for cases that differ from one of a process in a file
    or a flag only: a process start costs seconds."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "dont_write_bytecode", True)
        monkeypatch.setattr(sys, "argv", ["mlx-grpo", *(a.format(**inputs) for a in arguments)])
        return main(), *capsys.readouterr()

    return run


def snapshot(where: Path) -> dict[str, bytes | None]:
    """Everything below a directory, with the contents of files."""
    return {
        str(p.relative_to(where)): p.read_bytes() if p.is_file() else None for p in where.rglob("*")
    }


@pytest.fixture(scope="session")
def inputs(
    sft: Path,
    reward_model: Path,
    prompt_files: tuple[Path, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, str]:
    """Values for the {names} in the arguments of the cases."""
    directory = tmp_path_factory.mktemp("inputs")
    bare = write_model(directory / "bare")
    write_tokenizer(bare, chat_template=None)
    return {
        "sft": str(sft),
        "rm": str(reward_model),
        "prompts": str(prompt_files[0]),
        "held_out": str(prompt_files[1]),
        "other": str(write_model(directory / "other", seed=1)),
        "bare": str(bare),
    }


def refused(run: Run, where: Path, arguments: tuple[str, ...], complaint: str) -> None:
    """Assert the whole contract of bad input."""
    before = snapshot(where)
    code, out, err = run(*arguments)
    lines = [line for line in err.splitlines() if line.strip()]
    assert "Traceback" not in out + err
    assert (code, len(lines)) == (2, 1), err
    assert lines[0].startswith("error: ")
    assert re.search(complaint, lines[0]), lines[0]
    assert snapshot(where) == before


PROMPT_FILES = {
    "an empty prompt": ('{"prompt": " "}\n', r"p\.jsonl:1: field 'prompt' must be a text"),
    "a prompt that is a number": ('{"prompt": 5}\n', r"p\.jsonl:1: field 'prompt' must be a text"),
    "no prompt": ('{"text": "hi"}\n', r"p\.jsonl:1: field 'prompt' is missing \(or 'messages'\)"),
    "an id twice": (
        '{"id": "a", "prompt": "x"}\n{"id": "b", "prompt": "y"}\n{"id": "a", "prompt": "z"}\n',
        r"p\.jsonl:3: field 'id' repeats 'a' of \S*p\.jsonl:1; ids must be unique",
    ),
}


@pytest.mark.parametrize("case", PROMPT_FILES)
def test_a_prompts_file_with(case: str, entry_point: Run, tmp_path: Path) -> None:
    text, complaint = PROMPT_FILES[case]
    (tmp_path / "p.jsonl").write_text(text)
    refused(entry_point, tmp_path, (*TRAIN, "--prompts", "p.jsonl"), f"^error: {complaint}")


CONFIG_FILES = {
    "an unknown key": (
        "clip_rnage = 0.1\n",
        r"unknown setting 'clip_rnage'; did you mean 'clip_range",
    ),
    "an unknown key in a table": (
        "[kl]\ncontrl = 'lr'\n",
        r"unknown setting 'kl\.contrl'; did you",
    ),
    "bad syntax": ("K = = 2\n", r"not valid TOML: .*line 1"),
    "a wrong type": ("K = 'many'\n", r"K: must be a whole number, not 'many'"),
    "a wrong choice": (
        "kl_control = 'magic'\n",
        r"kl_control: must be one of decay, reward, lr, none",
    ),
}


@pytest.mark.parametrize("case", CONFIG_FILES)
def test_a_configuration_file_with(case: str, entry_point: Run, tmp_path: Path) -> None:
    text, complaint = CONFIG_FILES[case]
    (tmp_path / "c.toml").write_text(text)
    refused(entry_point, tmp_path, (*TRAIN, "--config", "c.toml"), rf"^error: c\.toml: {complaint}")


REWARDS = {
    "no file": ("missing.py:f", r"reward function missing\.py:f: cannot import 'missing\.py'"),
    "no function": (
        "r.py:missing",
        r"reward function r\.py:missing: 'r\.py' has no function 'missing'",
    ),
    "NaN": (
        "r.py:nan",
        r"reward 'nan' returned \[nan.*\] on prompt '\w+'; a reward must be a finite",
    ),
    "a wrong count": (
        "r.py:short",
        r"reward 'short' failed on prompt '\w+': it returned 0 scores for 1 completions",
    ),
}
REWARD_FILE = """
def raises(completions):
    raise KeyError("oops")


def nan(completions):
    return [float("nan")] * len(completions)


def short(completions):
    return [1.0] * (len(completions) - 1)
"""


@pytest.mark.parametrize("case", REWARDS)
def test_a_reward_function_with(case: str, entry_point: Run, tmp_path: Path) -> None:
    spec, complaint = REWARDS[case]
    (tmp_path / "r.py").write_text(REWARD_FILE)
    refused(entry_point, tmp_path, (*TRAIN, "--reward", spec), f"^error: {complaint}")


COMMANDS: dict[str, tuple[tuple[str, ...], str]] = {
    "no actor": (
        (*TRAIN, "--actor-model", "nowhere"),
        r"^error: nowhere: no model here .*make one with 'mlx-grpo convert'",
    ),
    "no reward model": (
        (*TRAIN, "--rm-model", "nowhere"),
        r"^error: nowhere: no reward model here .*'mlx-grpo convert --rm'",
    ),
    "no prompts": ((*TRAIN, "--prompts", "no.jsonl"), r"^error: no\.jsonl: no such file"),
    "an unknown flag": ((*TRAIN, "--clip-rnage", "0.1"), r"--clip-rnage.*--help"),
    "a flag of the wrong type": (
        (*TRAIN, "--K", "six"),
        r"^error: --K: must be a whole number, not 'six'",
    ),
    "a flag out of range": ((*TRAIN, "--clip-range", "1.5"), r"--clip-range: must be between 0"),
    "a group of one": ((*TRAIN, "--K", "1"), r"^error: --K: must be at least 2"),
    "a tokenizer without chat template": ((*TRAIN, "--actor-model", "{bare}"), NO_TEMPLATE),
    "all prompts too long": (
        (*TRAIN, "--max-prompt-length", "3"),
        r"eval\.jsonl: all 3 prompts are longer than 3 tokens; see --max-prompt-length",
    ),
    "a reward model for another backbone": (
        (*TRAIN, "--actor-model", "{other}"),
        r"reward_model\.json: made for a backbone with fingerprint \w+, but \S+other has \w+; "
        r"convert it again beside this model, or train one",
    ),
    "nothing to resume": (
        (*TRAIN, "--resume"),
        r"^error: runs/one: no run to resume here; start without --resume",
    ),
    "nothing to convert": (CONVERT, r"^error: nothing to convert; give --sft, --rm or both"),
    "nothing at the source": (
        (*CONVERT, "--sft", "./nowhere"),
        r"^error: ./nowhere: no such directory \(a Hub id looks like 'owner/name'\)",
    ),
    "no texts to measure on": (
        ("convert", "--sft", "{sft}", "--texts", "gone.jsonl"),
        r"gone\.jsonl: no such file; give --texts FILE, or --no-verify",
    ),
    "a source without chat template": ((*CONVERT, "--sft", "{bare}"), NO_TEMPLATE),
    "a language model as reward model": ((*CONVERT, "--rm", "{sft}"), r"sft: not a reward model"),
    "a revision of a directory": (
        (*CONVERT, "--sft", "{sft}", "--revision", "v1"),
        r"^error: \S+: a local path has no revisions; leave out 'v1'$",
    ),
    "no run to evaluate": (("eval", "runs/gone"), r"^error: runs/gone: no run here \(config\.toml"),
    "no pairs": ((*TRAIN_RM, "no.jsonl"), r"^error: no\.jsonl: no such file"),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_a_command_with(case: str, entry_point: Run, tmp_path: Path) -> None:
    refused(entry_point, tmp_path, *COMMANDS[case])


@pytest.mark.parametrize("case", ["an unknown flag", "no actor", "no run to evaluate"])
def test_a_process_with(case: str, process: Run, tmp_path: Path) -> None:
    refused(process, tmp_path, *COMMANDS[case])


ALONE = {
    "eval runs/gone --prompt-column question": "--prompts",
    "eval runs/gone --response-column answer": "--prompts",
    "eval runs/gone --judge-model gpt": "--judge",
    "convert --rm {rm} --revision v1": "--sft",
    "convert --rm {rm} --sft-base {sft}": "--sft",
    "convert --rm {rm} --texts {held_out}": "--sft",
    "convert --sft {sft} --rm-revision v1": "--rm",
    "convert --sft {sft} --rm-base {sft}": "--rm",
    "convert --sft {sft} --pairs pairs.jsonl": "--rm",
    "convert --sft {sft} --rm-as full": "--rm",
    "convert --sft {sft} --no-verify --texts {held_out}": "--verify",
    "convert --rm {rm} --no-verify --pairs pairs.jsonl": "--verify",
}
"""The last option does nothing without another."""


@pytest.mark.parametrize("arguments", ALONE)
def test_an_option_that_does_nothing(arguments: str, entry_point: Run, tmp_path: Path) -> None:
    typed = tuple(arguments.split())
    refused(entry_point, tmp_path, typed, f"^error: {typed[-2]}: needs {ALONE[arguments]}$")


def test_a_row_that_is_no_json(process: Run, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(GOOD_LINES + '{"prompt": "x",}\n')
    complaint = r"^error: p\.jsonl:17: not valid JSON \(.*; column \d+\)"
    refused(process, tmp_path, (*TRAIN, "--prompts", "p.jsonl"), complaint)


def test_a_reward_function_that_raises(process: Run, tmp_path: Path) -> None:
    (tmp_path / "r.py").write_text(REWARD_FILE)
    complaint = r"^error: reward 'raises' failed on prompt '\w+': KeyError: 'oops'"
    refused(process, tmp_path, (*TRAIN, "--reward", "r.py:raises"), complaint)


def test_a_pair_of_equal_answers(process: Run, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "b"}])
    complaint = r"^error: pairs\.jsonl: no usable pairs \(1 with equal answers\)$"
    refused(process, tmp_path, (*TRAIN_RM, "pairs.jsonl"), complaint)


def test_an_output_directory_in_use(process: Run, tmp_path: Path) -> None:
    (tmp_path / "runs" / "one").mkdir(parents=True)
    (tmp_path / "runs" / "one" / "notes.txt").write_text("mine")
    complaint = r"^error: runs/one: not empty; continue with --resume or choose another --output"
    refused(process, tmp_path, TRAIN, complaint)


def test_converting_over_an_existing_directory_needs_force(process: Run, tmp_path: Path) -> None:
    (tmp_path / "weights" / "sft-4bit").mkdir(parents=True)
    (tmp_path / "weights" / "sft-4bit" / "manifest.json").write_text("{}")
    complaint = r"^error: weights/sft-4bit: already exists; .*(--force|remove it)"
    refused(process, tmp_path, (*CONVERT, "--sft", "{sft}"), complaint)
    code, _, err = process(*CONVERT, "--sft", "{sft}", "--force")
    assert code == 0, err
    assert (tmp_path / "weights" / "sft-4bit" / "model.safetensors").is_file()


def test_a_classifier_of_two_labels_is_no_reward_model(process: Run, tmp_path: Path) -> None:
    from tests.helpers.hf_models import write_hf

    write_hf(tmp_path / "two", "LlamaForSequenceClassification", num_labels=2)
    complaint = r"^error: two/model\.safetensors: tensor 'score\.weight' has .* has one label"
    refused(process, tmp_path, (*CONVERT, "--rm", "two"), complaint)


def test_prompts_that_are_too_long_are_counted_and_skipped(process: Run, tmp_path: Path) -> None:
    rows = [{"prompt": "say tea"}, {"prompt": "x" * 90}, {"prompt": "say rain"}]
    write_jsonl(tmp_path / "p.jsonl", rows)
    before = snapshot(tmp_path)
    extra = ("--prompts", "p.jsonl", "--max-prompt-length", "64", "--dry-run")
    code, _, err = process(*TRAIN, *extra)
    assert code == 0, err
    assert err == "warning: p.jsonl: 1 prompts longer than 64 tokens are skipped\n"
    assert snapshot(tmp_path) == before
