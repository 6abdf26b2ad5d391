"""Multi-objective search over model merges.

It takes several fine-tunes of one base model and returns a Pareto front of checkpoints.

    import paretomerge as pm

    study = pm.Study(
        base="Qwen/Qwen2.5-0.5B",
        models=["./math", "./code", "./chat"],
        objectives=[pm.Task("arc_easy"), pm.Sparsity()],
        out="runs/first",
    )
    study.optimize(n_trials=60)
    study.save(study.pick(prefer={"arc_easy": 0.7}), "merged")

A name is loaded when it is first used: torch and botorch take seconds to import.
"""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

# For type checkers and editors only: they do not run `__getattr__`.
if TYPE_CHECKING:
    from paretomerge.config.schema import StudyConfig
    from paretomerge.config.settings import Budget, Evaluation, SecondLevel
    from paretomerge.endpoint import EndpointError
    from paretomerge.errors import (
        CheckpointError,
        ConfigError,
        EvaluationError,
        ParetoMergeError,
        RecipeError,
        StudyError,
    )
    from paretomerge.evaluate.evaluator import Score
    from paretomerge.evaluate.measures import (
        Constraint,
        Function,
        Judge,
        Perplexity,
        Size,
        Sparsity,
        Task,
    )
    from paretomerge.merging.engine import merge
    from paretomerge.merging.plan.make import make_plan as plan_merge
    from paretomerge.recipe import Recipe
    from paretomerge.record.trial import Trial
    from paretomerge.search.mmmo.sampler import MMMOSampler
    from paretomerge.space.specs import LineageSpace, RouteSpace, WeightSpace
    from paretomerge.study.study import Study, load_study

__version__ = "0.1.0"

# Public name -> its module. A plain import of these modules would take seconds, for torch and
# botorch (tests/test_package.py checks that `import paretomerge` loads neither).
_HOMES = {
    "Budget": "paretomerge.config.settings",
    "CheckpointError": "paretomerge.errors",
    "ConfigError": "paretomerge.errors",
    "Constraint": "paretomerge.evaluate.measures",
    "EndpointError": "paretomerge.endpoint",
    "Evaluation": "paretomerge.config.settings",
    "EvaluationError": "paretomerge.errors",
    "Function": "paretomerge.evaluate.measures",
    "Judge": "paretomerge.evaluate.measures",
    "LineageSpace": "paretomerge.space.specs",
    "MMMOSampler": "paretomerge.search.mmmo.sampler",
    "ParetoMergeError": "paretomerge.errors",
    "Perplexity": "paretomerge.evaluate.measures",
    "Recipe": "paretomerge.recipe",
    "RecipeError": "paretomerge.errors",
    "RouteSpace": "paretomerge.space.specs",
    "Score": "paretomerge.evaluate.evaluator",
    "SecondLevel": "paretomerge.config.settings",
    "Size": "paretomerge.evaluate.measures",
    "Sparsity": "paretomerge.evaluate.measures",
    "Study": "paretomerge.study.study",
    "StudyConfig": "paretomerge.config.schema",
    "StudyError": "paretomerge.errors",
    "Task": "paretomerge.evaluate.measures",
    "Trial": "paretomerge.record.trial",
    "WeightSpace": "paretomerge.space.specs",
    "load_study": "paretomerge.study.study",
    "merge": "paretomerge.merging.engine",
    "plan_merge": "paretomerge.merging.plan.make",
}
# The name in its module, where it differs from the public name.
_ORIGINAL_NAMES = {"plan_merge": "make_plan"}

__all__ = [
    "Budget",
    "CheckpointError",
    "ConfigError",
    "Constraint",
    "EndpointError",
    "Evaluation",
    "EvaluationError",
    "Function",
    "Judge",
    "LineageSpace",
    "MMMOSampler",
    "ParetoMergeError",
    "Perplexity",
    "Recipe",
    "RecipeError",
    "RouteSpace",
    "Score",
    "SecondLevel",
    "Size",
    "Sparsity",
    "Study",
    "StudyConfig",
    "StudyError",
    "Task",
    "Trial",
    "WeightSpace",
    "__version__",
    "load_study",
    "merge",
    "plan_merge",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'paretomerge' has no attribute {name!r}")
    home = _import_home(_HOMES[name])
    original_name = _ORIGINAL_NAMES.get(name, name)
    value: object = getattr(home, original_name)
    # Stored, so that the next use of the name does not come here again.
    globals()[name] = value
    return value


def _import_home(module: str) -> ModuleType:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        # Only now: it takes a moment to import.
        from paretomerge.errors import missing_search_library

        cure = missing_search_library(error)
        if cure is None:
            raise
        raise ImportError(cure) from error


def __dir__() -> list[str]:
    return sorted(__all__)
