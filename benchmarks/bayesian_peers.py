"""Peers of the search benchmark that model the objectives with Gaussian processes; see `peers`.

- `botorch`: qLogNEHVI as BoTorch has it: SingleTaskGP with its defaults (standard errors given; at
  most 100 steps per fit), 10 restarts, 512 raw samples, 2 (d + 1) Sobol points first, at most 20,
  and the problem's reference point. 128 Sobol samples of the outcomes, from three objectives on 32:
  with 128 an ask takes ten seconds.
- `mmmo-published`: MM-MO as its published program does it, its degenerate reference point included.
- `ap-bmm`: like AP-BMM (arXiv 2512.09972): 8 Sobol points, qNEHVI, candidates ranked again by the
  gaps in the front.
"""

from typing import Any

import numpy as np
import torch
from botorch.acquisition import AcquisitionFunction
from botorch.acquisition.multi_objective.logei import (
    qLogNoisyExpectedHypervolumeImprovement,
)
from botorch.acquisition.multi_objective.monte_carlo import (
    qExpectedHypervolumeImprovement,
    qNoisyExpectedHypervolumeImprovement,
)
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from botorch.optim import optimize_acqf
from botorch.sampling.normal import SobolQMCNormalSampler
from botorch.utils.multi_objective.box_decompositions.non_dominated import (
    FastNondominatedPartitioning,
)
from gpytorch.mlls import ExactMarginalLogLikelihood

from benchmarks.meter import Meter, UnitCube
from paretomerge.pareto.front import nondominated
from paretomerge.pareto.ranking import ranked
from paretomerge.problems import Problem
from paretomerge.types import Array


def botorch(problem: Problem, meter: Meter, seed: int) -> None:
    """qLogNEHVI (Ament et al. 2023), one point at a time."""
    cube = UnitCube(problem, meter)
    size = min(2 * (cube.encoding.d + 1), 20)
    cube.evaluate(cube.initial_design(size, seed))
    while True:
        improvement = hypervolume_improvement(
            qLogNoisyExpectedHypervolumeImprovement, cube, len(meter.observed), seed
        )
        best, _ = optimize_acqf(
            improvement, cube.bounds, q=1, num_restarts=10, raw_samples=512
        )
        cube.evaluate(best.numpy())


def ap_bmm(problem: Problem, meter: Meter, seed: int) -> None:
    """Of the four best local optima of qNEHVI, the one predicted in the front's widest gap.

    AP-BMM's length-scale prior by layer importance has nothing to use here; BoTorch's stands in.
    """
    cube = UnitCube(problem, meter)
    cube.evaluate(cube.initial_design(8, seed))
    while True:
        improvement = hypervolume_improvement(
            qNoisyExpectedHypervolumeImprovement, cube, len(meter.observed), seed
        )
        optima, values = optimize_acqf(
            improvement,
            cube.bounds,
            q=1,
            num_restarts=8,
            raw_samples=256,
            return_best_only=False,
        )
        best = optima[values.argsort(descending=True)[:4], 0]
        with torch.no_grad():
            outcome = improvement.model.posterior(best).mean.numpy()
        gap = distance_to_front(outcome, meter.y)
        cube.evaluate(best[int(gap.argmax())].numpy())


def hypervolume_improvement(
    kind: type[Any], cube: UnitCube, n_evaluations: int, seed: int
) -> AcquisitionFunction:
    """The noisy expected hypervolume improvement of BoTorch, plain or logarithmic."""
    m = cube.problem.n_objectives
    samples = torch.Size([128 if m == 2 else 32])
    return kind(
        default_model(cube),
        ref_point=cube.problem.reference_point.tolist(),
        X_baseline=torch.from_numpy(cube.x),
        sampler=SobolQMCNormalSampler(samples, seed=seed * 1000 + n_evaluations),
        prune_baseline=True,
        # Exact boxes take seconds from five objectives on.
        alpha=0.0 if m <= 4 else 1e-2,
    )


def default_model(cube: UnitCube) -> SingleTaskGP:
    """BoTorch's default process, all objectives in one batch, outcomes standardised."""
    noise = None
    if cube.meter.stderr:
        variance = torch.from_numpy(np.asarray(cube.meter.stderr) ** 2)
        noise = variance.clamp_min(1e-6)
    x = torch.from_numpy(cube.x)
    y = torch.from_numpy(cube.meter.y)
    model = SingleTaskGP(x, y, train_Yvar=noise)
    likelihood = ExactMarginalLogLikelihood(model.likelihood, model)
    # A fit without noise goes on for seconds, to the same hypervolume.
    fit_gpytorch_mll(likelihood, optimizer_kwargs={"options": {"maxiter": 100}})
    return model


def distance_to_front(outcome: Array, y: Array) -> Array:
    """Distance `(k,)` of each outcome `(k, m)` to its nearest point on the front of `y`."""
    front = y[nondominated(y)]
    spread = np.maximum(np.ptp(front, axis=0), 1e-9)
    difference = (outcome[:, None] - front[None]) / spread
    return np.asarray(np.linalg.norm(difference, axis=2).min(1))


def mmmo_published(problem: Problem, meter: Meter, seed: int) -> None:
    """Li et al. 2024 (arXiv 2407.00487): 10 random points, then 5 of 10 candidates per round.

    The program models standardised outcomes, but its reference point is in raw units (percent), far
    above anything that the model believes in. So the improvement is 0 everywhere, and the
    optimisation ends where it began, at random points. The paper has 4 rounds; here they go on. All
    scores count as exact.
    """
    rng = np.random.default_rng(seed)
    cube = UnitCube(problem, meter)
    starts = cube.initial_design(0, seed)
    n_random = max(10 - len(starts), 1)
    random_points = rng.random((n_random, cube.encoding.d))
    cube.evaluate(np.concatenate([starts, random_points]))
    while True:
        percent = in_percent(meter.y, problem)
        deviation = np.maximum(percent.std(0, ddof=1), 1e-9)
        outcomes = torch.from_numpy((percent - percent.mean(0)) / deviation)
        model = SingleTaskGP(torch.from_numpy(cube.x), outcomes, outcome_transform=None)
        fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
        worst = torch.from_numpy(percent[:10].min(0))
        boxes = FastNondominatedPartitioning(worst, outcomes)
        sampler = SobolQMCNormalSampler(torch.Size([128]), seed=seed)
        improvement = qExpectedHypervolumeImprovement(
            model, worst.tolist(), boxes, sampler
        )
        candidates = ten_candidates(improvement, cube, rng)
        elites = cube.x[ranked(meter.y, problem.reference_point)[:5]]
        crossed = weak_to_strong(candidates, elites, rng)
        with torch.no_grad():
            variance = model.posterior(torch.from_numpy(crossed)).variance
            information = (1 / variance).sum(1).numpy()
        cube.evaluate(crossed[np.argsort(information, kind="stable")[:5]])


def in_percent(y: Array, problem: Problem) -> Array:
    """Values `(n, m)` as percents.

    100 at the ideal point, 50 at the reference point, 0 at least.
    """
    span = problem.ideal_point - problem.reference_point
    percent = 100 - 50 * (problem.ideal_point - y) / span
    return np.maximum(percent, 0.0)


def ten_candidates(
    improvement: AcquisitionFunction, cube: UnitCube, rng: np.random.Generator
) -> Array:
    """Ten points of highest improvement; ten random points where it is 0 at all raw samples.

    Where it is flat, ten points together improve no more, and an optimiser does not move; so the
    subsets of ten need not be summed.
    """
    raw = torch.from_numpy(rng.random((512, 1, cube.encoding.d)))
    with torch.no_grad():
        flat = not bool((improvement(raw) > 0).any())
    if flat:
        return np.asarray(raw[:10, 0].numpy())
    candidates, _ = optimize_acqf(
        improvement,
        cube.bounds,
        q=10,
        sequential=True,
        num_restarts=10,
        raw_samples=512,
    )
    return np.asarray(candidates.numpy())


def weak_to_strong(candidates: Array, elites: Array, rng: np.random.Generator) -> Array:
    """Crossover of the paper's section 3.2: a + 0.5 (b - d) of three elites.

    Each coordinate is taken with probability 0.5, and at least one.
    """
    out = candidates.copy()
    for row in out:
        parents = rng.choice(len(elites), 3, replace=False)
        a, b, d = elites[parents]
        taken = rng.random(len(row)) < 0.5
        taken[rng.integers(len(row))] = True
        crossed = np.clip(a + 0.5 * (b - d), 0, 1)
        row[taken] = crossed[taken]
    return out
