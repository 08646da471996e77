"""Tiny random models and a byte tokenizer, made in milliseconds."""

import mlx_grpo  # noqa: F401  isort: skip  (first: it loads OpenBLAS before MLX)

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import _get_classes

from bench.families import family_config
from mlx_grpo.core.rng import key

VOCABULARY = 260
PAD, BOS, EOS, UNK = 256, 257, 258, 259
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def tiny_config(family: str, **changes: Any) -> dict[str, Any]:
    """config.json of a tiny model."""
    tokens = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    return family_config(
        family, **{"hidden_size": 32, "vocab_size": VOCABULARY, **tokens, **changes}
    )


def tiny_model(family: str = "llama", seed: int = 0, **changes: Any) -> Any:
    """A tiny random mlx-lm model in fp32 whose tokens all have their own probability."""
    return model_of(tiny_config(family, **changes), seed)


def model_of(config: dict[str, Any], seed: int = 0) -> Any:
    """A random mlx-lm model of a configuration, in fp32 and frozen."""
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    drawn = []
    for name, value in tree_flatten(model.parameters()):
        noise = mx.random.normal(value.shape, key=key(seed, "tiny", config["model_type"], name))
        # matrices wholly from the key (their own initialisation is not seeded), norms around theirs
        drawn.append((name, 0.15 * noise if value.ndim > 1 else value + 0.05 * noise))
    model.update(tree_unflatten(drawn))
    mx.eval(model.parameters())
    model.freeze()
    return model


def write_tokenizer(
    directory: Path, chat_template: str | None = CHAT_TEMPLATE, more: tuple[str, ...] = ()
) -> None:
    """A byte-level tokenizer: 256 bytes, four special tokens, and `more` of them."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = ["<pad>", "<s>", "</s>", "<unk>", *more]
    tokenizer.add_special_tokens([AddedToken(n, special=True, normalized=False) for n in names])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
    }
    if chat_template is not None:
        config["chat_template"] = chat_template
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def write_model(directory: Path, family: str = "llama", seed: int = 0, **changes: Any) -> Path:
    """A tiny model directory in mlx-lm's format."""
    return write_model_of(directory, tiny_config(family, **changes), seed)


def write_model_of(directory: Path, config: dict[str, Any], seed: int = 0) -> Path:
    """A directory with the model of a configuration."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = dict(tree_flatten(model_of(config, seed).parameters()))
    mx.save_safetensors(str(directory / "model.safetensors"), weights, metadata={"format": "mlx"})
    (directory / "config.json").write_text(json.dumps(config))
    write_tokenizer(directory)
    return directory


def write_acting_model(directory: Path) -> Path:
    """A tiny model whose random words are tool calls now and then, and which ends many turns: 80 of
    its tokens are a whole call of `add`, some of them malformed."""
    calls = tuple(
        f'<tool_call>{{"name": "add", "arguments": {{"number": {n}}}}}'
        + ("</tool_call>" if n % 5 else "")
        for n in range(80)
    )
    size = VOCABULARY + len(calls)
    write_model(directory, vocab_size=size, eos_token_id=[EOS, *range(40, 60)])
    write_tokenizer(directory, more=calls)
    return directory


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
