"""Hub ids: only the needed files, one revision, from the cache when there is no network.

A stub of the Hub's interface serves a tiny model; the program runs in a process of its own, since
huggingface_hub reads its settings when it is imported.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from mlx_grpo.convert.source import needed_files
from tests.helpers.http import serving
from tests.helpers.paths import WITHOUT_TORCH
from tests.helpers.tiny import write_model

COMMIT, OTHER = "a" * 40, "b" * 40
CARD = "---\nlicense: mit\n---\n"


@dataclass
class Hub:
    """A stub of the Hub: `owner/name` with two revisions; what it was asked for."""

    files: dict[str, dict[str, bytes]]
    """Content of each file, by commit."""
    address: str = ""
    requests: list[str] = field(default_factory=list)
    cut_once: str = ""
    """A file whose first transfer breaks off in the middle."""
    failing: str = ""
    """A file that the stub has lost."""

    def fetched(self) -> set[str]:
        """Files that were downloaded."""
        found = (re.match(r"GET /\S+/resolve/\w+/(\S+)", r) for r in self.requests)
        return {m[1] for m in found if m}


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    """Answers like huggingface.co."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def answer(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def refuse(self, status: int, code: str) -> None:
            self.answer(status, b"{}", X_Error_Code=code, X_Error_Message=f"stub says {code}")

        def do_GET(self) -> None:
            hub.requests.append(f"{self.command} {self.path}")
            if "secret" in self.path:
                return self.refuse(401, "GatedRepo")
            if about := re.match(
                r"/api/models/owner/name(?:/revision/([\w.]+))?(?:\?|$)", self.path
            ):
                commit = {None: COMMIT, "main": COMMIT, "old": OTHER}.get(about[1], about[1])
                if commit not in hub.files:
                    return self.refuse(404, "RevisionNotFound")
                siblings = [{"rfilename": name} for name in hub.files[commit]]
                body = {"id": "owner/name", "modelId": "owner/name", "sha": commit}
                text = json.dumps({**body, "siblings": siblings, "tags": [], "private": False})
                return self.answer(200, text.encode(), Content_Type="application/json")
            if tree := re.match(r"/api/models/owner/name/tree/(\w+)", self.path):
                entries = [
                    {"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                    for n, c in hub.files[tree[1]].items()
                ]
                body_text = json.dumps(entries).encode()
                return self.answer(200, body_text, Content_Type="application/json")
            if file := re.match(r"/owner/name/resolve/(\w+)/(\S+)", self.path):
                return self.send(file[1], file[2])
            return self.refuse(404, "RepoNotFound")

        def send(self, commit: str, name: str) -> None:
            body = hub.files[commit][name]
            digest = hashlib.sha256(body).hexdigest()
            headers = {"ETag": f'"{digest}"', "X_Repo_Commit": commit, "Accept_Ranges": "bytes"}
            if self.command == "GET" and hub.failing == name:
                return self.refuse(410, "Gone")
            if self.command == "GET" and hub.cut_once == name:
                hub.cut_once = ""
                self.send_response(200)
                for key, value in {**headers, "Content_Length": str(len(body))}.items():
                    self.send_header(key.replace("_", "-"), value)
                self.end_headers()
                self.wfile.write(body[: len(body) // 2])
                self.wfile.flush()
                self.close_connection = True
                return None
            return self.answer(200, body, **headers)

        do_HEAD = do_GET

    return Handler


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """The stub, running, with a model and files that no conversion needs."""
    commits = {}
    for commit, seed in ((COMMIT, 0), (OTHER, 5)):
        directory = write_model(tmp_path / commit, seed=seed)
        (directory / "README.md").write_text(CARD)
        (directory / "training_args.bin").write_bytes(b"never")
        (directory / "pytorch_model.bin").write_bytes(b"never")
        (directory / "model.onnx").write_bytes(b"never")
        commits[commit] = {p.name: p.read_bytes() for p in sorted(directory.iterdir())}
        commits[commit]["original/consolidated.safetensors"] = b"never"
    stub = Hub(commits)
    with serving(handler(stub)) as stub.address:
        yield stub


def convert(hub: Hub, where: Path, *arguments: str, offline: bool = False) -> tuple[int, str]:
    """`mlx-grpo convert` against the stub: (exit code, stderr without progress bars)."""
    environment = {
        **{k: v for k, v in os.environ.items() if not re.search("^HF_|proxy", k, re.I)},
        "HF_ENDPOINT": "http://127.0.0.1:9" if offline else hub.address,
        "HF_HOME": str(where / "cache"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": WITHOUT_TORCH,
    }
    flags = ("--no-verify", "--group-size", "32")
    done = subprocess.run(
        [sys.executable, "-m", "mlx_grpo", "convert", *flags, *arguments],
        cwd=where,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stderr


def test_only_needed_files_of_one_revision_are_fetched_and_then_kept(
    hub: Hub, tmp_path: Path
) -> None:
    code, err = convert(hub, tmp_path, "--sft", "owner/name", "--output", "one")
    assert code == 0, err
    needed = {"README.md", "config.json", "model.safetensors", "tokenizer.json"}
    assert hub.fetched() == needed | {"tokenizer_config.json"}
    card = (tmp_path / "one" / "sft-4bit" / "README.md").read_text()
    assert f"| source | `owner/name`, revision `{COMMIT}` |" in card
    assert "| licence | mit |" in card
    hub.requests.clear()
    code, err = convert(hub, tmp_path, "--sft", "owner/name", "--output", "two", offline=True)
    assert code == 0, err
    assert not hub.requests
    assert COMMIT in (tmp_path / "two" / "sft-4bit" / "README.md").read_text()
    code, err = convert(
        hub, tmp_path, "--sft", "owner/name", "--revision", "old", "--output", "old"
    )
    assert code == 0, err
    assert f"revision `{OTHER}`" in (tmp_path / "old" / "sft-4bit" / "README.md").read_text()
    files = [tmp_path / d / "sft-4bit" / "model.safetensors" for d in ("one", "two", "old")]
    weights = [file.read_bytes() for file in files]
    assert weights[0] == weights[1] != weights[2]


def test_what_was_fetched_before_a_failure_is_not_fetched_again(hub: Hub, tmp_path: Path) -> None:
    hub.failing = "model.safetensors"
    code, err = convert(hub, tmp_path, "--sft", "owner/name", "--output", "w")
    assert (code, len(err.strip().splitlines())) == (2, 1), err
    assert "owner/name" in err and not (tmp_path / "w").exists()
    before = hub.fetched()
    hub.requests.clear()
    hub.failing, hub.cut_once = "", "model.safetensors"  # breaks off once, and is tried again
    code, err = convert(hub, tmp_path, "--sft", "owner/name", "--output", "w")
    assert code == 0, err
    assert len(before) > 1 and hub.fetched() & before <= {"model.safetensors"}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--sft", "owner/none"), r"owner/none: no such directory, and the Hub refused .*404"),
        (("--sft", "secret/name"), r"secret/name: no such directory, and the Hub refused .*401"),
        (
            ("--sft", "owner/name", "--revision", "v9"),
            r"owner/name: no such directory, and the Hub refused .*404",
        ),
        (("--sft", "own er/na:me"), r"own er/na:me: neither a directory nor a Hub id"),
    ],
)
def test_what_the_hub_refuses_is_told_in_one_line(
    arguments: tuple[str, ...], complaint: str, hub: Hub, tmp_path: Path
) -> None:
    code, err = convert(hub, tmp_path, *arguments, "--output", "w")
    assert (code, len(err.strip().splitlines())) == (2, 1), err
    assert re.match(rf"error: {complaint}", err), err
    assert not (tmp_path / "w").exists()


def test_without_network_or_cache_the_command_says_so(hub: Hub, tmp_path: Path) -> None:
    code, err = convert(hub, tmp_path, "--sft", "owner/name", "--output", "w", offline=True)
    assert (code, len(err.strip().splitlines())) == (2, 1), err
    assert re.match(r"error: owner/name: no such directory, and the Hub cannot be reached \(", err)
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("lost", ["model.safetensors", "tokenizer_config.json"])
def test_a_cache_that_lacks_a_file_is_named_as_the_cause_without_a_network(
    lost: str, hub: Hub, tmp_path: Path
) -> None:
    code, err = convert(hub, tmp_path, "--sft", "owner/name", "--output", "one")
    assert code == 0, err
    for file in (tmp_path / "cache").rglob(f"snapshots/*/{lost}"):
        file.unlink()
    code, err = convert(hub, tmp_path, "--sft", "owner/name", "--output", "two", offline=True)
    assert (code, len(err.strip().splitlines())) == (2, 1), err
    assert "owner/name: only partly in the Hub's cache" in err
    assert not (tmp_path / "two").exists()


TEXTS = ["config.json", "tokenizer.json", "chat_template.jinja", "merges.txt", "tokenizer.model"]
JUNK = ["model.onnx", "a.gguf", "training_args.bin", "images/x.png", "onnx/model.safetensors"]


@pytest.mark.parametrize(
    ("weights", "fetched"),
    [
        (["model.safetensors"], ["model.safetensors"]),
        (["model.safetensors", "pytorch_model.bin"], ["model.safetensors"]),
        (
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
        ),
        (["pytorch_model.bin"], ["pytorch_model.bin"]),
        (["reward_head.safetensors", "model.safetensors"], None),
    ],
)
def test_one_format_of_weights_and_the_texts_are_needed(
    weights: list[str], fetched: list[str] | None
) -> None:
    found = needed_files([*TEXTS, *JUNK, *weights, "README.md"])
    assert sorted(found) == sorted([*TEXTS, "README.md", *(fetched or weights)])


def test_of_an_adapter_the_adapter_is_needed() -> None:
    files = ["adapter_config.json", "adapter_model.safetensors", "README.md", "training_args.bin"]
    assert sorted(needed_files(files)) == sorted(files[:3])
    head = ["adapter_config.json", "adapters.safetensors", "reward_head.safetensors"]
    assert sorted(needed_files(head)) == head
    whole = ["config.json", "model-1.safetensors", "consolidated.safetensors"]
    assert sorted(needed_files(whole)) == whole[:2]
    assert "adapter_model.bin" in needed_files(["adapter_config.json", "adapter_model.bin"])
