"""The lineage of a recipe: its graph, the plot and the tree of a terminal."""

import io
from dataclasses import replace

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from paretomerge.cli.main import app
from paretomerge.evaluate.evaluator import Objective, Score
from paretomerge.recipe import Recipe
from paretomerge.record.results import Results
from paretomerge.record.trial import Trial
from paretomerge.report.graph import layered
from paretomerge.report.lineage import lineage_tree, merge_graph, plot_lineage


def crossover(first, second, name=None, seed=1):
    content = {
        "merge_method": "crossover",
        "base_model": first,
        "models": [{"model": first}, {"model": second}],
        "seed": seed,
    }
    return content | ({"name": name} if name else {})


def recipe_of(*documents):
    return Recipe.from_yaml("---\n".join(yaml.safe_dump(one) for one in documents))


FAMILY = (
    crossover("m/ada", "m/bob", "trial-2"),
    crossover("trial-2", "m/ada", "trial-3"),
    crossover("trial-3", "trial-2"),
)


def drawn(recipe):
    console = Console(file=io.StringIO(), width=100)
    console.print(lineage_tree(recipe))
    return console.file.getvalue()


def test_the_graph_of_a_family():
    nodes = merge_graph(recipe_of(*FAMILY))
    assert [node.name for node in nodes] == ["m/ada", "m/bob", "trial-2", "trial-3", ""]
    by_name = {node.name: node for node in nodes}
    names = {node.key: node.name for node in nodes}
    found = {
        name: [names[key] for key in node.inputs] for name, node in by_name.items()
    }
    assert found == {
        "m/ada": [],
        "m/bob": [],
        "trial-2": ["m/ada", "m/bob"],
        "trial-3": ["trial-2", "m/ada"],
        "": ["trial-3", "trial-2"],
    }


def test_equal_merges_are_one_node_whatever_they_are_called():
    twins = recipe_of(
        crossover("m/ada", "m/bob", "one"),
        crossover("m/ada", "m/bob", "other"),
        crossover("m/ada", "m/bob", "with another mask", seed=2),
        crossover("one", "other", "child"),
        crossover("child", "with another mask"),
    )
    nodes = merge_graph(twins)
    assert [node.name for node in nodes] == [
        "m/ada",
        "m/bob",
        "one",
        "with another mask",
        "child",
        "",
    ]
    assert nodes[-1].key == merge_graph(replace(twins, name="named"))[-1].key
    alone = recipe_of(crossover("m/ada", "m/bob"))
    assert merge_graph(alone)[-1].key == nodes[2].key


def test_bases_and_unused_steps():
    base = "m/base"
    delta = {
        "name": "sum",
        "merge_method": "task_arithmetic",
        "base_model": base,
        "models": [{"model": "m/ada", "parameters": {"weight": 1.0}}],
    }
    unused = {**delta, "name": "unused", "models": [{"model": "m/cyd"}]}
    unused["parameters"] = {"weight": 1.0}
    outer = {**delta, "base_model": "sum", "models": [{"model": "m/bob"}]}
    outer["parameters"] = {"weight": 1.0}
    del outer["name"]
    nodes = merge_graph(recipe_of(delta, unused, outer))
    # Deltas are taken from a base, which is no ancestor; a base that is a merge is one.
    assert [node.name for node in nodes] == ["m/ada", "sum", "m/bob", ""]
    assert len(nodes[-1].inputs) == 2


def test_a_merge_that_several_others_use_is_drawn_once_on_a_terminal():
    assert drawn(recipe_of(*FAMILY)).splitlines() == [
        "crossover, seed 1",
        "├── trial-3: crossover, seed 1",
        "│   ├── trial-2: crossover, seed 1",
        "│   │   ├── m/ada",
        "│   │   └── m/bob",
        "│   └── m/ada",
        "└── trial-2 (above)",
    ]


def test_a_long_lineage_is_drawn_at_once():
    documents = [crossover("m/ada", "m/bob", "trial-0")]
    parents = ["m/bob", "trial-0"]
    for number in range(1, 60):
        name = f"trial-{number}"
        documents.append(crossover(parents[-1], parents[-2], name, seed=number + 1))
        parents.append(name)
    recipe = recipe_of(*documents, crossover(*parents[-2:], seed=99))
    assert len(merge_graph(recipe)) == 63
    assert drawn(recipe).count("\n") < 130


OBJECTIVES = (Objective("sort"), Objective("shift"))


def results_of(*recipes, labels=("ada", "bob"), score=0.5):
    trials = []
    for number, recipe in enumerate(recipes):
        scores = {one.name: Score(score + number / 100, n=100) for one in OBJECTIVES}
        label = labels[number] if number < len(labels) else ""
        trial = Trial(number, {}, scores, label=label, recipe_yaml=recipe.to_yaml())
        trials.append(trial)
    return Results(OBJECTIVES, ("ada", "bob"), tuple(trials))


def alone(model):
    return recipe_of(
        {
            "merge_method": "linear",
            "models": [{"model": model, "parameters": {"weight": 1.0}}],
        }
    )


def family_results(**changes):
    two = recipe_of(crossover("m/ada", "m/bob"))
    three = recipe_of(FAMILY[0], crossover("trial-2", "m/ada"))
    return results_of(
        alone("m/ada"), alone("m/bob"), two, three, recipe_of(*FAMILY), **changes
    )


def labels_of(figure):
    labels = []
    for trace in figure.data:
        labels += trace.text or ()
    return labels


def test_the_plot_has_each_merge_with_its_trial_method_and_score():
    results = family_results()
    (figure,) = plot_lineage(results, results.trials[4])
    assert sorted(labels_of(figure)) == [
        "ada<br>0.500",
        "bob<br>0.510",
        "trial 2, crossover<br>0.520",
        "trial 3, crossover<br>0.530",
        "trial 4, crossover<br>0.540",
    ]
    named = {trace.name: trace for trace in figure.data}
    assert list(named) == [
        "merged from",
        "moved towards",
        "models",
        "other merges",
        "picked",
    ]
    # Three merges of two models each: a line ends with None.
    for name in ("merged from", "moved towards"):
        assert named[name].x.count(None) == 3
    assert "seed 1" in named["picked"].hovertext[0]
    assert plot_lineage(results, results.trials[2]) == []


def test_a_step_of_the_name_of_another_merge_gets_no_score():
    """A recipe from elsewhere may call its steps like the study's trials."""
    results = family_results()
    other = recipe_of(
        crossover("m/ada", "m/bob", "trial-2", seed=5), crossover("trial-2", "m/cyd")
    )
    picked = replace(results.trials[4], recipe_yaml=other.to_yaml())
    (figure,) = plot_lineage(results, picked)
    assert sorted(labels_of(figure)) == [
        "ada<br>0.500",
        "bob<br>0.510",
        "cyd",
        "trial 4, crossover<br>0.540",
        "trial-2, crossover",
    ]


def test_names_are_no_markup_and_scores_without_a_mean_stand_beside_each_other():
    results = family_results(score=3.5)
    step = crossover("m/<b>ada</b>", "m/bob", "<i>")
    picked = replace(
        results.trials[4],
        recipe_yaml=recipe_of(step, crossover("<i>", "m/bob")).to_yaml(),
    )
    (figure,) = plot_lineage(results, picked)
    labels = labels_of(figure)
    assert "&lt;b&gt;ada&lt;" not in labels and "&lt;i&gt;, crossover" in labels
    assert any(label.endswith("3.540 / 3.540") for label in labels)


def test_columns_and_bends():
    places = layered({"a": (), "b": (), "c": ("a", "b"), "d": ("c",), "e": ("d", "a")})
    assert [places[node].x for node in "abcde"] == [0, 0, 1, 2, 3]
    path = places["e"].path_from("a")
    # One bend in each column between the two; ends are the nodes' places.
    assert [x for x, _ in path] == [0, 1, 2, 3]
    assert path[0] == (places["a"].x, places["a"].y)
    assert path[-1] == (places["e"].x, places["e"].y)
    for x in (0.0, 1.0, 2.0):
        column = [places[node].y for node in "abcde" if places[node].x == x]
        column += [y for at, y in path[1:-1] if at == x]
        assert len(set(column)) == len(column)


@pytest.mark.parametrize("steps", [True, False])
def test_plan_shows_the_lineage_of_a_recipe(pico, tmp_path, steps):
    ada, bob = f"{pico}/ada", f"{pico}/bob"
    documents = [crossover(ada, bob)]
    if steps:
        documents = [crossover(ada, bob, "child"), crossover("child", ada)]
    file = tmp_path / "recipe.yml"
    file.write_text(recipe_of(*documents).to_yaml())
    result = CliRunner().invoke(app, ["plan", str(file)])
    assert result.exit_code == 0
    assert ("child: crossover" in result.output) == steps
