"""What is believed of the trials of a study, given the noisy scores of all of them.

A score is a mean over some examples. The best of forty scores is therefore partly luck, and the
trial that has it is rarely the best one. Two things tell more than the score: trials with similar
parameters have similar scores, and all trials are scored on the same examples, so that a part of
their noise is common to all and does not affect which of two is better. A `Belief` combines both: a
Gaussian process over the parameters is the prior, and the noise has a common part.

The time of a belief grows with the cube of the trials, and most of it is the fit of the process's
hyperparameters. Of a long study these are fitted to 200 trials, half of them the best ones, half
spread over the others. All trials then count as data (of more than 2,000 the best 2,000), and only
those that may be the best are drawn for a pick. docs/lab/long-studies.md has what this changes.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from paretomerge.evaluate.evaluator import Objective, Score
from paretomerge.pareto.front import nondominated
from paretomerge.pareto.preference import Preference, Scale
from paretomerge.pareto.ranking import best_points, representative
from paretomerge.record.results import Parameters, Results
from paretomerge.record.trial import Trial
from paretomerge.types import Array

# Share of an objective's variance over trials that no process over the parameters explains, such as
# that of DARE's random masks. Without it, believed scores were worse than measured ones where the
# search had 600 examples (docs/lab/picks.md).
_UNEXPLAINED = 0.01
# Of a level with fewer trials no process is fitted: the scores stand alone.
_LEAST_TRIALS = 6
# Relative to the variance of the scores: keeps matrices invertible.
_JITTER = 1e-9
# Stands for "nothing is known before", in units of the variance of the scores.
_WIDE = 100.0
_DRAWS = 4096
# The longest study whose hyperparameters are fitted to all trials.
_MOST_FITTED = 200
# The most trials that count as data: their covariances take 32 MB for each objective.
_MOST_DATA = 2000
# The most trials that are drawn: the draws of three objectives take 30 MB.
_MOST_DRAWN = 300
# Standard deviations above the mean that a trial is given when it is asked whether it may be best.
_OPTIMISM = 2.0


@dataclass(frozen=True)
class Belief:
    """The scores that n trials would have on any number of examples, as normal distributions.

    Attributes:
        trials: The n trials: feasible, scored on all search examples, each recipe once.
        mean: `(n, m)`, all objectives maximised.
        covariance: `(m, n, n)`; objectives are independent, since they have examples of their own.
        noise: One per objective.
    """

    trials: tuple[Trial, ...]
    mean: Array
    covariance: Array
    noise: tuple["Noise", ...]

    @classmethod
    def of(cls, results: Results) -> "Belief":
        """Form a belief from everything that was measured but held-out scores.

        Args:
            results: The study's results, with a feasible trial.

        Returns:
            The belief.
        """
        return cls.of_search(results).with_selection(results)

    @classmethod
    def of_search(cls, results: Results, hidden: Collection[int] = ()) -> "Belief":
        """Form a belief from the search scores alone.

        Args:
            results: The study's results, with a feasible trial.
            hidden: Numbers of trials whose scores are not looked at.

        Returns:
            The belief.
        """
        objectives = results.objectives
        trials = _data(_candidates(results.trials), objectives, hidden)
        value_rows = [trial.values(objectives) for trial in trials]
        y = np.array(value_rows)
        noises = []
        for objective in objectives:
            scores = [trial.scores[objective.name] for trial in trials]
            noises.append(Noise.of(scores))
        measured = []
        for i, trial in enumerate(trials):
            if trial.number not in hidden:
                measured.append(i)
        mean, covariance = _prior(trials, y, measured, noises, results.parameters)
        belief = cls(trials, mean, covariance, tuple(noises))
        block = np.ix_(measured, measured)
        for k, noise in enumerate(noises):
            belief = belief._given(k, measured, y[measured, k], noise.search[block])
        return belief._only(belief._possibly_best(hidden))

    def _possibly_best(self, hidden: Collection[int]) -> list[int]:
        """Indices of the trials that a preference may prefer, in their order."""
        if len(self.trials) <= _MOST_DRAWN:
            return list(range(len(self.trials)))
        variances = np.diagonal(self.covariance, axis1=1, axis2=2).T
        hoped = self.mean + _OPTIMISM * np.sqrt(variances.clip(min=0))
        kept = set(best_points(hoped, _MOST_DRAWN).tolist())
        for i, trial in enumerate(self.trials):
            # What was asked of finalists is evidence, and what is hidden is asked for.
            if trial.selection or trial.number in hidden:
                kept.add(i)
        return sorted(kept)

    def _only(self, kept: list[int]) -> "Belief":
        """The belief of some of its trials."""
        if len(kept) == len(self.trials):
            return self
        block = np.ix_(range(len(self.covariance)), kept, kept)
        return Belief(
            tuple(self.trials[i] for i in kept),
            self.mean[kept],
            self.covariance[block],
            tuple(noise.only(kept) for noise in self.noise),
        )

    def with_selection(self, results: Results) -> "Belief":
        """The belief with what its trials scored on selection examples.

        Args:
            results: The study's results, with the same search scores.

        Returns:
            The belief.
        """
        trials = tuple(results.trials[trial.number] for trial in self.trials)
        belief = replace(self, trials=trials)
        for k, objective in enumerate(results.objectives):
            measured, values, counts = [], [], []
            for i, trial in enumerate(trials):
                score = (trial.selection or {}).get(objective.name)
                if score is not None:
                    measured.append(i)
                    values.append(objective.inside(score.value))
                    counts.append(score.n)
            if measured:
                noise = self.noise[k].of_means(measured, counts)
                belief = belief._given(k, measured, np.array(values), noise)
        return belief

    def _given(self, k: int, measured: list[int], y: Array, noise: Array) -> "Belief":
        """The belief after some trials were measured on objective k.

        Source: Rasmussen & Williams 2006, eq. 2.25 and 2.26, with correlated noise.

        Args:
            k: The objective.
            measured: Indices of the trials.
            y: `(q,)`, their values.
            noise: `(q, q)`, the covariance of the values' errors.
        """
        covariance = self.covariance[k]
        cross = covariance[:, measured]
        total = cross[measured] + noise
        spread = np.trace(total) / len(y)
        jitter = _JITTER * max(spread, 1e-12)
        total = total + jitter * np.eye(len(y))
        gain = np.linalg.solve(total, cross.T).T
        mean = self.mean.copy()
        mean[:, k] += gain @ (y - self.mean[measured, k])
        covariances = self.covariance.copy()
        reduced = covariance - gain @ cross.T
        covariances[k] = (reduced + reduced.T) / 2
        return replace(self, mean=mean, covariance=covariances)

    @property
    def scale(self) -> Scale:
        """The ranges of the objectives over the front of the believed scores."""
        return Scale.of(self.mean[nondominated(self.mean)])

    @cached_property
    def draws(self) -> Array:
        """Scores that the trials may have, `(draws, n, m)`."""
        # A fixed seed, so that a record always gives the same pick.
        rng = np.random.default_rng(0)
        n, m = self.mean.shape
        draws = np.empty((_DRAWS, n, m))
        for k in range(m):
            # Not Cholesky: exact objectives have a singular covariance.
            eigenvalues, vectors = np.linalg.eigh(self.covariance[k])
            root = vectors * np.sqrt(eigenvalues.clip(min=0))
            standard = rng.standard_normal((_DRAWS, n))
            draws[:, :, k] = self.mean[:, k] + standard @ root.T
        return draws

    def values(self, preference: Preference) -> Array:
        """The preference's value of each trial in each draw, `(draws, n)`."""
        # The ideal of each draw is its own: against a fixed one, a trial whose score is uncertain
        # would lose more by being below it than gain by being above.
        ideals = self.draws.max(1, keepdims=True)
        scale = Scale(ideals, self.scale.extent)
        return preference.values(self.draws, scale)

    def stderr_on(self, i: int, k: int, n_examples: int) -> float:
        """Standard deviation of a trial's score on examples that nobody has looked at.

        Args:
            i: The trial.
            k: The objective.
            n_examples: Their number.
        """
        variance = self.covariance[k, i, i]
        variance += self.noise[k].of_means([i], [n_examples])[0, 0]
        return float(np.sqrt(max(variance, 0.0)))


def _candidates(trials: Sequence[Trial]) -> tuple[Trial, ...]:
    """The trials that may be picked, each recipe once."""
    candidates = []
    for trial in trials:
        if trial.can_be_on_front and trial.same_as is None:
            candidates.append(trial)
    return tuple(candidates)


def _data(
    trials: Sequence[Trial], objectives: Sequence[Objective], hidden: Collection[int]
) -> tuple[Trial, ...]:
    """The trials that count as data: all, or of very many those with the best scores."""
    if len(trials) <= _MOST_DATA:
        return tuple(trials)
    y = np.array([trial.values(objectives) for trial in trials])
    kept = set(best_points(y, _MOST_DATA).tolist())
    data = []
    for i, trial in enumerate(trials):
        if i in kept or trial.selection or trial.number in hidden:
            data.append(trial)
    return tuple(data)


@dataclass(frozen=True)
class Noise:
    """The errors of n trials' scores on one objective.

    A trial's score on an example is the trial's own score, plus the example's easiness, plus a
    residual (a two-way layout). The easiness of the examples shifts all trials alike.

    Attributes:
        common: The variance of the examples' easiness; 0 where scores have no examples.
        residual: `(n,)`, the variance of the residual on one example.
        own: `(n,)`, the variance of the search scores' own errors.
        shared: The variance of the error that all search scores share.
        is_share: Whether every example is right or wrong, so that scores lie between 0 and 1.
    """

    common: float
    residual: Array
    own: Array
    shared: float
    is_share: bool = False

    @classmethod
    def of(cls, scores: Sequence[Score]) -> "Noise":
        """Estimate it from the trials' scores on one objective."""
        n = len(scores)
        table = _example_table([score.example_scores for score in scores])
        if table is None:
            own = np.array([score.stderr**2 for score in scores])
            counts = np.array([score.n for score in scores])
            return cls(0.0, own * counts, own, 0.0)
        n_examples = table.shape[1]
        of_trials = table.var(1, ddof=1)
        total = float(of_trials.mean())
        residual = 0.0 if n == 1 else _residual_variance(table)
        is_share = bool(np.isin(table, (0, 1)).all())
        if is_share:
            # A trial without a single right answer is not certain to be always wrong: the share of
            # right answers has one more of either kind (Laplace's rule of succession).
            share = (table.sum(1) + 1) / (n_examples + 2)
            of_trials = share * (1 - share)
        # Never below the mean of all trials: a lucky score has a small variance, and would count
        # more than others for its luck.
        excess = np.maximum(of_trials / total, 1.0) if total else np.ones(n)
        residuals = residual * excess
        common = max(total - residual, 0.0)
        own = residuals / n_examples
        return cls(common, residuals, own, common / n_examples, is_share)

    def only(self, kept: list[int]) -> "Noise":
        """The errors of some of the trials."""
        return replace(self, residual=self.residual[kept], own=self.own[kept])

    @property
    def search(self) -> Array:
        """The covariance `(n, n)` of the search scores' errors."""
        covariance: Array = self.shared + np.diag(self.own)
        return covariance

    def of_means(self, trials: list[int], counts: list[int]) -> Array:
        """The covariance of the errors of means over the first examples of a new set.

        Args:
            trials: Indices of q trials.
            counts: The number of examples of each.

        Returns:
            `(q, q)`.
        """
        # Two trials share the examples of the shorter list: of n_a and n_b examples, the covariance
        # of the means is common / max(n_a, n_b).
        longer = np.maximum.outer(counts, counts)
        own = self.residual[trials] / np.asarray(counts)
        covariance: Array = self.common / longer + np.diag(own)
        return covariance


def _example_table(rows: Sequence[Sequence[float] | None]) -> Array | None:
    """Scores by trial and example `(n, examples)`.

    None unless all trials have as many, and at least two.
    """
    lengths = {len(row) if row else 0 for row in rows}
    if len(lengths) > 1 or lengths.pop() < 2:
        return None
    return np.array(rows, dtype=float)


def _residual_variance(table: Array) -> float:
    """The variance of scores `(n, examples)` beyond the means of trials and of examples."""
    n, n_examples = table.shape
    residual = table - table.mean(0)
    residual -= residual.mean(1, keepdims=True)
    degrees_of_freedom = (n - 1) * (n_examples - 1)
    return float((residual**2).sum() / degrees_of_freedom)


def _prior(
    trials: Sequence[Trial],
    y: Array,
    measured: list[int],
    noises: Sequence[Noise],
    parameters: Mapping[int, Parameters],
) -> tuple[Array, Array]:
    """Mean `(n, m)` and covariance `(m, n, n)` of the scores before they were measured.

    The trials of each level have a process of their own, since levels have other parameters.
    """
    # Imported here: BoTorch takes seconds, which reading a record does without.
    from paretomerge.search.encoding import Encoding
    from paretomerge.search.mmmo.surrogate import KernelSpec, Surrogate

    n, m = y.shape
    seen = y[measured]
    spread = seen.var(0, ddof=1) if len(seen) > 1 else np.ones(m)
    mean = np.tile(seen.mean(0), (n, 1))
    wide = _WIDE * np.where(spread > 0, spread, 1.0)
    covariance = wide[:, None, None] * np.eye(n)
    kernels = [KernelSpec(), KernelSpec(quadratic_trend=False)]
    for level, of_level in parameters.items():
        members = [i for i, trial in enumerate(trials) if trial.level == level]
        known = [i for i in members if i in measured]
        if len(known) < _LEAST_TRIALS:
            continue
        block = np.ix_(range(m), members, members)
        encoding = Encoding(of_level.distributions, of_level.conditions)
        x = encoding.encode([trials[i].params for i in members])
        fitted = [known[i] for i in representative(y[known], _MOST_FITTED)]
        # Without the shared error, which the process's constant takes up.
        own_variances = [noise.own[fitted] for noise in noises]
        stderr = np.sqrt(np.array(own_variances).T)
        is_fitted = np.isin(members, fitted)
        surrogate = Surrogate.fit_mixture(x[is_fitted], y[fitted], stderr, kernels)
        level_mean, level_covariance = surrogate.prior(x)
        mean[members] = level_mean
        unexplained = _UNEXPLAINED * spread[:, None, None] * np.eye(len(members))
        # The constant is not known either: examples may be easy by chance, for all trials.
        covariance[block] = level_covariance + unexplained + wide[:, None, None]
    return mean, covariance
