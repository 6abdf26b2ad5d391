"""Tasks of lm-evaluation-harness as items: loaded once, each with the requests that it makes and with a key by its content."""

import contextlib
import hashlib
import inspect
import json
import logging
import os
import random
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from paretomerge.errors import EvaluationError, unknown_name
from paretomerge.evaluate.evaluator import Split


@dataclass(frozen=True)
class HarnessTask:
    """A task of the harness and the metric taken from it (by default the task's first)."""

    task: str
    metric: str | None = None


LENGTH = "output_length"
"""A metric that every task with written answers has: their tokens."""


@dataclass(frozen=True)
class Examples:
    """One task's items of one split, in the order of its data.

    requests: the harness's instances that each item makes. metric, filter: what is read from the responses.
    """

    task: Any
    metric: str
    filter: Any
    requests: tuple[tuple[Any, ...], ...]

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def higher_is_better(self) -> bool:
        return self.metric != LENGTH and bool(self.task.higher_is_better().get(self.metric, True))

    @cached_property
    def contents(self) -> tuple[str, ...]:
        """What each item asks and wants, whatever stands before it: equal where two tasks or splits have one item in common."""
        return tuple(_digest(_content(self.task, requests)) for requests in self.requests)

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """What each item sends to a model."""
        return tuple(
            _digest([[r.request_type, r.args, r.repeats] for r in requests])
            for requests in self.requests
        )

    @cached_property
    def key(self) -> str:
        """How responses become an outcome: the task's settings, the source of its functions, the harness's version."""
        import lm_eval

        settings = {
            k: v
            for k, v in self.task.dump_config().items()
            if k not in ("dataset_kwargs", "test_split", "metadata")
        }
        return _digest([lm_eval.__version__, self.metric, self.filter.name, settings])

    def aggregate(self, outcomes: Sequence[Any]) -> float:
        """The metric of several items."""
        return float(
            fmean(outcomes)
            if self.metric == LENGTH
            else self.task.aggregation()[self.metric](outcomes)
        )

    def outcomes(self, chosen: Sequence[int], length: Callable[[str], int]) -> list[Any]:
        """The metric of each chosen item, from the responses on its requests: what the harness does after a model has answered.
        length: of a text, in tokens.
        """
        if self.metric == LENGTH:
            return [
                fmean(length(text) for r in self.requests[i] for text in r.resps) for i in chosen
            ]
        instances = [instance for i in chosen for instance in self.requests[i]]
        if instances:
            self.filter.apply(instances)
        found = []
        for i in chosen:
            results = self.task.process_results(
                self.requests[i][0].doc,
                [r.filtered_resps[self.filter.name] for r in self.requests[i]],
            )
            found.append(results[self.metric])
        return found

    def without(self, contents: Collection[str]) -> "Examples":
        """Less the items that have one of these contents."""
        kept = [
            requests
            for requests, content in zip(self.requests, self.contents, strict=True)
            if content not in contents
        ]
        return Examples(self.task, self.metric, self.filter, tuple(kept))


@dataclass
class TaskLoader:
    """Finds tasks by name and loads their items.

    include_path: folder with task YAMLs. data_root: the folder that relative `data_files` in them start from (the harness: the
        current one).
    splits: the data set's split for `search` and for `held_out`. Without it, `search_items` documents of the split that
        the harness tests on are searched on and the rest are held out, drawn with `seed`.
    """

    include_path: Path | None = None
    data_root: Path | None = None
    splits: Mapping[str, str] | None = None
    search_items: int | None = None
    seed: int = 0
    _manager: Any = field(default=None, repr=False)

    def check(self, tasks: Mapping[str, HarnessTask]) -> None:
        """EvaluationError where a task is not known; the harness's 14,000 built-in tasks are indexed only if one is asked for."""
        if self.include_path is not None and not self.include_path.is_dir():
            raise EvaluationError(
                f"include_path: expected a folder with task YAMLs, got {self.include_path}, which is not there"
            )
        folder = str(self.include_path) if self.include_path else None
        with quiet():
            from lm_eval.tasks import TaskManager

            self._manager = TaskManager(include_defaults=False, include_path=folder)
            if any(spec.task not in self._manager.all_subtasks for spec in tasks.values()):
                self._manager = TaskManager(include_path=folder)
        for name, spec in tasks.items():
            if spec.task not in self._manager.all_subtasks:
                raise EvaluationError(
                    f"{name}: {unknown_name('task', spec.task, self._manager.all_subtasks)}"
                )

    def load(self, name: str, spec: HarnessTask, split: Split) -> Examples:
        """The items of one split, with their requests."""
        with quiet(), _at(self.data_root):
            try:
                task = self._manager.load([spec.task])["tasks"][spec.task]
            except (
                Exception
            ) as error:  # data sets fail in as many ways as there are hosts and formats
                raise EvaluationError(
                    f"{name}: task {spec.task!r} cannot be loaded: {type(error).__name__}: {error}; "
                    f"relative data_files start from {Path.cwd()}"
                ) from error
            if self.splits is not None:
                if self.splits[split] not in task.dataset:
                    raise EvaluationError(
                        f"{name}: {unknown_name('split', self.splits[split], task.dataset)}"
                    )
                task.config.test_split = self.splits[split]
            task.set_fewshot_seed(self.seed)
            task.build_all_requests(
                samples=self._documents(len(task.eval_docs), split), rank=0, world_size=1
            )
        metrics = [*task.aggregation(), *([LENGTH] if task.OUTPUT_TYPE == "generate_until" else [])]
        if spec.metric is not None and spec.metric not in metrics:
            raise EvaluationError(
                f"{name}: {unknown_name(f'metric of task {spec.task}', spec.metric, metrics)}"
            )
        requests: dict[int, list[Any]] = defaultdict(list)
        for instance in task.instances:
            requests[instance.doc_id].append(instance)
        ordered = tuple(
            tuple(sorted(instances, key=lambda i: i.idx)) for instances in requests.values()
        )
        return Examples(task, spec.metric or metrics[0], _first_filter(task), ordered)

    def _documents(self, n: int, split: Split) -> list[int]:
        if self.splits is not None:
            return list(
                range(
                    n if split == "held_out" or not self.search_items else min(n, self.search_items)
                )
            )
        if self.search_items is None or not 0 < self.search_items < n:
            raise EvaluationError(
                f"search_items: expected 1 to {n - 1}, so that some of the {n} items are held out, got {self.search_items}"
            )
        order = random.Random(self.seed).sample(range(n), n)
        return sorted(
            order[: self.search_items] if split == "search" else order[self.search_items :]
        )


def _first_filter(task: Any) -> Any:
    if task._filters:
        return task._filters[0]
    from lm_eval.filters import build_filter_ensemble

    return build_filter_ensemble("none", [["take_first", None]])


def _content(task: Any, requests: Sequence[Any]) -> Any:
    doc = requests[0].doc
    asked = task.doc_to_text(doc)
    choices = task.doc_to_choice(doc) if task.OUTPUT_TYPE == "multiple_choice" else None
    wanted = task.doc_to_target(doc)
    return [asked, wanted, choices] if asked or choices else [requests[0].args, wanted]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=_plain).encode()).hexdigest()[
        :20
    ]


def _plain(value: Any) -> Any:
    """Functions by their source; whatever else JSON does not know, by its text."""
    if callable(value):
        with contextlib.suppress(OSError, TypeError):
            return inspect.getsource(value)
        return getattr(value, "__qualname__", type(value).__qualname__)
    return str(value)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The harness, its data sets and the hub's lazy imports log, print and draw bars as they like."""
    with (
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stderr(nowhere),
        contextlib.redirect_stdout(nowhere),
    ):
        import datasets
        import lm_eval.tasks  # noqa: F401

        loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval", "datasets")]
        before = [logger.level for logger in loggers]
        bars = datasets.are_progress_bars_disabled()
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        datasets.disable_progress_bars()
        try:
            yield
        finally:
            if not bars:
                datasets.enable_progress_bars()
            for logger, level in zip(loggers, before, strict=True):
                logger.setLevel(level)


@contextlib.contextmanager
def _at(folder: Path | None) -> Iterator[None]:
    if folder is None:
        yield
        return
    with contextlib.chdir(folder):
        yield
