"""Atomic, verified checkpoints; knows files, not training.

A checkpoint is a directory `step-NNNNNN` with `adapter.safetensors`, `optimizer.safetensors`,
`state.json` and a `manifest.json` (sha256, shapes, dtypes). It is written under a temporary name,
flushed, renamed; then the pointer `latest` is replaced and old ones are pruned. Loading verifies
the manifest and walks back to the newest good one.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_grpo.core.errors import InputError
from mlx_grpo.core.types import Parameters
from mlx_grpo.files.atomic import atomic_directory, read_json, write_json, write_text
from mlx_grpo.files.manifest import MANIFEST, verify_manifest, write_manifest
from mlx_grpo.files.safetensors import load_arrays, save_arrays
from mlx_grpo.run.fields import WHOLE, check_fields

ARRAYS = ("adapter", "optimizer")


@dataclass(frozen=True)
class Checkpoint:
    """Everything a run needs to go on."""

    iteration: int
    adapter: Parameters
    optimizer: Parameters
    state: dict[str, Any]


def save(directory: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write `directory/step-NNNNNN`, move the pointer, prune all but the newest `keep`."""
    target = directory / f"step-{checkpoint.iteration:06d}"
    directory.mkdir(exist_ok=True)  # without parents: a run that was moved is not begun anew
    with atomic_directory(target, replace=True) as temporary:
        contents = {"adapter": checkpoint.adapter, "optimizer": checkpoint.optimizer}
        for name, arrays in contents.items():
            save_arrays(temporary / f"{name}.safetensors", arrays)
        write_json(temporary / "state.json", checkpoint.state)
        write_manifest(temporary, {"tensors": _tensors(contents)})
    write_text(directory / "latest", target.name + "\n")
    # those beyond the one just written are of a run that was resumed from before them
    others = [d for d in step_directories(directory) if d.name < target.name]
    newer = [d for d in step_directories(directory) if d.name > target.name]
    for old in others[keep - 1 :] + newer:
        shutil.rmtree(old)
    return target


def _tensors(contents: dict[str, Parameters]) -> dict[str, list[Any]]:
    return {
        f"{group}/{name}": [list(value.shape), str(value.dtype)]
        for group, arrays in contents.items()
        for name, value in arrays.items()
    }


def step_directories(directory: Path) -> list[Path]:
    """Checkpoints, newest first."""
    return sorted(directory.glob("step-[0-9]*"), reverse=True)


def load(path: Path) -> Checkpoint:
    """Read and verify one checkpoint.

    Raises:
        InputError: a file is missing or differs from the manifest; the file is named.
    """
    manifest = verify_manifest(path)
    if not {f"{n}.safetensors" for n in ARRAYS} <= manifest.get("files", {}).keys():
        raise InputError(f"{path / MANIFEST}: missing, or does not list the arrays")
    state = read_json(path / "state.json")
    check_fields(str(path / "state.json"), state, {"iteration": WHOLE})
    adapter, optimizer = (load_arrays(path / f"{name}.safetensors") for name in ARRAYS)
    if _tensors({"adapter": adapter, "optimizer": optimizer}) != manifest.get("tensors"):
        raise InputError(f"{path / MANIFEST}: tensors differ from the files")
    return Checkpoint(state["iteration"], adapter, optimizer, state)


def load_newest(
    directory: Path, wanted: Callable[[dict[str, Any]], bool] = lambda state: True
) -> tuple[Checkpoint, list[str]]:
    """The newest checkpoint that verifies, and one line for each newer one that did not.

    Args:
        wanted: whether to take one of this state.json.

    Raises:
        InputError: none is usable.
    """
    skipped: list[str] = []
    for path in step_directories(directory):
        try:
            found = load(path)
        except InputError as e:
            skipped.append(str(e))
        else:
            if wanted(found.state):
                return found, skipped
    raise InputError(
        f"{directory}: no usable checkpoint ({_reason(skipped)}); start anew in another --output"
    )


def _reason(skipped: list[str]) -> str:
    """Of the newest one, and how many others there are: what damages one often damages all."""
    if not skipped:
        return "there is none"
    newest, *others = skipped
    too = f"; {len(others)} older {'one' if len(others) == 1 else 'ones'} too" if others else ""
    return newest + too
