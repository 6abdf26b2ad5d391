"""Optuna's tables, read with plain queries.

Optuna reads a trial through its object-relational mapper and parses each parameter's distribution
twice, which was half the time of `status` after 1,000 trials (docs/lab/long-studies.md). Five
queries give the same trials. `tests/record/test_optuna_tables.py` fails when the tables of a new
version of Optuna give something else.
"""

import json
from collections import defaultdict
from functools import lru_cache
from typing import Any

from optuna.distributions import BaseDistribution, json_to_distribution
from optuna.storages import RDBStorage
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial
from sqlalchemy import Connection, Table, func, select

_TRIALS: Table = models.TrialModel.__table__
_PARAMS: Table = models.TrialParamModel.__table__
_VALUES: Table = models.TrialValueModel.__table__
_USER: Table = models.TrialUserAttributeModel.__table__
_SYSTEM: Table = models.TrialSystemAttributeModel.__table__
_STUDIES: Table = models.StudyModel.__table__


class TrialTable:
    """The trials of one study in a database. They are finished, and never change.

    Args:
        database: Optuna's storage.
        study_name: The name of a study that is in it.
    """

    def __init__(self, database: RDBStorage, study_name: str) -> None:
        self._engine = database.engine
        self._trials: list[FrozenTrial] = []
        self._last_id = -1
        query = select(_STUDIES.c.study_id).where(_STUDIES.c.study_name == study_name)
        with self._engine.connect() as connection:
            self._study_id = connection.execute(query).scalar_one()

    def count(self) -> int:
        """The number of trials in the database."""
        query = select(func.count()).where(_TRIALS.c.study_id == self._study_id)
        with self._engine.connect() as connection:
            return int(connection.execute(query).scalar_one())

    def read(self) -> list[FrozenTrial]:
        """All trials in the order of their numbers; only new ones are fetched."""
        # In the order in which they were written, so that a number is never skipped.
        query = (
            select(_TRIALS)
            .where(_TRIALS.c.study_id == self._study_id)
            .where(_TRIALS.c.trial_id > self._last_id)
            .order_by(_TRIALS.c.trial_id)
        )
        with self._engine.connect() as connection:
            heads = connection.execute(query).all()
            if heads:
                # A trial is written in one transaction, so whatever belongs to these is there.
                last_id = heads[-1].trial_id
                parts = _Parts(connection, self._study_id, self._last_id, last_id)
                for head in heads:
                    self._trials.append(parts.trial(head))
                self._last_id = last_id
        self._trials.sort(key=lambda trial: trial.number)
        return list(self._trials)


class _Parts:
    """What belongs to some trials of a study: trial id -> rows."""

    def __init__(
        self, connection: Connection, study_id: int, after: int, last: int
    ) -> None:
        def rows(table: Table, order: str) -> dict[int, list[Any]]:
            query = (
                select(table)
                .join(_TRIALS, _TRIALS.c.trial_id == table.c.trial_id)
                .where(_TRIALS.c.study_id == study_id)
                .where(table.c.trial_id > after)
                .where(table.c.trial_id <= last)
                .order_by(table.c[order])
            )
            by_trial = defaultdict(list)
            for row in connection.execute(query):
                by_trial[row.trial_id].append(row)
            return by_trial

        self._params = rows(_PARAMS, "param_id")
        self._values = rows(_VALUES, "objective")
        self._user = rows(_USER, "trial_user_attribute_id")
        self._system = rows(_SYSTEM, "trial_system_attribute_id")

    def trial(self, head: Any) -> FrozenTrial:
        """A trial from its row in the table of trials."""
        number = head.trial_id
        distributions: dict[str, BaseDistribution] = {}
        params = {}
        for row in self._params.get(number, ()):
            distribution = _distribution(row.distribution_json)
            distributions[row.param_name] = distribution
            params[row.param_name] = distribution.to_external_repr(row.param_value)
        values = []
        for row in self._values.get(number, ()):
            to_value = models.TrialValueModel.stored_repr_to_value
            values.append(to_value(row.value, row.value_type))
        return FrozenTrial(
            number=head.number,
            state=head.state,
            value=None,
            values=values or None,
            datetime_start=head.datetime_start,
            datetime_complete=head.datetime_complete,
            params=params,
            distributions=distributions,
            user_attrs=_attributes(self._user.get(number, ())),
            system_attrs=_attributes(self._system.get(number, ())),
            intermediate_values={},
            trial_id=number,
        )


def _attributes(rows: Any) -> dict[str, Any]:
    return {row.key: json.loads(row.value_json) for row in rows}


@lru_cache(maxsize=4096)
def _distribution(text: str) -> BaseDistribution:
    """The distribution that Optuna has stored as JSON; trials of a study share it."""
    return json_to_distribution(text)
