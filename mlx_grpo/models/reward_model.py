"""A Bradley-Terry reward model: a backbone, often shared with the policy, and a scalar head at the
last real token.

r(prompt, completion) = w . norm(h_last) + b. A directory holds `reward_model.json` (kind, input,
backbone fingerprint) and `reward_head.safetensors` (weight [1, hidden], optional bias [1]); kind
`adapter` adds a LoRA for the policy's backbone, kind `full` a whole mlx-lm model. A head of two
layers has a first one named after its activation: relu.weight [m, hidden], relu.bias [m], and
weight [1, m].
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_grpo.backend.precision import Precision
from mlx_grpo.core.errors import InputError
from mlx_grpo.core.padding import common_prefix, length_buckets, pad_right
from mlx_grpo.core.types import Group, TokenIds
from mlx_grpo.data.chat import conversation_tokens, load_chat_tokenizer
from mlx_grpo.data.messages import Message
from mlx_grpo.files.atomic import read_json
from mlx_grpo.files.safetensors import load_arrays
from mlx_grpo.models.backbone import Backbone, load_alone
from mlx_grpo.models.decoder import WHOLE, Decoder, Sizes
from mlx_grpo.models.directory import fingerprint
from mlx_grpo.models.lora import load_adapter

REWARD_CONFIG = "reward_model.json"
REWARD_HEAD = "reward_head.safetensors"
TokenRows = tuple[TokenIds, list[TokenIds]]
"""A prefix and what follows it in each row."""
LEARNING_CURVE = "learning_curve.jsonl"
ACTIVATIONS: dict[str, Callable[[mx.array], mx.array]] = {
    "relu": nn.relu,
    "tanh": mx.tanh,
    "silu": nn.silu,
    "gelu": nn.gelu,
}
"""What may stand between the two layers of a head."""


@dataclass(frozen=True)
class FirstLayer:
    """The first of two layers of a head; weight [m, hidden], bias [m] or None."""

    activation: str
    weight: mx.array
    bias: mx.array | None


@dataclass(frozen=True)
class TextForm:
    """What a conversation goes through before a reward model with its own template reads it."""

    padding: int | None = None
    """The token at the end of a text that the model was trained not to look at: transformers'
    classifiers pool at the last token that is not the padding token, even where that is the
    end-of-sequence token too."""
    appended: int | None = None
    """A token put behind every text, at which the score is read, as InternLM2's reward token."""
    template: Mapping[str, Any] | None = None
    """Arguments of the chat template; None for those of mlx-grpo's own prompts."""

    def ids(self, tokenizer: Any, messages: Sequence[Message], answer: str) -> TokenIds:
        """A whole conversation as token ids; its last is the one that the head reads."""
        ids = conversation_tokens(tokenizer, messages, answer, self.template)
        ids = without_padding(ids, self.padding)
        return ids if self.appended is None else (*ids, self.appended)

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "TextForm":
        """What reward_model.json says."""
        template = config.get("chat_template_arguments")
        return cls(config.get("padding_token_id"), config.get("reward_token_id"), template)


@dataclass(frozen=True)
class RewardModel:
    """Scores completions.

    `tokenizer` is None where the policy's token ids are used as they are; otherwise texts are put
    through the reward model's own chat template, in the given form.
    """

    decoder: Decoder
    weight_1D: mx.array
    bias: mx.array | None
    tokenizer: Any | None
    form: TextForm = field(default_factory=TextForm)
    first: FirstLayer | None = None

    def score(self, group: Group) -> list[float]:
        """Raw scores of the completions of a group.

        Groups do not share a pass: what else is in one changes the last bits of a score, and the
        same answer before and after training would no longer tie.
        """
        prompt_ids, rows = self.inputs(group)
        return self.score_ids(prompt_ids, rows)

    def inputs(self, group: Group) -> TokenRows:
        """Shared prefix and what follows it for each completion, as this model's token ids."""
        return reward_inputs(group, self.tokenizer, self.form)

    def score_ids(self, prompt_ids: TokenIds, rows: list[TokenIds]) -> list[float]:
        """Scores of token sequences that share a prefix; the head reads the last token of each."""
        scores = [0.0] * len(rows)
        most = self.decoder.sizes.rows
        for bucket in length_buckets(list(map(len, rows)), len(prompt_ids), most):
            rows_KT, lengths = pad_right([rows[i] for i in bucket])
            _, h_KTD = self.decoder.forward(mx.array([prompt_ids]), rows_KT)
            last_KD = h_KTD[mx.arange(len(bucket)), mx.array(lengths) - 1]
            found_K = reward_head(self.decoder, last_KD, self.weight_1D, self.bias, self.first)
            for i, score in zip(bucket, found_K.tolist(), strict=True):
                scores[i] = float(score)
        return scores


def reward_inputs(group: Group, tokenizer: Any | None, form: TextForm) -> TokenRows:
    """Shared prefix and what follows it for each completion, as the reward model's token ids."""
    if tokenizer is None:
        return group.prompt.token_ids, [c.token_ids for c in group.completions]
    texts = [form.ids(tokenizer, group.prompt.messages, c.text) for c in group.completions]
    shared = common_prefix(texts)
    return texts[0][:shared], [ids[shared:] for ids in texts]


def reward_head(
    decoder: Decoder,
    last_KD: mx.array,
    weight_1D: mx.array,
    bias: mx.array | None,
    first: FirstLayer | None = None,
) -> mx.array:
    """Scores [K], fp32, from hidden states after the last block [K, D]."""
    normed_KD = decoder.norm(last_KD[:, None])[:, 0].astype(mx.float32)
    return head_scores(normed_KD, weight_1D, bias, first)


def head_scores(
    h_KD: mx.array, weight_1D: mx.array, bias: mx.array | None, first: FirstLayer | None = None
) -> mx.array:
    """Scores [K] of hidden states after the final norm [K, D]."""
    if first is not None:
        inner_KM = h_KD @ first.weight.T
        inner_KM = inner_KM if first.bias is None else inner_KM + first.bias
        h_KD = ACTIVATIONS[first.activation](inner_KM)
    scores_K = (h_KD @ weight_1D.T)[:, 0]
    return scores_K if bias is None else scores_K + bias


def head_parts(
    arrays: Mapping[str, mx.array],
) -> tuple[mx.array, mx.array | None, FirstLayer | None]:
    """(weight, bias, first layer) of a head by the names in its file."""
    name = next((n for n in ACTIVATIONS if f"{n}.weight" in arrays), None)
    first = FirstLayer(name, arrays[f"{name}.weight"], arrays.get(f"{name}.bias")) if name else None
    return arrays["weight"], arrays.get("bias"), first


def without_padding(ids: tuple[int, ...], padding: int | None) -> tuple[int, ...]:
    """The token ids up to the last that is not the padding token, two of them at the least."""
    end = len(ids)
    while end > 2 and ids[end - 1] == padding:
        end -= 1
    return ids[:end]


def reward_config(path: Path) -> dict[str, Any]:
    """What reward_model.json says.

    Raises:
        InputError: no reward model there, or of an unknown kind.
    """
    if not (path / REWARD_CONFIG).is_file():
        raise InputError(
            f"{path}: no reward model here ({REWARD_CONFIG} is missing); make one with "
            "'mlx-grpo convert --rm'"
        )
    config = read_json(path / REWARD_CONFIG)
    kind = config.get("kind")
    if kind not in ("adapter", "full"):
        raise InputError(
            f"{path / REWARD_CONFIG}: field 'kind' must be 'adapter' or 'full', not {kind!r}"
        )
    return config


def load_reward_model(
    path: Path,
    backbone: Backbone | None,
    sizes: Sizes = WHOLE,
    precision: Precision | None = None,
    date: str = "",
) -> RewardModel:
    """Load a reward model; one of kind `adapter` shares the arrays of `backbone`.

    Its `input` says what it reads: `policy_token_ids` or `chat_template` (its own).

    Args:
        backbone: may be None for one of kind `full`.
        sizes: how much to work on at a time.
        precision: of a model of kind `full`; what this machine does by default.
        date: what its own chat template sees as today, YYYY-MM-DD; empty means the clock.

    Raises:
        InputError: missing or unfitting files, or an adapter made for another backbone.
    """
    config = reward_config(path)
    if config["kind"] == "adapter":
        if backbone is None:
            raise InputError(f"{path}: an adapter; name the model it was made for: --actor-model")
        check_fingerprint(path / REWARD_CONFIG, config, backbone.path)
        decoder = reward_decoder(load_adapter(backbone.model, path), sizes)
    else:
        decoder = reward_decoder(load_alone(path, precision), sizes)
    tokenizer = input_tokenizer(path, config, date)
    weight_1D, bias, first = load_head(path / REWARD_HEAD, decoder.hidden_size)
    return RewardModel(decoder, weight_1D, bias, tokenizer, TextForm.of(config), first)


def reward_decoder(model: nn.Module, sizes: Sizes = WHOLE) -> Decoder:
    """The decoder that a reward head reads.

    Raises:
        InputError: it cannot be taken apart, or has no final norm for a head to read.
    """
    decoder = Decoder(model, sizes)
    decoder.norm(mx.zeros((1, 1, decoder.hidden_size)))  # lazy: nothing is computed
    return decoder


def input_tokenizer(path: Path, config: dict[str, Any], date: str = "") -> Any | None:
    """None where the reward model reads the policy's token ids; one trained here does, whether it
    became a model of its own or not."""
    own_text = config.get("input") == "chat_template"
    return load_chat_tokenizer(path, date=date) if own_text else None


def check_fingerprint(place: Path, config: dict[str, Any], backbone: Path) -> None:
    """Raise InputError unless the reward adapter was trained on the weights in `backbone`."""
    expected = config.get("backbone_fingerprint")
    found = fingerprint(backbone)
    if expected != found:
        raise InputError(
            f"{place}: made for a backbone with fingerprint {str(expected)[:12]}, but "
            f"{backbone} has {found[:12]}; "
            "convert it again beside this model, or train one for it with 'mlx-grpo train-rm'"
        )


def load_head(file: Path, hidden: int) -> tuple[mx.array, mx.array | None, FirstLayer | None]:
    """(weight [1, hidden], bias [1] or None, the first of two layers or None), fp32.

    Raises:
        InputError: missing file or tensor, a shape other than one label or the backbone's width,
            values that are not finite.
    """
    arrays = {n: v.astype(mx.float32) for n, v in load_arrays(file).items()}
    weight = arrays.get("weight")
    if weight is None or weight.ndim != 2 or weight.shape[0] != 1:
        raise InputError(f"{file}: tensor 'weight' must have shape [1, hidden]")
    if not all(mx.isfinite(v).all().item() for v in arrays.values()):
        raise InputError(f"{file}: holds values that are not finite")
    weight, bias, first = head_parts(arrays)
    name = f"{first.activation}.weight" if first else "weight"
    width = (first.weight if first else weight).shape[-1]
    if width != hidden:
        raise InputError(f"{file}: tensor '{name}' has width {width}, the backbone has {hidden}")
    if first and first.weight.shape != (weight.shape[1], hidden):
        raise InputError(
            f"{file}: tensor 'weight' has width {weight.shape[1]}, not that of '{name}'"
        )
    return weight, bias, first
