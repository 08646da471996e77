"""The rubric marks what it says it marks, each part by itself."""

import pytest

from mlx_grpo.rubric import WEIGHTS, Judgement, judge, stem, words

PROMPT = "Explain why plants need light."
GOOD = "Plants turn light into sugar. They use that sugar to grow and to stay alive."


def test_a_good_answer_gets_full_marks() -> None:
    assert judge(PROMPT, GOOD, "stop") == Judgement(1.0, 1.0, 1.0, 1.0, 1.0)
    assert judge(PROMPT, GOOD, "stop").score == pytest.approx(1.0)


def test_the_score_is_the_weighted_mean_of_the_parts() -> None:
    assert sum(WEIGHTS.values()) == pytest.approx(1.0)
    for part, weight in WEIGHTS.items():
        only = Judgement(**{name: float(name == part) for name in WEIGHTS})
        assert only.score == pytest.approx(weight)


@pytest.mark.parametrize(
    ("answer", "reason", "mark"),
    [
        ("Light feeds them.", "stop", 1.0),
        ('They said "light!"', "stop", 1.0),
        ("Light feeds them", "stop", 0.5),
        ("Light feeds them.", "length", 0.0),
    ],
)
def test_an_answer_should_end_by_itself_and_with_a_sentence(
    answer: str, reason: str, mark: float
) -> None:
    assert judge(PROMPT, answer, reason).finished == mark


def test_a_loop_is_not_fresh() -> None:
    assert judge(PROMPT, "the sun is warm and " * 8, "stop").fresh == 0.0


def test_a_sentence_said_twice_halves_the_freshness() -> None:
    once = "The sun gives warmth. Many green leaves drink the light each single day"
    twice = f"The sun gives warmth. {GOOD} The sun gives warmth. And so on for ever."
    assert judge(PROMPT, once, "stop").fresh == 1.0
    assert 0 < judge(PROMPT, twice, "stop").fresh <= 0.5


@pytest.mark.parametrize(
    ("answer", "mark"),
    [
        ("Plants like the light of day.", 1.0),
        ("A plant grows.", 2 / 3),  # one of three stems, and half of them are enough
        ("Planting is fun.", 2 / 3),
        ("Dogs bark at night.", 0.0),
    ],
)
def test_an_answer_should_take_up_the_content_words(answer: str, mark: float) -> None:
    # content words of the prompt: plants, need, light
    assert judge(PROMPT, answer, "stop").relevant == pytest.approx(mark)


def test_a_prompt_without_content_words_asks_for_nothing() -> None:
    assert judge("What is it?", "Dogs bark.", "stop").relevant == 1.0


@pytest.mark.parametrize(
    ("answer", "mark"),
    [
        ("Plants grow.", 1.0),
        ("plants grow.", 0.5),
        ("Plants\n# They grow.", 0.65 * 0.5),
        ("- one\n- two", 0.3 * 0.5),
        ("1. one\n2. two\n3. three", 0.0),
        ("Plants **grow** well.", 0.3 * 0.5),
        ("Dear [Your Name], plants grow.", 0.65 * 0.5),
        ("Plants \N{SNOWMAN}\N{SNOWMAN} grow.", 0.5),
        ("1. Plants grow.", 0.65),
        ("  ", 0.0),
    ],
)
def test_an_answer_should_be_plain_sentences(answer: str, mark: float) -> None:
    assert judge(PROMPT, answer, "stop").plain == pytest.approx(mark)


@pytest.mark.parametrize(
    ("count", "mark"), [(0, 0.0), (4, 0.5), (8, 1.0), (60, 1.0), (90, 0.5), (120, 0.0), (500, 0.0)]
)
def test_an_answer_should_be_neither_a_shrug_nor_an_essay(count: int, mark: float) -> None:
    answer = " ".join(f"w{i}" for i in range(count))
    assert judge(PROMPT, answer, "stop").sized == pytest.approx(mark)


def test_an_empty_answer_is_worth_next_to_nothing() -> None:
    assert judge(PROMPT, "", "length").score == 0.0


@pytest.mark.parametrize(
    ("word", "expected"),
    [("plants", "plant"), ("planting", "plant"), ("berries", "berr"), ("berry", "berr")],
)
def test_stems_meet(word: str, expected: str) -> None:
    assert stem(word) == expected


@pytest.mark.parametrize("word", ["gas", "red", "sing", "is"])
def test_short_words_keep_their_endings(word: str) -> None:
    assert stem(word) == word


def test_words_are_lower_case_and_keep_apostrophes() -> None:
    assert words("It's 2 Cats, isn't it?") == ["it's", "2", "cats", "isn't", "it"]
