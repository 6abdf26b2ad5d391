"""Writes a mixture of experts: copies of dense models' tensors, and a router."""

from collections.abc import Iterator
from pathlib import Path

import torch

from paretomerge.arguments import flag, integer
from paretomerge.arguments import path as read_path
from paretomerge.checkpoint.companions import (
    companion_files,
    copy_files,
    files_besides_tokenizer,
    tokenizer_files,
)
from paretomerge.checkpoint.json_file import write_json
from paretomerge.checkpoint.model_config import with_tagged_floats
from paretomerge.checkpoint.operand import matrix_shape
from paretomerge.checkpoint.writer import (
    SHARD_BYTES,
    TensorSpec,
    WeightsWriter,
    check_out,
    check_replaceable,
    new_folder,
)
from paretomerge.errors import CheckpointError
from paretomerge.merging.card import (
    checksum_lines,
    dequantised_note,
    front_matter,
    licence_of,
    paragraphs,
    public_name,
    table_of_sources,
)
from paretomerge.merging.engine import usable_device
from paretomerge.merging.plan.plan import Weights
from paretomerge.systems.moe.config import MoeConfigLike
from paretomerge.systems.moe.plan import CopyJob, MoePlan, plan_moe
from paretomerge.systems.moe.router import Router, make_router
from paretomerge.systems.moe.search import ROUTER_FOLDER, write_router_adapters

CONFIG_FILE = "mergekit_moe_config.yml"
"""The configuration, in the folder of the result."""

_BLOCK_ELEMENTS = 1 << 22
_CARD = """\
---
{front_matter}---
# {title}

A {target} with {n_experts} expert(s), {n_per_token} per token, put together with paretomerge from
dense models. Attention, norms, embeddings and head are those of {base}; the experts are the MLPs of
the other models. Rows of the router: `{gate_mode}`.

| source | licence |
|---|---|
{sources}

The result is bound by the licences of all its sources.

{notes}Rebuild it with `paretomerge moe {config_file} OUT`:

```yaml
{config}```

SHA-256 (`sha256sum --check`):

```
{checksums}
```
"""


def write_moe(
    config: MoeConfigLike,
    out: str | Path,
    *,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    device: str = "cpu",
    allow_mismatch: bool = False,
    seed: int = 0,
    for_search: bool = False,
) -> MoePlan:
    """Build a mixture of experts from dense models and write it as a checkpoint.

    The tensors are streamed. Only `gate_mode: hidden` holds a model in memory, the base.

    Args:
        config: A `MoeConfig`, a mapping, the path of a YAML file, or YAML text.
        out: The folder to create. It appears whole or not at all.
        overwrite: Whether to replace `out` if it is a checkpoint.
        shard_bytes: The size of the largest file of weights.
        device: Where the base reads the prompts: `cpu`, `cuda` or `cuda:N`.
        allow_mismatch: Whether to take models that do not seem to belong together.
        seed: The seed of `gate_mode: random`.
        for_search: Whether the router is written as zeros, with the rows of each expert in an
            adapter under `out/router`. A study searches their lengths.

    Returns:
        What was written, with notes for the user.

    Raises:
        RecipeError: If the configuration has no meaning.
        CheckpointError: If a model cannot be read, the models do not fit together, or `out` cannot
            be written.
        ConfigError: If an argument has a wrong type, or the device is not available.

    Example:
        >>> plan = write_moe("config.yml", "OUT")  # doctest: +SKIP
        >>> plan.target.title, plan.notes  # doctest: +SKIP
        ('Mixtral', ())
    """
    folder = Path(read_path("out", out))
    overwrite = flag("overwrite", overwrite)
    shard_bytes = integer(1)("shard_bytes", shard_bytes)
    seed = integer(0)("seed", seed)
    for_search = flag("for_search", for_search)
    device = usable_device(device)
    plan = plan_moe(config, flag("allow_mismatch", allow_mismatch))
    check_out(folder, plan.config.source_models, overwrite)
    # The folder is claimed before the prompts are read: a wrong `out` must not cost their time.
    with new_folder(folder, overwrite, plan.bytes_written) as temporary:
        router = make_router(plan, device, seed)
        plan = plan.with_notes(router.notes)
        with WeightsWriter(temporary, plan.specs, shard_bytes) as writer:
            written = router.without_rows() if for_search else router
            _write_tensors(plan, written, writer)
            checksums = writer.checksums()
        # A source that changed meanwhile makes the result worthless.
        for weights in plan.weights.values():
            weights.check_unchanged()
        write_json(temporary / "config.json", with_tagged_floats(plan.model_config))
        _write_companions(plan.base, temporary)
        stated = plan.config.resolve_paths(Path.cwd())
        (temporary / CONFIG_FILE).write_text(stated.to_yaml(), encoding="utf-8")
        card = _card(plan, folder.name, checksums, for_search)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        if for_search:
            write_router_adapters(plan, router, temporary, folder.name)
        if overwrite:
            # Others may have put something else there meanwhile.
            check_replaceable(folder)
    return plan


def _write_tensors(plan: MoePlan, router: Router, writer: WeightsWriter) -> None:
    for job in plan.copies:
        start = 0
        for block in _scaled_blocks(plan, job):
            writer.write(job.spec.name, start, block)
            start += block.numel()
    for spec in plan.zeros:
        writer.write(spec.name, 0, _cast(spec, torch.zeros(spec.shape)))
    gates = {spec.name: spec for spec in plan.gates}
    for layer in range(plan.depth):
        spec = gates[plan.target.router(layer)]
        writer.write(spec.name, 0, _cast(spec, router.gates[layer]))
        if plan.config.shared_experts:
            spec = gates[plan.target.shared_gate(layer)]
            writer.write(spec.name, 0, _cast(spec, router.shared[layer]))


def _scaled_blocks(plan: MoePlan, job: CopyJob) -> Iterator[torch.Tensor]:
    """The tensor of a job, a few rows at a time."""
    operand = plan.weights[job.source.model].operand(job.source.name)
    n_rows, columns = matrix_shape(job.spec.shape)
    step = max(_BLOCK_ELEMENTS // max(columns, 1), 1)
    for first in range(0, n_rows, step):
        rows = operand.rows(first, min(first + step, n_rows))
        if job.scale != 1:
            rows = rows.mul_(job.scale)
        yield _cast(job.spec, rows)


def _cast(spec: TensorSpec, block: torch.Tensor) -> torch.Tensor:
    """A block in the dtype of its tensor.

    Raises:
        CheckpointError: If a value is too large for it.
    """
    cast = block.to(getattr(torch, spec.dtype))
    if not bool(torch.isfinite(cast).all()):
        raise CheckpointError(
            f"{spec.name}: has values that {spec.dtype} cannot hold; write another `dtype`"
        )
    return cast


def _write_companions(base: Weights, folder: Path) -> None:
    """Copy the tokenizer, the generation config and what else belongs to the base."""
    if base.tokenizer_folder == base.folder:
        copy_files(companion_files(base.folder), base.folder, folder)
        return
    # An adapter may have a tokenizer of its own.
    copy_files(files_besides_tokenizer(base.folder), base.folder, folder)
    source = base.tokenizer_folder
    copy_files(tokenizer_files(source), source, folder)


def _card(
    plan: MoePlan, title: str, checksums: dict[str, str], for_search: bool
) -> str:
    config = plan.config
    notes = [dequantised_note(plan.weights)]
    if for_search:
        notes.append(
            f"Its router is zero. The rows of each expert are an adapter in `{ROUTER_FOLDER}`, for "
            "a search over their lengths."
        )
    licences = {}
    for model in config.source_models:
        licences[model] = licence_of(plan.weights[model])
    return _CARD.format(
        front_matter=front_matter(
            config.source_models, licences.values(), ("moe", "merge")
        ),
        title=title,
        target=plan.target.title,
        n_experts=len(config.experts),
        n_per_token=config.experts_per_token,
        base=public_name(config.base_model),
        gate_mode=config.gate_mode,
        sources=table_of_sources(licences),
        notes=paragraphs(*notes),
        config_file=CONFIG_FILE,
        config=config.rename_models(public_name).to_yaml(),
        checksums=checksum_lines(checksums),
    )
