"""A merge recipe as frozen data.

    merge_method: ties
    base_model: ./base
    models:
      - model: ./order
        parameters: {weight: 0.7, density: 0.5}
      - model: ./scribe
        parameters: {weight: [0.2, 0.9]}           # a gradient over depth
    parameters:
      lambda: [{filter: mlp, value: 1.2}, {value: 1.0}]
    dtype: bfloat16

A recipe follows the grammar, and does not know methods, files or tensors: `merging.plan` checks it
against those. Two keys extend mergekit's grammar. `seed` is that of the random masks; mergekit has
it on its command line as `--random-seed`. `calibration` is a folder with statistics of the sources,
for methods that need data.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from paretomerge.arguments import path as read_path
from paretomerge.errors import ConfigError, ErrorCollector, RecipeError, shorten
from paretomerge.recipe.grammar import read_document, read_dtype
from paretomerge.recipe.parts import (
    Module,
    RenameModel,
    Slice,
    Tokenizer,
    rename_optional,
    rename_tokenizer_source,
    slices_to_dict,
)
from paretomerge.recipe.settings import ParameterSetting
from paretomerge.recipe.text import MAX_CHARACTERS, dump, parse


@dataclass(frozen=True)
class Recipe:
    """A whole merge, in the terms of mergekit's YAML.

    Attributes:
        merge_method: Name of the merge method.
        slices: The output layers; `models:` of the YAML is one slice over all layers.
        base_model: The model that the others were fine-tuned from.
        parameters: Settings by parameter name, for the whole merge.
        dtype: Dtype of the merged weights; None keeps that of the base.
        out_dtype: Takes the place of `dtype` in the files that are written.
        tokenizer_source: `union`, `base` or a model; the short form of `tokenizer`.
        seed: Seed of the random masks.
        modules: Modules by name, in place of `slices` (which is then empty).
        tokenizer: How the vocabularies are merged.
        chat_template: A template, its name, or `auto`.
        name: Name of a document that other documents use as a model.
        calibration: A folder with statistics of the sources, as `paretomerge calibrate` writes it.
        steps: Named merges that this one may use as models, each of which may use those before
            it. They exist only in memory, one tensor at a time (several documents in one file,
            as in mergekit-multi).

    Raises:
        RecipeError: If a dtype is unknown.

    Example:
        >>> recipe = Recipe.from_yaml("{merge_method: linear, models: [{model: a}, {model: b}]}")
        >>> recipe.models
        ('a', 'b')
    """

    merge_method: str
    slices: tuple[Slice, ...] = ()
    base_model: str | None = None
    parameters: Mapping[str, ParameterSetting] = field(default_factory=dict)
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: str | None = None
    seed: int = 0
    modules: Mapping[str, Module] = field(default_factory=dict)
    tokenizer: Tokenizer | None = None
    chat_template: str | None = None
    name: str | None = None
    steps: tuple["Recipe", ...] = ()
    calibration: str | None = None

    def __post_init__(self) -> None:
        # `replace` and programs come here without the grammar, which checks the rest.
        for key in ("dtype", "out_dtype"):
            dtype = getattr(self, key)
            if dtype is not None:
                # The class is frozen, so its fields cannot be assigned.
                object.__setattr__(self, key, read_dtype(dtype, f"recipe: {key}"))

    def __hash__(self) -> int:
        # Not of `key`: 1 and 1.0 are equal but have other digits there, and equal recipes must have
        # equal hashes.
        documents = [_frozen(recipe.to_dict()) for recipe in (*self.steps, self)]
        return hash(tuple(documents))

    @classmethod
    def from_yaml(cls, text: str, where: str = "recipe") -> "Recipe":
        """Parse a recipe.

        Args:
            text: One YAML document, or several: then the one without a name (or the last) is the
                recipe, and the others are its `steps`.
            where: Name of the text in error messages.

        Raises:
            RecipeError: With every error of the text, each with the path of its key.
        """
        if not isinstance(text, str):
            raise RecipeError(
                f"{where}: expected YAML text, got {shorten(text)}; to read a file, "
                "use Recipe.load(path)"
            )
        documents = parse(text, where)
        problems = ErrorCollector()
        recipes: list[Recipe] = []
        for number, data in enumerate(documents, start=1):
            label = where
            if len(documents) > 1:
                label = f"{where}: document {number}"
            with problems.collect():
                recipes.append(cls.from_dict(data, label))
        problems.raise_if_any()
        if len(recipes) == 1:
            return recipes[0]
        return _join_documents(recipes, where)

    @classmethod
    def load(cls, path: str | Path) -> "Recipe":
        """Read a recipe from a YAML file.

        Args:
            path: The file; `~` is the home folder. Relative model paths that exist beside it are
                resolved against its folder.

        Raises:
            RecipeError: If the file cannot be read or the recipe is invalid.
        """
        try:
            path = Path(read_path("recipe", path))
        except ConfigError as error:
            raise RecipeError(str(error)) from error
        try:
            with path.open(encoding="utf-8") as stream:
                # One character more than allowed shows that a file is too long, unread.
                text = stream.read(MAX_CHARACTERS + 1)
        except FileNotFoundError as error:
            raise RecipeError(
                f"{path}: no such file; name a recipe's YAML file"
            ) from error
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"{path}: cannot read the recipe: {error}") from error
        recipe = cls.from_yaml(text, str(path))
        return recipe.resolve_paths(path.parent)

    @classmethod
    def from_dict(cls, data: object, where: str = "recipe") -> "Recipe":
        """Check the grammar of one document and freeze it.

        Args:
            data: The document as plain data.
            where: Name of the document in error messages.

        Raises:
            RecipeError: With every error of the document, each with the path of its key.
        """
        return cls(**read_document(data, where))

    def to_dict(self) -> dict[str, Any]:
        """Return the document as plain data, without `steps`.

        The layers are under `models` if one slice holds whole models, else under `slices` or
        `modules`.
        """
        if self.modules:
            modules = {name: part.to_dict() for name, part in self.modules.items()}
            content = {"modules": modules}
        else:
            content = slices_to_dict(self.slices)
        # The order of the keys is that of the YAML file.
        data = {
            "name": self.name,
            "merge_method": self.merge_method,
            "base_model": self.base_model,
            **content,
            "parameters": dict(self.parameters),
            "dtype": self.dtype,
            "out_dtype": self.out_dtype,
            "tokenizer_source": self.tokenizer_source,
            "tokenizer": self.tokenizer and self.tokenizer.to_dict(),
            "chat_template": self.chat_template,
            "seed": self.seed,
            "calibration": self.calibration,
        }
        # Keys with their default values are left out; those of the layers and the method stay.
        required = {"merge_method", *content}
        result = {}
        for key, value in data.items():
            if value or key in required:
                result[key] = value
        return result

    def to_yaml(self) -> str:
        """Return the recipe as YAML, its steps as documents before it."""
        documents = [recipe.to_dict() for recipe in (*self.steps, self)]
        return "---\n".join(dump(document) for document in documents)

    @property
    def models(self) -> tuple[str, ...]:
        """Every model that this document names, the base first, each once."""
        names = [self.base_model]
        for part in self.all_slices():
            names += [source.model for source in part.sources]
            names.append(part.base_model)
        return tuple(dict.fromkeys(name for name in names if name))

    @property
    def source_models(self) -> tuple[str, ...]:
        """Every model that is read from disk, those of the steps included."""
        # A step has no files: its name stands for a merge in memory.
        step_names = {step.name for step in self.steps}
        names: list[str] = []
        for recipe in (*self.steps, self):
            names += [model for model in recipe.models if model not in step_names]
        return tuple(dict.fromkeys(names))

    def all_slices(self) -> Iterator[Slice]:
        """Iterate over all slices, those of the modules one after another."""
        yield from self.slices
        for module in self.modules.values():
            yield from module.slices

    @property
    def key(self) -> str:
        """Digest of the content (16 hex digits), independent of the order of its keys."""
        documents = [recipe.to_dict() for recipe in (*self.steps, self)]
        data = documents if self.steps else documents[0]
        # Records of trials store the key, so this text must not change from version to version.
        text = json.dumps(data, sort_keys=True, ensure_ascii=False)
        digest = hashlib.sha256(text.encode())
        return digest.hexdigest()[:16]

    def resolve_paths(self, folder: Path) -> "Recipe":
        """Return a copy whose paths that exist under `folder` point there.

        They are those of models, adapters and statistics.
        """
        renamed = self.rename_models(lambda model: resolve_model_path(folder, model))
        steps = [_resolve_calibration(step, folder) for step in renamed.steps]
        return replace(_resolve_calibration(renamed, folder), steps=tuple(steps))

    def rename_models(self, rename: RenameModel) -> "Recipe":
        """Return a copy with every model renamed; names of steps stay.

        Args:
            rename: Takes the name of a model and returns its new name.
        """
        step_names = {step.name for step in self.steps}

        def rename_source(model: str) -> str:
            return model if model in step_names else rename(model)

        steps = [_rename_in_document(step, rename_source) for step in self.steps]
        result = _rename_in_document(self, rename_source)
        return replace(result, steps=tuple(steps))

    def as_steps(self, name: str) -> tuple["Recipe", ...]:
        """Return the recipe as steps of another recipe.

        Args:
            name: Name of the step that stands for this recipe. It comes last, after the steps of
                this recipe, whose names get it as a prefix.
        """
        # Two recipes may have steps of the same name, hence the prefix.
        new_names = {step.name: f"{name}-{step.name}" for step in self.steps}

        def rename(model: str) -> str:
            return new_names.get(model, model)

        steps = []
        for step in self.steps:
            renamed = _rename_in_document(step, rename)
            steps.append(replace(renamed, name=new_names[step.name]))
        last = _rename_in_document(self, rename)
        return (*steps, replace(last, name=name, steps=()))


def _frozen(value: object) -> object:
    """Make data hashable, such that equal data stay equal."""
    if isinstance(value, Mapping):
        pairs = [(key, _frozen(entry)) for key, entry in value.items()]
        return frozenset(pairs)
    if isinstance(value, (list, tuple)):
        entries = [_frozen(entry) for entry in value]
        return tuple(entries)
    return value


def resolve_model_path(folder: Path, model: str) -> str:
    """Resolve a model's name against a folder.

    Args:
        folder: The folder that relative paths may start from.
        model: A path or Hub name, or two of them with a plus sign (model and adapter).

    Returns:
        The path under `folder` of what exists there; other names, or other sides of the plus
        sign, stay as they are.
    """
    # A plus sign may belong to a path, so the whole name comes first.
    if _is_subfolder(folder, model):
        return str(folder / model)
    parts = []
    for part in model.split("+"):
        if _is_subfolder(folder, part):
            part = str(folder / part)
        parts.append(part)
    return "+".join(parts)


def _resolve_calibration(recipe: Recipe, folder: Path) -> Recipe:
    """The document with the path of its statistics under `folder`, if they are there."""
    name = recipe.calibration
    if name is None or not _is_subfolder(folder, name):
        return recipe
    return replace(recipe, calibration=str(folder / name))


def _is_subfolder(folder: Path, name: str) -> bool:
    if not name:
        return False
    try:
        return not Path(name).is_absolute() and (folder / name).is_dir()
    except (OSError, ValueError):
        # The name cannot be a path: it is too long, or has a NUL character.
        return False


def _rename_in_document(recipe: Recipe, rename: RenameModel) -> Recipe:
    """Rename the models of one document, not those of its steps."""
    tokenizer_source = recipe.tokenizer_source
    if tokenizer_source is not None:
        tokenizer_source = rename_tokenizer_source(tokenizer_source, rename)
    slices = [part.rename_models(rename) for part in recipe.slices]
    modules = {}
    for name, module in recipe.modules.items():
        modules[name] = module.rename_models(rename)
    return replace(
        recipe,
        slices=tuple(slices),
        modules=modules,
        base_model=rename_optional(recipe.base_model, rename),
        tokenizer_source=tokenizer_source,
        tokenizer=recipe.tokenizer and recipe.tokenizer.rename_models(rename),
    )


def _join_documents(recipes: Sequence[Recipe], where: str) -> Recipe:
    """Make one recipe of several documents: the unnamed or last one, the others its steps."""
    unnamed = [recipe for recipe in recipes if recipe.name is None]
    if len(unnamed) > 1:
        raise RecipeError(
            f"{where}: only one of several documents may be without a name, {len(unnamed)} are; "
            "add `name: ...` to the others"
        )
    result = unnamed[0] if unnamed else recipes[-1]
    steps = {}
    for recipe in recipes:
        # By identity: two documents may be equal, and both count.
        if recipe is not result:
            steps[recipe.name] = recipe
    # Two documents of one name share an entry of `steps`.
    has_duplicates = len(steps) < len(recipes) - 1
    if has_duplicates or result.name in steps:
        names = [recipe.name for recipe in recipes]
        raise RecipeError(f"{where}: each document needs a different name, got {names}")
    return replace(result, steps=_sort_steps(steps, where))


def _sort_steps(steps: Mapping[str | None, Recipe], where: str) -> tuple[Recipe, ...]:
    """Order the steps so that each comes after those that it uses.

    Each comes as early as its place in the file allows: steps that are in order already stay so.
    """
    waiting = dict(steps)
    ordered: list[Recipe] = []
    while waiting:
        n_done = len(ordered)
        for name, recipe in list(waiting.items()):
            if waiting.keys().isdisjoint(recipe.models):
                ordered.append(waiting.pop(name))
        # If no document can be next, those that wait need each other, or one needs itself.
        if len(ordered) == n_done:
            raise RecipeError(
                f"{where}: these documents use each other in a circle: {list(waiting)}"
            )
    return tuple(ordered)
