"""What is evaluated before the sampler proposes.

The sources, what a warm start brings, the user's starts, the baselines.
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
        return WarmStart(starts, self.scored + other.scored, self.notes + other.notes)


def first_agenda(
    baselines: Mapping[str, Params],
    n_sources: int,
    warm_start: WarmStart,
    finished: Sequence[Trial],
    key: Callable[[Params], str],
) -> list[Trial]:
    """Line up what comes before the sampler's own proposals.

    First the sources: the hypervolume's reference point is theirs. Then everything that is
        already scored, the user's own
    starts, and the other baselines. The same recipe is lined up once; the sources are never left
    out.

    Args:
        baselines: Label -> point, the sources first.
        n_sources: How many of them are the sources.
        warm_start: What is known from outside.
        finished: The trials in the record.
        key: Tells which points are the same merge.

    Returns:
        Trials: those with scores are to be taken over, the others to be evaluated.
    """
    # Several studies may have scored the same merge; the first one named counts.
    scored: dict[str, Trial] = {}
    for trial in warm_start.scored:
        scored.setdefault(key(trial.params), trial)

    def labelled(label: str, params: Params) -> Trial:
        same = scored.get(key(params))
        if same is None:
            return Trial(-1, params, label=label)
        return replace(same, params=params, label=label)

    points = list(baselines.items())
    sources = [labelled(label, params) for label, params in points[:n_sources]]
    starts = [*warm_start.starts.items(), *points[n_sources:]]
    others = [labelled(label, params) for label, params in starts]
    with_label = {key(trial.params) for trial in (*sources, *others)}
    unlabelled = [
        trial for trial_key, trial in scored.items() if trial_key not in with_label
    ]

    # Sources are lined up by position and not by recipe: two of them may be the same merge, and
    # both need a trial.
    agenda = sources[len(finished) :]
    seen = {key(trial.params) for trial in (*finished, *sources)}
    known_first = [trial for trial in others if trial.scores] + unlabelled
    for trial in (*known_first, *(trial for trial in others if not trial.scores)):
        trial_key = key(trial.params)
        if trial_key not in seen:
            seen.add(trial_key)
            agenda.append(trial)
    return agenda
