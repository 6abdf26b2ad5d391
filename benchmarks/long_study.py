"""docs/lab/long-studies.md: what 2,000 trials cost beside their evaluation.

    python -m benchmarks.long_study run FOLDER           # half an hour on one core
    python -m benchmarks.long_study table

A study as users have it, with its record in a SQLite file: three fine-tunes of a tiny Llama, three
objectives of 200 examples each. The models answer no question: an example is right by chance, and
the chance falls with the distance of the merge to the task's expert. So a trial costs its
bookkeeping and little else.

The random sampler makes 2,000 trials in one process. Copies of the record at 100, 500, 1,000 and
2,000 trials are then opened by commands, and continued by MM-MO.
"""

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.reporting import (
    REPOSITORY,
    RESULTS,
    Entry,
    append_entry,
    documented_parser,
    markdown_table,
    read_entries,
)
from benchmarks.study_api import continued_trials
from paretomerge.evaluate.evaluator import Score
from paretomerge.study.event import Event
from paretomerge.types import Array

FILE = RESULTS / "long_study.jsonl"
SIZES = (100, 500, 1000, 2000)
WINDOW = 50  # trials whose median seconds are shown
N_EXAMPLES = 200
EXPERTS = ("first", "second", "third")
COMMANDS = ("status", "front", "pick")
N_PROPOSALS = 5  # of MM-MO at each size

Tensors = dict[str, torch.Tensor]


# ----- the models and their scores


@cache
def states() -> dict[str, Tensors]:
    """The base and its experts, which differ from it by small normal deltas."""
    torch.manual_seed(0)
    base: Tensors = LlamaForCausalLM(_config()).state_dict()
    made = {"base": base}
    for name in EXPERTS:
        expert = {}
        for key, tensor in base.items():
            expert[key] = tensor + 0.02 * torch.randn_like(tensor)
        made[name] = expert
    return made


def _config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=8,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
        tie_word_embeddings=False,
    )


def write_models(folder: Path) -> None:
    """Write the models as checkpoints."""
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    for name, state in states().items():
        model = LlamaForCausalLM(_config())
        model.load_state_dict(state)
        model.save_pretrained(folder / name)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(
            folder / name
        )


def _vector(state: Tensors) -> torch.Tensor:
    return torch.cat([state[name].float().flatten() for name in states()["base"]])


def _score(expert: str, model: LlamaForCausalLM, tokenizer: object) -> Score:
    """Answers of the merge to the questions of one expert."""
    merged = _vector(model.state_dict())
    target = _vector(states()[expert])
    length = torch.linalg.norm(target - _vector(states()["base"]))
    distance = float(torch.linalg.norm(merged - target) / length)
    seed = EXPERTS.index(expert)
    easiness: Array = np.random.default_rng(seed).uniform(-0.3, 0.3, N_EXAMPLES)
    chance = np.exp(-(distance**2)) + easiness
    # Random, and the same whenever this merge is asked.
    luck = np.random.default_rng([seed, int(distance * 1e9)])
    return Score.mean_of(luck.random(N_EXAMPLES) < chance)


def first(model: LlamaForCausalLM, tokenizer: object) -> Score:
    """The score of the first expert's task."""
    return _score("first", model, tokenizer)


def second(model: LlamaForCausalLM, tokenizer: object) -> Score:
    """The score of the second expert's task."""
    return _score("second", model, tokenizer)


def third(model: LlamaForCausalLM, tokenizer: object) -> Score:
    """The score of the third expert's task."""
    return _score("third", model, tokenizer)


def write_study(folder: Path) -> Path:
    """Write the models and the study.yaml."""
    write_models(folder / "models")
    objectives = []
    for name in EXPERTS:
        objectives.append({"function": f"benchmarks.long_study:{name}"})
    config = {
        "base": "models/base",
        "models": [f"models/{name}" for name in EXPERTS],
        "objectives": objectives,
        "space": {"groups": 2},
        "sampler": "random",
        "trials": max(SIZES),
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


# ----- the measurements


def resident_mib() -> float:
    """Memory of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def search(folder: Path, out: Path) -> None:
    """Make all trials with the random sampler; a line of `out` for each."""
    study_file = write_study(folder)
    record = folder / "runs" / "study" / "study.db"
    since = time.process_time()

    def watch(event: Event) -> None:
        nonlocal since
        cpu = time.process_time() - since
        number = event.trial.number + 1
        entry = {"trial": number, **event.seconds, "cpu": cpu, "mib": resident_mib()}
        append_entry(out, entry)
        if number in SIZES:
            # The trial is committed, and the next one has not begun.
            shutil.copy(record, folder / f"study-{number}.db")
        since = time.process_time()

    continued_trials(study_file, (), watch)


def at_size(folder: Path, n: int, name: str = "read") -> Path:
    """The study as it was after n trials, with a record of its own."""
    out = folder / "runs" / f"{name}-{n}"
    out.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / f"study-{n}.db", out / "study.db")
    config = yaml.safe_load((folder / "study.yaml").read_text())
    path = folder / f"{name}-{n}.yaml"
    path.write_text(yaml.safe_dump(config | {"out": str(out)}))
    return path


def command_seconds(study_file: Path, command: str) -> float:
    """CPU seconds of a command of the command line, its start included."""
    arguments = [sys.executable, "-m", "paretomerge", command, str(study_file)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(arguments, check=True, capture_output=True, cwd=REPOSITORY)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def propose(study_file: Path, n: int) -> list[float]:
    """CPU seconds of MM-MO's trials after n others.

    The first fits the Gaussian processes, and loads the models.
    """
    seconds: list[float] = []
    since = time.process_time()

    def watch(event: Event) -> None:
        nonlocal since
        now = time.process_time()
        seconds.append(now - since)
        since = now

    overrides = ("sampler=mmmo", f"trials={n + N_PROPOSALS}")
    continued_trials(study_file, overrides, watch)
    return seconds


def _in_process(*arguments: object) -> str:
    """Run a part of this script in a process of its own; its output."""
    command = [sys.executable, "-m", "benchmarks.long_study", *map(str, arguments)]
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
    )
    return done.stdout


def run(folder: Path, label: str, with_proposals: bool) -> None:
    """Measure everything, and add it to the results."""
    folder.mkdir(parents=True, exist_ok=True)
    curve_file = folder / "curve.jsonl"
    curve = read_entries(curve_file)
    if len(curve) < max(SIZES):
        curve_file.unlink(missing_ok=True)
        _in_process("search", folder)
        curve = read_entries(curve_file)
    for n in SIZES:
        entry: Entry = {"label": label, "trials": n}
        window = [line for line in curve if n - WINDOW < line["trial"] <= n]
        for part in ("ask", "merge", "evaluate", "record", "cpu"):
            entry[part] = statistics.median(line[part] for line in window)
        entry["mib"] = window[-1]["mib"]
        for command in COMMANDS:
            measure = partial(command_seconds, at_size(folder, n), command)
            entry[command] = min(measure(), measure())
        entry["record_mib"] = (folder / f"study-{n}.db").stat().st_size / 2**20
        if with_proposals:
            entry["mmmo"] = json.loads(_in_process("propose", folder, n))
        append_entry(FILE, entry)
        print(entry)


# ----- the table


def tables(entries: Sequence[Entry]) -> str:
    """The published table: the latest measurement of each size, before and now."""
    latest: dict[tuple[str, int], Entry] = {}
    for entry in entries:
        latest[entry["label"], entry["trials"]] = entry
    header = ["", "trials", "CPU of a trial", "ask", "record", "memory", "`study.db`"]
    header += [*COMMANDS, "MM-MO: first trial", "next trials"]
    rows = [_row(latest[key]) for key in sorted(latest)]
    return markdown_table(header, rows)


def _row(entry: dict[str, Any]) -> list[str]:
    """One row: milliseconds of a trial, MiB, CPU seconds of commands and proposals."""
    cells = [entry["label"], f"{entry['trials']:,}"]
    for part in ("cpu", "ask", "record"):
        cells.append(f"{1000 * entry[part]:.0f} ms")
    cells += [f"{entry['mib']:.0f} MiB", f"{entry['record_mib']:.1f} MiB"]
    cells += [f"{entry[command]:.1f} s" for command in COMMANDS]
    first_trial, *others = entry["mmmo"]
    cells += [f"{first_trial:.1f} s", f"{statistics.median(others):.1f} s"]
    return cells


def main() -> None:
    """Read the arguments."""
    parser = documented_parser(__doc__)
    parser.add_argument("what", choices=("run", "table", "search", "propose"))
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("trials", type=int, nargs="?", default=0)
    parser.add_argument("--label", default="now")
    parser.add_argument("--without-proposals", action="store_true")
    arguments = parser.parse_args()
    if arguments.what == "table":
        print(tables(read_entries(FILE)))
        return
    torch.set_num_threads(1)
    folder = arguments.folder.resolve()
    if arguments.what == "search":
        search(folder, folder / "curve.jsonl")
    elif arguments.what == "propose":
        n = arguments.trials
        print(json.dumps(propose(at_size(folder, n, "proposed"), n)))
    else:
        run(folder, arguments.label, not arguments.without_proposals)


if __name__ == "__main__":
    main()
