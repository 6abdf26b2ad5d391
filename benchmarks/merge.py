"""docs/lab/speed.md: merges to disk, ours and mergekit beside a floor, method by method.

    python -m benchmarks.merge run --methods linear,ties      # 4 GB in the temporary folder
    python -m benchmarks.merge run --size 2 --workers 1,2 --mergekit /path/to/venv --write
    python -m benchmarks.merge table                          # from benchmarks/results/

Every run is a fresh process with its inputs in the page cache and its output deleted afterwards;
floor, ours and mergekit follow each other. `--workers` sets OMP_NUM_THREADS, and ours takes it as
the number of its processes; `benchmarks.merge_processes` compares one process with several. The
floor reads the recipe's models, sums in float32 and writes one file. CPU is user and system time of
all processes. "Beyond files" is their peak of anonymous and shared memory together, which mapped
inputs do not count for.
"""

# No torch here: a child's peak RSS starts at that of the process which started it.
import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.reporting import (
    RESULTS,
    Entry,
    append_entry,
    documented_parser,
    markdown_row,
    markdown_table,
    read_entries,
)

FILE = RESULTS / "merge.jsonl"
MODELS = ("base", "a", "b", "c")
SIZES = ("0.5", "2")
OURS = str(Path(sys.executable).with_name("paretomerge"))
WORKLOADS = [sys.executable, "-m", "benchmarks.workloads"]
PARTS = ("start", "in-place", "merge")

Run = dict[str, Any]
"""Figures of one process; `failed` alone where it failed."""

Runs = Mapping[str, Sequence[Run]]
"""Tool -> its runs."""

Group = dict[tuple[str, str], Entry]
"""Part and name -> entry, of one size and number of threads."""


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Attributes:
        heading: its name.
        form: format of its numbers.
        tool: whose figure it shows.
        figure: `cpu` and `wall` in seconds, `beyond` and `rss` in MiB.
        over: the tool by whose figure it is divided.
    """

    heading: str
    form: str
    tool: str
    figure: str
    over: str = ""


COLUMNS = (
    Column("CPU s, floor", ".1f", "floor", "cpu"),
    Column("ours", ".1f", "ours", "cpu"),
    Column("mergekit", ".1f", "mergekit", "cpu"),
    Column("ours / mergekit", ".3f", "ours", "cpu", over="mergekit"),
    Column("wall s, floor", ".1f", "floor", "wall"),
    Column("ours", ".1f", "ours", "wall"),
    Column("mergekit", ".1f", "mergekit", "wall"),
    Column("ours / floor", ".2f", "ours", "wall", over="floor"),
    Column("beyond files, ours", ".0f", "ours", "beyond"),
    Column("mergekit", ".0f", "mergekit", "beyond"),
    Column("peak RSS, ours", ".0f", "ours", "rss"),
    Column("mergekit", ".0f", "mergekit", "rss"),
)


@dataclass(frozen=True)
class Workload:
    """What one method merges.

    Attributes:
        models: names of the models that are merged.
        each: parameters of each model.
        options: parameters of the whole.
        base: the base model; empty: none.
    """

    models: Sequence[str]
    each: Mapping[str, float]
    options: Mapping[str, float]
    base: str = "base"


METHODS = {
    "linear": Workload(MODELS, {"weight": 1.0}, {}, base=""),
    "task_arithmetic": Workload("abc", {"weight": 0.4}, {}),
    "slerp": Workload("ab", {}, {"t": 0.5}, base="a"),
    "nuslerp": Workload("ab", {"weight": 0.5}, {}),
    "multislerp": Workload("abc", {"weight": 1.0}, {}),
    "karcher": Workload(MODELS, {}, {}, base=""),
    "ties": Workload("abc", {"weight": 1.0, "density": 0.2}, {}),
    "dare_linear": Workload("abc", {"weight": 0.4, "density": 0.5}, {}),
    "dare_ties": Workload("abc", {"weight": 0.4, "density": 0.5}, {}),
    "della": Workload("abc", {"weight": 0.4, "density": 0.5, "epsilon": 0.15}, {}),
    "della_linear": Workload(
        "abc", {"weight": 0.4, "density": 0.5, "epsilon": 0.15}, {}
    ),
    "breadcrumbs": Workload("abc", {"weight": 0.4, "density": 0.9, "gamma": 0.01}, {}),
    "breadcrumbs_ties": Workload(
        "abc", {"weight": 0.4, "density": 0.9, "gamma": 0.01}, {}
    ),
    "sce": Workload("abc", {}, {"select_topk": 0.2}),
    "model_stock": Workload("abc", {}, {}),
    "passthrough": Workload("a", {"scale": 1.1}, {}, base=""),
}
"""Row of the table -> what is merged."""


def recipe(method: str, folder: Path, dtype: str) -> tuple[str, list[Path]]:
    """The recipe as YAML (JSON is YAML) that both tools read, and the models that it reads."""
    workload = METHODS[method]
    models = [folder / name for name in workload.models]
    entries = []
    for model in models:
        entry: dict[str, object] = {"model": str(model)}
        if workload.each:
            entry["parameters"] = workload.each
        entries.append(entry)
    content: dict[str, object] = {
        "merge_method": method,
        "models": entries,
        "dtype": dtype,
        "out_dtype": "bfloat16",
    }
    if workload.options:
        content["parameters"] = workload.options
    if workload.base:
        base = folder / workload.base
        content["base_model"] = str(base)
        models = list(dict.fromkeys([base, *models]))
    return json.dumps(content, indent=1), models


# ----- processes


def measure(command: list[str], threads: int = 1) -> Run:
    """Run one process to its end: CPU and wall seconds, peak MiB; or its exit status."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(threads),
    }
    with tempfile.TemporaryFile() as log:
        start = time.perf_counter()
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        watcher = MemoryWatcher(process.pid)
        watcher.start()
        _, status, used = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        watcher.join()
        log.seek(0)
        lines = log.read().decode(errors="replace").strip().splitlines()
    if process.returncode:
        # The output may name folders, so that it is not for the record.
        reason = lines[-1] if lines else "no output"
        print(f"{' '.join(command)}: {reason}", file=sys.stderr)
        return {"failed": process.returncode}
    return {
        "cpu": round(used.ru_utime + used.ru_stime, 3),
        "wall": round(wall, 3),
        "rss": round(used.ru_maxrss / 1024, 3),
        "beyond": round(watcher.peak / 1024, 3),
    }


class MemoryWatcher(threading.Thread):
    """Watches the memory beyond files of a process and its children, at 20 Hz.

    Attributes:
        peak: the most KiB of anonymous and shared memory that they held.
    """

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._pid = pid
        self.peak = 0

    def run(self) -> None:
        """Watch until the process ends."""
        while Path(f"/proc/{self._pid}").exists():
            current = sum(beyond_files(pid) for pid in with_children(self._pid))
            self.peak = max(self.peak, current)
            time.sleep(0.05)


def with_children(pid: int) -> Iterator[int]:
    """The process and its descendants."""
    yield pid
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield from with_children(int(child))


def beyond_files(pid: int) -> int:
    """KiB of anonymous and shared memory of one process."""
    total = 0
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(("RssAnon:", "RssShmem:")):
                total += int(line.split()[1])
    return total


def read_once(models: Iterable[Path]) -> None:
    """Read the files, so that they are in the page cache."""
    buffer = bytearray(1 << 24)
    for model in models:
        with (model / "model.safetensors").open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


# ----- what is measured


@dataclass(frozen=True)
class Setup:
    """What the parts need of the command line.

    Attributes:
        size: billions of parameters.
        folder: of the four checkpoints.
        dtype: of the recipes.
        repeat: runs of each tool.
        mergekit: path of `mergekit-yaml`; None: it is left out.
    """

    size: str
    folder: Path
    dtype: str
    repeat: int
    mergekit: Path | None


def make_models(folder: Path, size: str) -> Path:
    """The folder of the four checkpoints; made once."""
    models = folder / f"{size}B"
    if not models.exists():
        print(f"making {size} B models in {models} ...", file=sys.stderr)
        with tempfile.TemporaryDirectory(dir=folder) as partial:
            subprocess.run([*WORKLOADS, "make", f"{partial}/models", size], check=True)
            Path(partial, "models").rename(models)
    return models


def commands(
    setup: Setup, threads: int, recipe_file: Path, out: Path, models: list[Path]
) -> dict[str, list[str]]:
    """The command line of each tool.

    mergekit keeps those of its defaults that are fast (no accelerator, tensors in memory), and
    skips what ours does not write.
    """
    files = [str(recipe_file), str(out)]
    lines = {
        "floor": [*WORKLOADS, "floor", str(out), *map(str, models)],
        "ours": [OURS, "merge", *files, "--workers", str(threads)],
    }
    if setup.mergekit:
        options = ["--random-seed", "0", "--quiet", "--no-low-cpu-memory"]
        options += ["--no-copy-tokenizer", "--no-write-model-card"]
        lines["mergekit"] = [str(setup.mergekit), *options, *files]
    return lines


def compare(method: str, threads: int, setup: Setup) -> dict[str, list[Run]]:
    """Each tool's runs of one method, paired."""
    runs: dict[str, list[Run]] = {}
    with tempfile.TemporaryDirectory(dir=setup.folder.parent) as folder:
        recipe_file = Path(folder) / "recipe.yml"
        out = Path(folder) / "out"
        text, models = recipe(method, setup.folder, setup.dtype)
        recipe_file.write_text(text)
        for _ in range(setup.repeat):
            for tool, command in commands(
                setup, threads, recipe_file, out, models
            ).items():
                read_once(models)
                run = measure(command, threads)
                written = sum(file.stat().st_size for file in out.glob("*.safetensors"))
                run["MB written"] = written // 10**6
                shutil.rmtree(out, ignore_errors=True)
                runs.setdefault(tool, []).append(run)
    return runs


def start_up(setup: Setup, repeat: int = 5) -> dict[str, dict[str, list[Run]]]:
    """Runs of commands that merge nothing."""
    with tempfile.TemporaryDirectory(dir=setup.folder.parent) as folder:
        recipe_file = Path(folder) / "recipe.yml"
        recipe_file.write_text(recipe("ties", setup.folder, setup.dtype)[0])
        command_lines = {
            "paretomerge --help": [OURS, "--help"],
            "paretomerge plan recipe.yml": [OURS, "plan", str(recipe_file)],
        }
        runs = {}
        for name, command in command_lines.items():
            runs[name] = {"ours": [measure(command) for _ in range(repeat)]}
        return runs


def in_place(threads: int, setup: Setup) -> dict[str, dict[str, float]]:
    """Seconds of warm merges and of copying the same bytes, per set of tensors."""
    models = [str(setup.folder / name) for name in MODELS]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [*WORKLOADS, "in-place", str(threads), *models]
    result = subprocess.run(
        command, env=environment, check=True, stdout=subprocess.PIPE
    )
    return dict(json.loads(result.stdout))


def facts(threads: int, setup: Setup) -> dict[str, object]:
    """What the numbers depend on; no names of machines or folders."""
    cpu = "?"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if "model name" in line:
            cpu = line.split(":")[1].strip()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    about: dict[str, object] = {
        "parameters": f"{setup.size} B",
        "threads": threads,
        "dtype": setup.dtype,
        "cores": os.cpu_count(),
        "CPU": cpu,
        "memory": f"{memory:.0f} GiB",
        "python": sys.version.split()[0],
        "torch": version("torch"),
    }
    if setup.mergekit:
        about["mergekit"] = mergekit_version(setup.mergekit)
    return about


def mergekit_version(mergekit: Path) -> str:
    """Versions of mergekit and of its torch."""
    code = (
        "from importlib.metadata import version as v; "
        "print(v('mergekit'), 'with torch', v('torch'))"
    )
    command = [str(mergekit.with_name("python")), "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return result.stdout.strip()


def run(
    threads: int, parts: Sequence[str], methods: Sequence[str], setup: Setup
) -> list[Entry]:
    """Measure all parts under one number of threads; one entry per line of the report."""
    key = {"size": setup.size, "threads": threads}
    entries: list[Entry] = [{**key, "part": "facts", "facts": facts(threads, setup)}]
    if "start" in parts:
        for name, runs in start_up(setup).items():
            entries.append({**key, "part": "start-up", "name": name, "runs": runs})
    if "in-place" in parts:
        for name, seconds in in_place(threads, setup).items():
            entries.append(
                {**key, "part": "in place", "name": name, "seconds": seconds}
            )
    for method in methods if "merge" in parts else ():
        tool_runs = compare(method, threads, setup)
        entries.append({**key, "part": "method", "name": method, "runs": tool_runs})
        print(markdown_row(row(method, tool_runs)), file=sys.stderr, flush=True)
    return entries


# ----- the report


def report(entries: Sequence[Entry]) -> str:
    """The figures of docs/lab/speed.md, one block per size and number of threads.

    Where a part was measured several times, the last one counts.
    """
    groups: dict[tuple[str, int], Group] = {}
    for entry in entries:
        key = (entry["size"], entry["threads"])
        group = groups.setdefault(key, {})
        group[entry["part"], entry.get("name", "")] = entry
    return "\n\n".join(report_group(group) for group in groups.values())


def report_group(group: Group) -> str:
    """The figures of one size and number of threads."""
    about = group["facts", ""]["facts"]
    texts = [f"{name}: {value}" for name, value in about.items()]
    blocks = [", ".join(texts)]
    rows = []
    for name in METHODS:
        if ("method", name) in group:
            entry = group["method", name]
            rows.append(row(name, entry["runs"]))
    if rows:
        header = ["method", *(column.heading for column in COLUMNS)]
        blocks.append(markdown_table(header, rows))
    for (part, name), entry in group.items():
        if part == "start-up":
            wall = cell(entry["runs"], Column("", ".2f", "ours", "wall"))
            cpu = cell(entry["runs"], Column("", ".2f", "ours", "cpu"))
            blocks.append(f"`{name}`: {wall} s wall, {cpu} s CPU")
        elif part == "in place":
            blocks.append(
                f"in place, {name}, 3 sources, bfloat16: {ratios(entry['seconds'])}"
            )
    return "\n\n".join(blocks)


def row(method: str, runs: Runs) -> list[str]:
    """A method's row of the table."""
    return [method, *(cell(runs, column) for column in COLUMNS)]


def cell(runs: Runs, column: Column) -> str:
    """The median of a tool's runs, or of its ratios to another's; a dash where all failed."""
    figure = column.figure
    values = []
    ours = runs.get(column.tool, [])
    others = runs.get(column.over or column.tool, [])
    for run, other in zip(ours, others, strict=False):
        if figure in run and figure in other:
            divisor = other[figure] if column.over else 1
            values.append(run[figure] / divisor)
    if not values:
        return "–"
    return f"{statistics.median(values):{column.form}}"


def ratios(seconds: Mapping[str, float]) -> str:
    """Milliseconds of each piece of work, and how many copies that is."""
    texts = []
    for name, value in seconds.items():
        copies = value / seconds["copy"]
        texts.append(f"{name} {1000 * value:.1f} ms ({copies:.2f} x copy)")
    return ", ".join(texts)


# ----- the command


def find_mergekit(path: Path | None) -> Path | None:
    """`mergekit-yaml` of a virtual environment, its python or itself.

    Without a path, beside this python or on the PATH.
    """
    place = path or Path(sys.executable)
    beside = place / "bin" if place.is_dir() else place.parent
    executable = shutil.which("mergekit-yaml", path=str(beside))
    if executable is None and path is None:
        executable = shutil.which("mergekit-yaml")
    if executable is None and path is not None:
        raise SystemExit(
            f"--mergekit: {path} has no mergekit-yaml; give its virtual environment"
        )
    return Path(executable) if executable else None


def comma_separated(text: str) -> list[str]:
    """`a,b` -> a and b."""
    return text.split(",")


def comma_separated_numbers(text: str) -> list[int]:
    """`1,2` -> 1 and 2."""
    return [int(number) for number in text.split(",")]


def parse_arguments() -> argparse.Namespace:
    """The command line, as this module's docstring has it."""
    parser = documented_parser(__doc__)
    subcommands = parser.add_subparsers(dest="command", required=True)
    subcommands.add_parser("table")
    running = subcommands.add_parser("run")
    add = running.add_argument
    add("--size", choices=SIZES, default="0.5", help="billions of parameters")
    add(
        "--methods",
        type=comma_separated,
        default=list(METHODS),
        help="linear,ties,... (all)",
    )
    add("--workers", type=comma_separated_numbers, default=[1])
    add("--repeat", type=int, default=1)
    add(
        "--dtype",
        choices=["bfloat16", "float32"],
        default="bfloat16",
        help="mergekit computes in it; ours in float32",
    )
    add("--mergekit", type=Path, help="its virtual environment, or the python of that")
    add("--no-mergekit", action="store_true")
    models = Path(tempfile.gettempdir()) / "pm-bench"
    add("--models", type=Path, default=models, help="folder of the inputs")
    add(
        "--parts",
        type=comma_separated,
        default=PARTS,
        help=f"some of {','.join(PARTS)}",
    )
    add("--write", action="store_true", help="add the figures to benchmarks/results/")
    arguments = parser.parse_args()
    if arguments.command == "run":
        unknown = set(arguments.methods).difference(METHODS)
        unknown |= set(arguments.parts).difference(PARTS)
        if unknown:
            running.error(
                f"expected methods among {', '.join(METHODS)} and parts among {', '.join(PARTS)}, "
                f"got {', '.join(sorted(unknown))}"
            )
    return arguments


def main() -> None:
    """Measure, or print the report of what was measured."""
    arguments = parse_arguments()
    if arguments.command == "table":
        print(report(read_entries(FILE)))
        return
    arguments.models.mkdir(parents=True, exist_ok=True)
    setup = Setup(
        size=arguments.size,
        folder=make_models(arguments.models, arguments.size),
        dtype=arguments.dtype,
        repeat=arguments.repeat,
        mergekit=None if arguments.no_mergekit else find_mergekit(arguments.mergekit),
    )
    for threads in arguments.workers:
        entries = run(threads, arguments.parts, arguments.methods, setup)
        print(report(entries) + "\n")
        if arguments.write:
            for entry in entries:
                append_entry(FILE, entry)


if __name__ == "__main__":
    main()
