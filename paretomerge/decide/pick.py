"""Picking one trial of the front, and writing it out."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from paretomerge.checkpoint.writer import new_folder
from paretomerge.errors import ConfigError, unknown_name
from paretomerge.merging.engine import merge
from paretomerge.pareto.ranking import knee, preferred
from paretomerge.record.record import Trial
from paretomerge.study.study import Study


@dataclass(frozen=True)
class Choice:
    """How to pick: by preference (objective -> weight), by trial number, or the knee where neither is given."""

    prefer: Mapping[str, float] | None = None
    trial: int | None = None

    @classmethod
    def parse(cls, prefer: str | None, trial: int | None, at_knee: bool) -> "Choice":
        """From the command line: `sort=0.7,reverse=0.3`; at most one way."""
        if sum([prefer is not None, trial is not None, at_knee]) > 1:
            raise ConfigError("expected one of --prefer, --knee and --trial, got several")
        if prefer is None:
            return cls(trial=trial)
        weights = {}
        for part in prefer.split(","):
            name, _, number = part.partition("=")
            try:
                weights[name.strip()] = float(number)
            except ValueError as error:
                raise ConfigError(
                    f"--prefer: expected objective=weight,..., got {part!r}"
                ) from error
        return cls(prefer=weights)

    @property
    def text(self) -> str:
        if self.trial is not None:
            return f"--trial {self.trial}"
        if self.prefer is None:
            return "--knee"
        return "--prefer " + ",".join(f"{name}={weight:g}" for name, weight in self.prefer.items())


def choose(study: Study, choice: Choice) -> Trial:
    """The trial that a choice names; preferences and the knee look at the front's search scores only."""
    if choice.trial is not None:
        for trial in study.trials:
            if trial.number == choice.trial:
                if trial.failure:
                    raise ConfigError(f"--trial {choice.trial}: this trial failed: {trial.failure}")
                if trial.broken:
                    raise ConfigError(
                        f"--trial {choice.trial}: expected a feasible trial, got one that breaks {trial.broken}"
                    )
                return trial
        raise ConfigError(
            f"--trial {choice.trial}: expected a number below {len(study.trials)}, got none of that number"
        )
    front = study.front()
    scored = [t for t in study.trials if not t.failure]
    if not front and scored:
        near = min(scored, key=lambda t: sum(max(excess, 0) for excess in t.constraints.values()))
        raise ConfigError(
            f"{study.folder}: expected a trial that keeps the constraints, got none of {len(scored)}; the nearest, trial {near.number}, "
            f"breaks {near.broken}. Search on, or loosen them in another study"
        )
    if not front:
        raise ConfigError(
            f"{study.folder}: there is no finished trial to pick from; run `paretomerge search` first"
        )
    values = [t.values(study.objectives) for t in front]
    if choice.prefer is None:
        return front[knee(values)]
    names = [o.name for o in study.objectives]
    for name, weight in choice.prefer.items():
        if name not in names:
            raise ConfigError(f"--prefer: {unknown_name('objective', name, names)}")
        if weight < 0:
            raise ConfigError(f"--prefer: expected weights of 0 or more, got {name}={weight:g}")
    weights = [choice.prefer.get(name, 0.0) for name in names]
    if not sum(weights) > 0:
        raise ConfigError("--prefer: expected a weight above 0, got none")
    return front[preferred(values, weights)]


class _GivenUp(Exception):  # noqa: N818  no error, but the way out
    """A folder that was begun only to see that it can be."""


def check_out(out: Path, overwrite: bool = False) -> None:
    """Raise CheckpointError where `write_pick` could not write `out`, before time is spent on scoring; nothing is left there."""
    with suppress(_GivenUp), new_folder(out, overwrite):
        raise _GivenUp


def write_pick(
    study: Study, trial: Trial, out: Path, choice: Choice, overwrite: bool = False
) -> Path:
    """Write the trial's merge as a checkpoint, with its scores in the model card."""
    return merge(
        study.recipe(trial),
        out,
        overwrite=overwrite,
        card=_scores(study.objectives_and_watched(), trial, choice),
    )


def _scores(names: Sequence[str], trial: Trial, choice: Choice) -> str:
    lines = [f"Trial {trial.number} of a paretomerge study, picked with `{choice.text}`.", ""]
    lines += ["| task | search items | held-out items |", "|---|---|---|"]
    for name in names:
        search = trial.scores.get(name)
        held_out = (trial.held_out or {}).get(name)
        cells = [
            "-" if s is None else f"{s.value:.4f} ± {s.stderr:.4f} (n = {s.n})"
            for s in (search, held_out)
        ]
        lines.append(f"| {name} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)
