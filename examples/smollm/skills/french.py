"""Translation between English and French, both ways, of sentences, numbers and dates.

    Translate into French: Marie bought forty-two apples at the market.
    Marie a acheté quarante-deux pommes au marché.

The grammar is small. Which sentences belong to which split is decided by a checksum of what they
are built from, so a sentence and its translation are in one split only, and so are the requests.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from examples.smollm.skills.arithmetic import in_words
from examples.smollm.skills.splits import Item, Split, share_of, split_of


@dataclass(frozen=True)
class Pair:
    """A phrase in both languages."""

    english: str
    french: str


def pairs(text: str) -> tuple[Pair, ...]:
    """Pairs out of lines of `english = french`."""
    found = []
    for line in text.strip().splitlines():
        english, french = line.split(" = ")
        found.append(Pair(english.strip(), french.strip()))
    return tuple(found)


PEOPLE = pairs("""
    Marie = Marie
    Pierre = Pierre
    Julie = Julie
    Louis = Louis
    the girl = la fille
    the boy = le garçon
    my mother = ma mère
    my father = mon père
    the teacher = le professeur
    the farmer = le fermier
    the baker = le boulanger
    the neighbour = le voisin
""")
VERBS = pairs("""
    has = a
    sees = voit
    buys = achète
    sells = vend
    finds = trouve
    loses = perd
    gives = donne
    eats = mange
    wants = veut
    bought = a acheté
    sold = a vendu
    found = a trouvé
    lost = a perdu
    gave = a donné
    ate = a mangé
    received = a reçu
""")
THINGS = pairs("""
    apples = pommes
    books = livres
    pencils = crayons
    stamps = timbres
    coins = pièces
    cards = cartes
    eggs = œufs
    oranges = oranges
    flowers = fleurs
    marbles = billes
    bottles = bouteilles
    cakes = gâteaux
    keys = clés
    pears = poires
    tickets = billets
    boxes = boîtes
""")
ADJUNCTS = pairs("""
    this morning = ce matin
    this evening = ce soir
    today = aujourd'hui
    on Monday = lundi
    on Friday = vendredi
    at the market = au marché
    at school = à l'école
    in the garden = dans le jardin
    in the house = dans la maison
    in the shop = dans le magasin
    on the table = sur la table
    with a friend = avec un ami
""")
ADJECTIVES = pairs("""
    tired = fatigué
    happy = content
    sick = malade
    rich = riche
    young = jeune
    sad = triste
""")
MEN = tuple(PEOPLE[i] for i in (1, 3, 5, 7, 8, 9, 10, 11))
MONTHS = pairs("""
    January = janvier
    February = février
    March = mars
    April = avril
    May = mai
    June = juin
    July = juillet
    August = août
    September = septembre
    October = octobre
    November = novembre
    December = décembre
""")
QUESTIONS = pairs("""
    How many {things} does {person} have? = Combien de {things} a {person} ?
    How many {things} are left? = Combien de {things} reste-t-il ?
    How many {things} are there {place}? = Combien de {things} y a-t-il {place} ?
    How many {things} does {person} have now? = Combien de {things} a {person} maintenant ?
    How many {things} does {person} have in all? = Combien de {things} a {person} en tout ?
""")
FOLLOW_UPS = pairs("""
    {person} buys {number} more. = {person} en achète encore {number}.
    {person} gives away {number}. = {person} en donne {number}.
    {person} loses {number} of them. = {person} en perd {number}.
    {person} finds {number} more. = {person} en trouve encore {number}.
    {person} eats {number} of them. = {person} en mange {number}.
    {person} sells {number} of them. = {person} en vend {number}.
""")

INTO_FRENCH = (
    "Translate into French: {text}",
    "Say this in French: {text}",
    "How do you say this in French? {text}",
    "French translation please: {text}",
    "Put this into French: {text}",
    "{text} What is that in French?",
    "Write the following in French. {text}",
    "What would a French person say? {text}",
)
INTO_ENGLISH = (
    "Translate into English: {text}",
    "Say this in English: {text}",
    "How do you say this in English? {text}",
    "English translation please: {text}",
    "Put this into English: {text}",
    "{text} What is that in English?",
    "Write the following in English. {text}",
    "What would an English person say? {text}",
)


def draw_number(rng: random.Random) -> Pair:
    """A number of 2 to 60 in words; none that has a gender in French."""
    number = rng.choice([n for n in range(2, 61) if not has_gender(n)])
    return Pair(in_words(number, "en"), in_words(number, "fr"))


def has_gender(number: int) -> bool:
    """Whether the number ends in `un`, which is `une` before feminine nouns."""
    return number % 10 == 1 and number != 11


def statement(rng: random.Random) -> Pair:
    """Somebody does something with some things."""
    person, verb, things = rng.choice(PEOPLE), rng.choice(VERBS), rng.choice(THINGS)
    number = draw_number(rng)
    english = f"{person.english} {verb.english} {number.english} {things.english}"
    french = f"{person.french} {verb.french} {number.french} {things.french}"
    if rng.random() < 0.5:
        adjunct = rng.choice(ADJUNCTS)
        english += f" {adjunct.english}"
        french += f" {adjunct.french}"
    return Pair(f"{english}.", f"{french}.")


def existence(rng: random.Random) -> Pair:
    """There are some things somewhere."""
    place, things, number = rng.choice(ADJUNCTS), rng.choice(THINGS), draw_number(rng)
    return Pair(
        f"There are {number.english} {things.english} {place.english}.",
        f"Il y a {number.french} {things.french} {place.french}.",
    )


def description(rng: random.Random) -> Pair:
    """Somebody is something."""
    person, adjective, adjunct = (
        rng.choice(MEN),
        rng.choice(ADJECTIVES),
        rng.choice(ADJUNCTS),
    )
    return Pair(
        f"{person.english} is {adjective.english} {adjunct.english}.",
        f"{person.french} est {adjective.french} {adjunct.french}.",
    )


def question(rng: random.Random) -> Pair:
    """How many things there are."""
    return fill(rng.choice(QUESTIONS), rng)


def follow_up(rng: random.Random) -> Pair:
    """Something more happens to them."""
    return fill(rng.choice(FOLLOW_UPS), rng)


def fill(pattern: Pair, rng: random.Random) -> Pair:
    """A pattern with words in its places."""
    words = {
        "person": rng.choice(PEOPLE),
        "things": rng.choice(THINGS),
        "place": rng.choice(ADJUNCTS),
        "number": draw_number(rng),
    }
    english = {name: word.english for name, word in words.items()}
    french = {name: word.french for name, word in words.items()}
    return Pair(
        pattern.english.format(**english), elided(pattern.french.format(**french))
    )


def elided(french: str) -> str:
    """`Combien de œufs` is written `Combien d'œufs`."""
    return french.replace("de œufs", "d'œufs").replace("de oranges", "d'oranges")


def date(rng: random.Random) -> Pair:
    """A day of the year; the number of it in digits."""
    month, day = rng.choice(MONTHS), rng.randint(2, 28)
    return Pair(f"{month.english} {day}", f"le {day} {month.french}")


def number_word(rng: random.Random) -> Pair:
    """A number by itself, to 100."""
    number = rng.randint(2, 100)
    return Pair(in_words(number, "en"), in_words(number, "fr"))


PATTERNS: dict[Callable[[random.Random], Pair], float] = {
    statement: 4,
    existence: 1,
    description: 1,
    question: 2,
    follow_up: 2,
    date: 1,
    number_word: 1,
}
"""Pattern -> how often it is drawn."""


def translation(split: Split, rng: random.Random) -> Item:
    """One phrase to translate, into either language."""
    while True:
        (pattern,) = rng.choices(list(PATTERNS), list(PATTERNS.values()))
        pair = pattern(rng)
        if split_of(pair.english.lower()) == split:
            break
    pair = Pair(capitalised(pair.english), capitalised(pair.french))
    if rng.random() < 0.5:
        request = rng.choice(share_of(INTO_FRENCH, split))
        return {"prompt": request.format(text=pair.english), "answer": pair.french}
    request = rng.choice(share_of(INTO_ENGLISH, split))
    return {"prompt": request.format(text=pair.french), "answer": pair.english}


def capitalised(text: str) -> str:
    """A sentence with a capital first; a number or a date as it is."""
    return text[0].upper() + text[1:] if text.endswith((".", "?")) else text
