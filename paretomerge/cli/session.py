"""What the commands have in common: a study is opened, searched, shown; names and sizes are read; all is said on one console."""

import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from paretomerge.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from paretomerge.config.schema import StudyConfig
    from paretomerge.evaluate.evaluator import Split
    from paretomerge.record.record import Trial
    from paretomerge.study.budget import Budget
    from paretomerge.study.study import Study


def open_study(path: Path) -> "tuple[Study, StudyConfig]":
    """The study of a study.yaml; what is noteworthy about its spaces is said."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.disable_progress_bar()
    from paretomerge.config.build import load_study

    study, config = load_study(path)
    note((*study.space.notes, *(study.then.notes if study.then else ())))
    return study, config


def search(study: "Study", budget: "Budget", quiet: bool) -> None:
    """Until the budget is spent; then known starts and front on held-out items, and what is watched."""
    from paretomerge.cli.progress import Progress, tally
    from paretomerge.decide.pick import Choice, choose

    try:
        note(study.known.notes)
        with Progress(study, console(), quiet) as progress:
            reason = study.run(budget, progress.trial)
            if not quiet:
                console().print(f"{reason} ({tally(study.trials)})", highlight=False)
            known = study.starts()
            sources = [t for t in known if t.label in study.space.sources]
            study.hold_out([*known, *study.front()], progress.held_out)
            study.hold_out([*sources, choose(study, Choice())], progress.held_out, watched=True)
        note(study.goals.notes)
    except KeyboardInterrupt:
        sys.stderr.write("\nstopped; every finished trial is kept, the same command goes on\n")
        raise typer.Exit(130) from None


def show(study: "Study", most: int | None = None) -> "Trial":
    """The known starts and the front (its `most` best) as tables; returns the trial that `pick` takes by itself."""
    from paretomerge.decide.pick import Choice, choose
    from paretomerge.report.tables import best_first, terminal_table

    choice = Choice()
    picked = choose(study, choice)
    console().print()
    console().print(terminal_table(study, study.starts(), "Known starts", picked.number))
    console().print()
    ranked = best_first(study, study.front())
    shown = ranked[:most]
    if picked not in shown:
        shown.append(picked)
    heading = f"Pareto front, {len(shown)} of {len(ranked)} by scaled mean (→ {choice.text})"
    console().print(terminal_table(study, shown, heading, picked.number))
    return picked


def split_of(name: str) -> "Split":
    if name not in ("search", "held_out"):
        raise ConfigError(f"--split: expected search or held_out, got {name!r}")
    return "search" if name == "search" else "held_out"


def note(notes: Iterable[str]) -> None:
    for text in notes:
        sys.stderr.write(f"note: {text}\n")


def bytes_of(text: str) -> int:
    """5GB, 500MB, 2000000: decimal units, as the Hub counts."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "B": 1, "": 1}
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?B)?", text.strip().upper())
    if not found or (size := int(float(found[1]) * units[found[2] or ""])) < 1:
        raise ConfigError(f"--shard-size: expected a size like 5GB or 500MB, got {text!r}")
    return size


def console() -> "Console":
    from rich.console import Console

    return Console(markup=False, emoji=False)  # what users and errors say is no markup


def short(path: Path) -> str:
    """Relative to the current folder where that is shorter."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def shipped() -> Path:
    relative = Path("examples") / "specialists" / "study.yaml"
    for root in (Path.cwd(), Path(__file__).resolve().parents[2]):
        if (root / relative).is_file():
            return root / relative
    raise ConfigError(
        f"quickstart: expected {relative} here; run it from a clone of the repository"
    )
