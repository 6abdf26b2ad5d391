"""What is known before a search: points to try first, and scores that another study has already measured."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from paretomerge.record.record import Trial

Params = Mapping[str, Any]


@dataclass(frozen=True)
class Known:
    """starts: label -> point to evaluate right after the sources. scored: trials of other studies in this space's
    parameters, with `warm` saying whose, taken over with their scores. notes: what to tell the user about both.
    """

    starts: Mapping[str, Params] = field(default_factory=dict)
    scored: tuple[Trial, ...] = ()
    notes: tuple[str, ...] = ()

    def __or__(self, other: "Known") -> "Known":
        return Known(
            {**self.starts, **other.starts}, self.scored + other.scored, self.notes + other.notes
        )


def agenda(
    starts: Mapping[str, Params],
    sources: int,
    known: Known,
    finished: Sequence[Trial],
    key: Callable[[Params], str],
) -> list[Trial]:
    """What comes before the sampler's own proposals, in order, without what `finished` has: trials with scores are to be
    taken over, those without to be evaluated.

    First the `sources`, the first of `starts`: the reference point is theirs. Then everything that is already scored, the
    user's own starts, and the rest of `starts`. `key` tells which points are the same merge; the sources are never left out.
    """
    own = list(starts.items())
    scored: dict[str, Trial] = {}
    for trial in known.scored:
        scored.setdefault(key(trial.params), trial)

    def coming(label: str, params: Params) -> Trial:
        same = scored.get(key(params))
        return (
            Trial(-1, params, label=label)
            if same is None
            else replace(same, params=params, label=label)
        )

    seen = {key(t.params) for t in finished}
    first = [coming(label, params) for label, params in own[:sources]]
    points = [coming(label, params) for label, params in (*known.starts.items(), *own[sources:])]
    named = {key(t.params) for t in (*first, *points)}
    others = [t for k, t in scored.items() if k not in named]
    out = first[len(finished) :]
    seen |= {key(t.params) for t in first}
    for trial in (*(t for t in points if t.scores), *others, *(t for t in points if not t.scores)):
        if key(trial.params) not in seen:
            seen.add(key(trial.params))
            out.append(trial)
    return out
