"""Damaged or hostile files: the error names the file, and nothing is left behind."""

import json
import os
import shlex
import shutil
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from paretomerge.checkpoint.header import SAFETENSORS_DTYPES, read_header
from paretomerge.checkpoint.reader import Checkpoint
from paretomerge.checkpoint.reference import Reference, resolve_folder
from paretomerge.errors import CheckpointError


def packed(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(
    shape: Any = (2,), start: Any = 0, end: Any = 8, dtype: Any = "F32"
) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def copied(pico: Path, folder: Path, name: str = "ada") -> Path:
    shutil.copytree(pico / name, folder)
    return folder


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "in a file of 0"),
        (b"\x08\0\0\0", "in a file of 4"),
        (packed({"a": entry()}, bytes(8))[:-3], "damaged"),
        (packed({"a": entry()}, bytes(9)), "damaged"),
        (packed(b"{", length=1 << 63), "header of 9223372036854775808 bytes"),
        (packed(b"\xff\xfe{}"), "not a safetensors file"),
        (packed(b"[" * 100_000), "not a safetensors file"),
        (packed([1, 2]), "header must be a JSON object"),
        (packed({"a": [1]}, bytes(8)), "expected dtype, shape and data_offsets"),
        (
            packed({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
            "expected dtype, shape and data_offsets",
        ),
        (packed({"a": entry(dtype="F8_E4M3")}, bytes(8)), "quantised"),
        (packed({"a": entry(dtype=["F32"])}, bytes(8)), "the dtype must be one of"),
        (
            packed({"a": entry(shape=[-2], end=-8)}, bytes(8)),
            "expected dtype, shape and data_offsets",
        ),
        (
            packed({"a": entry(shape=[2.0])}, bytes(8)),
            "expected dtype, shape and data_offsets",
        ),
        (
            packed({"a": entry(shape=[True, 2])}, bytes(8)),
            "expected dtype, shape and data_offsets",
        ),
        (
            packed({"a": entry(shape={"2": 1})}, bytes(8)),
            "expected dtype, shape and data_offsets",
        ),
        (
            packed({"a": entry(shape=[1 << 62, 1 << 62])}, bytes(8)),
            "expected dtype, shape and data_offsets",
        ),
        (
            packed({"a": entry(shape=[0, 1 << 62], end=0)}),
            "expected dtype, shape and data_offsets",
        ),
        (
            packed({"a": entry(shape=[1] * 65, end=4)}, bytes(4)),
            "expected dtype, shape and data_offsets",
        ),
        (packed({"a": entry(shape=[1 << 20], end=4 << 20)}, bytes(8)), "damaged"),
        (packed({"a": entry(shape=[3])}, bytes(8)), "expected 12 bytes"),
        (packed({"a": entry(start=8, end=0)}, bytes(8)), "expected 8 bytes"),
        (packed({"a": entry(start=8, end=16)}, bytes(16)), "expected its data at byte"),
        (packed({"a": entry(), "b": entry()}, bytes(8)), "expected its data at byte"),
        (
            packed({"a": entry(), "b": entry(start=4, end=12)}, bytes(12)),
            "expected its data at byte",
        ),
        (
            packed({"a": entry(), "b": entry(start=12, end=20)}, bytes(20)),
            "expected its data at byte",
        ),
        (
            packed(
                b'{"\\ud800": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
                bytes(8),
            ),
            "expected dtype, shape",
        ),
    ],
)
def test_headers_that_lie(tmp_path: Path, content: bytes, told: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=told) as caught:
        read_header(tmp_path / "x.safetensors")
    assert len(str(caught.value)) < 1000


def sound(headers: Any, size: int) -> None:
    """What a header that was taken must be."""
    for name, header in headers.items():
        assert isinstance(name, str) and header.dtype in SAFETENSORS_DTYPES.values()
        assert all(side >= 0 for side in header.shape)
        assert header.offset >= 8 and header.offset + header.bytes <= size


NUMBERS = st.integers(-2, 40) | st.sampled_from(
    [1 << 31, 1 << 63, 1 << 64, 0.5, None, True, "1"]
)
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from([*SAFETENSORS_DTYPES, "F8", 3, None]),
        "shape": st.lists(NUMBERS, max_size=4) | NUMBERS,
        "data_offsets": st.lists(NUMBERS, max_size=3) | st.none(),
    },
)
LONG = int(os.environ.get("PARETOMERGE_FUZZ", "0"))  # examples, for a long run by hand


@settings(max_examples=LONG or 60, deadline=None)
@given(
    content=st.binary(max_size=200)
    | st.builds(
        packed,
        st.dictionaries(st.text(max_size=3), ENTRIES, max_size=3),
        st.binary(max_size=64),
    )
)
def test_any_bytes_are_a_header_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    file = tmp_path_factory.getbasetemp() / "any.safetensors"
    file.write_bytes(content)
    with suppress(CheckpointError):
        sound(read_header(file), len(content))


SIDES = st.lists(st.integers(0, 3), max_size=3)


@settings(max_examples=LONG or 60, deadline=None)
@given(
    tensors=st.lists(
        st.tuples(
            SIDES,
            st.sampled_from([torch.float32, torch.bfloat16, torch.int8, torch.bool]),
        ),
        min_size=1,
        max_size=4,
    ),
    at=st.integers(0, 300),
    put=st.binary(min_size=1, max_size=3),
)
def test_a_changed_header_is_a_header_or_an_error(
    tmp_path_factory: pytest.TempPathFactory,
    tensors: list[tuple[list[int], torch.dtype]],
    at: int,
    put: bytes,
) -> None:
    file = tmp_path_factory.getbasetemp() / "changed.safetensors"
    held = {
        f"t{i}": torch.zeros(sides, dtype=dtype)
        for i, (sides, dtype) in enumerate(tensors)
    }
    save_file(held, file)
    headers = read_header(file)
    assert {n: h.shape for n, h in headers.items()} == {
        n: tuple(t.shape) for n, t in held.items()
    }
    content = bytearray(file.read_bytes())
    at %= len(content)
    content[at : at + len(put)] = put
    file.write_bytes(content)
    with suppress(CheckpointError):
        sound(read_header(file), len(content))


@pytest.mark.parametrize(
    ("index", "told"),
    [
        ({}, "expected a `weight_map`"),
        ({"weight_map": []}, "expected a `weight_map`"),
        ({"weight_map": {"a": 1}}, "expected a `weight_map`"),
        ({"weight_map": {"a": ""}}, "which is missing"),
        ({"weight_map": {"a": ".."}}, "which is missing"),
        ({"weight_map": {"a": "../ada/model.safetensors"}}, "same folder"),
        ({"weight_map": {"a": "/etc/passwd"}}, "same folder"),
        ({"weight_map": {"a": "a\0b"}}, "which is missing"),
        ({"weight_map": {"a": "x" * 5000}}, "which is missing"),
        ({"weight_map": {"a": "\ud800"}}, "which is missing"),
        ({"weight_map": {"a": "away.safetensors"}}, "a link that leaves"),
    ],
)
def test_an_index_names_files_of_its_own_folder(
    pico: Path, tmp_path: Path, index: Any, told: str
) -> None:
    folder = copied(pico, tmp_path / "m")
    (folder / "away.safetensors").symlink_to(pico / "bob" / "config.json")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=told):
        Checkpoint(str(folder))


def test_links_may_lead_to_the_hubs_blobs_and_nowhere_else(
    pico: Path, tmp_path: Path
) -> None:
    repository = tmp_path / "models--o--n"
    snapshot = repository / "snapshots" / "1f"
    copied(pico, snapshot)
    (repository / "blobs").mkdir()
    (snapshot / "model.safetensors").rename(repository / "blobs" / "ab12")
    (snapshot / "model.safetensors").symlink_to("../../blobs/ab12")
    assert Checkpoint(str(snapshot)).dtype == "bfloat16"
    (repository / "blobs" / "ab12").rename(repository / "elsewhere")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to("../../elsewhere")
    with pytest.raises(CheckpointError, match="a link that leaves"):
        Checkpoint(str(snapshot))


def test_a_folder_may_itself_be_a_link(pico: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(pico / "ada")
    assert Checkpoint(str(tmp_path / "alias")).headers


def test_a_file_without_tensors_is_no_model(pico: Path, tmp_path: Path) -> None:
    folder = copied(pico, tmp_path / "m")
    (folder / "model.safetensors").write_bytes(
        packed({"__metadata__": {"format": "pt"}})
    )
    with pytest.raises(CheckpointError, match="contains no tensors"):
        Checkpoint(str(folder))


def test_a_pickle_is_refused_with_a_command_that_the_shell_takes(
    pico: Path, tmp_path: Path
) -> None:
    folder = copied(pico, tmp_path / 'it"s $(here)')
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="a pickle can run code") as caught:
        Checkpoint(str(folder))
    python, option, code = shlex.split(str(caught.value).split("sandbox: ")[1])
    assert (python, option) == ("python", "-c")
    compile(code, "cure", "exec")
    assert repr(str(folder)) in code


@pytest.mark.parametrize(
    "name",
    [
        "x" * 5000,
        "~nobody-of-that-name/x",
        "/" + "y/" * 3000,
        "~",
        "a+" + "b" * 5000,
        "owner/" + "n" * 300,
    ],
)
def test_names_that_are_no_paths(name: str) -> None:
    if name == "~":
        pytest.skip("a home is a folder") if Path.home().is_dir() else None
    with pytest.raises(CheckpointError):
        resolve_folder(Reference.parse(name).adapter or name)
