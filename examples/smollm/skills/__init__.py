"""The skills of the SmolLM2 family: what its experts learn, and what only a merge can do."""

import random
from collections.abc import Callable

from examples.smollm.skills.arithmetic import word_problem
from examples.smollm.skills.composed import french_problem
from examples.smollm.skills.extraction import extraction
from examples.smollm.skills.french import translation
from examples.smollm.skills.splits import Item, Split

SKILLS: dict[str, Callable[[Split, random.Random], Item]] = {
    "arithmetic": word_problem,
    "french": translation,
    "extraction": extraction,
    "composed": french_problem,
}
EXPERTS = ("arithmetic", "french", "extraction")


def draw_items(name: str, split: Split, n: int, seed: int = 0) -> list[Item]:
    """`n` different items of a skill, the same for the same arguments."""
    rng = random.Random(f"{seed} {name} {split}")
    items: dict[str, Item] = {}
    while len(items) < n:
        item = SKILLS[name](split, rng)
        items.setdefault(item["prompt"], item)
    return list(items.values())
