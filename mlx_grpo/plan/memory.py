"""Peak memory of each stage from shapes and flags, and how much to work on at a time to fit a
limit.

What stays: weights, the actor's LoRA with AdamW's two moments (fp32), the reward model. What comes
and goes: keys and values of a rollout, and the packed weights that undo its merged LoRA; a block's
arrays over one pass; the inputs of all blocks that a backward keeps; gradients and the adapter and
moments before the iteration; logits of a chunk of the head. The factors below count arrays alive at
once; they are fits to MLX's own peaks of single blocks (docs/memory.md), where an MLP's arrays
[tokens, width], the block's own [tokens, hidden] and attention's scores are what counts. A plan
assumes prompts and answers as long as they may be.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from mlx_grpo.backend.kernels import TILE
from mlx_grpo.backend.precision import EXPANDED_BYTES
from mlx_grpo.models.decoder import PREFILL_TOKENS, Sizes
from mlx_grpo.models.families.gated_delta import PIECE_TOKENS
from mlx_grpo.plan.footprint import Footprint

MLP_TOKENS = (0, 1024, 512, 256, 128, 64)
HEAD_BYTES = (32 << 20, 16 << 20, 8 << 20, 4 << 20)
HEAD_BYTES_ON_GPU = (256 << 20, 128 << 20, 64 << 20, *HEAD_BYTES)
"""A GPU is filled by products of a hundred rows and more."""
HALF = 0.9
"""Of a block's arrays in 16 bits against fp32: a LoRA's are fp32 in both."""
GPU_MARGIN = 1.1
"""The factors were found where MLX holds about 100 operations in flight; Metal holds more and frees
their inputs later."""
STATES_PER_TOKEN = 4.2
"""Of a recurrence, fp32, that its backward keeps where it is not taken in pieces of time."""
STATES_IN_FLIGHT = (27, 40)
"""Of a row of a recurrence in pieces, fp32, in its forward and in its backward, whatever the
length."""
STREAMED_HIDDEN = 128 << 20
"""Of hidden states that a reward model which is swapped in works on between two of its blocks."""


@dataclass(frozen=True)
class Workload:
    """What memory depends on beside the models."""

    prompts: int
    k: int
    prompt_tokens: int
    completion_tokens: int
    lora_rank: int
    steps: int = 1
    """Optimizer steps of an iteration."""
    epochs: int = 1
    """Passes over its rollout."""
    update_rows: int = 0
    """Completions per prompt that the update learns from; 0 means all."""
    lora_layers: int = 0
    """Last blocks with a LoRA; 0 means all."""
    expert_rank: int = 0
    """Of the LoRA on each expert; 0 means none."""
    kl_share: float = 1.0
    """Share of the completions on which the KL is measured."""
    update_prompts: int = 0
    """Prompts an update lasts for, of the rank with most in each step; 0 means `prompts`."""

    @property
    def learned(self) -> "Workload":
        """As the update sees it, whose groups are smaller."""
        k = min(self.update_rows or self.k, self.k)
        return replace(self, k=k, prompts=self.update_prompts or self.prompts)


@dataclass(frozen=True)
class RewardFootprint:
    """A reward model: a LoRA of some bytes on the policy's weights, or a model of its own."""

    adapter_bytes: int = 0
    model: Footprint | None = None


@dataclass(frozen=True)
class Choice:
    """How a run works; the planner tries them from the fastest on."""

    dense: bool
    """Weights expanded instead of packed."""
    value_bytes: int
    """Of an activation and of a weight that is not packed: 4 or 2."""
    decode_rows: int
    sizes: Sizes
    swap: bool = False
    """Read the reward model's blocks anew at each scoring instead of keeping them."""

    @property
    def merges(self) -> bool:
        """Whether a rollout samples with the LoRA inside the weights."""
        return self.dense and self.value_bytes == 4


@dataclass(frozen=True)
class Plan:
    """A choice and what it needs, in bytes."""

    limit: int
    choice: Choice
    weights: int
    reward_model: int
    """Of what stays of it."""
    adapter: int
    """LoRA and moments."""
    stages: dict[str, int]
    """Peak of each stage, all that stays included."""

    @property
    def peak(self) -> int:
        """Of a whole iteration."""
        return max(self.stages.values())

    @property
    def fits(self) -> bool:
        """Whether the peak is within the limit."""
        return self.peak <= self.limit


def weight_bytes(model: Footprint, choice: Choice) -> int:
    """Of a model's weights in memory; those of the head, or its scales, are fp32."""
    if not choice.dense:
        scales = model.scale_values if choice.value_bytes == 2 else model.all_scale_values
        return model.packed_bytes + 2 * scales
    head = (4 - choice.value_bytes) * model.vocabulary * model.hidden
    return choice.value_bytes * model.parameters + head


def predict(
    model: Footprint, reward: RewardFootprint, work: Workload, choice: Choice, limit: int
) -> Plan:
    """What a choice needs."""
    weights = weight_bytes(model, choice)
    kept = reward.adapter_bytes
    if reward.model and not choice.swap:
        kept += weight_bytes(reward.model, choice)
    adapter = model.lora_bytes(work.lora_rank, work.lora_layers, work.expert_rank)
    base = weights + kept + 3 * adapter
    # gradients; and from the first step on adapter and moments as they were, to go back to
    backward = (
        adapter + _update(model, work.learned, choice) + (3 * adapter if work.steps > 1 else 0)
    )
    stages = {
        "rollout": _rollout(model, work, choice),
        "reward": _reward(model, reward, work, choice),
        "logprob": _logprob(model, work, choice),
        "update": max(backward, 4 * adapter),
    }
    stages = {name: base + int(_margin(choice) * size) for name, size in stages.items()}
    return Plan(limit, choice, weights, kept, 3 * adapter, stages)


def choose(
    model: Footprint,
    reward: RewardFootprint,
    work: Workload,
    limit: int,
    given: Sequence[Choice],
    residency: str = "auto",
) -> Plan:
    """The fastest choice that fits, or the leanest if none does.

    Args:
        given: tried in turn; zeros in `decode_rows` and `sizes.rows` are for the planner to choose.
        residency: `resident`, `swap` or `auto` for a reward model of its own.
    """
    swaps = {"resident": (False,), "swap": (True,), "auto": (False, True)}[residency]
    swaps = swaps if reward.model else (False,)
    choices = [replace(choice, swap=swap) for choice, swap in product(given, swaps)]
    for choice in choices:
        plan = _sized(model, reward, work, limit, choice)
        if plan.fits:
            break
    return plan


def widest_rollout(
    model: Footprint, reward: RewardFootprint, work: Workload, choice: Choice, most: int
) -> int:
    """Rows decoded together where a rollout may take so many bytes, all that stays included; those
    of one prompt if no more fit."""
    for rows in _widths(work, choice):
        wide = predict(model, reward, work, replace(choice, decode_rows=rows), most)
        if wide.stages["rollout"] <= most:
            break
    return rows


def _sized(
    model: Footprint, reward: RewardFootprint, work: Workload, limit: int, given: Choice
) -> Plan:
    """With the widest rollout that fits, and the largest sizes for the other stages."""
    rows = given.decode_rows or widest_rollout(model, reward, work, given, limit)
    wide = replace(given, decode_rows=rows)
    for sizes in _ladder(work.k, given):
        cut = replace(wide, sizes=sizes)
        together = replace(sizes, texts=_rows(work, cut), text_tokens=_pass_tokens(work, cut))
        plan = predict(model, reward, work, replace(cut, sizes=together), limit)
        if max(plan.stages[s] for s in ("reward", "logprob", "update")) <= limit:
            return _keeping(model, reward, work, plan)
    return plan


def _keeping(model: Footprint, reward: RewardFootprint, work: Workload, lean: Plan) -> Plan:
    """The plan with as many blocks kept for their backward as there is room for."""
    trained = model.trained_blocks(work.lora_layers)
    one = _margin(lean.choice) * _kept(model, work.learned, lean.choice)
    count = min(trained, int((lean.limit - lean.stages["update"]) // one))
    sizes = replace(lean.choice.sizes, kept_blocks=count)
    return predict(model, reward, work, replace(lean.choice, sizes=sizes), lean.limit)


def _margin(choice: Choice) -> float:
    return 1.0 if choice.dense else GPU_MARGIN


def _widths(work: Workload, given: Choice) -> Iterator[int]:
    """Rows decoded together: all prompts, half of them, and so on down to one. Packed weights are
    multiplied by tiles of rows: there as many prompts as fill half as many tiles."""
    prompts, k = work.prompts, work.k
    while prompts > 1:
        yield prompts * k
        half = (prompts + 1) // 2
        tiles = (-(-prompts * k // TILE)) // 2
        prompts = half if given.dense else max(1, tiles * TILE // k or half)
    yield k


def _ladder(k: int, given: Choice) -> Iterator[Sizes]:
    """From the fastest to the leanest; with fewer rows the prompt is run more often."""
    rows = given.sizes.rows
    counts = (rows,) if rows else (0, *sorted({k // 2, k // 3, 1} - {0, k}, reverse=True))
    heads = HEAD_BYTES if given.dense else HEAD_BYTES_ON_GPU
    return (Sizes(*sizes) for sizes in product(counts, MLP_TOKENS, heads))


def _rows(work: Workload, choice: Choice) -> int:
    return min(choice.sizes.rows or work.k, work.k)


def _pass_tokens(work: Workload, choice: Choice) -> int:
    return work.prompt_tokens + _rows(work, choice) * work.completion_tokens


def _hidden(model: Footprint, tokens: int, choice: Choice) -> int:
    """Hidden states of some tokens."""
    return tokens * model.hidden * choice.value_bytes


def _scores(model: Footprint, work: Workload, choice: Choice) -> float:
    """Attention's scores of a pass, fp32."""
    s, t = work.prompt_tokens, work.completion_tokens
    return 4.0 * model.heads * (_rows(work, choice) * t * (s + t) + s * s)


def _block(
    model: Footprint, work: Workload, choice: Choice, tokens: int, rows: int = 0
) -> tuple[float, float]:
    """(forward, backward) of one block over a pass of so many tokens; its recurrence runs over so
    many rows, those of a pass unless told otherwise."""
    width, chunk = 4.0 * model.mlp, choice.sizes.mlp_tokens if model.cuttable else 0
    states, projected = 4.0 * tokens * model.hidden, 4.0 * tokens * model.attention
    scores = _scores(model, work, choice)
    forward = 3.2 * tokens * width + 12.8 * states + 0.2 * scores
    backward = 16.1 * tokens * width + 2.1 * projected + 0.7 * scores
    if 0 < chunk < tokens:
        forward = min(forward, 3.8 * chunk * width + 8.0 * states + 1.1 * scores)
        attention = 15.6 * states + 6.4 * projected + 1.8 * scores
        backward = min(backward, max(18.0 * chunk * width + 6.0 * states, attention))
    part = 1.0 if choice.value_bytes == 4 else HALF
    ahead, again = (
        4.0 * n * (rows or _rows(work, choice)) * model.scan_values * model.scans_in_pieces
        for n in STATES_IN_FLIGHT
    )
    return part * forward + ahead, part * backward + again + _scanned(model, tokens)


def _scanned(model: Footprint, tokens: int) -> float:
    """States that a block's gradient reads."""
    per_token = 1 / PIECE_TOKENS if model.scans_in_pieces else STATES_PER_TOKEN
    return 4.0 * per_token * tokens * model.scan_values


def _head(model: Footprint, work: Workload, choice: Choice) -> float:
    """Logits of a chunk, and the states it reads and leaves for a pass."""
    tokens = _rows(work, choice) * work.completion_tokens
    logits = min(choice.sizes.head_bytes, 4 * tokens * model.vocabulary)
    copies = 2.1 if choice.dense else 4.5
    return copies * logits + 12.0 * tokens * model.hidden


def _rollout(model: Footprint, work: Workload, choice: Choice) -> int:
    tokens = work.prompt_tokens + work.completion_tokens
    rows = max(work.k, min(choice.decode_rows, work.prompts * work.k))  # never less than a group
    grown = 1 if choice.dense else 2  # a GPU has all layers' old caches alive while they grow
    held = tokens * model.cache_values + model.state_values
    cached = grown * rows * held * choice.value_bytes
    prefill, _ = _block(model, work, choice, min(work.prompt_tokens, PREFILL_TOKENS), 1)
    undo = model.packed_block_bytes if choice.merges else 0  # to take the LoRA out again
    # each prompt's own, beside those of the batch that they are merged into
    merged = -(-rows // work.k) * work.prompt_tokens * model.cache_values * choice.value_bytes
    working = cached + max(5.0 * 4 * rows * model.vocabulary, prefill, merged)
    merging = 3 * EXPANDED_BYTES if choice.merges and model.expert_lora_width else 0
    return int(undo + max(working, merging))


def _reward(model: Footprint, reward: RewardFootprint, work: Workload, choice: Choice) -> int:
    if not reward.model and not reward.adapter_bytes:
        return 0
    scorer, tokens = reward.model or model, _pass_tokens(work, choice)
    forward, _ = _block(scorer, work, choice, tokens)
    if not (reward.model and choice.swap):
        return int(forward + 3 * _hidden(scorer, tokens, choice))
    inner = scorer.packed_bytes - scorer.embedding_bytes
    if choice.dense:
        inner = choice.value_bytes * (scorer.parameters - scorer.vocabulary * scorer.hidden)
    group = 2 * _hidden(scorer, work.prompt_tokens + work.k * work.completion_tokens, choice)
    held = min(STREAMED_HIDDEN, (work.prompts - 1) * group) + group
    return int(max(scorer.embedding_bytes, inner // scorer.blocks) + held + forward)


def _logprob(model: Footprint, work: Workload, choice: Choice) -> int:
    tokens = _pass_tokens(work, choice)
    forward, _ = _block(model, work, choice, tokens)
    return int(3 * _hidden(model, tokens, choice) + max(forward, _head(model, work, choice)))


def _update(model: Footprint, work: Workload, choice: Choice) -> int:
    tokens = _pass_tokens(work, choice)
    _, backward = _block(model, work, choice, tokens)
    trace = (model.trained_blocks(work.lora_layers) + 3) * _hidden(model, tokens, choice)
    kept = choice.sizes.kept_blocks * _kept(model, work, choice)
    return int(trace + kept + max(backward, _head(model, work, choice)))


def _kept(model: Footprint, work: Workload, choice: Choice) -> float:
    """Arrays of a block that its backward reads."""
    tokens = _pass_tokens(work, choice)
    values = 3.0 * model.mlp + 5.0 * model.hidden + 1.0 * model.attention
    part = 1.0 if choice.value_bytes == 4 else HALF
    own = part * 4.0 * tokens * values + _scores(model, work, choice)
    return own + _scanned(model, tokens)
