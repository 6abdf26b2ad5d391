"""The one place for internals of transformers: names of tensors in a loaded model.

transformers renames some tensors of a checkpoint while it loads it, such as the head of GPT-NeoX,
and ties some to others. It has no public interface for these names.
`tests/checkpoint/test_adapter_live.py`, `tests/merging/test_layouts.py` and
`tests/merging/live/test_names.py` fail if the internals change.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from paretomerge.checkpoint.json_file import ReadOnlyJson

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Shape = tuple[int, ...]

_MAX_MODELS = 32


@dataclass(frozen=True, eq=False)
class PackedTensors:
    """Tensors of a checkpoint that transformers turns into others while it loads them.

    For example, it stacks the matrices of all experts, or cuts a matrix into three.

    Attributes:
        names: The names in the checkpoint, in the order that transformers reads them.
        patterns: For each name, the pattern of the conversion that it matches.
        first_loaded: Name in memory of the first tensor that comes out.
        converter: transformers' own conversion.
        model: The model, whose weights may have no memory.
    """

    names: tuple[str, ...]
    patterns: tuple[str, ...]
    first_loaded: str
    converter: Any
    model: "PreTrainedModel"

    def convert(self, tensors: "Sequence[torch.Tensor]") -> "dict[str, torch.Tensor]":
        """Convert tensors as transformers does.

        Args:
            tensors: One tensor for each of `names`.

        Returns:
            Name in memory -> tensor.
        """
        converter = deepcopy(self.converter)
        entries = zip(self.names, self.patterns, tensors, strict=True)
        for name, pattern, tensor in entries:
            converter.add_tensor(self.first_loaded, name, pattern, tensor)
        config = self.model.config
        converted = converter.convert(
            self.first_loaded, model=self.model, config=config
        )
        result = {}
        for loaded, tensor in converted.items():
            result[loaded] = tensor[0] if isinstance(tensor, list) else tensor
        return result


@dataclass(frozen=True)
class Arrangement:
    """What transformers makes of the tensors of a checkpoint. Others it does not use.

    Attributes:
        plain: Name in memory -> name in the checkpoint, for tensors that are loaded as they are.
        packed: Tensors that are loaded in another form.
    """

    plain: Mapping[str, str]
    packed: tuple[PackedTensors, ...]


@dataclass(frozen=True)
class LoadedNames:
    """The names of a model's tensors once transformers has loaded it.

    Attributes:
        model: The model.
        state: Name in the model's `state_dict` -> shape.
        tied: Name of a tied tensor -> name of the tensor whose memory it shares.
        renamings: transformers' own changes of names, in their order.
        packings: transformers' changes that pack several tensors into one.
        base_prefix: Name of the model without its head, which checkpoints leave out or add.
    """

    model: "PreTrainedModel"
    state: Mapping[str, Shape]
    tied: Mapping[str, str]
    renamings: Sequence[Any]
    packings: Sequence[Any]
    base_prefix: str

    @classmethod
    def of_model(cls, model: "PreTrainedModel") -> "LoadedNames":
        """Read the names of a loaded model."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming

        renamings: list[Any] = []
        packings: list[Any] = []
        for change in get_model_conversion_mapping(model):
            kind = renamings if isinstance(change, WeightRenaming) else packings
            kind.append(change)
        tensors = model.state_dict(keep_vars=True)
        return cls(
            model=model,
            state={name: tuple(tensor.shape) for name, tensor in tensors.items()},
            tied=dict(model.get_expanded_tied_weights_keys(all_submodels=True)),
            renamings=renamings,
            packings=packings,
            base_prefix=model.base_model_prefix,
        )

    def find(self, name: str) -> str | None:
        """Find the tensor that transformers loads from a name in a checkpoint.

        Returns:
            The name in the model's `state_dict`; None if transformers would not use the tensor, or
            packs it together with others.
        """
        return self._find(name, packings=())

    def keeps(self, name: str) -> bool:
        """Whether transformers' changes of stored names leave a name in memory as it is.

        peft applies them to the keys of adapters, which have the names in memory already.
        """
        from transformers.core_model_loading import rename_source_key

        # Some changes of names remember the names before.
        renamed, _ = rename_source_key(name, deepcopy(list(self.renamings)), [])
        return bool(renamed == name)

    def is_used(self, name: str) -> bool:
        """Whether transformers loads a tensor of that name, alone or packed with others."""
        return self._find(name, self.packings) is not None

    def _find(self, name: str, packings: Sequence[Any]) -> str | None:
        if name in self.state:
            return name
        from transformers.core_model_loading import rename_source_key

        renamed, _ = rename_source_key(name, list(self.renamings), list(packings))
        without_prefix = re.sub(rf"^{re.escape(self.base_prefix)}\.", "", renamed)
        with_prefix = f"{self.base_prefix}.{renamed}"
        for candidate in (renamed, without_prefix, with_prefix):
            if candidate in self.state:
                return candidate
        return None

    def by_loaded_name(self, names: Iterable[str]) -> dict[str, str]:
        """Return name in the loaded model -> name in the checkpoint."""
        result = {}
        for name in names:
            loaded = self.find(name)
            if loaded is not None:
                result[loaded] = name
        return result

    def arrange(self, names: Iterable[str]) -> "Arrangement":
        """Find out what transformers makes of the tensors of a checkpoint, as its loader does.

        Args:
            names: Names of all tensors in a checkpoint of the model.
        """
        from transformers.core_model_loading import dot_natural_key

        # Some changes of names remember the names before, so each checkpoint needs new ones.
        changes = (deepcopy(list(self.renamings)), deepcopy(list(self.packings)))
        pattern_owners = {}
        for packing in self.packings:
            for pattern in packing.source_patterns:
                pattern_owners[pattern] = packing
        plain: dict[str, str] = {}
        members: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for name in sorted(names, key=dot_natural_key):
            loaded, pattern = self._place(name, *changes)
            if loaded not in self.state:
                continue
            if pattern is None:
                plain.setdefault(loaded, name)
            else:
                members[loaded].append((name, pattern))
        packed = []
        for loaded, entries in members.items():
            converter = pattern_owners[entries[0][1]]
            entry = PackedTensors(
                names=tuple(name for name, _ in entries),
                patterns=tuple(pattern for _, pattern in entries),
                first_loaded=loaded,
                converter=converter,
                model=self.model,
            )
            packed.append(entry)
        return Arrangement(plain, tuple(packed))

    def _place(
        self, name: str, renamings: list[Any], packings: list[Any]
    ) -> tuple[str, str | None]:
        """Name in memory of a checkpoint's tensor, and the pattern of its packing if it has one."""
        from transformers.core_model_loading import rename_source_key

        prefix = {"base_model_prefix": self.base_prefix, "meta_state_dict": self.state}
        loaded, pattern = rename_source_key(name, renamings, packings, **prefix)
        if loaded not in self.state and name in self.state:
            loaded, pattern = rename_source_key(name, [], [], **prefix)
        return loaded, pattern

    def tied_group(self, loaded: str) -> tuple[str, ...]:
        """Return the loaded names that share one tensor, the owner first; () if not tied."""
        owner = self.tied.get(loaded, loaded)
        sharers = [name for name, source in self.tied.items() if source == owner]
        return (owner, *sharers) if sharers else ()


def loaded_names(config: ReadOnlyJson) -> LoadedNames | None:
    """Return the names in the model that transformers makes of a config.

    The model is built without memory for its weights.

    Args:
        config: config.json.

    Returns:
        The names; None if transformers has no class of its own for the config, for its code is
        never run from a model's folder.
    """
    return _loaded_names(json.dumps(config, sort_keys=True))


@lru_cache(_MAX_MODELS)
def _loaded_names(config_text: str) -> LoadedNames | None:
    # Imported here: transformers takes seconds to load, and most merges need no such names.
    import torch
    import transformers

    config = json.loads(config_text)
    model_type = config.get("model_type")
    if model_type not in transformers.CONFIG_MAPPING:
        return None
    try:
        made = transformers.CONFIG_MAPPING[model_type].from_dict(config)
        with torch.device("meta"):
            model = _model_class(config, made)(made)
        return LoadedNames.of_model(model)
    # Classes raise exceptions of any class for configs that they do not know.
    except Exception:
        return None


def _model_class(config: ReadOnlyJson, made: object) -> Any:
    import transformers

    for name in config.get("architectures") or ():
        named = getattr(transformers, str(name), None)
        if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
            return named
    return transformers.AutoModelForCausalLM._model_mapping[type(made)]
