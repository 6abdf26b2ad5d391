"""The contract of a space finds what is wrong with one."""

from dataclasses import replace
from functools import cached_property

import pytest

from paretomerge.checkpoint.reader import Checkpoint
from paretomerge.errors import ConfigError
from paretomerge.recipe import Recipe
from paretomerge.space.sources import named_sources
from paretomerge.space.weights.layers import Grouping
from paretomerge.space.weights.layout import Granularity
from paretomerge.space.weights.space import WeightSearchSpace
from paretomerge.testing import check_space


class StartsOutside(WeightSearchSpace):
    def baselines(self):
        return {
            label: {
                name: 9.0 if name == "weight/bob" else v for name, v in point.items()
            }
            for label, point in super().baselines().items()
        }


class StartsWithoutSources(WeightSearchSpace):
    def baselines(self):
        return dict(reversed(super().baselines().items()))


class NotTheSource(WeightSearchSpace):
    def baselines(self):
        return {
            label: point | {"weight/bob": 0.5} if label == "bob" else point
            for label, point in super().baselines().items()
        }


class ForgottenCondition(WeightSearchSpace):
    @cached_property
    def conditions(self):
        return {
            "weight/ada": (("method", ("ties",)),)
        }  # it is active under every method


class UnknownParent(WeightSearchSpace):
    @cached_property
    def conditions(self):
        return {"density/ada": (("methods", ("ties",)),)}


class DeafParameter(WeightSearchSpace):
    def recipe(self, params):
        return super().recipe({**params, "weight/cyd": 0.5})


class Fickle(WeightSearchSpace):
    calls = 0

    def recipe(self, params):
        type(self).calls += 1
        return replace(super().recipe(params), seed=self.calls)


class Shallow(WeightSearchSpace):
    def recipe(self, params):
        piece = super().recipe(params).slices[0]
        return Recipe(
            "passthrough",
            (
                replace(
                    piece,
                    sources=(
                        replace(piece.sources[0], layer_range=(0, 2), parameters={}),
                    ),
                ),
            ),
            self.base,
        )


class DecodesElsewhere(WeightSearchSpace):
    def params_of(self, recipe):
        return super().params_of(recipe) | {"weight/ada": 0.123}


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (StartsOutside, "start 'ada': weight/bob = 9.0 is outside"),
        (StartsWithoutSources, "expected the sources first"),
        (NotTheSource, "start 'bob': .* is not that of the source"),
        (ForgottenCondition, "weight/ada is inactive at .* and changes the recipe"),
        (
            UnknownParent,
            "depends on methods, which is not a categorical or integer parameter",
        ),
        (DeafParameter, "weight/cyd is active at .* points, and changes no recipe"),
        (Fickle, "the recipe differs the second time"),
        (Shallow, "expected a recipe of 4 layers, got 2"),
        (DecodesElsewhere, "params_of leads to another recipe"),
    ],
)
def test_each_law_can_fail(pico, kind, told):
    sources = named_sources([str(pico / e) for e in ("ada", "bob", "cyd")])
    space = kind(
        str(pico / "base"),
        sources,
        Checkpoint(str(pico / "base")).architecture,
        methods=("task_arithmetic", "ties"),
    )
    with pytest.raises((AssertionError, ConfigError), match=told):
        check_space(space, points=6)


def test_a_space_that_only_comes_near_its_sources_may_say_so(pico):
    sources = named_sources([str(pico / e) for e in ("ada", "bob", "cyd")])
    architecture = Checkpoint(str(pico / "base")).architecture
    check_space(
        WeightSearchSpace(
            str(pico / "base"),
            sources,
            architecture,
            methods=("ties",),
            weight=Granularity((0.2, 0.8)),
        ),
        points=6,
    )


def test_encoder_decoders_and_layers_that_are_shared(pico):
    architecture = Checkpoint(str(pico / "base")).architecture
    flat = replace(architecture, stacks=())
    with pytest.raises(ConfigError, match="expected 1 to 1, the model's layers, got 2"):
        WeightSearchSpace(
            str(pico / "base"),
            {"ada": str(pico / "ada")},
            flat,
            weight=Granularity((0, 1), Grouping(2)),
        )
    one = WeightSearchSpace(str(pico / "base"), {"ada": str(pico / "ada")}, flat)
    assert len(one.recipe(one.uniform_params("ties", {"ada": 1.0})).slices) == 1
    two = replace(
        architecture,
        stacks=(
            architecture.stacks[0],
            replace(architecture.stacks[0], prefix="decoder.layers."),
        ),
    )
    with pytest.raises(ConfigError, match="several stacks"):
        WeightSearchSpace(
            str(pico / "base"),
            {"ada": str(pico / "ada")},
            two,
            weight=Granularity((0, 1), Grouping(2)),
        )
