"""Write the examples behind the tasks: `python -m examples.smollm.make_data`.

The files are committed; running it again changes nothing.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics

from examples.smollm.skills import SKILLS, Item, draw_items
from examples.smollm.skills.general import general_questions

DATA = Path(__file__).parent / "tasks" / "data"
N_SEARCH, N_HELD_OUT = 200, 400
TEXT_CHARACTERS = 60_000


def write_items(name: str, split: str, items: Sequence[Item]) -> None:
    """One JSON object per line, in `data/NAME/SPLIT.jsonl`."""
    path = DATA / name / f"{split}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(item, ensure_ascii=False) for item in items]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def plain_text() -> str:
    """Python's own manual, as text; the same in all releases of 3.11 but for small corrections."""
    return "\n".join(topics[name] for name in sorted(topics))[:TEXT_CHARACTERS]


def main() -> None:
    """Write all files."""
    for name in SKILLS:
        write_items(name, "search", draw_items(name, "search", N_SEARCH))
        write_items(name, "held_out", draw_items(name, "held_out", N_HELD_OUT))
    write_items("general", "search", general_questions("search"))
    write_items("general", "held_out", general_questions("held_out"))
    (DATA / "text.txt").write_text(plain_text(), encoding="utf-8")


if __name__ == "__main__":
    main()
