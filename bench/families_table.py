"""What works of each decoder that mlx-lm knows, and the table of it in the documentation.

    python -m bench.families_table                     all of them; writes docs/families.md
    python -m bench.families_table lfm2 "gemma4 shared"  these, on the screen only

A small random model of each configuration in `bench/decoders.py` goes through what training and
evaluation do with a model (`tests/helpers/decoders.py`), packed in 4 bits as well. A process may
end in the middle, as by a fault in a kernel: the next one goes on behind it.
"""

import mlx_grpo  # noqa: F401  isort: skip  (first: it loads OpenBLAS before MLX)

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from bench.decoders import CONFIGS
from mlx_grpo.core.errors import InputError
from mlx_grpo.models.check import check_decoder
from mlx_grpo.models.decoder import Decoder
from mlx_grpo.models.lora import add_lora
from tests.helpers.decoders import (
    actor_on,
    adapters_agree,
    forward_gap,
    gradient_gap,
    reward_gap,
    rollouts_agree,
    small_decoder,
)
from tests.helpers.groups import group_of

PAGE = Path(__file__).parent.parent / "docs" / "families.md"
MARKER = "<!-- below: written by python -m bench.families_table -->\n"
LARGEST = 1e-4
"""Of a difference, relative to the largest value."""
READS = 0.999
"""Least correlation of a model's logits with the product of its norm and its head."""
GROUP = 32
"""Values that share a scale in 4 bits; narrower layers stay as they are."""
COMMAND = [sys.executable, "-m", "bench.families_table", "--json"]
KEPT = 2
"""Last blocks whose arrays a second update keeps."""


@dataclass(frozen=True)
class Outcome:
    """What became of a configuration: nothing in a field, or what is wrong in a line."""

    name: str
    refusal: str = ""
    """What the check at load says."""
    actor: str = ""
    reward: str = ""
    packed: str = ""
    """In 4 bits, as an actor."""
    coverage: float = 0.0
    """Of the blocks' weights, those in layers that get a LoRA."""

    @property
    def works(self) -> bool:
        """As an actor and as a reward model."""
        return not (self.refusal or self.actor or self.reward)


def outcome(name: str) -> Outcome:
    """Try a configuration."""
    try:
        model = small_decoder(name)
    except Exception as e:  # as a run finds it where it loads the model
        return Outcome(name, refusal=f"cannot load the model: {e}".splitlines()[0])
    try:
        check_decoder(Decoder(model))
    except InputError as e:
        return Outcome(name, refusal=str(e))
    return Outcome(
        name,
        actor=_said(lambda: actor_faults(model)),
        reward=_said(lambda: reward_faults(model)),
        packed=_said(lambda: actor_faults(in_four_bits(model))),
        coverage=coverage(model),
    )


def _said(faults: Callable[[], Iterator[str]]) -> str:
    try:
        return ", ".join(faults())
    except Exception as e:  # whatever a family's own code raises is what the table is about
        return f"{type(e).__name__}: {e}".splitlines()[0]


def in_four_bits(model: nn.Module) -> nn.Module:
    """The same model with its layers packed, in place."""

    def wide(_: str, module: nn.Module) -> bool:
        return hasattr(module, "to_quantized") and module.weight.shape[-1] % GROUP == 0

    nn.quantize(model, GROUP, 4, class_predicate=wide)
    model.freeze()
    return model


def actor_faults(model: nn.Module) -> Iterator[str]:
    """What of forward, gradients, rollouts and saved adapters is not as it should be."""
    check_decoder(Decoder(model))
    actor = actor_on(model)
    if not (gap := forward_gap(actor)) < LARGEST:
        yield f"forward off by {gap:.0e}"
    for kept in (0, KEPT):
        if not (gap := gradient_gap(actor, kept)) < LARGEST:
            yield f"gradients off by {gap:.0e}" + (" with blocks kept" if kept else "")
    if not rollouts_agree(actor.eval()):
        yield "rollouts differ"
    with tempfile.TemporaryDirectory() as directory:
        if not adapters_agree(model, actor, Path(directory)):
            yield "saved adapter differs"


def reward_faults(model: nn.Module) -> Iterator[str]:
    """What of a reward head on its states is not as it should be."""
    if not (gap := reward_gap(actor_on(model))) < LARGEST:
        yield f"score off by {gap:.0e}"
    if not (found := agreement_with_head(Decoder(model))) > READS:
        yield f"its own head reads other states (correlation {found:.3f})"


def agreement_with_head(decoder: Decoder) -> float:
    """Correlation of the logits with the product of what a reward head reads and the matrix of the
    model's head: which of the matrices outside the blocks that is, the best one shows."""
    group = group_of()
    _, h_KTD = decoder.forward(mx.array([group.prompt_ids]), group.tokens_KT)
    logits_KV, read_KD = decoder.head(h_KTD)[:, 0], decoder.norm(h_KTD)[:, 0]
    with decoder.without_blocks():
        outside = [v for _, v in tree_flatten(decoder.model.parameters())]
    shape = (decoder.vocabulary, read_KD.shape[-1])
    return max(_correlation(read_KD @ m.T, logits_KV) for m in outside if m.shape == shape)


def _correlation(a_KV: mx.array, b_KV: mx.array) -> float:
    a, b = (x - x.mean(axis=0) for x in (a_KV, b_KV))  # without the bias that a head may have
    return float(((a * b).sum() / mx.sqrt((a * a).sum() * (b * b).sum())).item())


def coverage(model: nn.Module) -> float:
    """Share of the blocks' weights in layers that get a LoRA."""
    covered = total = 0
    adapted = add_lora(model, rank=1, scale=1.0, seed=0, expert_rank=1)
    for block, with_lora in zip(model.layers, adapted.layers, strict=True):
        places = tuple(f"{n}." for n, m in with_lora.named_modules() if "lora_a" in m)
        for name, value in tree_flatten(block.parameters()):
            total += value.nbytes
            covered += value.nbytes * name.startswith(places) if places else 0
    return covered / total


def outcomes(names: Sequence[str]) -> Iterator[Outcome]:
    """Of each, from processes that may end before they should."""
    left = list(names)
    while left:
        with subprocess.Popen([*COMMAND, *left], stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            for line in child.stdout:
                if line.startswith("{"):
                    yield Outcome(**json.loads(line))
                    left.pop(0)
        if left:
            ends = f"ends the process, status {child.returncode}"
            yield Outcome(left.pop(0), actor=ends, reward="not tried", packed="not tried")


def rows(found: Sequence[Outcome]) -> str:
    """The table and its sum."""
    lines = [
        f"{sum(o.works for o in found)} of {len(found)} configurations work, "
        f"{sum(o.works and not o.packed for o in found)} of them in 4 bits as well.",
        "",
        "| model type | actor | reward model | 4 bits | LoRA on |",
        "|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *map(_row, found)]) + "\n"


def _row(o: Outcome) -> str:
    if o.refusal:
        why = o.refusal.split(" is not supported: ")[-1].replace("|", "/")
        return f"| {o.name} | refused: {why} | | | |"
    cells = (said.replace("|", "/") or "yes" for said in (o.actor, o.reward, o.packed))
    return f"| {o.name} | {' | '.join(cells)} | {o.coverage:.0%} |"


def main(arguments: Sequence[str]) -> None:
    """The command."""
    if arguments[:1] == ["--json"]:
        for name in arguments[1:]:
            print(json.dumps(asdict(outcome(name))), flush=True)
        return
    found = []
    for o in outcomes(arguments or list(CONFIGS)):
        found.append(o)
        print(_row(o), flush=True)
    print(f"{sum(o.works for o in found)} of {len(found)} work")
    if not arguments:
        by_hand = PAGE.read_text(encoding="utf-8").split(MARKER)[0]
        PAGE.write_text(by_hand + MARKER + rows(found), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
