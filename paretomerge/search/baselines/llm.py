"""A language model as an optimiser: it reads the log of trials and proposes the next point.

After Liu et al. 2023 (arXiv 2310.12541), where a language model crosses and mutates the solutions
of a multi-objective search. Here it makes a share of the proposals and another sampler makes the
rest, so it can help the search but not stop it. Each answer is checked against the space. If it is
invalid, the model is asked once more with the list of problems; then the other sampler proposes.
"""

import logging
from collections.abc import Sequence
from typing import TypedDict, Unpack

import numpy as np
from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.search_space import IntersectionSearchSpace
from optuna.trial import FrozenTrial, TrialState

from paretomerge.endpoint import Endpoint, EndpointError, Message
from paretomerge.errors import ConfigError, shorten
from paretomerge.search.baselines._optuna import enqueued_params, set_system_attr
from paretomerge.search.baselines.llm_answers import AnswerChecker
from paretomerge.search.baselines.llm_prompt import (
    TASK,
    build_messages,
    format_trial_log,
)
from paretomerge.search.encoding import Encoding, ParamDict
from paretomerge.search.observations import Observations
from paretomerge.types import Conditions, ParamValue

PROPOSER = "proposer"
"""Trial system attribute: `llm`, or `inner: ` and the reason."""

Space = dict[str, BaseDistribution]

_MAX_REASON_LENGTH = 300
_MAX_PROBLEMS = 10  # listed in one message to the model
_MAX_QUOTED_ANSWER = 2000  # characters of an invalid answer that the model gets back
_MAX_FAILURES = 3  # in a row before the model is paused
_MAX_PAUSE = 64  # trials
_ATTEMPTS = 2  # answers per proposal

_log = logging.getLogger(__name__)


class Connection(TypedDict, total=False):
    """The arguments of `Endpoint`."""

    base_url: str | None
    model: str | None
    key: str | None
    timeout: float


class LLMSampler(BaseSampler):
    """Asks a language model for a share of the proposals, and `inner` for the rest.

    `inner` is asked at every trial, so that its generations and its random state are those of a
    search without a model. It alone samples trials with enqueued values. A model's answers are not
    reproducible, and so neither is the study. After three failures in a row the model is paused for
    2 trials, then for 4, 8 and so on up to 64, until it succeeds.

    Args:
        inner: The sampler for all other proposals.
        space: The parameters. Defaults to those that all finished trials have.
        conditions: When each parameter is active.
        seed: Decides which proposals the model makes.
        share: The share of the proposals that the model makes, in (0, 1].
        task: What the parameters mean, for the model.
        log_size: The most characters of the trial log that the model sees.
        **connection: `base_url`, `model`, `key` and `timeout` of the `Endpoint`. A proposal takes
            at most twice the timeout.

    Raises:
        ConfigError: `share` is out of its range, or no endpoint is configured.
    """

    def __init__(
        self,
        inner: BaseSampler,
        *,
        space: Space | None = None,
        conditions: Conditions | None = None,
        seed: int = 0,
        share: float = 0.5,
        task: str = TASK,
        log_size: int = 16_000,
        **connection: Unpack[Connection],
    ) -> None:
        if not 0 < share <= 1:
            raise ConfigError(
                f"share: expected above 0 and at most 1, got {shorten(share)}"
            )
        self.inner = inner
        self.endpoint = Endpoint(**connection)
        self._space = space
        self._conditions = conditions
        self._seed = seed
        self._share = share
        self._task = task
        self._log_size = log_size
        self._intersection = IntersectionSearchSpace()
        self._spaces: dict[int, tuple[Space, Space]] = {}
        self._failures = 0
        self._paused_until = 0
        self._has_warned = False

    def reseed_rng(self) -> None:
        """Reseed the inner sampler."""
        self.inner.reseed_rng()

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Call the inner sampler's hook."""
        self.inner.before_trial(study, trial)

    def after_trial(
        self,
        study: Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        """Call the inner sampler's hook."""
        self.inner.after_trial(study, trial, state, values)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> Space:
        """Return the parameters that the model or the inner sampler may set."""
        space = (
            dict(self._space) if self._space else self._intersection.calculate(study)
        )
        inner_space = self.inner.infer_relative_search_space(study, trial)
        asked = {}
        for name, distribution in space.items():
            if not distribution.single():
                asked[name] = distribution
        # Stored, because the study may have more trials when `sample_relative` is called.
        self._spaces[trial.number] = (asked, inner_space)
        return inner_space | space

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: Space
    ) -> ParamDict:
        """Return the point of the model, or that of the inner sampler where the model has none."""
        space, inner_space = self._spaces.pop(
            trial.number, (search_space, search_space)
        )
        params: ParamDict
        # Asked in any case: the inner sampler's random state must not depend on the model.
        params = self.inner.sample_relative(study, trial, inner_space)
        reason = self._reason_to_skip(trial, space)
        point: ParamDict = {}
        if reason is None:
            try:
                point = self._propose(study, trial, space)
                self._failures = 0
            except EndpointError as error:
                reason = _truncate(str(error))
                self._handle_failure(trial, reason)
        proposer = "llm" if reason is None else f"inner: {reason}"
        set_system_attr(study, trial, PROPOSER, proposer)
        return params | point

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> ParamValue:
        """Return the inner sampler's value."""
        value: ParamValue
        value = self.inner.sample_independent(
            study, trial, param_name, param_distribution
        )
        return value

    def _reason_to_skip(self, trial: FrozenTrial, space: Space) -> str | None:
        """Why the model is not asked in this trial; None if it is."""
        if not space:
            return "no parameter is known yet"
        if enqueued_params(trial):
            return "some values are enqueued"
        rng = np.random.default_rng([self._seed, trial.number])
        if rng.random() >= self._share:
            return "its turn"
        if trial.number < self._paused_until:
            return f"the model is paused until trial {self._paused_until}"
        return None

    def _propose(
        self,
        study: Study,
        trial: FrozenTrial,
        space: Space,
    ) -> ParamDict:
        """The model's point; raises EndpointError if it has none."""
        observations = Observations.of(study, trial)
        log = format_trial_log(study, observations, space, self._log_size)
        conditions = Encoding(space, self._conditions).conditions
        messages = build_messages(self._task, space, conditions, log)
        others = []
        for other in study.get_trials(deepcopy=False):
            if other.number != trial.number:
                others.append(other)
        checker = AnswerChecker(space, self._conditions, others)
        return _ask_for_point(self.endpoint, messages, checker)

    def _handle_failure(self, trial: FrozenTrial, reason: str) -> None:
        """Pause the model after several failures; log the first one."""
        self._failures += 1
        if self._failures >= _MAX_FAILURES:
            exponent = self._failures - _MAX_FAILURES + 1
            pause = min(2**exponent, _MAX_PAUSE)
            self._paused_until = trial.number + 1 + pause
        if not self._has_warned:
            self._has_warned = True
            _log.warning(
                "The language model made no proposal; %s proposes instead: %s "
                "(This is logged once. The system attribute %r of each trial has its reason.)",
                self.inner,
                reason,
                PROPOSER,
            )


def _ask_for_point(
    endpoint: Endpoint, messages: list[Message], checker: AnswerChecker
) -> ParamDict:
    """A valid point from the model; raises EndpointError if the second answer is invalid, too."""
    problems: list[str] = []
    for _ in range(_ATTEMPTS):
        answer = endpoint.chat(messages, json_object=True)
        point, problems = checker.check(answer)
        if not problems:
            return point
        if len(problems) > _MAX_PROBLEMS:
            hidden = len(problems) - _MAX_PROBLEMS
            problems = problems[:_MAX_PROBLEMS]
            problems.append(f"and {hidden} more such faults")
        lines = [f"- {problem}" for problem in problems]
        listed = "\n".join(lines)
        correction = (
            f"That cannot be used:\n{listed}\nAnswer again, with one whole JSON object."
        )
        messages = [
            *messages,
            {"role": "assistant", "content": answer[-_MAX_QUOTED_ANSWER:]},
            {"role": "user", "content": correction},
        ]
    raise EndpointError(f"an unusable answer, twice: {'; '.join(problems)}")


def _truncate(reason: str) -> str:
    # A server may send a whole page as its reason, and each trial stores it.
    if len(reason) <= _MAX_REASON_LENGTH:
        return reason
    return f"{reason[:_MAX_REASON_LENGTH]}..."
