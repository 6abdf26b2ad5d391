"""How long a study takes with any number of workers: a simulation of its events.

One driver asks the sampler, hands trials to the workers and records their scores; it does one thing
at a time. A worker merges and scores one trial at a time, and gets its next one as soon as the
driver is free, without waiting for the others. `benchmarks/scaling.py` compares this with searches
that ran.
"""

import heapq
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from paretomerge.arguments import integer

_ASK_BASE = 0.08
_ASK_EARLY = 0.3
_EARLY_TRIALS = 30

TYPICAL_SPREAD = 0.2
"""Of the times of trials, where there is no record: answers of merges differ in length."""


@dataclass(frozen=True)
class TrialCosts:
    """What one trial takes, in seconds.

    Attributes:
        merge: Merging it into a live model.
        evaluate: Scoring it; the mean over trials.
        ask: The sampler's proposal.
        record: Writing the trial.
        spread: Standard deviation of the time to merge and score, as a share of its mean.
        start: Loading a live model, once for each worker.
    """

    merge: float
    evaluate: float
    ask: float = 0.3
    record: float = 0.15
    spread: float = 0.0
    start: float = 0.0

    @property
    def work(self) -> float:
        """Seconds of a worker for one trial."""
        return self.merge + self.evaluate

    @property
    def drive(self) -> float:
        """Seconds of the driver for one trial."""
        return self.ask + self.record

    @property
    def most_workers(self) -> int:
        """The number of workers that the driver can keep busy."""
        if self.drive <= 0:
            return 1_000_000
        return max(1, int(self.work / self.drive) + 1)


@dataclass(frozen=True)
class Forecast:
    """What a simulation of a study gives.

    Attributes:
        workers: Number of workers.
        wall: Seconds from start to end.
        busy: Seconds of all workers together in which they merged and scored.
        driver: Share of the wall time in which the driver worked.
        idle: Share of the workers' time in which they waited: for the driver, and at the end for
            the last trials.
    """

    workers: int
    wall: float
    busy: float
    driver: float
    idle: float


def forecast(
    costs: TrialCosts,
    trials: int,
    workers: int = 1,
    *,
    speeds: Sequence[float] | None = None,
    generation: int | None = None,
    seed: int = 0,
) -> Forecast:
    """Simulate a study.

    Args:
        costs: What one trial takes.
        trials: Number of trials.
        workers: Number of workers.
        speeds: How fast each worker is; by default 1 for all.
        generation: Number of trials that are asked for together. The next ones wait until all of
            them are recorded, as in an evolution strategy. None for trials one by one.
        seed: The seed of the times of single trials.

    Returns:
        The forecast.

    Raises:
        ConfigError: A number is out of range.

    Example:
        >>> costs = TrialCosts(merge=5, evaluate=95, ask=0, record=0)
        >>> forecast(costs, trials=16, workers=8).wall
        200.0
    """
    workers = integer(1)("workers", workers)
    trials = integer(0)("trials", trials)
    speeds = [1.0] * workers if speeds is None else list(speeds)
    durations = _durations(costs, trials, seed)
    driver = _Driver(costs)
    # (when the worker is free, its number)
    free = [(costs.start / speed, number) for number, speed in enumerate(speeds)]
    heapq.heapify(free)
    # (when the trial is done, the worker)
    running: list[tuple[float, int]] = []
    busy = 0.0
    started, finished = 0, 0
    while finished < trials:
        may_start = started < trials
        if generation is not None:
            may_start = (
                may_start and started < (finished // generation + 1) * generation
            )
        # A worker that is free before the next trial ends gets a trial first.
        next_end = running[0][0] if running else math.inf
        if may_start and free and free[0][0] <= max(next_end, driver.now):
            ready, number = heapq.heappop(free)
            start = driver.work(ready, costs.ask)
            seconds = durations[started] / speeds[number]
            busy += seconds
            heapq.heappush(running, (start + seconds, number))
            started += 1
            continue
        end, number = heapq.heappop(running)
        recorded = driver.work(end, costs.record)
        heapq.heappush(free, (recorded, number))
        finished += 1
    wall = driver.now
    idle = 1 - busy / (workers * wall) if wall else 0.0
    share = driver.busy / wall if wall else 0.0
    return Forecast(workers, wall, busy, share, idle)


class _Driver:
    """Does one thing at a time."""

    def __init__(self, costs: TrialCosts) -> None:
        self.costs = costs
        self.now = 0.0
        self.busy = 0.0

    def work(self, earliest: float, seconds: float) -> float:
        """Do something that may begin at `earliest`, and return when it is done."""
        self.now = max(self.now, earliest) + seconds
        self.busy += seconds
        return self.now


def _durations(costs: TrialCosts, trials: int, seed: int) -> list[float]:
    """Seconds of each trial: log-normal, with the mean and the spread of the costs."""
    if not costs.spread or not costs.work:
        return [costs.work] * trials
    rng = random.Random(seed)
    sigma = math.sqrt(math.log1p(costs.spread**2))
    # The mean of a log-normal variable is exp(mu + sigma^2 / 2).
    mu = math.log(costs.work) - sigma**2 / 2
    return [rng.lognormvariate(mu, sigma) for _ in range(trials)]


def mmmo_ask_seconds(trials: int, parameters: int, objectives: int) -> float:
    """Estimate the mean time of a proposal of `MMMOSampler` over a study, on one core.

    A fit to the measurements of `benchmarks/scaling.py`, which it meets within a factor of two.

    Args:
        trials: Number of trials of the study.
        parameters: Number of parameters of its space.
        objectives: Number of its objectives.

    Returns:
        Seconds.
    """
    # The fit of the Gaussian processes grows with the square of the trials; the mean of n^2 over
    # a study is a third of its last value.
    growth = (trials / 1_000) ** 2 / 3
    # The first proposals take longer: few observations leave the fit of the processes open.
    early = _ASK_EARLY * min(1.0, _EARLY_TRIALS / max(trials, 1))
    return early + objectives / 2 * (_ASK_BASE * (1 + parameters / 30) + growth)


def shared(costs: TrialCosts, workers: int, places: int) -> TrialCosts:
    """The costs where workers share cores or GPUs.

    Args:
        costs: The costs of a trial on a place of its own.
        workers: Number of workers.
        places: How many of them can compute at a time.

    Returns:
        Costs with merges and scores that take longer by as much as there are more workers.
    """
    factor = max(1.0, workers / max(places, 1))
    return replace(costs, merge=costs.merge * factor, evaluate=costs.evaluate * factor)
