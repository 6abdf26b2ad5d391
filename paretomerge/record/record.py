"""The record of a study: an Optuna storage that only ever holds finished trials, each written in one call.

A killed process leaves no half-written trial: either the transaction is there or it is not. The optimiser works on a
copy in memory, so asking costs no disk; `optuna-dashboard` reads the same file live.
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

from paretomerge.errors import StudyError
from paretomerge.evaluate.evaluator import Objective, Score
from paretomerge.pareto.front import nondominated
from paretomerge.record.storage import Storage

Scores = Mapping[str, Score]


@dataclass(frozen=True)
class Trial:
    """One finished evaluation. `scores` are in the user's directions; empty where it failed, `failure` says why.

    label: what the point is known as, if it was not proposed (`uniform soup`). held_out: None until it was scored there.
    constraints: each one's name -> by how much it is broken (kept where 0 or less). warm: the study and number that the
    scores were taken over from. same_as: the trial that had the same recipe, whose scores these are. gain: what the sampler
    expected of it, as a share of the hypervolume. final: False where it was left before all its items were scored (see `Race`), and its
    scores are estimates. level: 1 where it belongs to a study's second level (see `Then`).
    """

    number: int
    params: Mapping[str, Any]
    scores: Scores = field(default_factory=dict)
    label: str = ""
    failure: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)
    held_out: Scores | None = None
    constraints: Mapping[str, float] = field(default_factory=dict)
    warm: str = ""
    same_as: int | None = None
    gain: float | None = None
    level: int = 0
    final: bool = True

    @property
    def is_start(self) -> bool:
        """Whether it is one of the points that were tried because they were known."""
        return bool(self.label) and self.label != f"warm: {self.warm}"

    @property
    def broken(self) -> str:
        """The constraints that are broken, and by how much, as text; empty where all are kept."""
        return ", ".join(
            f"{name} (by {excess:.3g})" for name, excess in self.constraints.items() if excess > 0
        )

    @property
    def feasible(self) -> bool:
        """Scored, and within the constraints: only such trials can be on the front."""
        return not self.failure and not self.broken

    def values(self, objectives: Sequence[Objective]) -> list[float]:
        """The scores as the search sees them: all maximised."""
        return [o.inside(self.scores[o.name].value) for o in objectives]


def on_front(trials: Sequence[Trial], objectives: Sequence[Objective]) -> list[Trial]:
    """Those of `trials` that no other of them dominates, in their order."""
    mask = nondominated([t.values(objectives) for t in trials])
    return [t for t, best in zip(trials, mask, strict=True) if best]


class Record:
    """A study in an Optuna storage.

    identity: what makes trials comparable; a record with trials of another identity is refused, so that two different
    questions are never answered from one table, and one without any trial begins anew.
    """

    def __init__(
        self, storage: Storage, objectives: Sequence[Objective], identity: Mapping[str, Any]
    ) -> None:
        self.objectives = tuple(objectives)
        self.storage = storage
        if storage.file:
            storage.file.parent.mkdir(parents=True, exist_ok=True)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        mine = _without_unset(json.loads(json.dumps(identity)))
        with storage.opened() as database:
            self._study = self._open(database)
            kept = _without_unset(self.noted("identity"))
            if kept not in (None, mine) and not self.frozen():
                optuna.delete_study(study_name=storage.name, storage=database)
                self._study, kept = self._open(database), None
            if kept is None:
                self._begin(mine)
        if kept not in (None, mine):
            changed = sorted(key for key in {*kept, *mine} if kept.get(key) != mine.get(key))
            raise StudyError(
                f"{storage}: holds trials of another study: {', '.join(changed)} changed since. "
                "Give the new one another `out` (another `study_name` where `storage` is set), or put the old settings back"
            )

    def _open(self, database: optuna.storages.RDBStorage) -> optuna.Study:
        directions: list[Literal["maximize"]] = ["maximize"] * len(self.objectives)
        return optuna.create_study(
            study_name=self.storage.name,
            storage=database,
            directions=directions,
            load_if_exists=True,
        )

    def _begin(self, identity: Mapping[str, Any]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self._study.set_user_attr("identity", identity)
            self._study.set_metric_names([o.name for o in self.objectives])

    def add(self, frozen: FrozenTrial, number: int) -> None:
        """Write one finished trial, whole or not at all. StudyError, once it is there, where it did not become trial `number`."""
        with self.storage.legible():
            self._study.add_trial(frozen)
            there = len(self.frozen())
        if there != number + 1:
            raise StudyError(
                f"{self.storage}: expected to add trial {number}, got {there} trials: another process searches there, too. All are "
                "kept; let one of the two go on alone"
            )

    def freeze(
        self,
        trial: Trial,
        distributions: Mapping[str, BaseDistribution],
        system: Mapping[str, Any] | None = None,
    ) -> FrozenTrial:
        """The trial in Optuna's form; `system` is what the sampler noted on it."""
        user: dict[str, Any] = {
            "label": trial.label,
            "seconds": dict(trial.seconds),
            "scores": _pack(trial.scores),
        }
        more = {
            "failure": trial.failure,
            "warm": trial.warm,
            "same_as": trial.same_as,
            "gain": trial.gain,
            "level": trial.level or None,
        }
        more["final"] = None if trial.final else False
        user |= {name: value for name, value in more.items() if value not in ("", None)}
        if not trial.failure:
            user["stderr"] = [trial.scores[o.name].stderr for o in self.objectives]
        frozen = optuna.trial.create_trial(
            state=TrialState.FAIL if trial.failure else TrialState.COMPLETE,
            values=None if trial.failure else trial.values(self.objectives),
            params=dict(trial.params),
            distributions=dict(distributions),
            user_attrs=user,
            system_attrs=dict(system or {}),
        )
        for name, excess in trial.constraints.items():
            if name not in frozen.constraints:
                frozen.set_constraint(name, excess)
        return frozen

    def note(self, key: str, value: Any) -> None:
        """Keep a fact about the study itself; written only where it has changed, for others may be reading."""
        if self.noted(key) != value:
            with self.storage.legible():
                self._study.set_user_attr(key, value)

    def noted(self, key: str) -> Any:
        """A fact that was kept, None where there is none."""
        return self._study.user_attrs.get(key)

    def add_held_out(self, number: int, kind: str, scores: Scores) -> None:
        """Keep held-out scores of a trial; `kind` (objectives, watched) says which, so that each is scored once."""
        with self.storage.legible():
            self._study.set_user_attr(f"held_out/{number}/{kind}", _pack(scores))

    def held_out(self, number: int) -> dict[str, Scores]:
        """kind -> held-out scores of a trial."""
        return _held_out(self._study.user_attrs, number)

    def frozen(self) -> list[FrozenTrial]:
        """Optuna's view, in the order of their numbers."""
        return self._study.get_trials(deepcopy=False)

    def trials(self) -> list[Trial]:
        """Every finished trial, failed ones included."""
        return thawed(self._study)


def thawed(study: optuna.Study) -> list[Trial]:
    """The trials of a record that is open, in the order of their numbers."""
    attributes = study.user_attrs
    return [
        _thaw(frozen, _held_out(attributes, frozen.number))
        for frozen in study.get_trials(deepcopy=False)
    ]


def _without_unset(value: Any) -> Any:
    """Settings that are not set say nothing: records outlive the coming of new ones."""
    if isinstance(value, Mapping):
        return {key: _without_unset(inner) for key, inner in value.items() if inner is not None}
    return [_without_unset(inner) for inner in value] if isinstance(value, list) else value


def _thaw(frozen: FrozenTrial, held_out: Mapping[str, Scores]) -> Trial:
    user = frozen.user_attrs
    return Trial(
        number=frozen.number,
        params=frozen.params,
        scores=_unpack(user.get("scores", {})),
        label=user.get("label", ""),
        failure=user.get("failure", ""),
        seconds=user.get("seconds", {}),
        held_out={name: score for scores in held_out.values() for name, score in scores.items()}
        or None,
        constraints=frozen.constraints,
        warm=user.get("warm", ""),
        same_as=user.get("same_as"),
        gain=user.get("gain"),
        level=user.get("level", 0),
        final=user.get("final", True),
    )


def _held_out(attributes: Mapping[str, Any], number: int) -> dict[str, Scores]:
    prefix = f"held_out/{number}/"
    return {
        key.removeprefix(prefix): _unpack(packed)
        for key, packed in attributes.items()
        if key.startswith(prefix)
    }


def _pack(scores: Scores) -> dict[str, Any]:
    return {
        name: [s.value, s.stderr, s.n, _pack_items(s.example_scores)] for name, s in scores.items()
    }


def _unpack(packed: Mapping[str, Any]) -> dict[str, Score]:
    return {
        name: Score(value, stderr, n, _unpack_items(items))
        for name, (value, stderr, n, items) in packed.items()
    }


def _pack_items(items: tuple[float, ...] | None) -> str | list[float] | None:
    """Right and wrong as a string of 1 and 0: the common case, in one byte an item."""
    if items is None or not all(item in (0.0, 1.0) for item in items):
        return None if items is None else list(items)
    return "".join("1" if item else "0" for item in items)


def _unpack_items(items: str | list[float] | None) -> tuple[float, ...] | None:
    return None if items is None else tuple(float(item) for item in items)
