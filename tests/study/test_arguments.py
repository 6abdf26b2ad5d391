"""Wrong arguments of `Study`: one sentence that names the argument, before anything is loaded."""

from pathlib import Path

import numpy as np
import pytest

import paretomerge as pm
from paretomerge.config.convert import settings_of


def score(model, tokenizer):
    return 1.0


def make(folder: Path, **changes) -> pm.Study:
    arguments = {
        "base": "m/base",
        "models": ["m/one", "m/two"],
        "objectives": [pm.Task("t"), pm.Sparsity()],
        "out": folder / "run",
    }
    return pm.Study(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("base", None, "^base: expected a folder or a name"),
        ("base", "", "^base: expected a folder or a name"),
        ("base", "m/one", "^models: m/one is the base"),
        ("base", "m/../m/one", "^models: m/one is the base"),
        ("models", "m/one", r"^models: expected a list, such as .*got 'm/one'"),
        ("models", Path("m"), "^models: expected a list"),
        ("models", None, "^models: expected a list"),
        ("models", ["m/one", None], "^models: expected a folder or a name.*None"),
        ("models", ["m/one", 2], "^models: expected a folder or a name.*2"),
        ("objectives", pm.Sparsity(), r"^objectives: expected a list"),
        ("objectives", None, r"^objectives: expected a list"),
        ("objectives", [], "^objectives: name one or more"),
        ("objectives", [pm.Sparsity], r"^objectives: .*class Sparsity; write Spars"),
        ("objectives", [score], r"^objectives: write Function\("),
        ("objectives", ["gsm8k"], r"^objectives: .*Task\('gsm8k'\)"),
        (
            "objectives",
            [pm.Task("a"), pm.Task("b", name="a_stderr")],
            "^objectives.*column a_stderr.*set another `name`",
        ),
        ("constraints", None, "^constraints: expected a list"),
        (
            "constraints",
            pm.Constraint(pm.Task("c"), at_least=0),
            "^constraints: expected a list",
        ),
        ("constraints", ["w0>0"], r"^constraints: expected Constraint\("),
        ("watch", "hellaswag", r"^watch: expected a list, such as \['hellaswag'\]"),
        ("watch", [0.5], "^watch: expected text"),
        ("space", {"methods": ["ties"]}, r"^space: expected WeightSpace\("),
        ("space", "ties", r"^space: expected WeightSpace\("),
        ("space", pm.WeightSpace, r"^space: .*class WeightSpace; write WeightSpace\("),
        ("then", 20, r"^then: expected SecondLevel\(RouteSpace"),
        ("then", pm.RouteSpace(), r"^then: expected SecondLevel\(RouteSpace"),
        ("sampler", pm.MMMOSampler, r"^sampler: .*class MMMOSampler; write MMMOS"),
        ("sampler", None, "^sampler: a name such as"),
        ("sampler", 3, "^sampler: a name such as"),
        ("sampler", {"nam": "tpe"}, "^sampler: a name such as"),
        ("sampler", "mmm", "^sampler: unknown name 'mmm'; did you mean 'mmmo'"),
        ("sampler", {"name": "tpa"}, "^sampler: unknown name 'tpa'; did you mean 'tpe"),
        ("budget", "60", r"^budget: expected Budget\(trials=60\) or a whole number"),
        ("budget", 60.5, r"^budget: expected Budget\(trials=60\) or a whole number"),
        ("budget", None, r"^budget: expected Budget\(trials=60\) or a whole number"),
        ("budget", True, r"^budget: expected Budget\(trials=60\) or a whole number"),
        ("budget", 0, r"^budget: .*above 0, got 0"),
        ("budget", pm.Budget, r"^budget: .*class Budget; write Budget\("),
        ("starts", "recipe.yml", r"^starts: expected a list, such as \['recipe.yml'\]"),
        ("starts", Path("recipe.yml"), r"^starts: expected a list"),
        ("warm_start", "runs/x", r"^warm_start: expected a list"),
        ("evaluation", {}, r"^evaluation: expected Evaluation\("),
        ("evaluation", pm.Evaluation, r"^evaluation: .*class Evaluation"),
        ("seed", None, "^seed: expected a whole number, got None"),
        ("seed", 1.5, "^seed: expected a whole number, got 1.5"),
        ("seed", True, "^seed: expected a whole number, got True"),
        ("out", "", "^out: expected a path"),
        ("out", None, "^out: expected a path"),
        ("storage", "x.db", "^storage: expected the URL of a database"),
        ("storage", 3, "^storage: expected the URL of a database"),
        ("study_name", "", "^study_name: expected text that is not empty"),
        ("dtype", 3, "^dtype: expected text"),
        ("dtype", "float3", "^dtype: unknown dtype 'float3'"),
        ("device", 0, "^device: expected cpu, cuda or cuda:N as text, got 0"),
        ("device", "gpu", "^device: expected cpu, cuda or cuda:N"),
    ],
)
def test_a_wrong_argument_is_named_with_its_cure(tmp_path, argument, value, message):
    with pytest.raises(pm.ConfigError, match=message):
        make(tmp_path, **{argument: value})


@pytest.mark.parametrize("out", ["file", "file/run", "file/deeper/run", "n" * 300])
def test_a_study_is_not_put_where_no_folder_can_be(tmp_path, out):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(pm.ConfigError, match=r"^out: .*cannot be a folder"):
        make(tmp_path, out=tmp_path / out)
    assert (tmp_path / "file").read_text() == "kept"


def test_numbers_of_numpy_and_paths_become_plain(tmp_path):
    study = make(
        tmp_path,
        models=(Path("m/one"), np.str_("m/two")),
        seed=np.int64(3),
        budget=np.int64(7),
        space=pm.WeightSpace(
            groups=np.int64(2), weight={"bounds": np.array([0.0, 1.0])}
        ),
        sampler={"name": "nsga2", "population_size": np.int64(4)},
        evaluation=pm.Evaluation(
            include_path=Path("tasks"), cache=Path("c.db"), batch_size=np.int32(4)
        ),
        storage=Path("x.db"),
        starts=[Path("r.yml")],
    )
    settings = study.settings
    assert settings.models == ("m/one", "m/two") and settings.starts == ("r.yml",)
    assert type(settings.seed) is int and settings.budget == pm.Budget(7)
    assert settings.storage_url == "sqlite:///x.db"
    again = settings_of(study.to_config(), tmp_path)
    assert again.space == settings.space and again.sampler == settings.sampler
    assert again.evaluation == settings.evaluation
    assert "population_size: 4" in study.to_yaml()


def test_the_home_folder_is_meant_by_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    study = make(
        tmp_path,
        base="~/base",
        models=["~/one+~/adapter", Path("~/two")],
        starts=["~/r.yml"],
        warm_start=["~/earlier", "sqlite:///~x.db"],
        out="~/run",
    )
    settings = study.settings
    home = str(tmp_path)
    assert settings.base == f"{home}/base" and study.folder == tmp_path / "run"
    assert settings.models == (f"{home}/one+{home}/adapter", f"{home}/two")
    assert settings.starts == (f"{home}/r.yml",)
    assert settings.warm_start == (f"{home}/earlier", "sqlite:///~x.db")

    yaml = study.to_yaml()
    (tmp_path / "study.yaml").write_text(yaml)
    for name in ("~/study.yaml", "~", tmp_path):
        assert pm.load_study(name).settings.base == settings.base


@pytest.mark.parametrize("until", [1e-7, 0.07, 0.0123, 0.1 + 0.2, np.float32(0.1)])
def test_a_share_comes_back_from_a_file_as_it_was(tmp_path, until):
    study = make(tmp_path, budget=pm.Budget(6, until=until))
    text = study.to_yaml()
    (tmp_path / "study.yaml").write_text(text)
    again = pm.load_study(tmp_path / "study.yaml")
    assert again.settings.budget == study.settings.budget
    assert again.to_yaml() == text


@pytest.mark.parametrize("path", [None, 3, "", "."])
def test_what_is_no_study_file_is_told(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(pm.ConfigError, match=r"expected a path|name the study's YAML"):
        pm.load_study(path)
