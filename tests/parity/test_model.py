"""A tiny llama written by Hugging Face transformers: its log-probs and LoRA gradients in float64
PyTorch against ours in fp32, to 1e-5 relative.

Transformers computes norms and rotary angles in fp32 even in a float64 model; that noise is 1e-7.
"""

from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mlx_grpo.core.rng import key
from mlx_grpo.core.types import TrainingGroup
from mlx_grpo.grpo.logprob import token_logps
from mlx_grpo.grpo.loss import Aggregation, Clip, RatioLevel, token_weights
from mlx_grpo.models.backbone import Backbone, load_backbone
from mlx_grpo.models.decoder import Decoder
from mlx_grpo.models.lora import add_lora, lora_parameters, set_parameters
from tests.helpers import torch_reference as reference
from tests.helpers.groups import staged_gradients
from tests.helpers.tiny import write_tokenizer
from tests.helpers.torch_reference import BOUND, double, relative_difference, report

PROMPT = (11, 203, 5, 77, 140)
LENGTHS = [6, 3, 9, 1]
SCALE = 2.0
MAX_TOKENS = 12


@dataclass(frozen=True)
class Case:
    """The same weights on both sides, and four completions of one prompt."""

    theirs: LlamaForCausalLM
    backbone: Backbone
    completions: list[list[int]]

    @property
    def tokens_KT(self) -> mx.array:
        longest = max(LENGTHS)
        return mx.array([[*c, *([0] * (longest - len(c)))] for c in self.completions])

    @property
    def mask_KT(self) -> mx.array:
        columns = mx.arange(max(LENGTHS))
        return (columns[None] < mx.array(LENGTHS)[:, None]).astype(mx.float32)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    directory = tmp_path_factory.mktemp("hf")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        initializer_range=0.2,  # so that tokens differ in probability
        bos_token_id=257,
        eos_token_id=258,
        pad_token_id=256,
    )
    theirs = LlamaForCausalLM(config).float()
    theirs.save_pretrained(directory)
    write_tokenizer(directory)
    rng = np.random.default_rng(3)
    completions = [rng.integers(0, 256, n).tolist() for n in LENGTHS]
    return Case(theirs.double().eval(), load_backbone(Path(directory)), completions)


def torch_logps(
    case: Case, temperature: float, weights: dict[str, torch.Tensor] | None = None
) -> list[torch.Tensor]:
    """Log-probs of each completion, each row run by itself, without padding."""
    rows = []
    for completion in case.completions:
        ids = torch.tensor([[*PROMPT, *completion]])
        output = torch.func.functional_call(case.theirs, weights or {}, (ids,))
        logits_TV = output.logits[0, len(PROMPT) - 1 : -1] / temperature
        chosen = torch.tensor(completion)[:, None]
        rows.append(torch.log_softmax(logits_TV, dim=-1).gather(1, chosen)[:, 0])
    return rows


def padded(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_log_probs(case: Case, temperature: float) -> None:
    found_KT = token_logps(
        Decoder(case.backbone.model), mx.array([PROMPT]), case.tokens_KT, case.mask_KT, temperature
    )
    with torch.no_grad():
        expected_KT = padded(torch_logps(case, temperature))
    assert expected_KT[expected_KT != 0].std() > 0.5  # the tokens do differ in probability
    difference = relative_difference(found_KT, expected_KT)
    assert report(f"token log-probs (temperature {temperature})", difference) <= BOUND


def adapted(case: Case) -> Decoder:
    """Our model with a LoRA whose B is not zero."""
    model = add_lora(case.backbone.model, rank=3, scale=SCALE, seed=1)
    drawn = {
        name: 0.1 * mx.random.normal(value.shape, key=key(1, "test", name))
        for name, value in lora_parameters(model).items()
        if name.endswith("lora_b")
    }
    set_parameters(model, drawn)
    model.train()
    return Decoder(model)


@pytest.mark.parametrize(
    ("aggregation", "level", "temperature"),
    [
        ("sequence", "token", 1.0),
        ("sequence", "token", 0.7),
        ("token", "token", 1.0),
        ("constant", "sequence", 0.7),
    ],
)
def test_lora_gradients_of_the_clipped_surrogate(
    case: Case, aggregation: Aggregation, level: RatioLevel, temperature: float
) -> None:
    """Every LoRA tensor, relative to the largest value of that tensor."""
    decoder = adapted(case)
    leaves = {n: double(v).requires_grad_() for n, v in lora_parameters(decoder.model).items()}
    assert len(leaves) == 2 * 2 * 7  # A and B of seven linear layers in each of two blocks
    weights = dict(case.theirs.named_parameters())
    for name in [n.removesuffix(".lora_a") for n in leaves if n.endswith(".lora_a")]:
        a, b = leaves[f"{name}.lora_a"], leaves[f"{name}.lora_b"]
        weights[f"{name}.weight"] = weights[f"{name}.weight"].detach() + SCALE * (a @ b).T
    logps = torch_logps(case, temperature, weights)

    rng = np.random.default_rng(4)
    advantages = rng.normal(0, 1, len(LENGTHS)).astype(np.float32)
    drift = [rng.normal(0, 0.2, n) + rng.normal(0, 0.2) for n in LENGTHS]
    old = [(logp.detach() + double(d)).float() for logp, d in zip(logps, drift, strict=True)]
    rows = [
        (logp, o.double(), a) for logp, o, a in zip(logps, old, double(advantages), strict=True)
    ]
    reference.clipped_surrogate(rows, 0.2, 0.2, level, aggregation, MAX_TOKENS).backward()

    old_KT = mx.array(padded(old).numpy())
    group = TrainingGroup(0, PROMPT, case.tokens_KT, case.mask_KT, old_KT, mx.array(advantages))
    weights_KT = token_weights(case.mask_KT, aggregation, len(LENGTHS), sum(LENGTHS), MAX_TOKENS)
    clip = Clip(0.2, 0.2, level)
    gradients, logp_KT = staged_gradients(decoder, group, weights_KT, clip, temperature)
    assert gradients.keys() == leaves.keys()
    assert relative_difference(logp_KT, padded(logps)) <= BOUND
    differences = [relative_difference(gradients[n], leaf.grad) for n, leaf in leaves.items()]
    what = f"LoRA gradients ({aggregation}, {level} ratio, temperature {temperature})"
    assert report(what, *differences) <= BOUND
