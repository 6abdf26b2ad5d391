"""The record of a study: finished trials in an Optuna storage, and what can be read from it alone.

- `Trial`: one finished evaluation.
- `Storage`: where records are stored, in a SQLite file or on a database server.
- `Record`: writes trials, each in one transaction.
- `Results`: a snapshot of a record; needs no model, task or lock.
"""

from paretomerge.record.record import Record
from paretomerge.record.results import Results
from paretomerge.record.storage import Storage
from paretomerge.record.trial import Scores, Trial

__all__ = ["Record", "Results", "Scores", "Storage", "Trial"]
