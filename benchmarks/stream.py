"""docs/lab/routes.md: how exact folded scales are, and how long a change of route takes.

    python -m benchmarks.stream exactness         # folded scales against explicit ones
    PYTHONPATH=examples/specialists python -m benchmarks.stream families FOLDER
    python -m benchmarks.stream switch FOLDER     # two random 0.5 B models of 24 layers (4 GB)

`families` does the same as `exactness` on small specialists of every family, which it trains in
FOLDER (minutes), with the training code of the example.
"""

import random
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from benchmarks import workloads
from benchmarks.reporting import documented_parser, markdown_row, markdown_table
from paretomerge.checkpoint.fold import FOLDS, fold_of
from paretomerge.checkpoint.reader import Checkpoint
from paretomerge.examples import SPECIALISTS
from paretomerge.merging.live.routed import RoutedModel
from paretomerge.space.routes.passthrough import RouteLayer, route_to_recipe

SOURCES = [str(SPECIALISTS / "models" / name) for name in ("order", "mirror", "scribe")]
ROUTES = 20
FAMILY_ROUTES = 10
FAMILY_STEPS = 250
CHANGES_PER_MODEL = 15
FAMILY_SKILLS = (("sort", "count"), ("copy", "shift"))
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
}
GPT2_SIZES = {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 64}
EXTRA_SIZES = {
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16},
}

Route = list[RouteLayer]
Errors = dict[str, list[float]]
"""Kind of scales and precision -> error of each route."""


def random_route(models: Sequence[str], layers: int, rng: np.random.Generator) -> Route:
    """The layers in order, each from any model: a few skipped, repeated and scaled."""
    route: Route = []
    for layer in range(layers):
        for _ in range(int(rng.choice([0, 1, 1, 1, 1, 2]))):
            is_scaled = bool(route) and rng.random() < 0.5
            model = str(rng.choice(models))
            scale = float(np.exp(rng.normal(0, 0.3))) if is_scaled else 1.0
            route.append(RouteLayer(model, layer, scale))
    return route or [RouteLayer(models[0], 0)]


def without_scales(route: Route) -> Route:
    """The same layers, each with a scale of 1."""
    return [RouteLayer(step.model, step.layer) for step in route]


# ----- exactness


def logits_of(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    prefix: str,
    scales: Sequence[float] = (),
) -> torch.Tensor:
    """Logits, with the residual stream multiplied on its way into each layer."""
    layers = model.get_submodule(prefix.rstrip("."))
    handles = []
    for layer, scale in zip(layers, scales, strict=False):
        hook = scaling_hook(scale)
        handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
    with torch.no_grad():
        logits: torch.Tensor = model(tokens).logits.float()
    for handle in handles:
        handle.remove()
    return logits


def scaling_hook(scale: float) -> Any:
    """A hook that multiplies a layer's hidden states."""

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (args[0] * scale, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": kwargs["hidden_states"] * scale}

    return hook


def errors_of(names: list[str], n_routes: int) -> Errors:
    """Largest difference of a logit over the largest logit, one per random route."""
    first = Checkpoint(names[0])
    fold = fold_of(first.config)
    depth, prefix = first.architecture.depth, first.architecture.prefix
    rng = np.random.default_rng(0)
    generator = torch.Generator().manual_seed(0)
    vocabulary = int(first.config["vocab_size"])
    tokens = torch.randint(3, vocabulary, (8, 24), generator=generator)
    float32, bfloat16 = RoutedModel(names, "float32"), RoutedModel(names, "bfloat16")
    errors: Errors = {
        "folded, float32": [],
        "folded, bfloat16": [],
        "explicit, bfloat16": [],
    }
    for _ in range(n_routes):
        route = random_route(names, depth, rng)
        scales = [step.scale for step in route]
        plain = route_to_recipe(without_scales(route), None)
        folded = route_to_recipe(route, fold)
        # A model is asked before the next recipe is loaded into it.
        exact = logits_of(float32.load(plain).model, tokens, prefix, scales)
        logits = {
            "folded, float32": logits_of(float32.load(folded).model, tokens, prefix),
            "folded, bfloat16": logits_of(bfloat16.load(folded).model, tokens, prefix),
            "explicit, bfloat16": logits_of(
                bfloat16.load(plain).model, tokens, prefix, scales
            ),
        }
        for name, approximate in logits.items():
            difference = (approximate - exact).abs().max()
            relative = difference / exact.abs().max()
            errors[name].append(relative.item())
    return errors


def exactness() -> None:
    """Median and worst of the routes, on the shipped specialists."""
    rows = []
    for name, values in errors_of(SOURCES, ROUTES).items():
        median = statistics.median(values)
        rows.append([name, f"{median:.1e}", f"{max(values):.1e}"])
    header = ["against explicit scales in float32", "median", "worst"]
    print(markdown_table(header, rows))


# ----- every family


def families(folder: Path) -> None:
    """Every family that has a fold; two specialists of each from one seed."""
    header = ["family", "float32, median", "float32, worst"]
    header += ["bfloat16, median", "explicit in bfloat16, median"]
    print(markdown_table(header, []))
    for kind in FOLDS:
        names = []
        for skills in FAMILY_SKILLS:
            names.append(specialist(kind, skills, folder / kind / skills[0]))
        errors = errors_of(names, FAMILY_ROUTES)
        cells = [
            statistics.median(errors["folded, float32"]),
            max(errors["folded, float32"]),
            statistics.median(errors["folded, bfloat16"]),
            statistics.median(errors["explicit, bfloat16"]),
        ]
        texts = [f"{cell:.1e}" for cell in cells]
        print(markdown_row([kind, *texts]), flush=True)


def specialist(kind: str, skills: Sequence[str], folder: Path) -> str:
    """A small model of a family, trained a little on some skills; its folder."""
    if not (folder / "config.json").exists():
        train_specialist(kind, skills, folder)
    return str(folder)


def train_specialist(kind: str, skills: Sequence[str], folder: Path) -> None:
    """Train from random weights of a fixed seed, and save the model."""
    import train  # of examples/specialists
    from skills import draw_item

    tokenizer, rng = train.make_tokenizer(), random.Random(0)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(family_config(kind, len(tokenizer)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(FAMILY_STEPS):
        batch = [draw_item(rng.choice(skills), "train", rng) for _ in range(32)]
        ids, labels = train.encode(tokenizer, batch)
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def family_config(kind: str, vocabulary: int) -> Any:
    """A small configuration of a family."""
    sizes: Mapping[str, int] = GPT2_SIZES if kind == "gpt2" else SIZES
    return AutoConfig.for_model(
        kind,
        **sizes,
        **EXTRA_SIZES.get(kind, {}),
        vocab_size=vocabulary,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )


# ----- changes of route


def switch(folder: Path) -> None:
    """Milliseconds from a recipe to a live model that follows it, for new and for seen depths."""
    if not folder.exists():
        workloads.make(folder, "0.5")
    names = [str(folder / name) for name in ("a", "b")]
    layers = workloads.SHAPES["0.5"].layers
    fold = fold_of(Checkpoint(names[0]).config)
    rng = np.random.default_rng(0)
    milliseconds: dict[str, list[float]] = {}
    for what in ("no scales", "scales"):
        for depth in ("a depth seen before", "another"):
            milliseconds[f"{what}, {depth}"] = []
    for number in range(6 * CHANGES_PER_MODEL):
        if number % CHANGES_PER_MODEL == 0:  # depths are new again to a new model
            live, depths = warm_model(names, layers), {layers}
        route = random_route(names, layers, rng)
        if number % 3 == 0:
            route = route[:layers]
        what = "scales"
        if number % 2:
            route, what = without_scales(route), "no scales"
        recipe = route_to_recipe(route, fold)
        depth = "a depth seen before" if len(route) in depths else "another"
        since = time.perf_counter()
        live.load(recipe)
        seconds = time.perf_counter() - since
        milliseconds[f"{what}, {depth}"].append(1000 * seconds)
        depths.add(len(route))
    rows = []
    for name, values in milliseconds.items():
        label = f"{name} ({len(values)})"
        median = statistics.median(values)
        rows.append([label, f"{median:.0f}", f"{max(values):.0f}"])
    header = ["a change of route, 24 layers, 0.5 B", "median, ms", "worst, ms"]
    print(markdown_table(header, rows))


def warm_model(names: list[str], layers: int) -> RoutedModel:
    """A live model whose sources were read from disk once."""
    live = RoutedModel(names)
    for name in names:
        route = [RouteLayer(name, layer) for layer in range(layers)]
        live.load(route_to_recipe(route, None))
    return live


def main() -> None:
    """Run one of the commands."""
    torch.set_num_threads(1)
    parser = documented_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("exactness")
    commands.add_parser("families").add_argument("folder", type=Path)
    commands.add_parser("switch").add_argument("folder", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "exactness":
        exactness()
    elif arguments.command == "families":
        families(arguments.folder)
    else:
        switch(arguments.folder)


if __name__ == "__main__":
    main()
