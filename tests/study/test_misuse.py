"""What a study must not do in silence when it is used in unusual ways.

Each test is a finding: a wrong score, another trial, or another study's trials, without a word.
"""

import copy
import functools
import pickle
import shutil
import sys
import threading
import time

import numpy as np
import pytest
from optuna.distributions import FloatDistribution
from safetensors.torch import load_file, save_file

import paretomerge as pm
from tests.conftest import pico_states, save_pico

QUIET = {"show_progress_bar": False, "held_out": False}
MODULE = """
import functools

def first(model, tokenizer):
    return model.model.layers[0].mlp.up_proj.weight[0, 0].item()

def negated(function):
    @functools.wraps(function)
    def negative(model, tokenizer):
        return -function(model, tokenizer)
    return negative
"""


def first(model, tokenizer, sign=1.0):
    return sign * model.model.layers[0].mlp.up_proj.weight[0, 0].item()


def slow(model, tokenizer):
    time.sleep(0.1)
    return first(model, tokenizer)


def failing(model, tokenizer):
    raise ValueError("no")


class Grader:
    def __init__(self, sign):
        self.sign = sign

    def __call__(self, model, tokenizer):
        return first(model, tokenizer, self.sign)


def signed(sign):
    def score(model, tokenizer):
        return first(model, tokenizer, sign)

    return score


@pytest.fixture
def make(pico, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def make(function=first, out="runs/a", models=("ada", "bob"), **settings):
        objective = pm.Function(function, name="v")
        paths = [pico / model for model in models]
        settings = {"sampler": "random"} | settings
        return pm.Study(pico / "base", paths, [objective], out=out, **settings)

    return make


def value_of(pico, model):
    return float(pico_states()[model]["model.layers.0.mlp.up_proj.weight"][0, 0])


def test_scoring_in_another_thread_does_not_change_what_the_search_scores(make, pico):
    study = make(slow)
    study.optimize(n_trials=1, **QUIET)
    search = threading.Thread(
        target=study.optimize, kwargs={"n_trials": 5, **QUIET}, daemon=True
    )
    search.start()
    while search.is_alive():
        for trial in study.get_trials():
            study.evaluate(trial, "held_out")
    search.join()
    # The function scores a merge alike on both splits.
    for trial in study.get_trials():
        assert study.evaluate(trial, "held_out")["v"].value == trial.scores["v"].value
    scores = {trial.label: trial.scores["v"].value for trial in study.get_trials()}
    for model in ("ada", "bob"):
        assert scores[model] == pytest.approx(value_of(pico, model), abs=1e-3)


def test_a_trial_of_another_study_is_refused(make):
    one, other = make(), make(out="runs/b", seed=5)
    for study in (one, other):
        study.optimize(n_trials=8, **QUIET)
    foreign = other.get_trials()[7]
    for use in (
        one.evaluate,
        lambda trial: one.evaluate(trial, "search"),
        lambda trial: one.compare(trial, 0),
        lambda trial: one.save(trial, "out"),
        one.plot_front,
    ):
        with pytest.raises(pm.ConfigError, match="not a trial of this study"):
            use(foreign)
    assert one.get_trials()[7].held_out is None
    own = one.get_trials()[7]
    one.evaluate(own)
    one.evaluate(own)  # a snapshot from before it had held-out scores


def test_a_changed_trial_is_refused_and_does_not_change_the_record(make):
    study = make()
    study.optimize(n_trials=6, **QUIET)
    trial = study.get_trials()[5]
    before = dict(trial.params)
    trial.params["weight/ada"] = 0.0
    assert study.get_trials()[5].params == before
    with pytest.raises(pm.ConfigError, match="or was changed"):
        study.evaluate(trial)


def test_a_number_is_a_trial_also_where_models_are_named_by_numbers(tmp_path, pico):
    for number, model in enumerate(("ada", "bob", "cyd"), start=1):
        save_pico(tmp_path / str(number), pico_states()[model])
    models = [tmp_path / str(number) for number in (1, 2, 3)]
    study = pm.Study(
        pico / "base",
        models,
        [pm.Function(first)],
        sampler="random",
        out=tmp_path / "out",
    )
    study.optimize(n_trials=3, **QUIET)
    for trial in study.get_trials():
        for number in (trial.number, np.int64(trial.number), str(trial.number)):
            assert study.evaluate(number, "search") == dict(trial.scores)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (functools.partial(first, sign=1.0), functools.partial(first, sign=-1.0)),
        (Grader(1.0), Grader(-1.0)),
        (signed(1.0), signed(-1.0)),
        (Grader(1.0).__call__, Grader(-1.0).__call__),
        (lambda m, t: first(m, t, 1.0), lambda m, t: first(m, t, -1.0)),
    ],
)
def test_another_function_is_another_study(make, one, other):
    make(one).optimize(n_trials=2, **QUIET)
    with pytest.raises(pm.StudyError, match="files of scores changed since"):
        make(other).optimize(n_trials=1, **QUIET)
    make(copy.copy(one)).optimize(n_trials=1, **QUIET)


def test_functions_typed_at_a_prompt_are_told_apart(make):
    functions = []
    for sign in ("", "-"):
        names = {"first": first}
        exec(
            f"def score(model, tokenizer): return {sign}first(model, tokenizer)", names
        )
        functions.append(names["score"])
    make(functions[0]).optimize(n_trials=2, **QUIET)
    with pytest.raises(pm.StudyError, match="files of scores"):
        make(functions[1]).optimize(n_trials=1, **QUIET)


def test_a_file_names_the_function_itself_or_none(make, tmp_path, monkeypatch):
    (tmp_path / "own_metrics_of_misuse.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    import own_metrics_of_misuse as own

    for function in (own.negated(own.first), functools.partial(own.first)):
        with pytest.raises(pm.ConfigError, match="cannot name the function"):
            make(function).to_yaml()
    study = make(own.first)
    study.optimize(n_trials=2, **QUIET)
    study.to_yaml("study.yaml")
    again = pm.load_study("study.yaml")
    again.optimize(n_trials=1, **QUIET)
    assert len(again.get_trials()) == 3


def test_another_spelling_is_the_same_study(make, pico, tmp_path):
    make().optimize(n_trials=2, **QUIET)
    (tmp_path / "link").symlink_to(pico)
    models = [f"{pico}/./ada", f"{pico}/bob/"]
    again = pm.Study(
        f"{pico}/../{pico.name}/base",
        models,
        [pm.Function(first, name="v", direction="maximize")],
        sampler="random",
        out="runs/a",
    )
    again.optimize(n_trials=1, **QUIET)
    assert len(again.get_trials()) == 3


def test_a_folder_of_another_study_is_not_read_as_this_one(make):
    make().optimize(n_trials=3, **QUIET)
    for other in (
        make(models=("bob", "cyd")),
        pm.Study("b", ["ada", "bob"], [pm.Sparsity()], out="runs/a"),
    ):
        with pytest.raises(pm.StudyError, match="holds trials of another study: "):
            other.pick()
    turned = make()
    objective = pm.Function(first, name="v", direction="minimize")
    turned = pm.Study(
        turned.settings.base, turned.settings.models, [objective], out="runs/a"
    )
    with pytest.raises(pm.StudyError, match="the direction of v changed"):
        turned.save(0, "out")


def test_other_weights_under_the_same_names_are_not_merged(pico, tmp_path, monkeypatch):
    def study() -> pm.Study:
        return pm.Study(
            "base",
            ["ada", "bob"],
            [pm.Function(first, name="v", direction="maximize")],
            sampler="random",
            seed=0,
            out="run",
            storage=f"sqlite:///{tmp_path}/shared.db",
        )

    one, other = tmp_path / "one", tmp_path / "other"
    for name in ("base", "ada", "bob"):
        shutil.copytree(pico / name, one / name)
        shutil.copytree(pico / name, other / name)
    monkeypatch.chdir(one)
    study().optimize(n_trials=3, show_progress_bar=False)
    # Of a folder with copies of the same models, it is the same study.
    monkeypatch.chdir(other)
    assert len(study().get_trials()) == 3
    for source in ("cyd", "bob"):
        for folder in (one, other):
            shutil.rmtree(folder / "ada")
            shutil.copytree(pico / source, folder / "ada")
        monkeypatch.chdir(other)
        with pytest.raises(pm.StudyError, match=r"scored with other weights of .*ada"):
            study().results()
        # Where they were searched, the scores may be looked at, but make no checkpoint.
        monkeypatch.chdir(one)
        assert study().results().trials
        with pytest.raises(pm.StudyError, match=r"scored with other weights of .*ada"):
            study().save(2, "out")


def test_splits_and_preferences_are_checked(make):
    study = make()
    study.optimize(n_trials=3, **QUIET)
    for call in (
        lambda: study.evaluate(1, "seach"),
        lambda: study.compare(0, 1, split="seach"),
    ):
        with pytest.raises(pm.ConfigError, match="use search or held_out"):
            call()
    for prefer in ({"v": float("inf")}, {"v": float("nan")}, {"v": "1"}, {"v": None}):
        with pytest.raises(pm.ConfigError, match="numbers of 0 or more"):
            study.pick(prefer=prefer)
    for prefer in ("v", ["v"]):
        with pytest.raises(pm.ConfigError, match="prefer: write"):
            study.pick(prefer=prefer)
    for trial in ("3", None, 1.5):
        with pytest.raises(pm.ConfigError, match="a trial or its number"):
            study.save(trial, "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_trials": -3}, "n_trials: must be 0 or more"),
        ({"n_trials": 1.5}, "n_trials: expected a whole number"),
        ({"n_trials": "3"}, "n_trials: expected a whole number"),
        ({"timeout": float("nan")}, "timeout: expected a finite number"),
        ({"timeout": "1"}, "timeout: expected a finite number"),
        ({"callbacks": first}, "callbacks: expected a list"),
        ({"callbacks": ["x"]}, "callbacks: expected a function"),
    ],
)
def test_arguments_of_optimize_are_checked_before_a_trial(make, arguments, message):
    study = make()
    with pytest.raises(pm.ConfigError, match=message):
        study.optimize(**QUIET | arguments)
    assert study.get_trials() == []


def test_callbacks_as_in_optuna(make):
    study, seen = make(), []
    study.optimize(n_trials=1, callbacks=None, **QUIET)
    record = lambda study, trial: seen.append(trial.number)  # noqa: E731
    study.optimize(n_trials=np.int64(2), callbacks=(f for f in [record]), **QUIET)
    assert seen == [1, 2]


def test_more_trials_after_a_search_that_stopped_by_itself(make):
    budget = pm.Budget(40, until=0.9, patience=1)
    study = make(sampler={"name": "mmmo", "n_startup": 5}, budget=budget)
    study.optimize(**QUIET)
    stopped = len(study.get_trials())
    assert stopped < 40
    study.optimize(n_trials=2, **QUIET)
    assert len(study.get_trials()) == stopped + 2
    study.optimize(**QUIET)  # its own budget: still stopped
    assert len(study.get_trials()) == stopped + 2


def test_wrong_models_are_found_before_the_first_trial(make, pico, tmp_path):
    study = make(models=("ada", "adda", "bobb"))
    for call in (study.check, lambda: study.optimize(n_trials=2, **QUIET)):
        with pytest.raises(pm.CheckpointError, match="adda") as error:
            call()
        assert "bobb" in str(error.value)
    assert study.get_trials() == [] and list(tmp_path.iterdir()) == []


def test_weights_that_are_not_finite_are_found_before_the_first_trial(
    make, pico, tmp_path
):
    shutil.copytree(pico / "ada", tmp_path / "broken")
    file = tmp_path / "broken" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    study = make(models=(tmp_path / "broken", "bob"))
    with pytest.raises(pm.CheckpointError, match=r"broken: model\.norm\.weight"):
        study.optimize(n_trials=2, **QUIET)
    assert not (tmp_path / "runs").exists()


def test_what_is_taken_from_the_base_is_noted(make, pico, tmp_path):
    shutil.copytree(pico / "ada", tmp_path / "lost")
    file = tmp_path / "lost" / "model.safetensors"
    tensors = load_file(file)
    del tensors["lm_head.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    study = make(models=(tmp_path / "lost", "bob"))
    notes = study.check()
    assert [note for note in notes if "lm_head.weight" in note and "taken from" in note]


def test_a_missing_device_leaves_nothing_behind(make, tmp_path):
    study = make(device="cuda:7")
    with pytest.raises(pm.ConfigError, match="cuda:7"):
        study.optimize(n_trials=1, **QUIET)
    assert list(tmp_path.iterdir()) == []


def test_a_study_that_only_failed_may_be_mended(make):
    study = make(failing)
    study.optimize(n_trials=3, **QUIET)
    with pytest.raises(pm.ConfigError, match="all 3 trials failed"):
        study.pick()
    mended = make(first)
    mended.optimize(n_trials=2, **QUIET)
    assert [trial.failure for trial in mended.get_trials()] == ["", ""]


def test_a_function_that_exits_fails_its_trial(make):
    study = make(lambda model, tokenizer: sys.exit("bye"))
    study.optimize(n_trials=2, **QUIET)
    assert ["SystemExit: bye" in trial.failure for trial in study.get_trials()] == [
        True,
        True,
    ]


def test_a_failure_on_held_out_examples_names_the_trial(make):
    def score(model, tokenizer, split):
        return 1.0 if split == "search" else float("nan")

    study = make(score)
    study.optimize(n_trials=2, **QUIET)
    with pytest.raises(pm.EvaluationError, match="ada, on held-out examples: v: "):
        study.evaluate(0)


def test_copies_of_a_used_study_read_the_same_record(make):
    study = make()
    study.optimize(n_trials=3, **QUIET)
    for again in (pickle.loads(pickle.dumps(study)), copy.deepcopy(study)):
        assert again.front() == study.front()


def test_a_model_with_the_name_of_a_baseline_is_refused(make, pico, tmp_path):
    save_pico(tmp_path / "uniform soup", pico_states()["ada"])
    study = pm.Study(
        pico / "base",
        [tmp_path / "uniform soup", pico / "bob"],
        [pm.Function(first)],
    )
    with pytest.raises(pm.ConfigError, match="also the name of a baseline"):
        study.optimize(n_trials=1, **QUIET)


@pytest.mark.parametrize(
    "options",
    [
        {"space": {"foo": FloatDistribution(0, 1)}},
        {"importance": {"weight/nope": 2.0}},
    ],
)
def test_a_sampler_for_other_parameters_is_refused(make, options):
    study = make(sampler=pm.MMMOSampler(**options))
    with pytest.raises(pm.ConfigError, match="sampler: unknown parameter"):
        study.optimize(n_trials=1, **QUIET)


def test_bounds_that_differ_little_are_two_constraints():
    bounds = [pm.Constraint("p", at_most=bound) for bound in (999999.6, 1000000.4)]
    assert len({bound.text for bound in bounds}) == 2
