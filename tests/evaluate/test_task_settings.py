"""Settings of one task are those of the harness's command line for this task alone."""

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import paretomerge as pm
from paretomerge.evaluate.evaluator import evaluators_in
from paretomerge.evaluate.inference.language_model import ResidentLM
from paretomerge.evaluate.measures import PROMPT_READERS, Task
from paretomerge.study.build import build_search
from tests.architectures import ARCHITECTURES
from tests.conftest import save_tokenizer
from tests.evaluate.test_evaluate import CHAT, live

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{search: search.jsonl, held_out: held_out.jsonl}}}}
test_split: held_out
fewshot_split: search
output_type: {kind}
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list: [{{metric: {metric}, aggregation: mean, higher_is_better: true}}]
{more}
"""
GENERATION = "generation_kwargs: {until: ['.'], max_gen_toks: 12}"

# The study's settings, and tasks with settings of their own.
STUDY = {"num_fewshot": 1, "system_instruction": "be brief", "add_bos_token": False}
TASKS = [
    pm.Task("written"),
    pm.Task(
        "written",
        name="chat",
        num_fewshot=2,
        apply_chat_template=True,
        gen_kwargs={"max_gen_toks": 3},
        add_bos_token=True,
    ),
    pm.Task(
        "written",
        name="thinks",
        think_end_token="c",
        system_instruction="go",
        num_fewshot=0,
    ),
    pm.Task("written", name="two", metric="output_length", num_fewshot=2),
    pm.Task("answers"),
    pm.Task(
        "answers",
        name="one_turn",
        apply_chat_template=True,
        fewshot_as_multiturn=False,
        num_fewshot=2,
    ),
    pm.Task("answers", name="begins", add_bos_token=True),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A model with a chat template that writes something else for each prompt, and two tasks."""
    folder = tmp_path_factory.mktemp("settings")
    ARCHITECTURES["llama"]().save_pretrained(folder / "base")
    save_tokenizer(folder / "base", adds_bos=True)
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder / "base")
    for name in ("one", "two"):
        shutil.copytree(folder / "base", folder / name)
    rng = random.Random(0)
    for split, letters in (("search", "abcd"), ("held_out", "efgh")):
        lines = []
        for _ in range(24):
            prompt = "".join(rng.choices(letters, k=rng.randint(2, 6)))
            lines.append(json.dumps({"prompt": prompt, "answer": rng.choice(letters)}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    (folder / "tasks").mkdir()
    for name, kind, metric, more in (
        ("answers", "loglikelihood", "acc", ""),
        ("written", "generate_until", "exact_match", GENERATION),
    ):
        text = TASK.format(name=name, kind=kind, metric=metric, more=more)
        (folder / "tasks" / f"{name}.yaml").write_text(text)
    return folder


def study(root: Path, objectives: list[Task], **settings: object) -> pm.Study:
    evaluation = {
        "include_path": str(root / "tasks"),
        "data_root": str(root),
        "splits": {"search": "search", "held_out": "held_out"},
        **STUDY,
        **settings.pop("evaluation", {}),
    }
    return pm.Study(
        base=str(root / "base"),
        models=[str(root / "one"), str(root / "two")],
        objectives=objectives,
        evaluation=pm.Evaluation(**evaluation),
        out=str(root / "runs"),
        **settings,
    )


def goals_of(root: Path, objectives: list[Task], **settings: object):
    return build_search(study(root, objectives, **settings).settings).goals


def harness_of(root: Path, objectives: list[Task], **settings: object):
    (evaluator,) = evaluators_in(goals_of(root, objectives, **settings).evaluator)
    return evaluator


def alone(root: Path, task: Task) -> list[dict]:
    """Samples of the harness's own run of one task, with the flags that apply to it."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    flags = dict(STUDY)
    for key in PROMPT_READERS:
        if getattr(task, key) is not None:
            flags[key] = getattr(task, key)
    model_args = f"pretrained={root / 'base'}"
    for key in ("think_end_token", "add_bos_token"):
        if key in flags:
            model_args += f",{key}={flags.pop(key)}"
    # The command line's default: turns of a chat, where there is a chat.
    is_chat = flags.get("apply_chat_template", False)
    flags = {"fewshot_as_multiturn": is_chat} | flags
    manager = TaskManager(include_defaults=False, include_path=str(root / "tasks"))
    with warnings.catch_warnings(), contextlib.chdir(root):
        warnings.simplefilter("ignore")
        results = simple_evaluate(
            "hf",
            model_args=model_args,
            tasks=[task.task],
            task_manager=manager,
            batch_size=16,
            device="cpu",
            bootstrap_iters=0,
            fewshot_random_seed=0,
            **flags,
        )
    return sorted(results["samples"][task.task], key=lambda sample: sample["doc_id"])


def check_equal(task: Task, evaluator, score: pm.Score, samples: list[dict]) -> None:
    requests = evaluator.examples("held_out")[task.name].requests
    prompts = [instances[0].args[0] for instances in requests]
    assert prompts == [sample["arguments"][0][0] for sample in samples], task.name
    responses = [instances[0].resps[0] for instances in requests]
    theirs = [sample["resps"][0][0] for sample in samples]
    if task.task == "written":
        assert responses == theirs, task.name
    else:
        for response, expected in zip(responses, theirs, strict=True):
            assert response[0] == pytest.approx(expected[0], rel=1e-4), task.name
    metric = "acc" if task.task == "answers" else "exact_match"
    if task.metric is None:
        expected_scores = [float(sample[metric]) for sample in samples]
        assert list(score.example_scores) == expected_scores, task.name


def test_each_task_of_a_study_is_scored_as_if_alone(root):
    """Objectives, a constraint and watched tasks, all of one study."""
    constraint = pm.Constraint(TASKS[2], at_least=0)
    goals = goals_of(
        root, TASKS[:2] + TASKS[3:6], constraints=[constraint], watch=[TASKS[6]]
    )
    candidate = live(root / "base")
    (evaluator,) = evaluators_in(goals.evaluator)
    (watching,) = evaluators_in(goals.watched)
    scores = evaluator.evaluate(candidate, "held_out")
    watched = watching.evaluate(candidate, "held_out")
    assert len(scores) == 6 and list(watched) == ["begins"]
    seen = set()
    for task in TASKS:
        of_task = watching if task.name in watched else evaluator
        score = (scores | watched)[task.name]
        samples = alone(root, task)
        check_equal(task, of_task, score, samples)
        seen.add(repr([sample["resps"] for sample in samples]))
    # Else equal results would say nothing.
    assert len(seen) == len(TASKS)


def test_the_command_line_of_the_harness_gives_the_same(root, tmp_path):
    evaluator = harness_of(root, TASKS[:2])
    score = evaluator.evaluate(live(root / "base"), "held_out")["chat"]
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu"]
    command += ["--model_args", f"pretrained={root / 'base'},add_bos_token=True"]
    command += ["--tasks", "written", "--include_path", str(root / "tasks")]
    command += ["--num_fewshot", "2", "--apply_chat_template", "--batch_size", "16"]
    command += ["--system_instruction", "be brief", "--gen_kwargs", "max_gen_toks=3"]
    command += ["--seed", "0", "--log_samples", "--output_path", str(tmp_path)]
    environment = os.environ | {"HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=root, env=environment, check=True, capture_output=True)
    (file,) = tmp_path.rglob("samples_written_*.jsonl")
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    samples.sort(key=lambda sample: sample["doc_id"])
    requests = evaluator.examples("held_out")["chat"].requests
    responses = [instances[0].resps[0] for instances in requests]
    assert responses == [sample["resps"][0][0] for sample in samples]
    theirs = [float(sample["exact_match"]) for sample in samples]
    assert list(score.example_scores) == theirs


def test_a_few_examples_of_each_task_as_a_race_asks_them(root):
    evaluator = harness_of(root, TASKS)
    candidate = live(root / "base")
    every = evaluator.evaluate(candidate, "search")
    indices = {"written": [3, 0], "chat": [5], "thinks": [], "begins": [7, 1]}
    some = evaluator.example_scores(candidate, "search", indices)
    for name, chosen in indices.items():
        expected = [every[name].example_scores[i] for i in chosen]
        assert some[name] == expected


def test_equal_requests_are_asked_once_where_the_options_are_equal(root, monkeypatch):
    asked: list[int] = []
    generate = ResidentLM.generate_until

    def count(self, requests, disable_tqdm=False):
        asked.append(len(requests))
        return generate(self, requests, disable_tqdm)

    monkeypatch.setattr(ResidentLM, "generate_until", count)
    tasks = [
        pm.Task("written"),
        pm.Task("written", name="length", metric="output_length"),
        pm.Task("written", name="begins", add_bos_token=True),
    ]
    evaluator = harness_of(root, tasks)
    evaluator.evaluate(live(root / "base"), "search")
    prompts = {
        one[0].args[0] for one in evaluator.examples("search")["written"].requests
    }
    assert asked == [len(prompts), len(prompts)]


def test_cached_scores_belong_to_the_settings_of_their_task(root, tmp_path):
    candidate = replace(live(root / "base"), key="k")
    fresh = harness_of(root, TASKS).evaluate(candidate, "search")
    evaluation = {"cache": str(tmp_path / "scores.db")}
    # One after another: each finds the scores of those before it.
    for task in TASKS:
        cached = harness_of(root, [task], evaluation=evaluation)
        assert cached.evaluate(candidate, "search")[task.name] == fresh[task.name]
    together = harness_of(root, TASKS, evaluation=evaluation)
    together._respond = None  # nothing is left to ask, so it must not be called
    with pytest.raises(pm.ParetoMergeError):
        together.evaluate(replace(candidate, key="other"), "search")
    together._respond = lambda candidate, instances, options: None
    assert together.evaluate(candidate, "search") == fresh


def test_a_backend_gets_the_options_of_each_task(root):
    tasks = [TASKS[0], TASKS[1], TASKS[2]]
    expected = harness_of(root, tasks).evaluate(live(root / "base"), "held_out")
    backend = {"name": "hf", "device": "cpu"}
    harness = harness_of(root, tasks, evaluation={"backend": backend})
    scores = harness.evaluate(live(root / "base"), "held_out")
    assert scores == expected


def test_an_example_is_searched_on_in_any_form(root, tmp_path):
    """Examples of a task with another prompt are the same examples."""
    for name in ("tasks", "search.jsonl"):
        source = root / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, tmp_path / name)
    # Of both splits, and with an empty question: only its document tells examples apart.
    shutil.copy(root / "search.jsonl", tmp_path / "held_out.jsonl")
    for file in (tmp_path / "tasks").glob("*.yaml"):
        text = file.read_text().replace('doc_to_text: "{{prompt}}"', 'doc_to_text: ""')
        file.write_text(text)
    evaluation = {"include_path": str(tmp_path / "tasks"), "data_root": str(tmp_path)}
    harness = harness_of(root, TASKS[:2], evaluation=evaluation)
    with pytest.raises(
        pm.ParetoMergeError, match="all held-out examples are searched on"
    ):
        harness.examples("held_out")


def test_turns_of_a_chat_need_a_chat(root):
    with pytest.raises(pm.ConfigError, match=r"^sort: fewshot_as_multiturn: needs"):
        study(root, [pm.Task("sort", fewshot_as_multiturn=True)])
    # The study's turns are those of its chats.
    chats = {"apply_chat_template": True, "fewshot_as_multiturn": True}
    plain = pm.Task("written", apply_chat_template=False)
    harness = harness_of(root, [plain], evaluation=chats)
    assert harness.tasks["written"].prompts.fewshot_as_multiturn is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"apply_chat_template": 1}, "Task: apply_chat_template: expected True or"),
        ({"think_end_token": ""}, "Task: think_end_token: expected a text"),
        ({"gen_kwargs": "t=1"}, "Task: gen_kwargs: expected"),
        ({"system_instruction": 3}, "Task: system_instruction: expected text"),
    ],
)
def test_wrong_values_are_refused(settings, message):
    with pytest.raises(pm.ConfigError, match=message):
        pm.Task("gsm8k", **settings)
