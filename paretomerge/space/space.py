"""The seam between a study and its space. `paretomerge.testing.check_space` runs the laws that every space must keep."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from optuna.distributions import BaseDistribution

from paretomerge.recipe import Recipe


class SearchSpace(Protocol):
    """What a search may vary: parameters with their distributions, and the recipe of each point."""

    @property
    def base(self) -> str:
        """The checkpoint whose architecture every recipe gives."""
        ...

    @property
    def sources(self) -> Mapping[str, str]:
        """Name -> path of the models that recipes take from."""
        ...

    @property
    def routed(self) -> bool:
        """Whether recipes are routes through layers, of any depth; else they are merged in place, in the base's."""
        ...

    @property
    def distributions(self) -> Mapping[str, BaseDistribution]:
        """Every parameter, whether or not it counts at a given point."""
        ...

    @property
    def conditions(self) -> Mapping[str, Sequence[tuple[str, Sequence[Any]]]]:
        """name -> (parent, values) pairs: the parameter counts where every parent has one of its values."""
        ...

    @property
    def notes(self) -> Sequence[str]:
        """What to tell the user about the space."""
        ...

    def recipe(self, params: Mapping[str, Any]) -> Recipe:
        """The recipe of one point."""
        ...

    def starts(self) -> Mapping[str, Mapping[str, Any]]:
        """Label -> known good point to begin with; each source alone first, under its name, or as `near` it where the space
        holds no such point."""
        ...

    def warm(self, recipe: Recipe) -> Mapping[str, Any]:
        """The point that gives the user's recipe; a ConfigError says which part of it is outside the space."""
        ...
