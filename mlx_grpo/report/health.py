"""What a run's metrics say is wrong with it, and what to try.

Iterations are noisy, so the mean of the first fifth is compared with that of the last. Held-out
evaluations are compared with each other.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

Row = dict[str, Any]

WORSE_GOLD = 0.02
"""Relative fall of the gold judge that counts; below it is noise on a hundred prompts."""
WORSE_PERPLEXITY = 1.05
LONGER = 1.5
REPEATED = 0.2
"""Share of repeated 4-grams beyond which a growing one counts."""
TOGETHER = 3
"""Evaluations whose mean stands for each, where a peak is looked for: a single one is noise."""
MOST = 0.5
CLIPPED = 0.3
"""Share of clipped tokens: healthy runs stay far below."""
KL_ABOVE, KL_BELOW = 1.5, 0.5
MISMATCH = 0.05
"""Nats per token between sampled and scored log-probs: noise that adds about 0.002 to a measured
KL, half the square of its deviation."""
FEWEST = 5
"""Iterations without which nothing is said about them."""


@dataclass(frozen=True)
class Finding:
    """Something a user should know."""

    title: str
    evidence: str
    """The figures."""
    advice: str
    """What to try."""
    judge: str = ""
    """Which one, where there may be several."""

    @property
    def about(self) -> tuple[str, str]:
        """What stays the same from one evaluation to the next."""
        return self.title, self.judge


def findings(rows: Sequence[Row], gold: Sequence[str] = ()) -> list[Finding]:
    """Everything that the rows of metrics.jsonl show to be wrong, the most serious first.

    Args:
        gold: names of reward functions that are measured and not trained on.
    """
    evaluations = [r for r in rows if "eval_reward" in r]
    iterations = [r for r in rows if "reward" in r]
    return [
        *_hacking(evaluations, gold),
        *_trends(iterations),
        *_kl(iterations),
        *_no_best(evaluations),
        *_skipped(rows),
    ]


def new_findings(rows: Sequence[Row], gold: Sequence[str] = ()) -> list[Finding]:
    """Those that were not there at the evaluation before the last."""
    ends = [i for i, row in enumerate(rows) if "eval_reward" in row]
    told = findings(rows[: ends[-2] + 1], gold) if len(ends) > 1 else []
    return [f for f in findings(rows, gold) if f.about not in {t.about for t in told}]


def _hacking(evaluations: Sequence[Row], gold: Sequence[str]) -> Iterator[Finding]:
    reward = _ends(evaluations, "eval_reward")
    if reward is None or reward[1] <= reward[0]:
        return
    rose = f"held-out reward {reward[0]:+.2f} -> {reward[1]:+.2f}"
    for name in gold:
        judged = _ends(evaluations, f"eval_rewards/{name}/mean")
        if judged and judged[1] < judged[0] - WORSE_GOLD * abs(judged[0]):
            yield Finding(
                "The reward rises while the gold judge falls",
                f"{rose}, {name} {judged[0]:.3f} -> {judged[1]:.3f}",
                "The reward is being fooled: read the answers whose reward rose most. Use an "
                "earlier checkpoint, lower --kl-targets, or fix the reward model (more pairs of "
                "the kind it overrates; a custom --reward beside it).",
                name,
            )
        else:
            yield from _past_the_peak(evaluations, name)
    perplexity = _ends(evaluations, "eval_perplexity")
    if perplexity and perplexity[1] > WORSE_PERPLEXITY * perplexity[0]:
        yield Finding(
            "The reward rises while the perplexity worsens",
            f"{rose}, perplexity of reference answers {perplexity[0]:.1f} -> {perplexity[1]:.1f}",
            "The model forgets how good answers read. Lower --kl-targets or --learning-rate; "
            "best/ holds the checkpoint before the damage, if one passed the gate.",
        )


def _past_the_peak(evaluations: Sequence[Row], name: str) -> Iterator[Finding]:
    """Over-optimisation (Gao et al. 2022, arXiv:2210.10760): from some iteration on the reward
    rises while the gold judge falls."""
    keys = ("eval_reward", f"eval_rewards/{name}/mean")
    rows = [r for r in evaluations if all(r.get(key) is not None for key in keys)]
    rewards, golds = ([fmean(r[k] for r in part) for part in _windows(rows)] for k in keys)
    if len(golds) <= TOGETHER:
        return
    peak = golds.index(max(golds))
    if rewards[-1] > rewards[peak] and golds[-1] < golds[peak] - WORSE_GOLD * abs(golds[peak]):
        step = rows[peak + TOGETHER // 2]["step"]
        yield Finding(
            "The reward is over-optimised",
            f"since about iteration {step} held-out reward {rewards[peak]:+.2f} -> "
            f"{rewards[-1]:+.2f}, {name} {golds[peak]:.3f} -> {golds[-1]:.3f}, means of {TOGETHER} "
            "evaluations",
            "What the reward gained after that, the judge does not see. Use a checkpoint from "
            "about there, train for fewer iterations, or lower --kl-targets.",
            name,
        )


def _windows(rows: Sequence[Row]) -> list[Sequence[Row]]:
    return [rows[i : i + TOGETHER] for i in range(len(rows) - TOGETHER + 1)]


@dataclass(frozen=True)
class Rule:
    """A finding that follows from one metric, the mean of its first fifth against its last."""

    metric: str
    holds: Callable[[float, float], bool]
    title: str
    evidence: str
    """A format of `first`, `last` and `times`, their ratio."""
    advice: str


RULES = (
    Rule(
        "completions/mean_length",
        lambda first, last: last > LONGER * first,
        "Answers grow",
        "{first:.0f} -> {last:.0f} tokens, x {times:.1f}",
        "Reward models often prefer long answers: compare 'longer one wins' in the output of "
        "train-rm. Add a --reward that charges for tokens, lower --max-completion-length, or try "
        "--loss-aggregation constant.",
    ),
    Rule(
        "completions/mean_length",
        lambda first, last: last < first / LONGER,
        "Answers shrink",
        "{first:.0f} -> {last:.0f} tokens, x {times:.2f}",
        "The reward may pay for brevity alone: read the shortest answers. Answers that learn to "
        "end by themselves also get shorter; then nothing is wrong. Else add a --reward that asks "
        "for content, or lower --kl-targets.",
    ),
    Rule(
        "completions/repetition",
        lambda first, last: last > max(REPEATED, LONGER * first),
        "Answers repeat themselves",
        "{first:.0%} -> {last:.0%} of the 4-grams in an answer came before in it",
        "The policy collapses into loops that the reward does not punish. Use an earlier "
        "checkpoint, lower --kl-targets or --learning-rate, or add a --reward against repetition.",
    ),
    Rule(
        "frac_dead_groups",
        lambda first, last: last > MOST,
        "Most groups teach nothing",
        "{last:.0%} of the groups have equal rewards for all answers that are learned from, or no "
        "such answer",
        "Raise --K or --temperature, try --prompt-sampling adaptive, use a reward with more steps "
        "between bad and good, or choose prompts that the model gets right some of the time.",
    ),
    Rule(
        "clip_ratio/region_mean",
        lambda first, last: last > CLIPPED,
        "The clip silences many tokens",
        "{last:.0%} of the ratios are outside the clip range",
        "The steps are too large for their rollouts: lower --learning-rate or --epochs, or raise "
        "--minibatch-size.",
    ),
    Rule(
        "sampling/sampling_logp_difference/mean",
        lambda first, last: last > MISMATCH,
        "What is scored is not what was sampled",
        "log-probs differ by {last:.3f} nats per token between rollout and update",
        "The measured KL and the importance ratios are wrong by as much. Try --precision fp32; if "
        "the difference stays, this model computes something else in a rollout: please report it.",
    ),
    Rule(
        "completions/clipped_ratio",
        lambda first, last: last > MOST,
        "Most answers are cut off",
        "{last:.0%} reach --max-completion-length without an end",
        "The reward sees fragments. Raise --max-completion-length, reward answers that end by "
        "themselves (finish_reasons, --soft-punish-cache), or learn only from those that do "
        "(--truncated mask).",
    ),
)


def _trends(iterations: Sequence[Row]) -> Iterator[Finding]:
    for rule in RULES:
        means = _fifths(iterations, rule.metric)
        if means and rule.holds(*means):
            first, last = means
            times = last / first if first else 0.0
            evidence = rule.evidence.format(first=first, last=last, times=times)
            yield Finding(rule.title, evidence, rule.advice)


def _kl(iterations: Sequence[Row]) -> Iterator[Finding]:
    ratios = [{"ratio": r["kl"] / r["kl/target"]} for r in iterations if r.get("kl") is not None]
    ratio = _fifths(ratios, "ratio")
    if not ratio:
        return
    last = iterations[-1]
    evidence = f"{ratio[1]:.2f} times its target, at the end {last['kl/target']:g} nats per token"
    if ratio[1] > KL_ABOVE:
        yield Finding(
            "The KL is above its target",
            evidence,
            "The controller does not hold the policy: lower --learning-rate or raise --kl-gain "
            "(with --kl-control reward also --kl-beta); with --kl-control none nothing holds it.",
        )
    elif ratio[1] < KL_BELOW:
        yield Finding(
            "The KL is far below its target",
            evidence,
            "There is room left to learn in: train for more iterations, or raise "
            "--learning-rate. Nothing is wrong if the reward is where you want it.",
        )


def _no_best(evaluations: Sequence[Row]) -> Iterator[Finding]:
    if len(evaluations) > 1 and not any(r["eval_best"] for r in evaluations):
        measured = _values(evaluations[1:], "eval_kl")
        lowest = (
            f"lowest held-out KL {min(measured):.4f} nats per token"
            if measured
            else "every KL was NaN or infinite"
        )
        yield Finding(
            "No evaluation has passed the KL gate",
            f"{lowest}; there is no best/ adapter",
            "best/ needs a held-out KL below the current target. Raise --kl-targets, or hold the "
            "policy closer with a lower --learning-rate or a higher --kl-gain.",
        )


def _skipped(rows: Sequence[Row]) -> Iterator[Finding]:
    whole = sum("skipped" in r for r in rows)
    steps = sum(r.get("policy/skipped_nonfinite", 0) for r in rows)
    if whole or steps:
        yield Finding(
            "NaN or infinity was met",
            f"{whole} iterations and {steps} optimizer steps were skipped; see skipped.jsonl",
            "Look at the answers there: a reward function may divide by zero. If the loss or "
            "gradient is named, lower --learning-rate.",
        )


def _values(rows: Sequence[Row], key: str) -> list[float]:
    return [r[key] for r in rows if r.get(key) is not None]


def _ends(rows: Sequence[Row], key: str) -> tuple[float, float] | None:
    values = _values(rows, key)
    return (values[0], values[-1]) if len(values) > 1 else None


def _fifths(rows: Sequence[Row], key: str) -> tuple[float, float] | None:
    """Means of the first and of the last fifth."""
    values = _values(rows, key)
    if len(values) < FEWEST:
        return None
    part = len(values) // 5
    return fmean(values[:part]), fmean(values[-part:])
