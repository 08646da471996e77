"""The gold judge of the demo: a rubric of answer quality in [0, 1], never a training reward there.

Five parts, each in [0, 1], averaged with the weights below:

| part | full marks |
|---|---|
| `finished` | ends by itself (stop token) and with a sentence's end, not at the limit |
| `fresh` | no repetition: share of distinct word trigrams, and no sentence said twice |
| `relevant` | it takes up the prompt's content words (half of them are enough) |
| `plain` | plain sentences: no headings, bullets, bold, placeholders or odd symbols |
| `sized` | 8 to 60 words: neither a shrug nor an essay |
"""

import re
from dataclasses import dataclass

WEIGHTS = {"finished": 0.35, "fresh": 0.2, "relevant": 0.2, "plain": 0.15, "sized": 0.1}
SENTENCE_END = re.compile(r"[.!?][\"')\]]*\s*$")
MARKUP = re.compile(
    r"^\s*(#+|[-*•]|\d+[.)])\s|\*\*|```|\[[A-Z][^\]]*\]|\|.*\||https?://|<[^>]+>", re.MULTILINE
)
PUNCTUATION = ".,;:!?'\"()-\u2019\u201c\u201d%$\u00b0/"
QUOTES = "\"'\u201c"
FUNCTION_WORDS = frozenset(
    """a about all also an and any are as at be because been but by can could did do does for from
    get give had has have how i if in into is it its just let like make many me more most my name no
    not of on one or our out please short should simple so some someone tell than that the their
    them then there they this three to two up us was way we what when where which while who why will
    with without word words would write you your explain describe difference between sentence list
    suggest compare""".split()  # noqa: SIM905
)


@dataclass(frozen=True)
class Judgement:
    """Marks of one answer, each in [0, 1]."""

    finished: float
    fresh: float
    relevant: float
    plain: float
    sized: float

    @property
    def score(self) -> float:
        """Weighted mean of the parts, in [0, 1]."""
        return sum(weight * getattr(self, part) for part, weight in WEIGHTS.items())


def words(text: str) -> list[str]:
    """Lower-case words of a text."""
    return re.findall(r"[a-z0-9]+(?:'[a-z]+)?", text.lower())


def stem(word: str) -> str:
    """A crude stem: enough to let `plants` meet `planting`."""
    for ending in ("ing", "ies", "es", "ed", "s", "y"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word[: -len(ending)]
    return word


def judge(prompt: str, answer: str, finish_reason: str) -> Judgement:
    """Judge one answer to one prompt; `finish_reason` is `stop` or `length`."""
    answer_words = words(answer)
    ends_well = bool(SENTENCE_END.search(answer))
    return Judgement(
        finished=float(finish_reason == "stop") * (1.0 if ends_well else 0.5),
        fresh=_fresh(answer, answer_words),
        relevant=_relevant(prompt, answer_words),
        plain=_plain(answer),
        sized=_sized(len(answer_words)),
    )


def gold(prompt: str, completions: list[str], finish_reasons: list[str]) -> list[float]:
    """The rubric as a reward function: `--eval-reward mlx_grpo.rubric:gold`."""
    return [judge(prompt, c, f).score for c, f in zip(completions, finish_reasons, strict=True)]


def _fresh(answer: str, answer_words: list[str]) -> float:
    trigrams = list(zip(answer_words, answer_words[1:], answer_words[2:], strict=False))
    if not trigrams:
        return float(bool(answer_words))
    distinct = len(set(trigrams)) / len(trigrams)
    sentences = [s.strip().lower() for s in re.split(r"[.!?\n]+", answer) if len(s.split()) > 2]
    said_twice = len(sentences) > len(set(sentences))
    # 10 % repeated trigrams is normal prose, 50 % is a loop
    return max(0.0, min(1.0, (distinct - 0.5) / 0.4)) * (0.5 if said_twice else 1.0)


def _relevant(prompt: str, answer_words: list[str]) -> float:
    content = {stem(w) for w in words(prompt) if w not in FUNCTION_WORDS}
    if not content:
        return 1.0
    found = content & {stem(w) for w in answer_words}
    return min(1.0, 2 * len(found) / len(content))


def _plain(answer: str) -> float:
    text = answer.strip()
    if not text:
        return 0.0
    marks = len(MARKUP.findall(text))
    ordinary = sum(c.isalnum() or c.isspace() or c in PUNCTUATION for c in text) / len(text)
    starts_well = text[0].isupper() or text[0].isdigit() or text[0] in QUOTES
    return (
        max(0.0, 1 - 0.35 * marks)
        * (1.0 if ordinary > 0.98 else 0.5)
        * (1.0 if starts_well else 0.5)
    )


def _sized(count: int) -> float:
    if count < 8:
        return count / 8
    return max(0.0, 1 - max(0, count - 60) / 60)
