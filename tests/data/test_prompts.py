"""Prompts and pairs: what a row becomes, which order prompts are visited in, and what ships."""

import json
import re
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.utils import load_tokenizer

from mlx_grpo.core.errors import InputError
from mlx_grpo.data import prompts
from mlx_grpo.data.chat import answer_tokens, encoded
from mlx_grpo.data.messages import row_messages
from mlx_grpo.data.pairs import load_pairs
from mlx_grpo.data.prompts import (
    SELDOM,
    batch_indices,
    load_prompts,
    order,
    prompt_weights,
    weighted_indices,
)
from mlx_grpo.data.tables import read_rows
from mlx_grpo.models.backbone import Backbone
from tests.helpers.tiny import CHAT_TEMPLATE, EOS, PAD, write_jsonl, write_tokenizer

DATA = Path(__file__).parents[2] / "data"
COMMON_WORDS = """
a an and are as at be but by can could did do does for from get give good had has have how i
if in into is it its me my name of on one or should so some something suggest tell than that
the their them there they this to two up us was way we what when where which who why will
with would you your explain describe write
"""


@pytest.fixture(scope="session")
def tokenizer(backbone: Backbone) -> Any:
    """The byte tokenizer of the tiny llama."""
    return backbone.tokenizer


@pytest.fixture(scope="module")
def shipped() -> dict[str, list[dict[str, Any]]]:
    """Rows of the data files of the repository, by name."""
    names = ("rl_prompts", "eval_prompts", "preference_pairs")
    return {
        n: [json.loads(line) for line in (DATA / f"{n}.jsonl").read_text("utf-8").splitlines()]
        for n in names
    }


def test_a_prompt_becomes_one_user_message_with_the_opening_of_an_answer(
    tokenizer: Any, tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "say tea"}])
    (prompt,), too_long = load_prompts(path, tokenizer, 64)
    assert prompt.messages == ({"role": "user", "content": "say tea"},)
    assert tokenizer.decode(list(prompt.token_ids)) == "<user>say tea</s><assistant>"
    assert (prompt.id, prompt.response, prompt.fields, too_long) == ("1", None, {}, 0)


def test_messages_keep_their_roles_and_order(tokenizer: Any, tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "bye"},
    ]
    path = write_jsonl(tmp_path / "p.jsonl", [{"messages": messages}])
    (prompt,), _ = load_prompts(path, tokenizer, 128)
    assert list(prompt.messages) == messages
    assert tokenizer.decode(list(prompt.token_ids)) == (
        "<system>be brief</s><user>hi</s><assistant>hello</s><user>bye</s><assistant>"
    )


def test_other_fields_are_kept_for_reward_functions(tokenizer: Any, tmp_path: Path) -> None:
    row = {"id": 7, "prompt": "2+2", "response": "4", "answer": 4, "tags": ["sum"]}
    (prompt,), _ = load_prompts(write_jsonl(tmp_path / "p.jsonl", [row]), tokenizer, 64)
    assert (prompt.id, prompt.response) == ("7", "4")
    assert prompt.fields == {"answer": 4, "tags": ["sum"]}


def test_the_length_limit_counts_the_template_and_is_inclusive(
    tokenizer: Any, tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "ab"}, {"prompt": "abc"}])
    length = len(load_prompts(path, tokenizer, 99)[0][0].token_ids)
    prompts, too_long = load_prompts(path, tokenizer, length)
    assert [p.messages[0]["content"] for p in prompts] == ["ab"]
    assert too_long == 1


def test_blank_lines_are_skipped_and_still_counted_in_places(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n\n  \n{"prompt": 3}\n')
    with pytest.raises(InputError, match=r"p\.jsonl:4: field 'prompt' must be a text"):
        [row_messages(place, row) for place, row in read_rows(path)]


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"prompt": "a", "messages": []}, "has both 'prompt' and 'messages'"),
        ({"messages": "hi"}, "field 'messages' must be a list"),
        ({"messages": []}, "field 'messages' must be a list that is not empty"),
        ({"messages": [{"role": "bot", "content": "a"}]}, r"'messages\[0\]\.role' must be one of"),
        ({"messages": [{"role": "user", "content": " "}]}, r"'messages\[0\]\.content' must be"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "ends with the assistant"),
    ],
)
def test_a_bad_conversation_is_refused_by_field(row: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InputError, match=f"^f:3: .*{complaint}"):
        row_messages("f:3", row)


def test_an_empty_response_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a", "response": ""}])
    with pytest.raises(InputError, match=r"p\.jsonl:1: field 'response'"):
        load_prompts(path, tokenizer, 64)


def test_a_finished_answer_ends_with_the_stop_token_and_a_cut_one_does_not(tokenizer: Any) -> None:
    assert answer_tokens(tokenizer, "ab") == (*answer_tokens(tokenizer, "ab", "length"), EOS)
    assert EOS not in answer_tokens(tokenizer, "ab", "length")


def test_pairs_carry_prompt_and_both_answers_with_their_finish_reasons(
    tokenizer: Any, tmp_path: Path
) -> None:
    rows = [
        {"prompt": "a", "chosen": "yes", "rejected": "no", "rejected_finish_reason": "length"},
        {"id": "x", "prompt": "a", "chosen": "y" * 90, "rejected": "no"},
    ]
    (pair,), skipped = load_pairs(write_jsonl(tmp_path / "p.jsonl", rows), tokenizer, 64)
    assert skipped == {"longer than 64 tokens": 1}
    assert tokenizer.decode(list(pair.prompt_ids)) == "<user>a</s><assistant>"
    assert tokenizer.decode(list(pair.chosen_ids)) == "yes</s>"
    assert tokenizer.decode(list(pair.rejected_ids)) == "no"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"rejected": None}, "field 'rejected' is missing"),
        ({"rejected": 3}, "field 'rejected' must be a text"),
        ({"chosen_finish_reason": "eos"}, "'chosen_finish_reason' must be 'stop' or 'length'"),
        ({"split": "dev"}, "field 'split' must be one of train, valid, test"),
        ({"split": ["train"]}, "field 'split' must be one of train, valid, test"),
    ],
)
def test_a_bad_pair_is_refused_by_field(
    tokenizer: Any, tmp_path: Path, changes: dict[str, Any], complaint: str
) -> None:
    row = {"prompt": "a", "chosen": "yes", "rejected": "no", **changes}
    path = write_jsonl(tmp_path / "pairs.jsonl", [row])
    with pytest.raises(InputError, match=rf"pairs\.jsonl:1: .*{complaint}"):
        load_pairs(path, tokenizer, 64)


def test_a_pair_keeps_the_side_its_row_names(tokenizer: Any, tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "chosen": "yes", "rejected": "no", "split": "valid"},
        {"prompt": "b", "chosen": "yes", "rejected": "no"},
    ]
    pairs, _ = load_pairs(write_jsonl(tmp_path / "p.jsonl", rows), tokenizer, 64)
    assert [p.split for p in pairs] == ["valid", ""]


@pytest.mark.parametrize("second", [{"split": "valid"}, {}])
def test_a_prompt_on_two_sides_is_refused(
    tokenizer: Any, tmp_path: Path, second: dict[str, str]
) -> None:
    rows = [
        {"prompt": "a", "chosen": "yes", "rejected": "no", "split": "train"},
        {"prompt": "a", "chosen": "si", "rejected": "no", **second},
    ]
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    with pytest.raises(InputError, match=r"pairs\.jsonl:2: .*the same prompt has 'train' at .*:1"):
        load_pairs(path, tokenizer, 64)


@pytest.mark.parametrize(("batch_size", "n"), [(4, 8), (3, 8), (5, 3), (1, 7), (8, 8)])
def test_batches_visit_every_prompt_once_per_epoch_and_drop_none(batch_size: int, n: int) -> None:
    epochs = 3
    batches = [batch_indices(5, i, batch_size, n) for i in range(-(-epochs * n // batch_size))]
    assert {len(b) for b in batches} == {batch_size}
    visits = [i for batch in batches for i in batch]
    for epoch in range(epochs):
        assert sorted(visits[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    assert order(1, 0, 20) == order(1, 0, 20)
    orders = {tuple(order(seed, epoch, 20)) for seed in (1, 2) for epoch in (0, 1)}
    assert len(orders) == 4
    assert batch_indices(1, 0, 20, 20) == order(1, 0, 20)
    assert batch_indices(1, 3, 4, 20) == order(1, 0, 20)[12:16]


def test_shipped_files_load_and_have_the_promised_size(
    tokenizer: Any, shipped: dict[str, list[dict[str, Any]]]
) -> None:
    training, skipped = load_prompts(DATA / "rl_prompts.jsonl", tokenizer, 512)
    held_out, skipped_too = load_prompts(DATA / "eval_prompts.jsonl", tokenizer, 512)
    assert (skipped, skipped_too) == (0, 0)
    assert len(training) >= 400
    assert len(held_out) == 100
    assert all(p.response for p in held_out)
    assert len(load_pairs(DATA / "preference_pairs.jsonl", tokenizer, 4096)[0]) == len(
        shipped["preference_pairs"]
    )
    for name, rows in shipped.items():
        assert len({r["id"] for r in rows}) == len(rows), name


def test_shipped_pairs_ask_only_training_prompts(
    shipped: dict[str, list[dict[str, Any]]],
) -> None:
    training = {r["prompt"] for r in shipped["rl_prompts"]}
    assert {p["prompt"] for p in shipped["preference_pairs"]} <= training
    assert all(p["chosen_score"] > p["rejected_score"] for p in shipped["preference_pairs"])


def overlap(a: frozenset[Any], b: frozenset[Any]) -> float:
    """Jaccard index; 0 for two empty sets."""
    return len(a & b) / len(a | b) if a | b else 0.0


def test_no_two_shipped_prompts_say_the_same(shipped: dict[str, list[dict[str, Any]]]) -> None:
    common = frozenset(COMMON_WORDS.split())
    texts = [r["prompt"] for n in ("rl_prompts", "eval_prompts") for r in shipped[n]]
    known = []
    for text in texts:
        words = re.findall(r"[a-z0-9']+", text.lower())
        trigrams = frozenset(zip(words, words[1:], words[2:], strict=False))
        known.append((text, trigrams, frozenset(words) - common))
    near = [
        (a[0], b[0])
        for a, b in combinations(known, 2)
        if overlap(a[1], b[1]) >= 0.5 or overlap(a[2], b[2]) >= 0.6
    ]
    assert near == []


def test_an_answer_is_closed_by_the_stop_token_of_the_template(tmp_path: Path) -> None:
    # Gemma ends a turn with a token that is not the tokenizer's eos
    template = CHAT_TEMPLATE.replace("</s>", "<pad>")
    write_tokenizer(tmp_path, template)
    tokenizer = load_tokenizer(tmp_path, eos_token_ids=[EOS, PAD])
    assert answer_tokens(tokenizer, "ab")[-1] == PAD
    assert len(answer_tokens(tokenizer, "ab", "length")) == 2
    write_tokenizer(tmp_path)
    assert answer_tokens(load_tokenizer(tmp_path, eos_token_ids=[EOS, PAD]), "ab")[-1] == EOS


def test_prompts_whose_answers_differ_are_preferred_and_none_is_starved() -> None:
    ids = [str(i) for i in range(20)]
    spreads = {i: 0.0 if int(i) < 10 else 1.0 for i in ids}
    weights = prompt_weights(ids, spreads)
    counts = Counter(i for t in range(400) for i in weighted_indices(3, t, 4, weights))
    dull, useful = (sum(counts[i] for i in part) for part in (range(10), range(10, 20)))
    assert useful > 2 * dull
    assert min(counts[i] for i in range(20)) > 10


def test_a_prompt_that_was_never_visited_counts_like_the_most_useful() -> None:
    assert prompt_weights(["new", "dull", "good"], {"dull": 0.0, "good": 0.4}) == [1.0, SELDOM, 1.0]


def test_weighted_prompts_are_drawn_by_key_and_differ_within_a_batch() -> None:
    drawn = weighted_indices(1, 7, 5, [1.0] * 8)
    assert drawn == weighted_indices(1, 7, 5, [1.0] * 8) != weighted_indices(1, 8, 5, [1.0] * 8)
    assert len(set(drawn)) == 5
    assert sorted(weighted_indices(1, 7, 6, [1.0, 0.2, 1.0])) == [0, 0, 1, 1, 2, 2]


def test_prompts_encoded_together_are_those_encoded_one_by_one(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["tea", "tea ", "</s><user>", "naïve 茶 🍵", "\x00\u200b", "x" * 90, "a\nb\t"]
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": f"{t}{i}"} for i, t in enumerate(texts)])
    alone = [
        tokenizer.encode(f"<user>{t}{i}</s><assistant>", add_special_tokens=False)
        for i, t in enumerate(texts)
    ]
    monkeypatch.setattr(prompts, "ROWS_AT_ONCE", 3)
    told: list[tuple[int, int]] = []
    rows = prompts.read_prompts(path)
    found, _ = prompts.tokenize_prompts(path, rows, tokenizer, 999, lambda *n: told.append(n))
    assert [list(p.token_ids) for p in found] == alone
    assert told == [(0, 7), (3, 7), (6, 7)]


def test_a_tokenizer_that_is_slow_cuts_or_does_more_in_python_gives_the_same_ids(
    tokenizer: Any, tmp_path: Path
) -> None:
    texts = ["<user>tea</s>", "x" * 90]
    plain = [tuple(tokenizer.encode(t, add_special_tokens=False)) for t in texts]

    class Slow:
        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            return [ord(c) for c in text]

    class Adds(Slow):
        backend_tokenizer = tokenizer.backend_tokenizer

    for other in (Slow(), Adds()):
        assert encoded(other, texts) == [tuple(map(ord, t)) for t in texts]
    write_tokenizer(tmp_path)
    about = json.loads((tmp_path / "tokenizer.json").read_text())
    cut = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps({**about, "truncation": cut}))
    assert encoded(load_tokenizer(tmp_path), texts) == plain


def test_a_text_with_a_lone_surrogate_is_refused_however_it_is_spelled(tmp_path: Path) -> None:
    for escape in ("\\ud83d", "\\uD83D", "\\udc00\\ud83d"):
        path = tmp_path / "p.jsonl"
        path.write_text(f'{{"prompt": "a {escape}"}}\n')
        with pytest.raises(InputError, match=r"p\.jsonl:1: .* stands alone"):
            list(read_rows(path))


@pytest.mark.parametrize(
    ("system", "roles"),
    [(None, ["system", "user"]), ("", ["user"]), ("Be kind.", ["system", "user"])],
)
def test_a_forced_system_prompt_replaces_the_rows_own(
    tmp_path: Path, system: str | None, roles: list[str]
) -> None:
    row = {"messages": [{"role": "system", "content": "own"}, {"role": "user", "content": "why"}]}
    plain = {"prompt": "how"}
    path = write_jsonl(tmp_path / "p.jsonl", [row, plain])
    first, second = (r.messages for r in prompts.read_prompts(path, system=system))
    assert [m["role"] for m in first] == roles
    assert first[0]["content"] == {None: "own", "": "why"}.get(system, system)
    assert [m["content"] for m in second] == ([system, "how"] if system else ["how"])


def test_a_row_that_is_a_system_message_alone_has_nothing_left_to_ask(tmp_path: Path) -> None:
    row = {"messages": [{"role": "system", "content": "own"}]}
    with pytest.raises(InputError, match=r"p\.jsonl:1: holds a system message alone"):
        prompts.read_prompts(write_jsonl(tmp_path / "p.jsonl", [row]), system="")
