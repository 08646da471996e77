"""A plan shown: memory, time and scaling tables, or the refusal of a run that cannot fit."""

from collections.abc import Sequence

from mlx_grpo.console.doing import duration
from mlx_grpo.console.output import Console
from mlx_grpo.core.errors import InputError
from mlx_grpo.plan.devices import Device
from mlx_grpo.plan.memory import Plan
from mlx_grpo.plan.planner import Planner, precision_of, way_out
from mlx_grpo.plan.scaling import Scaled, pays_up_to
from mlx_grpo.plan.timing import StageTime


def show_time(found: dict[str, StageTime], iterations: int, machine: Device, ui: Console) -> None:
    """The table of what an iteration and a run take, an estimate; of several ranks without their
    exchange."""
    rows: list[tuple[str, ...]] = [
        (stage, f"{t.flops / 1e12:.3g}", f"{t.at_least:.1f} s", f"{t.expected:.1f} s", t.bound)
        for stage, t in found.items()
    ]
    computed = f"{sum(t.flops for t in found.values()) / 1e12:.3g}"
    least, expected = (sum(getattr(t, n) for t in found.values()) for n in ("at_least", "expected"))
    rows.append(("an iteration", computed, f"{least:.1f} s", f"{expected:.1f} s", ""))
    whole = (duration(iterations * seconds) for seconds in (least, expected))
    rows.append((f"{iterations} iterations", "", *whole, ""))
    columns = ("", "TFLOP", "at least", "expected", "bound by")
    ui.table(f"Time on {machine.name}, an estimate", columns, rows)
    source = "measured just now" if machine.measured else "by its data sheet"
    reached = "at the shares of these that a Linux CPU reached"
    if machine.reached:
        reached = f"at {machine.reached:.0%} of these, as 4-bit products have reached on such GPUs"
    ui.say(
        f"at {machine.bandwidth / 1e9:.0f} GB/s and {machine.arithmetic / 1e12:.2g} TFLOP/s, "
        f"{source}; expected: {reached}; without evaluations"
    )


def show_savings(savings: Sequence[tuple[str, float]], ui: Console) -> None:
    """The table of what other settings would save. They learn from less in an iteration."""
    if savings:
        cells = [(flags, f"{left:.0%}") for flags, left in savings]
        ui.table("What would take less time", ("with", "of an iteration's time"), cells)


def show_scaling(scaled: Sequence[Scaled], link: str, ui: Console) -> None:
    """The table of what each number of ranks takes, and up to where more of them pay."""
    one = scaled[0].seconds
    rows = [
        (
            f"{s.ranks}",
            f"{s.prompts}",
            f"{s.traffic / 1e6:.1f} MB",
            f"{s.exchanging:.2f} s",
            f"{s.seconds:.1f} s",
            f"{one / s.seconds:.2f}x",
        )
        for s in scaled
    ]
    columns = ("ranks", "prompts each", "a rank sends", "exchange", "an iteration", "faster")
    ui.table(f"Ranks over {link}, on paper", columns, rows)
    up_to = pays_up_to(list(scaled))
    last = scaled[-1]
    more = "more save less than a tenth"
    if up_to == last.ranks:
        more = "more have no prompt" if last.prompts == 1 else "more were not looked at"
    ui.say(f"pays up to {up_to} {'rank' if up_to == 1 else 'ranks'}; {more}")


def check_fits(planner: Planner, plan: Plan, ui: Console) -> None:
    """Say what is planned; where it does not fit, show the table.

    Raises:
        InputError: it does not fit; with the cheapest way out.
    """
    if plan.fits:
        ui.say(summary(plan))
        held = precision_of(planner.config, plan)
        if planner.here and held.slow:
            ui.warn(f"{held} weights: MLX's 4-bit and 16-bit kernels are very slow on a CPU")
        return
    show(planner, plan, ui)
    raise InputError(
        f"{planner.config.model.actor}: needs {gigabytes(plan.peak)} of memory and may take "
        f"{gigabytes(plan.limit)}; {way_out(planner)}"
    )


def summary(plan: Plan) -> str:
    """One line: the planned peak, and what is done in parts."""
    sizes, choice = plan.choice.sizes, plan.choice
    parts = [
        f"{choice.decode_rows} answers decoded together",
        f"{sizes.rows} a pass" if sizes.rows else "",
        f"MLPs over {sizes.mlp_tokens} tokens" if sizes.mlp_tokens else "",
        f"{sizes.kept_blocks} blocks kept for the update" if sizes.kept_blocks else "",
        "reward model read anew each time" if choice.swap else "",
    ]
    return (
        f"memory: at most {gigabytes(plan.peak)} planned, {gigabytes(plan.limit)} allowed; "
        f"{', '.join(filter(None, parts))}"
    )


def show(planner: Planner, plan: Plan, ui: Console) -> None:
    """The table: what stays, and the peak of each stage."""
    dense = "fp32" if plan.choice.value_bytes == 4 else "16 bits"
    form = dense if plan.choice.dense else "as stored"
    found = planner.model.coverage
    adapted = found.describe(planner.work.expert_rank) if found else ""
    rows = [
        (f"weights, {form}", plan.weights, ""),
        ("reward model", plan.reward_model, "read anew each time" if plan.choice.swap else ""),
        ("LoRA and AdamW's moments", plan.adapter, adapted),
        *((f"peak: {name}", size, _how(name, plan)) for name, size in plan.stages.items()),
        ("allowed", plan.limit, ""),
    ]
    cells = [(label, gigabytes(size), how) for label, size, how in rows]
    ui.table("Memory, as planned", ("", "size", "how"), cells)


def _how(stage: str, plan: Plan) -> str:
    sizes = plan.choice.sizes
    if stage == "rollout":
        return f"{plan.choice.decode_rows} answers at a time"
    mlp = f", MLP {sizes.mlp_tokens} tokens" if sizes.mlp_tokens else ""
    kept = f", {sizes.kept_blocks} blocks kept" if sizes.kept_blocks and stage == "update" else ""
    return f"{sizes.rows or 'all'} of a prompt a pass{mlp}{kept}"


def gigabytes(size: int) -> str:
    """Bytes as people say them, 10^9 to a GB."""
    return f"{size / 1e9:.2f} GB"
