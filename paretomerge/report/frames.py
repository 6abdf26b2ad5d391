"""Trials as rows of a pandas data frame."""

from paretomerge.record.trial import Scores, Trial

Cell = str | int | float | bool | None


def dataframe_row(trial: Trial) -> dict[str, Cell]:
    """Flatten a trial.

    Args:
        trial: The trial.

    Returns:
        Column -> value; columns are named as in Optuna's `trials_dataframe`.
    """
    # A failed trial has no score columns, which pandas fills with NaN.
    row: dict[str, Cell] = {
        "number": trial.number,
        "label": trial.label,
        "state": "FAIL" if trial.failure else "COMPLETE",
        "failure": trial.failure,
        "feasible": trial.feasible,
        "level": trial.level,
    }
    row |= _score_cells("search", trial.scores)
    row |= _score_cells("held_out", trial.held_out or {})
    for name, value in trial.params.items():
        row[f"params_{name}"] = value
    for stage, seconds in trial.seconds.items():
        row[f"seconds_{stage}"] = seconds
    return row


def _score_cells(split: str, scores: Scores) -> dict[str, Cell]:
    cells: dict[str, Cell] = {}
    for name, score in scores.items():
        cells[f"{split}_{name}"] = score.value
        cells[f"{split}_{name}_stderr"] = score.stderr
    return cells
