"""Where transformers puts the tensors of a checkpoint when it loads them.

It renames some, packs others (the experts of a layer become one tensor), and splits or permutes
others again. It has no public interface for this, so this module uses its internals.
`tests/merging/live/test_names.py` fails if they change.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from paretomerge.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@dataclass(eq=False)
class Conversion:
    """Tensors of a checkpoint that transformers packs, splits or permutes together.

    Attributes:
        converter: transformers' own description of what it does.
        target: Name in the loaded model of what comes out; the first name, if there are several.
        members: Name in the checkpoint -> the pattern of transformers that it matches, in the order
            in which transformers reads them.
    """

    converter: Any  # Any: a class of transformers' internals
    target: str
    members: dict[str, str] = field(default_factory=dict)

    def apply(
        self, model: "PreTrainedModel", tensors: Mapping[str, "Tensor"]
    ) -> "dict[str, Tensor]":
        """Convert tensors as transformers does it when it loads them.

        Args:
            model: The loaded model.
            tensors: The members by their names in the checkpoint.

        Returns:
            The results by their names in the model's `state_dict`.
        """
        # A converter collects tensors, and is used up by one conversion.
        converter = copy.deepcopy(self.converter)
        for name, pattern in self.members.items():
            converter.add_tensor(self.target, name, pattern, tensors[name])
        converted = converter.convert(self.target, model=model, config=model.config)
        results = {}
        for name, result in converted.items():
            results[name] = result[0] if isinstance(result, list) else result
        return results


@dataclass(frozen=True)
class LoadingLayout:
    """What becomes of the tensors of a checkpoint in a loaded model.

    Attributes:
        renamed: Name in the checkpoint -> name in the model's `state_dict`, for tensors that stay
            as they are.
        conversions: What is done to the other tensors.
        unused: Names in the checkpoint that transformers does not read.
    """

    renamed: Mapping[str, str]
    conversions: tuple[Conversion, ...]
    unused: frozenset[str]


def loading_layout(model: "PreTrainedModel", names: Iterable[str]) -> LoadingLayout:
    """Find the tensors of a checkpoint in a loaded model.

    Args:
        model: The loaded model.
        names: The names of all tensors of a checkpoint of the model.

    Returns:
        Where each of them is.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    # This follows `convert_and_load_state_dict_in_model` step by step.
    changes = get_model_conversion_mapping(model)
    renamings = [change for change in changes if isinstance(change, WeightRenaming)]
    converters = [change for change in changes if isinstance(change, WeightConverter)]
    converter_of_pattern = {}
    for converter in converters:
        for pattern in converter.source_patterns:
            converter_of_pattern[pattern] = converter
    state = model.state_dict()
    prefix = model.base_model_prefix
    renamed: dict[str, str] = {}
    conversions: dict[str, Conversion] = {}
    unused: set[str] = set()
    # Experts are packed in the order in which transformers reads them.
    for name in sorted(names, key=dot_natural_key):
        loaded, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if loaded not in state and name in state:
            loaded, pattern = rename_source_key(name, [], [], prefix, state)
        if loaded not in state:
            unused.add(name)
        elif pattern is None:
            renamed[name] = loaded
        else:
            new = Conversion(converter_of_pattern[pattern], loaded)
            conversion = conversions.setdefault(loaded, new)
            conversion.members[name] = pattern
    return LoadingLayout(renamed, tuple(conversions.values()), frozenset(unused))


def names_in_model(model: "PreTrainedModel", names: Iterable[str]) -> dict[str, str]:
    """Find the tensors of a checkpoint in a loaded model that has each of them as it is.

    Args:
        model: The loaded model.
        names: Names of tensors in a checkpoint of the model.

    Returns:
        Name in the checkpoint -> name in the model's `state_dict`, without what transformers does
        not read.

    Raises:
        CheckpointError: If transformers changes a tensor when it loads it, for example because it
            packs several tensors into one.
    """
    layout = loading_layout(model, names)
    for conversion in layout.conversions:
        name = next(iter(conversion.members))
        raise CheckpointError(
            f"transformers packs or permutes {name} when it loads it, so routes through the layers "
            "of this architecture cannot be searched in memory; leave `space.routes` or `then` "
            "out to search its weights, or write routes with `paretomerge merge`"
        )
    return dict(layout.renamed)
