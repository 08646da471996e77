"""Checkpoints in every form people have them, written by transformers, peft and mlx-lm themselves.

LoRA matrices are drawn in steps of 1/64, so that W + scale * B A is the same number in every order
of summation and rounding it to bf16 has one result.
"""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import peft
import torch
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm import load
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import save_config

from mlx_grpo.files.safetensors import load_arrays, save_arrays
from tests.helpers.hf_models import save_hf, write_hf

FAMILIES = {
    "llama": "Llama",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gemma": "Gemma",
    "gemma2": "Gemma2",
    "gemma3_text": "Gemma3",
    "mistral": "Mistral",
    "phi3": "Phi3",
}
MLX_LORA = {"rank": 4, "scale": 2.0, "dropout": 0.0}


def causal(directory: Path, family: str, **changes: Any) -> Any:
    """A language model; returns the torch model."""
    return write_hf(directory, f"{FAMILIES[family]}ForCausalLM", **changes)


def classifier(directory: Path, family: str, **changes: Any) -> Any:
    """What TRL's RewardTrainer writes; returns the torch model."""
    name = "Gemma3Text" if family == "gemma3_text" else FAMILIES[family]
    changes = {"num_labels": 1, **changes}
    return write_hf(directory, f"{name}ForSequenceClassification", **changes)


def reshard(model: Any, directory: Path) -> None:
    """Write the model anew in several files."""
    (directory / "model.safetensors").unlink()
    save_hf(model, directory, max_shard_size="20KB")
    assert (directory / "model.safetensors.index.json").is_file()


def pickle(directory: Path, shards: int = 1) -> None:
    """Put the weights into PyTorch's own format, as transformers did until its version 4."""
    from safetensors.torch import load_file

    values = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    if shards == 1:
        torch.save(values, directory / "pytorch_model.bin")
        return
    names = [f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin" for i in range(shards)]
    places = {name: names[i % shards] for i, name in enumerate(values)}
    for file in names:
        torch.save({n: values[n] for n, f in places.items() if f == file}, directory / file)
    index = {"metadata": {}, "weight_map": places}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def peft_adapter(directory: Path, base: Path, model: Any, seed: int = 0, **options: Any) -> Any:
    """A LoRA trained with peft on `model`, which lies in `base`; returns peft's model, in fp32."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "lora_dropout": 0.0}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**{**settings, **options})).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "lora_" in name:
                value.copy_(torch.randint(-12, 13, value.shape, generator=generator) / 64)
            elif "modules_to_save" in name:
                value.copy_(torch.randint(-99, 99, value.shape, generator=generator) / 256)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(directory)
    return adapted


def merged(adapted: Any) -> Any:
    """peft's own fusion of an adapter, rounded once to bf16."""
    model = adapted.merge_and_unload()
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(value.bfloat16())
    return model


def mlx_directory(directory: Path, source: Path, bits: int | None = None) -> None:
    """What `mlx_lm.convert` writes of a Hugging Face directory."""
    from mlx_lm import convert

    options = {"quantize": True, "q_bits": bits, "q_group_size": 32} if bits else {}
    convert(str(source), str(directory), **options)


def mlx_adapter(directory: Path, base: Path, seed: int = 0) -> None:
    """A LoRA of `mlx_lm.lora` on the last block of the model in `base`."""
    model, _ = load(str(base))
    model.freeze()
    linear_to_lora_layers(model, 1, MLX_LORA)
    drawn = []
    for i, (name, value) in enumerate(sorted(tree_flatten(model.trainable_parameters()))):
        steps = mx.random.randint(-12, 13, value.shape, key=mx.random.key(seed + i))
        drawn.append((name, steps / 64))
    model.update(tree_unflatten(drawn))
    directory.mkdir()
    weights = dict(tree_flatten(model.trainable_parameters()))
    mx.save_safetensors(str(directory / "adapters.safetensors"), weights)
    about = {"fine_tune_type": "lora", "model": str(base), "num_layers": 1}
    save_config({**about, "lora_parameters": MLX_LORA}, directory / "adapter_config.json")


def add_mlx_adapter(model: Any, directory: Path) -> Any:
    """W + scale * (a b)^T of an mlx-lm adapter in a torch model, in place, rounded once to bf16."""
    arrays = {n: torch.tensor(v.tolist()) for n, v in load_arrays(adapter_file(directory)).items()}
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name in (n.removesuffix(".lora_a") for n in arrays if n.endswith(".lora_a")):
            update = MLX_LORA["scale"] * (arrays[f"{name}.lora_a"] @ arrays[f"{name}.lora_b"]).T
            weight = modules[name].weight
            weight.copy_((weight + update).bfloat16())
    return model


def adapter_file(directory: Path) -> Path:
    """The weights of an mlx-lm adapter."""
    return directory / "adapters.safetensors"


def reward_head(directory: Path, hidden: int, bias: bool, prefix: str = "") -> dict[str, Any]:
    """Write `reward_head.safetensors`; returns its tensors for torch."""
    head = {"weight": mx.random.normal((1, hidden), key=mx.random.key(3)) / 4}
    if bias:
        head["bias"] = mx.array([0.625])
    save_arrays(directory / "reward_head.safetensors", {prefix + n: v for n, v in head.items()})
    return {n: torch.tensor(v.tolist()) for n, v in head.items()}
