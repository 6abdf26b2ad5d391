"""Models by the task that each is for, as commands take them: `task=MODEL`."""

import re
from collections.abc import Sequence

from paretomerge.checkpoint.reference import is_folder
from paretomerge.errors import ConfigError
from paretomerge.space.sources import named_sources

# Names become names of files and of options.
_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*")


NO_TASK_NAME = "cannot be the name of a task (letters, digits, `_`, `.` and `-`)"
"""What is wrong with other names, for messages."""


def is_task_name(name: str) -> bool:
    """Whether a name can be that of a task, and so that of a file."""
    return _NAME.fullmatch(name) is not None


def task_models(models: Sequence[str]) -> dict[str, str]:
    """Read models with the tasks that they are for.

    Args:
        models: Each `task=MODEL`, or a model alone, whose task is the last part of its path.

    Returns:
        Task -> model, in the order given.

    Raises:
        ConfigError: If two models have one name, or a name is no name of a file.
    """
    given: list[str | None] = []
    paths = []
    for entry in models:
        name, equals, model = entry.partition("=")
        # A folder's own name may contain an equals sign.
        if equals and not is_folder(entry):
            given.append(name)
            paths.append(model)
        else:
            given.append(None)
            paths.append(entry)
    named = {model: name for name, model in named_sources(paths).items()}
    result: dict[str, str] = {}
    for chosen, model in zip(given, paths, strict=True):
        task = named[model] if chosen is None else chosen
        if not is_task_name(task):
            raise ConfigError(f"{model}: {task!r} {NO_TASK_NAME}; write name={model}")
        if task in result:
            raise ConfigError(
                f"models: {result[task]} and {model} are both named {task}; write name={model}"
            )
        result[task] = model
    return result
