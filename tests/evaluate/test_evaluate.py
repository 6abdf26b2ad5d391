import contextlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from paretomerge.errors import EvaluationError, unknown_name
from paretomerge.evaluate.evaluator import (
    Candidate,
    CombinedEvaluator,
    MergeFact,
    Objective,
    Score,
)
from paretomerge.evaluate.function import FunctionEvaluator
from paretomerge.evaluate.harness import HarnessEvaluator
from paretomerge.evaluate.tasks import HarnessTask, Prompts, TaskLoader

SPLITS = {"search": "search", "held_out": "held_out"}


def live(model: Path) -> Candidate:
    return Candidate(
        AutoModelForCausalLM.from_pretrained(model).eval(),
        AutoTokenizer.from_pretrained(model),
        {"sparsity": -0.5},
    )


def harness(folder: Path, *names: str, **settings) -> HarnessEvaluator:
    defaults = {
        "include_path": folder / "tasks",
        "data_root": folder,
        "splits": SPLITS,
        "search_items": 40,
        "batch_size": 16,
    }
    chosen = defaults | settings
    of_loader = {
        name: chosen.pop(name)
        for name in list(chosen)
        if name in TaskLoader.__dataclass_fields__
    }
    return HarnessEvaluator(
        {n: HarnessTask(n) for n in names}, TaskLoader(**of_loader), **chosen
    )


def test_scores_are_those_of_the_harness_itself(specialists, tmp_path):
    """lm-eval's own command line, in its own process, is the oracle: value and every item."""
    command = [
        sys.executable,
        "-m",
        "lm_eval",
        "--model",
        "hf",
        "--model_args",
        f"pretrained={specialists}/models/scribe",
    ]
    command += [
        "--tasks",
        "reverse,count",
        "--include_path",
        str(specialists / "tasks"),
        "--batch_size",
        "64",
        "--device",
        "cpu",
    ]
    command += ["--limit", "60", "--log_samples", "--output_path", str(tmp_path)]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    subprocess.run(
        command,
        cwd=specialists,
        env=environment,
        check=True,
        capture_output=True,
    )
    scores = harness(specialists, "reverse", "count", batch_size=64).evaluate(
        live(specialists / "models" / "scribe"), "held_out"
    )
    for name in ("reverse", "count"):
        (file,) = tmp_path.rglob(f"samples_{name}_*.jsonl")
        theirs = [json.loads(line)["acc"] for line in file.read_text().splitlines()]
        assert scores[name].n == 600 and len(theirs) == 60
        assert [float(x) for x in theirs] == list(scores[name].example_scores[:60])


def test_search_and_held_out_items_are_different_and_repeatable(specialists):
    model = live(specialists / "models" / "mirror")
    evaluator = harness(specialists, "sort", "reverse")
    first, again = (
        evaluator.evaluate(model, "search"),
        evaluator.evaluate(model, "search"),
    )
    assert first == again and first["sort"].n == 40
    prompts = {
        split: {r[0].args[0] for r in evaluator.examples(split)["sort"].requests}
        for split in ("search", "held_out")
    }
    assert not prompts["search"] & prompts["held_out"]
    assert (
        first["reverse"].value
        > 0.8
        > harness(specialists, "shift").evaluate(model, "search")["shift"].value
    )


def test_one_split_can_be_cut_in_two(specialists):
    evaluator = harness(specialists, "sort", splits=None, search_items=100)
    documents = {
        s: {r[0].doc["prompt"] for r in evaluator.examples(s)["sort"].requests}
        for s in ("search", "held_out")
    }
    assert len(documents["search"]) == 100 and len(documents["held_out"]) == 500
    assert not documents["search"] & documents["held_out"]
    other = harness(specialists, "sort", splits=None, search_items=100, seed=1)
    assert {
        r[0].doc["prompt"] for r in other.examples("search")["sort"].requests
    } != documents["search"]


def test_half_of_a_task_is_searched_on_by_default_but_at_most_200(
    specialists, tmp_path
):
    evaluator = harness(specialists, "sort", splits=None, search_items=None)
    counts = {s: len(evaluator.examples(s)["sort"].requests) for s in SPLITS}
    assert counts == {"search": 200, "held_out": 400}

    lines = (specialists / "tasks" / "data" / "sort" / "held_out.jsonl").read_text()
    text = (specialists / "tasks" / "sort.yaml").read_text()
    (tmp_path / "sort.yaml").write_text(text)
    folder = tmp_path / "tasks" / "data" / "sort"
    folder.mkdir(parents=True)
    for n, expected in ((7, (3, 4)), (2, (1, 1))):
        few = "".join(lines.splitlines(keepends=True)[:n])
        for name in ("search.jsonl", "held_out.jsonl"):
            (folder / name).write_text(few)
        small = harness(
            specialists,
            "sort",
            include_path=tmp_path,
            data_root=tmp_path,
            splits=None,
            search_items=None,
        )
        sizes = tuple(len(small.examples(s)["sort"].requests) for s in SPLITS)
        assert sizes == expected


def test_what_is_searched_on_is_never_held_out(specialists, tmp_path):
    """Items are told by what they ask and want.

    A copy under another split, or in another task, is the same item.
    """
    import json

    data = specialists / "tasks" / "data" / "reverse"
    lines = {
        split: (data / f"{split}.jsonl").read_text().splitlines()
        for split in ("search", "held_out")
    }
    mixed = [
        *lines["held_out"][:50],
        *lines["search"][:7],
        *lines["search"][39:42],
    ]  # of the last three, one is searched on
    for name, rows in (("search", lines["search"]), ("held_out", mixed)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    text = (
        (specialists / "tasks" / "reverse.yaml")
        .read_text()
        .replace("tasks/data/reverse/", "")
    )
    (tmp_path / "reverse.yaml").write_text(text)
    other = text.replace("task: reverse", "task: other").replace(
        "search: search.jsonl", "search: held_out.jsonl"
    )
    (tmp_path / "other.yaml").write_text(other)
    evaluator = harness(
        specialists, "reverse", include_path=tmp_path, data_root=tmp_path
    )
    assert len(evaluator.examples("held_out")["reverse"]) == 52
    assert evaluator.notes == [
        "reverse: 8 of 60 held-out examples are searched on too, and left out"
    ]
    watched = harness(
        specialists,
        "other",
        include_path=tmp_path,
        data_root=tmp_path,
        search_items=1,
        search_evaluator=evaluator,
    )
    assert (
        len(watched.examples("held_out")["other"]) == 51
    )  # its own first item is searched on besides
    assert {json.loads(line)["prompt"] for line in lines["search"][:40]} == {
        requests[0].doc["prompt"]
        for requests in evaluator.examples("search")["reverse"].requests
    }
    with pytest.raises(
        EvaluationError, match="other: all held-out examples are searched on too"
    ):
        everything = harness(
            specialists,
            "other",
            include_path=tmp_path,
            data_root=tmp_path,
            search_items=60,
        )
        everything.examples("held_out")


def test_a_metric_that_is_no_mean_gets_its_error_by_resampling(specialists, tmp_path):
    text = (
        (specialists / "tasks" / "copy.yaml")
        .read_text()
        .replace("task: copy", "task: copy_perplexity")
    )
    text = text.replace(
        "metric: acc\n    aggregation: mean\n    higher_is_better: true",
        "metric: perplexity\n    aggregation: perplexity\n    higher_is_better: false",
    )
    (tmp_path / "copy_perplexity.yaml").write_text(text)
    evaluator = harness(specialists, "copy_perplexity", include_path=tmp_path)
    assert evaluator.directions() == {"copy_perplexity": False}
    good, bad = (
        evaluator.evaluate(live(specialists / "models" / m), "search")[
            "copy_perplexity"
        ]
        for m in ("scribe", "mirror")
    )
    assert 1 <= good.value < bad.value and good.stderr > 0 and good.n == 40


def test_writing_an_answer_and_ranking_it_first_are_the_same(specialists, tmp_path):
    """generate_until with exact match, against the greedy flag of the log-likelihood.

    Two paths through the harness.
    """
    text = (
        (specialists / "tasks" / "reverse.yaml")
        .read_text()
        .replace("task: reverse", "task: reverse_written")
    )
    text = text.replace(
        "output_type: loglikelihood",
        "output_type: generate_until\ngeneration_kwargs: {until: ['.'], max_gen_toks: 12}",
    )
    text = text.replace("metric: acc", "metric: exact_match").replace(
        "{{answer}}", "{{answer[:-1]}}"
    )
    (tmp_path / "reverse_written.yaml").write_text(text)
    model = live(specialists / "models" / "scribe")
    model.model.float()
    written = harness(specialists, "reverse_written", include_path=tmp_path).evaluate(
        model, "search"
    )["reverse_written"]
    ranked = harness(specialists, "reverse").evaluate(model, "search")["reverse"]
    assert written.example_scores == ranked.example_scores and 0 < written.value < 1


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (lambda s: harness(s, "sorte"), "did you mean 'sort'|unknown task"),
        (lambda s: harness(s, "sort", include_path=s / "nowhere"), "does not exist"),
        (
            lambda s: harness(
                s, "sort", splits={"search": "serch", "held_out": "held_out"}
            ),
            "did you mean 'search'",
        ),
        (
            lambda s: harness(s, "sort", splits=None, search_items=600),
            "some of the 600 examples are held out",
        ),
        (
            lambda s: harness(s, "sort", data_root=s.parent),
            "relative data_files start from",
        ),
        (
            lambda s: HarnessEvaluator(
                {"sort": HarnessTask("sort", "accuracy")},
                TaskLoader(s / "tasks", s, SPLITS),
            ),
            "unknown metric of task sort 'accuracy'",
        ),
    ],
)
def test_what_is_missing_is_told_before_anything_is_scored(specialists, build, told):
    with pytest.raises(EvaluationError, match=told):
        build(specialists)


FILTERS = """
filter_list:
  - name: first
    filter: [{function: take_first}]
  - name: upper
    filter: [{function: uppercase}, {function: take_first}]
"""


def written_task(specialists, folder, name, more):
    """The reverse task with written answers, under another name and with more keys."""
    text = (specialists / "tasks" / "reverse.yaml").read_text()
    for old, new in (
        ("task: reverse", f"task: {name}"),
        (
            "output_type: loglikelihood",
            "output_type: generate_until\ngeneration_kwargs: {until: ['.'], max_gen_toks: 12}",
        ),
        ("metric: acc", "metric: exact_match"),
        ("{{answer}}", "{{answer[:-1]}}"),
    ):
        assert old in text
        text = text.replace(old, new)
    (folder / f"{name}.yaml").write_text(text + more)


def test_one_of_several_filters_is_chosen_by_name(specialists, tmp_path):
    written_task(specialists, tmp_path, "two_ways", FILTERS)

    def score(metric):
        evaluator = HarnessEvaluator(
            {"two_ways": HarnessTask("two_ways", metric)},
            TaskLoader(tmp_path, specialists, SPLITS, search_items=40),
        )
        model = live(specialists / "models" / "mirror")
        return evaluator.evaluate(model, "search")["two_ways"].value, evaluator.notes

    question = "choose one: `metric: exact_match,first` or `metric: exact_match,upper`"
    for undecided in ("exact_match", ""):
        with pytest.raises(EvaluationError, match=f"two_ways: .*{question}"):
            score(undecided)
    first, notes = score("exact_match,first")
    assert first > 0.5 and notes == []
    # The answers are in lower case, so in upper case none is right.
    assert score("exact_match,upper") == (0.0, [])
    with pytest.raises(
        EvaluationError, match="unknown filter of task two_ways 'lower'"
    ):
        score("exact_match,lower")


def test_more_few_shot_examples_than_there_are(specialists, tmp_path):
    sort = (specialists / "tasks" / "sort.yaml").read_text()
    (tmp_path / "sort.yaml").write_text(f"{sort}\nfewshot_split: held_out\n")
    with pytest.raises(EvaluationError, match=r"sort: .* num_fewshot 5000: Sample"):
        HarnessEvaluator(
            {"sort": HarnessTask("sort", prompts=Prompts(num_fewshot=5000))},
            TaskLoader(tmp_path, specialists, SPLITS, search_items=4),
        )


def small_group(specialists, folder, weight_by_size):
    """A group of `reverse` and of the first 30 examples of `sort`, each with its own size."""
    (folder / "few.py").write_text(
        "def first(docs):\n    return docs.select(range(30))\n"
    )
    sort = (specialists / "tasks" / "sort.yaml").read_text()
    few = sort.replace("task: sort", "task: few")
    (folder / "few.yaml").write_text(f"{few}\nprocess_docs: !function few.first\n")
    shutil.copy(specialists / "tasks" / "reverse.yaml", folder)
    (folder / "both.yaml").write_text(
        "group: both\ntask: [few, reverse]\naggregate_metric_list:\n"
        f"  - {{metric: acc, aggregation: mean, weight_by_size: {weight_by_size}}}\n"
    )


@pytest.mark.parametrize("weight_by_size", ["true", "false"])
def test_a_group_scores_what_the_harness_says(specialists, tmp_path, weight_by_size):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    small_group(specialists, tmp_path, weight_by_size)
    evaluator = harness(specialists, "both", include_path=tmp_path)
    candidate = live(specialists / "models" / "scribe")
    score = evaluator.evaluate(candidate, "held_out")["both"]
    assert score.n == 630 and len(score.example_scores) == 630 and score.stderr > 0
    with warnings.catch_warnings(), contextlib.chdir(specialists):
        warnings.simplefilter("ignore")
        told = simple_evaluate(
            HFLM(candidate.model, tokenizer=candidate.tokenizer, batch_size=64),
            tasks=["both"],
            task_manager=TaskManager(
                include_defaults=False, include_path=str(tmp_path)
            ),
            bootstrap_iters=0,
        )
    results = told["results"] | told["groups"]
    assert score.value == pytest.approx(results["both"]["acc,none"], abs=1e-9)
    # Weights matter: the two tasks differ in size and in score.
    assert abs(results["few"]["acc,none"] - results["reverse"]["acc,none"]) > 0.1


def test_a_groups_search_examples_are_shared_by_its_tasks(specialists, tmp_path):
    small_group(specialists, tmp_path, "true")
    evaluator = harness(
        specialists, "both", include_path=tmp_path, splits=None, search_items=40
    )
    search, held_out = (evaluator.examples(s)["both"] for s in ("search", "held_out"))
    assert [len(member) for member in search.members] == [15, 20]
    assert [len(member) for member in held_out.members] == [15, 580]
    assert not set(search.content_digests) & set(held_out.content_digests)
    fewer = harness(
        specialists, "both", include_path=tmp_path, search_items=9, held_out_items=40
    )
    held_out = fewer.examples("held_out")["both"]
    assert [len(member) for member in held_out.members] == [20, 20]


def test_what_a_group_cannot_score_is_told(specialists, tmp_path):
    small_group(specialists, tmp_path, "true")
    text = (tmp_path / "both.yaml").read_text()
    (tmp_path / "none.yaml").write_text("group: none_of_it\ntask: [few, reverse]\n")
    with pytest.raises(EvaluationError, match="'none_of_it' has no mean of a metric"):
        harness(specialists, "none_of_it", include_path=tmp_path)
    (tmp_path / "both.yaml").write_text(text)
    with pytest.raises(EvaluationError, match="'both' has no mean of f1"):
        HarnessEvaluator(
            {"both": HarnessTask("both", "f1")},
            TaskLoader(tmp_path, specialists, SPLITS),
        )


CHAT = (
    "{% for message in messages %}{{ message['role'][0] }}: {{ message['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


@pytest.mark.parametrize(
    "options",
    [
        {"num_fewshot": 2},
        {"num_fewshot": 1, "apply_chat_template": True},
        {
            "num_fewshot": 2,
            "apply_chat_template": True,
            "fewshot_as_multiturn": False,
            "system_instruction": "be brief",
        },
        {"system_instruction": "be brief", "gen_kwargs": {"max_gen_toks": 3}},
    ],
)
@pytest.mark.parametrize("task", ["reverse", "reverse_written"])
def test_prompts_are_those_of_the_harness(specialists, tmp_path, options, task):
    """Requests and scores equal the harness's own, example by example."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    folder = tmp_path / "model"
    shutil.copytree(specialists / "models" / "mirror", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    shutil.copy(specialists / "tasks" / "reverse.yaml", tasks)
    written_task(specialists, tasks, "reverse_written", "fewshot_split: search\n")
    evaluator = HarnessEvaluator(
        {"one": HarnessTask(task, prompts=Prompts(**options))},
        TaskLoader(
            tasks,
            specialists,
            {"search": "held_out", "held_out": "search"},
            search_items=12,
            seed=5,
            tokenizer=str(folder),
        ),
    )
    candidate = live(folder)
    ours = evaluator.evaluate(candidate, "search")["one"]
    # The command line's default: turns of a chat, where there is a chat.
    is_chat = options.get("apply_chat_template", False)
    harness_options = {"fewshot_as_multiturn": is_chat} | options
    with warnings.catch_warnings(), contextlib.chdir(specialists):
        warnings.simplefilter("ignore")
        theirs = simple_evaluate(
            HFLM(candidate.model, tokenizer=candidate.tokenizer, batch_size=64),
            tasks=[task],
            task_manager=TaskManager(include_defaults=False, include_path=str(tasks)),
            limit=12,
            fewshot_random_seed=5,
            bootstrap_iters=0,
            **harness_options,
        )
    samples = sorted(theirs["samples"][task], key=lambda sample: sample["doc_id"])
    metric = "acc" if task == "reverse" else "exact_match"
    assert list(ours.example_scores) == [float(sample[metric]) for sample in samples]
    examples = evaluator.examples("search")["one"]
    prompts = [requests[0].args[0] for requests in examples.requests]
    assert prompts == [sample["arguments"][0][0] for sample in samples]


def test_a_chat_template_must_be_there(specialists):
    loader = TaskLoader(
        specialists / "tasks", specialists, tokenizer=str(specialists / "models/base")
    )
    tasks = {"sort": HarnessTask("sort", prompts=Prompts(apply_chat_template=True))}
    with pytest.raises(EvaluationError, match="base has no chat template"):
        HarnessEvaluator(tasks, loader)


def test_a_task_has_few_shot_examples_of_its_own(specialists):
    loader = TaskLoader(specialists / "tasks", specialists, SPLITS, 5)
    tasks = {
        "two": HarnessTask("sort", prompts=Prompts(num_fewshot=2)),
        "none": HarnessTask("sort", prompts=Prompts(num_fewshot=0)),
    }
    examples = HarnessEvaluator(tasks, loader).examples("search")
    lengths = [len(examples[name].requests[0][0].args[0]) for name in tasks]
    assert lengths[0] > 2 * lengths[1]


def test_a_misspelt_name_among_thousands_is_answered_by_the_nearest():
    names = [f"task_{i}" for i in range(14_000)]
    message = unknown_name("task", "tusk_77", names)
    assert "did you mean 'task_77'" in message and len(message) < 300


def test_tasks_that_run_written_code_must_be_allowed(
    specialists, tmp_path, monkeypatch
):
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    written_task(specialists, tmp_path, "runs_code", "unsafe_code: true\n")
    with pytest.raises(EvaluationError, match="--confirm-run-unsafe-code"):
        harness(specialists, "runs_code", include_path=tmp_path)
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    harness(specialists, "runs_code", include_path=tmp_path)


def test_whatever_a_task_raises_is_told_as_an_error_of_evaluation(
    specialists, tmp_path
):
    (tmp_path / "broken.py").write_text(
        "def process_results(doc, results):\n    raise KeyError('lost')\n"
    )
    text = (
        (specialists / "tasks" / "copy.yaml")
        .read_text()
        .replace("task: copy", "task: broken")
    )
    (tmp_path / "broken.yaml").write_text(
        text + "\nprocess_results: !function broken.process_results\n"
    )
    evaluator = harness(specialists, "broken", include_path=tmp_path)
    with pytest.raises(
        EvaluationError, match="broken: the harness raised KeyError: 'lost'"
    ):
        evaluator.evaluate(live(specialists / "models" / "mirror"), "search")


def test_score_of_items():
    score = Score.mean_of([1, 0, 1, 1])
    assert (score.value, score.n, score.example_scores) == (
        0.75,
        4,
        (1.0, 0.0, 1.0, 1.0),
    )
    assert score.stderr == pytest.approx(0.25)
    with pytest.raises(EvaluationError, match="finite"):
        Score(float("nan"))
    for stderr in (float("nan"), float("inf"), -0.1):
        with pytest.raises(
            EvaluationError, match="standard error must be finite and at least 0"
        ):
            Score(1.0, stderr)


def test_only_the_objective_knows_which_way_is_up():
    assert (
        Objective("a").inside(3) == 3 and Objective("a", maximise=False).inside(3) == -3
    )
    down = Objective("a", maximise=False)
    assert down.inside(down.inside(3)) == 3


def test_functions_return_numbers_scores_or_dicts(pico):
    model = live(pico / "ada")
    assert FunctionEvaluator("f", lambda m, t: 2).evaluate(model, "search") == {
        "f": Score(2.0)
    }
    assert FunctionEvaluator("f", lambda m, t, split: Score(1, 0.1, 5)).evaluate(
        model, "search"
    ) == {"f": Score(1, 0.1, 5)}
    both = FunctionEvaluator(
        "f",
        lambda model, tokenizer, split: {"a": len(tokenizer), "b": split == "held_out"},
    )
    assert both.evaluate(model, "held_out") == {"f/a": Score(32.0), "f/b": Score(1.0)}
    assert CombinedEvaluator((MergeFact("sparsity"), both)).evaluate(model, "search")[
        "sparsity"
    ] == Score(-0.5)
    assert MergeFact("sparsity", "near").evaluate(model, "search") == {
        "near": Score(-0.5)
    }


def test_functions_that_fail_are_named(pico, tmp_path):
    def broken(model, tokenizer):
        raise KeyError("lost")

    with pytest.raises(EvaluationError, match="KeyError"):
        FunctionEvaluator("f", broken).evaluate(live(pico / "ada"), "search")
    with pytest.raises(EvaluationError, match="must return a number"):
        FunctionEvaluator("f", lambda m, t: "good").evaluate(
            live(pico / "ada"), "search"
        )
    for path, told in (
        ("no_colon", "module:function"),
        ("not_there:f", "No module"),
        ("json:f", "no attribute|cannot|has no"),
    ):
        with pytest.raises(EvaluationError, match=told):
            FunctionEvaluator.load("f", path)
    (tmp_path / "scoring_of_mine.py").write_text(
        "def score(model, tokenizer):\n    return 7\n"
    )
    assert (
        FunctionEvaluator.load("f", "scoring_of_mine:score", tmp_path)
        .evaluate(live(pico / "ada"), "search")["f"]
        .value
        == 7
    )
    (tmp_path / "half.py").write_text("def score(")
    with pytest.raises(
        EvaluationError, match="half:score cannot be imported: SyntaxError"
    ):
        FunctionEvaluator.load("f", "half:score", tmp_path)


def test_functions_of_two_folders_may_be_called_alike(tmp_path):
    for number in (7, 8):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "json.py").write_text(
            "from dataclasses import dataclass\n\n@dataclass\nclass Wrapped:\n    value: int\n\n"
            f"def score(model, tokenizer):\n    return Wrapped({number}).value\n"
        )
    found = {
        n: FunctionEvaluator.load("f", "json:score", tmp_path / str(n)) for n in (7, 8)
    }
    assert [f.function(None, None) for f in found.values()] == [7, 8]
    assert sys.modules["json"] is json
    # A process that begins with these paths has the standard library's, too.
    code = "import sys; sys.path[:] = sys.argv[1:]; import json; json.JSONEncoder"
    subprocess.run([sys.executable, "-c", code, *sys.path], check=True)
    # Beside what is installed, the study's own file is meant.
    place = sys.path.index(str(tmp_path / "8"))
    assert place < sys.path.index(sysconfig.get_path("purelib"))


def test_a_function_may_import_what_lies_beside_it_and_is_read_anew(tmp_path):
    (tmp_path / "helper_of_mine.py").write_text("VALUE = 7\n")
    for more in (0, 10):
        (tmp_path / "mine.py").write_text(
            "from helper_of_mine import VALUE\n\ndef score(model, tokenizer):\n    return VALUE "
            f"+ {more}\n"
        )
        assert (
            FunctionEvaluator.load("f", "mine:score", tmp_path).function(None, None)
            == 7 + more
        )


@pytest.mark.parametrize(
    ("score", "text"),
    [
        (Score(1.0, 0.0, 200), "1.000"),
        (Score(0.5, 0.01, 9), "0.500"),
        (Score(1e6), "1,000,000"),
        (Score(24.0), "24"),
        (Score(-0.25), "-0.250"),
    ],
)
def test_counts_are_shown_as_counts(score, text):
    assert score.text == text
