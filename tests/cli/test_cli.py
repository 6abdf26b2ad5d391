"""The whole way on the specialists, as a user walks it."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import yaml

from paretomerge.cli.main import main
from paretomerge.errors import ParetoMergeError
from tests.study.test_build import write

ENVIRONMENT = os.environ | {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "COLUMNS": "160",
}

N_HELD_OUT = 120


def process(
    *arguments: object, cwd: Path | None = None, ok: bool = True
) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "paretomerge", *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=ENVIRONMENT, cwd=cwd, check=False
    )
    if ok:
        assert done.returncode == 0, done.stderr
    return done


def paretomerge(
    *arguments: object, cwd: Path | None = None, ok: bool = True
) -> subprocess.CompletedProcess[str]:
    """The command in this process, which has imported the libraries already."""
    command = ["paretomerge", *map(str, arguments)]
    out, errors = io.StringIO(), io.StringIO()
    code = 0
    with (
        mock.patch.object(sys, "argv", command),
        mock.patch.dict(os.environ, COLUMNS="160"),
        contextlib.chdir(cwd or Path.cwd()),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(errors),
    ):
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
    done = subprocess.CompletedProcess(command, code, out.getvalue(), errors.getvalue())
    if ok:
        assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def small(specialists, tmp_path_factory) -> Path:
    """The shipped study with few trials and few items, in a folder of its own; already searched."""
    folder = tmp_path_factory.mktemp("small")
    study = yaml.safe_load((specialists / "study.yaml").read_text())
    study["base"] = str(specialists / "models" / "base")
    study["models"] = [
        str(specialists / "models" / m) for m in ("order", "mirror", "scribe")
    ]
    shutil.copytree(specialists / "tasks", folder / "tasks")
    for file in folder.glob("tasks/data/*/held_out.jsonl"):
        lines = file.read_text().splitlines(keepends=True)
        file.write_text("".join(lines[:N_HELD_OUT]))
    study["evaluate"] |= {
        "include_path": str(folder / "tasks"),
        "data_root": str(folder),
        "search_items": 30,
    }
    study["watch"] = ["copy"]
    study["trials"] = 11
    (folder / "study.yaml").write_text(yaml.safe_dump(study))
    process("search", folder / "study.yaml")
    return folder / "study.yaml"


@pytest.mark.slow
def test_search_status_front(small):
    assert "11 of 11 trials, 0 failed" in process("status", small).stdout
    again = paretomerge("search", small).stdout
    assert "Pareto front" in again and "/11" not in again  # nothing is left to do
    told = json.loads(paretomerge("front", small, "--json").stdout)
    assert told["objectives"] == ["sort", "reverse", "translate"]
    assert all(
        row["held_out"]["sort"]["n"] == N_HELD_OUT and row["search"]["sort"]["n"] == 30
        for row in told["front"]
    )


@pytest.mark.slow
def test_compare(small):
    (found,) = json.loads(
        paretomerge(
            "compare",
            "scribe",
            "mirror",
            "--study",
            small,
            "--task",
            "reverse",
            "--json",
        ).stdout
    )
    assert (
        found["n"] == N_HELD_OUT
        and found["difference"] < -0.3
        and found["p"] < 1e-4
        and found["only_other"] > found["only_one"]
    )
    shown = paretomerge("compare", "scribe", "mirror", "--study", small).stdout
    assert (
        "scribe − mirror" in shown
        and "right alone" in shown
        and len(shown.splitlines()) == 6
    )  # watched tasks too
    wrong = paretomerge("compare", "scribe", "miror", "--study", small, ok=False)
    assert wrong.returncode == 1 and "or one of: order, mirror, scribe" in wrong.stderr


@pytest.mark.slow
def test_the_picked_checkpoint_scores_what_the_study_recorded_to_the_last_item(
    small, tmp_path
):
    """Also under lm-eval's own command line, in another process, on the held-out items."""
    from tests.studies import open_search

    process(
        "pick",
        small,
        "--prefer",
        "reverse=0.6,translate=0.4",
        "--out",
        tmp_path / "out",
    )
    card = (tmp_path / "out" / "README.md").read_text()
    number = int(card.split("Trial ")[1].split()[0])
    (trial,) = [t for t in open_search(small).trials() if t.number == number]
    for split, recorded in (("search", trial.scores), ("held_out", trial.held_out)):
        told = json.loads(
            paretomerge(
                "evaluate",
                tmp_path / "out",
                "--study",
                small,
                "--split",
                split,
                "--json",
            ).stdout
        )
        assert set(told) == set(recorded)
        for name, score in recorded.items():
            assert (
                tuple(told[name]["items"]) == score.example_scores
                and told[name]["value"] == score.value
            )
    assert (
        paretomerge(
            "pick", small, "--knee", "--out", tmp_path / "out", ok=False
        ).returncode
        == 1
    )
    command = [
        sys.executable,
        "-m",
        "lm_eval",
        "--model",
        "hf",
        "--model_args",
        f"pretrained={tmp_path}/out",
        "--tasks",
        "reverse",
    ]
    config = yaml.safe_load(small.read_text())["evaluate"]
    command += [
        "--include_path",
        config["include_path"],
        "--batch_size",
        "128",
        "--device",
        "cpu",
        "--output_path",
        str(tmp_path / "lm"),
    ]
    subprocess.run(
        command,
        cwd=small.parent,
        env=ENVIRONMENT,
        check=True,
        capture_output=True,
    )
    (file,) = (tmp_path / "lm").rglob("results_*.json")
    assert (
        json.loads(file.read_text())["results"]["reverse"]["acc,none"]
        == trial.held_out["reverse"].value
    )


@pytest.mark.slow
def test_report_is_one_file(small, tmp_path):
    paretomerge("report", small, "--out", tmp_path / "r.html", "--trial", "3")
    page = (tmp_path / "r.html").read_text()
    assert (
        "<script src" not in page and "uniform soup" in page and "merge_method" in page
    )


@pytest.mark.slow
def test_ctrl_c_stops_with_one_line_and_keeps_what_is_done(small, tmp_path):
    study = yaml.safe_load(small.read_text()) | {"trials": 500}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    command = [
        sys.executable,
        "-u",
        "-m",
        "paretomerge",
        "search",
        str(tmp_path / "study.yaml"),
    ]
    hears = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731  a job in the background is started deaf to it
    search = subprocess.Popen(
        command,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hears,
    )
    assert search.stdout is not None
    for line in search.stdout:
        if "2/500" in line:
            break
    time.sleep(0.2)
    search.send_signal(signal.SIGINT)
    _, errors = search.communicate(timeout=60)
    assert (
        search.returncode == 130
        and "the same command continues the search" in errors
        and "Traceback" not in errors
    )
    assert (
        " of 500 trials, 0 failed"
        in paretomerge("status", tmp_path / "study.yaml").stdout
    )


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["search", "nowhere.yaml"], "no such file"),
        (["merge", "nowhere.yml", "out"], "no such file; name a recipe"),
        (["merge", "bad.yml", "out"], "did you mean 'ties'"),
        (["merge", "missing.yml", "out"], "there is no such folder"),
        (["status", "typo.yaml"], "did you mean 'models'"),
    ],
)
def test_errors_are_one_message_without_a_traceback(tmp_path, arguments, told):
    (tmp_path / "bad.yml").write_text("merge_method: tiess\nmodels: [{model: ./a}]")
    (tmp_path / "missing.yml").write_text(
        "merge_method: linear\nmodels: [{model: ./a, parameters: {weight: 1}}]"
    )
    (tmp_path / "typo.yaml").write_text(
        "base: x\nmodles: []\nobjectives: [{sparsity: true}]"
    )
    done = paretomerge(*arguments, cwd=tmp_path, ok=False)
    assert (
        done.returncode == 1 and told in done.stderr and "Traceback" not in done.stderr
    )
    assert not (tmp_path / "out").exists()
    with pytest.raises(ParetoMergeError):
        paretomerge("--debug", *arguments, cwd=tmp_path)


def test_merge_writes_a_checkpoint(pico, tmp_path):
    text = (
        f"merge_method: linear\nmodels: [{{model: {pico}/ada}}, "
        f"{{model: {pico}/bob}}]\nparameters: {{weight: 1}}"
    )
    (tmp_path / "r.yml").write_text(text)
    process("merge", "r.yml", "out", cwd=tmp_path)
    assert (tmp_path / "out" / "model.safetensors").is_file()
    again = paretomerge("merge", "r.yml", "out", cwd=tmp_path, ok=False)
    assert again.returncode == 1 and "--overwrite" in again.stderr
    paretomerge("merge", "r.yml", "out", "--overwrite", cwd=tmp_path)


def test_pick_refuses_an_existing_folder_before_it_scores_held_out_items(
    pico, tmp_path
):
    from paretomerge.cli.main import pick
    from paretomerge.errors import CheckpointError
    from tests.studies import open_search

    study = open_search(write(tmp_path, pico))
    study.run(1)
    with pytest.raises(CheckpointError, match="--overwrite"):
        pick(tmp_path / "study.yaml", tmp_path, trial=0)
    assert study.trials()[0].held_out is None
    pick(tmp_path / "study.yaml", trial=0)  # shows it and writes nothing
    assert study.trials()[0].held_out is None
    pick(tmp_path / "study.yaml", tmp_path / "out", trial=0)
    assert study.trials()[0].held_out and (tmp_path / "out" / "config.json").is_file()


def test_what_a_trial_says_of_its_failure_is_printed_as_it_is(pico, tmp_path):
    file = write(tmp_path, pico)
    (tmp_path / "mine.py").write_text(
        "def other(model, tokenizer): return 1\ndef score(model, tokenizer): raise "
        "ValueError('[/a/b] [enforce fail] :key:')\n"
    )
    assert (
        "[/a/b] [enforce fail] :key:"
        in paretomerge("search", file, "--trials", "1", ok=False).stdout
    )
    assert "[/a/b] [enforce fail] :key:" in paretomerge("status", file).stdout


FAILING = """
def bad(model, tokenizer):
    return reciprocal(0)

def reciprocal(x):
    return 1 / x
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_debug_shows_where_a_users_function_failed(pico, tmp_path, workers):
    (tmp_path / "failing_metric.py").write_text(FAILING)
    (tmp_path / "study.yaml").write_text(
        f"base: {pico}/base\nmodels: [{pico}/ada, {pico}/bob]\nspace: {{methods: [ties]}}\n"
        "objectives: [{function: failing_metric:bad}, {sparsity: true}]\n"
        f"trials: 2\nworkers: {workers}\n"
    )
    done = process(
        *("--debug", "search", "study.yaml", "--quiet"), cwd=tmp_path, ok=False
    )
    assert "in reciprocal\n    return 1 / x" in done.stderr
    assert "all 2 trials failed" in done.stderr
    # Without the option, its message alone.
    status = paretomerge("status", "study.yaml", cwd=tmp_path)
    assert "ZeroDivisionError" in status.stdout
    assert "reciprocal" not in status.stdout


def test_help_names_every_command():
    told = paretomerge("--help").stdout
    assert all(
        c in told
        for c in (
            "quickstart",
            "search",
            "status",
            "front",
            "pick",
            "merge",
            "evaluate",
            "report",
        )
    )


def recipe(pico: Path, folder: Path, text: str) -> Path:
    (folder / "recipe.yml").write_text(text.replace("PICO", str(pico)))
    return folder / "recipe.yml"


TIES = (
    "merge_method: ties\nbase_model: PICO/base\nmodels: [{model: PICO/ada}, {model: "
    "PICO/bob}]\nparameters: {weight: 0.5, gamma: 0.1}\n"
)


def test_plan_tells_what_a_merge_needs_and_merge_does_it(pico, tmp_path):
    file = recipe(pico, tmp_path, TIES)
    told = paretomerge("plan", file)
    assert (
        "39 tensors, 4 layers, bfloat16" in told.stdout and "on one core" in told.stdout
    )
    assert "note: parameters: `gamma` means nothing to ties" in told.stderr
    plan = json.loads(paretomerge("plan", file, "--json").stdout)
    merged = paretomerge(
        "merge", file, "out", "--shard-size", "20KB", "--workers", "2", cwd=tmp_path
    )
    assert "wrote out" in merged.stdout and "note:" in merged.stderr
    sizes = [f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors")]
    assert len(sizes) > 1 and plan["written"] < sum(sizes) < plan["written"] + 10_000


def test_plan_tells_every_error_at_once_and_merge_leaves_nothing(pico, tmp_path):
    file = recipe(
        pico,
        tmp_path,
        TIES.replace("PICO/bob", "PICO/eve").replace(
            "weight: 0.5", "weight: 0.5, densty: 1"
        ),
    )
    for arguments in (("plan", file), ("merge", file, tmp_path / "out")):
        failed = paretomerge(*arguments, ok=False)
        assert (
            failed.returncode == 1
            and "2 problems" in failed.stderr
            and "Traceback" not in failed.stderr
        )
        assert "eve" in failed.stderr and "did you mean 'density'" in failed.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.yml"]
    assert (
        "a size such as 5GB"
        in paretomerge("merge", file, "out", "--shard-size", "big", ok=False).stderr
    )


def test_methods_is_the_table_of_the_documentation():
    from paretomerge.report.recipes import methods_markdown

    assert (
        methods_markdown()
        in (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
    )
    told = {
        row["name"]: row for row in json.loads(paretomerge("methods", "--json").stdout)
    }
    assert told["ties"]["parameters"]["density"] == 1.0 and len(told) == 30
    assert "elect signs" in paretomerge("methods").stdout


def test_answers_that_need_no_torch_do_not_import_it(pico, tmp_path):
    """Start-up under half a second (benchmarks/merge.py measures it) rests on this."""
    file = recipe(pico, tmp_path, TIES)
    run = "import sys\nfrom paretomerge.cli.main import app\ntry: app()\nexcept SystemExit: pass\n"
    code = run + "assert not {'torch', 'transformers'} & set(sys.modules)"
    for arguments in (["--help"], ["methods"], ["plan", str(file)]):
        subprocess.run(
            [sys.executable, "-c", code, *arguments],
            check=True,
            capture_output=True,
            env=ENVIRONMENT,
        )


def test_init_writes_a_study_file_that_can_be_read(pico, tmp_path):
    import paretomerge as pm

    (tmp_path / "models").symlink_to(pico)
    done = paretomerge(
        "init",
        "models/base",
        "models/ada",
        "models/bob",
        "org/third",
        "--task",
        "gsm8k",
        "--device",
        "cpu",
        cwd=tmp_path,
    )
    assert "; next: paretomerge search study.yaml" in done.stdout
    assert "your own tasks" not in (tmp_path / "study.yaml").read_text()
    settings = pm.load_study(tmp_path / "study.yaml").settings
    assert settings.models == ("./models/ada", "./models/bob", "org/third")
    assert [measure.name for measure in settings.objectives] == ["gsm8k"]
    # The commented part is a study, too.
    text = (tmp_path / "study.yaml").read_text()
    start = text.index("# calibration:")
    end = text.index("\n\n", start)
    calibration = text[start:end].replace("\n# ", "\n").removeprefix("# ")
    text = text[:start] + calibration + text[end:]
    text = text.replace("methods: [task_arithmetic, ties]", "methods: [regmean]")
    (tmp_path / "other.yaml").write_text(text)
    settings = pm.load_study(tmp_path / "other.yaml").settings
    assert settings.calibration.data["./models/ada"] == {"task": "gsm8k"}
    assert settings.calibration.data.keys() == set(settings.models)
    # Paths start from the file's folder, those of adapters, too. Without tasks there are examples.
    (tmp_path / "lora").mkdir()
    (tmp_path / "c+c").mkdir()
    models = ("models/ada+lora", "models/bob", "org/third+org/lora", "c+c")
    file = tmp_path / "deep" / "study.yaml"
    done = paretomerge("init", "models/base", *models, "--file", file, cwd=tmp_path)
    assert "put your own tasks in place of arc_easy and piqa in" in done.stdout
    assert "put your own tasks here" in file.read_text()
    settings = pm.load_study(file).settings
    adapter, hub = "../models/ada+../lora", "org/third+org/lora"
    assert settings.models == (adapter, "../models/bob", hub, "../c+c")
    again = paretomerge("init", "b", "m", "n", cwd=tmp_path, ok=False)
    assert again.returncode == 1 and "exists" in again.stderr
    alone = paretomerge("init", "b", "m", "--file", "x.yaml", cwd=tmp_path, ok=False)
    assert "two or more" in alone.stderr and not (tmp_path / "x.yaml").exists()


def test_the_schema_is_that_of_a_study_file():
    schema = json.loads(paretomerge("schema").stdout)
    assert {"base", "models", "objectives", "space"} <= set(schema["properties"])


def test_version_and_short_help():
    assert paretomerge("--version").stdout.startswith("paretomerge ")
    for command in ("search", "pick", "init"):
        assert "Usage" in paretomerge(command, "-h").stdout


def test_search_as_json_prints_nothing_else(pico, tmp_path):
    file = write(tmp_path, pico)
    front = json.loads(paretomerge("search", file, "--trials", "3", "--json").stdout)
    assert front["front"] and front["front"][0]["held_out"]
    resumed = paretomerge("search", file, "--trials", "4").stdout
    assert "Resuming at trial 3." in resumed


def test_exit_statuses(tmp_path, monkeypatch):
    """As docs/search.md lists them; those of a search that is stopped are tested above."""
    (tmp_path / "bad.yaml").write_text("base: x\nmodles: []")
    assert paretomerge("methods").returncode == 0
    assert paretomerge("status", tmp_path / "bad.yaml", ok=False).returncode == 1
    for wrong in (["no-such-command"], ["methods", "--no-such"], ["merge"]):
        assert paretomerge(*wrong, ok=False).returncode == 2
    assert paretomerge("search", "x.yaml", "--trials", "two", ok=False).returncode == 2

    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("paretomerge.report.recipes.methods_table", interrupted)
    done = paretomerge("methods", ok=False)
    assert done.returncode == 130 and done.stderr == "\nStopped.\n"
