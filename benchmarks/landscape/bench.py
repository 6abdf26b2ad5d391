"""The real thing: merges of the shipped specialists by the engine, scored on the search items of their own tasks."""

import hashlib
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from paretomerge.errors import StudyError
from paretomerge.evaluate.evaluator import Candidate
from paretomerge.evaluate.harness import HarnessEvaluator
from paretomerge.evaluate.tasks import HarnessTask, TaskLoader
from paretomerge.merging.live.in_place import ResidentModel
from paretomerge.recipe import Recipe

from .merges import Merges, Space

REPOSITORY = Path(__file__).resolve().parents[2]
SPECIALISTS = REPOSITORY / "examples" / "specialists"
MASK_SEED = 0  # of DARE's random masks: the same for all merges
_SOURCES = ("order", "mirror", "scribe")
_TASKS = ("sort", "reverse", "translate")
_HALVES = (
    (0, 2),
    (2, 4),
)  # of the four layers; the first also governs the embedding, the last the norm and the head
_WEIGHT, _DENSITY = (-0.5, 1.5), (0.1, 1.0)


class Bench:
    """Merges one point of `space` at a time into a live model, and scores it."""

    tasks = _TASKS

    def __init__(self) -> None:
        torch.set_num_threads(1)  # more would add up in another order
        self.space = search_space()
        models = tuple(str(SPECIALISTS / "models" / name) for name in _SOURCES)
        self._resident = ResidentModel(str(SPECIALISTS / "models" / "base"), models, "float32")
        self._evaluator = HarnessEvaluator(
            {task: HarnessTask(task) for task in _TASKS},
            TaskLoader(
                SPECIALISTS / "tasks", REPOSITORY, {"search": "search", "held_out": "held_out"}
            ),
            batch_size=128,
        )

    def measure(self, params: Mapping[str, Any]) -> NDArray[np.bool_]:
        """Which search items `(m, items)` the merge gets right."""
        merged = self._resident.load(recipe(params))
        live = Candidate(merged.model, self._resident.tokenizer, merged.facts)
        scores = self._evaluator.evaluate(live, "search")
        return np.array([scores[task].example_scores for task in _TASKS]) > 0.5

    def starts(self) -> dict[str, dict[str, Any]]:
        """What a study begins with: each source alone, the soup, task arithmetic at two scales, TIES and DARE at usual densities."""
        alone = {name: _even("task_arithmetic", {name: 1.0}) for name in _SOURCES}
        plain = {"uniform soup": 1 / 3, "task arithmetic 0.5": 0.5, "task arithmetic 0.7": 0.7}
        sparse = {"ties": 0.2, "dare_ties": 0.5}
        return (
            alone
            | {
                label: _even("task_arithmetic", dict.fromkeys(_SOURCES, weight))
                for label, weight in plain.items()
            }
            | {
                f"{method} at density {d}": _even(method, dict.fromkeys(_SOURCES, 0.7), d)
                for method, d in sparse.items()
            }
        )

    def made(self, spread: int) -> dict[str, Any]:
        """What the file depends on: models and items by digest, the versions that merged and scored, and the design."""
        models = {
            name: _digest(SPECIALISTS / "models" / name / "model.safetensors")
            for name in ("base", *_SOURCES)
        }
        items = {
            task: _digest(SPECIALISTS / "tasks" / "data" / task / "search.jsonl") for task in _TASKS
        }
        versions = {
            name: version(name) for name in ("torch", "transformers", "lm_eval", "numpy", "scipy")
        }
        design = {"sobol": spread, "seeds": [0, 1]}
        return {
            "models": models,
            "items": items,
            "design": design,
            "mask seed": MASK_SEED,
            "dtype": "float32",
            "versions": versions,
        }


def search_space() -> Space:
    """A weight per source and half of the layers, a density per source, and the method."""
    numbers = {}
    for source in _SOURCES:
        numbers |= {f"weight/{source}/{half}": _WEIGHT for half in range(len(_HALVES))} | {
            f"density/{source}": _DENSITY
        }
    return Space(("task_arithmetic", "ties", "dare_ties"), numbers, ("ties", "dare_ties"))


def recipe(params: Mapping[str, Any]) -> Recipe:
    """One point of the space in mergekit's grammar."""
    method = params["method"]

    def source(name: str, half: int) -> dict[str, Any]:
        density = {} if method == "task_arithmetic" else {"density": params[f"density/{name}"]}
        setting = {"weight": params[f"weight/{name}/{half}"]} | density
        return {
            "model": str(SPECIALISTS / "models" / name),
            "layer_range": list(_HALVES[half]),
            "parameters": setting,
        }

    return Recipe.from_dict(
        {
            "merge_method": method,
            "base_model": str(SPECIALISTS / "models" / "base"),
            "slices": [
                {"sources": [source(name, half) for name in _SOURCES]}
                for half in range(len(_HALVES))
            ],
            "parameters": {"normalize": False},
            "dtype": "float32",
        }
    )


def check_made(merges: Merges, bench: Bench, spread: int) -> None:
    """Raise StudyError if the merges are not of this space, of these models and items, or of another design."""
    made = bench.made(spread)
    pairs = [("space", merges.space, bench.space)] + [
        (key, merges.made[key], made[key]) for key in ("models", "items", "design")
    ]
    for name, there, here in pairs:
        if there != here:
            raise StudyError(
                f"expected merges whose {name} is {here}, got {there}; move the file away to start afresh"
            )


def _even(method: str, weights: Mapping[str, float], density: float = 1.0) -> dict[str, Any]:
    """Both halves of a source alike."""
    point: dict[str, Any] = {"method": method}
    for name in _SOURCES:
        point |= {f"weight/{name}/{half}": weights.get(name, 0.0) for half in range(len(_HALVES))}
        point |= {} if method == "task_arithmetic" else {f"density/{name}": density}
    return point


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]
