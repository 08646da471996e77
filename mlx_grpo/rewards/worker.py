"""The process around one custom reward function: its code is a user's, and a process can be ended
whatever it is doing.

Run by path (`rewards.py` does), standard library only, so that it starts in no time and takes no
memory of its own. A line of JSON in, a line of JSON out: first `{"file": ...}` once the function is
loaded, then `{"scores": [...]}` for each `{"arguments": {...}}`, or `{"error": "..."}`.
"""

import importlib
import importlib.util
import inspect
import json
import os
import signal
import sys
import traceback
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

GRACE_SECONDS = 5.0
ALWAYS = frozenset({"prompt", "messages", "completions", "completion_ids", "finish_reasons"})
"""Arguments that there always are; the others are fields of the prompt's row."""


class RewardError(ValueError):
    """One line about a user's function."""


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


def call(function: Any, arguments: dict[str, Any]) -> list[float]:
    """A number per completion.

    The function gets those arguments that it names, or all if it takes `**anything`. One that names
    `prompts` is called as TRL calls it, see `_as_trl`.

    Raises:
        RewardError: it raises, or returns another count or something that is not numbers.
    """
    try:
        return _numbers(function(**_asked_for(function, arguments)), arguments["completions"])
    except RewardError:
        raise
    except (Exception, SystemExit) as e:  # a user's code may raise anything
        raise RewardError(f"{type(e).__name__}: {e}{_place(e)}{_hint(e)}") from e


def _numbers(returned: Any, completions: Sequence[str]) -> list[float]:
    # iterating over these would give something else than the scores in their order
    unordered = isinstance(returned, Mapping | Set | str | bytes)
    if unordered or not isinstance(returned, Iterable):
        kind = type(returned).__name__
        raise RewardError(f"it returned {kind}, not a list with a number per completion")
    scores = list(returned)
    for number, score in enumerate(scores, 1):
        if score is None or isinstance(score, str | bytes):
            raise RewardError(
                f"it returned {score!r} for completion {number}; give every completion a number"
            )
    if len(scores) != len(completions):
        raise RewardError(f"it returned {len(scores)} scores for {len(completions)} completions")
    return [float(score) for score in scores]


def _asked_for(function: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    parameters = list(inspect.signature(function).parameters.values())
    names, fields = {p.name for p in parameters}, arguments.keys() - ALWAYS
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    if "prompts" in names and "prompts" not in arguments:
        arguments = _as_trl(arguments)
    elif takes_all and (named := sorted(names & fields)) and not names & {"prompt", "messages"}:
        raise RewardError(
            f"it takes '{named[0]}' and **, as functions for TRL do, where '{named[0]}' is a list "
            "with a value per completion; here it is the value of the prompt's row. Add a "
            "parameter 'prompts' to get lists, or take the ** away to get the value"
        )
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


def serve(spec: str, timeout: float) -> None:
    """Answer requests until standard input ends, as it does when the trainer dies."""
    requests, replies = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w")
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)  # what the function prints is not a reply

    def reply(value: dict[str, Any]) -> None:
        replies.write(json.dumps(value) + "\n")
        replies.flush()

    try:
        function = load_function(spec)
        reply({"file": source_file(function)})
    except RewardError as e:
        reply({"error": str(e)})
        return
    for line in requests:
        # should the trainer be gone by then, the system ends a function that never returns
        signal.setitimer(signal.ITIMER_REAL, timeout + GRACE_SECONDS)
        try:
            reply({"scores": call(function, json.loads(line)["arguments"])})
        except RewardError as e:
            reply({"error": str(e)})
        signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    serve(sys.argv[1], float(sys.argv[2]))
