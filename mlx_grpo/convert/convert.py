"""Source checkpoints to verified MLX directories; a directory is complete or absent.

`convert_sft` and `convert_rm` each write one directory and return the row of the table that says
what it cost. The way of the data: `source` finds
out what is there, `reader` opens it lazily, `guard` and `original` ask whether mlx-lm computes the
same model, `quantize` streams it into its final form, `cost` measures what that changed, `output`
writes it down.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import replace as replace_fields
from pathlib import Path
from typing import Any, Literal

from mlx_grpo.convert.card import USE_RM, USE_SFT
from mlx_grpo.convert.cost import (
    QuantizationCost,
    check_pairs,
    check_texts,
    policy_cost,
    policy_rows,
    reward_cost,
)
from mlx_grpo.convert.guard import check_source
from mlx_grpo.convert.original import Agreement, check_agreement, compare_policy, compare_scores
from mlx_grpo.convert.output import (
    Converted,
    finish,
    keeps_values,
    lazily,
    write_about,
    write_adapter,
    write_model,
    writing,
)
from mlx_grpo.convert.quantize import (
    Quantization,
    first_difference,
    stream,
)
from mlx_grpo.convert.reader import OpenedSource, open_source
from mlx_grpo.convert.source import Source, locate
from mlx_grpo.core.errors import InputError
from mlx_grpo.data.chat import load_chat_tokenizer
from mlx_grpo.files.atomic import read_json, write_json
from mlx_grpo.files.manifest import verify_manifest
from mlx_grpo.files.safetensors import save_arrays
from mlx_grpo.models.directory import fingerprint
from mlx_grpo.models.reward_model import (
    LEARNING_CURVE,
    REWARD_CONFIG,
    REWARD_HEAD,
    TextForm,
    check_fingerprint,
)

__all__ = [
    "Converted",
    "Quantization",
    "RewardForm",
    "check_pairs",
    "check_sources",
    "check_texts",
    "convert_rm",
    "convert_sft",
    "locate",
]

RewardForm = Literal["auto", "full", "adapter"]


@dataclass(frozen=True)
class Checks:
    """What is looked at beside the files themselves."""

    against_source: bool = False
    """Run the source in PyTorch too, where that is installed, and compare."""
    allow_mismatch: bool = False
    """Write the model although mlx-lm computes another one."""


FILES_ALONE = Checks()


def convert_sft(
    source: Source,
    out: Path,
    target: Quantization,
    texts: Path | None,
    base: str | None = None,
    replace: bool = False,
    checks: Checks = FILES_ALONE,
) -> Converted:
    """Convert a causal language model to `out`, a directory `mlx_lm.load` reads.

    Args:
        texts: prompts with `response`, on which the cost of quantization is measured; None to skip.
        base: the model an adapter belongs to, where it does not say so itself.

    Raises:
        InputError: the source is unreadable, of another kind, another model under mlx-lm, or `out`
            exists and `replace` is false.
    """
    with _opened(source, base) as opened, writing(out, replace, source) as directory:
        _check_role(opened, wants_head=False)
        findings = check_source(opened, checks.allow_mismatch)
        limit = None if checks.allow_mismatch else findings.exact_up_to
        notes = write_about(opened, directory, target, limit)
        agreement, kept = Agreement(), keeps_values(opened, target)
        rows = []
        if texts and (checks.against_source or not kept):
            rows = policy_rows(load_chat_tokenizer(directory), texts)
        if texts and checks.against_source:
            agreement = compare_policy(opened, rows)
            check_agreement(agreement, source.path, checks.allow_mismatch)
        write_model(opened, directory)
        cost = QuantizationCost(kept=kept)
        if texts and not kept:
            cost = policy_cost(opened.model, lazily(directory), rows)
        row = finish(opened, directory, out, "model", cost, USE_SFT, agreement)
        return replace_fields(row, notes=(*notes, *findings.notes(agreement.compared)))


def convert_rm(
    source: Source,
    out: Path,
    sft: Path,
    target: Quantization,
    pairs: Path | None,
    form: RewardForm = "auto",
    base: str | None = None,
    replace: bool = False,
    checks: Checks = FILES_ALONE,
) -> Converted:
    """Convert a reward model to `out`, a directory `load_reward_model` reads.

    A reward model whose backbone, once converted, is the model in `sft` is written as an adapter
    that shares it; any other as a model of its own.

    Args:
        sft: the converted SFT model; need not exist.
        pairs: preference pairs on which the cost of quantization is measured; None to skip.
        form: `adapter` and `full` insist on one of the two.

    Raises:
        InputError: the source is unreadable, has another number of labels than one, does not fit
            the SFT model where it must, or `out` exists.
    """
    own = read_json(source.path / REWARD_CONFIG) if (source.path / REWARD_CONFIG).is_file() else {}
    if own.get("kind") == "adapter":
        check_fingerprint(source.path / REWARD_CONFIG, own, sft)
        base = str(sft)
    with _opened(source, base) as opened, writing(out, replace, source) as directory:
        _check_role(opened, wants_head=True)
        findings = check_source(opened, checks.allow_mismatch)
        limit = None if checks.allow_mismatch else findings.exact_up_to
        own_adapter = own.get("kind") == "adapter"
        as_adapter = form != "full" and (own_adapter or _shares(opened, sft, form == "adapter"))
        save_arrays(directory / REWARD_HEAD, opened.head)
        notes = () if as_adapter else write_about(opened, directory, target, limit)
        if as_adapter:
            opened.write_tokenizer(directory)
        about, agreement = _about(opened, own, directory), Agreement()
        tokenizer, text = load_chat_tokenizer(directory) if pairs else None, TextForm.of(about)
        if pairs and checks.against_source:
            agreement = compare_scores(opened, tokenizer, text, pairs)
            check_agreement(agreement, source.path, checks.allow_mismatch)
        if as_adapter:
            write_adapter(opened, directory, sft)
            about |= {"kind": "adapter", "backbone_fingerprint": fingerprint(sft)}
        else:
            write_model(opened, directory)
            about |= {"kind": "full"}
        write_json(directory / REWARD_CONFIG, about)
        if (source.path / LEARNING_CURVE).is_file():
            shutil.copyfile(source.path / LEARNING_CURVE, directory / LEARNING_CURVE)
        # an adapter made on these very weights, or weights that were not touched
        kept = own_adapter if as_adapter else keeps_values(opened, target)
        cost = QuantizationCost(kept=kept)
        if pairs and not kept:
            after = lazily(sft, directory) if as_adapter else lazily(directory)
            cost = reward_cost(opened.model, after, opened.head, tokenizer, text, pairs)
        kind = "adapter" if as_adapter else "model"
        row = finish(opened, directory, out, kind, cost, USE_RM, agreement)
        return replace_fields(row, notes=(*notes, *findings.notes(agreement.compared)))


def check_sources(
    sft: Source | None,
    rm: Source | None,
    bases: tuple[str | None, str | None],
    outs: list[Path],
    checks: Checks = FILES_ALONE,
) -> None:
    """Look at both sources, before the first is converted.

    Args:
        bases: of the SFT adapter and of the reward adapter, where they are named.
        outs: directories that must not be there yet.

    Raises:
        InputError: a source is unreadable or in the other's place, or a directory is there.
    """
    for out in outs:
        if out.exists():
            raise InputError(f"{out}: already exists; replace it with --force, or choose --output")
    if sft:
        with _opened(sft, bases[0]) as opened:
            _check_role(opened, wants_head=False)
            check_source(opened, checks.allow_mismatch)
    if rm and not (rm.path / REWARD_CONFIG).is_file():
        with _opened(rm, bases[1]) as opened:
            _check_role(opened, wants_head=True)
            check_source(opened, checks.allow_mismatch)


def _check_role(opened: OpenedSource, wants_head: bool) -> None:
    path = opened.source.path
    if opened.head and not wants_head:
        raise InputError(f"{path}: this is a reward model; give it as --rm")
    if wants_head and not opened.head:
        raise InputError(
            f"{path}: not a reward model; this is a language model without a reward head (a "
            "generative judge is one too). Give a *ForSequenceClassification with one label, a "
            f"model or LoRA adapter with {REWARD_HEAD}, or the output of 'mlx-grpo train-rm'"
        )


@contextmanager
def _opened(source: Source, base: str | None) -> Iterator[OpenedSource]:
    verify_manifest(source.path)  # of a directory that was written here
    with tempfile.TemporaryDirectory(prefix="mlx-grpo-") as scratch:
        yield open_source(source, base, Path(scratch))


def _about(opened: OpenedSource, own: dict[str, Any], directory: Path) -> dict[str, Any]:
    """What reward_model.json says beside the kind.

    Args:
        directory: holds the tokenizer of the reward model.
    """
    if own:
        return {n: v for n, v in own.items() if n not in ("kind", "backbone_fingerprint")}
    about: dict[str, Any] = {"input": "chat_template", "pooling": "last_token"}
    about["chat_template_arguments"] = {}  # other trainers give the template no arguments
    if token := opened.source.config.get("reward_token_id"):
        return {**about, "pooling": "reward_token", "reward_token_id": token}
    padding = _padding(opened, directory)
    if padding is None:
        return about
    pooling = {"pooling": "last_token_that_is_not_padding", "padding_token_id": padding}
    return about | pooling


def _padding(opened: OpenedSource, directory: Path) -> int | None:
    """The token that a classifier was trained not to look at.

    A model says it in its configuration. An adapter has none: its trainer gave the model the
    tokenizer's padding token, or where that has none the end-of-sequence token.
    """
    if opened.source.kind == "peft" and opened.own_tokenizer:
        tokenizer = load_chat_tokenizer(directory)
        padding = tokenizer.pad_token_id
        return tokenizer.eos_token_id if padding is None else padding
    found = opened.base.config.get("pad_token_id") if opened.base.config else None
    return found if opened.pools_at_padding and isinstance(found, int) else None


def _shares(opened: OpenedSource, sft: Path, insist: bool) -> bool:
    """Whether the reward model's backbone, converted as the SFT model was, is the SFT model."""
    if not (sft / "config.json").is_file():
        if insist:
            raise InputError(f"{sft}: no SFT model here; convert it first, or use --rm-as full")
        return False
    config = read_json(sft / "config.json")
    model = opened.backbone()
    different = first_difference(stream(model, config, opened), sft)
    if different and insist:
        raise InputError(
            f"{opened.source.path}: layer '{different.rpartition('.')[0]}' differs from that of "
            f"{sft}, so they cannot share a backbone; use --rm-as full"
        )
    return different is None
