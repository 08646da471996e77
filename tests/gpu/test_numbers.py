"""How near the numbers of packed 16-bit models are to those of the same weights in dense fp32."""

from pathlib import Path

import mlx.core as mx
import pytest

from bench.gpu.against_cpu import cosine
from bench.shapes import move_lora
from mlx_grpo.backend.device import device_name
from mlx_grpo.backend.precision import DTYPES, Precision
from mlx_grpo.core.types import Parameters, Prompt
from mlx_grpo.grpo.logprob import logps_with_gradient, token_logps
from mlx_grpo.grpo.rollout import Sampling, rollout
from mlx_grpo.models import backward
from mlx_grpo.models.backbone import load_backbone
from mlx_grpo.models.backward import Pass, States, gradients
from mlx_grpo.models.decoder import WHOLE, Decoder, Sizes, shift_right, unshift
from mlx_grpo.models.lora import add_lora
from tests.helpers.groups import group_of
from tests.helpers.rounding import APART

WEIGHTS = (1e-3, 1e-5, 1e-7, 6e-9)
"""Of a token in the loss; fp16 holds nothing below 6e-8."""
NEAREST = {"bf16": 0.98 if device_name() == "cpu" else 0.999, "fp16": 0.99}
"""Cosines; MLX's CPU backend adds up in bf16 what a GPU adds up in fp32."""


def actor_on(directory: Path, precision: Precision, sizes: Sizes = WHOLE) -> Decoder:
    """A packed or dense model with a LoRA that has left its starting point."""
    actor = add_lora(load_backbone(directory, precision).model, rank=4, scale=2.0, seed=1)
    move_lora(actor, 0.05, seed=2)
    return Decoder(actor, sizes)


def packed(dtype: str) -> Precision:
    return Precision(device_name(), dense=False, dtype=DTYPES[dtype])


def dense(dtype: str = "fp32") -> Precision:
    return Precision(device_name(), dense=True, dtype=DTYPES[dtype])


def gradients_of(decoder: Decoder, weight: float) -> Parameters:
    """Of a loss in which each token weighs so much."""
    group = group_of()

    def cotangents(states: list[States]) -> list[States]:
        ((h_prompt, h_rows),) = states
        hidden_KTD = shift_right(h_prompt, h_rows)
        _, slope_KTD = logps_with_gradient(decoder, hidden_KTD, group.tokens_KT, group.mask_KT)
        wanted_KTD = weight * group.advantages_K[:, None, None] * slope_KTD
        return [unshift(wanted_KTD, h_prompt.shape[1])]

    return gradients(decoder, [Pass(mx.array([group.prompt_ids]), group.tokens_KT)], cotangents)


def length(gradient: Parameters) -> float:
    """Euclidean, without squares that underflow."""
    flat = mx.concatenate([v.reshape(-1) for v in gradient.values()])
    most = mx.abs(flat).max()
    return (most * mx.sqrt(mx.square(flat / most).sum())).item()


@pytest.mark.parametrize("kept", [0, 9])
def test_a_gradient_points_where_dense_fp32_points_however_little_a_token_weighs(
    packed_model: Path, dtype: str, kept: int
) -> None:
    expected = gradients_of(actor_on(packed_model, dense()), 1.0)
    decoder = actor_on(packed_model, packed(dtype), Sizes(kept_blocks=kept))
    found = {weight: gradients_of(decoder, weight) for weight in WEIGHTS}
    cosines = {weight: cosine(g, expected) for weight, g in found.items()}
    print({weight: round(value, 5) for weight, value in cosines.items()})
    assert min(cosines.values()) > NEAREST[dtype]
    ratio = length(found[1e-7]) / length(expected)
    assert ratio == pytest.approx(1e-7, rel=0.1)  # the scale is taken out again


def test_a_gradient_through_dense_weights_is_as_near(packed_model: Path, dtype: str) -> None:
    expected = gradients_of(actor_on(packed_model, dense()), 1.0)
    decoder = actor_on(packed_model, dense(dtype))
    cosines = {weight: cosine(gradients_of(decoder, weight), expected) for weight in WEIGHTS}
    print("dense weights", {weight: round(value, 5) for weight, value in cosines.items()})
    assert min(cosines.values()) > {"bf16": 0.995, "fp16": 0.999}[dtype]


def test_fp16_loses_small_gradients_without_its_scale(
    packed_model: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = gradients_of(actor_on(packed_model, dense()), 1.0)
    monkeypatch.setattr(backward._LossScale, "__call__", lambda self, wanted: wanted)
    decoder = actor_on(packed_model, packed(dtype))
    cosines = {weight: cosine(gradients_of(decoder, weight), expected) for weight in WEIGHTS[:3]}
    print("without a scale", {weight: round(value, 5) for weight, value in cosines.items()})
    lost = not cosines[1e-7] > 0.5  # a gradient that vanished altogether has no direction
    assert lost == (dtype == "fp16")


def test_what_is_sampled_is_what_is_scored(packed_model: Path, dtype: str) -> None:
    backbone = load_backbone(packed_model, packed(dtype))
    decoder = actor_on(packed_model, packed(dtype))
    prompts = [Prompt(str(i), (), tuple(range(5, 25 + i))) for i in range(3)]
    drawn = rollout(
        decoder.model, backbone.tokenizer, frozenset(), prompts, Sampling(4, 12), 1, "test"
    )
    gaps = []
    for group in drawn:
        tokens_KT = mx.array([c.token_ids for c in group.completions])
        prompt_1S = mx.array([group.prompt.token_ids])
        scored_KT = token_logps(decoder, prompt_1S, tokens_KT, mx.ones(tokens_KT.shape))
        gaps.append(mx.abs(scored_KT - mx.array([c.logps for c in group.completions])))
    gaps_N = mx.concatenate(gaps).reshape(-1)
    print(f"largest {gaps_N.max().item():.5f}, mean {gaps_N.mean().item():.5f}")
    assert gaps_N.max().item() < APART[dtype]
    assert gaps_N.mean().item() < {"bf16": 0.02, "fp16": 0.003}[dtype]


def test_log_probs_are_those_of_dense_fp32(packed_model: Path, dtype: str) -> None:
    group = group_of()
    inputs = (mx.array([group.prompt_ids]), group.tokens_KT, group.mask_KT)
    expected = token_logps(actor_on(packed_model, dense()), *inputs)
    found = token_logps(actor_on(packed_model, packed(dtype)), *inputs)
    assert found.dtype == mx.float32
    gap_KT = mx.abs(found - expected)
    assert 0 < gap_KT.sum().item() / group.mask_KT.sum().item() < {"bf16": 0.1, "fp16": 0.02}[dtype]
