"""`Study` as a user works with it, without a YAML file."""

import subprocess
import sys
import weakref

import optuna
import pytest
import yaml
from safetensors.torch import load_file

import paretomerge as pm
from paretomerge.cli.quickstart import unpack_specialists


def norm(model, tokenizer):
    return model.state_dict()["model.layers.0.mlp.up_proj.weight"].float().norm().item()


def total(model, tokenizer):
    return model.state_dict()["model.layers.1.mlp.up_proj.weight"].float().sum().item()


@pytest.fixture
def make(pico, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def make(**settings):
        defaults = {
            "objectives": [pm.Function(norm), pm.Function(total, direction="minimize")],
            "sampler": "random",
            "out": "runs/first",
        }
        models = [pico / "ada", pico / "bob"]
        return pm.Study(pico / "base", models, **defaults | settings)

    return make


def test_the_program_of_the_readme(make, tmp_path):
    study = make(
        objectives=[pm.Function(norm), pm.Sparsity()],
        space=pm.WeightSpace(methods=["task_arithmetic", "ties"], groups=2),
        sampler=pm.MMMOSampler(seed=0),
    )
    study.optimize(n_trials=10, show_progress_bar=False)
    assert len(study.get_trials()) == 10
    assert all(trial.held_out for trial in study.front())
    trial = study.pick(prefer={"norm": 0.7})
    out = study.save(trial, "merged")
    assert out == tmp_path / "merged" or out.resolve() == tmp_path / "merged"
    recipe = pm.Recipe.load(out / "mergekit_config.yml")
    pm.merge(recipe, tmp_path / "again")
    first, second = (
        load_file(tmp_path / name / "model.safetensors") for name in ("merged", "again")
    )
    assert all((first[name] == second[name]).all() for name in first)
    scores = study.evaluate(out, "search")
    assert scores["norm"].value == pytest.approx(trial.scores["norm"].value)


def test_n_trials_means_more_and_the_budget_is_a_total(make):
    study = make(budget=6)
    study.optimize(n_trials=2, held_out=False, show_progress_bar=False)
    study.optimize(n_trials=2, held_out=False, show_progress_bar=False)
    assert len(study.get_trials()) == 4
    make(budget=6).optimize(held_out=False, show_progress_bar=False)
    make(budget=6).optimize(held_out=False, show_progress_bar=False)
    assert len(study.get_trials()) == 6


def test_watched_scores_from_python(make, tmp_path):
    """Functions and paths are watched as objects; an edited function or text is scored again."""
    text = tmp_path / "text.txt"
    text.write_text("abc " * 300)

    def watched(value, search=True):
        def constant(model, tokenizer):
            return value

        watch = [pm.Function(constant), pm.Perplexity(text)]
        study = make(watch=watch, budget=3)
        if search:
            study.optimize(show_progress_bar=False)
        study.score_held_out()
        held_out = study.get_trials()[0].held_out
        return held_out["constant"].value, held_out["perplexity"].value

    one, of_abc = watched(1)
    assert (one, of_abc) == watched(1)
    text.write_text("dba " * 300)
    two, of_dba = watched(2)
    assert (one, two) == (1, 2)
    assert of_dba != of_abc
    text.unlink()
    assert watched(2, search=False) == (two, of_dba)


def test_a_preview_counts_the_starts_among_the_baselines(make, pico, tmp_path):
    for weight in (
        0.5,
        0.3,
    ):  # the first one is the uniform average, a baseline already
        models = []
        for name in ("ada", "bob"):
            model = {"model": str(pico / name), "parameters": {"weight": weight}}
            models.append(model)
        recipe = {"merge_method": "task_arithmetic", "base_model": str(pico / "base")}
        text = yaml.safe_dump(recipe | {"models": models})
        (tmp_path / f"{weight}.yml").write_text(text)
    study = make(starts=["0.5.yml", "0.3.yml"], budget=20)
    counted = study.preview(measure=False).baselines
    study.optimize(n_trials=counted + 2, held_out=False, show_progress_bar=False)
    labelled = [trial for trial in study.get_trials() if trial.label]
    assert counted == len(labelled)


def test_callbacks_and_stop(make):
    seen = []

    def callback(study, trial):
        seen.append(trial.number)
        if len(seen) == 3:
            study.stop()

    study = make()
    study.optimize(callbacks=[callback], held_out=False, show_progress_bar=False)
    assert seen == [0, 1, 2] == [trial.number for trial in study.get_trials()]
    study.optimize(n_trials=1, held_out=False, show_progress_bar=False)
    assert len(study.get_trials()) == 4


def test_a_timeout_ends_the_search(make):
    study = make()
    study.optimize(timeout=0.0, held_out=False, show_progress_bar=False)
    assert study.get_trials() == []


def test_the_progress_bar(make, capsys):
    make().optimize(n_trials=2, held_out=False)
    assert "2/2" in capsys.readouterr().err


def test_results_as_a_data_frame(make):
    study = make()
    study.optimize(n_trials=3, show_progress_bar=False)
    frame = study.trials_dataframe()
    assert list(frame["number"]) == [0, 1, 2] and list(frame["label"])[:2] == [
        "ada",
        "bob",
    ]
    trial = study.get_trials()[0]
    assert frame["search_norm"][0] == trial.scores["norm"].value
    assert frame["held_out_total"][0] == trial.held_out["total"].value
    assert frame["params_method"][0] == trial.params["method"]


def test_figures_and_report(make, tmp_path):
    study = make()
    study.optimize(n_trials=4, show_progress_bar=False)
    assert type(study.plot_front()).__name__ == "Figure"
    assert len(study.plot_hypervolume().data[0].y) == 4
    assert study.report() == tmp_path / "runs" / "first" / "report.html"
    assert "picked" in study.report("other.html", trial=1).read_text()


def test_a_finished_study_is_read_without_models(make, pico, tmp_path):
    """Nothing heavy is imported, and no model is opened."""
    study = make()
    study.optimize(n_trials=4, show_progress_bar=False)
    code = f"""
import sys
import paretomerge as pm
study = pm.Study(
    "gone",
    [{str(pico / "ada")!r}, {str(pico / "bob")!r}],
    [pm.Function("gone:norm"), pm.Function("gone:total", direction="minimize")],
    out={str(tmp_path / "runs/first")!r},
)
assert len(study.front()) == {len(study.front())}
assert study.pick(trial=1).number == 1
study.report({str(tmp_path / "r.html")!r})
print([name for name in ("torch", "transformers", "lm_eval", "botorch") if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_before_the_search_there_is_nothing_to_read(make, tmp_path):
    study = make()
    assert study.get_trials() == []
    with pytest.raises(pm.StudyError, match="no record here yet"):
        study.front()
    assert not (tmp_path / "runs").exists()


def test_to_yaml_and_back(make, tmp_path):
    study = make(
        objectives=[
            pm.Function("mine:score", name="score"),
            pm.Size("layers"),
            pm.Task("gsm8k"),
        ],
        constraints=[pm.Constraint("score", at_least=0.5)],
        watch=["hellaswag"],
        space=pm.WeightSpace(
            methods=["ties"], groups=2, weight={"roles": True}, subset=True
        ),
        then=None,
        sampler={"name": "nsga2", "population_size": 10},
        budget=pm.Budget(70, until=0.01),
        evaluation=pm.Evaluation(search_items=50, race=0.9),
        seed=3,
        dtype="float32",
    )
    text = study.to_yaml("study.yaml")
    again = pm.load_study(tmp_path / "study.yaml")
    assert again.to_yaml() == text
    assert again.settings.objectives == study.settings.objectives
    assert again.settings.space == study.settings.space
    assert again.settings.evaluation == study.settings.evaluation
    assert again.settings.budget == study.settings.budget
    assert yaml.safe_load(text)["objectives"][1] == {"size": "layers"}
    config = study.to_config()
    assert pm.Study.from_config(config, tmp_path).to_config() == config


def test_a_second_level_in_yaml_and_back(make, tmp_path):
    then = pm.SecondLevel(pm.RouteSpace(blocks=2), trials=20, prefer={"norm": 1.0})
    study = make(objectives=[pm.Function("mine:norm"), pm.Size("layers")], then=then)
    study.to_yaml("study.yaml")
    assert pm.load_study(tmp_path / "study.yaml").settings.then == then


def test_what_a_file_cannot_say(make):
    with pytest.raises(pm.ConfigError, match="Move it to the top level of a module"):
        make(
            objectives=[pm.Function(lambda model, tokenizer: 1.0, name="one")]
        ).to_yaml()
    with pytest.raises(pm.ConfigError, match="cannot describe this RandomSampler"):
        make(sampler=optuna.samplers.RandomSampler(seed=0)).to_yaml()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objectives": []}, "objectives: name one or more"),
        ({"objectives": [pm.Sparsity(), pm.Sparsity()]}, "the name of two scores"),
        ({"constraints": [pm.Constraint("nrom", at_least=1)]}, "did you mean 'norm'"),
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
        (
            {"then": pm.SecondLevel(), "space": pm.RouteSpace()},
            "first level must merge weights",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused_at_once(
    make, settings, message
):
    with pytest.raises(pm.ConfigError, match=message):
        make(**settings)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: pm.Task("t", direction="up"), "maximize or minimize"),
        (lambda: pm.Function("nowhere"), "module:function"),
        (lambda: pm.Function(3), "cannot be called"),
        (lambda: pm.Perplexity("t.txt", metric="loss"), "bits_per_byte"),
        (lambda: pm.Judge("p.jsonl", criteria=""), "criteria"),
        (lambda: pm.Size("bytes"), "seconds_per_token"),
        (lambda: pm.Constraint("a"), "set one of"),
        (lambda: pm.Constraint("a", at_least=0, at_most=1), "set one of"),
        (lambda: pm.WeightSpace(methods="ties"), "list at least one method"),
        (lambda: pm.WeightSpace(near_duplicates=2), "near_duplicates"),
        (lambda: pm.WeightSpace(weight={"bound": (0, 1)}), "did you mean 'bounds'"),
        (lambda: pm.WeightSpace(order="random"), "given or kinship"),
        (lambda: pm.RouteSpace(form="loops"), "edits or indicators"),
        (lambda: pm.RouteSpace(blocks=0), "blocks"),
        (lambda: pm.SecondLevel(trials=0), "1 or more"),
        (lambda: pm.Budget(0), "trials"),
        (lambda: pm.Budget(9, until=1.0), "until"),
        (lambda: pm.Evaluation(race=0.4), "race"),
        (lambda: pm.Evaluation(race=0.9, backend="sglang"), "backend"),
        (lambda: pm.Evaluation(splits={"search": "a"}), "held_out"),
        (lambda: pm.Evaluation(batch_size=0), "batch_size"),
    ],
)
def test_descriptions_check_themselves(build, message):
    with pytest.raises(pm.ConfigError, match=message):
        build()


def test_a_sampler_of_ones_own_is_used_as_it_is(make):
    sampler = optuna.samplers.RandomSampler(seed=5)
    assert make(sampler=sampler).search().sampler is sampler


def test_mmmo_given_as_an_object_is_the_sampler_of_that_name(make):
    by_object = make(sampler=pm.MMMOSampler(seed=0), out="a")
    by_name = make(sampler="mmmo", out="b")
    for study in (by_object, by_name):
        study.optimize(n_trials=10, held_out=False, show_progress_bar=False)
    params = [
        [trial.params for trial in study.get_trials()] for study in (by_object, by_name)
    ]
    assert params[0] == params[1]


def test_the_quickstart_is_copied_once(tmp_path):
    first = unpack_specialists(tmp_path)
    assert (
        first == tmp_path / "paretomerge-quickstart" / "study.yaml" and first.is_file()
    )
    first.write_text("changed")
    assert unpack_specialists(tmp_path).read_text() == "changed"
    (tmp_path / "other" / "paretomerge-quickstart").mkdir(parents=True)
    with pytest.raises(pm.ConfigError, match=r"has no study\.yaml"):
        unpack_specialists(tmp_path / "other")


def test_models_are_loaded_without_bars_of_other_libraries(make, pico, capsys):
    from transformers.utils import logging

    logging.enable_progress_bar()
    try:
        study = make()
        study.optimize(n_trials=1, show_progress_bar=False)
        study.evaluate(pico / "ada", "search")
        assert logging.is_progress_bar_enabled()
    finally:
        logging.disable_progress_bar()
    assert "Loading weights" not in capsys.readouterr().err


def test_prompts_in_yaml_and_back(make):
    evaluation = pm.Evaluation(
        num_fewshot=4,
        apply_chat_template=True,
        fewshot_as_multiturn=False,
        system_instruction="Be brief.",
        gen_kwargs={"max_gen_toks": 64},
    )
    objectives = [pm.Task("gsm8k", num_fewshot=8), pm.Sparsity()]
    study = make(objectives=objectives, evaluation=evaluation)
    study.to_yaml("study.yaml")
    again = pm.load_study("study.yaml").settings
    assert again.evaluation == evaluation
    assert again.objectives == tuple(objectives)
    with pytest.raises(pm.ConfigError, match="needs `apply_chat_template`"):
        pm.Evaluation(fewshot_as_multiturn=True)
    with pytest.raises(pm.ConfigError, match="num_fewshot"):
        pm.Task("gsm8k", num_fewshot=-1)


def test_a_closed_study_holds_nothing_and_can_be_used_on(make):
    with make() as study:
        study.optimize(n_trials=3, held_out=False, show_progress_bar=False)
        loaded = weakref.ref(study.search())
        model = weakref.ref(study.search().first_level.model)
    assert loaded() is None and model() is None
    study.close()
    assert len(study.get_trials()) == 3
    study.optimize(n_trials=1, held_out=False, show_progress_bar=False)
    assert len(study.get_trials()) == 4
