"""Score the live model on tasks of lm-evaluation-harness.

Tasks are loaded and their requests built once per study. For each candidate, `example_scores` then
looks up cached scores, sends the requests of all other examples to the model, and lets the harness
turn the responses into per-example scores, which `aggregate` combines into a `Score`.
"""

import math
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, TypeAlias

from paretomerge.errors import ErrorCollector, EvaluationError
from paretomerge.evaluate import _lm_eval
from paretomerge.evaluate.backend import EvaluationBackend, ModelOptions
from paretomerge.evaluate.evaluator import (
    Candidate,
    ExampleIndices,
    MetricValue,
    MetricValues,
    Score,
    Scores,
    Split,
)
from paretomerge.evaluate.examples import Examples, GroupExamples
from paretomerge.evaluate.model_kind import ModelKind
from paretomerge.evaluate.score_cache import ScoreCache
from paretomerge.evaluate.tasks import HarnessTask, TaskLoader

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from transformers import PreTrainedTokenizerBase

    from paretomerge.evaluate.inference.language_model import ResidentLM

    Instances: TypeAlias = Sequence[Instance]
    Groups: TypeAlias = dict[str, list[Instance]]

TaskExamples: TypeAlias = Examples | GroupExamples
ExamplesByName: TypeAlias = dict[str, TaskExamples]
"""Name of a score -> its examples."""

_BOOTSTRAP_DRAWS = 100  # for the standard error of metrics that are not means


class HarnessEvaluator:
    """Scores tasks with lm-evaluation-harness, on all or some of their examples (`PerExample`).

    The search examples are loaded at once, so that a missing data set or metric is an error
    before anything is merged.

    Args:
        tasks: Name of the score -> task and metric.
        loader: Loads tasks and cuts them into splits.
        batch_size: Rows of a forward pass. It is halved where memory runs out.
        search_evaluator: What this other evaluator searches on is not held out here either.
        cache: Per-example scores of merges that were scored before, in any study.
        backend: Another engine, in place of the live model.

    Attributes:
        tasks: As given.
        batch_size: As given.
        notes: What users should know, such as examples that were removed from the held-out split.

    Raises:
        EvaluationError: A task, its data or its metric does not exist.
    """

    def __init__(
        self,
        tasks: Mapping[str, HarnessTask],
        loader: TaskLoader,
        *,
        batch_size: int = 16,
        search_evaluator: "HarnessEvaluator | None" = None,
        cache: ScoreCache | None = None,
        backend: EvaluationBackend | None = None,
    ) -> None:
        self.tasks = dict(tasks)
        self.batch_size = batch_size
        self.notes: list[str] = []
        self._loader = loader
        # A misspelled task is an error before any data is loaded.
        self._loader.check(self.tasks)
        self._search_evaluator = search_evaluator
        self._cache = cache
        self._backend = backend
        self._loaded: dict[Split, ExamplesByName] = {}
        # Each has a tokenizer of its own, and all have the same model.
        self._residents: dict[ModelOptions, ResidentLM] = {}
        self._tokenizer: PreTrainedTokenizerBase | None = None
        # Loaded now, so that their errors come before the first trial.
        self.examples("search")
        if loader.selection_items:
            self.examples("selection")

    @property
    def search_contents(self) -> frozenset[str]:
        """Content digests of all search examples, those of `search_evaluator` included."""
        contents: set[str] = set()
        if self._search_evaluator:
            contents.update(self._search_evaluator.search_contents)
        for examples in self.examples("search").values():
            contents.update(examples.content_digests)
        return frozenset(contents)

    @property
    def selection_contents(self) -> frozenset[str]:
        """Content digests of all selection examples, those of `search_evaluator` included."""
        contents: set[str] = set()
        if self._search_evaluator:
            contents.update(self._search_evaluator.selection_contents)
        elif self._loader.selection_items:
            for examples in self.examples("selection").values():
                contents.update(examples.content_digests)
        return frozenset(contents)

    def check_model_kind(self, kind: ModelKind) -> None:
        """Check that models of a kind can do tasks; see `Evaluator`."""
        names = ", ".join(self.tasks)
        if self._backend is None:
            kind.check_writes_text(names)
        else:
            self._backend.check(kind, names)

    def directions(self) -> dict[str, bool]:
        """Name of the score -> whether higher is better, as the tasks declare it."""
        directions = {}
        for name, task_examples in self.examples("search").items():
            directions[name] = task_examples.higher_is_better
        return directions

    def examples(self, split: Split) -> ExamplesByName:
        """Name of the score -> its examples of the split; no example is in both splits."""
        if split not in self._loaded:
            loaded = {}
            errors = ErrorCollector()
            for name, spec in self.tasks.items():
                with errors.collect():
                    loaded[name] = self._loader.load(name, spec, split)
            errors.raise_if_any()
            # the search keeps an example of several splits: no other score must include it
            if split != "search":
                loaded = self._without_used_examples(loaded, split)
            self._loaded[split] = loaded
        return self._loaded[split]

    def evaluate(self, candidate: Candidate, split: Split) -> Scores:
        """Score on all examples of the split; see `Evaluator.evaluate`."""
        all_indices = {}
        for name, task_examples in self.examples(split).items():
            all_indices[name] = range(len(task_examples))
        example_scores = self.example_scores(candidate, split, all_indices)
        scores = {}
        for name, values in example_scores.items():
            scores[name] = self.aggregate(split, name, values)
        return scores

    def example_scores(
        self, candidate: Candidate, split: Split, indices: ExampleIndices
    ) -> dict[str, list[MetricValue]]:
        """Score some examples; see `PerExample`. Cached scores are not computed again."""
        all_examples = self.examples(split)
        examples = {name: all_examples[name] for name in indices}
        scores: dict[str, MetricValues] = {}  # by request digest
        missing: dict[str, list[int]] = {}
        for name, task_examples in examples.items():
            cached = self._cached_scores(candidate, name, task_examples)
            digests = task_examples.request_digests
            missing[name] = []
            for i in indices[name]:
                if digests[i] not in cached:
                    missing[name].append(i)
            scores[name] = cached
        try:
            requests = self._requests_of(examples, missing)
            for options, instances in requests.items():
                self._respond(candidate, instances, options)
            for name, indices_left in missing.items():
                computed = self._compute_scores(
                    candidate, name, examples[name], indices_left
                )
                scores[name] |= computed
        except EvaluationError:
            # Its message already says what is wrong.
            raise
        # The templates, filters and metrics are code of the tasks, and may raise anything.
        except Exception as error:
            names = ", ".join(self.tasks)
            cause = f"{type(error).__name__}: {error}"
            raise EvaluationError(f"{names}: the harness raised {cause}") from error
        ordered = {}
        for name, task_examples in examples.items():
            task_scores = scores[name]
            digests = task_examples.request_digests
            wanted = [digests[i] for i in indices[name]]
            ordered[name] = [task_scores[digest] for digest in wanted]
        return ordered

    def aggregate(
        self, split: Split, name: str, example_scores: Sequence[MetricValue]
    ) -> Score:
        """Combine per-example scores with the task's own aggregation; see `PerExample`.

        Where that is the mean, the score has the standard error of a mean and carries the
        per-example scores; else the standard error comes from the bootstrap.
        """
        examples = self.examples(split)[name]
        aggregated = examples.aggregate(example_scores)
        # the harness does not say whether an aggregation is the mean, so compare the results
        if all(_is_number(value) for value in example_scores):
            numbers = [float(value) for value in example_scores]
            score = Score.mean_of(numbers)
            if math.isclose(aggregated, score.value, rel_tol=1e-9, abs_tol=1e-12):
                return score
        stderr = _bootstrap_stderr(examples, example_scores)
        return Score(aggregated, stderr, len(example_scores))

    def _requests_of(
        self, examples: ExamplesByName, indices: ExampleIndices
    ) -> "dict[ModelOptions, list[Instance]]":
        """The requests of some examples, by how their text goes into the model."""
        requests: dict[ModelOptions, list[Instance]] = defaultdict(list)
        for name, task_examples in examples.items():
            of_options = requests[self.tasks[name].options]
            for i in indices[name]:
                of_options += task_examples.requests[i]
        return requests

    def _cached_scores(
        self, candidate: Candidate, name: str, examples: TaskExamples
    ) -> MetricValues:
        if self._cache and candidate.key:
            key = self._cache_key(candidate, name)
            return self._cache.get(key, examples.scoring_digest)
        return {}

    def _cache_key(self, candidate: Candidate, name: str) -> str:
        # Prompts and settings of generation are in the digests of requests; options are not.
        # Without options and backend the key is that of earlier versions.
        key = candidate.key
        options = self.tasks[name].options.arguments
        if options:
            key += f" {options}"
        if self._backend:
            key += f" {self._backend.key}"
        return key

    def _compute_scores(
        self,
        candidate: Candidate,
        name: str,
        examples: TaskExamples,
        indices: Sequence[int],
    ) -> MetricValues:
        """Scores by request digest, from the responses on the requests; adds them to the cache."""
        digests = [examples.request_digests[i] for i in indices]
        values = examples.example_scores(indices, self._count_tokens)
        scores = dict(zip(digests, values, strict=True))
        if self._cache and candidate.key and scores:
            key = self._cache_key(candidate, name)
            self._cache.add(key, examples.scoring_digest, scores)
        return scores

    def _respond(
        self, candidate: Candidate, instances: "Instances", options: ModelOptions
    ) -> None:
        """Put the model's responses on the instances."""
        if not instances:
            return
        groups = _group_equal_requests(instances)
        with _lm_eval.quiet(), self._language_model(candidate, options) as model:
            for request_type, equal_requests in groups.items():
                distinct = [equal[0] for equal in equal_requests]
                # The type of a request is the name of the method that answers it.
                respond = getattr(model, request_type)
                responses = respond(distinct, disable_tqdm=True)
                for equal, response in zip(equal_requests, responses, strict=True):
                    for instance in equal:
                        instance.resps.append(response)
        self._tokenizer = candidate.text_tokenizer

    def _language_model(
        self, candidate: Candidate, options: ModelOptions
    ) -> "AbstractContextManager[LM]":
        """The candidate as a model of the harness."""
        if self._backend:
            return self._backend.load(candidate, self.batch_size, options)
        resident = self._residents.get(options)
        # The encoded requests belong to one tokenizer.
        if resident is None or resident.given_tokenizer is not candidate.text_tokenizer:
            # importing the harness and torch takes seconds, and `status` and `report` need neither
            from paretomerge.evaluate.inference.language_model import ResidentLM

            resident = ResidentLM(
                candidate.model, candidate.text_tokenizer, self.batch_size, options
            )
            self._residents[options] = resident
        resident.set_model(candidate.model)
        return nullcontext(resident)

    def _count_tokens(self, text: str) -> int:
        assert self._tokenizer is not None, "responses come before their lengths"
        tokens = self._tokenizer.encode(text, add_special_tokens=False)
        return len(tokens)

    def _without_used_examples(
        self, loaded: ExamplesByName, split: Split
    ) -> ExamplesByName:
        """Examples of a split without the search examples; a note counts those removed.

        Held-out examples are also not those of the selection.
        """
        used = self.search_contents
        if split == "held_out":
            used |= self.selection_contents
        kind = split.replace("_", "-")
        disjoint = {}
        for name, examples in loaded.items():
            remaining = examples.without(used)
            if not len(remaining):
                raise EvaluationError(
                    f"{name}: all {kind} examples are searched on too. "
                    "Change `splits` or `search_items`"
                )
            removed = len(examples) - len(remaining)
            if removed:
                total = len(examples)
                self.notes.append(
                    f"{name}: {removed} of {total} {kind} examples are searched on too, "
                    "and left out"
                )
            disjoint[name] = remaining
        return disjoint


def _group_equal_requests(instances: "Instances") -> "dict[str, list[list[Instance]]]":
    """Type of request -> groups of equal requests, and clear old responses.

    Each group needs one response. The requests of all tasks with the same options are in one list,
    so that a batch has requests of similar lengths. Each repeat of a request gets a response of its
    own.
    """
    by_type: dict[str, Groups] = defaultdict(dict)
    for instance in instances:
        instance.resps = []
        instance.filtered_resps = {}
        equal_requests = by_type[instance.request_type]
        for repeat in range(instance.repeats):
            # arguments hold dicts of generation settings, which cannot be keys themselves
            key = repr((instance.args, repeat))
            group = equal_requests.setdefault(key, [])
            group.append(instance)
    groups = {}
    for request_type, equal_requests in by_type.items():
        groups[request_type] = list(equal_requests.values())
    return groups


def _is_number(value: MetricValue) -> bool:
    """Whether it is a Python number or a scalar of numpy or torch."""
    return isinstance(value, (int, float)) or hasattr(value, "item")


def _bootstrap_stderr(examples: TaskExamples, values: Sequence[MetricValue]) -> float:
    """Standard deviation of the aggregated metric over resampled examples."""
    # A fixed seed: equal scores must have equal standard errors.
    rng = random.Random(0)
    n = len(values)
    draws = []
    for _ in range(_BOOTSTRAP_DRAWS):
        resampled = rng.choices(values, k=n)
        draw = examples.aggregate(resampled)
        draws.append(draw)
    mean = sum(draws) / len(draws)
    squares = sum((draw - mean) ** 2 for draw in draws)
    variance = squares / (len(draws) - 1)
    return math.sqrt(variance)
