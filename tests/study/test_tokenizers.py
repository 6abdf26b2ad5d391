"""Studies over models with vocabularies of their own, and models that do not belong together."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from paretomerge.errors import ParetoMergeError
from paretomerge.study.study import Study, load_study
from tests.merging.test_vocabulary_merge import build
from tests.studies import open_search

QUIET = {"show_progress_bar": False, "held_out": False}
FUNCTIONS = """
def rows(model, tokenizer):
    return model.get_input_embeddings().weight.shape[0]

def mass(model, tokenizer):
    import torch
    with torch.no_grad():
        logits = model(torch.tensor([[1, 2, 3]])).logits
    return logits.abs().sum().item()

def tokens(model, tokenizer):
    return len(tokenizer)

def template(model, tokenizer):
    return len(tokenizer.chat_template or "")
"""


def write_study(folder: Path, pool: Path, **changes: Any) -> Path:
    (folder / "mine.py").write_text(FUNCTIONS)
    names = ("rows", "mass", "tokens", "template")
    objectives: list[dict[str, Any]] = [{"function": f"mine:{name}"} for name in names]
    study = {
        "base": str(pool / "base"),
        "models": [str(pool / "ada"), str(pool / "bob")],
        "objectives": [*objectives, {"sparsity": True}],
        "sampler": "random",
        "space": {"methods": ["task_arithmetic"], "groups": 2},
        **changes,
    }
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(study))
    return file


def saved(study: Study, folder: Path) -> Path:
    return study.save(study.get_trials()[-1], folder)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("source", "rows"), [("base", 8), ("union", 11), ("./ada", 10)]
)
def test_a_trial_scores_what_its_checkpoint_scores(
    tmp_path: Path, source: str, rows: int, tied: bool
) -> None:
    build(tmp_path, tied)
    file = write_study(tmp_path, tmp_path, models=["./ada", "./bob"])
    with pytest.raises(ParetoMergeError, match="tokenizer_source"):
        load_study(file).check()
    assert not (tmp_path / "runs").exists()

    file = write_study(
        tmp_path,
        tmp_path,
        models=["./ada", "./bob"],
        tokenizer_source=source,
        chat_template="chatml",
    )
    study = load_study(file)
    study.optimize(n_trials=5, **QUIET)
    trial = study.get_trials()[-1]
    assert not trial.failure and trial.scores["rows"].value == rows
    assert trial.scores["template"].value > 100
    out = saved(study, tmp_path / "out")
    assert load_study(file).evaluate(out) == pytest.approx(trial.scores)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.vocab_size == rows
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert len(tokenizer) == trial.scores["tokens"].value
    assert "im_start" in tokenizer.chat_template
    if tied:
        return
    ada, bob = study.get_trials()[:2]
    assert min(ada.scores["sparsity"].value, bob.scores["sparsity"].value) == -1


def test_two_more_tokens_and_a_measured_space(tmp_path: Path, pico: Path) -> None:
    """The embedding is left out where deltas are compared."""
    for name in ("base", "ada", "bob"):
        shutil.copytree(pico / name, tmp_path / name)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ada")
    model.resize_token_embeddings(34, mean_resizing=False)
    model.save_pretrained(tmp_path / "ada")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ada")
    tokenizer.add_tokens(["<one>", "<two>"])
    tokenizer.save_pretrained(tmp_path / "ada")
    space = {"methods": ["ties"], "order": "kinship", "groups": 2}
    file = write_study(tmp_path, tmp_path, space=space)
    with pytest.raises(ParetoMergeError, match="expected one shape"):
        load_study(file).check()
    file = write_study(tmp_path, tmp_path, space=space, tokenizer_source="base")
    study = load_study(file)
    study.optimize(n_trials=4, **QUIET)
    assert not any(trial.failure for trial in study.get_trials())
    assert study.get_trials()[-1].scores["rows"].value == 32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer_source": "bsae"}, "tokenizer_source: .*did you mean 'base'"),
        (
            {"tokenizer_source": "base", "space": {"routes": {}}},
            "tokenizer_source: routes .`space.routes`. keep",
        ),
        (
            {"tokenizer_source": "base", "then": {}},
            "tokenizer_source: routes .`then`. keep",
        ),
        (
            {
                "tokenizer_source": "base",
                "space": {"methods": ["ties", "sce"], "method_groups": 2},
            },
            "tokenizer_source: does not work with several `space.method_groups`",
        ),
        ({"chat_template": "chatlm"}, "chat_template: .*did you mean 'chatml'"),
    ],
)
def test_what_does_not_work_is_said_before_a_trial(
    tmp_path: Path, pico: Path, changes: dict[str, Any], message: str
) -> None:
    functions = [{"function": "mine:rows"}, {"function": "mine:mass"}]
    file = write_study(tmp_path, pico, **{"objectives": functions, **changes})
    with pytest.raises(ParetoMergeError, match=message):
        load_study(file).check()
    assert not (tmp_path / "runs").exists()


def test_a_chat_template_along_routes(tmp_path: Path, pico: Path) -> None:
    file = write_study(
        tmp_path,
        pico,
        objectives=[{"function": "mine:template"}, {"size": "layers"}],
        space={"routes": {"blocks": 2}},
        chat_template="chatml",
    )
    study = load_study(file)
    study.optimize(n_trials=3, **QUIET)
    trial = study.get_trials()[-1]
    assert trial.scores["template"].value > 100
    tokenizer = AutoTokenizer.from_pretrained(saved(study, tmp_path / "out"))
    assert len(tokenizer.chat_template) == trial.scores["template"].value


def write_letters(folder: Path) -> None:
    """A task of the harness, in `folder/tasks`."""
    tasks = folder / "tasks"
    tasks.mkdir()
    lines = [json.dumps({"q": "a" * n, "a": "b"}) for n in range(1, 9)]
    (tasks / "data.jsonl").write_text("\n".join(lines))
    (tasks / "letters.yaml").write_text(
        "task: letters\ndataset_path: json\ntest_split: train\n"
        f"dataset_kwargs: {{data_files: {tasks / 'data.jsonl'}}}\n"
        "output_type: generate_until\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{a}}'\n"
        "generation_kwargs: {until: ['.'], max_gen_toks: 2}\n"
        "metric_list: [{metric: exact_match}]\n"
    )


@pytest.mark.parametrize("of_task", [False, True])
def test_the_template_of_the_study_writes_the_prompts(
    tmp_path: Path, pico: Path, of_task: bool
) -> None:
    write_letters(tmp_path)
    chat = {"apply_chat_template": True}
    letters = {"task": "letters", **(chat if of_task else {})}
    file = write_study(
        tmp_path,
        pico,
        objectives=[letters, {"function": "mine:rows"}],
        evaluate={"include_path": "tasks", **({} if of_task else chat)},
    )
    with pytest.raises(ParetoMergeError, match="has no chat template"):
        load_study(file).check()
    file.write_text(file.read_text() + "chat_template: chatml\n")
    search = open_search(file)
    (harness, _) = search.goals.evaluator.evaluators
    first = harness.examples("search")["letters"].requests[0][0]
    assert first.args[0].startswith("<|im_start|>user\na")


def test_what_is_watched_may_change(tmp_path: Path, pico: Path) -> None:
    """Scores of a watched task with other settings are not mistaken for those of now."""
    write_letters(tmp_path)
    short = {"task": "letters", "metric": "output_length", "name": "length"}

    def watched(*watch: object) -> dict[str, float]:
        file = write_study(
            tmp_path,
            pico,
            objectives=[{"function": "mine:rows"}, {"function": "mine:mass"}],
            evaluate={"include_path": "tasks"},
            trials=3,
            watch=list(watch),
        )
        study = load_study(file)
        study.optimize(show_progress_bar=False)
        scores = study.get_trials()[0].held_out
        assert scores is not None
        names = ("letters", "length")
        return {name: scores[name].value for name in names if name in scores}

    first = watched(short)
    assert watched(short) == first
    longer = watched({**short, "gen_kwargs": {"max_gen_toks": 1}})
    assert longer["length"] < first["length"]
    assert set(watched("letters", short)) == {"letters", "length"}
    assert set(watched("letters")) == {"letters"}


def test_a_mismatch_is_allowed_once_for_the_whole_study(
    tmp_path: Path, pico: Path
) -> None:
    for name in ("base", "ada", "bob"):
        shutil.copytree(pico / name, tmp_path / name)
    config = json.loads((tmp_path / "bob" / "config.json").read_text())
    config["num_attention_heads"] = 4
    config["head_dim"] = 8
    (tmp_path / "bob" / "config.json").write_text(json.dumps(config))
    file = write_study(tmp_path, tmp_path)
    with pytest.raises(ParetoMergeError, match="--allow-mismatch takes them anyway"):
        load_study(file).check()
    assert not (tmp_path / "runs").exists()
    study = load_study(file, ["allow_mismatch=true"])
    notes = study.check()
    assert any("num_attention_heads is 4" in note for note in notes)
    study.optimize(n_trials=3, **QUIET)
    # Without the flag: the record has it.
    resumed = load_study(file)
    resumed.optimize(n_trials=1, **QUIET)
    trials = resumed.get_trials()
    assert len(trials) == 4 and not any(trial.failure for trial in trials)
    assert (saved(load_study(file), tmp_path / "out") / "config.json").is_file()


def test_a_study_with_another_tokenizer_is_another_study(
    tmp_path: Path, pico: Path
) -> None:
    load_study(write_study(tmp_path, pico)).optimize(n_trials=2, **QUIET)
    file = write_study(tmp_path, pico, chat_template="chatml")
    with pytest.raises(ParetoMergeError, match="chat_template"):
        load_study(file).check()
