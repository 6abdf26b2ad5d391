"""How items are dealt to training, search and held-out scoring."""

import zlib
from collections.abc import Sequence
from typing import Literal, TypeVar

Split = Literal["train", "search", "held_out"]
Item = dict[str, str]
"""`prompt` is the user's message, `answer` the whole reply."""

BUCKETS: dict[Split, range] = {
    "search": range(2),
    "held_out": range(2, 5),
    "train": range(5, 10),
}
T = TypeVar("T")


def split_of(content: str) -> Split:
    """The split that a text belongs to: by a checksum, so the same on every machine."""
    bucket = zlib.crc32(content.encode()) % 10
    return next(split for split, buckets in BUCKETS.items() if bucket in buckets)


def share_of(choices: Sequence[T], split: Split) -> Sequence[T]:
    """A split's own part of a list: half for training, a quarter for each other split."""
    half, quarter = len(choices) // 2, len(choices) // 4
    if split == "train":
        return choices[:half]
    if split == "search":
        return choices[half : half + quarter]
    return choices[half + quarter :]
