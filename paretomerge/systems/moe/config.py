"""The YAML of mergekit-moe: which models become experts, and which prompts belong to each.

Keys: https://github.com/arcee-ai/mergekit/blob/main/docs/moe.md
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from paretomerge.arguments import as_float, as_integer, expand_home, plain_data
from paretomerge.arguments import path as read_path
from paretomerge.errors import (
    ConfigError,
    ErrorCollector,
    RecipeError,
    shorten,
    unknown_name,
)
from paretomerge.recipe.grammar import RECIPE_DTYPES
from paretomerge.recipe.recipe import resolve_model_path
from paretomerge.recipe.text import MAX_CHARACTERS, check_data, dump, parse

GATE_MODES = ("hidden", "cheap_embed", "random")
"""Where the rows of the router come from."""

_KEYS = (
    "base_model",
    "gate_mode",
    "dtype",
    "experts_per_token",
    "experts",
    "shared_experts",
    "architecture",
)
_EXPERT_KEYS = (
    "source_model",
    "positive_prompts",
    "negative_prompts",
    "residual_scale",
)
_YAML_MARK = "\n"
_T = TypeVar("_T")


@dataclass(frozen=True)
class MoeExpert:
    """A dense model whose MLPs become one expert of every layer.

    Attributes:
        source_model: A folder or a Hub name, perhaps with `@revision` and `+adapter`.
        positive_prompts: What the router should send to this expert.
        negative_prompts: What it should send elsewhere.
        residual_scale: Factor of the expert's output.
    """

    source_model: str
    positive_prompts: tuple[str, ...] = ()
    negative_prompts: tuple[str, ...] = ()
    residual_scale: float = 1.0


@dataclass(frozen=True)
class MoeConfig:
    """A mixture of experts to build from dense models.

    Attributes:
        base_model: Gives attention, norms, embeddings, head, tokenizer and config.
        experts: The experts that the router chooses from.
        gate_mode: One of `GATE_MODES`.
        dtype: Dtype of the result; None for that of the base.
        experts_per_token: Experts that each token goes through.
        shared_experts: Experts that every token goes through, besides.
        architecture: The architecture of the result; None to choose it by the base.
    """

    base_model: str
    experts: tuple[MoeExpert, ...]
    gate_mode: str = "hidden"
    dtype: str | None = None
    experts_per_token: int = 2
    shared_experts: tuple[MoeExpert, ...] = ()
    architecture: str | None = None

    @property
    def all_experts(self) -> tuple[MoeExpert, ...]:
        """The routed experts, then the shared ones."""
        return (*self.experts, *self.shared_experts)

    @property
    def source_models(self) -> tuple[str, ...]:
        """The base and the experts' models, each once."""
        experts = [expert.source_model for expert in self.all_experts]
        return tuple(dict.fromkeys((self.base_model, *experts)))

    def rename_models(self, rename: Callable[[str], str]) -> "MoeConfig":
        """Return a copy with every model renamed."""

        def renamed(experts: tuple[MoeExpert, ...]) -> tuple[MoeExpert, ...]:
            copies = []
            for expert in experts:
                name = rename(expert.source_model)
                copies.append(replace(expert, source_model=name))
            return tuple(copies)

        return replace(
            self,
            base_model=rename(self.base_model),
            experts=renamed(self.experts),
            shared_experts=renamed(self.shared_experts),
        )

    def resolve_paths(self, folder: Path) -> "MoeConfig":
        """Return a copy whose model paths that exist under `folder` point there."""
        return self.rename_models(lambda model: resolve_model_path(folder, model))

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as plain data, without what has its default."""
        content: dict[str, Any] = {
            "base_model": self.base_model,
            "gate_mode": self.gate_mode,
            "dtype": self.dtype,
            "experts_per_token": self.experts_per_token,
            "architecture": self.architecture,
        }
        content["experts"] = [_expert_content(expert) for expert in self.experts]
        shared = [_expert_content(expert) for expert in self.shared_experts]
        content["shared_experts"] = shared or None
        return {key: value for key, value in content.items() if value is not None}

    def to_yaml(self) -> str:
        """Write the configuration as YAML that `as_moe_config` reads."""
        return dump(self.to_dict())


MoeConfigLike = MoeConfig | Mapping[str, object] | str | Path
"""A configuration, or what one can be read from. See `as_moe_config`."""


def as_moe_config(config: MoeConfigLike) -> MoeConfig:
    """Read a configuration.

    Args:
        config: A `MoeConfig`, a mapping, the path of a YAML file, or YAML text of several lines.
            Relative model paths that exist beside the file are resolved against its folder.

    Returns:
        The configuration.

    Raises:
        RecipeError: If the file cannot be read, or with every error of its content.
    """
    if isinstance(config, MoeConfig):
        # Its fields may hold anything: they are checked as those of a file are.
        return _read(config.to_dict(), "moe")
    if isinstance(config, Mapping):
        return _read(config, "moe")
    if isinstance(config, str) and _YAML_MARK in config:
        return _read(_only_document(config, "moe"), "moe")
    try:
        path = Path(read_path("config", config))
    except ConfigError as error:
        raise RecipeError(str(error)) from error
    try:
        with path.open(encoding="utf-8") as stream:
            text = stream.read(MAX_CHARACTERS + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from error
    document = _only_document(text, str(path))
    return _read(document, str(path)).resolve_paths(path.parent)


def _only_document(text: str, where: str) -> object:
    documents = parse(text, where)
    if len(documents) > 1:
        raise RecipeError(
            f"{where}: has {len(documents)} YAML documents; a mixture of experts is one document"
        )
    return documents[0]


def _read(data: object, where: str) -> MoeConfig:
    """Check plain data and freeze it.

    Raises:
        RecipeError: With every error, each with the path of its key.
    """
    check_data(data, where)
    content = _mapping(plain_data(data), where)
    problems = ErrorCollector()
    _check_keys(content, _KEYS, where, problems)
    if "merge_method" in content:
        raise RecipeError(
            f"{where}: is a recipe of a merge (`merge_method`); write it with `paretomerge merge`"
        )
    fields: dict[str, Any] = {}

    def collect(key: str, read: Callable[[object, str], _T]) -> None:
        if content.get(key) is not None:
            with problems.collect():
                fields[key] = read(content[key], f"{where}: {key}")

    collect("base_model", _model)
    collect("experts", _experts)
    collect("shared_experts", _experts)
    collect("gate_mode", _gate_mode)
    collect("dtype", _dtype)
    collect("experts_per_token", _count)
    collect("architecture", _text)
    for key in ("base_model", "experts"):
        with problems.collect():
            if content.get(key) is None:
                raise RecipeError(f"{where}: {key}: required key is missing")
    problems.raise_if_any()
    config = MoeConfig(**fields)
    _check_counts(config, where, problems)
    _check_prompts(config, where, problems)
    problems.raise_if_any()
    return config


def _check_keys(
    content: Mapping[str, object],
    known: tuple[str, ...],
    where: str,
    problems: ErrorCollector,
) -> None:
    for key in content:
        with problems.collect():
            if key == "noise_scale":
                raise RecipeError(
                    f"{where}: noise_scale: noise for later training is not supported; "
                    "leave it out"
                )
            if key not in known:
                raise RecipeError(f"{where}: {unknown_name('key', key, known)}")


def _check_counts(config: MoeConfig, where: str, problems: ErrorCollector) -> None:
    with problems.collect():
        count = len(config.experts)
        if config.experts_per_token > count:
            raise RecipeError(
                f"{where}: experts_per_token: {config.experts_per_token} of {count} experts; "
                "use fewer, or add experts"
            )
    with problems.collect():
        if len(config.shared_experts) > 1:
            raise RecipeError(
                f"{where}: shared_experts: no architecture has more than one; name one"
            )


def _check_prompts(config: MoeConfig, where: str, problems: ErrorCollector) -> None:
    """Check that there are prompts where the router is made of them."""
    if config.gate_mode == "random":
        return
    for index, expert in enumerate(config.experts):
        with problems.collect():
            if not expert.positive_prompts:
                raise RecipeError(
                    f"{where}: experts[{index}].positive_prompts: needed for gate_mode "
                    f"{config.gate_mode}; say what this expert is for"
                )
    for index, expert in enumerate(config.shared_experts):
        with problems.collect():
            if expert.negative_prompts and not expert.positive_prompts:
                raise RecipeError(
                    f"{where}: shared_experts[{index}].negative_prompts: have no meaning without "
                    "positive_prompts; add some, or leave both out"
                )
    seen: dict[tuple[frozenset[str], frozenset[str]], int] = {}
    for index, expert in enumerate(config.experts):
        prompts = (
            frozenset(expert.positive_prompts),
            frozenset(expert.negative_prompts),
        )
        first = seen.setdefault(prompts, index)
        with problems.collect():
            if first != index and expert.positive_prompts:
                raise RecipeError(
                    f"{where}: experts[{index}] has the prompts of experts[{first}], so the "
                    "router could not tell them apart; give them different prompts"
                )


def _experts(value: object, where: str) -> tuple[MoeExpert, ...]:
    if not isinstance(value, list) or not value:
        raise RecipeError(
            f"{where}: expected a list of experts, each with `source_model`, got {shorten(value)}"
        )
    problems = ErrorCollector()
    experts = []
    for index, entry in enumerate(value):
        with problems.collect():
            experts.append(_expert(entry, f"{where}[{index}]"))
    problems.raise_if_any()
    return tuple(experts)


def _expert(value: object, where: str) -> MoeExpert:
    content = _mapping(value, where)
    problems = ErrorCollector()
    _check_keys(content, _EXPERT_KEYS, where, problems)
    fields: dict[str, Any] = {}
    readers: dict[str, Callable[[object, str], object]] = {
        "source_model": _model,
        "positive_prompts": _prompts,
        "negative_prompts": _prompts,
        "residual_scale": _number,
    }
    for key, read in readers.items():
        if content.get(key) is not None:
            with problems.collect():
                fields[key] = read(content[key], f"{where}.{key}")
    with problems.collect():
        if content.get("source_model") is None:
            raise RecipeError(f"{where}.source_model: required key is missing")
    problems.raise_if_any()
    return MoeExpert(**fields)


def _expert_content(expert: MoeExpert) -> dict[str, object]:
    """The keys of an expert that differ from their defaults."""
    content: dict[str, object] = {}
    default = MoeExpert(source_model="")
    for key, value in asdict(expert).items():
        if value != getattr(default, key):
            content[key] = list(value) if isinstance(value, tuple) else value
    return content


def _mapping(value: object, where: str) -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        raise RecipeError(f"{where}: expected keys with values, got {shorten(value)}")
    return value


def _text(value: object, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise RecipeError(
            f"{where}: expected text that is not empty, got {shorten(value)}"
        )
    return value


def _model(value: object, where: str) -> str:
    parts = [expand_home(part) for part in _text(value, where).split("+")]
    return "+".join(parts)


def _prompts(value: object, where: str) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise RecipeError(f"{where}: expected a list of texts, got {shorten(value)}")
    prompts = []
    for index, entry in enumerate(value):
        text = _text(entry, f"{where}[{index}]")
        if not text.strip():
            raise RecipeError(f"{where}[{index}]: is blank; write a prompt")
        if text in prompts:
            raise RecipeError(
                f"{where}[{index}]: is there twice ({shorten(text)}); remove one"
            )
        prompts.append(text)
    return tuple(prompts)


def _number(value: object, where: str) -> float:
    number = None if isinstance(value, bool) else as_float(value)
    if number is None:
        raise RecipeError(f"{where}: expected a number, got {shorten(value)}")
    return number


def _count(value: object, where: str) -> int:
    number = as_integer(value)
    if number is None or number < 1:
        raise RecipeError(
            f"{where}: expected a whole number, 1 or more, got {shorten(value)}"
        )
    return number


def _gate_mode(value: object, where: str) -> str:
    if value not in GATE_MODES:
        raise RecipeError(f"{where}: {unknown_name('gate mode', value, GATE_MODES)}")
    return str(value)


def _dtype(value: object, where: str) -> str:
    if value not in RECIPE_DTYPES:
        raise RecipeError(f"{where}: {unknown_name('dtype', value, RECIPE_DTYPES)}")
    return str(value)
