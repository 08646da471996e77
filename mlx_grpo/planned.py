"""The plan of a run: from its settings and the headers of its models, shown, or refused."""

from dataclasses import replace
from pathlib import Path

from mlx_grpo.backend import choose_policy, policy_for, recommended_memory
from mlx_grpo.config import TrainConfig, parse_bytes
from mlx_grpo.console import Console
from mlx_grpo.errors import InputError
from mlx_grpo.models.footprint import adapter_bytes, footprint
from mlx_grpo.models.reward_model import reward_config
from mlx_grpo.models.stages import Sizes
from mlx_grpo.plan import Choice, Judge, Plan, Workload, choose


def plan_run(config: TrainConfig) -> Plan:
    """What fits into the run's memory limit, or the leanest if nothing does; reads no weight.

    Raises:
        InputError: a model is missing or cannot be loaded.
    """
    model = footprint(Path(config.actor_model))
    work = Workload(
        prompts=config.batch_size,
        k=config.K,
        prompt_tokens=config.max_prompt_length,
        completion_tokens=config.max_completion_length,
        lora_rank=config.lora_rank,
        steps=-(-config.batch_size // config.minibatch_size) * config.epochs,
    )
    dense = choose_policy(model.parameters).dense
    given = Choice(dense, config.decode_rows, Sizes(rows=config.rows_per_pass))
    limit = parse_bytes(config.memory_limit) or recommended_memory()
    return choose(model, _judge(config), work, limit, given, config.rm_residency)


def _judge(config: TrainConfig) -> Judge:
    if config.rm_model == "none":
        return Judge()
    path = Path(config.rm_model)
    if reward_config(path)["kind"] == "full":
        return Judge(model=footprint(path))
    return Judge(adapter_bytes(path))


def check_fits(config: TrainConfig, plan: Plan, ui: Console) -> None:
    """Say what is planned; where it does not fit, show the table.

    Raises:
        InputError: it does not fit; with the cheapest way out.
    """
    if plan.fits:
        ui.say(summary(plan))
        if policy_for(plan.choice.dense).slow:
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
