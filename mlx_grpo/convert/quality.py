"""What quantization changed, measured on a few dozen texts against the source's own precision."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_grpo.backend import apply_policy
from mlx_grpo.data import answer_tokens, load_prompts, read_jsonl
from mlx_grpo.errors import InputError
from mlx_grpo.logprob import chunk_tokens
from mlx_grpo.models.backbone import load_backbone
from mlx_grpo.models.reward_model import RewardModel, conversation_tokens, load_reward_model
from mlx_grpo.models.stages import Stages, shift_right

TEXTS = 24
MAX_PROMPT = 512


@dataclass(frozen=True)
class Cost:
    """Change against the source; None where it does not apply."""

    kl_per_token: float | None = None
    perplexity_before: float | None = None
    perplexity_after: float | None = None
    pearson: float | None = None
    agreement: float | None = None
    kept: bool = False
    """The source's own values were kept."""

    def describe(self) -> str:
        """For the table."""
        if self.kl_per_token is not None and self.perplexity_before and self.perplexity_after:
            change = self.perplexity_after / self.perplexity_before - 1
            return f"KL {self.kl_per_token:.4f} nats/token, perplexity {change:+.1%}"
        if self.pearson is not None and self.agreement is not None:
            return f"score correlation {self.pearson:.3f}, pairwise agreement {self.agreement:.1%}"
        return "values kept" if self.kept else "not measured"


def check_texts(texts: Path) -> None:
    """Raise InputError unless the file has texts to measure on."""
    count = sum(isinstance(row.get("response"), str) for _, row in read_jsonl(texts))
    if count < 2:
        raise InputError(
            f"{texts}: {count} rows have a 'response', two are needed to measure what quantization "
            "cost; give another --texts, or --no-verify"
        )


def policy_cost(source: nn.Module, converted: Path, texts: Path) -> Cost:
    """KL(source || converted) per token and both perplexities, on reference answers."""
    new = load_backbone(converted)
    apply_policy(source, replace(new.policy, dense=False))
    prompts, _ = load_prompts(texts, new.tokenizer, MAX_PROMPT)
    chosen = [p for p in prompts if p.response][:TEXTS]
    kl = nll_old = nll_new = 0.0
    count = 0
    for prompt in chosen:
        answer = mx.array([answer_tokens(new.tokenizer, prompt.response or "")])
        hidden = [_predicting(Stages(m), prompt.token_ids, answer) for m in (source, new.model)]
        width = chunk_tokens(hidden[0][0].vocabulary)
        for start in range(0, answer.size, width):
            part = slice(start, start + width)
            old_TV, new_TV = (_log_softmax(s.head(h[:, part])[0]) for s, h in hidden)
            picked = answer[0, part, None]
            sums = (
                (mx.exp(old_TV) * (old_TV - new_TV)).sum(),
                -mx.take_along_axis(old_TV, picked, -1).sum(),
                -mx.take_along_axis(new_TV, picked, -1).sum(),
            )
            kl, nll_old, nll_new = (
                a + s.item() for a, s in zip((kl, nll_old, nll_new), sums, strict=True)
            )
        count += answer.size
    return Cost(kl / count, math.exp(nll_old / count), math.exp(nll_new / count))


def _predicting(
    stages: Stages, prompt_ids: tuple[int, ...], answer: mx.array
) -> tuple[Stages, mx.array]:
    hidden = shift_right(*stages.forward(mx.array([prompt_ids]), answer))
    return stages, hidden.astype(mx.float32)  # a bf16 head would round the logits


def _log_softmax(logits: mx.array) -> mx.array:
    z = logits.astype(mx.float32)
    return z - mx.logsumexp(z, axis=-1, keepdims=True)


def pair_cost(
    weights: dict[str, mx.array],
    config: dict[str, Any],
    head: dict[str, mx.array],
    converted: Path,
    texts: Path,
) -> Cost:
    """Correlation of scores and agreement on all pairs of texts, source against converted."""
    from mlx_grpo.convert.weights import model_from

    new_backbone = load_backbone(converted)
    new = load_reward_model(converted, new_backbone)
    source = model_from(config, {n: v.astype(mx.float32) for n, v in weights.items()})
    old = RewardModel(Stages(source), head["weight"], head.get("bias"), new_backbone.tokenizer)
    prompts, _ = load_prompts(texts, new_backbone.tokenizer, MAX_PROMPT)
    scores: list[list[float]] = [[], []]
    for prompt in [p for p in prompts if p.response][:TEXTS]:
        ids = conversation_tokens(new_backbone.tokenizer, prompt.messages, prompt.response or "")
        for model, found in zip((old, new), scores, strict=True):
            found += model.score_ids(ids[:-1], [ids[-1:]])
    pairs = list(combinations(range(len(scores[0])), 2))
    same = sum((scores[0][i] > scores[0][j]) == (scores[1][i] > scores[1][j]) for i, j in pairs)
    return Cost(pearson=pearson(*scores), agreement=same / len(pairs))


def pearson(a: Sequence[float], b: Sequence[float]) -> float:
    """Correlation coefficient; 1 where neither varies."""
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    covariance = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    spread = math.sqrt(sum((x - mean_a) ** 2 for x in a) * sum((y - mean_b) ** 2 for y in b))
    return covariance / spread if spread else 1.0
