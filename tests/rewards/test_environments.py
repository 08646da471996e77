"""Environments in their process: a bad call is an observation, a broken class ends the run."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from mlx_grpo.core.errors import InputError
from mlx_grpo.rewards.environments import Action, Environments

FILE = Path(__file__).parent.parent / "helpers" / "environments.py"


@pytest.fixture(scope="module")
def counters() -> Iterator[Environments]:
    made = Environments(f"{FILE}:Counter", timeout=0.3)
    yield made
    made.close()


def opened(environments: Environments, *rows: str) -> Environments:
    environments.reset({row: (f"seed/{row}", {"id": "p"}) for row in rows})
    return environments


def test_tools_are_described_by_types_and_docstrings(counters: Environments) -> None:
    described = {t["function"]["name"]: t["function"] for t in counters.tools}
    assert set(described) == {"add", "draw", "fail", "hang", "flood", "swell"}
    assert described["add"]["parameters"]["properties"]["number"]["type"] == "integer"
    assert counters.rewards


def test_each_row_has_an_environment_of_its_own(counters: Environments) -> None:
    opened(counters, "a", "b")
    calls = [Action(row, "add", {"number": n}) for row, n in (("a", 1), ("b", 5), ("a", 2))]
    assert [o.text for o in counters.call(calls)] == ["total 1", "total 5", "total 3"]
    outcomes = counters.finish(["a", "b"])
    assert [o.reward for o in outcomes] == [3.0, 5.0]
    assert [o.state for o in outcomes] == [{"total": 3}, {"total": 5}]


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("fail", {}, "it fails"),
        ("hang", {}, "no answer within 0.3 s"),
        ("flood", {}, "1,000,000 characters"),
        ("swell", {}, "MemoryError"),
        ("add", {}, "missing a required argument"),
        ("add", {"number": "two"}, "unsupported operand"),
        ("reset", {}, "there is no tool 'reset'"),
        ("_secret", {}, "there is no tool"),
    ],
)
def test_a_call_that_fails_is_an_observation(
    counters: Environments, name: str, arguments: dict[str, str], said: str
) -> None:
    opened(counters, "a")
    (found,) = counters.call([Action("a", name, arguments)])
    assert found.failed and said in found.text
    (after,) = counters.call([Action("a", "add", {"number": 1})])
    assert (after.text, after.failed) == ("total 1", False)
    counters.finish(["a"])


def test_random_numbers_depend_on_the_row_alone(counters: Environments) -> None:
    def drawn(*rows: str) -> dict[str, list[str]]:
        opened(counters, *rows)
        found = {row: [] for row in rows}
        for _ in range(2):
            results = counters.call([Action(row, "draw", {}) for row in rows])
            for row, o in zip(rows, results, strict=True):
                found[row].append(o.text)
        counters.finish(rows)
        return found

    together, alone = drawn("a", "b"), drawn("b")
    assert together["b"] == alone["b"]
    assert together["a"] != together["b"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Untyped", "tool"),
        ("Nothing", "has no function 'Nothing'"),
    ],
)
def test_a_class_that_cannot_be_used_is_refused_in_a_line(name: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as e:
        Environments(f"{FILE}:{name}", timeout=5)
    assert "\n" not in str(e.value)


def test_a_reset_that_raises_ends_the_run_with_the_place() -> None:
    broken = Environments(f"{FILE}:BreaksAtReset", timeout=5)
    with pytest.raises(InputError, match=r"no dice \(environments.py:\d+\)"):
        broken.reset({"a": ("s", {"id": "p"})})
    broken.close()


def test_a_class_that_cannot_be_interrupted_names_the_flag_that_gives_it_longer() -> None:
    deaf = Environments(f"{FILE}:Deaf", timeout=0.2)
    with pytest.raises(InputError, match=r"no answer within 0\.4 s; .* raise --tool-timeout"):
        deaf.reset({"a": ("s", {"id": "p"})})
