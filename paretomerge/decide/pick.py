"""Pick one trial of the front, and write its merge as a checkpoint."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from paretomerge.decide.belief import Belief
from paretomerge.decide.decision import Decision, decide
from paretomerge.errors import ConfigError
from paretomerge.evaluate.evaluator import Score
from paretomerge.pareto.preference import KNEE, MEAN, Preference, PreferSetting
from paretomerge.record.results import Results
from paretomerge.record.trial import Trial


@dataclass(frozen=True)
class Choice:
    """How to pick. At most one field is set; the knee of the front is the default.

    Attributes:
        prefer: Objective -> weight, `mean` or `knee`.
        trial: A trial's number.
    """

    prefer: PreferSetting | None = None
    trial: int | None = None

    @classmethod
    def parse(cls, prefer: str | None, trial: int | None, at_knee: bool) -> "Choice":
        """Read the command line's options.

        Args:
            prefer: `sort=0.7,reverse=0.3`, `mean` or `knee`.
            trial: A trial's number.
            at_knee: Whether `--knee` was given.

        Returns:
            The choice.

        Raises:
            ConfigError: Several options are given, or a weight is not a number.
        """
        given = [prefer is not None, trial is not None, at_knee]
        if sum(given) > 1:
            raise ConfigError("use one of --prefer, --knee and --trial, not several")
        if at_knee:
            return cls(KNEE)
        if prefer is None:
            return cls(trial=trial)
        if prefer == MEAN:
            return cls(MEAN)
        if prefer == KNEE:
            return cls(KNEE)
        # Only the form is checked here: the names of objectives are in the record, which `choose`
        # reads.
        weights = {}
        for part in prefer.split(","):
            name, _, number = part.partition("=")
            if name.strip() in weights:
                raise ConfigError(f"--prefer: {name.strip()!r} is named twice")
            try:
                weights[name.strip()] = float(number)
            except ValueError as error:
                raise ConfigError(
                    f"--prefer: write mean, knee or objective=weight,..., not {part!r}"
                ) from error
        return cls(prefer=weights)

    @property
    def text(self) -> str:
        """How the trial is picked, in words."""
        if self.trial is not None:
            return f"its number, {self.trial}"
        if self.prefer is None or self.prefer == KNEE:
            return "the knee of the front"
        if isinstance(self.prefer, str):
            return "the mean of the objectives"
        weights = []
        for name, weight in self.prefer.items():
            weights.append(f"{name}={weight:g}")
        return "the preference " + ", ".join(weights)

    def preference(self, results: Results) -> Preference:
        """The preference that the choice stands for.

        Args:
            results: The study's results.

        Returns:
            The preference.

        Raises:
            ConfigError: It names no objective of the study, or the objectives have no mean.
        """
        names = [objective.name for objective in results.objectives]
        if self.prefer is None:
            return Preference.knee(len(names))
        minimised = [o.name for o in results.objectives if not o.maximise]
        if self.prefer == MEAN and minimised:
            raise ConfigError(
                f"prefer: mean: {minimised[0]!r} is minimised; write objective=weight,..."
            )
        return Preference.parse(self.prefer, names)


def choose(results: Results, choice: Choice) -> Trial:
    """Find the trial that a choice selects.

    Args:
        results: The study's results.
        choice: How to pick.

    Returns:
        The trial.

    Raises:
        ConfigError: There is no such trial, it failed, or nothing has finished yet.
    """
    # A number may select any feasible trial, also one that is not on the front.
    if choice.trial is not None:
        return _numbered(results, choice.trial)
    return decide_for(results, choice).trial


def decide_for(results: Results, choice: Choice) -> Decision:
    """Pick by a preference or the knee, and say how sure the pick is.

    The pick rests on what is believed of all trials, given the search scores and those on selection
    examples (`Belief`). Held-out scores are never looked at: choosing by them would make them
    optimistic, too.

    Args:
        results: The study's results.
        choice: How to pick, without a number.

    Returns:
        The decision.

    Raises:
        ConfigError: No feasible trial has finished, or the preference does not fit the study.
    """
    preference = choice.preference(results)
    check_has_front(results)
    return decide(results, preference, Belief.of(results))


def check_has_front(results: Results) -> None:
    """Check that there is something to pick from.

    Args:
        results: The study's results.

    Raises:
        ConfigError: No feasible trial has finished; the message says why.
    """
    if not results.front:
        raise ConfigError(_why_no_front(results))


class _Undo(Exception):  # noqa: N818 - not an error
    """Makes `new_folder` remove what it has begun."""


def check_out(out: Path, overwrite: bool = False) -> None:
    """Check that a folder can be written, before time is spent on scoring.

    Args:
        out: The folder. Nothing is left there.
        overwrite: Whether an existing folder may be replaced.

    Raises:
        CheckpointError: It cannot be written.
    """
    from paretomerge.checkpoint.writer import (
        check_not_current,
        check_replaceable,
        new_folder,
    )

    check_not_current(out)
    if overwrite:
        check_replaceable(out)
    # Begins to write and undoes it, so the check and the writer cannot disagree.
    with suppress(_Undo), new_folder(out, overwrite):
        raise _Undo


def write_pick(
    results: Results,
    trial: Trial,
    out: Path,
    picked_by: str,
    overwrite: bool = False,
    allow_mismatch: bool = False,
) -> Path:
    """Write a trial's merge as a checkpoint, with its scores in the model card.

    Args:
        results: The study's results.
        trial: The trial.
        out: A new folder.
        picked_by: How it was picked, for the model card; see `Choice.text`.
        overwrite: Whether an existing folder is replaced.
        allow_mismatch: Whether models are merged that do not seem to belong together.

    Returns:
        The folder.

    Raises:
        CheckpointError: The folder exists, or cannot be written.
    """
    from paretomerge.merging.engine import merge

    card = scores_table(results.score_names, trial, picked_by)
    return merge(
        trial.recipe,
        out,
        overwrite=overwrite,
        card=card,
        allow_mismatch=allow_mismatch,
    )


def scores_table(names: Sequence[str], trial: Trial, picked_by: str) -> str:
    """Write a trial's scores as Markdown, for the model card.

    Args:
        names: Scores to list.
        trial: The trial.
        picked_by: How it was picked, "" where that is not known.

    Returns:
        A paragraph and a table.
    """
    title = f"Trial {trial.number}"
    if trial.label:
        title += f" ({trial.label})"
    picked = f", picked by {picked_by}" if picked_by else ""
    lines = [
        f"{title} of a paretomerge study{picked}.",
        "",
        "| task | search examples | held-out examples |",
        "|---|---|---|",
    ]
    for name in names:
        search = _cell(trial.scores.get(name))
        held_out = _cell((trial.held_out or {}).get(name))
        lines.append(f"| {name} | {search} | {held_out} |")
    return "\n".join(lines)


def _numbered(results: Results, number: int) -> Trial:
    trial = results.trial(number)
    if trial is None:
        raise ConfigError(
            f"trial {number}: there is no such trial; numbers are below {len(results.trials)}"
        )
    if trial.failure:
        raise ConfigError(f"trial {number} failed: {trial.failure}")
    if trial.violations:
        raise ConfigError(f"trial {number} breaks {trial.violations}")
    return trial


def _why_no_front(results: Results) -> str:
    scored = []
    for trial in results.trials:
        if not trial.failure:
            scored.append(trial)
    failed = [trial for trial in results.trials if trial.failure]
    if not scored and failed:
        latest = failed[-1]
        return f"{results.place}: all {len(failed)} trials failed; the latest: {latest.failure}"
    if not scored:
        return f"{results.place}: no trial has finished; run the search first"
    nearest = min(scored, key=_total_violation)
    return (
        f"{results.place}: none of {len(scored)} trials keeps the constraints. "
        f"The nearest, trial {nearest.number}, breaks {nearest.violations}. "
        "Search on, or loosen the constraints in another study."
    )


def _total_violation(trial: Trial) -> float:
    # Room to spare in one constraint must not make up for another that is broken.
    excesses = [max(violation, 0) for violation in trial.constraints.values()]
    return sum(excesses)


def _cell(score: Score | None) -> str:
    if score is None:
        return "-"
    number = f"{score.value:.4f} ± {score.stderr:.4f}"
    return f"{number} (n = {score.n})"
