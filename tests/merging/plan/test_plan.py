"""What a plan knows before a weight is read: every error, the cost, the config of the result."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from paretomerge.checkpoint.reader import Checkpoint
from paretomerge.errors import CheckpointError, RecipeError
from paretomerge.merging.engine import merge, merged_tensors
from paretomerge.merging.methods import METHODS
from paretomerge.merging.plan.cost import estimate_cost
from paretomerge.merging.plan.make import make_plan
from paretomerge.recipe import Recipe


def plan(pico, text, **options):
    return make_plan(Recipe.from_yaml(text.replace("PICO", str(pico))), **options)


TWO = "base_model: PICO/base\nmodels: [{model: PICO/ada}, {model: PICO/bob}]\n"


def test_every_error_is_told_at_once(pico):
    text = (
        "merge_method: ties\nbase_model: PICO/base\nmodels:\n"
        "- {model: PICO/eve, parameters: {weight: 1}}\n- {model: PICO/mallory, parameters: "
        "{wieght: 1}}\n"
        "parameters: {densty: 0.5}"
    )
    with pytest.raises(RecipeError) as caught:
        plan(pico, text)
    told = str(caught.value)
    assert told.startswith("4 problems:") and len(caught.value.parts) == 4
    for part in ("eve", "mallory", "did you mean 'weight'", "did you mean 'density'"):
        assert part in told


def test_wild_values_are_told_together_and_once(pico):
    with pytest.raises(RecipeError) as caught:
        plan(
            pico,
            "merge_method: ties\n"
            + TWO
            + "parameters: {weight: 1, density: [0.5, 1.5], lambda: much}",
        )
    assert (
        len(caught.value.parts) == 2
        and "density" in caught.value.parts[0]
        and "lambda" in caught.value.parts[1]
    )


def test_what_no_method_reads_is_an_error_and_what_others_read_a_note(pico):
    made = plan(
        pico,
        "merge_method: task_arithmetic\n"
        + TWO
        + "parameters: {weight: 0.5, density: 0.5, int8_mask: true}",
    )
    assert [note for note in made.notes if "density" in note] and not [
        note for note in made.notes if "int8_mask" in note
    ]
    text = (
        "merge_method: ties\nbase_model: PICO/base\nmodels: [{model: PICO/ada, parameters: "
        "{weight: 1, lambda: 2}}]"
    )
    made = plan(pico, text)
    assert (
        "`lambda` holds for the whole merge" in made.notes[0]
        and made.jobs[0].options["lambda"] == 1
    )


def test_a_weight_of_sce_that_mergekit_ignores_is_a_note(pico):
    text = "merge_method: sce\n" + TWO + "parameters: {weight: WEIGHT}"
    (note,) = plan(pico, text.replace("WEIGHT", "0.5")).notes
    assert "mergekit ignores it" in note
    assert not plan(pico, text.replace("WEIGHT", "1.0")).notes
    gradient = plan(pico, text.replace("WEIGHT", "[1.0, 0.5]"))
    assert gradient.notes == (note,)
    assert gradient.jobs[0].parameters[0]["weight"] == 1.0


def test_cost_is_read_from_headers(pico):
    made = plan(pico, "merge_method: ties\n" + TWO + "parameters: {weight: 1}")
    size = sum(
        header.bytes for header in Checkpoint(str(pico / "base")).headers.values()
    )
    told = estimate_cost(made)
    assert (told.read, told.written) == (3 * size, size)
    assert told.seconds > 0 and estimate_cost(made, workers=2).memory > told.memory
    whole = plan(pico, "merge_method: tsv\n" + TWO)
    assert (
        METHODS["tsv"].whole_tensors
        and estimate_cost(whole).memory > told.memory
        and estimate_cost(whole).seconds is None
    )


def test_a_plan_reads_no_weight(pico, monkeypatch):
    monkeypatch.setattr("os.preadv", lambda *_: pytest.fail("read a weight"))
    for method in ("ties", "karcher", "tsv"):
        plan(pico, f"merge_method: {method}\n" + TWO + "parameters: {weight: 1}")


def test_hub_headers_are_enough_for_a_plan(pico, tmp_path, monkeypatch):
    """A repository whose weights are not here.

    The Hub tells their headers (its answer is simulated: no network in tests).
    """
    from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata
    from huggingface_hub.utils._safetensors import TensorInfo

    codes = {"bfloat16": "BF16"}
    headers = Checkpoint(str(pico / "ada")).headers
    infos = {
        name: TensorInfo(codes[h.dtype], list(h.shape), (0, h.bytes))
        for name, h in headers.items()
    }
    told = SafetensorsRepoMetadata(
        None,
        False,
        dict.fromkeys(infos, "f"),
        {"f": SafetensorsFileMetadata({}, infos)},
    )
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.get_safetensors_metadata",
        lambda repo, revision: asked.append((repo, revision)) or told,
    )
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda *_, allow_patterns, **__: _no_weights(pico, tmp_path, allow_patterns),
    )
    text = (
        "merge_method: task_arithmetic\nbase_model: PICO/base\nmodels: [{model: "
        "owner/ada@v2}]\nparameters: {weight: 1}"
    )
    made = plan(pico, text, download=False)
    assert asked == [("owner/ada", "v2")] and estimate_cost(made).read == 2 * sum(
        h.bytes for h in headers.values()
    )


def _no_weights(pico, folder, patterns):
    assert not any("safetensors" in pattern for pattern in patterns)
    shutil.copytree(
        pico / "ada",
        folder / "ada",
        ignore=shutil.ignore_patterns("*.safetensors"),
        dirs_exist_ok=True,
    )
    return str(folder / "ada")


def test_weights_that_were_downloaded_before_are_enough_for_a_plan(pico, monkeypatch):
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda *_, **__: str(pico / "ada")
    )
    text = (
        "merge_method: task_arithmetic\nbase_model: PICO/base\nmodels: [{model: "
        "owner/ada@v2}]\nparameters: {weight: 1}"
    )
    headers = Checkpoint(str(pico / "ada")).headers
    made = plan(pico, text, download=False)
    assert estimate_cost(made).read == 2 * sum(h.bytes for h in headers.values())


def test_each_tensor_keeps_the_dtype_it_has_in_the_base(pico, tmp_path):
    shutil.copytree(pico / "base", tmp_path / "mixed")
    tensors = load_file(tmp_path / "mixed" / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    save_file(
        tensors, tmp_path / "mixed" / "model.safetensors", metadata={"format": "pt"}
    )
    text = (
        f"merge_method: task_arithmetic\nbase_model: {tmp_path}/mixed\nmodels: "
        f"[{{model: PICO/ada}}]\nparameters: {{weight: 1}}"
    )
    dtypes = {job.name: job.dtype for job in plan(pico, text).jobs}
    assert dtypes.pop("model.norm.weight") == "float32" and set(dtypes.values()) == {
        "bfloat16"
    }
    assert {job.dtype for job in plan(pico, text + "\ndtype: float16").jobs} == {
        "float16"
    }


def test_a_head_of_its_own_unties_the_result(pico, tmp_path):
    """ada has a head, the base's is its embedding.

    The result has the merged head, and a config that says so.
    """
    from transformers import AutoModelForCausalLM

    shutil.copytree(pico / "base", tmp_path / "tied")
    tensors = load_file(tmp_path / "tied" / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(
        tensors, tmp_path / "tied" / "model.safetensors", metadata={"format": "pt"}
    )
    config = (
        (tmp_path / "tied" / "config.json")
        .read_text()
        .replace('"tie_word_embeddings": false', '"tie_word_embeddings": true')
    )
    (tmp_path / "tied" / "config.json").write_text(config)
    text = (
        f"merge_method: task_arithmetic\nbase_model: {tmp_path}/tied\nmodels: "
        f"[{{model: {pico}/ada}}]\nparameters: {{weight: 0.5}}"
    )
    merge(Recipe.from_yaml(text), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    head = (
        tensors["model.embed_tokens.weight"].float()
        + load_file(pico / "ada" / "model.safetensors")["lm_head.weight"].float()
    ) / 2
    assert not model.config.tie_word_embeddings
    torch.testing.assert_close(model.lm_head.weight.data, head, rtol=1e-2, atol=1e-3)


def test_blocks_of_any_size_give_the_same_bytes(pico, tmp_path):
    for method in (
        "ties",
        "dare_ties",
        "della",
        "breadcrumbs",
        "sce",
        "karcher",
        "model_stock",
        "multislerp",
    ):
        keys = "parameters: {weight: 0.4, density: 0.5, select_topk: 0.5}"
        made = plan(pico, f"merge_method: {method}\n" + TWO + keys)
        reference = dict(merged_tensors(made))
        for block in (1, 50, 1 << 20):
            assert all(
                torch.equal(tensor, reference[name])
                for name, tensor in merged_tensors(made, block=block)
            ), (method, block)


def test_a_device_that_is_not_there(pico, tmp_path):
    from paretomerge.errors import ConfigError

    recipe = Recipe.from_yaml(
        (
            "merge_method: linear\nmodels: [{model: PICO/ada}]\nparameters: {weight: 1}"
        ).replace("PICO", str(pico))
    )
    with pytest.raises(ConfigError, match="expected cpu, cuda"):
        merge(recipe, tmp_path / "out", device="abacus")
    assert list(tmp_path.iterdir()) == []


def test_the_card_names_licences_and_checksums(pico, tmp_path):
    import hashlib

    for name in ("ada", "bob"):
        shutil.copytree(pico / name, tmp_path / name)
        (tmp_path / name / "README.md").write_text(
            "---\nlicense: apache-2.0\n---\n# x\n"
        )
    text = (
        f"merge_method: linear\nmodels: [{{model: {tmp_path}/ada}}, "
        f"{{model: {tmp_path}/bob}}]\nparameters: {{weight: 1}}"
    )
    merge(Recipe.from_yaml(text), tmp_path / "out", shard_bytes=20_000)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: apache-2.0" in card and card.count("| apache-2.0 |") == 2
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 1
    assert all(
        f"{hashlib.sha256(s.read_bytes()).hexdigest()}  {s.name}" in card
        for s in shards
    )
    shutil.copytree(pico / "cyd", tmp_path / "cyd")
    merge(
        Recipe.from_yaml(text.replace("}]", f"}}, {{model: {tmp_path}/cyd}}]")),
        tmp_path / "out2",
    )
    card = (tmp_path / "out2" / "README.md").read_text()
    assert "license:" not in card and "not stated" in card


def test_a_model_that_only_gives_its_tokenizer(pico):
    made = plan(
        pico,
        "merge_method: task_arithmetic\n"
        + TWO
        + "parameters: {weight: 1}\ntokenizer_source: PICO/cyd",
    )
    assert made.vocabulary is not None and made.vocabulary.size == 32
    with pytest.raises(CheckpointError, match="there is no such folder"):
        plan(
            pico,
            "merge_method: task_arithmetic\n"
            + TWO
            + "parameters: {weight: 1}\ntokenizer_source: ./elsewhere",
        )
