"""What is checked before a Twin-Merging folder is made: the architecture and the tensors."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from paretomerge.checkpoint.companions import tokenizer_files
from paretomerge.checkpoint.loaded_names import loaded_names
from paretomerge.checkpoint.operand import FLOAT_DTYPES, read_tensor
from paretomerge.errors import CheckpointError
from paretomerge.evaluate.inference.prefill import supports_cache
from paretomerge.merging.plan.plan import Plan, Weights
from paretomerge.systems.twin.exclusive import LowRank, Part, Parts, Whole
from paretomerge.systems.twin.model import TwinModel, hidden_size
from paretomerge.systems.twin.places import Places, find_places
from paretomerge.systems.twin.router import Router

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TRIAL_IDS = ((1, 2, 3, 4), (3, 1, 2, 2))
_TRIAL_WEIGHTS = ((0.7, 0.3), (-0.2, 1.1))
_TRIAL_SIZE = 0.05
_TOLERANCE = {torch.float32: 1e-3}
_COARSE_TOLERANCE = 0.1  # of dtypes with few bits, as a share of what the parts change


def check_models(plan: Plan) -> Places:
    """Check that the models of a plan can be one model with exclusive parts.

    Only configs and headers are read, and those tensors that no exclusive part can be added to.

    Args:
        plan: The merge that makes theta*.

    Returns:
        Where the tensors are in a loaded model.

    Raises:
        CheckpointError: The models are no causal language models, have no tokenizer, or differ in
            tensors that prompts cannot have weights of their own for.
    """
    base = plan.recipe.base_model
    loaded = loaded_names(plan.config)
    if loaded is None or not _is_causal(loaded.model):
        raise CheckpointError(
            f"{base}: Twin-Merging needs a causal language model that transformers has a class for"
        )
    if not supports_cache(loaded.model):
        raise CheckpointError(
            f"{base}: Twin-Merging needs a model with a key-value cache and position_ids, and "
            f"{type(loaded.model).__name__} has none"
        )
    if not tokenizer_files(plan.template.folder):
        raise CheckpointError(
            f"{base}: has no tokenizer, which the router needs; copy its files, such as "
            "tokenizer.json, into the folder"
        )
    places = find_places(loaded.model, [job.name for job in plan.jobs])
    _check_supported(plan, places)
    _check_tied(plan, places)
    return places


def _is_causal(model: "PreTrainedModel") -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    # Some models that see or hear are in that table, too.
    reads_text_alone = model.config.get_text_config() is model.config
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return reads_text_alone and type(model).__name__ in names


def _check_supported(plan: Plan, places: Places) -> None:
    """Check that the sources agree on tensors that no exclusive part can be added to."""
    unsupported = places.unsupported
    for job in plan.jobs:
        is_plain = job.dtype in FLOAT_DTYPES and len(job.shape) in (1, 2)
        if is_plain and job.name not in unsupported:
            continue
        for source in plan.recipe.models:
            if not _equals_base(plan, source, job.name):
                held_by = unsupported.get(job.name, f"a tensor of shape {job.shape}")
                raise CheckpointError(
                    f"{source}: changes {job.name} ({held_by}), which cannot have weights of its "
                    "own for each prompt; Twin-Merging changes linear layers, embeddings and norms"
                )


def _check_tied(plan: Plan, places: Places) -> None:
    """Check that tensors which the loaded model ties are equal in every checkpoint."""
    for first, *others in places.tied:
        for other in others:
            for model, weights in plan.weights.items():
                if not {first, other} <= set(weights.headers):
                    continue
                one = read_tensor(weights.operand(first))
                if not torch.equal(one, read_tensor(weights.operand(other))):
                    raise CheckpointError(
                        f"{model}: {first} differs from {other}, but the loaded model ties them; "
                        "set tie_word_embeddings in config.json to false if they are two"
                    )


def _equals_base(plan: Plan, source: str, name: str) -> bool:
    base = plan.template
    weights = plan.weights[source]
    if name not in weights.headers or name not in base.headers:
        return True
    return torch.equal(source_tensor(weights, name), source_tensor(base, name))


def source_tensor(weights: Weights, name: str) -> Tensor:
    """A whole tensor of a source, in float32 where it has decimals."""
    tensor = read_tensor(weights.operand(name))
    return tensor.float() if tensor.is_floating_point() else tensor


@torch.no_grad()
def check_computation(
    model: "PreTrainedModel", places: Places, names: Sequence[str]
) -> None:
    """Check that exclusive parts, added by hooks, do what changed weights would do.

    Every layer must be called, and two rows with random parts and different weights are compared
    with the model whose weights are changed, row by row. It shows an architecture that reads its
    weights past its layers, or mixes the rows of a batch. The model's weights change: use it for
    nothing afterwards.

    Args:
        model: The loaded model.
        places: Its layers.
        names: Names of all tensors of its checkpoint.

    Raises:
        CheckpointError: The results differ, or the model's are not finite.
    """
    parameters = _changeable(model, places)
    parts = [_random_parts(parameters, seed) for seed in (0, 1)]
    router = Router(hidden_size(model), len(parts))
    twin = TwinModel(model, router, ("one", "other"), parts, names)
    ids = torch.tensor(_TRIAL_IDS, device=model.device) % _vocabulary(model)
    weights = torch.tensor(_TRIAL_WEIGHTS)
    mask = torch.ones_like(ids)
    called = _watch_calls(model, places)
    plain = _finite(model(input_ids=ids, attention_mask=mask).logits)
    _check_called(model, places, called)
    tolerance = _TOLERANCE.get(model.dtype, _COARSE_TOLERANCE)
    mixed = _finite(twin(ids, mask, task_weights=weights, use_cache=False).logits)
    before = torch.zeros(len(parts))
    for row, of_row in enumerate(weights):
        # From the weights of the row before, since the model is changed in place.
        _add(parameters, parts, of_row - before)
        before = of_row
        expected = _finite(model(input_ids=ids[row : row + 1]).logits)
        effect = (expected - plain[row]).norm()
        error = (mixed[row] - expected[0]).norm()
        if error > tolerance * effect:
            raise CheckpointError(
                f"{type(model).__name__}: this architecture does not compute with its layers' "
                "weights alone, so Twin-Merging cannot change them for each prompt"
            )


def _changeable(model: "PreTrainedModel", places: Places) -> dict[str, Tensor]:
    """Name in the checkpoint -> the model's own tensor, of those that parts can be added to."""
    parameters: dict[str, Tensor] = {}
    for place in places.layers:
        for own_name, name in place.tensors.items():
            if place.kind != "other":
                path = f"{place.path}.{own_name}"
                parameters[name] = model.get_parameter(path)
    return parameters


def _finite(logits: Tensor) -> Tensor:
    """Logits in float32."""
    if not bool(logits.isfinite().all()):
        raise CheckpointError(
            "the logits of the shared model are NaN or infinite; take a smaller --weight"
        )
    return logits.float()


def _watch_calls(model: "PreTrainedModel", places: Places) -> set[str]:
    """The paths of layers, which fill up as the model calls them."""
    called: set[str] = set()

    def recorder(path: str) -> Callable[..., None]:
        def record(*_: object) -> None:
            called.add(path)

        return record

    for place in places.layers:
        layer = model.get_submodule(place.path)
        layer.register_forward_hook(recorder(place.path))
    return called


def _check_called(
    model: "PreTrainedModel", places: Places, called: Collection[str]
) -> None:
    for place in places.layers:
        if place.path not in called and place.kind != "other":
            raise CheckpointError(
                f"{type(model).__name__}: reads the weights of {place.path} without calling the "
                "layer, so Twin-Merging cannot change them for each prompt"
            )


def _add(
    parameters: Mapping[str, Tensor], parts: Sequence[Parts], weights: Tensor
) -> None:
    """Add the parts of each task to the model's own weights."""
    for name, parameter in parameters.items():
        for of_task, weight in zip(parts, weights.tolist(), strict=True):
            part = of_task[name].dense().to(parameter)
            parameter.add_(part, alpha=weight)


def _random_parts(parameters: Mapping[str, Tensor], seed: int) -> dict[str, Part]:
    generator = torch.Generator().manual_seed(seed)
    parts = {}
    for name, parameter in parameters.items():
        parts[name] = _random_part(parameter, generator)
    return parts


def _random_part(parameter: Tensor, generator: torch.Generator) -> Part:
    """A random part of a size that changes what a model computes, but not its nature."""
    size = _TRIAL_SIZE * float(parameter.float().square().mean().sqrt().clamp_min(0.1))
    dtype = parameter.dtype
    if parameter.dim() == 1:
        vector = size * torch.randn(parameter.shape, generator=generator)
        return Whole(vector.to(parameter))
    rows, columns = parameter.shape
    left = size * torch.randn((rows, 1), generator=generator)
    right = torch.randn((1, columns), generator=generator)
    device = parameter.device
    return LowRank(left.to(device, dtype), right.to(device, dtype))


def _vocabulary(model: "PreTrainedModel") -> int:
    return int(model.get_input_embeddings().weight.shape[0])
