"""Merges of the shipped specialists by the engine, scored on the search examples of their tasks."""

import hashlib
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from paretomerge.errors import StudyError
from paretomerge.evaluate.evaluator import Candidate
from paretomerge.evaluate.harness import HarnessEvaluator
from paretomerge.evaluate.tasks import HarnessTask, TaskLoader
from paretomerge.examples import SPECIALISTS
from paretomerge.merging.live.in_place import ResidentModel
from paretomerge.problems import MergeSpace, ScoredMerges
from paretomerge.recipe import Recipe
from paretomerge.types import Params, ParamValue

MASK_SEED = 0
"""Seed of DARE's random masks, the same for all merges."""

MODELS = SPECIALISTS / "models"
TASK_DATA = SPECIALISTS / "tasks" / "data"
SOURCES = ("order", "mirror", "scribe")
TASKS = ("sort", "reverse", "translate")

# Of the four layers. The first half also governs the embedding, the last the norm and the head.
_HALVES = ((0, 2), (2, 4))
_WEIGHT_BOUNDS = (-0.5, 1.5)
_DENSITY_BOUNDS = (0.1, 1.0)


class Evaluator(Protocol):
    """Merges points of a space and scores them, one at a time."""

    space: MergeSpace

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the tasks."""

    def measure(self, params: Params) -> NDArray[np.bool_]:
        """Whether the merge answers each example correctly, `(m, n_examples)`."""

    def baselines(self) -> dict[str, dict[str, ParamValue]]:
        """Baseline recipes by name."""

    def provenance(self, n_sobol: int) -> dict[str, object]:
        """What the file of merges depends on."""


class SpecialistEvaluator:
    """Merges one point of `space` at a time into a live model, and scores it."""

    tasks = TASKS

    def __init__(self) -> None:
        # Sums of several threads differ in their last bits.
        torch.set_num_threads(1)
        self.space = search_space()
        sources = tuple(str(MODELS / name) for name in SOURCES)
        self._resident = ResidentModel(str(MODELS / "base"), sources, "float32")
        splits = {"search": "search", "held_out": "held_out"}
        self._evaluator = HarnessEvaluator(
            {task: HarnessTask(task) for task in TASKS},
            TaskLoader(SPECIALISTS / "tasks", SPECIALISTS, splits),
            batch_size=128,
        )

    def measure(self, params: Params) -> NDArray[np.bool_]:
        """Whether the merge answers each search example correctly, `(m, n_examples)`."""
        merged = self._resident.load(recipe(params))
        candidate = Candidate(merged.model, self._resident.tokenizer, merged.facts)
        scores = self._evaluator.evaluate(candidate, "search")
        return np.array([scores[task].example_scores for task in TASKS]) > 0.5

    def baselines(self) -> dict[str, dict[str, ParamValue]]:
        """Each source alone, the uniform average, task arithmetic, TIES and DARE at defaults."""
        starts = {name: uniform("task_arithmetic", {name: 1.0}) for name in SOURCES}
        for label, weight in (
            ("uniform soup", 1 / 3),
            ("task arithmetic 0.5", 0.5),
            ("task arithmetic 0.7", 0.7),
        ):
            starts[label] = uniform("task_arithmetic", dict.fromkeys(SOURCES, weight))
        for method, density in (("ties", 0.2), ("dare_ties", 0.5)):
            point = uniform(method, dict.fromkeys(SOURCES, 0.7), density)
            starts[f"{method} at density {density}"] = point
        return starts

    def provenance(self, n_sobol: int) -> dict[str, object]:
        """Digests of models and examples, versions, and the design."""
        models = {}
        for name in ("base", *SOURCES):
            models[name] = digest(MODELS / name / "model.safetensors")
        examples = {}
        for task in TASKS:
            examples[task] = digest(TASK_DATA / task / "search.jsonl")
        packages = ("torch", "transformers", "lm_eval", "numpy", "scipy")
        return {
            "models": models,
            "items": examples,
            "design": {"sobol": n_sobol, "seeds": [0, 1]},
            "mask seed": MASK_SEED,
            "dtype": "float32",
            "versions": {name: version(name) for name in packages},
        }


def search_space() -> MergeSpace:
    """A weight per source and half of the layers, a density per source, and the method."""
    numbers = {}
    for source in SOURCES:
        for half in range(len(_HALVES)):
            numbers[f"weight/{source}/{half}"] = _WEIGHT_BOUNDS
        numbers[f"density/{source}"] = _DENSITY_BOUNDS
    return MergeSpace(
        ("task_arithmetic", "ties", "dare_ties"), numbers, ("ties", "dare_ties")
    )


def recipe(params: Params) -> Recipe:
    """One point of the space in mergekit's grammar."""
    slices = []
    for half, layer_range in enumerate(_HALVES):
        sources = []
        for name in SOURCES:
            parameters = {"weight": params[f"weight/{name}/{half}"]}
            if params["method"] != "task_arithmetic":
                parameters["density"] = params[f"density/{name}"]
            source = {
                "model": str(MODELS / name),
                "layer_range": list(layer_range),
                "parameters": parameters,
            }
            sources.append(source)
        slices.append({"sources": sources})
    return Recipe.from_dict(
        {
            "merge_method": params["method"],
            "base_model": str(MODELS / "base"),
            "slices": slices,
            "parameters": {"normalize": False},
            "dtype": "float32",
        }
    )


def uniform(
    method: str, weights: Mapping[str, float], density: float = 1.0
) -> dict[str, ParamValue]:
    """The point with one weight per source, the same in both halves of the layers."""
    point: dict[str, ParamValue] = {"method": method}
    for name in SOURCES:
        for half in range(len(_HALVES)):
            point[f"weight/{name}/{half}"] = weights.get(name, 0.0)
        if method != "task_arithmetic":
            point[f"density/{name}"] = density
    return point


def check_provenance(merges: ScoredMerges, evaluator: Evaluator, n_sobol: int) -> None:
    """Raise StudyError if the merges are of another space, models, examples or design."""
    current = evaluator.provenance(n_sobol)
    check_equal("space", merges.space, evaluator.space)
    for key in ("models", "items", "design"):
        check_equal(key, merges.provenance[key], current[key])


def check_equal(name: str, stored: object, expected: object) -> None:
    """Raise StudyError where stored merges were made with something else."""
    if stored != expected:
        raise StudyError(
            f"expected merges whose {name} is {expected}, got {stored}; "
            "move the file away to start afresh"
        )


def digest(file: Path) -> str:
    """The first 16 digits of the file's SHA-256."""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]
