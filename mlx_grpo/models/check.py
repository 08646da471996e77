"""The check at load: the decoder taken apart, and the caches of its rollouts, against the model.

What `Decoder` knows of a model it has seen in one run of it. Whether that is the whole truth is
found out here, on a few tokens, before any work: hidden states, final norm and logits behind a
shared prompt, and the logits of a rollout, equal those of the model over whole sequences.
"""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from mlx_grpo.backend.precision import Precision
from mlx_grpo.core.errors import InputError
from mlx_grpo.core.rng import key
from mlx_grpo.models.block_reader import each_block_read, embed_rows, run_blocks
from mlx_grpo.models.decoder import Decoder, shift_right
from mlx_grpo.models.prompt_caches import caches_of_whole_sequences, rollout_caches
from mlx_grpo.models.stand_ins import fp32_after_blocks, quoted, refusal

PROMPT, ROWS, COMPLETION = 6, 3, 2
"""Tokens of the prompt, completions, and tokens of each."""
HIDDEN_STATES = "hidden states"
BOUND_32, BOUND_16 = 1e-3, 0.1
"""Root mean square of the difference over that of the value. What is left out of a model, or done
twice, makes it about 1; rounding in 16 bits makes it 0.01, more where it sends a token to another
expert."""


def check_decoder(decoder: Decoder) -> None:
    """Compare a few random tokens on each way through the model.

    Raises:
        InputError: one of them differs, fails or is not finite; names the model's family.
    """
    _check_batches(decoder)
    _compare(decoder, _differences)


def check_streamed(opened: Callable[[], Decoder], precision: Precision) -> None:
    """As `check_decoder`, of the last hidden states, with one block in memory at a time.

    Args:
        opened: gives the model with nothing read yet.

    Raises:
        InputError: see `check_decoder`.
    """

    def apart(tokens_KL: mx.array) -> mx.array:
        decoder = opened()
        rows = embed_rows(decoder, tokens_KL[:1, :PROMPT], tokens_KL[:, PROMPT:])
        run_blocks(decoder, [rows], precision)
        return rows.states[1]

    def differences(whole: Decoder) -> dict[str, float]:
        tokens_KL = _tokens(whole)
        h_KTD = apart(tokens_KL)
        if whole.final_norm is None:
            return {}
        caches = caches_of_whole_sequences(whole.model)
        with each_block_read(whole.model, precision), whole.final_norm.noted() as read:
            whole.model(tokens_KL, cache=caches)
        if mx.isnan(read[-1]).any().item():
            return {}  # damaged weights: others say so with the remedy
        return {HIDDEN_STATES: _difference(h_KTD, read[-1][:, PROMPT:])}

    _compare(opened(), differences)


def _compare(decoder: Decoder, differences_of: Callable[[Decoder], dict[str, float]]) -> None:
    try:
        differences = differences_of(decoder)
    except InputError as e:
        raise refusal(decoder.model, str(e)) from None
    except Exception as e:  # whatever a model's own code raises where it is not run as it expects
        raise refusal(decoder.model, f"it fails on a few tokens ({quoted(e)})") from e
    bound = BOUND_32 if decoder.dtype == mx.float32 else BOUND_16
    for what, difference in differences.items():
        if not difference <= bound:  # NaN is a difference too
            raise refusal(
                decoder.model, f"{what} differ by {difference:.2g} of their size from the model's"
            )


def check_trainable(model: nn.Module) -> Decoder:
    """A model taken apart, before any work and lazily, so that no weight is read; `check_decoder`
    compares its numbers at load.

    Raises:
        InputError: it cannot be taken apart, or takes no batch; names its family.
    """
    decoder = Decoder(model)
    _check_batches(decoder)
    return decoder


def _check_batches(decoder: Decoder) -> None:
    """Look whether a model takes prompts of different length together, as a rollout gives them to
    it; lazily, so that no weight is read.

    Raises:
        InputError: it does not; names its family.
    """
    tokens_KL = mx.zeros((ROWS, PROMPT + COMPLETION), mx.int32)
    try:
        _of_rollout(decoder, tokens_KL, mx.zeros((ROWS, PROMPT + COMPLETION, decoder.vocabulary)))
    except Exception as e:  # whatever a model's own code raises
        raise refusal(decoder.model, f"it fails with several prompts at once ({quoted(e)})") from e


def _differences(decoder: Decoder) -> dict[str, float]:
    """Of what the two ways give; nothing where the model's own values are not finite."""
    tokens_KL = _tokens(decoder)
    prompt_1S, rows_KT = tokens_KL[:1, :PROMPT], tokens_KL[:, PROMPT:]
    read_KLD, logits_KLV = _whole(decoder, tokens_KL)
    infinite = mx.isinf(logits_KLV).any().item()
    h_prompt, h_rows = decoder.forward(prompt_1S, rows_KT)
    expected_KTV = logits_KLV[:, PROMPT - 1 : -1]
    if mx.isnan(logits_KLV).any().item() or (decoder.dtype == mx.float16 and infinite):
        return {}  # damaged weights, or fp16: others say so with the remedy
    if infinite:
        raise InputError("some of its logits are infinite")
    apart_KTV = decoder.head(shift_right(h_prompt, h_rows))
    pairs = {
        "logits of the model taken apart": (apart_KTV, expected_KTV),
        "logits of a rollout": _of_rollout(decoder, tokens_KL, logits_KLV),
    }
    if read_KLD is not None:
        pairs[HIDDEN_STATES] = (h_rows, read_KLD[:, PROMPT:])
    return {what: _difference(*pair) for what, pair in pairs.items()}


def _tokens(decoder: Decoder) -> mx.array:
    """Random ones, [K, L]; all rows begin with the same prompt."""
    shape = (ROWS, PROMPT + COMPLETION)
    tokens_KL = mx.random.randint(0, decoder.vocabulary, shape, key=key(0, "check"))
    tokens_KL[:, :PROMPT] = tokens_KL[:1, :PROMPT]
    return tokens_KL


def _whole(decoder: Decoder, tokens_KL: mx.array) -> tuple[mx.array | None, mx.array]:
    """What the final norm reads, and the logits; by the model itself."""
    caches = caches_of_whole_sequences(decoder.model)
    with fp32_after_blocks(decoder.model):
        if decoder.final_norm is None:
            return None, decoder.model(tokens_KL, cache=caches)
        with decoder.final_norm.noted() as read:
            logits_KLV = decoder.model(tokens_KL, cache=caches)
    return read[-1], logits_KLV


def _of_rollout(
    decoder: Decoder, tokens_KL: mx.array, logits_KLV: mx.array
) -> tuple[mx.array, mx.array]:
    """Logits as a rollout computes them, a token at a time, and those that are expected, [K, V].

    The last row has a prompt half as long, so that it is padded.
    """
    model, per_prompt = decoder.model, []
    for length in (PROMPT, PROMPT // 2):
        caches = make_prompt_cache(model)
        model(tokens_KL[:1, :length], cache=caches)
        per_prompt.append(caches)
    batch = rollout_caches(model, per_prompt, [0] * (ROWS - 1) + [1])
    places = mx.array([PROMPT] * (ROWS - 1) + [PROMPT // 2])
    rows = mx.arange(ROWS)
    with fp32_after_blocks(model):
        for _ in range(COMPLETION):
            found_KV = model(tokens_KL[rows, places][:, None], cache=batch)[:, -1]
            places = places + 1
    return found_KV, logits_KLV[rows, places - 1]


def _difference(found: mx.array, expected: mx.array) -> float:
    expected = expected.astype(mx.float32)
    error = mx.square(found.astype(mx.float32) - expected).mean()
    size = mx.square(expected - expected.mean(axis=-1, keepdims=True)).mean()
    return float(mx.sqrt(error / mx.maximum(size, 1e-30)).item())
