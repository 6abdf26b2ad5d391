"""Layers that cannot stand at another place of the network.

Most models have layers of one or a few kinds, and the config says which comes where. In a few, such
as ModernBERT and RWKV, the code of the first layer differs from that of the others.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from paretomerge.checkpoint.architecture import Architecture
from paretomerge.checkpoint.loaded_names import LoadedNames, loaded_names
from paretomerge.errors import ErrorCollector, RecipeError
from paretomerge.merging.plan.opened_recipe import name_at_layer_0
from paretomerge.merging.plan.plan import Plan


@dataclass(frozen=True)
class _Misfit:
    """What transformers ignores of a checkpoint, and what it would make up.

    Attributes:
        ignored: Tensors of the checkpoint that the model does not use.
        missing: Tensors of the model that the checkpoint lacks, under their names in memory.
    """

    ignored: frozenset[str]
    missing: frozenset[str]


def check_layer_places(plan: Plan) -> None:
    """Check that each layer of a result fits its place in the network.

    transformers is asked only where layers move and have tensors of different kinds.

    Args:
        plan: A plan whose config can be made.

    Raises:
        RecipeError: transformers would ignore a tensor of a layer, or fill one with random values.
    """
    moved = [i for i, source in enumerate(plan.route) if source.layer != i]
    template = plan.template
    if not moved or _has_equal_layers(template.architecture, template.headers):
        return
    names = loaded_names(plan.config)
    usual_names = loaded_names(template.config)
    if names is None or usual_names is None:
        return
    stored = [job.name for job in plan.jobs]
    misfit = _find_misfit(names, stored)
    # What transformers ignores in the model as it is, such as predictors, is no fault.
    usual = _find_misfit(usual_names, template.headers)
    architecture = template.architecture
    in_memory = Architecture.infer(usual_names.state, template.config)
    problems = ErrorCollector()
    for i in moved:
        source = plan.route[i]
        ignored = _of_layer(i, architecture, misfit.ignored, usual.ignored)
        missing = _of_layer(i, in_memory, misfit.missing, usual.missing)
        with problems.collect():
            if ignored or missing:
                problem = f"would not use {ignored[0]}" if ignored else ""
                if missing:
                    problem = f"needs {missing[0]}, which that layer lacks"
                raise RecipeError(
                    f"layer {source.layer} of {source.model} cannot be layer {i} of the result: "
                    f"transformers {problem}; keep the layer at its place"
                )
    problems.raise_if_any()


def _has_equal_layers(architecture: Architecture, names: Iterable[str]) -> bool:
    """Whether all layers have tensors of the same names."""
    layers: dict[int, set[str]] = {}
    for name in names:
        layer = architecture.layer(name)
        if layer is not None:
            layers.setdefault(layer, set()).add(name_at_layer_0(name, architecture))
    kinds = list(layers.values())
    return all(kind == kinds[0] for kind in kinds)


def _find_misfit(names: LoadedNames, stored: Iterable[str]) -> _Misfit:
    stored = list(stored)
    arrangement = names.arrange(stored)
    used = set(arrangement.plain.values())
    loaded = set(arrangement.plain)
    for packed in arrangement.packed:
        used.update(packed.names)
        # A packing has one or several results; which ones, only the conversion itself tells.
        loaded.update(
            name for name in names.state if _is_beside(name, packed.first_loaded)
        )
    for name, owner in names.tied.items():
        if owner in loaded or name in loaded:
            loaded |= {name, owner}
    ignored = frozenset(stored) - used
    return _Misfit(ignored, frozenset(names.state) - loaded)


def _is_beside(name: str, other: str) -> bool:
    """Whether two tensors belong to one submodule."""
    return name.rpartition(".")[0] == other.rpartition(".")[0]


def _of_layer(
    layer: int,
    architecture: Architecture,
    names: Iterable[str],
    usual_names: Iterable[str],
) -> list[str]:
    """The names in a layer, without those that also occur, in any layer, in the model as it is."""
    usual_kinds = {name_at_layer_0(name, architecture) for name in usual_names}
    found = []
    for name in names:
        kind = name_at_layer_0(name, architecture)
        if architecture.layer(name) == layer and kind not in usual_kinds:
            found.append(name)
    return sorted(found)
