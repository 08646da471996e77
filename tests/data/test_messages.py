"""Rows in the shapes that data sets have become the same conversations."""

from pathlib import Path
from typing import Any

import pytest

from mlx_grpo.core.errors import InputError
from mlx_grpo.data.messages import pair_conversation, row_messages
from mlx_grpo.data.pairs import EMPTY, EQUAL, load_pairs, read_pairs
from mlx_grpo.data.prompts import read_prompts
from mlx_grpo.models.backbone import Backbone
from tests.helpers.tiny import write_jsonl

SYSTEM = {"role": "system", "content": "be brief"}
USER = {"role": "user", "content": "say tea"}
MORE = {"role": "user", "content": "again"}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"prompt": "say tea"}, (USER,)),
        ({"prompt": [SYSTEM, USER]}, (SYSTEM, USER)),
        ({"prompt": "say tea", "messages": None}, (USER,)),
        ({"prompt": None, "messages": [USER, said("tea"), MORE]}, (USER, said("tea"), MORE)),
        (
            {"conversations": [{"from": "system", "value": "be brief"},
                               {"from": "human", "value": "say tea"}]},
            (SYSTEM, USER),
        ),
        (
            {"messages": [{"role": "developer", "content": "be brief"}, USER]},
            ({"role": "developer", "content": "be brief"}, USER),
        ),
        (
            {"messages": [{"role": "system", "content": ""}, USER]},
            ({"role": "system", "content": ""}, USER),
        ),
        (
            {"messages": [{"role": "user", "content": [
                {"type": "text", "text": "say "}, {"type": "text", "text": "tea"}]}]},
            (USER,),
        ),
        ({"messages": [{"role": "user", "content": ["say ", "tea"]}]}, (USER,)),
        (
            {"messages": [{"role": "user", "name": "ann", "content": "say tea", "x": None}]},
            ({"role": "user", "name": "ann", "content": "say tea"},),
        ),
    ],
)  # fmt: skip
def test_a_prompt_may_have_any_of_these_shapes(
    row: dict[str, Any], messages: tuple[dict[str, Any], ...]
) -> None:
    assert row_messages("f:1", row) == messages


def test_a_tool_call_keeps_what_a_template_needs() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    result = {"role": "tool", "tool_call_id": "c1", "content": "rain"}
    asking = {"role": "assistant", "content": None, "tool_calls": [call]}
    _, called, last = row_messages("f:1", {"messages": [USER, asking, result]})
    assert (called["content"], last) == ("", result)
    assert called["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
    broken = {**call, "function": {"name": "f", "arguments": "{"}}
    row = {"messages": [USER, {**asking, "tool_calls": [broken]}, result]}
    assert row_messages("f:1", row)[1]["tool_calls"] == [broken]


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"question": "2+2", "answer": "4"}, "'prompt' is missing .* the row has question, answer; "
         "if one of these is the prompt, name it with --prompt-column"),
        ({}, "the row has nothing"),
        ({"prompt": "a", "messages": [USER]}, "has both .* name it with --prompt-column"),
        ({"prompt": [{"role": "user"}]}, r"'prompt\[0\]\.content' must be a text"),
        ({"prompt": [USER, said("tea")]}, "'prompt' ends with the assistant"),
        ({"prompt": 7}, "'prompt' must be a text that is not empty, or a list of messages"),
        ({"conversations": [{"from": "narrator", "value": "x"}]}, r"'conversations\[0\]\.role'"),
        ({"conversations": "x"}, "'conversations' must be a list"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            r"'messages\[0\]\.content' has a part of type 'image_url'; only text is read",
        ),
        ({"messages": [{"role": "user", "content": 5}]}, r"'messages\[0\]\.content' must be a"),
        ({"messages": [{"role": "tool", "content": ""}]}, r"'messages\[0\]\.content' must be a"),
    ],
)  # fmt: skip
def test_the_real_obstacle_is_named(row: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InputError, match=f"^f:1: .*{complaint}"):
        row_messages("f:1", row)


PAIR = ((USER,), {"chosen": "tea", "rejected": "no"})
HUMAN = "\n\nHuman: say tea\n\nAssistant:"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "say tea", "chosen": "tea", "rejected": "no"}, PAIR),
        ({"messages": [USER], "chosen": "tea", "rejected": "no"}, PAIR),
        ({"prompt": [USER], "chosen": [said("tea")], "rejected": [said("no")]}, PAIR),
        ({"prompt": "say tea", "chosen": [said("tea")], "rejected": [said("no")]}, PAIR),
        ({"prompt": [USER], "chosen": [USER, said("tea")], "rejected": [USER, said("no")]}, PAIR),
        ({"chosen": [USER, said("tea")], "rejected": [USER, said("no")]}, PAIR),
        (  # UltraFeedback: the prompt three times, and another answer
            {"prompt": "say tea", "messages": [USER, said("x")], "prompt_id": "7",
             "chosen": [USER, said("tea")], "rejected": [USER, said("no")]},
            PAIR,
        ),
        (
            {"chosen": [SYSTEM, USER, said("tea"), MORE, said("tea")],
             "rejected": [SYSTEM, USER, said("tea"), MORE, said("no")]},
            ((SYSTEM, USER, said("tea"), MORE), PAIR[1]),
        ),
        ({"chosen": [USER, said("tea")], "rejected": [USER, said("tea")]},
         ((USER,), {"chosen": "tea", "rejected": "tea"})),
        ({"chosen": f"{HUMAN} tea", "rejected": f"{HUMAN} no"}, PAIR),
        (
            {"chosen": f"{HUMAN} tea\n\nHuman: again\n\nAssistant: tea",
             "rejected": f"{HUMAN} tea\n\nHuman: again\n\nAssistant: no"},
            ((USER, said("tea"), MORE), PAIR[1]),
        ),
    ],
)  # fmt: skip
def test_a_pair_may_have_any_of_these_shapes(row: dict[str, Any], expected: Any) -> None:
    assert pair_conversation("f:1", row) == expected


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"prompt": "a", "chosen": "b"}, "'rejected' is missing; the row has prompt, chosen"),
        ({"chosen": "b", "rejected": "c"}, "'prompt' is missing, and 'chosen' is no dialogue"),
        ({"prompt": "a", "chosen": [said("b")], "rejected": "c"}, "must both be texts, or both"),
        ({"prompt": "a", "chosen": 3, "rejected": "c"}, "'chosen' must be a text or a list"),
        ({"chosen": [USER], "rejected": [USER]}, "'chosen' must hold one message .* holds none"),
        (
            {"chosen": [USER, said("a"), MORE, said("b")], "rejected": [USER, said("c")]},
            "'chosen' must hold one message of the assistant after .*; it holds assistant, user, ",
        ),
        ({"chosen": [said("a")], "rejected": [said("b")]}, "'prompt' is missing"),
    ],
)
def test_a_pair_of_another_shape_is_refused_by_field(row: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InputError, match=f"^f:1: .*{complaint}"):
        pair_conversation("f:1", row)


def test_equal_and_empty_pairs_are_skipped_and_counted(backbone: Backbone, tmp_path: Path) -> None:
    good = {"prompt": "a", "chosen": "yes", "rejected": "no"}
    rows = [
        good,
        {**good, "rejected": "yes"},
        {**good, "chosen": " "},
        {**good, "rejected": ""},
        {"chosen": [USER, said("x")], "rejected": [USER, said("")]},
        {"chosen": [USER, said("x")], "rejected": [USER, said("x")]},
        {**good, "rejected": "yes", "rejected_finish_reason": "length"},  # not the same
        {**good, "chosen": "y" * 99},
    ]
    path = write_jsonl(tmp_path / "p.jsonl", rows)
    pairs, skipped = load_pairs(path, backbone.tokenizer, 64)
    assert len(pairs) == 2
    assert skipped == {EQUAL: 2, EMPTY: 3, "longer than 64 tokens": 1}


def test_pairs_keep_their_other_fields(tmp_path: Path) -> None:
    row = {
        "id": None,
        "prompt": "a",
        "chosen": "b",
        "rejected": "c",
        "category": "chat",
        "split": None,
    }
    (pair,) = read_pairs(write_jsonl(tmp_path / "p.jsonl", [row]))
    assert (pair.id, pair.fields, pair.split) == ("1", {"category": "chat"}, "")


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([None, None], ["1", "2"]),
        (["a", None], ["a", "2"]),
        (["2", None], ["2", "row 2"]),
        ([None, 1], ["row 1", "1"]),
        (["", "x"], ["1", "x"]),
        ([0, None], ["0", "2"]),
    ],
)
def test_ids_may_be_null_or_partly_there(
    ids: list[Any], expected: list[str], tmp_path: Path
) -> None:
    rows = [{"id": i, "prompt": "a"} for i in ids]
    assert [p.id for p in read_prompts(write_jsonl(tmp_path / "p.jsonl", rows))] == expected
