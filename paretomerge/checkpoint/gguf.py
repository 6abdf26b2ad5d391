"""GGUF files, the format of llama.cpp: they are converted to checkpoints and not merged.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from paretomerge.checkpoint.json_file import ReadOnlyJson, read_json, write_json
from paretomerge.checkpoint.model_config import DEQUANTIZED_FROM
from paretomerge.checkpoint.writer import (
    check_not_current,
    check_replaceable,
    new_folder,
)
from paretomerge.errors import CheckpointError

if TYPE_CHECKING:
    from gguf import GGUFReader

_MAGIC = b"GGUF"
_FLOAT_TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

_CARD = """\
---
{front_matter}---
# {title}

Converted from `{file}` by `paretomerge convert`.

{weights}
"""


@dataclass(frozen=True)
class _Contents:
    """What the header of a GGUF file says.

    Attributes:
        types: Types of weights, such as `Q4_1`, the one with the most weights first.
        licence: Its licence; None if it states none.
        scales_positions: Whether rotary positions are scaled, for longer texts.
    """

    types: tuple[str, ...]
    licence: str | None
    scales_positions: bool

    @property
    def quantised(self) -> tuple[str, ...]:
        """The types that are no floating-point numbers."""
        return tuple(name for name in self.types if name not in _FLOAT_TYPES)

    @property
    def dtype(self) -> str:
        """The dtype of the checkpoint: that of the file, or bfloat16 for quantised weights."""
        return "bfloat16" if self.quantised else _FLOAT_TYPES[self.types[0]]


def convert(
    source: Path, out: Path, overwrite: bool = False, allow_mismatch: bool = False
) -> Path:
    """Write a GGUF file as a checkpoint with its tokenizer.

    transformers reads the file, and knows the architectures that such a file can hold. Quantised
    weights are dequantised to bfloat16: the checkpoint has the values that the file stands for, not
    those that were quantised. Its config.json and model card say so, and so does the card of a
    merge that it is a source of.

    Args:
        source: The file.
        out: The folder to create. It appears whole or not at all.
        overwrite: Whether to replace `out` if it exists.
        allow_mismatch: Whether to convert a file whose scaling of rotary positions is lost.

    Returns:
        The folder.

    Raises:
        CheckpointError: If the file cannot be read or converted, or `out` cannot be written.
    """
    check_not_current(out)
    if source.resolve().is_relative_to(out.resolve()):
        raise CheckpointError(
            f"{out}: holds {source.name}, and cannot be replaced by what is made of it; name a "
            "new folder"
        )
    if overwrite:
        check_replaceable(out)
    contents = _read_contents(source)
    with new_folder(out, overwrite) as folder:
        _convert_weights(source, folder, contents.dtype)
        config = read_json(folder / "config.json")
        if contents.scales_positions and not allow_mismatch:
            _check_scales_positions(source, config)
        if contents.quantised:
            types = ", ".join(contents.quantised)
            config[DEQUANTIZED_FROM] = f"{source.name} ({types})"
            write_json(folder / "config.json", config)
        card = _model_card(source, out, contents)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return out


def _read_contents(source: Path) -> _Contents:
    """Read the header, and check that the file can be read.

    Raises:
        CheckpointError: If it is no GGUF file, or the package that reads it is missing.
    """
    try:
        with source.open("rb") as file:
            magic = file.read(len(_MAGIC))
    except OSError as error:
        raise CheckpointError(f"{source}: cannot be read: {error.strerror}") from error
    if magic != _MAGIC:
        raise CheckpointError(f"{source}: not a GGUF file")
    if find_spec("gguf") is None:
        raise CheckpointError(
            f"{source}: the package gguf is not installed: pip install 'paretomerge[gguf]'"
        )
    from gguf import GGUFReader

    try:
        reader = GGUFReader(source)
        return _contents(reader)
    except (
        Exception
    ) as error:  # the reader checks little: a damaged file fails anywhere
        raise CheckpointError(
            f"{source}: damaged, download it again ({type(error).__name__}: {error})"
        ) from error


def _contents(reader: "GGUFReader") -> _Contents:
    counts: Counter[str] = Counter()
    for tensor in reader.tensors:
        counts[tensor.tensor_type.name] += int(tensor.n_elements)
    licence = reader.get_field("general.license")
    names = [tensor.name for tensor in reader.tensors]
    scalings = [
        field.contents()
        for key, field in reader.fields.items()
        if key.endswith(".rope.scaling.type")
    ]
    return _Contents(
        types=tuple(name for name, _ in counts.most_common()),
        licence=str(licence.contents()) if licence else None,
        # Llama 3 has the factors as a tensor.
        scales_positions="rope_freqs.weight" in names or scalings not in ([], ["none"]),
    )


def _check_scales_positions(source: Path, config: ReadOnlyJson) -> None:
    """Check that the scaling of rotary positions is in the config.

    Raises:
        CheckpointError: If transformers has lost it, as it does for most architectures.
    """
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type", "default") == "default":
        raise CheckpointError(
            f"{source}: scales rotary positions for long texts, which transformers does not read "
            "from GGUF files; long texts would be read wrongly. --allow-mismatch converts it "
            "anyway; then copy rope_parameters (or rope_scaling) into config.json from that of "
            "the original model"
        )


def _convert_weights(source: Path, folder: Path, dtype: str) -> None:
    """Let transformers read the file, and write what it holds.

    Raises:
        CheckpointError: If transformers cannot read it.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where: dict[str, Any] = {
        "gguf_file": source.name,
        "local_files_only": True,
        "trust_remote_code": False,
    }
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            source.parent,
            output_loading_info=True,
            dtype=getattr(torch, dtype),
            # Else the weights stay packed, and cannot be written.
            quantization_config=GgufConfig(gguf_file=source.name, dequantize=True),
            **where,
        )
        tokenizer = AutoTokenizer.from_pretrained(source.parent, **where)
    except Exception as error:  # of many classes, one per fault of the file
        first_line = (str(error).splitlines() or [""])[0]
        raise CheckpointError(
            f"{source}: transformers cannot read it: {type(error).__name__}: {first_line}"
        ) from error
    # transformers only warns, and makes up what is missing.
    for fault, names in (
        ("lacks", report["missing_keys"]),
        ("holds in another shape", report["mismatched_keys"]),
        ("holds what has no place in the model:", report["unexpected_keys"]),
    ):
        if names:
            raise CheckpointError(f"{source}: the file {fault} {sorted(names)[0]}")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _model_card(source: Path, out: Path, contents: _Contents) -> str:
    front: dict[str, object] = {"library_name": "transformers"}
    if contents.licence:
        front["license"] = contents.licence
    if contents.quantised:
        types = ", ".join(contents.quantised)
        weights = (
            f"The weights were dequantised from {types} to {contents.dtype}. They keep the error "
            "of the quantisation: they are not the weights that it was made from."
        )
    else:
        weights = f"The weights are those of the file, in {contents.dtype}."
    return _CARD.format(
        front_matter=yaml.safe_dump(front),
        title=out.name,
        file=source.name,
        weights=weights,
    )
