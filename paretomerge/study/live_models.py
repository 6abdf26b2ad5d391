"""The models that merges are loaded into, one for each level of a study."""

import hashlib
from collections.abc import Callable, Mapping
from functools import cached_property

from paretomerge.config.settings import SourcesSetting
from paretomerge.evaluate.evaluator import Candidate
from paretomerge.merging.live.in_place import ResidentModel
from paretomerge.merging.live.routed import RoutedModel
from paretomerge.recipe import Recipe
from paretomerge.space.sources import digest
from paretomerge.space.space import SearchSpace
from paretomerge.study.placement import Placement

LiveModel = ResidentModel | RoutedModel


class LiveModels:
    """Loads the live models of a study when they are first needed.

    Args:
        space: The first level's search space.
        placement: The dtype, the device and the tokenizer of merges.
        where: Says where the base and the sources stay, when a model is loaded.
    """

    def __init__(
        self,
        space: SearchSpace,
        placement: Placement,
        where: Callable[[], SourcesSetting],
    ) -> None:
        self._space = space
        self._placement = placement
        self._where = where
        self._sources = tuple(space.sources.values())
        self._second: RoutedModel | None = None

    def of_level(self, level: int, pool: Mapping[str, Recipe]) -> LiveModel:
        """The model of a level.

        Args:
            level: 0 for the first, 1 for the second.
            pool: See `second`.

        Returns:
            The model, loaded when it is first needed.
        """
        return self.second(pool) if level else self.first

    @cached_property
    def first(self) -> LiveModel:
        """The first level's model."""
        placement = self._placement
        dtype, device = placement.dtype, placement.device
        allow_mismatch = placement.allow_mismatch
        if self._space.routed:
            return RoutedModel(
                self._sources, dtype, device, allow_mismatch=allow_mismatch
            )
        model = ResidentModel(
            self._space.base,
            self._sources,
            dtype,
            device,
            allow_mismatch,
            sources_on_device=self._where() == "device",
        )
        if placement.tokenizer_source or placement.chat_template:
            # All recipes of a study have one tokenizer.
            first = next(iter(self._space.baselines().values()))
            model.use_tokenizer_of(placement.apply(self._space.recipe(first)))
        return model

    def second(self, pool: Mapping[str, Recipe]) -> RoutedModel:
        """The second level's model.

        It shares the tensors of the first level's model, which may be gigabytes.

        Args:
            pool: Name -> recipe of the first level's merges that it takes from. A study has one
                pool.

        Returns:
            The model.
        """
        if self._second is None:
            self._second = RoutedModel(
                self._sources,
                self._placement.dtype,
                self._placement.device,
                pool,
                self.first.checkpoints,
                self._placement.allow_mismatch,
            )
        return self._second

    @cached_property
    def weights_key(self) -> str:
        """Identifies the weights that the names of the models stand for."""
        models = (self._space.base, *self._sources)
        digests = " ".join(digest(model) for model in models)
        weights_digest = hashlib.sha256(digests.encode())
        return weights_digest.hexdigest()[:16]

    def load(self, model: LiveModel, recipe: Recipe) -> Candidate:
        """Merge a recipe into one of the models.

        Args:
            model: `first`, or a `second`.
            recipe: A recipe of its level.

        Returns:
            What evaluators score; it is valid until the next recipe is loaded.

        Raises:
            ParetoMergeError: The recipe cannot be merged.
        """
        merged = model.load(recipe)
        # A recipe names its models. Caches also need to know which weights those names stand for,
        # since a model may be trained again in the same folder.
        key = f"{recipe.key} {self.weights_key}"
        return Candidate(merged.model, model.tokenizer, merged.facts, key)
