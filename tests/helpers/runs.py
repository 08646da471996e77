"""Run directories written by hand, for what reads them: no model, no training."""

import json
from pathlib import Path
from typing import Any

from mlx_grpo.config.settings import train_config
from mlx_grpo.config.sources import to_toml

HOSTILE = "</p><script>document.title = 1</script><img src=x onerror=alert(1)> & "
STAGES = ("rollout", "reward", "logprob", "update")


def write_run(run: Path, seed: int = 42, steps: int = 60, **changes: Any) -> Path:
    """A run of `steps` iterations with an evaluation every ten; the reward rises, gold falls."""
    from tests.helpers.tiny import write_jsonl  # seconds, and the rest is used by short programs

    run.mkdir(parents=True)
    named = {"num_iterations": 60, "eval_every": 10, "kl_beta": 5.0, "output": str(run)}
    gold = {"eval_reward": ("mlx_grpo.rubric:gold",)}
    config = train_config(seed=seed, **{**named, **gold, **changes})
    (run / "config.toml").write_text(to_toml(config))
    rows, answers = [], []
    for step in range(steps + 1):
        if step:
            rows.append(iteration(step, seed))
        if step % 10 == 0:
            rows.append(evaluation(step, seed))
            answers += [answer(step, i, seed) for i in range(12)]
    write_jsonl(run / "metrics.jsonl", rows)
    write_jsonl(run / "eval_completions.jsonl", answers)
    state = {"versions": {"mlx": "1.2.3"}, "inputs": {"--prompts": "ab" * 32}}
    checkpoint = run / "checkpoints" / f"step-{steps:06d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps(state))
    return run


def write_trained(run: Path, sft: Path, adapted: Any) -> Path:
    """A run whose `final/` is the adapter of a model; it has no figures."""
    from mlx_grpo.run.directory import save_named_adapter  # as above

    run.mkdir()
    (run / "config.toml").write_text(to_toml(train_config(actor_model=str(sft))))
    (run / "metrics.jsonl").touch()
    save_named_adapter(run, "final", adapted, step=1)
    return run


def iteration(step: int, seed: int = 42) -> dict[str, Any]:
    """A row of metrics.jsonl."""
    target = (0.05, 0.02, 0.01)[min((step - 1) // 20, 2)]
    return {
        "step": step,
        "reward": 0.1 * step + 0.01 * (seed % 7) * (step % 5),
        "rewards/reward_model/mean": 0.1 * step,
        "rewards/gold/mean": 0.7 - 0.003 * step,
        "kl": target * (1 + 0.1 * (step % 3 - 1)),
        "kl/target": target,
        "kl/beta": 5.0 + step / 10,
        "kl/decay": 0.0,
        "learning_rate": 1e-4,
        "clip_ratio/region_mean": 0.02,
        "frac_dead_groups": 0.1,
        "completions/mean_length": 40.0 - step / 10,
        "completions/clipped_ratio": 0.3,
        "policy/skipped_nonfinite": 0,
        **{f"time/{s}": 4.0 + i for i, s in enumerate(STAGES)},
        **{f"memory/{s}": 8e8 + 1e8 * i for i, s in enumerate(STAGES)},
        "time/iteration": 22.0,
        "time/left": 22.0 * (60 - step),
        "time/tokens_per_second": 120.0,
        "time/update_tokens_per_second": 80.0,
        "memory/peak": 1.1e9,
    }


def evaluation(step: int, seed: int = 42) -> dict[str, Any]:
    """An evaluation's row of metrics.jsonl."""
    return {
        "step": step,
        "eval_reward": 0.1 * step + 0.1 * (seed % 3),
        "eval_rewards/gold/mean": 0.7 - 0.003 * step,
        "eval_kl": 0.0005 * step,
        "eval_perplexity": 20.0 - step / 20,
        "eval_completions/mean_length": 41.0 - step / 10,
        "eval_completions/clipped_ratio": 0.3,
        "eval_best": step in (10, 20, 30),
        "time/evaluate": 30.0,
        "memory/evaluate": 1.3e9,
    }


def answer(step: int, index: int, seed: int = 42) -> dict[str, Any]:
    """A held-out answer."""
    return {
        "step": step,
        "id": f"p{index}",
        "prompt": f"Why is number {index} as it is?",
        "completion": f"Answer {index} after {step} iterations. " + HOSTILE * (index == 4),
        "finish_reason": "length" if index % 4 == 0 else "stop",
        "reward": index + 0.05 * step * (1 if index > 3 else -1),
        "rewards/gold": 0.5 + 0.01 * index,
    }
