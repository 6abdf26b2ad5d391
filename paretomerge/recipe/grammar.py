"""The grammar of mergekit's YAML: checks every key and value, and reports all errors at once.

Each `_read_*` function takes plain data and `where`, the path of its key (`recipe.yml:
models[0].layer_range`), and returns frozen parts or raises a `RecipeError` that starts with the
path. The reader is written by hand because the error messages and the several spellings that
mergekit accepts would take a custom validator for nearly every field of a schema library.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from paretomerge.arguments import plain_data
from paretomerge.errors import ErrorCollector, RecipeError, shorten, unknown_name
from paretomerge.recipe.parts import Module, Slice, Source, Tokenizer
from paretomerge.recipe.settings import ParameterSetting
from paretomerge.recipe.text import check_data

DOCUMENT_KEYS = (
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
    "calibration",
)
"""The keys of a document."""

RECIPE_DTYPES = ("float32", "float16", "bfloat16")
"""Dtypes that a recipe may ask for."""

_CONTENT_KEYS = ("models", "slices", "modules")
_MAX_PADDING = 1 << 16

_T = TypeVar("_T")


def read_document(data: object, where: str) -> dict[str, Any]:
    """Check one document and read it.

    Args:
        data: The document as plain data.
        where: Name of the document in error messages.

    Returns:
        The arguments of `Recipe`.

    Raises:
        RecipeError: With every error of the document, each with the path of its key.
    """
    check_data(data, where)
    # Only now, since data that contains itself would never end. Programs may have numpy's numbers,
    # tuples and paths, which YAML has not.
    data = plain_data(data)
    if data is None:
        raise RecipeError(
            f"{where}: the recipe is empty; write `merge_method`, `base_model` and `models`"
        )
    if not isinstance(data, Mapping):
        _reject_keys(data, DOCUMENT_KEYS, where)
    problems = ErrorCollector()
    fields: dict[str, Any] = {}
    # One block per field, so that an error in one does not hide the errors of the others.
    with problems.collect():
        _check_keys(data, DOCUMENT_KEYS, where)
    with problems.collect():
        fields["merge_method"] = _read_method(data.get("merge_method"), where)
    with problems.collect():
        fields |= _read_content(data, where)
    # `null` counts as missing: programs write it for options that are not set.
    for key, read in _FIELD_READERS.items():
        value = data.get(key)
        if value is None:
            continue
        with problems.collect():
            fields[key] = read(value, f"{where}: {key}")
    with problems.collect():
        if "tokenizer" in fields and "tokenizer_source" in fields:
            raise RecipeError(
                f"{where}: `tokenizer` and `tokenizer_source` exclude each other; remove one"
            )
    problems.raise_if_any()
    return fields


def _read_method(data: object, where: str) -> str:
    if not isinstance(data, str):
        raise RecipeError(
            f"{where}: `merge_method: <name>` is required, got {shorten(data)}"
        )
    return data


def _read_content(data: Mapping[str, object], where: str) -> dict[str, Any]:
    """Read the one of `models`, `slices` and `modules` that a document has."""
    present = [key for key in _CONTENT_KEYS if key in data]
    if len(present) != 1:
        got = " and ".join(present) or "none"
        raise RecipeError(
            f"{where}: exactly one of `models`, `slices` and `modules` is required, got {got}"
        )
    key = present[0]
    path = f"{where}: {key}"
    if key == "modules":
        return {"modules": _read_modules(data[key], path)}
    return {"slices": _read_slices(data[key], key, path)}


def _read_modules(data: object, where: str) -> dict[str, Module]:
    # Which modules there are is checked against the model, which is not open yet.
    if not isinstance(data, Mapping) or not data:
        raise RecipeError(f"{where}: expected modules by name, got {shorten(data)}")
    modules = {}
    for name, entry in data.items():
        modules[str(name)] = _read_module(entry, f"{where}.{name}")
    return modules


def _read_module(data: object, where: str) -> Module:
    module = _check_keys(data, ("models", "slices", "parameters"), where)
    if ("models" in module) == ("slices" in module):
        got = "both" if "models" in module else "none"
        raise RecipeError(
            f"{where}: exactly one of `models` and `slices` is required, got {got}"
        )
    key = "models" if "models" in module else "slices"
    path = f"{where}.{key}"
    slices = _read_slices(module[key], key, path)
    parameters = _read_parameters(module.get("parameters"), f"{where}.parameters")
    return Module(slices, parameters)


def _read_slices(
    data: object,
    key: str,
    where: str,
) -> tuple[Slice, ...]:
    """Read the list under `models`, which is one slice of whole models, or under `slices`."""
    if key == "models":
        return (Slice(_read_list(data, where, _read_model)),)
    return _read_list(data, where, _read_slice)


def _read_list(
    data: object,
    where: str,
    read: Callable[[object, str], _T],
) -> tuple[_T, ...]:
    """Read every entry of a list and report the errors of all."""
    if not isinstance(data, list) or not data:
        raise RecipeError(
            f"{where}: expected a list with at least one entry, got {shorten(data)}"
        )
    problems = ErrorCollector()
    entries = []
    for index, entry in enumerate(data):
        path = f"{where}[{index}]"
        with problems.collect():
            entries.append(read(entry, path))
    problems.raise_if_any()
    return tuple(entries)


def _read_model(data: object, where: str) -> Source:
    entry = _check_keys(data, ("model", "parameters"), where)
    model = _read_reference(entry.get("model"), f"{where}.model")
    parameters = _read_parameters(entry.get("parameters"), where)
    return Source(model, parameters=parameters)


def _read_slice(data: object, where: str) -> Slice:
    # mergekit accepts `residual_weight` and ignores it.
    keys = ("sources", "parameters", "base_model", "residual_weight")
    entry = _check_keys(data, keys, where)
    sources = _read_list(entry.get("sources"), f"{where}.sources", _read_slice_source)
    # Layer i of the output merges layer i of every source, so the lengths must agree.
    lengths = set()
    for source in sources:
        if source.layer_range:
            first, end = source.layer_range
            lengths.add(end - first)
    if len(lengths) > 1:
        raise RecipeError(
            f"{where}: all sources of a slice must have the same number of layers, "
            f"got {sorted(lengths)}"
        )
    base_model = entry.get("base_model")
    if base_model is not None:
        base_model = _read_reference(base_model, f"{where}.base_model")
    parameters = _read_parameters(entry.get("parameters"), where)
    return Slice(sources, parameters, base_model)


def _read_slice_source(data: object, where: str) -> Source:
    entry = _check_keys(data, ("model", "layer_range", "parameters"), where)
    layers = _read_layer_range(entry.get("layer_range"), f"{where}.layer_range")
    model = _read_reference(entry.get("model"), f"{where}.model")
    parameters = _read_parameters(entry.get("parameters"), where)
    return Source(model, layers, parameters)


def _read_layer_range(data: object, where: str) -> tuple[int, int]:
    # `type` and not `isinstance`: YAML's `true` is a bool, and bool is a subclass of int.
    if isinstance(data, list) and [type(number) for number in data] == [int, int]:
        first, end = data
        if 0 <= first < end:
            return first, end
    raise RecipeError(
        f"{where}: expected [first, end) with 0 <= first < end, got {shorten(data)}"
    )


def _read_reference(data: object, where: str) -> str:
    """Read a model as `path@revision+adapter@revision`; mergekit's mapping form is accepted."""
    if isinstance(data, Mapping) and "model" in data:
        # `override_architecture` is accepted and ignored: the architecture is inferred.
        _check_keys(data, ("model", "lora", "override_architecture"), where)
        model = _read_reference(data["model"], where)
        if data.get("lora") is None:
            return model
        adapter = _read_reference(data["lora"], where)
        return f"{model}+{adapter}"
    if isinstance(data, Mapping) and "path" in data:
        _check_keys(data, ("path", "revision"), where)
        path = _read_string(data["path"], where)
        if data.get("revision") is None:
            return path
        revision = _read_string(data["revision"], where)
        return f"{path}@{revision}"
    return _read_string(data, where)


def _read_string(data: object, where: str) -> str:
    # A NUL ends a path in the operating system's calls, which raise ValueError for it.
    if not isinstance(data, str) or not data or "\0" in data:
        raise RecipeError(f"{where}: expected a non-empty string, got {shorten(data)}")
    return data


def read_dtype(data: object, where: str) -> str:
    """Read a dtype, as torch names it or with `torch.` before it."""
    # `str(torch.bfloat16)` is "torch.bfloat16", and recipes written by programs have that.
    name = data.removeprefix("torch.") if isinstance(data, str) else data
    if name not in RECIPE_DTYPES:
        raise RecipeError(f"{where}: {unknown_name('dtype', name, RECIPE_DTYPES)}")
    return str(name)


def _read_integer(data: object, where: str) -> int:
    if isinstance(data, bool) or not isinstance(data, int):
        raise RecipeError(f"{where}: expected a whole number, got {shorten(data)}")
    return data


def _read_tokenizer(data: object, where: str) -> Tokenizer:
    entry = _check_keys(data, ("source", "tokens", "pad_to_multiple_of"), where)
    tokens = entry.get("tokens") or {}
    if not isinstance(tokens, Mapping):
        raise RecipeError(
            f"{where}.tokens: expected rules by token, got {shorten(tokens)}"
        )
    padding = _read_padding(
        entry.get("pad_to_multiple_of"), f"{where}.pad_to_multiple_of"
    )
    for token, rule in tokens.items():
        _check_token_rule(rule, f"{where}.tokens[{shorten(token)}]")
    source = "union"
    if entry.get("source") is not None:
        source = _read_reference(entry["source"], f"{where}.source")
    return Tokenizer(source, dict(tokens), padding)


def _read_padding(data: object, where: str) -> int | None:
    if data is None:
        return None
    # Bounded, as every row of padding takes memory in every embedding.
    if type(data) is int and 0 < data <= _MAX_PADDING:
        return data
    raise RecipeError(
        f"{where}: expected a whole number from 1 to {_MAX_PADDING}, got {shorten(data)}"
    )


def _check_token_rule(data: object, where: str) -> None:
    """Check the form of a rule; models and tokens are checked against the vocabularies later."""
    rule = _check_keys(data, ("source", "force"), where)
    source = rule.get("source")
    if isinstance(source, Mapping):
        _check_keys(source, ("kind", "model", "token", "token_id"), f"{where}.source")
        values = list(source.values())
    else:
        values = [source]
    values.append(rule.get("force"))
    for value in values:
        if not isinstance(value, (str, int, type(None))):
            raise RecipeError(
                f"{where}: expected a model, {{kind: zero}} or "
                f"{{kind: model_token, model, token}}, got {shorten(value)}"
            )


def _read_parameters(data: object, where: str) -> Mapping[str, ParameterSetting]:
    if data is None:
        return {}
    if not isinstance(data, Mapping):
        raise RecipeError(
            f"{where}: expected parameters as `name: value`, got {shorten(data)}"
        )
    problems = ErrorCollector()
    for name, setting in data.items():
        with problems.collect():
            _check_setting(setting, f"{where}.{name}")
    problems.raise_if_any()
    return dict(data)


def _check_setting(setting: ParameterSetting, where: str) -> None:
    for value in _scalars(setting, where):
        if not isinstance(value, (int, float, bool, str)):
            raise RecipeError(
                f"{where}: expected a number, a list of numbers or {{filter, value}} entries, "
                f"got {shorten(value)}"
            )


def _scalars(setting: ParameterSetting, where: str) -> Iterator[object]:
    """Iterate over the scalars of a setting while checking its lists."""
    if isinstance(setting, Mapping):
        _check_conditional(setting, where)
        yield from _scalars(setting["value"], where)
        return
    if not isinstance(setting, list):
        yield setting
        return
    if not setting:
        raise RecipeError(f"{where}: a list of values must not be empty")
    n_conditionals = sum(isinstance(entry, Mapping) for entry in setting)
    is_mixture = 0 < n_conditionals < len(setting)
    if is_mixture:
        raise RecipeError(
            f"{where}: a list holds either values or {{filter, value}} entries, not a mixture"
        )
    # Flags and words have no values in between: a gradient of them switches.
    is_of_numbers = _is_number(setting[0])
    for entry in setting:
        if isinstance(entry, Mapping):
            yield from _scalars(entry, where)
        elif (isinstance(entry, (bool, str)) and not is_of_numbers) or _is_number(
            entry
        ):
            yield entry
        else:
            raise RecipeError(
                f"{where}: expected a gradient of numbers, got {shorten(entry)}"
            )


def _is_number(value: object) -> bool:
    """Whether a value is a number, or a text such as `1e-3`, which YAML takes for no number."""
    if not isinstance(value, str):
        return type(value) in (int, float)  # without bool, a subclass of int
    try:
        float(value)
    except ValueError:
        return False
    return True


def _check_conditional(entry: Mapping[str, object], where: str) -> None:
    # A `value` may itself be a gradient, which the caller checks.
    _check_keys(entry, ("filter", "value"), where)
    pattern = entry.get("filter")
    if entry.get("value") is None:
        raise RecipeError(
            f"{where}: `filter: {shorten(pattern)}` needs a `value` beside it"
        )
    if not isinstance(pattern, (str, type(None))):
        raise RecipeError(
            f"{where}: a filter must be a part of tensor names, got {shorten(pattern)}"
        )


def _check_keys(
    data: object,
    known: Sequence[str],
    where: str,
) -> Mapping[str, object]:
    """Return `data` if it is a mapping that has only known keys; report all unknown ones."""
    if data is None:
        raise RecipeError(
            f"{where}: the recipe is empty; write `merge_method`, `base_model` and `models`"
        )
    if not isinstance(data, Mapping):
        _reject_keys(data, known, where)
    problems = ErrorCollector()
    for key in data:
        with problems.collect():
            if key not in known:
                raise RecipeError(f"{where}: {unknown_name('key', key, known)}")
    problems.raise_if_any()
    return data


def _reject_keys(
    data: object,
    known: Sequence[str],
    where: str,
) -> NoReturn:
    keys = ", ".join(known)
    raise RecipeError(f"{where}: expected a mapping with {keys}, got {shorten(data)}")


_FIELD_READERS: Mapping[str, Callable[[object, str], object]] = {
    "base_model": _read_reference,
    "parameters": _read_parameters,
    "dtype": read_dtype,
    "out_dtype": read_dtype,
    "tokenizer_source": _read_reference,
    "tokenizer": _read_tokenizer,
    "chat_template": _read_string,
    "name": _read_string,
    "seed": _read_integer,
    "calibration": _read_string,
}
"""Readers of the optional keys of a document, in the order in which errors are reported."""
