"""How written answers are scored: 1 where they are right, else 0."""

import json
import re
from typing import Any

Doc = dict[str, Any]
Scores = dict[str, float]

NUMBER = re.compile(r"-?\d+")


def last_number(doc: Doc, results: list[str]) -> Scores:
    """Whether the last number of the answer is that of the right one."""
    return score(NUMBER.findall(results[0])[-1:] == NUMBER.findall(doc["answer"])[-1:])


def same_sentence(doc: Doc, results: list[str]) -> Scores:
    """Whether the sentence is the right one, but for capitals, spaces and the last full stop."""
    return score(plain(results[0]) == plain(doc["answer"]))


def plain(text: str) -> str:
    """The text in small letters, with single spaces and typewriter apostrophes."""
    words = text.replace("’", "'").lower().split()
    return " ".join(words).removesuffix(".").removesuffix(" ?").removesuffix("?")


def same_object(doc: Doc, results: list[str]) -> Scores:
    """Whether the answer is JSON and means the right object."""
    try:
        found = json.loads(results[0])
    except json.JSONDecodeError:
        return score(False)
    return score(found == json.loads(doc["answer"]))


def contains_answer(doc: Doc, results: list[str]) -> Scores:
    """Whether the answer contains the right word."""
    return score(doc["answer"].lower() in results[0].lower())


def score(is_right: bool) -> Scores:
    """The metric of all these tasks."""
    return {"acc": float(is_right)}
