"""The examples of a task, or of a group of tasks, with their requests to a model.

Digests identify examples and tasks by their contents. So no example is both searched on and held
out, and another study can use the cached scores (`ScoreCache`).
"""

import contextlib
import hashlib
import inspect
import json
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean
from typing import TYPE_CHECKING

from paretomerge.evaluate.evaluator import MetricValue

if TYPE_CHECKING:
    from lm_eval.api.filter import FilterEnsemble
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import Task

    Requests = tuple[tuple[Instance, ...], ...]

OUTPUT_LENGTH = "output_length"
"""A metric that every task with generated answers has: their mean length in tokens."""

# settings of a task that say where its data is, not how responses become a score
_NOT_SCORING = ("dataset_kwargs", "test_split", "metadata")
_DIGEST_LENGTH = 20  # hexadecimal digits


@dataclass(frozen=True)
class Examples:
    """One task's examples of one split, in the order of its data.

    Attributes:
        task: The task, as the harness loaded it.
        metric: Which of its metrics is computed.
        filter: The pipeline that turns a model's responses into what the metric sees.
        requests: The requests (`Instance`s) of each example, `tuple[tuple[Instance, ...], ...]`.
    """

    task: "Task"
    metric: str
    filter: "FilterEnsemble"
    requests: "Requests"

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

    @property
    def is_mean(self) -> bool:
        """Whether the metric is a mean over examples."""
        if self.metric == OUTPUT_LENGTH:
            return True
        # The harness does not say so: three numbers tell.
        try:
            aggregated = self.aggregate([0.0, 0.0, 1.0])
        except Exception:  # an aggregation of its own, of other values than numbers
            return False
        return math.isclose(aggregated, 1 / 3)

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


@dataclass(frozen=True)
class GroupExamples:
    """The examples of a group of tasks, such as MMLU, as if it were one task; see `Examples`.

    The harness aggregates a group as a mean over its tasks, weighted by their sizes or not. Both
    are means over weighted examples, so a group has per-example scores and standard errors.

    Attributes:
        members: The examples of each of its tasks.
        weight_by_size: Whether all examples count alike; otherwise all tasks do.
    """

    members: tuple[Examples, ...]
    weight_by_size: bool

    def __len__(self) -> int:
        return sum(map(len, self.members))

    @property
    def metric(self) -> str:
        """The metric, which all tasks of the group have."""
        return self.members[0].metric

    @property
    def filter(self) -> "FilterEnsemble":
        """The first task's filter pipeline, for messages."""
        return self.members[0].filter

    @property
    def higher_is_better(self) -> bool:
        """The metric's direction, as the first task declares it."""
        return self.members[0].higher_is_better

    @cached_property
    def requests(self) -> "Requests":
        """The requests of each example, task after task."""
        requests: list[tuple[Instance, ...]] = []
        for member in self.members:
            requests += member.requests
        return tuple(requests)

    @cached_property
    def content_digests(self) -> tuple[str, ...]:
        """Digest of each example's content; see `Examples`."""
        digests: list[str] = []
        for member in self.members:
            digests += member.content_digests
        return tuple(digests)

    @cached_property
    def request_digests(self) -> tuple[str, ...]:
        """Digest of what each example sends to a model, and of how its task scores it."""
        digests = []
        for member in self.members:
            for request_digest in member.request_digests:
                # Two tasks may ask the same and score the answer differently.
                digests.append(_digest([member.scoring_digest, request_digest]))
        return tuple(digests)

    @cached_property
    def scoring_digest(self) -> str:
        """Digest of how responses become a score."""
        scoring = [member.scoring_digest for member in self.members]
        return _digest([scoring, self._weights])

    @cached_property
    def _weights(self) -> list[float]:
        """The weight of each task's examples; their mean over all examples is 1."""
        if self.weight_by_size:
            return [1.0] * len(self.members)
        equal_share = len(self) / len(self.members)
        return [equal_share / len(member) for member in self.members]

    def aggregate(self, example_scores: Sequence[MetricValue]) -> float:
        """The mean of weighted scores."""
        return float(fmean(example_scores))

    def example_scores(
        self, indices: Sequence[int], count_tokens: Callable[[str], int]
    ) -> list[MetricValue]:
        """The weighted metric of single examples; see `Examples.example_scores`."""
        scores: dict[int, MetricValue] = {}
        first = 0
        for member, weight in zip(self.members, self._weights, strict=True):
            end = first + len(member)
            of_member = [i for i in indices if first <= i < end]
            local = [i - first for i in of_member]
            values = member.example_scores(local, count_tokens)
            for i, value in zip(of_member, values, strict=True):
                scores[i] = weight * value
            first = end
        return [scores[i] for i in indices]

    def without(self, content_digests: Collection[str]) -> "GroupExamples":
        """The examples whose content has none of these digests; a task may have none left."""
        remaining = [member.without(content_digests) for member in self.members]
        members = tuple(member for member in remaining if len(member))
        # Of an empty group the caller tells the user; it still needs a metric and a direction.
        return replace(self, members=members or tuple(remaining[:1]))


def requests_by_document(task: "Task") -> "Requests":
    """The requests that a task has built, by example, in the order of its data."""
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
    """The question, target and choices of an example, or its document if it has no question."""
    doc = requests[0].doc
    question = task.doc_to_text(doc)
    choices = None
    if task.OUTPUT_TYPE == "multiple_choice":
        choices = task.doc_to_choice(doc)
    target = task.doc_to_target(doc)
    if question or choices:
        return [question, target, choices]
    # Not the request, in which few-shot examples and a chat template may stand, too.
    return [doc, target]


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
