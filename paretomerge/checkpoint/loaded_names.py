"""The one place for internals of transformers: names of tensors in a loaded model.

transformers renames some tensors of a checkpoint while it loads it, such as the head of GPT-NeoX,
and ties some to others. It has no public interface for these names.
`tests/checkpoint/test_adapter_live.py` and `tests/merging/live/test_names.py` fail if the internals
change.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from paretomerge.checkpoint.json_file import ReadOnlyJson

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MAX_MODELS = 32


@dataclass(frozen=True)
class LoadedNames:
    """The names of a model's tensors once transformers has loaded it.

    Attributes:
        state: The names in the model's `state_dict`.
        tied: Name of a tied tensor -> name of the tensor whose memory it shares.
        renamings: transformers' own changes of names, in their order.
        packings: transformers' changes that pack several tensors into one.
        base_prefix: Name of the model without its head, which checkpoints leave out or add.
    """

    state: frozenset[str]
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
        return cls(
            state=frozenset(model.state_dict(keep_vars=True)),
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
