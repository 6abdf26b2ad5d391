"""Routes through layers: how exact the fold is on the specialists, and what a change of route takes.

python benchmarks/stream.py exactness            # folded scales against explicit ones, float32 and bfloat16
python benchmarks/stream.py families FOLDER      # the same on small specialists of every family, trained in FOLDER (minutes)
python benchmarks/stream.py switch FOLDER        # two random 0.5 B models of 24 layers, made in FOLDER (4 GB)
"""

import argparse
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import workloads

from paretomerge.checkpoint.fold import FOLDS, fold_of
from paretomerge.checkpoint.reader import Checkpoint
from paretomerge.merging.live.routed import RoutedModel
from paretomerge.space.routes.passthrough import RouteLayer, route_to_recipe

MODELS = Path(__file__).resolve().parent.parent / "examples" / "specialists" / "models"
ROUTES = 20
TIMED = 15


def random_route(models: list[str], layers: int, rng: np.random.Generator) -> list[RouteLayer]:
    """From the layers in order, each from any model: a few skipped, repeated and scaled."""
    route: list[RouteLayer] = []
    for layer in range(layers):
        for _ in range(int(rng.choice([0, 1, 1, 1, 1, 2]))):
            scaled = route and rng.random() < 0.5
            route.append(
                RouteLayer(
                    str(rng.choice(models)),
                    layer,
                    float(np.exp(rng.normal(0, 0.3))) if scaled else 1.0,
                )
            )
    return route or [RouteLayer(models[0], 0)]


def logits(
    model: Any, tokens: torch.Tensor, prefix: str, scales: list[float] | None = None
) -> torch.Tensor:
    """Of the model, with the stream multiplied on its way into each layer where scales are given."""
    handles = []
    for layer, scale in zip(model.get_submodule(prefix.rstrip(".")), scales or [], strict=False):

        def before(module: Any, args: Any, kwargs: Any, scale: float = scale) -> Any:
            if args:
                return (args[0] * scale, *args[1:]), kwargs
            return args, kwargs | {"hidden_states": kwargs["hidden_states"] * scale}

        handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
    with torch.no_grad():
        found: torch.Tensor = model(tokens).logits.float()
    for handle in handles:
        handle.remove()
    return found


def errors_of(names: list[str], routes: int) -> dict[str, list[float]]:
    """Largest difference of a logit over the largest logit, one per random route."""
    first = Checkpoint(names[0])
    fold, depth, prefix = fold_of(first.config), first.architecture.depth, first.architecture.prefix
    rng = np.random.default_rng(0)
    tokens = torch.randint(
        3, int(first.config["vocab_size"]), (8, 24), generator=torch.Generator().manual_seed(0)
    )
    errors: dict[str, list[float]] = {
        "folded, float32": [],
        "folded, bfloat16": [],
        "explicit, bfloat16": [],
    }
    live = {dtype: RoutedModel(names, dtype) for dtype in ("float32", "bfloat16")}
    for _ in range(routes):
        route = random_route(names, depth, rng)
        scales = [step.scale for step in route]
        plain, folded = (
            route_to_recipe([RouteLayer(s.model, s.layer) for s in route], None),
            route_to_recipe(route, fold),
        )
        exact = logits(live["float32"].load(plain).model, tokens, prefix, scales)
        found = {
            "folded, float32": logits(live["float32"].load(folded).model, tokens, prefix),
            "folded, bfloat16": logits(live["bfloat16"].load(folded).model, tokens, prefix),
            "explicit, bfloat16": logits(
                live["bfloat16"].load(plain).model, tokens, prefix, scales
            ),
        }
        for name, got in found.items():
            errors[name].append(((got - exact).abs().max() / exact.abs().max()).item())
    return errors


def exactness() -> None:
    """Median and worst of the routes, on the shipped specialists."""
    errors = errors_of([str(MODELS / name) for name in ("order", "mirror", "scribe")], ROUTES)
    print("| against explicit scales in float32 | median | worst |\n|---|---:|---:|")
    for name, values in errors.items():
        print(f"| {name} | {statistics.median(values):.1e} | {max(values):.1e} |")


FAMILY_STEPS, FAMILY_ROUTES = 250, 10
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
GPT2_SIZES = {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 64}
MORE = {
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16},
}


def specialist(kind: str, own: tuple[str, ...], folder: Path) -> str:
    """A small model of that family, trained a little on its own skills in place of the mixture."""
    import train
    from skills import draw_item
    from transformers import AutoConfig, AutoModelForCausalLM

    if not (folder / "config.json").exists():
        tokenizer, rng = train.make_tokenizer(), random.Random(0)
        torch.manual_seed(0)
        sizes = (
            GPT2_SIZES
            if kind == "gpt2"
            else {**SIZES, "max_position_embeddings": 64, **MORE.get(kind, {})}
        )
        tokens = {
            "vocab_size": len(tokenizer),
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 1,
        }
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **tokens))
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        for _ in range(FAMILY_STEPS):
            ids, labels = train.encode(
                tokenizer, [draw_item(rng.choice(own), "train", rng) for _ in range(32)]
            )
            optimizer.zero_grad()
            model(input_ids=ids, labels=labels).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return str(folder)


def families(folder: Path) -> None:
    """Every family that has a fold; two specialists of each from one seed."""
    sys.path.insert(0, str(MODELS.parent))
    print(
        "| family | float32, median | float32, worst | bfloat16, median | explicit in bfloat16, median |\n|---|---:|---:|---:|---:|"
    )
    for kind in FOLDS:
        names = [
            specialist(kind, own, folder / kind / own[0])
            for own in (("sort", "count"), ("copy", "shift"))
        ]
        errors = errors_of(names, FAMILY_ROUTES)
        exact, rounded, plain = errors.values()
        cells = [
            statistics.median(exact),
            max(exact),
            statistics.median(rounded),
            statistics.median(plain),
        ]
        print(f"| {kind} | " + " | ".join(f"{cell:.1e}" for cell in cells) + " |", flush=True)


def switch(folder: Path) -> None:
    """Milliseconds from a recipe to a live model that follows it, for routes never seen, and for the same depth again."""
    if not folder.exists():
        workloads.make(folder, "0.5")
    names = [str(folder / name) for name in ("a", "b")]
    layers = workloads.SHAPES["0.5"].layers
    live, fold, rng = (
        RoutedModel(names),
        fold_of(Checkpoint(names[0]).config),
        np.random.default_rng(0),
    )
    for name in names:  # the sources are read from disk once
        live.load(route_to_recipe([RouteLayer(name, layer) for layer in range(layers)], None))
    taken: dict[str, list[float]] = {
        f"{what}, {depth}": []
        for what in ("no scales", "scales")
        for depth in ("a depth seen before", "another")
    }
    depths = {layers}
    for number in range(6 * TIMED):
        route = random_route(names, layers, rng)
        route = route if number % 3 else route[:layers]
        if number % 2:
            route = [RouteLayer(step.model, step.layer) for step in route]
        recipe, seen = (
            route_to_recipe(route, fold),
            "a depth seen before" if len(route) in depths else "another",
        )
        since = time.perf_counter()
        live.load(recipe)
        taken[f"{'no scales' if number % 2 else 'scales'}, {seen}"].append(
            1000 * (time.perf_counter() - since)
        )
        depths.add(len(route))
        if number % TIMED == 0:  # forget the shells, so that depths are new again
            live._skeletons.clear()
            depths = {len(route)}
    print("| a change of route, 24 layers, 0.5 B | median, ms | worst, ms |\n|---|---:|---:|")
    for name, values in taken.items():
        print(f"| {name} ({len(values)}) | {statistics.median(values):.0f} | {max(values):.0f} |")


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="what", required=True)
    commands.add_parser("exactness")
    commands.add_parser("families").add_argument("folder", type=Path)
    commands.add_parser("switch").add_argument("folder", type=Path)
    arguments = parser.parse_args()
    if arguments.what == "exactness":
        exactness()
    elif arguments.what == "families":
        families(arguments.folder)
    else:
        switch(arguments.folder)


if __name__ == "__main__":
    main()
