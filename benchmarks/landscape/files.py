"""Writing the landscape's data files; `paretomerge.problems` reads them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from paretomerge.problems import MergeLandscape, ScoredMerges
from paretomerge.problems.merge_landscape import SURROGATE_FILE
from paretomerge.problems.scored_merges import MERGES_FILE, MethodIndices
from paretomerge.types import Array


def extended(
    merges: ScoredMerges,
    stage: int,
    method: MethodIndices,
    numbers: Array,
    correct: NDArray[np.bool_],
) -> ScoredMerges:
    """The merges, followed by others of one stage."""
    stages = np.full(len(method), stage, dtype=np.uint8)
    return replace(
        merges,
        stage=np.concatenate([merges.stage, stages]),
        method=np.concatenate([merges.method, method]),
        numbers=np.concatenate([merges.numbers, numbers]),
        correct=np.concatenate([merges.correct, correct]),
    )


def save_merges(merges: ScoredMerges, file: Path = MERGES_FILE) -> None:
    """Write the file, whole or not at all."""
    space = merges.space
    header = {
        "space": {
            "methods": space.methods,
            "numbers": dict(space.numbers),
            "dense": space.density_methods,
        },
        "tasks": merges.tasks,
        "items": merges.n_examples,
        "labels": merges.labels,
        "made": merges.provenance,
    }
    partial = file.with_suffix(".partial.npz")
    np.savez_compressed(
        partial,
        header=np.array(json.dumps(header)),
        stage=merges.stage,
        method=merges.method,
        numbers=merges.numbers,
        items=np.packbits(merges.correct.reshape(len(merges), -1), axis=1),
    )
    partial.replace(file)


def save_surrogate(landscape: MergeLandscape, file: Path = SURROGATE_FILE) -> None:
    """Write what the surrogate knows beside the merges."""
    hyperparameters = []
    for process in landscape.processes:
        variances = [process.variance, process.slope_variance]
        hyperparameters.append(
            [*variances, process.noise_share, process.residual_variance]
        )
    np.savez_compressed(
        file,
        projection=np.stack([process.projection for process in landscape.processes]),
        settings=np.array(hyperparameters),
        coefficients=landscape.coefficients,
        error=landscape.error,
        reference=landscape.reference_point,
        front_method=landscape.front_rows[0],
        front_numbers=landscape.front_rows[1],
        hypervolume=np.array(landscape.front_hypervolume),
    )
