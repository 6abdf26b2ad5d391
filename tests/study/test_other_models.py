"""Searches of models that are no plain decoders, from the base to the written checkpoint."""

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, ViTConfig, ViTForImageClassification

import paretomerge as pm
from paretomerge.errors import CheckpointError, EvaluationError
from tests.architectures import ARCHITECTURES
from tests.conftest import save_tokenizer
from tests.merging.live.test_in_place import base_and_tuned, moved

TASK = """
task: letters
dataset_path: json
dataset_kwargs:
  data_files:
    search: data/search.jsonl
    held_out: data/held_out.jsonl
test_split: held_out
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: ["a", "bc", "d"]
doc_to_target: "{{answer}}"
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 1.0}
"""
WRITTEN = (
    TASK.replace("task: letters", "task: written")
    .replace("multiple_choice", "generate_until")
    .replace('doc_to_choice: ["a", "bc", "d"]\n', "")
    .replace("metric: acc", "metric: exact_match")
    + 'generation_kwargs: {until: ["."], max_gen_toks: 4}\n'
)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("root")
    rng = random.Random(0)
    (folder / "data").mkdir()
    for split in ("search", "held_out"):
        lines = []
        for _ in range(12):
            prompt = "".join(rng.choices("abcdefgh", k=rng.randint(2, 6)))
            answer = rng.randrange(3)
            lines.append(json.dumps({"prompt": prompt, "answer": answer}))
        (folder / "data" / f"{split}.jsonl").write_text("\n".join(lines))
    (folder / "tasks").mkdir()
    (folder / "tasks" / "letters.yaml").write_text(TASK)
    (folder / "tasks" / "written.yaml").write_text(WRITTEN)
    (folder / "text.txt").write_text("".join(rng.choices("abcdefgh", k=200)))
    return folder


def study_of(
    family: str, root: Path, folder: Path, objectives: list, **options
) -> pm.Study:
    base, tuned = base_and_tuned(family, folder)
    second = folder / "second"
    moved(ARCHITECTURES[family](), 2).save_pretrained(second)
    save_tokenizer(second)
    return pm.Study(
        base=str(base),
        models=[str(tuned), str(second)],
        objectives=objectives,
        sampler="random",
        evaluation=pm.Evaluation(
            include_path=str(root / "tasks"),
            data_root=str(root),
            splits={"search": "search", "held_out": "held_out"},
        ),
        out=str(folder / "run"),
        **options,
    )


def samples_of_the_harness(kind: type, out: Path, root: Path) -> dict[str, list]:
    """lm-evaluation-harness's own `hf` model on a written checkpoint, each example's sample."""
    import contextlib
    import warnings

    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = kind.from_pretrained(out, dtype=torch.float32).eval()
    # One by one there is no padding. The longest answer of an encoder-decoder, however, depends on
    # the padding in the harness, so the batches must be equal.
    size = 16 if model.config.is_encoder_decoder else 1
    tokenizer = AutoTokenizer.from_pretrained(out)
    harness = HFLM(model, tokenizer=tokenizer, batch_size=size)
    manager = TaskManager(include_defaults=False, include_path=str(root / "tasks"))
    with warnings.catch_warnings(), contextlib.chdir(root):
        warnings.simplefilter("ignore")
        results = simple_evaluate(
            harness, tasks=["letters", "written"], task_manager=manager
        )
    ordered = {}
    for task, samples in results["samples"].items():
        ordered[task] = sorted(samples, key=lambda sample: sample["doc_id"])
    return ordered


@pytest.mark.parametrize(
    "family",
    ["gemma3_vl", "qwen2_vl", "llava", "mixtral", "qwen3_moe", "deepseek_v3", "t5"],
)
def test_tasks_are_scored_as_the_harness_scores_the_checkpoint(family, root, tmp_path):
    study = study_of(family, root, tmp_path, [pm.Task("letters"), pm.Task("written")])
    study.optimize(n_trials=4, show_progress_bar=False)
    trials = study.get_trials()
    assert [trial.failure for trial in trials] == [""] * 4
    out = study.save(trials[-1], tmp_path / "out")
    live = study.search().load(trials[-1])
    evaluator = study.search().goals.evaluator
    ours = evaluator.evaluate(live, "held_out")
    theirs = samples_of_the_harness(type(live.model), out, root)
    accuracies = [float(sample["acc"]) for sample in theirs["letters"]]
    assert list(ours["letters"].example_scores) == accuracies
    (harness,) = evaluator.evaluators
    for task in ("letters", "written"):
        requests = harness.examples("held_out")[task].requests
        for instances, sample in zip(requests, theirs[task], strict=True):
            for instance, responses in zip(instances, sample["resps"], strict=True):
                assert close(instance.resps, responses)
    texts = [sample["resps"][0][0] for sample in theirs["written"]]
    assert len(set(texts)) > 1


def close(ours: list, theirs: list) -> bool:
    """Whether answers are equal, or log-likelihoods nearly so: batches round differently."""
    if isinstance(theirs[0], str):
        return ours == theirs
    (one, is_greedy), (other, is_greedy_too) = ours[0], theirs[0]
    return is_greedy == is_greedy_too and abs(one - other) < 1e-4


def hidden_size(model, tokenizer) -> float:
    ids = torch.tensor([tokenizer.encode("abc")])
    with torch.no_grad():
        output = model(ids)
    return float(output[0].abs().mean())


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "albert"])
def test_encoders_are_searched_by_functions(family, root, tmp_path):
    study = study_of(family, root, tmp_path, [pm.Function(hidden_size), pm.Sparsity()])
    study.optimize(n_trials=4, show_progress_bar=False)
    trials = study.get_trials()
    assert not any(trial.failure for trial in trials)
    kind = type(ARCHITECTURES[family]())
    out = study.save(trials[-1], tmp_path / "out")
    written = kind.from_pretrained(out, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(out)
    expected = hidden_size(written, tokenizer)
    assert trials[-1].scores["hidden_size"].value == expected
    again = study.evaluate(str(out), split="search")
    assert again["hidden_size"].value == expected
    assert again["sparsity"] == trials[-1].scores["sparsity"]


@pytest.mark.parametrize(
    ("family", "objective", "message"),
    [
        (
            "bert",
            pm.Task("letters"),
            "letters: needs a model that writes text, but .*Bert",
        ),
        (
            "bert",
            pm.Perplexity("text.txt"),
            "perplexity: needs a model that writes text",
        ),
        (
            "bert",
            pm.Size("seconds_per_token"),
            "seconds_per_token: needs a model that w",
        ),
        ("t5", pm.Perplexity("text.txt"), "perplexity: .* T5ForCond.* has an encoder"),
        ("t5", pm.Size("seconds_per_token"), "seconds_per_token: .* has an encoder"),
    ],
)
def test_scores_that_a_model_cannot_have_are_refused_before_the_first_trial(
    family, objective, message, root, tmp_path
):
    if isinstance(objective, pm.Perplexity):
        objective = pm.Perplexity(root / objective.path)
    study = study_of(family, root, tmp_path, [objective, pm.Sparsity()])
    with pytest.raises(EvaluationError, match=message):
        study.optimize(n_trials=4, show_progress_bar=False)
    assert not study.get_trials()


def test_watched_tasks_are_checked_too(root, tmp_path):
    objectives = [pm.Function(hidden_size)]
    watched = study_of("bert", root, tmp_path, objectives, watch=["letters"])
    with pytest.raises(EvaluationError, match="letters: needs a model that writes"):
        watched.check()


def test_models_that_cannot_be_loaded_end_the_search_at_once(root, tmp_path):
    study = study_of("llama", root, tmp_path, [pm.Sparsity()])
    for model in ("base", "tuned", "second"):
        file = tmp_path / model / "config.json"
        settings = json.loads(file.read_text())
        settings["architectures"] = ["LlamaForSequenceClassification"]
        file.write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=r"the checkpoint has no score\.weight"):
        study.optimize(n_trials=4, show_progress_bar=False)
    assert not study.get_trials()


@pytest.mark.parametrize("then", [False, True])
def test_routes_over_packed_experts_are_refused_by_the_check(root, tmp_path, then):
    options = {"space": pm.RouteSpace(form="edits")}
    if then:
        options = {"then": pm.SecondLevel(trials=2)}
    study = study_of("mixtral", root, tmp_path, [pm.Size("layers")], **options)
    with pytest.raises(CheckpointError, match="so routes through the layers of this"):
        study.check()
    assert not (tmp_path / "run").exists()


def test_a_study_that_is_refused_leaves_no_measurements(root, tmp_path, monkeypatch):
    """The deltas are measured before the tasks are looked for."""
    monkeypatch.chdir(tmp_path)
    space = pm.WeightSpace(groups={"by": "profile", "count": 2})
    objectives = [pm.Size("layers"), pm.Task("no_such_task")]
    study = study_of("llama", root, tmp_path, objectives, space=space)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(EvaluationError, match="no_such_task"):
        study.optimize(n_trials=1, show_progress_bar=False)
    assert sorted(tmp_path.rglob("*")) == before
    study = study_of("llama", root, tmp_path / "right", objectives[:1], space=space)
    study.check()
    assert len(list(tmp_path.glob("runs/deltas-*.json"))) == 1


def head_norm(model, tokenizer):
    assert tokenizer is None
    return model.classifier.weight.float().norm().item()


def image_classifiers(folder: Path) -> list[str]:
    config = ViTConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    torch.manual_seed(0)
    model = ViTForImageClassification(config)
    folders = []
    for seed, name in enumerate(("base", "one", "two")):
        model = moved(model, seed) if seed else model
        model.save_pretrained(folder / name)
        (folder / name / "preprocessor_config.json").write_text("{}")
        folders.append(str(folder / name))
    return folders


def test_image_classifiers_are_searched_by_functions(tmp_path):
    base, *models = image_classifiers(tmp_path)
    objectives = [pm.Function(head_norm), pm.Sparsity()]
    out = tmp_path / "run"
    study = pm.Study(base, models, objectives, sampler="random", out=out)
    study.optimize(n_trials=4, show_progress_bar=False)
    trials = study.get_trials()
    assert not any(trial.failure for trial in trials)
    saved = study.save(trials[-1], tmp_path / "out")
    written = ViTForImageClassification.from_pretrained(saved)
    score = trials[-1].scores["head_norm"]
    assert head_norm(written, None) == pytest.approx(score.value)
    assert study.evaluate(str(saved), split="search")["head_norm"] == score
