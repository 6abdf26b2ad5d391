"""The source models of a space: their short names, and a digest of their files."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from paretomerge.arguments import mapping_of, sequence_of
from paretomerge.arguments import model as read_model
from paretomerge.checkpoint.digest import digest_of_weights
from paretomerge.checkpoint.reference import is_folder, model_parts
from paretomerge.errors import ConfigError
from paretomerge.recipe import resolve_model_path


def named_sources(models: Sequence[str]) -> dict[str, str]:
    """Return short names for models.

    Args:
        models: Paths or Hub names.

    Returns:
        Name -> model. The name is the last part of the path, or the whole path with `_` for `/`
        where two models have the same last part.

    Raises:
        ConfigError: Two models have the same name.
    """
    last_parts = [Path(model).name for model in models]
    sources: dict[str, str] = {}
    for last_part, model in zip(last_parts, models, strict=True):
        name = last_part
        if last_parts.count(last_part) > 1:
            name = model.replace("/", "_")
        if name in sources and sources[name] == model:
            raise ConfigError(f"models: {model} is listed twice; list each model once")
        if name in sources:
            raise ConfigError(
                f"models: {sources[name]} and {model} would both be named {name}; rename a folder"
            )
        sources[name] = model
    return sources


def read_sources(models: object) -> dict[str, str]:
    """Read the models that a Python caller names.

    Args:
        models: A list of paths or Hub names, or short name -> model.

    Returns:
        Short name -> model, as text. A path of another type than the one that a recipe holds would
        not be found again in its plan.

    Raises:
        ConfigError: It is something else, or two models have the same name.
    """
    if isinstance(models, Mapping):
        sources: dict[str, str] = mapping_of(read_model, '{"math": "./math"}')(
            "models", models
        )
        return sources
    return named_sources(
        sequence_of(read_model, '["./math", "./code"]')("models", models)
    )


def model_path(folder: Path, model: str) -> str:
    """Make the local paths of a model and its adapter absolute.

    Args:
        folder: Where relative paths start.
        model: A path, also `model+adapter`. Anything that is not a local path is a name on the Hub.

    Returns:
        The path.
    """
    name = resolve_model_path(folder, model)
    absolute = []
    for part in model_parts(name):
        if part.startswith((".", "/")):
            part = str((folder / part).resolve())
        absolute.append(part)
    return "+".join(absolute)


def neutral_path(folder: Path, model: str) -> str:
    """The same path for a model however it is written, also after its folder has moved.

    Args:
        folder: Where relative paths start.
        model: A path, also `model+adapter`, or a name on the Hub.

    Returns:
        The path from the folder where the model is below it; else the whole path.
    """
    root = folder.resolve()
    parts = model_path(root, model).split("+")
    return "+".join(part.removeprefix(f"{root}/") for part in parts)


def digest(model: str) -> str:
    """Return a digest of a local model's weights that changes when the model is trained again.

    Args:
        model: Path of a model, also `model+adapter`. Parts from the Hub are ignored.

    Returns:
        16 hexadecimal digits; "" if the model has no local files.
    """
    parts = filter(is_folder, model_parts(model))
    folders = [Path(part).expanduser() for part in parts]
    return digest_of_weights(folders)
