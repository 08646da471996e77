"""Settings: frozen dataclasses by concern. The docstring under a field is its help text.

Every setting has one flat name, which is its flag and its old TOML key: `evaluation.every` is
`eval_every` and `--eval-every`. Where the two differ, the field says so with `named`. How files and
flags become settings: `sources.py`.
"""

from dataclasses import dataclass, field, fields, replace
from math import ceil
from pathlib import Path
from typing import Any, Literal, NewType

FEWEST_MEASURED = 6
"""Completions of an iteration whose KL must be measured for the controller to hold its target, in
runs of 90 iterations or more (bench/RESULTS.md)."""
ENOUGH_TO_MEASURE_LESS = 90
"""Iterations from which so few hold it."""
REPEATED = ("reward", "eval_reward", "test_prompts", "log")
"""Settings whose flag may be given several times."""
FREE = (
    *("output", "keep", "checkpoint_every", "max_skipped_steps", "reward_timeout"),
    *("show_every", "log", "keep_awake", "early_stopping_patience"),
)
"""May change when a run is resumed: no number depends on them."""
ROUNDING = ("decode_rows", "rows_per_pass", "memory_limit", "rm_residency")
"""May change as well: only the order of sums depends on them, so the last bits may differ. A change
that makes the weights be held in another form is compared separately."""
BY_CONTENT = (
    *("prompts", "eval_prompts", "test_prompts", "actor_model", "rm_model"),
    "chat_template",
)
"""Paths: their content counts, not their place. Everything else shapes the numbers,
`num_iterations` too, because the phases of the KL target are shares of it."""
TrackerName = Literal["tensorboard", "trackio", "wandb"]
Dtype = Literal["auto", "fp32", "bf16", "fp16"]
Weights = Literal["auto", "packed", "dense"]
JsonObject = NewType("JsonObject", str)
"""A JSON object as a text, keys sorted, or nothing; a TOML file may give it as a table."""


def named(flat: str, default: Any) -> Any:
    """A field whose flag is not simply its own name."""
    return field(default=default, metadata={"flat": flat})


def flag_of(flat: str) -> str:
    """The flag of a setting, by its flat name."""
    return "--K" if flat == "K" else f"--{flat.replace('_', '-')}"


@dataclass(frozen=True)
class ModelSettings:
    """The SFT model and the adapter that is trained on it."""

    actor: str = named("actor_model", "weights/sft-4bit")
    """SFT model: a directory in mlx-lm format, as `mlx-grpo convert` writes it."""
    precision: Dtype = "auto"
    """Dtype the blocks compute in; what lies behind them is always fp32. auto is fp32 on a CPU,
    fp16 on M1 and M2, bf16 on other GPUs, or what MLX_GRPO_PRECISION says."""
    weights: Weights = "auto"
    """Whether quantized weights stay packed or are expanded once; auto expands them on a CPU, or
    does what MLX_GRPO_WEIGHTS says."""
    template_date: str = ""
    """Date that a chat template sees as today, such as 2026-01-31; empty means the day on which the
    run starts, and the run keeps it."""
    chat_template: str = ""
    """File with a Jinja chat template to use in place of the SFT model's own. A reward model that
    has a template of its own keeps it."""
    chat_template_kwargs: JsonObject = JsonObject("")
    """Arguments of the SFT model's chat template as JSON, such as '{"enable_thinking": true}'.
    Thinking is off unless this turns it on."""
    lora_rank: int = 16
    """Rank of the LoRA on the linear layers of the blocks."""
    expert_lora_rank: int = 2
    """Rank of the LoRA on each expert of a mixture of experts; its parameters grow with the number
    of experts. 0 leaves the experts frozen. Routers always are."""
    lora_scale: float = 2.0
    """Factor of the LoRA (absolute: what other libraries write as alpha / rank)."""
    lora_alpha: float = 0.0
    """The same as alpha, which sets --lora-scale to alpha / --lora-rank; 0 means that --lora-scale
    is given."""
    lora_target_modules: tuple[str, ...] = ()
    """Linear layers that get a LoRA, such as q_proj,v_proj or self_attn.q_proj; empty means all."""
    lora_layers: int = 0
    """Last blocks that get a LoRA. Fewer cost less, because the backward pass ends there; 0 means
    all."""


@dataclass(frozen=True)
class DataSettings:
    """The prompts to train on."""

    prompts: str = "data/rl_prompts.jsonl"
    """Training prompts: JSONL, JSON, CSV, Parquet, or a Hub data set as owner/name:split."""
    prompt_column: str = ""
    """Field of both prompt files that holds the prompt, if it is not `prompt` or `messages`."""
    response_column: str = ""
    """Field of --eval-prompts that holds the reference answer, if it is not `response`."""
    system_prompt: str | None = None
    """System message of every prompt, training and held-out, in place of the rows' own. An empty
    one removes theirs. Reward models and reward functions see it as well."""
    max_prompt_length: int = 256
    """Prompts longer than this many tokens, chat template included, are skipped and counted."""
    batch_size: int = 6
    """Prompts per iteration."""
    prompt_sampling: Literal["uniform", "adaptive"] = "uniform"
    """Visit every prompt once per epoch, or prefer those whose completions differ in reward."""


@dataclass(frozen=True)
class RolloutSettings:
    """How completions are sampled."""

    K: int = 6
    """Completions per prompt."""
    temperature: float = 1.0
    """Sampling temperature; log-probs are taken at the same temperature."""
    max_completion_length: int = 256
    """Longest completion, in tokens."""
    decode_rows: int = 0
    """Completions decoded together; 0 means all of an iteration, or as many as fit in memory."""
    environment: str = ""
    """Class whose public methods are tools for the model, file.py:Class or module:Class; its
    `reset` begins and its `reward` marks a completion (see docs/environments.md)."""
    max_tool_calling_iterations: int = 0
    """Times that the tool calls of a completion are answered; 0 means any number within
    --max-completion-length, which counts observations too."""
    tool_timeout: float = 10.0
    """Seconds that a tool may take; after that the model is told so."""


@dataclass(frozen=True)
class RewardSettings:
    """How completions are scored, and how scores become advantages."""

    model: str = named("rm_model", "weights/rm-4bit")
    """Reward model directory; `none` to train on --reward functions alone."""
    model_weight: float = named("rm_weight", 1.0)
    """Weight of the reward model's score beside custom rewards."""
    residency: Literal["auto", "resident", "swap"] = named("rm_residency", "auto")
    """Whether a reward model with its own backbone stays in memory or is read again for each
    scoring; auto keeps it if it fits."""
    functions: tuple[str, ...] = named("reward", ())
    """Custom reward function, module:function or file.py:function; may be given several times."""
    weights: tuple[float, ...] = named("reward_weights", ())
    """Weights of the custom rewards, in their order; empty means 1 each."""
    timeout: float = named("reward_timeout", 60.0)
    """Seconds a custom reward function may take for the completions of one prompt; after that the
    run ends."""
    soft_punish_cache: int = 0
    """Last tokens before --max-completion-length in which a completion loses reward: nothing at
    their beginning, 1 at the limit (DAPO's soft overlong punishment); 0: none."""
    alpha: float = named("reward_alpha", 0.99)
    """Decay of the moving mean and standard deviation that normalise scores."""
    clip: float = named("reward_clip", 5.0)
    """Normalised scores are clipped to plus or minus this."""
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = (
        "sum_then_normalize"
    )
    """Whether several rewards are summed as they are, or each is first normalised within its group
    (GDPO), so that one of larger numbers does not drown the others."""
    scale_advantages: Literal["none", "group", "batch", "std"] = "none"
    """Whether advantages are divided by a standard deviation: of the group's scores, or of all of
    the iteration. std is the older name of group."""


@dataclass(frozen=True)
class KLSettings:
    """How the KL to the reference is held on its target."""

    control: Literal["decay", "reward", "lr", "none"] = named("kl_control", "decay")
    """What holds the KL on target: decay of the adapter towards the reference, a penalty in the
    reward, the learning rate, or nothing."""
    schedule: Literal["phased", "constant", "linear"] = named("kl_schedule", "phased")
    """How the KL target moves over the run."""
    targets: tuple[float, ...] = named("kl_targets", (0.05, 0.02, 0.01))
    """KL targets in nats per token."""
    share: float = named("kl_share", 0.125)
    """Share of the completions on which the KL is measured, drawn at random, but at least six
    per iteration. Under --kl-control reward and in evaluations it is measured on all of them."""
    phases: tuple[float, ...] = named("kl_phases", ())
    """Relative lengths of the phases; empty means equal lengths."""
    beta: float = named("kl_beta", 10.0)
    """First weight of the KL penalty of --kl-control reward, in normalised score per (nat per
    token)."""
    gain: float = named("kl_gain", 1.0)
    """Gain of the controller; it was tuned at 1 (bench/learning/kl_simulation.py)."""
    beta_min: float = named("kl_beta_min", 0.1)
    """Smallest penalty weight."""
    beta_max: float = named("kl_beta_max", 1000.0)
    """Largest penalty weight."""
    lr_min: float = named("kl_lr_min", 1e-6)
    """Smallest learning rate under --kl-control lr."""
    lr_max: float = named("kl_lr_max", 1e-3)
    """Largest learning rate under --kl-control lr."""
    stop_factor: float = named("kl_stop_factor", 1.5)
    """Skip the remaining minibatches once the update's own KL passes this times the target; 0:
    never."""

    def measured(self, completions: int) -> int:
        """How many of an iteration's completions the KL is measured on."""
        share = 1.0 if self.control == "reward" else self.share
        return max(ceil(share * completions), min(FEWEST_MEASURED, completions))


@dataclass(frozen=True)
class OptimizerSettings:
    """The loss and the steps of the optimizer."""

    learning_rate: float = 1e-4
    """Learning rate of AdamW. LoRA needs a higher one than full fine-tuning."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate falls over the run's iterations, from its full value towards zero.
    Under --kl-control lr it multiplies the rate that the controller sets."""
    warmup_ratio: float = 0.0
    """Share of the iterations over which the learning rate first rises to its full value."""
    weight_decay: float = 0.0
    """Weight decay of AdamW."""
    max_grad_norm: float = 0.5
    """Global norm the gradient is clipped to."""
    minibatch_size: int = 2
    """Prompts per optimizer step."""
    epochs: int = 1
    """Passes over each rollout."""
    update_rows: int = 3
    """Completions per prompt that the update learns from: those whose rewards differ most; 0, or K
    or more, means all."""
    rows_per_pass: int = 0
    """Completions per forward and backward pass. Fewer need less memory; 0 means all of similar
    length, or as many as fit in memory."""
    clip_range: float = 0.2
    """Clip range of the importance ratio: 1 - c to 1 + c."""
    clip_range_high: float = 0.0
    """Upper clip range where it differs (clip-higher, DAPO); 0 means the same as --clip-range."""
    truncated: Literal["keep", "mask"] = "keep"
    """Whether completions cut off at --max-completion-length are learned from. With mask they are
    compared with the others of their group but take no part in the loss."""
    loss_aggregation: Literal["sequence", "token", "constant"] = "sequence"
    """Mean over tokens and then completions, mean over all tokens, or sum divided by the longest
    possible completion (Dr. GRPO)."""
    ratio_level: Literal["token", "sequence"] = "token"
    """Importance ratio per token, or per completion (GSPO)."""


@dataclass(frozen=True)
class EvaluationSettings:
    """Held-out evaluation during training."""

    prompts: str = named("eval_prompts", "data/eval_prompts.jsonl")
    """Held-out prompts, in the same forms; a `response` field is the reference answer for the
    perplexity."""
    tests: tuple[str, ...] = named("test_prompts", ())
    """Further held-out prompts: measured at each evaluation under the file's name, as
    eval_NAME_reward, and never used to choose best/. May be given several times."""
    every: int = named("eval_every", 50)
    """Iterations between evaluations. There is also one before the first iteration and one after
    the last."""
    limit: int = named("eval_limit", 0)
    """Held-out prompts used by the evaluations during training; 0 means all."""
    temperature: float = named("eval_temperature", 0.0)
    """Temperature of the held-out answers that the report and `mlx-grpo eval` show and compare; 0
    takes the likeliest token each time. The KL, and what chooses best/, stay on answers sampled at
    --temperature; give the same number here to show those."""
    num_generations: int = named("num_generations_eval", 1)
    """Answers sampled per held-out prompt. With several, rewards that are 0 or 1 also get mean@n
    and pass@k, as rewards/NAME/pass@4."""
    metric: str = named("metric_for_best_model", "perplexity")
    """Held-out figure that chooses best/ among the evaluations whose KL is below its target:
    perplexity, reward, rewards/NAME/mean or any other that metrics.jsonl has with `eval_` before
    it. Rewards are better when they are higher, other figures when they are lower."""
    patience: int = named("early_stopping_patience", 0)
    """End the run after this many evaluations in a row in which the figure that chooses best/ was
    not better than ever before, whatever the KL; 0: never."""
    rewards: tuple[str, ...] = named("eval_reward", ())
    """Like --reward, but only measured, never trained on: a gold judge that shows whether the
    reward is being fooled. May be given several times."""

    @property
    def test_names(self) -> dict[str, str]:
        """What metrics call each --test-prompts file: its name without directory and ending."""
        return {Path(file).name.split(".")[0].replace(":", "-"): file for file in self.tests}

    @property
    def best_metric(self) -> str:
        """What metrics.jsonl calls the figure that chooses best/."""
        return f"eval_{self.metric.removeprefix('eval_')}"


@dataclass(frozen=True)
class RunSettings:
    """The run itself: how long, where, what is kept and shown."""

    output: str = ""
    """Run directory; empty means runs/seed-SEED."""
    seed: int = 42
    """Seed of every random number of the run."""
    num_iterations: int = 800
    """Iterations, each one rollout and its update."""
    checkpoint_every: int = 50
    """Iterations between checkpoints."""
    keep: int = 3
    """How many checkpoints to keep."""
    memory_limit: str = ""
    """Most memory MLX may take, such as 2.5GB or 6GiB; empty means what the machine recommends.
    Sizes left at 0 are chosen to fit (see `mlx-grpo plan`)."""
    show_every: int = 10
    """Iterations between tables of sample answers on a terminal; 0: none."""
    log: tuple[TrackerName, ...] = ()
    """Also log metrics to tensorboard, trackio or wandb; may be given several times."""
    keep_awake: Literal["auto", "off"] = "auto"
    """Whether a Mac is kept from falling asleep while the run goes on (auto, by `caffeinate`) or
    not."""
    max_skipped_steps: int = 5
    """Stop after this many iterations in a row with NaN or infinity."""


@dataclass(frozen=True)
class TrainConfig:
    """All settings of a training run."""

    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    rollout: RolloutSettings = field(default_factory=RolloutSettings)
    reward: RewardSettings = field(default_factory=RewardSettings)
    kl: KLSettings = field(default_factory=KLSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    run: RunSettings = field(default_factory=RunSettings)

    @property
    def run_directory(self) -> Path:
        """Where the run is written."""
        return Path(self.run.output or f"runs/seed-{self.run.seed}")

    @property
    def columns(self) -> dict[str, str]:
        """What `prompt` and `response` are called in the file of held-out prompts."""
        return {"prompt": self.data.prompt_column, "response": self.data.response_column}

    @property
    def gold_names(self) -> list[str]:
        """What the metrics call the --eval-reward functions."""
        return [spec.rpartition(":")[2] for spec in self.evaluation.rewards]


def judge_label(name: str) -> str:
    """What tables and charts call an --eval-reward function."""
    return "gold judge" if name == "gold" else f"gold judge: {name}"


def decoding(temperature: float) -> str:
    """How answers were taken, in words that stand before them."""
    return f"sampled (temperature {temperature:g})" if temperature else "greedy"


@dataclass(frozen=True)
class Setting:
    """Where a setting lives: `config.SECTION.FIELD`; its flat name names its flag."""

    flat: str
    section: str
    field: str
    default: Any


def _settings() -> dict[str, Setting]:
    found = [
        Setting(f.metadata.get("flat", f.name), section.name, f.name, f.default)
        for section in fields(TrainConfig)
        for f in fields(section.default_factory)  # type: ignore[arg-type]
    ]
    return {s.flat: s for s in found}


SETTINGS = _settings()
"""Every setting of a training run by its flat name, in the order of the sections."""


def flat_values(config: TrainConfig) -> dict[str, Any]:
    """The value of every setting, by flat name."""
    return {s.flat: getattr(getattr(config, s.section), s.field) for s in SETTINGS.values()}


def with_settings(config: TrainConfig, **values: Any) -> TrainConfig:
    """The configuration with other values, by flat name.

    Raises:
        KeyError: an unknown name.
    """
    sections: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        s = SETTINGS[name]
        sections.setdefault(s.section, {})[s.field] = value
    new = {name: replace(getattr(config, name), **own) for name, own in sections.items()}
    return replace(config, **new)


def train_config(**values: Any) -> TrainConfig:
    """A configuration from flat names, as flags give them: `train_config(K=4, eval_every=10)`.

    Raises:
        KeyError: an unknown name.
    """
    return with_settings(TrainConfig(), **values)


@dataclass(frozen=True)
class RewardTrainConfig:
    """All settings of a reward model training."""

    model: str = "weights/sft-4bit"
    """Directory of the SFT model the reward model grows on."""
    precision: Dtype = "auto"
    """Dtype the blocks compute in; auto is fp32 on a CPU, fp16 on M1 and M2, bf16 on other GPUs, or
    what MLX_GRPO_PRECISION says."""
    weights: Weights = "auto"
    """Whether quantized weights stay packed or are expanded once; auto expands them on a CPU, or
    does what MLX_GRPO_WEIGHTS says."""
    pairs: str = "data/preference_pairs.jsonl"
    """Preference pairs: JSONL, JSON, CSV, Parquet, or a Hub data set as owner/name:split."""
    output: str = "weights/rm"
    """Directory to write."""
    seed: int = 42
    """Seed of the split, the order and the LoRA."""
    epochs: int = 3
    """Passes over the training pairs, at the most."""
    batch_size: int = 4
    """Prompts per optimizer step, each with all of its pairs."""
    learning_rate: float = 4e-4
    """First learning rate; it falls linearly to zero."""
    weight_decay: float = 0.01
    """Weight decay of AdamW."""
    max_grad_norm: float = 1.0
    """Global norm the gradient is clipped to."""
    lora_rank: int = 8
    """Rank of the LoRA."""
    expert_lora_rank: int = 1
    """Rank of the LoRA on each expert of a mixture of experts; 0 leaves the experts frozen. Routers
    always are."""
    lora_scale: float = 2.0
    """Factor of the LoRA (absolute)."""
    lora_blocks: int = 0
    """Last blocks that get a LoRA; fewer train faster; 0 means all."""
    eval_every: int = 20
    """Optimizer steps between evaluations on the held-out prompts that choose the weights."""
    patience: int = 5
    """Stop after this many evaluations without a lower held-out loss; 0: never. The weights of the
    lowest are kept either way."""
    valid_fraction: float = 0.1
    """Share of the prompts held out to choose the weights; 0: keep the last ones."""
    test_fraction: float = 0.1
    """Share of the prompts held out for the figures, and for nothing else."""
    template_date: str = ""
    """Date that a chat template sees as today, such as 2026-01-31; empty means today's."""
    prompt_column: str = ""
    """Field that holds the prompt, if it is not `prompt` or `messages`."""
    chosen_column: str = ""
    """Field that holds the preferred answer, if it is not `chosen`."""
    rejected_column: str = ""
    """Field that holds the other answer, if it is not `rejected`."""
    max_length: int = 512
    """Pairs longer than this many tokens, prompt included, are skipped and counted."""
