"""Memory of a conversion: a random bf16 model of true size, converted to 4 bits, measured.

    python bench/memory/convert.py [--shape llama-3.2-1b] [--json FILE]

The bound: twice the largest tensor plus what is written. Prints MLX's peak of the conversion alone
and with the measurement of what 4 bits cost.
"""

import mlx_grpo  # noqa: F401  isort: skip  (first: it loads OpenBLAS before MLX)

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes

from bench.shapes import SHAPES
from mlx_grpo.backend.device import peak_memory
from mlx_grpo.convert.convert import convert_sft
from mlx_grpo.convert.quantize import Quantization, write_weights
from mlx_grpo.convert.source import locate
from mlx_grpo.core.rng import key

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def write_source(directory: Path, shape: dict[str, object], tokenizer: Path) -> int:
    """Random bf16 weights in files of at most 1 GB; returns the bytes of the largest tensor."""
    model_class, args_class = _get_classes(shape)
    model = model_class(args_class.from_dict(shape))
    shapes = {name: value.shape for name, value in tree_flatten(model.parameters())}

    def draw() -> Iterator[tuple[str, mx.array]]:
        for name, size in shapes.items():
            value = 0.02 * mx.random.normal(size, dtype=mx.bfloat16, key=key(0, "weights", name))
            mx.eval(value)
            yield name, value

    write_weights(directory, draw())
    (directory / "config.json").write_text(json.dumps(shape))
    for name in TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, directory / name)
    return max(2 * mx.zeros(s).size for s in shapes.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.2-1b")
    parser.add_argument("--tokenizer", type=Path, default=Path("weights/sft-4bit"))
    parser.add_argument("--texts", type=Path, default=Path("data/eval_prompts.jsonl"))
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    arguments = parser.parse_args()
    figures: dict[str, object] = {"shape": arguments.shape, "bits": 4}
    with tempfile.TemporaryDirectory() as work:
        source, out = Path(work, "source"), Path(work, "out")
        source.mkdir()
        largest = write_source(source, SHAPES[arguments.shape], arguments.tokenizer)
        for name, texts in (("convert", None), ("convert_and_measure", arguments.texts)):
            mx.clear_cache()
            mx.reset_peak_memory()
            start = time.perf_counter()
            row = convert_sft(locate(str(source)), out, Quantization(), texts, replace=True)
            seconds = time.perf_counter() - start
            bound = 2 * largest + row.bytes
            figures[name] = {
                "peak_bytes": peak_memory(),
                "bound_bytes": bound,
                "seconds": round(seconds, 1),
                "cost": row.cost.describe(),
            }
            print(
                f"{name}: peak {peak_memory() / 1e6:,.0f} MB of {bound / 1e6:,.0f} "
                f"(2 x {largest / 1e6:,.0f} + {row.bytes / 1e6:,.0f}), {seconds:.0f} s, "
                f"{row.parameters / 1e6:,.0f} M parameters, {row.bits_per_weight:.2f} bits per "
                f"weight; {row.cost.describe()}"
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
