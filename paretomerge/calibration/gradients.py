"""Mean squared gradients of single examples: the diagonal of the empirical Fisher information."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from paretomerge.calibration.text import Tokens
from paretomerge.merging.live.names import loading_layout

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def trained_parameters(
    model: "PreTrainedModel", tensors: Sequence[str]
) -> dict[str, nn.Parameter]:
    """Find the parameters of a model that are in a checkpoint as they are.

    Args:
        model: The loaded model.
        tensors: The names of all tensors of its checkpoint.

    Returns:
        Name in the checkpoint -> parameter. Tied tensors are there once.
    """
    by_name = dict(model.named_parameters())
    found: dict[str, nn.Parameter] = {}
    for tensor, loaded in loading_layout(model, tensors).renamed.items():
        if loaded in by_name:
            found[tensor] = by_name[loaded]
    return found


def measure_squares(
    model: "PreTrainedModel",
    parameters: Mapping[str, nn.Parameter],
    examples: Sequence[Tokens],
    memory: int,
) -> Iterator[tuple[str, Tensor]]:
    """Measure the mean over the examples of (d log p(answer | prompt) / d theta)^2.

    The square is of each example's own gradient. That of a batch's sum is something else: gradients
    of different examples cancel. Labels are those of the text (the empirical Fisher information;
    the true one draws them from the model).

    Args:
        model: The model, in eval mode.
        parameters: Name -> parameter.
        examples: The text.
        memory: Bytes that the squares may take at a time; the text is read once for every few
            parameters.

    Yields:
        Each name and its squares, of the shape of the parameter, in float32.
    """
    was_trained = {name: p.requires_grad for name, p in model.named_parameters()}
    try:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for part in _parts(parameters, memory):
            yield from _squares_of(model, part, examples)
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(was_trained[name])


def _squares_of(
    model: "PreTrainedModel",
    part: Mapping[str, nn.Parameter],
    examples: Sequence[Tokens],
) -> Iterator[tuple[str, Tensor]]:
    for parameter in part.values():
        parameter.requires_grad_(True)
    sums = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in part.items()}
    for example in examples:
        loss = answer_loss(model, example)
        gradients = torch.autograd.grad(
            loss, list(part.values()), allow_unused=True, materialize_grads=True
        )
        for name, gradient in zip(part, gradients, strict=True):
            sums[name].add_(gradient.float().square_())
    for parameter in part.values():
        parameter.requires_grad_(False)
    for name in part:
        yield name, sums.pop(name).div_(len(examples))


def answer_loss(model: "PreTrainedModel", example: Tokens) -> Tensor:
    """-log p(answer | prompt), the sum over the tokens of the answer."""
    ids = torch.tensor([example.ids], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0]
    # The logits at a token are those of the next one.
    predicted = logits[example.start - 1 : -1].float()
    targets = ids[0, example.start :]
    return nn.functional.cross_entropy(predicted, targets, reduction="sum")


def _parts(
    parameters: Mapping[str, nn.Parameter], memory: int
) -> Iterator[dict[str, nn.Parameter]]:
    """Parameters whose squares and gradients fit into memory together."""
    part: dict[str, nn.Parameter] = {}
    size = 0
    for name, parameter in parameters.items():
        # The squares in float32, and the gradient.
        bytes_of_one = parameter.numel() * (4 + parameter.element_size())
        if part and size + bytes_of_one > memory:
            yield part
            part, size = {}, 0
        part[name] = parameter
        size += bytes_of_one
    if part:
        yield part
