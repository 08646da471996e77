"""Configuration: one frozen dataclass; the docstring under a field is its help text on the command
line.

Precedence: command line, then `--set`, then the TOML file, then the defaults here. In TOML and in
`--set` a table name and
a key join with an underscore: `[kl] control = "lr"`, `kl.control=lr` and `kl_control=lr` say the
same.
"""

import ast
import difflib
import hashlib
import inspect
import json
import math
import sys
import textwrap
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal

from mlx_grpo.errors import InputError

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover
    import tomli as tomllib


@dataclass(frozen=True)
class TrainConfig:
    """Every number of a training run."""

    actor_model: str = "weights/sft-4bit"
    """Directory of the supervised fine-tuned model (mlx-lm format, see `mlx-grpo convert`)."""
    rm_model: str = "weights/rm-4bit"
    """Directory of the reward model; `none` to train on --reward functions alone."""
    prompts: str = "data/rl_prompts.jsonl"
    """Training prompts, JSONL."""
    eval_prompts: str = "data/eval_prompts.jsonl"
    """Held-out prompts, JSONL; a `response` field serves as reference answer for the perplexity."""
    output: str = ""
    """Run directory; empty means runs/seed-SEED."""
    seed: int = 42
    """Seed of every random number of the run."""

    num_iterations: int = 800
    """Iterations: one rollout and its update each."""
    batch_size: int = 16
    """Prompts per iteration."""
    K: int = 6
    """Completions per prompt."""
    temperature: float = 1.0
    """Sampling temperature; log-probs are taken at the same temperature."""
    max_completion_length: int = 256
    """Longest completion in tokens."""
    max_prompt_length: int = 256
    """Prompts longer than this, chat template included, are skipped and counted."""
    decode_rows: int = 0
    """Completions decoded together; 0 means all of an iteration."""

    learning_rate: float = 1e-4
    """Learning rate of AdamW. LoRA wants more than full fine-tuning does."""
    weight_decay: float = 0.0
    """Weight decay of AdamW."""
    max_grad_norm: float = 0.5
    """Global norm the gradient is clipped to."""
    minibatch_size: int = 4
    """Prompts per optimizer step."""
    epochs: int = 1
    """Passes over each rollout."""
    rows_per_pass: int = 0
    """Completions per forward and backward pass; fewer need less memory; 0 means a whole group."""
    lora_rank: int = 16
    """Rank of the LoRA on all linear layers of the blocks."""
    lora_scale: float = 2.0
    """Factor of the LoRA (absolute: what other libraries write as alpha / rank)."""

    clip_range: float = 0.2
    """Clip of the importance ratio: 1 - c to 1 + c."""
    clip_range_high: float = 0.0
    """Upper clip where it differs (clip-higher, DAPO); 0 means the same as --clip-range."""
    loss_aggregation: Literal["sequence", "token", "constant"] = "sequence"
    """Mean over tokens then completions, over all tokens, or by the constant longest length (Dr.
    GRPO)."""
    ratio_level: Literal["token", "sequence"] = "token"
    """Importance ratio per token, or per completion (GSPO)."""
    scale_advantages: Literal["none", "std"] = "none"
    """Divide the advantages by the group's standard deviation or not."""

    reward: tuple[str, ...] = ()
    """Custom reward function, module:function or file.py:function; may be given several times."""
    reward_weights: tuple[float, ...] = ()
    """Weights of the custom rewards, in their order; empty means 1 each."""
    rm_weight: float = 1.0
    """Weight of the reward model's score beside custom rewards."""
    reward_alpha: float = 0.99
    """Decay of the score normaliser's moving mean and standard deviation."""
    reward_clip: float = 5.0
    """Normalised scores are clipped to plus or minus this."""

    kl_control: Literal["reward", "lr", "none"] = "reward"
    """What holds the KL on target: a per-completion penalty in the reward, the learning rate, or
    nothing."""
    kl_schedule: Literal["phased", "constant", "linear"] = "phased"
    """How the KL target moves over the run."""
    kl_targets: tuple[float, ...] = (0.05, 0.02, 0.01)
    """KL targets in nats per token."""
    kl_phases: tuple[float, ...] = ()
    """Relative lengths of the phases; empty means equal ones."""
    kl_beta: float = 10.0
    """First weight of the KL penalty in the shaped reward (unit: normalised score per nat per
    token)."""
    kl_gain: float = 1.0
    """Gain of the controller; the relative error is clipped to 0.2, so beta moves by at most 20 %
    times this."""
    kl_beta_min: float = 0.1
    """Smallest penalty weight."""
    kl_beta_max: float = 1000.0
    """Largest penalty weight."""
    kl_lr_min: float = 1e-6
    """Smallest learning rate under --kl-control lr."""
    kl_lr_max: float = 1e-3
    """Largest learning rate under --kl-control lr."""
    kl_stop_factor: float = 1.5
    """Skip an iteration's remaining minibatches once old-to-new KL passes this times the target; 0
    means never."""

    eval_every: int = 50
    """Iterations between evaluations (also one before the first and one after the last)."""
    eval_limit: int = 0
    """Held-out prompts used by the evaluations during training; 0 means all."""
    checkpoint_every: int = 50
    """Iterations between checkpoints."""
    keep: int = 3
    """Checkpoints kept."""
    max_skipped_steps: int = 5
    """Stop after this many iterations in a row whose update met a value that is not finite."""

    @property
    def run_directory(self) -> Path:
        """Where the run is written."""
        return Path(self.output or f"runs/seed-{self.seed}")

    def digest(self) -> str:
        """Hash of all that shapes the mathematics; a resumed run must agree on it."""
        free = ("output", "keep", "checkpoint_every", "decode_rows")
        shaping = {k: v for k, v in asdict(self).items() if k not in free}
        return hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class RewardTrainConfig:
    """Every number of a reward-model training."""

    model: str = "weights/sft-4bit"
    """Directory of the SFT model the reward model grows on."""
    pairs: str = "data/preference_pairs.jsonl"
    """Preference pairs, JSONL."""
    output: str = "weights/rm"
    """Directory to write."""
    seed: int = 42
    """Seed of the split, the order and the LoRA."""
    epochs: int = 1
    """Passes over the training pairs."""
    batch_size: int = 4
    """Prompts per optimizer step, each with all of its pairs."""
    learning_rate: float = 2e-4
    """First learning rate; it falls linearly to zero."""
    weight_decay: float = 0.01
    """Weight decay of AdamW."""
    max_grad_norm: float = 1.0
    """Global norm the gradient is clipped to."""
    lora_rank: int = 8
    """Rank of the LoRA."""
    lora_scale: float = 2.0
    """Factor of the LoRA (absolute)."""
    lora_blocks: int = 0
    """Last blocks that get a LoRA; fewer train faster; 0 means all."""
    valid_fraction: float = 0.1
    """Share of the prompts held out; all pairs of a prompt are on one side."""
    max_length: int = 512
    """Pairs longer than this many tokens, prompt included, are skipped and counted."""


@cache
def field_help(cls: type) -> dict[str, str]:
    """The docstring under each field."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    texts = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
        ):
            texts[field.target.id] = str(text.value.value)
    return texts


def field_types(cls: type) -> dict[str, Any]:
    """The type of each field, evaluated."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls)}


def _known(cls: type, key: str, place: str) -> str:
    name = key.replace(".", "_").replace("-", "_")
    names = [f.name for f in fields(cls)]
    if name not in names:
        near = difflib.get_close_matches(name, names, 1)
        hint = f"did you mean '{near[0]}'?" if near else "see --help for the fields"
        raise InputError(f"{place}: unknown key '{key}'; {hint}")
    return name


def _coerce(place: str, name: str, kind: Any, value: Any) -> Any:
    """The value in the field's type; a text is parsed, a wrong type is refused."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if value not in arguments:
            raise InputError(
                f"{place}: field '{name}' must be one of {', '.join(arguments)}, not {value!r}"
            )
        return value
    if origin is tuple:
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, Sequence):
            items = [items]
        return tuple(_coerce(place, name, arguments[0], i) for i in items if i != "")
    try:
        if kind is str and isinstance(value, str):
            return value
        if kind is int and not isinstance(value, bool):
            if isinstance(value, str) or float(value) == int(value):
                return int(value)
        elif kind is float and not isinstance(value, bool):
            number = float(value)
            if math.isfinite(number):
                return number
    except (TypeError, ValueError, OverflowError):
        pass
    raise InputError(f"{place}: field '{name}' must be {_TYPE_NAMES[kind]}, not {value!r}")


_TYPE_NAMES = {str: "a text", int: "a whole number", float: "a finite number"}


def _flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= (
            _flatten(value, f"{prefix}{key}.")
            if isinstance(value, Mapping)
            else {f"{prefix}{key}": value}
        )
    return flat


def read_toml(path: Path) -> dict[str, Any]:
    """Keys and values of a TOML file, tables flattened with dots.

    Raises:
        InputError: missing file or bad syntax.
    """
    try:
        return _flatten(tomllib.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: not valid TOML: {e}") from None


def build_config(
    file: Path | None = None,
    assignments: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> TrainConfig:
    """The configuration from a TOML file, `--set key=value` texts and command-line flags, checked.

    Raises:
        InputError: unknown key, wrong type, or a value out of range.
    """
    kinds = field_types(TrainConfig)
    values: dict[str, Any] = {}
    for key, value in (read_toml(file) if file else {}).items():
        name = _known(TrainConfig, key, str(file))
        values[name] = _coerce(str(file), name, kinds[name], value)
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"--set {text}: write it as key=value")
        name = _known(TrainConfig, key.strip(), f"--set {text}")
        values[name] = _coerce(f"--set {text}", name, kinds[name], value.strip())
    config = TrainConfig(**{**values, **typed_flags(TrainConfig, flags or {})})
    check(config)
    return config


POSITIVE = {
    "temperature",
    "learning_rate",
    "max_grad_norm",
    "lora_scale",
    "reward_clip",
    "kl_beta",
    "kl_gain",
}
AT_LEAST_ZERO = {
    *(
        "decode_rows",
        "rows_per_pass",
        "eval_limit",
        "weight_decay",
        "kl_stop_factor",
        "lora_blocks",
        "clip_range_high",
    ),
    *("seed",),
}


def need(config: Any, name: str, condition: bool, rule: str) -> None:
    """Raise InputError that `name` must be `rule` unless `condition` holds."""
    if not condition:
        flag = name if name == "K" else name.replace("_", "-")
        raise InputError(f"--{flag}: must be {rule}, not {getattr(config, name)!r}")


def typed_flags(cls: type, flags: Mapping[str, Any]) -> dict[str, Any]:
    """Command-line texts in the types of the fields.

    Raises:
        InputError: a text that does not fit.
    """
    kinds = field_types(cls)
    return {
        n: _coerce(f"--{n.replace('_', '-')}", n, kinds[n], value) for n, value in flags.items()
    }


def check_ranges(config: Any) -> None:
    """Refuse numbers that no configuration can work with: counts below 1, rates that are not
    positive.

    Raises:
        InputError: naming flag, value and bound.
    """
    for field in fields(config):
        name, value = field.name, getattr(config, field.name)
        if name in POSITIVE:
            need(config, name, value > 0, "more than 0")
        elif name in AT_LEAST_ZERO:
            need(config, name, value >= 0, "0 or more")
        elif type(value) is int:
            need(config, name, value >= 1, "at least 1")
        elif name == "valid_fraction":
            need(config, name, 0 < value < 1, "between 0 and 1")


def check(config: TrainConfig) -> None:
    """Refuse values that cannot work.

    Raises:
        InputError: naming flag, value and bound.
    """
    check_ranges(config)
    c = config
    need(c, "K", c.K >= 2, "at least 2: an advantage compares the answers of a group")
    need(c, "clip_range", 0 < c.clip_range < 1, "between 0 and 1")
    need(c, "reward_alpha", 0 <= c.reward_alpha < 1, "at least 0 and below 1")
    need(
        c, "kl_targets", bool(c.kl_targets) and min(c.kl_targets) > 0, "one or more numbers above 0"
    )
    need(
        c,
        "kl_phases",
        len(c.kl_phases) in (0, len(c.kl_targets)),
        "as many numbers as --kl-targets",
    )
    need(c, "kl_phases", all(p > 0 for p in c.kl_phases), "numbers above 0")
    need(
        c,
        "kl_beta_min",
        0 < c.kl_beta_min <= c.kl_beta <= c.kl_beta_max,
        "at most kl-beta <= kl-beta-max",
    )
    need(c, "kl_lr_min", 0 < c.kl_lr_min <= c.kl_lr_max, "above 0 and at most kl-lr-max")
    need(
        c,
        "reward_weights",
        len(c.reward_weights) in (0, len(c.reward)),
        "as many numbers as --reward",
    )
    need(c, "rm_model", c.rm_model != "none" or bool(c.reward), "a directory, or give --reward")


def to_toml(config: TrainConfig) -> str:
    """The configuration as TOML, each field under its help text."""
    lines = []
    for name, value in asdict(config).items():
        lines += [f"# {field_help(TrainConfig)[name]}", f"{name} = {json.dumps(value)}", ""]
    return "\n".join(lines)
