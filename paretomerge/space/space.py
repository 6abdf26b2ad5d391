"""The interface between a study and its search space.

`paretomerge.testing.check_space` checks the laws that every space must satisfy.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

from optuna.distributions import BaseDistribution

from paretomerge.recipe import Recipe
from paretomerge.types import Conditions, Params


class SearchSpace(Protocol):
    """What a search may vary: parameters with their distributions, and the recipe that they give.

    `recipe` maps a trial's parameters to a recipe, `params_of` maps a recipe back to parameters.
    """

    @property
    def base(self) -> str:
        """The checkpoint whose architecture all recipes have."""
        ...

    @property
    def sources(self) -> Mapping[str, str]:
        """Name -> path of the models that recipes use."""
        ...

    @property
    def routed(self) -> bool:
        """Whether recipes are routes through layers, of any depth.

        If not, they are merged in place and have the base's depth.
        """
        ...

    @property
    def distributions(self) -> Mapping[str, BaseDistribution]:
        """Every parameter, whether or not it is active, and its distribution."""
        ...

    @property
    def conditions(self) -> Conditions:
        """Parameter -> pairs (parent, values): it is active where each parent has such a value.

        Parameters that are always active are left out.
        """
        ...

    @property
    def notes(self) -> Sequence[str]:
        """What to tell the user about the space."""
        ...

    def recipe(self, params: Params) -> Recipe:
        """Return the recipe of a trial's parameters."""
        ...

    def baselines(self) -> Mapping[str, Params]:
        """Return the baseline recipes' parameters, by label.

        Each source alone is first, under its name, or under `near <name>` where the space does not
        contain it. Each has a value for every parameter.
        """
        ...

    def params_of(self, recipe: Recipe) -> Params:
        """Return the parameters that give a recipe: the inverse of `recipe`.

        Raises:
            ConfigError: A part of the recipe, named in the message, is outside the space.
        """
        ...
