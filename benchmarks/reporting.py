"""What the scripts share: result files of one JSON line per search, tables, arguments."""

import argparse
import json
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results"

Entry = dict[str, Any]
"""One line of a result file."""


def read_entries(path: Path) -> list[Entry]:
    """The lines of a result file. A line that an interrupt cut short is left out."""
    if not path.exists():
        return []
    entries = []
    for line in path.read_text().splitlines():
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return entries


def append_entry(
    path: Path, entry: Mapping[str, object], *, exact: bool = False
) -> None:
    """Add one line to a result file, its numbers rounded to six significant digits.

    exact: whether they keep all digits.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A line that an interrupt cut short must not swallow this one.
    written = path.read_text() if path.exists() else ""
    cut_short = bool(written) and not written.endswith("\n")
    with path.open("a") as file:
        if cut_short:
            file.write("\n")
        file.write(json.dumps(entry if exact else rounded(entry)) + "\n")


def missing_runs(
    path: Path, seeds: Iterable[int], searches: Sequence[str]
) -> Iterator[tuple[int, str]]:
    """The pairs (seed, search) that a result file has no entry of, seed after seed."""
    finished = {(entry["seed"], entry["search"]) for entry in read_entries(path)}
    for run in product(seeds, searches):
        if run not in finished:
            yield run


def rounded(value: object) -> object:
    """The value with each float in it rounded to six significant digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(part) for part in value]
    return value


def markdown_table(
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    text_columns: int = 1,
    spaced: bool = False,
) -> str:
    """A Markdown table, numbers on the right.

    text_columns: how many columns stand on the left. spaced: whether the rule below the header has
    spaces around its dashes, and an empty heading two spaces.
    """
    n_numbers = len(header) - text_columns
    rule = ["---"] * text_columns + ["---:"] * n_numbers
    head, line = markdown_row(header), markdown_row(rule)
    if not spaced:
        head = head.replace("|  |", "| |")
        line = line.replace(" ", "")
    body = [markdown_row(row) for row in rows]
    return "\n".join([head, line, *body])


def markdown_row(cells: Iterable[str]) -> str:
    """One line of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def mean_and_deviation(values: Sequence[float], digits: int = 3) -> str:
    """The mean and, of two values or more, their standard deviation."""
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) < 2:
        return mean
    return f"{mean} ± {statistics.stdev(values):.{digits}f}"


def write_study(
    folder: Path, name: str, seed: int, config: Mapping[str, object]
) -> Path:
    """Write the study.yaml of one search in a folder of its own; its path."""
    label = name.replace(" ", "-").replace(",", "")
    own_folder = folder / f"{label}-{seed}"
    own_folder.mkdir(parents=True, exist_ok=True)
    path = own_folder / "study.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def documented_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help shows the module's docstring as it is written."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def search_arguments(
    description: str | None,
    searches: Iterable[str],
    *,
    folder: bool = True,
    others: Iterable[str] = (),
) -> argparse.Namespace:
    """Arguments of a script that runs searches on several seeds: `run` or `table`.

    folder: whether `run` takes the folder for models and studies. others: commands without
    arguments.
    """
    names = list(searches)
    parser = documented_parser(description)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    if folder:
        run.add_argument("folder", type=Path)
    run.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    run.add_argument("--searches", nargs="+", choices=names, default=names)
    for command in ("table", *others):
        commands.add_parser(command)
    return parser.parse_args()
