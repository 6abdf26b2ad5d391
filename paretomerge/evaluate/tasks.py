"""Tasks of lm-evaluation-harness, loaded once, with the requests of each of their examples.

Digests identify examples and tasks by their contents. So no example is both searched on and held
out, and another study can use the cached scores (`ScoreCache`).
"""

import contextlib
import hashlib
import inspect
import json
import os
import random
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from paretomerge.errors import EvaluationError, unknown_name
from paretomerge.evaluate import _lm_eval
from paretomerge.evaluate.evaluator import MetricValue, Split

if TYPE_CHECKING:
    from lm_eval.api.filter import FilterEnsemble
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

    Requests = tuple[tuple[Instance, ...], ...]

ALLOW_CODE = "HF_ALLOW_CODE_EVAL"
"""The environment variable of Hugging Face's `evaluate` that allows to run written code."""

OUTPUT_LENGTH = "output_length"
"""A metric that every task with generated answers has: their mean length in tokens."""

# settings of a task that say where its data is, not how responses become a score
_NOT_SCORING = ("dataset_kwargs", "test_split", "metadata")
_DIGEST_LENGTH = 20  # hexadecimal digits
_MOST_SEARCH_ITEMS = 200
"""Search examples of a task, at most, where neither a split nor a number is set."""


@dataclass(frozen=True)
class HarnessTask:
    """A task of the harness and one of its metrics.

    Attributes:
        task: The task's name, as in `lm_eval --tasks`.
        metric: The metric's name, also `metric,filter` as the harness reports it, such as
            `exact_match,flexible-extract`. Where it is None, the task's first metric; without a
            filter, the task's first filter.
    """

    task: str
    metric: str | None = None


@dataclass(frozen=True)
class Examples:
    """One task's examples of one split, in the order of its data.

    Attributes:
        task: The task, as the harness loaded it.
        metric: Which of its metrics is computed.
        filter: The pipeline that turns a model's responses into what the metric sees.
        requests: The requests (`Instance`s) of each example, `tuple[tuple[Instance, ...], ...]`.
        ignored_filters: Other pipelines of the task, where the user has chosen none.
    """

    task: "Task"
    metric: str
    filter: "FilterEnsemble"
    requests: "Requests"
    ignored_filters: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def higher_is_better(self) -> bool:
        """The metric's direction, as the task declares it; shorter outputs are better."""
        if self.metric == OUTPUT_LENGTH:
            return False
        declared = self.task.higher_is_better()
        return bool(declared.get(self.metric, True))

    @cached_property
    def content_digests(self) -> tuple[str, ...]:
        """Digest of each example's question and target, without few-shot examples before it.

        Equal where two tasks or splits share an example.
        """
        digests = []
        for requests in self.requests:
            content = _content(self.task, requests)
            digests.append(_digest(content))
        return tuple(digests)

    @cached_property
    def request_digests(self) -> tuple[str, ...]:
        """Digest of what each example sends to a model."""
        digests = []
        for requests in self.requests:
            sent = []
            for request in requests:
                parts = [request.request_type, request.args, request.repeats]
                sent.append(parts)
            digests.append(_digest(sent))
        return tuple(digests)

    @cached_property
    def scoring_digest(self) -> str:
        """Digest of how responses become a score.

        It covers the task's settings, the source of its functions and the harness's version.
        """
        import lm_eval

        config = self.task.dump_config()
        settings = {}
        for key, value in config.items():
            if key not in _NOT_SCORING:
                settings[key] = value
        scoring = [lm_eval.__version__, self.metric, self.filter.name, settings]
        return _digest(scoring)

    def aggregate(self, example_scores: Sequence[MetricValue]) -> float:
        """The metric over several examples."""
        if self.metric == OUTPUT_LENGTH:
            return float(fmean(example_scores))
        aggregation = self.task.aggregation()[self.metric]
        return float(aggregation(example_scores))

    def example_scores(
        self, indices: Sequence[int], count_tokens: Callable[[str], int]
    ) -> list[MetricValue]:
        """The metric of single examples, from the responses that are on their requests.

        Args:
            indices: Which examples.
            count_tokens: Length of a text in tokens, for `OUTPUT_LENGTH`.

        Returns:
            The metric of each of them.
        """
        if self.metric == OUTPUT_LENGTH:
            return [self._mean_output_length(i, count_tokens) for i in indices]
        instances: list[Instance] = []
        for i in indices:
            instances += self.requests[i]
        # filters see all responses at once, as in the harness, and fail on none
        if instances:
            self.filter.apply(instances)
        scores = []
        for i in indices:
            requests = self.requests[i]
            responses = []
            for request in requests:
                filtered = request.filtered_resps[self.filter.name]
                responses.append(filtered)
            doc = requests[0].doc
            metrics = self.task.process_results(doc, responses)
            scores.append(metrics[self.metric])
        return scores

    def _mean_output_length(
        self, index: int, count_tokens: Callable[[str], int]
    ) -> float:
        lengths: list[int] = []
        for request in self.requests[index]:
            lengths += [count_tokens(text) for text in request.resps]
        return fmean(lengths)

    def without(self, content_digests: Collection[str]) -> "Examples":
        """The examples whose content has none of these digests."""
        remaining = []
        pairs = zip(self.requests, self.content_digests, strict=True)
        for requests, digest in pairs:
            if digest not in content_digests:
                remaining.append(requests)
        requests_left = tuple(remaining)
        return replace(self, requests=requests_left)


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
            `splits`, their greatest number; by default all.
        seed: Draws the search examples and the few-shot examples.
    """

    include_path: Path | None = None
    data_root: Path | None = None
    splits: Mapping[str, str] | None = None
    search_items: int | None = None
    seed: int = 0
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
        available = self._manager.all_subtasks
        groups = {*self._manager.all_groups, *self._manager.all_tags}
        for name, spec in tasks.items():
            if spec.task in groups:
                raise EvaluationError(
                    f"{name}: {spec.task!r} is a group of tasks; name the tasks that you mean "
                    f"(`lm_eval ls tasks` lists them)"
                )
            if spec.task not in available:
                message = unknown_name("task", spec.task, available)
                raise EvaluationError(f"{name}: {message}")

    def load(self, name: str, spec: HarnessTask, split: Split) -> Examples:
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
            task = self._load_task(name, spec)
            if self.splits is not None:
                # the harness asks the documents of the test split
                dataset_split = self.splits[split]
                if dataset_split not in task.dataset:
                    message = unknown_name("split", dataset_split, task.dataset)
                    raise EvaluationError(f"{name}: {message}")
                task.config.test_split = dataset_split
            # Few-shot examples are drawn when requests are built, so the seed comes before.
            task.set_fewshot_seed(self.seed)
            n = len(task.eval_docs)
            documents = self._select_documents(n, split)
            task.build_all_requests(samples=documents, rank=0, world_size=1)
        metric_name, _, filter_name = (spec.metric or "").partition(",")
        metric = _choose_metric(name, replace(spec, metric=metric_name or None), task)
        pipelines = _lm_eval.filters(task)
        if filter_name and filter_name not in pipelines:
            message = unknown_name(
                f"filter of task {spec.task}", filter_name, pipelines
            )
            raise EvaluationError(f"{name}: {message}")
        chosen = filter_name or next(iter(pipelines))
        ignored: tuple[str, ...] = ()
        if not filter_name:
            ignored = tuple(other for other in pipelines if other != chosen)
        requests = _requests_by_document(task)
        return Examples(task, metric, pipelines[chosen], requests, ignored)

    def _load_task(self, name: str, spec: HarnessTask) -> "Task":
        assert self._manager is not None, "check() comes before load()"
        try:
            loaded = self._manager.load([spec.task])
            task: Task = loaded["tasks"][spec.task]
        # Data sets fail in as many ways as there are hosts and formats.
        except Exception as error:
            cause = f"{type(error).__name__}: {error}"
            raise EvaluationError(
                f"{name}: task {spec.task!r} cannot be loaded: {cause}; "
                f"relative data_files start from {Path.cwd()}"
            ) from error
        allowed = os.environ.get(ALLOW_CODE) == "1"
        if _lm_eval.runs_written_code(task) and not allowed:
            raise EvaluationError(
                f"{name}: task {spec.task!r} runs code that the model writes. To allow it, set "
                f"{ALLOW_CODE}=1, or use `paretomerge --confirm-run-unsafe-code COMMAND`"
            )
        return task

    def _select_documents(self, n: int, split: Split) -> list[int]:
        """Which of the n documents belong to the split, in the order of the data."""
        if self.splits is not None:
            if split == "search" and self.search_items:
                n = min(n, self.search_items)
            return list(range(n))
        search_items = self.search_items
        if search_items is None:
            search_items = min(n // 2, _MOST_SEARCH_ITEMS)
        if not 0 < search_items < n:
            raise EvaluationError(
                f"search_items: must be between 1 and {n - 1}, so that some of the {n} examples "
                f"are held out, got {search_items}"
            )
        rng = random.Random(self.seed)
        shuffled = rng.sample(range(n), n)
        # The same permutation for both splits: they have no example in common.
        if split == "search":
            return sorted(shuffled[:search_items])
        return sorted(shuffled[search_items:])


def _choose_metric(name: str, spec: HarnessTask, task: "Task") -> str:
    metrics = list(task.aggregation())
    if task.OUTPUT_TYPE == "generate_until":
        metrics.append(OUTPUT_LENGTH)
    if spec.metric is None:
        return str(metrics[0])
    if spec.metric not in metrics:
        message = unknown_name(f"metric of task {spec.task}", spec.metric, metrics)
        raise EvaluationError(f"{name}: {message}")
    return spec.metric


def _requests_by_document(task: "Task") -> "Requests":
    requests: dict[int, list[Instance]] = defaultdict(list)
    for instance in task.instances:
        requests[instance.doc_id].append(instance)
    ordered = []
    for instances in requests.values():
        # answers of a multiple-choice example, in the order that the metric expects
        instances.sort(key=lambda instance: instance.idx)
        ordered.append(tuple(instances))
    return tuple(ordered)


def _content(task: "Task", requests: Sequence["Instance"]) -> list[object]:
    """The question, target and choices of an example, or its requests if it has no question."""
    doc = requests[0].doc
    question = task.doc_to_text(doc)
    choices = None
    if task.OUTPUT_TYPE == "multiple_choice":
        choices = task.doc_to_choice(doc)
    target = task.doc_to_target(doc)
    if question or choices:
        return [question, target, choices]
    return [requests[0].args, target]


def _digest(value: object) -> str:
    """Hexadecimal digest of a value's JSON."""
    # Score caches store digests, so the format of the text must not change.
    text = json.dumps(value, sort_keys=True, default=_to_json)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return digest[:_DIGEST_LENGTH]


def _to_json(value: object) -> str:
    """The source of a function, or its name without one; the text of any other value."""
    if not callable(value):
        return str(value)
    # built-in functions, and functions of an interactive session, have no source
    with contextlib.suppress(OSError, TypeError):
        return inspect.getsource(value)
    class_name = type(value).__qualname__
    return str(getattr(value, "__qualname__", class_name))


def _working_directory(folder: Path | None) -> contextlib.AbstractContextManager[None]:
    """Change to the folder, if there is one, for the length of a `with` block."""
    if folder is None:
        return contextlib.nullcontext()
    return contextlib.chdir(folder)
