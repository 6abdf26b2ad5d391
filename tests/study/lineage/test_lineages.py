"""Studies of lineages, from the file to the written pick."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file

import paretomerge as pm
from paretomerge.checkpoint.reader import Checkpoint
from paretomerge.errors import ConfigError, StudyError
from paretomerge.evaluate.evaluator import Objective, Score
from paretomerge.merging.engine import merged_tensors
from paretomerge.merging.plan.make import make_plan
from paretomerge.record.trial import Trial
from paretomerge.space.build import Pool, cached_profile
from paretomerge.space.lineage import CROSSOVER, SOURCE
from paretomerge.space.measurements import Measurements
from paretomerge.study.goals import Goals
from paretomerge.study.lineage.individuals import parents
from paretomerge.study.lineage.kinship import coefficients, kinship_of
from paretomerge.study.study import load_study
from tests.merging.methods.test_crossover import mask_of

NAMES = ("ada", "bob", "cyd")
FUNCTIONS = """
def one(model, tokenizer):
    return 0.5 + model.state_dict()["model.layers.0.mlp.up_proj.weight"].float().mean().item()

def two(model, tokenizer):
    return 0.5 - model.state_dict()["model.layers.1.mlp.up_proj.weight"].float().mean().item()
"""


@pytest.fixture
def study_file(pico, tmp_path):
    """Makes a study.yaml of lineages in a folder of its own."""

    def write(name="study", **changes):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "scores.py").write_text(FUNCTIONS)
        content = {
            "base": str(pico / "base"),
            "models": [str(pico / name) for name in NAMES],
            "objectives": [{"function": "scores:one"}, {"function": "scores:two"}],
            "space": {"lineage": True},
            "sampler": {"name": "evolver", "population_size": 3, "generations": 3},
            "trials": 12,
            "dtype": "float32",
        }
        path = folder / "study.yaml"
        path.write_text(yaml.safe_dump(content | changes))
        return path

    return write


def run(path, trials=None):
    study = load_study(path)
    study.run(lambda event: None, trials)
    return study


def arrays(recipe):
    found = {}
    for name, tensor in merged_tensors(make_plan(recipe)):
        found[name] = tensor.numpy()
    return found


def test_every_individual_is_what_the_paper_says_of_its_parents(study_file, pico):
    """The whole population as arrays, by the formula and the masks' addresses alone."""
    trials = run(study_file(), trials=9).get_trials()
    assert len(trials) == 9 and not any(trial.failure for trial in trials)
    models = {}
    for trial in trials:
        params = trial.params
        if params["method"] == SOURCE:
            source = Checkpoint(str(pico / params["source"]))
            models[trial.number] = {
                name: source.tensor(name).float().numpy() for name in source.headers
            }
            continue
        first, second = (models[number] for number in parents(params))
        child = {}
        for name, x in first.items():
            mutant = np.float32(0.5) * x + np.float32(0.5) * second[name]
            mask = mask_of(params["seed"], name, x.size, 0.5).reshape(x.shape)
            child[name] = np.where(mask, mutant, x)
        models[trial.number] = child
    for trial in trials:
        merged = arrays(trial.recipe)
        for name, expected in models[trial.number].items():
            np.testing.assert_allclose(merged[name], expected, rtol=0, atol=1e-6)


def test_each_child_challenges_its_parent_in_turn(study_file):
    """Greedy acceptance on the mean search score, written anew."""
    sampler = {
        "name": "evolver",
        "population_size": 4,
        "generations": 3,
        "compare": "mean",
    }
    trials = run(study_file(sampler=sampler, trials=16)).get_trials()

    def mean(trial):
        return np.mean([score.value for score in trial.scores.values()])

    # Three sources, and one child of two of them that fills the population.
    members = trials[:4]
    assert set(parents(trials[3].params)) <= {0, 1, 2}
    for turn, child in enumerate(trials[4:]):
        place = turn % 4
        first, second = parents(child.params)
        assert first == members[place].number
        assert second in {member.number for member in members} - {first}
        if mean(child) > mean(members[place]):
            members[place] = child
    assert members != trials[:4], "no child was ever better: the test shows nothing"


def test_an_interrupted_search_continues_the_same_lineage(study_file):
    whole = run(study_file("whole"), trials=8).get_trials()
    path = study_file("parts")
    for trials in (2, 3, 3):
        run(path, trials=trials)
    parts = load_study(path).get_trials()
    assert [trial.params for trial in parts] == [trial.params for trial in whole]
    assert [trial.recipe.key for trial in parts] == [
        trial.recipe.key for trial in whole
    ]


@pytest.mark.parametrize("sampler", ["evolver", "kinship"])
def test_choosing_never_looks_at_held_out_examples(study_file, monkeypatch, sampler):
    score = Goals.score
    splits = []

    def search_only(self, candidate, split):
        splits.append(split)
        assert split == "search"
        return score(self, candidate, split)

    expected = run(study_file("expected", sampler=sampler), 8).get_trials()
    path = study_file("watched", sampler=sampler)
    monkeypatch.setattr(Goals, "score", search_only)
    study = run(path, trials=5)
    # Held-out scores that would turn every choice around are in the record from here on.
    record = study.search().record
    for trial in study.get_trials():
        reversed_scores = {}
        for name, one in trial.scores.items():
            reversed_scores[name] = Score(-100 * one.value)
        record.add_held_out(trial.number, "objectives", reversed_scores)
    trials = run(path, trials=3).get_trials()
    assert any(trial.held_out for trial in trials)
    assert [trial.params for trial in trials] == [trial.params for trial in expected]


def test_the_commands_of_a_study(study_file, tmp_path):
    path = study_file(trials=7)
    study = load_study(path)
    study.optimize(show_progress_bar=False)
    assert all(trial.held_out for trial in study.front())
    merges = [trial for trial in study.get_trials() if trial.recipe.steps]
    trial = merges[-1]
    out = study.save(trial, tmp_path / "merged")
    assert pm.Recipe.load(out / "mergekit_config.yml").steps
    again = study.evaluate(out, "search")
    for name, score in trial.scores.items():
        assert again[name].value == pytest.approx(score.value)
    page = study.report(trial=trial.number).read_text()
    assert f"Lineage of {trial.name}" in page
    assert study.preview(measure=False).parameters == 7
    assert "method" in str(study.trials_dataframe().columns)
    # The bytes that were scored are those that were written.
    written = {
        name: tensor.numpy()
        for name, tensor in load_file(out / "model.safetensors").items()
    }
    merged = arrays(trial.recipe)
    assert all((merged[name] == written[name]).all() for name in merged)


def test_the_same_study_in_python(study_file, pico, monkeypatch):
    expected = run(study_file("file"), trials=6).get_trials()
    monkeypatch.chdir(study_file("program").parent)
    study = pm.Study(
        pico / "base",
        [pico / name for name in NAMES],
        [pm.Function("scores:one"), pm.Function("scores:two")],
        space=pm.LineageSpace(),
        sampler={"name": "evolver", "population_size": 3, "generations": 3},
        budget=12,
        dtype="float32",
    )
    study.optimize(n_trials=6, held_out=False, show_progress_bar=False)
    assert [trial.params for trial in study.get_trials()] == [
        trial.params for trial in expected
    ]


def test_kinship_is_the_cosine_of_the_merged_deltas(study_file, pico, tmp_path):
    path = study_file(sampler={"name": "kinship"}, trials=10)
    trials = run(path).get_trials()
    base = Checkpoint(str(pico / "base"))
    deltas = []
    for trial in trials:
        parts = []
        for name, merged in arrays(trial.recipe).items():
            start = base.tensor(name).float().numpy()
            parts.append((merged - start).astype(np.float64).ravel())
        deltas.append(np.concatenate(parts))
    matrix = np.stack(deltas)
    lengths = np.linalg.norm(matrix, axis=1)
    expected = matrix @ matrix.T / np.outer(lengths, lengths)
    sources = {name: str(pico / name) for name in NAMES}
    profile = cached_profile(
        Measurements(tmp_path / "m"), Pool(str(pico / "base"), sources)
    )
    products = np.asarray(profile.products)
    found = kinship_of(trials, trials, list(sources), products)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert found.min() < 0.9, "all are alike: the test shows nothing"


def test_kinship_merges_each_pair_once_the_best_with_the_least_kin(study_file):
    sampler = {"name": "kinship", "compare": "mean", "top": 3, "explore": 1}
    trials = run(study_file(sampler=sampler, trials=9)).get_trials()
    pairs = [frozenset(parents(trial.params)) for trial in trials[3:]]
    assert len(set(pairs)) == len(pairs)
    for trial in trials[3:]:
        assert trial.params["t"] == 0.5 and trial.params["method"] == "linear"
    # The first merge is one of exploration: the best source, and its least kin.
    best = max(
        trials[:3],
        key=lambda trial: sum(score.value for score in trial.scores.values()),
    )
    assert best.number in pairs[0]


def test_kinship_stops_when_the_best_are_alike(study_file):
    sampler = {"name": "kinship", "max_kinship": 0.3, "top": 2}
    path = study_file(sampler=sampler, trials=50)
    study = load_study(path)
    reason = study.run(lambda event: None)
    n_trials = len(study.get_trials())
    assert "stopped" in reason and n_trials < 50
    # A search that has converged stays so.
    again = load_study(path)
    assert again.run(lambda event: None) == reason
    assert len(again.get_trials()) == n_trials


def test_the_expected_coefficients_of_a_crossover():
    def trial(number, **params):
        return Trial(number, {"method": CROSSOVER, **params}, {"x": Score(0.0)})

    trials = [
        Trial(0, {"method": SOURCE, "source": "ada"}),
        Trial(1, {"method": SOURCE, "source": "bob"}),
        trial(2, first=0, second=1, t=0.5, crossover_rate=0.5),
        trial(3, first=2, second=0, t=1.0, crossover_rate=0.2),
    ]
    found = coefficients(trials, ["ada", "bob"])
    np.testing.assert_allclose(found[2], [0.75, 0.25])
    np.testing.assert_allclose(found[3], [0.8, 0.2])
    assert Objective("x").maximise


def test_a_failed_child_has_had_its_turn(study_file):
    path = study_file("fails")
    text = (path.parent / "scores.py").read_text()
    fails = "    if model.fails: raise RuntimeError('no')\n"
    head = "def two(model, tokenizer):\n"
    counter = (
        "CALLS = []\n\n\n" + text.replace(head, head + "    CALLS.append(1)\n" + fails)
    ).replace("model.fails", "len(CALLS) == 5")
    (path.parent / "scores.py").write_text(counter)
    trials = run(path, trials=8).get_trials()
    assert [bool(trial.failure) for trial in trials].index(True) == 4
    # Trials 0 to 2 are the population; the turns are those of 0, 1, 2, 0, ...
    members = [trials[0], trials[1], trials[2]]
    assert parents(trials[3].params)[0] == members[0].number
    assert parents(trials[4].params)[0] == members[1].number
    assert parents(trials[5].params)[0] == members[2].number
    later = [parents(trial.params) for trial in trials[5:]]
    assert all(4 not in pair for pair in later)


def test_nothing_to_merge_is_said(study_file):
    path = study_file()
    (path.parent / "scores.py").write_text(
        FUNCTIONS.replace(
            "    return 0.5 +", "    raise ValueError('broken')\n    return"
        )
    )
    with pytest.raises(StudyError, match="a lineage needs 2 sources with scores"):
        run(path)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"sampler": "mmmo"}, "searched by evolver or kinship, and not by mmmo"),
        ({"sampler": "nsga2"}, "searched by evolver or kinship, and not by nsga2"),
        ({"sampler": {"name": "evolver", "size": 3}}, "unknown option of evolver"),
        ({"sampler": {"name": "evolver", "t": 0}}, "t and crossover_rate above 0"),
        ({"sampler": {"name": "evolver", "t": "x"}}, "evolver: t: expected a number"),
        ({"sampler": {"name": "evolver", "generations": 0}}, "1 or more generations"),
        ({"sampler": {"name": "evolver", "compare": "sum"}}, "dominance or mean"),
        ({"sampler": {"name": "kinship", "top": 1}}, "top of 2 or more"),
        ({"sampler": {"name": "kinship", "compare": "best"}}, "dominance or mean"),
        ({"sampler": {"name": "kinship", "seed": "x"}}, "kinship: seed: expected a"),
        (
            {
                "sampler": {"name": "kinship", "compare": "mean"},
                "objectives": [
                    {"function": "scores:one", "direction": "minimize"},
                    {"function": "scores:two"},
                ],
            },
            "'one' is minimised",
        ),
        ({"space": {"lineage": True, "groups": 2}}, "`lineage` stands alone"),
        ({"space": {"lineage": False}}, "lineage"),
        ({"tokenizer_source": "union"}, "does not work with `space.lineage`"),
        ({"then": {"routes": {}}}, "`space` is a lineage; leave `then` out"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(study_file, changes, told):
    path = study_file(**changes)
    with pytest.raises(ConfigError, match=told):
        load_study(path).check()
    assert not (path.parent / "runs").exists()


def test_other_recipes_are_no_starts(study_file, pico):
    path = study_file(starts=["start.yml"])
    start = {
        "merge_method": "ties",
        "base_model": str(pico / "base"),
        "models": [
            {"model": str(pico / "ada"), "parameters": {"weight": 1, "density": 1}}
        ],
    }
    (path.parent / "start.yml").write_text(yaml.safe_dump(start))
    with pytest.raises(ConfigError, match=r"starts: start\.yml: .* no trial with"):
        run(path)


def test_a_preference_chooses_the_pick_alone(study_file):
    study = load_study(study_file(prefer="mean"))
    assert "a search of lineages ignores `prefer`; only the pick follows it" in (
        study.check()
    )
    assert yaml.safe_load(study.to_yaml())["space"] == {"lineage": True}


def test_another_process_finds_the_same_parents(study_file):
    path = study_file()
    search = run(path, trials=7).search()
    space = pickle.loads(pickle.dumps(search.space))
    for trial in search.trials():
        # A trial's recipe in the record has the dtype of the study.
        recipe = replace(space.recipe(trial.params), dtype="float32")
        assert recipe.key == trial.recipe.key
