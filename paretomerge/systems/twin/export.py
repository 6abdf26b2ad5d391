"""Write theta* + sum_t g_t v_t for fixed weights as an ordinary checkpoint."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from paretomerge.arguments import as_float
from paretomerge.arguments import path as read_path
from paretomerge.checkpoint.reader import INDEX_FILE, Checkpoint
from paretomerge.checkpoint.writer import (
    SHARD_BYTES,
    TensorSpec,
    WeightsWriter,
    check_out,
    new_folder,
)
from paretomerge.errors import CheckpointError, ConfigError
from paretomerge.systems.twin.exclusive import load_parts
from paretomerge.systems.twin.manifest import SHARED_FOLDER, Manifest

_README = """# A mixture of a Twin-Merging folder

theta* + {sum}, an ordinary checkpoint ([Twin-Merging](https://arxiv.org/abs/2406.15479)).
"""


def export_corner(
    folder: str | Path, task: str, out: str | Path, *, overwrite: bool = False
) -> Path:
    """Write the model of one task as an ordinary checkpoint: theta* + v_t.

    Args:
        folder: A folder that `paretomerge twin` wrote.
        task: The task.
        out: The folder to create.
        overwrite: Whether to replace `out`, if it is a checkpoint.

    Returns:
        The new folder.

    Raises:
        CheckpointError: The folder cannot be read, has no such task, or `out` cannot be written.
    """
    return export_mixture(folder, {task: 1.0}, out, overwrite=overwrite)


def export_mixture(
    folder: str | Path,
    weights: Mapping[str, float],
    out: str | Path,
    *,
    overwrite: bool = False,
) -> Path:
    """Write the model of fixed weights of the tasks as an ordinary checkpoint.

    Args:
        folder: A folder that `paretomerge twin` wrote.
        weights: Name of a task -> its weight, used as it is; 0 for the others. The router's weights
            sum to 1.
        out: The folder to create.
        overwrite: Whether to replace `out`, if it is a checkpoint.

    Returns:
        The new folder, with theta*'s names, dtypes and tokenizer.

    Raises:
        CheckpointError: The folder cannot be read, has no such task, or `out` cannot be written.
        ConfigError: A weight is not a finite number, or there is none.
    """
    folder = Path(folder).expanduser()
    out = Path(read_path("out", out))
    manifest = Manifest.read(folder)
    files = {}
    for task, weight in weights.items():
        files[manifest.exclusive_file(task)] = _finite(task, weight)
    if not files:
        raise ConfigError(
            f"weights: name a task and its weight, such as {manifest.tasks[0]}=1"
        )
    manifest.check_files(folder, contents=files)
    check_out(out, (str(folder), str(folder / SHARED_FOLDER)), overwrite)
    shared = Checkpoint(str(folder / SHARED_FOLDER))
    mixtures = [(load_parts(folder / file), weight) for file, weight in files.items()]
    specs = []
    for name, header in shared.headers.items():
        specs.append(TensorSpec(name, header.dtype, header.shape))
    needed = sum(spec.bytes for spec in specs)
    with new_folder(out, overwrite, needed) as temporary:
        with WeightsWriter(temporary, specs, SHARD_BYTES) as writer:
            for spec in specs:
                tensor = shared.tensor(spec.name)
                for parts, weight in mixtures:
                    if spec.name in parts:
                        tensor = tensor.float()
                        tensor = tensor + weight * parts[spec.name].dense()
                writer.write(spec.name, 0, _cast(tensor, spec))
            # Reads what was written once more, which shows a tensor that is missing.
            writer.checksums()
        _copy_companions(shared.folder, temporary)
        terms = [f"{weight:g} v_{task}" for task, weight in weights.items()]
        readme = _README.format(sum=" + ".join(terms))
        (temporary / "README.md").write_text(readme, encoding="utf-8")
        shared.check_unchanged()
    return out


def _cast(tensor: Tensor, spec: TensorSpec) -> Tensor:
    """A tensor in the dtype that it is written in."""
    cast = tensor.to(getattr(torch, spec.dtype))
    if cast.is_floating_point() and not bool(cast.isfinite().all()):
        raise CheckpointError(
            f"{spec.name}: the sum is too large for {spec.dtype}; take smaller weights, or make "
            "the Twin-Merging folder with --dtype float32"
        )
    return cast


def _finite(task: str, weight: object) -> float:
    value = as_float(weight)
    if value is None or not abs(value) < float("inf"):
        raise ConfigError(f"{task}: its weight must be a finite number, got {weight!r}")
    return value


def _copy_companions(source: Path, out: Path) -> None:
    """Copy the config, the tokenizer and what else is no weight and no description."""
    for file in source.iterdir():
        is_weight = file.suffix == ".safetensors" or file.name == INDEX_FILE
        if is_weight or file.name in ("README.md", "mergekit_config.yml"):
            continue
        if file.is_dir():
            shutil.copytree(file, out / file.name)
        else:
            shutil.copy(file, out / file.name)
