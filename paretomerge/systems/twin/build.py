"""Make a Twin-Merging folder: theta*, the exclusive parts and a trained router."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from paretomerge.arguments import (
    flag,
    integer,
    label,
    mapping_of,
    number,
    sequence_of,
)
from paretomerge.arguments import model as read_model
from paretomerge.arguments import path as read_path
from paretomerge.checkpoint.operand import FLOAT_DTYPES
from paretomerge.checkpoint.reader import Checkpoint
from paretomerge.checkpoint.writer import (
    check_out,
    new_folder,
)
from paretomerge.errors import CheckpointError, ConfigError
from paretomerge.evaluate.inference.batching import Tokens
from paretomerge.merging.card import public_name
from paretomerge.merging.engine import usable_device, write
from paretomerge.merging.live.model_class import load_model, load_tokenizer
from paretomerge.merging.plan.make import make_plan
from paretomerge.merging.plan.plan import Plan
from paretomerge.recipe import Recipe
from paretomerge.space.sources import read_sources
from paretomerge.systems.notes import plan_notes
from paretomerge.systems.twin.check import (
    check_computation,
    check_models,
    source_tensor,
)
from paretomerge.systems.twin.exclusive import Part, compress, save_parts
from paretomerge.systems.twin.manifest import (
    ROUTER_FILE,
    SHARED_FOLDER,
    Manifest,
    file_facts,
)
from paretomerge.systems.twin.model import TwinModel, hidden_size
from paretomerge.systems.twin.places import Places
from paretomerge.systems.twin.router import (
    Router,
    TrainedRouter,
    save_router,
    train_router,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WEIGHT = 0.3
"""The paper's weight of each source in theta*."""

RANK_SHARE = 0.1
"""The paper's share of the rank of the exclusive parts."""

MIN_PROMPTS = 5
"""Distinct prompts that each task needs: four to train on and one to validate with."""

_PROMPTS_EXAMPLE = '{"math": ["What is 3 + 4?", ...]}'

_README = """# A Twin-Merging folder

`{shared}/` is an ordinary checkpoint: task arithmetic at {weight:g} of {tasks} on `{base}`.
The files `exclusive-*.safetensors` hold what is particular to each of them, and
`router.safetensors` weighs them by the prompt ([Twin-Merging](https://arxiv.org/abs/2406.15479)).
`twin.json` lists the files.

```python
from paretomerge.systems.twin import TwinModel

model = TwinModel.from_pretrained("THIS FOLDER")
```
"""


def build_twin(  # noqa: PLR0913 - the options of the command, all with a default
    base: str,
    models: Sequence[str] | Mapping[str, str],
    prompts: Mapping[str, Sequence[str]],
    out: str | Path,
    *,
    weight: float = WEIGHT,
    rank_share: float = RANK_SHARE,
    seed: int = 0,
    dtype: str | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    allow_mismatch: bool = False,
) -> Path:
    """Make a Twin-Merging folder (Lu et al. 2024, arXiv 2406.15479).

    theta* is task arithmetic of all sources; v_t = theta_t - theta* is cut to a share of its rank;
    the router is trained on prompts of each task, a fifth of which selects its best epoch.

    Args:
        base: The base, a folder or a name on the Hub.
        models: The sources; a task is named after the last part of its source's path. Or name of a
            task -> source.
        prompts: Name of a task -> at least five prompts of it. Use no examples that scores are
            reported on.
        out: The folder to create; it appears whole or not at all.
        weight: Weight of each source in theta*.
        rank_share: Stored directions of each matrix, as a share of its rank, above 0 and at most 1.
        seed: Of the router's training.
        dtype: The dtype of all weights but the router's; by default the base's.
        device: Where matrices are decomposed and prompts are read: `cpu`, `cuda` or `cuda:N`.
        overwrite: Whether to replace `out`, if it is a model's folder.
        allow_mismatch: Whether to take models that do not seem to belong together.

    Returns:
        The folder.

    Raises:
        ConfigError: There are fewer than two sources, prompts are missing, or an argument is wrong.
        CheckpointError: The models cannot be read or used, or `out` cannot be written.
        RecipeError: The sources cannot be merged.

    Example:
        >>> from paretomerge.systems.twin import build_twin
        >>> build_twin(
        ...     "./base",
        ...     ["./math", "./code"],
        ...     {"math": ["What is 3 + 4?", ...], "code": ["Reverse a list.", ...]},
        ...     "twin",
        ... )  # doctest: +SKIP
        PosixPath('twin')
    """
    folder = Path(read_path("out", out))
    overwrite = flag("overwrite", overwrite)
    weight = number("weight", weight)
    rank_share = number("rank_share", rank_share)
    seed = int(integer(0)("seed", seed))
    device = usable_device(device)
    if not 0 < rank_share <= 1:
        raise ConfigError(
            f"rank_share: a share above 0 and at most 1, such as 0.1; got {rank_share:g}"
        )
    base, sources = read_model("base", base), read_sources(models)
    prompts = mapping_of(sequence_of(label, '["What is 3 + 4?"]'), _PROMPTS_EXAMPLE)(
        "prompts", prompts
    )
    texts = _checked_prompts(sources, prompts)
    plan = _plan(base, sources, weight, dtype, allow_mismatch)
    places = check_models(plan)
    _check_out(plan, folder, overwrite)
    with new_folder(folder, overwrite, plan.bytes_written()) as temporary:
        shared = write(plan, temporary / SHARED_FOLDER, device=device)
        tokenizer = load_tokenizer(shared)
        assert tokenizer is not None, "check_models has seen one"
        checkpoint = Checkpoint(str(shared))
        names = list(checkpoint.headers)
        # In float32: over many layers the rounding of bfloat16 is as large as what is looked for.
        model = load_model(shared, torch.float32).to(device).eval()
        check_computation(model, places, names)
        # Its weights have changed.
        model = load_model(shared, None).to(device).eval()
        trained = _train(model, tokenizer, list(texts.values()), names, seed)
        del model
        save_router(trained.router, temporary / ROUTER_FILE)
        manifest = Manifest(
            tasks=tuple(sources),
            base=public_name(base),
            sources={task: public_name(source) for task, source in sources.items()},
            weight=weight,
            rank_share=rank_share,
            seed=seed,
            router_accuracy=trained.accuracy,
            training_prompts=trained.n_training,
            validation_prompts=trained.n_validation,
            notes=plan_notes(plan),
        )
        for task, source in sources.items():
            parts = _exclusive_parts(
                plan, source, checkpoint, places, rank_share, device
            )
            save_parts(parts, temporary / manifest.exclusive_file(task))
        for weights in plan.weights.values():
            weights.check_unchanged()
        readme = _README.format(
            shared=SHARED_FOLDER,
            weight=weight,
            tasks=", ".join(sources),
            base=manifest.base,
        )
        (temporary / "README.md").write_text(readme, encoding="utf-8")
        replace(manifest, files=file_facts(temporary)).write(temporary)
        _check_out(plan, folder, overwrite)
    return folder


def _checked_prompts(
    sources: Mapping[str, str], prompts: Mapping[str, Sequence[str]]
) -> dict[str, list[str]]:
    """The distinct prompts of each task, in the order of the tasks."""
    if len(sources) < 2:
        raise ConfigError(
            "Twin-Merging routes between tasks: name two sources or more, "
            f"not {len(sources)}"
        )
    unknown = sorted(set(prompts) - set(sources))
    if unknown:
        raise ConfigError(
            f"prompts of {', '.join(unknown)}: no source has this name; the sources are "
            f"{', '.join(sources)}"
        )
    texts = {}
    for task in sources:
        distinct = list(dict.fromkeys(prompts.get(task, ())))
        if len(distinct) < MIN_PROMPTS:
            raise ConfigError(
                f"{task}: the router needs at least {MIN_PROMPTS} different prompts of each task, "
                f"got {len(distinct)}"
            )
        texts[task] = distinct
    return texts


def _plan(
    base: str,
    sources: Mapping[str, str],
    weight: float,
    dtype: str | None,
    allow_mismatch: bool,
) -> Plan:
    """The plan of theta*: task arithmetic."""
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": base,
        "models": [{"model": source} for source in sources.values()],
        "parameters": {"weight": weight},
    }
    if dtype is not None:
        recipe["dtype"] = dtype
    return make_plan(Recipe.from_dict(recipe), allow_mismatch=allow_mismatch)


def _check_out(plan: Plan, folder: Path, overwrite: bool) -> None:
    models = (*plan.recipe.source_models, *plan.weights)
    check_out(folder, models, overwrite)


def _train(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    texts: Sequence[Sequence[str]],
    names: Sequence[str],
    seed: int,
) -> TrainedRouter:
    """Train the router on what theta* makes of the prompts of each task."""
    width = hidden_size(model)
    untrained = Router(width, len(texts)).to(model.device)
    tasks = [str(number) for number in range(len(texts))]
    reader = TwinModel(model, untrained, tasks, [{} for _ in tasks], names)
    states = []
    for of_task in texts:
        encoded = [_tokens(tokenizer, text, model) for text in of_task]
        states.append(reader.encode_prompts(encoded))
    if not all(bool(of_task.isfinite().all()) for of_task in states):
        raise CheckpointError(
            "the hidden states of the shared model are NaN or infinite; take a smaller --weight"
        )
    return train_router(states, seed)


def _tokens(
    tokenizer: "PreTrainedTokenizerBase", text: str, model: "PreTrainedModel"
) -> Tokens:
    """The tokens of a prompt; of a longer one than the model reads, the end."""
    ids = tokenizer(text)["input_ids"]
    if not ids:
        raise ConfigError(f"a prompt has no tokens: {text!r}; leave it out")
    config = model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None) or len(ids)
    return tuple(ids[-longest:])


@torch.inference_mode()
def _exclusive_parts(
    plan: Plan,
    source: str,
    shared: Checkpoint,
    places: Places,
    rank_share: float,
    device: str,
) -> dict[str, Part]:
    """v_t = theta_t - theta*, compressed, tensor by tensor.

    theta* is read as it was written: what its rounding lost belongs to v_t.
    """
    weights = plan.weights[source]
    usable: set[str] = set()
    for place in places.layers:
        if place.kind != "other":
            usable.update(place.tensors.values())
    parts: dict[str, Part] = {}
    for job in plan.jobs:
        # The other tensors are equal in all models, as `check_models` has seen.
        if job.name not in usable or job.dtype not in FLOAT_DTYPES:
            continue
        # With --allow-mismatch a source may lack a tensor: then it has the base's.
        owner = weights if job.name in weights.headers else plan.template
        expert = source_tensor(owner, job.name).to(device)
        delta = expert - shared.tensor(job.name).float().to(device)
        if not bool(delta.any()):
            continue
        if not math.isfinite(float(delta.abs().max())):
            raise CheckpointError(
                f"{source}: {job.name}: holds NaN or infinite weights"
            )
        parts[job.name] = compress(delta, rank_share, getattr(torch, job.dtype))
    return parts
