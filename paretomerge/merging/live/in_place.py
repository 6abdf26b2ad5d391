"""A live model whose weights are replaced in place by one merge after another."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from paretomerge.checkpoint.operand import (
    InMemoryTensor,
    Operand,
    matrix_shape,
    read_tensor,
)
from paretomerge.checkpoint.reader import Checkpoint
from paretomerge.errors import CheckpointError, RecipeError
from paretomerge.merging.block import CPU_BLOCK
from paretomerge.merging.engine import run
from paretomerge.merging.job_io import cast_block
from paretomerge.merging.live.loaded_tensors import LoadedTensors, StagedTensors
from paretomerge.merging.live.model import CachedWeights, LoadedMerge
from paretomerge.merging.live.model_class import load_model, load_tokenizer
from paretomerge.merging.live.result_tokenizer import (
    load_result_tokenizer,
    resize_to_vocabulary,
)
from paretomerge.merging.plan.make import make_plan, open_weights
from paretomerge.merging.plan.one_layout import arrange_like
from paretomerge.merging.plan.plan import Plan, TensorJob, TensorRef
from paretomerge.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Elements that are compared with the base's at a time, so that a tensor of the host never lies on
# the device as a whole. A multiple of CPU_BLOCK, which sums do not depend on then.
_PART = 1 << 24
_WRITE_IT_OUT = "write the merge to a folder with `paretomerge merge` instead"


class ResidentModel:
    """A loaded model whose tensors are overwritten by each recipe (a `LiveModel`).

    The sources stay in memory between merges, and the model is built once.

    Args:
        base: The checkpoint that gives the architecture and the reference of the sparsity.
        sources: The checkpoints to merge.
        dtype: The dtype of the loaded weights; by default the base's, so that scores equal those of
            the written checkpoint.
        device: cpu, cuda or cuda:N.
        allow_mismatch: Whether models are merged that do not seem to belong together.
        sources_on_device: Whether the base and the sources stay on the device. If not, they stay in
            their files, which are mapped into the memory of the host, and each merge moves them to
            the device block by block.
    """

    def __init__(
        self,
        base: str,
        sources: Sequence[str],
        dtype: str | None = None,
        device: str = "cpu",
        allow_mismatch: bool = False,
        sources_on_device: bool = True,
    ) -> None:
        opened = open_weights((base, *sources), mapped=True)
        self.checkpoints: dict[str, CachedWeights] = {}
        for name, weights in opened.items():
            # Once, and not for every merge: a model may store packed experts one by one.
            arranged = arrange_like(base, opened[base], name, weights)
            self.checkpoints[name] = CachedWeights(arranged, device, sources_on_device)
        self.base = base
        self.sources_on_device = sources_on_device
        self.sources = tuple(source for source in sources if source != base)
        self.device = device
        template = self.checkpoints[base]
        self.dtype = dtype or template.dtype
        model = load_model(template.folder, getattr(torch, self.dtype))
        self.model: PreTrainedModel = model.to(device).eval()
        # None for models that read no text.
        self.tokenizer: PreTrainedTokenizerBase | None = load_tokenizer(template.folder)
        self.allow_mismatch = allow_mismatch
        self._tensors = LoadedTensors(self.model, template.headers)
        self._check_untied()
        # A base may be a model with an adapter, which transformers has not loaded.
        plain = Checkpoint(str(template.folder))
        try:
            LoadedTensors(self.model, plain.headers).check_loaded(plain.tensor)
        except CheckpointError as error:
            raise CheckpointError(f"{base}: {error}") from error
        self._max_distance: float | None = None
        self._tokenizer_key: tuple[object, ...] = (None, None, None)
        # A plan with the merged vocabulary, and the tensors that were brought into it.
        self._resized: Plan | None = None
        self._resized_tensors: dict[TensorRef, InMemoryTensor] = {}

    def use_tokenizer_of(self, recipe: Recipe) -> None:
        """Give the model the vocabulary, the tokenizer and the chat template of a recipe.

        `load` does the same. Recipes with the same tokenizer share it.

        Args:
            recipe: A recipe with the base's architecture.
        """
        plan = make_plan(recipe, self.checkpoints, allow_mismatch=self.allow_mismatch)
        self._use_tokenizer(plan)

    def _use_tokenizer(self, plan: Plan) -> None:
        recipe = plan.recipe
        key = (recipe.tokenizer_source, recipe.tokenizer, recipe.chat_template)
        if key == self._tokenizer_key:
            return
        self.tokenizer = load_result_tokenizer(plan)
        resize_to_vocabulary(self.model, plan)
        # Resizing makes new tensors.
        self._tensors = LoadedTensors(self.model, self.checkpoints[self.base].headers)
        self._resized = plan if plan.vocabulary else None
        self._resized_tensors.clear()
        self._max_distance = None
        self._tokenizer_key = key

    def load(self, recipe: Recipe) -> LoadedMerge:
        """Overwrite every weight by the recipe's.

        The tensors are those that `merge` would write, bit for bit, if `dtype` is the recipe's.

        Args:
            recipe: A recipe with the base's architecture.

        Returns:
            The model with its facts. `sparsity` is minus the L1 norm of (merged - base) over that
            of the source farthest from the base, measured on the cast weights: the objective of
            MM-MO (Li et al. 2024, sec. 3.4) in units that do not depend on the model's size.

        Raises:
            RecipeError: If the result would have other tensors than the base.
            CheckpointError: If the recipe does not fit its models.
        """
        plan = make_plan(recipe, self.checkpoints, allow_mismatch=self.allow_mismatch)
        self._use_tokenizer(plan)
        self._check_same_tensors(plan)
        # A file that was written again is another model, and what is mapped would change with it.
        for weights in self.checkpoints.values():
            weights.check_unchanged()
        plan.check_unchanged()
        # One sum per tensor, so that its order does not depend on the order of the threads.
        names = [job.name for job in plan.jobs]
        distances = dict.fromkeys(names, 0.0)
        staged = StagedTensors(self._tensors)

        def write(job: TensorJob, start: int, block: torch.Tensor) -> None:
            is_staged = self._tensors.conversion(job.name) is not None
            out = None
            if job.name not in self._tensors.unused:
                flat = self._memory(job, staged)
                out = flat[start : start + block.numel()]
            merged = cast_block(plan, job, block, out).reshape(-1)
            distance = self._distance(merged, job.name, start)
            distances[job.name] += distance
            if is_staged:
                staged.written(job, block.numel())

        run(plan, write, device=self.device)
        total = sum(distances.values())
        sparsity = -total / self.max_distance
        return LoadedMerge.from_plan(plan, self.model, sparsity=sparsity)

    def _check_same_tensors(self, plan: Plan) -> None:
        """Raise RecipeError if a plan's result cannot be written into the loaded model."""
        layers = len(plan.route)
        depth = self.checkpoints[self.base].architecture.depth
        if layers != depth:
            raise RecipeError(
                f"The recipe gives {layers} layers, but the base has {depth}; {_WRITE_IT_OUT}"
            )
        for job in plan.jobs:
            if self._expected_shape(job.name) != tuple(job.shape):
                shape = list(job.shape)
                raise RecipeError(
                    f"{job.name}: the base has no such tensor of shape {shape}; {_WRITE_IT_OUT}"
                )
        left_out = self._tensors.not_written(job.name for job in plan.jobs)
        if left_out:
            # It would keep the values of an earlier merge.
            raise RecipeError(
                f"{left_out[0]}: the recipe gives no such tensor, but the base has one; "
                f"{_WRITE_IT_OUT}"
            )
        # A tied head is the embedding's memory, so it cannot hold other values.
        if plan.untied:
            raise RecipeError(
                "The recipe gives an LM head of its own, but the base ties it to the embedding; "
                f"{_WRITE_IT_OUT}"
            )

    def _expected_shape(self, name: str) -> tuple[int, ...] | None:
        """The shape that a merged tensor must have; None if there is no such tensor."""
        # The model's own tensor has the rows of a merged vocabulary, the base's file has not.
        tensor = self._tensors.find(name)
        if tensor is not None:
            return tuple(tensor.shape)
        header = self.checkpoints[self.base].headers.get(name)
        return None if header is None else tuple(header.shape)

    def _check_untied(self) -> None:
        """Raise RecipeError if the base needs two tensors where the loaded model has one."""
        template = self.checkpoints[self.base]
        for name in template.architecture.separated:
            tensor = self._tensors.find(name)
            for other_name in template.headers:
                other = self._tensors.find(other_name)
                if tensor is None or other is None or other_name == name:
                    continue
                if other.data_ptr() == tensor.data_ptr():
                    raise RecipeError(
                        f"{self.base}: {name} differs from {other_name}, but the loaded model "
                        f"ties them; {_WRITE_IT_OUT}"
                    )

    def _memory(self, job: TensorJob, staged: StagedTensors) -> torch.Tensor:
        """Flat memory for a merged tensor: the model's own, or that of tensors that wait."""
        tensor = self._tensors.find(job.name)
        if tensor is None:
            return staged.memory(job, self.device)
        return tensor.view(-1)

    @property
    def max_distance(self) -> float:
        """L1 distance of the base to the source farthest from it; 1 if all are equal to it."""
        if self._max_distance is None:
            distances = [self._source_distance(source) for source in self.sources]
            # 1 instead of 0: if nothing differs from the base, every merge has the sparsity 0.
            self._max_distance = max(distances, default=0.0) or 1.0
        return self._max_distance

    def _source_distance(self, source: str) -> float:
        names = self.checkpoints[self.base].headers
        architecture = self.checkpoints[source].architecture
        total = 0.0
        for name in names:
            source_name = architecture.find_equivalent(name)
            # What a source lacks stays as it is in the base.
            if source_name is None:
                continue
            operand = self._operand(source, source_name)
            n_elements = math.prod(operand.shape)
            for start in range(0, n_elements, _PART):
                end = min(start + _PART, n_elements)
                part = self._flat_part(operand, start, end)
                total += self._distance(part, name, start)
        return total

    def distance(self, tensor: torch.Tensor, name: str) -> float:
        """Measure how far a tensor is from the base's.

        Args:
            tensor: A tensor of the shape of the base's, on the device.
            name: The tensor's name in the base.

        Returns:
            The L1 distance.
        """
        flat = tensor.reshape(-1)
        return self._distance(flat, name, start=0)

    def _distance(self, flat: torch.Tensor, name: str, start: int) -> float:
        """L1 distance of a flat part of a tensor, which begins at `start`, to the base's."""
        end = start + flat.numel()
        flat_base = self._flat_part(self._operand(self.base, name), start, end)
        # Sums by blocks have the same order for any number of threads, and so the same rounding.
        blocks = torch.split(flat, CPU_BLOCK)
        base_blocks = torch.split(flat_base, CPU_BLOCK)
        total = 0.0
        for part, base_part in zip(blocks, base_blocks, strict=True):
            # bfloat16 would round the difference.
            difference = part.to(torch.float32) - base_part.to(torch.float32)
            l1 = difference.abs().sum(dtype=torch.float64)
            total += l1.item()
        return total

    def _flat_part(self, operand: Operand, start: int, end: int) -> torch.Tensor:
        """Elements [start, end) of a flat tensor on the device, without a copy if they are there.

        A tensor that stays on the host is moved part by part.
        """
        if isinstance(operand, InMemoryTensor):
            return operand.tensor.view(-1)[start:end].to(self.device)
        columns = max(matrix_shape(operand.shape)[1], 1)
        first = start // columns
        rows = operand.rows(first, -(-end // columns), self.device)
        offset = first * columns
        return rows.view(-1)[start - offset : end - offset]

    def _operand(self, model: str, name: str) -> Operand:
        """A model's tensor, in the merged vocabulary where there is one."""
        operand = self.checkpoints[model].operand(name)
        if self._resized is None:
            return operand
        architecture = self.checkpoints[model].architecture
        if architecture.vocabulary_axis(name, operand.shape) is None:
            return operand
        ref = TensorRef(model, name)
        if ref not in self._resized_tensors:
            dtype = getattr(torch, operand.dtype)
            resized = read_tensor(self._resized.operand(ref))
            place = self.device if self.sources_on_device else "cpu"
            tensor = resized.to(place, dtype)
            self._resized_tensors[ref] = InMemoryTensor(tensor)
        return self._resized_tensors[ref]
