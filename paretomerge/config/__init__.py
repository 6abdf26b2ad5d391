"""A study's settings as plain data: `StudySettings`, and the same as a study.yaml.

Nothing here loads a model, data or database.
"""

from paretomerge.config.convert import config_of, settings_of
from paretomerge.config.schema import StudyConfig, load_config
from paretomerge.config.settings import Budget, Evaluation, SecondLevel, StudySettings

__all__ = [
    "Budget",
    "Evaluation",
    "SecondLevel",
    "StudyConfig",
    "StudySettings",
    "config_of",
    "load_config",
    "settings_of",
]
