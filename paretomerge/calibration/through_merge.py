"""RegMean++: statistics of each layer on what the merged layers below it put out.

Nguyen et al. 2025, arXiv 2508.03121, sec. 4. Embeddings are averaged. Then, layer by layer: the
layer of each source reads the hidden states of that source's text, and its inputs are measured; the
layer is merged; the merged layer takes the hidden states of all texts to the next one.

Layers run one by one, with the arguments that the model passes to them, such as masks and
positions. These are recorded in one pass over the whole model, for every layer: they differ between
layers in some families.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from paretomerge.calibration.inputs import (
    LinearLayer,
    SharedInput,
    find_shared_inputs,
    linear_layers,
    measure_inputs,
)
from paretomerge.calibration.text import Batch
from paretomerge.checkpoint.operand import InMemoryTensor
from paretomerge.errors import CheckpointError
from paretomerge.merging.block import Inputs
from paretomerge.merging.job_io import job_inputs
from paretomerge.merging.live.in_place import ResidentModel
from paretomerge.merging.live.matching import stack_path
from paretomerge.merging.live.names import loading_layout
from paretomerge.merging.methods import METHODS
from paretomerge.merging.plan.make import make_plan
from paretomerge.merging.plan.plan import Plan, TensorJob
from paretomerge.merging.statistics import Statistic
from paretomerge.recipe import Recipe, Slice, Source

_ONE_BY_ONE = (
    "its layers cannot be run one by one, which `regmean_pp` needs; use `regmean`"
)
_TOLERANCE = 1e-4  # relative to the largest hidden state


@dataclass
class _Text:
    """The text of one source, on its way through the layers.

    Attributes:
        batches: The tokens.
        states: The hidden states of each batch, into the next layer.
        arguments: For each batch, the other arguments of each layer.
    """

    batches: Sequence[Batch]
    states: list[Tensor] = field(default_factory=list)
    arguments: list[list["_Arguments"]] = field(default_factory=list)


@dataclass(frozen=True)
class _Arguments:
    """What a layer gets besides the hidden states."""

    positional: tuple[Any, ...]
    named: Mapping[str, Any]

    def run(self, layer: nn.Module, states: Tensor) -> Tensor:
        """Run a layer."""
        result = layer(states, *self.positional, **self.named)
        # Families differ in whether they return a tuple.
        output: Tensor = result[0] if isinstance(result, tuple) else result
        return output


@dataclass(frozen=True)
class _Measured:
    """The statistics of one input, for all sources."""

    shared: SharedInput
    grams: Mapping[str, Tensor]


class MergeWalk:
    """Merges sources layer by layer while it measures them.

    Args:
        base: The base.
        texts: Source -> its tokens.
        alpha: The factor of the entries off the diagonal.
        device: Where the layers run.

    Attributes:
        inputs: Which layers have one input, in the order of the forward pass.

    Raises:
        CheckpointError: The layers cannot be run one by one.
    """

    def __init__(
        self,
        base: str,
        texts: Mapping[str, Sequence[Batch]],
        alpha: float,
        device: str,
    ) -> None:
        self._live = ResidentModel(
            base,
            tuple(texts),
            dtype="float32",
            device=device,
            sources_on_device=False,
        )
        self._model = self._live.model
        self._alpha = alpha
        self._base = base
        self._plan = self._plan_of_mean(tuple(texts))
        self._live.load(self._plan.recipe)
        template = self._live.checkpoints[base]
        architecture = template.architecture
        if len(architecture.main_stacks) != 1:
            raise CheckpointError(f"{base}: {_ONE_BY_ONE}")
        path = stack_path(self._model, architecture)
        self._stack = list(self._model.get_submodule(path).children())
        names = list(template.headers)
        self._renamed = loading_layout(self._model, names).renamed
        self._state = self._model.state_dict()
        self._jobs = {job.name: job for job in self._plan.jobs}
        self._layer_of = {name: architecture.layer(name) for name in names}
        layers = linear_layers(self._model, names)
        first = next(iter(texts.values()))
        self.inputs = find_shared_inputs(layers, first[-1], self._forward)
        self._texts = {source: _Text(batches) for source, batches in texts.items()}
        for text in self._texts.values():
            self._record(text)

    def _plan_of_mean(self, sources: tuple[str, ...]) -> Plan:
        """The plan of the mean of the sources, which is what is not measured becomes."""
        listed = []
        for source in sources:
            listed.append(Source(source, parameters={"weight": 1 / len(sources)}))
        recipe = Recipe(
            "task_arithmetic",
            (Slice(tuple(listed)),),
            base_model=self._base,
            dtype="float32",
        )
        return make_plan(recipe, self._live.checkpoints)

    def _forward(self, batch: Batch) -> object:
        return self._model(**batch.model_inputs())

    def _record(self, text: _Text) -> None:
        """Record the hidden states into the first layer, and the arguments of all layers."""
        for number, batch in enumerate(text.batches):
            seen: list[tuple[Tensor, _Arguments]] = []
            outputs: list[Tensor] = []
            with _recorders(self._stack, seen, outputs), torch.no_grad():
                self._forward(batch)
            if len(seen) != len(self._stack):
                raise CheckpointError(f"{self._base}: {_ONE_BY_ONE}")
            states, _ = seen[0]
            text.states.append(states)
            text.arguments.append([arguments for _, arguments in seen])
            if number == 0:
                self._check_one_by_one(text, outputs[-1])

    def _check_one_by_one(self, text: _Text, expected: Tensor) -> None:
        """Refuse a model whose layers need more than their arguments."""
        states = text.states[0]
        mask = text.batches[0].mask.bool()
        try:
            with torch.no_grad():
                for layer, arguments in zip(
                    self._stack, text.arguments[0], strict=True
                ):
                    states = arguments.run(layer, states)
            difference = (states - expected)[mask].abs().max()
            largest = expected[mask].abs().max().clamp_min(1e-6)
            is_same = bool(difference <= _TOLERANCE * largest)
        # Layers of other families fail in ways of their own.
        except Exception as error:
            raise CheckpointError(f"{self._base}: {_ONE_BY_ONE}") from error
        if not is_same:
            raise CheckpointError(f"{self._base}: {_ONE_BY_ONE}")

    def measure(self) -> Iterator[_Measured]:
        """Measure and merge layer by layer.

        Yields:
            Each input and, for each source, its G with the entries off the diagonal multiplied by
            alpha.
        """
        for number, layer in enumerate(self._stack):
            inputs = self._inputs_of(number)
            grams = {}
            for source, text in self._texts.items():
                self._set(number, source)
                grams[source] = self._grams(inputs, text, number, layer)
            measured = []
            for shared in inputs:
                of_shared = {source: of[shared] for source, of in grams.items()}
                measured.append(_Measured(shared, of_shared))
            self._merge(number, measured)
            yield from measured
            for text in self._texts.values():
                self._advance(text, number, layer)
        # What is behind the layers, such as a head of its own, reads the merged states.
        behind = self._inputs_of(None)
        if behind:
            yield from self._measure_behind(behind)

    def name_in_source(self, source: str, tensor: str) -> str:
        """The name that a source has for a tensor of the base."""
        for ref in self._jobs[tensor].sources:
            if ref.model == source:
                return ref.name
        return tensor

    def _inputs_of(self, layer: int | None) -> list[SharedInput]:
        found = []
        for shared in self.inputs:
            if self._layer_of[shared.first.tensor] == layer:
                found.append(shared)
        return found

    def _grams(
        self, inputs: Sequence[SharedInput], text: _Text, number: int, layer: nn.Module
    ) -> dict[SharedInput, Tensor]:
        places = {id(batch): place for place, batch in enumerate(text.batches)}

        def run_layer(batch: Batch) -> object:
            place = places[id(batch)]
            return text.arguments[place][number].run(layer, text.states[place])

        return self._scaled(inputs, text.batches, run_layer)

    def _measure_behind(self, inputs: Sequence[SharedInput]) -> Iterator[_Measured]:
        grams = {}
        for source, text in self._texts.items():
            grams[source] = self._scaled(inputs, text.batches, self._forward)
        for shared in inputs:
            of_shared = {source: of[shared] for source, of in grams.items()}
            yield _Measured(shared, of_shared)

    def _scaled(
        self,
        inputs: Sequence[SharedInput],
        batches: Sequence[Batch],
        forward: Callable[[Batch], object],
    ) -> dict[SharedInput, Tensor]:
        if not inputs:
            return {}
        # The matrices of one layer are merged together, so they are in memory together.
        no_limit = 1 << 62
        scaled = {}
        for shared, gram in measure_inputs(inputs, batches, forward, no_limit):
            diagonal = gram.diagonal().clone()
            gram.mul_(self._alpha).diagonal().copy_(diagonal)
            scaled[shared] = gram
        return scaled

    def _set(self, number: int, source: str) -> None:
        """Give a layer the weights of a source."""
        for name, job in self._jobs_of(number):
            ref = next(ref for ref in job.sources if ref.model == source)
            operand = self._plan.operand(ref)
            rows = _n_rows(job)
            self._write(name, operand.rows(0, rows, self._live.device))

    def _merge(self, number: int, measured: Sequence[_Measured]) -> None:
        """Give a layer the merged weights."""
        statistics: dict[str, tuple[LinearLayer, Mapping[str, Tensor]]] = {}
        for entry in measured:
            for layer in entry.shared.layers:
                statistics[layer.tensor] = (layer, entry.grams)
        for name, job in self._jobs_of(number):
            inputs = job_inputs(self._plan, job, self._live.device)
            method = self._plan.method
            if name in statistics:
                layer, grams = statistics[name]
                inputs = _with_statistics(inputs, job, layer, grams)
                # What a recipe merges later with these statistics.
                method = METHODS["regmean_pp"]
            with torch.no_grad():
                merge_block = method.function(inputs)
                blocks = [merge_block(block) for block in inputs.blocks()]
                self._write(name, torch.cat(blocks))

    def _jobs_of(self, number: int) -> Iterator[tuple[str, TensorJob]]:
        for name in self._renamed:
            job = self._jobs[name]
            if self._layer_of[name] == number and not job.copy:
                yield name, job

    def _write(self, name: str, values: Tensor) -> None:
        loaded = self._renamed[name]
        target = self._state[loaded]
        target.copy_(values.view(target.shape))

    def _advance(self, text: _Text, number: int, layer: nn.Module) -> None:
        with torch.no_grad():
            for place, states in enumerate(text.states):
                arguments = text.arguments[place][number]
                text.states[place] = arguments.run(layer, states)


def _n_rows(job: TensorJob) -> int:
    rows = 1
    for size in job.shape[:-1]:
        rows *= size
    return rows


def _with_statistics(
    inputs: Inputs, job: TensorJob, layer: LinearLayer, grams: Mapping[str, Tensor]
) -> Inputs:
    """The inputs of the method regmean_pp for a tensor."""
    statistics = []
    for ref in job.sources:
        operand = InMemoryTensor(grams[ref.model])
        statistics.append(Statistic(operand, layer.of_rows))
    equal = [{"weight": 1.0} for _ in job.sources]
    return Inputs(
        name=inputs.name,
        shape=inputs.shape,
        base=inputs.base,
        sources=inputs.sources,
        parameters=equal,
        options={"lambda": 1.0, "normalize": True},
        device=inputs.device,
        is_matrix=inputs.is_matrix,
        statistics=tuple(statistics),
    )


@contextmanager
def _recorders(
    layers: Sequence[nn.Module],
    seen: list[tuple[Tensor, _Arguments]],
    outputs: list[Tensor],
) -> Iterator[None]:
    """Record what each layer gets, and what it puts out."""

    def before(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        named = dict(named)
        # Families differ in whether they pass the hidden states by position.
        if arguments:
            states, *others = arguments
        else:
            states, others = named.pop("hidden_states"), []
        seen.append((states, _Arguments(tuple(others), named)))

    def after(_: nn.Module, __: object, result: Any) -> None:
        outputs.append(result[0] if isinstance(result, tuple) else result)

    handles = []
    try:
        for layer in layers:
            handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(layer.register_forward_hook(after))
        yield
    finally:
        for handle in handles:
            handle.remove()
