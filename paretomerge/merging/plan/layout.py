"""Lays out a plan: walks over the modules and slices of a recipe and makes one job per tensor."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from paretomerge.checkpoint.adapter import AdaptedCheckpoint
from paretomerge.checkpoint.architecture import (
    DEFAULT_MODULE,
    LANGUAGE_MODULE,
    Architecture,
)
from paretomerge.checkpoint.chat_template import resolve_chat_template
from paretomerge.checkpoint.companions import companion_files, weights_in
from paretomerge.checkpoint.loaded_names import loaded_names
from paretomerge.checkpoint.operand import FLOAT_DTYPES
from paretomerge.checkpoint.vocabulary import Vocabulary, merge_vocabularies
from paretomerge.errors import CheckpointError, ErrorCollector, RecipeError
from paretomerge.merging.plan.belonging import find_mismatch
from paretomerge.merging.plan.calibration import check_statistics
from paretomerge.merging.plan.layer_places import check_layer_places
from paretomerge.merging.plan.opened_recipe import (
    OpenedRecipe,
    models_to_open,
    name_at_layer_0,
)
from paretomerge.merging.plan.plan import LayerRef, Plan, TensorJob, TensorRef, Weights
from paretomerge.merging.plan.slices import (
    CompleteSlice,
    complete_slice,
    without_layer_ranges,
)
from paretomerge.merging.plan.tensor_jobs import (
    SourceLayers,
    TensorJobBuilder,
    copy_job,
)
from paretomerge.recipe import Module

_WHOLE_MODEL = None
"""Stands for the one module of a recipe without `modules`."""

_MAX_NAMES_IN_NOTE = 3


def lay_out(
    opened: OpenedRecipe, notes: tuple[str, ...], allow_nan: bool = False
) -> Plan:
    """Make the plan of a recipe whose models are open. Only headers and configs are read.

    Args:
        opened: The recipe with its models.
        notes: Notes to put into the plan, before those that are found here.
        allow_nan: True if NaN and infinite weights are merged like others.

    Returns:
        The plan, with its config checked.

    Raises:
        ParetoMergeError: All that is wrong with the recipe and the headers, in one error.
    """
    recipe = opened.recipe
    # Each part below collects its errors, so that a user sees all of them at once.
    problems = ErrorCollector()
    vocabulary = None
    with problems.collect():
        vocabulary = _merge_vocabulary(opened)
    copied = _copied_files(opened, problems)
    dtype = recipe.out_dtype or recipe.dtype
    modules = _named_modules(opened, problems)
    jobs: list[TensorJob] = []
    route: list[LayerRef] = []
    lacking: dict[str, set[str]] = {}
    for name, content in modules.items():
        with problems.collect():
            module = _lay_out_module(opened, name, content, dtype, vocabulary)
            jobs += module.jobs
            route += module.route
            for model, names in module.lacking.items():
                lacking.setdefault(model, set()).update(names)
    left_out = {model: _left_out(opened, model) for model in recipe.models}
    with problems.collect():
        _check_left_out(opened, left_out)
    mismatch_notes: list[str] = []
    with problems.collect():
        mismatch_notes = _check_belonging(opened)
    if recipe.modules:
        jobs += _copy_other_modules(opened, modules, dtype, vocabulary)
    # Jobs in the order of names: the result does not depend on the order of slices and modules.
    jobs.sort(key=attrgetter("name"))
    plan = Plan(
        recipe=recipe,
        method=opened.method,
        weights={model: opened.weights[model] for model in models_to_open(recipe)},
        jobs=tuple(jobs),
        dtype=dtype or opened.template.dtype,
        route=tuple(route),
        vocabulary=vocabulary,
        notes=(
            *notes,
            *mismatch_notes,
            *_notes_of_resized_vocabulary(opened),
            *_notes_of_lacking_tensors(opened, lacking),
            *_notes_of_left_out_tensors(opened, left_out),
            *_notes_of_copied_weights(opened, copied),
        ),
        untied=any(_is_untied(opened, job.name) for job in jobs),
        allow_nan=allow_nan,
        statistics=opened.statistics,
    )
    with problems.collect():
        # A plan from headers alone may lack what a later one checks.
        if not problems and plan.method.statistics and _has_all_statistics(plan):
            plan = replace(plan, notes=(*plan.notes, *check_statistics(plan)))
    with problems.collect():
        # The config is made once here, so that its errors are reported with the others. It would
        # only add consequences of errors that are known already.
        if not problems:
            _ = plan.config
            check_layer_places(plan)
    problems.raise_if_any()
    return plan


def _has_all_statistics(plan: Plan) -> bool:
    """Whether the statistics of every source are open."""
    assert plan.statistics is not None
    for job in plan.jobs:
        models = {ref.model for ref in job.sources}
        if not job.copy and not models <= plan.statistics.by_model.keys():
            return False
    return True


class _ModuleLayout(NamedTuple):
    """What one module adds to a plan.

    Attributes:
        jobs: One job per tensor of the module.
        route: For each layer of the module, the layer that its config entries are copied from.
        lacking: Model -> names of tensors that it lacks and that are copied from the template.
    """

    jobs: list[TensorJob]
    route: list[LayerRef]
    lacking: dict[str, set[str]]


def _lay_out_module(
    opened: OpenedRecipe,
    name: str | None,
    content: Module,
    dtype: str | None,
    vocabulary: Vocabulary | None,
) -> _ModuleLayout:
    """Lay out the module `name` of the template, or the whole model."""
    architecture = opened.architecture
    # Of a multimodal model, only the layers of the language module can be stacked.
    has_layers = name in (_WHOLE_MODEL, opened.language_module)
    if name is not None and not has_layers:
        content = without_layer_ranges(opened, name, content)
    slices = _complete_slices(opened, content)
    starts_at_0 = slices[0].sources[0].first_layer == 0
    keeps_layers = starts_at_0 and len(slices) == 1
    keeps_all_layers = keeps_layers and slices[0].depth == architecture.depth
    if not keeps_layers and len(architecture.main_stacks) > 1:
        raise RecipeError(
            "slices: the layers of this architecture cannot be stacked, because it has several "
            "stacks of layers; list whole models under `models`"
        )
    problems = ErrorCollector()
    builder = TensorJobBuilder(
        opened=opened,
        parameters=content.parameters,
        dtype=dtype,
        vocabulary=vocabulary,
        problems=problems,
    )
    names = architecture.names
    if name is not None:
        names = architecture.modules[name]
    if has_layers:
        names = (*names, *_untied_heads(opened))
    for tensor in names:
        # A multi-token predictor after the last layer fits only layers in their own order.
        is_dropped = architecture.is_beyond_depth(tensor) and not keeps_all_layers
        if architecture.layer(tensor) is None and not is_dropped:
            _add_outside_layers(builder, slices, tensor)
    route: list[LayerRef] = []
    if has_layers and architecture.depth:
        for piece in slices:
            route += _add_layers(builder, piece, first_result_layer=len(route))
    builder.raise_if_any()
    return _ModuleLayout(builder.jobs, route, builder.lacking)


def _complete_slices(opened: OpenedRecipe, content: Module) -> list[CompleteSlice]:
    problems = ErrorCollector()
    slices = []
    for i, piece in enumerate(content.slices):
        with problems.collect():
            complete = complete_slice(opened, piece, where=f"slices[{i}]")
            slices.append(complete)
    problems.raise_if_any()
    return slices


def _add_outside_layers(
    builder: TensorJobBuilder, slices: Sequence[CompleteSlice], name: str
) -> None:
    """Add a tensor before or after the layers: an embedding, the final norm, the LM head."""
    # As in mergekit, embeddings take the models and parameters of the first slice, the others take
    # those of the last one.
    is_first = builder.opened.architecture.is_embedding(name)
    piece = slices[0] if is_first else slices[-1]
    builder.add(piece, name, name, SourceLayers.outside_layers(piece))


def _add_layers(
    builder: TensorJobBuilder, piece: CompleteSlice, first_result_layer: int
) -> list[LayerRef]:
    """Add the layers of a slice; returns the layer that each layer's config follows."""
    opened = builder.opened
    first_model = piece.sources[0].model
    base_model = piece.base_model or opened.recipe.base_model
    base_start = piece.first_layer_of(base_model)
    template_start = piece.first_layer_of(opened.template_name)
    starts = [source.first_layer for source in piece.sources]
    last = piece.depth - 1
    route = []
    for i in range(piece.depth):
        layers = SourceLayers(
            base=base_start + i,
            sources=tuple(start + i for start in starts),
            # mergekit's rule: the only layer of a slice takes the last value of a gradient.
            depth=i / last if last > 0 else 1.0,
        )
        config_layer = LayerRef(first_model, starts[0] + i)
        for name in _names_in_layer(opened, template_start + i, config_layer):
            result_name = opened.architecture.at_layer(name, first_result_layer + i)
            builder.add(piece, result_name, name, layers)
        route.append(config_layer)
    return route


def _names_in_layer(
    opened: OpenedRecipe, template_layer: int, fallback: LayerRef
) -> list[str]:
    """Names, at layer 0, of the tensors in a layer of the template."""
    architecture, layer = opened.architecture, template_layer
    # Sources may be deeper than the template.
    if layer not in architecture.by_layer:
        architecture = opened.weights[fallback.model].architecture
        layer = fallback.layer
    return [architecture.at_layer(name, 0) for name in architecture.by_layer[layer]]


def _copy_other_modules(
    opened: OpenedRecipe,
    named: Collection[str | None],
    dtype: str | None,
    vocabulary: Vocabulary | None,
) -> list[TensorJob]:
    """Jobs that copy the template's tensors of all modules that the recipe does not name."""
    jobs = []
    for name in opened.architecture.names:
        if opened.architecture.module(name) in named:
            continue
        ref = TensorRef(opened.template_name, name)
        result_dtype = opened.header(ref).dtype
        if dtype is not None and result_dtype in FLOAT_DTYPES:
            result_dtype = dtype
        shape = opened.merged_shape(ref, vocabulary)
        job = copy_job(name, shape, result_dtype, ref)
        jobs.append(job)
    return jobs


def _named_modules(
    opened: OpenedRecipe, problems: ErrorCollector
) -> dict[str | None, Module]:
    """The template's modules that the recipe names, with what it says of them."""
    recipe = opened.recipe
    if not recipe.modules:
        return {_WHOLE_MODEL: Module(recipe.slices)}
    modules: dict[str | None, Module] = {}
    for alias, content in recipe.modules.items():
        with problems.collect():
            name = opened.architecture.find_module(alias)
            if name in modules:
                raise RecipeError(
                    f"modules: {alias!r} is the module {name!r}, which is listed twice"
                )
            modules[name] = content
    return modules


def _copied_files(opened: OpenedRecipe, problems: ErrorCollector) -> list[Path]:
    """The files that are copied after the merge, which are checked now."""
    recipe = opened.recipe
    files: list[Path] = []
    with problems.collect():
        files = companion_files(opened.template.folder)
    if recipe.chat_template:
        with problems.collect():
            resolve_chat_template(recipe.chat_template, _folders(opened))
    return files


def _folders(opened: OpenedRecipe) -> dict[str, Path]:
    folders = {}
    for model in models_to_open(opened.recipe):
        folders[model] = opened.weights[model].tokenizer_folder
    return folders


def _merge_vocabulary(opened: OpenedRecipe) -> Vocabulary | None:
    """The merged vocabulary, if the recipe asks for one."""
    recipe = opened.recipe
    tokenizer = recipe.tokenizer
    source = tokenizer.source if tokenizer else recipe.tokenizer_source
    if source is None:
        return None
    folders = _folders(opened)
    rows = {model: _embedding_rows(model, opened.weights[model]) for model in folders}
    base = recipe.base_model
    tokens = tokenizer.tokens if tokenizer else {}
    multiple = tokenizer.pad_to_multiple_of if tokenizer else None
    if tokens:
        return merge_vocabularies(source, folders, rows, base, tokens, multiple)
    models = []
    for model, folder in folders.items():
        models.append(_VocabularyOf(model, folder, rows[model], _files_of(folder)))
    return _vocabulary(source, tuple(models), base, multiple)


class _VocabularyOf(NamedTuple):
    """A model as its vocabulary goes into a merge.

    Its files are named with their times and sizes, which tell when one has been changed.
    """

    model: str
    folder: Path
    n_rows: int
    files: tuple[tuple[str, int, int], ...]


def _files_of(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Name, time and size of each file that may describe a tokenizer."""
    files = []
    for path in sorted(folder.iterdir()):
        # A link of a cache may lead nowhere.
        if path.suffix != ".safetensors" and path.is_file():
            status = path.stat()
            files.append((path.name, status.st_mtime_ns, status.st_size))
    return tuple(files)


# Remembered: all merges of a study have one vocabulary. With three models of 100,000 tokens and
# small weights, loading a merge takes 0.05 s in place of 0.48 s. Few are held, as each is large.
@lru_cache(4)
def _vocabulary(
    source: str,
    models: tuple[_VocabularyOf, ...],
    base: str | None,
    pad_to_multiple_of: int | None,
) -> Vocabulary:
    """`merge_vocabularies` without rules for single tokens, and with arguments that have a hash."""
    folders = {one.model: one.folder for one in models}
    rows = {one.model: one.n_rows for one in models}
    return merge_vocabularies(
        source, folders, rows, base, pad_to_multiple_of=pad_to_multiple_of
    )


def _embedding_rows(model: str, weights: Weights) -> int:
    """Rows of a model's input embedding."""
    architecture = weights.architecture
    sizes = [
        header.shape[0]
        for name, header in weights.headers.items()
        if architecture.is_vocabulary(name, header.shape)
    ]
    if not sizes:
        raise CheckpointError(
            f"{model}: found no embedding with a row per token, so vocabularies cannot be merged; "
            "leave out `tokenizer_source`"
        )
    return max(sizes)


def _untied_heads(opened: OpenedRecipe) -> list[str]:
    """LM heads that the template ties to its embedding and another model has of its own.

    The result gets a head of its own, too.
    """
    heads: dict[str, None] = {}
    for model in opened.recipe.models:
        for name in opened.weights[model].architecture.names:
            if _is_untied(opened, name):
                heads[name] = None
    return list(heads)


def _is_untied(opened: OpenedRecipe, name: str) -> bool:
    """Whether the template ties a tensor to its embedding and another model has it of its own."""
    if opened.is_tied_head(name):
        return True
    if name in opened.template.headers:
        return False
    models = opened.recipe.models
    return any(name in opened.weights[model].architecture.separated for model in models)


def _notes_of_left_out_tensors(
    opened: OpenedRecipe, left_out: Mapping[str, Sequence[str]]
) -> list[str]:
    """Notes on tensors that sources have and the template lacks."""
    notes = []
    for model, names in left_out.items():
        if names:
            lacking = f"{len(names)} kinds of tensors that {opened.template_name} lacks"
            notes.append(f"{model}: {lacking} are left out: {_shown(names)}")
    return notes


def _notes_of_resized_vocabulary(opened: OpenedRecipe) -> list[str]:
    """A note on tokens that only the template's adapter has, where no tokenizer is merged."""
    template, recipe = opened.template, opened.recipe
    if not isinstance(template, AdaptedCheckpoint) or template.resized is None:
        return []
    if recipe.tokenizer or recipe.tokenizer_source:
        return []
    name = opened.template_name
    return [
        f"{name}: the adapter changes the number of tokens to {template.resized}; "
        f"`tokenizer_source: {name}` writes the tokenizer in its folder, not the model's"
    ]


def _notes_of_lacking_tensors(
    opened: OpenedRecipe, lacking: Mapping[str, Collection[str]]
) -> list[str]:
    notes = []
    for model, names in lacking.items():
        taken = f"{len(names)} kinds of tensors that it lacks are taken from"
        notes.append(
            f"{model}: {taken} {opened.template_name}: {_shown(sorted(names))}"
        )
    return notes


def _notes_of_copied_weights(opened: OpenedRecipe, copied: Sequence[Path]) -> list[str]:
    files = [
        str(path.relative_to(opened.template.folder)) for path in weights_in(copied)
    ]
    if not files:
        return []
    return [f"{opened.template_name}: copied and not merged: {_shown(files)}"]


def _left_out(opened: OpenedRecipe, model: str) -> list[str]:
    """Names, at layer 0, of the tensors of a model that the template has no place for."""
    architecture = opened.architecture
    template_names = {
        name_at_layer_0(name, architecture) for name in architecture.names
    }
    names = _names_at_layer_0(opened.weights[model].architecture)
    # A tied head or another prefix is only another name for a tensor that the template has.
    return [
        name
        for name in sorted(names - template_names)
        if opened.find_in_template(name) is None
    ]


def _shown(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_MAX_NAMES_IN_NOTE])
    return f"{shown}, ..." if len(names) > _MAX_NAMES_IN_NOTE else shown


def _check_left_out(
    opened: OpenedRecipe, left_out: Mapping[str, Sequence[str]]
) -> None:
    """Raise CheckpointError if a model computes with tensors that the template has no place for."""
    if opened.allow_mismatch:
        return
    problems = ErrorCollector()
    for model, names in left_out.items():
        kept = [name for name in names if not _may_be_left_out(opened, model, name)]
        if kept:
            with problems.collect():
                _raise_left_out(opened, model, kept)
            continue
        for name in names:
            if _is_declared_head(opened, name):
                with problems.collect():
                    _raise_lost_head(opened, name)
    problems.raise_if_any()


def _is_declared_head(opened: OpenedRecipe, name: str) -> bool:
    """Whether the template lacks a head of that name, which transformers expects there."""
    if not opened.architecture.lacks_head(name):
        return False
    loaded = loaded_names(opened.template.config)
    return loaded is not None and loaded.is_used(name)


def _raise_lost_head(opened: OpenedRecipe, name: str) -> None:
    raise CheckpointError(
        f"{opened.template_name} has no tensor {name!r}, but its config.json says that its head is "
        "a tensor of its own (tie_word_embeddings: false), so a result would load with a random "
        "head; download or save the model again"
    )


def _may_be_left_out(opened: OpenedRecipe, model: str, name: str) -> bool:
    """Whether a model's tensor may be left out: the rest computes the same, or another task."""
    if not opened.computes_with(model, name):
        return True
    architecture = opened.weights[model].architecture
    if architecture.module(name) in (LANGUAGE_MODULE, DEFAULT_MODULE):
        # Outside the layers there are heads for other tasks.
        return architecture.layer(name) is None
    # The other parts of a model that sees, where the template is a language model.
    return not opened.architecture.multimodal


def _check_belonging(opened: OpenedRecipe) -> list[str]:
    """Raise CheckpointError if a model does not belong to the template; returns notes."""
    recipe = opened.recipe
    problems = ErrorCollector()
    notes: list[str] = []
    for model in recipe.models:
        if model == opened.template_name:
            continue
        mismatch = find_mismatch(
            opened.template_name,
            opened.template,
            model,
            opened.weights[model],
            same_vocabulary=not (recipe.tokenizer or recipe.tokenizer_source),
        )
        notes += mismatch.notes
        if opened.allow_mismatch:
            notes += mismatch.errors
            continue
        with problems.collect():
            mismatch.raise_if_any()
    problems.raise_if_any()
    return notes


def _raise_left_out(opened: OpenedRecipe, model: str, names: Sequence[str]) -> None:
    architecture = opened.weights[model].architecture
    modules = dict.fromkeys(architecture.module(name) for name in names)
    kinds = "a tensor" if len(names) == 1 else f"{len(names)} kinds of tensors"
    module = f"module {', '.join(map(repr, modules))}"
    raise CheckpointError(
        f"{model} has {kinds} that {opened.template_name} lacks: {_shown(names)} ({module}); do "
        "the models come from one base? --allow-mismatch leaves such tensors out"
    )


def _names_at_layer_0(architecture: Architecture) -> set[str]:
    """One name per kind of tensor; multi-token predictors are left out without a note."""
    names = set()
    for name in architecture.names:
        if not architecture.is_beyond_depth(name):
            names.add(name_at_layer_0(name, architecture))
    return names
