"""The plan of a run: from its settings and the headers of its models, shown, or refused."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from mlx_grpo.backend.device import recommended_memory
from mlx_grpo.backend.precision import DTYPES, Asked, Precision, asked, precision_for, precisions
from mlx_grpo.config.checks import parse_bytes
from mlx_grpo.config.settings import (
    ENOUGH_TO_MEASURE_LESS,
    KLSettings,
    TrainConfig,
    flag_of,
    flat_values,
    with_settings,
)
from mlx_grpo.models.decoder import Sizes
from mlx_grpo.models.reward_model import reward_config
from mlx_grpo.plan.devices import THIS, Device, device
from mlx_grpo.plan.footprint import Footprint, adapter_bytes, footprint
from mlx_grpo.plan.memory import Choice, Plan, RewardFootprint, Workload, choose, widest_rollout
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
        """Of the rank that has most. Ranks wait for each other at every optimizer step."""
        config = self.config
        batch, step = config.data.batch_size, config.optimizer.minibatch_size
        completions = batch * config.rollout.K
        steps = [min(step, batch - start) for start in range(0, batch, step)]
        return Workload(
            prompts=-(-batch // self.ranks),
            k=config.rollout.K,
            prompt_tokens=config.data.max_prompt_length,
            completion_tokens=config.rollout.max_completion_length,
            lora_rank=config.model.lora_rank,
            expert_rank=config.model.expert_lora_rank,
            steps=len(steps) * config.optimizer.epochs,
            epochs=config.optimizer.epochs,
            update_rows=config.optimizer.update_rows,
            lora_layers=config.model.lora_layers,
            kl_share=config.kl.measured(completions) / completions,
            update_prompts=sum(-(-prompts // self.ranks) for prompts in steps),
        )

    def plan(self) -> Plan:
        """What fits into the run's memory limit, or the leanest if nothing does."""
        return self._plan

    @cached_property
    def _plan(self) -> Plan:
        config = self.config
        rows, sizes = config.rollout.decode_rows, Sizes(rows=config.optimizer.rows_per_pass)
        rows = rows and max(self.work.k, rows - rows % self.work.k)  # whole prompts
        given = [Choice(dense, size, rows, sizes) for dense, size in self._forms()]
        limit = parse_bytes(config.run.memory_limit) or recommended_memory()
        return choose(self.model, self.reward, self.work, limit, given, config.reward.residency)

    def held_out_rows(self, prompts: int, longest: int, k: int) -> int:
        """Rows of held-out answers decoded together: the widest rollout that needs no more memory
        than an iteration does.

        Args:
            prompts: how many there are.
            longest: tokens of the longest of them.
            k: answers to each.
        """
        plan, share = self.plan(), -(-prompts // self.ranks)
        work = replace(self.work, prompts=share, k=k, prompt_tokens=longest)
        most = min(plan.peak, plan.limit)
        return widest_rollout(self.model, self.reward, work, plan.choice, most)

    def _forms(self) -> list[tuple[bool, int]]:
        """(weights expanded, bytes of a value) to try in turn; a Mac's GPU takes packed weights and
        16 bits unless something else is asked for."""
        wanted = asked_in(self.config)
        if self.here:
            return [(p.dense, p.dtype.size) for p in precisions(self.model.parameters, wanted)]
        size = DTYPES[wanted.dtype].size if wanted.dtype in DTYPES else 2
        return [(wanted.weights == "dense", size)]

    def times(self, plan: Plan, machine: Device) -> dict[str, StageTime]:
        """Seconds of each stage of an iteration, without those that there are not."""
        costs = stage_costs(self.model, self.reward, self.work, plan.choice)
        return {stage: t for stage, t in estimate(costs, machine).items() if t.at_least}

    def savings(self, machine: Device) -> list[tuple[str, float]]:
        """Settings that cost less, each alone and then together, and the share of an iteration's
        expected time that is left."""
        config, half = self.config, -(-self.model.blocks // 2)
        rows, share = max(2, -(-config.rollout.K // 2)), KLSettings().share
        cheaper: dict[str, float] = {"update_rows": rows, "kl_share": share, "lora_layers": half}
        now = flat_values(config)
        cheaper = {n: v for n, v in cheaper.items() if not 0 < now[n] <= v}
        fewer = replace(self, config=with_settings(config, kl_share=share)).work.kl_share
        if fewer >= self.work.kl_share or config.run.num_iterations < ENOUGH_TO_MEASURE_LESS:
            cheaper.pop("kl_share", None)
        if rows >= config.rollout.K:
            cheaper.pop("update_rows", None)
        tried = [{n: v} for n, v in cheaper.items()]
        if len(tried) > 1:
            tried.append(cheaper)
        whole = self._expected(machine)
        return [
            (
                " ".join(f"{flag_of(n)} {v:g}" for n, v in values.items()),
                replace(self, config=with_settings(config, **values))._expected(machine) / whole,
            )
            for values in tried
        ]

    def _expected(self, machine: Device) -> float:
        """Seconds of an iteration."""
        return sum(t.expected for t in self.times(self.plan(), machine).values())

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
    model = footprint(Path(config.model.actor), config.model.lora_target_modules)
    return Planner(config, model, reward_footprint(config), here, ranks)


def reward_footprint(config: TrainConfig) -> RewardFootprint:
    if config.reward.model == "none":
        return RewardFootprint()
    path = Path(config.reward.model)
    if reward_config(path)["kind"] == "full":
        return RewardFootprint(model=footprint(path))
    return RewardFootprint(adapter_bytes(path))


def asked_in(config: TrainConfig) -> Asked:
    """The precision that a run's settings ask for."""
    return asked(config.model.precision, config.model.weights)


def precision_of(config: TrainConfig, plan: Plan) -> Precision:
    """How a run computes here."""
    return precision_for(plan.choice.dense, asked_in(config))


def machine_of(name: str, plan: Plan, config: TrainConfig) -> Device:
    """A named device, or `this`, which is measured."""
    if name == THIS:
        return device(name, precision_of(config, plan).dtype)
    return device(name, DTYPES.get(asked_in(config).dtype))


def way_out(planner: Planner) -> str:
    """The least that would have to change."""

    def fits(**change: int) -> bool:
        return replace(planner, config=with_settings(planner.config, **change)).plan().fits

    length = planner.config.rollout.max_completion_length // 2
    while length >= 16:
        if fits(max_completion_length=length):
            return f"it fits with --max-completion-length {length}"
        length //= 2
    if planner.model.expert_lora_width and fits(expert_lora_rank=0):
        for rank in range(planner.config.model.expert_lora_rank - 1, -1, -1):
            if fits(expert_lora_rank=rank):
                return f"it fits with --expert-lora-rank {rank}"
    rank = planner.config.model.lora_rank // 2
    while rank >= 1:
        if fits(lora_rank=rank):
            return f"it fits with --lora-rank {rank}"
        rank //= 2
    return "take a smaller model, or raise --memory-limit if this machine has more"
