"""theta(x) = theta* + sum_t g_t v_t inside a loaded model, with weights g of its own for each row.

No weight is copied: hooks add to what a layer computes. For a matrix y = W* x + sum_t g_t B_t A_t x
(Twin-Merging, Lu et al. 2024, arXiv 2406.15479, applied to a layer). That is exact for each row of
a batch, so rows need not be grouped by their weights.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from paretomerge.errors import EvaluationError
from paretomerge.systems.twin.exclusive import LowRank, Part, Parts
from paretomerge.systems.twin.places import LAYER_KINDS, Place

TaskWeights = Tensor
"""Weights of the tasks for each row of a batch, `(rows, T)`, in float32."""


class MixedMatrix(nn.Module):
    """sum_t g_t v_t of one matrix, applied without being built.

    Args:
        parts: A part for each task; None where the task adds nothing.
    """

    left: Tensor | None
    right: Tensor | None
    whole: Tensor | None
    owner: Tensor

    def __init__(self, parts: Sequence[Part | None]) -> None:
        super().__init__()
        left, right, owner, whole, whole_owner = [], [], [], [], []
        for task, part in enumerate(parts):
            if isinstance(part, LowRank):
                left.append(part.left)
                right.append(part.right)
                owner += [task] * part.left.shape[1]
            elif part is not None:
                whole.append(part.tensor)
                whole_owner.append(task)
        # The factors of all tasks side by side: one product of matrices for all of them.
        self.register_buffer("left", torch.cat(left, 1) if left else None)
        self.register_buffer("right", torch.cat(right, 0) if right else None)
        self.register_buffer("owner", torch.tensor(owner, dtype=torch.long))
        self.register_buffer("whole", torch.stack(whole) if whole else None)
        self._whole_owner = whole_owner

    def _whole_matrices(self) -> Iterator[tuple[int, Tensor]]:
        """Task -> its matrix, of those that are stored whole."""
        if self.whole is not None:
            yield from zip(self._whole_owner, self.whole, strict=True)

    def project(self, inputs: Tensor, weights: TaskWeights) -> Tensor:
        """sum_t g_t v_t x, for a matrix `(outputs, inputs)`; see `_multiply`."""
        return self._multiply(inputs, weights, transposed=True)

    def project_transposed(self, inputs: Tensor, weights: TaskWeights) -> Tensor:
        """sum_t g_t v_t^T x, for a matrix `(inputs, outputs)`; see `_multiply`."""
        return self._multiply(inputs, weights, transposed=False)

    def look_up(self, ids: Tensor, weights: TaskWeights) -> Tensor:
        """Rows of sum_t g_t v_t.

        Args:
            ids: Numbers of rows, `(rows, positions)`, or `(1, positions)` for all rows of the
                batch.
            weights: `(rows, T)`.

        Returns:
            `(rows, positions, columns)`.
        """
        total: Tensor | None = None
        n_dims = ids.dim() + 1
        if self.left is not None and self.right is not None:
            scale = _spread(weights[:, self.owner], n_dims, self.left.dtype)
            total = (self.left[ids] * scale) @ self.right
        for task, matrix in self._whole_matrices():
            scale = _spread(weights[:, task, None], n_dims, matrix.dtype)
            added = matrix[ids] * scale
            total = added if total is None else total + added
        assert total is not None, "a matrix without parts is not mixed"
        return total

    def _multiply(
        self, inputs: Tensor, weights: TaskWeights, *, transposed: bool
    ) -> Tensor:
        """Multiply inputs `(rows, positions, n)` by the mixed matrix or its transpose."""
        total: Tensor | None = None
        n_dims = inputs.dim()
        if self.left is not None and self.right is not None:
            first, second = self.left, self.right
            if transposed:
                first, second = self.right.T, self.left.T
            scale = _spread(weights[:, self.owner], n_dims, first.dtype)
            total = ((inputs @ first) * scale) @ second
        for task, matrix in self._whole_matrices():
            scale = _spread(weights[:, task, None], n_dims, matrix.dtype)
            added = (inputs @ (matrix.T if transposed else matrix)) * scale
            total = added if total is None else total + added
        assert total is not None, "a matrix without parts is not mixed"
        return total


class MixedVector(nn.Module):
    """sum_t g_t v_t of one tensor of one dimension.

    Args:
        parts: A part for each task; None where the task adds nothing.
    """

    rows: Tensor

    def __init__(self, parts: Sequence[Part | None]) -> None:
        super().__init__()
        first = next(part for part in parts if part is not None)
        nothing = torch.zeros_like(first.dense())
        rows = [nothing if part is None else part.dense() for part in parts]
        self.register_buffer("rows", torch.stack(rows))

    def mixed(self, weights: TaskWeights) -> Tensor:
        """`(rows, n)`, in float32."""
        return weights @ self.rows.float()


class Held:
    """The weights that the hooks add the exclusive parts with.

    Attributes:
        weights: `(rows, T)`; None for theta* alone.
    """

    def __init__(self) -> None:
        self.weights: TaskWeights | None = None
        self._lock = threading.RLock()

    @contextmanager
    def use(self, weights: TaskWeights | None) -> Iterator[None]:
        """Hold weights while a block runs. Another thread waits: the hooks are the model's."""
        with self._lock:
            before = self.weights
            self.weights = weights
            try:
                yield
            finally:
                self.weights = before


class Addition(nn.Module):
    """What the exclusive parts add to one layer.

    Args:
        place: The layer's tensors.
        parts: The parts of each task.
        held: Whose weights are used.
    """

    def __init__(self, place: Place, parts: Sequence[Parts], held: Held) -> None:
        super().__init__()
        self.kind = place.kind
        self.label = place.path
        self._held = held
        self.matrix: MixedMatrix | None = None
        self.vectors: dict[str, MixedVector] = {}
        for own_name, name in place.tensors.items():
            of_tasks = [of_task.get(name) for of_task in parts]
            given = [part for part in of_tasks if part is not None]
            if not given:
                continue
            if given[0].n_dims == 1:
                vector = MixedVector(of_tasks)
                self.vectors[own_name] = vector
                self.add_module(f"mixed_{own_name}", vector)
            else:
                self.matrix = MixedMatrix(of_tasks)

    @property
    def is_empty(self) -> bool:
        """Whether no task adds anything to the layer."""
        return self.matrix is None and not self.vectors

    def hook(
        self,
        layer: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        output: Tensor,
    ) -> Tensor:
        """A forward hook of the layer: its output with the exclusive parts.

        Raises:
            EvaluationError: The layer's input does not have the rows of the batch.
        """
        weights = self._held.weights
        if weights is None:
            return output
        inputs = args[0] if args else next(iter(kwargs.values()))
        self._check_rows(inputs, len(weights))
        if self.kind == "norm":
            return self._normalised(layer, inputs, weights)
        total = output
        if self.matrix is not None:
            total = total + self._product(layer, self.matrix, inputs, weights)
        for vector in self.vectors.values():
            mixed = vector.mixed(weights)
            total = total + _spread(mixed, output.dim(), output.dtype)
        return total

    def _product(
        self,
        layer: nn.Module,
        matrix: MixedMatrix,
        inputs: Tensor,
        weights: TaskWeights,
    ) -> Tensor:
        """What the exclusive parts of the layer's matrix add."""
        if self.kind == "linear":
            return matrix.project(inputs, weights)
        if self.kind == "conv1d":
            return matrix.project_transposed(inputs, weights)
        rows = matrix.look_up(inputs, weights)
        # Gemma's embeddings multiply what they look up.
        scale = getattr(layer, "embed_scale", None)
        return rows if scale is None else rows * scale

    def _normalised(
        self, layer: nn.Module, inputs: Tensor, weights: TaskWeights
    ) -> Tensor:
        """The layer's own computation, with a vector of parameters for each row."""
        parameters = {}
        for name, parameter in layer.named_parameters():
            rows = parameter.expand(len(weights), *parameter.shape)
            if name in self.vectors:
                mixed = self.vectors[name].mixed(weights)
                rows = (rows.float() + mixed).to(parameter.dtype)
            parameters[f"layer.{name}"] = rows
        call = _WithoutHooks(layer)

        def of_row(parameters: Mapping[str, Tensor], row: Tensor) -> Tensor:
            result: Tensor = functional_call(call, dict(parameters), (row,))
            return result

        result: Tensor = torch.vmap(of_row)(parameters, inputs)
        return result

    def _check_rows(self, inputs: Tensor, n_rows: int) -> None:
        """Check that the first dimension is that of the batch, so that rows get their weights."""
        if self.kind == "embedding":
            # Positions are looked up once for all rows.
            fits = inputs.dim() == 2 and inputs.shape[0] in (1, n_rows)
        else:
            fits = inputs.dim() >= 3 and inputs.shape[0] == n_rows
        if not fits:
            raise EvaluationError(
                f"{self.label}: this architecture gives the layer a batch of shape "
                f"{tuple(inputs.shape)}, in which the {n_rows} prompts cannot be told apart; "
                "Twin-Merging needs layers that read (rows, positions, features)"
            )


class _WithoutHooks(nn.Module):
    """Calls a layer's own `forward`, so that its hooks do not call themselves."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, inputs: Tensor) -> Tensor:
        forward: Callable[[Tensor], Tensor] = self.layer.forward
        return forward(inputs)


def attach(
    model: nn.Module, places: Sequence[Place], parts: Sequence[Parts], held: Held
) -> nn.ModuleList:
    """Put hooks on the layers of a loaded model.

    Args:
        model: The model of theta*.
        places: Its layers and their tensors.
        parts: The exclusive parts of each task.
        held: Whose weights the hooks use.

    Returns:
        The additions, which hold the parts and are to be moved between devices with the model.
    """
    additions = nn.ModuleList()
    for place in places:
        addition = Addition(place, parts, held)
        if addition.is_empty:
            continue
        assert place.kind in LAYER_KINDS
        layer = model.get_submodule(place.path)
        layer.register_forward_hook(addition.hook, with_kwargs=True)
        additions.append(addition)
    return additions


def _spread(of_rows: Tensor, n_dims: int, dtype: torch.dtype) -> Tensor:
    """`(rows, n)` as `(rows, 1, ..., 1, n)`, to be multiplied with a batch."""
    rows, n = of_rows.shape
    ones = [1] * (n_dims - 2)
    return of_rows.to(dtype).view(rows, *ones, n)
