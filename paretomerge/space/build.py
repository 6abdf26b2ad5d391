"""From the description of a space to the search space itself.

Models' headers are read, deltas are measured if need be.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from pathlib import Path
from types import MappingProxyType
from typing import Any

from paretomerge.checkpoint.architecture import Architecture
from paretomerge.checkpoint.fold import Fold, fold_of
from paretomerge.checkpoint.reader import Checkpoint
from paretomerge.errors import CheckpointError, ConfigError
from paretomerge.merging.delta_profile import (
    DeltaProfile,
    near_duplicates,
    order_by_similarity,
    profile,
)
from paretomerge.merging.plan.make import open_weights
from paretomerge.merging.plan.plan import Weights
from paretomerge.recipe import Recipe
from paretomerge.space.routes.edits import EditSearchSpace
from paretomerge.space.routes.indicators import IndicatorSearchSpace
from paretomerge.space.routes.space import RouteSearchSpace, handover_label
from paretomerge.space.sources import digest
from paretomerge.space.specs import RouteSpace, WeightSpace
from paretomerge.space.weights.layers import Grouping
from paretomerge.space.weights.space import WeightSearchSpace

_MOST_BLOCKS = 8  # by default: more makes the space large before it makes it finer
_DEFAULT_REPEATS = 2  # of a block, by an edit


@dataclass(frozen=True)
class Pool:
    """The models that a space merges.

    Attributes:
        base: The base: a folder or a name on the Hub.
        sources: Name -> path of the fine-tunes.
    """

    base: str
    sources: Mapping[str, str]


def build_space(
    spec: WeightSpace | RouteSpace, pool: Pool, seed: int, cache_folder: Path
) -> WeightSearchSpace | RouteSearchSpace:
    """Make the search space that a description names.

    Args:
        spec: The description.
        pool: The models.
        seed: Of the random masks in its recipes.
        cache_folder: Where the profile of the deltas is kept, if one is needed. A text to `match`
            lies beside this folder.

    Returns:
        The space.

    Raises:
        ConfigError: The models do not fit the description.
        CheckpointError: A model cannot be read.
    """
    if isinstance(spec, RouteSpace):
        space = build_route_space(spec, pool, seed)
        if spec.match is None:
            return space
        return replace(space, matched=_cached_scales(cache_folder, spec.match, space))
    return _build_weight_space(spec, pool, seed, cache_folder)


def build_route_space(
    spec: RouteSpace,
    pool: Pool,
    seed: int,
    recipes: Mapping[str, Recipe] = MappingProxyType({}),
) -> RouteSearchSpace:
    """Make a space of routes.

    Args:
        spec: The description.
        pool: The models.
        seed: Of the random masks in its recipes.
        recipes: Name -> recipe of merges with the base's depth, which are sources too.

    Returns:
        The space.

    Raises:
        ConfigError: The models do not fit together.
        CheckpointError: A model cannot be read.
    """
    # Only headers are read here: layers, widths and names.
    opened = open_weights((pool.base, *pool.sources.values()))
    depths = {
        name: opened[path].architecture.depth for name, path in pool.sources.items()
    }
    depths |= dict.fromkeys(recipes, opened[pool.base].architecture.depth)
    fold, notes = _common_fold(opened, pool) if spec.scale else (None, ())
    settings: dict[str, Any] = {
        "fold": fold,
        "blocks": spec.blocks or min(_MOST_BLOCKS, *depths.values()),
        "seed": seed,
        "notes": notes,
        "recipes": recipes,
    }
    if spec.scale:
        settings["scale"] = spec.scale
    sources = {**pool.sources, **{name: name for name in recipes}}
    try:
        if spec.form == "indicators":
            repeats = spec.repeats or 1
            return IndicatorSearchSpace(
                pool.base, sources, depths, **settings, repeats=repeats
            )
        most = spec.most or _DEFAULT_REPEATS
        return EditSearchSpace(pool.base, sources, depths, **settings, most=most)
    except ConfigError as error:
        raise ConfigError(str(error).replace("space.", "space.routes.", 1)) from error


def cached_profile(folder: Path, pool: Pool) -> DeltaProfile:
    """Measure the deltas of the models, or read what an earlier call measured.

    Args:
        folder: Where the profile is kept.
        pool: The models; a profile is measured anew when their files change.

    Returns:
        The profile.

    Raises:
        ConfigError: The cached file is torn.
        CheckpointError: A model cannot be read.
    """
    models = (pool.base, *pool.sources.values())
    # The key contains the files' digests: a model that was trained again is measured again.
    files = [digest(model) for model in models]
    key = _hash([pool.base, dict(pool.sources), files])
    file = folder / f"deltas-{key}.json"
    if file.is_file():
        try:
            return DeltaProfile.from_json(file.read_text(encoding="utf-8"))
        except (ConfigError, OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file}: {error}") from error
    measured = profile(pool.base, pool.sources)
    _write_whole(file, measured.to_json())
    return measured


def _build_weight_space(
    spec: WeightSpace, pool: Pool, seed: int, cache_folder: Path
) -> WeightSearchSpace:
    architecture: Architecture = Checkpoint(pool.base).architecture
    deltas: DeltaProfile | None = None
    notes: list[str] = []
    if spec.needs_profile:
        deltas = cached_profile(cache_folder, pool)
        deltas, notes = _selected_sources(spec, deltas)
    space = WeightSearchSpace(
        pool.base,
        deltas.sources if deltas else pool.sources,
        architecture,
        tuple(spec.methods),
        spec.weight,
        spec.density,
        seed,
        method_groups=Grouping.read(spec.method_groups),
        method_parameters=spec.method_parameters,
        subset=spec.subset,
        profile=deltas,
    )
    if not space.holds_sources:
        notes.append(
            "no point of the space is a source alone: that needs weights 0 and 1, density 1 and "
            "a method that takes one "
            "model. The first trials, and the reference point of the hypervolume, are only near "
            "the sources."
        )
    return replace(space, notes=tuple(notes))


def _selected_sources(
    spec: WeightSpace, deltas: DeltaProfile
) -> tuple[DeltaProfile, list[str]]:
    """Leave out near-duplicates, and order the sources as the description asks."""
    notes = []
    dropped: Mapping[str, str] = {}
    if spec.near_duplicates is not None:
        dropped = near_duplicates(deltas, spec.near_duplicates)
        for name, other in dropped.items():
            cosine = deltas.cosine[deltas.names.index(name)][deltas.names.index(other)]
            notes.append(
                f"{name} is left out: the cosine of its delta to that of {other} is {cosine:.3f}, "
                f"above {spec.near_duplicates:g}"
            )
    deltas = deltas.of(tuple(name for name in deltas.names if name not in dropped))
    if spec.order == "kinship":
        deltas = deltas.of(order_by_similarity(deltas))
    return deltas, notes


def _common_fold(
    opened: Mapping[str, Weights], pool: Pool
) -> tuple[Fold | None, tuple[str, ...]]:
    """How scales of the residual stream are folded into weights; a note where they cannot be."""
    try:
        folds = {fold_of(opened[path].config) for path in pool.sources.values()}
    except CheckpointError as error:
        return None, (f"scales of the residual stream are left out: {error}",)
    if len(folds) > 1:
        raise ConfigError(
            "space.routes: the models are of several families; use models of one"
        )
    return folds.pop(), ()


def _cached_scales(
    folder: Path, text: str, space: RouteSearchSpace
) -> dict[str, float]:
    """Match the streams of each pair of models on a text, or read what an earlier call found."""
    from paretomerge.merging.live.matching import matching_scale, measure_streams
    from paretomerge.merging.live.routed import RoutedModel

    lines = _lines(folder.parent / text, text)
    if space.fold is None:
        raise ConfigError(
            "space.routes.match: the models' scales cannot be folded; leave it out"
        )
    digests = [digest(path) for path in space.sources.values()]
    key = _hash([dict(space.sources), space.half, space.blocks, digests, lines])
    file = folder / f"scales-{key}.json"
    if file.is_file():
        cached: dict[str, float] = json.loads(file.read_text(encoding="utf-8"))
        return cached
    model = RoutedModel(tuple(space.sources.values()), "float32")
    by_model = measure_streams(model, space.sources, space.depths, lines)
    scales = {}
    if space.half:
        middle = {
            name: by_model[name][space.layers(name, space.half).start]
            for name in by_model
        }
        for first, second in permutations(by_model, 2):
            scales[handover_label(first, second)] = matching_scale(
                middle[first], middle[second]
            )
    _write_whole(file, json.dumps(scales, indent=1) + "\n")
    return scales


def _lines(path: Path, name: str) -> list[str]:
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"space.routes.match: cannot read the text {name}: {error}"
        ) from error
    lines = [line for line in content.splitlines() if line.strip()]
    if not lines:
        raise ConfigError(f"space.routes.match: the text {name} is empty")
    return lines


def _hash(content: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


def _write_whole(file: Path, text: str) -> None:
    """Write a file that appears whole or not at all; its folder is created."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(f".{os.getpid()}")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(file)
