"""What is wrong with models is said before the first trial, and nothing is left behind."""

import json
import shutil
from pathlib import Path

import pytest

from paretomerge.errors import ParetoMergeError
from paretomerge.study.study import Study, load_study
from tests.study.test_build import write


@pytest.fixture
def models(tmp_path: Path, pico: Path) -> Path:
    for name in ("base", "ada", "bob"):
        shutil.copytree(pico / name, tmp_path / "models" / name)
    return tmp_path / "models"


def study_of(tmp_path: Path, models: Path) -> Study:
    return load_study(write(tmp_path, models))


def refused(tmp_path: Path, models: Path, message: str) -> None:
    with pytest.raises(ParetoMergeError, match=message):
        study_of(tmp_path, models).check()
    assert not (tmp_path / "runs").exists()


def test_a_base_without_a_tokenizer(tmp_path: Path, models: Path) -> None:
    for file in (models / "base").glob("tokenizer*"):
        file.unlink()
    message = (
        "models/base: has no tokenizer, which a model that writes .*; copy the files"
    )
    refused(tmp_path, models, message)


def test_a_base_with_a_damaged_tokenizer(tmp_path: Path, models: Path) -> None:
    (models / "base" / "tokenizer.json").write_text("{")
    message = r"models/base: its tokenizer cannot be loaded \(.*\); copy the files"
    refused(tmp_path, models, message)


def test_a_config_that_transformers_does_not_know(tmp_path: Path, models: Path) -> None:
    for name in ("base", "ada", "bob"):
        file = models / name / "config.json"
        config = json.loads(file.read_text()) | {"model_type": "lamma9"}
        file.write_text(json.dumps(config))
    refused(tmp_path, models, "transformers cannot read config.json: .*lamma9")


def test_a_missing_source_and_a_missing_function_are_one_error(
    tmp_path: Path, models: Path
) -> None:
    shutil.rmtree(models / "ada")
    study = study_of(tmp_path, models)
    (tmp_path / "mine.py").write_text("def score(model, tokenizer):\n    return 1.0\n")
    with pytest.raises(ParetoMergeError) as raised:
        study.check()
    assert any("ada" in part for part in raised.value.parts)
    assert any("mine:other" in part for part in raised.value.parts)
    assert study_of(tmp_path, models).get_trials() == []
