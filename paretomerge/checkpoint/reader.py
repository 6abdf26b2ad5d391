"""Reads a Hugging Face checkpoint: headers when it is opened, tensors when they are needed.

Only safetensors files are read; a pickle can run code when it is opened.
"""

import mmap
import os
import re
import shlex
import threading
import weakref
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from paretomerge.checkpoint.architecture import Architecture
from paretomerge.checkpoint.header import Header, UnsupportedDtypeError, read_header
from paretomerge.checkpoint.hub import fetch_headers
from paretomerge.checkpoint.json_file import (
    JsonObject,
    read_json,
    read_optional_json,
)
from paretomerge.checkpoint.model_config import text_config, with_plain_floats
from paretomerge.checkpoint.operand import (
    FLOAT_DTYPES,
    InMemoryTensor,
    StoredTensor,
)
from paretomerge.checkpoint.reference import (
    GGUF_SUFFIX,
    conversion_hint,
    reject_symlink_escape,
    resolve_folder,
    split_revision,
)
from paretomerge.errors import CheckpointError

if TYPE_CHECKING:
    import torch

INDEX_FILE = "model.safetensors.index.json"
"""Lists the shard of each tensor, in a checkpoint of several files."""

SINGLE_FILE = "model.safetensors"
"""The weights of a checkpoint in one file."""

ADAPTER_CONFIG_FILE = "adapter_config.json"
"""The settings of an adapter in peft's format."""

# Folders of this package that are no checkpoint: manifest -> what to do with such a folder.
_SEVERAL_MODELS = {
    "pareto_family.json": "a family of `pareto-merge`, which is no single checkpoint; write one "
    "with `paretomerge pick {name} --prefer SOURCE=WEIGHT,... --out OUT` and name that",
    "twin.json": "a folder of `twin`, which is no single checkpoint; write that of a task with "
    "`paretomerge expand {name} --task TASK OUT` and name that",
}

# `quant_method` of a config -> how transformers loads the model with float weights.
_DEQUANTISING_CALLS = {
    "fp8": (
        "T.AutoModelForCausalLM.from_pretrained({}, "
        "quantization_config=T.FineGrainedFP8Config(dequantize=True))"
    ),
    # It needs the package of the same name.
    "bitsandbytes": "T.AutoModelForCausalLM.from_pretrained({}).dequantize()",
}

# What quantisers store beside, or instead of, a weight.
_QUANTISATION = re.compile(
    r"\.(qweight|qzeros|g_idx|SCB|W_q|codebooks|weight_scale(_inv|_2)?|weight_zero_point"
    r"|weight_packed|weight_shape|weight_format|scale_weight"
    r"|weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..+))$"
    r"|_blocks$"
)
_MAX_NAME_IN_MESSAGE = 100


@dataclass(frozen=True)
class _FileStamp:
    """Shows whether a file is still the one whose header was read."""

    size: int
    modified_ns: int
    inode: int

    @classmethod
    def of(cls, file: Path) -> "_FileStamp":
        status = file.stat()
        return cls(status.st_size, status.st_mtime_ns, status.st_ino)


class Shards:
    """The tensors of some safetensors files; a file is opened when its first tensor is read.

    Args:
        name: Name of the model, for error messages.
        headers: Tensor name -> header entry.
        allow_nan: Whether NaN and infinity are read like other values, or are an error.
        mapped: Whether tensors are views of the mapped files, which are read on demand and shared
            by all processes of the machine.
    """

    def __init__(
        self,
        name: str,
        headers: Mapping[str, Header],
        allow_nan: bool = False,
        mapped: bool = False,
    ) -> None:
        self.name = name
        self.headers = headers
        self.allow_nan = allow_nan
        # Headers from the Hub name files that are not here.
        files = {header.file for header in headers.values()}
        self._stamps = {file: _FileStamp.of(file) for file in files if file.exists()}
        self._is_mapped = mapped
        self._prepare_to_open()

    def _prepare_to_open(self) -> None:
        self._descriptors: dict[Path, int] = {}
        self._mappings: dict[Path, mmap.mmap | None] = {}
        self._mapped: dict[str, InMemoryTensor] = {}
        self._lock = threading.Lock()
        # Not `__del__`: at the interpreter's end that may run when `os` is gone already.
        weakref.finalize(self, _close, self._descriptors)

    def __getstate__(self) -> dict[str, object]:
        # Each process of a merge opens the files for itself.
        state = dict(self.__dict__)
        for name in ("_descriptors", "_lock", "_mappings", "_mapped"):
            del state[name]
        return state

    def __setstate__(self, state: Mapping[str, object]) -> None:
        self.__dict__.update(state)
        self._prepare_to_open()

    def operand(self, name: str) -> StoredTensor | InMemoryTensor:
        """Return the tensor, to be read a few rows at a time.

        Raises:
            CheckpointError: If a mapped tensor holds NaN or infinity, or cannot be read.
        """
        if not self._is_mapped:
            return self.stored(name)
        if name not in self._mapped:
            stored = self.stored(name)
            mapping = self._mapping(self.headers[name].file)
            tensor = stored.mapped(mapping) if mapping else None
            # Some file systems map no files, and memory may be limited: then rows are read.
            if tensor is None:
                return stored
            self._mapped[name] = InMemoryTensor(tensor)
        return self._mapped[name]

    def stored(self, name: str) -> StoredTensor:
        """Return the tensor in its file, also where files are mapped."""
        header = self.headers[name]
        return StoredTensor(
            descriptor=partial(self._descriptor, header.file),
            offset=header.offset,
            shape=header.shape,
            dtype=header.dtype,
            label=f"{self.name}: {name}",
            allow_nan=self.allow_nan,
        )

    def check_unchanged(self) -> None:
        """Check that every file is still the one whose header was read.

        Raises:
            CheckpointError: If a file was changed, replaced or removed.
        """
        for file, stamp in self._stamps.items():
            if not file.exists() or _FileStamp.of(file) != stamp:
                raise CheckpointError(
                    f"{file}: the file changed while it was read; merge again when it is complete"
                )

    def _mapping(self, file: Path) -> mmap.mmap | None:
        """A file as memory; None where the operating system refuses."""
        descriptor = self._descriptor(file)
        with self._lock:
            if file not in self._mappings:
                try:
                    # A private mapping: what is written to it by mistake never reaches the file.
                    mapping = mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
                except OSError:
                    mapping = None
                self._mappings[file] = mapping
            return self._mappings[file]

    def _descriptor(self, file: Path) -> int:
        # Several threads of a merge read from the same files.
        with self._lock:
            if file not in self._descriptors:
                try:
                    flags = os.O_RDONLY | os.O_CLOEXEC
                    self._descriptors[file] = os.open(file, flags)
                except OSError as error:
                    raise CheckpointError(
                        f"{file}: cannot be opened: {error.strerror}"
                    ) from error
            return self._descriptors[file]


def _close(descriptors: Mapping[Path, int]) -> None:
    for descriptor in descriptors.values():
        os.close(descriptor)


class Checkpoint:
    """A folder with config.json and safetensors files, opened for reading.

    Args:
        name: A local folder, or a Hub name with an optional `@revision`.
        allow_nan: Whether NaN and infinity in the weights are read like other values, or are an
            error that names the tensor.
        download: Whether missing weights are downloaded. Without them a merge can be planned, but
            no tensor can be read.
        mapped: Whether tensors are views of the mapped files; see `Shards`.

    Attributes:
        name: The name that was given.
        folder: The folder with the files.
        config: config.json.
        shards: The tensors.

    Raises:
        CheckpointError: If the folder is missing, incomplete, damaged, unsafe or quantised.
    """

    def __init__(
        self,
        name: str,
        allow_nan: bool = False,
        download: bool = True,
        mapped: bool = False,
    ) -> None:
        self.name = name
        self.folder = resolve_folder(name, download)
        _check_no_adapter(self.folder, name)
        _check_not_several(self.folder, name)
        _check_no_gguf(self.folder, name)
        config_file = reject_symlink_escape(self.folder / "config.json")
        config = read_json(config_file, f"{name}: config.json")
        self.config: JsonObject = with_plain_floats(config)
        is_here = download or Path(name).expanduser().is_dir()
        read_headers = _local_headers if is_here else _downloaded_or_fetched
        try:
            headers = read_headers(self.folder, name, self.config)
        except UnsupportedDtypeError as error:
            hint = _dequantising_hint(name, self.config)
            raise CheckpointError(f"{error}{hint}") from error
        _check_full_precision(name, headers, self.config)
        # Left over from an earlier state of the weights, which are not quantised.
        for part in (self.config, text_config(self.config)):
            assert isinstance(part, dict)
            part.pop("quantization_config", None)
        # A merge is written under the usual name.
        self.config.pop("transformers_weights", None)
        self.shards = Shards(name, headers, allow_nan, mapped)

    @property
    def weight_folders(self) -> tuple[Path, ...]:
        """The folder whose files hold the weights."""
        return (self.folder,)

    @property
    def tokenizer_folder(self) -> Path:
        """The folder with the tokenizer: that of the model."""
        return self.folder

    @property
    def headers(self) -> Mapping[str, Header]:
        """Tensor name -> header entry."""
        return self.shards.headers

    @cached_property
    def architecture(self) -> Architecture:
        """What the names of the tensors say about the network.

        Raises:
            CheckpointError: If the names do not fit the config.
        """
        try:
            return Architecture.infer(self.headers, self.config)
        except CheckpointError as error:
            raise CheckpointError(f"{self.name}: {error}") from error

    @property
    def dtype(self) -> str:
        """The dtype of most of the float tensors, as torch names it."""
        dtypes = [header.dtype for header in self.headers.values()]
        counts = Counter(dtype for dtype in dtypes if dtype in FLOAT_DTYPES)
        # Sorted, so that a tie does not depend on the order of the tensors.
        return max(sorted(counts), key=counts.__getitem__, default="float32")

    def operand(self, name: str) -> StoredTensor | InMemoryTensor:
        """Return the tensor, to be read a few rows at a time."""
        return self.shards.operand(name)

    def tensor(self, name: str) -> "torch.Tensor":
        """Read the whole tensor in its stored dtype, on the CPU."""
        return self.shards.stored(name).read()

    def check_unchanged(self) -> None:
        """Check that every file is still the one whose header was read.

        Raises:
            CheckpointError: If a file was changed, replaced or removed.
        """
        self.shards.check_unchanged()


def shard_path(folder: Path, file: str) -> Path:
    """Return the path of a shard that an index names, if it is a file of the folder itself.

    Raises:
        CheckpointError: If the name leads out of the folder or the file is missing.
    """
    # An index may come from anywhere: "../other/model.safetensors" must not be followed.
    if Path(file).name != file:
        raise CheckpointError(
            f"{folder}: {INDEX_FILE}: shards must be files in the same folder, got {file!r}"
        )
    path = folder / file
    try:
        exists = path.is_file()
    except OSError:  # the name is too long
        exists = False
    if not exists:
        raise CheckpointError(
            f"{folder}: the index names {file[:_MAX_NAME_IN_MESSAGE]!r}, which is missing; "
            "download the model again"
        )
    return reject_symlink_escape(path)


def _check_not_several(folder: Path, name: str) -> None:
    """Raise CheckpointError if a folder stands for several models, of which one can be written."""
    if (folder / "config.json").is_file():
        return
    for manifest, advice in _SEVERAL_MODELS.items():
        if (folder / manifest).is_file():
            raise CheckpointError(f"{name}: {advice.format(name=name)}")


def _check_no_adapter(folder: Path, name: str) -> None:
    """Raise CheckpointError if a folder holds an adapter, with a model beside it or without."""
    if not (folder / ADAPTER_CONFIG_FILE).is_file():
        return
    config = read_optional_json(folder / ADAPTER_CONFIG_FILE)
    base = config.get("base_model_name_or_path") or "its base model"
    if not any((folder / file).is_file() for file in (SINGLE_FILE, INDEX_FILE)):
        raise CheckpointError(
            f"{name}: an adapter and no model; write model+{name}, with the model that the "
            f"adapter was trained on ({base})"
        )
    raise CheckpointError(
        f"{name}: the folder holds a model and an adapter ({ADAPTER_CONFIG_FILE}), and "
        f"transformers loads the adapter on {base} and not the model beside it; move one of the "
        "two to another folder"
    )


def _check_no_gguf(folder: Path, name: str) -> None:
    """Raise CheckpointError if a folder holds GGUF files and no model beside them."""
    files = sorted(folder.glob(f"*{GGUF_SUFFIX}"))
    if files and not (folder / "config.json").exists():
        raise CheckpointError(f"{name}: holds {conversion_hint(files[0])}")


def _check_full_precision(
    name: str, headers: Mapping[str, Header], config: JsonObject
) -> None:
    # The config tells nothing: `quantization_config` stays in it when the weights are full again.
    for tensor, header in headers.items():
        is_integer = header.dtype not in FLOAT_DTYPES
        is_code = is_integer and tensor.endswith("weight")
        if is_code or _QUANTISATION.search(tensor):
            raise CheckpointError(
                f"{name}: {tensor}: the weights are quantised; merge the full-precision model that "
                f"they were made from{_dequantising_hint(name, config)}"
            )


def _dequantising_hint(name: str, config: JsonObject) -> str:
    """The command that makes float weights, for the quantisers that it was tried with."""
    settings = config.get("quantization_config")
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    load = _DEQUANTISING_CALLS.get(str(method))
    if load is None:
        return ""
    out = f"{Path(name).name}-full"
    # With the original format transformers would quantise the weights again.
    save = f"save_pretrained({out!r}, save_original_format=False)"
    code = f"import transformers as T; {load.format(repr(name))}.{save}"
    return f", or dequantise them: python -c {shlex.quote(code)}"


def _local_headers(folder: Path, name: str, config: JsonObject) -> dict[str, Header]:
    """The header entries of all tensors, sorted by name."""
    # In the order of transformers: the file that the config names, the single file, the index.
    named_file = config.get("transformers_weights")
    if isinstance(named_file, str):
        if named_file.endswith(".index.json"):
            return _indexed_headers(folder, name, named_file)
        return _single_file_headers(folder, name, named_file)
    if (folder / SINGLE_FILE).is_file():
        return _single_file_headers(folder, name, SINGLE_FILE)
    if (folder / INDEX_FILE).is_file():
        return _indexed_headers(folder, name, INDEX_FILE)
    raise _missing_weights_error(folder, name)


def _downloaded_or_fetched(
    folder: Path, name: str, config: JsonObject
) -> dict[str, Header]:
    """The headers of an earlier download, which needs no network, or else those of the Hub."""
    try:
        return _local_headers(folder, name, config)
    except CheckpointError:
        return fetch_headers(*split_revision(name), folder)


def _single_file_headers(folder: Path, name: str, file: str) -> dict[str, Header]:
    headers = read_header(shard_path(folder, file))
    if not headers:
        raise CheckpointError(
            f"{name}: {file} contains no tensors; download the model again"
        )
    return dict(sorted(headers.items()))


def _indexed_headers(folder: Path, name: str, index: str) -> dict[str, Header]:
    weight_map = _read_weight_map(folder, name, index)
    # Each shard is read once, whatever the number of its tensors.
    files = sorted(set(weight_map.values()))
    shards = {file: read_header(shard_path(folder, file)) for file in files}
    missing = [name for name, file in weight_map.items() if name not in shards[file]]
    if missing:
        raise CheckpointError(
            f"{name}: the index lists {missing[0]!r} and {len(missing) - 1} more tensors that "
            "its shards do not contain; download the model again"
        )
    # As in transformers: the index only names the files, and every tensor in them is loaded, the
    # one in the last file if several have it.
    headers: dict[str, Header] = {}
    for file in files:
        headers |= shards[file]
    return dict(sorted(headers.items()))


def _read_weight_map(folder: Path, name: str, index: str) -> dict[str, str]:
    """The file of each tensor, as the index of shards gives it."""
    label = f"{name}: {index}"
    weight_map = read_json(shard_path(folder, index), label).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{label}: expected a `weight_map` from tensors to files")
    if not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{label}: expected a `weight_map` from tensors to files")
    return weight_map


def _missing_weights_error(folder: Path, name: str) -> CheckpointError:
    # The advice must not open the pickle here: that is what a sandbox is for.
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    pickles += sorted(path.name for path in folder.glob("*.pt*"))
    problem = f"{name}: the folder has no {SINGLE_FILE} and no {INDEX_FILE}"
    gguf_files = sorted(folder.glob(f"*{GGUF_SUFFIX}"))
    if gguf_files:
        return CheckpointError(f"{problem}, only {conversion_hint(gguf_files[0])}")
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if others:
        return CheckpointError(
            f"{problem}, which transformers loads, only {others[0]}; rename the file if it holds "
            "the whole model, or download the model again"
        )
    if not pickles:
        return CheckpointError(f"{problem}; download the model again")
    code = (
        "from transformers import AutoModelForCausalLM as M; "
        f"M.from_pretrained({str(folder)!r}, use_safetensors=False)"
        f".save_pretrained({str(folder)!r} + '-safe')"
    )
    return CheckpointError(
        f"{problem}, only {pickles[0]} (a pickle can run code when it is opened); "
        f"convert it in a sandbox: python -c {shlex.quote(code)}"
    )
