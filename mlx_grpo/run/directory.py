"""A run on disk: configuration, logs, checkpoints, adapters; opened, saved, restored."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.nn as nn
import mlx.optimizers as optim

from mlx_grpo.config.settings import TrainConfig, with_settings
from mlx_grpo.config.sources import build_config, to_toml
from mlx_grpo.core.commands import command
from mlx_grpo.core.dates import today
from mlx_grpo.core.errors import InputError
from mlx_grpo.core.finite import Skip
from mlx_grpo.core.types import Completion, Group, Parameters, Prompt
from mlx_grpo.files.atomic import (
    atomic_directory,
    clear_debris,
    need_space,
    read_json,
    write_text,
)
from mlx_grpo.files.lock import mine
from mlx_grpo.files.manifest import MANIFEST, directory_digest, write_manifest
from mlx_grpo.grpo.evaluate import Evaluation
from mlx_grpo.grpo.state import Best, RunState
from mlx_grpo.models.lora import (
    lora_parameters,
    save_adapter,
    saved_parameters,
    set_parameters,
)
from mlx_grpo.models.optimizer import optimizer_arrays, set_optimizer_arrays
from mlx_grpo.run import checkpoint, log, provenance
from mlx_grpo.run.fields import check_not_newer, check_state

CONFIG = "config.toml"
CHECKPOINTS = "checkpoints"
REPORT = "report.html"
SPARE_BYTES = 32 << 20
"""Disk space beyond the arrays: logs, manifests, what else runs on the machine."""
LOG_BYTES_PER_TOKEN = 8
"""Generous: completions.jsonl holds every sampled token as text."""


@dataclass(frozen=True)
class Snapshot:
    """A run between two stages, to go back to; MLX arrays are immutable, so these are references.

    Held through an iteration, so that one that is given up leaves no trace. Its price is memory:
    the old adapter and AdamW's two moments live until the iteration ends, three times the adapter.
    """

    adapter: Parameters
    optimizer: Parameters
    logs: dict[str, int]
    """Bytes of each log."""

    @classmethod
    def of(cls, run: Path, actor: nn.Module, optimizer: optim.Optimizer) -> "Snapshot":
        """As it is now."""
        return cls(lora_parameters(actor), optimizer_arrays(optimizer), log.sizes(run))

    def put_back(self, actor: nn.Module, optimizer: optim.Optimizer) -> None:
        """Give actor and optimizer these arrays."""
        set_parameters(actor, self.adapter)
        set_optimizer_arrays(optimizer, self.optimizer)


def check_vacant(run: Path, resume: bool) -> None:
    """Refuse to overwrite a run, and to resume where there is none.

    Raises:
        InputError: with the way out.
    """
    if resume and not is_run(run):
        raise InputError(f"{run}: no run to resume here; start without --resume")
    # hidden files: the lock, what a process left that died before its run began, .DS_Store
    if not resume and run.is_dir() and any(not p.name.startswith(".") for p in run.iterdir()):
        raise InputError(f"{run}: not empty; continue with --resume or choose another --output")


def is_run(run: Path) -> bool:
    """Whether a run was started in this directory."""
    return (run / CONFIG).is_file()


def in_place(run: Path) -> bool:
    """Whether the run that this process writes is still in its directory."""
    return is_run(run) and mine(run)


def check_in_place(run: Path) -> None:
    """Raise InputError if the directory that this process writes to is there no more."""
    if not mine(run):
        raise InputError(
            f"{run}: moved, deleted or replaced while the run went on; nothing more was written. "
            f"Put it back, then resume from its last checkpoint: {resume_command(run)}"
        )


def resume_command(run: Path) -> str:
    """What to type to resume a run."""
    return command("mlx-grpo", "train", "--resume", "--output", run)


def run_settings(run: Path, flags: Mapping[str, Any] | None = None) -> TrainConfig:
    """The settings of the run in a directory, with flags that change them.

    Raises:
        InputError: no run there, one of a newer mlx-grpo, or its settings are damaged.
    """
    if not is_run(run):
        raise InputError(f"{run}: no run here ({CONFIG} is missing)")
    try:
        return build_config(run / CONFIG, flags)
    except InputError:
        for step in checkpoint.step_directories(run / CHECKPOINTS)[:1]:
            if (step / "state.json").is_file():
                check_not_newer(str(run), read_json(step / "state.json"))
        raise


def with_date(config: TrainConfig, resume: bool) -> TrainConfig:
    """The settings with the date that chat templates see: what is set, or what the run that is
    resumed was started with, or today."""
    if config.model.template_date:
        return config
    started = resume and is_run(config.run_directory)
    date = run_settings(config.run_directory).model.template_date if started else today()
    return with_settings(config, template_date=date)


def chosen_adapter(run: Path, name: str) -> Path:
    """Directory of a run's adapter `best`, `final`, or "" for best if there.

    Raises:
        InputError: no such adapter.
    """
    if name not in ("", "best", "final"):
        raise InputError(f"--adapter: must be best or final, not '{name}'")
    candidates = [run / n for n in ([name] if name else ["best", "final"])]
    for directory in candidates:
        if directory.is_dir():
            return directory
    places = " or ".join(f"{d.name}/" for d in candidates)
    raise InputError(f"{run}: no adapter in {places}; has the run finished?")


def other_model(run: Path, actor: Path) -> str | None:
    """A line that says so if the SFT model is no longer the one that the run was trained on: an
    adapter changes the weights it has learned beside. None if it is, or if no checkpoint says."""
    states = (d / "state.json" for d in checkpoint.step_directories(run / CHECKPOINTS))
    found = next(filter(None, (provenance.recorded_digest(s, "--actor-model") for s in states)), "")
    now = directory_digest(actor)
    if found in ("", now):
        return None
    return (
        f"{actor}: not the model that {run} was trained on (sha256 {found[:8]} -> {now[:8]}); its "
        "adapter belongs to that one; put it back"
    )


def open_new(run: Path, config: TrainConfig) -> None:
    """Make the directory and write the configuration."""
    run.mkdir(parents=True, exist_ok=True)
    write_text(run / CONFIG, to_toml(config))


def check_space(run: Path, config: TrainConfig, actor: nn.Module) -> None:
    """Refuse to start where the disk cannot hold what the run will write beside what it has.

    Raises:
        InputError: with the bytes free and needed.
    """
    adapter = sum(v.nbytes for v in lora_parameters(actor).values())
    written = 1 + -(-config.run.num_iterations // config.run.checkpoint_every)
    # while a checkpoint is written the oldest is still there; best/ and final/ are one adapter each
    arrays = 3 * adapter * min(config.run.keep + 1, written) + 2 * _adapter_bytes(actor)
    completions = config.run.num_iterations * config.data.batch_size * config.rollout.K
    logs = LOG_BYTES_PER_TOKEN * completions * config.rollout.max_completion_length
    missing = max(0, arrays + logs - _written_bytes(run)) + SPARE_BYTES
    need_space(run, missing, "free some or lower --keep")


def _written_bytes(run: Path) -> int:
    """Of logs, checkpoints and adapters of a run that goes on."""
    places = [run / name for name in (CHECKPOINTS, "best", "final")]
    files = [run / name for name in log.LOGS]
    files += [file for place in places for file in place.rglob("*")]
    return sum(file.stat().st_size for file in files if file.is_file())


def checkpoint_bytes(actor: nn.Module) -> int:
    """Bytes that must be free for a checkpoint: adapter, AdamW's two moments, and to spare."""
    return 3 * _adapter_bytes(actor) + SPARE_BYTES


def _adapter_bytes(actor: nn.Module) -> int:
    """Of `best/` or `final/`."""
    return sum(v.nbytes for v in saved_parameters(actor).values())


def save(
    run: Path, config: TrainConfig, state: RunState, now: Snapshot, about: dict[str, Any]
) -> None:
    """Write a checkpoint after the iterations done so far.

    Args:
        about: the run's provenance, see `provenance.recorded`.

    Raises:
        InputError: the disk is too full; the checkpoints before are untouched.
    """
    check_in_place(run)
    size = sum(v.nbytes for part in (now.adapter, now.optimizer) for v in part.values())
    need_space(run, size + SPARE_BYTES, "free some, then continue with --resume")
    log.flush(run)
    saved = {**state.to_json(), **about, "logs": now.logs}
    checkpoint.save(
        run / CHECKPOINTS,
        checkpoint.Checkpoint(state.iteration, now.adapter, now.optimizer, saved),
        # an adapter that gives only NaN would push out all those before it
        config.run.keep + state.skipped_in_a_row,
    )


def restore(
    run: Path,
    config: TrainConfig,
    state: RunState,
    actor: nn.Module,
    optimizer: optim.Optimizer,
    about: dict[str, Any],
    allow_change: bool = False,
) -> tuple[RunState, list[str]]:
    """Load the newest good checkpoint into actor and optimizer, and cut the logs back to it.

    A run that ended before its first checkpoint starts again.

    Args:
        about: today's provenance; what changed since the checkpoint is refused or, with
            `allow_change`, told.

    Returns:
        (the state to go on from, warnings).

    Raises:
        InputError: no usable checkpoint, or one of other settings or inputs.
    """
    for place in (run, run / CHECKPOINTS):
        clear_debris(place)
    if not checkpoint.step_directories(run / CHECKPOINTS):
        for name in log.LOGS:
            log.cut(run / name, 0)
        _remove_best(run)
        write_text(run / CONFIG, to_toml(config))
        return state, []
    saved, skipped = _newest(run / CHECKPOINTS, config.run.max_skipped_steps)
    check_not_newer(str(run), saved.state)
    if "inputs" not in saved.state:
        raise InputError(f"{run}: made by an older mlx-grpo; start anew in another --output")
    check_state(str(run / CHECKPOINTS / f"step-{saved.iteration:06d}" / "state.json"), saved.state)
    warnings = [f"checkpoint skipped: {reason}" for reason in skipped]
    changes = provenance.differences(saved.state, about)
    if changes and not allow_change:
        raise InputError(
            f"{run}: not what the run was started with: {'; '.join(changes)}; put it back, or go "
            "on with it by --allow-config-change"
        )
    warnings += [f"changed since the checkpoint: {change}" for change in changes]
    hints = provenance.hints(saved.state, about)
    warnings += [f"changed since the checkpoint, last bits may differ: {hint}" for hint in hints]
    _check_shapes(run, saved.adapter, actor)
    logs = saved.state["logs"]
    Snapshot(saved.adapter, saved.optimizer, logs).put_back(actor, optimizer)
    for name in log.LOGS:
        log.cut(run / name, logs.get(name, 0))  # an older checkpoint knows fewer logs
    write_text(run / CONFIG, to_toml(config))
    restored = state.with_json(saved.state)
    if restored.skipped_in_a_row >= config.run.max_skipped_steps:  # none before them: count anew
        restored = replace(restored, skipped_in_a_row=0)
    restored = _with_changes(restored, state, provenance.changed_fields(saved.state, about))
    if provenance.evaluates_otherwise(saved.state, about):
        if restored.best.step is not None:
            warnings.append("evaluations do not compare with earlier ones: best/ is chosen anew")
        restored = replace(restored, best=Best(), peak=None, without_gain=0)
    elif changes and (left := _left_behind(run, restored.best)):
        restored = replace(restored, best=Best())
        warnings.append(f"best/ was of iteration {left}, which is undone: it is chosen anew")
    if restored.best.step is None:
        _remove_best(run)
    return restored, warnings


def _newest(checkpoints: Path, max_skipped_steps: int) -> tuple[checkpoint.Checkpoint, list[str]]:
    """The newest usable checkpoint; where NaN ended the run, the newest from before it if there is
    one: the adapter after that may give nothing else."""
    saved, skipped = checkpoint.load_newest(checkpoints)
    if _skips(saved.state) < max_skipped_steps:
        return saved, skipped
    try:
        before, damaged = checkpoint.load_newest(checkpoints, lambda state: _skips(state) == 0)
    except InputError:
        return saved, skipped
    note = f"step {saved.iteration} comes after {_skips(saved.state)} iterations of NaN or infinity"
    return before, [*damaged, f"{checkpoints}: {note}; going back to step {before.iteration}"]


def _skips(state: Mapping[str, Any]) -> int:
    """Iterations with NaN or infinity that ended at a state.json; 0 where it does not say."""
    found = state.get("skipped_in_a_row")
    return found if type(found) is int else 0


def _left_behind(run: Path, best: Best) -> int | None:
    """The iteration of `best/` where it is another one than the state knows: that of an evaluation
    after the checkpoint. The same iterations under the same settings would write it again."""
    manifest = run / "best" / MANIFEST
    step = read_json(manifest).get("step") if manifest.is_file() else None
    return step if best.step is not None and type(step) is int and step != best.step else None


def _remove_best(run: Path) -> None:
    """Remove a `best/` that the state does not know: of iterations that are to be done again."""
    if (run / "best").exists():
        shutil.rmtree(run / "best")


def _check_shapes(run: Path, adapter: Parameters, actor: nn.Module) -> None:
    shapes = {n: v.shape for n, v in lora_parameters(actor).items()}
    if {n: v.shape for n, v in adapter.items()} != shapes:
        raise InputError(
            f"{run}: its adapter does not fit --actor-model, --lora-rank and --expert-lora-rank; "
            "they cannot change within a run"
        )


def _with_changes(restored: RunState, fresh: RunState, changed: Sequence[str]) -> RunState:
    """Settings that the state carries along take their new values."""
    controller = restored.controller
    if "learning_rate" in changed:
        controller = replace(controller, learning_rate=fresh.controller.learning_rate)
    if "kl_beta" in changed:
        controller = replace(controller, beta=fresh.controller.beta)
    return replace(restored, controller=controller)


def save_named_adapter(run: Path, name: str, actor: nn.Module, step: int) -> None:
    """Write `best/` or `final/`, an adapter in mlx-lm's format, after `step` iterations; as a whole
    or not at all."""
    size = _adapter_bytes(actor)
    need_space(run, size + SPARE_BYTES, "free some, then continue with --resume")
    with atomic_directory(run / name, replace=True) as temporary:
        save_adapter(temporary, actor)
        write_manifest(temporary, {"step": step})


def log_completions(
    run: Path, step: int, groups: Sequence[Group], raw_PK: Sequence[Sequence[float]]
) -> None:
    """Append every sampled answer with its raw reward."""
    rows = [
        _answer(step, group.prompt, c, reward)
        for group, rewards in zip(groups, raw_PK, strict=True)
        for c, reward in zip(group.completions, rewards, strict=True)
    ]
    log.append(run / log.COMPLETIONS, *rows)


@dataclass(frozen=True)
class Sides:
    """An evaluation on sampled answers, and on those that people are shown; often the same."""

    sampled: Evaluation
    shown: Evaluation


def log_evaluation(run: Path, step: int, held_out: Sides, tests: Mapping[str, Sides]) -> None:
    """Append every held-out answer with its raw reward and what each source of it gave: those that
    were sampled; in a log of their own those that people are shown, where these are others, and
    those to each file of --test-prompts."""
    log.append(run / log.EVAL_COMPLETIONS, *_held_out(step, held_out.sampled))
    if held_out.shown is not held_out.sampled:
        log.append(run / log.EVAL_ANSWERS, *_shown(step, held_out.shown))
    for name, sides in tests.items():
        rows = _shown(step, sides.shown)
        log.append(run / log.EVAL_ANSWERS, *({**row, "file": name} for row in rows))


def _shown(step: int, evaluation: Evaluation) -> list[dict[str, Any]]:
    rows = _held_out(step, evaluation)
    return [{**row, "temperature": evaluation.temperature} for row in rows]


def _held_out(step: int, evaluation: Evaluation) -> list[dict[str, Any]]:
    answers = [(g.prompt, c) for g in evaluation.groups for c in g.completions]
    return [
        _answer(step, prompt, c, reward)
        | {f"rewards/{name}": scores[i] for name, scores in evaluation.by_source.items()}
        for i, ((prompt, c), reward) in enumerate(zip(answers, evaluation.rewards, strict=True))
    ]


def _answer(step: int, prompt: Prompt, completion: Completion, reward: float) -> dict[str, Any]:
    return {
        "step": step,
        "id": prompt.id,
        "prompt": prompt.messages[-1]["content"],
        "completion": completion.text,
        "finish_reason": completion.finish_reason,
        "reward": reward,
        **({"turns": completion.turns} if completion.turns else {}),
    }


def log_skips(run: Path, step: int, groups: Sequence[Group], skips: Sequence[Skip]) -> None:
    """Append what an iteration left out because a value was not finite."""
    if skips:
        log.append(run / log.SKIPPED, *(skip.row(step, groups) for skip in skips))
