"""Which text each model gets from the options of `calibrate` and `learn-weights`."""

import json
from pathlib import Path

import pytest

from tests.cli.test_cli import paretomerge
from tests.conftest import TEXTS


def refused(*arguments: object) -> str:
    done = paretomerge(*arguments, ok=False)
    assert done.returncode == 1
    return done.stderr


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXTS["ada"] * 3)
    return file


def test_no_text_replaces_another_in_silence(pico: Path, text: Path, tmp_path: Path):
    command = ("calibrate", pico / "base", pico / "ada", "--out", tmp_path / "out")
    # By its path and by its name, it is one model.
    options = ("--data", f"ada={text}", "--data", f"{pico}/ada={text}")
    assert "ada is named twice" in refused(*command, *options)
    study = tmp_path / "study.yaml"
    assert "--study" in refused(*command, "--data", f"ada={text}", "--task", "ada=x")
    assert not (tmp_path / "out").exists() and not study.exists()


def test_a_name_that_two_models_share(pico: Path, text: Path, tmp_path: Path):
    models = [tmp_path / place / "ada" for place in ("one", "other")]
    command = ("calibrate", pico / "base", *models, "--out", tmp_path / "out")
    message = refused(*command, "--data", f"ada={text}")
    assert f"ada may be {models[0]} or {models[1]}; write the whole name" in message


def test_equals_signs_in_names_and_files(pico: Path, tmp_path: Path):
    model = tmp_path / "lr=0.1"
    model.symlink_to(pico / "ada")
    text = tmp_path / "text=1.txt"
    text.write_text(TEXTS["ada"] * 3)
    out = tmp_path / "out"
    paretomerge(
        "calibrate",
        pico / "base",
        model,
        "--out",
        out,
        "--data",
        f"{model.name}={text}",
    )
    (source,) = json.loads((out / "calibration.json").read_text())["sources"]
    assert source["name"] == str(model)
    command = ("calibrate", pico / "base", model, "--out", tmp_path / "other")
    assert "write MODEL=VALUE, not 'lr'" in refused(*command, "--data", "lr")


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("folder", "is a folder; name a file, such as"),
        ("text.txt/recipe.yml", "cannot be written: "),
    ],
)
def test_where_no_recipe_can_be_written_no_weights_are_learned(
    pico: Path, text: Path, tmp_path: Path, out: str, message: str
):
    (tmp_path / "folder").mkdir()
    # No such models: they are not looked at.
    command = ("learn-weights", "nowhere", "none", "--data", f"none={text}")
    options = ("--out", tmp_path / out, "--overwrite")
    assert message in refused(*command, *options)


def test_the_folder_of_a_recipe_is_made(pico: Path, text: Path, tmp_path: Path):
    out = tmp_path / "new" / "folder" / "recipe.yml"
    command = ("learn-weights", pico / "base", pico / "ada", "--data", f"ada={text}")
    paretomerge(*command, "--out", out, "--steps", 0, "--max-tokens", 10)
    assert out.read_text().startswith("# Learned weights: step 0")
