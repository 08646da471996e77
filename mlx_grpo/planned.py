"""The plan of a run: from its settings and the headers of its models, shown, or refused."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mlx_grpo.backend.device import recommended_memory
from mlx_grpo.backend.precision import choose_policy, policy_for
from mlx_grpo.config.checks import parse_bytes
from mlx_grpo.config.settings import TrainConfig
from mlx_grpo.console.live import duration
from mlx_grpo.console.output import Console
from mlx_grpo.core.errors import InputError
from mlx_grpo.devices import Device, device
from mlx_grpo.models.footprint import Footprint, adapter_bytes, footprint
from mlx_grpo.models.reward_model import reward_config
from mlx_grpo.models.decoder import Sizes
from mlx_grpo.plan import Choice, Judge, Plan, Workload, choose
from mlx_grpo.scaling import Scaled, exchange, pays_up_to
from mlx_grpo.timing import StageTime, estimate, stage_costs


@dataclass(frozen=True)
class Planner:
    """A run's settings and what its memory and time follow from beside them."""

    config: TrainConfig
    model: Footprint
    judge: Judge
    here: bool
    """On this machine; otherwise on a Mac, whose GPU takes the weights as they are stored."""
    ranks: int
    """Processes that share the prompts of an iteration; a plan is each one's."""

    @property
    def work(self) -> Workload:
        """Of the rank that has most."""
        config = self.config
        return Workload(
            prompts=-(-config.batch_size // self.ranks),
            k=config.K,
            prompt_tokens=config.max_prompt_length,
            completion_tokens=config.max_completion_length,
            lora_rank=config.lora_rank,
            steps=-(-config.batch_size // config.minibatch_size) * config.epochs,
            epochs=config.epochs,
        )

    def plan(self) -> Plan:
        """What fits into the run's memory limit, or the leanest if nothing does."""
        config = self.config
        dense = self.here and choose_policy(self.model.parameters).dense
        given = Choice(dense, config.decode_rows, Sizes(rows=config.rows_per_pass))
        limit = parse_bytes(config.memory_limit) or recommended_memory()
        return choose(self.model, self.judge, self.work, limit, given, config.rm_residency)

    def times(self, plan: Plan, machine: Device) -> dict[str, StageTime]:
        """Seconds of each stage of an iteration, without those that there are not."""
        costs = stage_costs(self.model, self.judge, self.work, plan.choice)
        return {stage: t for stage, t in estimate(costs, machine).items() if t.at_least}

    def scaled(self, machine: Device, bytes_per_second: float) -> list[Scaled]:
        """An iteration with 1, 2, ... such machines up to `ranks`; never more than there are
        prompts."""
        whole = replace(self, ranks=1).work
        scaled = []
        for size in range(1, min(self.ranks, whole.prompts) + 1):
            share = replace(self, ranks=size)
            found = share.times(share.plan(), machine)
            working = sum(t.expected for t in found.values())
            traffic, exchanging = exchange(self.model, whole, size, bytes_per_second)
            scaled.append(Scaled(size, share.work.prompts, traffic, working, exchanging))
        return scaled


def planner(config: TrainConfig, here: bool = True, ranks: int = 1) -> Planner:
    """Read the models' configurations and headers, no weight.

    Raises:
        InputError: a model is missing or cannot be loaded.
    """
    return Planner(config, footprint(Path(config.actor_model)), _judge(config), here, ranks)


def _judge(config: TrainConfig) -> Judge:
    if config.rm_model == "none":
        return Judge()
    path = Path(config.rm_model)
    if reward_config(path)["kind"] == "full":
        return Judge(model=footprint(path))
    return Judge(adapter_bytes(path))


def machine_of(name: str, plan: Plan) -> Device:
    """A named device, or `this`, which is measured."""
    return device(name, policy_for(plan.choice.dense).dtype)


def show_time(found: dict[str, StageTime], iterations: int, machine: Device, ui: Console) -> None:
    """The table of what an iteration and a run take, an estimate; of several ranks without their
    exchange."""
    rows: list[tuple[str, ...]] = [
        (stage, f"{t.at_least:.1f} s", f"{t.expected:.1f} s", t.bound) for stage, t in found.items()
    ]
    least, expected = (sum(getattr(t, n) for t in found.values()) for n in ("at_least", "expected"))
    rows.append(("an iteration", f"{least:.1f} s", f"{expected:.1f} s", ""))
    whole = (duration(iterations * seconds) for seconds in (least, expected))
    rows.append((f"{iterations} iterations", *whole, ""))
    ui.table(f"Time on {machine.name}, an estimate", ("", "at least", "expected", "bound by"), rows)
    source = "measured just now" if machine.measured else "by its data sheet"
    ui.say(
        f"at {machine.bandwidth / 1e9:.0f} GB/s and {machine.arithmetic / 1e12:.2g} TFLOP/s, "
        f"{source}; expected: at the shares of these that a Linux CPU reached; without evaluations"
    )


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


def check_fits(planned: Planner, plan: Plan, ui: Console) -> None:
    """Say what is planned; where it does not fit, show the table.

    Raises:
        InputError: it does not fit; with the cheapest way out.
    """
    if plan.fits:
        ui.say(summary(plan))
        if planned.here and policy_for(plan.choice.dense).slow:
            ui.warn("weights stay packed to fit: MLX's 4-bit kernels are very slow on a CPU")
        return
    show(plan, ui)
    raise InputError(
        f"{planned.config.actor_model}: needs {gigabytes(plan.peak)} of memory and may take "
        f"{gigabytes(plan.limit)}; {way_out(planned)}"
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


def way_out(planned: Planner) -> str:
    """The least that would have to change."""

    def fits(**change: int) -> bool:
        return replace(planned, config=replace(planned.config, **change)).plan().fits  # type: ignore[arg-type]

    length = planned.config.max_completion_length // 2
    while length >= 16:
        if fits(max_completion_length=length):
            return f"it fits with --max-completion-length {length}"
        length //= 2
    rank = planned.config.lora_rank // 2
    while rank >= 1:
        if fits(lora_rank=rank):
            return f"it fits with --lora-rank {rank}"
        rank //= 2
    return "take a smaller model, or raise --memory-limit if this machine has more"
