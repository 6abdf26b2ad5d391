"""Facts out of plain sentences, as a JSON object.

    Write as JSON with the keys name, age, city, job: Nina Berg, 34, is a nurse in Oslo.
    {"name": "Nina Berg", "age": 34, "city": "Oslo", "job": "nurse"}

Requests, sentences and the words in them that belong to one split occur in no other.
"""

import json
import random
from collections.abc import Callable, Mapping

from examples.smollm.skills.splits import Item, Split, share_of

Fact = str | int

FIRST_NAMES = (
    *("Tom", "Anna", "Ben", "Lucy", "Sam", "Emma", "Jack", "Mia"),
    *("Noah", "Clara", "Hugo", "Zoe", "Felix", "Maya", "Oscar", "Jane"),
)
SURNAMES = (
    *("Berg", "Smith", "Costa", "Novak", "Brown", "Rossi", "Miller", "Fischer"),
    *("Lindgren", "Baker", "Moreau", "Sato", "Keller", "Silva", "Hansen", "Walker"),
)
CITIES = (
    *("Oslo", "Paris", "Madrid", "Vienna", "Boston", "Lisbon", "Dublin", "Rome"),
    *("Prague", "Chicago", "Athens", "Berlin", "Warsaw", "Toronto", "Geneva", "Sydney"),
)
JOBS = (
    *("nurse", "teacher", "baker", "lawyer", "farmer", "driver"),
    *("painter", "doctor", "dentist", "singer", "cook", "pilot"),
)
GOODS = (
    *("lamps", "chairs", "shirts", "phones", "books", "cups", "bikes", "tables"),
    *("clocks", "boots", "pens", "hats", "mirrors", "bags", "radios", "spoons"),
)
COLOURS = ("red", "blue", "green", "white", "black", "yellow", "grey", "brown")
WEEKDAYS = (
    "Monday",
    "Tuesday",
    "Wednesday",
    "Thursday",
    "Friday",
    "Saturday",
    "Sunday",
)
TOPICS = (
    *("budget", "holiday", "project", "garden", "school", "music"),
    *("safety", "travel", "history", "website", "health", "sports"),
)

REQUESTS = (
    "Write as JSON with the keys {keys}: {sentence}",
    "Extract {keys} as a JSON object. {sentence}",
    "{sentence} Give me {keys} in JSON.",
    "Turn this into JSON ({keys}): {sentence}",
    "Fill in a JSON object with {keys} from this text: {sentence}",
    "{sentence} Return a JSON object that has {keys}.",
    "Read the text and answer in JSON with {keys}. {sentence}",
    "What are {keys}? Answer as a JSON object. {sentence}",
)
PERSONS = (
    "{name}, {age}, is a {job} in {city}.",
    "{name} is {age} years old, lives in {city} and works as a {job}.",
    "The {job} {name} from {city} turned {age} this week.",
    "At {age}, {name} moved to {city} to be a {job}.",
    "In {city} we met {name}, a {job} of {age} years.",
    "My neighbour {name} ({age}) works in {city}; the job is that of a {job}.",
    "Say hello to {name}, who is {age} and the best {job} of {city}.",
    "Our new {job} is called {name}, comes from {city} and is {age}.",
)
ORDERS = (
    "{name} ordered {count} {colour} {goods}.",
    "Please send {count} {colour} {goods} to {name}.",
    "An order came in from {name}: {goods}, {colour}, {count} pieces.",
    "{name} bought {count} {goods}, all of them {colour}.",
    "We owe {name} {count} {goods} in {colour}.",
    "There are {count} {colour} {goods} waiting for {name}.",
    "{count} {goods} were sold to {name}, who wanted them {colour}.",
    "The customer {name} asks for {goods} in {colour}, {count} in all.",
)
MEETINGS = (
    "The {topic} meeting is on {day} at {hour} in room {room}.",
    "On {day} at {hour} we talk about {topic} in room {room}.",
    "Room {room} is booked on {day}, {hour}, for the {topic} meeting.",
    "Please come to room {room} at {hour} on {day}; the subject is {topic}.",
    "We meet in room {room} to discuss {topic}, {day} at {hour}.",
    "{topic} is the subject on {day}. Room {room}, {hour}.",
    "At {hour} on {day} the {topic} group gathers in room {room}.",
    "Do not forget {day}, {hour}, room {room}: it is about {topic}.",
)


def person(split: Split, rng: random.Random) -> dict[str, Fact]:
    """Who somebody is."""
    return {
        "name": full_name(split, rng),
        "age": rng.randint(18, 90),
        "city": rng.choice(share_of(CITIES, split)),
        "job": rng.choice(share_of(JOBS, split)),
    }


def order(split: Split, rng: random.Random) -> dict[str, Fact]:
    """What somebody ordered."""
    return {
        "name": full_name(split, rng),
        "count": rng.randint(2, 99),
        "colour": rng.choice(COLOURS),
        "goods": rng.choice(share_of(GOODS, split)),
    }


def meeting(split: Split, rng: random.Random) -> dict[str, Fact]:
    """When and where a meeting is."""
    return {
        "topic": rng.choice(share_of(TOPICS, split)),
        "day": rng.choice(WEEKDAYS),
        "hour": f"{rng.randint(8, 19)}:{rng.choice(('00', '15', '30', '45'))}",
        "room": rng.randint(1, 60),
    }


def full_name(split: Split, rng: random.Random) -> str:
    """A first name and a surname."""
    first = rng.choice(share_of(FIRST_NAMES, split))
    return f"{first} {rng.choice(share_of(SURNAMES, split))}"


KINDS: tuple[
    tuple[Callable[[Split, random.Random], dict[str, Fact]], tuple[str, ...]], ...
]
KINDS = ((person, PERSONS), (order, ORDERS), (meeting, MEETINGS))


def extraction(split: Split, rng: random.Random) -> Item:
    """One text and the object that it holds, its keys in the order of the request."""
    draw, sentences = rng.choice(KINDS)
    facts = draw(split, rng)
    sentence = rng.choice(share_of(sentences, split)).format(**facts)
    keys = list(facts)
    rng.shuffle(keys)
    request = rng.choice(share_of(REQUESTS, split))
    prompt = request.format(keys=", ".join(keys), sentence=sentence)
    return {"prompt": prompt, "answer": as_json(facts, keys)}


def as_json(facts: Mapping[str, Fact], keys: list[str]) -> str:
    """The object on one line."""
    return json.dumps({key: facts[key] for key in keys}, ensure_ascii=False)
