"""How long an iteration takes, estimated: what each stage must move and do, over what a machine can
(a roofline; Williams et al. 2009, doi:10.1145/1498765.1498785).

Nothing is faster than its roofline; how near a stage comes to it depends on the machine. `REACHED`
is what SmolLM2-135M in fp32 reached on a 2-core Linux CPU (bench/RESULTS.md, 4 prompts of 6 answers
of 64 tokens). For a Mac it is the share that others measured for 4-bit products (`devices.py`);
this project has not been timed on Metal.
"""

import math
from dataclasses import dataclass
from typing import Literal

from mlx_grpo.plan.devices import Device
from mlx_grpo.plan.footprint import Footprint
from mlx_grpo.plan.memory import Choice, RewardFootprint, Workload, weight_bytes

REACHED = {"rollout": 0.25, "reward": 0.5, "logprob": 0.5, "update": 0.4}


@dataclass(frozen=True)
class StageCost:
    """What a stage cannot do without."""

    bytes: float
    flops: float


@dataclass(frozen=True)
class StageTime:
    """Seconds of a stage in one iteration."""

    at_least: float
    """At the machine's limit."""
    expected: float
    """At the share of it that was reached where that was measured."""
    bound: Literal["bandwidth", "arithmetic"]
    """Which of the two limits it is."""
    flops: float = 0.0
    """What it computes."""


def stage_costs(
    model: Footprint, reward: RewardFootprint, work: Workload, choice: Choice
) -> dict[str, StageCost]:
    """Bytes and FLOPs of one iteration by stage, prompts and answers as long as they may be.

    Attention's scores and elementwise work are left out.
    """
    rows = work.prompts * work.k
    answered = rows * work.completion_tokens
    passes, seen = _passes(work, choice)
    adapter = model.lora_values(work.lora_rank, work.expert_rank)
    weights = weight_bytes(model, choice)
    head = 2.0 * model.vocabulary * model.hidden

    steps = -(-rows // max(work.k, min(choice.decode_rows or rows, rows))) * work.completion_tokens
    context = work.prompt_tokens + work.completion_tokens / 2
    kept = answered * context * model.cache_values * choice.value_bytes
    decoded = work.prompts * work.prompt_tokens + answered

    scorer = reward.model or model
    scoring = reward.model is not None or reward.adapter_bytes > 0
    forward = 2.0 * model.block_weights
    # the reference runs for a share of the completions, and for the prompts of these
    measured = work.kl_share * answered
    prompts = _share_of_prompts_measured(work)
    return {
        "rollout": StageCost(
            steps * weights + kept,
            2.0 * (model.block_weights + adapter) * decoded + head * answered,
        ),
        "reward": StageCost(
            scoring * passes * weight_bytes(scorer, choice),
            scoring * 2.0 * scorer.block_weights * seen,
        ),
        "logprob": StageCost(
            passes * prompts * weights,
            forward * (prompts * (seen - answered) + measured) + head * measured,
        ),
        "update": _update_cost(model, work.learned, choice),
    }


def _share_of_prompts_measured(work: Workload) -> float:
    """Expected share of the prompts with at least one of the completions that the KL is measured
    on, which are drawn without putting any back."""
    rows = work.prompts * work.k
    count = work.kl_share * rows
    return 1 - math.prod(max(0.0, 1 - count / (rows - i)) for i in range(work.k))


def _passes(work: Workload, choice: Choice) -> tuple[int, int]:
    """(passes, tokens that go through the blocks) of a forward over all groups."""
    rows = min(choice.sizes.rows or work.k, work.k)
    passes = work.prompts * -(-work.k // rows)
    answered = work.prompts * work.k * work.completion_tokens
    return passes, passes * work.prompt_tokens + answered


def _update_cost(model: Footprint, work: Workload, choice: Choice) -> StageCost:
    """Old log-probs of all minibatches but the first, then for each a forward, and from the last
    block to the first that learns: what was not kept again, and the gradients of the inputs. An
    adapter x A B costs two products forward and four backward: dy B', of which both dA and the
    inputs' gradient are made, dB, and these two. The head runs once, and once more for its
    gradient."""
    passes, seen = _passes(work, choice)
    answered = work.prompts * work.k * work.completion_tokens
    weights = weight_bytes(model, choice)
    learn = model.trained_blocks(work.lora_layers) / model.blocks
    again = max(0.0, learn - choice.sizes.kept_blocks / model.blocks)
    before = 1.0 if choice.sizes.rows else 1 - work.epochs / work.steps
    runs = work.epochs * (1 + again + learn) + before
    adapter = model.lora_values(work.lora_rank, work.expert_rank)
    head = 2.0 * model.vocabulary * model.hidden * answered
    return StageCost(
        runs * passes * weights,
        runs * 2.0 * model.block_weights * seen
        + 2.0 * (work.epochs * (3 * learn + again) + before * learn) * adapter * seen
        + (2 * work.epochs + before) * head,
    )


def estimate(costs: dict[str, StageCost], device: Device) -> dict[str, StageTime]:
    """Seconds of each stage."""
    return {
        stage: _time(cost, device, device.reached or REACHED[stage])
        for stage, cost in costs.items()
    }


def _time(cost: StageCost, device: Device, reached: float) -> StageTime:
    moving, computing = cost.bytes / device.bandwidth, cost.flops / device.arithmetic
    least = max(moving, computing)
    bound: Literal["bandwidth", "arithmetic"] = "bandwidth" if moving > computing else "arithmetic"
    return StageTime(least, least / reached, bound, cost.flops)
