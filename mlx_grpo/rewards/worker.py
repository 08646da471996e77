"""The process around one custom reward function: its code is a user's, and a process can be ended
whatever it is doing.

Run by path (`process.py` does), standard library only, so that it starts in no time and takes no
memory of its own. A line of JSON in, a line of JSON out: first `{"file": ...}` once the function is
loaded, then `{"scores": [...]}` for each `{"request": 1, "arguments": {...}}`, or
`{"error": "..."}`; each with the number of the request (0 for the first) and of this process.
"""

import importlib
import importlib.util
import inspect
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from functools import cache
from io import TextIOWrapper
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

GRACE_SECONDS = 5.0
ALWAYS = frozenset(
    {
        *("prompt", "messages", "completions", "completion_ids", "finish_reasons"),
        *("turns", "environments", "environment_rewards"),
    }
)
"""Arguments that there always are; the others are fields of the prompt's row."""
WALKERS = frozenset({"re", "sre_parse", "difflib", "fnmatch"})
"""Modules that take a text, never a list of them, and look at its letters in Python."""


class RewardError(ValueError):
    """One line about a user's function."""


class FieldText(str):
    """A text of the prompt's row: one for all completions. It is an ordinary text, but its letters
    are given to nobody who asks for them one by one: that is what a function written for a list
    with a text per completion does (`zip(completions, answer)`, `answer[i]`, `[a.strip() for a in
    answer]`), and it would go wrong in silence. `str(answer)` is free of this.
    """

    def __new__(cls, text: str, name: str, walks: list[RewardError]) -> "FieldText":
        made = super().__new__(cls, text)
        made.name, made.walks = name, walks
        return made

    name: str
    walks: list[RewardError]
    """Told of each attempt, for a function may catch what is raised here."""

    def __iter__(self) -> Iterator[str]:
        self._check_walk(sys._getframe(1))
        return super().__iter__()

    def __getitem__(self, key: Any) -> str:
        if isinstance(key, slice):  # of a list it would still be a list
            return FieldText(super().__getitem__(key), self.name, self.walks)
        self._check_walk(sys._getframe(1))
        return super().__getitem__(key)

    def __copy__(self) -> "FieldText":
        return self

    def __deepcopy__(self, memo: Any) -> "FieldText":
        return self

    def __reduce__(self) -> Any:  # an ordinary text for other processes
        return str, (str(self),)

    def _check_walk(self, caller: FrameType) -> None:
        if caller.f_globals.get("__name__", "").partition(".")[0] in WALKERS:
            return
        name = self.name
        self.walks.append(
            RewardError(
                f"it takes '{name}' apart letter by letter; '{name}' is one text for all "
                f"completions here, not a list: compare with it as it is, or add `prompts` to the "
                f"function's arguments to get lists as in TRL, or write str({name}) if its letters "
                "are meant"
            )
        )
        raise self.walks[-1]


def load_function(spec: str) -> Any:
    """The function that `module:function` or `path/file.py:function` names.

    Raises:
        RewardError: no such module, file or function.
    """
    source, _, name = spec.rpartition(":")
    if not source or not name:
        raise RewardError("write it as module:function or file.py:function")
    try:
        module = _load_file(Path(source)) if source.endswith(".py") else _load_module(source)
    except (Exception, SystemExit) as e:  # importing runs the user's code: it may raise anything
        reason = f"{type(e).__name__}: {e}"
        raise RewardError(f"cannot import '{source}' ({reason})") from e
    function = getattr(module, name, None)
    if not callable(function):
        raise RewardError(f"'{source}' has no function '{name}'")
    return function


def _load_module(name: str) -> Any:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` would
    return importlib.import_module(name)


def _load_file(path: Path) -> Any:
    # a name of its own: a file called json.py must not take the place of the real module
    spec = importlib.util.spec_from_file_location(f"mlx_grpo_reward_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError("no such file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    sys.path.append(str(path.parent.resolve()))  # last: what lies beside it takes no one's place
    spec.loader.exec_module(module)
    return module


def call(function: Any, arguments: dict[str, Any]) -> list[float | None]:
    """A number per completion; None where the function does not apply. It may be asynchronous.

    The function gets those arguments that it names, or all if it takes `**anything`. One that names
    `prompts` is called as TRL calls it, see `_as_trl`; to others texts are a `FieldText`.

    Raises:
        RewardError: it raises, or returns another count or something that is not numbers.
    """
    expected = len(arguments["completions"])
    if "environments" in arguments:  # what is left of them, by attribute as in TRL
        found = [SimpleNamespace(**state) for state in arguments["environments"]]
        arguments = {**arguments, "environments": found}
    walks: list[RewardError] = []
    try:
        scores = _numbers(_finished(function(**_asked_for(function, arguments, walks))))
    except (Exception, SystemExit) as e:  # a user's code may raise anything
        _check_walks(walks)
        if isinstance(e, RewardError):
            raise
        raise RewardError(f"{type(e).__name__}: {e}{_place(e)}{_hint(e)}") from e
    _check_walks(walks)
    if len(scores) != expected:
        raise RewardError(f"it returned {len(scores)} scores for {expected} completions")
    return scores


def _numbers(returned: Any) -> list[float | None]:
    # iterating over these would give something else than the scores in their order
    unordered = isinstance(returned, Mapping | Set | str | bytes)
    if unordered or not isinstance(returned, Iterable):
        kind = type(returned).__name__
        raise RewardError(f"it returned {kind}, not a list with a number per completion")
    scores = list(returned)
    for number, score in enumerate(scores, 1):
        if isinstance(score, str | bytes):
            raise RewardError(f"it returned {score!r} for completion {number}, which is no number")
    return [None if score is None else float(score) for score in scores]


def _check_walks(walks: Sequence[RewardError]) -> None:
    """Before any other complaint, which would be a consequence of it."""
    if walks:
        raise RewardError(f"{walks[0]}{_place(walks[0])}") from walks[0]


def _finished(returned: Any) -> Any:
    """What an asynchronous function comes to. It runs in the one event loop that this process has
    for them, because clients that a user keeps belong to the loop they were first used in; and in a
    thread, because a notebook has a loop of its own that runs already."""
    if not inspect.isawaitable(returned):
        return returned

    async def waited() -> Any:
        return await returned

    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as beside:
        return beside.submit(_event_loop().run_until_complete, waited()).result()


@cache
def _event_loop() -> Any:
    import asyncio  # not at the start of every worker: it takes as long as all the rest

    return asyncio.new_event_loop()


def _asked_for(
    function: Any, arguments: dict[str, Any], walks: list[RewardError]
) -> dict[str, Any]:
    parameters = list(inspect.signature(function).parameters.values())
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    if "prompts" not in arguments and any(p.name == "prompts" for p in parameters):
        arguments = _as_trl(arguments)
    else:
        arguments = _guarded(arguments, walks)
    if takes_all:
        return arguments
    wanted = [p for p in parameters if p.kind is not inspect.Parameter.VAR_POSITIONAL]
    for p in wanted:
        if p.default is inspect.Parameter.empty and p.name not in arguments:
            raise RewardError(
                f"it asks for '{p.name}', which the prompt's row does not have; there are "
                f"{', '.join(sorted(arguments))}"
            )
    return {p.name: arguments[p.name] for p in wanted if p.name in arguments}


def _guarded(arguments: dict[str, Any], walks: list[RewardError]) -> dict[str, Any]:
    """With texts of the row that are given for what they are."""
    texts = {
        name: FieldText(value, name, walks)
        for name, value in arguments.items()
        if isinstance(value, str) and name not in ALWAYS
    }
    return {**arguments, **texts}


def _as_trl(arguments: dict[str, Any]) -> dict[str, Any]:
    """`prompts`, and the fields of the row, as lists with a value per completion."""
    count = len(arguments["completions"])
    lists = {name: [value] * count for name, value in arguments.items() if name not in ALWAYS}
    return {**arguments, **lists, "prompts": [arguments["prompt"]] * count}


def _hint(error: BaseException) -> str:
    """What to change where a function takes a completion for TRL's list of messages."""
    if isinstance(error, TypeError) and "string indices must be integers" in str(error):
        return "; a completion is a text here: write completion for completion[0]['content']"
    return ""


def _place(error: BaseException) -> str:
    """Where in the user's own file."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
    own = [f for f in frames if f.filename == frames[0].filename]
    return f" ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else ""


def source_file(function: Any) -> str | None:
    """The file a function was written in."""
    try:
        return inspect.getsourcefile(inspect.unwrap(function))
    except TypeError:  # built in, or an instance with __call__
        return inspect.getsourcefile(type(function)) if not inspect.isbuiltin(function) else None


def pipes() -> tuple[TextIOWrapper, Callable[[int, dict[str, Any]], None]]:
    """(requests, how to reply to one); what the user's code reads and prints is kept apart."""
    requests, replies = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w")
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)  # what the function prints is not a reply
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # nothing that it prints fails, or is lost at its end
            stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)
    own = os.getpid()

    def reply(request: int, value: dict[str, Any]) -> None:
        if os.getpid() != own:  # a process that the function forked, and that returned as well
            os._exit(0)
        replies.write(json.dumps({"process": own, "request": request, **value}) + "\n")
        replies.flush()

    return requests, reply


def serve(spec: str, timeout: float) -> None:
    """Answer requests until standard input ends, as it does when the trainer dies."""
    requests, reply = pipes()
    try:
        function = load_function(spec)
        reply(0, {"file": source_file(function)})
    except RewardError as e:
        reply(0, {"error": str(e)})
        return
    for line in requests:
        request = json.loads(line)
        # should the trainer be gone by then, the system ends a function that never returns
        signal.setitimer(signal.ITIMER_REAL, timeout + GRACE_SECONDS)
        try:
            reply(request["request"], {"scores": call(function, request["arguments"])})
        except RewardError as e:
            reply(request["request"], {"error": str(e)})
        signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    serve(sys.argv[1], float(sys.argv[2]))
