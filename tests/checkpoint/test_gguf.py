"""GGUF files of a small Llama, written by the reference library, against the weights in them."""

import shutil

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from paretomerge.checkpoint.gguf import convert
from paretomerge.checkpoint.json_file import read_json
from paretomerge.checkpoint.reader import Checkpoint
from paretomerge.errors import CheckpointError
from paretomerge.merging.engine import merge
from tests.cli.test_cli import paretomerge
from tests.conftest import pico_config

LAYERS, WIDTH = 2, 32  # a block of Q8_0 holds 32 weights
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
TYPES = gguf.GGMLQuantizationType
CHARACTERS = "abcdefghijklmnopqrstuvwxyz"


def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(pico_config(LAYERS, WIDTH))


def gguf_name(name):
    name = name.removeprefix("model.")
    if name.startswith("layers."):
        _, layer, part = name.split(".", 2)
        return f"blk.{layer}.{NAMES[part.removesuffix('.weight')]}.weight"
    whole = {
        "rope_freqs.weight": "rope_freqs.weight",
        "embed_tokens.weight": "token_embd.weight",
        "norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    return whole[name]


def interleaved(weight, heads):
    """llama.cpp turns pairs of neighbours, transformers the two halves of a head."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def write_gguf(path, kind, state, config, licence="apache-2.0"):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_license(licence)
    tokens = ["<s>", "</s>", *CHARACTERS, "ab"]
    tokens += [f"<{i}>" for i in range(config.vocab_size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, tensor in state.items():
        values = tensor.numpy()
        if "q_proj" in name:
            values = interleaved(values, config.num_attention_heads)
        if "k_proj" in name:
            values = interleaved(values, config.num_key_value_heads)
        if values.ndim == 1 or kind is TYPES.F32:
            writer.add_tensor(gguf_name(name), values.astype(np.float32))
        else:
            packed = quantize(np.ascontiguousarray(values), kind)
            writer.add_tensor(gguf_name(name), packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    pico = model()
    for kind in (TYPES.F32, TYPES.Q8_0):
        path = folder / f"pico.{kind.name}.gguf"
        write_gguf(path, kind, pico.state_dict(), pico.config)
    return folder


def test_full_weights_are_converted_to_the_last_bit(files, tmp_path):
    out = convert(files / "pico.F32.gguf", tmp_path / "out")
    weights = load_file(out / "model.safetensors")
    expected = {name: t for name, t in model().state_dict().items() if name in weights}
    assert len(expected) == len(model().state_dict())
    for name, tensor in expected.items():
        assert weights[name].dtype == torch.float32
        assert torch.equal(weights[name], tensor), name
    assert "dequantized_from" not in read_json(out / "config.json")
    ids = torch.arange(6)[None]
    live = AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        assert torch.allclose(live(ids).logits, model()(ids).logits, atol=1e-6)
    assert AutoTokenizer.from_pretrained(out)("baab")["input_ids"] == [3, 2, 28]


def test_quantised_weights_are_those_that_the_file_stands_for(files, tmp_path):
    out = convert(files / "pico.Q8_0.gguf", tmp_path / "out")
    weights = load_file(out / "model.safetensors")
    for name, tensor in model().state_dict().items():
        values = tensor.numpy()
        if values.ndim == 2 and "q_proj" not in name and "k_proj" not in name:
            values = dequantize(quantize(values, TYPES.Q8_0), TYPES.Q8_0)
            assert torch.equal(weights[name], torch.tensor(values).bfloat16()), name
        assert torch.allclose(weights[name].float(), tensor, atol=2e-3), name


def test_the_cards_say_that_weights_were_dequantised(files, tmp_path):
    out = convert(files / "pico.Q8_0.gguf", tmp_path / "full")
    card = (out / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "dequantised from Q8_0 to bfloat16" in card
    assert Checkpoint(str(out)).config["dequantized_from"] == "pico.Q8_0.gguf (Q8_0)"
    recipe = {"merge_method": "linear", "models": [{"model": str(out)}] * 2}
    recipe["parameters"] = {"weight": 0.5}
    merged = merge(recipe, tmp_path / "merged")
    merged_card = (merged / "README.md").read_text()
    assert "of full were dequantised from pico.Q8_0.gguf (Q8_0)" in merged_card
    assert "license: apache-2.0" in merged_card
    assert "\n\n\n" not in merged_card
    # Each note is a paragraph: Markdown joins lines that follow each other.
    shutil.copytree(out, tmp_path / "again")
    recipe["models"] = [{"model": str(out)}, {"model": str(tmp_path / "again")}]
    two = (merge(recipe, tmp_path / "two") / "README.md").read_text()
    notes = [part for part in two.split("\n\n") if "dequantised" in part]
    assert len(notes) == 2


def test_a_gguf_source_is_refused_with_the_command_that_converts_it(files, tmp_path):
    file = files / "pico.F32.gguf"
    with pytest.raises(
        CheckpointError, match=r"paretomerge convert .*F32\.gguf pico\.F32"
    ):
        Checkpoint(str(file))
    with pytest.raises(
        CheckpointError, match=r"holds a GGUF file.*`paretomerge convert"
    ):
        Checkpoint(str(files))
    # Many folders hold the config beside it.
    (tmp_path / "both").mkdir()
    shutil.copy(file, tmp_path / "both")
    (tmp_path / "both" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(
        CheckpointError, match=r"only a GGUF file.*`paretomerge convert"
    ):
        Checkpoint(str(tmp_path / "both"))


def test_command(files, tmp_path):
    quantised, full = files / "pico.Q8_0.gguf", files / "pico.F32.gguf"
    out = tmp_path / "out"
    done = paretomerge("convert", quantised, "out", cwd=tmp_path)
    assert done.stdout == "wrote out\n"
    assert Checkpoint(str(out)).dtype == "bfloat16"
    refused = paretomerge("convert", full, "out", cwd=tmp_path, ok=False)
    assert "--overwrite" in refused.stderr
    paretomerge("convert", "--overwrite", full, "out", cwd=tmp_path)
    assert Checkpoint(str(out)).dtype == "float32"


def test_lost_scaling_of_positions_is_refused(tmp_path):
    """As in files of Llama 3.1, whose factors transformers does not read."""
    state = model().state_dict() | {"rope_freqs.weight": torch.ones(8)}
    path = write_gguf(tmp_path / "x.gguf", TYPES.F32, state, model().config)
    with pytest.raises(CheckpointError, match="scales rotary positions"):
        convert(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    convert(path, tmp_path / "out", allow_mismatch=True)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"PK\x03\x04", b"GGUF" + bytes(64)])
def test_other_and_damaged_files(content, tmp_path):
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.gguf: (not a GGUF file|damaged)"):
        convert(tmp_path / "x.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_that_was_cut_short_leaves_nothing_behind(files, tmp_path):
    whole = (files / "pico.F32.gguf").read_bytes()
    (tmp_path / "x.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"x\.gguf: damaged"):
        convert(tmp_path / "x.gguf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]


def test_an_architecture_that_transformers_does_not_know(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "novel")
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", np.zeros((2, 2), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"transformers cannot read it: .*novel"):
        convert(tmp_path / "x.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_weight_that_is_not_in_the_file_is_not_made_up(tmp_path):
    state = model().state_dict()
    del state["model.layers.1.mlp.up_proj.weight"]
    path = write_gguf(tmp_path / "x.gguf", TYPES.F32, state, model().config)
    with pytest.raises(CheckpointError, match=r"lacks .*layers\.1\.mlp\.up_proj"):
        convert(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_folder_of_the_file_is_not_replaced(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    path = write_gguf(
        folder / "x.gguf", TYPES.F32, model().state_dict(), model().config
    )
    with pytest.raises(CheckpointError, match=r"holds x\.gguf"):
        convert(path, folder, overwrite=True)
    assert path.exists()


def test_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        convert(tmp_path / "x.gguf", tmp_path / "out")
