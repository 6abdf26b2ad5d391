"""Merging to disk, measured: ours and mergekit side by side over a floor, method by method.

    python benchmarks/merge.py --methods linear,ties           # 4 GB under the system's temporary folder
    python benchmarks/merge.py --size 2 --threads 1,2 --repeat 3 --mergekit /path/to/venv --write

Every run is a fresh process under OMP_NUM_THREADS, with its inputs in the page cache and its output deleted afterwards;
floor, ours and mergekit follow each other. The floor reads the recipe's models, sums in float32 and writes one file.
CPU is user + system time. "Beyond files" is the peak of anonymous and shared memory: what mapped inputs do not count for.
"""

import argparse  # and no torch: a child's peak RSS starts at that of the process which started it
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "merge"
MODELS = ("base", "a", "b", "c")
OURS = str(Path(sys.executable).with_name("paretomerge"))
PARTS = ("start", "in-place", "merge")
# Heading, format, tool, figure, and the tool it is divided by. Memory is in MiB.
COLUMNS = (
    ("CPU s, floor", ".1f", "floor", "cpu", ""),
    ("ours", ".1f", "ours", "cpu", ""),
    ("mergekit", ".1f", "mergekit", "cpu", ""),
    ("ours / mergekit", ".3f", "ours", "cpu", "mergekit"),
    ("wall s, floor", ".1f", "floor", "wall", ""),
    ("ours", ".1f", "ours", "wall", ""),
    ("mergekit", ".1f", "mergekit", "wall", ""),
    ("ours / floor", ".2f", "ours", "wall", "floor"),
    ("beyond files, ours", ".0f", "ours", "beyond", ""),
    ("mergekit", ".0f", "mergekit", "beyond", ""),
    ("peak RSS, ours", ".0f", "ours", "rss", ""),
    ("mergekit", ".0f", "mergekit", "rss", ""),
)
BASE = {"base_model": "base"}
# Method -> fine-tunes merged (`*`: base included), parameters of each, base model and parameters of the whole.
RECIPES: dict[str, tuple[str, dict[str, float], dict[str, Any]]] = {
    "linear": ("*abc", {"weight": 1.0}, {}),
    "task_arithmetic": ("abc", {"weight": 0.4}, BASE),
    "slerp": ("ab", {}, {"base_model": "a", "t": 0.5}),
    "nuslerp": ("ab", {"weight": 0.5}, BASE),
    "multislerp": ("abc", {"weight": 1.0}, BASE),
    "karcher": ("*abc", {}, {}),
    "ties": ("abc", {"weight": 1.0, "density": 0.2}, BASE),
    "dare_linear": ("abc", {"weight": 0.4, "density": 0.5}, BASE),
    "dare_ties": ("abc", {"weight": 0.4, "density": 0.5}, BASE),
    "della": ("abc", {"weight": 0.4, "density": 0.5, "epsilon": 0.15}, BASE),
    "della_linear": ("abc", {"weight": 0.4, "density": 0.5, "epsilon": 0.15}, BASE),
    "breadcrumbs": ("abc", {"weight": 0.4, "density": 0.9, "gamma": 0.01}, BASE),
    "breadcrumbs_ties": ("abc", {"weight": 0.4, "density": 0.9, "gamma": 0.01}, BASE),
    "sce": ("abc", {}, {**BASE, "select_topk": 0.2}),
    "model_stock": ("abc", {}, BASE),
    "passthrough": ("a", {"scale": 1.1}, {}),
}


def recipe(method: str, models: Path, dtype: str) -> tuple[str, list[Path]]:
    """The recipe as YAML (JSON is YAML) that both tools read, and the models that it reads."""
    names, each, whole = RECIPES[method]
    listed = [models / ("base" if name == "*" else name) for name in names]
    options = {name: value for name, value in whole.items() if name != "base_model"}
    entries = [{"model": str(path), **({"parameters": each} if each else {})} for path in listed]
    told: dict[str, Any] = {
        "merge_method": method,
        "models": entries,
        "dtype": dtype,
        "out_dtype": "bfloat16",
    }
    if options:
        told["parameters"] = options
    if "base_model" in whole:
        base = models / whole["base_model"]
        told["base_model"] = str(base)
        listed = list(dict.fromkeys([base, *listed]))
    return json.dumps(told, indent=1), listed


def measure(command: list[str], threads: int = 1) -> dict[str, Any]:
    """Run one process to its end: CPU and wall seconds, peak MiB; or the exit status of a failure."""
    offline = {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    with tempfile.TemporaryFile() as log:
        start = time.perf_counter()
        process = subprocess.Popen(
            command,
            env={**os.environ, **offline, "OMP_NUM_THREADS": str(threads)},
            stdout=log,
            stderr=log,
        )
        peak = [0]
        poller = threading.Thread(target=watch, args=(process.pid, peak), daemon=True)
        poller.start()
        _, status, used = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        poller.join()
        log.seek(0)
        lines = log.read().decode(errors="replace").strip().splitlines()
    if process.returncode:
        print(
            f"{' '.join(command)}: {lines[-1] if lines else 'no word'}", file=sys.stderr
        )  # it may name folders: not for the record
        return {"failed": process.returncode}
    told = {
        "cpu": used.ru_utime + used.ru_stime,
        "wall": wall,
        "rss": used.ru_maxrss / 1024,
        "beyond": peak[0] / 1024,
    }
    return {name: round(value, 3) for name, value in told.items()}


def watch(pid: int, peak: list[int]) -> None:
    """Keep in `peak[0]` the most KiB of anonymous and shared memory that the process and its children held, at 20 Hz."""
    while Path(f"/proc/{pid}").exists():
        peak[0] = max(peak[0], sum(beyond_files(one) for one in family(pid)))
        time.sleep(0.05)


def family(pid: int) -> Iterable[int]:
    yield pid
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield from family(int(child))


def beyond_files(pid: int) -> int:
    with suppress(OSError):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return sum(
            int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssShmem:"))
        )
    return 0


def warm(models: Iterable[Path]) -> None:
    """Read the files once, so that they lie in the page cache."""
    buffer = bytearray(1 << 24)
    for model in models:
        with (model / "model.safetensors").open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def inputs(folder: Path, size: str) -> Path:
    """The folder of the four checkpoints; made once."""
    models = folder / f"{size}B"
    if not models.exists():
        print(f"making {size} B models in {models} ...", file=sys.stderr)
        with tempfile.TemporaryDirectory(dir=folder) as partial:
            subprocess.run(
                [sys.executable, str(HERE / "workloads.py"), "make", f"{partial}/models", size],
                check=True,
            )
            Path(partial, "models").rename(models)
    return models


def commands(
    mergekit: Path | None, threads: int, text: Path, out: Path, read: list[Path]
) -> dict[str, list[str]]:
    """The three command lines. mergekit's keep its defaults that are fast (no accelerator, tensors in memory) and skip the extras."""
    told = {
        "floor": [sys.executable, str(HERE / "workloads.py"), "floor", str(out), *map(str, read)]
    }
    told["ours"] = [
        OURS,
        "merge",
        str(text),
        str(out),
        *(["--threads", str(threads)] if offers("merge", "--threads") else []),
    ]
    if mergekit:
        options = [
            "--random-seed",
            "0",
            "--quiet",
            "--no-low-cpu-memory",
            "--no-copy-tokenizer",
            "--no-write-model-card",
        ]
        told["mergekit"] = [str(mergekit), *options, str(text), str(out)]
    return told


def offers(command: str, option: str = "") -> bool:
    """Whether this version of `paretomerge` has the command, and the option."""
    shown = subprocess.run([OURS, command, "--help"], capture_output=True, text=True, check=False)
    return shown.returncode == 0 and option in shown.stdout


def compare(
    method: str, models: Path, threads: int, arguments: argparse.Namespace
) -> dict[str, list[dict[str, Any]]]:
    """Each tool's runs of one method, `--repeat` of them, paired."""
    found: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(dir=arguments.models) as folder:
        text, out = Path(folder) / "recipe.yml", Path(folder) / "out"
        words, read = recipe(method, models, arguments.dtype)
        text.write_text(words)
        for _ in range(arguments.repeat):
            for tool, command in commands(arguments.mergekit, threads, text, out, read).items():
                warm(read)
                run = measure(command, threads)
                run["MB written"] = (
                    sum(file.stat().st_size for file in out.glob("*.safetensors")) // 10**6
                )
                shutil.rmtree(out, ignore_errors=True)
                found.setdefault(tool, []).append(run)
    return found


def start_up(
    models: Path, arguments: argparse.Namespace, repeat: int = 5
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Runs of commands that merge nothing."""
    with tempfile.TemporaryDirectory(dir=arguments.models) as folder:
        text = Path(folder) / "recipe.yml"
        text.write_text(recipe("ties", models, arguments.dtype)[0])
        tried = {"paretomerge --help": [OURS, "--help"]}
        if offers("plan"):
            tried["paretomerge plan recipe.yml"] = [OURS, "plan", str(text)]
        return {
            name: {"ours": [measure(command) for _ in range(repeat)]}
            for name, command in tried.items()
        }


def in_place(models: Path, threads: int) -> dict[str, dict[str, float]]:
    """Seconds of warm re-merges and of copying the same bytes, per set of tensors; see workloads.py."""
    command = [
        sys.executable,
        str(HERE / "workloads.py"),
        "in-place",
        str(threads),
        *(str(models / name) for name in MODELS),
    ]
    told = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        check=True,
        stdout=subprocess.PIPE,
    )
    return dict(json.loads(told.stdout))


def cell(found: dict[str, list[dict[str, Any]]], form: str, tool: str, key: str, over: str) -> str:
    """The median of a tool's runs, or of its ratios to the paired runs of another; a dash where none got to its end."""
    pairs = zip(found.get(tool, []), found.get(over or tool, []), strict=False)
    values = [a[key] / (b[key] if over else 1) for a, b in pairs if key in a and key in b]
    return f"{statistics.median(values):{form}}" if values else "–"


def table(methods: dict[str, Any]) -> str:
    """Markdown, a row a method."""
    lines = [
        f"| method | {' | '.join(heading for heading, *_ in COLUMNS)} |",
        "|---|" + "---:|" * len(COLUMNS),
    ]
    for method in RECIPES:
        if method in methods:
            lines.append(
                f"| {method} | {' | '.join(cell(methods[method], *column) for _, *column in COLUMNS)} |"
            )
    return "\n".join(lines)


def report(told: dict[str, Any]) -> str:
    """The results as Markdown."""
    blocks = [", ".join(f"{name}: {value}" for name, value in told["facts"].items())]
    if told.get("methods"):
        blocks.append(table(told["methods"]))
    for name, runs in told.get("start-up", {}).items():
        wall, cpu = (cell(runs, ".2f", "ours", key, "") for key in ("wall", "cpu"))
        blocks.append(f"`{name}`: {wall} s wall, {cpu} s CPU")
    for name, seconds in told.get("in place", {}).items():
        ratios = [
            f"{what} {1000 * s:.1f} ms ({s / seconds['copy']:.2f} x copy)"
            for what, s in seconds.items()
        ]
        blocks.append(f"in place, {name}, 3 sources, bfloat16: {', '.join(ratios)}")
    return "\n\n".join(blocks) + "\n"


def facts(size: str, threads: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """What the numbers depend on; no names of machines or folders."""
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        "?",
    )
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    told = {
        "parameters": f"{size} B",
        "threads": threads,
        "dtype": arguments.dtype,
        "cores": os.cpu_count(),
        "CPU": cpu,
    }
    told |= {
        "memory": f"{memory:.0f} GiB",
        "python": sys.version.split()[0],
        "torch": version("torch"),
    }
    if arguments.mergekit:
        ask = "from importlib.metadata import version as v; print(v('mergekit'), 'with torch', v('torch'))"
        python = str(arguments.mergekit.with_name("python"))
        told["mergekit"] = subprocess.run(
            [python, "-c", ask], capture_output=True, text=True, check=True
        ).stdout.strip()
    return told


def executable(given: str | None) -> Path | None:
    """`mergekit-yaml` from a venv, its python or itself; where nothing is given, beside this python or on the PATH."""
    path = Path(given) if given else Path(sys.executable)
    beside = path / "bin" if path.is_dir() else path.parent
    found = shutil.which("mergekit-yaml", path=str(beside)) or (
        None if given else shutil.which("mergekit-yaml")
    )
    if given and not found:
        raise SystemExit(
            f"--mergekit: expected a virtual environment with mergekit-yaml, got {given}"
        )
    return Path(found) if found else None


def run(threads: int, models: Path, arguments: argparse.Namespace) -> None:
    """All parts under one number of threads; a method that is not asked for keeps its stored result."""
    path = RESULTS / f"{arguments.size}-{threads}.json"
    told: dict[str, Any] = json.loads(path.read_text()) if arguments.write and path.exists() else {}
    told["facts"] = {**told.get("facts", {}), **facts(arguments.size, threads, arguments)}
    if "start" in arguments.parts:
        told["start-up"] = start_up(models, arguments)
    if "in-place" in arguments.parts:
        told["in place"] = in_place(models, threads)
    for method in arguments.methods if "merge" in arguments.parts else ():
        told.setdefault("methods", {})[method] = compare(method, models, threads, arguments)
        print(
            table({method: told["methods"][method]}).splitlines()[-1], file=sys.stderr, flush=True
        )
    print(report(told))
    if arguments.write:
        RESULTS.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(told, indent=1) + "\n")
        path.with_suffix(".md").write_text(report(told))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--size", choices=["0.5", "2"], default="0.5", help="billions of parameters"
    )
    parser.add_argument(
        "--methods",
        type=lambda text: text.split(","),
        default=list(RECIPES),
        help="linear,ties,... (all)",
    )
    parser.add_argument(
        "--threads", type=lambda text: [int(n) for n in text.split(",")], default=[1]
    )
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument(
        "--dtype",
        choices=["bfloat16", "float32"],
        default="bfloat16",
        help="mergekit computes in it; ours in float32",
    )
    parser.add_argument("--mergekit", help="the virtual environment that has it, or its python")
    parser.add_argument("--no-mergekit", action="store_true")
    parser.add_argument(
        "--models",
        type=Path,
        default=Path(tempfile.gettempdir()) / "pm-bench",
        help="where inputs are kept",
    )
    parser.add_argument(
        "--parts",
        type=lambda text: text.split(","),
        default=PARTS,
        help=f"some of {','.join(PARTS)}",
    )
    parser.add_argument(
        "--write", action="store_true", help="keep the results in benchmarks/results/merge/"
    )
    arguments = parser.parse_args()
    if unknown := {*arguments.methods} - {*RECIPES} | {*arguments.parts} - {*PARTS}:
        parser.error(
            f"expected methods among {', '.join(RECIPES)} and parts among {', '.join(PARTS)}, got {', '.join(sorted(unknown))}"
        )
    arguments.mergekit = None if arguments.no_mergekit else executable(arguments.mergekit)
    arguments.models.mkdir(parents=True, exist_ok=True)
    models = inputs(arguments.models, arguments.size)
    for threads in arguments.threads:
        run(threads, models, arguments)


if __name__ == "__main__":
    main()
