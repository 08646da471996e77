"""A model that its parts or its caches do not compute is refused as it is loaded."""

import mlx.core as mx
import pytest
from mlx_lm.models.cache import RotatingKVCache

from bench.families import FAMILIES
from mlx_grpo.backend.precision import Precision, apply_precision
from mlx_grpo.core.errors import InputError
from mlx_grpo.models.check import check_decoder
from mlx_grpo.models.decoder import Decoder
from tests.helpers.decoders import Doubling, small_decoder
from tests.helpers.tiny import tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_is_its_parts_passes(family: str) -> None:
    check_decoder(Decoder(tiny_model(family)))


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_rounding_in_16_bits_is_no_difference(dtype: mx.Dtype) -> None:
    model = tiny_model("llama")
    apply_precision(model, Precision("cpu", dense=True, dtype=dtype))
    check_decoder(Decoder(model))


@pytest.mark.parametrize("name", ["qwen3_5", "lfm2", "gemma3n", "gemma4 shared", "gpt_oss"])
def test_blocks_that_share_more_than_hidden_states_pass(name: str) -> None:
    check_decoder(Decoder(small_decoder(name)))


def test_a_model_that_changes_states_between_its_blocks_is_refused() -> None:
    model = tiny_model("llama")
    model.model.__class__ = Doubling
    with pytest.raises(InputError, match=r"is not supported: logits of the model taken apart diff"):
        check_decoder(Decoder(model))


def test_a_model_whose_caches_forget_is_refused() -> None:
    model = tiny_model("llama")
    model.make_cache = lambda: [RotatingKVCache(max_size=2) for _ in model.layers]
    with pytest.raises(InputError, match=r"'llama' is not supported: .* differ by"):
        check_decoder(Decoder(model))


def test_a_part_that_gives_nan_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    head = Decoder.head
    monkeypatch.setattr(Decoder, "head", lambda self, h: mx.nan * head(self, h))
    with pytest.raises(InputError, match="differ by nan"):
        check_decoder(Decoder(tiny_model("llama")))


def test_infinite_logits_are_refused() -> None:
    model = tiny_model("llama")
    model.lm_head.weight[3, 0] = mx.inf
    with pytest.raises(InputError, match=r"'llama' is not supported: .* infinite"):
        check_decoder(Decoder(model))


def test_whatever_a_family_raises_is_a_line_with_its_name() -> None:
    decoder = Decoder(small_decoder("gpt_bigcode"))
    with pytest.raises(
        InputError, match=r"'gpt_bigcode' is not supported: .*ValueError"
    ) as refused:
        check_decoder(decoder)
    assert "\n" not in str(refused.value)
