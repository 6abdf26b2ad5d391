"""Digests of the local files and functions that decide a score.

A module of its own: it loads no torch, so that a finished study is read quickly.
"""

import hashlib
import re
from pathlib import Path

from paretomerge.config.settings import StudySettings
from paretomerge.evaluate.function_digest import file_digest, function_digest
from paretomerge.evaluate.measures import Function, Judge, Measure, Perplexity, Task


def task_digest(folder: Path, task: str) -> str:
    """Digest the YAML and Python files that a task may depend on.

    These are all such files of the folder, except those that define another task.

    Args:
        folder: The folder.
        task: The task's name.

    Returns:
        16 hexadecimal digits.
    """
    content_digest = hashlib.sha256()
    files = []
    for file in folder.rglob("*"):
        if file.suffix in (".yaml", ".yml", ".py"):
            files.append(file)
    # Sorted, since the order of a directory differs between file systems.
    for file in sorted(files):
        content = file.read_bytes()
        # A search in the text and not a YAML parser: the harness's files have tags such as
        # `!function`, which a safe loader refuses.
        definition = re.search(rb"^task:[ \t]+([^\s#]+)", content, re.MULTILINE)
        # A file that defines no task may be included by any of them.
        defines_another = False
        if definition is not None:
            defines_another = definition[1].strip(b"\"'") != task.encode()
        if not defines_another:
            # With the length, so that text cannot move from one file to the next unnoticed.
            header = f"{file.relative_to(folder)} {len(content)} "
            content_digest.update(header.encode() + content)
    return content_digest.hexdigest()[:16]


def measure_digest(settings: StudySettings, measure: Measure) -> str:
    """Digest what decides a score: a function's source, a task's files, or a text.

    Args:
        settings: The study.
        measure: One of its measures.

    Returns:
        16 hexadecimal digits; "" where no local file decides the score.
    """
    folder = settings.root
    include_path = settings.evaluation.include_path
    if isinstance(measure, Task):
        if not include_path or not (folder / include_path).is_dir():
            return ""
        return task_digest(folder / include_path, measure.task)
    if isinstance(measure, Function):
        return function_digest(measure.function, folder)
    if isinstance(measure, Perplexity | Judge):
        path = measure.path if isinstance(measure, Perplexity) else measure.prompts
        return file_digest(folder / path)
    return ""
