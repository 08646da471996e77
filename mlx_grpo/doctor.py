"""Is this machine ready: versions, device, BLAS, compiler, disk, memory, weights. For each problem
what to type."""

import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Literal

import mlx.core as mx
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from mlx_grpo.backend.device import (
    OPENBLAS,
    device_name,
    gpu_working_set,
    on_linux_cpu,
    physical_memory,
)
from mlx_grpo.backend.precision import choose_precision
from mlx_grpo.config.settings import ModelSettings
from mlx_grpo.core.commands import command
from mlx_grpo.core.errors import InputError
from mlx_grpo.demo import INSTALL_MODEL, smollm2_gguf
from mlx_grpo.files.atomic import read_json
from mlx_grpo.files.manifest import verify_manifest
from mlx_grpo.models.directory import load_lazily, parameter_count, weight_files
from mlx_grpo.models.reward_model import REWARD_CONFIG, check_fingerprint
from mlx_grpo.models.stand_ins import family
from mlx_grpo.plan.devices import seconds_of
from mlx_grpo.plan.footprint import footprint_of

SHOWN = ("mlx", "mlx-lm", "transformers", "huggingface-hub", "numpy", "safetensors", "typer")
SLOW_GFLOPS = 10.0
"""Below it an fp32 matmul is not a BLAS's: the reference implementation reaches 2 on a core."""
LITTLE_DISK = 2 << 30
WIRED_SHARE = 0.85
"""Of a Mac's memory that can be given to the GPU and leave the system alive."""


@dataclass(frozen=True)
class Check:
    """One line of the examination."""

    level: Literal["ok", "note", "problem"]
    """`note`: nothing is wrong, but something is not there."""
    subject: str
    text: str
    remedy: str = ""
    """What to type."""


def examine(weights: Path) -> Iterator[Check]:
    """All findings, one by one.

    Args:
        weights: the directory that holds converted models.
    """
    yield from _versions()
    yield from _arithmetic()
    yield from _memory()
    yield _disk()
    yield _demo_model()
    yield from _models(weights)


def trains(directory: Path) -> Check:
    """Whether the model in a directory will train, and what of it gets a LoRA; no weight is
    read."""
    try:
        if not (directory / "config.json").is_file() and (directory / REWARD_CONFIG).is_file():
            return _reward_adapter(directory, "trains with that model")
        model, _ = load_lazily(directory)
        found = footprint_of(model, parameter_count(directory)).coverage
    except InputError as e:
        return Check("problem", str(directory), f"does not train: {e}")
    rank = ModelSettings().expert_lora_rank
    adapted = found.describe(rank) if found else ""
    return Check("ok", str(directory), f"{family(model)}: trains, with a LoRA {adapted}")


def _versions() -> Iterator[Check]:
    python = ".".join(map(str, sys.version_info[:3]))
    yield Check("ok", "python", f"{python}, {sys.executable}")
    wanted = _requirements()
    for name in SHOWN:
        try:
            found = version(name)
        except PackageNotFoundError:
            yield Check("problem", name, "not installed", command("pip", "install", name))
            continue
        rule = wanted.get(name)
        if rule is None or rule.contains(found, prereleases=True):
            yield Check("ok", name, found)
        else:
            yield Check(
                "problem", name, f"{found}, not {rule}", command("pip", "install", f"{name}{rule}")
            )


def _requirements() -> dict[str, SpecifierSet]:
    """What this package asks of others on this machine, extras left out."""
    try:
        texts = distribution("mlx-grpo").requires or []
    except PackageNotFoundError:  # run from a checkout that is not installed
        return {}
    parsed = (Requirement(text) for text in texts)
    return {r.name: r.specifier for r in parsed if not r.marker or r.marker.evaluate({"extra": ""})}


def _arithmetic() -> Iterator[Check]:
    device = device_name()
    gflops = matmul_gflops(512 if device == "cpu" else 4096)  # a GPU is idle at the smaller size
    speed = f"{gflops:,.0f} GFLOP/s in an fp32 matmul"
    if device != "cpu" or gflops >= SLOW_GFLOPS:
        blas = f", {OPENBLAS}" if OPENBLAS else ""
        yield Check("ok", "device", f"{device}{blas}, {speed}")
    elif on_linux_cpu() and OPENBLAS is None:
        remedy = "apt-get install libopenblas0-pthread"
        yield Check("problem", "device", f"cpu without OpenBLAS, {speed}", remedy)
    else:
        yield Check("note", "device", f"cpu, {speed}: is the machine busy?")
    yield Check(
        "ok", "precision", f"{choose_precision(0)}, unless --precision or --weights say else"
    )
    if on_linux_cpu():
        compiler = shutil.which("g++")
        if compiler:
            yield Check("ok", "compiler", compiler)
        else:
            text = "no g++, with which MLX compiles small kernels at run time"
            yield Check("problem", "compiler", text, "apt-get install g++")


def matmul_gflops(size: int) -> float:
    """Best speed of an fp32 matmul of [size, size] on the default device."""
    a = mx.ones((size, size))
    return 2 * size**3 / seconds_of(lambda: a @ a) / 1e9


def _memory() -> Iterator[Check]:
    yield Check("ok", "memory", f"{physical_memory() / 1e9:.1f} GB")
    if limit := gpu_working_set():
        text = f"{limit / 1e9:.1f} GB recommended for the GPU's working set"
        yield Check("ok", "GPU memory", text)


def _disk() -> Check:
    free = shutil.disk_usage(Path.cwd()).free
    text = f"{free / 1e9:.1f} GB free in {Path.cwd()}"
    if free < LITTLE_DISK:
        return Check(
            "problem", "disk", f"{text}; remove old checkpoints", "du -sh runs/*/checkpoints"
        )
    return Check("ok", "disk", text)


def _demo_model() -> Check:
    try:
        return Check("ok", "demo model", str(smollm2_gguf()))
    except InputError:
        return Check("note", "demo model", "not installed", INSTALL_MODEL)


def _models(weights: Path) -> Iterator[Check]:
    found = sorted(d for d in weights.glob("*") if _is_model(d))
    if not any((d / "config.json").is_file() for d in found):
        text = f"no converted model in {weights}/"
        yield Check("note", "weights", text, "mlx-grpo convert --sft MODEL --rm MODEL")
    for directory in found:
        try:
            yield _model(directory)
        except InputError as e:
            yield Check("problem", str(directory), str(e), "mlx-grpo convert --force ...")


def _is_model(directory: Path) -> bool:
    return any((directory / n).is_file() for n in ("config.json", REWARD_CONFIG))


def _model(directory: Path) -> Check:
    listed = bool(verify_manifest(directory))
    state = "whole" if listed else "no manifest, not checked"
    if not (directory / "config.json").is_file():
        return _reward_adapter(directory, state)
    size = sum(f.stat().st_size for f in weight_files(directory))
    text, subject = f"{size / 1e6:,.0f} MB, {state}", str(directory)
    packed = "quantization" in read_json(directory / "config.json")
    if packed and device_name() == "cpu" and not choose_precision(parameter_count(directory)).dense:
        slow = "too large to unpack in this memory, and 4-bit kernels are slow on a CPU"
        return Check("problem", subject, f"{text}; {slow}")
    if (limit := gpu_working_set()) and size > limit:
        megabytes = int(WIRED_SHARE * physical_memory()) >> 20
        remedy = f"sudo sysctl iogpu.wired_limit_mb={megabytes}"
        return Check("problem", subject, f"{text}; more than the GPU may use", remedy)
    return Check("ok", subject, text)


def _reward_adapter(directory: Path, state: str) -> Check:
    """An adapter belongs to one SFT model, as a rule beside it."""
    about = read_json(directory / REWARD_CONFIG)
    for sft in sorted(directory.parent.glob("sft-*")):
        try:
            check_fingerprint(directory / REWARD_CONFIG, about, sft)
        except InputError:
            continue
        return Check("ok", str(directory), f"adapter of {sft}, {state}")
    return Check("note", str(directory), f"adapter, {state}; its SFT model is not beside it")
