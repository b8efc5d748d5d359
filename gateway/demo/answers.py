"""What the demo's model says (``answers.toml``), and which of it to a question.

Each answer lasts some fifteen seconds at the demo's pace, so that there is time to block, reload and stop.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

MAX_ECHO_LENGTH = 160
"""Characters of the question that an answer repeats; a pasted book should not come back whole."""

MAX_READ_LENGTH = 10_000
"""Characters of the question that are looked at."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One canned answer.

    Attributes:
        topic: What the model says it was asked about.
        stems: Beginnings of words that make a question one about this; none for the last resort.
        thought: The second half of its reasoning; the first repeats the question.
        text: The answer, paragraphs parted by empty lines.
    """

    topic: str
    stems: tuple[str, ...]
    thought: str
    text: str


def _load() -> tuple[Answer, ...]:
    document = tomllib.loads(Path(__file__).with_name("answers.toml").read_text(encoding="utf-8"))
    return tuple(
        Answer(item["topic"], tuple(item["stems"]), _unwrap(item["thought"]), _unwrap(item["text"]))
        for item in document["answer"]
    )


def _unwrap(text: str) -> str:
    return re.sub(r"(?<!\n)\n(?!\n)", " ", text)


ANSWERS = _load()


def choose_answer(question: str) -> Answer:
    """The answer whose stems begin most of the question's words; the last one when none does."""
    words = _words(question)
    best = max(ANSWERS, key=lambda answer: _hits(answer, words))
    return best if _hits(best, words) else ANSWERS[-1]


def reasoning(answer: Answer, question: str) -> str:
    """What the model thinks aloud: the question's own words, then the answer's thought."""
    words = _words(question)
    if not words:
        return f"Not a word in it. Then I shall say what this is. {answer.thought}"
    echo = question.strip()
    if len(echo) > MAX_ECHO_LENGTH:
        echo = echo[:MAX_ECHO_LENGTH].rstrip() + "…"
    count = "one word" if len(words) == 1 else f"{len(words)} words"
    longest = max(words, key=len)[:MAX_ECHO_LENGTH]
    return (
        f"I am asked: “{echo}” That is {count}, and the longest is “{longest}”. "
        f"It is about {answer.topic}. {answer.thought}"
    )


def _words(question: str) -> list[str]:
    return re.findall(r"\w[\w'\u2019-]*", question.lower()[:MAX_READ_LENGTH])


def _hits(answer: Answer, words: list[str]) -> int:
    return sum(word.startswith(answer.stems) for word in words)
