"""Word problems in English, answered by a short calculation.

    Tom has 12 apples. He buys thirty more and eats 5. How many apples does he have now?
    12 + 30 = 42, 42 - 5 = 37

Stories, names and things of one split occur in no other.
"""

import operator
import random
from collections.abc import Callable
from dataclasses import dataclass

from num2words import num2words

from examples.smollm.skills.splits import Item, Split, share_of

LARGEST_RESULT = 100
OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
}
NAMES = (
    *("Tom", "Anna", "Ben", "Lucy", "Sam", "Emma", "Jack", "Mia", "Paul", "Nina"),
    *("Omar", "Ruth", "Leo", "Sara", "Max", "Ivy"),
    *("Noah", "Clara", "Hugo", "Zoe", "Adam", "Rosa", "Erik", "Lily"),
    *("Felix", "Maya", "Oscar", "Jane", "Karl", "Ella", "David", "Iris"),
)
THINGS = (
    *("apples", "books", "pencils", "stamps", "coins", "cards", "eggs", "oranges"),
    *("marbles", "stickers", "bottles", "balls"),
    *("shells", "cookies", "toys", "lemons", "flowers", "tickets"),
    *("candles", "pears", "buttons", "keys", "photos", "plates"),
)
STORIES = (
    # half of them for training
    ("{a} + {b}", "{name} has {a} {things}. A friend gives {name} {b} more. "
     "How many {things} does {name} have now?"),
    ("{a} - {b}", "{name} has {a} {things} and loses {b} of them. "
     "How many {things} are left?"),
    ("{a} + {b} - {c}", "{name} has {a} {things}, buys {b} more and gives away {c}. "
     "How many {things} does {name} have now?"),
    ("{a} - {b} + {c}", "There are {a} {things} in a box. {name} takes out {b} and "
     "puts in {c}. How many {things} are in the box?"),
    ("{a} - {b} - {c}", "A shop has {a} {things}. It sells {b} on Monday and {c} on "
     "Tuesday. How many {things} remain?"),
    ("{a} + {b} + {c}", "{name} finds {a} {things} in the house, {b} in the garden "
     "and {c} at school. How many {things} did {name} find?"),
    ("{m} * {n}", "{name} buys {m} bags with {n} {things} in each bag. "
     "How many {things} is that?"),
    ("{m} * {n} + {c}", "{name} has {m} boxes of {n} {things} and {c} loose {things}. "
     "How many {things} does {name} have in all?"),
    ("{m} * {n} - {c}", "{name} fills {m} bags with {n} {things} each, then gives "
     "away {c} {things}. How many {things} are left?"),
    ("{a} + {b} - {c}", "On Monday {name} sold {a} {things} and on Friday {b}. People "
     "brought back {c} of them. How many {things} stay sold?"),
    ("{a} - {b}", "{name} wants {a} {things} but only has {b}. How many {things} are "
     "missing?"),
    ("{a} + {b}", "In one room there are {a} {things}, in the next room {b}. "
     "How many {things} are there together?"),
    ("{a} - {b} + {c}", "{name} started the week with {a} {things}, used {b} of them "
     "and then got {c} new ones. How many {things} does {name} own?"),
    ("{m} * {n} + {c}", "Each of {m} children brings {n} {things}. The teacher adds "
     "{c} more. How many {things} are there?"),
    ("{a} - {b} - {c}", "From {a} {things}, {name} gives {b} to a brother and {c} to a "
     "sister. How many {things} does {name} keep?"),
    ("{m} * {n} - {c}", "A table has {m} rows of {n} {things}. Then {c} {things} fall "
     "down. How many {things} are still on the table?"),
    # a quarter for the search
    ("{a} + {b} - {c}", "{name} picks {a} {things} in the morning and {b} in the "
     "evening, and throws away {c}. How many {things} does {name} keep?"),
    ("{a} - {b}", "A bus carries {a} {things}. At the first stop {name} unloads {b}. "
     "How many {things} does the bus still carry?"),
    ("{a} - {b} + {c}", "The market had {a} {things}. {name} bought {b} of them, and a "
     "farmer delivered {c}. How many {things} does the market have now?"),
    ("{m} * {n}", "A tower has {m} floors, and {name} stores {n} {things} on each. "
     "How many {things} are stored?"),
    ("{m} * {n} + {c}", "{name} earns {n} {things} a day for {m} days, and {c} as a "
     "present. How many {things} does {name} get?"),
    ("{a} - {b} - {c}", "Of {a} {things}, {b} were broken and {c} were stolen. "
     "How many {things} can {name} still use?"),
    ("{a} + {b} + {c}", "{name} made {a} {things}, the neighbour made {b} and the baker "
     "made {c}. How many {things} were made?"),
    ("{m} * {n} - {c}", "A card costs {n} {things}. {name} pays for {m} cards and gets "
     "back {c} {things}. How many {things} were paid?"),
    # a quarter held out
    ("{a} + {b} - {c}", "A ship carries {a} {things} and loads {b} in the harbour. The "
     "storm takes {c}. How many {things} arrive with {name}?"),
    ("{a} + {b}", "{name} wrote down {a} {things} last year and {b} this year. "
     "How many {things} is that in two years?"),
    ("{a} - {b} + {c}", "After lunch {name} counts {a} {things}. Guests eat {b}, then "
     "the cook brings {c}. How many {things} are there?"),
    ("{m} * {n}", "Every week {name} receives {n} {things}. How many {things} come in "
     "{m} weeks?"),
    ("{m} * {n} + {c}", "In a park stand {m} benches with {n} {things} on each, and {c} "
     "{things} lie on the grass. How many {things} does {name} see?"),
    ("{a} - {b} - {c}", "A library owns {a} {things}. {name} borrows {b} and a student "
     "borrows {c}. How many {things} stay?"),
    ("{a} + {b} + {c}", "Three friends share: {name} has {a} {things}, the others have "
     "{b} and {c}. How many {things} do they have together?"),
    ("{m} * {n} - {c}", "{name} plants {m} lines of {n} {things}, but {c} do not grow. "
     "How many {things} grow?"),
)  # fmt: skip


@dataclass(frozen=True)
class Calculation:
    """A sum that is worked out from left to right.

    Attributes:
        steps: each step as it is written, such as `12 + 30 = 42`.
        result: the last number.
    """

    steps: tuple[str, ...]
    result: int

    def __str__(self) -> str:
        return ", ".join(self.steps)


def calculate(formula: str) -> Calculation | None:
    """Work out a formula such as `12 + 30 - 5`; None if a result leaves 1 to 100."""
    first, *rest = formula.split()
    total = int(first)
    steps = []
    for sign, operand in zip(rest[::2], rest[1::2], strict=True):
        result = OPERATIONS[sign](total, int(operand))
        if not 1 <= result <= LARGEST_RESULT:
            return None
        steps.append(f"{total} {sign} {operand} = {result}")
        total = result
    return Calculation(tuple(steps), total)


def draw_numbers(
    formula: str, rng: random.Random
) -> tuple[dict[str, int], Calculation]:
    """Numbers for the letters of a formula: a, b, c up to 60, the factors m, n up to 9."""
    while True:
        numbers = {letter: rng.randint(2, 60) for letter in "abc"}
        numbers |= {letter: rng.randint(2, 9) for letter in "mn"}
        calculation = calculate(formula.format(**numbers))
        if calculation is not None:
            return numbers, calculation


def in_words(number: int, language: str) -> str:
    """A number as it is read."""
    return str(num2words(number, lang=language))


def word_problem(split: Split, rng: random.Random) -> Item:
    """One problem; each of its numbers is in digits or, one time in two, in words."""
    formula, story = rng.choice(share_of(STORIES, split))
    numbers, calculation = draw_numbers(formula, rng)
    written = {}
    for letter, number in numbers.items():
        as_words = rng.random() < 0.5
        written[letter] = in_words(number, "en") if as_words else str(number)
    names = {
        "name": rng.choice(share_of(NAMES, split)),
        "things": rng.choice(share_of(THINGS, split)),
    }
    return {"prompt": story.format(**written, **names), "answer": str(calculation)}
