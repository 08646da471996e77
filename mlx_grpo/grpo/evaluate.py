"""How good is a policy on held-out prompts: reward, KL, perplexity, length; which checkpoint is
best; who wins."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from mlx_grpo.core.stats import source_means
from mlx_grpo.core.stopping import SafePoint, never_stop
from mlx_grpo.core.types import Group, Prompt
from mlx_grpo.data.chat import answer_tokens
from mlx_grpo.distributed.gather import Rewards, all_groups, all_rewards
from mlx_grpo.distributed.ranks import ALONE, Ranks
from mlx_grpo.grpo.logprob import token_logps
from mlx_grpo.grpo.reference import kl_to_reference, mean_kl
from mlx_grpo.grpo.rollout import Sampling, rollout
from mlx_grpo.grpo.turns import Acting
from mlx_grpo.models.backbone import Backbone
from mlx_grpo.models.decoder import Decoder
from mlx_grpo.models.merging import merged_for_rollout
from mlx_grpo.rewards.mix import RewardMix

PURPOSE = "evaluate"  # fixed keys: every evaluation draws with the same random numbers
Answers = dict[str, tuple[int, ...]]
Progress = Callable[[str, int, int], None]
"""Told (what, done, total)."""


@dataclass(frozen=True)
class Evaluation:
    """Figures of one policy on held-out prompts."""

    reward: float
    """Mean raw reward of the policy's own answers."""
    kl: float
    """KL to the reference on the policy's own answers, k3, nats per token."""
    perplexity: float
    """Perplexity of reference answers."""
    mean_length: float
    """Tokens per answer."""
    finished: float
    """Share of answers that ended by themselves."""
    rewards: tuple[float, ...]
    """Raw reward of each answer."""
    groups: tuple[Group, ...]
    by_source: dict[str, list[float | None]] = field(default_factory=dict)
    """What each reward model or function gave to each answer; None where it does not apply."""

    def metrics(self) -> dict[str, float]:
        """For metrics.jsonl."""
        return {
            "eval_reward": self.reward,
            "eval_kl": self.kl,
            "eval_perplexity": self.perplexity,
            "eval_completions/mean_length": self.mean_length,
            "eval_completions/clipped_ratio": 1 - self.finished,
            **source_means(self.by_source, "eval_rewards"),
        }


@dataclass(frozen=True)
class Evaluator:
    """Everything an evaluation needs but the policy."""

    backbone: Backbone
    reference: Decoder
    prompts: tuple[Prompt, ...]
    answers: Answers
    """Reference answers by prompt id, for the perplexity."""
    rewards: RewardMix
    sampling: Sampling
    seed: int
    acting: Acting | None = None
    """Environments that answer the policy, in training too."""

    def __call__(
        self,
        policy: Decoder,
        progress: Progress = lambda *_: None,
        safe_point: SafePoint = never_stop,
        ranks: Ranks = ALONE,
    ) -> Evaluation:
        """Evaluate a policy; of several ranks each takes its share of the prompts."""

        def after_each(what: str, done: int, total: int) -> None:
            progress(what, done, total)
            safe_point()

        with merged_for_rollout(self.backbone, policy.model) as model:
            mine = rollout(
                model,
                self.backbone.tokenizer,
                self.backbone.stop_ids,
                self.prompts,
                self.sampling,
                self.seed,
                PURPOSE,
                on_token=writing("held-out answers", self.sampling, after_each),
                safe_point=safe_point,
                share=ranks.share,
                acting=self.acting,
            )
        groups = all_groups(ranks, mine, self.prompts)
        found: Rewards = ([], {})
        for batch in [mine] if self.rewards.at_once else [[g] for g in mine]:
            rewards, sources = self.rewards(batch, safe_point)
            found[0].extend(rewards)
            for name, scores in sources.items():
                found[1].setdefault(name, []).extend(scores)
            after_each("held-out rewards", len(found[0]), len(mine))
        raw_PK, by_source = all_rewards(ranks, found, self.sampling.k)
        flat = [reward for row in raw_PK for reward in row]
        completions = [c for g in groups for c in g.completions]
        return Evaluation(
            reward=sum(flat) / len(flat),
            kl=0.0 if policy is self.reference else self._kl(mine, after_each, ranks),
            perplexity=perplexity(policy, self.prompts, self.answers, after_each, ranks),
            mean_length=sum(c.model_tokens for c in completions) / len(completions),
            finished=sum(c.finish_reason == "stop" for c in completions) / len(completions),
            rewards=tuple(flat),
            groups=tuple(groups),
            by_source=by_source,
        )

    def _kl(self, groups: Sequence[Group], progress: Progress, ranks: Ranks) -> float:
        found = []
        for done, group in enumerate(groups, 1):
            rows = [list(range(len(group.completions)))]
            temperature = self.sampling.temperature or 1.0
            found += kl_to_reference([group], rows, self.reference, temperature)
            progress("held-out KL", done, len(groups))
        return mean_kl(found, ranks)[0]


def writing(what: str, sampling: Sampling, progress: Progress) -> Callable[[int, int, int], None]:
    """Tells `progress` of a rollout: its answers, and where those are that are being written."""
    most = sampling.max_tokens
    return lambda done, total, token: progress(f"{what} (token {token} of {most})", done, total)


def reference_answers(
    tokenizer: Any, prompts: Sequence[Prompt], answer: Callable[[Sequence[Prompt]], list[Group]]
) -> Answers:
    """The file's `response` where it has one, else what the reference model answers (asked once,
    with fixed keys)."""
    written = {p.id: answer_tokens(tokenizer, p.response) for p in prompts if p.response}
    missing = [p for p in prompts if not p.response]
    drawn = {g.prompt.id: g.completions[0].token_ids for g in answer(missing)} if missing else {}
    return written | drawn


def perplexity(
    policy: Decoder,
    prompts: Sequence[Prompt],
    answers: Answers,
    progress: Progress = lambda *_: None,
    ranks: Ranks = ALONE,
) -> float:
    """exp of the mean negative log-prob per token of the reference answers, at temperature 1."""
    each, mine = [], prompts[ranks.share]
    for done, prompt in enumerate(mine, 1):
        progress("held-out perplexity", done, len(mine))
        row_1T = mx.array([answers[prompt.id]])
        logp_1T = token_logps(policy, mx.array([prompt.token_ids]), row_1T, mx.ones(row_1T.shape))
        each.append((-logp_1T.sum().item(), row_1T.size))
    total, tokens = map(sum, zip(*ranks.merged(each), strict=True))
    return math.exp(min(total / tokens, 700.0))
