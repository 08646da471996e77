"""`mlx-grpo export`."""

from pathlib import Path
from typing import Annotated

import typer

from mlx_grpo.cli.options import Quiet, check_needs
from mlx_grpo.console.output import Console
from mlx_grpo.core.errors import InputError


def export(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    fuse: Annotated[
        bool, typer.Option("--fuse", help="A model of its own, quantized as the SFT model is.")
    ] = False,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="With --fuse: in 16 bits, rounded once.")
    ] = False,
    peft: Annotated[bool, typer.Option("--peft", help="An adapter for Hugging Face PEFT.")] = False,
    adapter: Annotated[str, typer.Option(help="best or final (default: best if there).")] = "",
    output: Annotated[
        Path | None, typer.Option(help="Directory to write (default: RUN/export/FORM).")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="Hub id or directory of the transformers model the adapter belongs to (default: "
            "what the SFT model's card says)."
        ),
    ] = None,
    texts: Annotated[
        Path | None,
        typer.Option(
            help="Prompts with a `response`, on which a fused model is measured (default: the "
            "run's held-out prompts)."
        ),
    ] = None,
    verify: Annotated[bool, typer.Option(help="Measure what fusing changed.")] = True,
    push: Annotated[
        str | None, typer.Option(help="Upload to this Hub repository, as in owner/name.")
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="With --push: create it as private.")
    ] = False,
    report: Annotated[bool, typer.Option(help="Put the run's report.html beside it.")] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing directory.")] = False,
    quiet: Quiet = False,
) -> None:
    """Write a run's adapter for others: mlx-lm (as it is, or fused), PEFT, the Hub."""
    from mlx_grpo.export.export import Export, Form, export_run
    from mlx_grpo.export.push import check_push
    from mlx_grpo.export.push import push as upload

    if fuse and peft:
        raise InputError("--fuse and --peft write different things; give one of them")
    check_needs("--fuse", fuse, dequantize=dequantize, texts=texts)
    check_needs("--push", push, private=private)
    form: Form = "dequantized" if dequantize else "fused" if fuse else "peft" if peft else "adapter"
    if push:
        check_push(push)
    ui = Console(quiet)
    with ui.working("exporting"):
        wanted = Export(run, form, adapter, output, base, texts, verify, report, force)
        done = export_run(wanted)
    ui.say(f"{done.adapter} -> {done.directory}")
    if done.cost:
        ui.say(f"what fusing cost: {done.cost.describe()}")
        if advice := done.cost.advice():
            ui.warn(advice)
    if done.note:
        ui.warn(done.note)
    if peft and not done.base:
        ui.warn("the card of the SFT model does not say what it was made of; name it with --base")
    if push:
        with ui.working("uploading"):
            ui.say(f"uploaded to {upload(done.directory, push, private)}")
    ui.say(f"use it with: {done.use}")
