"""Wrong arguments of `merge` and `plan_merge`, and what is never overwritten."""

from pathlib import Path

import pytest

import paretomerge as pm


def recipe(pico: Path) -> dict:
    models = [{"model": str(pico / "ada")}, {"model": str(pico / "bob")}]
    return {"merge_method": "linear", "models": models, "parameters": {"weight": 1}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"out": None}, "^out: expected a path, got None"),
        ({"out": ""}, "^out: expected a path"),
        ({"overwrite": "no"}, "^overwrite: expected True or False"),
        ({"allow_nan": None}, "^allow_nan: expected True or False"),
        ({"card": None}, "^card: expected text"),
        ({"workers": -1}, "^workers: must be 1 or more, not -1"),
        ({"workers": 0}, "^workers: must be 1 or more, not 0"),
        ({"workers": "2"}, "^workers: expected a whole number, got '2'"),
        ({"workers": 1.5}, "^workers: expected a whole number, got 1.5"),
        ({"shard_bytes": "5GB"}, "^shard_bytes: expected a whole number, got '5GB'"),
        ({"shard_bytes": -1}, "^shard_bytes: must be 1 or more, not -1"),
        ({"shard_bytes": 0}, "^shard_bytes: must be 1 or more, not 0"),
        ({"device": 0}, "^device: expected cpu, cuda or cuda:N as text, got 0"),
        ({"device": None}, "^device: expected cpu, cuda or cuda:N as text, got None"),
    ],
)
def test_a_wrong_argument_is_named_before_a_model_is_opened(
    tmp_path, arguments, message
):
    # The models are missing, which would be the error if they were opened first.
    chosen = {"recipe": recipe(tmp_path), "out": tmp_path / "out", **arguments}
    with pytest.raises(pm.ConfigError, match=message):
        pm.merge(**chosen)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (None, "^recipe: expected a Recipe, a mapping, the path"),
        ([], "^recipe: expected a Recipe, a mapping, the path"),
        ("", "^recipe: expected a Recipe, a mapping, the path"),
        (3, "^recipe: expected a Recipe, a mapping, the path"),
        (pm.Recipe("linear"), "^recipe: names no models to merge"),
        ("missing.yml", "no such file; name a recipe"),
        ("merge_method.yml", "no such file; name a recipe"),
        ("{merge_method: linear}", "exactly one of `models`, `slices` and `modules`"),
    ],
)
def test_what_is_no_recipe(tmp_path, bad, message):
    with pytest.raises(pm.RecipeError, match=message):
        pm.merge(bad, tmp_path / "out")
    with pytest.raises(pm.RecipeError, match=message):
        pm.plan_merge(bad)


def test_every_form_of_a_recipe_gives_the_same_plan(pico, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    data = recipe(pico)
    whole = pm.Recipe.from_dict(data)
    (tmp_path / "r.yml").write_text(whole.to_yaml())
    # A dict's repr is YAML of one line.
    forms = [data, whole, whole.to_yaml(), str(data), tmp_path / "r.yml", "~/r.yml"]
    for form in forms:
        assert pm.plan_merge(form).recipe == whole


def test_the_home_folder_is_meant_by_a_tilde(pico, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert pm.merge(recipe(pico), "~/out") == tmp_path / "out"
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("out", [".", "..", "../here"])
def test_the_current_folder_is_not_replaced(
    pico, tmp_path, monkeypatch, out, overwrite
):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(
        pm.CheckpointError, match=r"current folder .*cannot be replaced"
    ):
        pm.merge(recipe(pico), out, overwrite=overwrite)
    assert [entry.name for entry in tmp_path.rglob("*")] == ["here"]


def test_a_file_is_not_overwritten(pico, tmp_path):
    (tmp_path / "out").write_text("precious")
    with pytest.raises(pm.CheckpointError, match="is a file"):
        pm.merge(recipe(pico), tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").read_text() == "precious"


def test_a_folder_with_other_content_is_not_overwritten(pico, tmp_path):
    (tmp_path / "out" / "photos").mkdir(parents=True)
    (tmp_path / "out" / "photos" / "one").write_text("precious")
    with pytest.raises(pm.CheckpointError, match="holds no checkpoint"):
        pm.merge(recipe(pico), tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "photos" / "one").read_text() == "precious"


def test_what_comes_there_while_a_merge_runs_is_not_overwritten(
    pico, tmp_path, monkeypatch
):
    from paretomerge.merging import engine

    def merge(*_) -> None:
        (tmp_path / "out").write_text("precious")
        merge_as_planned(*_)

    merge_as_planned = engine.merge_with_processes
    monkeypatch.setattr(engine, "merge_with_processes", merge)
    with pytest.raises(pm.CheckpointError, match="is a file"):
        pm.merge(recipe(pico), tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").read_text() == "precious"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_checkpoint_and_an_empty_folder_are_overwritten(pico, tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / name).write_text("old")
    (tmp_path / "old" / "extra").write_text("old")
    for out in ("empty", "old"):
        pm.merge(recipe(pico), tmp_path / out, overwrite=True)
        assert (tmp_path / out / "config.json").read_text() != "old"
        assert not (tmp_path / out / "extra").exists()
