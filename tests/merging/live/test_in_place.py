"""A merge in memory is the merge on disk, as transformers loads it, for models of all families."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from paretomerge.errors import CheckpointError
from paretomerge.merging.engine import merge
from paretomerge.merging.live.in_place import ResidentModel
from paretomerge.recipe import Recipe
from tests.architectures import ARCHITECTURES, run
from tests.conftest import save_tokenizer


def moved(model: PreTrainedModel, seed: int = 1) -> PreTrainedModel:
    """The model after a small random step, buffers included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                step = torch.randn(tensor.shape, generator=generator)
                tensor.add_(0.05 * step)
    return model


def base_and_tuned(family: str, folder: Path) -> tuple[Path, Path]:
    paths = folder / "base", folder / "tuned"
    model = ARCHITECTURES[family]()
    model.save_pretrained(paths[0])
    moved(model).save_pretrained(paths[1])
    for path in paths:
        save_tokenizer(path)
    return paths


def halfway(base: Path, tuned: Path, dtype: str = "float32", weight=0.5) -> Recipe:
    return Recipe.from_dict(
        {
            "merge_method": "task_arithmetic",
            "base_model": str(base),
            "models": [{"model": str(tuned), "parameters": {"weight": weight}}],
            "dtype": dtype,
        }
    )


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_a_merge_in_memory_is_the_merge_on_disk(family, tmp_path):
    base, tuned = base_and_tuned(family, tmp_path)
    resident = ResidentModel(str(base), [str(tuned)], "float32")
    # An earlier merge must leave nothing behind.
    resident.load(halfway(base, tuned, weight=-1.0))
    recipe = halfway(base, tuned)
    live = resident.load(recipe).model
    out = merge(recipe, tmp_path / "out")
    kind = type(ARCHITECTURES[family]())
    assert type(live) is kind
    written = kind.from_pretrained(out, dtype=torch.float32).eval()
    states = live.state_dict(), written.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[1].items():
        assert torch.equal(states[0][name], tensor), name
    assert torch.equal(run(live), run(written))
    unmerged = kind.from_pretrained(base, dtype=torch.float32).eval()
    assert not torch.equal(run(live), run(unmerged))


@pytest.mark.parametrize("family", ["mixtral", "gemma3_vl", "t5"])
def test_in_bfloat16_and_float16_too(family, tmp_path):
    base, tuned = base_and_tuned(family, tmp_path)
    kind = type(ARCHITECTURES[family]())
    for dtype in ("bfloat16", "float16"):
        recipe = halfway(base, tuned, dtype)
        live = ResidentModel(str(base), [str(tuned)], dtype).load(recipe).model
        out = merge(recipe, tmp_path / dtype)
        written = kind.from_pretrained(out, dtype=getattr(torch, dtype))
        state = live.state_dict()
        for name, tensor in written.state_dict().items():
            assert torch.equal(state[name], tensor), name


def edit_config(folder: Path, **keys) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))


@pytest.mark.parametrize(
    "left_over",
    [
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "fp8"},
        {"quant_method": "nobody-knows"},
    ],
)
def test_a_left_over_quantisation_config_is_ignored(left_over, tmp_path):
    base, tuned = base_and_tuned("llama", tmp_path)
    recipe = halfway(base, tuned)
    expected = ResidentModel(str(base), [str(tuned)], "float32").load(recipe)
    logits = run(expected.model)
    for folder in (base, tuned):
        edit_config(folder, quantization_config=left_over)
    resident = ResidentModel(str(base), [str(tuned)], "float32")
    assert torch.equal(run(resident.load(recipe).model), logits)


def test_a_part_that_the_base_lacks_is_an_error(tmp_path):
    """transformers would fill it with random numbers, and say so in a log."""
    base, tuned = base_and_tuned("llama", tmp_path)
    for folder in (base, tuned):
        edit_config(folder, architectures=["LlamaForSequenceClassification"])
    with pytest.raises(
        CheckpointError, match=r"has no score.weight, which a LlamaForSeq"
    ):
        ResidentModel(str(base), [str(tuned)])


def test_a_pooler_may_be_missing(tmp_path):
    """Models of sentence embeddings often have none."""
    torch.manual_seed(0)
    masked = ARCHITECTURES["bert"]()
    masked.bert.save_pretrained(tmp_path / "base")
    moved(masked).bert.save_pretrained(tmp_path / "tuned")
    save_tokenizer(tmp_path / "base")
    resident = ResidentModel(str(tmp_path / "base"), [str(tmp_path / "tuned")])
    assert isinstance(resident.model, transformers.BertModel)
    resident.load(halfway(tmp_path / "base", tmp_path / "tuned"))


def test_a_model_that_is_loaded_otherwise_is_an_error(tmp_path, monkeypatch):
    """A version of transformers that changes weights in a way that we do not see."""
    base, tuned = base_and_tuned("llama", tmp_path)
    load = transformers.LlamaForCausalLM.from_pretrained

    def load_permuted(*args, **options):
        model = load(*args, **options)
        weight = model.model.layers[1].self_attn.q_proj.weight
        weight.data = weight.data.flip(0)
        return model

    monkeypatch.setattr(transformers.LlamaForCausalLM, "from_pretrained", load_permuted)
    with pytest.raises(CheckpointError, match=r"base: transformers changes .*q_proj"):
        ResidentModel(str(base), [str(tuned)])


def test_a_model_that_transformers_does_not_know_is_an_error(tmp_path):
    base, tuned = base_and_tuned("llama", tmp_path)
    for folder in (base, tuned):
        edit_config(folder, model_type="unheard-of")
    with pytest.raises(CheckpointError, match=r"base: transformers cannot read config"):
        ResidentModel(str(base), [str(tuned)])


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gemma3_vl", "llava"])
@pytest.mark.parametrize("in_memory", ["base", "tuned"])
def test_models_under_their_names_in_memory(family, in_memory, tmp_path):
    """Trainers write transformers' own layout, such as packed experts."""
    base, tuned = base_and_tuned(family, tmp_path)
    recipe = halfway(base, tuned)
    expected = merge(recipe, tmp_path / "expected")
    kind = type(ARCHITECTURES[family]())
    folder = tmp_path / in_memory
    model = kind.from_pretrained(folder)
    shutil.rmtree(folder)
    model.save_pretrained(folder, save_original_format=False)
    save_tokenizer(folder)
    merged = ResidentModel(str(base), [str(tuned)], "float32").load(recipe)
    assert merged.facts["sparsity"] == pytest.approx(-0.5, abs=1e-6)
    written = kind.from_pretrained(expected, dtype=torch.float32).state_dict()
    for name, tensor in merged.model.state_dict().items():
        assert torch.equal(tensor, written[name]), name
