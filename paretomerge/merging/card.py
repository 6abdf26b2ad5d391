"""The model card of a merge: what it was made of, under which licences, how to make it again, and checksums."""

import re
from collections.abc import Mapping
from pathlib import Path

import yaml

from paretomerge.checkpoint.adapter import AdaptedCheckpoint
from paretomerge.checkpoint.reference import reject_symlink_escape
from paretomerge.errors import CheckpointError
from paretomerge.merging.plan.plan import Plan
from paretomerge.merging.plan.steps import RecipeStep

_ON_HUB = re.compile(r"[\w.-]+/[\w.-]+(@.*)?$")


def model_card(plan: Plan, title: str, more: str, checksums: Mapping[str, str]) -> str:
    """Markdown with the Hub's front matter. more: text after the list of sources; checksums: file -> SHA-256."""
    files = plan.recipe.source_models
    named = dict.fromkeys(part for model in files for part in model.split("+"))
    licences = _licences(plan)
    front = {
        "library_name": "transformers",
        "base_model": [
            m.partition("@")[0] for m in named if _ON_HUB.match(m) and not Path(m).exists()
        ],
        "tags": ["merge", "mergekit", "paretomerge"],
    }
    known = {value for value in licences.values() if value}
    if len(known) == 1 and all(licences.values()):
        front["license"] = known.pop()
    header = yaml.safe_dump({k: v for k, v in front.items() if v}, sort_keys=False)
    rows = "\n".join(f"| {model} | {licences.get(model) or 'not stated'} |" for model in files)
    sums = "\n".join(f"{value}  {name}" for name, value in checksums.items())
    recipe = plan.recipe.to_yaml()
    return (
        f"---\n{header}---\n# {title}\n\nMerged with paretomerge by `{plan.recipe.merge_method}` "
        f"({plan.method.paper}) from:\n\n| source | licence |\n|---|---|\n{rows}\n\n"
        f"A merge is bound by the licences of all its sources.\n\n{more}\n\n"
        f"Rebuild it with `paretomerge merge mergekit_config.yml OUT`:\n\n```yaml\n{recipe}```\n\n"
        f"SHA-256 (`sha256sum --check`):\n\n```\n{sums}\n```\n"
    )


def _licences(plan: Plan) -> dict[str, str | None]:
    """By model, those of steps and adapters included; None where one of a model's parts states none."""
    found: dict[str, str | None] = {}
    for model, weights in plan.weights.items():
        if isinstance(weights, RecipeStep):
            found |= _licences(weights.plan)
        elif isinstance(weights, AdaptedCheckpoint):
            both = [licence(weights.folder), licence(weights.adapter)]
            found[model] = (
                None if None in both else " + ".join(dict.fromkeys(str(one) for one in both))
            )
        else:
            found[model] = licence(weights.folder)
    return found


def licence(folder: Path) -> str | None:
    """What the front matter of a model's README says."""
    readme = folder / "README.md"
    if not readme.is_file():
        return None
    try:
        text = reject_symlink_escape(readme).read_text(encoding="utf-8", errors="replace")
        found = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
        front = (
            yaml.load(found[1], yaml.BaseLoader) if found else None
        )  # makes texts, lists and mappings only
    except (CheckpointError, OSError, yaml.YAMLError, RecursionError, ValueError, TypeError):
        return None  # a card that can't be read states nothing
    value = front.get("license") if isinstance(front, dict) else None
    return value if isinstance(value, str) and value not in ("", "~", "null") else None
