"""What to merge: a recipe, in mergekit's YAML grammar.

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

A recipe is frozen data. It knows the grammar and nothing of methods, files or tensors: those are checked by
`paretomerge.merge.plan`. One key is ours: `seed`, the address of the random masks (mergekit has it on its command
line as `--random-seed`).
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from paretomerge.errors import RecipeError, unknown

Setting = Any
"""A value as the grammar allows it: a scalar, a list of numbers (gradient), or a list of `{filter, value}`."""

TOP_LEVEL = ("merge_method", "base_model", "models", "slices", "parameters", "dtype", "out_dtype", "tokenizer_source", "seed")
LATER = {
    "modules": "list the layers under `slices`",
    "tokenizer": "use `tokenizer_source: base`",
    "chat_template": "the base's chat template is kept",
}
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Source:
    """One model inside a slice. `layer_range` excludes its end; None means all layers."""

    model: str
    layer_range: tuple[int, int] | None = None
    parameters: Mapping[str, Setting] = field(default_factory=dict)


@dataclass(frozen=True)
class Slice:
    """Consecutive output layers, each made of the same number of layers from every source."""

    sources: tuple[Source, ...]
    parameters: Mapping[str, Setting] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """A whole merge. `models:` of the YAML is the one slice over all layers (`layer_range` None)."""

    merge_method: str
    slices: tuple[Slice, ...]
    base_model: str | None = None
    parameters: Mapping[str, Setting] = field(default_factory=dict)
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: str | None = None
    seed: int = 0

    @classmethod
    def from_yaml(cls, text: str, where: str = "recipe") -> "Recipe":
        """Parse; `where` names the text in error messages."""
        try:
            data = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RecipeError(f"{where}: expected YAML, got a syntax error: {error}") from error
        return cls.from_dict(data, where)

    @classmethod
    def load(cls, path: str | Path) -> "Recipe":
        """Read a YAML file; relative model paths that exist beside the file are taken from there."""
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"{path}: expected a recipe in YAML, got {error}") from error
        return cls.from_yaml(text, str(path)).relative_to(path.parent)

    @classmethod
    def from_dict(cls, data: Any, where: str = "recipe") -> "Recipe":
        """Check the grammar and freeze it."""
        _expect_keys(data, TOP_LEVEL, where)
        if not isinstance(data.get("merge_method"), str):
            raise RecipeError(f"{where}: expected `merge_method: <name>`, got {data.get('merge_method')!r}")
        if ("models" in data) == ("slices" in data):
            raise RecipeError(f"{where}: expected one of `models` and `slices`, got {'both' if 'models' in data else 'none'}")
        if "models" in data:
            sources = _items(data["models"], f"{where}: models", _model)
            slices: tuple[Slice, ...] = (Slice(sources),)
        else:
            slices = _items(data["slices"], f"{where}: slices", _slice)
        for key in ("dtype", "out_dtype"):
            if data.get(key) is not None and data[key] not in DTYPES:
                raise RecipeError(f"{where}: {key}: {unknown('dtype', data[key], DTYPES)}")
        if not isinstance(data.get("seed", 0), int):
            raise RecipeError(f"{where}: seed: expected a whole number, got {data['seed']!r}")
        base = data.get("base_model")
        return cls(
            merge_method=data["merge_method"],
            slices=slices,
            base_model=None if base is None else _reference(base, f"{where}: base_model"),
            parameters=_parameters(data.get("parameters"), f"{where}: parameters"),
            dtype=data.get("dtype"),
            out_dtype=data.get("out_dtype"),
            tokenizer_source=data.get("tokenizer_source"),
            seed=data.get("seed", 0),
        )

    def to_dict(self) -> dict[str, Any]:
        """The grammar's own shape: `models` where there is one whole slice, else `slices`."""
        out: dict[str, Any] = {"merge_method": self.merge_method}
        if self.base_model is not None:
            out["base_model"] = self.base_model
        whole = len(self.slices) == 1 and all(s.layer_range is None for s in self.slices[0].sources)
        if whole and not self.slices[0].parameters:
            out["models"] = [_source_dict(s) for s in self.slices[0].sources]
        else:
            out["slices"] = [
                {"sources": [_source_dict(s) for s in piece.sources], **_if(parameters=dict(piece.parameters))} for piece in self.slices
            ]
        out |= _if(parameters=dict(self.parameters), dtype=self.dtype, out_dtype=self.out_dtype)
        return out | _if(tokenizer_source=self.tokenizer_source, seed=self.seed)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    @property
    def models(self) -> tuple[str, ...]:
        """Every model that is named, the base first, each once."""
        named = [s.model for piece in self.slices for s in piece.sources]
        return tuple(dict.fromkeys(([self.base_model] if self.base_model else []) + named))

    @property
    def key(self) -> str:
        """The same for two recipes of the same content, whatever the order of their keys."""
        text = json.dumps(self.to_dict(), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def relative_to(self, folder: Path) -> "Recipe":
        """The recipe with model paths that exist under `folder` made to point there."""

        def at(model: str) -> str:
            return str(folder / model) if not Path(model).is_absolute() and (folder / model).is_dir() else model

        pieces = tuple(
            Slice(tuple(Source(at(s.model), s.layer_range, s.parameters) for s in piece.sources), piece.parameters) for piece in self.slices
        )
        base = None if self.base_model is None else at(self.base_model)
        return Recipe(**{**self.__dict__, "slices": pieces, "base_model": base})


def resolve(setting: Setting, tensor: str, t: float) -> Any:
    """The value of `setting` for `tensor` at depth `t` in [0, 1]; None where no filter matches."""
    if isinstance(setting, (list, tuple)) and setting:
        if all(isinstance(entry, Mapping) for entry in setting):
            for entry in setting:
                pattern = entry.get("filter")
                if pattern is None or pattern == "*" or pattern in tensor:
                    return resolve(entry["value"], tensor, t)
            return None
        position = t * (len(setting) - 1)
        low = min(int(position), len(setting) - 1)
        high = min(low + 1, len(setting) - 1)
        return setting[low] + (position - low) * (setting[high] - setting[low])
    return setting


def settings(levels: Sequence[Mapping[str, Setting]], name: str, tensor: str, t: float) -> Any:
    """Look `name` up from the innermost level outwards; a level where nothing matches falls through."""
    for level in levels:
        if name in level and (value := resolve(level[name], tensor, t)) is not None:
            return value
    return None


def _items(data: Any, where: str, read: Any) -> tuple[Any, ...]:
    if not isinstance(data, list) or not data:
        raise RecipeError(f"{where}: expected a list with at least one entry, got {data!r}")
    return tuple(read(entry, f"{where}[{i}]") for i, entry in enumerate(data))


def _model(data: Any, where: str) -> Source:
    _expect_keys(data, ("model", "parameters"), where)
    return Source(_reference(data.get("model"), f"{where}.model"), None, _parameters(data.get("parameters"), where))


def _slice(data: Any, where: str) -> Slice:
    _expect_keys(data, ("sources", "parameters"), where)
    sources = _items(data.get("sources"), f"{where}.sources", _slice_source)
    lengths = {s.layer_range[1] - s.layer_range[0] for s in sources if s.layer_range}
    if len(lengths) > 1:
        raise RecipeError(f"{where}: expected sources with the same number of layers, got {sorted(lengths)}")
    return Slice(sources, _parameters(data.get("parameters"), where))


def _slice_source(data: Any, where: str) -> Source:
    _expect_keys(data, ("model", "layer_range", "parameters"), where)
    layers = data.get("layer_range")
    whole = isinstance(layers, list) and len(layers) == 2 and all(type(n) is int for n in layers)
    if not whole or not 0 <= layers[0] < layers[1]:
        raise RecipeError(f"{where}.layer_range: expected [first, end) with 0 <= first < end, got {layers!r}")
    model = _reference(data.get("model"), f"{where}.model")
    return Source(model, (layers[0], layers[1]), _parameters(data.get("parameters"), where))


def _reference(data: Any, where: str) -> str:
    if isinstance(data, Mapping) and set(data) == {"model"}:  # mergekit writes references so, too
        data = data["model"]
    if isinstance(data, Mapping) and isinstance(data.get("path"), str):
        data = data["path"]
    if not isinstance(data, str) or not data:
        raise RecipeError(f"{where}: expected a path or a name, got {data!r}")
    if "+" in Path(data).name and not Path(data).exists():
        raise RecipeError(f"{where}: adapters ({data!r}) are not read yet; merge the adapter into its model first")
    return data


def _parameters(data: Any, where: str) -> Mapping[str, Setting]:
    if data is None:
        return {}
    if not isinstance(data, Mapping):
        raise RecipeError(f"{where}: expected parameters as `name: value`, got {data!r}")
    for name, setting in data.items():
        for value in _leaves(setting, f"{where}.{name}"):
            if not isinstance(value, (int, float, bool, str)):
                raise RecipeError(f"{where}.{name}: expected a number, a list of numbers or {{filter, value}}, got {value!r}")
    return dict(data)


def _leaves(setting: Setting, where: str) -> Iterator[Any]:
    if not isinstance(setting, list):
        yield setting
        return
    if not setting:
        raise RecipeError(f"{where}: expected a value, got an empty list")
    conditional = [isinstance(entry, Mapping) for entry in setting]
    if any(conditional) and not all(conditional):
        raise RecipeError(f"{where}: expected numbers or {{filter, value}} entries, got a mixture")
    for entry in setting:
        if isinstance(entry, Mapping):
            _expect_keys(entry, ("filter", "value"), where)
            if "value" not in entry:
                raise RecipeError(f"{where}: expected `value` beside `filter: {entry.get('filter')}`, got none")
            yield from _leaves(entry["value"], where)
        elif isinstance(entry, (int, float)) and not isinstance(entry, bool):
            yield entry
        else:
            raise RecipeError(f"{where}: expected a gradient of numbers, got {entry!r}")


def _expect_keys(data: Any, known: Sequence[str], where: str) -> None:
    if not isinstance(data, Mapping):
        raise RecipeError(f"{where}: expected a mapping with {', '.join(known)}, got {data!r}")
    for key in data:
        if key in LATER and known is TOP_LEVEL:
            raise RecipeError(f"{where}: `{key}` is not read yet; {LATER[key]}")
        if key not in known:
            raise RecipeError(f"{where}: {unknown('key', key, known)}")


def _source_dict(source: Source) -> dict[str, Any]:
    layers = None if source.layer_range is None else list(source.layer_range)
    return {"model": source.model, **_if(layer_range=layers, parameters=dict(source.parameters))}


def _if(**entries: Any) -> dict[str, Any]:
    return {key: value for key, value in entries.items() if value}
