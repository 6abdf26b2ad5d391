"""Test problems for optimisers of several objectives: real merges, functions, designs.

Every problem is an objective function for Optuna that evaluates in milliseconds, without a model
or a GPU. Its Pareto front's hypervolume is known, so a search gets a grade between 0 and 1:

    >>> import optuna
    >>> from paretomerge import problems
    >>> optuna.logging.set_verbosity(optuna.logging.WARNING)
    >>> problem = problems.landscape(noise=True)
    >>> sampler = optuna.samplers.NSGAIISampler(population_size=20, seed=0)
    >>> study = optuna.create_study(directions=problem.directions, sampler=sampler)
    >>> study.optimize(problem, n_trials=60)
    >>> 0.1 < problem.hypervolume(study) < 1.0
    True

Public names:
    landscape: real merges of three fine-tuned models, scored on three tasks; the `Problem`.
    names: the name of every problem.
    get: the `Problem` of that name, such as `zdt1-d30`, `re21` or `landscape-noisy`.
    Problem: the objective function, its space, directions, reference point and hypervolume.
    MergeLandscape: the surrogate behind `landscape`, and its front.
    MergeSpace, ScoredMerges: the 3,488 evaluated merges, example by example.
"""

from paretomerge.problems.catalogue import get, landscape, names
from paretomerge.problems.merge_landscape import MergeLandscape
from paretomerge.problems.problem import Problem
from paretomerge.problems.scored_merges import MergeSpace, ScoredMerges

__all__ = [
    "MergeLandscape",
    "MergeSpace",
    "Problem",
    "ScoredMerges",
    "get",
    "landscape",
    "names",
]
