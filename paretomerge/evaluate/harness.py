"""lm-evaluation-harness on the resident model: tasks are loaded and their requests built once, then only scored."""

import math
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from paretomerge.errors import EvaluationError
from paretomerge.evaluate.backend import Backend
from paretomerge.evaluate.evaluator import Candidate, Score, Split
from paretomerge.evaluate.score_cache import ScoreCache
from paretomerge.evaluate.tasks import Examples, HarnessTask, TaskLoader, quiet

_BOOTSTRAPS = 100  # for the standard error of metrics that are not means


class HarnessEvaluator:
    """Scores `tasks` (name of the score -> task) with lm-evaluation-harness, all or some of their items.

    loader: where tasks and their splits come from. beside: what is searched on there is, like what is searched on here, never
    held out. kept: outcomes of items, by merge, that need not be had again. backend: another model of the harness, in place of the
    live one.
    """

    def __init__(
        self,
        tasks: Mapping[str, HarnessTask],
        loader: TaskLoader,
        *,
        batch_size: int = 16,
        beside: "HarnessEvaluator | None" = None,
        kept: ScoreCache | None = None,
        backend: Backend | None = None,
    ) -> None:
        self.tasks = dict(tasks)
        self.batch_size = batch_size
        self.notes: list[str] = []
        self._loader = loader
        self._loader.check(self.tasks)
        self._beside = beside
        self._kept = kept
        self._backend = backend
        self._loaded: dict[str, dict[str, Examples]] = {}
        self._lm: Any = None
        self._tokenizer: Any = None
        self.items(
            "search"
        )  # so that a missing data set or metric is told before anything is merged

    @property
    def searched(self) -> frozenset[str]:
        """Contents of all items that are searched on."""
        elsewhere = self._beside.searched if self._beside else frozenset[str]()
        return elsewhere.union(*(items.contents for items in self.items("search").values()))

    def directions(self) -> dict[str, bool]:
        """Name -> whether higher is better, as the tasks say."""
        return {name: items.higher_is_better for name, items in self.items("search").items()}

    def items(self, split: Split) -> dict[str, Examples]:
        """Name -> items of the split; none is in both."""
        if split not in self._loaded:
            loaded = {
                name: self._loader.load(name, spec, split) for name, spec in self.tasks.items()
            }
            if split == "held_out":
                searched = self.searched
                loaded = {
                    name: self._apart(name, items, searched) for name, items in loaded.items()
                }
            self._loaded[split] = loaded
        return self._loaded[split]

    def evaluate(self, live: Candidate, split: Split) -> Mapping[str, Score]:
        everything = {name: range(len(items)) for name, items in self.items(split).items()}
        return {
            name: self.score(split, name, found)
            for name, found in self.outcomes(live, split, everything).items()
        }

    def outcomes(
        self, live: Candidate, split: Split, wanted: Mapping[str, Sequence[int]]
    ) -> dict[str, list[Any]]:
        """Name -> the metric of each wanted item (by its place in the split). What is kept of this merge is not asked again."""
        items = {name: self.items(split)[name] for name in wanted}
        found = {
            name: self._kept.of(live.key, one.key) if self._kept and live.key else {}
            for name, one in items.items()
        }
        missing = {
            name: [i for i in wanted[name] if one.keys[i] not in found[name]]
            for name, one in items.items()
        }
        try:
            self._respond(
                live,
                [
                    r
                    for name, places in missing.items()
                    for i in places
                    for r in items[name].requests[i]
                ],
            )
            for name, places in missing.items():
                new = dict(
                    zip(
                        (items[name].keys[i] for i in places),
                        items[name].outcomes(places, self._length),
                        strict=True,
                    )
                )
                found[name] = found[name] | new
                if self._kept and live.key and new:
                    self._kept.add(live.key, items[name].key, new)
        except EvaluationError:
            raise
        except Exception as error:  # templates, filters and metrics are code of the tasks' own
            raise EvaluationError(
                f"{', '.join(self.tasks)}: the harness raised {type(error).__name__}: {error}"
            ) from error
        return {
            name: [found[name][one.keys[i]] for i in wanted[name]] for name, one in items.items()
        }

    def score(self, split: Split, name: str, outcomes: Sequence[Any]) -> Score:
        """What the harness makes of items' outcomes."""
        items = self.items(split)[name]
        if all(isinstance(value, (int, float)) or hasattr(value, "item") for value in outcomes):
            score = Score.mean_of([float(value) for value in outcomes])
            if math.isclose(items.aggregate(outcomes), score.value, rel_tol=1e-9, abs_tol=1e-12):
                return score
        return Score(items.aggregate(outcomes), _bootstrap(items, outcomes), len(outcomes))

    def _respond(self, live: Candidate, instances: Sequence[Any]) -> None:
        """Put the model's responses on the instances."""
        if not instances:
            return
        # one list per kind of request, over all tasks, equal requests once: batches are of like lengths
        requests: dict[str, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
        for instance in instances:
            instance.resps, instance.filtered_resps = [], {}
            for repeat in range(instance.repeats):
                requests[instance.request_type][repr((instance.args, repeat))].append(instance)
        with (
            quiet(),
            self._backend.model(live, self.batch_size)
            if self._backend
            else nullcontext(self._resident(live)) as model,
        ):
            for kind, same in requests.items():
                responses = getattr(model, kind)(
                    [each[0] for each in same.values()], disable_tqdm=True
                )
                for each, response in zip(same.values(), responses, strict=True):
                    for instance in each:
                        instance.resps.append(response)
        self._tokenizer = live.tokenizer

    def _resident(self, live: Candidate) -> Any:
        """The live model as the harness sees it."""
        if self._lm is None or self._lm.tokenizer is not live.tokenizer:
            from paretomerge.evaluate.inference.language_model import ResidentLM

            self._lm = ResidentLM(live.model, live.tokenizer, self.batch_size)
        self._lm.take(live.model)
        return self._lm

    def _length(self, text: str) -> int:
        return len(self._tokenizer.encode(text, add_special_tokens=False))

    def _apart(self, name: str, items: Examples, searched: frozenset[str]) -> Examples:
        """Held-out items, less those that are searched on."""
        apart = items.without(searched)
        if not len(apart):
            raise EvaluationError(
                f"{name}: expected held-out items that are not searched on, got none; see `splits` and `search_items`"
            )
        if lost := len(items) - len(apart):
            self.notes.append(
                f"{name}: {lost} of {len(items)} held-out items are searched on too, and left out"
            )
        return apart


def _bootstrap(items: Examples, values: Sequence[Any]) -> float:
    rng = random.Random(0)
    draws = [items.aggregate(rng.choices(values, k=len(values))) for _ in range(_BOOTSTRAPS)]
    mean = sum(draws) / len(draws)
    return math.sqrt(sum((d - mean) ** 2 for d in draws) / (len(draws) - 1))
