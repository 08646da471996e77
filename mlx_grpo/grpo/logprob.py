"""Log-probs of given tokens in fp32; [tokens, vocabulary] exists for one chunk at a time.

logp_t = z_t[token] - logsumexp(z_t), z = logits / temperature. A chunk is evaluated before the next
one is built; one graph over all chunks would have them all alive at once.
"""

from collections.abc import Callable, Iterator, Sequence

import mlx.core as mx
import numpy as np

from mlx_grpo.backend.kernels import exp_rows
from mlx_grpo.core.padding import joined, length_buckets, pad_right, row_lengths, shared_passes
from mlx_grpo.core.types import TokenIds
from mlx_grpo.models.decoder import Decoder, chunk_tokens, shift_right


def _softmax(z_NV: mx.array, targets_N: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """(log-prob of the targets [N], exp(z - max) [N, V], its sum [N, 1]); uses up `z_NV`."""
    picked_N1 = mx.take_along_axis(z_NV, targets_N[:, None], axis=-1)
    mx.eval(picked_N1)
    exp_NV, top_N1 = exp_rows(z_NV)
    sum_N1 = exp_NV.sum(axis=-1, keepdims=True)
    return (picked_N1 - top_N1 - mx.log(sum_N1))[:, 0], exp_NV, sum_N1


def _logits(decoder: Decoder, hidden_ND: mx.array, temperature: float) -> mx.array:
    return decoder.head(hidden_ND[None])[0].astype(mx.float32) / temperature


def _chunks(decoder: Decoder, count: int) -> Iterator[slice]:
    width = chunk_tokens(decoder.vocabulary, decoder.sizes.head_bytes)
    return (slice(i, min(i + width, count)) for i in range(0, count, width))


def flat_positions(mask_KT: mx.array) -> mx.array:
    """Indices of the real tokens in the flattened [K * T] order: the head never sees padding."""
    return mx.array(np.flatnonzero(np.asarray(mask_KT)).astype(np.uint32))


def token_logps(
    decoder: Decoder,
    prompt_1S: mx.array,
    tokens_KT: mx.array,
    mask_KT: mx.array,
    temperature: float = 1.0,
) -> mx.array:
    """Log-probs [K, T] of the completion tokens given the prompt, fp32, zero where `mask_KT` is 0.
    No gradient."""
    lengths, parts = row_lengths(mask_KT), []
    for rows in length_buckets(lengths, prompt_1S.shape[1], decoder.sizes.rows):
        index, longest = mx.array(rows), max(lengths[i] for i in rows)
        tokens, mask = tokens_KT[index, :longest], mask_KT[index, :longest]
        hidden = shift_right(*decoder.forward(prompt_1S, tokens))
        parts.append((rows, hidden_logps(decoder, hidden, tokens, mask, temperature)))
    return joined(parts, mask_KT.shape)


def answer_logps(
    decoder: Decoder,
    asked: Sequence[tuple[TokenIds, TokenIds]],
    temperature: float = 1.0,
    after_pass: Callable[[int], None] = lambda done: None,
) -> list[mx.array]:
    """Log-probs [T], fp32, of each answer's tokens given its own prompt, several prompts to a pass.
    No gradient.

    Args:
        asked: (prompt, answer) as token ids.
        after_pass: told how many answers are done.
    """
    texts = [(*prompt, *answer) for prompt, answer in asked]
    limits, sizes = [len(prompt) for prompt, _ in asked], decoder.sizes
    found: dict[int, mx.array] = {}
    for shared in shared_passes(texts, limits, sizes.texts, sizes.text_tokens):
        tokens_KT, lengths = pad_right(shared.rows)
        starts = [limits[place] - len(shared.prefix) for place in shared.places]
        at_1T = mx.arange(tokens_KT.shape[1])[None]
        answered_KT = (mx.array(starts)[:, None] <= at_1T) & (at_1T < mx.array(lengths)[:, None])
        mask_KT = answered_KT.astype(mx.float32)
        hidden_KTD = shift_right(*decoder.forward(mx.array([shared.prefix]), tokens_KT))
        logp_KT = hidden_logps(decoder, hidden_KTD, tokens_KT, mask_KT, temperature)
        for row, place in enumerate(shared.places):
            found[place] = logp_KT[row, starts[row] : lengths[row]]
        after_pass(len(found))
    return [found[place] for place in range(len(asked))]


def hidden_logps(
    decoder: Decoder,
    hidden_KTD: mx.array,
    tokens_KT: mx.array,
    mask_KT: mx.array,
    temperature: float = 1.0,
) -> mx.array:
    """As `token_logps`, from the hidden states that predict each token."""
    where_N = flat_positions(mask_KT)
    hidden_ND = hidden_KTD.reshape(-1, hidden_KTD.shape[-1])[where_N]
    targets_N = tokens_KT.reshape(-1)[where_N]
    parts = []
    for part in _chunks(decoder, where_N.size):
        logp_N, _, _ = _softmax(_logits(decoder, hidden_ND[part], temperature), targets_N[part])
        mx.eval(logp_N)
        parts.append(logp_N)
    return _scatter(mx.concatenate(parts), where_N, mask_KT.shape)


def logps_with_gradient(
    decoder: Decoder,
    hidden_KTD: mx.array,
    tokens_KT: mx.array,
    mask_KT: mx.array,
    temperature: float = 1.0,
) -> tuple[mx.array, mx.array]:
    """As `hidden_logps`, and the gradient of each token's own log-prob.

    A log-prob depends on its own hidden state alone, so for any loss dL/dhidden is dL/dlogp times
    dlogp/dhidden: one pass over the head serves a loss that is known only after all log-probs are.

    Returns:
        (logp [K, T], dlogp/dhidden [K, T, D]), both zero where `mask_KT` is 0.
    """
    where_N = flat_positions(mask_KT)
    hidden_ND = hidden_KTD.reshape(-1, hidden_KTD.shape[-1])[where_N]
    targets_N = tokens_KT.reshape(-1)[where_N]
    logp_parts, grad_parts = [], []
    for part in _chunks(decoder, where_N.size):
        targets = targets_N[part]
        logp_N, exp_NV, sum_N1 = _softmax(_logits(decoder, hidden_ND[part], temperature), targets)
        mx.eval(logp_N, sum_N1)
        # dlogp/dz = one_hot - softmax; with no name left for it, its buffer is used again
        grad_NV = (exp_NV * (-1 / sum_N1)).at[mx.arange(targets.size), targets].add(1.0)
        del exp_NV
        _, (grad_ND,) = mx.vjp(
            lambda h: _logits(decoder, h, temperature), [hidden_ND[part]], [grad_NV]
        )
        del grad_NV
        mx.eval(grad_ND)
        logp_parts.append(logp_N)
        grad_parts.append(grad_ND)
    grad_KTD = mx.zeros((mask_KT.size, hidden_KTD.shape[-1]), hidden_KTD.dtype)
    grad_KTD[where_N] = mx.concatenate(grad_parts)
    logp_KT = _scatter(mx.concatenate(logp_parts), where_N, mask_KT.shape)
    return logp_KT, grad_KTD.reshape(hidden_KTD.shape)


def _scatter(values_N: mx.array, where_N: mx.array, shape: tuple[int, ...]) -> mx.array:
    flat = mx.zeros(shape[0] * shape[1])
    flat[where_N] = values_N
    return flat.reshape(shape)
