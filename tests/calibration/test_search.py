"""Searches over methods that need data: the space, a study with two workers, the command."""

import hashlib
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

import paretomerge as pm
from paretomerge.checkpoint.reader import Checkpoint
from paretomerge.cli.main import main
from paretomerge.errors import ConfigError
from paretomerge.merging.engine import merge
from paretomerge.space.sources import model_path, named_sources
from paretomerge.space.weights.space import WeightSearchSpace
from paretomerge.study.calibration import calibration_digest
from paretomerge.testing import check_space
from tests.cli.test_cli import paretomerge
from tests.conftest import EXPERTS, TEXTS

METHODS = ("regmean", "fisher", "regmean_pp")


def norm(model, tokenizer):
    return model.state_dict()["model.layers.0.mlp.up_proj.weight"].float().norm().item()


def total(model, tokenizer):
    return model.state_dict()["model.layers.1.mlp.up_proj.weight"].float().sum().item()


def space(pico: Path, calibration: Path | None, **settings) -> WeightSearchSpace:
    base = str(pico / "base")
    return WeightSearchSpace(
        base,
        named_sources([str(pico / expert) for expert in EXPERTS]),
        Checkpoint(base).architecture,
        calibration=None if calibration is None else str(calibration),
        **settings,
    )


def test_the_contract_of_spaces(pico: Path, pico_calibration: Path):
    check_space(space(pico, pico_calibration, methods=(*METHODS, "ties")))


def test_alpha_is_searched_where_it_has_a_meaning(pico: Path, pico_calibration: Path):
    full = space(pico, pico_calibration, methods=METHODS)
    assert full.conditions["alpha"] == (("method", ("regmean",)),)
    baselines = full.baselines()
    assert baselines["regmean"]["weight/ada"] == pytest.approx(1 / 3)
    assert baselines["regmean"]["alpha"] == 0.9
    recipe = full.recipe(baselines["fisher"])
    assert recipe.calibration == str(pico_calibration)
    assert recipe.parameters["normalize"] is False


def test_a_space_without_statistics_is_refused(pico: Path, pico_calibration: Path):
    with pytest.raises(ConfigError, match=r"regmean needs statistics .* `calibration`"):
        space(pico, None, methods=("ties", "regmean"))
    full = space(pico, pico_calibration, methods=("regmean",))
    recipe = full.recipe(full.baselines()["regmean"])
    other = recipe.from_dict(recipe.to_dict() | {"calibration": "elsewhere"})
    with pytest.raises(ConfigError, match=r"calibration: expected .*, got elsewhere"):
        full.params_of(other)


def test_processes_write_the_same_bytes(
    pico: Path, pico_calibration: Path, tmp_path: Path, monkeypatch
):
    from paretomerge.merging import tasks

    monkeypatch.setattr(tasks, "_LEAST_ELEMENTS", 200)
    for method in ("regmean", "fisher"):
        data = {
            "merge_method": method,
            "base_model": str(pico / "base"),
            "models": [{"model": str(pico / expert)} for expert in EXPERTS],
            "calibration": str(pico_calibration),
        }
        files = []
        for workers in (1, 2):
            out = merge(data, tmp_path / f"{method}-{workers}", workers=workers)
            files.append((out / "model.safetensors").read_bytes())
        assert files[0] == files[1]


def study(pico: Path, folder: Path, **settings) -> pm.Study:
    texts = {}
    for expert in EXPERTS:
        file = folder / f"{expert}.txt"
        file.write_text(TEXTS[expert] * 4)
        texts[str(pico / expert)] = str(file)
    defaults = {
        "objectives": [
            pm.Function(norm, name="norm"),
            pm.Function(total, direction="minimize"),
        ],
        "space": pm.WeightSpace(methods=["regmean", "fisher"]),
        "sampler": "random",
        "out": "runs/first",
        "calibration": {"data": texts, "examples": 8, "max_tokens": 12},
    }
    models = [str(pico / expert) for expert in EXPERTS]
    return pm.Study(pico / "base", models, **defaults | settings)


def test_a_study_makes_its_statistics_once_also_for_two_workers(
    pico: Path, tmp_path: Path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    first = study(pico, tmp_path, workers=2)
    first.optimize(n_trials=6, held_out=False, show_progress_bar=False)
    trials = first.get_trials()
    assert len(trials) == 6 and not any(trial.failure for trial in trials)
    folder = tmp_path / "runs" / "first" / "calibration"
    manifest = json.loads((folder / "calibration.json").read_text())
    assert [source["examples"] for source in manifest["sources"]] == [4, 4, 5]
    kinds = [set(source["statistics"]) for source in manifest["sources"]]
    assert kinds == [{"regmean", "fisher"}] * 3
    made = (folder / "calibration.json").stat().st_mtime_ns
    # The same study in one process: the same scores of the same merges, and the same statistics.
    again = study(pico, tmp_path)
    again.optimize(n_trials=6, held_out=False, show_progress_bar=False)
    assert (folder / "calibration.json").stat().st_mtime_ns == made
    picked = again.save(again.pick(), tmp_path / "picked")
    recipe = pm.Recipe.load(picked / "mergekit_config.yml")
    merge(recipe, tmp_path / "rebuilt")
    expected = load_file(picked / "model.safetensors")
    for name, tensor in load_file(tmp_path / "rebuilt" / "model.safetensors").items():
        assert tensor.equal(expected[name])
    # Other text is another study.
    (tmp_path / "ada.txt").write_text("zzz yyy xxx")
    changed = pm.Study.from_settings(again.settings)
    with pytest.raises(ConfigError, match="made of other text"):
        changed.check()


def test_statistics_that_an_earlier_version_made_are_used(
    pico: Path, tmp_path: Path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    data = {}
    for expert in reversed(EXPERTS):
        data[str(pico / expert)] = str(tmp_path / f"{expert}.txt")
    calibration = {"data": data, "examples": 8, "max_tokens": 12}
    mine = study(pico, tmp_path, calibration=calibration)
    folder = mine.settings.calibration_folder
    content = {}
    # As they were written, in their order.
    for model, text in data.items():
        file = Path(text).read_bytes()
        content[model] = hashlib.sha256(file).hexdigest()[:16]
    described = json.dumps([content, 8, 12, 0.9, ["regmean", "fisher"]])
    digest = hashlib.sha256(described.encode()).hexdigest()[:16]
    assert calibration_digest(mine.settings) != digest

    def mine_again() -> pm.Study:
        return study(pico, tmp_path, calibration=calibration)

    monkeypatch.setattr(
        "paretomerge.study.calibration.calibration_digest", lambda settings: digest
    )
    monkeypatch.setattr(
        "paretomerge.study.identity.calibration_digest", lambda settings: digest
    )
    mine_again().optimize(n_trials=2, held_out=False, show_progress_bar=False)
    assert json.loads((folder / "calibration.json").read_text())["origin"] == digest
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    again = mine_again()
    again.optimize(n_trials=1, held_out=False, show_progress_bar=False)
    assert len(again.get_trials()) == 3
    (tmp_path / "ada.txt").write_text("zzz yyy xxx")
    with pytest.raises(ConfigError, match="made of other text"):
        pm.Study.from_settings(again.settings).check()


def test_settings_go_to_a_file_and_back(pico: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mine = study(pico, tmp_path)
    settings = pm.Study.from_config(
        pm.StudyConfig(
            base=str(pico / "base"),
            models=[str(pico / expert) for expert in EXPERTS],
            objectives=[{"sparsity": True}],
            space={"methods": ["regmean"]},
            calibration=mine.settings.calibration.to_dict(),
        )
    ).settings
    assert settings.calibration == mine.settings.calibration
    assert settings.calibration_folder == settings.out_folder / "calibration"
    digest = calibration_digest(settings)
    assert len(digest) == 16
    # The same text, however the models are written and in whatever order.
    reversed_data = {}
    for model, text in reversed(settings.calibration.data.items()):
        path = Path(os.path.relpath(model_path(settings.root, model), tmp_path))
        reversed_data[f"./{path}"] = text
    calibration = replace(settings.calibration, data=reversed_data)
    other = replace(settings, calibration=calibration)
    assert calibration_digest(other) == digest
    written = study(pico, tmp_path, objectives=[pm.Sparsity()])
    written.to_yaml("study.yaml")
    assert pm.load_study("study.yaml").settings.calibration == settings.calibration
    folder = study(pico, tmp_path, calibration="statistics")
    assert folder.settings.calibration_folder == tmp_path / "statistics"
    for calibration, message in (
        ({"data": {}}, "ada has no text"),
        ({"data": {"eve": "a.txt"}}, "unknown model 'eve'"),
        ({"data": {"eve": 3}}, "calibration.data"),
        ({"data": {}, "size": 3}, "unknown key 'size'"),
        (3, "expected a folder of statistics"),
    ):
        with pytest.raises(ConfigError, match=message):
            study(pico, tmp_path, calibration=calibration)


def test_the_command(pico: Path, tmp_path: Path):
    for expert in ("ada", "bob"):
        (tmp_path / f"{expert}.txt").write_text(TEXTS[expert] * 3)
    command = [sys.executable, "-m", "paretomerge", "calibrate", str(pico / "base")]
    command += [str(pico / "ada"), str(pico / "bob"), "--out", "statistics"]
    texts = ["--data", "ada=ada.txt", "--data", f"{pico}/bob=bob.txt"]
    options = ["--kind", "fisher", "--through-merge", "--alpha", "0.5", "--quiet"]

    def run(*more: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [*command, *more], cwd=tmp_path, capture_output=True, text=True
        )

    done = run(*texts, *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        "statistics is written; a recipe uses it as `calibration: statistics`\n"
    )
    content = json.loads((tmp_path / "statistics" / "calibration.json").read_text())
    assert set(content["sources"][1]["statistics"]) == {"fisher", "regmean_pp"}
    assert content["through_merge"]["alpha"] == 0.5
    refused = run("--data", "eve=ada.txt", "--overwrite")
    assert refused.returncode == 1 and "unknown model 'eve'" in refused.stderr


def test_the_command_that_learns(pico: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for expert in ("ada", "bob"):
        (tmp_path / f"{expert}.txt").write_text(TEXTS[expert] * 3)

    def run(*more: str) -> int:
        command = ["paretomerge", "learn-weights", str(pico / "base")]
        command += [str(pico / "ada"), str(pico / "bob"), "--out", "recipe.yml"]
        command += ["--data", "ada=ada.txt", "--data", "bob=bob.txt", *more]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as left:
            main()
        return int(left.value.code or 0)

    options = ("--steps", "2", "--groups", "2", "--max-tokens", "10")
    assert run(*options) == 0
    assert "step 0: KL" in capsys.readouterr().out
    assert pm.Recipe.load("recipe.yml").merge_method == "task_arithmetic"
    assert run(*options) == 1
    assert "recipe.yml: exists; replace it with --overwrite" in capsys.readouterr().err
    assert run(*options, "--overwrite", "--quiet") == 0
    assert "step" not in capsys.readouterr().out


@pytest.mark.parametrize("measure", [False, True])
def test_a_preview_says_what_is_read_and_leaves_nothing_behind(
    pico: Path, tmp_path: Path, monkeypatch, measure: bool
):
    monkeypatch.chdir(tmp_path)
    mine = study(pico, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    preview = mine.preview(measure=measure)
    assert preview.baselines == 7
    assert sorted(tmp_path.rglob("*")) == before
    said = preview.statistics
    assert said is not None and said.models == len(EXPERTS)
    assert (said.seconds is not None) == measure
    assert said.seconds is None or said.seconds > 0
    mine.optimize(n_trials=1, held_out=False, show_progress_bar=False)
    made = Path(said.folder)
    sizes = [file.stat().st_size for file in made.iterdir()]
    assert said.bytes == pytest.approx(sum(sizes), rel=0.01)
    content = json.loads((made / "calibration.json").read_text())
    # Each text is shorter than eight examples.
    assert said.examples == 24
    assert sum(source["examples"] for source in content["sources"]) < 24
    assert mine.preview(measure=False).statistics is None


def test_the_plan_of_a_study_says_what_is_read(pico: Path, tmp_path: Path):
    (tmp_path / "metric.py").write_text("def one(model, tokenizer):\n    return 1.0\n")
    lines = [f"base: {pico}/base", "objectives: [{function: metric:one}]"]
    lines += [f"models: [{pico}/ada, {pico}/bob]", "space: {methods: [regmean]}"]
    lines += ["calibration:", "  examples: 5", "  data:"]
    for expert in ("ada", "bob"):
        (tmp_path / f"{expert}.txt").write_text(TEXTS[expert])
        lines.append(f"    {pico}/{expert}: {expert}.txt")
    (tmp_path / "study.yaml").write_text("\n".join(lines))
    shown = " ".join(paretomerge("plan", tmp_path / "study.yaml").stdout.split())
    assert re.search(
        r"time \S+ s before the first trial, in which 2 models read up to 10 ex", shown
    )
    assert re.search(r"disk .* KB for statistics in /", shown)
    assert not (tmp_path / "runs").exists()
    guess = paretomerge("plan", tmp_path / "study.yaml", "--no-measure").stdout
    assert "read up to 10 examples in all, which is not estimated" in " ".join(
        guess.split()
    )
