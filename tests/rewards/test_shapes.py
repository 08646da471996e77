"""Reward functions as people write them: asynchronous, silent where they do not apply, written for
columns that are lists, given as Python objects."""

import asyncio
import copy
import inspect
import itertools
import json
import math
import pickle
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from difflib import SequenceMatcher
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from mlx_grpo import GRPOConfig, train
from mlx_grpo.config.sources import build_config
from mlx_grpo.console.output import Console
from mlx_grpo.core.errors import InputError
from mlx_grpo.core.stats import source_means
from mlx_grpo.core.types import Group
from mlx_grpo.evaluation.compare import compare_run
from mlx_grpo.grpo.evaluate import Evaluation
from mlx_grpo.rewards.functions import CustomReward, given_reward, load_reward, named
from mlx_grpo.rewards.mix import RewardMix
from mlx_grpo.rewards.worker import RewardError, call
from mlx_grpo.run import log
from mlx_grpo.run.directory import CONFIG
from mlx_grpo.training.loop import train as train_run
from tests.helpers.answers import group

Scores = list[float | None]


def here(name: str, function: Callable[..., Any], weight: float = 1.0) -> CustomReward:
    """A reward function called as its worker would, in this process."""
    return CustomReward(name, lambda arguments, _: call(function, arguments), weight)


def scores(function: Callable[..., Any], *texts: str, **fields: Any) -> Scores:
    return here("f", function)(group(*texts, **fields))


# asynchronous ones


async def after_a_while(completions: list[str]) -> list[int]:
    await asyncio.sleep(0)
    return [len(c) for c in completions]


class Asynchronous:
    async def __call__(self, completions: list[str]) -> list[int]:
        return await after_a_while(completions)


@pytest.mark.parametrize(
    "function", [after_a_while, Asynchronous(), lambda completions: after_a_while(completions)]
)
def test_an_asynchronous_function_is_waited_for(function: Callable[..., Any]) -> None:
    assert scores(function, "a", "bcd") == [1.0, 3.0]


def test_what_it_keeps_between_calls_belongs_to_one_event_loop() -> None:
    loops = []

    async def remembers(completions: list[str]) -> list[float]:
        loops.append(asyncio.get_running_loop())
        return [0.0] * len(completions)

    assert scores(remembers, "a") == scores(remembers, "b") == [0.0]
    assert loops[0] is loops[1]


def test_it_may_be_called_where_a_loop_runs_already() -> None:
    async def notebook() -> Scores:
        return scores(after_a_while, "ab")

    assert asyncio.run(notebook()) == [2.0]


def test_an_asynchronous_function_fails_in_one_line_with_its_place(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("async def f(completions):\n    raise KeyError('a')\n")
    reward = load_reward(f"{file}:f")
    with pytest.raises(InputError, match=r"reward 'f' failed on prompt 'p1': KeyError: 'a'"):
        reward(group("a"))


def test_an_asynchronous_function_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "import asyncio\n"
        "async def f(completions):\n"
        "    await asyncio.sleep(0)\n"
        "    return [None if c == 'a' else len(c) for c in completions]\n"
    )
    assert load_reward(f"{file}:f")(group("a", "bc")) == [None, 2.0]


# None


def test_a_source_that_does_not_apply_is_left_out_of_sum_and_mean() -> None:
    length = here("length", lambda completions: [len(c) for c in completions])
    sums = here("sums", lambda completions: [2.0 if "=" in c else None for c in completions], 3.0)
    totals, parts = RewardMix(None, 1.0, (length, sums))([group("1=1", "tea")])
    assert totals == [[3.0 + 6.0, 3.0]]
    assert parts == {"length": [3.0, 3.0], "sums": [2.0, None]}
    assert source_means(parts, "rewards") == {"rewards/length/mean": 3, "rewards/sums/mean": 2}


def test_a_completion_that_no_source_scores_counts_as_nothing() -> None:
    mix = RewardMix(None, 1.0, (here("f", lambda: [None, 1.0]),))
    assert mix([group("a", "b")])[0] == [[0.0, 1.0]]
    mix.check_finite(group("a", "b"))


def test_a_group_that_no_source_scores_is_refused() -> None:
    mute = here("mute", lambda completions: [None] * len(completions))
    gold = here("gold", lambda completions: [1.0] * len(completions), 0.0)
    with pytest.raises(InputError, match="prompt 'p1': every reward function returned None for al"):
        RewardMix(None, 1.0, (mute, gold))([group("a", "b")])
    assert RewardMix(None, 1.0, (mute,))([group("a")])[0] == [[0.0]]  # an evaluation's one answer
    assert RewardMix(None, 1.0, (gold,))([group("a", "b")])[0] == [[0.0, 0.0]]


def test_means_of_a_source_that_never_applies_are_left_out() -> None:
    evaluation = Evaluation(0, 0, 1, 1, 1, (0.0,), (), {"f": [None], "g": [1.0, None, 3.0]})
    assert "eval_rewards/f/mean" not in evaluation.metrics()
    assert evaluation.metrics()["eval_rewards/g/mean"] == 2.0


# scores of any size


@pytest.mark.parametrize(("value", "weight"), [(1e200, 1.0), (-1e19, 1.0), (1e12, 1e9)])
def test_a_score_that_32_bits_cannot_work_with_is_one_line(value: float, weight: float) -> None:
    mix = RewardMix(None, 1.0, (here("huge", lambda: [0.0, value], weight),))
    with pytest.raises(InputError, match=r"reward 'huge' returned .* on prompt 'p1', more than"):
        mix([group("a", "b")])


@pytest.mark.parametrize(("value", "weight"), [(1e18, 1.0), (1e200, 0.0), (math.inf, 1.0)])
def test_other_scores_pass(value: float, weight: float) -> None:
    mix = RewardMix(None, 1.0, (here("f", lambda: [0.0, value], weight),))
    assert mix([group("a", "b")])[1] == {"f": [0.0, value]}  # infinities are left to the caller


# columns


def zipped(completions: list[str], answer: str) -> list[float]:
    return [float(a in c) for c, a in zip(completions, answer, strict=False)]


def caught(completions: list[str], answer: str) -> list[float]:
    try:
        return zipped(completions, answer)
    except Exception:
        return [0.0] * len(completions)


def appended(completions: list[str], answer: str) -> list[float]:
    found = []
    for i in range(len(completions)):
        found.append(1.0 if completions[i].strip() == answer[i].strip() else 0.0)
    return found


def in_step(completions: list[str], answer: str) -> list[float]:
    right = iter(answer)
    return [float(c == next(right)) for c in completions]


async def gathered(completions: list[str], answer: str) -> list[float]:
    async def one(c: str, a: str) -> float:
        return float(a in c)

    return await asyncio.gather(*[one(c, a) for c, a in zip(completions, answer, strict=False)])


def filled(completions: list[str], answer: str) -> list[float]:
    return [float(a == c) for c, a in itertools.zip_longest(completions, answer, fillvalue="")]


def threaded(completions: list[str], answer: str) -> list[float]:
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda c, a: float(a in c), completions, answer))


def prepared(completions: list[str], answer: str) -> list[float]:
    right = [a.strip().lower() for a in answer]
    return [float(c.lower() == a) for c, a in zip(completions, right, strict=False)]


def copied(completions: list[str], **fields: Any) -> list[float]:
    own = copy.deepcopy(fields)
    return zipped(completions, own["answer"])


def yielding(completions: list[str], answer: str) -> Any:
    for c, a in zip(completions, answer, strict=False):
        yield float(a in c)


TRLS: list[Callable[..., Any]] = [
    zipped,
    caught,
    appended,
    in_step,
    gathered,
    filled,
    threaded,
    prepared,
    copied,
    yielding,
    lambda completions, answer, **_: [float(a in c) for a, c in zip(answer, completions)],  # noqa: B905
    lambda completions, **fields: zipped(completions, fields["answer"]),
    lambda completions, **fields: zipped(completions, fields.get("answer", [])),
    lambda completions, answer: zipped(completions, answer[:]),
    lambda completions, answer: zipped(completions, answer[: len(completions)]),
    lambda completions, answer: zipped(completions, list(answer)),
    lambda completions, answer: zipped(completions, copy.copy(answer)),
    lambda completions, answer: list(map(lambda c, a: float(c == a), completions, answer)),
    lambda completions, answer: [float(c == answer[i]) for i, c in enumerate(completions)],
    lambda completions, answer: [float(completions[i] == a) for i, a in enumerate(answer)],
    lambda completions, answer: [float(completions[i] == answer[i]) for i in range(len(answer))],
    lambda completions, answer: [float(c == answer[0]) for c in completions],
    lambda completions, answer: [float(c == answer[-1]) for c in completions],
    lambda completions, answer: [float(c == a) for c, a in zip(completions, reversed(answer))],  # noqa: B905
    lambda completions, answer: [float(c == set(answer).pop()) for c in completions],
    lambda completions, answer: [float(pair[0] in pair[1]) for pair in zip(answer, completions)],  # noqa: B905
    lambda completions, answer: [float(dict(zip(completions, answer))[c] == c) for c in completions],  # noqa: B905, E501
    lambda completions, answer: [float(c == a) for c, a in zip(completions, answer, strict=True)],
    lambda completions, answer: zipped(completions, [*answer]),
    lambda completions, answer: zipped(completions, answer)[:2],
    lambda completions, id: [float(i in c) for c, i in zip(completions, id)],  # noqa: B905
]  # fmt: skip
COUNTS = [("tea",), ("the", "eel", "tea")]
"""An evaluation's one completion, and a group."""


@pytest.mark.parametrize("texts", COUNTS, ids=["one", "three"])
@pytest.mark.parametrize("function", TRLS)
def test_a_function_that_takes_a_text_for_a_list_of_them_is_told(
    function: Callable[..., Any], texts: tuple[str, ...]
) -> None:
    for answer in ("tea", "t", "a longer text than there are completions"):
        with pytest.raises(InputError) as failure:
            scores(function, *texts, answer=answer)
        line = str(failure.value)
        assert "letter by letter" in line and "is one text for all completions here" in line
        assert "add `prompts` to the function's arguments" in line and "write str(" in line
        assert "(test_shapes.py:" in line or function in (gathered, threaded)


@pytest.mark.parametrize("texts", COUNTS, ids=["one", "three"])
def test_each_of_them_is_right_once_it_names_prompts(texts: tuple[str, ...]) -> None:
    def with_prompts(completions: list[str], prompts: list[str], answer: list[str]) -> Any:
        pairs = zip(completions, answer, strict=True)
        return [float(a in c) + float(any(x in c for x in a)) for c, a in pairs]

    assert scores(with_prompts, *texts, answer="tea") == [2.0 if t == "tea" else 1.0 for t in texts]


def plainly(function: Callable[..., Any], asked: Group) -> Scores:
    """What it gives for ordinary texts."""
    named = inspect.signature(function).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in named.values())

    def direct(arguments: dict[str, Any], _: Any) -> Scores:
        wanted = {n: v for n, v in arguments.items() if takes_all or n in named}
        return [float(value) for value in function(**wanted)]

    return CustomReward("f", direct)(asked)


OURS: list[Callable[..., Any]] = [
    lambda completions, answer: [float(answer in c) for c in completions],
    lambda completions, answer, **_: [float(c == answer) for c in completions],
    lambda completions, **fields: [float(c.strip() == fields["answer"]) for c in completions],
    lambda completions, answer: [float(c[0] == answer[:1]) for c in completions],
    lambda completions, answer: [float(c.startswith(answer[:2].upper())) for c in completions],
    lambda completions, answer: [float(answer.split()[0] in c.split()) for c in completions],
    lambda completions, answer: [float(len(set(answer.split()) & set(c))) for c in completions],
    lambda completions, answer: [float(bool(re.search(answer, c, re.I))) for c in completions],
    lambda completions, answer: [float(bool(re.match(c, answer))) for c in completions],
    lambda completions, answer: [abs(len(c) - len(answer)) for c in completions],
    lambda completions, answer: [float(c in answer) for c in completions],
    lambda completions, answer: [float("," in answer) for _ in completions],
    lambda completions, answer: [answer.index("b") for _ in completions],
    lambda completions, answer: [len(json.loads(json.dumps({"a": answer, "c": c}))) for c in completions],  # noqa: E501
    lambda completions, answer: [len(f"{answer}: {c}" + answer + answer * 2) for c in completions],
    lambda completions, answer: [{answer: 1.0}.get(c, 0.0) for c in completions],
    lambda completions, answer: [float(c == a) for c, a in zip(completions, [answer] * 3)],  # noqa: B905
    lambda completions, answer: [float(isinstance(answer, str)) for _ in completions],
    lambda completions, answer: [float(answer.lower().strip()[0] == c[0]) for c in completions],
    lambda completions, answer: [float(any(x in c for x in answer.strip().split("|"))) for c in completions],  # noqa: E501
    lambda completions, answer: [sum(c.count(x) for x in str(answer)) for c in completions],
    lambda completions, answer: [float(set(str(answer)) <= set(c)) for c in completions],
    lambda completions, answer: [SequenceMatcher(None, c, answer).ratio() for c in completions],
    lambda completions, answer: [SequenceMatcher(None, answer, c).ratio() for c in completions],
    lambda completions, answer: [len(re.compile(answer).findall(c)) for c in completions],
    lambda completions, answer: [float(fnmatch(c, answer)) for c in completions],
    lambda completions, prompt: [float(any(x in c for x in prompt)) for c in completions],
    lambda completions, finish_reasons: [float(r == "stop") for r in finish_reasons],
    lambda completions, messages: [len(messages[0]["content"][0]) for _ in completions],
]  # fmt: skip


@pytest.mark.parametrize("texts", [("ab",), ("ab", "bx", "cy")], ids=["one", "three"])
@pytest.mark.parametrize("function", OURS)
def test_a_text_is_a_text_to_all_else(function: Callable[..., Any], texts: tuple[str, ...]) -> None:
    expected = plainly(function, group(*texts, answer="abcd"))
    assert scores(function, *texts, answer="abcd") == expected


def test_a_list_that_belongs_to_the_completions_may_be_walked() -> None:
    assert scores(zipped, "a", "b", answer=["a", "x"]) == [1.0, 0.0]


def test_texts_and_completions_are_ordinary_ones_to_everything_else() -> None:
    seen: dict[str, Any] = {}

    def spy(completions: list[str], answer: str) -> list[float]:
        seen.update(completions=completions, answer=answer)
        return [0.0, 0.0]

    scores(spy, "a", "b", answer="xyz")
    answer, completions = seen["answer"], seen["completions"]
    assert isinstance(answer, str) and answer == "xyz" and {answer: 1}["xyz"] == 1
    assert json.dumps([answer, completions]) == '["xyz", ["a", "b"]]'
    for own in (pickle.loads(pickle.dumps(answer)), str(answer), answer.strip(), answer + ""):
        assert (type(own), own) == (str, "xyz")
    assert type(completions) is list
    assert (answer[1:], answer[-1:], completions[1:]) == ("yz", "z", ["b"])


# Python objects


@pytest.fixture
def own_rewards(train_arguments: dict[str, Any]) -> dict[str, Any]:
    return {**train_arguments, "rm_model": "none", "num_iterations": 2}


def short(completions: list[str]) -> list[float]:
    return [-float(len(c)) for c in completions]


def test_functions_may_be_given_from_python(own_rewards: dict[str, Any]) -> None:
    seen: list[str] = []

    def vowels(completions: list[str]) -> list[float]:
        seen.extend(completions)
        return [float(sum(c in "aeiou" for c in text)) for text in completions]

    config = GRPOConfig(**{**own_rewards, "reward_weights": (1.0, 0.5)})
    run = train(config, rewards=[short, vowels], quiet=True)
    assert run.finished and seen
    first = run.metrics()[1]
    total = first["rewards/short/mean"] + 0.5 * first["rewards/vowels/mean"]
    assert first["reward"] == pytest.approx(total, abs=1e-5)
    assert build_config(run.directory / CONFIG).reward.functions == (
        "python:short",
        "python:vowels",
    )
    state = json.loads(next(run.directory.glob("checkpoints/*/state.json")).read_text())
    assert {"--reward short", "--reward vowels"} <= state["inputs"].keys()


def test_a_run_goes_on_with_the_functions_it_was_given(own_rewards: dict[str, Any]) -> None:
    whole = train(GRPOConfig(**{**own_rewards, "checkpoint_every": 1}), rewards=[short], quiet=True)
    assert whole.finished
    config = GRPOConfig(**{**own_rewards, "checkpoint_every": 1})
    assert train(config, rewards=[short], resume=True, quiet=True).finished

    def other(completions: list[str]) -> list[float]:
        return [0.0 for _ in completions]

    other.__name__ = "short"
    with pytest.raises(InputError, match="--reward short other content"):
        train(config, rewards=[other], resume=True, quiet=True)
    with pytest.raises(
        InputError, match=r"resume it from there: train\(config, rewards=\[short\], "
    ):
        train_run(build_config(whole.directory / CONFIG), Console(quiet=True), resume=True)


def test_an_evaluation_leaves_out_what_was_given_from_python(
    own_rewards: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(GRPOConfig(**own_rewards), rewards=[short], quiet=True)
    gold = ("mlx_grpo.rubric:gold",)
    found = compare_run(run.directory, None, "", Console(quiet=True), judges=gold)
    assert "short was given from Python and is left out here" in capsys.readouterr().err
    assert list(found.before.by_source) == ["gold"]
    assert log.read(run.directory / log.METRICS)


def test_a_function_from_python_gets_copies_and_fails_in_one_line() -> None:
    def spoils(messages: list[Any], completions: list[str]) -> list[float]:
        messages[0]["content"] = "gone"
        raise ValueError("two\nlines")

    asked = group("a")
    reward = given_reward("python:spoils", 1.0, named([spoils]))
    with pytest.raises(InputError, match="reward 'spoils' failed on prompt 'p1': ValueError: two "):
        reward(asked)
    assert asked.prompt.messages[0]["content"] == "be kind"


@pytest.mark.parametrize(
    ("functions", "complaint"),
    [
        ([3], "rewards: must be functions, not int"),
        (len, "rewards: must be a list of functions, not builtin_function_or_method"),
        (None, "rewards: must be a list of functions, not NoneType"),
        (["mine.py:f"], "rewards: must be functions, not str"),
        ([short, short], "two functions are named 'short'"),
    ],
)
def test_what_is_no_function_is_refused(functions: list[Any], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        named(functions)


def test_weights_are_those_of_all_rewards(own_rewards: dict[str, Any]) -> None:
    config = GRPOConfig(**{**own_rewards, "reward_weights": (1.0, 2.0)})
    with pytest.raises(InputError, match="--reward-weights: must be as many numbers as --reward"):
        train(config, rewards=[short], quiet=True)


def test_a_run_without_any_reward_is_refused(own_rewards: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="--rm-model: must be a directory, or give --reward"):
        train(GRPOConfig(**own_rewards), quiet=True)


def test_a_number_that_is_none_is_an_error_of_its_own() -> None:
    with pytest.raises(RewardError, match="returned 1 scores for 2 completions"):
        call(lambda: [None], {"completions": ["a", "b"]})
