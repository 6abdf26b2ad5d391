"""Tasks of lm-evaluation-harness, loaded once, with the requests of each of their examples."""

import contextlib
import os
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from paretomerge.errors import ErrorCollector, EvaluationError, unknown_name
from paretomerge.evaluate import _lm_eval
from paretomerge.evaluate.backend import DEFAULT_OPTIONS, ModelOptions
from paretomerge.evaluate.evaluator import Split
from paretomerge.evaluate.examples import (
    OUTPUT_LENGTH,
    Examples,
    GroupExamples,
    requests_by_document,
)

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.config.group import AggMetricConfig
    from lm_eval.tasks import TaskManager

ALLOW_CODE = "HF_ALLOW_CODE_EVAL"
"""The environment variable of Hugging Face's `evaluate` that allows to run written code."""

_MOST_SEARCH_ITEMS = 200
"""Search examples of a task, at most, where neither a split nor a number is set."""


@dataclass(frozen=True)
class Prompts:
    """How questions are put to the model, as on the harness's command line.

    Attributes:
        num_fewshot: Examples before each question; None for the task's own number.
        apply_chat_template: Whether questions are put as chats.
        fewshot_as_multiturn: Whether examples are turns of the chat. By default they are where
            the chat template is applied.
        system_instruction: The chat's system message, or text before each question.
        gen_kwargs: Settings of generation, such as `{"temperature": 0.7}`.
    """

    num_fewshot: int | None = None
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool | None = None
    system_instruction: str | None = None
    gen_kwargs: Mapping[str, Any] | None = None

    def request_arguments(
        self, chat_template: Callable[..., str] | None
    ) -> dict[str, Any]:
        """Arguments of the harness's `build_all_requests`.

        Args:
            chat_template: What turns a chat into a prompt, where questions are put as chats.
        """
        arguments: dict[str, Any] = {"system_instruction": self.system_instruction}
        if not self.apply_chat_template:
            return arguments
        multiturn = self.fewshot_as_multiturn
        return arguments | {
            "apply_chat_template": True,
            "fewshot_as_multiturn": True if multiturn is None else multiturn,
            "chat_template": chat_template,
        }


@dataclass(frozen=True)
class HarnessTask:
    """A task of the harness and one of its metrics.

    Attributes:
        task: The name of a task or of a group of tasks, as in `lm_eval --tasks`.
        metric: The metric's name, also `metric,filter` as the harness reports it, such as
            `exact_match,flexible-extract`. Where it is None, the task's first metric; without a
            filter, the only filter that the task has.
        search_items: The number of its search examples; None for the study's number.
        prompts: How its questions are put.
        options: How its text goes into the model and comes out of it.
    """

    task: str
    metric: str | None = None
    search_items: int | None = None
    prompts: Prompts = Prompts()
    options: ModelOptions = DEFAULT_OPTIONS

    @property
    def metric_name(self) -> str:
        """The metric without a filter; "" for the default."""
        return (self.metric or "").partition(",")[0]

    @property
    def filter_name(self) -> str:
        """The filter; "" for the default."""
        return (self.metric or "").partition(",")[2]


class _MostItems(NamedTuple):
    """The greatest numbers of examples of one task; None for all, or for the default."""

    search: int | None
    held_out: int | None
    selection: int | None


@dataclass
class TaskLoader:
    """Finds tasks by name and loads their examples.

    Attributes:
        include_path: Folder with task YAMLs.
        data_root: Folder that relative `data_files` in the task YAMLs start from. Without it, they
            start from the current folder, as in the harness.
        splits: The data set's split for `search` and for `held_out`. Without it, `search_items`
            examples of the task's test split are searched on and the rest are held out.
        search_items: The number of search examples; by default half of them, at most 200. With
            `splits`, their greatest number; by default all. The tasks of a group share it.
        held_out_items: The greatest number of held-out examples; by default all. The tasks of a
            group share it.
        selection_items: The greatest number of selection examples; by default none. The tasks of a
            group share it.
        seed: Draws the search examples and the few-shot examples.
        tokenizer: The model whose chat template is applied.
    """

    include_path: Path | None = None
    data_root: Path | None = None
    splits: Mapping[str, str] | None = None
    search_items: int | None = None
    held_out_items: int | None = None
    selection_items: int | None = None
    seed: int = 0
    tokenizer: str = ""
    _manager: "TaskManager | None" = field(default=None, repr=False)

    def check(self, tasks: Mapping[str, HarnessTask]) -> None:
        """Index the tasks by name, before any data is loaded.

        Args:
            tasks: Name of the score -> task.

        Raises:
            EvaluationError: A task or the folder does not exist.
        """
        if self.include_path is not None and not self.include_path.is_dir():
            raise EvaluationError(
                f"include_path: the folder with task YAMLs {self.include_path} does not exist"
            )
        with _lm_eval.quiet():
            names = [spec.task for spec in tasks.values()]
            self._manager = _lm_eval.index_tasks(names, self.include_path)
        errors = ErrorCollector()
        available = {*self._manager.all_subtasks, *self._manager.all_groups}
        for name, spec in tasks.items():
            with errors.collect():
                if spec.task in self._manager.all_tags:
                    raise EvaluationError(
                        f"{name}: {spec.task!r} is a tag, for which the harness has no score; "
                        "name the tasks that you mean"
                    )
                if spec.task not in available:
                    message = unknown_name("task", spec.task, available)
                    raise EvaluationError(f"{name}: {message}")
        errors.raise_if_any()

    def load(
        self, name: str, spec: HarnessTask, split: Split
    ) -> Examples | GroupExamples:
        """Load a task's examples of one split and build their requests.

        Args:
            name: The score's name, for error messages.
            spec: Task and metric; the task went through `check`.
            split: Which examples.

        Returns:
            The examples.

        Raises:
            EvaluationError: The data cannot be loaded, or the metric or split does not exist.
        """
        with _lm_eval.quiet(), _working_directory(self.data_root):
            tasks, group = self._load_tasks(name, spec)
            search_items = self.search_items
            if spec.search_items is not None:
                search_items = spec.search_items
            if group is None:
                most = _MostItems(
                    search_items, self.held_out_items, self.selection_items
                )
                return self._examples(name, spec, tasks[0], split, most)
            spec = replace(spec, metric=spec.metric or group.metric)
            members = []
            for task in tasks:
                share = self._share(task, len(tasks), search_items)
                held_out = _shared(self.held_out_items, len(tasks))
                selection = _shared(self.selection_items, len(tasks))
                most = _MostItems(share, held_out, selection)
                examples = self._examples(name, spec, task, split, most)
                if not examples.is_mean:
                    raise EvaluationError(
                        f"{name}: {task.task_name}: {examples.metric} is no mean over examples, "
                        "so the group has no such score; name its tasks one by one"
                    )
                members.append(examples)
        return GroupExamples(tuple(members), group.weight_by_size)

    def _share(
        self, task: "Task", n_tasks: int, search_items: int | None
    ) -> int | None:
        """The number of search examples of one of a group's tasks; None for all of its split."""
        if self.splits is not None and search_items is None:
            return None
        total = search_items or _MOST_SEARCH_ITEMS
        share = max(total // n_tasks, 1)
        if self.splits is None:
            # Small tasks keep half of their examples for the report.
            share = min(share, max(len(task.eval_docs) // 2, 1))
        return share

    def _examples(
        self,
        name: str,
        spec: HarnessTask,
        task: "Task",
        split: Split,
        most: _MostItems,
    ) -> Examples:
        """The examples of one task; see `load`."""
        if self.splits is not None:
            # the harness asks the documents of the test split
            # Selection examples are those of the search split that the search does not use.
            dataset_split = self.splits["held_out" if split == "held_out" else "search"]
            if dataset_split not in task.dataset:
                message = unknown_name("split", dataset_split, task.dataset)
                raise EvaluationError(f"{name}: {message}")
            task.config.test_split = dataset_split
        prompts = spec.prompts
        # Few-shot examples are drawn when requests are built, so these come before.
        _lm_eval.configure(task, prompts.num_fewshot, prompts.gen_kwargs)
        task.set_fewshot_seed(self.seed)
        n = len(task.eval_docs)
        if not n:
            raise EvaluationError(_no_examples(name, task.task_name))
        documents = self._select_documents(name, n, split, most)
        if not documents:
            raise EvaluationError(
                f"{name}: no example is left for `selection_items`: the search uses all {n} of its "
                "split; set a smaller `search_items`"
            )
        template = self._chat_template if prompts.apply_chat_template else None
        arguments = prompts.request_arguments(template)
        try:
            task.build_all_requests(
                samples=documents, rank=0, world_size=1, **arguments
            )
        # The harness draws few-shot examples with `random.sample`.
        except ValueError as error:
            raise EvaluationError(
                f"{name}: the prompts of task {task.task_name!r} cannot be written with "
                f"num_fewshot {task.get_config('num_fewshot')}: {error}"
            ) from error
        metric = _choose_metric(name, spec, task)
        pipelines = _lm_eval.filters(task)
        if spec.filter_name and spec.filter_name not in pipelines:
            message = unknown_name(
                f"filter of task {spec.task}", spec.filter_name, pipelines
            )
            raise EvaluationError(f"{name}: {message}")
        if not spec.filter_name and len(pipelines) > 1:
            choices = [f"`metric: {metric},{choice}`" for choice in pipelines]
            raise EvaluationError(
                f"{name}: task {task.task_name!r} scores answers in several ways; choose one: "
                + " or ".join(choices)
            )
        chosen = spec.filter_name or next(iter(pipelines))
        requests = requests_by_document(task)
        return Examples(task, metric, pipelines[chosen], requests)

    @cached_property
    def _chat_template(self) -> Callable[..., str]:
        # Loaded once: tasks share it, and the tokenizer's folder may be gone when held-out
        # examples are loaded.
        template = _lm_eval.chat_template(self.tokenizer)
        if template is None:
            raise EvaluationError(
                f"apply_chat_template: the tokenizer of {self.tokenizer} has no chat template"
            )
        return template

    def _load_tasks(
        self, name: str, spec: HarnessTask
    ) -> tuple[list["Task"], "AggMetricConfig | None"]:
        """A task alone, or the tasks of a group and how their scores are aggregated."""
        assert self._manager is not None, "check() comes before load()"
        try:
            loaded = self._manager.load([spec.task])
        # Data sets fail in as many ways as there are hosts and formats.
        except Exception as error:
            raise EvaluationError(_loading_problem(name, spec.task, error)) from error
        tasks: list[Task] = list(loaded["tasks"].values())
        group = None
        if spec.task in loaded["groups"]:
            group = _lm_eval.group_mean(loaded["groups"][spec.task], spec.metric_name)
            if group is None:
                raise EvaluationError(
                    f"{name}: the group {spec.task!r} has no mean of "
                    f"{spec.metric_name or 'a metric'}; name its tasks one by one"
                )
        for task in tasks:
            self._check_code(name, task)
        return tasks, group

    def _check_code(self, name: str, task: "Task") -> None:
        allowed = os.environ.get(ALLOW_CODE) == "1"
        if _lm_eval.runs_written_code(task) and not allowed:
            raise EvaluationError(
                f"{name}: task {task.task_name!r} runs code that the model writes. To allow it, "
                f"set {ALLOW_CODE}=1, or use `paretomerge --confirm-run-unsafe-code COMMAND`"
            )

    def _select_documents(
        self,
        name: str,
        n: int,
        split: Split,
        most: _MostItems,
    ) -> list[int]:
        """Which of the n documents belong to the split, in the order of the data."""
        search_items, held_out_items, selection_items = most
        n_selection = selection_items or 0
        if self.splits is not None:
            documents = range(n)
            if split == "held_out":
                return list(documents[:held_out_items])
            n_search = n if search_items is None else search_items
            if split == "search":
                return list(documents[:n_search])
            return list(documents[n_search : n_search + n_selection])
        if n < 2:
            raise EvaluationError(
                f"{name}: one example cannot be searched on and held out; add examples, or name "
                "two `splits`"
            )
        if search_items is None:
            search_items = min(n // 2, _MOST_SEARCH_ITEMS)
        most_used = n - 1 - n_selection
        if not 0 < search_items <= most_used:
            beside = f" beside {n_selection} selection_items" if n_selection else ""
            raise EvaluationError(
                f"{name}: search_items must be between 1 and {most_used}{beside}, so that some of "
                f"the {n} examples are held out, not {search_items}"
            )
        rng = random.Random(self.seed)
        shuffled = rng.sample(range(n), n)
        # The same permutation for all splits: they have no example in common.
        if split == "search":
            return sorted(shuffled[:search_items])
        rest = shuffled[search_items:]
        if split == "selection":
            return sorted(rest[:n_selection])
        return sorted(rest[n_selection:][:held_out_items])


def _shared(most: int | None, n_tasks: int) -> int | None:
    """The share of one of a group's tasks; None where there is no limit."""
    return None if most is None else max(most // n_tasks, 1)


def _loading_problem(name: str, task: str, error: Exception) -> str:
    """Say why a task cannot be loaded, and what to look at."""
    # What datasets and the harness raise for an empty file, and for a split without a document.
    has_none = isinstance(error, IndexError) and "size 0" in str(error)
    if has_none or isinstance(error, StopIteration):
        return _no_examples(name, task)
    # The class that datasets raises says only that something failed.
    reason = error.__cause__ or error
    first_line = (str(reason).splitlines() or [""])[0]
    return (
        f"{name}: task {task!r} cannot be loaded: {type(reason).__name__}: {first_line}; "
        f"relative data_files start from {Path.cwd()}"
    )


def _no_examples(name: str, task: str) -> str:
    return (
        f"{name}: task {task!r} has no examples; check its data files, which must not be empty, "
        "and its split"
    )


def _choose_metric(name: str, spec: HarnessTask, task: "Task") -> str:
    metrics = list(task.aggregation())
    if task.OUTPUT_TYPE == "generate_until":
        metrics.append(OUTPUT_LENGTH)
    if not spec.metric_name:
        return str(metrics[0])
    if spec.metric_name not in metrics:
        message = unknown_name(f"metric of task {spec.task}", spec.metric_name, metrics)
        raise EvaluationError(f"{name}: {message}")
    return spec.metric_name


def _working_directory(folder: Path | None) -> contextlib.AbstractContextManager[None]:
    """Change to the folder, if there is one, for the length of a `with` block."""
    if folder is None:
        return contextlib.nullcontext()
    return contextlib.chdir(folder)
