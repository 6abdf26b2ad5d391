"""What the language model reads: the task, the parameters and the log of trials."""

import json
import math
from collections.abc import Iterator, Sequence

import numpy as np
from optuna import Study
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from paretomerge.endpoint import Message
from paretomerge.pareto.front import nondominated_fronts
from paretomerge.search.encoding import Condition, Space
from paretomerge.search.observations import Observations
from paretomerge.types import Conditions, ParamValue

TASK = (
    "You choose the settings for merging the weights of language models that were fine-tuned from "
    "one base model. `method` is how they are merged; a `weight` scales what one model changed in "
    "the base (0: left out, 1: in full, above 1: amplified; weights need not sum to 1); a "
    "`density` is the share of its changes that is kept. The rest of a name is the model, "
    "and, where they have settings of their own, the group of layers (0: nearest the input) and "
    "the part of a layer."
)
"""What the parameters of a `WeightSpace` mean."""

_RULES = (
    "Answer with one JSON object and nothing else: every parameter's name with its value, flat. "
    "Choose a point that is likely to improve the front: better than the known ones in some "
    "objective, or a new trade-off. Do not repeat a known point."
)
_DIGITS = 3  # numbers in the log are rounded to a thousandth of their range


def build_messages(
    task: str,
    space: Space,
    conditions: Conditions,
    log: Sequence[str],
) -> list[Message]:
    """Write the chat that asks for a point.

    Args:
        task: What the parameters mean.
        space: The parameters.
        conditions: When each parameter is active.
        log: The lines of the trial log.

    Returns:
        A system message and a user message.
    """
    parameters = []
    for name, distribution in space.items():
        description = describe(distribution, conditions.get(name, ()))
        parameters.append(f"- {json.dumps(name)}: {description}")
    content = "\n".join(
        [
            "Parameters:",
            *parameters,
            "",
            "Trials so far (of many, the best and the latest), as tab-separated values:",
            *log,
        ]
    )
    return [
        {"role": "system", "content": f"{task}\n{_RULES}"},
        {"role": "user", "content": content},
    ]


def describe(
    distribution: BaseDistribution,
    conditions: Sequence[Condition] = (),
) -> str:
    """Say which values a parameter takes, and when it is active.

    Args:
        distribution: The parameter's distribution.
        conditions: Pairs (parent, values), as in `Conditions`.

    Returns:
        A phrase in English.
    """
    if isinstance(distribution, CategoricalDistribution):
        choices = json.dumps(list(distribution.choices), default=str)
        values = f"one of {choices}"
    else:
        values = _describe_number(distribution)
    if not conditions:
        return values
    clauses = []
    for parent, parent_values in conditions:
        listed = json.dumps(list(parent_values), default=str)
        clauses.append(f"{json.dumps(parent)} is one of {listed}")
    return f"{values}; counts only where {' and '.join(clauses)}"


def _describe_number(distribution: BaseDistribution) -> str:
    assert isinstance(distribution, (FloatDistribution, IntDistribution))
    kind = "a number"
    if isinstance(distribution, IntDistribution):
        kind = "a whole number"
    low = distribution.low
    high = distribution.high
    text = f"{kind} from {low:.12g} to {high:.12g}"
    if distribution.step not in (None, 1):
        text += f" in steps of {distribution.step:g}"
    if distribution.log:
        text += " (think in logarithms)"
    return text


def format_trial_log(
    study: Study,
    observations: Observations,
    space: Space,
    max_characters: int,
) -> list[str]:
    """Write the log of trials as tab-separated values.

    Args:
        study: The study, for the names and directions of the objectives.
        observations: Its trials.
        space: The parameters to show.
        max_characters: The most characters of all lines but the heading.

    Returns:
        A heading and one line per trial, in their order. If not all fit, the lines are chosen from
        the best trials, front after front, and the latest, in turn.
    """
    lines: dict[int, str] = {}
    remaining = max_characters
    for i in _alternate_best_and_latest(observations):
        if i in lines:
            continue
        line = _format_trial(observations, i, space)
        remaining -= len(line) + 1  # 1 for the line break
        if remaining < 0:
            break
        lines[i] = line
    titles = ["trial", *_objective_titles(study), *space]
    heading = "\t".join(titles)
    ordered = [lines[i] for i in sorted(lines)]
    return [heading, *ordered]


def _objective_titles(study: Study) -> list[str]:
    """The name and the direction of each objective."""
    titles = []
    names = study.metric_names
    for k, direction in enumerate(study.directions):
        name = names[k] if names else f"objective {k + 1}"
        verb = direction.name.lower()
        titles.append(f"{name} ({verb})")
    return titles


def _alternate_best_and_latest(observations: Observations) -> Iterator[int]:
    """Indices of the best and the latest trials in turn; an index may come twice."""
    best = _best_first(observations)
    for latest in reversed(range(len(observations))):
        next_best = next(best, None)
        if next_best is not None:
            yield next_best
        yield latest


def _best_first(observations: Observations) -> Iterator[int]:
    """Indices of the feasible trials, front after front."""
    feasible = np.flatnonzero(observations.feasible)
    for front in nondominated_fronts(observations.y[feasible]):
        yield from feasible[front].tolist()


def _format_trial(
    observations: Observations,
    i: int,
    space: Space,
) -> str:
    params = observations.trials[i].params
    fields = _format_values(observations, i)
    for name, distribution in space.items():
        value = params.get(name)
        fields.append(_format_value(value, distribution))
    return "\t".join(fields)


def _format_values(observations: Observations, i: int) -> list[str]:
    """The number of a trial and its values, with standard errors where these are known."""
    trial = observations.trials[i]
    m = len(observations.signs)
    if not observations.complete[i]:
        return [str(trial.number), *["failed"] * m]
    number = str(trial.number)
    if not observations.feasible[i]:
        number += " (infeasible)"
    texts = [number]
    stderr = observations.stderr
    for k, value in enumerate(trial.values):
        text = f"{value:.4g}"
        # NaN means that no trial has a standard error for this objective.
        if stderr is not None and not math.isnan(stderr[i, k]):
            text += f"±{stderr[i, k]:.1g}"
        texts.append(text)
    return texts


def _format_value(value: ParamValue, distribution: BaseDistribution) -> str:
    """A parameter's value, rounded to a thousandth of its range or to four digits."""
    if value is None or isinstance(distribution, CategoricalDistribution):
        return json.dumps(value, default=str)
    assert isinstance(distribution, (FloatDistribution, IntDistribution))
    if distribution.log:
        return f"{value:.4g}"
    if distribution.step is not None:
        return f"{value:.12g}"
    # The power of ten of the range: ranges of 0.1 and of 0.9 are rounded to the same digit.
    extent = distribution.high - distribution.low
    magnitude = math.floor(math.log10(extent))
    rounded = round(float(value), _DIGITS - magnitude)
    return f"{rounded:.12g}"
