import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from paretomerge.checkpoint.architecture import Architecture
from paretomerge.checkpoint.reader import Checkpoint
from paretomerge.checkpoint.writer import TensorSpec, WeightsWriter, new_folder
from paretomerge.errors import CheckpointError


def test_architecture_tells_layers_and_roles_from_names(pico):
    architecture = Checkpoint(str(pico / "base")).architecture
    assert (architecture.prefix, architecture.depth) == ("model.layers.", 4)
    roles = {
        "model.layers.2.self_attn.q_proj.weight": "attention",
        "model.layers.2.mlp.up_proj.weight": "mlp",
        "model.layers.2.post_attention_layernorm.weight": "other",
        "model.embed_tokens.weight": "other",
        "lm_head.weight": "other",
    }
    assert {name: architecture.role(name) for name in roles} == roles
    assert architecture.role_filters("attention") == (".self_attn.",)
    assert architecture.layer("model.layers.2.mlp.up_proj.weight") == 2
    assert (
        architecture.at_layer("model.layers.2.mlp.up_proj.weight", 7)
        == "model.layers.7.mlp.up_proj.weight"
    )
    assert architecture.is_embedding(
        "model.embed_tokens.weight"
    ) and not architecture.is_embedding("lm_head.weight")


def test_architecture_is_not_a_list_of_models():
    names = [
        f"transformer.h.{i}.{part}.weight"
        for i in range(3)
        for part in ("attn.c_attn", "mlp.c_fc", "ln_1")
    ]
    names += [
        f"transformer.h.{i}.moe.experts.{e}.w" for i in range(3) for e in range(3)
    ] + ["transformer.wte.weight"]
    architecture = Architecture.infer(names, {"n_layer": 3})
    assert architecture.prefix == "transformer.h."
    assert architecture.role("transformer.h.0.moe.experts.1.w") == "mlp"
    assert architecture.role("transformer.h.0.ln_1.weight") == "other"
    with pytest.raises(CheckpointError, match="expected 5 numbered layers"):
        Architecture.infer(names, {"n_layer": 5})


def test_reads_single_files_and_shards_alike(pico):
    whole, sharded = Checkpoint(str(pico / "ada")), Checkpoint(str(pico / "bob"))
    assert len({h.file for h in sharded.headers.values()}) > 1
    assert set(whole.headers) == set(sharded.headers)
    assert whole.dtype == "bfloat16"
    name = "model.layers.0.mlp.up_proj.weight"
    assert sharded.tensor(name).shape == sharded.headers[name].shape


def write(folder, specs, tensors, **options):
    with WeightsWriter(folder, specs, **options) as writer:
        for name in reversed(tensors):  # any order, in pieces
            flat = tensors[name].reshape(-1)
            writer.write(name, 1, flat[1:])
            writer.write(name, 0, flat[:1])


def test_written_shards_are_what_safetensors_reads(tmp_path):
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.arange(6).to(torch.bfloat16),
        "c": torch.zeros(()),
    }
    specs = [
        TensorSpec(n, str(t.dtype).removeprefix("torch."), tuple(t.shape))
        for n, t in tensors.items()
    ]
    write(tmp_path, specs, tensors)
    back = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(back[n], t) for n, t in tensors.items())
    (tmp_path / "cut").mkdir()
    write(tmp_path / "cut", specs, tensors, shard_bytes=20)
    index = json.loads((tmp_path / "cut" / "model.safetensors.index.json").read_text())
    assert (
        set(index["weight_map"]) == set(tensors)
        and index["metadata"]["total_size"] == 76
    )
    assert len(set(index["weight_map"].values())) == 2


def test_a_failed_write_leaves_nothing_behind(tmp_path):
    with pytest.raises(RuntimeError), new_folder(tmp_path / "out") as folder:
        (folder / "half").write_text("x")
        raise RuntimeError("stop")
    with (
        pytest.raises(CheckpointError, match="free some space"),
        new_folder(tmp_path / "out"),
    ):
        raise OSError(28, "No space left on device")
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_full_folder_is_not_overwritten_unasked(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with (
        pytest.raises(CheckpointError, match="--overwrite"),
        new_folder(tmp_path / "out"),
    ):
        raise AssertionError("not reached")
    assert (tmp_path / "out" / "precious").read_text() == "x"


def write_index(folder, text):
    """An index in the place of the single file, which would come first."""
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text)


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda f: (f / "config.json").unlink(), "is this a Hugging Face model folder"),
        (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "pickle"),
        (
            lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 100),
            "not a safetensors file",
        ),
        (
            lambda f: (f / "model.safetensors").write_bytes(
                (f / "model.safetensors").read_bytes()[:-10]
            ),
            "damaged",
        ),
        (
            lambda f: write_index(f, '{"weight_map": {"a": "../x.safetensors"}}'),
            "same folder",
        ),
        (
            lambda f: write_index(f, '{"weight_map": {"a": "x.safetensors"}}'),
            "which is missing",
        ),
    ],
)
def test_broken_checkpoints_are_named(pico, tmp_path, harm, told):
    shutil.copytree(pico / "ada", tmp_path / "m")
    harm(tmp_path / "m")
    with pytest.raises(CheckpointError, match=told):
        Checkpoint(str(tmp_path / "m"))


def test_a_missing_model_is_named():
    with pytest.raises(CheckpointError, match="there is no such folder"):
        Checkpoint("./not/there")


def test_index_that_promises_too_much(pico, tmp_path):
    shutil.copytree(pico / "ada", tmp_path / "m")
    save_file({"a": torch.zeros(1)}, tmp_path / "m" / "x.safetensors")
    write_index(
        tmp_path / "m", '{"weight_map": {"a": "x.safetensors", "b": "x.safetensors"}}'
    )
    with pytest.raises(CheckpointError, match="lists 'b'"):
        Checkpoint(str(tmp_path / "m"))


def test_a_tensor_that_was_not_written_is_no_endless_wait(tmp_path):
    specs = [TensorSpec("a", "float32", (2, 3)), TensorSpec("b", "float32", (4,))]
    with WeightsWriter(tmp_path, specs) as writer:
        writer.write("a", 0, torch.ones(2, 3))
        writer.write("b", 0, torch.ones(3))
        with pytest.raises(RuntimeError, match="b: 4 bytes have not been written"):
            writer.checksums()
        writer.write("b", 3, torch.ones(1))
        assert len(writer.checksums()) == 1
