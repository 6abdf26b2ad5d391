"""Making, exporting and refusing Twin-Merging folders."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from paretomerge.errors import CheckpointError, ConfigError, ParetoMergeError
from paretomerge.merging.engine import merge
from paretomerge.systems.twin import (
    Manifest,
    TwinModel,
    build_twin,
    export_corner,
    export_mixture,
    is_twin_folder,
    read_prompts,
)
from paretomerge.systems.twin.check import check_computation
from paretomerge.systems.twin.places import find_places
from paretomerge.systems.twin.router import train_router
from tests.architectures import ARCHITECTURES
from tests.checkpoint.test_adapter import UP, adapter, alone, factors
from tests.cli.test_cli import paretomerge
from tests.conftest import pico_config, save_tokenizer
from tests.pico import moved
from tests.systems.twins import (
    LETTERS,
    PROMPTS,
    dense_state,
    encode,
    manifest,
    plain_logits,
    prompts_of,
)

FEW = {task: PROMPTS[task][:6] for task in ("ada", "bob")}


@pytest.fixture(scope="module")
def folder(pico, tmp_path_factory):
    out = tmp_path_factory.mktemp("twin") / "twin"
    return make(pico, out, PROMPTS)


def make(pico, out, prompts=FEW, **options):
    sources = [str(pico / name) for name in prompts]
    return build_twin(str(pico / "base"), sources, prompts, out, **options)


def files_of(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_the_router_tells_tasks_apart_on_prompts_it_has_not_seen(folder):
    model = TwinModel.from_pretrained(folder)
    for task, letters in LETTERS.items():
        unseen = sorted(set(prompts_of(letters, 40, seed=9)) - set(PROMPTS[task]))
        weights = model.task_weights(**encode(unseen))
        right = weights.argmax(1) == model.tasks.index(task)
        assert right.double().mean() > 0.85  # chance is 1 in 3
    facts = manifest(folder)
    assert facts["router_accuracy"] > 0.85
    assert (facts["training_prompts"], facts["validation_prompts"]) == (72, 18)


def test_the_router_is_not_selected_on_what_it_is_trained_on():
    """With labels that nothing explains, validation says so and training would not."""
    generator = torch.Generator().manual_seed(1)
    states = [torch.randn((40, 32), generator=generator) for _ in range(2)]
    trained = train_router(states, seed=0)
    assert 0.1 < trained.accuracy < 0.9
    assert (trained.n_training, trained.n_validation) == (64, 16)


def test_a_router_depends_on_its_seed_alone():
    states = [torch.randn((12, 8)) + task for task in range(3)]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = train_router(states, seed=3).router.state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    same = train_router(states, seed=3).router.state_dict()
    other = train_router(states, seed=4).router.state_dict()
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["layers.0.weight"], other["layers.0.weight"])


def test_the_same_seed_gives_the_same_bytes(pico, tmp_path):
    one = files_of(make(pico, tmp_path / "one", seed=2))
    assert one == files_of(make(pico, tmp_path / "other", seed=2))
    other = files_of(make(pico, tmp_path / "third", seed=3))
    differing = {name for name in one if one[name] != other[name]}
    assert differing == {"router.safetensors", "twin.json"}


def test_theta_star_is_task_arithmetic_and_an_ordinary_checkpoint(pico, tmp_path):
    out = make(pico, tmp_path / "twin", dtype="float32", weight=0.4)
    states = {}
    for name in ("base", "ada", "bob"):
        model = AutoModelForCausalLM.from_pretrained(pico / name, dtype=torch.float32)
        states[name] = model.state_dict()
    shared = AutoModelForCausalLM.from_pretrained(out / "shared").state_dict()
    for name, base in states["base"].items():
        deltas = states["ada"][name] - base + states["bob"][name] - base
        torch.testing.assert_close(shared[name], base + 0.4 * deltas)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_corner_of_the_full_rank_is_the_expert(pico, tmp_path, dtype):
    out = make(pico, tmp_path / "twin", rank_share=1, dtype=dtype)
    corner = export_corner(out, "bob", tmp_path / "corner")
    found = AutoModelForCausalLM.from_pretrained(corner).state_dict()
    expert = AutoModelForCausalLM.from_pretrained(pico / "bob", dtype=dtype)
    for name, tensor in expert.state_dict().items():
        # two roundings, of the difference and of the sum
        eps = torch.finfo(tensor.dtype).eps
        torch.testing.assert_close(found[name], tensor, rtol=2 * eps, atol=eps / 8)


def test_a_source_may_be_an_adapter(pico, tmp_path):
    lora = adapter(tmp_path / "lora", factors(UP, (32, 16)))
    sources = {"ada": str(pico / "ada"), "lora": f"{pico / 'base'}+{lora}"}
    prompts = {"ada": FEW["ada"], "lora": FEW["bob"]}
    out = build_twin(
        str(pico / "base"),
        sources,
        prompts,
        tmp_path / "twin",
        rank_share=1,
        dtype="float32",
    )
    corner = export_corner(out, "lora", tmp_path / "corner")
    whole = merge(alone(pico / "base", lora), tmp_path / "whole")
    expected = load_file(whole / "model.safetensors")
    for name, tensor in load_file(corner / "model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-5)
    assert Manifest.read(out).sources == {"ada": "ada", "lora": "base+lora"}


def test_exported_weights_are_the_sum_from_the_files(folder, tmp_path):
    out = export_mixture(folder, {"cyd": -0.25, "ada": 0.5}, tmp_path / "out")
    expected = dense_state(folder, [0.5, 0, -0.25])
    found = load_file(out / "model.safetensors")
    for name, tensor in load_file(folder / "shared" / "model.safetensors").items():
        assert found[name].dtype == tensor.dtype == torch.bfloat16
        torch.testing.assert_close(found[name], expected[name], rtol=1e-2, atol=1e-3)
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "tokenizer.json", "README.md"} <= names
    assert "mergekit_config.yml" not in names


def test_a_corner_is_the_twin_with_one_hot_weights(folder, tmp_path):
    corner = export_corner(folder, "cyd", tmp_path / "corner")
    plain = AutoModelForCausalLM.from_pretrained(corner, dtype=torch.float32).eval()
    twin = TwinModel.from_pretrained(folder, dtype=torch.float32)
    inputs = encode(["hello"])
    logits = twin(**inputs, task_weights=twin.weights_of({"cyd": 1})).logits[0]
    # the exported weights are rounded to bfloat16 once more
    expected = plain_logits(plain, "hello")
    assert (logits - expected).norm() < 0.02 * expected.norm()


def test_sources_equal_to_the_base_have_nothing_of_their_own(pico, tmp_path):
    sources = {}
    for name in ("same", "again"):
        sources[name] = str(shutil.copytree(pico / "base", tmp_path / name))
    prompts = {"same": FEW["ada"], "again": FEW["bob"]}
    out = build_twin(str(pico / "base"), sources, prompts, tmp_path / "twin")
    assert not load_file(out / "exclusive-1.safetensors")
    plain = AutoModelForCausalLM.from_pretrained(pico / "base").eval()
    logits = TwinModel.from_pretrained(out)(**encode(["hello"])).logits[0]
    assert torch.equal(logits, plain_logits(plain, "hello"))


def test_overwriting_and_refusing_to(pico, folder, tmp_path):
    out = export_corner(folder, "ada", tmp_path / "out")
    with pytest.raises(CheckpointError, match="exists and is not an empty folder"):
        export_corner(folder, "bob", out)
    export_corner(folder, "bob", out, overwrite=True)
    with pytest.raises(CheckpointError, match="would replace"):
        export_corner(folder, "bob", folder.parent, overwrite=True)
    with pytest.raises(CheckpointError, match="would replace the source"):
        export_corner(folder, "bob", folder / "shared", overwrite=True)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("mine")
    for run in (
        lambda: export_corner(folder, "bob", tmp_path / "notes", overwrite=True),
        lambda: make(pico, tmp_path / "notes", overwrite=True),
    ):
        with pytest.raises(CheckpointError, match="holds no checkpoint"):
            run()
    twin = make(pico, tmp_path / "twin")
    assert manifest(make(pico, twin, overwrite=True, seed=7))["seed"] == 7
    with pytest.raises(CheckpointError, match="would replace the source"):
        make(pico, pico, overwrite=True)
    assert (pico / "base" / "config.json").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": ["ada"]}, "name two sources or more, not 1"),
        ({"prompts": {"ada": FEW["ada"]}}, "bob: .* at least 5 different .* got 0"),
        ({"prompts": FEW | {"bob": ["a"] * 9}}, "bob: .* different prompts .* got 1"),
        ({"prompts": FEW | {"dan": ["a"]}}, "dan: no source has this name"),
        # Text is a list of its letters.
        (
            {"prompts": FEW | {"bob": "abcdefg"}},
            "prompts.bob: expected a list, such as",
        ),
        ({"prompts": FEW | {"bob": [1, 2, 3, 4, 5]}}, "prompts.bob: expected text"),
        ({"prompts": None}, "prompts: expected {"),
        ({"rank_share": 0}, "rank_share: a share above 0"),
        ({"rank_share": 1.5}, "rank_share: a share above 0"),
        ({"weight": "much"}, "weight: expected a finite number"),
        ({"seed": -1}, "seed"),
        ({"device": "tpu"}, "device"),
        (
            {
                "models": ["ada", "nil"],
                "prompts": {"ada": FEW["ada"], "nil": FEW["bob"]},
            },
            "nil: expected a folder",
        ),
        ({"weight": 1e38}, "take a smaller --weight"),
    ],
)
def test_what_cannot_be_made_is_refused_and_leaves_nothing(
    pico, tmp_path, change, message
):
    models = change.pop("models", ["ada", "bob"])
    prompts = change.pop("prompts", FEW)
    sources = [pico / name for name in models]
    with pytest.raises(ParetoMergeError, match=message):
        build_twin(pico / "base", sources, prompts, tmp_path / "twin", **change)
    assert not list(tmp_path.iterdir())


def test_a_deep_model_in_bfloat16(tmp_path):
    """Over its layers the rounding of bfloat16 grows as large as what the check looks for."""
    config = pico_config(layers=24, width=32)
    config.initializer_range = 0.3
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    for seed, name in enumerate(("base", "ada", "bob")):
        if seed:
            moved(model, seed)
        model.to(torch.bfloat16).save_pretrained(tmp_path / name)
        save_tokenizer(tmp_path / name)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="bfloat16")
    names = list(model.state_dict())
    # So it was refused, as if the architecture were another one than Llama.
    with pytest.raises(CheckpointError, match="does not compute with its layers"):
        check_computation(model.eval(), find_places(model, names), names)
    out = make(tmp_path, tmp_path / "twin", FEW)
    twin = TwinModel.from_pretrained(out, dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(out / "shared", dtype="float32")
    plain.load_state_dict(dense_state(out, [0.4, 0.6], torch.float64))
    weights = twin.weights_of({"ada": 0.4, "bob": 0.6})
    logits = twin(**encode(["hello"]), task_weights=weights).logits[0]
    expected = plain_logits(plain.eval(), "hello")
    assert (logits - expected).norm() < 1e-3 * expected.norm()


def save_pair(folder, name):
    """A base, an expert and the same expert again under another name."""
    model = ARCHITECTURES[name]()
    for seed, part in enumerate(("base", "ada", "bob")):
        moved(model, seed).save_pretrained(folder / part)
        save_tokenizer(folder / part)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mixtral", "ada: changes .*experts.* cannot have weights of its own"),
        ("mamba", "needs a model with a key-value cache"),
        ("bloom", "needs a model with a key-value cache and position_ids"),
        ("bert", "needs a causal language model"),
        ("t5", "needs a causal language model"),
        ("gemma3_vl", "needs a causal language model"),
    ],
)
def test_other_architectures_are_refused(tmp_path, name, message):
    save_pair(tmp_path, name)
    before = set(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=message) as error:
        make(tmp_path, tmp_path / "twin")
    assert "\n" not in str(error.value) and set(tmp_path.iterdir()) == before


def test_an_architecture_that_mixes_rows_is_refused(tmp_path):
    save_pair(tmp_path, "opt")
    before = set(tmp_path.iterdir())
    with pytest.raises(ParetoMergeError, match=r"cannot have weights"):
        make(tmp_path, tmp_path / "twin")
    assert set(tmp_path.iterdir()) == before


def test_weights_that_layers_do_not_read_are_noticed(pico, tmp_path, monkeypatch):
    """An exclusive part would have no effect there."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    def past_the_layer(self, x):
        up = torch.nn.functional.linear(x, self.up_proj.weight)
        return self.down_proj(self.act_fn(self.gate_proj(x)) * up)

    monkeypatch.setattr(LlamaMLP, "forward", past_the_layer)
    with pytest.raises(CheckpointError, match=r"mlp.up_proj without calling"):
        make(pico, tmp_path / "twin")
    assert not list(tmp_path.iterdir())


def test_quantised_and_untokenised_models_are_refused(pico, tmp_path):
    from safetensors.torch import save_file

    state = load_file(pico / "ada" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    state[name] = state[name].to(torch.int8)
    broken = tmp_path / "quantised"
    broken.mkdir()
    for file in (pico / "ada").iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    prompts = {"quantised": FEW["ada"], "bob": FEW["bob"]}
    sources = [str(broken), str(pico / "bob")]
    with pytest.raises(CheckpointError, match="quantised"):
        build_twin(str(pico / "base"), sources, prompts, tmp_path / "twin")
    mute = tmp_path / "mute"
    mute.mkdir()
    for file in (pico / "base").iterdir():
        if not file.name.startswith("tokenizer"):
            (mute / file.name).write_bytes(file.read_bytes())
    sources = [str(pico / task) for task in FEW]
    with pytest.raises(CheckpointError, match="has no tokenizer, which the router"):
        build_twin(str(mute), sources, FEW, tmp_path / "twin")


def test_a_damaged_folder_is_noticed(pico, tmp_path):
    out = make(pico, tmp_path / "twin")
    assert is_twin_folder(out) and not is_twin_folder(pico / "base")
    assert not is_twin_folder("x" * 5000)
    with pytest.raises(CheckpointError, match="not a Twin-Merging folder"):
        TwinModel.from_pretrained(pico / "base")
    with pytest.raises(CheckpointError, match="unknown task 'dan'"):
        export_corner(out, "dan", tmp_path / "corner")
    with pytest.raises(ConfigError, match="ada: its weight must be a finite number"):
        export_mixture(out, {"ada": float("nan")}, tmp_path / "corner")
    with pytest.raises(ConfigError, match="name a task and its weight"):
        export_mixture(out, {}, tmp_path / "corner")
    file = out / "exclusive-2.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-2] + b"??")
    with pytest.raises(CheckpointError, match=r"exclusive-2.*content changed"):
        TwinModel.from_pretrained(out)
    file.write_bytes(whole[:-2])
    with pytest.raises(CheckpointError, match=r"exclusive-2.*missing, or changed"):
        export_corner(out, "bob", tmp_path / "corner")
    file.write_bytes(whole)
    content = manifest(out)
    for change, message in (
        ({"kind": "emr"}, "not of a version"),
        ({"tasks": None}, "damaged"),
    ):
        (out / "twin.json").write_text(json.dumps({**content, **change}))
        with pytest.raises(CheckpointError, match=message):
            TwinModel.from_pretrained(out)


def test_the_manifest_lists_all_files(folder):
    facts = Manifest.read(folder)
    sizes = {path: len(content) for path, content in files_of(folder).items()}
    del sizes["twin.json"]
    assert {name: file.bytes for name, file in facts.files.items()} == sizes
    assert facts.bytes == sum(sizes.values())
    model = TwinModel.from_pretrained(folder)
    stored = []
    for file in folder.rglob("*.safetensors"):
        stored += [tensor.numel() for tensor in load_file(file).values()]
    assert model.num_parameters() == sum(stored)


def test_prompts_from_files(tmp_path):
    text = tmp_path / "lines.txt"
    text.write_text("one\n\n  two \n")
    assert read_prompts(text) == ["one", "  two "]
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"prompt": "a\\nb", "text": "no"}\n\n{"text": "c"}\n"d"\n')
    assert read_prompts(lines) == ["a\nb", "c", "d"]
    for wrong in ('{"question": "a"}', '{"prompt": 3}', "[1]", "not json", '""'):
        lines.write_text(wrong)
        with pytest.raises(ConfigError, match=r"lines.jsonl, line 1: "):
            read_prompts(lines)
    text.write_bytes("\ufeffa\x0cb\u2028c\r\nd\r\n".encode())
    assert read_prompts(text) == ["a\x0cb\u2028c", "d"]
    lines.write_text(r'"a\ud83d"')
    with pytest.raises(ConfigError, match=r"lines.jsonl, line 1: holds half of"):
        read_prompts(lines)
    with pytest.raises(ConfigError, match=r"nowhere.txt: cannot be read"):
        read_prompts(tmp_path / "nowhere.txt")


def test_the_command(pico, tmp_path):
    options = []
    for task, words in FEW.items():
        (tmp_path / f"{task}.txt").write_text("\n".join(words))
        options += ["--data", f"{task}={tmp_path / task}.txt"]
    models = [pico / name for name in ("base", "ada", "bob")]
    out = tmp_path / "twin"
    done = paretomerge("twin", *models, *options, "--out", out, "--rank-share", 0.2)
    assert "the router is right about" in done.stdout
    assert manifest(out)["rank_share"] == 0.2
    for wrong, message in (
        (["--data", "ada"], "--data: write NAME=FILE, not 'ada'"),
        (["--task", "ada=sort"], "--task: needs --study"),
        (["--study", "study.yaml"], "--study: needs --task"),
        (options, "exists and is not an empty folder"),
    ):
        failed = paretomerge("twin", *models, *wrong, "--out", out, ok=False)
        assert failed.returncode and message in failed.stderr


def test_a_mixture_that_its_dtype_cannot_hold_is_refused(pico, tmp_path):
    twin = make(pico, tmp_path / "twin", dtype="float16")
    with pytest.raises(CheckpointError, match="the sum is too large for float16"):
        export_mixture(twin, {"ada": 1e9}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_tells_where_the_models_differ(pico, tmp_path):
    """theta* has the tensors and the chat template of the base."""
    for name in ("ada", "bob"):
        shutil.copytree(pico / name, tmp_path / name)
    file = tmp_path / "ada" / "model.safetensors"
    tensors = load_file(file) | {"model.layers.0.gate.weight": torch.zeros(2, 2)}
    save_file(tensors, file, metadata={"format": "pt"})
    (tmp_path / "bob" / "chat_template.jinja").write_text("{{ messages }}")
    sources = [str(tmp_path / name) for name in FEW]
    out = build_twin(str(pico / "base"), sources, FEW, tmp_path / "twin")
    first, second = Manifest.read(out).notes
    assert first.startswith("ada: ") and "layers.0.gate.weight" in first
    assert second.startswith("bob: has a chat template")


def test_expand_writes_a_corner(folder, tmp_path):
    paretomerge("expand", folder, tmp_path / "cyd", "--task", "cyd")
    corner = export_corner(folder, "cyd", tmp_path / "corner")
    written = (tmp_path / "cyd" / "model.safetensors").read_bytes()
    assert written == (corner / "model.safetensors").read_bytes()
    wrong = paretomerge(
        *("expand", folder, tmp_path / "x", "--task", "cyd", "--base", "b"), ok=False
    )
    assert "needs no base" in wrong.stderr
    unknown = paretomerge("expand", folder, tmp_path / "x", "--task", "dan", ok=False)
    assert unknown.stderr.count("\n") == 1 and not (tmp_path / "x").exists()
