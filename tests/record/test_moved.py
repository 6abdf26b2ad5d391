"""Recipes of a study that was moved, copied, or is worked on from several places."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

import paretomerge as pm
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
    old, new = folders(tmp_path / "old", "ada"), folders(tmp_path / "new", "ada")
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
