"""`think_end_token` and `add_bos_token` do what they do on the harness's command line."""

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest

from paretomerge.errors import ConfigError
from paretomerge.evaluate.backend import ModelOptions
from paretomerge.evaluate.harness import HarnessEvaluator
from paretomerge.evaluate.score_cache import ScoreCache
from paretomerge.evaluate.tasks import HarnessTask, TaskLoader
from tests.architectures import ARCHITECTURES
from tests.conftest import save_tokenizer
from tests.evaluate.test_evaluate import live

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{search: data.jsonl, held_out: data.jsonl}}}}
test_split: held_out
output_type: {kind}
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list: [{{metric: {metric}, aggregation: mean, higher_is_better: true}}]
{more}
"""
GENERATION = "generation_kwargs: {until: ['.'], max_gen_toks: 12}"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A model that writes something else for each prompt, with tasks and data."""
    folder = tmp_path_factory.mktemp("options")
    model = ARCHITECTURES["llama"]()
    model.save_pretrained(folder / "model")
    save_tokenizer(folder / "model", adds_bos=True)
    # The same model with a tokenizer that knows the token `~`, and adds it only when asked.
    shutil.copytree(folder / "model", folder / "plain")
    file = folder / "plain" / "tokenizer.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "post_processor": None}))
    rng = random.Random(0)
    lines = []
    for _ in range(24):
        prompt = "".join(rng.choices("abcdefgh", k=rng.randint(2, 6)))
        answer = rng.choice("abcdefgh")
        lines.append(json.dumps({"prompt": prompt, "answer": answer}))
    (folder / "data.jsonl").write_text("\n".join(lines))
    tasks = folder / "tasks"
    tasks.mkdir()
    for name, kind, metric, more in (
        ("answers", "loglikelihood", "acc", ""),
        ("written", "generate_until", "exact_match", GENERATION),
    ):
        text = TASK.format(name=name, kind=kind, metric=metric, more=more)
        (tasks / f"{name}.yaml").write_text(text)
    return folder


def evaluator(root, task, options, **more):
    splits = {"search": "search", "held_out": "held_out"}
    loader = TaskLoader(root / "tasks", root, splits)
    return HarnessEvaluator({"one": HarnessTask(task, options=options)}, loader, **more)


def scores_and_responses(root, model, task, options):
    harness = evaluator(root, task, options)
    score = harness.evaluate(live(root / model), "search")["one"]
    requests = harness.examples("search")["one"].requests
    responses = [instances[0].resps[0] for instances in requests]
    return list(score.example_scores), responses


def as_arguments(options: ModelOptions) -> str:
    return "".join(f",{key}={value}" for key, value in options.arguments.items())


@pytest.mark.parametrize("model", ["model", "plain"])
@pytest.mark.parametrize("task", ["answers", "written"])
@pytest.mark.parametrize(
    "options",
    [
        ModelOptions(),
        ModelOptions(add_bos_token=True),
        ModelOptions(add_bos_token=False),
        ModelOptions(think_end_token="c"),
        ModelOptions(think_end_token=4, add_bos_token=True),
        ModelOptions(think_end_token="4"),
    ],
    ids=str,
)
def test_responses_are_those_of_the_harness(root, model, task, options):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=False, include_path=str(root / "tasks"))
    with warnings.catch_warnings(), contextlib.chdir(root):
        warnings.simplefilter("ignore")
        # `model_args` is the text of the command line.
        theirs = simple_evaluate(
            "hf",
            model_args=f"pretrained={root / model}{as_arguments(options)}",
            tasks=[task],
            task_manager=manager,
            batch_size=16,
            device="cpu",
            bootstrap_iters=0,
        )
    samples = sorted(theirs["samples"][task], key=lambda sample: sample["doc_id"])
    metric = "acc" if task == "answers" else "exact_match"
    scores, responses = scores_and_responses(root, model, task, options)
    assert scores == [float(sample[metric]) for sample in samples]
    for response, sample in zip(responses, samples, strict=True):
        if task == "written":
            assert response == sample["resps"][0][0]
        else:
            assert response[0] == pytest.approx(sample["resps"][0][0][0], rel=1e-4)


def test_the_options_make_a_difference(root):
    """Else the test above would compare nothing."""
    plain = scores_and_responses(root, "plain", "written", ModelOptions())[1]
    thinks = ModelOptions(think_end_token="c")
    assert scores_and_responses(root, "plain", "written", thinks)[1] != plain
    begins = ModelOptions(add_bos_token=True)
    assert scores_and_responses(root, "plain", "written", begins)[1] != plain
    bare = ModelOptions(add_bos_token=False)
    added = scores_and_responses(root, "model", "written", ModelOptions())[1]
    assert scores_and_responses(root, "model", "written", bare)[1] != added


def test_on_the_command_line_of_the_harness(root, tmp_path):
    options = ModelOptions(think_end_token="c", add_bos_token=True)
    model_args = f"pretrained={root / 'plain'}{as_arguments(options)}"
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu"]
    command += ["--model_args", model_args, "--tasks", "written"]
    command += ["--include_path", str(root / "tasks"), "--batch_size", "16"]
    command += ["--log_samples", "--output_path", str(tmp_path)]
    environment = os.environ | {"HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=root, env=environment, check=True, capture_output=True)
    (file,) = tmp_path.rglob("samples_written_*.jsonl")
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    samples.sort(key=lambda sample: sample["doc_id"])
    _, responses = scores_and_responses(root, "plain", "written", options)
    assert responses == [sample["resps"][0][0] for sample in samples]


def test_cached_scores_belong_to_their_options(root, tmp_path):
    candidate = replace(live(root / "plain"), key="k")
    cache = ScoreCache(tmp_path / "scores.db")
    values = []
    for options in (ModelOptions(), ModelOptions(think_end_token="c")):
        harness = evaluator(root, "written", options, cache=cache)
        values.append(harness.evaluate(candidate, "search")["one"])
        fresh = evaluator(root, "written", options)
        assert values[-1] == fresh.evaluate(candidate, "search")["one"]


@pytest.mark.parametrize("token", ["", True, 1.5, -1])
def test_a_token_is_a_text_or_a_number(token):
    import paretomerge as pm

    with pytest.raises(
        ConfigError, match=r"evaluate\.think_end_token: expected a text"
    ):
        pm.Evaluation(think_end_token=token)


def test_the_options_are_keys_of_a_study_file(root, tmp_path):
    import paretomerge as pm

    study = pm.Study(
        base=str(root / "model"),
        models=[str(root / "plain"), "elsewhere"],
        objectives=[pm.Task("written")],
        evaluation=pm.Evaluation(
            include_path=str(root / "tasks"),
            think_end_token="</think>",
            add_bos_token=True,
        ),
    )
    file = tmp_path / "study.yaml"
    file.write_text(study.to_yaml())
    evaluation = pm.load_study(file).settings.evaluation
    assert evaluation.think_end_token == "</think>"
    assert evaluation.add_bos_token is True
