"""What cannot be merged rightly is refused, before anything is merged, in one sentence."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from paretomerge.calibration import Example, calibrate
from paretomerge.errors import CheckpointError, ConfigError, RecipeError
from paretomerge.merging.engine import merge, write
from paretomerge.merging.plan.make import make_plan
from paretomerge.merging.statistics import MANIFEST_FILE
from tests.calibration.models import save_gpt2
from tests.conftest import EXPERTS, pico_examples, save_tokenizer
from tests.pico import build_pico, moved


def document(folder: Path, calibration, method="regmean", names=EXPERTS, **parameters):
    data = {
        "merge_method": method,
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / name)} for name in names],
        "parameters": parameters,
    }
    if calibration is not None:
        data["calibration"] = str(calibration)
    return data


def refused(error, message, data):
    with pytest.raises(error, match=message):
        make_plan(data)


@pytest.fixture(scope="module")
def of_two(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Statistics `regmean` of ada and bob alone."""
    texts = {str(pico / name): pico_examples(name, 3) for name in ("ada", "bob")}
    out = tmp_path_factory.mktemp("two") / "s"
    return calibrate(str(pico / "base"), list(texts), texts, out)


def test_recipes_without_statistics(pico: Path, tmp_path: Path):
    refused(RecipeError, "regmean: needs statistics", document(pico, None))
    missing = document(pico, tmp_path / "none")
    refused(CheckpointError, "no statistics there .*paretomerge calibrate", missing)


def test_statistics_of_other_models(pico: Path, of_two: Path, tmp_path: Path):
    assert make_plan(document(pico, of_two, names=("ada", "bob")))
    refused(RecipeError, "no statistics of .*cyd", document(pico, of_two))
    only = "no statistics `fisher` of .*ada, only regmean"
    refused(RecipeError, only, document(pico, of_two, "fisher", ("ada", "bob")))
    # Trained again, in the same folder
    for name in ("base", "ada", "bob"):
        shutil.copytree(pico / name, tmp_path / name)
    data = document(tmp_path, of_two, names=("ada", "bob"))
    assert make_plan(data)
    file = tmp_path / "ada" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    refused(RecipeError, "no statistics of .*ada as it is now", data)


def test_a_step_has_no_statistics(pico: Path, of_two: Path):
    inner = document(pico, None, "task_arithmetic", ("ada", "bob"), weight=0.5)
    outer = document(pico, of_two, names=("ada",))
    outer["models"].append({"model": "inner"})
    text = "---\n".join(yaml.safe_dump(d) for d in ({**inner, "name": "inner"}, outer))
    refused(RecipeError, "no statistics of inner", text)


def test_regmean_pp_of_another_merge(pico: Path, pico_calibration: Path):
    assert make_plan(document(pico, pico_calibration, "regmean_pp"))
    same = document(pico, pico_calibration, "regmean_pp", alpha=0.9)
    assert make_plan(same)
    other = document(pico, pico_calibration, "regmean_pp", alpha=0.5)
    refused(RecipeError, "alpha: .* with alpha 0.9, not 0.5", other)
    base = document(pico, pico_calibration, "regmean_pp", ("ada", "bob"))
    base["base_model"] = str(pico / "cyd")
    refused(RecipeError, "over another base", base)


def test_damaged_statistics(pico: Path, of_two: Path, tmp_path: Path):
    folder = tmp_path / "s"
    shutil.copytree(of_two, folder)
    data = document(pico, folder, names=("ada", "bob"))
    manifest = folder / MANIFEST_FILE
    content = json.loads(manifest.read_text())

    def write(changed):
        manifest.write_text(json.dumps(changed))

    write({**content, "format": 2})
    refused(CheckpointError, "of another version", data)
    write({**content, "sources": [{"name": "ada"}]})
    refused(CheckpointError, "damaged", data)
    outside = json.loads(json.dumps(content).replace("0-ada", "../0-ada"))
    write(outside)
    refused(CheckpointError, "expected files of the folder", data)
    write(content)
    (file,) = folder.glob("0-ada*")
    tensors = load_file(file)
    name = "model.layers.0.mlp.down_proj.weight"
    save_file(tensors | {name: torch.zeros(3, 3)}, file)
    write({**content, "origin": "again"})
    refused(
        RecipeError, r"down_proj.weight: .* shape \[3, 3\], expected \[32, 32\]", data
    )
    file.unlink()
    write({**content, "origin": "once more"})
    refused(CheckpointError, "is missing", data)


def test_statistics_that_change_during_a_merge_leave_nothing(
    pico: Path, of_two: Path, tmp_path: Path
):
    folder = tmp_path / "s"
    shutil.copytree(of_two, folder)
    data = document(pico, folder, names=("ada", "bob"))
    plan = make_plan(data)
    (file,) = folder.glob("1-bob*")
    file.write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match="the file changed while it was read"):
        write(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    merge(data, tmp_path / "out")


def test_methods_without_data_ignore_statistics(pico: Path, of_two: Path):
    data = document(pico, of_two, "task_arithmetic", weight=0.5)
    (note,) = make_plan(data).notes
    assert note == "`calibration` means nothing to task_arithmetic and is ignored"


def test_matrices_without_statistics_are_named(
    pico: Path, of_two: Path, tmp_path: Path
):
    folder = tmp_path / "s"
    shutil.copytree(of_two, folder)
    manifest = folder / MANIFEST_FILE
    content = json.loads(manifest.read_text())
    name = "model.layers.2.mlp.up_proj.weight"
    first, second = content["sources"]
    del first["statistics"]["regmean"]["tensors"][name]
    manifest.write_text(json.dumps(content))
    data = document(pico, folder, names=("ada", "bob"))
    refused(RecipeError, "up_proj.weight of other sources, but not of .*ada", data)
    del second["statistics"]["regmean"]["tensors"][name]
    content["origin"] = "again"
    manifest.write_text(json.dumps(content))
    (note,) = make_plan(data).notes
    assert note == (
        f"regmean: 1 matrices of layers have no statistics and are averaged: {name}"
    )


TEXT = [Example("abc")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {}}, "data: .*ada has no text"),
        ({"data": {"eve": TEXT}}, "data: unknown model 'eve'"),
        ({"data": [TEXT]}, "data: expected {"),
        ({"models": "ada"}, "models: expected a list"),
        ({"models": [3]}, "models: expected a folder or a name"),
        ({"kinds": ()}, "kinds: list at least one"),
        ({"kinds": ("hessian",)}, "kinds: unknown kind 'hessian'"),
        ({"alpha": 1.5}, "alpha: expected a number from 0 to 1"),
        ({"alpha": "much"}, "alpha: expected a finite number"),
        ({"examples": 0}, "examples: "),
        ({"models": []}, "models: list the fine-tunes"),
    ],
)
def test_arguments(pico: Path, tmp_path: Path, change, message):
    arguments = {"models": [str(pico / "ada")], "data": {str(pico / "ada"): TEXT}}
    arguments |= change
    with pytest.raises(ConfigError, match=message):
        calibrate(str(pico / "base"), out=tmp_path / "s", **arguments)
    assert not list(tmp_path.iterdir())


def test_texts_that_are_no_examples(pico: Path, tmp_path: Path):
    for texts in (["abc", "def"], 3, {"text": "abc"}):
        data = {str(pico / "ada"): texts}
        with pytest.raises(ConfigError, match="ada: expected a file or a list of exam"):
            calibrate(str(pico / "base"), list(data), data, tmp_path / "s")


def test_paths_of_any_kind(pico: Path, tmp_path: Path):
    texts = {pico / "ada": TEXT}
    out = calibrate(pico / "base", [str(pico / "ada")], texts, tmp_path / "s")
    again = calibrate(str(pico / "base"), [pico / "ada"], texts, tmp_path / "two")
    manifests = [(folder / MANIFEST_FILE).read_text() for folder in (out, again)]
    assert manifests[0] == manifests[1]


def test_what_is_there_is_not_lost(pico: Path, tmp_path: Path):
    arguments = (str(pico / "base"), [str(pico / "ada")], {str(pico / "ada"): TEXT})
    out = tmp_path / "s"
    out.mkdir()
    (out / "mine.safetensors").touch()
    with pytest.raises(CheckpointError, match="exists and is not an empty folder"):
        calibrate(*arguments, out)
    with pytest.raises(CheckpointError, match="holds no statistics"):
        calibrate(*arguments, out, overwrite=True)
    (out / "mine.safetensors").unlink()
    calibrate(*arguments, out)
    before = (out / MANIFEST_FILE).read_text()
    calibrate(*arguments, out, overwrite=True, max_tokens=2)
    assert (out / MANIFEST_FILE).read_text() != before


def test_a_failure_leaves_nothing(pico: Path, tmp_path: Path):
    texts = {str(pico / "ada"): TEXT, str(pico / "bob"): [Example("a")]}
    with pytest.raises(ConfigError, match="bob has no example of two tokens"):
        calibrate(str(pico / "base"), list(texts), texts, tmp_path / "s")
    assert not list(tmp_path.iterdir())


def test_models_that_do_not_write_text(tmp_path: Path):
    build_pico("t5").save_pretrained(tmp_path / "t5")
    save_tokenizer(tmp_path / "t5")
    with pytest.raises(CheckpointError, match="writes text from left to right"):
        calibrate(
            str(tmp_path / "t5"),
            [str(tmp_path / "t5")],
            {str(tmp_path / "t5"): TEXT},
            tmp_path / "s",
        )


def test_encoders_that_load_as_language_models(tmp_path: Path):
    """BERT reads the token that it predicts, so its gradients there say nothing."""
    bert = tmp_path / "bert"
    build_pico("bert").save_pretrained(bert)
    save_tokenizer(bert)
    with pytest.raises(CheckpointError, match="tokens see later ones"):
        calibrate(str(bert), [str(bert)], {str(bert): TEXT}, tmp_path / "s")
    # The same architecture as a decoder is one.
    build_pico("bert", {"is_decoder": True}).save_pretrained(bert)
    calibrate(str(bert), [str(bert)], {str(bert): TEXT}, tmp_path / "s")


@pytest.mark.parametrize(
    ("family", "n_regmean", "n_fisher", "first"),
    [
        # 3 layers: 4 experts of 3 matrices, and the router, which is no linear layer
        ("mixtral", 3 * 13, 3 * 12, "experts.0.w1"),
        # A_log, the convolution, and dt_proj, whose weight is read without a call
        ("mamba", 3 * 3, 0, "layers.0.mixer.A_log"),
    ],
)
def test_matrices_without_statistics_are_told(
    tmp_path: Path, family: str, n_regmean: int, n_fisher: int, first: str
):
    for name in ("base", "one"):
        model = build_pico(family)
        model = moved(model) if name == "one" else model
        model.save_pretrained(tmp_path / name)
        save_tokenizer(tmp_path / name)
    told: list[str] = []
    one = str(tmp_path / "one")
    out = calibrate(
        str(tmp_path / "base"),
        [one],
        {one: TEXT},
        tmp_path / "s",
        kinds=("regmean", "fisher"),
        on_progress=told.append,
    )
    for kind, expected in (("regmean", n_regmean), ("fisher", n_fisher)):
        (*notes,) = make_plan(document(tmp_path, out, kind, ("one",))).notes
        lines = [line for line in told if f"{kind}: " in line]
        assert len(lines) == len(notes) == bool(expected)
        for line in (*lines, *notes):
            assert f"{expected} matrices of layers have no statistics" in line
            assert first in line


def test_gpt2_through_a_merge(tmp_path: Path):
    """Its layers pass the hidden states by position, and its statistics fit its layers."""
    save_gpt2(tmp_path)
    texts = {str(tmp_path / name): pico_examples("ada", 4) for name in ("one", "two")}
    out = calibrate(
        str(tmp_path / "base"),
        list(texts),
        texts,
        tmp_path / "s",
        kinds=("regmean_pp",),
    )
    plan = make_plan(document(tmp_path, out, "regmean_pp", ("one", "two")))
    assert not plan.notes
