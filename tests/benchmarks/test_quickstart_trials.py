"""The comparison of two quickstarts sees every difference."""

import json

import optuna
import pytest

from benchmarks import quickstart_trials


@pytest.fixture
def finished(tmp_path):
    """A function that writes the folder of a finished study with one score changed."""

    def write(name, score=0.5, weights=b"weights", parent="here"):
        folder = tmp_path / name
        (folder / "picked").mkdir(parents=True)
        study = optuna.create_study(
            study_name="paretomerge",
            storage=f"sqlite:///{folder}/study.db",
            directions=["maximize", "maximize"],
        )
        for number in range(3):
            trial = study.ask()
            trial.suggest_float("weight", 0.25, 0.25)
            trial.set_user_attr("scores", {"sort": [score, 0.1, 4, "1100"]})
            study.tell(trial, [0.5, number])
        study.set_user_attr("held_out/1/objectives", {"sort": [0.25, 0.1, 4, "1000"]})
        study.set_user_attr("end", {"reason": "finished"})
        recipe = f"base_model: /{parent}/models/base\nmodels:\n- model: '/{parent}/models/a'\n"
        (folder / "picked" / "mergekit_config.yml").write_text(recipe)
        (folder / "picked" / "model.safetensors").write_bytes(weights)
        return folder

    return write


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["quickstart_trials", *map(str, arguments)])
    return quickstart_trials.main()


def test_equal_studies_in_different_folders_are_equal(finished, tmp_path, monkeypatch):
    file = tmp_path / "dump.json"
    assert run(monkeypatch, "dump", file, "--study", finished("before")) == 0
    after = finished("after", parent="some/where else")
    dumped = json.loads(file.read_text())
    assert [t["values"] for t in dumped["trials"]] == [
        [0.5, 0.0],
        [0.5, 1.0],
        [0.5, 2.0],
    ]
    assert dumped["trials"][1]["held_out"] == {
        "objectives": {"sort": [0.25, 0.1, 4, "1000"]}
    }
    assert dumped["trials"][0]["params"] == {"weight": 0.25}
    assert "model: 'a'" in dumped["checkpoint"]["recipe"]
    assert (
        run(monkeypatch, "compare", file, "--study", finished("again", parent="other"))
        == 0
    )
    picked = finished("elsewhere") / "picked"
    assert run(monkeypatch, "compare", file, "--study", after, "--picked", picked) == 0


def test_every_difference_is_printed(finished, tmp_path, monkeypatch, capsys):
    file = tmp_path / "dump.json"
    run(monkeypatch, "dump", file, "--study", finished("before"))
    after = finished("after", score=0.5000000000000001, weights=b"other weights")
    capsys.readouterr()
    assert run(monkeypatch, "compare", file, "--study", after) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "/trials/0/scores/sort/0: 0.5 before, 0.5000000000000001 after"
    assert lines[3].startswith("/checkpoint/sha256") and lines[4].endswith(
        "4 differences"
    )


def test_missing_trials_and_keys_are_differences():
    before, after = (
        {"trials": [1, 2], "a": None, "nan": float("nan")},
        {"trials": [1], "b": 3},
    )
    after["nan"] = float("nan")
    texts = list(quickstart_trials.differences(before, after))
    assert texts == ["/trials: 2 entries before, 1 after", "/b: None before, 3 after"]
