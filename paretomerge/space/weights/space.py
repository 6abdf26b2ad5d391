"""The search space of merge weights, densities and methods."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from optuna.distributions import BaseDistribution

from paretomerge.checkpoint.architecture import Architecture
from paretomerge.errors import ConfigError
from paretomerge.merging.delta_profile import DeltaProfile
from paretomerge.merging.methods import METHODS
from paretomerge.merging.plan.make import open_weights
from paretomerge.merging.plan.plan import Weights
from paretomerge.recipe import Recipe
from paretomerge.space.weights.decode import params_of
from paretomerge.space.weights.encode import recipe_of
from paretomerge.space.weights.importance import parameter_importance
from paretomerge.space.weights.layers import SINGLE_GROUP, Grouping
from paretomerge.space.weights.layout import Granularity, ParameterLayout
from paretomerge.space.weights.method_parameters import (
    AVAILABLE,
    ParameterBounds,
    bounds_of,
    check_method_parameters,
    check_needs_no_data,
    check_searchable,
    methods_with,
    search_range,
)
from paretomerge.space.weights.parameters import (
    TASK_ARITHMETIC,
    ParameterSpace,
    ParentChoices,
)
from paretomerge.types import Params, ParamValue

_BASELINE_SCALES = (0.5, 0.7)
"""Weights of all sources in the task arithmetic baselines."""

_SUMS = "task_vectors"
"""The family of methods that add up deltas, so that the weights 1 / K average the sources."""


def _default_weight() -> Granularity:
    # Weights above 1 and of any sum: Akiba et al. 2024 (arXiv 2403.13187) found the best sums near
    # 2. A negative weight removes a skill.
    return Granularity((-0.5, 1.5))


def _default_density() -> Granularity:
    return Granularity((0.1, 1.0))


@dataclass(frozen=True)
class WeightSearchSpace:
    """Merges of fine-tunes of one base: weights and densities per source, and the merge method.

    Which parameter goes where in the recipe is in `paretomerge.space.weights.parameters`. Weights
    are never normalised.

    Attributes:
        base: Path of the base model.
        sources: Name -> path of the models that are merged.
        architecture: Architecture of the base.
        methods: Merge methods to choose from.
        weight: How finely weights are divided over layers and roles, and their bounds.
        density: The same for densities.
        seed: Seed of the recipes' random masks.
        method_groups: Groups of layers that each have their own method.
        method_parameters: Per-method parameters such as gamma and epsilon -> value or bounds, in
            place of the defaults.
        subset: Whether a source can be left out.
        profile: Mass of the sources' deltas, for groups of equal mass and for `importance`.
        notes: What to tell the user about the space.
        calibration: The folder with statistics of the sources, for methods that need data.

    Raises:
        ConfigError: A setting is invalid, or does not fit the architecture or the other settings.
    """

    base: str
    sources: Mapping[str, str]
    architecture: Architecture
    methods: tuple[str, ...] = ("task_arithmetic", "ties", "dare_ties")
    weight: Granularity = field(default_factory=_default_weight)
    density: Granularity = field(default_factory=_default_density)
    seed: int = 0
    method_groups: Grouping = SINGLE_GROUP
    method_parameters: Mapping[str, ParameterBounds] = field(default_factory=dict)
    subset: bool = False
    profile: DeltaProfile | None = None
    notes: tuple[str, ...] = ()
    calibration: str | None = None

    def __post_init__(self) -> None:
        self._check_methods()
        low, high = self.density.bounds
        if not (low > 0 and high <= 1):
            raise ConfigError(
                f"space.density.bounds: expected 0 < low < high <= 1, got {[low, high]}"
            )
        check_method_parameters(self.method_parameters, self.methods)
        if self.profile is not None:
            self._check_profile(self.profile)
        # This also builds `parameters`, so that a setting that does not fit is refused here.
        several_stacks = len(self.architecture.main_stacks) > 1
        if self._has_layer_groups() and several_stacks:
            raise ConfigError(
                "space: expected one group, for the architecture has several stacks of layers, "
                "got more"
            )

    def _check_profile(self, profile: DeltaProfile) -> None:
        for source in self.sources:
            if source not in profile.names:
                raise ConfigError(
                    f"space: expected a profile of every source, got none of {source}"
                )

    def _has_layer_groups(self) -> bool:
        starts = [self.parameters.method_starts]
        for layout in self.parameters.layouts.values():
            starts.append(layout.starts)
        return max(map(len, starts)) > 1

    def _check_methods(self) -> None:
        check_searchable(self.methods)
        for method in self.methods:
            least_sources, _ = METHODS[method].models
            if len(self.sources) < least_sources:
                raise ConfigError(
                    f"space.methods: {method}: expected {least_sources} models or more, "
                    f"got {len(self.sources)}"
                )
        if self.calibration is None:
            check_needs_no_data(self.methods)
        listed = ", ".join(self.methods)
        different = set(self.methods)
        if len(different) < len(self.methods):
            raise ConfigError(f"space.methods: expected each method once, got {listed}")

    @property
    def routed(self) -> bool:
        """False: recipes are merged in place, in the base's architecture."""
        return False

    @cached_property
    def parameters(self) -> ParameterSpace:
        """All parameters, their layout over the architecture, and what recipes are made from."""
        method_starts = self._method_starts()
        method_bounds = {}
        for name in AVAILABLE:
            if methods_with(name, self.methods):
                default = search_range(name)
                default_bounds = (default.low, default.high)
                setting = self.method_parameters.get(name, default_bounds)
                method_bounds[name] = bounds_of(setting)
        return ParameterSpace(
            base=self.base,
            sources=self.sources,
            architecture=self.architecture,
            methods=self.methods,
            method_starts=method_starts,
            method_bounds=method_bounds,
            layouts={
                "weight": self._layout("weight", self.weight, method_starts),
                "density": self._layout("density", self.density, method_starts),
            },
            subset=self.subset,
            seed=self.seed,
            calibration=self.calibration,
        )

    def _method_starts(self) -> tuple[int, ...]:
        """First layer of each group with its own method."""
        try:
            starts = self.method_groups.starts(
                self.architecture.depth, self._layer_mass
            )
        except ConfigError as error:
            raise ConfigError(f"space.method_{error}") from error
        return starts if len(self.methods) > 1 else (0,)

    def _layout(
        self,
        kind: str,
        granularity: Granularity,
        method_starts: tuple[int, ...],
    ) -> ParameterLayout:
        """The layout of weights or densities over the architecture."""
        layout = ParameterLayout.of(
            kind,
            granularity,
            self.architecture,
            self._layer_mass,
        )
        readers = methods_with(kind, self.methods)
        only_some_read = 0 < len(readers) < len(self.methods)
        if len(method_starts) == 1 or not only_some_read:
            return layout
        # Whether a parameter is active depends on the method of its group, so it must not span
        # groups with different methods.
        if granularity.smooth:
            raise ConfigError(
                f"space.{kind}.smooth: expected methods that all read `{kind}` "
                "where layers have methods of their own"
            )
        return layout.cut_at(method_starts)

    @cached_property
    def _layer_mass(self) -> Sequence[float] | None:
        """(L,) Squared L2 norm of each layer's deltas, summed over the sources."""
        if self.profile is None:
            return None
        by_layer = self.profile.by_layer(self.architecture)
        layer_mass: list[float] = by_layer.sum(1).tolist()
        return layer_mass

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Every parameter, whether or not it is active, and its distribution."""
        return self.parameters.distributions

    @property
    def conditions(self) -> dict[str, ParentChoices]:
        """Parameter -> pairs (parent, values): it is active where each parent has such a value."""
        return self.parameters.conditions

    @cached_property
    def importance(self) -> dict[str, float]:
        """Parameter -> L2 norm of the deltas that it governs; {} without a profile.

        Relative to the parameters of the same kind, whose geometric mean is 1.
        """
        if self.profile is None:
            return {}
        return parameter_importance(self.parameters, self.profile)

    def recipe(self, params: Params) -> Recipe:
        """Return the recipe of a trial's parameters.

        Groups of layers become slices, roles become filters, and methods per group of layers become
        named steps.

        Args:
            params: Value of every active parameter.
        """
        return recipe_of(self.parameters, params)

    def params_of(self, recipe: Recipe) -> dict[str, ParamValue]:
        """Return the parameters that give a recipe, however the recipe is written.

        Args:
            recipe: A recipe over the base and the sources.

        Returns:
            A value for every parameter.

        Raises:
            ConfigError: A part of the recipe, named in the message, is outside the space.
        """
        return params_of(self.parameters, recipe, self._weights)

    @cached_property
    def _weights(self) -> Mapping[str, Weights]:
        """The open checkpoints of the base and the sources, by path."""
        return open_weights((self.base, *self.sources.values()))

    def uniform_params(
        self,
        method: str,
        weights: Mapping[str, float],
        density: float = 1.0,
    ) -> dict[str, ParamValue]:
        """One method everywhere and one weight per source; see `ParameterSpace.uniform_params`."""
        return self.parameters.uniform_params(method, weights, density)

    def baselines(self) -> dict[str, dict[str, ParamValue]]:
        """Return the parameters of the baseline recipes.

        Returns:
            Label -> parameters: each source alone, the uniform average, task arithmetic, and each
            method at published settings. Where no method adds up deltas, there is no uniform
            average. A source alone has the source's name as its label, or
            `near <name>` where the space does not contain it. Recipes that occur twice are listed
            once.
        """
        baselines = self._source_baselines()
        keys = set()
        for params in baselines.values():
            recipe = self.recipe(params)
            keys.add(recipe.key)
        for label, params in self._merge_baselines().items():
            if label in baselines:
                raise ConfigError(
                    f"models: {label!r} is also the name of a baseline; rename the folder"
                )
            # Narrow bounds clip several baselines to one recipe, which is evaluated once.
            recipe = self.recipe(params)
            if recipe.key not in keys:
                keys.add(recipe.key)
                baselines[label] = params
        return baselines

    def _source_baselines(self) -> dict[str, dict[str, ParamValue]]:
        baselines = {}
        for source in self.sources:
            weights = dict.fromkeys(self.sources, 0.0)
            weights[source] = 1.0
            label = source if self.holds_sources else f"near {source}"
            baselines[label] = self.uniform_params(self._baseline_method, weights)
        return baselines

    def _merge_baselines(self) -> dict[str, dict[str, ParamValue]]:
        method = self._baseline_method
        baselines = {}
        if METHODS[method].family == _SUMS:
            # A model soup (Wortsman et al. 2022, arXiv 2203.05482).
            share = 1 / len(self.sources)
            weights = dict.fromkeys(self.sources, share)
            baselines["uniform soup"] = self.uniform_params(method, weights)
        for scale in _BASELINE_SCALES:
            title = method.replace("_", " ")
            label = f"{title} {scale}"
            weights = dict.fromkeys(self.sources, scale)
            baselines[label] = self.uniform_params(method, weights)
        sparse_methods = methods_with("density", self.methods)
        for method in self.methods:
            published = METHODS[method].baseline_weight
            scale = 1 / len(self.sources) if published is None else published
            weights = dict.fromkeys(self.sources, scale)
            is_listed = method == self._baseline_method and scale in _BASELINE_SCALES
            if method in sparse_methods:
                density = METHODS[method].baseline_density
                label = f"{method} at density {density}"
                baselines[label] = self.uniform_params(method, weights, density)
            elif not is_listed:
                baselines[method] = self.uniform_params(method, weights)
        return baselines

    @cached_property
    def _baseline_method(self) -> str:
        """The method of the plain baselines.

        If possible, one that gives a single model back, and if possible one that adds up deltas,
        without needing density 1 for that.
        """
        sparse_methods = methods_with("density", self.methods)

        def rank(method: str) -> tuple[bool, bool, bool]:
            row = METHODS[method]
            least_sources, _ = row.models
            return least_sources > 1, row.family != _SUMS, method in sparse_methods

        return min(self.methods, key=rank)

    @property
    def holds_sources(self) -> bool:
        """Whether the space contains each source alone.

        This needs weights 0 and 1 (1 with `subset`), a method that merges a single model, and its
        `density` or `select_topk` at 1.
        """
        method = self._baseline_method
        least_sources, _ = METHODS[method].models
        if self.subset and least_sources > 1:
            # With a single source, recipes fall back to task arithmetic.
            method = TASK_ARITHMETIC
            least_sources = 1
        if least_sources > 1:
            return False
        # The other sources are left out, or have weight 0.
        needed_weights = (1.0,) if self.subset else (0.0, 1.0)
        for weight in needed_weights:
            if self.weight.clip(weight) != weight:
                return False
        # A sparse delta is not the source's.
        if methods_with("density", (method,)):
            return self.density.clip(1.0) == 1.0
        if methods_with("select_topk", (method,)):
            _, largest = self.parameters.method_bounds["select_topk"]
            return largest >= 1
        return True
