"""Reward models as other trainers write them: as in PyTorch once converted, or refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")
import torch

from mlx_grpo.convert.convert import Converted, convert_rm
from mlx_grpo.convert.quantize import Quantization
from mlx_grpo.convert.source import locate
from mlx_grpo.core.errors import InputError
from mlx_grpo.core.types import Completion, Group, Prompt
from mlx_grpo.files.safetensors import load_arrays, save_arrays
from mlx_grpo.models.backbone import load_backbone
from mlx_grpo.models.reward_model import load_reward_model
from tests.helpers import sources
from tests.helpers.hf_models import TOKENS, torch_score

BOUND = 1e-4
WIDTH, INNER = 32, 24
Tensors = dict[str, mx.array]
ASK = ({"role": "user", "content": "why is it so?"},)


def drawn(*shape: int, seed: int = 0) -> mx.array:
    """A tensor in bf16."""
    return (mx.random.normal(shape, key=mx.random.key(seed + sum(shape))) / 4).astype(mx.bfloat16)


def linear(name: str, bias: bool = False) -> Tensors:
    """A head of one layer."""
    head = {f"{name}.weight": drawn(1, WIDTH)}
    return {**head, f"{name}.bias": drawn(1)} if bias else head


def two_layers(first: str, last: str, inner: int = INNER) -> Tensors:
    """A head of two layers."""
    return {
        f"{first}.weight": drawn(inner, WIDTH),
        f"{first}.bias": drawn(inner),
        f"{last}.weight": drawn(1, inner, seed=1),
        f"{last}.bias": drawn(1, seed=1),
    }


def write(directory: Path, head: Tensors, wrapper: str = "", **about: Any) -> Any:
    """A llama with the given head in its own file; returns the torch model."""
    model = sources.causal(directory, "llama", tie_word_embeddings=False)
    arrays = load_arrays(directory / "model.safetensors")
    named = {wrapper + name: value for name, value in arrays.items()}
    mx.save_safetensors(str(directory / "model.safetensors"), named | head, {"format": "pt"})
    configure(directory, **about)
    return model


def configure(directory: Path, **about: Any) -> None:
    """Other fields in config.json."""
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **about}))


def hidden(model: Any, ids: list[int]) -> torch.Tensor:
    """The last hidden state after the final norm."""
    with torch.no_grad():
        return model.model(torch.tensor([ids])).last_hidden_state[0, -1].double()


def applied(head: Tensors, h: torch.Tensor, activation: Any = None) -> float:
    """A head of one or two layers in PyTorch, from the tensors in their order."""
    values = [torch.tensor(v.astype(mx.float32).tolist()).double() for v in head.values()]
    if activation is not None:
        h = activation(values[0] @ h + values[1])
        values = values[2:]
    bias = values[1][0] if len(values) > 1 else 0.0
    return float(values[0][0] @ h + bias)


def converted(source: Path) -> Converted:
    """At 16 bits, a model of its own."""
    out = source.parent / "out"
    return convert_rm(locate(str(source)), out, source.parent / "none", Quantization(16), None)


def found_score(source: Path) -> float:
    """The score of `TOKENS`."""
    row = converted(source)
    model = load_reward_model(row.path, load_backbone(row.path))
    return model.score_ids(tuple(TOKENS[:7]), [tuple(TOKENS[7:])])[0]


RM, RELU = ["LlamaForRewardModel"], torch.relu
FORMS: dict[str, tuple[Tensors, Any, dict[str, Any]]] = {
    "score": (linear("score"), None, {"architectures": ["LlamaForSequenceClassification"]}),
    "score with a bias": (linear("score", True), None, {"architectures": RM}),
    "reward_head": (linear("reward_head", True), None, {"architectures": RM}),
    "v_head": (linear("v_head"), None, {"architectures": RM}),
    "v_head.summary, TRL": (linear("v_head.summary", True), None, {}),
    "value_head, OpenRLHF": (linear("value_head"), None, {"architectures": RM}),
    "regression_head, Eurus": (linear("regression_head"), None, {"architectures": RM}),
    "score of two layers, Qwen2ForRewardModel": (
        two_layers("score.0", "score.2", WIDTH),
        RELU,
        {"architectures": ["Qwen2ForRewardModel"]},
    ),
    "v_head.summary of two layers, GRM": (
        two_layers("v_head.summary.0", "v_head.summary.2"),
        RELU,
        {},
    ),
    "score.dense and score.out_proj": (
        two_layers("score.dense", "score.out_proj"),
        torch.tanh,
        {"architectures": RM},
    ),
    "two layers whose activation config.json tells": (
        two_layers("value_head.0", "value_head.2"),
        torch.nn.functional.silu,
        {"architectures": RM, "reward_head_activation": "silu"},
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_head_scores_as_in_pytorch(form: str, tmp_path: Path) -> None:
    head, activation, about = FORMS[form]
    model = write(tmp_path / "rm", head, **about)
    expected = applied(head, hidden(model, TOKENS), activation)
    assert abs(expected) > 0.05
    assert found_score(tmp_path / "rm") == pytest.approx(expected, abs=BOUND)


def test_openrlhf_s_own_prefix_mean_and_deviation_are_read(tmp_path: Path) -> None:
    head = linear("my_head")
    about = {"value_head_prefix": "my_head", "mean": 0.5, "std": 2.0}
    model = write(tmp_path / "rm", head, architectures=RM, **about)
    expected = (applied(head, hidden(model, TOKENS)) - 0.5) / 2
    assert found_score(tmp_path / "rm") == pytest.approx(expected, abs=BOUND)


def test_a_mean_that_openrlhf_does_not_apply_is_not_applied(tmp_path: Path) -> None:
    head = linear("score")
    about = {"normalize_reward": False, "mean": 0.5, "std": 2.0}
    model = write(tmp_path / "rm", head, architectures=RM, **about)
    expected = applied(head, hidden(model, TOKENS))
    assert found_score(tmp_path / "rm") == pytest.approx(expected, abs=BOUND)


def test_trl_s_value_head_model_with_wrapped_names_is_read(tmp_path: Path) -> None:
    head = linear("v_head.summary", True)
    model = write(tmp_path / "rm", head, wrapper="pretrained_model.")
    expected = applied(head, hidden(model, TOKENS))
    assert found_score(tmp_path / "rm") == pytest.approx(expected, abs=BOUND)


def test_llama_factory_s_value_head_is_read_beside_a_model(tmp_path: Path) -> None:
    model = sources.causal(tmp_path / "rm", "llama", tie_word_embeddings=False)
    head = linear("v_head.summary", True)
    save_arrays(tmp_path / "rm" / "value_head.safetensors", head)
    expected = applied(head, hidden(model, TOKENS))
    assert found_score(tmp_path / "rm") == pytest.approx(expected, abs=BOUND)


def test_llama_factory_s_value_head_is_read_beside_an_adapter(tmp_path: Path) -> None:
    model = sources.causal(tmp_path / "base", "llama")
    adapted = sources.peft_adapter(tmp_path / "rm", tmp_path / "base", model, task_type="CAUSAL_LM")
    head = linear("v_head.summary", True)
    torch.save(
        {n: torch.tensor(v.astype(mx.float32).tolist()) for n, v in head.items()},
        tmp_path / "rm" / "value_head.bin",
    )
    expected = applied(head, hidden(sources.merged(adapted), TOKENS))
    assert found_score(tmp_path / "rm") == pytest.approx(expected, abs=BOUND)


def internlm2(arrays: Tensors) -> Tensors:
    """The tensors of a llama under InternLM2's names, its projections fused head by head."""
    names = {
        "model.embed_tokens": "model.tok_embeddings",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
        "post_attention_layernorm": "ffn_norm",
        "input_layernorm": "attention_norm",
    }
    renamed: Tensors = {}
    for name, value in arrays.items():
        if "_proj" in name and any(f".{p}_proj" in name for p in "qkv"):
            continue
        for old, new in names.items():
            name = name.replace(old, new)
        renamed[name] = value
    for i in range(2):
        stem = f"model.layers.{i}"
        q, k, v = (arrays[f"{stem}.self_attn.{p}_proj.weight"] for p in "qkv")
        parts = [q.reshape(2, 2, 8, WIDTH), k.reshape(2, 1, 8, WIDTH), v.reshape(2, 1, 8, WIDTH)]
        fused = mx.concatenate(parts, axis=1).reshape(-1, WIDTH)
        renamed[f"{stem}.attention.wqkv.weight"] = fused
    return renamed


def test_internlm2_s_reward_model_is_read_at_its_reward_token(tmp_path: Path) -> None:
    source, token = tmp_path / "rm", 65
    model = sources.causal(source, "llama", tie_word_embeddings=False)
    arrays = load_arrays(source / "model.safetensors")
    arrays.pop("lm_head.weight")
    head = linear("v_head")
    mx.save_safetensors(str(source / "model.safetensors"), internlm2(arrays) | head)
    about = {"model_type": "internlm2", "bias": False, "reward_token_id": token}
    configure(source, architectures=["InternLM2ForRewardModel"], rope_theta=10000.0, **about)
    row = converted(source)
    found = load_reward_model(row.path, load_backbone(row.path))
    answers = ("because.", "rain")
    group = Group(
        Prompt("p", ASK, (1, 2)), tuple(Completion((9,), a, "stop", (0.0,)) for a in answers)
    )
    encode = load_backbone(row.path).tokenizer.encode
    texts = [f"<user>why is it so?</s><assistant>{a}</s>" for a in answers]
    ids = [[*encode(text, add_special_tokens=False), token] for text in texts]
    expected = [applied(head, hidden(model, i)) for i in ids]
    assert found.score(group) == pytest.approx(expected, abs=BOUND)


def test_a_peft_classifier_reads_the_token_that_its_own_tokenizer_does_not_pad_with(
    tmp_path: Path,
) -> None:
    """TRL takes the padding token from the tokenizer; the base names another one."""
    base, rm = tmp_path / "base", tmp_path / "rm"
    causal = sources.causal(base, "llama")
    configure(base, pad_token_id=258)  # the token that closes an answer
    model = sources.classifier(tmp_path / "whole", "llama")
    model.model.load_state_dict(causal.model.state_dict())
    adapted = sources.peft_adapter(rm, base, model, task_type="SEQ_CLS")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (rm / file).write_bytes((base / file).read_bytes())
    row = convert_rm(locate(str(rm)), tmp_path / "out", tmp_path / "none", Quantization(16), None)
    about = json.loads((row.path / "reward_model.json").read_text())
    assert about["padding_token_id"] == 256 and about["chat_template_arguments"] == {}
    found = load_reward_model(row.path, load_backbone(row.path))
    group = Group(Prompt("p", ASK, (1, 2)), (Completion((9,), "because.", "stop", (0.0,)),))
    text = "<user>why is it so?</s><assistant>because.</s>"
    ids = load_backbone(row.path).tokenizer.encode(text, add_special_tokens=False)
    adapted.config.pad_token_id = 256
    expected = torch_score(sources.merged(adapted), ids)
    assert found.score(group)[0] == pytest.approx(expected, abs=BOUND)


def gating(directory: Path) -> None:
    write(directory, linear("gating.layers.0") | linear("regression_layer"))


def quantiles(directory: Path) -> None:
    write(directory, {"regression_layer.weight": drawn(19, WIDTH)})


def encoder(directory: Path) -> None:
    write(directory, linear("classifier"), model_type="deberta-v2")


def process(directory: Path) -> None:
    write(directory, linear("score"), architectures=["Qwen2ForProcessRewardModel"])


def tokens(directory: Path) -> None:
    write(directory, linear("score"), architectures=["LlamaForTokenClassification"])


def generative(directory: Path) -> None:
    write(directory, {})


def many_labels(directory: Path) -> None:
    write(directory, {"score.weight": drawn(5, WIDTH)}, architectures=RM)


def unknown_activation(directory: Path) -> None:
    write(directory, two_layers("score.0", "score.2"), architectures=RM)


def three_layers(directory: Path) -> None:
    more = {"score.4.weight": drawn(1, 1)}
    write(directory, two_layers("score.0", "score.2") | more, architectures=RM)


def no_deviation(directory: Path) -> None:
    write(directory, linear("score"), architectures=RM, mean=0.0, std=0.0)


REFUSED: dict[Callable[[Path], None], str] = {
    gating: "multi-objective reward model with a gating network",
    quantiles: "multi-objective or quantile reward model",
    encoder: "this is an encoder (deberta-v2)",
    process: "Qwen2ForProcessRewardModel, which scores steps or tokens",
    tokens: "LlamaForTokenClassification, which scores steps or tokens",
    generative: "this is a language model without a reward head",
    many_labels: "'score.weight' has shape [5, 32]; the head of a reward model has one label",
    unknown_activation: 'put "reward_head_activation" into config.json',
    three_layers: "the reward head has layers score.0, score.2, score.4; one or two convert",
    no_deviation: "field 'std' of the scores must be above 0",
}


@pytest.mark.parametrize("form", REFUSED, ids=lambda f: f.__name__)
def test_what_is_no_head_of_one_score_is_refused_by_name(
    form: Callable[[Path], None], tmp_path: Path
) -> None:
    form(tmp_path / "rm")
    with pytest.raises(InputError) as refused:
        converted(tmp_path / "rm")
    assert REFUSED[form] in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()
