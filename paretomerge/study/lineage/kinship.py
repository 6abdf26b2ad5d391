"""Model Kinship: merge the best, and the best with the least similar, until all are alike.

Hu et al. 2024, arXiv 2410.12613. The k best models are merged in pairs, generation after
generation. This alone stalls among models that are all alike, so the best model is also merged with
the one of least kinship. Kinship is the cosine between two models' deltas to the base.

A mean of two means is linear in the sources, so the kinship of any two trials follows exactly from
the inner products of the sources' deltas, which are measured once:

    delta(trial) = sum_k c_k tau_k,    <delta(a), delta(b)> = sum_kl a_k b_l <tau_k, tau_l>
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.random import Generator

from paretomerge.errors import ConfigError
from paretomerge.record.trial import Trial
from paretomerge.search.options import check_options
from paretomerge.space.lineage import CROSSOVER, LINEAR, SOURCE, LineageSearchSpace
from paretomerge.study.lineage.compare import Compare, best_first, check_compare
from paretomerge.study.lineage.individuals import parents, scored
from paretomerge.study.lineage.sampler import Lineage, Proposal
from paretomerge.types import Array, ParamValue

_MIN_LENGTH = 1e-12  # the base itself has the kinship 0 with all

Pair = tuple[int, int]
"""Two places in a list of trials, the better one first."""


@dataclass(frozen=True)
class KinshipBreeder:
    """Means of two models; see the module.

    Attributes:
        top: The number k of best trials that are merged in pairs.
        explore: Every how many trials a merge with the least kinship comes first.
        max_kinship: The mean kinship of the best k above which they count as one model, and the
            search has converged.
        compare: How models are ordered: `dominance` (fronts, then crowding distance), or `mean`.

    Raises:
        ConfigError: An option is out of its range.
    """

    top: int = 5
    explore: int = 3
    max_kinship: float = 0.98
    compare: Compare = "dominance"

    def __post_init__(self) -> None:
        check_options("sampler: kinship", self)
        check_compare(self.compare)
        if self.top < 2 or self.explore < 1 or not 0 < self.max_kinship <= 1:
            raise ConfigError(
                "sampler: kinship: top of 2 or more, explore of 1 or more and max_kinship above 0 "
                f"and at most 1, not {self.top}, {self.explore} and {self.max_kinship}"
            )

    def propose(self, lineage: Lineage, rng: Generator) -> Proposal:
        """The mean of the first pair that has not been merged; see `Breeder.propose`."""
        space = lineage.space
        candidates = scored(lineage.trials)
        ranked = best_first(candidates, lineage.objectives, self.compare)
        sources = list(space.sources)
        kinship = kinship_of(ranked, lineage.trials, sources, lineage.products())
        top = min(self.top, len(ranked))
        # The sum of two ranks orders the pairs from the best to the worst.
        greedy = sorted(combinations(range(top), 2), key=sum)
        distant = _least_kin(kinship, top)
        pairs = [*greedy, *distant]
        if (len(lineage.trials) + len(lineage.running)) % self.explore == 0:
            pairs = [*distant, *greedy]
        tried = {frozenset(parents(trial.params)) for trial in lineage.trials}
        tried |= {frozenset(parents(params)) for params in lineage.running}
        for better, other in pairs:
            numbers = (ranked[better].number, ranked[other].number)
            if frozenset(numbers) not in tried:
                gain = 0.0 if self._is_alike(kinship, top) else None
                return Proposal(_mean(space, *numbers), gain)
        # Every pair is merged: the best pair again, of which nothing new is expected.
        return Proposal(_mean(space, ranked[0].number, ranked[1].number), gain=0.0)

    def _is_alike(self, kinship: Array, top: int) -> bool:
        pairs = np.triu_indices(top, 1)
        return bool(kinship[pairs].mean() > self.max_kinship)


def kinship_of(
    trials: Sequence[Trial],
    all_trials: Sequence[Trial],
    sources: Sequence[str],
    products: Array,
) -> Array:
    """The cosines between the deltas of trials.

    Args:
        trials: n trials of a lineage.
        all_trials: These and their ancestors.
        sources: Names of the K sources.
        products: Inner products `(K, K)` of the sources' deltas.

    Returns:
        `(n, n)`; 0 for a trial that equals the base.
    """
    by_number = coefficients(all_trials, sources)
    c = np.array([by_number[trial.number] for trial in trials])
    inner = c @ products @ c.T
    length = np.sqrt(np.diag(inner).clip(min=0))
    divisor = np.outer(length, length)
    is_zero = divisor < _MIN_LENGTH
    cosine: Array = np.where(is_zero, 0.0, inner / np.where(is_zero, 1.0, divisor))
    return cosine


def coefficients(trials: Sequence[Trial], sources: Sequence[str]) -> dict[int, Array]:
    """Write each trial's delta as a sum of the sources' deltas.

    Args:
        trials: All trials of a lineage, in the order of their numbers.
        sources: Names of the K sources.

    Returns:
        Number -> `(K,)`. Of a crossover, whose mask is random, the expected ones.
    """
    found: dict[int, Array] = {}
    for trial in trials:
        params = trial.params
        if params["method"] == SOURCE:
            found[trial.number] = np.array(
                [float(name == params["source"]) for name in sources]
            )
            continue
        first, second = (found[number] for number in parents(params))
        share = _number(trial, "t")
        if params["method"] == CROSSOVER:
            share *= _number(trial, "crossover_rate")
        found[trial.number] = (1 - share) * first + share * second
    return found


def _number(trial: Trial, name: str) -> float:
    value = trial.params[name]
    assert isinstance(value, int | float)
    return float(value)


def _least_kin(kinship: Array, top: int) -> list[Pair]:
    """Each of the best `top` with all others, those of least kinship first."""
    pairs: list[Pair] = []
    for better in range(top):
        order = kinship[better].argsort(kind="stable")
        for other in order.tolist():
            if other != better:
                pairs.append((better, other))
    return pairs


def _mean(space: LineageSearchSpace, first: int, second: int) -> dict[str, ParamValue]:
    return space.point(LINEAR, first=first, second=second, t=0.5)
