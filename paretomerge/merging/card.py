"""The model card of a merge: its sources, their licences, the recipe and checksums of the files."""

import re
from collections.abc import Iterable, Mapping, Sequence
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

{notes}Rebuild it with `paretomerge merge mergekit_config.yml OUT`:

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
    licences = licences_of(plan)
    stated = {model: licences.get(model) for model in plan.recipe.source_models}
    return _CARD.format(
        front_matter=front_matter(
            plan.recipe.source_models, licences.values(), ("merge", "mergekit")
        ),
        title=title,
        method=plan.recipe.merge_method,
        paper=plan.method.paper,
        sources=table_of_sources(stated),
        notes=paragraphs(dequantised_note(_sources(plan)), text),
        recipe=plan.recipe.rename_models(public_name).to_yaml(),
        checksums=checksum_lines(checksums),
    )


def table_of_sources(licences: Mapping[str, str | None]) -> str:
    """Return the rows of a table of models with their licences; None is none that is stated."""
    rows = []
    for model, licence_name in licences.items():
        rows.append(f"| {public_name(model)} | {licence_name or 'not stated'} |")
    return "\n".join(rows)


def paragraphs(*notes: str) -> str:
    """Join notes that are not empty, each with an empty line behind it."""
    return "".join(f"{note}\n\n" for note in notes if note)


def checksum_lines(checksums: Mapping[str, str]) -> str:
    """Return checksums by file name in the format of `sha256sum`."""
    lines = [f"{checksum}  {name}" for name, checksum in checksums.items()]
    return "\n".join(lines)


def public_name(model: str) -> str:
    """Return the name of a model in a card, which may be published.

    Args:
        model: A Hub name or a folder, perhaps with `+adapter`.

    Returns:
        A Hub name as it is; of a local folder its name alone.
    """
    parts = []
    for part in model.split("+"):
        is_local = part.startswith((".", "/", "~")) or Path(part).exists()
        parts.append(Path(part).name if is_local else part)
    return "+".join(parts)


def public_notes(notes: Iterable[str], models: Iterable[str]) -> tuple[str, ...]:
    """Return the notes of a plan as a folder may hold them that is published.

    Args:
        notes: Sentences, which name models as the recipe does.
        models: These names.
    """
    # A name may be a part of a longer one.
    longest_first = sorted(models, key=len, reverse=True)
    result = []
    for note in notes:
        for model in longest_first:
            note = note.replace(model, public_name(model))
        result.append(note)
    return tuple(result)


def front_matter(
    models: Iterable[str], licences: Iterable[str | None], tags: Sequence[str]
) -> str:
    """Write the front matter of a card.

    Args:
        models: The sources. Those on the Hub are listed.
        licences: Their licences; None where one states none.
        tags: What kind of model it is.

    Returns:
        YAML for the Hub, with the licence if all sources share one.
    """
    hub_models: dict[str, None] = {}
    for model in models:
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
    front["tags"] = [*tags, "paretomerge"]
    distinct = set(licences)
    if len(distinct) == 1 and None not in distinct:
        front["license"] = distinct.pop()
    return yaml.safe_dump(front, sort_keys=False)


def licences_of(plan: Plan) -> dict[str, str | None]:
    """Model -> licence, with those of earlier steps; None where one of its parts states none."""
    return {model: licence_of(weights) for model, weights in _sources(plan).items()}


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


def dequantised_note(sources: Mapping[str, Weights]) -> str:
    """Return a paragraph on sources that were quantised; nothing without such a source."""
    lines = []
    for model, weights in sources.items():
        origin = weights.config.get(DEQUANTIZED_FROM)
        if origin:
            lines.append(
                f"The weights of {public_name(model)} were dequantised from {origin}, and keep "
                "the error of that quantisation."
            )
    # Paragraphs: Markdown joins lines that follow each other.
    return "\n\n".join(lines)


def licence_of(weights: Weights) -> str | None:
    """Return the licence of an opened model and of its adapter; None if one states none."""
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
