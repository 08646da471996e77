"""Sample K answers per prompt.

Every prompt is prefilled once and its keys and values serve K rows; a long beginning that all
prompts decoded together share, such as descriptions of tools, is prefilled once. All rows decode
together, or those of as many whole prompts as `decode_rows` allows, one at least; rows that finish
are dropped from the batch. A token is drawn by inverting the cumulative distribution at a uniform
number that belongs to (seed, purpose, iteration, prompt, sample, position), so up to rounding a
sample does not depend on which rows it was batched with.
"""

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from mlx_grpo.backend.kernels import exp_rows, worth_dropping
from mlx_grpo.core.padding import common_prefix
from mlx_grpo.core.rng import uniforms
from mlx_grpo.core.stopping import SafePoint, never_stop
from mlx_grpo.core.types import Completion, FinishReason, Group, Prompt, TokenIds
from mlx_grpo.grpo.turns import Acting, Conversations
from mlx_grpo.models.decoder import PREFILL_TOKENS
from mlx_grpo.models.families.gated_delta import in_pieces
from mlx_grpo.models.prompt_caches import rollout_caches
from mlx_grpo.models.stand_ins import fp32_after_blocks, in_eval_mode, one_block_at_a_time

SAMPLER_BLOCK = 256
SHARED_TOKENS = 64
"""A shared beginning of at least so many tokens is worth a pass of its own."""
GROW_TOKENS = 64
"""Of the caches at a time, at most."""


@dataclass(frozen=True)
class Sampling:
    """How to sample."""

    k: int
    """Completions per prompt."""
    max_tokens: int
    """Longest completion, the stop token included."""
    temperature: float = 1.0
    """0 takes the likeliest token."""
    decode_rows: int = 0
    """Rows decoded together, in whole prompts: never fewer than `k`; 0 means all."""


class Talks(Protocol):
    """What `_decode` asks at the end of a turn."""

    def go_on(self, ended: Mapping[int, Sequence[int]], room: int) -> dict[int, tuple[int, ...]]:
        """See `Conversations.go_on`."""


def rollout(
    model: nn.Module,
    tokenizer: Any,
    stop_ids: frozenset[int],
    prompts: Sequence[Prompt],
    sampling: Sampling,
    seed: int,
    purpose: str,
    iteration: int = 0,
    on_token: Callable[[int, int, int], None] = lambda done, total, token: None,
    safe_point: SafePoint = never_stop,
    share: slice = slice(None),
    acting: Acting | None = None,
) -> list[Group]:
    """One group per prompt of the share, in order.

    Args:
        seed, purpose, iteration: choose the random numbers, with the prompt's id, the sample and
            the position.
        on_token: told (finished prompts, all prompts, tokens of the unfinished answers).
        safe_point: called at each token; it may stop the rollout.
        share: which of the prompts to answer.
        acting: environments that answer the model, turn by turn.
    """
    numbered = _numbered(prompts)[share]
    per_wave = max(1, sampling.decode_rows // sampling.k if sampling.decode_rows else len(numbered))
    groups: list[Group] = []
    for start in range(0, len(numbered), per_wave):
        wave, paths = [], []
        for prompt, times in numbered[start : start + per_wave]:
            wave.append(prompt)
            first = sampling.k * times
            paths += [(purpose, iteration, prompt.id, first + i) for i in range(sampling.k)]

        def at_each_token(rows: int, token: int, before: int = len(groups)) -> None:
            on_token(before + rows // sampling.k, len(numbered), token)
            safe_point()

        talks = None
        if acting:
            talks = Conversations(acting, tokenizer, stop_ids, seed, safe_point)
            wave = talks.open(wave, paths)
        with fp32_after_blocks(model), in_eval_mode(model):
            drawn = _decode(model, stop_ids, wave, sampling, seed, paths, at_each_token, talks)
        if talks:
            completions = talks.close(drawn)
        else:
            completions = [_completion(tokenizer, stop_ids, ids, logps) for ids, logps, _ in drawn]
        groups += [
            Group(prompt, tuple(completions[i * sampling.k : (i + 1) * sampling.k]))
            for i, prompt in enumerate(wave)
        ]
        on_token(len(groups), len(numbered), 0)
    return groups


def _numbered(prompts: Sequence[Prompt]) -> list[tuple[Prompt, int]]:
    """Each prompt and how often it came before: one that comes twice in a batch, at an epoch's end,
    gets other samples."""
    seen: Counter[str] = Counter()
    numbered = []
    for prompt in prompts:
        numbered.append((prompt, seen[prompt.id]))
        seen[prompt.id] += 1
    return numbered


def _completion(
    tokenizer: Any, stop_ids: frozenset[int], ids: list[int], logps: list[float]
) -> Completion:
    stopped = ids[-1] in stop_ids
    reason: FinishReason = "stop" if stopped else "length"
    text = tokenizer.decode(ids[:-1] if stopped else ids)
    return Completion(tuple(ids), text, reason, tuple(logps))


def _decode(
    model: nn.Module,
    stop_ids: frozenset[int],
    prompts: Sequence[Prompt],
    sampling: Sampling,
    seed: int,
    paths: Sequence[tuple[str | int, ...]],
    at_each_token: Callable[[int, int], None],
    talks: Talks | None = None,
) -> list[tuple[list[int], list[float], list[bool]]]:
    """Token ids, log-probs and whether they were sampled, of every row; a step is queued before the
    last one is read.

    The tokens of an observation take the place of sampled ones, a token a step, while other rows
    of the batch go on: rows stay aligned, nothing runs twice, and every kind of cache can do it.

    Args:
        at_each_token: told (finished rows, tokens of the others); it may stop the rollout.
        talks: what answers a row at the end of a turn.
    """
    rows, length = len(paths), sampling.max_tokens
    caches = _prefill(model, prompts, sampling, lambda: at_each_token(0, 0))
    u_BT = uniforms(seed, [(*path, t) for path in paths for t in range(length)]).reshape(
        rows, length
    )

    def step(tokens_B: mx.array, t: int) -> tuple[mx.array, mx.array]:
        logits_BV = model(tokens_B[:, None], cache=caches)[:, -1]
        drawn = sample(logits_BV, u_BT[:, t], sampling.temperature)
        mx.async_eval(drawn)
        return drawn

    active = list(range(rows))
    result: list[tuple[list[int], list[float], list[bool]]] = [([], [], []) for _ in active]
    finished: set[int] = set()
    given: dict[int, deque[int]] = {}
    """Tokens of observations that are still to be put in, by row."""
    last_B = mx.array([prompt.token_ids[-1] for prompt in prompts for _ in range(sampling.k)])
    pending = step(last_B, 0)
    for t in range(length):
        at_each_token(len(finished), t)
        tokens_B, sampled = _with_given(pending[0], active, given)
        following = step(tokens_B, t + 1) if t + 1 < length else pending
        ended = []
        drawn = zip(active, tokens_B.tolist(), pending[1].tolist(), sampled, strict=True)
        for row, token, logp, own in drawn:
            if row not in finished:
                result[row][0].append(token)
                result[row][1].append(logp if own else 0.0)
                result[row][2].append(own)
                if own and token in stop_ids:
                    ended.append(row)
        if ended and talks:
            room = length - t - 1
            going_on = talks.go_on({row: result[row][0] for row in ended}, room)
            given |= {row: deque(tokens) for row, tokens in going_on.items()}
            ended = [row for row in ended if row not in going_on]
        finished.update(ended)
        keep = [j for j, row in enumerate(active) if row not in finished]
        if not keep:
            break
        if worth_dropping(len(active), len(keep)):
            kept = mx.array(keep)
            for cache in caches:
                cache.filter(kept)
                mx.eval(cache.state)  # not all layers twice at once
            u_BT, following = u_BT[kept], (following[0][kept], following[1][kept])
            active = [active[j] for j in keep]
        pending = following
    return result


def _with_given(
    tokens_B: mx.array, active: Sequence[int], given: dict[int, deque[int]]
) -> tuple[mx.array, list[bool]]:
    """(the tokens, those of observations in place of sampled ones; which were sampled)."""
    sampled = [not given.get(row) for row in active]
    if all(sampled):
        return tokens_B, sampled
    put = [given[row].popleft() if not own else 0 for row, own in zip(active, sampled, strict=True)]
    return mx.where(mx.array(sampled), tokens_B, mx.array(put, tokens_B.dtype)), sampled


def _prefill(
    model: nn.Module, prompts: Sequence[Prompt], sampling: Sampling, safe_point: SafePoint
) -> list[Any]:
    """Batch caches holding every prompt but its last token, each repeated K times."""
    ahead = [prompt.token_ids[:-1] for prompt in prompts]
    shared = common_prefix(ahead) if len(prompts) > 1 else 0
    if shared < SHARED_TOKENS:
        shared = 0
    beginning = make_prompt_cache(model)
    _fill(model, beginning, ahead[0][:shared])
    per_prompt = []
    for tokens in ahead:
        safe_point()
        caches = deepcopy(beginning)
        _fill(model, caches, tokens[shared:])
        per_prompt.append(caches)
    each_k = [i for i in range(len(prompts)) for _ in range(sampling.k)]
    batch = rollout_caches(model, per_prompt, each_k)
    # grown a few times, to what this rollout can need: most of that may never be touched
    step = -(-sampling.max_tokens // -(-sampling.max_tokens // GROW_TOKENS))
    for cache in batch:
        cache.step = step
    return batch


def _fill(model: nn.Module, caches: list[Any], tokens: TokenIds) -> None:
    """Run the model over more tokens of one prompt."""
    for cache in caches:
        cache.step = max(1, len(tokens))  # no room for what is decoded elsewhere
    for start in range(0, len(tokens), PREFILL_TOKENS):
        part = tokens[start : start + PREFILL_TOKENS]
        with one_block_at_a_time(model), in_pieces():
            model(mx.array([part]), cache=caches)  # lazy: the head is never computed
        mx.eval([c.state for c in caches])


def sample(logits_BV: mx.array, u_B: mx.array, temperature: float) -> tuple[mx.array, mx.array]:
    """Draw a token per row: (tokens int32 [B], log-probs fp32 [B] at the temperature).

    Inverse transform on two levels, blocks of the vocabulary and then tokens, which needs one exp
    per logit and keeps the rounding of a cumulative sum over 256 thousand tokens small. At
    temperature 0: the likeliest token, log-prob at 1.
    """
    z_BV = logits_BV.astype(mx.float32) / (temperature or 1.0)
    rows, vocabulary = z_BV.shape
    if temperature == 0:
        tokens_B1 = z_BV.argmax(axis=-1, keepdims=True)
        picked_B1 = mx.take_along_axis(z_BV, tokens_B1, axis=-1)
        logps_B1 = picked_B1 - mx.logsumexp(z_BV, axis=-1, keepdims=True)
        return tokens_B1[:, 0].astype(mx.int32), logps_B1[:, 0]
    weights_BV, _ = exp_rows(z_BV)
    if missing := -vocabulary % SAMPLER_BLOCK:  # a pad by nothing would be a copy
        weights_BV = mx.pad(weights_BV, [(0, 0), (0, missing)])
    blocks_BNM = weights_BV.reshape(rows, -1, SAMPLER_BLOCK)
    sums_BN = blocks_BNM.sum(axis=-1)
    total_B = sums_BN.sum(axis=-1)
    block_B, rest_B = _invert(sums_BN, u_B * total_B)
    chosen_BM = mx.take_along_axis(blocks_BNM, block_B[:, None, None], axis=1)[:, 0]
    inner_B, _ = _invert(chosen_BM, rest_B)
    tokens_B = block_B * SAMPLER_BLOCK + inner_B
    picked_B = mx.take_along_axis(weights_BV, tokens_B[:, None], axis=-1)[:, 0]
    return tokens_B.astype(mx.int32), mx.log(picked_B / total_B)


def _invert(weights_BN: mx.array, target_B: mx.array) -> tuple[mx.array, mx.array]:
    """Index at which the running sum passes `target`, and what is left of the target there."""
    sums_BN = mx.cumsum(weights_BN, axis=-1)
    # A GPU adds in parallel. Rounding can let such a sum pass the target at an entry of weight
    # zero, or nowhere: then it is the last entry that weighs something.
    possible_BN = weights_BN > 0
    passed_BN = (sums_BN > target_B[:, None]) & possible_BN
    last_B = (mx.arange(weights_BN.shape[-1]) * possible_BN).argmax(axis=-1)
    index_B = mx.where(passed_BN.any(axis=-1), passed_BN.argmax(axis=-1), last_B)
    before_BN = sums_BN - weights_BN
    before_B = mx.take_along_axis(before_BN, index_B[:, None], axis=-1)[:, 0]
    return index_B, mx.maximum(target_B - before_B, 0)
