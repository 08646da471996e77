"""Malformed input, made by Hypothesis: whatever comes in, one line goes out, and no traceback.

Each `check_*` takes what a user may have written and fails unless the product accepts it or refuses
it with an InputError of one line that names the place.
"""

import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx_lm.utils import load_tokenizer

from mlx_grpo.config.settings import SETTINGS
from mlx_grpo.config.sources import build_config
from mlx_grpo.core.errors import InputError
from mlx_grpo.core.types import Completion, Group, Prompt
from mlx_grpo.data.pairs import load_pairs
from mlx_grpo.data.prompts import load_prompts
from mlx_grpo.rewards.functions import CustomReward
from mlx_grpo.rewards.worker import call
from tests.helpers.tiny import write_tokenizer

ANY_TEXT = st.text(st.characters(), max_size=20)  # halves of surrogate pairs, too: JSON spells them
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
MESSAGE = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "assistant", "system", "tool", ""]) | JSON,
        "content": st.text(max_size=20) | JSON,
    },
)
MESSAGES = st.lists(MESSAGE | JSON, max_size=3) | JSON
TEXT = ANY_TEXT | JSON
PROMPT_ROW = st.fixed_dictionaries(
    {}, optional={"prompt": TEXT, "messages": MESSAGES, "id": JSON, "response": TEXT, "topic": JSON}
)
PAIR_ROW = st.fixed_dictionaries(
    {},
    optional={
        "prompt": TEXT,
        "messages": MESSAGES,
        "chosen": TEXT,
        "rejected": TEXT,
        "chosen_finish_reason": st.sampled_from(["stop", "length", ""]) | JSON,
        "split": st.sampled_from(["train", "valid", "dev"]) | JSON,
    },
)
NOISE = st.binary(max_size=60) | st.sampled_from(
    [
        b"[" * 5000,
        b'{"prompt": ' + b"9" * 5000 + b"}",
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "prompt": 1}',
        b"\xef\xbb\xbf{}",
        b"NaN",
        b'{"prompt": "a\x00b"}',
    ]
)


def lines(row: st.SearchStrategy[Any]) -> st.SearchStrategy[bytes]:
    """Files: rows of JSON, some of them something else, cut anywhere."""
    good = (row | JSON).map(lambda r: json.dumps(r).encode())
    raw = (row | JSON).map(lambda r: json.dumps(r, ensure_ascii=False).encode("utf-8", "replace"))
    joined = st.lists(good | raw | NOISE, max_size=4).map(b"\n".join)
    return st.tuples(joined, st.integers(0, 400)).map(lambda t: t[0][: t[1]] if t[1] else t[0])


NAMES = list(SETTINGS)
KEYS = st.sampled_from(NAMES) | st.sampled_from(NAMES).map(lambda n: n.replace("_", ".", 1)) | TEXT
VALUES = JSON | st.sampled_from(
    [0, -1, 1, 0.5, "0", "none", "nan", "1e999", "9" * 5000, 10**400, [], [0.1], ["a"], [[1]]]
)
SETTING = st.tuples(KEYS, VALUES)
REWARDS = st.lists(JSON | st.floats() | st.integers(), max_size=4) | JSON


def one_line(action: Callable[[], Any]) -> None:
    """Run it; only an InputError whose message makes one line may come out."""
    try:
        action()
    except InputError as e:
        shown = " ".join(str(e).split())  # as the command line does
        assert shown and "Traceback" not in shown, repr(e)


def check_prompts(content: bytes, place: Path, tokenizer: Any) -> None:
    """A prompts file."""
    file = place / "prompts.jsonl"
    file.write_bytes(content)
    one_line(lambda: load_prompts(file, tokenizer, 64))


def check_pairs(content: bytes, place: Path, tokenizer: Any) -> None:
    """A preference file."""
    file = place / "pairs.jsonl"
    file.write_bytes(content)
    one_line(lambda: load_pairs(file, tokenizer, 64))


def check_config(setting: list[tuple[Any, Any]], place: Path) -> None:
    """The same settings as a TOML file, as --set, and as flags."""
    file = place / "config.toml"
    text = "\n".join(f"{key} = {json.dumps(value)}" for key, value in setting)
    file.write_text(text, encoding="utf-8", errors="replace")
    one_line(lambda: build_config(file))
    flags = {key: value for key, value in setting if key in NAMES}
    one_line(lambda: build_config(None, flags))


def check_reward(returned: Any) -> None:
    """What a reward function returned for two completions."""
    answers = tuple(Completion((65,), text, "stop", (0.0,)) for text in "ab")
    group = Group(Prompt("p", ({"role": "user", "content": "x"},), (1,)), answers)

    reward = CustomReward("mine", lambda arguments, _: call(lambda: returned, arguments))
    one_line(lambda: reward(group))


def tokenizer_in(place: Path) -> Any:
    """The byte tokenizer, as the trainer loads it."""
    write_tokenizer(place)
    return load_tokenizer(place)


def fuzz(world: Any, count: int, rng: random.Random) -> dict[str, Any]:
    """`count` examples in all, a quarter of each kind; for the long form."""
    done: dict[str, int] = {}
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        tokenizer = tokenizer_in(place)
        kinds: dict[str, tuple[st.SearchStrategy[Any], Callable[[Any], None]]] = {
            "prompt files": (lines(PROMPT_ROW), lambda c: check_prompts(c, place, tokenizer)),
            "preference files": (lines(PAIR_ROW), lambda c: check_pairs(c, place, tokenizer)),
            "configurations": (
                st.lists(SETTING, max_size=4),
                lambda s: check_config(s, place),
            ),
            "reward returns": (REWARDS, check_reward),
        }
        for kind, (strategy, check) in kinds.items():
            done[kind] = 0
            try:
                _examples(strategy, check, count // len(kinds), done, kind)
            except Exception as e:  # what Hypothesis found; anything at all is a failure
                failures.append(f"{kind}: {type(e).__name__}: {e}")
    total = sum(done.values())
    return {"inputs": total, "one_line": total - len(failures), **done, "failures": failures}


def _examples(
    strategy: st.SearchStrategy[Any],
    check: Callable[[Any], None],
    count: int,
    done: dict[str, int],
    kind: str,
) -> None:
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def example(value: Any) -> None:
        done[kind] += 1
        check(value)

    example()
