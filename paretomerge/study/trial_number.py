"""Which trial of a study a user means."""

from collections.abc import Sequence

from paretomerge.arguments import as_integer
from paretomerge.decide.pick import Choice
from paretomerge.errors import ConfigError, shorten
from paretomerge.pareto.preference import PreferSetting
from paretomerge.record.results import Results
from paretomerge.record.trial import Trial


def choice_of(
    results: Results,
    prefer: PreferSetting | None,
    trial: Trial | int | None,
) -> Choice:
    """Read a preference or a trial.

    Args:
        results: The study's results.
        prefer: Objective -> weight, `mean` or `knee`.
        trial: A trial, or its number.

    Returns:
        The choice.

    Raises:
        ConfigError: Both are given, or there is no such trial.
    """
    if prefer is not None and trial is not None:
        raise ConfigError("pick by one of `prefer` and `trial`, not both")
    number = None if trial is None else number_of(trial, results.trials)
    return Choice(prefer, number)


def number_of(trial: Trial | int, trials: Sequence[Trial]) -> int:
    """The number of one of a study's trials.

    Args:
        trial: The trial, or its number.
        trials: All trials of the study.

    Returns:
        The number.

    Raises:
        ConfigError: It is no trial, or one of another study.
    """
    if isinstance(trial, Trial):
        if not any(_is_same(recorded, trial) for recorded in trials):
            raise ConfigError(
                f"{trial!r} is not a trial of this study, or was changed. Merge its recipe "
                "with `merge`, and pass the checkpoint."
            )
        return trial.number
    # NumPy's integers, such as those of a data frame, are no `int`.
    number = as_integer(trial)
    if number is None:
        raise ConfigError(f"trial: a trial or its number, not {shorten(trial)}")
    return number


def _is_same(one: Trial, other: Trial) -> bool:
    """Whether two snapshots of one trial; held-out scores may have been added in between."""
    return (
        one.number == other.number
        and one.params == other.params
        and one.scores == other.scores
        and one.recipe_yaml == other.recipe_yaml
    )
