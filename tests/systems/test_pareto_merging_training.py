"""Training a family on unlabelled texts, and the command line of families."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import LlamaForCausalLM

from paretomerge.checkpoint.operand import matrix_shape
from paretomerge.errors import ConfigError
from paretomerge.systems.pareto_merging import (
    ParetoFamily,
    TrainingSettings,
    pareto_merge,
)
from paretomerge.systems.pareto_merging.texts import read_texts
from tests.calibration.models import SOURCES, save_gpt2
from tests.cli.test_cli import paretomerge
from tests.conftest import EXPERTS, pico_states, save_pico

SETTINGS = TrainingSettings(
    steps=30, learning_rate=2e-2, batch_size=8, new_tokens=3, check_every=10
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A file of texts for each expert, in three forms."""
    folder = tmp_path_factory.mktemp("texts")
    texts = []
    for i in range(20):
        start = chr(ord("a") + i)
        texts.append(f"{start}bc=")
    files = {name: folder / f"{name}.txt" for name in EXPERTS}
    files["bob"] = folder / "bob.jsonl"
    files["ada"].write_text("\n\n".join(texts))
    lines = [json.dumps({"prompt": text, "answer": "x"}) for text in texts]
    files["bob"].write_text("\n".join(lines))
    files["cyd"].write_text("\n".join(texts))
    return files


@pytest.fixture(scope="module")
def far(tmp_path_factory):
    """Experts that are far from the base, so that a low rank loses much of them."""
    folder = tmp_path_factory.mktemp("far")
    states = pico_states(layers=2, width=32)
    base = states["base"]
    for name, state in states.items():
        moved = {n: base[n] + 4 * (t - base[n]) for n, t in state.items()}
        save_pico(folder / name, moved, layers=2, width=32)
    return folder


def train(folder, out, data, settings=SETTINGS):
    paths = [str(folder / name) for name in EXPERTS]
    return pareto_merge(
        str(folder / "base"),
        paths,
        out,
        rank=2,
        dtype="float32",
        data=data,
        training=settings,
    )


@pytest.fixture(scope="module")
def trained(far, data, tmp_path_factory):
    return train(far, tmp_path_factory.mktemp("trained") / "out", data)


def test_training_lowers_the_divergence_and_the_seed_decides_it(
    far, data, trained, tmp_path
):
    report = trained.manifest.training
    assert report["divergence_after"] < 0.9 * report["divergence_before"]
    assert report["texts"] == dict.fromkeys(EXPERTS, 20)
    again = train(far, tmp_path / "again", data)
    assert again.manifest.training == report
    one, other = trained.merge("mean"), again.merge("mean")
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name])
    seeded = train(far, tmp_path / "seed", data, replace(SETTINGS, seed=1))
    assert seeded.manifest.training["divergence_after"] != report["divergence_after"]


def test_the_divergence_is_that_of_the_loaded_models(far, data, tmp_path):
    """Computed here by transformers, text by text, without padding."""
    settings = replace(
        SETTINGS, new_tokens=0, steps=1, check_every=1, watched_share=0.9
    )
    family = train(far, tmp_path / "out", data, settings)
    closed = pareto_merge(
        str(far / "base"),
        [str(far / name) for name in EXPERTS],
        tmp_path / "closed",
        rank=2,
        dtype="float32",
    )
    # 18 of the 20 texts are watched; all have one length, and the difference is small.
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(far / "base")
    texts = read_texts(data["cyd"])
    total = 0.0
    gammas = [{name: 1} for name in EXPERTS]
    for gamma in (*gammas, dict.fromkeys(EXPERTS, 1)):
        closed.write(gamma, tmp_path / "at", overwrite=True)
        merged = LlamaForCausalLM.from_pretrained(tmp_path / "at")
        shares = closed.gamma(gamma)
        for k, name in enumerate(EXPERTS):
            expert = LlamaForCausalLM.from_pretrained(far / name, dtype=torch.float32)
            divergences = []
            for text in texts:
                ids = tokenizer(text, return_tensors="pt")["input_ids"]
                with torch.no_grad():
                    p = expert(ids).logits[0].log_softmax(-1)
                    q = merged(ids).logits[0].log_softmax(-1)
                divergences.append(float((p.exp() * (p - q)).sum(-1).mean()))
            total += float(shares[k]) * sum(divergences) / len(divergences) / 4
    before = family.manifest.training["divergence_before"]
    assert before == pytest.approx(total, rel=0.05)


def test_a_trained_family_is_a_family(far, trained):
    loaded = ParetoFamily.load(trained.folder)
    assert loaded.manifest.training["steps"] == 30
    for name, rank in loaded.manifest.ranks.items():
        factors = loaded.factors(name)
        assert rank == 2
        rows, columns = matrix_shape(loaded.base.headers[name].shape)
        assert factors.update(torch.ones(3)).shape == (rows, columns)
    files = sorted(path.name for path in trained.folder.iterdir())
    expected = ["README.md", "base", "factors-00001.safetensors", "pareto_family.json"]
    assert files == expected


def test_training_that_does_not_help_is_not_taken(far, data, tmp_path):
    family = train(far, tmp_path / "out", data, replace(SETTINGS, learning_rate=10.0))
    report = family.manifest.training
    assert report["best_step"] == 0
    assert report["divergence_after"] == report["divergence_before"]
    paths = [str(far / name) for name in EXPERTS]
    closed = pareto_merge(
        str(far / "base"), paths, tmp_path / "closed", rank=2, dtype="float32"
    )
    for name, tensor in closed.merge({"ada": 1}).items():
        assert torch.equal(tensor, family.tensor(name, {"ada": 1}))


def test_training_that_cannot_be_done_is_refused(far, pico, data, tmp_path):
    paths = [str(pico / name) for name in EXPERTS]
    with pytest.raises(ConfigError, match="nothing to train"):
        pareto_merge(str(pico / "base"), paths, tmp_path / "out", rank=16, data=data)
    with pytest.raises(ConfigError, match="did you mean 'ada'"):
        train(far, tmp_path / "out", {**data, "adda": data["ada"]})
    with pytest.raises(ConfigError, match="needs `data`"):
        pareto_merge(
            str(pico / "base"), paths, tmp_path / "out", rank=2, training=SETTINGS
        )
    for wrong in ({"steps": 0}, {"learning_rate": 0}, {"watched_share": 1.0}):
        with pytest.raises(ConfigError, match=f"training.{next(iter(wrong))}"):
            TrainingSettings(**wrong)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("new_tokens", [3, 0])
def test_texts_that_are_longer_than_the_models_read(tmp_path, new_tokens):
    """GPT-2 has 32 positions: the end of a prompt counts, with room for what is written."""
    save_gpt2(tmp_path)
    letters = "abcdefghijklmnopqrstuvwxyz"
    whole = [letter + letters[:i] + letters for i, letter in enumerate(letters)]
    whole = [text for text in whole if len(text) > 32]
    part = slice(-29, None) if new_tokens else slice(32)
    settings = replace(SETTINGS, steps=2, new_tokens=new_tokens)
    reports = []
    for number, texts in enumerate((whole, [text[part] for text in whole])):
        file = tmp_path / f"{number}.txt"
        file.write_text("\n".join(texts))
        family = pareto_merge(
            str(tmp_path / "base"),
            [str(tmp_path / name) for name in SOURCES],
            tmp_path / f"family-{number}",
            rank=2,
            data=dict.fromkeys(SOURCES, file),
            training=settings,
        )
        reports.append(family.manifest.training)
    assert reports[0] == reports[1]
    too_many = replace(settings, new_tokens=32)
    with pytest.raises(
        ConfigError, match=r"read 32 tokens in all, so 32 .* leave none"
    ):
        pareto_merge(
            str(tmp_path / "base"),
            [str(tmp_path / name) for name in SOURCES],
            tmp_path / "none",
            rank=2,
            data=dict.fromkeys(SOURCES, file),
            training=too_many,
        )
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a\nb\nc\n", "holds 3 texts"),
        ('{"prompt": "a"}\n{"answer": "b"}\n', "line 2: has neither"),
        ('{"prompt": "a"}\n[', "line 2: is not JSON"),
    ],
)
def test_files_of_no_use_are_refused(tmp_path, content, message):
    suffix = ".jsonl" if content.startswith("{") else ".txt"
    file = tmp_path / f"texts{suffix}"
    file.write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_texts(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_texts(tmp_path / "nowhere.txt")


# ----- the command line


@pytest.fixture(scope="module")
def family(pico, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "family"
    paths = [pico / name for name in EXPERTS]
    done = paretomerge(
        "pareto-merge", pico / "base", *paths, "--out", folder, "--rank", "2"
    )
    assert "energy of the deltas that the rank keeps" in done.stdout
    assert "MB of factors" in done.stdout
    return folder


def test_a_preference_is_picked_from_a_family(family, tmp_path):
    out = tmp_path / "merged"
    done = paretomerge("pick", family, "--prefer", "ada=0.7,bob=0.7", "--out", out)
    assert "ada=0.5,bob=0.5,cyd=0" in done.stdout
    expected = ParetoFamily.load(family).merge({"ada": 1, "bob": 1})
    model = LlamaForCausalLM.from_pretrained(out)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name])
    done = paretomerge("pick", family, "--prefer", "mean")
    assert "add --out" in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "needs a preference; add --prefer ada=1,bob=1,cyd=1"),
        (["--prefer", "adda=1"], "did you mean 'ada'"),
        (["--prefer", "ada=-1"], "0 or more"),
        (["--prefer", "ada=1", "--trial", "3"], "--trial: is for a study"),
        (["--prefer", "ada=1", "--refine", "2"], "--refine: is for a study"),
        (["--knee"], "--knee: is for a study"),
        (["--prefer", "knee"], "write mean or"),
    ],
)
def test_picks_without_a_meaning_are_refused(family, tmp_path, options, message):
    done = paretomerge("pick", family, *options, "--out", tmp_path / "out", ok=False)
    assert done.returncode == 1
    assert message in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_family_is_refused(pico):
    done = paretomerge("pick", pico / "base", "--prefer", "ada=1", ok=False)
    assert "has no pareto_family.json" in done.stderr


def test_the_command_trains(far, data, tmp_path):
    paths = [far / name for name in EXPERTS]
    files = []
    for name, file in data.items():
        files += ["--data", f"{name}={file}"]
    out = ("--out", tmp_path / "out")
    arguments = ("pareto-merge", far / "base", *paths, *out, "--rank", "2")
    done = paretomerge(*arguments, *files, "--steps", "2", "--new-tokens", "2")
    assert "on texts that were split off" in done.stdout
    for wrong, message in (
        (["--steps", "2"], "--steps: is for training"),
        (["--data", "ada"], "write NAME=FILE"),
        (["--data", "ada=a", "--data", "ada=b"], "named twice"),
    ):
        done = paretomerge(*arguments, *wrong, ok=False)
        assert message in done.stderr
