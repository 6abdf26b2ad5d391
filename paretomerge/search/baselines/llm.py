"""A language model as proposer: it reads the log of trials and names the next point, checked before it is believed.

After Liu et al. 2023 (arXiv 2310.12541), who let a language model cross and mutate the solutions of a multi-objective
search. Here it makes a share of the proposals and another sampler the rest, so that it can help but not harm: what it
answers is checked key by key, told back to it once if wrong, and then left for the other sampler.
"""

import json
import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from optuna import Study
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler
from optuna.search_space import IntersectionSearchSpace
from optuna.trial import FrozenTrial, TrialState

from paretomerge.endpoint import Endpoint, EndpointError, Message
from paretomerge.errors import ConfigError, shorten
from paretomerge.pareto.front import nondominated_fronts
from paretomerge.search.baselines.answers import Answers, described
from paretomerge.search.encoding import Conditions, Encoding
from paretomerge.search.observations import Observations

PROPOSER = "proposer"
"""Trial system attribute: `llm`, or `inner: ` and why."""

TASK = (
    "You choose the settings for merging the weights of language models that were fine-tuned from one base model. "
    "`method` is how they are merged; a `weight` scales what one model changed in the base (0: left out, 1: in full, above 1: "
    "amplified; weights need not sum to 1); a `density` is the share of its changes that is kept. A name goes on with the "
    "model, then, where they are told apart, the group of layers (0: nearest the input) and the part of a layer."
)
"""What the parameters of our own spaces mean."""

_REASON = 300  # characters of a reason
_FAULTS = 10  # told to the model at once
_PATIENCE = 3  # failures in a row before it is left alone for a while
_LONGEST_REST = 64  # trials

_log = logging.getLogger(__name__)


class LLMSampler(BaseSampler):
    """Asks a language model for a share of the proposals, and `inner` for the rest.

    space, conditions: as for MMMOSampler; without a space, the parameters that all finished trials have.
    share: of the proposals that the model makes, in (0, 1]; which ones is drawn from `seed`.
    task: what the parameters mean, for the model. log_size: characters of the trial log that it is shorten.
    connection: base_url, model, key and timeout of an `Endpoint`, by default from the environment. A proposal takes
        at most twice the timeout. Raises ConfigError where no endpoint is configured.
    `inner` is asked at every trial, so that its generations and random state are those of a search without a model. It
    alone serves trials with enqueued values. A model's answers are not reproducible, and so neither is the study.
    After three failures in a row the model is left alone for 2 trials, then 4, 8, ... (64 at most) until it succeeds.
    """

    def __init__(
        self,
        inner: BaseSampler,
        *,
        space: dict[str, BaseDistribution] | None = None,
        conditions: Conditions | None = None,
        seed: int = 0,
        share: float = 0.5,
        task: str = TASK,
        log_size: int = 16_000,
        **connection: Any,
    ) -> None:
        if not 0 < share <= 1:
            raise ConfigError(f"share: expected above 0 and at most 1, got {shorten(share)}")
        self.inner = inner
        self.endpoint = Endpoint(**connection)
        self._space = space
        self._conditions = conditions
        self._seed = seed
        self._share = share
        self._task = task
        self._log_size = log_size
        self._intersection = IntersectionSearchSpace()
        self._spaces: dict[
            int, tuple[dict[str, BaseDistribution], dict[str, BaseDistribution]]
        ] = {}
        self._failures = 0
        self._rests_until = 0
        self._warned = False

    def reseed_rng(self) -> None:
        self.inner.reseed_rng()

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self.inner.before_trial(study, trial)

    def after_trial(
        self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        self.inner.after_trial(study, trial, state, values)

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Everything that either of the two may set."""
        own = dict(self._space) if self._space else self._intersection.calculate(study)
        inner = self.inner.infer_relative_search_space(study, trial)
        # kept, for the record may have grown when the point is asked for
        self._spaces[trial.number] = ({name: d for name, d in own.items() if not d.single()}, inner)
        return inner | own

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The model's point where it is its turn and it has one, else `inner`'s."""
        own, inner = self._spaces.pop(trial.number, (search_space, search_space))
        params = self.inner.sample_relative(study, trial, inner)
        proposer, point = self._ask(study, trial, own)
        study._storage.set_trial_system_attr(trial._trial_id, PROPOSER, proposer)
        return params | point

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        return self.inner.sample_independent(study, trial, param_name, param_distribution)

    def _ask(
        self, study: Study, trial: FrozenTrial, space: dict[str, BaseDistribution]
    ) -> tuple[str, dict[str, Any]]:
        """Who proposes, and the model's point, empty where it is not the model."""
        if not space:
            return "inner: no parameter is known yet", {}
        if trial.system_attrs.get("fixed_params"):
            return "inner: some values are given", {}
        if np.random.default_rng([self._seed, trial.number]).random() >= self._share:
            return "inner: its turn", {}
        if trial.number < self._rests_until:
            return f"inner: the model is left alone until trial {self._rests_until}", {}
        others = [t for t in study.get_trials(deepcopy=False) if t.number != trial.number]
        messages = self._messages(study, Observations.of(study, trial), space)
        try:
            point = _converse(self.endpoint, messages, Answers(space, self._conditions, others))
        except EndpointError as error:
            return self._failed(trial, str(error)), {}
        self._failures = 0
        return "llm", point

    def _failed(self, trial: FrozenTrial, reason: str) -> str:
        reason = reason if len(reason) <= _REASON else f"{reason[:_REASON]}..."
        self._failures += 1
        if self._failures >= _PATIENCE:
            self._rests_until = (
                trial.number + 1 + min(2 ** (self._failures - _PATIENCE + 1), _LONGEST_REST)
            )
        if not self._warned:
            self._warned = True
            told = "the language model made no proposal, %s goes on: %s (told once; the system attribute %r of each trial has the rest)"
            _log.warning(told, self.inner, reason, PROPOSER)
        return f"inner: {reason}"

    def _messages(
        self, study: Study, seen: Observations, space: dict[str, BaseDistribution]
    ) -> list[Message]:
        rules = (
            "Answer with one JSON object and nothing else: every parameter's name with its value, flat. Choose a point that is likely "
            "to improve the front: better than known ones in some objective, or a trade-off that is not there yet. No known point again."
        )
        conditions = Encoding(space, self._conditions).conditions
        parameters = "\n".join(
            f"- {json.dumps(name)}: {described(d, conditions.get(name, ()))}"
            for name, d in space.items()
        )
        log = "\n".join(log_lines(study, seen, space, self._log_size))
        content = f"Parameters:\n{parameters}\n\nTrials so far (of many, the best and the latest), as tab-separated values:\n{log}"
        return [
            {"role": "system", "content": f"{self._task}\n{rules}"},
            {"role": "user", "content": content},
        ]


def log_lines(
    study: Study, seen: Observations, space: dict[str, BaseDistribution], size: int
) -> list[str]:
    """A heading, and lines of trials in at most `size` characters: the best, front after front, and the latest, in turn."""
    names = study.metric_names or [f"objective {i}" for i in range(1, len(study.directions) + 1)]
    goals = [
        f"{name} ({direction.name.lower()})"
        for name, direction in zip(names, study.directions, strict=True)
    ]
    latest, best = reversed(range(len(seen))), _best(seen)
    chosen: dict[int, str] = {}
    for turn in range(2 * len(seen)):
        i = next(latest if turn % 2 else best, None)
        if i is None or i in chosen:
            continue
        line = "\t".join(
            [
                *_outcome(seen, i),
                *(_rounded(seen.params[i].get(name), d) for name, d in space.items()),
            ]
        )
        size -= len(line) + 1
        if size < 0:
            break
        chosen[i] = line
    return ["\t".join(["trial", *goals, *space]), *(chosen[i] for i in sorted(chosen))]


def _converse(endpoint: Endpoint, messages: list[Message], answers: Answers) -> dict[str, Any]:
    """A point from the model, which is told once what was wrong. EndpointError where there is none."""
    faults: list[str] = []
    for _ in range(2):
        text = endpoint.chat(messages, json_object=True)
        point, faults = answers.check(text)
        if not faults:
            return point
        if len(faults) > _FAULTS:
            faults = [*faults[:_FAULTS], f"and {len(faults) - _FAULTS} more such faults"]
        told = "\n".join(f"- {fault}" for fault in faults)
        messages = [
            *messages,
            {"role": "assistant", "content": text[-2000:]},
            {
                "role": "user",
                "content": f"That cannot be used:\n{told}\nAnswer again, with one whole JSON object.",
            },
        ]
    raise EndpointError(f"an unusable answer, twice: {'; '.join(faults)}")


def _best(seen: Observations) -> Iterator[int]:
    """Indices of the feasible trials, front after front."""
    usable = np.flatnonzero(seen.feasible)
    for front in nondominated_fronts(seen.y[usable]):
        yield from usable[front].tolist()


def _outcome(seen: Observations, i: int) -> list[str]:
    """The number of a trial, and what came out, with standard errors where they are known."""
    trial = seen.trials[i]
    if not seen.complete[i]:
        return [str(trial.number), *["failed"] * len(seen.signs)]
    spread = (
        [""] * len(seen.signs)
        if seen.stderr is None
        else ["" if math.isnan(e) else f"±{e:.1g}" for e in seen.stderr[i]]
    )
    number = str(trial.number) if seen.feasible[i] else f"{trial.number} (infeasible)"
    return [number, *(f"{value:.4g}{e}" for value, e in zip(trial.values, spread, strict=True))]


def _rounded(value: Any, distribution: BaseDistribution) -> str:
    """As the log shows it: to a thousandth of the range, or to four digits."""
    d: Any = distribution
    if value is None or isinstance(d, CategoricalDistribution):
        return json.dumps(value, default=str)
    if d.log or d.step is not None:
        return f"{value:.4g}" if d.log else f"{value:.12g}"
    return f"{round(value, 3 - math.floor(math.log10(d.high - d.low))):.12g}"
