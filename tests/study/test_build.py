import os
import shutil

import pytest
import yaml

from paretomerge.config.schema import load_config
from paretomerge.errors import ConfigError, ParetoMergeError, StudyError
from paretomerge.search.mmmo.sampler import MMMOSampler
from paretomerge.study.measure_digest import task_digest
from paretomerge.study.parts import study_pool
from paretomerge.study.study import load_study
from tests.studies import open_search


def write(tmp_path, pico, **changes):
    (tmp_path / "mine.py").write_text(
        "def score(model, tokenizer):\n    return 1.0\n\n\ndef other(model, tokenizer):\n    "
        "return 2.0\n"
    )
    data = {
        "base": str(pico / "base"),
        "models": [str(pico / "ada"), str(pico / "bob")],
        "objectives": [
            {"function": "mine:score"},
            {"function": "mine:other", "direction": "minimize"},
        ],
        "sampler": {"name": "MMMOSampler"},
    } | changes
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in data.items() if v is not None}))
    return path


def test_a_small_file_is_enough(tmp_path, pico):
    study = open_search(write(tmp_path, pico))
    assert [(o.name, o.maximise) for o in study.goals.objectives] == [
        ("score", True),
        ("other", False),
    ]
    assert isinstance(study.sampler, MMMOSampler) and study.rule.trials == 60
    assert study.folder == tmp_path / "runs" / "study"
    assert set(study.space.sources) == {"ada", "bob"}


def test_the_shipped_study_is_read(specialists):
    settings = load_study(specialists / "study.yaml").settings
    assert [measure.name for measure in settings.objectives] == [
        "sort",
        "reverse",
        "translate",
    ]
    assert len(settings.watch) == 6


def test_other_samplers_by_name(tmp_path, pico):
    study = open_search(
        write(tmp_path, pico, sampler={"name": "NSGAIISampler", "population_size": 10})
    )
    assert type(study.sampler).__name__ == "NSGAIISampler"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"modles": []}, "did you mean 'models'"),
        ({"space": {"method": ["ties"]}}, "did you mean 'methods'"),
        ({"space": {"methods": ["tie"]}}, "unknown searchable method 'tie'"),
        (
            {"space": {"weight": {"bounds": [1, 0]}}},
            "space.weight.bounds: .*low < high",
        ),
        (
            {"space": {"routes": {}, "subset": True}},
            "`routes` stands alone, without subset",
        ),
        ({"space": {"routes": {"blocks": 9}}}, "space.routes.blocks: expected 1 to 4"),
        (
            {"space": {"routes": {"scale": [1.1, 2]}}},
            "space.routes.scale: expected 0 < low < 1 < high",
        ),
        ({"space": {"routes": {"block": 2}}}, "did you mean 'blocks'"),
        (
            {"space": {"routes": {"match": "none.txt"}}},
            "space.routes.match: cannot read the text none.txt",
        ),
        (
            {"space": {"routes": {"match": "mine.py", "scale": False}}},
            "space.routes.match: needs scales",
        ),
        (
            {"space": {"routes": {"repeats": 2}}},
            "space.routes.repeats: has no meaning with form: edits",
        ),
        (
            {"space": {"routes": {"form": "indicators", "most": 2}}},
            "space.routes.most: has no meaning with form: indicators",
        ),
        ({"objectives": [{"size": "layer"}]}, "layers"),
        ({"models": ["one"]}, "models: expected at least 2 items, got"),
        ({"models": None}, "models: required key is missing"),
        (
            {"objectives": [{"task": "a", "function": "b:c"}]},
            "set exactly one of `task`",
        ),
        ({"objectives": [{"function": "mine:score", "direction": "up"}]}, "direction"),
        (
            {"objectives": [{"function": "mine:score"}, {"function": "mine:score"}]},
            "'score' is the name of two scores",
        ),
        ({"objectives": [{"function": "mine:scor"}]}, "scor"),
        ({"objectives": [{"taks": "a"}]}, "did you mean 'task'"),
        ({"sampler": {"name": "MMOSampler"}}, "did you mean 'MMMOSampler'"),
        ({"sampler": {"name": "MMMOSampler", "elite": 3}}, "did you mean 'elites'"),
        ({"sampler": {"name": "CmaEsSampler"}}, "one objective"),
        ({"trials": 0}, "trials: expected a number greater than or equal to 1, got 0"),
        ({"seed": "x"}, "seed: expected an integer, got 'x'"),
        ({"sampler": 3}, "sampler: expected a string, got 3"),
        (
            {"space": {"weight": {"groups": 0}}},
            "groups: expected a count of 1 or more, got 0$",
        ),
        ({"dtype": "int8"}, "dtype"),
        ({"evaluate": {"splits": {"search": "a"}}}, "held_out"),
        ({"base": "./nowhere"}, "there is no such folder"),
    ],
)
def test_bad_files_say_what_is_wrong(tmp_path, pico, changes, told):
    with pytest.raises(ParetoMergeError, match=told):
        open_search(write(tmp_path, pico, **changes))


def test_no_file_and_no_yaml(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "study.yaml")
    (tmp_path / "study.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        load_config(tmp_path / "study.yaml")


@pytest.fixture
def own(tmp_path, pico):
    """The pico models beside a study.yaml, to be changed."""
    for name in ("base", "ada", "bob"):
        shutil.copytree(pico / name, tmp_path / name)
    return {"base": "base", "models": ["ada", "bob"]}


@pytest.mark.parametrize(
    ("model", "told"),
    [("base", "files of base changed"), ("bob", "files of models changed")],
)
def test_trials_of_models_that_were_trained_again_are_refused(
    tmp_path, pico, own, model, told
):
    path = write(tmp_path, pico, **own)
    study = open_search(path)
    study.run(1)
    for file in (tmp_path / model).glob("*.safetensors"):
        os.utime(file, (1, 1))
    open_search(path)  # a copy with other times is the same model
    for file in (tmp_path / model).glob("*.safetensors"):
        file.unlink()
    for file in (
        *(pico / "cyd").glob("*.safetensors"),
        *(pico / "cyd").glob("*.index.json"),
    ):
        shutil.copy(file, tmp_path / model)
    with pytest.raises(StudyError, match=told):
        open_search(path)


def test_trials_of_a_function_that_was_edited_are_refused(tmp_path, pico):
    path = write(tmp_path, pico)
    study = open_search(path)
    study.run(1)
    module = tmp_path / "mine.py"
    module.write_text(module.read_text().replace("1.0", "3.0"))
    with pytest.raises(StudyError, match="files of scores changed"):
        open_search(path)


def test_trials_of_a_task_that_was_edited_are_refused_and_other_tasks_may_come(
    tmp_path, specialists
):
    shutil.copytree(specialists / "tasks", tmp_path / "tasks")
    names = {entry.stem for entry in (tmp_path / "tasks").glob("*.yaml")}
    assert {"sort", "copy"} <= names
    before = task_digest(tmp_path / "tasks", "sort")
    copied = tmp_path / "tasks" / "copy.yaml"
    copied.write_text(copied.read_text() + "# another\n")
    assert task_digest(tmp_path / "tasks", "sort") == before
    sort = tmp_path / "tasks" / "sort.yaml"
    sort.write_text(sort.read_text() + "# another\n")
    assert task_digest(tmp_path / "tasks", "sort") != before


def test_the_batch_size_may_change(tmp_path, pico):
    study = open_search(write(tmp_path, pico))
    study.run(1)
    assert (
        len(open_search(write(tmp_path, pico, evaluate={"batch_size": 2})).trials())
        == 1
    )
    with pytest.raises(StudyError, match="evaluate changed"):
        open_search(write(tmp_path, pico, evaluate={"search_items": 2}))


def test_studies_in_two_folders_share_scores_of_the_same_function(tmp_path, pico):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    study = open_search(write(tmp_path / "one", pico))
    study.run(2)
    later = write(
        tmp_path / "two",
        pico,
        warm_start="../one/runs/study",
        evaluate={"batch_size": 2},
    )
    assert len(open_search(later).warm_start.scored) == 2
    module = tmp_path / "two" / "mine.py"
    module.write_text(module.read_text().replace("1.0", "3.0"))
    (note,) = open_search(write_config(later, out="again")).warm_start.notes
    assert "score 'score'" in note and "score 'other'" in note


def write_config(path, **changes):
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))
    return path


@pytest.mark.parametrize("model", ["ada+bob", "./ada+./bob", "ada+ABS/bob"])
def test_adapters_start_from_the_file_s_folder_too(tmp_path, pico, own, model):
    settings = load_study(
        write(
            tmp_path,
            pico,
            **own | {"models": ["ada", model.replace("ABS", str(tmp_path))]},
        )
    ).settings
    assert study_pool(settings).sources["bob"] == f"{tmp_path}/ada+{tmp_path}/bob"


def test_the_same_model_twice_is_refused_however_it_is_spelt(tmp_path, pico, own):
    path = write(tmp_path, pico, **own | {"models": ["ada", "bob", "./bob/../ada"]})
    with pytest.raises(
        ConfigError, match=r"models: .*ada is listed twice; list each model once"
    ):
        open_search(path)


def test_a_missing_folder_is_named_with_where_it_was_looked_for(
    tmp_path, pico, own, monkeypatch
):
    monkeypatch.chdir(pico)  # where there is a `cyd`, which is not meant
    settings = load_study(
        write(tmp_path, pico, **own | {"models": ["ada", "./cyd"]})
    ).settings
    assert study_pool(settings).sources["cyd"] == f"{tmp_path}/cyd"


def test_a_path_with_a_plus_and_hub_names_stay_whole(tmp_path, pico, own):
    shutil.move(tmp_path / "bob", tmp_path / "bob+1")
    settings = load_study(
        write(tmp_path, pico, **own | {"models": ["owner/name@main+ada", "bob+1"]})
    ).settings
    assert study_pool(settings).sources == {
        "ada": f"owner/name@main+{tmp_path}/ada",
        "bob+1": f"{tmp_path}/bob+1",
    }


def test_storage_starts_from_the_file_s_folder(tmp_path, pico, monkeypatch):
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    open_search(write(tmp_path, pico, storage="sqlite:///x.db")).run(1)
    assert (tmp_path / "x.db").is_file() and not list((tmp_path / "cwd").iterdir())
    open_search(write(tmp_path, pico, storage=f"sqlite:///{tmp_path}/y.db")).run(1)
    assert (tmp_path / "y.db").is_file()
    later = write(tmp_path, pico, storage=None, out="later")
    earlier = write_config(
        shutil.copy(later, tmp_path / "earlier.yaml"), storage="sqlite:///x.db"
    )
    for name in (earlier.name, "sqlite:///x.db", f"sqlite:///{tmp_path}/x.db"):
        assert (
            len(open_search(write_config(later, warm_start=name)).warm_start.scored)
            == 1
        )


def test_a_constraint_without_a_name_is_on_the_objective_of_the_same_score(
    tmp_path, pico
):
    objectives = [
        {"function": "mine:score", "name": "mine", "direction": "minimize"},
        {"function": "mine:other"},
    ]
    constraints = [
        {"function": "mine:score", "at_least": 0},
        {"function": "mine:other", "name": "own", "at_most": 3},
    ]
    study = open_search(
        write(tmp_path, pico, objectives=objectives, constraints=constraints)
    )
    assert [c.score for c in study.goals.constraints] == ["mine", "own"]
    study.run(1)
    first = study.trials()[0]
    assert list(study.goals.evaluator.evaluate(study.load(first), "search")) == [
        "mine",
        "other",
        "own",
    ]
