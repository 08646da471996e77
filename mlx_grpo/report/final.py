"""What the last adapter of a run has lost against the best one."""

from collections.abc import Sequence

from mlx_grpo.config.settings import judge_label
from mlx_grpo.report.health import Row
from mlx_grpo.run import log


def lost_since_best(rows: Sequence[Row], gold: Sequence[str] = ()) -> str:
    """One sentence on `final/` beside `best/`, by their held-out figures; empty where they are the
    same or there is no best.

    Args:
        rows: of metrics.jsonl.
        gold: names of reward functions that are measured and not trained on.
    """
    evaluations = [r for r in rows if "eval_reward" in r]
    best = next((r for r in reversed(evaluations) if r["eval_best"]), None)
    if best is None or best is evaluations[-1]:
        return ""
    last = evaluations[-1]
    figures = {
        "reward": ("eval_reward", "+.2f", 1),
        **{judge_label(name): (f"eval_rewards/{name}/mean", ".3f", 1) for name in gold},
        "perplexity": ("eval_perplexity", ".2f", -1),
        "KL": ("eval_kl", ".4f", -1),
    }
    worse, known = [], []
    for name, (key, form, sign) in figures.items():
        old, new = best.get(key), last.get(key)
        if old is None:
            continue
        known.append(name)
        if new is None or sign * (new - old) < 0:
            worse.append(f"{name} {old:{form}} -> {log.figure(new, form)}")
    pair = f"final/ (iteration {last['step']}) has lost"
    than = f"against best/ (iteration {best['step']})"
    if not worse:
        return f"{pair} nothing {than} in {', '.join(known)}."
    return f"{pair} {than}: {', '.join(worse)}."
