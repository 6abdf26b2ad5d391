"""Plain descriptions of search spaces, as a user gives them, without models.

`build.py` makes a `SearchSpace` from a description, once it has read the headers of the models.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from paretomerge.arguments import (
    Reader,
    describe,
    flag,
    integer,
    mapping_of,
    number,
    optional,
    pair,
    path,
    plain_data,
    read_fields,
    sequence_of,
    word,
)
from paretomerge.errors import ConfigError, unknown_name
from paretomerge.space.weights.layers import Grouping
from paretomerge.space.weights.layout import Granularity
from paretomerge.space.weights.method_parameters import (
    ParameterBounds,
    check_searchable,
)

# Both bounds include what the baselines need: weights 0 and 1, and density 1, make a source alone.
WEIGHT_BOUNDS = (-0.5, 1.5)
DENSITY_BOUNDS = (0.1, 1.0)
_GRANULARITY_KEYS = ("bounds", "groups", "roles", "smooth")


@dataclass(frozen=True)
class WeightSpace:
    """Merges of the models' weights.

    The parameters are the method, and the weight and density of each source, layer group and role.

    Attributes:
        methods: Merge methods to choose from.
        groups: Groups of layers that have separate weights and densities: a number, `{"by":
            "profile", "count": 4}`, or ranges `[[0, 8], [8, 24]]`. `weight` and `density` can
            override it.
        weight: How finely weights are split: a mapping with `bounds`, `groups`, `roles`, `smooth`.
        density: The same for densities.
        method_groups: Groups of layers that have separate methods.
        method_parameters: Bounds or fixed values of the methods' parameters, such as `{"gamma":
            (0.0, 0.05)}`.
        subset: Whether a source may be left out.
        near_duplicates: Leave out a source whose delta has a cosine above this to that of an
            earlier source.
        order: The order of the sources: `given`, or `kinship` for the least similar first.
        importance: Measure how much of the deltas each parameter governs, for samplers that use it.

    Raises:
        ConfigError: A setting is unknown or out of range, or has a wrong type.

    Example:
        >>> space = WeightSpace(methods=["task_arithmetic", "ties"], groups=2)
        >>> space.weight.bounds
        (-0.5, 1.5)
    """

    methods: Sequence[str] = ("task_arithmetic", "ties", "dare_ties")
    groups: Any = field(default=1, compare=False)  # held by `weight` and `density`
    weight: Granularity = field(default_factory=dict)  # type: ignore[assignment]  # a mapping is read below
    density: Granularity = field(default_factory=dict)  # type: ignore[assignment]
    method_groups: Any = 1
    method_parameters: Mapping[str, ParameterBounds] = field(default_factory=dict)
    subset: bool = False
    near_duplicates: float | None = None
    order: Literal["given", "kinship"] = "given"
    importance: bool = False

    def __post_init__(self) -> None:
        read_fields(self, _WEIGHT_SPACE_READERS, "space.")
        check_searchable(self.methods)
        if self.near_duplicates is not None and not 0 < self.near_duplicates <= 1:
            raise ConfigError(
                f"space.near_duplicates: a cosine above 0 and at most 1, not {self.near_duplicates}"
            )
        if self.order not in ("given", "kinship"):
            raise ConfigError(f"space.order: use given or kinship, not {self.order!r}")
        groups = _groups(self.groups)
        weight = _granularity("weight", self.weight, WEIGHT_BOUNDS, groups)
        density = _granularity("density", self.density, DENSITY_BOUNDS, groups)
        # The fields accept what a study.yaml holds and store what spaces need. The class is frozen,
        # so `object.__setattr__` is the only way to replace them.
        object.__setattr__(self, "groups", groups)
        object.__setattr__(self, "weight", weight)
        object.__setattr__(self, "density", density)
        method_groups = Grouping.parse(_groups(self.method_groups))
        object.__setattr__(self, "method_groups", method_groups)

    @property
    def needs_profile(self) -> bool:
        """Whether the deltas must be measured before the space can be built."""
        # Measuring reads every weight of every model; other spaces read headers only.
        groupings = (self.method_groups, self.weight.groups, self.density.groups)
        for grouping in groupings:
            if grouping.by == "profile":
                return True
        if self.near_duplicates is not None or self.importance:
            return True
        return self.order == "kinship"


@dataclass(frozen=True)
class LineageSpace:
    """Lineages: each trial is a source, or a merge of two earlier trials of the study.

    The sampler must be `evolver` or `kinship`, which choose the parents.

    Example:
        >>> LineageSpace()
        LineageSpace()
    """


@dataclass(frozen=True)
class RouteSpace:
    """Routes through the layers of several models.

    This is the data-flow space of Akiba et al. (arXiv 2403.13187, sec. 3.2).

    Attributes:
        form: `edits` for edits of one model or of a hand-over between two, or `indicators` for a
            use-or-skip parameter per block, as in Akiba et al.
        blocks: Blocks of layers that each model is cut into. By default the number of layers, at
            most 8.
        scale: Bounds of the scale of the residual stream on its way into a block; False for no
            scales.
        most: The most times that an edit repeats a block (`form="edits"` only).
        repeats: Rounds through the indicators (`form="indicators"` only).
        match: A text file. Hand-overs begin with the scales that match the models' residual streams
            on its first lines.

    Raises:
        ConfigError: A setting does not belong to the form, is out of range, or has a wrong type.

    Example:
        >>> RouteSpace(blocks=4).form
        'edits'
    """

    form: Literal["edits", "indicators"] = "edits"
    blocks: int | None = None
    scale: tuple[float, float] | Literal[False] = (0.7, 1.4)
    most: int | None = None
    repeats: int | None = None
    match: str | None = None

    def __post_init__(self) -> None:
        if self.form not in ("edits", "indicators"):
            raise ConfigError(
                f"space.routes.form: use edits or indicators, not {self.form!r}"
            )
        read_fields(self, _ROUTE_SPACE_READERS, "space.routes.")
        # Refused and not ignored: a key without effect would mislead whoever reads the file.
        foreign = "repeats" if self.form == "edits" else "most"
        if getattr(self, foreign) is not None:
            raise ConfigError(
                f"space.routes.{foreign}: has no meaning with form: {self.form}"
            )
        if self.match is not None and not self.scale:
            raise ConfigError("space.routes.match: needs scales, but `scale` is false")


def _granularity(
    kind: str,
    value: object,
    default_bounds: tuple[float, float],
    default_groups: object,
) -> Granularity:
    """Read `weight:` or `density:`, with the defaults of its kind."""
    if isinstance(value, Granularity):
        return value
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"space.{kind}: a mapping with {', '.join(_GRANULARITY_KEYS)}, not {describe(value)}"
        )
    for key in value:
        if key not in _GRANULARITY_KEYS:
            raise ConfigError(
                f"space.{kind}: {unknown_name('key', key, _GRANULARITY_KEYS)}"
            )
    bounds = pair(f"space.{kind}.bounds", value.get("bounds", default_bounds))
    groups = _groups(value.get("groups", default_groups))
    roles = _roles(f"space.{kind}.roles", value.get("roles", False))
    smooth = flag(f"space.{kind}.smooth", value.get("smooth", False))
    try:
        return Granularity(bounds, Grouping.parse(groups), roles, smooth)
    except ConfigError as error:
        raise ConfigError(f"space.{kind}.{error}") from error


def _methods(name: str, value: object) -> tuple[str, ...]:
    # A single name is a sequence too, of its letters.
    if isinstance(value, str) or value in ((), []):
        raise ConfigError(
            f"{name}: list at least one method, such as ['ties'], not {describe(value)}"
        )
    methods: tuple[str, ...] = sequence_of(word, "['ties']")(name, value)
    return methods


def _groups(value: object) -> object:
    """Groups of layers as a study.yaml holds them; numpy's numbers become Python's."""
    if isinstance(value, Grouping):
        return value
    return plain_data(value)


def _roles(name: str, value: object) -> bool | Mapping[str, Sequence[str]]:
    if isinstance(value, Mapping):
        patterns = sequence_of(word, "['mlp.']")
        roles: Mapping[str, Sequence[str]] = mapping_of(patterns, "roles")(name, value)
        return roles
    try:
        return flag(name, value)
    except ConfigError as error:
        raise ConfigError(
            f"{name}: expected False, True or {{'mlp': ['mlp.'], ...}}, "
            f"got {describe(value)}"
        ) from error


def _bounds_or_value(name: str, value: object) -> ParameterBounds:
    if isinstance(value, (list, tuple)):
        return pair(name, value)
    try:
        return number(name, value)
    except ConfigError as error:
        raise ConfigError(
            f"{name}: expected a number or [low, high], got {describe(value)}"
        ) from error


def _scale(name: str, value: object) -> tuple[float, float] | Literal[False]:
    if value is False:
        return False
    try:
        return pair(name, value)
    except ConfigError as error:
        raise ConfigError(
            f"{name}: expected two numbers (low, high), or False for no scales, "
            f"got {describe(value)}"
        ) from error


_WEIGHT_SPACE_READERS: Mapping[str, Reader] = {
    "methods": _methods,
    "method_parameters": mapping_of(_bounds_or_value, "{'gamma': (0.0, 0.05)}"),
    "subset": flag,
    "near_duplicates": optional(number),
    "importance": flag,
}
_ROUTE_SPACE_READERS: Mapping[str, Reader] = {
    "blocks": optional(integer(1)),
    "scale": _scale,
    "most": optional(integer(1)),
    "repeats": optional(integer(1)),
    "match": optional(path),
}
