"""What the peers share: the work, an environment of its own for each, one line of JSON as result.

Standard library only: it runs in every peer's environment. A peer's script calls `main`, which
makes the environment under `.cache/peers/`, starts the script again inside it with OpenBLAS loaded
first, and prints what `measure` returns.
"""

import argparse
import hashlib
import json
import os
import runpy
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "peers"
MODEL = CACHE / "model"
PACKED = CACHE / "model-4bit"
"""The same values as they come from `mlx-grpo convert`, for mlx-grpo."""
ENDING = CACHE / "model-ending"
"""The same values with the model's own stop token, for learning."""

# The work of design: SmolLM2-135M in fp32, LoRA 16 on all linear layers, K answers of 64 tokens.
K, NEW_TOKENS, RANK, SCALE = 6, 64, 16, 2.0
SEED, LEARNING_RATE = 42, 1e-4
INSIDE = "MLX_GRPO_PEER"

MLX = ("mlx[cpu]==0.32.4", "mlx-lm==0.32.2")


def prompts(count: int) -> list[dict[str, Any]]:
    """The first `count` prompts, see `Task.rows`; 24 to 48 tokens each."""
    rows = json.loads((MODEL / "prompts.json").read_text())
    return rows[:count]


def measured(
    script: Path, arguments: Sequence[str], log: Path, timeout: float | None = None
) -> dict[str, Any] | None:
    """What a script of this directory prints as its last line of JSON; None if it fails. What it
    says besides goes to `log`.

    Raises:
        subprocess.TimeoutExpired: it took more than `timeout` seconds.
    """
    with log.open("w") as errors:
        done = subprocess.run(
            [sys.executable, str(script), *arguments],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            timeout=timeout,
        )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return None if done.returncode or not lines else dict(json.loads(lines[-1]))


@dataclass(frozen=True)
class Task:
    """What a peer is trained on."""

    rows: list[dict[str, Any]]
    """{"messages": [...], "ids": [...], "fields": JSON of what the reward wants to know}."""
    reward: Callable[[str, str], float]
    """Of a completion and its row's fields."""

    @property
    def data_set(self) -> list[dict[str, Any]]:
        """The rows as trainers take them that have TRL's interface."""
        return [{"prompt": row["messages"], "fields": row["fields"]} for row in self.rows]

    def rewards(self, texts: Sequence[str], fields: Sequence[str]) -> list[float]:
        return [self.reward(*pair) for pair in zip(texts, fields, strict=True)]

    def rewards_of_turns(self, completions: list[Any], fields: list[str], **_: Any) -> list[float]:
        """A reward function as such trainers call it: each completion is a list of one turn."""
        return self.rewards([turns[0]["content"] for turns in completions], fields)


def model_of(args: argparse.Namespace) -> Path:
    """The model of the comparison."""
    return ENDING if args.learn else MODEL


def task(args: argparse.Namespace, tokens_of: Callable[[str], Any]) -> Task:
    """Short answers to a few prompts, whose speed is measured; or, to learn from, constraints.

    Args:
        tokens_of: encodes a text. An answer that is as long as it may be was cut off.
    """
    if not args.learn:
        return Task(prompts(args.prompts), lambda text, _: length_reward([text])[0])
    marks = runpy.run_path(str(ROOT / "examples" / "constraints.py"))["constraints"]

    def marked(text: str, fields: str) -> float:
        reason = "stop" if len(tokens_of(text)) < args.tokens else "length"
        return float(marks([text], [reason], **json.loads(fields))[0])

    return Task(json.loads((ENDING / "constraints.json").read_text()), marked)


def kept_at(args: argparse.Namespace, iteration: int) -> Path | None:
    """Where the adapter goes after an iteration, under mlx-lm's names; None for nowhere."""
    if not args.learn or iteration % args.every:
        return None
    return Path(args.learn) / f"step-{iteration:06d}.safetensors"


def keep_adapter(model: Any, args: argparse.Namespace, iteration: int) -> None:
    """Write an adapter of MLX."""
    if place := kept_at(args, iteration):
        import mlx.core as mx
        from mlx.utils import tree_flatten

        mx.save_safetensors(str(place), dict(tree_flatten(model.trainable_parameters())))


def length_reward(completions: list[str]) -> list[float]:
    """The reward of the comparison: shorter is better."""
    return [-float(len(text)) for text in completions]


def main(
    measure: Callable[[argparse.Namespace], dict[str, Any]],
    requirements: tuple[str, ...],
    bare: tuple[str, ...] = (),
    variants: tuple[str, ...] = ("default",),
) -> None:
    """Install, enter the environment, measure, print one JSON line.

    Args:
        requirements: pinned, for pip; empty means the environment that runs the script.
        bare: installed without what they depend on.
        variants: configurations of this peer; each is measured in a process of its own.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--variant", choices=variants, default=variants[0])
    parser.add_argument("--prompts", type=int, default=1, help="prompts an iteration")
    parser.add_argument("--iterations", type=int, default=1, help="measured, after a dropped one")
    parser.add_argument("--tokens", type=int, default=NEW_TOKENS, help="of each answer")
    parser.add_argument(
        "--rollout-only", action="store_true", help="the dropped iteration then has one prompt"
    )
    parser.add_argument("--install", action="store_true", help="make the environment and stop")
    parser.add_argument("--learn", metavar="DIR", help="train on constraints, keep adapters there")
    parser.add_argument("--every", type=int, default=5, help="iterations between two adapters")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE)
    args = parser.parse_args()
    if not os.environ.get(INSIDE):
        name, python = Path(sys.argv[0]).stem, sys.executable
        if requirements:
            python = environment(name, requirements, bare)
        if not args.install:  # in the place of this process, so that nothing outlives a timeout
            os.execve(python, [python, *sys.argv], _inside(bool(requirements)))
        return
    import resource

    started = time.perf_counter()
    result = measure(args)
    unit = 1 if sys.platform == "darwin" else 1024
    result["rss_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
    result["wall_seconds"] = time.perf_counter() - started
    rounded = {k: round(v, 3) if isinstance(v, float) else v for k, v in result.items()}
    sys.__stdout__.write("\n" + json.dumps(rounded) + "\n")  # type: ignore[union-attr]


def environment(name: str, requirements: tuple[str, ...], bare: tuple[str, ...]) -> str:
    """Python of the environment `name`, made or remade if its pins changed."""
    place = CACHE / name
    python = str(place / "bin" / "python")
    pins = hashlib.sha256(json.dumps([requirements, bare]).encode()).hexdigest()
    stamp = place / "pins"
    if stamp.is_file() and stamp.read_text() == pins:
        return python
    sys.stderr.write(f"installing {name}: {', '.join((*requirements, *bare))}\n")
    venv.create(place, with_pip=True, clear=True)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *requirements], check=True, stderr=subprocess.DEVNULL)
    if bare:
        subprocess.run([*pip, "--no-deps", *bare], check=True, stderr=subprocess.DEVNULL)
    stamp.write_text(pins)
    return python


def _inside(own_environment: bool) -> dict[str, str]:
    """The same BLAS for all: without it MLX's CPU wheel is fifty times slower. What is preloaded
    already comes before it."""
    dropped = ("PYTHONPATH",) if own_environment else ()
    given = {k: v for k, v in os.environ.items() if k not in dropped}
    own = {INSIDE: "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    preloaded = (os.environ.get("LD_PRELOAD"), "libopenblas.so.0")
    blas = {"LD_PRELOAD": ":".join(filter(None, preloaded))} if sys.platform == "linux" else {}
    return {**given, **own, **blas, "PYTHONUNBUFFERED": "1"}


class Stopwatch:
    """Seconds of every call of a function, by wrapping it."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds.append(time.perf_counter() - start)
            return result

        return timed


def mlx_peak_gb() -> float:
    """MLX's own peak since the process started, weights included."""
    import mlx.core as mx

    return float(mx.get_peak_memory() / 1e9)


def result(
    args: argparse.Namespace,
    rows: int,
    rollout: list[float],
    iteration: list[float],
    peak: float | None,
) -> dict[str, Any]:
    """The fastest measured time of each, the first one dropped; memory in GB."""
    found: dict[str, Any] = {"prompts": args.prompts, "rows": rows, "tokens": args.tokens}
    if rollout[1:]:
        found["rollout_tokens_per_second"] = rows * args.tokens / min(rollout[1:])
    if iteration[1:]:
        found["seconds_per_prompt_iteration"] = min(iteration[1:]) / args.prompts
    if peak is not None:
        found["peak_gb"] = peak
    if args.learn:
        found["seconds"] = iteration
    return found
