"""What can go wrong while a merge is written: the output folder is whole, or as it was."""

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from paretomerge.checkpoint.writer import TensorSpec, WeightsWriter, new_folder
from paretomerge.errors import CheckpointError, RecipeError
from paretomerge.merging import engine
from paretomerge.merging.card import licence
from paretomerge.merging.engine import merge
from paretomerge.recipe import Recipe
from tests.checkpoint.test_safety import copied


def recipe(*models: Path | str, method: str = "linear") -> Recipe:
    listed = [{"model": str(m), "parameters": {"weight": 1}} for m in models]
    return Recipe.from_dict({"merge_method": method, "models": listed})


def listed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named(
    pico: Path, tmp_path: Path, value: float
) -> None:
    folder = copied(pico, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][1, 2] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError,
        match=r"m: model\.layers\.2\.mlp\.up_proj\.weight: expected finite .* --allow-nan",
    ):
        merge(recipe(folder), tmp_path / "out")
    assert listed(tmp_path) == ["m"]
    merge(recipe(folder), tmp_path / "out", allow_nan=True)
    assert not load_file(tmp_path / "out" / "model.safetensors")[
        "model.layers.2.mlp.up_proj.weight"
    ][1, 2].isfinite()


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that even a pico tensor has several blocks."""
    monkeypatch.setattr("paretomerge.merging.block.CPU_BLOCK", 32)


def after_first_write(
    monkeypatch: pytest.MonkeyPatch, harm: Callable[[], None]
) -> None:
    plain, done = WeightsWriter.write, threading.Event()

    def write(self: WeightsWriter, *arguments: Any) -> None:
        plain(self, *arguments)
        if not done.is_set():
            done.set()
            harm()

    monkeypatch.setattr(WeightsWriter, "write", write)


@pytest.mark.parametrize(
    "harm",
    [
        lambda f: os.truncate(f, 3000),
        lambda f: f.write_bytes(f.read_bytes()),
        lambda f: f.unlink(),
        lambda f: (
            f.with_name("new").write_bytes(f.read_bytes())
            and f.with_name("new").rename(f)
        ),
    ],
    ids=["truncated", "rewritten", "removed", "replaced"],
)
def test_a_source_that_changes_while_it_is_read(
    pico: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    small_blocks: None,
    harm: Callable[[Path], None],
) -> None:
    folder = copied(pico, tmp_path / "m")
    after_first_write(monkeypatch, lambda: harm(folder / "model.safetensors"))
    with pytest.raises(
        CheckpointError,
        match=r"changed while it was read|ended too early|cannot be opened",
    ):
        merge(recipe(folder, pico / "bob"), tmp_path / "out")
    assert listed(tmp_path) == ["m"]


@pytest.mark.parametrize("at", [0, 1, 5])
def test_a_disk_that_fills(
    pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    plain, count = os.pwrite, iter(range(10_000))

    def pwrite(*arguments: Any) -> int:
        if next(count) == at:
            raise OSError(28, "No space left on device")
        return plain(*arguments)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(
        CheckpointError, match="No space left on device; free some space"
    ):
        merge(
            recipe(pico / "ada", pico / "bob"),
            tmp_path / "new" / "parents" / "out",
        )
    assert listed(tmp_path) == []


def test_short_writes_are_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = os.pwrite
    monkeypatch.setattr(
        os, "pwrite", lambda descriptor, raw, offset: plain(descriptor, raw[:7], offset)
    )
    with WeightsWriter(tmp_path, [TensorSpec("a", "float32", (5, 3))]) as writer:
        writer.write("a", 0, torch.arange(15.0).view(5, 3))
    assert torch.equal(
        load_file(tmp_path / "model.safetensors")["a"], torch.arange(15.0).view(5, 3)
    )


def test_a_disk_that_is_too_small_is_refused_at_once(
    pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1)
    )  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match="GB of free disk space"):
        merge(recipe(pico / "ada"), tmp_path / "new" / "out")
    assert listed(tmp_path) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_may_not_be_written(pico: Path, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o555)
    with pytest.raises(CheckpointError, match=r"folder is writable\. Nothing"):
        merge(recipe(pico / "ada"), tmp_path / "closed" / "out")


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda out: out.symlink_to(out.parent), "symbolic link"),
        (lambda out: out.symlink_to(out.parent / "nothing"), "symbolic link"),
        (lambda out: out.write_text("x"), "--overwrite"),
        (lambda out: (out.mkdir(), (out / "x").write_text("x")), "--overwrite"),
    ],
)
def test_an_output_that_is_there(
    pico: Path, tmp_path: Path, make: Callable[[Path], Any], told: str
) -> None:
    make(tmp_path / "out")
    before = [(p, p.lstat().st_mtime_ns) for p in sorted(tmp_path.rglob("*"))]
    with pytest.raises(CheckpointError, match=told):
        merge(recipe(pico / "ada"), tmp_path / "out")
    assert [(p, p.lstat().st_mtime_ns) for p in sorted(tmp_path.rglob("*"))] == before


@pytest.mark.parametrize("out", ["file/out", "n" * 300, "file/deeper/out"])
def test_an_output_that_cannot_be(pico: Path, tmp_path: Path, out: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="cannot write"):
        merge(recipe(pico / "ada"), tmp_path / out)
    assert listed(tmp_path) == ["file"]


def test_a_long_name_is_no_trouble(tmp_path: Path) -> None:
    with new_folder(tmp_path / ("n" * 255)) as folder:
        (folder / "x").write_text("x")
    assert [len(n) for n in listed(tmp_path)] == [255]


@pytest.mark.parametrize(
    "make",
    [
        lambda out: out.write_text("old"),
        lambda out: (out.mkdir(), (out / "old").write_text("old")),
    ],
)
def test_overwriting_leaves_nothing_of_the_old(
    tmp_path: Path, make: Callable[[Path], Any]
) -> None:
    make(tmp_path / "out")
    with new_folder(tmp_path / "out", overwrite=True) as folder:
        (folder / "new").write_text("new")
    assert listed(tmp_path) == ["out"] and listed(tmp_path / "out") == ["new"]


def test_the_old_folder_comes_back_when_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    plain = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self.suffix == ".partial":
            raise OSError(5, "Input/output error")
        return plain(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with (
        pytest.raises(CheckpointError, match="cannot write"),
        new_folder(tmp_path / "out", overwrite=True) as folder,
    ):
        (folder / "new").write_text("new")
    assert listed(tmp_path) == ["out"] and listed(tmp_path / "out") == ["old"]


def test_what_came_there_meanwhile_is_not_replaced_unasked(tmp_path: Path) -> None:
    with (
        pytest.raises(CheckpointError, match="another program created it meanwhile"),
        new_folder(tmp_path / "out"),
    ):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").write_text("theirs")
    assert listed(tmp_path) == ["out"] and listed(tmp_path / "out") == ["theirs"]


def test_an_interrupt_leaves_nothing(
    pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    after_first_write(monkeypatch, stop)
    with pytest.raises(KeyboardInterrupt):
        merge(recipe(pico / "ada"), tmp_path / "new" / "out")
    assert listed(tmp_path) == []


def test_the_last_step_may_fail_too(
    pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def card(*_: Any) -> str:
        raise CheckpointError("no card")

    monkeypatch.setattr(engine, "model_card", card)
    with pytest.raises(CheckpointError, match="no card"):
        merge(recipe(pico / "ada"), tmp_path / "out")
    assert listed(tmp_path) == []


@pytest.mark.parametrize(
    ("front", "told"),
    [
        ("license: mit", "mit"),
        ("license: 2020-99-99", "2020-99-99"),
        ("license: [a, b]", None),
        ("license:", None),
        ("- a", None),
        ("license: [", None),
        ("a: " + "[" * 3000, None),
        ("a: &a {x: 1}\nb: &b {<<: [*a, *a]}\nlicense: mit", "mit"),
        ("? [a, b]\n: c", None),
    ],
)
def test_a_models_card_cannot_stop_a_merge(
    tmp_path: Path, front: str, told: str | None
) -> None:
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n# x\n")
    assert licence(tmp_path) == told


def test_a_card_names_hub_models_by_repository(
    pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from paretomerge.checkpoint import reader

    monkeypatch.setattr(
        reader,
        "resolve_folder",
        lambda name, *_: pico / "ada" if name == "owner/ada@main" else Path(name),
    )
    merge(recipe("owner/ada@main", pico / "bob"), tmp_path / "out")
    front = (tmp_path / "out" / "README.md").read_text().split("---")[1]
    assert "- owner/ada\n" in front and "pico" not in front


def test_a_card_holds_no_local_paths(pico: Path, tmp_path: Path) -> None:
    merge(recipe(pico / "ada", pico / "bob"), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert str(pico) not in card and "| ada | " in card and "model: bob" in card
    # The recipe that rebuilds the merge here is beside it.
    assert str(pico) in (tmp_path / "out" / "mergekit_config.yml").read_text()


def test_a_large_file_is_no_recipe(tmp_path: Path) -> None:
    (tmp_path / "big.yml").write_text("a: " + "[" * 10_000_000)
    (tmp_path / "binary.yml").write_bytes(bytes(range(256)) * 10)
    for name, told in (
        ("big.yml", "at most 1,000,000"),
        ("binary.yml", "cannot read the recipe"),
        (".", "cannot read the recipe"),
        ("no.yml", "no such file"),
    ):
        with pytest.raises(RecipeError, match=told):
            Recipe.load(tmp_path / name)


@pytest.mark.parametrize("out", ["models", "models/ada"])
def test_a_folder_that_holds_a_source_is_not_replaced(
    pico: Path, tmp_path: Path, out: str
) -> None:
    shutil.copytree(pico, tmp_path / "models")
    with pytest.raises(
        CheckpointError, match="the output folder would replace the source"
    ):
        merge(recipe(tmp_path / "models" / "ada"), tmp_path / out, overwrite=True)
    assert listed(tmp_path / "models") == ["ada", "base", "bob", "cyd"]
    assert listed(tmp_path) == ["models"] and listed(
        tmp_path / "models" / "ada"
    ) == listed(pico / "ada")


def test_tokenizer_files_that_link_out_of_the_model_are_not_copied(
    pico: Path, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text("key")
    folder = copied(pico, tmp_path / "m")
    (folder / "vocab.txt").symlink_to(tmp_path / "secret")
    before = listed(tmp_path)
    with pytest.raises(CheckpointError, match="a link that leaves it"):
        merge(recipe(folder), tmp_path / "out")
    assert listed(tmp_path) == before


def test_weights_of_the_recipe_that_no_dtype_can_hold(
    pico: Path, tmp_path: Path
) -> None:
    wild = {
        "merge_method": "task_arithmetic",
        "base_model": str(pico / "base"),
        "models": [{"model": str(pico / "ada"), "parameters": {"weight": 3e38}}],
        "parameters": {"lambda": 1e10},
    }
    with pytest.raises(CheckpointError, match="expected values that bfloat16 can hold"):
        merge(Recipe.from_dict(wild), tmp_path / "out")
    assert listed(tmp_path) == []
