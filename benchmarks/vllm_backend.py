"""docs/lab/vllm.md: a search whose candidates are scored by one vLLM engine.

    python -m benchmarks.vllm_backend search --python /path/to/vllm-env/bin/python
    python -m benchmarks.vllm_backend turns --python /path/to/vllm-env/bin/python
    python -m benchmarks.vllm_backend table

The study of `examples/smollm` (its base must be built: `make smollm`) is searched with vLLM in
place of the model in memory. Then transformers scores the same merges on the same examples, and
every example's score is compared. A second part perturbs the base a little, four times, and shows
how far the log-probabilities of the fixed prompt are from those of transformers, and how far a
perturbation moves them. `turns` times both engines on some merges, one after the other, in seconds
of the processor, so that other work on the machine counts less.
"""

import argparse
import os
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.reporting import (
    REPOSITORY,
    RESULTS,
    Entry,
    append_entry,
    documented_parser,
    markdown_table,
    read_entries,
)
from paretomerge.evaluate.evaluator import Candidate, evaluators_in
from paretomerge.evaluate.harness import HarnessEvaluator
from paretomerge.evaluate.vllm.backend import VLLMBackend
from paretomerge.evaluate.vllm.probe import probe

EXAMPLE = REPOSITORY / "examples" / "smollm"
BASE = EXAMPLE / "models" / "base"
FILE = RESULTS / "vllm.jsonl"
ENGINE = {"max_model_len": 512, "enforce_eager": True}
N_PERTURBATIONS = 4
DTYPES = ("float32", "bfloat16")


def write_study(folder: Path, python: str) -> Path:
    """The study of the example with vLLM, fewer held-out examples and a cheaper sampler."""
    study = yaml.safe_load((EXAMPLE / "study.yaml").read_text())
    study["base"] = str(BASE)
    adapters = EXAMPLE / "adapters"
    experts = ("arithmetic", "french", "extraction")
    study["models"] = [f"{BASE}+{adapters / expert}" for expert in experts]
    study["watch"] = []
    study["sampler"] = "qmc"
    study["out"] = str(folder / "run")
    study["evaluate"] |= {
        "include_path": str(EXAMPLE / "tasks"),
        "data_root": str(EXAMPLE),
        "held_out_items": 20,
        "backend": {"name": "vllm", "python": python, **ENGINE},
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(study))
    return path


def search(python: str, n_trials: int) -> Entry:
    """Search with vLLM, score the same merges with transformers, and compare."""
    from paretomerge.study.build import build_search
    from paretomerge.study.study import load_study

    with tempfile.TemporaryDirectory() as temporary:
        path = write_study(Path(temporary), python)
        settings = load_study(path).settings
        there = build_search(settings, with_models=True)
        backend = backend_of(there)
        swaps = []
        there.run(n_trials, lambda event: swaps.append(backend.seconds.get("swap")))
        trials = there.trials()
        start = backend.seconds["start"]
        entry: Entry = {
            "start": start,
            "starts": backend.n_starts,
            "failed": sum(bool(trial.failure) for trial in trials),
            "trials": [],
        }
        backend.close()
        study = yaml.safe_load(path.read_text())
        del study["evaluate"]["backend"]
        path.write_text(yaml.safe_dump(study | {"out": str(Path(temporary) / "here")}))
        here = build_search(load_study(path).settings)
        for trial, swap in zip(trials, swaps, strict=True):
            candidate = here.load(trial)
            since = time.perf_counter()
            scores = here.score(candidate, "search")
            seconds = time.perf_counter() - since
            equal, total, differences = 0, 0, {}
            for name, score in scores.items():
                pairs = zip(
                    score.example_scores or (),
                    trial.scores[name].example_scores or (),
                    strict=True,
                )
                same = [ours == theirs for ours, theirs in pairs]
                equal += sum(same)
                total += len(same)
                differences[name] = trial.scores[name].value - score.value
            row: dict[str, Any] = {
                "label": trial.label,
                "vllm": trial.seconds["evaluate"],
                "swap": swap,
                "transformers": seconds,
                "equal": equal,
                "examples": total,
                "differences": differences,
            }
            entry["trials"].append(row)
            print(row, flush=True)
    return entry


def turns(python: str, n_merges: int) -> list[dict[str, float]]:
    """Processor seconds of each merge: to swap it, and to score it with either engine."""
    from paretomerge.study.build import build_search
    from paretomerge.study.study import load_study

    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        path = write_study(Path(temporary), python)
        there = build_search(load_study(path).settings, with_models=True)
        study = yaml.safe_load(path.read_text())
        del study["evaluate"]["backend"]
        path.write_text(yaml.safe_dump(study | {"out": str(Path(temporary) / "here")}))
        here = build_search(load_study(path).settings)
        backend = backend_of(there)
        level = here.first_level
        for params in list(here.space.baselines().values())[: n_merges + 1]:
            candidate = level.load(level.recipe(params))
            marks = [seconds_used(backend)]
            with backend.load(candidate, 1):
                marks.append(seconds_used(backend))
            there.score(candidate, "search")
            marks.append(seconds_used(backend))
            here.score(candidate, "search")
            marks.append(seconds_used(backend))
            parts = [after - before for before, after in pairwise(marks)]
            row = dict(zip(("swap", "vllm", "transformers"), parts, strict=True))
            print(row, flush=True)
            rows.append(row)
        backend.close()
    # The first row is the engine's start.
    return rows


def backend_of(search: Any) -> VLLMBackend:
    """The backend of a study's tasks."""
    (harness, *_) = evaluators_in(search.goals.evaluator)
    assert isinstance(harness, HarnessEvaluator)
    assert isinstance(harness._backend, VLLMBackend)
    return harness._backend


def seconds_used(backend: VLLMBackend) -> float:
    """Processor seconds of this process and of vLLM's, so far."""
    total = time.process_time()
    assert backend._worker is not None
    ticks = os.sysconf("SC_CLK_TCK")
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            # It has ended in the meantime.
            continue
        # The group, and the seconds in the program and in the kernel; see proc(5).
        if int(fields[2]) == backend._worker.pid:
            total += (int(fields[11]) + int(fields[12])) / ticks
    return total


def probes(python: str) -> dict[str, list[dict[str, float]]]:
    """Distances of the fixed prompt's log-probabilities, by dtype."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    distances: dict[str, list[dict[str, float]]] = {}
    for dtype in DTYPES:
        model = AutoModelForCausalLM.from_pretrained(BASE, dtype=getattr(torch, dtype))
        model.eval()
        backend = VLLMBackend(ENGINE, python=python)
        generator = torch.Generator().manual_seed(0)
        rows = []
        before = None
        for i in range(N_PERTURBATIONS + 1):
            candidate = Candidate(model, tokenizer, {})
            with backend.load(candidate, 1) as engine:
                reference = probe(candidate, 64)
                tokens = reference.tokens
                continuation = (None, tokens[:1], tokens[1:])
                ((log_likelihood, _),) = engine._loglikelihood_tokens([continuation])
            assert backend._engine is not None and backend._engine.answer is not None
            row = {
                "engines": reference.difference(backend._engine.answer),
                "sum": abs(log_likelihood - sum(reference.log_probabilities)),
            }
            if before is not None:
                row["moved"] = before.difference(reference.log_probabilities)
            rows.append(row)
            before = reference
            # The engine holds its copy until the next candidate is loaded.
            perturb(model, 6 * i, generator)
        backend.close()
        distances[dtype] = rows
        print(dtype, rows, flush=True)
    return distances


@torch.no_grad()
def perturb(model: Any, layer: int, generator: torch.Generator) -> None:
    """Add noise of a twentieth of its standard deviation to each matrix of a layer."""
    for tensor in model.model.layers[layer].parameters():
        if tensor.ndim == 2:
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.add_((0.05 * tensor.float().std() * noise).to(tensor.dtype))


def tables() -> str:
    """Seconds per candidate and equal scores; distances of log-probabilities."""
    searched = latest("trials")
    start, *swapped = latest("turns")["turns"]
    swap, vllm, here = (
        statistics.median(row[part] for row in swapped)
        for part in ("swap", "vllm", "transformers")
    )
    lines = []
    for name, load, score in (
        ("vLLM, an engine for each candidate", start["swap"], vllm),
        ("vLLM, weights replaced", swap, vllm),
        ("transformers, the model in memory", 0.0, here),
    ):
        cells = [f"{value:.1f}" for value in (load, score, load + score)]
        lines.append([name, *cells])
    header = ["", "load, s", "evaluate, s", "in all, s"]
    distances = []
    for dtype, probed in searched["probes"].items():
        largest = max(row["engines"] for row in probed)
        moved = [row["moved"] for row in probed if "moved" in row]
        distances.append([dtype, f"{largest:.1g}", f"{min(moved):.2f}"])
    columns = ["weights", "vLLM from transformers, at most"]
    columns.append("a perturbed layer from the model before, at least")
    return "\n\n".join(
        [
            markdown_table(header, lines),
            score_line(searched),
            markdown_table(columns, distances),
        ]
    )


def score_line(searched: Entry) -> str:
    """How many scores are equal."""
    trials = searched["trials"]
    equal = sum(trial["equal"] for trial in trials)
    examples = sum(trial["examples"] for trial in trials)
    swaps = [trial["swap"] for trial in trials if trial["swap"] is not None]
    return (
        f"{equal} of {examples} scores of {len(trials)} merges are equal. Engines started: "
        f"{searched['starts']}; failed trials: {searched['failed']}; wall-clock seconds of a "
        f"swap: {statistics.median(swaps):.1f}."
    )


def latest(part: str) -> Any:
    """The latest entry of the results with a part."""
    return [entry for entry in read_entries(FILE) if part in entry][-1]


def main() -> None:
    """Measure, or print the tables."""
    parser = documented_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, n_merges in (("search", 7), ("turns", 3)):
        running = commands.add_parser(name)
        running.add_argument("--python", required=True, help="vLLM's interpreter")
        running.add_argument("--merges", type=int, default=n_merges)
    commands.add_parser("table")
    arguments: argparse.Namespace = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.command == "search":
        entry = search(arguments.python, arguments.merges)
        entry["probes"] = probes(arguments.python)
        append_entry(FILE, entry)
    elif arguments.command == "turns":
        append_entry(FILE, {"turns": turns(arguments.python, arguments.merges)})
    else:
        print(tables())


if __name__ == "__main__":
    main()
