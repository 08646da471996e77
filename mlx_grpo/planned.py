"""The plan of a run: from its settings and the headers of its models, shown, or refused."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mlx_grpo.backend import choose_policy, policy_for, recommended_memory
from mlx_grpo.config import TrainConfig, parse_bytes
from mlx_grpo.console import Console, duration
from mlx_grpo.devices import Device, device
from mlx_grpo.errors import InputError
from mlx_grpo.models.footprint import adapter_bytes, footprint
from mlx_grpo.models.reward_model import reward_config
from mlx_grpo.models.stages import Sizes
from mlx_grpo.plan import Choice, Judge, Plan, Workload, choose
from mlx_grpo.scaling import Scaled, exchange, link_speed, pays_up_to
from mlx_grpo.timing import StageTime, estimate, stage_costs


def plan_run(config: TrainConfig, here: bool = True, ranks: int = 1) -> Plan:
    """What fits into the run's memory limit, or the leanest if nothing does; reads no weight.

    Args:
        here: on this machine; otherwise on a Mac, whose GPU takes the weights as they are stored.
        ranks: processes that share the prompts of an iteration; the plan is each one's.

    Raises:
        InputError: a model is missing or cannot be loaded.
    """
    model = footprint(Path(config.actor_model))
    dense = here and choose_policy(model.parameters).dense
    given = Choice(dense, config.decode_rows, Sizes(rows=config.rows_per_pass))
    limit = parse_bytes(config.memory_limit) or recommended_memory()
    return choose(
        model, _judge(config), _workload(config, ranks), limit, given, config.rm_residency
    )


def _workload(config: TrainConfig, ranks: int = 1) -> Workload:
    return Workload(
        prompts=-(-config.batch_size // ranks),
        k=config.K,
        prompt_tokens=config.max_prompt_length,
        completion_tokens=config.max_completion_length,
        lora_rank=config.lora_rank,
        steps=-(-config.batch_size // config.minibatch_size) * config.epochs,
        epochs=config.epochs,
    )


def _judge(config: TrainConfig) -> Judge:
    if config.rm_model == "none":
        return Judge()
    path = Path(config.rm_model)
    if reward_config(path)["kind"] == "full":
        return Judge(model=footprint(path))
    return Judge(adapter_bytes(path))


def times(config: TrainConfig, plan: Plan, machine: Device, ranks: int = 1) -> dict[str, StageTime]:
    """Seconds of each stage of an iteration, without those that there are not."""
    model = footprint(Path(config.actor_model))
    costs = stage_costs(model, _judge(config), _workload(config, ranks), plan.choice)
    return {stage: t for stage, t in estimate(costs, machine).items() if t.at_least}


def machine_of(name: str, plan: Plan) -> Device:
    """A named device, or `this`, which is measured."""
    return device(name, policy_for(plan.choice.dense).dtype)


def show_time(
    config: TrainConfig, plan: Plan, machine: Device, ui: Console, ranks: int = 1
) -> None:
    """The table of what an iteration and a run take, an estimate; of several ranks without their
    exchange."""
    found = times(config, plan, machine, ranks)
    rows: list[tuple[str, ...]] = [
        (stage, f"{t.at_least:.1f} s", f"{t.expected:.1f} s", t.bound) for stage, t in found.items()
    ]
    least, expected = (sum(getattr(t, n) for t in found.values()) for n in ("at_least", "expected"))
    rows.append(("an iteration", f"{least:.1f} s", f"{expected:.1f} s", ""))
    whole = (duration(config.num_iterations * seconds) for seconds in (least, expected))
    rows.append((f"{config.num_iterations} iterations", *whole, ""))
    ui.table(f"Time on {machine.name}, an estimate", ("", "at least", "expected", "bound by"), rows)
    source = "measured just now" if machine.measured else "by its data sheet"
    ui.say(
        f"at {machine.bandwidth / 1e9:.0f} GB/s and {machine.arithmetic / 1e12:.2g} TFLOP/s, "
        f"{source}; expected: at the shares of these that a Linux CPU reached; without evaluations"
    )


def scale(config: TrainConfig, machine: Device, link: str, ranks: int, here: bool) -> list[Scaled]:
    """An iteration with 1, 2, ... `ranks` such machines; never more than there are prompts.

    Raises:
        InputError: `link` is no speed.
    """
    model, speed = footprint(Path(config.actor_model)), link_speed(link)
    scaled = []
    for size in range(1, min(ranks, config.batch_size) + 1):
        found = times(config, plan_run(config, here, size), machine, size)
        working = sum(t.expected for t in found.values())
        traffic, exchanging = exchange(model, _workload(config), size, speed)
        prompts = _workload(config, size).prompts
        scaled.append(Scaled(size, prompts, traffic, working, exchanging))
    return scaled


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
    more = "more were not looked at" if up_to == scaled[-1].ranks else "more save less than a tenth"
    ui.say(f"pays up to {up_to} {'rank' if up_to == 1 else 'ranks'}; {more}")


def check_fits(config: TrainConfig, plan: Plan, ui: Console, here: bool = True) -> None:
    """Say what is planned; where it does not fit, show the table.

    Args:
        here: on this machine, as in `plan_run`.

    Raises:
        InputError: it does not fit; with the cheapest way out.
    """
    if plan.fits:
        ui.say(summary(plan))
        if here and policy_for(plan.choice.dense).slow:
            ui.warn("weights stay packed to fit: MLX's 4-bit kernels are very slow on a CPU")
        return
    show(plan, ui)
    raise InputError(
        f"{config.actor_model}: needs {gigabytes(plan.peak)} of memory and may take "
        f"{gigabytes(plan.limit)}; {_way_out(config, plan)}"
    )


def summary(plan: Plan) -> str:
    """One line: the planned peak, and what is done in parts."""
    sizes, choice = plan.choice.sizes, plan.choice
    parts = [
        f"{choice.decode_rows} answers decoded together",
        f"{sizes.rows} a pass" if sizes.rows else "",
        f"MLPs over {sizes.mlp_tokens} tokens" if sizes.mlp_tokens else "",
        "reward model read anew each time" if choice.swap else "",
    ]
    return (
        f"memory: at most {gigabytes(plan.peak)} planned, {gigabytes(plan.limit)} allowed; "
        f"{', '.join(filter(None, parts))}"
    )


def show(plan: Plan, ui: Console) -> None:
    """The table: what stays, and the peak of each stage."""
    form = "fp32" if plan.choice.dense else "as stored"
    rows = [
        (f"weights, {form}", plan.weights, ""),
        ("reward model", plan.reward_model, "read anew each time" if plan.choice.swap else ""),
        ("LoRA and AdamW's moments", plan.adapter, ""),
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
    return f"{sizes.rows or 'all'} of a prompt a pass{mlp}"


def gigabytes(size: int) -> str:
    """Bytes as people say them, 10^9 to a GB."""
    return f"{size / 1e9:.2f} GB"


def _way_out(config: TrainConfig, plan: Plan) -> str:
    """The least that would have to change."""
    length = config.max_completion_length // 2
    while length >= 16:
        if plan_run(replace(config, max_completion_length=length)).fits:
            return f"it fits with --max-completion-length {length}"
        length //= 2
    rank = config.lora_rank // 2
    while rank >= 1:
        if plan_run(replace(config, lora_rank=rank)).fits:
            return f"it fits with --lora-rank {rank}"
        rank //= 2
    return "take a smaller model, or raise --memory-limit if this machine has more"
