"""What to merge, as frozen data.

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

A recipe knows the grammar and nothing of methods, files or tensors: those are checked by `paretomerge.merging.plan.make`.
One key is ours: `seed`, the address of the random masks (mergekit has it on its command line as `--random-seed`).
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from paretomerge.errors import RecipeError
from paretomerge.recipe.settings import Setting
from paretomerge.recipe.text import LARGEST, dump

DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Source:
    """One model inside a slice. `layer_range` excludes its end; None means all layers.

    model: a folder or a Hub name, with an optional `@revision` and an optional `+adapter`.
    """

    model: str
    layer_range: tuple[int, int] | None = None
    parameters: Mapping[str, Setting] = field(default_factory=dict)


@dataclass(frozen=True)
class Slice:
    """Consecutive output layers, each made of the same number of layers from every source.

    base_model: in place of the recipe's, for these layers.
    """

    sources: tuple[Source, ...]
    parameters: Mapping[str, Setting] = field(default_factory=dict)
    base_model: str | None = None


@dataclass(frozen=True)
class Module:
    """One part of a model that has several, such as the language part of a vision-language model."""

    slices: tuple[Slice, ...]
    parameters: Mapping[str, Setting] = field(default_factory=dict)


@dataclass(frozen=True)
class Tokenizer:
    """The merged vocabulary: `union`, `base` or a model; overrides by token; rows padded to a multiple."""

    source: str
    tokens: Mapping[str, Any] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None


@dataclass(frozen=True)
class Recipe:
    """A whole merge. `models:` of the YAML is the one slice over all layers (`layer_range` None).

    modules: by name, in place of `slices` (which is then empty).
    steps: named merges that this one may use as models, each of which may use those before it; they exist in memory
    only, a tensor at a time (mergekit-multi's several documents in one file).
    """

    merge_method: str
    slices: tuple[Slice, ...] = ()
    base_model: str | None = None
    parameters: Mapping[str, Setting] = field(default_factory=dict)
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: str | None = None
    seed: int = 0
    modules: Mapping[str, Module] = field(default_factory=dict)
    tokenizer: Tokenizer | None = None
    chat_template: str | None = None
    name: str | None = None
    steps: tuple["Recipe", ...] = ()

    @classmethod
    def from_yaml(cls, text: str, where: str = "recipe") -> "Recipe":
        """Parse one document or several; `where` names the text in error messages."""
        from paretomerge.recipe.grammar import read_documents

        return read_documents(text, where)

    @classmethod
    def load(cls, path: str | Path) -> "Recipe":
        """Read a YAML file; relative model paths that exist beside the file are taken from there."""
        path = Path(path)
        try:
            with path.open(encoding="utf-8") as stream:
                text = stream.read(LARGEST + 1)
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"{path}: expected a recipe in YAML, got {error}") from error
        return cls.from_yaml(text, str(path)).relative_to(path.parent)

    @classmethod
    def from_dict(cls, data: Any, where: str = "recipe") -> "Recipe":
        """Check the grammar of one document and freeze it."""
        from paretomerge.recipe.grammar import read_document

        return read_document(data, where)

    def to_dict(self) -> dict[str, Any]:
        """The grammar's own shape, without `steps`: `models` where there is one whole slice, else `slices` or `modules`."""
        out: dict[str, Any] = _if(name=self.name)
        out["merge_method"] = self.merge_method
        out |= _if(base_model=self.base_model)
        if self.modules:
            out["modules"] = {
                name: _slices(module.slices) | _if(parameters=dict(module.parameters))
                for name, module in self.modules.items()
            }
        else:
            out |= _slices(self.slices)
        out |= _if(
            parameters=dict(self.parameters),
            dtype=self.dtype,
            out_dtype=self.out_dtype,
            tokenizer_source=self.tokenizer_source,
        )
        if self.tokenizer:
            more = _if(
                tokens=dict(self.tokenizer.tokens),
                pad_to_multiple_of=self.tokenizer.pad_to_multiple_of,
            )
            out["tokenizer"] = {"source": self.tokenizer.source, **more}
        return out | _if(chat_template=self.chat_template, seed=self.seed)

    def to_yaml(self) -> str:
        documents = [*(step.to_dict() for step in self.steps), self.to_dict()]
        return "---\n".join(dump(d) for d in documents)

    @property
    def models(self) -> tuple[str, ...]:
        """Every model that this document names, the base first, each once."""
        named = [
            model
            for piece in self.pieces()
            for model in (*(s.model for s in piece.sources), piece.base_model)
            if model
        ]
        return tuple(dict.fromkeys(([self.base_model] if self.base_model else []) + named))

    @property
    def files(self) -> tuple[str, ...]:
        """Every model that is read from disk, those of the steps included."""
        steps = {step.name for step in self.steps}
        named = [
            model for recipe in (*self.steps, self) for model in recipe.models if model not in steps
        ]
        return tuple(dict.fromkeys(named))

    def pieces(self) -> Iterator[Slice]:
        """All slices, those of the modules one after another."""
        yield from self.slices
        for module in self.modules.values():
            yield from module.slices

    @property
    def key(self) -> str:
        """The same for two recipes of the same content, whatever the order of their keys."""
        documents = [step.to_dict() for step in self.steps] + [self.to_dict()]
        text = json.dumps(
            documents if self.steps else documents[0], sort_keys=True, ensure_ascii=False
        )
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def relative_to(self, folder: Path) -> "Recipe":
        """The recipe with model paths (and adapters) that exist under `folder` made to point there."""
        return self.renamed(lambda model: under(folder, model))

    def renamed(self, at: Callable[[str], str]) -> "Recipe":
        """The recipe with every model's name `m` replaced by `at(m)`; names of steps stay."""
        steps = {step.name for step in self.steps}

        def name(model: str) -> str:
            return model if model in steps else at(model)

        return replace(
            _renamed(self, name), steps=tuple(_renamed(step, name) for step in self.steps)
        )

    def as_steps(self, name: str) -> tuple["Recipe", ...]:
        """The recipe as a step of another one, under `name`, after its own steps, whose names then begin with that."""
        own = {step.name: f"{name}-{step.name}" for step in self.steps}

        def at(model: str) -> str:
            return own.get(model, model)

        before = tuple(replace(_renamed(step, at), name=own[step.name]) for step in self.steps)
        return (*before, replace(_renamed(self, at), name=name, steps=()))


def under(folder: Path, model: str) -> str:
    """A model's name, with what exists under `folder`, itself or the sides of its plus sign, made to point there."""
    if _beside(folder, model):
        return str(folder / model)
    return "+".join(
        str(folder / part) if _beside(folder, part) else part for part in model.split("+")
    )


def _beside(folder: Path, name: str) -> bool:
    """Whether a relative name is a folder there."""
    try:
        return bool(name) and not Path(name).is_absolute() and (folder / name).is_dir()
    except (OSError, ValueError):  # too long to be a path
        return False


def _renamed(recipe: Recipe, name: Callable[[str], str]) -> Recipe:
    def moved(pieces: tuple[Slice, ...]) -> tuple[Slice, ...]:
        return tuple(
            replace(
                p,
                sources=tuple(replace(s, model=name(s.model)) for s in p.sources),
                base_model=None if p.base_model is None else name(p.base_model),
            )
            for p in pieces
        )

    def vocabulary(source: str) -> str:
        return source if source in ("union", "base") else name(source)

    tokenizer = recipe.tokenizer
    if tokenizer is not None:
        tokens = {token: _renamed_rule(rule, name) for token, rule in tokenizer.tokens.items()}
        tokenizer = replace(tokenizer, source=vocabulary(tokenizer.source), tokens=tokens)
    return replace(
        recipe,
        slices=moved(recipe.slices),
        modules={
            key: replace(module, slices=moved(module.slices))
            for key, module in recipe.modules.items()
        },
        base_model=None if recipe.base_model is None else name(recipe.base_model),
        tokenizer_source=None
        if recipe.tokenizer_source is None
        else vocabulary(recipe.tokenizer_source),
        tokenizer=tokenizer,
    )


def _renamed_rule(rule: Any, name: Callable[[str], str]) -> Any:
    """A token's rule, `{source: model}` or `{source: {kind: model_token, model: ...}}`, with its model renamed."""
    if not isinstance(rule, Mapping):
        return rule
    source = rule.get("source")
    if isinstance(source, str):
        return {**rule, "source": name(source)}
    if isinstance(source, Mapping) and isinstance(source.get("model"), str):
        return {**rule, "source": {**source, "model": name(source["model"])}}
    return rule


def _slices(slices: tuple[Slice, ...]) -> dict[str, Any]:
    whole = len(slices) == 1 and all(s.layer_range is None for s in slices[0].sources)
    if whole and not slices[0].parameters and not slices[0].base_model:
        return {"models": [_source(s) for s in slices[0].sources]}
    return {
        "slices": [
            {
                "sources": [_source(s) for s in p.sources],
                **_if(parameters=dict(p.parameters), base_model=p.base_model),
            }
            for p in slices
        ]
    }


def _source(source: Source) -> dict[str, Any]:
    layers = None if source.layer_range is None else list(source.layer_range)
    return {"model": source.model, **_if(layer_range=layers, parameters=dict(source.parameters))}


def _if(**entries: Any) -> dict[str, Any]:
    return {key: value for key, value in entries.items() if value}
