"""Reading mergekit's YAML: every key known, every value of its kind, every error told at once, by the path of its key."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from paretomerge.errors import ErrorCollector, RecipeError, shorten, unknown_name
from paretomerge.recipe.recipe import DTYPES, Module, Recipe, Slice, Source, Tokenizer
from paretomerge.recipe.settings import Setting
from paretomerge.recipe.text import check_data, parse

TOP_LEVEL = (
    "merge_method",
    "base_model",
    "models",
    "slices",
    "modules",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
    "name",
    "seed",
)
_CONTENT = ("models", "slices", "modules")
_MOST_PADDING = 1 << 16

T = TypeVar("T")


def read_documents(text: str, where: str) -> Recipe:
    """The recipe of a text: its one document, or the last of several, with those before it as named `steps`."""
    documents = parse(text, where)
    problems = ErrorCollector()
    read: list[Recipe] = []
    for i, data in enumerate(documents):
        with problems.collect():
            read.append(
                read_document(data, where if len(documents) == 1 else f"{where}: document {i + 1}")
            )
    problems.raise_if_any()
    if len(read) == 1:
        return read[0]
    return _in_order(read, where)


def _in_order(read: Sequence[Recipe], where: str) -> Recipe:
    """The one document without a name, or the last; the others before it, each behind those that it uses."""
    unnamed = [recipe for recipe in read if recipe.name is None]
    if len(unnamed) > 1:
        raise RecipeError(
            f"{where}: expected `name: ...` in every document but one, got none in {len(unnamed)}"
        )
    result = unnamed[0] if unnamed else read[-1]
    steps = {recipe.name: recipe for recipe in read if recipe is not result}
    if len(steps) < len(read) - 1 or result.name in steps:
        raise RecipeError(
            f"{where}: expected a name of its own for each document, got {[recipe.name for recipe in read]}"
        )
    ordered: list[Recipe] = []
    while len(ordered) < len(steps):
        done = {recipe.name for recipe in ordered}
        waiting = [r for name, r in steps.items() if name not in done]
        ready = [r for r in waiting if not any(m in steps and m not in done for m in r.models)]
        if not ready:
            raise RecipeError(
                f"{where}: expected documents that can be merged one after another, got a circle: {[r.name for r in waiting]}"
            )
        ordered += ready
    return Recipe(**{**result.__dict__, "steps": tuple(ordered)})


def read_document(data: Any, where: str) -> Recipe:
    """Check the grammar of one document and freeze it."""
    check_data(data, where)
    problems = ErrorCollector()
    with problems.collect():
        _expect_keys(data, TOP_LEVEL, where)
    if not isinstance(data, Mapping):
        problems.raise_if_any()
        raise AssertionError("a document that is no mapping was noted")
    fields: dict[str, Any] = {}

    def read(key: str, reader: Callable[[Any, str], Any]) -> None:
        if data.get(key) is not None:
            with problems.collect():
                fields[key] = reader(data[key], f"{where}: {key}")

    with problems.collect():
        if not isinstance(data.get("merge_method"), str):
            raise RecipeError(
                f"{where}: expected `merge_method: <name>`, got {shorten(data.get('merge_method'))}"
            )
    with problems.collect():
        given = [key for key in _CONTENT if key in data]
        if len(given) != 1:
            raise RecipeError(
                f"{where}: expected one of `models`, `slices` and `modules`, got {' and '.join(given) or 'none'}"
            )
        _reading(fields, data[given[0]], given[0], f"{where}: {given[0]}")
    read("base_model", _reference)
    read("parameters", _parameters)
    read("dtype", _dtype)
    read("out_dtype", _dtype)
    read("tokenizer_source", _reference)
    read("tokenizer", _tokenizer)
    read("chat_template", _text)
    read("name", _text)
    read("seed", _whole_number)
    with problems.collect():
        if "tokenizer" in fields and "tokenizer_source" in fields:
            raise RecipeError(
                f"{where}: expected one of `tokenizer` and `tokenizer_source`, got both"
            )
    problems.raise_if_any()
    return Recipe(merge_method=data["merge_method"], **fields)


def _reading(fields: dict[str, Any], data: Any, key: str, where: str) -> None:
    if key == "modules":
        if not isinstance(data, Mapping) or not data:
            raise RecipeError(f"{where}: expected modules by name, got {shorten(data)}")
        fields["modules"] = {
            str(name): _module(entry, f"{where}.{name}") for name, entry in data.items()
        }
    else:
        fields["slices"] = _content(data, key, where)


def _content(data: Any, key: str, where: str) -> tuple[Slice, ...]:
    return (Slice(_items(data, where, _model)),) if key == "models" else _items(data, where, _slice)


def _module(data: Any, where: str) -> Module:
    _expect_keys(data, ("models", "slices", "parameters"), where)
    if ("models" in data) == ("slices" in data):
        raise RecipeError(
            f"{where}: expected one of `models` and `slices`, got {'both' if 'models' in data else 'none'}"
        )
    key = "models" if "models" in data else "slices"
    return Module(
        _content(data[key], key, f"{where}.{key}"),
        _parameters(data.get("parameters"), f"{where}.parameters"),
    )


def _items(data: Any, where: str, read: Callable[[Any, str], Any]) -> tuple[Any, ...]:
    if not isinstance(data, list) or not data:
        raise RecipeError(f"{where}: expected a list with at least one entry, got {shorten(data)}")
    problems = ErrorCollector()
    items = []
    for i, entry in enumerate(data):
        with problems.collect():
            items.append(read(entry, f"{where}[{i}]"))
    problems.raise_if_any()
    return tuple(items)


def _model(data: Any, where: str) -> Source:
    _expect_keys(data, ("model", "parameters"), where)
    return Source(
        _reference(data.get("model"), f"{where}.model"),
        None,
        _parameters(data.get("parameters"), where),
    )


def _slice(data: Any, where: str) -> Slice:
    _expect_keys(
        data, ("sources", "parameters", "base_model", "residual_weight"), where
    )  # mergekit reads the last, and uses it not
    sources = _items(data.get("sources"), f"{where}.sources", _slice_source)
    lengths = {s.layer_range[1] - s.layer_range[0] for s in sources if s.layer_range}
    if len(lengths) > 1:
        raise RecipeError(
            f"{where}: expected sources with the same number of layers, got {sorted(lengths)}"
        )
    base = data.get("base_model")
    base = None if base is None else _reference(base, f"{where}.base_model")
    return Slice(sources, _parameters(data.get("parameters"), where), base)


def _slice_source(data: Any, where: str) -> Source:
    _expect_keys(data, ("model", "layer_range", "parameters"), where)
    layers = data.get("layer_range")
    whole = isinstance(layers, list) and len(layers) == 2 and all(type(n) is int for n in layers)
    if not whole or not 0 <= layers[0] < layers[1]:
        raise RecipeError(
            f"{where}.layer_range: expected [first, end) with 0 <= first < end, got {shorten(layers)}"
        )
    model = _reference(data.get("model"), f"{where}.model")
    return Source(model, (layers[0], layers[1]), _parameters(data.get("parameters"), where))


def _reference(data: Any, where: str) -> str:
    """A model as `path@revision+adapter@revision`; mergekit's spelt-out form is read, too."""
    if isinstance(data, Mapping) and "model" in data:
        _expect_keys(
            data, ("model", "lora", "override_architecture"), where
        )  # the last says what we infer
        adapter = data.get("lora")
        return _reference(data["model"], where) + (
            "" if adapter is None else "+" + _reference(adapter, where)
        )
    if isinstance(data, Mapping) and "path" in data:
        _expect_keys(data, ("path", "revision"), where)
        revision = data.get("revision")
        return _text(data["path"], where) + (
            "" if revision is None else "@" + _text(revision, where)
        )
    return _text(data, where)


def _text(data: Any, where: str) -> str:
    if not isinstance(data, str) or not data or "\0" in data:
        raise RecipeError(f"{where}: expected a text, got {shorten(data)}")
    return data


def _dtype(data: Any, where: str) -> str:
    data = data.removeprefix("torch.") if isinstance(data, str) else data
    if data not in DTYPES:
        raise RecipeError(f"{where}: {unknown_name('dtype', data, DTYPES)}")
    return str(data)


def _whole_number(data: Any, where: str) -> int:
    if type(data) is not int:
        raise RecipeError(f"{where}: expected a whole number, got {shorten(data)}")
    return data


def _tokenizer(data: Any, where: str) -> Tokenizer:
    _expect_keys(data, ("source", "tokens", "pad_to_multiple_of"), where)
    tokens = data.get("tokens") or {}
    if not isinstance(tokens, Mapping):
        raise RecipeError(f"{where}.tokens: expected tokens by their text, got {shorten(tokens)}")
    pad = data.get("pad_to_multiple_of")
    if pad is not None and not (type(pad) is int and 0 < pad <= _MOST_PADDING):
        raise RecipeError(
            f"{where}.pad_to_multiple_of: expected a whole number from 1 to {_MOST_PADDING}, got {shorten(pad)}"
        )
    source = data.get("source")
    for token, rule in tokens.items():
        _token_rule(rule, f"{where}.tokens[{shorten(token)}]")
    return Tokenizer(
        "union" if source is None else _reference(source, f"{where}.source"), dict(tokens), pad
    )


def _token_rule(data: Any, where: str) -> None:
    """Its form alone; models and tokens are checked against the vocabularies."""
    _expect_keys(data, ("source", "force"), where)
    source = data.get("source")
    if isinstance(source, Mapping):
        _expect_keys(source, ("kind", "model", "token", "token_id"), f"{where}.source")
    for value in (
        *(source.values() if isinstance(source, Mapping) else [source]),
        data.get("force"),
    ):
        if not isinstance(value, (str, int, type(None))):
            raise RecipeError(
                f"{where}: expected a model, {{kind: zero}} or {{kind: model_token, model, token}}, got {shorten(value)}"
            )


def _parameters(data: Any, where: str) -> Mapping[str, Setting]:
    if data is None:
        return {}
    if not isinstance(data, Mapping):
        raise RecipeError(f"{where}: expected parameters as `name: value`, got {shorten(data)}")
    problems = ErrorCollector()
    for name, setting in data.items():
        with problems.collect():
            for value in _leaves(setting, f"{where}.{name}"):
                if not isinstance(value, (int, float, bool, str)):
                    raise RecipeError(
                        f"{where}.{name}: expected a number, a list of numbers or {{filter, value}} entries, got {shorten(value)}"
                    )
    problems.raise_if_any()
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
            if entry.get("value") is None:
                raise RecipeError(
                    f"{where}: expected `value` beside `filter: {shorten(entry.get('filter'))}`, got none"
                )
            if not isinstance(entry.get("filter", ""), (str, type(None))):
                raise RecipeError(
                    f"{where}: expected a filter that is a part of tensor names, got {shorten(entry['filter'])}"
                )
            yield from _leaves(entry["value"], where)
        elif isinstance(entry, (int, float)) and not isinstance(entry, bool):
            yield entry
        else:
            raise RecipeError(f"{where}: expected a gradient of numbers, got {shorten(entry)}")


def _expect_keys(data: Any, known: Sequence[str], where: str) -> None:
    if not isinstance(data, Mapping):
        raise RecipeError(
            f"{where}: expected a mapping with {', '.join(known)}, got {shorten(data)}"
        )
    problems = ErrorCollector()
    for key in data:
        with problems.collect():
            if key not in known:
                raise RecipeError(f"{where}: {unknown_name('key', key, known)}")
    problems.raise_if_any()
