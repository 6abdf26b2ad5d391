"""Build a search space from its description.

This reads the headers of the models, and measures their deltas if the description needs them.
"""

import hashlib
import json
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
from paretomerge.space.measurements import Measurements
from paretomerge.space.routes.edits import EditSearchSpace
from paretomerge.space.routes.indicators import IndicatorSearchSpace
from paretomerge.space.routes.space import RouteSearchSpace, handover_label
from paretomerge.space.sources import digest
from paretomerge.space.specs import RouteSpace, WeightSpace
from paretomerge.space.weights.layers import Grouping
from paretomerge.space.weights.space import WeightSearchSpace

# The default. Each block adds parameters, so more blocks make the space harder to search.
_MOST_BLOCKS = 8
_DEFAULT_REPEATS = 2  # the most times that an edit repeats a block


@dataclass(frozen=True)
class Pool:
    """The models that a space merges.

    Attributes:
        base: The base: a folder or a name on the Hub.
        sources: Name -> path of the fine-tunes.
        allow_mismatch: Whether they are merged even if they do not seem to belong together.
        same_vocabulary: Whether they must have the base's vocabulary. Without, recipes bring
            their vocabularies together.
        calibration: The folder with statistics of the sources, for methods that need data.
    """

    base: str
    sources: Mapping[str, str]
    allow_mismatch: bool = False
    same_vocabulary: bool = True
    calibration: str | None = None


def build_space(
    spec: WeightSpace | RouteSpace,
    pool: Pool,
    seed: int,
    measurements: Measurements,
    root: Path | None = None,
) -> WeightSearchSpace | RouteSearchSpace:
    """Make the search space that a description names.

    Args:
        spec: The description.
        pool: The models.
        seed: The seed of the random masks in its recipes.
        measurements: Has the profile of the deltas, if one is needed, or gets it.
        root: The folder that the path of a text to `match` starts from; by default that of the
            measurements.

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
        text = (root or measurements.folder.parent) / spec.match
        lines = _lines(text, spec.match)
        return replace(space, matched=_cached_scales(measurements, lines, space))
    return _build_weight_space(spec, pool, seed, measurements)


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
        seed: The seed of the random masks in its recipes.
        recipes: Name -> recipe of merges that have the base's depth. They are sources too.

    Returns:
        The space.

    Raises:
        ConfigError: The models do not fit together.
        CheckpointError: A model cannot be read.
    """
    # Only headers are read here: layers, widths and names.
    models = (pool.base, *pool.sources.values())
    opened = open_weights(models, download=False)
    depths: dict[str, int] = {}
    for name, path in pool.sources.items():
        depths[name] = opened[path].architecture.depth
    base_depth = opened[pool.base].architecture.depth
    depths |= dict.fromkeys(recipes, base_depth)
    fold: Fold | None = None
    notes: tuple[str, ...] = ()
    if spec.scale:
        fold, notes = _common_fold(opened, pool)
    settings: dict[str, Any] = {
        "fold": fold,
        "blocks": spec.blocks or min(_MOST_BLOCKS, *depths.values()),
        "seed": seed,
        "notes": notes,
        "recipes": recipes,
    }
    if spec.scale:
        settings["scale"] = spec.scale
    # A merge of the pool has no path: its name refers to its recipe.
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
        # The spaces name their own keys, which the user wrote under `space.routes`.
        message = str(error).replace("space.", "space.routes.", 1)
        raise ConfigError(message) from error


def cached_profile(measurements: Measurements, pool: Pool) -> DeltaProfile:
    """Measure the deltas of the models, or read what an earlier call measured.

    Args:
        measurements: Has the profile, or gets it.
        pool: The models. The profile is measured again when their files change.

    Returns:
        The profile.

    Raises:
        ConfigError: The cached file is damaged.
        CheckpointError: A model cannot be read.
    """
    models = (pool.base, *pool.sources.values())
    # The key contains the files' digests: a model that was trained again is measured again.
    files = [digest(model) for model in models]
    content = [pool.base, dict(pool.sources), files]
    if not pool.same_vocabulary:
        content.append("without embeddings")
    key = _hash(content)
    name = f"deltas-{key}.json"
    try:
        cached = measurements.read(name)
        if cached is not None:
            return DeltaProfile.from_json(cached)
    except (ConfigError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{measurements.path(name)}: {error}") from error
    measured = profile(
        pool.base,
        pool.sources,
        allow_mismatch=pool.allow_mismatch,
        same_vocabulary=pool.same_vocabulary,
    )
    measurements.add(name, measured.to_json())
    return measured


def _build_weight_space(
    spec: WeightSpace, pool: Pool, seed: int, measurements: Measurements
) -> WeightSearchSpace:
    # Headers suffice: checking a study must not download gigabytes.
    architecture: Architecture = Checkpoint(pool.base, download=False).architecture
    deltas: DeltaProfile | None = None
    notes: list[str] = []
    if spec.needs_profile:
        deltas = cached_profile(measurements, pool)
        deltas, notes = _selected_sources(spec, deltas)
    # With a profile, its sources are used: near-duplicates are gone, and the order is the one
    # asked for.
    space = WeightSearchSpace(
        pool.base,
        deltas.sources if deltas else pool.sources,
        architecture,
        tuple(spec.methods),
        spec.weight,
        spec.density,
        seed,
        method_groups=Grouping.parse(spec.method_groups),
        method_parameters=spec.method_parameters,
        subset=spec.subset,
        profile=deltas,
        calibration=pool.calibration,
    )
    if not space.holds_sources:
        notes.append(
            "no point of the space is a source alone: that needs weights 0 and 1, a method that "
            "takes one model, and its density or select_topk at 1. The first trials, and the "
            "reference point of the hypervolume, are only near the sources."
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
            row = deltas.names.index(name)
            column = deltas.names.index(other)
            cosine = deltas.cosine[row][column]
            notes.append(
                f"{name} is left out: the cosine of its delta to that of {other} is {cosine:.3f}, "
                f"above {spec.near_duplicates:g}"
            )
    retained = []
    for name in deltas.names:
        if name not in dropped:
            retained.append(name)
    deltas = deltas.of(tuple(retained))
    # Ordered last, so that only the sources that stay take part.
    if spec.order == "kinship":
        deltas = deltas.of(order_by_similarity(deltas))
    return deltas, notes


def _common_fold(
    opened: Mapping[str, Weights], pool: Pool
) -> tuple[Fold | None, tuple[str, ...]]:
    """How scales of the residual stream are folded into weights; a note where they cannot be."""
    # A family without a fold costs the scales only: any numbered layers can be stacked without.
    try:
        folds = set()
        for path in pool.sources.values():
            folds.add(fold_of(opened[path].config))
    except CheckpointError as error:
        return None, (f"scales of the residual stream are left out: {error}",)
    if len(folds) > 1:
        raise ConfigError(
            "space.routes: the models are of several families; use models of one"
        )
    return folds.pop(), ()


def _cached_scales(
    measurements: Measurements, lines: Sequence[str], space: RouteSearchSpace
) -> dict[str, float]:
    """Match the residual streams of each pair of models on a text, or read the cached scales."""
    # Imported here: this runs the models, and needs torch and transformers.
    from paretomerge.merging.live.matching import matching_scale, measure_streams
    from paretomerge.merging.live.routed import RoutedModel

    if space.fold is None:
        raise ConfigError(
            "space.routes.match: the models' scales cannot be folded; leave it out"
        )
    # The key holds everything that the scales depend on, the text itself included.
    digests = [digest(path) for path in space.sources.values()]
    sources = dict(space.sources)
    key = _hash([sources, space.half, space.blocks, digests, lines])
    file = f"scales-{key}.json"
    text_of_cache = measurements.read(file)
    if text_of_cache is not None:
        cached: dict[str, float] = json.loads(text_of_cache)
        return cached
    model = RoutedModel(tuple(space.sources.values()), "float32")
    by_model = measure_streams(model, space.sources, space.depths, lines)
    scales = {}
    # With one block per model there is no middle to hand over at.
    if space.half:
        middle = {}
        for name, streams in by_model.items():
            middle_layer = space.layers(name, space.half).start
            middle[name] = streams[middle_layer]
        for first, second in permutations(by_model, 2):
            scale = matching_scale(middle[first], middle[second])
            scales[handover_label(first, second)] = scale
    content = json.dumps(scales, indent=1)
    measurements.add(file, content + "\n")
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
    text = json.dumps(content)
    content_digest = hashlib.sha256(text.encode())
    return content_digest.hexdigest()[:12]
