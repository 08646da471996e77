"""What a run's numbers come from: settings, the contents of its inputs, library versions.

On resume these are compared with those the checkpoint recorded.
"""

import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlx_grpo.config.settings import (
    BY_CONTENT,
    FREE,
    ROUNDING,
    TrainConfig,
    flag_of,
    flat_values,
)
from mlx_grpo.core.errors import InputError
from mlx_grpo.data.tables import digest
from mlx_grpo.files.atomic import read_json
from mlx_grpo.files.manifest import directory_digest, sha256
from mlx_grpo.rewards.functions import CustomReward

BEFORE = {"update_rows": 0, "kl_share": 1.0}
"""What versions without these settings did."""

EVALUATED_BY = {
    *("seed", "temperature", "max_completion_length", "eval_limit", "num_generations_eval"),
    *("metric_for_best_model", "reward", "reward_weights", "rm_weight", "soft_punish_cache"),
    *("prompt_column", "response_column", "system_prompt", "max_prompt_length", "template_date"),
    *("chat_template_kwargs", "environment", "max_tool_calling_iterations"),
}
"""Settings that the figures of an evaluation depend on, beside those which no run may change."""


def versions() -> dict[str, str]:
    """Versions of what shapes the numbers."""
    return {name: version(name) for name in ("mlx-grpo", "mlx", "mlx-lm", "numpy", "transformers")}


def input_digests(config: TrainConfig, custom: Sequence[CustomReward]) -> dict[str, str]:
    """sha256 of every input, by the flag that names it."""
    rm = "none" if config.reward.model == "none" else directory_digest(Path(config.reward.model))
    template = config.model.chat_template
    return {
        "--prompts": digest(Path(config.data.prompts)),
        "--eval-prompts": digest(Path(config.evaluation.prompts)),
        "--actor-model": directory_digest(Path(config.model.actor)),
        "--rm-model": rm,
        **{f"--test-prompts {n}": digest(Path(p)) for n, p in config.evaluation.test_names.items()},
        **({"--chat-template": sha256(Path(template))} if template else {}),
        **{f"--reward {r.name}": found for r in custom if (found := r.digest())},
    }


def recorded(
    config: TrainConfig, inputs: dict[str, str], held: str, ranks: int = 1
) -> dict[str, Any]:
    """What a checkpoint keeps of it, as JSON reads it back.

    Args:
        held: how weights are held and activations computed, see `Precision`.
        ranks: processes that share the work; only the order of sums depends on it.
    """
    about = {
        "config": flat_values(config),
        "inputs": inputs,
        "versions": versions(),
        "weights": held,
        "ranks": ranks,
    }
    return dict(json.loads(json.dumps(about)))


def recorded_digest(state: Path, flag: str) -> str | None:
    """sha256 of an input that a state.json keeps; None if it does not, or if it is damaged: such a
    checkpoint is skipped on resume as well."""
    try:
        inputs = read_json(state).get("inputs")
    except InputError:
        return None
    return inputs.get(flag) if isinstance(inputs, dict) else None


def changed_fields(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Fields of the configuration that shape the numbers and differ."""
    before, after = _settings(saved), now["config"]
    shaping = [n for n in after if n not in FREE + ROUNDING + BY_CONTENT]
    return [n for n in shaping if before[n] != after[n]]


def changed_inputs(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Flags of the inputs whose content differs."""
    before, after = saved["inputs"], now["inputs"]
    return [f for f in sorted(before.keys() | after.keys()) if before.get(f) != after.get(f)]


def evaluates_otherwise(saved: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether figures of an evaluation cannot be compared with those before the checkpoint."""
    inputs = (flag.split()[0] for flag in changed_inputs(saved, now))
    return bool(
        set(changed_fields(saved, now)) & EVALUATED_BY
        or any(flag not in ("--prompts", "--test-prompts") for flag in inputs)
    )


def _settings(saved: dict[str, Any]) -> dict[str, Any]:
    """Those of a checkpoint; a field that its version did not have is at what it did then."""
    defaults = json.loads(json.dumps(flat_values(TrainConfig())))
    return {**defaults, **BEFORE, **saved["config"]}


def differences(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A text for each difference that changes the numbers: `--flag old -> new`."""
    before, after = _settings(saved), now["config"]
    flags = [
        f"{flag_of(n)} {_shown(before[n])} -> {_shown(after[n])}"
        for n in changed_fields(saved, now)
    ]
    contents = [
        f"{flag} other content (sha256 {saved['inputs'].get(flag, 'none')[:8]} -> "
        f"{now['inputs'].get(flag, 'none')[:8]})"
        for flag in changed_inputs(saved, now)
    ]
    held = saved.get("weights", now["weights"])  # states from before it was recorded
    causes = "--precision, --weights, their MLX_GRPO_ variables, --memory-limit or the machine"
    same = now["weights"].startswith(held)  # older states say only `packed`
    form = [] if same else [f"weights {held} -> {now['weights']} ({causes})"]
    return flags + contents + form


def hints(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A text for each difference that may change the last bits only."""
    before, after = _settings(saved), now["config"]
    flags = [
        f"{flag_of(n)} {_shown(before[n])} -> {_shown(after[n])}"
        for n in ROUNDING
        if before[n] != after[n]
    ]
    libraries = [
        f"{name} {saved['versions'].get(name)} -> {new}"
        for name, new in now["versions"].items()
        if saved["versions"].get(name) != new
    ]
    before_ranks = saved.get("ranks", 1)  # states from before there were several
    ranks = [f"ranks {before_ranks} -> {now['ranks']}"] if before_ranks != now["ranks"] else []
    return flags + libraries + ranks


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
