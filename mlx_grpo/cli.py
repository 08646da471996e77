"""The command line: flags to configuration, errors to one line, nothing else."""

import inspect
import sys
import typing
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from mlx_grpo import __version__
from mlx_grpo.config import RewardTrainConfig, TrainConfig, flag_of
from mlx_grpo.config_sources import build_config, field_help, field_types, typed_flags
from mlx_grpo.console import Console
from mlx_grpo.errors import InputError

app = typer.Typer(
    help="GRPO for language models on Apple silicon.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

UsageError: Any = typer.BadParameter.__mro__[
    1
]  # typer carries its own copy of click, which it does not export

Quiet = Annotated[bool, typer.Option("--quiet", help="Warnings and errors only.")]


def main() -> int:
    """Entry point: 0 when done, 2 for bad input, 130 when interrupted."""
    command = typer.main.get_command(app)
    try:
        code = command.main(standalone_mode=False)
    except InputError as e:
        Console().error(" ".join(str(e).split()))
        return 2
    except OSError as e:
        place = f"{e.filename}: " if e.filename else ""
        Console().error(f"{place}{e.strerror or e}")
        return 2
    except UsageError as e:
        if message := e.format_message():  # empty where a missing command has shown the help
            Console().error(f"{message} (see --help)")
        return 2
    except (KeyboardInterrupt, typer.Abort):
        Console().error("interrupted")
        return 130
    if code == 130:  # what typer makes of Ctrl-C, without a word
        Console().error("interrupted")
    return code if isinstance(code, int) else 0


def with_flags(
    cls: type, repeated: tuple[str, ...] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one option per field of a configuration class.

    The function receives those that were given, as `flags`.

    Args:
        repeated: fields whose option may be given several times.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        kinds = typing.get_type_hints(command, include_extras=True)
        own = [
            p.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=kinds[p.name])
            for p in list(inspect.signature(command).parameters.values())[1:]
        ]
        options = [
            _option(cls, field.name, field.default, field.name in repeated) for field in fields(cls)
        ]
        names = [option.name for option in options]

        def wrapper(**arguments: Any) -> None:
            given = {n: arguments.pop(n) for n in names}
            command({n: v for n, v in given.items() if v not in (None, [])}, **arguments)

        wrapper.__doc__ = command.__doc__
        wrapper.__name__ = command.__name__
        wrapper.__signature__ = inspect.Signature([*options, *own])  # type: ignore[attr-defined]
        wrapper.__annotations__ = {p.name: p.annotation for p in (*options, *own)}
        return wrapper

    return decorate


def _option(cls: type, name: str, default: Any, repeated: bool) -> inspect.Parameter:
    kind = field_types(cls)[name]
    text = field_help(cls)[name]
    if typing.get_origin(kind) is typing.Literal:
        text += f" One of: {', '.join(typing.get_args(kind))}."
    shown = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
    text += f" (default: {shown})" if shown else ""
    plain = (
        list[str] if repeated else str
    )  # read as text, so that one place checks types for flags and files
    metavar = {int: "INT", float: "NUMBER", str: "TEXT"}.get(
        kind, "CHOICE" if "One of" in text else "LIST"
    )
    option = typer.Option(flag_of(name), help=text, show_default=False, metavar=metavar)
    annotation = Annotated[plain | None, option]  # type: ignore[valid-type]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )


def _version(show: bool) -> None:
    if show:
        Console().say(f"mlx-grpo {__version__}")
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """GRPO for language models on Apple silicon: one process, one copy of the weights."""


@app.command()
def demo(
    work: Annotated[Path, typer.Option(help="Directory for weights/ and runs/.")] = Path("."),
    iterations: Annotated[int, typer.Option(help="Training iterations.", min=1)] = 10,
    seed: Annotated[int, typer.Option(help="Seed.", min=0)] = 42,
    quiet: Quiet = False,
) -> None:
    """The whole story on an embedded model: convert, train, show what changed."""
    from mlx_grpo.demo import demo as run

    run(work, iterations, seed, Console(quiet))


@app.command()
def convert(
    sft: Annotated[
        str | None, typer.Option(help="SFT model: directory, .gguf file, or Hub id.")
    ] = None,
    rm: Annotated[
        str | None, typer.Option(help="Reward model: directory or Hub id, full or an adapter.")
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Directory that gets sft-4bit/ and rm-4bit/ (or -8bit, -16bit).")
    ] = Path("weights"),
    revision: Annotated[str | None, typer.Option(help="Hub revision of --sft.")] = None,
    rm_revision: Annotated[str | None, typer.Option(help="Hub revision of --rm.")] = None,
    sft_base: Annotated[
        str | None,
        typer.Option(help="Model that an SFT adapter belongs to (default: what it says itself)."),
    ] = None,
    rm_base: Annotated[
        str | None,
        typer.Option(help="Model that a reward adapter belongs to (default: what it says itself)."),
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
        Path, typer.Option(help="Prompts with a `response`, on which the SFT model is measured.")
    ] = Path("data/eval_prompts.jsonl"),
    pairs: Annotated[
        Path, typer.Option(help="Preference pairs, on which the reward model is measured.")
    ] = Path("data/preference_pairs.jsonl"),
    verify: Annotated[bool, typer.Option(help="Measure what quantization cost.")] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace existing directories.")] = False,
    quiet: Quiet = False,
) -> None:
    """Convert an SFT model and a reward model to MLX, 4-bit by default."""
    from mlx_grpo.convert import (
        Quantization,
        check_pairs,
        check_sources,
        check_texts,
        convert_rm,
        convert_sft,
        locate,
    )

    if bits not in (4, 8, 16):
        raise InputError(f"--bits: must be 4, 8 or 16, not {bits}")
    if group_size not in (32, 64, 128):
        raise InputError(f"--group-size: must be 32, 64 or 128, not {group_size}")
    if rm_as not in ("auto", "full", "adapter"):
        raise InputError(f"--rm-as: must be auto, full or adapter, not '{rm_as}'")
    if not sft and not rm:
        raise InputError("nothing to convert; give --sft, --rm or both")
    wanted = ((sft, "--texts", texts, check_texts), (rm, "--pairs", pairs, check_pairs))
    for source, flag, file, check_file in wanted:
        if verify and source:
            if not file.is_file():
                raise InputError(
                    f"{file}: no such file; give {flag} FILE, or --no-verify to measure nothing"
                )
            check_file(file)
    ui, target = Console(quiet), Quantization(bits, group_size)
    sft_out, rm_out = out / f"sft-{bits}bit", out / f"rm-{bits}bit"
    sft_source = locate(sft, revision) if sft else None
    rm_source = locate(rm, rm_revision) if rm else None
    outs = [out for given, out in ((sft, sft_out), (rm, rm_out)) if given and not force]
    check_sources(sft_source, rm_source, (sft_base, rm_base), outs)
    rows = []
    if sft_source:
        with ui.working("converting the SFT model"):
            measured = texts if verify else None
            rows.append(convert_sft(sft_source, sft_out, target, measured, sft_base, force))
    if rm_source:
        with ui.working("converting the reward model"):
            measured = pairs if verify else None
            form: Any = rm_as
            rows.append(
                convert_rm(rm_source, rm_out, sft_out, target, measured, form, rm_base, force)
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
        if advice := row.cost.advice():
            ui.warn(f"{row.path}: {advice}")
        if row.form == "model" and row.cost.kept and row.bits_per_weight > bits + 1:
            ui.warn(f"{row.path}: the source is quantized already and was kept as it is")


@app.command()
@with_flags(TrainConfig, repeated=("seed", "reward"))
def train(
    flags: dict[str, Any],
    config: Annotated[
        Path | None, typer.Option(help="TOML file with any of the fields below.")
    ] = None,
    set: Annotated[list[str] | None, typer.Option("--set", help="Any field as key=value.")] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue the run in --output with its own settings, bit for bit. Free to change: "
            "output, keep, checkpoint_every, max_skipped_steps, reward_timeout; decode_rows and "
            "rows_per_pass move the last bits; inputs may move to another path.",
        ),
    ] = False,
    allow_config_change: Annotated[
        bool,
        typer.Option(
            "--allow-config-change",
            help="Resume although other settings, or the contents of inputs, have changed.",
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="One iteration; nothing is kept.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Train a LoRA on the SFT model with GRPO.

    --seed may be given several times: the runs follow one another.
    """
    from mlx_grpo.run_directory import CONFIG, is_run
    from mlx_grpo.trainer import train as run

    seeds = flags.pop("seed", [])
    configs = [build_config(config, set or (), {**flags, "seed": s}) for s in seeds]
    if not configs:
        configs = [build_config(config, set or (), flags)]
    if len(configs) > 1:
        configs = [replace(c, output=c.output and f"{c.output}/seed-{c.seed}") for c in configs]
    for c in configs:
        started = is_run(c.run_directory)
        if resume and started and config is None:
            # the run knows its own settings; flags that contradict them are refused later
            given = {**flags, "output": c.output, **({"seed": c.seed} if seeds else {})}
            c = build_config(c.run_directory / CONFIG, set or (), given)
        # of several seeds, those not started yet start now
        goes_on = resume and (started or len(configs) == 1)
        finished = run(c, Console(quiet), goes_on, dry_run, allow_config_change)
        if not finished:
            break


@app.command("train-rm")
@with_flags(RewardTrainConfig)
def train_reward_model(flags: dict[str, Any], quiet: Quiet = False) -> None:
    """Train a reward model on preference pairs: LoRA and scalar head, Bradley-Terry loss."""
    from mlx_grpo.train_rm import train_rm

    ui = Console(quiet)
    config = RewardTrainConfig(**typed_flags(RewardTrainConfig, flags))
    with ui.working("training the reward model"):
        quality = train_rm(config, ui.say)
    ui.table(
        f"Held-out pairs ({quality.pairs})",
        ("accuracy", "calibration error", "loss", "shorter answer wins"),
        [
            (
                f"{quality.accuracy:.1%}",
                f"{quality.calibration_error:.3f}",
                f"{quality.loss:.3f}",
                f"{quality.shorter_wins:.1%}",
            )
        ],
    )
    ui.say(
        f"written to {config.output}; use it with 'mlx-grpo convert --rm {config.output}' or "
        "'mlx-grpo train --rm-model'"
    )


@app.command("eval")
def evaluate(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    prompts: Annotated[
        Path | None, typer.Option(help="Held-out prompts instead of the run's own.")
    ] = None,
    adapter: Annotated[str, typer.Option(help="best or final (default: best if there).")] = "",
    rubric: Annotated[
        bool, typer.Option("--rubric", help="Also judge by the rubric of the demo.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Compare a run with the SFT model on held-out prompts: reward, KL, perplexity, wins."""
    from mlx_grpo.compare import compare_run, show_comparison

    ui = Console(quiet)
    show_comparison(ui, compare_run(run, prompts, adapter, ui), rubric)


if __name__ == "__main__":
    sys.exit(main())
