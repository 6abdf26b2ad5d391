"""Merges of merges: several steps read one, and each of its blocks is merged once."""

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from paretomerge.errors import CheckpointError
from paretomerge.merging.engine import merge, merged_tensors, run
from paretomerge.merging.methods import evolution
from paretomerge.merging.plan.cost import estimate_cost, processor_seconds
from paretomerge.merging.plan.make import make_plan
from paretomerge.recipe import Recipe


def crossover(name, first, second, seed, **more):
    return {
        "name": name,
        "merge_method": "crossover",
        "base_model": first,
        "models": [{"model": first}, {"model": second}],
        "seed": seed,
        **more,
    }


def family(pico, generations, dtype="float32"):
    """Documents in which each merge has the two before it as parents: a Fibonacci tree."""
    models = [f"{pico}/ada", f"{pico}/bob"]
    documents = []
    for generation in range(generations):
        name = f"trial-{generation}"
        child = crossover(name, models[-1], models[-2], generation + 1, dtype=dtype)
        documents.append(child)
        models.append(name)
    return documents


def as_recipe(documents):
    return Recipe.from_yaml("---\n".join(yaml.safe_dump(one) for one in documents))


def test_a_grandchild_in_one_go_is_that_of_written_parents(
    pico: Path, tmp_path: Path
) -> None:
    documents = family(pico, 4)
    merge(as_recipe(documents), tmp_path / "at once", workers=1)
    for document in documents:
        recipe = Recipe.from_dict(document).rename_models(
            lambda model: str(tmp_path / model) if "trial" in model else model
        )
        merge(replace(recipe, name=None), tmp_path / document["name"], workers=1)
    one, other = (
        load_file(tmp_path / name / "model.safetensors")
        for name in ("at once", "trial-3")
    )
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_bytes_do_not_depend_on_processes_threads_or_blocks(
    pico: Path, tmp_path: Path, dtype: str
) -> None:
    recipe = as_recipe(family(pico, 6, dtype))
    for workers in (1, 3):
        merge(recipe, tmp_path / str(workers), workers=workers)
    one, other = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("1", "3")
    )
    assert one == other
    written = load_file(tmp_path / "1" / "model.safetensors")
    plan = make_plan(recipe)
    for block in (16, 100, None):
        for name, tensor in merged_tensors(plan, block=block):
            assert torch.equal(tensor, written[name])
    parts: dict[str, torch.Tensor] = {}
    run(
        plan,
        lambda job, start, block: parts.update({f"{job.name} {start}": block}),
        threads=2,
    )
    for key, block in parts.items():
        name, start = key.split()
        flat = written[name].view(-1)[int(start) :][: block.numel()]
        assert torch.equal(block.view(-1).to(flat.dtype), flat)


def test_each_block_of_a_shared_step_is_merged_once(
    pico: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without that, a generation would take half as long again as the one before it."""
    merges: Counter[str] = Counter()
    original = evolution.crossover

    def counted(inputs):
        merge_block = original(inputs)

        def merge_and_count(block):
            merges[inputs.name] += 1
            return merge_block(block)

        return merge_and_count

    monkeypatch.setattr(evolution, "crossover", counted)
    generations = 20
    plan = make_plan(as_recipe(family(pico, generations)))
    names = [job.name for job in plan.jobs]
    dict(merged_tensors(plan))
    assert merges == dict.fromkeys(names, generations)


def test_what_one_reader_writes_to_no_other_sees(pico: Path) -> None:
    """Methods write to the rows that they get, so each reader gets a copy."""
    shared = crossover("shared", f"{pico}/ada", f"{pico}/bob", 1, dtype="float32")
    left = {
        "name": "left",
        "merge_method": "linear",
        "models": [
            {"model": "shared", "parameters": {"weight": 3.0}},
            {"model": f"{pico}/ada", "parameters": {"weight": 1.0}},
        ],
        "dtype": "float32",
    }
    result = {
        "merge_method": "linear",
        "models": [{"model": "left"}, {"model": "shared"}],
        "parameters": {"weight": 0.5},
        "dtype": "float32",
    }
    tensors = dict(merged_tensors(make_plan(as_recipe([shared, left, result]))))
    alone = dict(merged_tensors(make_plan(as_recipe([shared]))))
    ada = load_file(pico / "ada" / "model.safetensors")
    for name, tensor in tensors.items():
        step = alone[name]
        expected = 0.5 * (0.75 * step + 0.25 * ada[name].float()) + 0.5 * step
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-6)


def test_a_source_that_changes_is_noticed_through_any_number_of_steps(
    pico: Path, tmp_path: Path
) -> None:
    shutil.copytree(pico, tmp_path / "models")
    plan = make_plan(as_recipe(family(tmp_path / "models", 40)))
    parents = [plan.weights[name] for name in ("trial-37", "trial-38")]
    for parent in parents:
        parent.check_unchanged()
    file = tmp_path / "models" / "ada" / "model.safetensors"
    file.write_bytes(file.read_bytes() + b" ")
    for parent in parents:
        with pytest.raises(CheckpointError, match="ada"):
            parent.check_unchanged()


def test_the_time_of_a_lineage_counts_each_step_once(pico: Path) -> None:
    alone = processor_seconds(make_plan(as_recipe(family(pico, 1))))
    plan = make_plan(as_recipe(family(pico, 12)))
    assert processor_seconds(plan) == pytest.approx(12 * alone)
    seconds = estimate_cost(plan).seconds
    assert seconds is not None and seconds > 12 * alone
