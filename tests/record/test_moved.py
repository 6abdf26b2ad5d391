"""Recipes of a study that was moved, copied, or is worked on from several places."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

import paretomerge as pm
from paretomerge.recipe import Recipe
from paretomerge.record.moved import moved_folders, root_notes, with_new_paths

QUIET = {"show_progress_bar": False, "held_out": False}


def norm(model, tokenizer):
    return model.state_dict()["model.norm.weight"].float().norm().item()


def identity(*models: str) -> dict:
    return {"base": "base", "models": list(models)}


def folders(root: Path, *names: str) -> Path:
    for name in ("base", *names):
        (root / name).mkdir(parents=True)
    return root


def test_former_places_are_remembered_once():
    notes = {}
    for root in ("/a", "/b", "/a", "/c", "/b", "/b"):
        notes |= root_notes(notes, root)
    assert notes["root"] == "/b"
    assert sorted(notes["former roots"]) == ["/a", "/c"]


def test_paths_move_where_the_models_did(tmp_path):
    old, new = folders(tmp_path / "old", "ada", "bob"), folders(tmp_path / "new", "ada")
    notes = {"root": str(old), "identity": identity("ada", "ada+base")}
    assert moved_folders(notes, str(new)) == [str(old)]
    assert moved_folders(notes, str(old)) == []
    assert moved_folders(notes, "") == []
    # Only the study.yaml is elsewhere: the models are where they were.
    notes["identity"] = identity("ada", "bob")
    assert moved_folders(notes, str(new)) == []
    notes["identity"] = identity(str(old / "ada"))
    assert moved_folders(notes, str(new)) == []
    # Nothing is left at the old place.
    notes["root"] = str(tmp_path / "gone")
    assert moved_folders(notes, str(new)) == [notes["root"]]


def test_only_paths_below_the_old_folder_change():
    text = "base_model: /a/b\nmodels:\n- model: /a/b/ada+/a/b/lora\n- model: /a/bc/x\n"
    assert with_new_paths(text, ["/a/b"], "/d") == (
        "base_model: /a/b\nmodels:\n- model: /d/ada+/d/lora\n- model: /a/bc/x\n"
    )


def test_a_place_below_an_old_one_and_paths_that_end_alike():
    text = "models:\n- model: /d/ada\n- model: /d/new/bob+/d/lora\n- model: /mnt/d/x\n"
    assert with_new_paths(text, ["/d", "/old"], "/d/new") == (
        "models:\n- model: /d/new/ada\n- model: /d/new/bob+/d/new/lora\n- model: /mnt/d/x\n"
    )
    # What one former place is replaced by is not below the other one.
    text = "models:\n- model: /old/ada\n"
    assert with_new_paths(text, ["/old", "/d"], "/d/new") == (
        "models:\n- model: /d/new/ada\n"
    )


@pytest.mark.parametrize("old", ["/my disk/" + "a long name " * 9, "/it's: #1/ü", "/a"])
@pytest.mark.parametrize("new", ["/b", "/b: c/it's #2", "/x y" * 30])
def test_paths_that_yaml_quotes_or_breaks(old, new):
    def recipe(root: str) -> Recipe:
        document = {
            "merge_method": "regmean",
            "base_model": f"{root}/base",
            "models": [
                {"model": f"{root}/ada+{root}/lora", "parameters": {"weight": 0.1}}
            ],
            "calibration": f"{root}/run/calibration",
        }
        return Recipe.from_dict(document)

    moved = with_new_paths(recipe(old).to_yaml(), [old], new)
    assert moved == recipe(new).to_yaml()


def test_models_on_the_hub_and_elsewhere_move_with_none(tmp_path):
    old, new = folders(tmp_path / "old", "ada"), folders(tmp_path / "new", "ada")
    (tmp_path / "bob").mkdir()
    models = ["ada+org/lora", str(tmp_path / "bob")]
    notes = {
        "root": str(old),
        "identity": {"base": "org/name", "models": models},
    }
    # The copy has its own `ada`, whatever becomes of the first one.
    assert moved_folders(notes, str(new)) == [str(old)]
    notes["identity"]["models"] = models[1:]
    assert moved_folders(notes, str(new)) == []
    # A name with a plus sign.
    (old / "a+da").mkdir()
    notes["identity"]["models"] = ["ada", "a+da"]
    assert moved_folders(notes, str(new)) == []
    (new / "a+da").mkdir()
    assert moved_folders(notes, str(new)) == [str(old)]


def test_an_old_place_that_cannot_be_looked_at_is_gone(tmp_path):
    new = folders(tmp_path / "new", "ada")
    # The system refuses to look for so long a name, as for a folder in another user's home.
    old = "/" + 300 * "x"
    notes = {"root": old, "identity": identity("ada")}
    assert moved_folders(notes, str(new)) == [old]


@pytest.mark.parametrize("way", [shutil.move, shutil.copytree])
def test_a_study_goes_on_and_is_picked_from_where_it_was_moved(
    pico, tmp_path, monkeypatch, way
):
    first, second = tmp_path / "first", tmp_path / "second"
    for name in ("base", "ada", "bob"):
        shutil.copytree(pico / name, first / "models" / name)
    (first / "ada.txt").write_text("text of ada " * 20)
    (first / "bob.txt").write_text("bob has other text " * 20)

    def study() -> pm.Study:
        return pm.Study(
            "models/base",
            ["models/ada", "models/bob"],
            [pm.Function(norm)],
            space=pm.WeightSpace(methods=["regmean"]),
            calibration={"data": {"models/ada": "ada.txt", "models/bob": "bob.txt"}},
            sampler="random",
            seed=0,
            out="run",
        )

    monkeypatch.chdir(first)
    study().optimize(n_trials=4, **QUIET)
    there = study().save(3, tmp_path / "there")
    way(first, second)
    monkeypatch.chdir(second)
    # As a user would: from the folder itself, where relative paths exist, too.
    trials = study().get_trials()
    assert f"{second}/models/ada" in trials[3].recipe.source_models
    assert trials[3].recipe.calibration == f"{second}/run/calibration"
    here = study().save(3, tmp_path / "here")
    written = (here / "mergekit_config.yml").read_text()
    assert f"{first}/" not in written
    expected = load_file(there / "model.safetensors")
    for name, tensor in load_file(here / "model.safetensors").items():
        assert tensor.equal(expected[name])
    study().optimize(n_trials=1, **QUIET)
    later = study().get_trials()
    assert len(later) == 5
    assert {trial.recipe.base_model for trial in later} == {f"{second}/models/base"}
