"""A source compared with itself: what transformers computes of it against what mlx-lm does.

At the source's own values, before any quantization, both in fp32; what differs is the computation.
The PyTorch side runs in a process of its own (`torch_side`), so that neither library sees the
other's threads and memory, and it starts no code that came with the source.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import mlx.core as mx
import numpy as np

from mlx_grpo.backend.device import device_name, physical_memory
from mlx_grpo.backend.precision import Precision
from mlx_grpo.convert.cost import (
    PromptAndAnswer,
    head_logps,
    reward_rows,
    reward_scores,
    streamed,
    without_blocks,
)
from mlx_grpo.convert.reader import OpenedSource
from mlx_grpo.convert.tensors import written_by_mlx
from mlx_grpo.core.errors import InputError, one_line
from mlx_grpo.core.types import Parameters
from mlx_grpo.models.decoder import shift_right
from mlx_grpo.models.reward_model import TextForm, head_parts, head_scores

LIMIT = 1e-3
"""KL in nats per token, and share of the scores' spread; rounding stays far below."""
FP32_SHARE = 0.4
STORED_SHARE = 0.7
"""Of this machine's memory, for the source in fp32 and as it is stored."""
START = (
    "import json, runpy, sys; sys.path[:] = json.loads(sys.argv[2]); "
    "runpy.run_path(sys.argv[1], run_name='__main__')"
)


@dataclass(frozen=True)
class Agreement:
    """The source in PyTorch against the source in MLX."""

    kl: float | None = None
    """KL(PyTorch || MLX), nats per token."""
    same_token: float = 0.0
    """Share of positions at which both find the same token likeliest."""
    score_gap: float | None = None
    """Largest difference of a reward model's scores, as a share of their spread."""
    texts: int = 0
    skipped: str = ""
    """Why nothing was compared."""

    def describe(self) -> str:
        """For the table."""
        if self.kl is not None:
            kl = "below 1e-06" if self.kl < 1e-6 else f"{self.kl:.1e}"
            return f"KL {kl} nats/token, next token {self.same_token:.1%} equal"
        if self.score_gap is not None:
            return f"scores within {self.score_gap:.1e} of their spread"
        return f"not compared: {self.skipped}" if self.skipped else "not compared"

    @property
    def compared(self) -> bool:
        """Whether there is something to report."""
        return self.kl is not None or self.score_gap is not None

    def differs(self) -> bool:
        """Whether MLX computes another model."""
        found = [value for value in (self.kl, self.score_gap) if value is not None]
        return not all(value <= LIMIT for value in found)  # NaN is a difference as well


class NotRunError(Exception):
    """The PyTorch side ended before its last array."""


def check_agreement(agreement: Agreement, place: Path, allow_mismatch: bool) -> None:
    """Raise InputError where MLX computes another model than PyTorch, unless that is allowed."""
    if agreement.differs() and not allow_mismatch:
        raise InputError(
            f"{place}: mlx-lm computes another model than transformers {version('transformers')}, "
            f"before any quantization ({agreement.describe()}); --allow-mismatch converts it "
            "anyway"
        )


def why_not(opened: OpenedSource) -> str:
    """Why a source cannot be compared, or nothing."""
    if opened.base.kind != "model":
        return "transformers does not read GGUF here"
    if opened.quantized:
        return "quantized already"
    if written_by_mlx(opened.base.path):
        return "the source is an MLX model"
    needed = ["torch"] + ["peft"] * (opened.source.kind == "peft")
    absent = [package for package in needed if find_spec(package) is None]
    if absent:
        return f"{absent[0]} is not installed (pip install 'mlx-grpo[verify]')"
    return "" if _dtype(opened) else "the source does not fit into this machine's memory twice"


def compare_policy(opened: OpenedSource, rows: Sequence[PromptAndAnswer]) -> Agreement:
    """KL per token and agreement of the next token, on answers."""
    if reason := why_not(opened):
        return Agreement(skipped=reason)
    # an mlx-lm adapter is nothing that transformers reads: its base is compared
    whole = partial(opened.model, exact=True)
    open_model = opened.backbone if opened.source.kind == "mlx-lora" else whole
    kl = same = 0.0
    try:
        with _running(opened, "policy", rows) as answers:
            hidden = [shift_right(*h)[0] for h in streamed(open_model, rows, _fp32())]
            decoder = without_blocks(open_model(), _fp32())
            for h_TD, z_TV in zip(hidden, answers, strict=False):
                found_TV = mx.concatenate(list(head_logps(decoder, h_TD)))
                width = min(z_TV.shape[-1], found_TV.shape[-1])  # one may be padded
                logp_TV = _log_softmax(mx.array(z_TV[:, :width]))
                found_TV = _log_softmax(found_TV[:, :width])
                kl += (mx.exp(logp_TV) * (logp_TV - found_TV)).sum().item()
                same += (logp_TV.argmax(-1) == found_TV.argmax(-1)).sum().item()
    except NotRunError as e:
        return Agreement(skipped=str(e))
    count = sum(len(answer) for _, answer in rows)
    kl = float(np.maximum(kl / count, 0.0))  # NaN stays NaN
    return Agreement(kl=kl, same_token=same / count, texts=len(rows))


def compare_scores(opened: OpenedSource, tokenizer: Any, form: TextForm, pairs: Path) -> Agreement:
    """Scores of a reward model on both sides of preference pairs.

    A classifier of transformers gets the texts whole, so that the token it reads is compared too.
    """
    reason = why_not(opened)
    if opened.loras is not None and not opened.classifier:
        reason = reason or "the adapter is not one that transformers scores with"
    if reason:
        return Agreement(skipped=reason)
    kind = "classifier" if opened.classifier else "backbone"
    whole = replace(form, padding=None) if opened.classifier else form
    rows, own = (reward_rows(tokenizer, f, pairs) for f in (whole, form))
    try:
        with _running(opened, kind, rows, form.padding) as answers:
            found = reward_scores(partial(opened.model, exact=True), own, opened.head, _fp32())
            scores = [
                _score(value, kind, opened.head) for _, value in zip(rows, answers, strict=False)
            ]
    except NotRunError as e:
        return Agreement(skipped=str(e))
    gap = float(np.abs(np.subtract(scores, found)).max())
    return Agreement(score_gap=gap / (float(np.std(scores)) or 1.0), texts=len(rows))


def _score(value: np.ndarray, kind: str, head: Parameters) -> float:
    if kind == "classifier":
        return float(value[0])
    return float(head_scores(mx.array(value)[None], *head_parts(head))[0].item())


def _fp32() -> Precision:
    return Precision(device_name(), dense=True, dtype=mx.float32)


def _log_softmax(z_TV: mx.array) -> mx.array:
    return z_TV - mx.logsumexp(z_TV, axis=-1, keepdims=True)


def _dtype(opened: OpenedSource) -> str:
    """How PyTorch holds the source: `float32`, `stored`, or nothing where neither fits."""
    arrays = opened.tensors().arrays.values()
    if 4 * sum(v.size for v in arrays) < FP32_SHARE * physical_memory():
        return "float32"
    return "stored" if sum(v.nbytes for v in arrays) < STORED_SHARE * physical_memory() else ""


@contextmanager
def _running(
    opened: OpenedSource, kind: str, rows: Sequence[PromptAndAnswer], padding: int | None = None
) -> Iterator[Iterator[np.ndarray]]:
    """The arrays that the PyTorch side answers, as they come."""
    request = {
        "model": str(opened.base.path.resolve()),
        "adapter": str(opened.source.path.resolve()) if opened.source.kind == "peft" else None,
        "kind": kind,
        "rows": [[list(prompt), list(answer)] for prompt, answer in rows],
        "dtype": _dtype(opened),
        "padding": padding,
    }
    place = Path(__file__).with_name("torch_side.py")
    command = [sys.executable, "-I", "-c", START, str(place), json.dumps(sys.path)]
    with tempfile.TemporaryFile() as complaints, tempfile.TemporaryFile() as asked:
        asked.write(json.dumps(request).encode())
        asked.seek(0)
        process = subprocess.Popen(
            command, stdin=asked, stdout=subprocess.PIPE, stderr=complaints, env=_environment()
        )
        try:
            yield _arrays(process, complaints)
        finally:
            process.kill()
            process.wait()


def _environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}


def _arrays(process: "subprocess.Popen[bytes]", complaints: IO[bytes]) -> Iterator[np.ndarray]:
    """Raise NotRunError where the other side ends before its last array."""
    answers: Any = process.stdout
    while line := answers.readline():
        shape = json.loads(line)
        data = answers.read(4 * int(np.prod(shape)))
        if len(data) == 4 * int(np.prod(shape)):
            yield np.frombuffer(data, np.float32).reshape(shape)
    process.wait()
    complaints.seek(0)
    last = (complaints.read().decode(errors="replace").strip().splitlines() or ["it was killed"])[
        -1
    ]
    raise NotRunError(f"transformers cannot run it here ({one_line(last)[:150]})")
