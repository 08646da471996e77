"""What a conversion changed, measured on texts of `data/` against the source's own precision.

Both models are run block by block, the weights of one block in memory at a time, so that a model is
measured on the machine that can convert it.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_grpo.backend.precision import Precision, apply_precision, choose_precision
from mlx_grpo.core.errors import InputError
from mlx_grpo.core.stats import pearson, ranks
from mlx_grpo.core.types import Parameters
from mlx_grpo.data.chat import answer_tokens
from mlx_grpo.data.messages import pair_conversation
from mlx_grpo.data.prompts import load_prompts
from mlx_grpo.data.tables import read_rows
from mlx_grpo.models.block_reader import cast_around_blocks, embed_rows, let_go, run_blocks
from mlx_grpo.models.decoder import Decoder, chunk_tokens, shift_right
from mlx_grpo.models.reward_model import TextForm, head_parts, reward_head

TEXTS = 24
MAX_PROMPT = 512
LOGIT_BYTES = 128 << 20
"""Of fp32 logits of the source, kept until those of the converted model are there."""
MUCH_KL = 0.1
"""Twice the first KL target of a training run, nats per token."""
LITTLE_AGREEMENT = 0.9
Open = Callable[[], nn.Module]
PromptAndAnswer = tuple[tuple[int, ...], tuple[int, ...]]
"""Token ids of a prompt and of what follows it."""


@dataclass(frozen=True)
class QuantizationCost:
    """Change against the source; None where it does not apply."""

    kl_per_token: float | None = None
    """KL(source || converted), nats."""
    perplexity_before: float | None = None
    perplexity_after: float | None = None
    pearson: float | None = None
    spearman: float | None = None
    agreement: float | None = None
    """Share of preference pairs that both reward models order alike."""
    texts: int = 0
    """How many answers or pairs were measured on."""
    kept: bool = False
    """The source's own values were kept."""

    def describe(self) -> str:
        """For the table."""
        if self.kl_per_token is not None and self.perplexity_before and self.perplexity_after:
            change = self.perplexity_after / self.perplexity_before - 1
            return (
                f"KL {self.kl_per_token:.4f} nats/token, perplexity {change:+.1%} "
                f"({self.texts} texts)"
            )
        if self.pearson is not None and self.spearman is not None and self.agreement is not None:
            return (
                f"scores: Pearson {self.pearson:.3f}, Spearman {self.spearman:.3f}, "
                f"{round(self.agreement * self.texts)} of {self.texts} pairs ordered alike"
            )
        return "values kept" if self.kept else "not measured"

    def advice(self) -> str | None:
        """What to try where quantization changed more than a training run does on purpose."""
        finer = "try --group-size 32 or --bits 8"
        if self.kl_per_token is not None and self.kl_per_token > MUCH_KL:
            return f"quantization moved the model by {self.kl_per_token:.2f} nats/token; {finer}"
        if self.agreement is not None and self.agreement < LITTLE_AGREEMENT:
            return f"quantization reordered {1 - self.agreement:.0%} of the pairs; {finer}"
        return None


def check_texts(texts: Path, columns: Mapping[str, str] | None = None) -> None:
    """Raise InputError unless the file has texts to measure on."""
    count = sum(isinstance(row.get("response"), str) for _, row in read_rows(texts, columns))
    if count < 2:
        raise InputError(
            f"{texts}: {count} rows have a 'response', two are needed to measure what quantization "
            "cost; give another --texts, or --no-verify"
        )


def policy_rows(
    tokenizer: Any, texts: Path, columns: Mapping[str, str] | None = None
) -> list[PromptAndAnswer]:
    """Prompts with their reference answers, as many as are measured on."""
    prompts, _ = load_prompts(texts, tokenizer, MAX_PROMPT, columns)
    chosen = [p for p in prompts if p.response][:TEXTS]
    if not chosen:
        raise InputError(
            f"{texts}: no row with a 'response' has a prompt of {MAX_PROMPT} tokens or fewer; give "
            "another --texts, or --no-verify"
        )
    return [(p.token_ids, tuple(answer_tokens(tokenizer, p.response or ""))) for p in chosen]


def policy_cost(before: Open, after: Open, rows: Sequence[PromptAndAnswer]) -> QuantizationCost:
    """KL(source || converted) per token and both perplexities, on reference answers."""
    targets = [token for _, answer in rows for token in answer]
    precision = choose_precision(0)
    hidden_ND = [
        mx.concatenate([shift_right(*h)[0] for h in streamed(open_model, rows, precision)])
        for open_model in (before, after)
    ]
    sums = [0.0, 0.0, 0.0]
    width = chunk_tokens(Decoder(before()).vocabulary, LOGIT_BYTES)
    for start in range(0, len(targets), width):
        part = slice(start, start + width)
        found = _compare(
            _logps(before, hidden_ND[0][part], precision),
            _logps(after, hidden_ND[1][part], precision),
            mx.array(targets[part])[:, None],
        )
        sums = [a + b for a, b in zip(sums, found, strict=True)]
    kl, nll_before, nll_after = (s / len(targets) for s in sums)
    return QuantizationCost(kl, math.exp(nll_before), math.exp(nll_after), texts=len(rows))


def _compare(
    before: Iterator[mx.array], after: Iterator[mx.array], targets_N1: mx.array
) -> tuple[float, float, float]:
    """Sums over tokens of the KL and of both negative log-probs of the targets."""
    first_NV = mx.concatenate(list(before))
    mx.eval(first_NV)
    kl = nll_after = 0.0
    done = 0
    for second in after:
        own = slice(done, done + len(second))
        kl += (mx.exp(first_NV[own]) * (first_NV[own] - second)).sum().item()
        nll_after -= mx.take_along_axis(second, targets_N1[own], -1).sum().item()
        done += len(second)
    nll_before = -mx.take_along_axis(first_NV, targets_N1, -1).sum().item()
    return kl, nll_before, nll_after


def check_pairs(pairs: Path) -> None:
    """Raise InputError unless the file has preference pairs to measure on."""
    count = 0
    for place, row in islice(read_rows(pairs), TEXTS):
        pair_conversation(place, row)
        count += 1
    if not count:
        raise InputError(
            f"{pairs}: it is empty; give --pairs with preference pairs, or --no-verify"
        )


def reward_rows(tokenizer: Any, form: TextForm, pairs: Path) -> list[PromptAndAnswer]:
    """Both sides of preference pairs, in turn; the head reads the last token of each."""
    texts = [
        _conversation(place, row, side, tokenizer, form)
        for place, row in islice(read_rows(pairs), TEXTS)
        for side in ("chosen", "rejected")
    ]
    return [(ids[:-1], ids[-1:]) for ids in texts]


def reward_cost(
    before: Open, after: Open, head: Parameters, tokenizer: Any, form: TextForm, pairs: Path
) -> QuantizationCost:
    """Correlation of scores, and the share of preference pairs that are ordered alike."""
    rows, precision = reward_rows(tokenizer, form, pairs), choose_precision(0)
    old, new = (reward_scores(open_model, rows, head, precision) for open_model in (before, after))
    alike = [(old[i] > old[i + 1]) == (new[i] > new[i + 1]) for i in range(0, len(rows), 2)]
    return QuantizationCost(
        pearson=pearson(old, new),
        spearman=pearson(ranks(old), ranks(new)),
        agreement=sum(alike) / len(alike),
        texts=len(alike),
    )


def _conversation(
    place: str, row: dict[str, Any], side: str, tokenizer: Any, form: TextForm
) -> tuple[int, ...]:
    try:
        asked, answers = pair_conversation(place, row)
        return form.ids(tokenizer, asked, answers[side])
    except InputError as e:
        raise InputError(f"{place}: {e}") from e


def reward_scores(
    open_model: Open, rows: Sequence[PromptAndAnswer], head: Parameters, precision: Precision
) -> list[float]:
    """Scores of texts, read at their last token."""
    last_ND = mx.concatenate([h_rows[:, -1] for _, h_rows in streamed(open_model, rows, precision)])
    decoder = without_blocks(open_model(), precision)
    scores_N = reward_head(decoder, last_ND, *head_parts(head))
    return [float(s) for s in scores_N.tolist()]


def streamed(
    open_model: Open, rows: Sequence[PromptAndAnswer], precision: Precision
) -> list[tuple[mx.array, mx.array]]:
    """Hidden states after the last block, [1, S, D] and [1, T, D] for each row, with the weights of
    one block in memory at a time."""
    decoder = cast_around_blocks(Decoder(open_model()), precision.dtype)
    entered = [embed_rows(decoder, mx.array([a]), mx.array([b])) for a, b in rows]
    with decoder.without_blocks():
        let_go(decoder.model)
    run_blocks(decoder, entered, precision)
    return [(r.states[0], r.states[1]) for r in entered]


def without_blocks(model: nn.Module, precision: Precision) -> Decoder:
    """Embedding, final norm and head in memory; the blocks stay on disk."""
    decoder = Decoder(model)
    with decoder.without_blocks():
        apply_precision(model, precision)
    return decoder


def _logps(open_model: Open, hidden_ND: mx.array, precision: Precision) -> Iterator[mx.array]:
    """As `head_logps`; the head is read at the first chunk and goes with the last one."""
    yield from head_logps(without_blocks(open_model(), precision), hidden_ND)


def head_logps(decoder: Decoder, hidden_ND: mx.array) -> Iterator[mx.array]:
    """Log-probs over the vocabulary, fp32, [N, V] in chunks of tokens."""
    width = chunk_tokens(decoder.vocabulary, decoder.sizes.head_bytes)
    for start in range(0, len(hidden_ND), width):
        # a bf16 head would round the logits
        h_1ND = hidden_ND[None, start : start + width].astype(mx.float32)
        z_NV = decoder.head(h_1ND)[0].astype(mx.float32)
        logp_NV = z_NV - mx.logsumexp(z_NV, axis=-1, keepdims=True)
        mx.eval(logp_NV)  # before the next chunk, and before another model's head is read
        yield logp_NV
