"""The files of each form, written into a directory that is there and empty."""

from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_grpo.backend.precision import can_expand, dense_twin, dense_weight, float_dtype
from mlx_grpo.convert.adapters import PEFT_PREFIX, fuse
from mlx_grpo.convert.quantize import Quantization, quantized_config, stream, write_weights
from mlx_grpo.convert.reader import open_source
from mlx_grpo.convert.source import locate
from mlx_grpo.convert.tokenizer import copy_tokenizer
from mlx_grpo.core.errors import InputError
from mlx_grpo.files.atomic import read_json, write_json
from mlx_grpo.files.safetensors import load_arrays, save_arrays


def write_adapter(directory: Path, adapter: Path, base: str | None) -> None:
    """The run's own adapter, which mlx-lm reads as it is."""
    config = read_json(adapter / "adapter_config.json")
    save_arrays(directory / "adapters.safetensors", load_arrays(adapter / "adapters.safetensors"))
    write_json(directory / "adapter_config.json", {**config, **({"model": base} if base else {})})


def write_fused(directory: Path, adapter: Path, sft: Path, dequantize: bool, scratch: Path) -> None:
    """A model of its own: W + scale * (a b)^T, quantized as the SFT model is, or in 16 bits.

    Each weight is rounded once, block by block; the directory loads with `mlx_lm.load`, and in 16
    bits, where a family has the same names there, with transformers too.
    """
    opened = open_source(locate(str(adapter)), str(sft), scratch)
    model = opened.backbone()
    config = quantized_config(opened, model, Quantization(16))  # a quantized one stays as it is
    if dequantize:
        config = _unpack(model, config)
    fuse(model, opened.loras or {}, adapter)
    write_json(directory / "config.json", config)
    opened.write_tokenizer(directory)
    write_weights(directory, stream(model, config, opened))


def _unpack(model: nn.Module, config: dict[str, Any]) -> dict[str, Any]:
    """Put lazy 16-bit twins in the place of quantized modules; returns config.json for them."""
    packed = [(name, module) for name, module in model.named_modules() if "scales" in module]
    for name, module in packed:
        if not can_expand(module):
            raise InputError(
                f"'{name}' is packed in a form that is not unpacked; leave --dequantize out"
            )
    model.update_modules(tree_unflatten([(name, _unpacked(module)) for name, module in packed]))
    return {n: v for n, v in config.items() if n not in ("quantization", "quantization_config")}


def _unpacked(module: nn.Module) -> nn.Module:
    twin = dense_twin(module)
    twin.weight = dense_weight(module).astype(float_dtype(module))
    if "bias" in module:
        twin.bias = module.bias
    return twin


def write_peft(directory: Path, adapter: Path, sft: Path, base: str | None) -> None:
    """A LoRA adapter as Hugging Face PEFT reads it, in fp32, with the tokenizer.

    PEFT holds A as [rank, in] and B as [out, rank] and scales by alpha / rank; mlx-lm holds the
    transposes and the scale itself.
    """
    parameters = read_json(adapter / "adapter_config.json")["lora_parameters"]
    leaves = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}
    arrays = {}
    for name, value in load_arrays(adapter / "adapters.safetensors").items():
        module, _, leaf = name.rpartition(".")
        if value.ndim != 2:
            raise InputError(
                f"{adapter}: '{module}' are experts, and a PEFT adapter has no place for their "
                "LoRA; use --fuse"
            )
        arrays[f"{PEFT_PREFIX}{module}.{leaves[leaf]}"] = value.T
    save_arrays(directory / "adapter_model.safetensors", arrays)
    copy_tokenizer(sft, directory)
    write_json(
        directory / "adapter_config.json",
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": parameters["rank"],
            "lora_alpha": parameters["scale"] * parameters["rank"],
            "target_modules": parameters["keys"],
            "lora_dropout": 0.0,
            "bias": "none",
            "inference_mode": True,
        },
    )
