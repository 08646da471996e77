"""What do turns cost? Tokens/s of a three-turn rollout against the same tokens in one turn.

usage: python bench/speed/turns.py [--model weights/sft-4bit] [--rows 8] [--turn 24]

Every turn is cut after the same number of tokens, so that both rollouts have equal shapes. The
observations come from a real environment, through the chat template.
"""

import mlx_grpo  # noqa: F401  isort: skip  (before MLX: it loads OpenBLAS)

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from mlx_grpo.core.types import Prompt
from mlx_grpo.data.chat import prompt_tokens
from mlx_grpo.data.tools import answered, observation_tokens, tools_for
from mlx_grpo.grpo.rollout import Sampling, _decode
from mlx_grpo.models.backbone import Backbone, load_backbone
from mlx_grpo.rewards.environments import Action, Environments

TURNS = 3
CALCULATOR = Path(__file__).parents[2] / "examples" / "calculator.py"


class Cut:
    """Ends a turn after so many tokens and calls a tool, whatever the model said."""

    def __init__(self, backbone: Backbone, environments: Environments, turn: int):
        self.tokenizer, self.environments, self.turn = backbone.tokenizer, environments, turn
        self.tools = tools_for(backbone.tokenizer, environments.tools)
        self.next: dict[int, int] = {}
        self.turns: dict[int, int] = {}

    def go_on(self, ended: Mapping[int, Sequence[int]], room: int) -> dict[int, tuple[int, ...]]:
        """Each row, with an observation where its turn is over."""
        over = [i for i, ids in ended.items() if len(ids) >= self.next.get(i, self.turn)]
        found: dict[int, tuple[int, ...]] = dict.fromkeys(ended, ())
        asked = [i for i in over if self.turns.get(i, 1) < TURNS]
        results = self.environments.call([Action(str(i), "add", {"a": i, "b": 2}) for i in asked])
        for i, result in zip(asked, results, strict=True):
            history = [{"role": "user", "content": "go"}]
            messages = answered(self.tools, [result])
            found[i] = observation_tokens(self.tokenizer, self.tools, history, messages, "")
            self.turns[i] = self.turns.get(i, 1) + 1
            self.next[i] = len(ended[i]) + len(found[i]) + self.turn
        return {i: tokens for i, tokens in found.items() if i in asked or i not in over}


def main() -> None:
    """Print tokens/s of both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("weights/sft-4bit"))
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--turn", type=int, default=24)
    given = parser.parse_args()
    backbone = load_backbone(given.model)
    environments = Environments(f"{CALCULATOR}:Calculator", 10.0)
    environments.reset({str(i): ("0", {"answer": 0}) for i in range(given.rows)})
    messages = ({"role": "user", "content": "What is 2 + 2?"},)
    prompt = Prompt("p", messages, prompt_tokens("p", backbone.tokenizer, messages))
    paths = [("bench", i) for i in range(given.rows)]
    everything = frozenset(range(len(backbone.tokenizer)))

    def timed(length: int, cut: Cut | None) -> tuple[int, float]:
        start = time.perf_counter()
        stop = everything if cut else frozenset[int]()
        sampling = Sampling(given.rows, length)
        drawn = _decode(backbone.model, stop, [prompt], sampling, 1, paths, lambda *_: None, cut)
        return max(len(ids) for ids, _, _ in drawn), time.perf_counter() - start

    timed(4, None)
    length, turns = timed(TURNS * (given.turn + 64), Cut(backbone, environments, given.turn))
    _, one = timed(length, None)
    environments.close()
    sys.stdout.write(
        f"{given.rows} rows, {length} tokens each\n"
        f"{TURNS} turns: {given.rows * length / turns:.1f} tokens/s\n"
        f"one turn: {given.rows * length / one:.1f} tokens/s\n"
    )


if __name__ == "__main__":
    main()
