"""Log-probs of answers to different prompts, several to a pass, are those of each answer alone."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_grpo.core.rng import key
from mlx_grpo.core.types import TokenIds
from mlx_grpo.grpo.logprob import answer_logps, token_logps
from mlx_grpo.models.decoder import Decoder, Sizes
from tests.helpers.decoders import actor_on, small_decoder

OPENING = (3, 17, 40, 5)
LENGTHS = ((9, 6), (1, 11), (30, 2), (4, 4), (12, 9))
"""(tokens of a prompt behind the opening, tokens of its answer)."""
FAMILIES = ("llama", "gemma3_text", "mamba2", "lfm2", "gemma4_text shared", "qwen3_moe")


def asked() -> list[tuple[TokenIds, TokenIds]]:
    """Prompts that a template begins alike, and one that begins with another token."""

    def drawn(i: int, n: int, what: str) -> TokenIds:
        return tuple(mx.random.randint(3, 200, (n,), key=key(i, what)).tolist())

    pairs = [
        ((*OPENING, *drawn(i, p, "prompt")), drawn(i, a, "answer"))
        for i, (p, a) in enumerate(LENGTHS)
    ]
    return [*pairs, ((8, 9), (10, 11, 12))]


def alone(decoder: Decoder, temperature: float) -> list[list[float]]:
    found = []
    for prompt, answer in asked():
        tokens_1T = mx.array([answer])
        ones_1T = mx.ones(tokens_1T.shape)
        logps_1T = token_logps(decoder, mx.array([prompt]), tokens_1T, ones_1T, temperature)
        found.append(logps_1T[0].tolist())
    return found


@pytest.fixture(params=FAMILIES)
def actor(request: pytest.FixtureRequest) -> nn.Module:
    return actor_on(small_decoder(request.param)).eval()


@pytest.mark.parametrize("sizes", [Sizes(), Sizes(texts=2), Sizes(text_tokens=40)])
def test_log_probs_do_not_depend_on_what_shares_the_pass(actor: nn.Module, sizes: Sizes) -> None:
    found = answer_logps(Decoder(actor, sizes), asked(), 0.7)
    for values, expected in zip(found, alone(Decoder(actor), 0.7), strict=True):
        assert values.tolist() == pytest.approx(expected, abs=2e-4)


def test_texts_with_one_opening_take_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, passes = Decoder(actor_on(small_decoder("llama")).eval()), []
    forward = decoder.forward

    def counted(prompt_1S: mx.array, rows_KT: mx.array) -> Any:
        passes.append((prompt_1S.shape[1], rows_KT.shape[0]))
        return forward(prompt_1S, rows_KT)

    monkeypatch.setattr(decoder, "forward", counted)
    told: list[int] = []
    answer_logps(decoder, asked(), after_pass=told.append)
    assert passes == [(len(OPENING), len(LENGTHS)), (2, 1)] and told == [5, 6]
