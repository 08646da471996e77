"""The model card of an exported run: what it is, how to use it, what the training changed."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlx_grpo.config.settings import TrainConfig, flat_values, judge_label
from mlx_grpo.convert.source import licence
from mlx_grpo.core.commands import command
from mlx_grpo.export.fused_cost import FusedCost
from mlx_grpo.run import log
from mlx_grpo.run.directory import REPORT

FORMS = {
    "adapter": "LoRA adapter in mlx-lm's format",
    "fused": "adapter fused into the SFT model, quantized as that is",
    "dequantized": "adapter fused into the SFT model, 16 bits",
    "peft": "LoRA adapter in Hugging Face PEFT's format",
}
FIGURES = {
    "eval_reward": "reward",
    "eval_kl": "KL to the SFT model, nats per token",
    "eval_perplexity": "perplexity of reference answers",
    "eval_completions/mean_length": "length, tokens",
    "eval_completions/clipped_ratio": "answers cut off",
}
SHOWN = ("num_iterations", "batch_size", "K", "seed", "learning_rate", "lora_rank", "kl_targets")


@dataclass(frozen=True)
class Subject:
    """What a card is about."""

    run: Path
    adapter: Path
    sft: Path
    base: str | None
    form: str
    title: str
    report: bool
    """Whether the run's report lies beside the card."""


def usage(form: str, model: object, sft: object, base: str) -> str:
    """What to type to use an export: a command, or of a PEFT adapter an expression of Python."""
    if form == "peft":
        loaded = f"AutoModelForCausalLM.from_pretrained({base!r})"
        return f"PeftModel.from_pretrained({loaded}, {str(model)!r})"
    models = ("--model", sft, "--adapter-path", model) if form == "adapter" else ("--model", model)
    return command("mlx_lm.generate", *models, "--prompt", "...")


def export_card(
    subject: Subject, config: TrainConfig, cost: FusedCost | None, note: str = ""
) -> str:
    """README.md of an exported directory.

    Args:
        note: what to know before using it.
    """
    name, base = subject.title, subject.base or subject.sft.name
    if not _is_hub_id(base):
        base = Path(base).name  # where it lies on this machine is nobody's business
    use = usage(subject.form, name, subject.sft.name, base)
    return "\n".join(
        [
            *("---", *_front_matter(subject), "---", f"# {name}", ""),
            f"`{base}`, trained with GRPO by mlx-grpo: {FORMS[subject.form]}.",
            *([f"What fusing cost: {cost.describe()}."] if cost else []),
            *("", "## Use", "", "```", use, "```", ""),
            *([f"{note[0].upper()}{note[1:]}.", ""] if note else []),
            *("## What training changed", "", *_figures(subject, config.gold_names), ""),
            *("## How it was trained", "", *_settings(subject, config), ""),
        ]
    )


def _front_matter(subject: Subject) -> list[str]:
    known = licence(subject.sft)
    return [
        f"library_name: {'peft' if subject.form == 'peft' else 'mlx'}",
        *([f"license: {known}"] if known and " " not in known else []),
        *([f"base_model: {subject.base}"] if subject.base and _is_hub_id(subject.base) else []),
        *("pipeline_tag: text-generation", "tags:", "- mlx-grpo", "- grpo"),
    ]


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()


def _figures(subject: Subject, judges: Sequence[str]) -> list[str]:
    rows = [r for r in log.read(subject.run / log.METRICS) if "eval_reward" in r]
    best = subject.adapter.name == "best"
    after = next((r for r in reversed(rows) if r["eval_best"] or not best), None)
    if not rows or after is None:
        return ["The run holds no evaluation."]
    gold = {f"eval_rewards/{name}/mean": judge_label(name) for name in judges}
    named = {key: what for key, what in (FIGURES | gold).items() if key in after}
    chosen = "; chosen on the same prompts, so judge it on others" if best else ""
    return [
        f"On the run's held-out prompts, before and after iteration {after['step']}{chosen}.",
        "",
        *("| | SFT model | after GRPO |", "|---|---|---|"),
        *(
            f"| {what} | {_number(rows[0], name)} | {_number(after, name)} |"
            for name, what in named.items()
        ),
        *(["", f"The whole run: [{REPORT}]({REPORT})."] if subject.report else []),
    ]


def _number(row: dict[str, Any], name: str) -> str:
    return log.figure(row.get(name), ".0%" if name.endswith("ratio") else ".4g")


def _settings(subject: Subject, config: TrainConfig) -> list[str]:
    rewards = [n for n in (Path(config.reward.model).name,) if config.reward.model != "none"]
    rewards += [Path(spec).name for spec in config.reward.functions]
    values = flat_values(config)
    rows = {
        "rewards": ", ".join(rewards),
        **{name.replace("_", " "): values[name] for name in SHOWN},
        "made with": ", ".join(f"{p} {version(p)}" for p in ("mlx-grpo", "mlx", "mlx-lm")),
    }
    return ["| | |", "|---|---|", *(f"| {what} | {_text(value)} |" for what, value in rows.items())]


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
