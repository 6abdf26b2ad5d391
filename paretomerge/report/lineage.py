"""The lineage of a recipe: which models its merge comes from, and through which merges.

A recipe with steps is a graph: models with files at the leaves, the result at the root. Equal steps
are one node, whatever they are called.
"""

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from paretomerge.merging.methods import METHODS
from paretomerge.recipe import Recipe
from paretomerge.record.results import Results
from paretomerge.record.trial import Trial
from paretomerge.report.graph import Place, Point, layered
from paretomerge.report.plots import (
    BASELINE_COLOUR,
    FRONT_COLOUR,
    OTHER_COLOUR,
    PICKED_COLOUR,
    styled,
)

if TYPE_CHECKING:
    from plotly.graph_objects import Figure
    from rich.tree import Tree

_TRIAL_STEP = re.compile(r"trial-(\d+)")
_ROW = 62  # pixels from one node to the next in a column
_FRAME = 170  # pixels of heading, margins and legend
_EDGE = "#94a3b8"


@dataclass(frozen=True)
class Node:
    """A model with files, or a merge.

    Attributes:
        key: The same for equal merges, whatever the steps are called.
        name: The model, or the name of the step; empty for the result.
        document: The merge, without its steps; None for a model with files.
        inputs: Keys of what is merged, in the order of the recipe; the base first where it is one
            of the models.
    """

    key: str
    name: str
    document: Recipe | None
    inputs: tuple[str, ...] = ()


def merge_graph(recipe: Recipe) -> list[Node]:
    """Resolve the steps of a recipe.

    Args:
        recipe: The recipe.

    Returns:
        The nodes that its result comes from, each after its inputs; the result is the last.
    """
    step_names = {step.name for step in recipe.steps}
    nodes: dict[str, Node] = {}
    keys: dict[str, str] = {}  # what recipes call a model -> the key of its node
    for document in (*recipe.steps, replace(recipe, steps=())):
        inputs = []
        for model in _merged_models(document, step_names):
            if model not in keys:
                leaf = Node(f"model {model}", model, None)
                nodes[leaf.key] = leaf
                keys[model] = leaf.key
            inputs.append(keys[model])
        key = _key(document, keys)
        name = document.name or ""
        nodes.setdefault(key, Node(key, name, document, tuple(inputs)))
        if document.name is not None:
            keys[document.name] = key
    # `key` is that of the result, the last document.
    needed = {key}
    found: list[Node] = []
    for node in reversed(nodes.values()):
        if node.key in needed:
            needed.update(node.inputs)
            found.insert(0, node)
    return found


def _merged_models(document: Recipe, steps: set[str | None]) -> list[str]:
    """The models that a merge takes something from, each once."""
    models = []
    method = METHODS.get(document.merge_method)
    base = document.base_model
    # A base that deltas are only taken from is no ancestor, unless it is a merge itself.
    is_merged = method is not None and method.base in ("source", "optional")
    if base is not None and (is_merged or base in steps):
        models.append(base)
    for part in document.all_slices():
        models += [source.model for source in part.sources]
    return list(dict.fromkeys(models))


def _key(document: Recipe, keys: Mapping[str, str]) -> str:
    # Only a result has a tokenizer, and no name counts.
    plain = replace(
        document, name=None, tokenizer_source=None, tokenizer=None, chat_template=None
    )
    return plain.rename_models(lambda model: keys.get(model, model)).key


def lineage_tree(recipe: Recipe) -> "Tree":
    """Draw the lineage of a recipe for a terminal.

    Args:
        recipe: The recipe.

    Returns:
        A tree whose root is the result. A merge that several others use is drawn once.
    """
    from rich.text import Text
    from rich.tree import Tree

    nodes = {node.key: node for node in merge_graph(recipe)}
    root = next(reversed(nodes.values()))
    drawn: set[str] = set()

    def add(tree: Tree, node: Node) -> None:
        for key in node.inputs:
            child = nodes[key]
            if child.document is None:
                tree.add(Text(child.name))
            elif key in drawn:
                tree.add(Text(f"{child.name} (above)", style="dim"))
            else:
                drawn.add(key)
                add(tree.add(Text(f"{child.name}: {_settings(child.document)}")), child)

    assert root.document is not None
    tree = Tree(Text(_settings(root.document), style="bold"))
    add(tree, root)
    return tree


def _settings(document: Recipe) -> str:
    """The method of a merge and its settings for all models."""
    parts = [document.merge_method]
    for name, value in document.parameters.items():
        parts.append(f"{name} {value}")
    if document.seed:
        parts.append(f"seed {document.seed}")
    return ", ".join(parts)


def plot_lineage(results: Results, trial: Trial) -> list["Figure"]:
    """Plot the lineage of a trial: sources on the left, the trial on the right.

    Args:
        results: The study's results, from which the scores of ancestors are taken.
        trial: The trial.

    Returns:
        One figure; none where the recipe has no steps.
    """
    from plotly.graph_objects import Figure

    if not trial.recipe.steps:
        return []
    nodes = merge_graph(trial.recipe)
    trials = _trials_of(nodes, results, trial)
    places = layered({node.key: node.inputs for node in nodes})
    figure = Figure()
    for trace in _edges(nodes, places):
        figure.add_scatter(**trace)
    for trace in _markers(nodes, places, trials, results, trial):
        figure.add_scatter(**trace)
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    measure = "mean search score" if results.has_mean else "search scores"
    heading = f"Lineage of {trial.name}, with the {measure} of each merge"
    height = _FRAME + round(_ROW * _rows(places))
    return [styled(figure, heading, height)]


def _rows(places: Mapping[str, Place]) -> float:
    """The rows that the graph and its edges take."""
    heights = [place.y for place in places.values()]
    for place in places.values():
        for path in place.paths.values():
            heights += [y for _, y in path]
    return max(heights) - min(heights) + 1


def _trials_of(
    nodes: Sequence[Node], results: Results, picked: Trial
) -> dict[str, Trial]:
    """Key of a node -> the trial that scored this merge."""
    by_number = {trial.number: trial for trial in results.trials}
    trials: dict[str, Trial] = {}
    for node in nodes:
        if node.document is None:
            for trial in results.trials:
                is_source = trial.label in results.sources
                if not is_source or trial.label != Path(node.name).name:
                    continue
                if not trial.failure and node.name in trial.recipe.source_models:
                    trials[node.key] = trial
            continue
        named = _TRIAL_STEP.fullmatch(node.name)
        trial_of_step = by_number.get(int(named[1])) if named else None
        if trial_of_step is None or trial_of_step.failure:
            continue
        # Compared, because a recipe from elsewhere may use the same names.
        if merge_graph(trial_of_step.recipe)[-1].key == node.key:
            trials[node.key] = trial_of_step
    trials[nodes[-1].key] = picked
    return trials


def _edges(
    nodes: Sequence[Node], places: Mapping[str, Place]
) -> list[dict[str, object]]:
    """A line from each input to its merge.

    It is dotted where the order of the models matters, from all but the first of them.
    """
    ways: dict[str, list[Sequence[Point]]] = {"solid": [], "dot": []}
    for node in nodes:
        for key in node.inputs:
            is_first = key == node.inputs[0]
            dash = "solid" if is_first or _is_symmetric(node) else "dot"
            ways[dash].append(places[node.key].path_from(key))
    names = {"solid": "merged from", "dot": "moved towards"}
    traces: list[dict[str, object]] = []
    for dash, paths in ways.items():
        if not paths:
            continue
        xs: list[float | None] = []
        ys: list[float | None] = []
        for path in paths:
            # None ends a line.
            xs += [*(x for x, _ in path), None]
            ys += [*(y for _, y in path), None]
        traces.append(
            {
                "x": xs,
                "y": ys,
                "mode": "lines",
                "line": {"color": _EDGE, "width": 1.4, "dash": dash, "shape": "spline"},
                "name": names[dash],
                "hoverinfo": "skip",
            }
        )
    return traces


def _is_symmetric(node: Node) -> bool:
    if node.document is None:
        return True
    method = METHODS.get(node.document.merge_method)
    return method is None or method.symmetric


def _markers(
    nodes: Sequence[Node],
    places: Mapping[str, Place],
    trials: Mapping[str, Trial],
    results: Results,
    picked: Trial,
) -> list[dict[str, object]]:
    """The nodes with their labels, a trace for each colour."""
    on_front = {trial.number for trial in results.front}
    groups: dict[str, list[Node]] = {}
    for node in nodes:
        trial = trials.get(node.key)
        if node is nodes[-1]:
            group = "picked"
        elif node.document is None:
            group = "models"
        elif trial is not None and trial.number in on_front:
            group = "merges on the front"
        else:
            group = "other merges"
        groups.setdefault(group, []).append(node)
    colours = {
        "models": BASELINE_COLOUR,
        "other merges": OTHER_COLOUR,
        "merges on the front": FRONT_COLOUR,
        "picked": PICKED_COLOUR,
    }
    traces: list[dict[str, object]] = []
    for group, colour in colours.items():
        members = groups.get(group, [])
        if not members:
            continue
        labels = []
        details = []
        for node in members:
            trial = trials.get(node.key)
            labels.append(_label(node, trial, results, picked))
            details.append(_detail(node, trial))
        traces.append(
            {
                "x": [places[node.key].x for node in members],
                "y": [places[node.key].y for node in members],
                "mode": "markers+text",
                "text": labels,
                "textposition": "bottom center",
                "textfont": {"size": 11},
                "hovertext": details,
                "hovertemplate": "%{hovertext}<extra></extra>",
                "marker": {"color": colour, "size": 13},
                "name": group,
                "cliponaxis": False,
            }
        )
    return traces


def _label(node: Node, trial: Trial | None, results: Results, picked: Trial) -> str:
    """A node's name and method, and its score below."""
    name = Path(node.name).name
    if trial is not None and node.document is not None:
        name = f"trial {trial.number}"
    if trial is picked:
        name = picked.name
    lines = [name]
    if node.document is not None:
        lines = [f"{name}, {node.document.merge_method}"]
    if trial is not None:
        mean = results.mean(trial.scores)
        if mean is not None:
            lines.append(f"{mean:.3f}")
        else:
            names = [objective.name for objective in results.objectives]
            lines.append(" / ".join(trial.scores[name].text for name in names))
    # plotly reads markup in texts.
    return "<br>".join(html.escape(line) for line in lines)


def _detail(node: Node, trial: Trial | None) -> str:
    lines = [node.name or "the result"]
    if node.document is not None:
        lines.append(_settings(node.document))
    for name, score in (trial.scores if trial is not None else {}).items():
        lines.append(f"{name} {score.text}")
    return "<br>".join(html.escape(line) for line in lines)
