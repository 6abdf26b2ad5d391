"""The one loop: jobs -> (name, tensor). Float32 inside, one cast at the end, no state between tensors."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from paretomerge.checkpoint.tokenizer import copy_tokenizer
from paretomerge.checkpoint.writer import SHARD_BYTES, TensorSpec, new_folder, write_json, write_weights
from paretomerge.errors import CheckpointError
from paretomerge.merge.methods import Inputs
from paretomerge.merge.plan import Job, Plan, make_plan
from paretomerge.recipe import Recipe

Read = Callable[[str, str], torch.Tensor]
"""(model, tensor name) -> float32 tensor, not to be written to."""


def merge(recipe: Recipe, out: str | Path, *, overwrite: bool = False, shard_bytes: int = SHARD_BYTES, card: str = "") -> Path:
    """Merge `recipe` into the new folder `out`: weights, config, tokenizer, recipe and model card.

    The folder appears whole or not at all. `card` is added to the model card. Returns the folder.
    """
    plan = make_plan(recipe)
    out = Path(out)
    with new_folder(out, overwrite) as folder:
        specs = [TensorSpec(job.name, plan.dtype, job.shape) for job in plan.jobs]
        write_weights(folder, specs, merged_tensors(plan), shard_bytes)
        write_json(folder / "config.json", result_config(plan))
        tokenizer = recipe.tokenizer_source if recipe.tokenizer_source in plan.checkpoints else None
        copy_tokenizer(plan.checkpoints[tokenizer].folder if tokenizer else plan.template.folder, folder)
        (folder / "mergekit_config.yml").write_text(recipe.to_yaml(), encoding="utf-8")
        (folder / "README.md").write_text(_card(recipe, out.name, card), encoding="utf-8")
    return out


def merged_tensors(plan: Plan) -> Iterator[tuple[str, torch.Tensor]]:
    """Every output tensor in the order of the plan, cast to the plan's dtype."""

    def read(model: str, tensor: str) -> torch.Tensor:
        return _finite(plan.checkpoints[model].tensor(tensor).to(torch.float32), model, tensor)

    dtype = getattr(torch, plan.dtype)
    for job in plan.jobs:
        yield job.name, merge_tensor(plan, job, read).to(dtype)


def merge_tensor(plan: Plan, job: Job, read: Read) -> torch.Tensor:
    """One output tensor in float32; `read` says where the inputs come from."""
    sources = [read(*pair) for pair in job.sources]
    device = sources[0].device
    uniform = [_uniform(plan.recipe.seed, job.name, i, job.shape, device) for i in range(len(sources))]
    base = read(*job.base) if job.base else None
    return plan.method.combine(Inputs(base, sources, job.knobs, job.options, uniform))


def _uniform(seed: int, name: str, index: int, shape: tuple[int, ...], device: torch.device) -> Callable[[], torch.Tensor]:
    """Random numbers with an address: the same whatever was drawn before, in any process."""

    def draw() -> torch.Tensor:
        digest = hashlib.sha256(f"{seed}\0{name}\0{index}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        return torch.rand(shape, generator=generator).to(device)  # drawn on the CPU: the same on every device

    return draw


def _finite(tensor: torch.Tensor, model: str, name: str) -> torch.Tensor:
    if not torch.isfinite(tensor).all():
        raise CheckpointError(f"{model}: {name}: expected finite weights, got NaN or infinity; is the download or the training broken?")
    return tensor


def result_config(plan: Plan) -> dict[str, Any]:
    """The template's config with the depth, the dtype and every per-layer list made to follow the route."""
    config = dict(plan.template.config)
    depth = plan.template.architecture.depth
    for key in ("dtype", "torch_dtype"):
        if key in config:
            config[key] = plan.dtype
    for key, value in config.items():
        if isinstance(value, list) and len(value) == depth and key.startswith("layer"):
            config[key] = [_entry(plan.checkpoints[model].config, key, layer, value) for model, layer in plan.route]
        elif key in ("num_hidden_layers", "n_layer", "num_layers", "n_layers"):
            config[key] = len(plan.route)
    return config


def _entry(config: Mapping[str, Any], key: str, layer: int, fallback: list[Any]) -> Any:
    return config.get(key, fallback)[layer]


def _card(recipe: Recipe, title: str, more: str) -> str:
    listed = "\n".join(f"- {model}" for model in recipe.models)
    return (
        f"---\nlibrary_name: transformers\ntags:\n- merge\n- mergekit\n- paretomerge\n---\n# {title}\n\n"
        f"Merged with paretomerge by `{recipe.merge_method}` from:\n\n{listed}\n\n{more}\n\n"
        f"Rebuild it with `paretomerge merge mergekit_config.yml OUT`.\n\n```yaml\n{recipe.to_yaml()}```\n"
    )
