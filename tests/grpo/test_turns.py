"""Turns: observations follow in the row, only what the model said is trained on."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_grpo.config.settings import train_config
from mlx_grpo.console.output import Console
from mlx_grpo.core.errors import InputError
from mlx_grpo.core.padding import completion_arrays, row_lengths
from mlx_grpo.core.types import Completion, Group, Prompt
from mlx_grpo.data.chat import prompt_tokens
from mlx_grpo.data.tools import Tools, calls_in
from mlx_grpo.grpo.logprob import token_logps
from mlx_grpo.grpo.loss import Clip, LossInputs, clipped_surrogate, token_weights
from mlx_grpo.grpo.rollout import Sampling, rollout
from mlx_grpo.grpo.turns import Acting
from mlx_grpo.models.backbone import Backbone
from mlx_grpo.models.decoder import Decoder
from mlx_grpo.models.lora import lora_parameters, set_parameters
from mlx_grpo.rewards.environments import Environments
from mlx_grpo.run import log
from mlx_grpo.training.loop import train
from tests.helpers.groups import actor_of, group_of, staged_gradients
from tests.helpers.rounding import apart
from tests.helpers.tiny import EOS, write_acting_model

FILE = Path(__file__).parent.parent / "helpers" / "environments.py"
STOP = frozenset({EOS, *range(40, 100)})
"""Many, so that a random model ends many turns."""


def adds(text: str, _: Any) -> Any:
    """Every third call is malformed, by the bytes that the model happens to say."""
    if len(text) % 3 == 0:
        raise ValueError("no call")
    return {"name": "add", "arguments": {"number": len(text)}}


TOOLS = Tools(({"function": {"name": "add", "parameters": {}}},), True, "", "", adds)


@pytest.fixture(scope="module")
def counters() -> Iterator[Environments]:
    made = Environments(f"{FILE}:Counter", timeout=5)
    yield made
    made.close()


@pytest.fixture
def prompts(backbone: Backbone) -> list[Prompt]:
    found = []
    for word in ("tea", "snow and rain", "figs"):
        messages = ({"role": "user", "content": word},)
        found.append(Prompt(word, messages, prompt_tokens(word, backbone.tokenizer, messages)))
    return found


def every_turn_calls(monkeypatch: pytest.MonkeyPatch, parser: Any = adds) -> None:
    """A call in any text: a random model writes no marker of one."""
    marked = replace(TOOLS, start="\x00", parser=parser)
    monkeypatch.setattr(
        "mlx_grpo.grpo.turns.calls_in", lambda _, text: calls_in(marked, "\x00" + text)
    )


def draw(
    backbone: Backbone, prompts: list[Prompt], acting: Acting | None, sampling: Sampling
) -> list[Group]:
    model, tokenizer = backbone.model, backbone.tokenizer
    return rollout(model, tokenizer, STOP, prompts, sampling, 1, "test", acting=acting)


def completions(groups: list[Group]) -> list[Completion]:
    return [c for g in groups for c in g.completions]


def test_rows_in_turns_are_what_they_are_alone(
    backbone: Backbone,
    prompts: list[Prompt],
    counters: Environments,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    every_turn_calls(monkeypatch)
    acting = Acting(counters, TOOLS, 0)
    together = completions(draw(backbone, prompts, acting, Sampling(3, 160)))
    in_waves = completions(draw(backbone, prompts, acting, Sampling(3, 160, decode_rows=3)))
    assert [c.token_ids for c in together] == [c.token_ids for c in in_waves]
    assert [c.outcome for c in together] == [c.outcome for c in in_waves]
    assert len({c.calls for c in together}) > 1 and any(c.failures for c in together)


def test_log_probs_and_tokens_are_those_of_the_conversation(
    backbone: Backbone,
    prompts: list[Prompt],
    counters: Environments,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    every_turn_calls(monkeypatch)
    groups = draw(backbone, prompts, Acting(counters, TOOLS, 2), Sampling(2, 200))
    decoder, seen = Decoder(backbone.model), 0
    for group in groups:
        tokens, mask = completion_arrays(group.completions)
        again = token_logps(decoder, mx.array([group.prompt.token_ids]), tokens, mask)
        for c, row in zip(group.completions, np.array(again), strict=True):
            assert len(c.by_model) == len(c.token_ids) and c.by_model[-1]
            own = np.array(c.by_model)
            assert np.abs(np.array(c.logps) - row[: len(own)])[own].max() < apart(1e-4)
            assert (np.array(c.logps)[~own] == 0).all() and (row[: len(own)][~own] == 0).all()
            observed = backbone.tokenizer.decode(np.array(c.token_ids)[~own].tolist())
            for m in c.turns:
                if m["role"] == "tool":
                    seen += 1
                    assert f"<tool>{m['content']}" in observed
            assert c.calls <= 3
    assert seen


def test_two_hundred_malformed_calls_end_nothing(
    backbone: Backbone,
    prompts: list[Prompt],
    counters: Environments,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wrong = [{"name": 3}, "text", None, {"name": "add", "arguments": []}, {"name": "x"}, {}]
    given = count()

    def parser(text: str, _: Any) -> Any:
        n = next(given) % 7
        if n == 6:
            raise KeyError("x")
        return wrong[n]

    every_turn_calls(monkeypatch, parser)
    found = completions(draw(backbone, prompts, Acting(counters, TOOLS, 0), Sampling(8, 720)))
    assert sum(c.failures for c in found) == sum(c.calls for c in found) >= 200


def test_an_environment_without_tools_changes_no_bit(
    train_arguments: dict[str, Any], tmp_path: Path
) -> None:
    plain = train_config(**{**train_arguments, "num_iterations": 2})
    with_one = train_config(
        **{
            **train_arguments,
            "num_iterations": 2,
            "output": str(tmp_path / "other"),
            "environment": f"{FILE}:OneTurn",
        }
    )
    for config in (plain, with_one):
        assert train(config, Console(quiet=True))
    first, second = (
        (c.run_directory / "final" / "adapters.safetensors").read_bytes() for c in (plain, with_one)
    )
    assert first == second


def test_a_run_shows_its_turns_and_counts_its_calls(
    train_arguments: dict[str, Any], tmp_path: Path
) -> None:
    changes = {
        "actor_model": str(write_acting_model(tmp_path / "acting")),
        "rm_model": "none",
        "environment": f"{FILE}:Adder",
        "reward": (f"{FILE}:as_in_trl",),
        "max_prompt_length": 1000,
        "max_completion_length": 140,
        "num_iterations": 1,
        "output": str(tmp_path / "run"),
    }
    config = train_config(**{**train_arguments, **changes})
    assert train(config, Console(quiet=True))
    rows = log.read(tmp_path / "run" / "completions.jsonl")
    (figures,) = [r for r in log.read(tmp_path / "run" / "metrics.jsonl") if "reward" in r]
    said = [m for row in rows for m in row["turns"]]
    answers = [m for m in said if m["role"] == "user"]
    assert answers and all("<tool_response>" in m["content"] for m in answers)
    turns = sum(m["role"] == "assistant" for m in said) / len(rows)
    assert figures["completions/mean_turns"] == pytest.approx(turns)
    assert figures["tools/call_frequency"] >= len(answers) / len(rows)
    assert 0 < figures["tools/failure_frequency"] < 1
    assert figures["completions/mean_tool_tokens"] > 0
    assert figures["rewards/as_in_trl/mean"] == 2 * figures["rewards/Adder/mean"]


def test_an_opening_joins_the_prompt_of_its_group(
    backbone: Backbone, prompts: list[Prompt]
) -> None:
    for name, opened in (("Greeting", True), ("Unsettled", False)):
        environments = Environments(f"{FILE}:{name}", timeout=5)
        acting = Acting(environments, replace(TOOLS, schemas=()), 0)
        if opened:
            (group, *_) = draw(backbone, prompts, acting, Sampling(2, 4))
            assert group.prompt.messages[-1]["content"] == "tea\nhello tea"
            assert "hello tea" in backbone.tokenizer.decode(list(group.prompt.token_ids))
        else:
            with pytest.raises(InputError, match="in 2 ways"):
                draw(backbone, prompts, acting, Sampling(2, 4))
        environments.close()


HOLES = mx.array([[1, 1, 0, 0, 0, 1, 1, 0, 1], [1, 0, 0, 1, 0, 0, 0, 0, 0], [1] + [0] * 8])


def test_lengths_reach_over_observations() -> None:
    assert row_lengths(HOLES.astype(mx.float32)) == [9, 4, 1]


def test_gradients_over_turns_are_those_of_the_masked_loss() -> None:
    mask = HOLES.astype(mx.float32)
    group = replace(group_of(), mask_KT=mask)
    weights = token_weights(mask, "sequence", 3, int(mask.sum().item()), 16)
    actor = actor_of("llama")
    found, _ = staged_gradients(Decoder(actor), group, weights, Clip())
    prompt = len(group.prompt_ids)
    rows = mx.concatenate(
        [mx.broadcast_to(mx.array(group.prompt_ids), (3, prompt)), group.tokens_KT], axis=1
    )

    def plain(parameters: Any) -> mx.array:
        set_parameters(actor, parameters)
        logits = actor(rows)[:, prompt - 1 : -1]
        logps = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        logp_KT = mx.take_along_axis(logps, group.tokens_KT[..., None], axis=-1)[..., 0] * mask
        inputs = LossInputs(group.sampled_logp_KT * mask, group.advantages_K, mask, weights)
        return clipped_surrogate(logp_KT, inputs, Clip())[0]

    expected = mx.grad(plain)(lora_parameters(actor))
    assert max(mx.abs(found[n] - expected[n]).max().item() for n in expected) < 1e-5


def test_the_tokens_of_a_last_observation_change_no_gradient() -> None:
    """Behind the last token of the model nothing depends on them, so only a target could."""
    mask = mx.array([[1, 1, 0, 0, 0, 0, 0, 0, 0]] * 3).astype(mx.float32)
    weights = token_weights(mask, "sequence", 3, 6, 16)
    first = replace(group_of(), mask_KT=mask)
    tokens = mx.array(first.tokens_KT)
    tokens[:, 2:] = (tokens[:, 2:] + 17) % 250
    decoder = Decoder(actor_of("llama"))
    (one, logps), (other, others) = (
        staged_gradients(decoder, replace(first, tokens_KT=t), weights, Clip())
        for t in (first.tokens_KT, tokens)
    )
    assert (logps == others).all().item()
    assert all((one[n] == other[n]).all().item() for n in one)
