"""Makes the job of one tensor: which tensors are merged into it, and with which parameters."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from paretomerge.checkpoint.operand import FLOAT_DTYPES
from paretomerge.checkpoint.vocabulary import Vocabulary
from paretomerge.errors import CheckpointError, ErrorCollector, RecipeError
from paretomerge.merging.plan.belonging import ONE_VOCABULARY
from paretomerge.merging.plan.opened_recipe import OpenedRecipe, Shape
from paretomerge.merging.plan.parameters import (
    evaluate_options,
    evaluate_source_parameters,
)
from paretomerge.merging.plan.plan import TensorJob, TensorRef
from paretomerge.merging.plan.slices import CompleteSlice, CompleteSource
from paretomerge.recipe import ParameterSetting
from paretomerge.types import Params


@dataclass(frozen=True)
class SourceLayers:
    """The layers that are merged into one layer of the result.

    Attributes:
        base: The layer of the base model; None outside the layers.
        sources: The layer of each source of the slice; None outside the layers.
        depth: Relative depth inside the slice, from 0 to 1, for gradients of parameters.
    """

    base: int | None
    sources: tuple[int | None, ...]
    depth: float

    @classmethod
    def outside_layers(cls, piece: CompleteSlice) -> "SourceLayers":
        """For tensors outside the layers: embeddings, the final norm, the LM head."""
        sources = tuple(None for _ in piece.sources)
        return cls(base=None, sources=sources, depth=0.0)


class _SourceTensor(NamedTuple):
    """A tensor to merge, with the parameters of its source."""

    ref: TensorRef
    parameters: Params


class _MissingTensorError(Exception):
    """A model has no tensor in place of one of the template."""

    def __init__(self, model: str, name: str) -> None:
        super().__init__(model, name)
        self.model = model
        self.name = name


class _UnequalShapesError(Exception):
    """The tensors of several models that would be merged differ in shape."""

    def __init__(self, name: str, shapes: str, cure: str) -> None:
        super().__init__(name, shapes, cure)
        self.name = name
        self.shapes = shapes
        self.cure = cure


@dataclass
class TensorJobBuilder:
    """Makes the jobs of one module and collects what is wrong with them.

    Attributes:
        opened: The recipe with its models.
        parameters: The module's parameters.
        dtype: The dtype of floating-point results; None for that of the base's or first model's
            tensor.
        vocabulary: The merged vocabulary, if the recipe asks for one.
        problems: Collects the errors, so that one error does not hide those of later tensors.
        jobs: The jobs made so far.
        lacking: Model -> names, at layer 0, of the tensors that it lacks and that are copied.
        missing: Model -> names of the tensors that it lacks and must have.
        unequal: Cure -> (name, shapes) of the tensors that it brings to one shape.
    """

    opened: OpenedRecipe
    parameters: Mapping[str, ParameterSetting]
    dtype: str | None
    vocabulary: Vocabulary | None
    problems: ErrorCollector
    jobs: list[TensorJob] = field(default_factory=list)
    lacking: dict[str, set[str]] = field(default_factory=dict)
    missing: dict[str, list[str]] = field(default_factory=dict)
    unequal: dict[str, list[tuple[str, str]]] = field(default_factory=dict)

    def add(
        self,
        piece: CompleteSlice,
        result_name: str,
        name: str,
        layers: SourceLayers,
    ) -> None:
        """Add the job of one tensor, or collect the error that prevents it.

        Args:
            piece: The slice that the tensor belongs to.
            result_name: The tensor's name in the result.
            name: The tensor's name in the template, at layer 0 if it is in a layer.
            layers: The layers of the models that are merged.
        """
        with self.problems.collect():
            try:
                job = self._make_job(piece, result_name, name, layers)
            except _MissingTensorError as error:
                self.missing.setdefault(error.model, []).append(error.name)
                return
            except _UnequalShapesError as error:
                entry = (error.name, error.shapes)
                self.unequal.setdefault(error.cure, []).append(entry)
                return
            self.jobs.append(job)

    def raise_if_any(self) -> None:
        """Raise what has been collected, with one error for all tensors of one cause.

        Raises:
            ParetoMergeError: If a job could not be made.
        """
        for model, names in self.missing.items():
            with self.problems.collect():
                raise _missing_tensors(self.opened, model, names)
        for cure, entries in self.unequal.items():
            with self.problems.collect():
                name, shapes = entries[0]
                also = f", and {len(entries) - 1} others differ" if entries[1:] else ""
                raise CheckpointError(
                    f"{name}: expected one shape, got {shapes}{also}; {cure}"
                )
        self.problems.raise_if_any()

    def _make_job(
        self,
        piece: CompleteSlice,
        result_name: str,
        name: str,
        layers: SourceLayers,
    ) -> TensorJob:
        method = self.opened.method
        reference = self._reference(piece, name, layers)
        header = self.opened.header(reference)
        # Integers and booleans cannot be averaged.
        if header.dtype not in FLOAT_DTYPES:
            return copy_job(result_name, header.shape, header.dtype, reference)
        dtype = self.dtype or header.dtype
        tensors = self._source_tensors(piece, name, layers)
        if tensors is None:
            return copy_job(result_name, header.shape, dtype, reference)
        # With one order for every listing of the sources, sums and random masks agree bit for bit.
        if method.symmetric:
            tensors.sort(key=self._sort_key)
        parameters = tuple(tensor.parameters for tensor in tensors)
        options = evaluate_options(
            method, self._levels(piece), result_name, layers.depth
        )
        mistake = method.check(parameters, options) if method.check else None
        if mistake:
            where = f"{result_name}: {method.name}"
            raise RecipeError(f"{where}: {mistake}")
        sources = tuple(tensor.ref for tensor in tensors)
        base = reference if self._merges_task_vectors(piece) else None
        inputs = [*sources, base] if base else sources
        return TensorJob(
            name=result_name,
            shape=self._check_shapes(result_name, name, inputs),
            dtype=dtype,
            base=base,
            sources=sources,
            parameters=parameters,
            options=options,
        )

    def _base_model(self, piece: CompleteSlice) -> str | None:
        return piece.base_model or self.opened.recipe.base_model

    def _merges_task_vectors(self, piece: CompleteSlice) -> bool:
        """Whether the method merges differences to the base, which is then no source."""
        base = self.opened.method.base
        has_base = self._base_model(piece) is not None
        return base == "required" or (base == "reference" and has_base)

    def _reference(
        self, piece: CompleteSlice, name: str, layers: SourceLayers
    ) -> TensorRef:
        """The tensor of the base, or else of the first source, that gives the dtype."""
        base_model = self._base_model(piece)
        if base_model:
            return self._require_tensor(base_model, name, layers.base)
        first_source = piece.sources[0]
        return self._require_tensor(first_source.model, name, layers.sources[0])

    def _source_tensors(
        self, piece: CompleteSlice, name: str, layers: SourceLayers
    ) -> list[_SourceTensor] | None:
        """The tensors of the slice's sources, in their order; None if they cannot be merged."""
        opened = self.opened
        skips_base = self._merges_task_vectors(piece)
        base_model = self._base_model(piece)
        tensors = []
        for source, layer in zip(piece.sources, layers.sources, strict=True):
            if skips_base and source.model == base_model:
                continue
            ref = opened.find_tensor(source.model, name, layer)
            # Filters match the name in the source's own layer.
            name_in_source = opened.name_at(name, layer)
            if ref is None and opened.may_lack(source.model, name_in_source):
                self.lacking.setdefault(source.model, set()).add(name)
                return None
            if ref is None:
                raise _MissingTensorError(source.model, name_in_source)
            parameters = self._source_parameters(
                piece, source, name_in_source, layers.depth
            )
            tensors.append(_SourceTensor(ref, parameters))
        return tensors

    def _source_parameters(
        self,
        piece: CompleteSlice,
        source: CompleteSource,
        tensor: str,
        depth: float,
    ) -> Params:
        levels = (source.parameters, *self._levels(piece))
        method = self.opened.method
        return evaluate_source_parameters(method, levels, source.model, tensor, depth)

    def _levels(
        self, piece: CompleteSlice
    ) -> tuple[Mapping[str, ParameterSetting], ...]:
        """Parameters for all sources, from the innermost level outwards."""
        return piece.parameters, self.parameters, self.opened.recipe.parameters

    def _sort_key(self, tensor: _SourceTensor) -> tuple[str, str, str]:
        # Not by the name in the recipe: two spellings of one path must give the same order.
        location = self.opened.locations[tensor.ref.model]
        parameters = json.dumps(tensor.parameters, sort_keys=True)
        return location, tensor.ref.name, parameters

    def _require_tensor(self, model: str, name: str, layer: int | None) -> TensorRef:
        ref = self.opened.find_tensor(model, name, layer)
        if ref is None:
            raise _MissingTensorError(model, self.opened.name_at(name, layer))
        return ref

    def _check_shapes(
        self, result_name: str, name: str, inputs: Sequence[TensorRef]
    ) -> Shape:
        """The one shape of all inputs of a job.

        Raises:
            _UnequalShapesError: If inputs differ in shape.
            CheckpointError: If the template has no tensor of that name and shape in any layer.
        """
        opened = self.opened
        shapes = []
        for ref in inputs:
            shape = opened.merged_shape(ref, self.vocabulary)
            shapes.append(shape)
        if len(set(shapes)) > 1:
            raise self._unequal_shapes(result_name, inputs, shapes)
        shape = shapes[0]
        first = inputs[0]
        # The config of the result follows the template, so it could not describe other shapes.
        allowed = opened.template_shapes.get(name, {shape})
        has_token_axis = opened.vocabulary_axis(first) is not None
        is_resized = has_token_axis and self.vocabulary is not None
        if shape not in allowed and not is_resized:
            listed = " or ".join(map(_shape_text, sorted(allowed)))
            expected = f"expected {listed}, as in {opened.template_name}"
            got = f"got {_shape_text(shape)} of {first.model}"
            raise CheckpointError(f"{result_name}: {expected}, {got}")
        return shape

    def _unequal_shapes(
        self, result_name: str, inputs: Sequence[TensorRef], shapes: Sequence[Shape]
    ) -> _UnequalShapesError:
        entries = []
        for ref, shape in zip(inputs, shapes, strict=True):
            entries.append(f"{ref.model} {_shape_text(shape)}")
        listed = ", ".join(entries)
        first = inputs[0]
        architecture = self.opened.weights[first.model].architecture
        axis = architecture.vocabulary_axis(first.name, shapes[0])
        if axis is not None and _differ_only_along(axis, shapes):
            cure = ONE_VOCABULARY
        else:
            cure = "do the models come from one base?"
        return _UnequalShapesError(result_name, listed, cure)


def copy_job(
    name: str,
    shape: Shape,
    dtype: str,
    source: TensorRef,
) -> TensorJob:
    """Return a job that copies a tensor without the method.

    Args:
        name: The tensor's name in the result.
        shape: The tensor's shape in the result.
        dtype: The tensor's dtype in the result.
        source: The tensor to copy.
    """
    return TensorJob(
        name=name,
        shape=shape,
        dtype=dtype,
        base=None,
        sources=(source,),
        copy=True,
    )


def _missing_tensors(
    opened: OpenedRecipe, model: str, names: Sequence[str]
) -> CheckpointError:
    # A tensor may be looked for once for each slice.
    distinct = tuple(dict.fromkeys(names))
    lacking = f"{model} has no tensor {distinct[0]!r}"
    if len(distinct) > 1:
        lacking += f" and {len(distinct) - 1} others of {opened.template_name}"
    if opened.architecture.multimodal:
        modules = dict.fromkeys(opened.architecture.module(name) for name in distinct)
        lacking += f" (module {', '.join(map(repr, modules))})"
    return CheckpointError(
        f"{lacking}; do the models come from one base? --allow-mismatch takes what sources lack "
        f"from {opened.template_name}"
    )


def _differ_only_along(axis: int, shapes: Sequence[Shape]) -> bool:
    """Whether shapes are equal apart from one axis."""
    return len({(*shape[:axis], *shape[axis + 1 :]) for shape in shapes}) == 1


def _shape_text(shape: Shape) -> str:
    return str(list(shape))
