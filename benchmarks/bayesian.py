"""Peers of the search benchmark that model the objectives with Gaussian processes; see peers.py for what a peer is.

- `botorch`: qLogNEHVI as BoTorch has it: SingleTaskGP with its defaults (known noise given; at most 100 steps a fit), 10
  restarts, 512 raw samples, 2 (d + 1) Sobol starts, at most 20, and the problem's reference point. 128 Sobol samples of
  the outcomes, from three objectives on 32: with 128 an ask takes ten seconds.
- `mmmo-published`: MM-MO as its program does it, its degenerate reference point included.
- `ap-bmm`: like AP-BMM (arXiv 2512.09972): 8 Sobol starts, qNEHVI, candidates ranked again by the gaps in the front.
"""

from typing import Any

import numpy as np
import torch
from meter import Cube, Meter, starts
from numpy.typing import NDArray
from problems import Problem

from paretomerge.pareto.front import nondominated
from paretomerge.pareto.ranking import ranked

Array = NDArray[np.float64]


def _model(cube: Cube) -> Any:
    """BoTorch's default Gaussian process, all objectives in one batch, outcomes standardised; known noise given."""
    from botorch.fit import fit_gpytorch_mll
    from botorch.models import SingleTaskGP
    from gpytorch.mlls import ExactMarginalLogLikelihood

    noise = (
        torch.from_numpy(np.asarray(cube.meter.stderr) ** 2).clamp_min(1e-6)
        if cube.meter.stderr
        else None
    )
    model = SingleTaskGP(torch.from_numpy(cube.x), torch.from_numpy(cube.meter.y), train_Yvar=noise)
    options = {
        "options": {"maxiter": 100}
    }  # a fit without noise goes on for seconds, to the same hypervolume
    fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model), optimizer_kwargs=options)
    return model


def botorch(problem: Problem, meter: Meter, seed: int) -> None:
    """qLogNEHVI (Ament et al. 2023), one point at a time."""
    from botorch.optim import optimize_acqf

    cube = Cube(problem, meter)
    cube(starts(problem, cube.encoding, min(2 * (cube.encoding.d + 1), 20), seed))
    while True:
        best, _ = optimize_acqf(
            _improvement(cube, len(meter.seen), seed),
            cube.bounds,
            q=1,
            num_restarts=10,
            raw_samples=512,
        )
        cube(best.numpy())


def _improvement(cube: Cube, number: int, seed: int, logarithmic: bool = True) -> Any:
    from botorch.acquisition.multi_objective.logei import qLogNoisyExpectedHypervolumeImprovement
    from botorch.acquisition.multi_objective.monte_carlo import qNoisyExpectedHypervolumeImprovement
    from botorch.sampling.normal import SobolQMCNormalSampler

    kind = (
        qLogNoisyExpectedHypervolumeImprovement
        if logarithmic
        else qNoisyExpectedHypervolumeImprovement
    )
    return kind(
        _model(cube),
        ref_point=cube.problem.reference.tolist(),
        X_baseline=torch.from_numpy(cube.x),
        sampler=SobolQMCNormalSampler(
            torch.Size([128 if cube.problem.m == 2 else 32]), seed=seed * 1000 + number
        ),
        prune_baseline=True,
        alpha=0.0
        if cube.problem.m <= 4
        else 1e-2,  # approximate boxes: exact ones take seconds from five objectives on
    )


def ap_bmm(problem: Problem, meter: Meter, seed: int) -> None:
    """Of the four best local optima of qNEHVI, the one whose predicted outcome lies in the widest gap of the front.

    Its length-scale prior by layer importance has nothing to go by here, and BoTorch's stands in its place.
    """
    from botorch.optim import optimize_acqf

    cube = Cube(problem, meter)
    cube(starts(problem, cube.encoding, 8, seed))
    while True:
        acquisition = _improvement(cube, len(meter.seen), seed, logarithmic=False)
        found, value = optimize_acqf(
            acquisition, cube.bounds, q=1, num_restarts=8, raw_samples=256, return_best_only=False
        )
        best = found[value.argsort(descending=True)[:4], 0]
        with torch.no_grad():
            outcome = acquisition.model.posterior(best).mean.numpy()
        front = meter.y[nondominated(meter.y)]
        spread = np.maximum(np.ptp(front, axis=0), 1e-9)
        gap = np.linalg.norm((outcome[:, None] - front[None]) / spread, axis=2).min(1)
        cube(best[int(gap.argmax())].numpy())


def mmmo_published(problem: Problem, meter: Meter, seed: int) -> None:
    """Li et al. 2024 (arXiv 2407.00487): 10 random points, then rounds of 10 candidates of which 5 are evaluated.

    The program models standardised outcomes, and takes its reference point in raw units (percents): far above anything
    that the model believes in, so the improvement is 0 everywhere and the climb ends where it began, at random points.
    The paper has 4 rounds; here they go on. All scores count as exact.
    """
    from botorch.acquisition.multi_objective.monte_carlo import qExpectedHypervolumeImprovement
    from botorch.fit import fit_gpytorch_mll
    from botorch.models import SingleTaskGP
    from botorch.optim import optimize_acqf
    from botorch.sampling.normal import SobolQMCNormalSampler
    from botorch.utils.multi_objective.box_decompositions.non_dominated import (
        FastNondominatedPartitioning,
    )
    from gpytorch.mlls import ExactMarginalLogLikelihood

    rng = np.random.default_rng(seed)
    cube = Cube(problem, meter)
    known = starts(problem, cube.encoding, 0, seed)
    cube(np.concatenate([known, rng.random((max(10 - len(known), 1), cube.encoding.d))]))
    while True:
        percent = 100 - 50 * (problem.ideal - meter.y) / (
            problem.ideal - problem.reference
        )  # 100 ideal, 50 at the reference
        percent = np.maximum(percent, 0.0)
        standard = torch.from_numpy(
            (percent - percent.mean(0)) / np.maximum(percent.std(0, ddof=1), 1e-9)
        )
        model = SingleTaskGP(torch.from_numpy(cube.x), standard, outcome_transform=None)
        fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
        worst = torch.from_numpy(percent[:10].min(0))
        boxes = FastNondominatedPartitioning(worst, standard)
        sampler = SobolQMCNormalSampler(torch.Size([128]), seed=seed)
        acquisition = qExpectedHypervolumeImprovement(model, worst.tolist(), boxes, sampler)
        raw = torch.from_numpy(rng.random((512, 1, cube.encoding.d)))
        with torch.no_grad():
            flat = not bool((acquisition(raw) > 0).any())
        if flat:  # ten points together improve no more, and a climb does not move: the subsets of ten need not be summed up
            candidates = raw[:10, 0].numpy()
        else:
            options = {"q": 10, "sequential": True, "num_restarts": 10, "raw_samples": 512}
            candidates = optimize_acqf(acquisition, cube.bounds, **options)[0].numpy()
        crossed = _crossed(candidates, cube.x[ranked(meter.y, problem.reference)[:5]], rng)
        with torch.no_grad():
            information = (1 / model.posterior(torch.from_numpy(crossed)).variance).sum(1).numpy()
        cube(crossed[np.argsort(information, kind="stable")[:5]])


def _crossed(candidates: Array, elites: Array, rng: np.random.Generator) -> Array:
    """Weak-to-strong (sec. 3.2): a + 0.5 (b - d) of three elites, in each coordinate with probability 0.5, at least one."""
    out = candidates.copy()
    for row in out:
        a, b, d = elites[rng.choice(len(elites), 3, replace=False)]
        taken = rng.random(len(row)) < 0.5
        taken[rng.integers(len(row))] = True
        row[taken] = np.clip(a + 0.5 * (b - d), 0, 1)[taken]
    return out
