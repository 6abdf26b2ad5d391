"""From a recipe to jobs: all meaning checked against headers before a weight is read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from paretomerge.checkpoint.reader import Checkpoint
from paretomerge.errors import CheckpointError, RecipeError, unknown
from paretomerge.merge.methods import METHODS, Method
from paretomerge.recipe import Recipe, Slice, Source, settings


@dataclass(frozen=True)
class Job:
    """One output tensor: which tensors of which models make it, with what settings.

    `base` and `sources` are (model, tensor name) pairs; `knobs` has one entry per source.
    """

    name: str
    shape: tuple[int, ...]
    base: tuple[str, str] | None
    sources: tuple[tuple[str, str], ...]
    knobs: tuple[Mapping[str, Any], ...]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Plan:
    """A recipe that has been understood: every job, and the checkpoints that they read."""

    recipe: Recipe
    method: Method
    checkpoints: Mapping[str, Checkpoint]
    jobs: tuple[Job, ...]
    dtype: str
    route: tuple[tuple[str, int], ...]
    """For each output layer the model and layer that its config entries follow."""

    @property
    def template(self) -> Checkpoint:
        """The model whose config the result follows."""
        return self.checkpoints[self.recipe.base_model or self.recipe.models[0]]


def open_checkpoints(models: Sequence[str], already: Mapping[str, Checkpoint] | None = None) -> dict[str, Checkpoint]:
    """Open each model that is not open `already`."""
    already = already or {}
    return {model: already[model] if model in already else Checkpoint(model) for model in models}


def make_plan(recipe: Recipe, checkpoints: Mapping[str, Checkpoint] | None = None) -> Plan:
    """Check the recipe against the table of methods and the models' headers, and lay out the work.

    checkpoints: models that are open already, by the name that the recipe uses.
    """
    if recipe.merge_method not in METHODS:
        raise RecipeError(f"merge_method: {unknown('method', recipe.merge_method, METHODS)}")
    method = METHODS[recipe.merge_method]
    _check_names(recipe, method)
    opened = open_checkpoints(recipe.models, checkpoints)
    if recipe.tokenizer_source not in (None, "base", *recipe.models):
        raise RecipeError(
            f"tokenizer_source: expected base or one of the recipe's models, got {recipe.tokenizer_source!r}; "
            "`union` is not there yet: the models must share one vocabulary"
        )
    slices = tuple(_complete(piece, recipe, method, opened, i) for i, piece in enumerate(recipe.slices))
    jobs, route = _lay_out(recipe, method, slices, opened)
    template = opened[recipe.base_model or recipe.models[0]]
    dtype = recipe.out_dtype or recipe.dtype or template.dtype
    return Plan(recipe, method, opened, tuple(jobs), dtype, tuple(route))


def _check_names(recipe: Recipe, method: Method) -> None:
    """Parameters that the method does not have, or that stand where it does not look for them."""
    known = {knob.name for knob in method.knobs}
    whole = {knob.name for knob in method.knobs if not knob.per_source}
    levels: list[tuple[str, Mapping[str, Any]]] = [("parameters", recipe.parameters)]
    for i, piece in enumerate(recipe.slices):
        levels.append((f"slices[{i}].parameters", piece.parameters))
        levels += [(f"{source.model}: parameters", source.parameters) for source in piece.sources]
    for where, parameters in levels:
        for name in parameters:
            if name in whole and where.endswith(": parameters"):
                raise RecipeError(f"{where}: `{name}` holds for the whole merge; move it to the top level's `parameters`")
            if name not in known:
                raise RecipeError(f"{where}: {unknown(f'parameter of {method.name}', name, known or ['none'])}")
    if method.base in ("required", "source") and recipe.base_model is None:
        raise RecipeError(f"{method.name}: expected `base_model`, got none")


def _complete(piece: Slice, recipe: Recipe, method: Method, opened: Mapping[str, Checkpoint], index: int) -> Slice:
    """Layer ranges written out; the sources in the order and number that the method works on."""
    sources = []
    for source in piece.sources:
        depth = opened[source.model].architecture.depth
        first, end = source.layer_range or (0, depth)
        if end > depth:
            raise RecipeError(f"slices[{index}]: {source.model}: expected layers below {depth}, got [{first}, {end})")
        sources.append(Source(source.model, (first, end), source.parameters))
    lengths = {s.layer_range[1] - s.layer_range[0] for s in sources if s.layer_range}
    if len(lengths) > 1:
        depths = {s.model: opened[s.model].architecture.depth for s in sources}
        raise RecipeError(f"slices[{index}]: expected models of equal depth, got {depths}")
    base = recipe.base_model
    if method.base == "required":
        sources = [s for s in sources if s.model != base]
    elif base is not None and method.base in ("source", "optional"):
        if all(s.model != base for s in sources):  # as mergekit does: an unlisted base is a source without parameters
            sources.append(Source(base, sources[0].layer_range, {}))
        sources.sort(key=lambda s: s.model != base)
    least, most = method.models
    if len(sources) < least or (most is not None and len(sources) > most):
        wanted = f"{least}" if least == most else f"{least} or more" if most is None else f"{least} to {most}"
        besides = " besides the base" if method.base == "required" else ""
        raise RecipeError(f"slices[{index}]: {method.name}: expected {wanted} models{besides}, got {len(sources)}")
    return Slice(tuple(sources), piece.parameters)


def _lay_out(
    recipe: Recipe, method: Method, slices: Sequence[Slice], opened: Mapping[str, Checkpoint]
) -> tuple[list[Job], list[tuple[str, int]]]:
    first_model = slices[0].sources[0].model
    architecture = opened[recipe.base_model or first_model].architecture
    jobs: list[Job] = []
    route: list[tuple[str, int]] = []
    for name in architecture.names:
        if architecture.layer(name) is None:
            piece = slices[0] if architecture.is_embedding(name) else slices[-1]
            jobs.append(_job(recipe, method, piece, opened, name, [name] * len(piece.sources), name, 0.0))
    pattern = [name for name in architecture.names if architecture.layer(name) == 0]
    out = 0
    for piece in slices:
        first, end = piece.sources[0].layer_range or (0, 0)
        for i in range(end - first):
            t = i / (end - first - 1) if end - first > 1 else 1.0
            layers = [s.layer_range[0] + i for s in piece.sources if s.layer_range]
            for name in pattern:
                inputs = [architecture.at_layer(name, layer) for layer in layers]
                base = architecture.at_layer(name, layers[0])
                jobs.append(_job(recipe, method, piece, opened, architecture.at_layer(name, out), inputs, base, t))
            route.append((piece.sources[0].model, layers[0]))
            out += 1
    return sorted(jobs, key=lambda job: job.name), route


def _job(
    recipe: Recipe,
    method: Method,
    piece: Slice,
    opened: Mapping[str, Checkpoint],
    name: str,
    inputs: Sequence[str],
    base: str,
    t: float,
) -> Job:
    pairs = tuple((source.model, tensor) for source, tensor in zip(piece.sources, inputs, strict=True))
    with_base = method.base == "required"
    base_pair = (recipe.base_model, base) if with_base and recipe.base_model else None
    shape = _one_shape(opened, pairs + ((base_pair,) if base_pair else ()))
    outer = (piece.parameters, recipe.parameters)
    knobs = []
    for source, tensor in zip(piece.sources, inputs, strict=True):
        where = f"{source.model}: {tensor}"
        levels = (source.parameters, *outer)
        knobs.append({k.name: _value(k, settings(levels, k.name, tensor, t), where) for k in method.knobs if k.per_source})
    # mergekit reads options of the whole merge below the sources' own parameters, never from them
    options = {k.name: _value(k, settings(outer, k.name, name, t), name) for k in method.knobs if not k.per_source}
    if method.name == "linear" and options["normalize"] and abs(sum(k["weight"] for k in knobs)) < 1e-8:
        raise RecipeError(f"{name}: linear: expected weights with a sum other than 0, got {[k['weight'] for k in knobs]}")
    return Job(name, shape, base_pair, pairs, tuple(knobs), options)


def _value(knob: Any, value: Any, where: str) -> Any:
    value = knob.default if value is None else value
    if value is None:
        raise RecipeError(f"{where}: expected a value for `{knob.name}`, which has no default; add it under `parameters`")
    if knob.choices:
        if value not in knob.choices:
            raise RecipeError(f"{where}: {knob.name}: expected one of {knob.choices}, got {value!r}")
    elif isinstance(knob.default, bool):
        if not isinstance(value, bool):
            raise RecipeError(f"{where}: {knob.name}: expected true or false, got {value!r}")
    elif isinstance(value, (bool, str)) or not knob.low <= value <= knob.high:
        raise RecipeError(f"{where}: {knob.name}: expected a number from {knob.low} to {knob.high}, got {value!r}")
    return value


def _one_shape(opened: Mapping[str, Checkpoint], pairs: Sequence[tuple[str, str]]) -> tuple[int, ...]:
    shapes = {}
    for model, tensor in pairs:
        if tensor not in opened[model].headers:
            raise CheckpointError(f"{model}: expected a tensor {tensor!r}, got none; do the models come from one base?")
        shapes[model] = opened[model].headers[tensor].shape
    if len(set(shapes.values())) > 1:
        told = ", ".join(f"{model} {list(shape)}" for model, shape in shapes.items())
        raise CheckpointError(f"{pairs[0][1]}: expected one shape, got {told}; do the models come from one base?")
    return next(iter(shapes.values()))
