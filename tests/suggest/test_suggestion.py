"""`suggest` on pico models and on the specialists, and as a command."""

import json

import pytest
import torch
from safetensors.torch import load_file

from paretomerge.errors import ConfigError
from paretomerge.merging.engine import merge
from paretomerge.merging.methods import METHODS
from paretomerge.merging.plan.make import make_plan
from paretomerge.recipe import Recipe
from paretomerge.study.study import load_study
from paretomerge.suggest import suggest
from paretomerge.suggest.candidates import candidates
from paretomerge.suggest.interference import Interference
from paretomerge.suggest.sample import leading_directions
from paretomerge.suggest.scores import score_first
from tests.cli.test_cli import paretomerge
from tests.conftest import EXPERTS
from tests.study.test_build import write


@pytest.fixture(scope="module")
def suggestion(pico):
    return suggest(str(pico / "base"), [str(pico / name) for name in EXPERTS])


def test_recipes_come_with_the_least_interference_first(suggestion):
    values = [suggested.interference for suggested in suggestion.recipes]
    assert values == sorted(values)
    methods = {suggested.method for suggested in suggestion.recipes}
    assert {"linear", "task_arithmetic", "ties", "tsv", "model_stock"} <= methods
    assert not {"slerp", "wudi", "passthrough"} & methods


def test_the_interference_is_that_of_the_written_merge(suggestion, pico, tmp_path):
    """From files: the merge on disk, against the sources on disk."""
    chosen = next(s for s in suggestion.recipes if s.method == "task_arithmetic")
    exact = Recipe.from_dict(chosen.recipe.to_dict() | {"dtype": "float32"})
    merge(exact, tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    base = load_file(pico / "base" / "model.safetensors")
    by_hand = Interference()
    experts = {}
    for name in ("ada", "cyd"):  # bob lies in several shards
        experts[name] = load_file(pico / name / "model.safetensors")
    for tensor, value in base.items():
        if value.dim() != 2 or ".layers." not in tensor:
            continue
        deltas = {}
        for name, weights in experts.items():
            deltas[name] = weights[tensor].float() - value.float()
        directions = {n: leading_directions(delta) for n, delta in deltas.items()}
        by_hand.add(merged[tensor].float() - value.float(), deltas, directions)
    for name in experts:
        assert chosen.by_source[name] == pytest.approx(
            by_hand.at()[name], rel=1e-2, abs=1e-3
        )


def test_a_sum_gets_the_scale_that_its_recipe_has(suggestion):
    for suggested in suggestion.recipes:
        written = suggested.recipe.to_dict().get("parameters", {}).get("lambda")
        assert written == suggested.scale
    scaled = {s.method for s in suggestion.recipes if s.scale is not None}
    assert "task_arithmetic" in scaled
    assert "ties" not in scaled and "linear" not in scaled
    for method in scaled:
        parameters = {parameter.name for parameter in METHODS[method].parameters}
        assert "lambda" in parameters


def test_unrelated_deltas_are_found_unrelated(suggestion):
    # pico experts differ from their base by independent noise
    off_diagonal = suggestion.facts.cosine[0, 1]
    assert abs(off_diagonal) < 0.1
    assert suggestion.facts.sign_conflict[0, 1] == pytest.approx(0.5, abs=0.05)


def test_every_candidate_can_be_planned(pico):
    sources = {name: str(pico / name) for name in EXPERTS}
    for recipe in candidates(str(pico / "base"), sources).values():
        make_plan(recipe)


def test_two_runs_agree(suggestion, pico):
    torch.manual_seed(7)
    again = suggest(str(pico / "base"), [str(pico / name) for name in EXPERTS])
    assert again.recipes == suggestion.recipes


def test_one_model_is_refused(pico):
    with pytest.raises(ConfigError, match="two or more fine-tunes"):
        suggest(str(pico / "base"), [str(pico / "ada")])


def test_the_base_as_one_of_the_models_is_refused(pico):
    base = str(pico / "base")
    with pytest.raises(ConfigError, match="is the base and one of the models"):
        suggest(base, [str(pico / "ada"), pico / "base", str(pico / "bob")])


def test_scores_order_the_first_recipes(specialists):
    study = load_study(
        specialists / "study.yaml",
        ["evaluate.search_items=20", "objectives=[{task: sort}, {task: reverse}]"],
    )
    models = {n: str(specialists / "models" / n) for n in ("order", "mirror", "scribe")}
    ranked = suggest(str(specialists / "models" / "base"), models)
    seen = []
    scored = score_first(ranked, study.settings, 2, seen.append)
    assert set(scored.alone) == {"order", "mirror", "scribe"}
    assert seen[:3] == ["order", "mirror", "scribe"]
    first, second, third = scored.recipes[:3]
    assert first.mean_score >= second.mean_score
    assert {first.method, second.method} == {s.method for s in ranked.recipes[:2]}
    assert third.scores == {} and third == ranked.recipes[2]
    # Accuracies of 20 examples of each task.
    assert {score.n for score in first.scores.values()} == {20}
    assert not (study.folder / "study.db").exists()


def test_the_command_writes_recipes_that_merge_and_a_study_that_loads(pico, tmp_path):
    out = tmp_path / "first"
    models = [str(pico / name) for name in EXPERTS]
    done = paretomerge("suggest", str(pico / "base"), *models, "--out", str(out))
    assert "Why" in done.stdout and "It cannot know" in done.stdout
    assert "paretomerge calibrate" in done.stdout
    assert "Add --task to score" in done.stdout
    assert "put your own tasks in place of arc_easy and piqa" in done.stdout
    recipes = sorted(out.glob("*.yml"))
    assert len(recipes) == 3
    for recipe in recipes:
        make_plan(Recipe.load(recipe))
    settings = load_study(out / "study.yaml").settings
    assert [str(start) for start in settings.starts] == [r.name for r in recipes]
    again = paretomerge(
        "suggest", str(pico / "base"), *models, "--out", str(out), ok=False
    )
    assert "exists" in again.stderr


def test_the_command_prints_json(pico):
    models = [str(pico / name) for name in EXPERTS]
    done = paretomerge("suggest", str(pico / "base"), *models, "--json")
    rows = json.loads(done.stdout)
    Recipe.from_dict(rows["recipes"][0]["recipe"])
    assert set(rows["sources"]) == set(EXPERTS)


def test_a_study_is_told_of_its_own_option(pico, tmp_path):
    """A study has tasks of its own: --task is refused with it."""
    shown = paretomerge("suggest", write(tmp_path, pico)).stdout
    assert "Add --evaluate 4 to score" in shown and "--task" not in shown


def test_the_command_takes_a_study_and_scores(specialists, tmp_path):
    done = paretomerge(
        "suggest",
        specialists / "study.yaml",
        *("--evaluate", "1", "--examples", "10", "--out", tmp_path / "out"),
    )
    assert "order alone" in done.stdout
    assert "starts: [" in done.stdout and "with a new `out`" in done.stdout
    assert not (tmp_path / "out" / "study.yaml").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["BASE", "ONE"], "two or more fine-tunes"),
        (["BASE", "ONE", "TWO", "--evaluate", "2"], "name a --task"),
        (["study.yaml", "--task", "sort"], "name no others"),
    ],
)
def test_wrong_arguments_are_one_sentence(arguments, message):
    done = paretomerge("suggest", *arguments, ok=False)
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
