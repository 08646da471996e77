"""Configuration: frozen dataclasses; the docstring under a field is its help on the command line.

How files and flags become one: `sources.py`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

REPEATED = ("reward", "eval_reward", "log")
"""Fields whose option may be given several times."""
FREE = (
    *("output", "keep", "checkpoint_every", "max_skipped_steps", "reward_timeout"),
    *("show_every", "log"),
)
"""May change when a run is resumed: no number depends on them."""
ROUNDING = ("decode_rows", "rows_per_pass", "memory_limit", "rm_residency")
"""May change as well: only the order of sums depends on them, so the last bits may differ; unless
they make the weights be held in another form, which is compared on its own."""
BY_CONTENT = ("prompts", "eval_prompts", "actor_model", "rm_model")
"""Paths: what is there counts, not where it is. Everything else shapes the numbers,
`num_iterations` too, because the KL targets' phases are shares of it."""
TrackerName = Literal["tensorboard", "trackio", "wandb"]


def flag_of(name: str) -> str:
    """The command line's option for a field."""
    return "--K" if name == "K" else f"--{name.replace('_', '-')}"


@dataclass(frozen=True)
class TrainConfig:
    """Every number of a training run."""

    actor_model: str = "weights/sft-4bit"
    """Directory of the supervised fine-tuned model (mlx-lm format, see `mlx-grpo convert`)."""
    rm_model: str = "weights/rm-4bit"
    """Directory of the reward model; `none` to train on --reward functions alone."""
    prompts: str = "data/rl_prompts.jsonl"
    """Training prompts: JSONL, JSON, CSV, Parquet, or a Hub data set as owner/name:split."""
    eval_prompts: str = "data/eval_prompts.jsonl"
    """Held-out prompts, likewise; a `response` field serves as reference answer for the
    perplexity."""
    output: str = ""
    """Run directory; empty means runs/seed-SEED."""
    seed: int = 42
    """Seed of every random number of the run."""

    template_date: str = ""
    """Date that a chat template sees as today, such as 2026-01-31; empty means the day on which the
    run starts, which it then keeps."""
    prompt_column: str = ""
    """Field of both prompt files that holds the prompt, where it is not `prompt` or `messages`."""
    response_column: str = ""
    """Field of --eval-prompts that holds the reference answer, where it is not `response`."""

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
    """Completions decoded together; 0 means all of an iteration, or as many as memory allows."""

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
    """Completions per forward and backward pass; fewer need less memory; 0 means all of similar
    length, which lets the first forward serve as old log-probs, or as many as memory allows."""
    memory_limit: str = ""
    """Most memory MLX may take, as 2.5GB or 6GiB; empty means what the machine recommends. What is
    left at 0 above is chosen to fit (see `mlx-grpo plan`)."""
    rm_residency: Literal["auto", "resident", "swap"] = "auto"
    """A reward model of its own: kept in memory, or read anew for each scoring; auto: kept if it
    fits."""
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
    eval_reward: tuple[str, ...] = ()
    """Like --reward, but only measured, never trained on: a gold judge that shows whether the
    reward is being fooled. May be given several times."""
    reward_timeout: float = 60.0
    """Seconds a custom reward function may take for one prompt's completions; then the run ends."""
    rm_weight: float = 1.0
    """Weight of the reward model's score beside custom rewards."""
    reward_alpha: float = 0.99
    """Decay of the score normaliser's moving mean and standard deviation."""
    reward_clip: float = 5.0
    """Normalised scores are clipped to plus or minus this."""

    kl_control: Literal["decay", "reward", "lr", "none"] = "decay"
    """What holds the KL on target: decay of the adapter towards the reference, a penalty in the
    reward, the learning rate, or nothing."""
    kl_schedule: Literal["phased", "constant", "linear"] = "phased"
    """How the KL target moves over the run."""
    kl_targets: tuple[float, ...] = (0.05, 0.02, 0.01)
    """KL targets in nats per token."""
    kl_phases: tuple[float, ...] = ()
    """Relative lengths of the phases; empty means equal ones."""
    kl_beta: float = 10.0
    """First weight of the KL penalty of --kl-control reward, in normalised score per (nat per
    token)."""
    kl_gain: float = 1.0
    """Gain of the controller: 1 is what was tuned (bench/learning/kl_simulation.py)."""
    kl_beta_min: float = 0.1
    """Smallest penalty weight."""
    kl_beta_max: float = 1000.0
    """Largest penalty weight."""
    kl_lr_min: float = 1e-6
    """Smallest learning rate under --kl-control lr."""
    kl_lr_max: float = 1e-3
    """Largest learning rate under --kl-control lr."""
    kl_stop_factor: float = 1.5
    """Skip remaining minibatches once old-to-new KL passes this times the target; 0: never."""

    eval_every: int = 50
    """Iterations between evaluations (also one before the first and one after the last)."""
    eval_limit: int = 0
    """Held-out prompts used by the evaluations during training; 0 means all."""
    checkpoint_every: int = 50
    """Iterations between checkpoints."""
    keep: int = 3
    """Checkpoints kept, newest first."""
    show_every: int = 10
    """Iterations between tables of answers on a terminal; 0: none."""
    log: tuple[TrackerName, ...] = ()
    """Where else the figures go: tensorboard, trackio, wandb; may be given several times."""
    max_skipped_steps: int = 5
    """Stop after this many iterations in a row that met a value that is not finite."""

    @property
    def run_directory(self) -> Path:
        """Where the run is written."""
        return Path(self.output or f"runs/seed-{self.seed}")

    @property
    def columns(self) -> dict[str, str]:
        """What `prompt` and `response` are called in the file of held-out prompts."""
        return {"prompt": self.prompt_column, "response": self.response_column}

    @property
    def gold_names(self) -> list[str]:
        """What the figures call the --eval-reward functions."""
        return [spec.rpartition(":")[2] for spec in self.eval_reward]


@dataclass(frozen=True)
class RewardTrainConfig:
    """Every number of a reward-model training."""

    model: str = "weights/sft-4bit"
    """Directory of the SFT model the reward model grows on."""
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
    """Field that holds the prompt, where it is not `prompt` or `messages`."""
    chosen_column: str = ""
    """Field that holds the preferred answer, where it is not `chosen`."""
    rejected_column: str = ""
    """Field that holds the other answer, where it is not `rejected`."""
    max_length: int = 512
    """Pairs longer than this many tokens, prompt included, are skipped and counted."""
