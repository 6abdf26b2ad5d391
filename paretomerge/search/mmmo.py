"""MM-MO: multi-objective Bayesian optimisation for model merging (Li et al. 2024, arXiv 2407.00487), mended.

Three steps make a proposal, each a switch: the acquisition's best points; the weak-to-strong crossing of them with
evaluated elites (sec. 3.2); the Fisher filter, which of the best keeps the one that the surrogate knows least (3.3).

The published program fits standardised objectives and leaves the reference point in raw units, so its improvement is
zero everywhere. Here both are standardised, the reference point is explicit, and scores carry their noise.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from botorch.acquisition.multi_objective.analytic import ExpectedHypervolumeImprovement
from botorch.generation.gen import gen_candidates_scipy
from botorch.utils.multi_objective.box_decompositions.non_dominated import FastNondominatedPartitioning
from numpy.typing import NDArray
from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.search_space import IntersectionSearchSpace
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from scipy.stats import qmc

from paretomerge.errors import ConfigError
from paretomerge.pareto.front import contributions, nondominated, reference_point
from paretomerge.search.encoding import Conditions, Encoding
from paretomerge.search.surrogate import Surrogate

Array = NDArray[np.float64]
_STEPS = 20  # uphill: an ask must stay cheap beside an evaluation
STDERR = "stderr"
"""Trial user attribute with the standard error of each value, in the order of the objectives."""


class MMMOSampler(BaseSampler):
    """Expected hypervolume improvement with a weak-to-strong step and a Fisher filter, for any Optuna study.

    space: the parameters, if known up front (else inferred from finished trials).
    conditions: name -> (categorical parent, values under which the parameter counts).
    reference: worst acceptable values `(m,)` in the study's own directions; by default the worst of the first
        `reference_trials` trials less a tenth of their range: let these be the sources (`study.enqueue_trial`).
    n_startup: trials before the first fit; what is not enqueued is drawn from a Sobol sequence.
    elites, crossover, differential: the 5, CR = 0.5 and F = 0.5 of the paper's weak-to-strong step.
    shortlist: how many of the best candidates the Fisher filter chooses from.
    Every proposal is a function of the seed and the trials so far: a study that is resumed goes on as if never stopped.
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        space: dict[str, BaseDistribution] | None = None,
        conditions: Conditions | None = None,
        reference: Sequence[float] | None = None,
        n_startup: int = 10,
        reference_trials: int | None = None,
        weak_to_strong: bool = True,
        fisher_filter: bool = True,
        elites: int = 5,
        crossover: float = 0.5,
        differential: float = 0.5,
        shortlist: int = 3,
        raw_samples: int = 256,
        restarts: int = 6,
    ) -> None:
        self._seed = seed
        self._space = space
        self._conditions = conditions
        self._reference = None if reference is None else np.asarray(reference, dtype=float)
        self.n_startup = n_startup
        self.reference_trials = reference_trials or n_startup
        self.weak_to_strong = weak_to_strong
        self.fisher_filter = fisher_filter
        self.elites = elites
        self.crossover = crossover
        self.differential = differential
        self.shortlist = shortlist
        self.raw_samples = raw_samples
        self.restarts = restarts
        self._intersection = IntersectionSearchSpace()
        self._independent = RandomSampler(seed=seed)

    def reseed_rng(self) -> None:
        self._independent.reseed_rng()

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return dict(self._space) if self._space else self._intersection.calculate(study)

    def sample_independent(self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution) -> Any:
        return self._independent.sample_independent(study, trial, param_name, param_distribution)

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        """The next point of the study."""
        if not search_space:
            return {}
        encoding = Encoding(search_space, self._conditions)
        done, running = self._trials(study, trial, search_space)
        if len(done) < self.n_startup or not any(t.state == TrialState.COMPLETE for t in done):
            sobol = qmc.Sobol(encoding.d, rng=np.random.default_rng(self._seed))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # its balance at powers of two does not matter here
                return encoding.decode(encoding.settle(sobol.random(trial.number + 1)[-1:])[0])
        y, stderr = self._outcomes(study, done)
        x = encoding.encode([t.params for t in done])
        pending = encoding.encode([t.params for t in running]) if running else None
        reference = self._reference_point(study, y)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed((self._seed * 1_000_003 + trial.number) % 2**31)
            rng = np.random.default_rng([self._seed, trial.number])
            return encoding.decode(self._propose(encoding, x, y, stderr, reference, pending, rng))

    def _trials(self, study: Study, trial: FrozenTrial, space: dict[str, BaseDistribution]) -> tuple[list[FrozenTrial], list[FrozenTrial]]:
        """Finished and failed ones that have every parameter; running ones besides `trial`."""
        known = [t for t in study.get_trials(deepcopy=False) if t.number != trial.number and set(space) <= set(t.params)]
        done = [t for t in known if t.state in (TrialState.COMPLETE, TrialState.FAIL)]
        return done, [t for t in known if t.state == TrialState.RUNNING]

    def _outcomes(self, study: Study, done: Sequence[FrozenTrial]) -> tuple[Array, Array | None]:
        """y `(n, m)`, maximised, and its standard errors. A failed trial counts as bad as the worst seen."""
        signs = _signs(study)
        complete = [t.values for t in done if t.state == TrialState.COMPLETE]
        worst = (np.asarray(complete) * signs).min(0)
        y = np.stack([np.asarray(t.values) * signs if t.state == TrialState.COMPLETE else worst for t in done])
        noise = [t.user_attrs.get(STDERR) for t in done]
        if any(n is None for n, t in zip(noise, done, strict=True) if t.state == TrialState.COMPLETE):
            return y, None
        return y, np.asarray([np.zeros(len(signs)) if n is None else n for n in noise], dtype=float)

    def _reference_point(self, study: Study, y: Array) -> Array:
        if self._reference is None:
            return reference_point(y[: self.reference_trials])
        if len(self._reference) != y.shape[1]:
            raise ConfigError(f"reference: expected {y.shape[1]} numbers, one per objective, got {len(self._reference)}")
        return np.asarray(self._reference * _signs(study))

    def _propose(
        self,
        encoding: Encoding,
        x: Array,
        y: Array,
        stderr: Array | None,
        reference: Array,
        pending: Array | None,
        rng: np.random.Generator,
    ) -> Array:
        surrogate = Surrogate.fit(x, y, stderr)
        elites = x[_ranked(y, reference)[: self.elites]]
        if pending is not None:
            surrogate = surrogate.believing(x, y, stderr, pending)
            x = np.concatenate([x, pending])
        acquisition = _acquisition(surrogate, x, reference)
        candidates = self._climb(encoding, acquisition, self._raw(encoding, elites, rng))
        if self.weak_to_strong:
            candidates = np.concatenate([candidates, self._cross(encoding, candidates, elites, rng)])
        candidates = _new(encoding.settle(candidates), x, encoding, rng)
        best = np.argsort(-_values(acquisition, candidates), kind="stable")
        if not self.fisher_filter:
            return np.asarray(candidates[best[0]])
        short = candidates[best[: self.shortlist]]
        information = (1 / surrogate.predict(short)[1] ** 2 * surrogate.scale**2).sum(1)  # Li et al. 2024, sec. 3.3
        return np.asarray(short[information.argmin()])

    def _raw(self, encoding: Encoding, elites: Array, rng: np.random.Generator) -> Array:
        """Where to start climbing: half spread over the cube, half near the elites."""
        half = self.raw_samples // 2
        spread = rng.random((half, encoding.d))
        near = elites[rng.integers(len(elites), size=half)]
        moved = near + 0.15 * rng.standard_normal(near.shape) * (rng.random(near.shape) < 0.5) * ~encoding.discrete
        return encoding.settle(np.concatenate([spread, moved]))

    def _climb(self, encoding: Encoding, acquisition: Any, raw: Array) -> Array:
        """The best raw points, moved uphill along the continuous coordinates; the discrete ones stay."""
        start = raw[np.argsort(-_values(acquisition, raw), kind="stable")[: self.restarts]]
        if encoding.discrete.all():
            return np.asarray(start)
        points, _ = gen_candidates_scipy(
            torch.from_numpy(start[:, None]),
            acquisition,
            lower_bounds=0.0,
            upper_bounds=1.0,
            fixed_features={int(i): torch.from_numpy(start[:, None, i]) for i in np.flatnonzero(encoding.discrete)},
            options={"maxiter": _STEPS},
        )
        return np.asarray(points.detach().numpy()[:, 0])

    def _cross(self, encoding: Encoding, candidates: Array, elites: Array, rng: np.random.Generator) -> Array:
        """Weak-to-strong (Li et al. 2024, sec. 3.2, eq. 5-6): v = a + F (b - d), taken per coordinate with CR."""
        if len(elites) < 3:
            return candidates[:0]
        children = []
        for candidate in candidates:
            a, b, d = elites[rng.choice(len(elites), 3, replace=False)]
            taken = rng.random(encoding.d) < self.crossover
            taken[rng.integers(encoding.d)] = True
            children.append(np.where(taken, a + self.differential * (b - d), candidate))
        return np.asarray(children)


def _signs(study: Study) -> Array:
    return np.array([1.0 if direction == StudyDirection.MAXIMIZE else -1.0 for direction in study.directions])


class _LogExpectedHypervolumeImprovement(ExpectedHypervolumeImprovement):  # type: ignore[misc]
    """The closed form (Yang et al. 2019), as a logarithm: its slopes do not vanish where little is to be gained."""

    def forward(self, X: torch.Tensor) -> torch.Tensor:  # noqa: N803
        improvement: torch.Tensor = super().forward(X)
        return improvement.clamp_min(1e-250).log()


def _acquisition(surrogate: Surrogate, x: Array, reference: Array) -> Any:
    """Expected hypervolume improvement over what the surrogate believes of the evaluated points.

    The posterior mean stands for the noisy scores, so a lucky score does not become the front. Exact for one point at
    a time; BoTorch's sampled forms cost more, and compile a kernel when first used, if there is a compiler.
    """
    believed = torch.from_numpy(surrogate.standardise(surrogate.predict(x)[0]))
    worst = torch.from_numpy(surrogate.standardise(reference))
    return _LogExpectedHypervolumeImprovement(surrogate.model, worst.tolist(), FastNondominatedPartitioning(worst, believed))


def _values(acquisition: Any, x: Array) -> Array:
    with torch.no_grad():
        return np.asarray(acquisition(torch.from_numpy(x)[:, None]).numpy())


def _ranked(y: Array, reference: Array) -> NDArray[np.intp]:
    """Best first: by front after front, inside a front by hypervolume contribution."""
    left = np.arange(len(y))
    order: list[np.intp] = []
    while len(left):
        mask = nondominated(y[left])
        front = left[mask]
        order.extend(front[np.argsort(-contributions(y[front], reference), kind="stable")])
        left = left[~mask]
    return np.asarray(order)


def _new(candidates: Array, known: Array, encoding: Encoding, rng: np.random.Generator) -> Array:
    """Candidates that were not evaluated yet and are not running; a random point where none is left."""
    fresh = candidates[[not np.isclose(known, c, atol=1e-6).all(1).any() for c in candidates]]
    return fresh if len(fresh) else encoding.settle(rng.random((1, encoding.d)))
