"""lm-evaluation-harness on the resident model: tasks are loaded and their requests built once, then only scored."""

import contextlib
import logging
import math
import os
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paretomerge.errors import EvaluationError, unknown
from paretomerge.evaluate.evaluator import Live, Score, Split

_BOOTSTRAPS = 100  # for the standard error of metrics that are not means


@dataclass(frozen=True)
class HarnessTask:
    """A task of the harness and the metric taken from it (by default the task's first)."""

    task: str
    metric: str | None = None


@dataclass
class _Loaded:
    task: Any
    metric: str
    filter: str


class HarnessEvaluator:
    """Scores `tasks` (name of the score -> task) with lm-evaluation-harness.

    include_path: folder with task YAMLs; the harness's 14,000 built-in tasks are indexed only if one is asked for.
    data_root: the folder that relative `data_files` in the task YAMLs start from (the harness: the current one).
    splits: the data set's split for `search` and for `held_out`. Without it, `search_items` documents of the split that
        the harness tests on are searched on and the rest are held out, drawn with `seed`.
    """

    def __init__(
        self,
        tasks: Mapping[str, HarnessTask],
        *,
        include_path: Path | None = None,
        data_root: Path | None = None,
        splits: Mapping[str, str] | None = None,
        search_items: int | None = None,
        batch_size: int = 16,
        seed: int = 0,
    ) -> None:
        self.tasks = dict(tasks)
        self.splits = splits
        self.search_items = search_items
        self.batch_size = batch_size
        self.seed = seed
        self._manager = _manager(include_path, [t.task for t in tasks.values()])
        self._root = data_root
        self._loaded: dict[str, dict[str, _Loaded]] = {}
        self._lm: Any = None
        for name, spec in self.tasks.items():
            if spec.task not in self._manager.all_subtasks:
                raise EvaluationError(f"{name}: {unknown('task', spec.task, self._manager.all_subtasks)}")
        self._prepare("search")  # so that a missing data set or metric is told before anything is merged

    def directions(self) -> dict[str, bool]:
        """Name -> whether higher is better, as the tasks say."""
        loaded = self._prepare("search")
        return {name: bool(part.task.higher_is_better().get(part.metric, True)) for name, part in loaded.items()}

    def evaluate(self, live: Live, split: Split) -> Mapping[str, Score]:
        try:
            loaded = self._prepare(split)
            self._respond(live, loaded)
            return {name: _score(part) for name, part in loaded.items()}
        except EvaluationError:
            raise
        except Exception as error:  # templates, filters and metrics are code of the tasks' own
            raise EvaluationError(f"{', '.join(self.tasks)}: the harness raised {type(error).__name__}: {error}") from error

    def _respond(self, live: Live, loaded: Mapping[str, _Loaded]) -> None:
        """Put the model's responses on every request."""
        if self._lm is None or self._lm.model is not live.model:
            from lm_eval.models.huggingface import HFLM

            with _quiet():
                self._lm = HFLM(pretrained=live.model, tokenizer=live.tokenizer, batch_size=self.batch_size)
        # one list per kind of request, over all tasks: the harness batches by length
        requests: dict[str, list[Any]] = defaultdict(list)
        for part in loaded.values():
            for instance in part.task.instances:
                instance.resps, instance.filtered_resps = [], {}
                requests[instance.request_type].extend([instance] * instance.repeats)
        for kind, instances in requests.items():
            with _quiet():
                responses = getattr(self._lm, kind)(instances, disable_tqdm=True)
            for instance, response in zip(instances, responses, strict=True):
                instance.resps.append(response)

    def _prepare(self, split: Split) -> dict[str, _Loaded]:
        if split not in self._loaded:
            with _quiet(), _at(self._root):
                self._loaded[split] = {name: self._load(name, spec, split) for name, spec in self.tasks.items()}
        return self._loaded[split]

    def _load(self, name: str, spec: HarnessTask, split: Split) -> _Loaded:
        try:
            task = self._manager.load([spec.task])["tasks"][spec.task]
        except Exception as error:  # data sets fail in as many ways as there are hosts and formats
            raise EvaluationError(
                f"{name}: task {spec.task!r} cannot be loaded: {type(error).__name__}: {error}; relative data_files start from {Path.cwd()}"
            ) from error
        if self.splits is not None:
            if self.splits[split] not in task.dataset:
                raise EvaluationError(f"{name}: {unknown('split', self.splits[split], task.dataset)}")
            task.config.test_split = self.splits[split]
        task.set_fewshot_seed(self.seed)
        task.build_all_requests(samples=self._documents(len(task.eval_docs), split), rank=0, world_size=1)
        metrics = list(task.aggregation())
        if spec.metric is not None and spec.metric not in metrics:
            raise EvaluationError(f"{name}: {unknown(f'metric of task {spec.task}', spec.metric, metrics)}")
        filters = [f.name for f in task._filters] or ["none"]
        return _Loaded(task, spec.metric or metrics[0], filters[0])

    def _documents(self, n: int, split: Split) -> list[int]:
        if self.splits is not None:
            return list(range(n if split == "held_out" or not self.search_items else min(n, self.search_items)))
        if self.search_items is None or not 0 < self.search_items < n:
            raise EvaluationError(
                f"search_items: expected 1 to {n - 1}, so that some of the {n} items are held out, got {self.search_items}"
            )
        order = random.Random(self.seed).sample(range(n), n)
        return sorted(order[: self.search_items] if split == "search" else order[self.search_items :])


def _score(part: _Loaded) -> Score:
    """What the harness does after the responses: filter, score each document, aggregate."""
    task = part.task
    task.apply_filters()
    by_document: dict[int, list[Any]] = defaultdict(list)
    for instance in task.instances:
        by_document[instance.doc_id].append(instance)
    values = []
    for instances in by_document.values():
        instances.sort(key=lambda instance: instance.idx)
        results = task.process_results(instances[0].doc, [i.filtered_resps[part.filter] for i in instances])
        values.append(results[part.metric])
    if all(isinstance(value, (int, float)) or hasattr(value, "item") for value in values):
        items = [float(value) for value in values]
        score = Score.mean_of(items)
        if math.isclose(task.aggregation()[part.metric](values), score.value, rel_tol=1e-9, abs_tol=1e-12):
            return score
    return Score(float(task.aggregation()[part.metric](values)), _bootstrap(task, part.metric, values), len(values))


def _bootstrap(task: Any, metric: str, values: Sequence[Any]) -> float:
    aggregate = task.aggregation()[metric]
    rng = random.Random(0)
    draws = [float(aggregate(rng.choices(values, k=len(values)))) for _ in range(_BOOTSTRAPS)]
    mean = sum(draws) / len(draws)
    return math.sqrt(sum((d - mean) ** 2 for d in draws) / (len(draws) - 1))


def _manager(include_path: Path | None, names: Sequence[str]) -> Any:
    if include_path is not None and not include_path.is_dir():
        raise EvaluationError(f"include_path: expected a folder with task YAMLs, got {include_path}, which is not there")
    with _quiet():
        from lm_eval.tasks import TaskManager

        own = TaskManager(include_defaults=False, include_path=str(include_path) if include_path else None)
        if all(name in own.all_subtasks for name in names):
            return own
        return TaskManager(include_path=str(include_path) if include_path else None)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The harness, its data sets and the hub's lazy imports log, print and draw bars as they like."""
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
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
