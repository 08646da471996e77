"""An mlx-lm model of a configuration and of arrays that are read lazily."""

from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes

from mlx_grpo.convert.tensors import Tensors
from mlx_grpo.core.errors import InputError, one_line
from mlx_grpo.core.types import Parameters
from mlx_grpo.models.directory import check_layers


def build_model(config: dict[str, Any], tensors: Tensors, place: Path) -> nn.Module:
    """An mlx-lm model that holds the given arrays, lazily; each parameter must be there, and fit.

    Raises:
        InputError: an unknown architecture, a tensor that is missing, mis-shaped or unknown.
    """
    check_layers(place / "config.json" if place.is_dir() else place, config)
    try:
        model_class, args_class = _get_classes(config)
        model = model_class(args_class.from_dict(config))
        arrays = dict(tensors.arrays)
        if hasattr(model, "sanitize"):
            arrays = model.sanitize(arrays)
        if quantization := config.get("quantization"):
            _make_quantized(model, quantization, arrays)
    except SystemExit:  # what a family does whose code wants another package
        raise InputError(
            f"{place}: mlx-lm's code for {config.get('model_type')} needs a package that is not "
            "installed"
        ) from None
    except Exception as e:  # the model code of mlx-lm asserts and raises what it likes
        about = place / "config.json" if place.is_dir() else place
        raise InputError(f"{about}: no model can be built of this: {one_line(e)}") from e
    expected = dict(tree_flatten(model.parameters()))
    for name in sorted(expected.keys() | arrays.keys()):
        file = tensors.files.get(name, place)
        if name not in arrays:
            raise InputError(f"{file}: tensor '{name}' is missing")
        if name not in expected:
            raise InputError(f"{file}: tensor '{name}' has no place in this architecture")
        if arrays[name].shape != expected[name].shape:
            raise InputError(
                f"{file}: tensor '{name}' has shape {list(arrays[name].shape)}, config.json wants "
                f"{list(expected[name].shape)}"
            )
    model.load_weights(list(arrays.items()))
    model.eval()
    return model


def _make_quantized(model: nn.Module, quantization: dict[str, Any], arrays: Parameters) -> None:
    def how(path: str, module: nn.Module) -> bool | dict[str, Any]:
        packed = hasattr(module, "to_quantized") and f"{path}.scales" in arrays
        return quantization.get(path, packed) if packed else False

    nn.quantize(
        model,
        quantization["group_size"],
        quantization["bits"],
        mode=quantization.get("mode", "affine"),
        class_predicate=how,
    )
