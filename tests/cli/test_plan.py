"""`paretomerge plan` of recipes and studies: what it says, and that it leaves nothing behind."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from paretomerge.cli.plan import is_study_file
from tests.cli.test_cli import TIES, paretomerge, recipe
from tests.study.test_build import write

TASK = """
task: letters
dataset_path: json
test_split: train
dataset_kwargs: {data_files: data.jsonl}
output_type: generate_until
doc_to_text: '{{q}}'
doc_to_target: '{{a}}'
generation_kwargs: {until: ['.'], max_gen_toks: 2}
metric_list: [{metric: exact_match}]
"""


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def study(tmp_path: Path, pico: Path) -> Path:
    """A study with a task of ten examples and a function."""
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "letters.yaml").write_text(TASK)
    lines = [json.dumps({"q": "a" * n, "a": "b"}) for n in range(1, 11)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    return write(
        tmp_path,
        pico,
        objectives=[{"task": "letters", "search_items": 3}, {"function": "mine:score"}],
        evaluate={"include_path": "tasks", "cache": "scores.db"},
        space={"methods": ["ties"], "order": "kinship"},
        trials=7,
    )


def test_a_study_is_measured_and_nothing_is_left(study: Path) -> None:
    before = files_in(study.parent)
    shown = " ".join(paretomerge("plan", study).stdout.split())
    assert "letters (maximize): 3 search and 7 held-out examples" in shown
    assert "trials" in shown and "7, of which" in shown
    assert "for one trial (merge" in shown and "for the trials that are left" in shown
    assert (
        "rests on one merge" in shown and "without the time that the sampler" in shown
    )
    assert files_in(study.parent) == before
    plan = json.loads(paretomerge("plan", study, "--json").stdout)
    names = [model["name"] for model in plan["models"]]
    assert names[0] == "base" and sorted(names[1:]) == ["ada", "bob"]
    assert plan["models"][0]["parameters"] * 2 == plan["models"][0]["bytes"]
    assert plan["scores"][0]["search_examples"] == 3
    assert plan["times"]["trial"] > 0 and plan["checkpoint_bytes"] > 10_000
    assert plan["times"]["search"] == pytest.approx(7 * plan["times"]["trial"])
    assert plan["memory"]["workers"] == 1 and plan["memory"]["sources"] == "mmap"
    assert plan["memory"]["host"] > plan["memory"]["live"] > 10_000
    (alone,) = plan["forecasts"]
    assert alone["wall"] > plan["times"]["search"]
    assert files_in(study.parent) == before


def test_without_a_measurement_and_with_a_record(study: Path) -> None:
    shown = paretomerge("plan", study, "--no-measure").stdout
    assert "not estimated: no merge was made to measure it" in shown
    paretomerge("search", study, "--trials", "5", "--quiet")
    plan = json.loads(paretomerge("plan", study, "--json", "--no-measure").stdout)
    assert plan["done"] == 5
    assert plan["times"]["basis"] == "the median time of 5 trials in the record"
    assert plan["times"]["search"] == pytest.approx(2 * plan["times"]["trial"])
    lines = paretomerge("plan", study, "--workers", "4").stdout
    shown = " ".join(lines.split())
    assert "with 4 workers, beside" in shown and "of mapped files" in shown
    assert "with 4 workers, which wait" in shown and re.search(
        r"can keep \d+ workers? busy", shown
    )
    changed = paretomerge("plan", study, "--set", "seed=4", ok=False)
    assert "seed changed since (seed: 0, now 4)" in changed.stderr


def test_every_problem_of_a_study_at_once(
    tmp_path: Path, pico: Path, study: Path
) -> None:
    content = yaml.safe_load(study.read_text())
    objectives: list[dict[str, Any]] = [
        {"task": "leters"},
        {"function": "mine:nothing"},
        {"perplexity": "none.txt"},
        {"sizee": "layers"},
    ]
    content |= {
        "models": [str(pico / "ada"), "nowhere/at/all"],
        "objectives": objectives,
        "dtype": "int8",
        "device": "cuda:99",
        "space": {"methods": ["ties"], "importance": 3},
    }
    study.write_text(yaml.safe_dump(content))
    before = files_in(tmp_path)
    failed = paretomerge("plan", study, ok=False)
    assert failed.returncode == 1 and "Traceback" not in failed.stderr
    for message in (
        "dtype: unknown dtype 'int8'",
        "space.importance: expected a boolean, got 3",
        "objectives.3: unknown key 'sizee'; did you mean 'size'",
        "nowhere/at/all",
        "device: expected",
        "leters: unknown task 'leters'; did you mean 'letters'",
        "mine:nothing",
        "perplexity: ",
    ):
        assert message in failed.stderr, message
    assert files_in(tmp_path) == before


@pytest.mark.parametrize("command", ["plan", "search"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("out=mine.py", "out: mine.py cannot be a folder"),
        ("out=/proc/no/folder", "out: /proc/no/folder: cannot write in /proc"),
        ("device=cuda:99", "device: expected cpu, cuda or cuda:N"),
        ("space.order=kinshp", "unknown order 'kinshp'; did you mean 'kinship'"),
        ("objectives.x=1", "the file has no keys there"),
        ("trials=0", "trials: expected a number greater"),
    ],
)
def test_one_sentence_and_nothing_is_left(
    tmp_path: Path, pico: Path, command: str, change: str, message: str
) -> None:
    file = write(tmp_path, pico)
    before = files_in(tmp_path)
    failed = paretomerge(command, file, "--set", change, ok=False)
    assert failed.returncode == 1 and message in failed.stderr
    assert "Traceback" not in failed.stderr
    after = [name for name in files_in(tmp_path) if "__pycache__" not in name]
    assert after == before


def test_a_function_without_a_score_is_named(tmp_path: Path, pico: Path) -> None:
    file = write(tmp_path, pico)
    source = "def score(model, tokenizer):\n    return float('nan')\n"
    (tmp_path / "mine.py").write_text(source + source.replace("score", "other"))
    failed = paretomerge("plan", file, ok=False)
    assert "score: the scoring function mine:score returned nan" in failed.stderr
    assert "was made to measure the time" in failed.stderr


def test_a_wrong_dtype_of_a_recipe_hides_nothing(tmp_path: Path, pico: Path) -> None:
    text = TIES.replace("PICO/bob", "PICO/eve").replace("weight: 0.5", "densty: 1")
    failed = paretomerge(
        "plan", recipe(pico, tmp_path, text + "dtype: int8\n"), ok=False
    )
    for message in ("unknown dtype 'int8'", "eve", "did you mean 'density'"):
        assert message in failed.stderr


@pytest.mark.parametrize(
    ("text", "is_study"),
    [
        ("base: a\nobjectives: []\n", True),
        ("merge_method: ties\nmodels: []\n", False),
        ("models: []\n", False),
        ("", False),
        ("a: [", False),
        ("- 1\n", False),
    ],
)
def test_which_file_it_is(tmp_path: Path, text: str, is_study: bool) -> None:
    (tmp_path / "file.yml").write_text(text)
    assert is_study_file(tmp_path / "file.yml") == is_study
    # The name decides where the content does not.
    (tmp_path / "study.yaml").write_text(text)
    assert is_study_file(tmp_path / "study.yaml") == (is_study or "models" not in text)
    assert is_study_file(tmp_path)


def test_empty_and_missing_files(tmp_path: Path) -> None:
    for name, message in (
        ("study.yaml", "the file is empty; write a study"),
        ("recipe.yml", "the recipe is empty; write `merge_method`"),
    ):
        (tmp_path / name).write_text("")
        assert message in paretomerge("plan", tmp_path / name, ok=False).stderr
    missing = paretomerge("plan", tmp_path / "none.yml", ok=False)
    assert "none.yml: no such file" in missing.stderr
    refused = paretomerge("plan", tmp_path / "recipe.yml", "--no-measure", ok=False)
    assert "are for studies, not recipes" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["init", "b", "m", "n", "--file", "/proc/x.yaml"], "name another file with"),
        (
            ["init", "b", "m", "n", "--file", "new.yaml", "--device", "gpu"],
            "expected cpu",
        ),
        (["compare", "a", "b", "--study", "study.yaml"], "no trial has finished"),
        (["report", "study.yaml", "--out", "/proc/x.html"], "no record here yet"),
        (["status", "study.yaml"], "no record here yet"),
        (["status", "folder"], "is a folder without a study.yaml"),
        (
            ["search", "study.yaml", "--set", "evaluate.cache=/proc/no/x.db"],
            "Set another `evaluate.cache`",
        ),
        (
            ["search", "study.yaml", "--set", "storage=sqlite:////proc/no/x.db"],
            "Set another `storage`",
        ),
    ],
)
def test_other_commands_leave_nothing(
    tmp_path: Path, pico: Path, arguments: list[str], message: str
) -> None:
    write(tmp_path, pico)
    (tmp_path / "folder").mkdir()
    before = files_in(tmp_path)
    failed = paretomerge(*arguments, cwd=tmp_path, ok=False)
    assert failed.returncode == 1 and message in failed.stderr
    after = [name for name in files_in(tmp_path) if "__pycache__" not in name]
    assert after == before


def test_a_report_that_cannot_be_written(tmp_path: Path, pico: Path) -> None:
    file = write(tmp_path, pico)
    paretomerge("search", file, "--trials", "2", "--quiet")
    failed = paretomerge("report", file, "--out", "/proc/x.html", ok=False)
    assert "/proc/x.html: the report cannot be written" in failed.stderr


def test_a_study_that_is_merged_is_one_sentence(study: Path) -> None:
    before = files_in(study.parent)
    done = paretomerge("merge", study, study.parent / "out", ok=False)
    assert done.stderr.count("\n") == 1
    assert (
        f"a study, and not a recipe; search it with `paretomerge search {study}`"
        in (done.stderr)
    )
    assert files_in(study.parent) == before
