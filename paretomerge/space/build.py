"""The `space:` part of study.yaml -> the space that it describes."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from paretomerge.checkpoint.architecture import Architecture
from paretomerge.checkpoint.fold import fold_of
from paretomerge.errors import CheckpointError, ConfigError
from paretomerge.merging.delta_profile import (
    DeltaProfile,
    near_duplicates,
    order_by_similarity,
    profile,
)
from paretomerge.merging.plan.make import open_weights
from paretomerge.recipe import Recipe
from paretomerge.space.routes.edits import EditSearchSpace
from paretomerge.space.routes.indicators import IndicatorSearchSpace
from paretomerge.space.routes.space import RouteSearchSpace, handover_label
from paretomerge.space.sources import digest
from paretomerge.space.weights.layers import Grouping
from paretomerge.space.weights.layout import Granularity
from paretomerge.space.weights.method_parameters import ParameterBounds
from paretomerge.space.weights.space import WeightSearchSpace


class Strict(BaseModel):
    """A section of a study.yaml: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _grammar(value: Any) -> Any:
    """`groups` as it stands in the file, once it is known to be right."""
    try:
        Grouping.read(value)
    except ConfigError as error:
        raise ValueError(str(error).removeprefix("groups: ")) from error
    return value


Groups = Annotated[Any, AfterValidator(_grammar)]


class DialConfig(Strict):
    """How finely weights or densities are split. `layer_groups: 4` is an older name of `groups: 4`."""

    bounds: tuple[float, float]
    groups: Groups = 1
    roles: bool | dict[str, list[str]] = False
    smooth: bool = False

    @model_validator(mode="before")
    @classmethod
    def _one_name(cls, data: Any) -> Any:
        if not isinstance(data, dict) or "layer_groups" not in data:
            return data
        if "groups" in data:
            raise ValueError("expected one of `groups` and `layer_groups`, got both")
        return {"groups" if key == "layer_groups" else key: value for key, value in data.items()}

    def dial(self, kind: str) -> Granularity:
        """kind: `weight` or `density`, for errors."""
        try:
            return Granularity(self.bounds, Grouping.read(self.groups), self.roles, self.smooth)
        except ConfigError as error:
            raise ConfigError(f"space.{kind}.{error}") from error


class WeightConfig(DialConfig):
    bounds: tuple[float, float] = (-0.5, 1.5)


class DensityConfig(DialConfig):
    bounds: tuple[float, float] = (0.1, 1.0)


class RoutesConfig(Strict):
    """Routes through layers. blocks: by default the layers of the shallowest model, at most 8. scale: `false` for none.

    most: times that an edit repeats a block. repeats: rounds of the indicators. match: a text, beside the study.yaml; hand-overs begin
    with the scales that match the models' streams on its first lines.
    """

    form: Literal["edits", "indicators"] = "edits"
    blocks: int | None = Field(default=None, ge=1)
    scale: tuple[float, float] | Literal[False] = (0.7, 1.4)
    most: int | None = Field(default=None, ge=1)
    repeats: int | None = Field(default=None, ge=1)
    match: str | None = None

    @model_validator(mode="after")
    def _own_settings(self) -> "RoutesConfig":
        other = {"edits": "repeats", "indicators": "most"}[self.form]
        if getattr(self, other) is not None:
            raise ValueError(f"expected no `{other}` beside `form: {self.form}`")
        if self.match is not None and not self.scale:
            raise ValueError("expected scales where `match` is set, got `scale: false`")
        return self


class SpaceConfig(Strict):
    """What the search may vary: weights, or with `routes` the way through the layers."""

    routes: RoutesConfig | None = None
    methods: list[str] = Field(default=["task_arithmetic", "ties", "dare_ties"], min_length=1)
    method_groups: Groups = 1
    weight: WeightConfig = WeightConfig()
    density: DensityConfig = DensityConfig()
    method_parameters: dict[str, ParameterBounds] = {}
    subset: bool = False
    near_duplicates: float | None = Field(default=None, gt=0, le=1)
    order: Literal["given", "kinship"] = "given"
    importance: bool = False

    @model_validator(mode="after")
    def _one_kind(self) -> "SpaceConfig":
        if self.routes is not None and (others := sorted(self.model_fields_set - {"routes"})):
            raise ValueError(
                f"expected nothing beside `routes`, got {', '.join(others)}: weights are not searched along routes"
            )
        return self

    @property
    def profiled(self) -> bool:
        """Whether the deltas must be looked at before anything else."""
        by_profile = any(
            Grouping.read(g).by == "profile"
            for g in (self.method_groups, self.weight.groups, self.density.groups)
        )
        return (
            by_profile
            or self.importance
            or self.near_duplicates is not None
            or self.order == "kinship"
        )


def build_space(
    config: SpaceConfig,
    base: str,
    sources: Mapping[str, str],
    architecture: Architecture,
    seed: int,
    folder: Path,
) -> WeightSearchSpace | RouteSearchSpace:
    """The space over `sources` (name -> path). folder: where the delta profile is kept, if one is needed."""
    if config.routes is not None:
        routes = route_space(config.routes, base, sources, seed)
        return (
            replace(routes, matched=kept_scales(folder, config.routes.match, routes))
            if config.routes.match
            else routes
        )
    deltas = kept_profile(folder, base, sources) if config.profiled else None
    notes: list[str] = []
    if deltas:
        dropped = (
            near_duplicates(deltas, config.near_duplicates)
            if config.near_duplicates is not None
            else {}
        )
        for twin, kept in dropped.items():
            cosine = deltas.cosine[deltas.names.index(twin)][deltas.names.index(kept)]
            notes.append(
                f"{twin} is left out: the cosine of its delta to that of {kept} is {cosine:.3f}, above {config.near_duplicates:g}"
            )
        deltas = deltas.of(tuple(name for name in deltas.names if name not in dropped))
        deltas = deltas.of(order_by_similarity(deltas)) if config.order == "kinship" else deltas
    space = WeightSearchSpace(
        base,
        deltas.sources if deltas else sources,
        architecture,
        tuple(config.methods),
        config.weight.dial("weight"),
        config.density.dial("density"),
        seed,
        method_groups=Grouping.read(config.method_groups),
        method_parameters=config.method_parameters,
        subset=config.subset,
        profile=deltas,
    )
    if not space.holds_sources:
        notes.append(
            "no point of the space is a source alone, for which weights 0 and 1, density 1 and a method that takes one model "
            "would have to be in it: the first trials, and the reference point after them, are only near the sources"
        )
    return replace(space, notes=tuple(notes))


def route_space(
    config: RoutesConfig,
    base: str,
    sources: Mapping[str, str],
    seed: int,
    recipes: Mapping[str, Recipe] = MappingProxyType({}),
) -> RouteSearchSpace:
    """Routes through `sources` (name -> path) and merges of the base's depth (name -> recipe)."""
    opened = open_weights((base, *sources.values()))
    depths = {name: opened[path].architecture.depth for name, path in sources.items()}
    depths |= dict.fromkeys(recipes, opened[base].architecture.depth)
    fold, notes = None, []
    if config.scale:
        try:
            folds = {fold_of(opened[path].config) for path in sources.values()}
            if len(folds) > 1:
                raise ConfigError("space.routes: expected models of one family, got several")
            fold = folds.pop()
        except CheckpointError as error:
            notes.append(f"scales of the stream are left out: {error}")
    common: Any = {
        "fold": fold,
        "blocks": config.blocks or min(8, *depths.values()),
        "seed": seed,
        "notes": tuple(notes),
    }
    common |= {"recipes": recipes}
    sources = {**sources, **{name: name for name in recipes}}
    common |= {"scale": config.scale} if config.scale else {}
    try:
        if config.form == "indicators":
            return IndicatorSearchSpace(
                base, sources, depths, **common, repeats=config.repeats or 1
            )
        return EditSearchSpace(base, sources, depths, **common, most=config.most or 2)
    except ConfigError as error:
        raise ConfigError(str(error).replace("space.", "space.routes.", 1)) from error


def kept_scales(folder: Path, text: str, space: RouteSearchSpace) -> dict[str, float]:
    """Scales of the hand-overs half-way, by their labels, that match the streams on a text; kept in `folder` for the next time."""
    from paretomerge.merging.live.matching import matching_scale, measure_streams
    from paretomerge.merging.live.routed import RoutedModel

    try:
        content = (folder.parent / text).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"space.routes.match: expected a text, got {text}: {error}") from error
    lines = [line for line in content.splitlines() if line.strip()]
    if not lines or space.fold is None:
        raise ConfigError(
            f"space.routes.match: expected a text with a line in it and a family with a fold, got {text}"
        )
    asked = [
        dict(space.sources),
        space.half,
        space.blocks,
        [digest(path) for path in space.sources.values()],
        lines,
    ]
    file = folder / f"scales-{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:12]}.json"
    if file.is_file():
        kept: dict[str, float] = json.loads(file.read_text(encoding="utf-8"))
        return kept
    live = RoutedModel(tuple(space.sources.values()), "float32")
    found = measure_streams(live, space.sources, space.depths, lines)
    at = {name: space.layers(name, space.half).start for name in found}
    scales = {
        handover_label(a, b): matching_scale(found[a][at[a]], found[b][at[b]])
        for a, b in permutations(found, 2)
        if space.half
    }
    _keep(file, json.dumps(scales, indent=1) + "\n")
    return scales


def kept_profile(folder: Path, base: str, sources: Mapping[str, str]) -> DeltaProfile:
    """The delta profile, kept in `folder` for the next time; another one where a model's files have changed since."""
    files = [digest(model) for model in (base, *sources.values())]
    key = hashlib.sha256(json.dumps([base, dict(sources), files]).encode()).hexdigest()[:12]
    file = folder / f"deltas-{key}.json"
    if file.is_file():
        try:
            return DeltaProfile.from_json(file.read_text(encoding="utf-8"))
        except (ConfigError, OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file}: {error}") from error
    made = profile(base, sources)
    _keep(file, made.to_json())
    return made


def _keep(file: Path, text: str) -> None:
    """Write a file that appears whole, in a folder that need not be there yet."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(f".{os.getpid()}")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(file)
