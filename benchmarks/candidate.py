"""docs/lab/smollm.md: what one candidate costs, ours and the loop that people write by hand.

    python -m benchmarks.candidate run --mergekit /path/to/venv     # a quarter of an hour
    python -m benchmarks.candidate table

The loop by hand is what mergenetic, mergekit-evolve on disk and the script of MM-MO are made of:
for each candidate, `mergekit-yaml` writes a checkpoint, and `lm_eval` loads and scores it. Ours
merges in the memory of one process. Both score the same merges of the experts of SmolLM2-135M on
the same examples, on one thread, one after the other. The adapters are folded into whole models
before.

`lm_eval` prints no times: its loading is a run with one example of each task. Our loading happens
once in a search, and is not of a candidate.

The second table has the harness's own `hf` model and ours on the same written answers: medians of
three rounds in turns, both warm.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.merge import find_mergekit, measure
from benchmarks.reporting import (
    REPOSITORY,
    RESULTS,
    Entry,
    append_entry,
    documented_parser,
    markdown_table,
    read_entries,
)

EXAMPLE = REPOSITORY / "examples" / "smollm"
FILE = RESULTS / "candidate.jsonl"
TASKS = ("smollm_arithmetic", "smollm_french", "smollm_extraction")
EXPERTS = ("arithmetic", "french", "extraction")
N_EXAMPLES = 40
BATCH_SIZE = 64
ROUNDS = 3
PARTS = ("propose", "merge", "load", "evaluate")
PYTHON = [sys.executable, "-m"]


def write_models(folder: Path) -> None:
    """Fold each adapter into a whole model, so that both loops start from the same files."""
    # In a process of its own: a child's peak memory starts at that of the one which starts it.
    file = folder / "fold.yml"
    for expert in EXPERTS:
        name = f"{EXAMPLE / 'models' / 'base'}+{EXAMPLE / 'adapters' / expert}"
        recipe = {"merge_method": "passthrough", "models": [{"model": name}]}
        file.write_text(yaml.safe_dump(recipe))
        measure([*PYTHON, "paretomerge", "merge", str(file), str(folder / expert)])


def write_study(folder: Path) -> Path:
    """The study of the example, on held-out examples: those that `lm_eval` takes first."""
    study = yaml.safe_load((EXAMPLE / "study.yaml").read_text())
    study["base"] = str(EXAMPLE / "models" / "base")
    study["models"] = [str(folder / expert) for expert in EXPERTS]
    study["watch"] = []
    study["evaluate"] |= {
        "include_path": str(EXAMPLE / "tasks"),
        "data_root": str(EXAMPLE),
        "splits": {"search": "held_out", "held_out": "search"},
        "search_items": N_EXAMPLES,
        "held_out_items": 1,
        "batch_size": BATCH_SIZE,
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(study))
    return path


def ours(folder: Path, n_merges: int) -> tuple[dict[str, float], list[Any]]:
    """Search, and give the mean seconds of the last merges, and their trials."""
    from paretomerge.study.study import load_study

    path = write_study(folder)
    n_sources = len(EXPERTS)
    command = [*PYTHON, "paretomerge", "search", str(path), "--quiet"]
    run = measure([*command, "--trials", str(n_sources + n_merges)])
    trials = load_study(path).results().trials[n_sources:]

    def mean(part: str) -> float:
        return statistics.mean(trial.seconds[part] for trial in trials)

    figures = {
        "propose": mean("ask"),
        "merge": mean("merge"),
        "load": 0.0,
        "evaluate": mean("evaluate"),
        "rss": run["rss"],
        "written": 0.0,
    }
    return figures, list(trials)


def by_hand(folder: Path, trials: Sequence[Any], mergekit: Path) -> dict[str, float]:
    """mergekit to disk, then lm_eval on the folder; mean seconds over the merges."""
    runs = []
    for trial in trials:
        recipe = folder / "recipe.yml"
        recipe.write_text(trial.recipe.to_yaml())
        out = folder / "merged"
        merged = measure([str(mergekit), str(recipe), str(out)])
        written = sum(file.stat().st_size for file in out.iterdir())
        started = measure(lm_eval(out, folder / "few", 1))
        scored = measure(lm_eval(out, folder / "scores", N_EXAMPLES))
        check_scores(trial, folder / "scores")
        shutil.rmtree(out)
        runs.append(
            {
                "merge": merged["wall"],
                "load": started["wall"],
                "evaluate": scored["wall"] - started["wall"],
                "propose": 0.0,
                "rss": max(merged["rss"], scored["rss"]),
                "written": written / 1e6,
            }
        )
    return {key: statistics.mean(run[key] for run in runs) for key in runs[0]}


def lm_eval(model: Path, out: Path, limit: int) -> list[str]:
    """The harness's command line on a folder."""
    arguments = {
        "--model": "hf",
        "--model_args": f"pretrained={model},dtype=float32",
        "--tasks": ",".join(TASKS),
        "--include_path": str(EXAMPLE / "tasks"),
        "--batch_size": str(BATCH_SIZE),
        "--limit": str(limit),
        "--device": "cpu",
        "--output_path": str(out),
    }
    command = ["env", "-C", str(EXAMPLE), *PYTHON, "lm_eval", "--apply_chat_template"]
    for name, value in arguments.items():
        command += [name, value]
    return command


def check_scores(trial: Any, out: Path) -> None:
    """Say where the two loops' scores differ, and forget the harness's file."""
    (file,) = out.rglob("results_*.json")
    results = json.loads(file.read_text())["results"]
    file.unlink()
    for task in TASKS:
        theirs, our = results[task]["acc,none"], trial.scores[task].value
        if abs(theirs - our) > 1e-9:
            print(f"{task}: by hand {theirs:.4f}, ours {our:.4f}", flush=True)


def generation(folder: Path) -> dict[str, float]:
    """Task -> how many times as many examples per second as the harness's own model.

    The expert of each task answers.
    """
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from paretomerge.evaluate.inference.language_model import ResidentLM
    from paretomerge.evaluate.tasks import HarnessTask, Prompts, TaskLoader

    torch.set_num_threads(1)
    base = EXAMPLE / "models" / "base"
    tokenizer = AutoTokenizer.from_pretrained(base)
    splits = {"search": "search", "held_out": "held_out"}
    loader = TaskLoader(
        EXAMPLE / "tasks", EXAMPLE, splits, N_EXAMPLES, tokenizer=str(base)
    )
    ratios = {}
    for expert, task in zip(EXPERTS, TASKS, strict=True):
        model = AutoModelForCausalLM.from_pretrained(
            folder / expert, dtype=torch.float32
        ).eval()
        theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH_SIZE)
        our = ResidentLM(model, tokenizer, BATCH_SIZE)
        spec = HarnessTask(task, prompts=Prompts(apply_chat_template=True))
        loader.check({task: spec})
        examples = loader.load(task, spec, "search")
        requests = [instance for group in examples.requests for instance in group]
        seconds: dict[str, list[float]] = {"theirs": [], "ours": []}
        for _ in range(ROUNDS):
            answers = []
            for name, lm in (("theirs", theirs), ("ours", our)):
                since = time.perf_counter()
                answers.append(lm.generate_until(requests, disable_tqdm=True))
                seconds[name].append(time.perf_counter() - since)
            differing = sum(a != b for a, b in zip(*answers, strict=True))
            if differing:
                print(f"{task}: {differing} of {len(requests)} answers differ")
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        ratios[task] = medians["theirs"] / medians["ours"]
    return ratios


def run(mergekit: Path, n_merges: int) -> None:
    """Measure both loops, then generation, and add what was found to the results."""
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_models(folder)
        our, trials = ours(folder, n_merges)
        theirs = by_hand(folder, trials, mergekit)
        speeds = generation(folder)
    entry = {"n": n_merges, "ours": our, "by hand": theirs, "generation": speeds}
    append_entry(FILE, entry)
    print(tables(entry))


def tables(entry: Entry) -> str:
    """Seconds per candidate, and examples per second beside the harness's model."""
    rows = []
    totals = {}
    for name in ("by hand", "ours"):
        figures = entry[name]
        parts = [figures[part] for part in PARTS]
        totals[name] = sum(parts)
        cells = [f"{value:.1f}" for value in (*parts, totals[name])]
        cells += [f"{figures['rss'] / 1024:.1f}", f"{figures['written']:.0f}"]
        rows.append([name, *cells])
    ratio = totals["by hand"] / totals["ours"]
    rows.append(["ratio", *[""] * len(PARTS), f"{ratio:.1f}", "", ""])
    header = ["", *(f"{part}, s" for part in PARTS), "in all, s"]
    header += ["peak memory, GiB", "written, MB"]
    speeds: Mapping[str, float] = entry["generation"]
    answers = [[task, f"{ratio:.2f}"] for task, ratio in speeds.items()]
    return "\n\n".join(
        [
            markdown_table(header, rows),
            markdown_table(["", "times as fast as `hf`"], answers),
        ]
    )


def main() -> None:
    """Measure, or print the tables."""
    parser = documented_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run")
    running.add_argument("--mergekit", type=Path, help="an environment with mergekit")
    running.add_argument("--merges", type=int, default=3)
    commands.add_parser("table")
    arguments: argparse.Namespace = parser.parse_args()
    if arguments.command == "table":
        print(tables(read_entries(FILE)[-1]))
        return
    mergekit = find_mergekit(arguments.mergekit)
    if mergekit is None:
        parser.error("no mergekit was found; name its environment with --mergekit")
    run(mergekit, arguments.merges)


if __name__ == "__main__":
    main()
