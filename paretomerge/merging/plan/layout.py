"""Laying out a plan: which tensors of which layers of which models make each tensor of the result."""

import json
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from paretomerge.checkpoint.architecture import Architecture
from paretomerge.checkpoint.chat_template import resolve_chat_template
from paretomerge.checkpoint.operand import FLOAT_DTYPES
from paretomerge.checkpoint.reference import canonical_name
from paretomerge.checkpoint.tokenizer import tokenizer_files
from paretomerge.checkpoint.vocabulary import Vocabulary, merge_vocabularies
from paretomerge.errors import CheckpointError, ErrorCollector, RecipeError
from paretomerge.merging.methods import Method
from paretomerge.merging.plan.parameters import option_values, parameter_values
from paretomerge.merging.plan.plan import Pair, Plan, TensorJob, Weights
from paretomerge.recipe import Module, Recipe, Slice, Source


def needed(recipe: Recipe) -> tuple[str, ...]:
    """The models of a recipe, and one that only gives its tokenizer."""
    source = recipe.tokenizer.source if recipe.tokenizer else recipe.tokenizer_source
    return (
        recipe.models
        if source is None or source in ("union", "base", *recipe.models)
        else (*recipe.models, source)
    )


@dataclass(frozen=True)
class Layout:
    """A recipe whose method is known and whose models are open."""

    recipe: Recipe
    method: Method
    weights: Mapping[str, Weights]
    notes: tuple[str, ...]
    allow_nan: bool = False

    @property
    def template_name(self) -> str:
        return self.recipe.base_model or self.recipe.models[0]

    @cached_property
    def architecture(self) -> Architecture:
        return self.weights[self.template_name].architecture

    @cached_property
    def places(self) -> dict[str, str]:
        """What sources are put in order by: local folders by where they are, however a recipe spells that."""
        return {model: canonical_name(model) for model in self.recipe.models}

    @cached_property
    def shapes(self) -> Mapping[str, set[tuple[int, ...]]]:
        """Name, as of layer 0 -> the shapes that the template has there, in whichever layer."""
        found: dict[str, set[tuple[int, ...]]] = {}
        for name, header in self.weights[self.template_name].headers.items():
            found.setdefault(self._in_layer_0(name, self.architecture), set()).add(header.shape)
        return found

    def plan(self) -> Plan:
        dtype = self.recipe.out_dtype or self.recipe.dtype
        problems = ErrorCollector()
        jobs: list[TensorJob] = []
        route: list[tuple[str, int]] = []
        vocabulary = None
        with problems.collect():
            vocabulary = self._vocabulary()
        with problems.collect():
            tokenizer_files(
                self.weights[self.template_name].folder
            )  # what is copied at the end is looked at now
        with problems.collect():
            if self.recipe.chat_template:
                resolve_chat_template(
                    self.recipe.chat_template,
                    {model: self.weights[model].folder for model in needed(self.recipe)},
                )
        modules = self._modules(problems)
        for module, content in modules:
            with problems.collect():
                more, layers = self._module(module, content, dtype, vocabulary)
                jobs += more
                route += layers
        jobs += (
            self._rest({module for module, _ in modules}, dtype, vocabulary)
            if self.recipe.modules
            else []
        )
        ordered = tuple(sorted(jobs, key=lambda job: job.name))
        used = {model: self.weights[model] for model in needed(self.recipe)}
        untied = any(self.architecture.is_tied_head(job.name) for job in jobs)
        told = dtype or self.weights[self.template_name].dtype
        notes = (*self.notes, *self._left_out())
        plan = Plan(
            self.recipe,
            self.method,
            used,
            ordered,
            told,
            tuple(route),
            vocabulary,
            notes,
            untied,
            self.allow_nan,
        )
        with problems.collect():
            assert problems or plan.config
        problems.raise_if_any()
        return plan

    def _left_out(self) -> list[str]:
        """Notes of tensors that sources have and the template has not."""
        known = {self._in_layer_0(name, self.architecture) for name in self.architecture.names}
        notes = []
        for model in self.recipe.models:
            theirs = self.weights[model].architecture
            names = {
                self._in_layer_0(name, theirs)
                for name in theirs.names
                if not theirs.is_beyond_depth(name)
            }
            if more := sorted(
                n for n in names - known if self.architecture.find_equivalent(n) is None
            ):
                shown = ", ".join(more[:3]) + (", ..." if len(more) > 3 else "")
                notes.append(
                    f"{model}: {len(more)} kinds of tensors that {self.template_name} lacks are left out: {shown}"
                )
        return notes

    @staticmethod
    def _in_layer_0(name: str, architecture: Architecture) -> str:
        return name if architecture.layer(name) is None else architecture.at_layer(name, 0)

    def _modules(self, problems: ErrorCollector) -> list[tuple[str | None, Module]]:
        """What the recipe says of each module of the template; None stands for the whole model."""
        if not self.recipe.modules:
            return [(None, Module(self.recipe.slices))]
        found: list[tuple[str | None, Module]] = []
        for alias, content in self.recipe.modules.items():
            with problems.collect():
                module = self.architecture.find_module(alias)
                if module in dict(found):
                    raise RecipeError(
                        f"modules: expected each module once, got {alias!r}, which is {module!r}, again"
                    )
                found.append((module, content))
        return found

    def _module(
        self, module: str | None, content: Module, dtype: str | None, vocabulary: Vocabulary | None
    ) -> tuple[list[TensorJob], list[tuple[str, int]]]:
        problems = ErrorCollector()
        slices = []
        if module not in (None, self.language):
            content = self._whole(module, content)
        for i, piece in enumerate(content.slices):
            with problems.collect():
                slices.append(self._complete(piece, f"slices[{i}]"))
        problems.raise_if_any()
        builder = _Jobs(self, content.parameters, dtype, vocabulary, problems)
        names = self.architecture.names if module is None else self.architecture.modules[module]
        straight = len(slices) == 1 and (slices[0].sources[0].layer_range or (0, 0))[0] == 0
        if not straight and len(self.architecture.main_stacks) > 1:
            raise RecipeError(
                "slices: expected whole models, for the architecture has several stacks of layers; list them under `models`"
            )
        for name in (*names, *(self._untied_heads() if module in (None, self.language) else ())):
            if self.architecture.layer(name) is None and (
                straight or not self.architecture.is_beyond_depth(name)
            ):
                piece = slices[0] if self.architecture.is_embedding(name) else slices[-1]
                layers = [None] * (len(piece.sources) + 1)
                builder.add(piece, name, name, layers, 0.0)
        route: list[tuple[str, int]] = []
        if module in (None, self.language) and self.architecture.depth:
            for piece in slices:
                route += self._slice(builder, piece, len(route))
        problems.raise_if_any()
        return builder.jobs, route

    def _whole(self, module: str | None, content: Module) -> Module:
        """Only the language part is cut into layers; of the others, recipes may spell out the whole range."""
        inside = [
            s
            for s in self.architecture.stacks
            if self.architecture.module(f"{s.prefix}0.") == module
        ]
        whole = [None, *((0, stack.depth) for stack in inside)]
        for source in (source for piece in content.slices for source in piece.sources):
            if source.layer_range not in whole or len(content.slices) > 1:
                raise RecipeError(
                    f"modules.{module}: expected whole models, got layers {source.layer_range}; list them under `models`"
                )
        pieces = tuple(
            replace(p, sources=tuple(replace(s, layer_range=None) for s in p.sources))
            for p in content.slices
        )
        return replace(content, slices=pieces)

    @property
    def language(self) -> str:
        """The module whose layers are routed."""
        return self.architecture.module(self.architecture.prefix)

    def named(self, name: str, layer: int | None) -> str:
        return name if layer is None else self.architecture.at_layer(name, layer)

    def pair(self, model: str, name: str, layer: int | None) -> Pair | None:
        """What a model has for a tensor of the template, in a layer of its own."""
        found = self.weights[model].architecture.find_equivalent(self.named(name, layer))
        return None if found is None else (model, found)

    def _untied_heads(self) -> list[str]:
        """Heads that the template ties to its embedding and another source has of its own: the result has them, too."""
        others = (
            name for model in self.recipe.models for name in self.weights[model].architecture.names
        )
        return [name for name in dict.fromkeys(others) if self.architecture.is_tied_head(name)]

    def _slice(self, builder: "_Jobs", piece: Slice, out: int) -> list[tuple[str, int]]:
        """Jobs of the slice's layers, which are numbered from `out` on; the model and layer that each layer's config follows."""
        ranges = [s.layer_range or (0, 0) for s in piece.sources]
        listed = {
            s.model: r for s, r in zip(reversed(piece.sources), reversed(ranges), strict=True)
        }
        base = listed.get(piece.base_model or self.recipe.base_model or "", ranges[0])
        first, length = piece.sources[0].model, ranges[0][1] - ranges[0][0]
        route = []
        for i in range(length):
            t = i / (length - 1) if length > 1 else 1.0
            for name in self._layer_names(
                listed.get(self.template_name, ranges[0])[0] + i, first, ranges[0][0] + i
            ):
                builder.add(
                    piece,
                    self.architecture.at_layer(name, out + i),
                    name,
                    [base[0] + i, *(r[0] + i for r in ranges)],
                    t,
                )
            route.append((first, ranges[0][0] + i))
        return route

    def _layer_names(self, layer: int, first: str, first_layer: int) -> list[str]:
        """Names, as of layer 0, of the tensors in the template's layer; where it has no such layer, in the first source's."""
        owner = self.architecture
        if layer not in owner.by_layer:
            owner, layer = self.weights[first].architecture, first_layer
        return [owner.at_layer(name, 0) for name in owner.by_layer[layer]]

    def _complete(self, piece: Slice, where: str) -> Slice:
        """Layer ranges written out; the sources in the order and number that the method works on."""
        sources = []
        for source in piece.sources:
            depth = self.weights[source.model].architecture.depth
            first, end = source.layer_range or (0, depth)
            if end > depth:
                raise RecipeError(
                    f"{where}: {source.model}: expected layers below {depth}, got [{first}, {end})"
                )
            sources.append(Source(source.model, (first, end), source.parameters))
        if len({s.layer_range[1] - s.layer_range[0] for s in sources if s.layer_range}) > 1:
            depths = {s.model: self.weights[s.model].architecture.depth for s in sources}
            raise RecipeError(f"{where}: expected models of equal depth, got {depths}")
        base = piece.base_model or self.recipe.base_model
        listed = [s for s in sources if s.model != base]
        whole = all(s.layer_range is None for s in piece.sources)
        if base is not None and (
            self.method.base == "source" or (self.method.base == "optional" and whole)
        ):
            if len(listed) == len(
                sources
            ):  # as mergekit does: an unlisted base of `models` is a source without parameters
                sources.append(Source(base, sources[0].layer_range, {}))
            sources.sort(key=lambda s: s.model != base)
        count = len(listed if self.method.base in ("required", "reference") else sources)
        least, most = self.method.models
        if count < least or (most is not None and count > most):
            wanted = (
                f"{least}"
                if least == most
                else f"{least} or more"
                if most is None
                else f"{least} to {most}"
            )
            besides = " besides the base" if self.method.base == "required" else ""
            raise RecipeError(
                f"{where}: {self.method.name}: expected {wanted} models{besides}, got {count}"
            )
        return Slice(tuple(sources), piece.parameters, piece.base_model)

    def _rest(
        self, named: Container[str | None], dtype: str | None, vocabulary: Vocabulary | None
    ) -> list[TensorJob]:
        """Modules that the recipe does not name stay as they are in the template."""
        headers = self.weights[self.template_name].headers
        jobs = []
        for name in (
            n for n in self.architecture.names if self.architecture.module(n) not in named
        ):
            pair = (self.template_name, name)
            kept = dtype if dtype and headers[name].dtype in FLOAT_DTYPES else headers[name].dtype
            jobs.append(
                TensorJob(
                    name, _sized(self.weights, pair, vocabulary), kept, None, (pair,), copy=True
                )
            )
        return jobs

    def _vocabulary(self) -> Vocabulary | None:
        spec = self.recipe.tokenizer
        source = spec.source if spec else self.recipe.tokenizer_source
        if source is None:
            return None
        folders = {model: self.weights[model].folder for model in needed(self.recipe)}
        rows = {model: _vocabulary_rows(model, self.weights[model]) for model in folders}
        more = (spec.tokens, spec.pad_to_multiple_of) if spec else ({}, None)
        return merge_vocabularies(source, folders, rows, self.recipe.base_model, *more)


@dataclass
class _Jobs:
    """Jobs of one module as they are laid out; what is wrong with a tensor is noted and the next one looked at."""

    layout: "Layout"
    parameters: Mapping[str, Any]
    dtype: str | None
    vocabulary: Vocabulary | None
    problems: ErrorCollector

    def __post_init__(self) -> None:
        self.jobs: list[TensorJob] = []

    def add(
        self, piece: Slice, out: str, name: str, layers: Sequence[int | None], t: float
    ) -> None:
        """out: the tensor's name in the result; name: in the template, as of layer 0; layers: that of the base and of each
        source, None outside layers."""
        with self.problems.collect():
            self.jobs.append(self._job(piece, out, name, layers, t))

    def _job(
        self, piece: Slice, out: str, name: str, layers: Sequence[int | None], t: float
    ) -> TensorJob:
        layout, method = self.layout, self.layout.method
        base_model = piece.base_model or layout.recipe.base_model
        owner = base_model or piece.sources[0].model
        own = layout.pair(owner, name, layers[0 if base_model else 1])
        if own is None:
            raise CheckpointError(
                f"{owner}: expected a tensor {name!r}, got none; do the models come from one base?"
            )
        header = layout.weights[own[0]].headers[own[1]]
        dtype = self.dtype or header.dtype
        if header.dtype not in FLOAT_DTYPES:
            return TensorJob(out, header.shape, header.dtype, None, (own,), copy=True)
        deltas = method.base == "required" or (
            method.base == "reference" and base_model is not None
        )
        entries = []
        for source, layer in zip(piece.sources, layers[1:], strict=True):
            if deltas and source.model == base_model:
                continue
            pair = layout.pair(source.model, name, layer)
            if pair is None and layout.architecture.module(name) != layout.language:
                return TensorJob(out, header.shape, dtype, None, (own,), copy=True)
            if pair is None:
                raise CheckpointError(
                    f"{source.model}: expected a tensor {name!r}, got none; do the models come from one base?"
                )
            levels = (
                source.parameters,
                piece.parameters,
                self.parameters,
                layout.recipe.parameters,
            )
            tensor = layout.named(name, layer)
            entries.append(
                (pair, parameter_values(method, levels, tensor, t, f"{source.model}: {tensor}"))
            )
        if (
            method.symmetric
        ):  # one order for every listing: sums and random masks then agree bit for bit
            entries.sort(
                key=lambda entry: (
                    layout.places[entry[0][0]],
                    entry[0][1],
                    json.dumps(entry[1], sort_keys=True),
                )
            )
        pairs, parameters = tuple(p for p, _ in entries), tuple(k for _, k in entries)
        base = own if deltas else None
        options = option_values(
            method, (piece.parameters, self.parameters, layout.recipe.parameters), out, t
        )
        if method.check and (wrong := method.check(parameters, options)):
            raise RecipeError(f"{out}: {method.name}: {wrong}")
        return TensorJob(
            out,
            self._shape(out, name, pairs + ((base,) if base else ())),
            dtype,
            base,
            pairs,
            parameters,
            options,
        )

    def _shape(self, out: str, name: str, pairs: Sequence[Pair]) -> tuple[int, ...]:
        """The one shape of all inputs, which the result's config can hold: one that the template has in such a place."""
        weights = self.layout.weights
        shapes = [_sized(weights, pair, self.vocabulary) for pair in pairs]
        if len(set(shapes)) > 1:
            told = ", ".join(
                f"{model} {list(shape)}" for (model, _), shape in zip(pairs, shapes, strict=True)
            )
            tokens = (
                weights[pairs[0][0]].architecture.vocabulary_axis(pairs[0][1], shapes[0])
                is not None
            )
            cure = (
                "give `tokenizer_source: union` or `base`"
                if tokens
                else "do the models come from one base?"
            )
            raise CheckpointError(f"{out}: expected one shape, got {told}; {cure}")
        model, tensor = pairs[0]
        known = self.layout.shapes.get(name, {shapes[0]})
        axis = weights[model].architecture.vocabulary_axis(
            tensor, weights[model].headers[tensor].shape
        )
        if shapes[0] not in known and (self.vocabulary is None or axis is None):
            wanted = " or ".join(str(list(shape)) for shape in sorted(known))
            raise CheckpointError(
                f"{out}: expected {wanted}, as in {self.layout.template_name}, got {list(shapes[0])} of {model}"
            )
        return shapes[0]


def _sized(
    weights: Mapping[str, Weights], pair: Pair, vocabulary: Vocabulary | None
) -> tuple[int, ...]:
    """The shape of a tensor, in the merged vocabulary where there is one."""
    model, name = pair
    shape = weights[model].headers[name].shape
    axis = weights[model].architecture.vocabulary_axis(name, shape) if vocabulary else None
    return (
        shape
        if vocabulary is None or axis is None
        else (*shape[:axis], vocabulary.size, *shape[axis + 1 :])
    )


def _vocabulary_rows(model: str, weights: Weights) -> int:
    """Rows of the input embedding."""
    sizes = [
        h.shape[0]
        for name, h in weights.headers.items()
        if weights.architecture.is_vocabulary(name, h.shape)
    ]
    if not sizes:
        raise CheckpointError(
            f"{model}: expected an embedding with a row per token, got none; leave `tokenizer_source` out"
        )
    return max(sizes)
