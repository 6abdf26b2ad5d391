"""Twin-Merging folders under a study's tasks and under lm-evaluation-harness."""

import json
import shutil

import pytest
import yaml

from paretomerge.errors import ConfigError, EvaluationError
from paretomerge.study.study import load_study
from paretomerge.systems.twin import (
    TwinModel,
    build_twin,
    language_model,
    score_twin,
    study_prompts,
)
from tests.cli.test_cli import paretomerge

OWN = {"order": ["sort"], "mirror": ["reverse"], "scribe": ["translate"]}
N_SEARCH, N_HELD_OUT = 40, 25


@pytest.fixture(scope="module")
def study(specialists, tmp_path_factory):
    """The shipped study with few examples."""
    folder = tmp_path_factory.mktemp("study")
    config = yaml.safe_load((specialists / "study.yaml").read_text())
    config["base"] = str(specialists / "models" / "base")
    config["models"] = [str(specialists / "models" / name) for name in OWN]
    del config["watch"]
    shutil.copytree(specialists / "tasks", folder / "tasks")
    for split, n in (("search", N_SEARCH), ("held_out", N_HELD_OUT)):
        for file in folder.glob(f"tasks/data/*/{split}.jsonl"):
            lines = file.read_text().splitlines(keepends=True)
            file.write_text("".join(lines[:n]))
    (folder / "study.yaml").write_text(yaml.safe_dump(config))
    return folder / "study.yaml"


@pytest.fixture(scope="module")
def folder(study, specialists, tmp_path_factory):
    models = specialists / "models"
    prompts = study_prompts(load_study(study), OWN)
    return build_twin(
        str(models / "base"),
        [str(models / name) for name in OWN],
        prompts,
        tmp_path_factory.mktemp("twin") / "twin",
        dtype="float32",
    )


def lines_of(study, task, split):
    file = study.parent / "tasks" / "data" / task / f"{split}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_prompts_come_from_search_examples_alone(study):
    prompts = study_prompts(load_study(study), {"order": ["sort", "reverse"]})
    expected = []
    for task in ("sort", "reverse"):
        expected += [line["prompt"] for line in lines_of(study, task, "search")]
    assert prompts == {"order": list(dict.fromkeys(expected))}
    held_out = {line["prompt"] for line in lines_of(study, "sort", "held_out")}
    assert not held_out & set(prompts["order"])
    with pytest.raises(ConfigError, match="--task order=sorting: unknown task"):
        study_prompts(load_study(study), {"order": ["sorting"]})


def test_scores_are_those_of_single_examples(study, folder):
    """Batched as one by one, and as a check by hand says."""
    together = score_twin(load_study(study), folder)
    alone = score_twin(load_study(study, ["evaluate.batch_size=1"]), folder)
    model = TwinModel.from_pretrained(folder)
    tokenizer = language_model(folder).tokenizer
    for task in ("sort", "reverse", "translate"):
        assert together[task].example_scores == alone[task].example_scores
        by_hand = []
        for line in lines_of(study, task, "held_out"):
            context = tokenizer(line["prompt"], return_tensors="pt")
            weights = model.task_weights(**context)
            whole = tokenizer(line["prompt"] + line["answer"], return_tensors="pt")
            ids = whole["input_ids"]
            n = ids.shape[1] - context["input_ids"].shape[1]
            logits = model(ids, task_weights=weights).logits[0]
            greedy = logits[-n - 1 : -1].argmax(-1)
            by_hand.append(float(bool((greedy == ids[0, -n:]).all())))
        assert list(together[task].example_scores) == by_hand
        assert sum(by_hand) / len(by_hand) > 0.8


def test_evaluate_recognises_the_folder(study, folder):
    done = paretomerge("evaluate", folder, "--study", study, "--json")
    rows = json.loads(done.stdout)
    expected = score_twin(load_study(study), folder)
    assert {name: row["value"] for name, row in rows.items()} == {
        name: score.value for name, score in expected.items()
    }


def test_another_engine_cannot_load_it(study, folder):
    with pytest.raises(EvaluationError, match=r"remove `evaluate.backend`"):
        score_twin(load_study(study, ["evaluate.backend=hf"]), folder)


def test_facts_of_a_folder(study, folder, tmp_path):
    config = yaml.safe_load(study.read_text())
    config["objectives"] = [{"size": "parameters"}, {"size": "layers"}]
    path = study.with_name("size.yaml")
    path.write_text(yaml.safe_dump(config))
    scores = score_twin(load_study(path), folder)
    n_shared = sum(
        parameter.numel()
        for parameter in TwinModel.from_pretrained(folder).shared.parameters()
    )
    assert scores["layers"].value == 4 and scores["parameters"].value > n_shared
    config["objectives"][1] = {"sparsity": True}
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(EvaluationError, match="has no sparsity, which the study"):
        score_twin(load_study(path), folder)


def test_the_harness_evaluates_it(study, folder, monkeypatch):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(study.parent)
    manager = TaskManager(include_path=str(study.parent / "tasks"))
    lm = language_model(folder, batch_size=8)
    result = simple_evaluate(
        model=lm, tasks=["sort"], task_manager=manager, bootstrap_iters=0
    )
    expected = score_twin(load_study(study), folder)["sort"].value
    assert result["results"]["sort"]["acc,none"] == pytest.approx(expected)


def test_the_plain_wrapper_of_the_harness_takes_single_requests_alone(folder):
    """It sends no attention mask, so the router would read the padding of a batch."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = TwinModel.from_pretrained(folder)
    tokenizer = language_model(folder).tokenizer
    requests = []
    for i, words in enumerate((("SORT:ba=", "ab"), ("SORT:bac=", "abc"))):
        requests.append(Instance("loglikelihood", {}, words, i))
    single = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    found = single.loglikelihood(requests, disable_tqdm=True)
    assert all(value <= 0 for value, _ in found)
    batched = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2)
    with pytest.raises(EvaluationError, match="attention_mask: needed for a batch"):
        batched.loglikelihood(requests, disable_tqdm=True)
