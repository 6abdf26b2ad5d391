"""The record of a study: an Optuna storage that only ever holds finished trials.

Each trial is written in one transaction, so a killed process leaves no half-written trial. The
sampler works on a copy in memory, so asking does not touch the disk. `optuna-dashboard` reads the
same database while a search runs.
"""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import optuna
from optuna.distributions import BaseDistribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from paretomerge.errors import StudyError
from paretomerge.evaluate.evaluator import Objective, Score
from paretomerge.record._optuna_tables import TrialTable
from paretomerge.record.changes import describe_changes
from paretomerge.record.folder import make_folder
from paretomerge.record.moved import moved_folders, root_notes, with_new_paths
from paretomerge.record.results import Parameters, Results
from paretomerge.record.storage import Storage
from paretomerge.record.trial import Scores, Trial
from paretomerge.search.observations import SAME_AS, STDERR, WARM
from paretomerge.types import Conditions

_Result = TypeVar("_Result")
# Prefix of the study's attributes `held_out/<trial>/<kind>`. They are not attributes of the trial,
# because Optuna refuses to change a finished trial.
_HELD_OUT = "held_out"
_SELECTION = "selection"
_CONDITIONS = "conditions"
_ALLOW_MISMATCH = "allow_mismatch"
WATCHED = "watched"
"""The note of what is watched: name of each score -> what is set of its task."""


@dataclass(frozen=True)
class Header:
    """What a record states about its study, written once, before the first trial.

    Attributes:
        objectives: The objectives, with their directions.
        sources: Names of the models that are merged.
        identity: Everything that makes trials comparable. A record with trials of another identity
            is refused, so that one table never mixes scores with different meanings.
    """

    objectives: tuple[Objective, ...]
    sources: tuple[str, ...]
    identity: Mapping[str, Any]


class Record:
    """A study in an Optuna storage.

    Use `Record.begin` to search and `Record.read` to look at what is there.

    Attributes:
        storage: Where it is.
        objectives: The objectives, with their directions.
        sources: Names of the models that are merged.
    """

    def __init__(
        self,
        storage: Storage,
        study: optuna.Study,
        database: optuna.storages.RDBStorage,
        trials: TrialTable,
        to_search: bool = False,
    ) -> None:
        self.storage = storage
        # A search waits for a database that is away; whoever only looks is told at once.
        self._to_search = to_search
        self.objectives = _read_objectives(study)
        self.sources = tuple(study.user_attrs.get("sources", ()))
        self._study = study
        self._database = database
        self._study_id = database.get_study_id_from_name(study.study_name)
        self._table = trials
        # Trial number -> its search scores: thousands of examples, read once for all looks.
        self._scores: dict[int, Scores] = {}

    @classmethod
    def begin(cls, storage: Storage, header: Header) -> "Record":
        """Open a study's record to add trials; create it where there is none.

        A record of another study is replaced if it has no trial, or only failed ones.

        Args:
            storage: Where it is.
            header: The study.

        Returns:
            The record.

        Raises:
            StudyError: The record holds trials of another study, or cannot be read or written.
        """
        if storage.file:
            make_folder(storage.file.parent)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        return storage.once_unlocked(
            lambda: cls._begin(storage, header), to_search=True
        )

    @classmethod
    def _begin(cls, storage: Storage, header: Header) -> "Record":
        identity = _plain(header.identity)
        with storage.connect() as database:
            study = _create_or_load(storage, database, header)
            _check_identity(storage, study, identity)
            recorded = _without_unset(study.user_attrs.get("identity"))
            if recorded not in (None, identity):
                # It has no scores, or the check would have failed.
                optuna.delete_study(study_name=storage.study_name, storage=database)
                study = _create_or_load(storage, database, header)
                recorded = None
            if recorded is None:
                _write_header(study, header, identity)
            trials = TrialTable(database, storage.study_name)
        return cls(storage, study, database, trials, to_search=True)

    @staticmethod
    def check(storage: Storage, header: Header) -> None:
        """Check that trials of a study may be added to a record; nothing is created.

        Args:
            storage: Where the record is, or would be.
            header: The study.

        Raises:
            StudyError: The record holds trials of another study, or cannot be read.
        """
        # SQLite creates a missing file when it connects.
        if storage.file and not storage.file.is_file():
            return
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        storage.once_unlocked(lambda: _check_record(storage, header), to_search=True)

    @classmethod
    def read(cls, storage: Storage, to_search: bool = False) -> "Record":
        """Open a record for reading; nothing is created or locked.

        Args:
            storage: Where it is.
            to_search: Whether a search reads it, which waits longer for a lock.

        Returns:
            The record.

        Raises:
            StudyError: There is no such record, or it cannot be read.
        """
        # SQLite creates a missing file when it connects, and reading must leave nothing behind.
        if storage.file and not storage.file.is_file():
            raise StudyError(
                f"{storage.file}: there is no record here yet. Run the search first."
            )
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        return storage.once_unlocked(lambda: cls._read(storage, to_search), to_search)

    @classmethod
    def _read(cls, storage: Storage, to_search: bool) -> "Record":
        with storage.connect() as database:
            try:
                study = optuna.load_study(
                    study_name=storage.study_name, storage=database
                )
            except KeyError as error:
                names = optuna.get_all_study_names(database)
                others = f"It holds {', '.join(names)}." if names else "It is empty."
                raise StudyError(
                    f"{storage.redacted_url}: there is no study named {storage.study_name!r}. "
                    f"{others}"
                ) from error
            trials = TrialTable(database, storage.study_name)
        return cls(storage, study, database, trials, to_search)

    def results(self) -> Results:
        """Read everything that has finished.

        Returns:
            A snapshot.
        """
        trials = tuple(self.trials())
        last_end = self.note("end")
        # The reason is outdated once a later run has added a trial.
        end_reason = ""
        if last_end and last_end["total"] == len(trials):
            end_reason = last_end["reason"]
        return Results(
            self.objectives,
            self.sources,
            trials,
            end_reason,
            str(self.storage),
            self._parameters(),
        )

    def trials(self) -> list[Trial]:
        """Read every finished trial, failed ones included, in the order of their numbers."""
        attributes = self._all_notes()
        held_out = _held_out_by_trial(attributes)
        root = self.storage.root
        moved = moved_folders(attributes, root)
        trials = []
        for frozen in self.frozen_trials():
            number = frozen.number
            if number not in self._scores:
                self._scores[number] = _unpack(frozen.user_attrs.get("scores", {}))
            selection = attributes.get(f"{_SELECTION}/{number}")
            trial = _from_frozen(
                frozen,
                # A copy, as of the parameters: a user who changes it must not change the record.
                dict(self._scores[number]),
                held_out.get(number, {}),
                selection,
            )
            if moved:
                recipe = with_new_paths(trial.recipe_yaml, moved, root)
                trial = replace(trial, recipe_yaml=recipe)
            trials.append(trial)
        return trials

    def _parameters(self) -> dict[int, Parameters]:
        distributions: dict[int, dict[str, BaseDistribution]] = {}
        for frozen in self.frozen_trials():
            level = frozen.user_attrs.get("level", 0)
            distributions.setdefault(level, {}).update(frozen.distributions)
        parameters = {}
        for level, of_level in distributions.items():
            conditions = self.note(f"{_CONDITIONS}/{level}") or {}
            parameters[level] = Parameters(of_level, conditions)
        return parameters

    def frozen_trials(self) -> list[FrozenTrial]:
        """Read the trials in Optuna's form, in the order of their numbers."""
        return self._query(self._table.read)

    def add(self, frozen: FrozenTrial) -> int:
        """Write one finished trial, whole or not at all.

        A database that is away for a while is waited for.

        Args:
            frozen: The trial, from `freeze`.

        Returns:
            The number that it gets.

        Raises:
            StudyError: It cannot be written.
        """
        total: int | None = None

        def write(attempt: int) -> int:
            nonlocal total
            if total is None:
                total = self._table.count()
            else:
                # The answer of an earlier attempt may have been lost after the trial was written.
                for recorded in self._table.read()[total:]:
                    if recorded.user_attrs == frozen.user_attrs:
                        return recorded.number
            trial_id = self._database.create_new_trial(self._study_id, frozen)
            return self._database.get_trial_number_from_id(trial_id)

        return self.storage.patiently(write)

    def freeze(
        self,
        trial: Trial,
        distributions: Mapping[str, BaseDistribution],
        sampler_notes: Mapping[str, Any] | None = None,
    ) -> FrozenTrial:
        """Convert a trial to Optuna's form.

        Args:
            trial: The trial.
            distributions: Its parameters' distributions.
            sampler_notes: System attributes that the sampler set on it.

        Returns:
            Optuna's trial, with all values maximised.
        """
        failed = bool(trial.failure)
        frozen = optuna.trial.create_trial(
            state=TrialState.FAIL if failed else TrialState.COMPLETE,
            values=None if failed else trial.values(self.objectives),
            params=dict(trial.params),
            distributions=dict(distributions),
            user_attrs=self._attributes(trial),
            system_attrs=dict(sampler_notes or {}),
        )
        # `tell` leaves the constraints among the system attributes, which are passed in above. Then
        # Optuna would warn that they are set twice.
        for name, violation in trial.constraints.items():
            if name not in frozen.constraints:
                frozen.set_constraint(name, violation)
        return frozen

    def note(self, key: str) -> Any:
        """Read a note about the study.

        Args:
            key: Its name.

        Returns:
            The value; None where there is none.
        """
        return self._all_notes().get(key)

    def notes(self, prefix: str) -> dict[str, Any]:
        """Read the notes whose names begin with a prefix."""
        found = {}
        for key, value in self._all_notes().items():
            if key.startswith(prefix):
                found[key] = value
        return found

    def count(self) -> int:
        """Count the trials, those of other processes included."""
        return self._query(self._table.count)

    def set_note(self, key: str, value: object) -> None:
        """Write a note about the study, if its value has changed.

        Args:
            key: Its name.
            value: Anything that JSON can hold.
        """
        self.storage.patiently(lambda attempt: self._set_note(key, value))

    def note_root(self) -> None:
        """Note where the study's relative paths start, for studies that begin from this record."""
        root = self.storage.root
        if not root:
            return
        for key, value in root_notes(self.notes(""), root).items():
            self.set_note(key, value)

    def _set_note(self, key: str, value: object) -> None:
        if self._study.user_attrs.get(key) != value:
            self._study.set_user_attr(key, value)

    def set_conditions(self, level: int, conditions: Conditions) -> None:
        """Write when the parameters of a level are active.

        Args:
            level: The level's number.
            conditions: Parameter -> pairs (parent, values).
        """
        listed = {}
        for name, pairs in conditions.items():
            # Lists, as JSON returns them: equal conditions must not look changed.
            listed[name] = [[parent, list(values)] for parent, values in pairs]
        self.set_note(f"{_CONDITIONS}/{level}", listed)

    def add_selection(self, number: int, scores: Scores) -> None:
        """Write a trial's scores on selection examples, in place of earlier ones.

        Args:
            number: The trial's number.
            scores: Its scores on the first selection examples, in the order of the data.
        """
        self.set_note(f"{_SELECTION}/{number}", _pack(scores))

    def forget_other_selection(self, digest: str) -> None:
        """Forget scores on selection examples that are not the present ones.

        Args:
            digest: Identifies the present examples and their order.
        """
        if self.note(_SELECTION) != digest:
            for key, packed in self._all_notes().items():
                if key.startswith(f"{_SELECTION}/") and packed is not None:
                    self.set_note(key, None)
        self.set_note(_SELECTION, digest)

    def allow_mismatch(self) -> None:
        """Note that the study merges models that may not belong together."""
        self.set_note(_ALLOW_MISMATCH, True)

    def allows_mismatch(self) -> bool:
        """Whether the study merges models that may not belong together."""
        return bool(self.note(_ALLOW_MISMATCH))

    def add_held_out(self, number: int, kind: str, scores: Scores) -> None:
        """Write held-out scores of a trial.

        Args:
            number: The trial's number.
            kind: `objectives` or `watched`: each is scored once.
            scores: The scores.
        """
        self.set_note(f"{_HELD_OUT}/{number}/{kind}", _pack(scores))

    def forget_other_watched(self, watched: Mapping[str, Any]) -> None:
        """Forget held-out scores of watched tasks that were other ones, or had other settings.

        Args:
            watched: What is watched now, as the note `WATCHED` has it.
        """
        noted = self.note(WATCHED)
        # Records of earlier versions have no note; tasks had no settings then.
        if noted in (None, watched):
            return
        for key in list(self._all_notes()):
            if key.startswith(f"{_HELD_OUT}/") and key.endswith("/watched"):
                self.set_note(key, None)
        self.set_note(WATCHED, dict(watched))

    def held_out(self, number: int) -> dict[str, Scores]:
        """Read the held-out scores of a trial, by kind."""
        return _held_out_by_trial(self._all_notes()).get(number, {})

    def _all_notes(self) -> dict[str, Any]:
        return self._query(lambda: self._study.user_attrs)

    def _query(self, action: Callable[[], _Result]) -> _Result:
        """Read the database; what waits for it is said at `Storage`."""
        if self._to_search:
            return self.storage.patiently(lambda attempt: action())
        return self.storage.once_unlocked(action)

    def _attributes(self, trial: Trial) -> dict[str, Any]:
        attributes: dict[str, Any] = {
            "label": trial.label,
            "seconds": dict(trial.seconds),
            "scores": _pack(trial.scores),
            "recipe": trial.recipe_yaml,
        }
        # Unset attributes are not written: each is a row of the database.
        optional = {
            "failure": trial.failure,
            "retried": trial.retried,
            WARM: trial.warm_start,
            SAME_AS: trial.same_as,
            "gain": trial.gain,
            "level": trial.level or None,
            "final": None if trial.final else False,
        }
        for name, value in optional.items():
            if value not in ("", None):
                attributes[name] = value
        if not trial.failure:
            # In the order of the objectives: surrogates read the noise of each objective here.
            stderrs = []
            for objective in self.objectives:
                stderrs.append(trial.scores[objective.name].stderr)
            attributes[STDERR] = stderrs
        return attributes


def _plain(identity: Mapping[str, Any]) -> dict[str, Any]:
    """An identity as the database returns it.

    It returns what JSON makes of a value, such as lists for tuples. Without this round trip an
    unchanged identity would differ from the recorded one.
    """
    as_text = json.dumps(identity)
    plain: dict[str, Any] = _without_unset(json.loads(as_text))
    return plain


def _check_record(storage: Storage, header: Header) -> None:
    with storage.connect() as database:
        if storage.study_name not in optuna.get_all_study_names(database):
            return
        study = optuna.load_study(study_name=storage.study_name, storage=database)
        _check_identity(storage, study, _plain(header.identity))


def _check_identity(
    storage: Storage, study: optuna.Study, identity: Mapping[str, Any]
) -> None:
    recorded = _without_unset(study.user_attrs.get("identity"))
    if recorded in (None, identity):
        return
    # A record without scores has nothing to lose, so a changed study may replace it: most often
    # the user has mended what made every trial fail.
    if study.get_trials(deepcopy=False, states=[TrialState.COMPLETE]):
        raise StudyError(_changed_message(storage, recorded, identity))


def _create_or_load(
    storage: Storage, database: optuna.storages.RDBStorage, header: Header
) -> optuna.Study:
    return optuna.create_study(
        study_name=storage.study_name,
        storage=database,
        directions=[StudyDirection.MAXIMIZE] * len(header.objectives),
        load_if_exists=True,
    )


def _write_header(
    study: optuna.Study, header: Header, identity: Mapping[str, Any]
) -> None:
    with warnings.catch_warnings():
        # `set_metric_names` is experimental in Optuna; the dashboard shows the names.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.set_metric_names([objective.name for objective in header.objectives])
    # The stored values are all maximised. The user's directions are written beside them, so that
    # reading a record does not need a task.
    directions = [objective.maximise for objective in header.objectives]
    study.set_user_attr("maximise", directions)
    study.set_user_attr("sources", list(header.sources))
    study.set_user_attr("identity", dict(identity))


def _read_objectives(study: optuna.Study) -> tuple[Objective, ...]:
    names = study.metric_names or []
    directions = study.user_attrs.get("maximise", [])
    if len(names) != len(directions):
        raise StudyError(
            f"{study.study_name!r} is not a study of paretomerge, or an older version made it."
        )
    objectives = []
    for name, maximise in zip(names, directions, strict=True):
        objectives.append(Objective(name, maximise))
    return tuple(objectives)


def _changed_message(
    storage: Storage, recorded: Mapping[str, Any], identity: Mapping[str, Any]
) -> str:
    return (
        f"{storage}: holds trials of another study: {describe_changes(recorded, identity)}. "
        "Set another `out` (another `study_name` where `storage` is set), "
        "or put the old settings back."
    )


def _without_unset(value: Any) -> Any:
    """Drop what is None, so that a record stays valid when a later version adds a setting."""
    if isinstance(value, Mapping):
        stated: dict[str, Any] = {}
        for key, item in value.items():
            if item is not None:
                stated[key] = _without_unset(item)
        return stated
    if isinstance(value, list):
        return [_without_unset(item) for item in value]
    return value


def _from_frozen(
    frozen: FrozenTrial,
    scores: Scores,
    held_out: Mapping[str, Scores],
    selection: Mapping[str, Sequence[Any]] | None,
) -> Trial:
    # Every attribute has a default: records of earlier versions lack the newer ones.
    attributes = frozen.user_attrs
    all_held_out: dict[str, Score] = {}
    for scores_of_kind in held_out.values():
        all_held_out |= scores_of_kind
    return Trial(
        number=frozen.number,
        # Copies: a user who changes them must not change the record.
        params=dict(frozen.params),
        scores=scores,
        label=attributes.get("label", ""),
        failure=attributes.get("failure", ""),
        seconds=dict(attributes.get("seconds", {})),
        held_out=all_held_out or None,
        selection=_unpack(selection) if selection else None,
        constraints=dict(frozen.constraints),
        warm_start=attributes.get(WARM, ""),
        same_as=attributes.get(SAME_AS),
        gain=attributes.get("gain"),
        level=attributes.get("level", 0),
        final=attributes.get("final", True),
        recipe_yaml=attributes.get("recipe", ""),
        retried=attributes.get("retried", ""),
    )


def _held_out_by_trial(attributes: Mapping[str, Any]) -> dict[int, dict[str, Scores]]:
    """Trial number -> kind -> scores."""
    held_out: dict[int, dict[str, Scores]] = {}
    for key, packed in attributes.items():
        # Without those that were forgotten; Optuna deletes no attribute.
        if key.startswith(f"{_HELD_OUT}/") and packed is not None:
            _, number, kind = key.split("/", 2)
            held_out.setdefault(int(number), {})[kind] = _unpack(packed)
    return held_out


def _pack(scores: Scores) -> dict[str, Any]:
    # Lists and not named fields: a task may have thousands of examples, and a study many trials.
    packed = {}
    for name, score in scores.items():
        examples = _pack_examples(score.example_scores)
        packed[name] = [score.value, score.stderr, score.n, examples]
    return packed


def _unpack(packed: Mapping[str, Sequence[Any]]) -> dict[str, Score]:
    scores = {}
    for name, (value, stderr, n, examples) in packed.items():
        example_scores = _unpack_examples(examples)
        scores[name] = Score(value, stderr, n, example_scores)
    return scores


def _pack_examples(scores: Sequence[float] | None) -> str | list[float] | None:
    """Write scores of 0 and 1, the common case, as a string with a byte for each example."""
    if scores is None:
        return None
    if all(score in (0.0, 1.0) for score in scores):
        digits = ["1" if score else "0" for score in scores]
        return "".join(digits)
    return list(scores)


_DIGITS = {"0": 0.0, "1": 1.0}


def _unpack_examples(packed: str | Sequence[float] | None) -> tuple[float, ...] | None:
    if packed is None:
        return None
    if isinstance(packed, str):
        return tuple(map(_DIGITS.__getitem__, packed))
    return tuple(map(float, packed))
