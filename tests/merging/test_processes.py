"""Merges with several processes: the same bytes, and an error of a worker leaves nothing behind."""

import logging
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from paretomerge.checkpoint.operand import InMemoryTensor
from paretomerge.cli.main import main
from paretomerge.errors import CheckpointError, ConfigError
from paretomerge.merging import processes, tasks
from paretomerge.merging.engine import merge, write
from paretomerge.merging.methods import METHODS, averaging
from paretomerge.merging.plan import cost
from paretomerge.merging.plan.cost import default_workers, processors
from paretomerge.merging.plan.make import make_plan
from paretomerge.merging.processes import _Team
from paretomerge.merging.worker_start import started_workers
from paretomerge.recipe import Recipe
from tests.checkpoint.test_adapter import Q, adapter, factors
from tests.conftest import REPOSITORY
from tests.merging.test_vocabulary_merge import build
from tests.study.test_workers import wait_for

Dictionary = dict[str, Any]

MERGE_HERE = _Team.merge_here


@pytest.fixture(autouse=True)
def small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that even a pico model has many tasks, and tensors that are cut."""
    monkeypatch.setattr(tasks, "_MOST_ELEMENTS", 200)
    monkeypatch.setattr(tasks, "_LEAST_ELEMENTS", 200)
    monkeypatch.setattr(tasks, "CPU_BLOCK", 64)


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers merge everything: the process that starts them merges nothing itself."""
    monkeypatch.setattr(_Team, "merge_here", lambda _: None)


def document(method: str, folder: Path, **more: Any) -> Dictionary:
    models = []
    for name in ("ada", "bob"):
        parameters = {"weight": 0.4, "density": 0.5}
        models.append({"model": f"{folder}/{name}", "parameters": parameters})
    return {
        "merge_method": method,
        "base_model": f"{folder}/base",
        "models": models,
        **more,
    }


def files(folder: Path) -> dict[str, bytes]:
    """The content of all files but the card, which names its folder."""
    content = {}
    for file in folder.iterdir():
        if file.name != "README.md":
            content[file.name] = file.read_bytes()
    return content


def names_in(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir()]


def linear(pico: Path, tmp_path: Path) -> Dictionary:
    models = []
    for name in ("ada", "bob"):
        models.append({"model": f"{pico}/{name}", "parameters": {"weight": 0.4}})
    return {"merge_method": "linear", "models": models}


def random_masks(pico: Path, tmp_path: Path) -> Dictionary:
    return document("dare_ties", pico)


def row_sorts(pico: Path, tmp_path: Path) -> Dictionary:
    return document("della", pico)


def with_adapter(pico: Path, tmp_path: Path) -> Dictionary:
    lora = adapter(tmp_path / "lora", factors(Q, (16, 16)))
    recipe = document("ties", pico)
    recipe["models"][0]["model"] = f"{pico}/ada+{lora}"
    return recipe


def tied_union_of_tokens(pico: Path, tmp_path: Path) -> Dictionary:
    folder = build(tmp_path / "vocabularies", tied=True)
    return document("dare_linear", folder, tokenizer={"source": "union"})


def renamed_tensors(pico: Path, tmp_path: Path) -> Dictionary:
    for name in ("base", "ada", "bob"):
        shutil.copytree(pico / name, tmp_path / name)
    # As a base model without its head names them.
    file = tmp_path / "ada" / "model.safetensors"
    tensors = {}
    for name, tensor in load_file(file).items():
        tensors[name.removeprefix("model.")] = tensor
    save_file(tensors, file, metadata={"format": "pt"})
    return document("ties", tmp_path)


def stacked_layers(pico: Path, tmp_path: Path) -> Dictionary:
    first = {"sources": [{"model": f"{pico}/ada", "layer_range": [0, 3]}]}
    second = {"sources": [{"model": f"{pico}/cyd", "layer_range": [1, 4]}]}
    return {"merge_method": "passthrough", "slices": [first, second]}


@pytest.mark.parametrize(
    "recipe",
    [
        linear,
        random_masks,
        row_sorts,
        with_adapter,
        tied_union_of_tokens,
        renamed_tensors,
        stacked_layers,
    ],
)
def test_two_workers_write_the_same_files_as_one_process(
    pico: Path, tmp_path: Path, idle: None, recipe: Callable[..., Dictionary]
) -> None:
    plan = make_plan(recipe(pico, tmp_path))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Team, "merge_here", MERGE_HERE)
        one = write(plan, tmp_path / "one", workers=1, shard_bytes=5_000)
    three = write(plan, tmp_path / "three", workers=3, shard_bytes=5_000)
    assert files(one) == files(three)
    assert len(files(one)) > 5


def test_the_starting_process_and_a_worker_share_a_recipe_with_steps(
    pico: Path, tmp_path: Path
) -> None:
    inner = document("dare_ties", pico) | {"name": "inner"}
    outer = document("task_arithmetic", pico)
    outer["models"][1] = {"model": "inner", "parameters": {"weight": 0.3}}
    for entry in outer["models"]:
        entry["parameters"].pop("density", None)
    texts = [Recipe.from_dict(part).to_yaml() for part in (inner, outer)]
    recipe = Recipe.from_yaml("\n---\n".join(texts))
    one = merge(recipe, tmp_path / "one", workers=1)
    two = merge(recipe, tmp_path / "two", workers=2)
    assert files(one) == files(two)


@pytest.mark.parametrize("recipe", [linear, random_masks, stacked_layers])
def test_tasks_have_every_element_once(
    pico: Path, tmp_path: Path, recipe: Callable[..., Dictionary]
) -> None:
    plan = make_plan(recipe(pico, tmp_path))
    counts = dict.fromkeys((job.name for job in plan.jobs), 0)
    for task in tasks.cut_into_tasks(plan, 2):
        for piece in task:
            job = plan.jobs[piece.job]
            rows = 1 if len(job.shape) == 1 else job.shape[0]
            first, end = piece.rows or (0, rows)
            counts[job.name] += (end - first) * job.shape[-1]
    assert counts == {job.name: torch.Size(job.shape).numel() for job in plan.jobs}


def test_long_tasks_begin_first(pico: Path) -> None:
    plan = make_plan(document("ties", pico))
    task, *_ = tasks.cut_into_tasks(plan, 8)
    largest = max(plan.jobs, key=lambda job: torch.Size(job.shape).numel())
    assert plan.jobs[task[0].job].shape == largest.shape


# ----- errors


def damaged(pico: Path, folder: Path) -> Path:
    shutil.copytree(pico / "ada", folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][1, 2] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def passthrough(folder: Path) -> Dictionary:
    return {"merge_method": "passthrough", "models": [{"model": str(folder)}]}


def test_a_damaged_tensor_is_named_by_the_worker(
    pico: Path, tmp_path: Path, idle: None
) -> None:
    folder = damaged(pico, tmp_path / "m")
    with pytest.raises(
        CheckpointError,
        match=r"m: model\.layers\.2\.mlp\.up_proj\.weight: expected fin",
    ):
        merge(passthrough(folder), tmp_path / "new" / "out", workers=3)
    assert names_in(tmp_path) == ["m"]


def test_a_disk_that_fills_in_a_worker(
    pico: Path, tmp_path: Path, idle: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = processes.Work

    def on_full_disk(plan: Any, destinations: Any, cache_bytes: int) -> Any:
        full = {}
        for name, destination in destinations.items():
            full[name] = replace(destination, file=Path("/dev/full"))
        return work(plan, full, cache_bytes)

    monkeypatch.setattr(processes, "Work", on_full_disk)
    with pytest.raises(
        CheckpointError, match="No space left on device; free some space"
    ):
        merge(linear(pico, tmp_path), tmp_path / "new" / "out", workers=2)
    assert names_in(tmp_path) == []


def test_a_bug_in_a_worker_has_its_traceback(
    pico: Path, tmp_path: Path, idle: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = processes.Work
    monkeypatch.setattr(processes, "Work", lambda plan, _, size: work(plan, {}, size))
    with pytest.raises(KeyError) as caught:
        merge(linear(pico, tmp_path), tmp_path / "out", workers=2)
    assert "In a worker process" in caught.value.__notes__[0]
    assert "worker.py" in caught.value.__notes__[0]
    assert names_in(tmp_path) == []


@pytest.fixture
def harmed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The first worker stops for ever at its first task; the fixture lists its number."""
    give_task = _Team._give_task
    stopped: list[int] = []

    def stop_and_give(self: _Team, connection: Any) -> None:
        assert self._workers is not None
        if not stopped:
            os.kill(self._workers.process.pid, signal.SIGSTOP)
            stopped.append(self._workers.process.pid)
        give_task(self, connection)

    monkeypatch.setattr(_Team, "_give_task", stop_and_give)
    return stopped


def running(group: int) -> list[str]:
    """The processes of a group that run, or could go on."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            # After the name, which may hold anything: state, parent, group.
            state, _, its_group, *_ = (
                (entry / "stat").read_text().rpartition(")")[2].split()
            )
            if int(its_group) == group and state not in "ZX":
                found.append(entry.name)
    return found


def wait_for_the_end_of(group: int) -> None:
    """Wait until no process of a group runs; a killed one may take a moment to be gone."""
    wait_for(lambda: not running(group), 60)


def test_a_worker_that_is_killed(
    pico: Path, tmp_path: Path, harmed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def merge_here(self: _Team) -> None:
        while not self._busy:
            time.sleep(0.01)
        os.kill(harmed[0], signal.SIGKILL)

    monkeypatch.setattr(_Team, "merge_here", merge_here)
    with pytest.raises(
        CheckpointError, match=r"was killed while it merged.*--workers 1"
    ):
        merge(linear(pico, tmp_path), tmp_path / "new" / "out", workers=2)
    assert names_in(tmp_path) == []


def test_an_interrupt_ends_the_workers(
    pico: Path, tmp_path: Path, harmed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def merge_here(self: _Team) -> None:
        while not self._busy:
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(_Team, "merge_here", merge_here)
    with pytest.raises(KeyboardInterrupt):
        merge(linear(pico, tmp_path), tmp_path / "new" / "out", workers=3)
    assert names_in(tmp_path) == []
    wait_for_the_end_of(harmed[0])


# ----- where workers cannot be had


@pytest.mark.parametrize("program", ["/bin/false", "/nowhere/python"])
def test_a_merge_goes_on_without_workers_that_do_not_start(
    pico: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    program: str,
) -> None:
    monkeypatch.setattr(sys, "executable", program)
    one = merge(linear(pico, tmp_path), tmp_path / "one", workers=1)
    two = merge(linear(pico, tmp_path), tmp_path / "two", workers=2)
    assert files(one) == files(two)
    if program.startswith("/nowhere"):
        assert "No worker process could be started" in caplog.text


def no_start(*_: Any) -> None:
    pytest.fail("started a worker")


def test_a_method_of_the_user_is_merged_by_one_process(
    pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Team, "merge_with", no_start)
    mine = replace(METHODS["linear"], rule="mine")
    monkeypatch.setitem(METHODS, "linear", mine)
    merge(linear(pico, tmp_path), tmp_path / "row", workers=2)
    monkeypatch.undo()
    monkeypatch.setattr(_Team, "merge_with", no_start)
    plain = averaging.linear
    monkeypatch.setattr(averaging, "linear", lambda inputs: plain(inputs))
    merge(linear(pico, tmp_path), tmp_path / "function", workers=2)


def test_a_model_in_memory_is_merged_by_one_process(
    pico: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(_Team, "merge_with", no_start)
    plan = make_plan(linear(pico, tmp_path))
    for weights in plan.weights.values():
        held = InMemoryTensor(torch.zeros(1))
        weights.held = held  # type: ignore[attr-defined]
    with caplog.at_level(logging.INFO):
        write(plan, tmp_path / "out", workers=2)
    assert "in one process: a model of the plan is in memory" in caplog.text


SCRIPT = """
import logging
import paretomerge as pm
from paretomerge.merging import processes, tasks
logging.basicConfig(level="INFO")
tasks._LEAST_ELEMENTS = 200
print("once")
pm.merge({recipe!r}, {out!r}, workers=3)
"""


@pytest.mark.parametrize("form", ["file", "input"])
def test_a_script_without_a_main_guard(pico: Path, tmp_path: Path, form: str) -> None:
    code = SCRIPT.format(recipe=document("ties", pico), out=str(tmp_path / "out"))
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(code))
    command = [sys.executable, "-W", "error"]
    command.append(str(script) if form == "file" else "-")
    done = subprocess.run(
        command,
        input=code,
        text=True,
        capture_output=True,
        check=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )
    assert done.stdout == "once\n"
    assert done.stderr == ""


# ----- how many


def test_a_small_merge_starts_no_process(pico: Path, tmp_path: Path) -> None:
    plan = make_plan(linear(pico, tmp_path))
    assert default_workers(plan, processors=64) == 1


def test_large_merges_use_the_processors(
    pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(linear(pico, tmp_path))
    monkeypatch.setattr(cost, "processor_seconds", lambda _: 9.0)
    monkeypatch.setattr(cost, "worker_bytes", lambda _: 1)
    assert default_workers(plan, processors=64) == 4
    assert default_workers(plan, processors=3) == 3
    monkeypatch.setattr(cost, "worker_bytes", lambda _: 1 << 60)
    assert default_workers(plan, processors=64) == 1


def test_processors_are_counted_as_torch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert processors() == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "5,2")
    assert processors() == 5
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert processors() == len(os.sched_getaffinity(0))


def test_the_command_line_starts_workers_early(
    pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipe.yml").write_text(
        Recipe.from_dict(linear(pico, tmp_path)).to_yaml()
    )
    monkeypatch.chdir(tmp_path)
    for workers in ("1", "3"):
        command = ["merge", "recipe.yml", f"out{workers}", "--workers", workers]
        monkeypatch.setattr(sys, "argv", ["paretomerge", *command])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
    assert files(tmp_path / "out1") == files(tmp_path / "out3")


def test_workers_that_get_no_work_are_ended(pico: Path, tmp_path: Path) -> None:
    plan = make_plan(linear(pico, tmp_path))
    (tmp_path / "out").write_text("precious")
    with (
        pytest.raises(CheckpointError, match="exists"),
        started_workers(1) as started,
    ):
        assert started is not None
        write(plan, tmp_path / "out", workers=2, started=started)
    wait_for_the_end_of(started.process.pid)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_one_process_merges_on_a_gpu(pico: Path, tmp_path: Path) -> None:
    plan = make_plan(linear(pico, tmp_path))
    with pytest.raises(ConfigError, match="one process merges on a GPU"):
        write(plan, tmp_path / "out", workers=2, device="cuda")
