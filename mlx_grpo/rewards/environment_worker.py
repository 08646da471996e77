"""The process that holds a user's environments, one object per row of a rollout.

Run by path like `worker.py`, whose loading and pipes it shares. Each request holds actions for some
rows, and each action gets a result of its own: `{"text": ...}`, or `{"failure": ...}` where a tool
raised, took too long or was called wrongly. Environments that call `random` get numbers that depend
on their row alone: its state is kept per row.
"""

import contextlib
import importlib.util
import inspect
import json
import random
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LONGEST_RESULT = 20_000
"""Characters of one observation."""
NOT_TOOLS = frozenset({"reset", "reward", "close"})


class TimeIsUp(BaseException):
    """Not an Exception: a tool that catches those still ends."""


def tool_names(environment: Any) -> list[str]:
    """Public methods, without those that the trainer itself calls."""
    methods = inspect.getmembers(environment, inspect.ismethod)
    return [n for n, _ in methods if not n.startswith("_") and n not in NOT_TOOLS]


def schemas(environment: Any) -> list[dict[str, Any]]:
    """JSON schemas of the tools, from their types and docstrings.

    Raises:
        ValueError: a tool lacks a type or a docstring.
    """
    if not (names := tool_names(environment)):
        return []
    from transformers.utils import get_json_schema  # it takes seconds to load

    return [get_json_schema(getattr(environment, name)) for name in names]


class Rows:
    """The environments of a rollout by row."""

    def __init__(self, made: Callable[[], Any], timeout: float):
        self._made, self._timeout = made, timeout
        self._rows: dict[str, Any] = {}
        self._random: dict[str, Any] = {}

    def do(self, action: dict[str, Any]) -> dict[str, Any]:
        """The result of one action."""
        row, kind = action["row"], action["do"]
        with self._own_random(row, action.get("seed")), self._limit():
            if kind == "reset":
                return self._reset(row, action)
            if kind == "finish":
                return self._finish(row)
            return self._call(row, action["name"], action["arguments"])

    def _reset(self, row: str, action: dict[str, Any]) -> dict[str, Any]:
        self._rows[row] = environment = self._made()
        opening = environment.reset(**_taken(environment.reset, action["arguments"]))
        if opening is not None and not isinstance(opening, str):
            raise TypeError(f"reset returned {type(opening).__name__}, not a text or None")
        return {"text": opening}

    def _call(self, row: str, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        environment = self._rows[row]
        if name not in tool_names(environment):
            known = ", ".join(tool_names(environment))
            return {"failure": f"there is no tool {name!r}; there are: {known}"}
        try:
            inspect.signature(getattr(environment, name)).bind(**arguments)
            text = str(getattr(environment, name)(**arguments))
        except (Exception, SystemExit) as e:  # a user's code may raise anything
            return {"failure": (str(e) or type(e).__name__)[:LONGEST_RESULT]}
        except TimeIsUp:
            return {"failure": f"no answer within {self._timeout:g} s"}
        if len(text) > LONGEST_RESULT:
            return {"failure": f"the result has {len(text):,} characters, too many to show"}
        return {"text": text}

    def _finish(self, row: str) -> dict[str, Any]:
        environment = self._rows.pop(row)
        self._random.pop(row, None)
        reward = getattr(environment, "reward", None)
        found = reward() if callable(reward) else None
        if found is not None:
            found = float(found)
        state = {k: v for k, v in vars(environment).items() if k[:1] != "_" and _is_json(v)}
        if close := getattr(environment, "close", None):
            close()
        return {"reward": found, "state": state}

    @contextmanager
    def _own_random(self, row: str, seed: str | None) -> Iterator[None]:
        if seed is not None:
            random.seed(seed)
        elif row in self._random:
            random.setstate(self._random[row])
        yield
        if row in self._rows:
            self._random[row] = random.getstate()

    @contextmanager
    def _limit(self) -> Iterator[None]:
        signal.setitimer(signal.ITIMER_REAL, self._timeout)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)


def _taken(function: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Those fields of the row that `reset` names, or all if it takes `**anything`."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return arguments
    return {p.name: arguments[p.name] for p in parameters if p.name in arguments}


def _is_json(value: Any) -> bool:
    try:
        return len(json.dumps(value)) <= LONGEST_RESULT
    except (TypeError, ValueError, RecursionError):
        return False


def _raise_time_is_up(*_: Any) -> None:
    raise TimeIsUp


def complaint(error: BaseException) -> str:
    """What broke, and where in the user's file."""
    if isinstance(error, TimeIsUp):
        return "reset or reward took too long"
    own = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
    place = f" ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {error}{place}"


def serve(spec: str, timeout: float, memory: int) -> None:
    """Answer requests until standard input ends, as it does when the trainer dies."""
    worker = _worker()
    requests, reply = worker.pipes()
    try:
        made = worker.load_function(spec)
        first = made()
        if not callable(getattr(first, "reset", None)):
            raise worker.RewardError("it has no method 'reset'")
        offers = {"tools": schemas(first), "file": worker.source_file(made)}
        offers["rewards"] = callable(getattr(first, "reward", None))
    except (Exception, SystemExit) as e:  # importing and making it runs the user's code
        own = isinstance(e, worker.RewardError)
        reply(0, {"error": str(e) if own else complaint(e)})
        return
    del first
    reply(0, offers)
    with contextlib.suppress(ValueError, OSError):  # macOS takes no such limit
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    signal.signal(signal.SIGALRM, _raise_time_is_up)
    rows = Rows(made, timeout)
    for line in requests:
        request = json.loads(line)
        try:
            reply(request["request"], {"results": [rows.do(a) for a in request["actions"]]})
        except (Exception, SystemExit, TimeIsUp) as e:  # reset or reward of a user's class
            reply(request["request"], {"error": complaint(e)})


def _worker() -> Any:
    """`worker.py`, by its path: this process does not load the package."""
    spec = importlib.util.spec_from_file_location(
        "mlx_grpo_worker", Path(__file__).with_name("worker.py")
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    serve(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]))
