"""What we take from lm-evaluation-harness outside of its documented interface.

`tests/evaluate/test_adapters.py` fails when one of these changes. Importing the harness takes
seconds, so every function here imports it when it is called.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lm_eval.api.filter import FilterEnsemble
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.config.group import AggMetricConfig
    from lm_eval.tasks import TaskManager

_LOGGERS = ("lm_eval", "lm-eval", "datasets")


def index_tasks(names: Sequence[str], include_path: Path | None) -> "TaskManager":
    """A task manager that knows the tasks in a folder, and the built-in tasks if they are needed.

    Args:
        names: The tasks that are going to be loaded.
        include_path: Folder with task YAMLs.

    Returns:
        The manager; names that are not in its `all_subtasks` or `all_groups` are unknown.
    """
    from lm_eval.tasks import TaskManager

    folder = str(include_path) if include_path else None
    # reading the 14,000 built-in tasks takes seconds, so they are indexed only if one is asked for
    manager = TaskManager(include_defaults=False, include_path=folder)
    if set(names) <= {*manager.all_subtasks, *manager.all_groups}:
        return manager
    return TaskManager(include_path=folder)


def filters(task: "Task") -> dict[str, "FilterEnsemble"]:
    """The filter pipelines of a task by name; the harness reports the first one's metrics first.

    A task with an empty `filter_list` has none. It gets the harness's default.
    """
    from lm_eval.filters import build_filter_ensemble

    if task._filters:
        return {pipeline.name: pipeline for pipeline in task._filters}
    return {"none": build_filter_ensemble("none", [["take_first", None]])}


def group_mean(group: "Group", metric: str) -> "AggMetricConfig | None":
    """How a group's metric is aggregated.

    Args:
        group: The group.
        metric: The metric; "" for the group's first.

    Returns:
        None where the group does not aggregate the metric, or not by a mean.
    """
    for aggregated in group.aggregate_metric_list or ():
        if metric in ("", aggregated.metric) and aggregated.aggregation == "mean":
            return aggregated
    return None


def configure(
    task: "Task",
    num_fewshot: int | None,
    generation: Mapping[str, object] | None,
) -> None:
    """Override a task's settings as the harness's command line does.

    Args:
        task: The task.
        num_fewshot: Examples before each question. A task whose YAML says 0 keeps it.
        generation: What `--gen_kwargs` sets, for tasks with written answers.
    """
    if generation and task.OUTPUT_TYPE == "generate_until":
        # Not `update=True`, which would change the dict of the file for the same task elsewhere.
        settings = {**task.get_config("generation_kwargs"), **generation}
        task.set_config(key="generation_kwargs", value=settings)
    if num_fewshot is not None and task.get_config("num_fewshot") != 0:
        task.set_config(key="num_fewshot", value=num_fewshot)


def chat_template(folder: str) -> "Callable[..., str] | None":
    """What turns a chat into a prompt, with the template of a tokenizer, as `hf` models do it.

    Args:
        folder: A model with a tokenizer.

    Returns:
        The function that a task's requests are built with; None where there is no template.
    """
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if not tokenizer.chat_template:
        return None
    # The method reads no more of its model than this.
    model = SimpleNamespace(tokenizer=tokenizer, chat_template_args={})
    return partial(HFLM.apply_chat_template, model)


def runs_written_code(task: "Task") -> bool:
    """Whether a task runs code that the model writes, as its YAML's `unsafe_code` says."""
    return bool(getattr(task, "UNSAFE_CODE", False))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the harness and datasets: their log messages, prints and progress bars."""
    with (
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stderr(nowhere),
        contextlib.redirect_stdout(nowhere),
    ):
        import datasets

        # the first import prints and sets log levels, so it comes before levels are read
        import lm_eval.tasks  # noqa: F401

        had_bars = not datasets.are_progress_bars_disabled()
        loggers = [logging.getLogger(name) for name in _LOGGERS]
        levels = [logger.level for logger in loggers]
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        datasets.disable_progress_bars()
        try:
            yield
        finally:
            if had_bars:
                datasets.enable_progress_bars()
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
