"""The plan of a run: from its settings and the headers of its models, shown, or refused."""

from dataclasses import dataclass, replace
from pathlib import Path

from mlx_grpo.backend.device import recommended_memory
from mlx_grpo.backend.precision import choose_precision, precision_for
from mlx_grpo.config.checks import parse_bytes
from mlx_grpo.config.settings import TrainConfig, with_settings
from mlx_grpo.models.decoder import Sizes
from mlx_grpo.models.reward_model import reward_config
from mlx_grpo.plan.devices import Device, device
from mlx_grpo.plan.footprint import Footprint, adapter_bytes, footprint
from mlx_grpo.plan.memory import Choice, Plan, RewardFootprint, Workload, choose
from mlx_grpo.plan.scaling import Scaled, exchange
from mlx_grpo.plan.timing import StageTime, estimate, stage_costs


@dataclass(frozen=True)
class Planner:
    """A run's settings and what its memory and time follow from beside them."""

    config: TrainConfig
    model: Footprint
    reward: RewardFootprint
    here: bool
    """On this machine; otherwise on a Mac, whose GPU takes the weights as they are stored."""
    ranks: int
    """Processes that share the prompts of an iteration; a plan is each one's."""

    @property
    def work(self) -> Workload:
        """Of the rank that has most."""
        config = self.config
        return Workload(
            prompts=-(-config.data.batch_size // self.ranks),
            k=config.rollout.K,
            prompt_tokens=config.data.max_prompt_length,
            completion_tokens=config.rollout.max_completion_length,
            lora_rank=config.model.lora_rank,
            steps=-(-config.data.batch_size // config.optimizer.minibatch_size)
            * config.optimizer.epochs,
            epochs=config.optimizer.epochs,
        )

    def plan(self) -> Plan:
        """What fits into the run's memory limit, or the leanest if nothing does."""
        config = self.config
        dense = self.here and choose_precision(self.model.parameters).dense
        given = Choice(
            dense, config.rollout.decode_rows, Sizes(rows=config.optimizer.rows_per_pass)
        )
        limit = parse_bytes(config.run.memory_limit) or recommended_memory()
        return choose(self.model, self.reward, self.work, limit, given, config.reward.residency)

    def times(self, plan: Plan, machine: Device) -> dict[str, StageTime]:
        """Seconds of each stage of an iteration, without those that there are not."""
        costs = stage_costs(self.model, self.reward, self.work, plan.choice)
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


def planner_for(config: TrainConfig, here: bool = True, ranks: int = 1) -> Planner:
    """Read the models' configurations and headers, no weight.

    Raises:
        InputError: a model is missing or cannot be loaded.
    """
    return Planner(
        config, footprint(Path(config.model.actor)), reward_footprint(config), here, ranks
    )


def reward_footprint(config: TrainConfig) -> RewardFootprint:
    if config.reward.model == "none":
        return RewardFootprint()
    path = Path(config.reward.model)
    if reward_config(path)["kind"] == "full":
        return RewardFootprint(model=footprint(path))
    return RewardFootprint(adapter_bytes(path))


def machine_of(name: str, plan: Plan) -> Device:
    """A named device, or `this`, which is measured."""
    return device(name, precision_for(plan.choice.dense).dtype)


def way_out(planner: Planner) -> str:
    """The least that would have to change."""

    def fits(**change: int) -> bool:
        return replace(planner, config=with_settings(planner.config, **change)).plan().fits

    length = planner.config.rollout.max_completion_length // 2
    while length >= 16:
        if fits(max_completion_length=length):
            return f"it fits with --max-completion-length {length}"
        length //= 2
    rank = planner.config.model.lora_rank // 2
    while rank >= 1:
        if fits(lora_rank=rank):
            return f"it fits with --lora-rank {rank}"
        rank //= 2
    return "take a smaller model, or raise --memory-limit if this machine has more"
