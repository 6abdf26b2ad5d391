"""The skills the specialists learn: short string tasks written with one token per character.

A prompt names an operation, gives a word, and ends in the sign of the script that the answer is
to be written in::

    SORT:dbca=abcd.        "=" asks for the Latin script
    COPY:dbca~δβγα.        "~" asks for the Greek script (a fixed, scrambled alphabet)

Which words may be trained on is decided by a checksum of the word, so training, search and
held-out items are disjoint by construction, for every skill at once.
"""

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass

LATIN = "abcdefghijkl"
GREEK = "ζαμδρβκωηθλπ"  # scrambled, so that translating is a mapping to learn and not a shift
SPLITS = {"search": (0,), "held_out": (1, 2), "train": tuple(range(3, 10))}


def _unique(word: str) -> str:
    return "".join(dict.fromkeys(word))


def _shift(word: str) -> str:
    return "".join(LATIN[(LATIN.index(c) + 1) % len(LATIN)] for c in word)


def _count(word: str) -> str:
    """Letters and how often each occurs, in order of first appearance: `abba` -> `a2b2`."""
    return "".join(f"{c}{word.count(c)}" for c in dict.fromkeys(word))


def translate(word: str) -> str:
    return "".join(GREEK[LATIN.index(c)] for c in word)


@dataclass(frozen=True)
class Skill:
    """One task.

    `operation` names it in the prompt, `answer` computes what is to be written after `sign`.
    """

    operation: str
    answer: Callable[[str], str]
    sign: str = "="
    letters: str = LATIN  # few letters make repeated ones likely, where a skill is about repetition

    def item(self, word: str) -> dict[str, str]:
        answer = self.answer(word) if self.sign == "=" else translate(self.answer(word))
        return {"prompt": f"{self.operation}:{word}{self.sign}", "answer": f"{answer}."}


SKILLS = {
    "sort": Skill("SORT", lambda w: "".join(sorted(w))),
    "unique": Skill("UNIQUE", _unique, letters=LATIN[:6]),
    "reverse": Skill("REVERSE", lambda w: w[::-1]),
    "shift": Skill("SHIFT", _shift),
    "translate": Skill("COPY", lambda w: w, sign="~"),
    "translate_reverse": Skill("REVERSE", lambda w: w[::-1], sign="~"),
    "copy": Skill("COPY", lambda w: w),
    "count": Skill("COUNT", _count, letters=LATIN[:6]),
    "translate_sort": Skill("SORT", lambda w: "".join(sorted(w)), sign="~"),
}
COMPOSED = (
    "translate_sort",
)  # never trained on: the operation of one expert, in the script of another


def split_of(word: str) -> str:
    bucket = zlib.crc32(word.encode()) % 10
    return next(split for split, buckets in SPLITS.items() if bucket in buckets)


def draw_item(name: str, split: str, rng: random.Random) -> dict[str, str]:
    """One item of skill `name`; its word of 4 to 9 letters belongs to `split`."""
    skill = SKILLS[name]
    while True:
        word = "".join(rng.choices(skill.letters, k=rng.randint(4, 9)))
        if split_of(word) == split:
            return skill.item(word)


def draw_items(name: str, split: str, n: int, seed: int) -> list[dict[str, str]]:
    """`n` different items, the same for the same arguments."""
    rng = random.Random(f"{seed} {name} {split}")
    items: dict[str, dict[str, str]] = {}
    while len(items) < n:
        item = draw_item(name, split, rng)
        items.setdefault(item["prompt"], item)
    return list(items.values())
