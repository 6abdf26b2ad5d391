"""What is evaluated before the sampler proposes.

These are the sources, the trials and points of a warm start, the user's starts and the baselines.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from paretomerge.record.trial import Trial
from paretomerge.types import Params


@dataclass(frozen=True)
class WarmStart:
    """What a study knows before it begins.

    Attributes:
        starts: Label -> point to evaluate right after the sources.
        scored: Trials of other studies in this space's parameters, whose scores are taken over.
        notes: For the user.
    """

    starts: Mapping[str, Params] = field(default_factory=dict)
    scored: tuple[Trial, ...] = ()
    notes: tuple[str, ...] = ()

    def __or__(self, other: "WarmStart") -> "WarmStart":
        starts = {**self.starts, **other.starts}
        scored = self.scored + other.scored
        notes = self.notes + other.notes
        return WarmStart(starts, scored, notes)


def first_agenda(
    baselines: Mapping[str, Params],
    n_sources: int,
    warm_start: WarmStart,
    finished: Sequence[Trial],
    key: Callable[[Params], str],
) -> list[Trial]:
    """Line up what comes before the sampler's own proposals.

    The sources come first, since the hypervolume's reference point is computed from them. Then come
    all trials that are already scored, the user's starts and the other baselines. A recipe is lined
    up once; the sources are never left out.

    Args:
        baselines: Label -> point, the sources first.
        n_sources: How many of them are the sources.
        warm_start: Points and trials from outside the study.
        finished: The trials in the record.
        key: Gives points of the same merge the same key.

    Returns:
        Trials: those with scores are to be taken over, the others to be evaluated.
    """
    # Several studies may have scored the same merge; the first study in the user's list counts.
    scored: dict[str, Trial] = {}
    for trial in warm_start.scored:
        scored.setdefault(key(trial.params), trial)

    def labelled(label: str, params: Params) -> Trial:
        same = scored.get(key(params))
        if same is None:
            return Trial(-1, params, label=label)
        return replace(same, params=params, label=label)

    points = list(baselines.items())
    sources: list[Trial] = []
    for label, params in points[:n_sources]:
        sources.append(labelled(label, params))
    others: list[Trial] = []
    for label, params in (*warm_start.starts.items(), *points[n_sources:]):
        others.append(labelled(label, params))
    # A scored trial that is also a baseline or a start already carries that label above.
    with_label = {key(trial.params) for trial in (*sources, *others)}
    unlabelled: list[Trial] = []
    for trial_key, trial in scored.items():
        if trial_key not in with_label:
            unlabelled.append(trial)

    # Sources are found by label and not by recipe: two of them may be the same merge, and both need
    # a trial.
    done = {trial.label for trial in finished}
    agenda = [trial for trial in sources if trial.label not in done]
    seen = {key(trial.params) for trial in (*finished, *sources)}
    # Trials with scores cost nothing: the record has them before anything is evaluated.
    with_scores = [trial for trial in others if trial.scores]
    without_scores = [trial for trial in others if not trial.scores]
    for trial in (*with_scores, *unlabelled, *without_scores):
        trial_key = key(trial.params)
        if trial_key not in seen:
            seen.add(trial_key)
            agenda.append(trial)
    return agenda
