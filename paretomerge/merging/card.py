"""The model card of a merge: its sources, their licences, the recipe and checksums of the files."""

import re
from collections.abc import Mapping
from pathlib import Path

import yaml

from paretomerge.checkpoint.adapter import AdaptedCheckpoint
from paretomerge.checkpoint.model_config import DEQUANTIZED_FROM
from paretomerge.checkpoint.reference import reject_symlink_escape
from paretomerge.errors import CheckpointError
from paretomerge.merging.plan.one_layout import ArrangedWeights
from paretomerge.merging.plan.plan import Plan, Weights
from paretomerge.merging.plan.steps import RecipeStep

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@.*)?$")
_FRONT_MATTER = re.compile(r"---\s*\n(.*?)\n---", re.DOTALL)
_NO_LICENCE = ("", "~", "null")

_CARD = """\
---
{front_matter}---
# {title}

Merged with paretomerge by `{method}` ({paper}) from:

| source | licence |
|---|---|
{sources}

A merge is bound by the licences of all its sources.

{notes}

Rebuild it with `paretomerge merge mergekit_config.yml OUT`:

```yaml
{recipe}```

SHA-256 (`sha256sum --check`):

```
{checksums}
```
"""


def model_card(
    plan: Plan,
    title: str,
    text: str,
    checksums: Mapping[str, str],
) -> str:
    """Write the model card of a merge.

    Args:
        plan: The merge.
        title: The heading.
        text: What follows the list of sources.
        checksums: File name -> SHA-256.

    Returns:
        Markdown with the front matter of the Hugging Face Hub.
    """
    licences = _licences(plan)
    sources = []
    for model in plan.recipe.source_models:
        stated = licences.get(model) or "not stated"
        sources.append(f"| {_public_name(model)} | {stated} |")
    # The format of `sha256sum`
    lines_of_checksums = []
    for name, checksum in checksums.items():
        lines_of_checksums.append(f"{checksum}  {name}")
    return _CARD.format(
        front_matter=_front_matter(plan, licences),
        title=title,
        method=plan.recipe.merge_method,
        paper=plan.method.paper,
        sources="\n".join(sources),
        notes="\n\n".join(note for note in (_dequantised(plan), text) if note),
        recipe=plan.recipe.rename_models(_public_name).to_yaml(),
        checksums="\n".join(lines_of_checksums),
    )


def _public_name(model: str) -> str:
    """A Hub name as it is; of a local folder its name alone, since a card may be published."""
    parts = []
    for part in model.split("+"):
        is_local = part.startswith((".", "/", "~")) or Path(part).exists()
        parts.append(Path(part).name if is_local else part)
    return "+".join(parts)


def _front_matter(plan: Plan, licences: Mapping[str, str | None]) -> str:
    """YAML for the Hub: its models among the sources, tags, and the licence if they share one."""
    hub_models: dict[str, None] = {}
    for model in plan.recipe.source_models:
        for part in model.split("+"):
            if _HUB_NAME.match(part) and not Path(part).exists():
                hub_models[part] = None
    front: dict[str, object] = {"library_name": "transformers"}
    if hub_models:
        # The Hub takes a repository without its revision.
        repositories = []
        for model in hub_models:
            repositories.append(model.partition("@")[0])
        front["base_model"] = repositories
    front["tags"] = ["merge", "mergekit", "paretomerge"]
    distinct = set(licences.values())
    if len(distinct) == 1 and None not in distinct:
        front["license"] = distinct.pop()
    return yaml.safe_dump(front, sort_keys=False)


def _licences(plan: Plan) -> dict[str, str | None]:
    """Model -> licence, with those of earlier steps; None where one of its parts states none."""
    return {model: _licence_of(weights) for model, weights in _sources(plan).items()}


def _sources(plan: Plan) -> dict[str, Weights]:
    """Model -> its weights, with the models of earlier steps in place of their results."""
    sources: dict[str, Weights] = {}
    for model, weights in plan.weights.items():
        if isinstance(weights, ArrangedWeights):
            weights = weights.weights
        if isinstance(weights, RecipeStep):
            sources |= _sources(weights.plan)
        else:
            sources[model] = weights
    return sources


def _dequantised(plan: Plan) -> str:
    """A paragraph on sources that were quantised; nothing without such a source."""
    lines = []
    for model, weights in _sources(plan).items():
        origin = weights.config.get(DEQUANTIZED_FROM)
        if origin:
            lines.append(
                f"The weights of {_public_name(model)} were dequantised from {origin}, and keep "
                "the error of that quantisation."
            )
    return "\n".join(lines)


def _licence_of(weights: Weights) -> str | None:
    model_licence = licence(weights.folder)
    if not isinstance(weights, AdaptedCheckpoint):
        return model_licence
    adapter_licence = licence(weights.adapter)
    if model_licence is None or adapter_licence is None:
        return None
    return " + ".join(dict.fromkeys((model_licence, adapter_licence)))


def licence(folder: Path) -> str | None:
    """Read the licence that a model's README states in its front matter.

    Args:
        folder: The folder of a model or an adapter.

    Returns:
        The identifier, or None where there is no readable statement.
    """
    readme = folder / "README.md"
    if not readme.is_file():
        return None
    try:
        text = reject_symlink_escape(readme).read_text(
            encoding="utf-8", errors="replace"
        )
        match = _FRONT_MATTER.match(text)
        if match is None:
            return None
        # BaseLoader makes only strings, lists and mappings.
        front = yaml.load(match[1], yaml.BaseLoader)
    except (
        CheckpointError,
        OSError,
        yaml.YAMLError,
        RecursionError,
        ValueError,
        TypeError,
    ):
        # A card that cannot be read states no licence, and does not stop a merge.
        return None
    if not isinstance(front, dict):
        return None
    value = front.get("license")
    if not isinstance(value, str) or value in _NO_LICENCE:
        return None
    return value
