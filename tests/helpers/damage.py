"""Ways to damage a source: each a function of its directory."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import torch

from mlx_grpo.files.safetensors import load_arrays, save_arrays

WEIGHTS = "model.safetensors"
UP = "model.layers.1.mlp.up_proj.weight"
Damage = Callable[[Path], None]


def arrays(change: Callable[[dict[str, mx.array]], Any], file: str = WEIGHTS) -> Damage:
    """A change of the tensors of a file."""

    def damage(source: Path) -> None:
        place = next(source.glob(file))
        found = load_arrays(place)
        change(found)
        save_arrays(place, found)

    return damage


def tensor(name: str, change: Callable[[mx.array], mx.array], file: str = WEIGHTS) -> Damage:
    """Another tensor of a name."""
    return arrays(lambda a: a.update({name: change(a[name])}), file)


def missing(name: str, file: str = WEIGHTS) -> Damage:
    """A tensor taken away."""
    return arrays(lambda a: a.pop(name), file)


def added(file: str = WEIGHTS, **new: tuple[int, ...]) -> Damage:
    """Tensors of zeros, their names with `__` for a dot."""
    zeros = {name.replace("__", "."): mx.zeros(shape) for name, shape in new.items()}
    return arrays(lambda a: a.update(zeros), file)


def value(name: str, x: float, file: str = WEIGHTS) -> Damage:
    """One number in a tensor."""
    return tensor(name, lambda v: put(v, x), file)


def both(*damages: Damage) -> Damage:
    """One after the other."""

    def damage(source: Path) -> None:
        for one in damages:
            one(source)

    return damage


def put(array: mx.array, x: float) -> mx.array:
    """The array with another last number."""
    flat = array.reshape(-1)
    flat[-1] = x
    return flat.reshape(array.shape)


def fields(file: str = "config.json", **changes: Any) -> Damage:
    """Other fields in a JSON file; None takes one out."""

    def damage(source: Path) -> None:
        about = {**json.loads((source / file).read_text()), **changes}
        about = {k: v for k, v in about.items() if v != "out"}
        (source / file).write_text(json.dumps(about))

    return damage


def without(name: str) -> Damage:
    """A file taken away."""
    return lambda source: next(source.glob(name)).unlink()


def empty(name: str) -> Damage:
    """A file without content."""
    return lambda source: next(source.glob(name)).write_bytes(b"")


def many_tokens(source: Path) -> None:
    """The tokenizer of a larger model."""
    about = json.loads((source / "tokenizer.json").read_text())
    more = {"id": 999, "content": "<more>", "special": True, "normalized": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    about["model"]["vocab"]["<more>"] = 999
    about["added_tokens"].append({**more, **flags})
    (source / "tokenizer.json").write_text(json.dumps(about))


def pickled(content: Any) -> Damage:
    """Something else than the weights in `pytorch_model.bin`."""
    return lambda source: torch.save(content, source / "pytorch_model.bin")


def nan_in_bin(source: Path) -> None:
    """One NaN in a file of PyTorch's format."""
    found = torch.load(source / "pytorch_model.bin", weights_only=True)
    found[UP][0, 0] = float("nan")
    torch.save(found, source / "pytorch_model.bin")


def shard_twice(source: Path) -> None:
    """A tensor in two shards, and no index that says which one counts."""
    (source / "model.safetensors.index.json").unlink()
    files = sorted(source.glob("model-*.safetensors"))
    first, second = load_arrays(files[0]), load_arrays(files[1])
    save_arrays(files[1], {**second, next(iter(first)): next(iter(first.values()))})


def outside(source: Path) -> None:
    """An index that leads out of the directory."""
    file = source / "model.safetensors.index.json"
    about = json.loads(file.read_text())
    about["weight_map"][UP] = "../sft/model.safetensors"
    file.write_text(json.dumps(about))


class Evil:
    """Would write a file when unpickled by a careless reader."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("unpickled"),))
