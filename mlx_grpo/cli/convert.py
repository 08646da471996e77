"""`mlx-grpo convert`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from mlx_grpo.cli.options import Quiet, check_needs
from mlx_grpo.console.output import Console
from mlx_grpo.core.errors import InputError
from mlx_grpo.files.assets import asset
from mlx_grpo.files.manifest import check_replaceable


def convert(
    sft: Annotated[
        str | None, typer.Option(help="SFT model: directory, .gguf file, or Hub id.")
    ] = None,
    rm: Annotated[
        str | None, typer.Option(help="Reward model: directory or Hub id, full or an adapter.")
    ] = None,
    output: Annotated[
        Path, typer.Option(help="Directory that gets sft-4bit/ and rm-4bit/ (or -8bit, -16bit).")
    ] = Path("weights"),
    revision: Annotated[str | None, typer.Option(help="Hub revision of --sft.")] = None,
    rm_revision: Annotated[str | None, typer.Option(help="Hub revision of --rm.")] = None,
    sft_base: Annotated[
        str | None,
        typer.Option(
            help="Model that an SFT adapter belongs to (default: the one named in its config)."
        ),
    ] = None,
    rm_base: Annotated[
        str | None,
        typer.Option(
            help="Model that a reward adapter belongs to (default: the one named in its config)."
        ),
    ] = None,
    bits: Annotated[int, typer.Option(help="Bits per weight: 4, 8 or 16.")] = 4,
    group_size: Annotated[int, typer.Option(help="Weights per scale: 32, 64 or 128.")] = 64,
    rm_as: Annotated[
        str,
        typer.Option(
            help="How to write the reward model: adapter (shares the SFT model's weights), full, "
            "or auto (adapter where the two backbones are equal)."
        ),
    ] = "auto",
    texts: Annotated[
        Path | None,
        typer.Option(
            help="Prompts with a `response`, on which the SFT model is measured (default: the "
            "held-out prompts that ship with mlx-grpo)."
        ),
    ] = None,
    pairs: Annotated[
        Path | None,
        typer.Option(
            help="Preference pairs, on which the reward model is measured (default: those that "
            "ship with mlx-grpo)."
        ),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option(
            help="Compare with the source in PyTorch, where that is installed, and measure what "
            "quantization cost."
        ),
    ] = True,
    allow_mismatch: Annotated[
        bool,
        typer.Option(
            "--allow-mismatch", help="Convert even a model that mlx-lm computes differently."
        ),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace existing directories.")] = False,
    quiet: Quiet = False,
) -> None:
    """Convert an SFT model and a reward model to MLX, 4-bit by default."""
    from mlx_grpo.convert.convert import Checks, check_sources, convert_rm, convert_sft
    from mlx_grpo.convert.cost import check_pairs, check_texts
    from mlx_grpo.convert.quantize import Quantization
    from mlx_grpo.convert.source import locate

    if bits not in (4, 8, 16):
        raise InputError(f"--bits: must be 4, 8 or 16, not {bits}")
    if group_size not in (32, 64, 128):
        raise InputError(f"--group-size: must be 32, 64 or 128, not {group_size}")
    if rm_as not in ("auto", "full", "adapter"):
        raise InputError(f"--rm-as: must be auto, full or adapter, not '{rm_as}'")
    if not sft and not rm:
        raise InputError("nothing to convert; give --sft, --rm or both")
    check_needs("--sft", sft, revision=revision, sft_base=sft_base, texts=texts)
    check_needs(
        "--rm", rm, rm_revision=rm_revision, rm_base=rm_base, pairs=pairs, rm_as=rm_as != "auto"
    )
    check_needs("--verify", verify, texts=texts, pairs=pairs)
    texts = texts or asset("data/eval_prompts.jsonl")
    pairs = pairs or asset("data/preference_pairs.jsonl")
    wanted = ((sft, "--texts", texts, check_texts), (rm, "--pairs", pairs, check_pairs))
    for source, flag, file, check_file in wanted:
        if verify and source:
            if not file.is_file():
                raise InputError(
                    f"{file}: no such file; give {flag} FILE, or --no-verify to measure nothing"
                )
            check_file(file)
    ui, target = Console(quiet), Quantization(bits, group_size)
    sft_out, rm_out = output / f"sft-{bits}bit", output / f"rm-{bits}bit"
    sft_source = locate(sft, revision) if sft else None
    rm_source = locate(rm, rm_revision) if rm else None
    outs = [out for given, out in ((sft, sft_out), (rm, rm_out)) if given]
    if force:
        for out in outs:
            check_replaceable(out)
        outs = []
    checks = Checks(against_source=verify, allow_mismatch=allow_mismatch)
    check_sources(sft_source, rm_source, (sft_base, rm_base), outs, checks)
    rows = []
    if sft_source:
        with ui.working("converting the SFT model"):
            measured = texts if verify else None
            rows.append(convert_sft(sft_source, sft_out, target, measured, sft_base, force, checks))
    if rm_source:
        with ui.working("converting the reward model"):
            measured = pairs if verify else None
            form: Any = rm_as
            rows.append(
                convert_rm(
                    rm_source, rm_out, sft_out, target, measured, form, rm_base, force, checks
                )
            )
    ui.table(
        "Converted",
        ("directory", "form", "parameters", "bits/weight", "size", "what it cost"),
        [
            (
                str(r.path),
                r.form,
                f"{r.parameters / 1e6:.2f} M",
                f"{r.bits_per_weight:.2f}",
                f"{r.bytes / 1e6:.2f} MB",
                r.cost.describe(),
            )
            for r in rows
        ],
    )
    for row in rows:
        if verify:
            ui.say(f"{row.path}: the source in PyTorch against MLX: {row.agreement.describe()}")
        for note in row.notes:
            ui.warn(f"{row.path}: {note}")
        if advice := row.cost.advice():
            ui.warn(f"{row.path}: {advice}")
        if row.form == "model" and row.cost.kept and row.bits_per_weight > bits + 1:
            ui.warn(f"{row.path}: the source is quantized already and was kept as it is")
