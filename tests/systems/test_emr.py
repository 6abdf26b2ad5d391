"""EMR-Merging: the formulas in numpy, their laws, exact files, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from paretomerge.cli.main import app
from paretomerge.errors import CheckpointError, ConfigError
from paretomerge.merging.engine import merged_tensors
from paretomerge.merging.plan.make import make_plan
from paretomerge.systems.emr import emr
from paretomerge.systems.emr_vote import elect
from paretomerge.systems.expand import EmrModel, expand
from paretomerge.systems.task_models import task_models
from tests.architectures import ARCHITECTURES, run
from tests.conftest import EXPERTS, pico_states, save_pico
from tests.pico import moved

State = dict[str, torch.Tensor]


def by_formula(base: State, models: dict[str, State]) -> dict[str, State]:
    """The tasks' models by the formulas, in float64 for the sums: task -> tensors."""
    unified, masks = {}, {}
    deltas: dict[str, dict[str, Any]] = {}
    for name, tensor in base.items():
        theta = tensor.float().numpy()
        deltas[name] = {t: s[name].float().numpy() - theta for t, s in models.items()}
        stacked = np.stack(list(deltas[name].values()))
        sign = np.where(stacked.mean(0) > 0, 1.0, -1.0).astype(np.float32)
        masks[name] = {task: tau * sign > 0 for task, tau in deltas[name].items()}
        agreeing = [np.abs(tau) * masks[name][t] for t, tau in deltas[name].items()]
        unified[name] = sign * np.max(agreeing, axis=0)
    result = {}
    for task in models:
        over = sum(np.abs(tau[task]).mean(dtype=np.float64) for tau in deltas.values())
        under = 0.0
        for name in base:
            masked = np.abs(unified[name] * masks[name][task])
            under += masked.mean(dtype=np.float64)
        tensors = {}
        for name, tensor in base.items():
            delta = over / under * masks[name][task] * unified[name]
            tensors[name] = tensor.float() + torch.from_numpy(delta).float()
        result[task] = tensors
    return result


def tensors_of(folder: Path) -> State:
    state: State = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= load_file(file)
    return state


@pytest.fixture(scope="module")
def unified(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ada, bob and cyd, unified; treat it as read-only."""
    out = tmp_path_factory.mktemp("emr") / "unified"
    emr(pico / "base", {name: pico / name for name in EXPERTS}, out)
    return out


def test_the_expanded_models_are_those_of_the_formulas(
    pico: Path, unified: Path, tmp_path: Path
) -> None:
    base = tensors_of(pico / "base")
    states = {name: tensors_of(pico / name) for name in EXPERTS}
    wanted = by_formula(base, states)
    for task in EXPERTS:
        got = tensors_of(expand(unified, task, tmp_path / task))
        assert got.keys() == base.keys()
        for name, tensor in got.items():
            assert tensor.dtype == base[name].dtype == torch.bfloat16
            # One unit in the last place: lambda is a quotient of sums in another order.
            torch.testing.assert_close(
                tensor.float(), wanted[task][name], rtol=2**-8, atol=1e-7
            )
            delta = tensor.float() - base[name].float()
            tau = states[task][name].float() - base[name].float()
            assert not ((delta != 0) & (delta.sign() != tau.sign())).any()


def test_every_unified_weight_is_that_of_a_model(pico: Path, unified: Path) -> None:
    """So that bfloat16 loses nothing of tau_u."""
    candidates = [tensors_of(pico / name) for name in ("base", *EXPERTS)]
    for name, tensor in tensors_of(unified).items():
        is_one = torch.stack([state[name] == tensor for state in candidates]).any(0)
        assert is_one.all()


def test_the_tensors_in_memory_are_those_on_disk(unified: Path, tmp_path: Path) -> None:
    model = EmrModel.open(unified)
    on_disk = tensors_of(expand(unified, "bob", tmp_path / "bob"))
    in_memory = dict(model.tensors("bob"))
    assert in_memory.keys() == on_disk.keys()
    for name, tensor in in_memory.items():
        assert tensor.equal(on_disk[name])
    # A recipe reads them as a model, and block by block.
    recipe = {"merge_method": "passthrough", "models": [{"model": "task"}]}
    plan = make_plan(recipe, {"task": model.weights("bob")})
    for name, tensor in merged_tensors(plan, block=24):
        assert tensor.equal(on_disk[name])


def test_both_kinds_of_checkpoint_load(unified: Path, tmp_path: Path) -> None:
    expand(unified, "cyd", tmp_path / "cyd")
    for folder in (unified, tmp_path / "cyd"):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert model.dtype == torch.bfloat16
        for name, tensor in tensors_of(folder).items():
            assert tensor.equal(model.state_dict()[name])
        transformers.AutoTokenizer.from_pretrained(folder)


def test_sizes(pico: Path, tmp_path: Path) -> None:
    models = {name: pico / name for name in EXPERTS}
    summary = emr(pico / "base", models, tmp_path / "out")
    base = tensors_of(pico / "base")
    n_bytes = sum(-(-tensor.numel() // 8) for tensor in base.values())
    assert summary.mask_bytes == 3 * n_bytes
    assert summary.unified_bytes == sum(tensor.nbytes for tensor in base.values())
    assert summary.model_bytes == 3 * summary.unified_bytes
    for task in EXPERTS:
        masks = load_file(tmp_path / "out" / "emr" / f"{task}.safetensors")
        assert sum(mask.nbytes for mask in masks.values()) == n_bytes
        bits = sum(int(np.unpackbits(mask.numpy()).sum()) for mask in masks.values())
        n_parameters = sum(tensor.numel() for tensor in base.values())
        assert summary.tasks[task].density == pytest.approx(bits / n_parameters)


def test_experts_of_disjoint_parameters_are_found_again(tmp_path: Path) -> None:
    """Their masks do not overlap, so lambda is 1 and both are exact."""
    states = pico_states()
    base = {name: t.bfloat16() for name, t in states["base"].items()}
    generator = torch.Generator().manual_seed(0)
    one, other = {}, {}
    for name, tensor in base.items():
        is_first = torch.rand(tensor.shape, generator=generator) < 0.5
        one[name] = torch.where(is_first, states["ada"][name].bfloat16(), tensor)
        other[name] = torch.where(is_first, tensor, states["bob"][name].bfloat16())
    for folder, state in (("base", base), ("one", one), ("other", other)):
        save_pico(tmp_path / folder, state)
    models = {"one": tmp_path / "one", "other": tmp_path / "other"}
    summary = emr(tmp_path / "base", models, tmp_path / "out")
    for task, state in (("one", one), ("other", other)):
        assert summary.tasks[task].scale == pytest.approx(1)
        got = tensors_of(expand(tmp_path / "out", task, tmp_path / f"{task}-again"))
        for name, tensor in got.items():
            assert tensor.equal(state[name])


@given(values=arrays.arrays(np.float32, (4, 3, 5), elements=st.floats(-4, 4, width=16)))
@settings(max_examples=60, deadline=None)
def test_laws_of_the_election(values: np.ndarray) -> None:
    base, *sources = (torch.from_numpy(value.copy()) for value in values)
    deltas = torch.stack([source - base for source in sources])
    elected = elect(base, sources)
    tau = elected.unified - base
    masks = torch.stack(elected.votes) > 0
    # Of the sign of the mean; only where all agree on nothing is there no change.
    positive = deltas.sum(0) > 0
    assert (tau[positive] > 0).all() and (tau[~positive] <= 0).all()
    assert elected.size.equal(tau.abs())
    assert (deltas[masks].sign() == tau.expand_as(deltas)[masks].sign()).all()
    assert (tau.expand_as(deltas)[masks].abs() >= deltas[masks].abs()).all()
    # The order of the models says nothing.
    turned = elect(base, sources[::-1])
    if turned.unified.equal(elected.unified):
        assert (torch.stack(turned.votes[::-1]) > 0).equal(masks)


def test_by_hand() -> None:
    base = torch.tensor([[1.0, 1.0, 1.0, 1.0]])
    one = torch.tensor([[2.0, 0.0, 1.0, 3.0]])
    other = torch.tensor([[4.0, 1.5, 1.0, -1.0]])
    # Deltas 1, -1, 0, 2 and 3, .5, 0, -2: signs +, -, -, -.
    elected = elect(base, [one, other])
    assert elected.unified.tolist() == [[4.0, 0.0, 1.0, -1.0]]
    assert (elected.votes[0] > 0).tolist() == [[True, True, False, False]]
    assert (elected.votes[1] > 0).tolist() == [[True, False, False, True]]


def test_adapters_and_wider_models_are_held_exactly(pico: Path, tmp_path: Path) -> None:
    states = pico_states()
    wide = tmp_path / "wide"
    shutil.copytree(pico / "ada", wide)
    save_file(states["ada"], wide / "model.safetensors", {"format": "pt"})
    emr(pico / "base", {"wide": wide, "bob": pico / "bob"}, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "float32"
    with pytest.raises(ConfigError, match="cannot hold"):
        emr(pico / "base", {"wide": wide}, tmp_path / "narrow", dtype="bfloat16")
    # Alone, a model agrees with itself everywhere.
    emr(pico / "base", {"wide": wide}, tmp_path / "alone")
    got = tensors_of(expand(tmp_path / "alone", "wide", tmp_path / "again"))
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, states["ada"][name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["qwen2", "mixtral", "bert"])
def test_other_architectures(name: str, tmp_path: Path) -> None:
    """Tied heads, experts that are stacked in memory, and biases that are stored twice."""
    model = ARCHITECTURES[name]()
    kind = type(model)
    model.save_pretrained(tmp_path / "base")
    moved(model).save_pretrained(tmp_path / "one", save_original_format=False)
    wanted = run(model.eval())
    moved(kind.from_pretrained(tmp_path / "base"), 2).save_pretrained(tmp_path / "two")
    emr(tmp_path / "base", {"one": tmp_path / "one"}, tmp_path / "alone")
    expand(tmp_path / "alone", "one", tmp_path / "again")
    got = run(kind.from_pretrained(tmp_path / "again").eval())
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    models = {"one": tmp_path / "one", "two": tmp_path / "two"}
    emr(tmp_path / "base", models, tmp_path / "both")
    run(kind.from_pretrained(expand(tmp_path / "both", "two", tmp_path / "second")))


def test_refusals(pico: Path, unified: Path, tmp_path: Path) -> None:
    base, out = pico / "base", tmp_path / "out"
    with pytest.raises(CheckpointError, match="0/0; leave it out"):
        emr(base, {"same": base, "ada": pico / "ada"}, out)
    with pytest.raises(ConfigError, match="at least one"):
        emr(base, {}, out)
    with pytest.raises(ConfigError, match="task"):
        expand(unified, "dan", out)
    with pytest.raises(
        CheckpointError, match=r"`paretomerge emr` writes.*`paretomerge pick`"
    ):
        expand(base, "ada", out)
    with pytest.raises(CheckpointError, match="is not that of the base"):
        expand(unified, "ada", out, base=pico / "ada")
    with pytest.raises(CheckpointError, match="would replace the source"):
        expand(unified, "ada", unified, overwrite=True)
    with pytest.raises(CheckpointError, match="would replace the source"):
        expand(unified, "ada", unified / "emr", overwrite=True)
    save_pico(tmp_path / "deep", pico_states(layers=5)["ada"], layers=5)
    with pytest.raises(CheckpointError, match="has 5 layers"):
        emr(base, {"deep": tmp_path / "deep"}, out)
    assert not out.exists() and not list(tmp_path.glob(".*"))


def test_a_file_that_changed_is_refused(unified: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(unified, copy)
    masks = copy / "emr" / "ada.safetensors"
    raw = bytearray(masks.read_bytes())
    raw[-1] ^= 1
    masks.write_bytes(raw)
    with pytest.raises(CheckpointError, match="has changed since it was made"):
        EmrModel.open(copy)
    shutil.copy(unified / "emr" / "ada.safetensors", masks)
    EmrModel.open(copy)
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: has changed"):
        EmrModel.open(copy)


def test_a_base_that_moved(pico: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(pico / "base", base)
    emr(base, {"ada": pico / "ada"}, tmp_path / "out")
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="base"):
        expand(tmp_path / "out", "ada", tmp_path / "ada")
    expand(tmp_path / "out", "ada", tmp_path / "ada", base=tmp_path / "elsewhere")


def test_names_of_tasks(tmp_path: Path) -> None:
    named = task_models(["math=./a/b", "./x/code", "owner/chat-1.5"])
    assert named == {
        "math": "./a/b",
        "code": "./x/code",
        "chat-1.5": "owner/chat-1.5",
    }
    for wrong in (["a=x", "a=y"], ["../up=x"], ["=x"], ["a=x", "b=x"]):
        with pytest.raises(ConfigError):
            task_models(wrong)
    folder = tmp_path / "a=b"
    folder.mkdir()
    with pytest.raises(ConfigError, match="write name="):
        task_models([str(folder)])
    assert task_models([f"task={folder}"]) == {"task": str(folder)}


def test_the_commands(pico: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    models = [f"first={pico / 'ada'}", str(pico / "bob")]
    result = CliRunner().invoke(
        app, ["emr", str(pico / "base"), *models, "--out", str(out)]
    )
    assert result.exit_code == 0, result.output
    assert "first" in result.output and "bob" in result.output
    assert "56% of the 2 models" in result.output
    arguments = ["expand", str(out), "--task", "first", str(tmp_path / "first")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "first" / "model.safetensors").is_file()
    (tmp_path / "here.py").write_text("def score(model, tokenizer):\n    return 0.5\n")
    study = {
        "base": str(pico / "base"),
        "models": [str(pico / "ada"), str(pico / "bob")],
        "objectives": [{"function": "here:score", "direction": "maximize"}],
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    arguments = ["evaluate", str(out), "--study", str(tmp_path / "study.yaml")]
    result = CliRunner().invoke(app, arguments)
    assert "no good model by itself" in result.stderr and "0.5000" in result.stdout


def test_what_the_tasks_do_not_get_of_their_fine_tunes_is_noted(
    pico: Path, tmp_path: Path
) -> None:
    """Their models have the positions and the chat template of the base."""
    for name in ("ada", "bob"):
        shutil.copytree(pico / name, tmp_path / name)
    config = json.loads((tmp_path / "ada" / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 5e5
    (tmp_path / "ada" / "config.json").write_text(json.dumps(config))
    (tmp_path / "bob" / "chat_template.jinja").write_text("{{ messages }}")
    models = [str(tmp_path / name) for name in ("ada", "bob")]
    base, out = str(pico / "base"), str(tmp_path / "unified")
    done = CliRunner().invoke(app, ["emr", base, *models, "--out", out])
    assert done.exit_code == 0
    first, second = done.stderr.splitlines()
    assert "ada: rope_parameters is {'rope_theta': 500000.0" in first
    assert "bob: has a chat template that is not that of" in second
    expand(out, "ada", tmp_path / "again")
    expanded = json.loads((tmp_path / "again" / "config.json").read_text())
    assert expanded["rope_parameters"]["rope_theta"] == 10000.0


def test_names_and_models_that_cannot_be_tasks(pico: Path, tmp_path: Path) -> None:
    base, ada, bob = (pico / name for name in ("base", "ada", "bob"))
    out = tmp_path / "in" / "out"
    for task in ("../../escaped", "a/b", "", ".."):
        with pytest.raises(ConfigError, match="cannot be the name of a task"):
            emr(base, {task: ada, "b": bob}, out)
    with pytest.raises(ConfigError, match="one and two are the same model"):
        emr(base, {"one": ada, "two": ada}, out)
    assert not list(tmp_path.iterdir())
