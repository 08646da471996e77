"""`export --push` against a stub of the Hub: what it uploads, and what it says when it may not."""

import base64
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
from typing import Any

import pytest

from tests.helpers.http import serving
from tests.helpers.paths import WITHOUT_TORCH

COMMIT = "c" * 40


@dataclass
class Hub:
    """The stub: who may write, and what it was given."""

    token: str = "hf_right"
    full: bool = False
    """Takes no files."""
    address: str = ""
    created: dict[str, Any] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    """Large files by sha256."""
    files: dict[str, bytes] = field(default_factory=dict)


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    """Answers like huggingface.co."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def answer(self, status: int, body: Any = None) -> None:
            text = json.dumps({} if body is None else body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def handle_request(self) -> None:
            sent = self.body()
            if "blob" in self.path:
                hub.blobs[self.path.rpartition("/")[2]] = sent
                return self.answer(200)
            if self.headers.get("Authorization") != f"Bearer {hub.token}":
                return self.answer(401, {"error": "Invalid username or password."})
            if self.path == "/api/whoami-v2":
                return self.answer(200, {"name": "owner", "type": "user", "orgs": []})
            if self.path == "/api/repos/create":
                hub.created = json.loads(sent)
                return self.answer(200, {"url": f"{hub.address}/owner/name"})
            if self.path == "/api/validate-yaml":
                return self.answer(200, {"errors": [], "warnings": []})
            if self.path == "/api/models/owner/name/preupload/main":
                return self.answer(200, {"files": [mode(f) for f in json.loads(sent)["files"]]})
            if self.path == "/owner/name.git/info/lfs/objects/batch":
                objects = [blob(o) for o in json.loads(sent)["objects"]]
                return self.answer(200, {"transfer": "basic", "objects": objects})
            if self.path.startswith("/api/models/owner/name/tree/main?"):
                return self.answer(200, [listed(path) for path in hub.files])
            if self.path == "/api/models/owner/name/commit/main" and not hub.full:
                keep(sent)
                address = f"{hub.address}/owner/name/commit/{COMMIT}"
                return self.answer(200, {"commitUrl": address, "commitOid": COMMIT})
            return self.answer(507 if hub.full else 404, {"error": "stub says no"})

        do_GET = do_POST = do_PUT = handle_request

    def mode(file: dict[str, Any]) -> dict[str, Any]:
        large = file["path"].endswith(".safetensors")
        how = "lfs" if large else "regular"
        return {"path": file["path"], "uploadMode": how, "shouldIgnore": False, "oid": None}

    def listed(path: str) -> dict[str, Any]:
        return {"type": "file", "path": path, "size": len(hub.files[path]), "oid": "0" * 40}

    def blob(wanted: dict[str, Any]) -> dict[str, Any]:
        upload = {"href": f"{hub.address}/blob/{wanted['oid']}", "header": {}}
        return {**wanted, "actions": {"upload": upload}}

    def keep(commit: bytes) -> None:
        for line in map(json.loads, commit.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                hub.files[value["path"]] = base64.b64decode(value["content"])
            if line["key"] == "lfsFile":
                hub.files[value["path"]] = hub.blobs[value["oid"]]
            if line["key"] == "deletedFile":
                del hub.files[value["path"]]

    return Handler


@pytest.fixture
def hub() -> Iterator[Hub]:
    """The stub, running."""
    stub = Hub()
    with serving(handler(stub)) as stub.address:
        yield stub


def push(hub: Hub, run: Path, where: Path, *flags: str, token: str = "") -> tuple[int, str, str]:
    """`mlx-grpo export RUN --push owner/name` in a process of its own."""
    environment = {
        **{k: v for k, v in os.environ.items() if not re.search("^HF_|proxy", k, re.I)},
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(where / "cache"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": WITHOUT_TORCH,
        **({"HF_TOKEN": token} if token else {}),
    }
    done = subprocess.run(
        [
            *(sys.executable, "-m", "mlx_grpo", "export", str(run), "--push", "owner/name"),
            *("--output", str(where / "out"), *flags),
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr


def test_the_directory_is_uploaded_file_by_file(
    hub: Hub, finished_run: Path, tmp_path: Path
) -> None:
    old = ("model-00001-of-00002.safetensors", "model.safetensors.index.json")
    hub.files = dict.fromkeys((*old, "notes.txt"), b"of an earlier upload")
    code, out, err = push(hub, finished_run, tmp_path, "--private", token="hf_right")
    assert code == 0, err
    assert hub.files.pop("notes.txt") == b"of an earlier upload"
    assert (hub.created["organization"], hub.created["name"]) == ("owner", "name")
    assert hub.created.get("visibility") == "private"
    written = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    assert hub.files == written
    assert {"adapters.safetensors", "adapter_config.json", "README.md"} <= written.keys()
    digest = hashlib.sha256(written["adapters.safetensors"]).hexdigest()
    assert list(hub.blobs) == [digest]
    assert f"uploaded to {hub.address}/owner/name" in out


def test_nobody_logged_in_is_told_before_anything_is_written(
    hub: Hub, finished_run: Path, tmp_path: Path
) -> None:
    for token, complaint in (
        ("", "nobody is logged in; type: hf auth login"),
        ("hf_no", "Invalid user token"),
    ):
        code, _, err = push(hub, finished_run, tmp_path, token=token)
        assert (code, len(err.strip().splitlines())) == (2, 1), err
        assert err.startswith("error: --push owner/name: ") and complaint in err
        assert not (tmp_path / "out").exists()


def test_an_upload_that_fails_leaves_the_directory_and_says_how_to_go_on(
    hub: Hub, finished_run: Path, tmp_path: Path
) -> None:
    hub.full = True
    code, _, err = push(hub, finished_run, tmp_path, token="hf_right")
    assert (code, len(err.strip().splitlines())) == (2, 1), err
    assert f"try again with: hf upload owner/name {tmp_path / 'out'}" in err
    assert (tmp_path / "out" / "adapters.safetensors").is_file()
