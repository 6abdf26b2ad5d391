"""From the merges to the landscape: one process per task, and the front of what they predict."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from paretomerge.errors import StudyError
from paretomerge.pareto.front import reference_point

from . import nsga2
from .landscape import SURROGATE, Landscape
from .merges import Array, Merges
from .process import Process, features, fit, logits, sigmoid

_FRONT = 300  # points kept of the front


def build(
    merges: Merges,
    processes: tuple[Process, ...] | None = None,
    file: Path = SURROGATE,
    seeds: tuple[int, ...] = (0, 1),
) -> Landscape:
    """Fit, unless the processes' settings are given; search the surrogate's front once per seed; write the file."""
    processes = processes or settings(merges)
    coefficients, left_out = solved(processes, merges, left_out=True)
    error = np.sqrt(((left_out - merges.scores) ** 2).mean(0))
    reference = reference_point(source_scores(merges))
    nothing = (merges.method[:0], merges.numbers[:0])
    draft = Landscape(merges, processes, coefficients, error, reference, nothing, 1.0)
    found = [nsga2.front(merges, draft.predict, reference, seed=seed) for seed in seeds]
    whole = nsga2.united(found)
    volumes = [nsga2.volume(part, reference) for part in [*found, whole]]
    print(
        f"hypervolume of the front by seed {volumes[:-1]}, of both {volumes[-1]:.6f} ({len(whole[0])} points)",
        flush=True,
    )
    kept = nsga2.thinned(whole[2], _FRONT)
    landscape = replace(draft, front_rows=(whole[0][kept], whole[1][kept]), hypervolume=volumes[-1])
    landscape.save(file)
    return landscape


def settings(merges: Merges) -> tuple[Process, ...]:
    """One fitted process per task."""
    x = features(merges.space, merges.method, merges.numbers)
    right = merges.correct.sum(2).astype(float)
    return tuple(fit(x, *logits(right[:, j], merges.items)) for j in range(len(merges.tasks)))


def solved(
    processes: tuple[Process, ...], merges: Merges, *, left_out: bool = False
) -> tuple[Array, Array]:
    """Coefficients `(m, n)` of the processes given all merges; if `left_out`, scores `(n, m)` of each predicted by the others."""
    x = features(merges.space, merges.method, merges.numbers)
    right = merges.correct.sum(2).astype(float)
    pairs = [
        p.solve(x, *logits(right[:, j], merges.items), left_out=left_out)
        for j, p in enumerate(processes)
    ]
    return np.stack([pair[0] for pair in pairs]), sigmoid(
        np.stack([pair[1] for pair in pairs], axis=1)
    )


def source_scores(merges: Merges) -> Array:
    """Measured scores `(K, m)` of the sources alone."""
    sources = [name for name in merges.made["models"] if name != "base"]
    missing = [name for name in sources if name not in merges.labels]
    if missing:
        raise StudyError(
            f"expected the known starts among the merges, got no {missing[0]}; run `make` to its end"
        )
    return merges.scores[[merges.labels.index(name) for name in sources]]
