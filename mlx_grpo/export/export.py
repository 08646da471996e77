"""A finished run in the form somebody else wants: mlx-lm adapter, fused model, PEFT adapter.

Each is a directory that is complete or absent, with a model card that holds the run's figures.
"""

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mlx_grpo.config.settings import TrainConfig
from mlx_grpo.convert.cost import check_texts
from mlx_grpo.convert.source import declared_base
from mlx_grpo.core.errors import InputError
from mlx_grpo.data.tables import data_files
from mlx_grpo.export.card import Subject, export_card, usage
from mlx_grpo.export.formats import write_adapter, write_fused, write_peft
from mlx_grpo.export.fused_cost import FusedCost, fused_cost
from mlx_grpo.export.names import check_peft, note_on_transformers
from mlx_grpo.files.atomic import atomic_directory, write_text
from mlx_grpo.files.manifest import check_replaceable, verify_manifest, write_manifest
from mlx_grpo.run.directory import REPORT, chosen_adapter, is_run, other_model, run_settings

Form = Literal["adapter", "fused", "dequantized", "peft"]


@dataclass(frozen=True)
class Export:
    """What to write, and where."""

    run: Path
    form: Form
    adapter: str = ""
    """`best`, `final`, or "" for best if there."""
    output: Path | None = None
    """None for RUN/export/FORM."""
    base: str | None = None
    """Hub id or path of the transformers model that a PEFT adapter belongs to; None for what the
    SFT model's card says."""
    texts: Path | None = None
    """Prompts with `response` to measure on; None for the run's held-out prompts."""
    verify: bool = True
    report: bool = True
    """Put the run's report beside the model, if there is one."""
    replace: bool = False


@dataclass(frozen=True)
class Exported:
    """What was written."""

    directory: Path
    adapter: Path
    use: str
    """A command that uses it."""
    base: str | None
    cost: FusedCost | None
    note: str
    """What to know before using it; may be empty."""


def export_run(export: Export) -> Exported:
    """Write a run's adapter in another form.

    Raises:
        InputError: no finished run, its SFT model is gone or another one now, PEFT would not find
            its layers, or the directory exists and `replace` is false.
    """
    config = run_settings(export.run)
    adapter, sft = chosen_adapter(export.run, export.adapter), Path(config.model.actor)
    if not (sft / "config.json").is_file():
        raise InputError(f"{sft}: the run's SFT model is not here; run from where it was trained")
    verify_manifest(adapter)
    verify_manifest(sft)
    if changed := other_model(export.run, sft):
        raise InputError(changed)
    if export.form == "peft":
        check_peft(sft)
    note = note_on_transformers(sft) if export.form == "dequantized" else ""
    measured = _texts(export, config)
    base = export.base or declared_base(sft)
    out = export.output or export.run / "export" / export.form
    if out.exists() and not export.replace:
        raise InputError(f"{out}: already exists; replace it with --force, or choose --output")
    _check_replaced(out, sft)
    with atomic_directory(out, replace=export.replace) as directory:
        _write(export.form, directory, adapter, sft, base)
        own = {} if export.texts else config.columns
        cost = fused_cost(sft, adapter, directory, measured, own) if measured else None
        report = export.report and (export.run / REPORT).is_file()
        if report:
            shutil.copyfile(export.run / REPORT, directory / REPORT)
        write_manifest(directory)  # before the card, which people edit
        subject = Subject(export.run, adapter, sft, base, export.form, out.name, report)
        write_text(directory / "README.md", export_card(subject, config, cost, note))
    use = usage(export.form, out, sft, base or "BASE")
    return Exported(out, adapter, use, base, cost, note)


def _check_replaced(out: Path, sft: Path) -> None:
    """Raise InputError where --force would delete the SFT model, or a part of a run."""
    place = Path(os.path.realpath(out))
    runs = [p for p in place.parents if is_run(p) and place.relative_to(p).parts[0] != "export"]
    if place.exists() and (runs or place == Path(os.path.realpath(sft))):
        what = f"part of the run {runs[0]}" if runs else "the SFT model of the run"
        raise InputError(f"{out}: {what}, which --force does not replace; choose --output")
    check_replaceable(out)


def _texts(export: Export, config: TrainConfig) -> Path | None:
    """What to measure a fused model on, found good before the long work."""
    if not export.verify or export.form not in ("fused", "dequantized"):
        return None
    texts = export.texts or Path(config.evaluation.prompts)
    try:
        data_files(texts)
    except InputError as e:
        raise InputError(f"{e}; give --texts FILE, or --no-verify") from None
    check_texts(texts, {} if export.texts else config.columns)
    return texts


def _write(form: Form, directory: Path, adapter: Path, sft: Path, base: str | None) -> None:
    if form == "adapter":
        write_adapter(directory, adapter, base)
    elif form == "peft":
        write_peft(directory, adapter, sft, base)
    else:
        with tempfile.TemporaryDirectory(prefix="mlx-grpo-") as scratch:
            write_fused(directory, adapter, sft, form == "dequantized", Path(scratch))
