"""Corruption, determinism, values that are not finite, and a long run: what else may go wrong."""

import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_grpo.core.errors import InputError
from mlx_grpo.grpo.iteration import Iteration
from mlx_grpo.models.backbone import load_backbone
from mlx_grpo.models.lora import load_adapter
from mlx_grpo.run import checkpoint
from mlx_grpo.run import directory as run_directory
from mlx_grpo.training import loop as trainer
from tests.crash.harness import Child, World, finish, training

REPOSITORY = Path(__file__).parents[2]
Load = Callable[[], Any]


def in_child(world: World, act: Callable[[], Any]) -> Any:
    """The JSON value that a child computes.

    Raises:
        RuntimeError: it does not end well; with all it said.
    """
    result, output = world.root / "result.json", world.root / "child.txt"

    def run() -> None:
        result.write_text(json.dumps(act()))

    if Child(run, output).wait():
        raise RuntimeError(output.read_text())
    return json.loads(result.read_text())


def corruption(world: World, count: int, rng: random.Random) -> dict[str, Any]:
    """Flip a bit or cut the end of every file of a checkpoint, a converted model, an adapter."""
    config, run = world.config(), world.root / "corrupt"
    shutil.rmtree(run, ignore_errors=True)
    finish(config, run)
    model = world.root / "sft"

    def act() -> dict[str, Any]:
        backbone = load_backbone(model)
        step = checkpoint.step_directories(run / run_directory.CHECKPOINTS)[0]
        loads: dict[Path, Load] = {
            step: lambda: checkpoint.load(step),
            model: lambda: load_backbone(model),
            run / "best": lambda: load_adapter(backbone.model, run / "best"),
        }
        files = [(file, d) for d in loads for file in sorted(d.iterdir())]
        failures = []
        for index in range(count):
            file, directory = files[index % len(files)]
            loads[directory]()  # it is whole
            damage = _damage(file, rng)
            failures += _found(loads[directory], file, damage)
        return {
            "damages": count,
            "detected": count - len(failures),
            "files": len(files),
            "failures": failures,
        }

    result: dict[str, Any] = in_child(world, act)
    return result


def _damage(file: Path, rng: random.Random) -> tuple[str, bytes]:
    """Damage a file: (what was done, what was there)."""
    content = file.read_bytes()
    if rng.random() < 0.3:
        length = rng.randrange(len(content))
        file.write_bytes(content[:length])
        return f"cut to {length} bytes", content
    position, bit = rng.randrange(len(content)), rng.randrange(8)
    spoilt = bytearray(content)
    spoilt[position] ^= 1 << bit
    file.write_bytes(spoilt)
    return f"bit {bit} of byte {position}", content


def _found(load: Load, file: Path, damage: tuple[str, bytes]) -> list[str]:
    what, content = damage
    try:
        load()
    except InputError as e:
        named = file.name in str(e) and "\n" not in str(e)
        return [] if named else [f"{file}: {what}: {e}"]
    except Exception as e:
        return [f"{file}: {what}: {type(e).__name__}: {e}"]
    finally:
        file.write_bytes(content)
    return [f"{file}: {what}: not detected"]


def determinism(world: World, count: int, rng: random.Random) -> dict[str, Any]:
    """Runs of one seed: distinct hashes; and the differences other batchings make."""
    hashes = set()
    for number in range(count):
        run = world.root / f"same-{number}"
        shutil.rmtree(run, ignore_errors=True)
        finish(world.config(), run)
        parts = [(run / "final/adapters.safetensors").read_bytes(), *map(repr, _rewards(run))]
        parts.append((run / "completions.jsonl").read_bytes())
        whole = b"".join(p if isinstance(p, bytes) else p.encode() for p in parts)
        hashes.add(hashlib.sha256(whole).hexdigest())
    reference = world.root / "same-0"
    differences = {}
    for name, widths in (("decode_rows", (3, 6, 9)), ("rows_per_pass", (1, 2))):
        for width in widths:
            run = world.root / f"{name}-{width}"
            shutil.rmtree(run, ignore_errors=True)
            finish(world.config(**{name: width}), run)
            differences[f"{name}={width}"] = {
                "completions": _same_text(run, reference),
                "reward": max(
                    abs(a - b) for a, b in zip(_rewards(run), _rewards(reference), strict=True)
                ),
                "adapter": in_child(world, lambda run=run: _adapter_gap(run, reference)),
            }
    return {
        "runs": count,
        "distinct_hashes": len(hashes),
        "differences": differences,
        "failures": [] if len(hashes) == 1 else [f"{len(hashes)} different runs of one seed"],
    }


def _rewards(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["reward"] for row in rows if "reward" in row]


def _same_text(run: Path, reference: Path) -> str:
    logs = [(r / "completions.jsonl").read_text().splitlines() for r in (run, reference)]
    texts = [[json.loads(line)["completion"] for line in lines] for lines in logs]
    equal = sum(a == b for a, b in zip(*texts, strict=True))
    return f"{equal}/{len(texts[0])} equal"


def _adapter_gap(run: Path, reference: Path) -> float:
    import mlx.core as mx

    a, b = (mx.load(str(r / "final/adapters.safetensors")) for r in (run, reference))
    return float(max(mx.abs(a[name] - b[name]).max().item() for name in a))


def not_finite(world: World, count: int, rng: random.Random) -> dict[str, Any]:
    """NaN and both infinities at every guarded stage: weights, normaliser and controller stay."""
    wanted = ["-k", "stay_as_they_are", "tests/training/test_nonfinite.py"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *wanted], cwd=REPOSITORY, capture_output=True, text=True
    )
    passed, failed = (
        int(m[1]) if (m := re.search(rf"(\d+) {word}", done.stdout)) else 0
        for word in ("passed", "failed")
    )
    broken = [] if done.returncode == 0 else [done.stdout[-2000:]]
    return {"injections": passed + failed, "weights_unchanged": passed, "failures": broken}


def soak(world: World, count: int, rng: random.Random) -> dict[str, Any]:
    """A run of many iterations: memory, open files and files on disk, early against late."""
    run = world.root / "soak"
    shutil.rmtree(run, ignore_errors=True)
    # all that may be kept is kept before the second tenth, where the measuring begins
    config = world.config(
        num_iterations=count, eval_every=max(4, count // 20), checkpoint_every=max(2, count // 50)
    )

    def act() -> list[dict[str, int]]:
        import mlx.core as mx

        samples: list[dict[str, int]] = []
        real = trainer.iterate

        def sampled(*arguments: Any) -> Iteration:
            done = real(*arguments)
            samples.append(
                {
                    "resident": _resident_bytes(),
                    "mlx": mx.get_active_memory(),
                    "descriptors": len(os.listdir("/dev/fd")),
                    "checkpoints": _size(run / "checkpoints"),
                    "entries": sum(1 for _ in run.rglob("*")),
                    "log": (run / "metrics.jsonl").stat().st_size,
                }
            )
            return done

        trainer.iterate = sampled
        if status := training(config, run)():
            raise RuntimeError(f"exit status {status}")
        return samples

    samples = in_child(world, act)
    tenth = max(1, count // 10)
    early, late = samples[tenth : 2 * tenth], samples[-tenth:]
    means = {
        name: [sum(s[name] for s in part) / len(part) for part in (early, late)]
        for name in samples[0]
    }
    per_row = [(p[-1]["log"] - p[0]["log"]) / max(1, len(p) - 1) for p in (early, late)]
    grown = [
        f"{name}: {means[name][0]:.0f} -> {means[name][1]:.0f}"
        for name in ("resident", "mlx", "descriptors", "checkpoints", "entries")
        if means[name][1] > 1.05 * means[name][0] + 1
    ]
    return {
        "iterations": count,
        **{name: [round(v) for v in means[name]] for name in means if name != "log"},
        "log_bytes_per_iteration": [round(v) for v in per_row],
        "failures": grown,
    }


def _resident_bytes() -> int:
    if Path("/proc/self/statm").exists():
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    shown = subprocess.run(["ps", "-o", "rss=", "-p", str(os.getpid())], capture_output=True)
    return int(shown.stdout) * 1024


def _size(directory: Path) -> int:
    return sum(p.stat().st_size for p in directory.rglob("*") if p.is_file())
