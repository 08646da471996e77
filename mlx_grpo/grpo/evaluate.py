"""How good is a policy on held-out prompts: reward, KL, perplexity, length; which checkpoint is
best; who wins."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mlx_grpo.core.stats import pass_rates, repetition, source_means
from mlx_grpo.core.stopping import SafePoint, never_stop
from mlx_grpo.core.types import Group, Prompt, TokenIds
from mlx_grpo.data.chat import answer_tokens
from mlx_grpo.distributed.gather import Rewards, all_groups, all_rewards
from mlx_grpo.distributed.ranks import ALONE, Ranks
from mlx_grpo.grpo.logprob import answer_logps
from mlx_grpo.grpo.reference import kl_of_single_answers, kl_to_reference, mean_kl
from mlx_grpo.grpo.rollout import Sampling, rollout
from mlx_grpo.grpo.turns import Acting
from mlx_grpo.models.backbone import Backbone
from mlx_grpo.models.decoder import Decoder
from mlx_grpo.models.merging import merged_for_rollout
from mlx_grpo.rewards.mix import RewardMix

PURPOSE = "evaluate"  # fixed keys: every evaluation draws with the same random numbers
Answers = dict[str, TokenIds]
Progress = Callable[[str, int, int], None]
"""Told (what, done, total)."""


@dataclass(frozen=True)
class Evaluation:
    """Figures of one policy on held-out prompts."""

    reward: float
    """Mean raw reward of the policy's own answers."""
    kl: float
    """KL to the reference on answers sampled as the run samples them, k3, nats per token."""
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
    temperature: float = 1.0
    """Of the answers; 0 is greedy."""
    repetition: float = 0.0
    """Share of each answer's 4-grams that came before in it, see `core/stats.py`."""

    @property
    def per_prompt(self) -> int:
        """Answers to each prompt."""
        return len(self.rewards) // max(len(self.groups), 1)

    def metrics(self, prefix: str = "eval") -> dict[str, float]:
        """For metrics.jsonl."""
        return {
            f"{prefix}_reward": self.reward,
            f"{prefix}_kl": self.kl,
            f"{prefix}_perplexity": self.perplexity,
            f"{prefix}_completions/mean_length": self.mean_length,
            f"{prefix}_completions/clipped_ratio": 1 - self.finished,
            f"{prefix}_completions/repetition": self.repetition,
            **source_means(self.by_source, f"{prefix}_rewards"),
            **{
                f"{prefix}_rewards/{source}/{name}": rate
                for source, scores in self.by_source.items()
                for name, rate in pass_rates(scores, self.per_prompt).items()
            },
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
        """Evaluate a policy on sampled answers; of several ranks each takes its share of the
        prompts."""
        work = _Work(progress, safe_point, ranks)
        mine = self._answer(policy, self.sampling, work)
        scored = self._score(mine, self.sampling.k, work)
        kl, perplexed = self._kl(policy, mine, work), self._perplexity(policy, work)
        return self._figures(scored, kl, perplexed, self.sampling.temperature)

    def shown(
        self,
        policy: Decoder,
        sampled: Evaluation,
        temperature: float,
        progress: Progress = lambda *_: None,
        safe_point: SafePoint = never_stop,
        ranks: Ranks = ALONE,
    ) -> Evaluation:
        """The same policy by the answers that people are shown: one per prompt, at a temperature of
        its own. KL and perplexity stay those of `sampled`."""
        if self.shows_samples(temperature):
            return sampled
        how, work = self._one_each(temperature), _Work(progress, safe_point, ranks)
        scored = self._score(self._answer(policy, how, work), how.k, work)
        return self._figures(scored, sampled.kl, sampled.perplexity, temperature)

    def at(
        self, policy: Decoder, temperature: float, progress: Progress = lambda *_: None
    ) -> Evaluation:
        """Like `shown`, where nobody has evaluated the policy on samples: those that the KL needs
        are not scored."""
        how, work = self._one_each(temperature), _Work(progress)
        mine = self._answer(policy, how, work)
        scored = self._score(mine, how.k, work)
        same = self.shows_samples(temperature) or policy is self.reference
        drawn = mine if same else self._answer(policy, self.sampling, work)
        kl, perplexed = self._kl(policy, drawn, work), self._perplexity(policy, work)
        return self._figures(scored, kl, perplexed, temperature)

    def shows_samples(self, temperature: float) -> bool:
        """Whether the sampled answers are those that people are shown."""
        return self._one_each(temperature) == self.sampling

    def _one_each(self, temperature: float) -> Sampling:
        return replace(self.sampling, k=1, temperature=temperature)

    def _answer(self, policy: Decoder, how: Sampling, work: "_Work") -> list[Group]:
        """This rank's share of the answers."""
        with merged_for_rollout(self.backbone, policy.model) as model:
            return rollout(
                model,
                self.backbone.tokenizer,
                self.backbone.stop_ids,
                self.prompts,
                how,
                self.seed,
                PURPOSE,
                on_token=writing("held-out answers", how, work.after_each),
                safe_point=work.safe_point,
                share=work.ranks.share,
                acting=self.acting,
            )

    def _score(self, mine: list[Group], k: int, work: "_Work") -> "_Scored":
        groups = all_groups(work.ranks, mine, self.prompts)
        found: Rewards = ([], {})
        for batch in [mine] if self.rewards.at_once else [[g] for g in mine]:
            rewards, sources = self.rewards(batch, work.safe_point)
            found[0].extend(rewards)
            for name, scores in sources.items():
                found[1].setdefault(name, []).extend(scores)
            work.after_each("held-out rewards", len(found[0]), len(mine))
        raw_PK, by_source = all_rewards(work.ranks, found, k)
        return _Scored(tuple(groups), tuple(r for row in raw_PK for r in row), by_source)

    def _kl(self, policy: Decoder, groups: Sequence[Group], work: "_Work") -> float:
        if policy is self.reference:
            return 0.0
        temperature = self.sampling.temperature or 1.0

        def told(done: int) -> None:
            work.after_each("held-out KL", done, len(groups))

        if self.sampling.k == 1:
            single = kl_of_single_answers(groups, self.reference, temperature, told)
            return mean_kl(single, work.ranks)[0]
        found = []
        for done, group in enumerate(groups, 1):
            rows = [list(range(len(group.completions)))]
            found += kl_to_reference([group], rows, self.reference, temperature)
            told(done)
        return mean_kl(found, work.ranks)[0]

    def _perplexity(self, policy: Decoder, work: "_Work") -> float:
        return perplexity(policy, self.prompts, self.answers, work.after_each, work.ranks)

    def _figures(
        self, scored: "_Scored", kl: float, perplexed: float, temperature: float
    ) -> Evaluation:
        completions = [c for g in scored.groups for c in g.completions]
        return Evaluation(
            reward=sum(scored.rewards) / len(scored.rewards),
            kl=kl,
            perplexity=perplexed,
            mean_length=sum(c.model_tokens for c in completions) / len(completions),
            finished=sum(c.finish_reason == "stop" for c in completions) / len(completions),
            rewards=scored.rewards,
            groups=scored.groups,
            by_source=scored.by_source,
            temperature=temperature,
            repetition=sum(repetition(c.token_ids) for c in completions) / len(completions),
        )


@dataclass(frozen=True)
class _Scored:
    """Answers to all prompts, and what each got."""

    groups: tuple[Group, ...]
    rewards: tuple[float, ...]
    by_source: dict[str, list[float | None]]


@dataclass(frozen=True)
class _Work:
    """Who is told of an evaluation, what may stop it, who shares it."""

    progress: Progress
    safe_point: SafePoint = never_stop
    ranks: Ranks = ALONE

    def after_each(self, what: str, done: int, total: int) -> None:
        self.progress(what, done, total)
        self.safe_point()


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
    mine = prompts[ranks.share]
    logps = answer_logps(
        policy,
        [(prompt.token_ids, answers[prompt.id]) for prompt in mine],
        after_pass=lambda done: progress("held-out perplexity", done, len(mine)),
    )
    each = [(-logp_T.sum().item(), logp_T.size) for logp_T in logps]
    total, tokens = map(sum, zip(*ranks.merged(each), strict=True))
    return math.exp(min(total / tokens, 700.0))
