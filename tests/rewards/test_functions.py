"""Scores become comparable over a run; a user's reward function may be anything and fails with one
line."""

import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from mlx_grpo.config.settings import train_config
from mlx_grpo.console.output import Console
from mlx_grpo.core.errors import InputError
from mlx_grpo.core.types import Group
from mlx_grpo.models.reward_model import RewardModel
from mlx_grpo.rewards.functions import CustomReward, load_reward
from mlx_grpo.rewards.mix import RewardMix
from mlx_grpo.rewards.normalizer import ScoreNormalizer
from mlx_grpo.rewards.worker import call
from mlx_grpo.training.setup import load_learner
from tests.helpers.answers import group


def here(name: str, function: Callable[..., Any], weight: float = 1.0) -> CustomReward:
    """A reward function called as its worker would, in this process."""
    return CustomReward(name, lambda arguments, _: call(function, arguments), weight)


@pytest.fixture
def write(tmp_path: Path) -> Iterator[Callable[[str], str]]:
    """Write a reward file whose module is forgotten afterwards."""
    before = dict(sys.modules)

    def write_file(source: str) -> str:
        path = tmp_path / "my_rewards.py"
        path.write_text(source)
        return str(path)

    yield write_file
    for name in sys.modules.keys() - before.keys():
        if name.startswith("my_rewards"):
            del sys.modules[name]


def test_the_first_batch_sets_mean_and_standard_deviation() -> None:
    normalizer = ScoreNormalizer().observe([1.0, 3.0])
    assert (normalizer.mean, normalizer.std) == (2.0, 1.0)
    assert normalizer(3.0) == pytest.approx(1.0, abs=2e-6)


def test_later_batches_move_both_by_one_minus_alpha() -> None:
    normalizer = ScoreNormalizer(alpha=0.9).observe([1.0, 3.0]).observe([10.0, 16.0])
    assert normalizer.mean == pytest.approx(0.9 * 2 + 0.1 * 13)
    assert normalizer.std == pytest.approx(0.9 * 1 + 0.1 * 3)


def test_observing_leaves_the_old_normaliser_as_it_was() -> None:
    first = ScoreNormalizer(limit=2.0).observe([1.0, 3.0])
    second = first.observe([9.0, 9.5])
    assert (first.mean, first.std) == (2.0, 1.0)
    assert (second.limit, second.alpha) == (2.0, 0.99)


@pytest.mark.parametrize(("score", "z"), [(1e9, 3.0), (-1e9, -3.0)])
def test_outliers_are_clipped(score: float, z: float) -> None:
    assert ScoreNormalizer(limit=3.0).observe([0.0, 1.0])(score) == z


def test_equal_scores_normalise_to_zero() -> None:
    assert ScoreNormalizer().observe([4.0] * 6)(4.0) == 0.0


@pytest.mark.parametrize("equal", [0.0, 0.1, 4.0])  # 0.1: the mean of 36 of them is not quite it
def test_a_first_batch_without_spread_does_not_clip_the_later_ones(equal: float) -> None:
    second = [equal + 1, equal + 0.5, *[equal] * 34]
    after = ScoreNormalizer().observe([equal] * 36).observe(second)
    assert after.std == pytest.approx(np.std(second))
    assert after(equal) < 1 < after(equal + 0.5) < after(equal + 1)


def test_a_fresh_normaliser_refuses_to_normalise() -> None:
    with pytest.raises(RuntimeError, match="observe a batch"):
        ScoreNormalizer()(1.0)


def test_a_reward_gets_everything_there_is_by_keyword() -> None:
    seen: dict[str, Any] = {}

    def spy(**arguments: Any) -> list[float]:
        seen.update(arguments)
        return [0.0, 1.0]

    here("spy", spy)(group("a", "bc", topic="drinks"))
    assert seen == {
        "prompt": "say tea",
        "messages": list(group().prompt.messages),
        "completions": ["a", "bc"],
        "completion_ids": [[97], [98, 99]],
        "finish_reasons": ["stop", "stop"],
        "id": "p1",
        "response": None,
        "topic": "drinks",
    }


def test_a_reward_may_ask_for_some_arguments_only() -> None:
    def longest(completions: list[str], topic: str) -> list[int]:
        return [len(c) + len(topic) for c in completions]

    assert here("longest", longest)(group("a", "bc", topic="xyz")) == [4.0, 5.0]


def raises(completions: list[str]) -> list[float]:
    raise ZeroDivisionError("by hand")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (raises, "reward 'r' failed on prompt 'p1': ZeroDivisionError: by hand"),
        (lambda topic: [1.0], "'p1': it asks for 'topic', which the prompt's row does not have"),
        (lambda: None, "'p1': it returned NoneType, not a list with a number per completion"),
        (lambda: 1.0, "'p1': it returned float, not a list with a number per completion"),
        (lambda: ["good", "bad"], "'p1': it returned 'good' for completion 1, which is no number"),
        (lambda: ["1", "2"], "'p1': it returned '1' for completion 1, which is no number"),
        (lambda: [1.0, [2.0]], "failed on prompt 'p1': TypeError"),
        (lambda: {0: 1.0, 1: 2.0}, "it returned dict, not a list with a number per completion"),
        (lambda: {1.0, 2.0}, "it returned set, not a list with a number per completion"),
        (lambda: "12", "it returned str, not a list with a number per completion"),
        (
            lambda completions: [c[0]["content"] for c in completions],
            "a completion is a text here: write completion for completion[0]['content']",
        ),
        (lambda: [1.0], "returned 1 scores for 2 completions"),
        (lambda: exit(3), "failed on prompt 'p1': SystemExit: 3"),
    ],
)
def test_a_failing_reward_is_reported_in_one_line(
    function: Callable[..., Any], message: str
) -> None:
    with pytest.raises(InputError) as failure:
        here("r", function)(group("a", "b"))
    assert message in str(failure.value)
    assert "\n" not in str(failure.value)


def test_a_function_that_names_prompts_is_called_as_trl_calls_it() -> None:
    def equals(prompts: list[str], completions: list[str], answer: list[str], **_: Any) -> Any:
        assert prompts == ["say tea"] * 3
        return [float(c == a) for c, a in zip(completions, answer, strict=True)]

    def named(prompts: list[str], completions: list[str], id: list[str]) -> list[float]:
        return [float(len(p) + len(i)) for p, i in zip(prompts, id, strict=True)]

    asked = group("the", "tea", "t", answer="tea")
    assert here("equals", equals)(asked) == [0.0, 1.0, 0.0]
    assert here("named", named)(asked) == [9.0, 9.0, 9.0]


def test_a_row_with_a_field_called_prompts_keeps_it() -> None:
    asked = group("a", "b", prompts="mine")
    assert here("f", lambda prompts: [prompts == "mine"] * 2)(asked) == [1.0, 1.0]


def test_a_function_that_takes_everything_gets_the_fields_as_they_are() -> None:
    ours = here("ours", lambda completions, prompt, answer, **_: [c == answer for c in completions])
    assert ours(group("tea", "t", answer="tea")) == [1.0, 0.0]


def test_a_reward_loads_from_a_file(write: Callable[[str], str]) -> None:
    file = write("def count(completions):\n    return [len(c) for c in completions]\n")
    reward = load_reward(f"{file}:count", weight=0.5)
    assert (reward.name, reward.weight) == ("count", 0.5)
    assert reward(group("a", "bcd")) == [1.0, 3.0]


def test_a_failure_says_where_in_the_users_file(write: Callable[[str], str]) -> None:
    source = "import json\ndef parse(text):\n    return json.loads(text)\n"
    file = write(source + "def marks(completions):\n    return [parse(c) for c in completions]\n")
    with pytest.raises(InputError, match=r"JSONDecodeError: .* \(my_rewards\.py:3\)$"):
        load_reward(f"{file}:marks")(group("a"))


def test_a_reward_file_may_import_what_lies_beside_it(
    write: Callable[[str], str], tmp_path: Path
) -> None:
    (tmp_path / "my_rewards_helper.py").write_text("def size(text):\n    return len(text)\n")
    (tmp_path / "string.py").write_text("raise RuntimeError('not the real one')\n")
    file = write(
        "import string\nfrom my_rewards_helper import size\n"
        "def sizes(completions):\n    return [size(c) for c in completions]\n"
    )
    assert load_reward(f"{file}:sizes")(group("a", "bcd")) == [1.0, 3.0]


def test_a_reward_loads_from_a_module() -> None:
    assert load_reward("statistics:mean").name == "mean"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("count", "module:function or file.py:function"),
        ("module:", "module:function or file.py:function"),
        (":count", "module:function or file.py:function"),
        ("no_such_module_here:f", "cannot import 'no_such_module_here'"),
        ("no/such/file.py:f", "cannot import 'no/such/file.py'"),
        ("statistics:no_such_function", "has no function 'no_such_function'"),
        ("math:pi", "has no function 'pi'"),
    ],
)
def test_a_spec_that_leads_nowhere_is_refused(spec: str, message: str) -> None:
    with pytest.raises(InputError) as failure:
        load_reward(spec)
    assert str(failure.value).startswith(f"reward function {spec}: ")
    assert message in str(failure.value)


@pytest.mark.parametrize("source", ["def count(:\n", "count = undefined\n", "1 / 0\n"])
def test_a_reward_file_that_does_not_run_is_refused(
    write: Callable[[str], str], source: str
) -> None:
    file = write(source)
    with pytest.raises(InputError, match=r"my_rewards\.py"):
        load_reward(f"{file}:count")


def test_a_reward_file_does_not_take_the_place_of_a_module_of_the_same_name(
    tmp_path: Path,
) -> None:
    file = tmp_path / "json.py"
    file.write_text("def one(completions):\n    return [1.0] * len(completions)\n")
    try:
        assert load_reward(f"{file}:one")(group("a")) == [1.0]
        assert sys.modules["json"] is json
    finally:
        sys.modules["json"] = json


class FixedScores:
    """Stands in for a reward model."""

    def score(self, scored: Group) -> list[float]:
        return [10.0 * len(c.text) for c in scored.completions]


def test_a_mix_adds_weighted_sources_and_keeps_the_raw_parts() -> None:
    length = here("length", lambda completions: [len(c) for c in completions], -2.0)
    vowel = here("vowel", lambda completions: [c[0] in "aeiou" for c in completions])
    mix = RewardMix(cast(RewardModel, FixedScores()), 0.5, (length, vowel))
    totals, parts = mix([group("a", "bcd"), group("ef", "g")])
    assert totals == [[5.0 - 2 + 1, 15.0 - 6], [10.0 - 4 + 1, 5.0 - 2]]
    assert parts == {
        "reward_model": [10.0, 30.0, 20.0, 10.0],
        "length": [1.0, 3.0, 2.0, 1.0],
        "vowel": [1.0, 0.0, 1.0, 0.0],
    }


def test_a_mix_without_a_reward_model_uses_the_functions_alone() -> None:
    length = here("length", lambda completions: [len(c) for c in completions])
    assert RewardMix(None, 1.0, (length,))([group("a", "bcd")]) == (
        [[1.0, 3.0]],
        {"length": [1.0, 3.0]},
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_source_whose_score_is_not_finite_is_named(value: float) -> None:
    class Broken:
        def score(self, group: Group) -> list[float]:
            return [1.0, value]

    mix = RewardMix(cast(RewardModel, Broken()), 1.0, (here("length", lambda: [1.0, 2.0]),))
    with pytest.raises(InputError, match=r"reward 'reward_model' returned .* on prompt 'p1'"):
        mix.check_finite(group("a", "b"))
    RewardMix(None, 1.0, mix.custom).check_finite(group("a", "b"))


def test_a_reward_file_may_define_dataclasses(write: Callable[[str], str]) -> None:
    path = write(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Mark:\n    value: float = 2.0\n"
        "def marks(completions):\n    return [Mark().value for _ in completions]\n"
    )
    assert load_reward(f"{path}:marks")(group("a", "b")) == [2.0, 2.0]


def test_a_weight_of_zero_measures_and_trains_nothing_even_where_it_is_not_a_number() -> None:
    gold = here("gold", lambda completions: [math.nan, 7.0], 0.0)
    length = here("length", lambda completions: [len(c) for c in completions])
    mix = RewardMix(None, 1.0, (length, gold))
    totals, by_source = mix([group("a", "bcd")])
    assert totals == [[1.0, 3.0]]
    assert by_source["gold"][1] == 7.0
    mix.check_finite(group("a", "bcd"))


def test_a_function_under_a_name_that_figures_have_is_refused(
    train_arguments: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(
        "def reward(completions):\n    return [0.0] * len(completions)\n"
    )
    config = train_config(**{**train_arguments, "reward": (f"{tmp_path / 'mine.py'}:reward",)})
    with pytest.raises(InputError, match="--reward: the name 'reward' is taken"):
        load_learner(config, Console(quiet=True))
