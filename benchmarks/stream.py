"""Routes through layers: how exact the fold is on the specialists, and what a change of route takes.

python benchmarks/stream.py exactness            # folded scales against explicit ones, float32 and bfloat16
python benchmarks/stream.py switch FOLDER        # two random 0.5 B models of 24 layers, made in FOLDER (4 GB)
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import workloads

from paretomerge.checkpoint.reader import Checkpoint
from paretomerge.checkpoint.stream import fold_of
from paretomerge.merge.routed import RoutedModel
from paretomerge.space.stacks import Step, route_recipe

MODELS = Path(__file__).resolve().parent.parent / "examples" / "specialists" / "models"
ROUTES = 20
TIMED = 15


def random_route(models: list[str], layers: int, rng: np.random.Generator) -> list[Step]:
    """From the layers in order, each from any model: a few skipped, repeated and scaled."""
    route: list[Step] = []
    for layer in range(layers):
        for _ in range(int(rng.choice([0, 1, 1, 1, 1, 2]))):
            scaled = route and rng.random() < 0.5
            route.append(Step(str(rng.choice(models)), layer, float(np.exp(rng.normal(0, 0.3))) if scaled else 1.0))
    return route or [Step(models[0], 0)]


def logits(model: Any, tokens: torch.Tensor, scales: list[float] | None = None) -> torch.Tensor:
    """Of the model, with the stream multiplied on its way into each layer where scales are given."""
    handles = []
    for layer, scale in zip(model.model.layers, scales or [], strict=False):
        handles.append(layer.register_forward_pre_hook(lambda module, args, scale=scale: (args[0] * scale, *args[1:])))
    with torch.no_grad():
        found: torch.Tensor = model(tokens).logits.float()
    for handle in handles:
        handle.remove()
    return found


def exactness() -> None:
    """Largest difference of a logit over the largest logit: median and worst of the routes."""
    names = [str(MODELS / name) for name in ("order", "mirror", "scribe")]
    first = Checkpoint(names[0])
    fold, depth = fold_of(first.config), first.architecture.depth
    rng = np.random.default_rng(0)
    tokens = torch.randint(3, int(first.config["vocab_size"]), (8, 24), generator=torch.Generator().manual_seed(0))
    errors: dict[str, list[float]] = {"folded, float32": [], "folded, bfloat16": [], "explicit, bfloat16": []}
    live = {dtype: RoutedModel(names, dtype) for dtype in ("float32", "bfloat16")}
    for _ in range(ROUTES):
        route = random_route(names, depth, rng)
        scales = [step.scale for step in route]
        plain, folded = route_recipe([Step(s.model, s.layer) for s in route], None), route_recipe(route, fold)
        exact = logits(live["float32"].load(plain).model, tokens, scales)
        found = {
            "folded, float32": logits(live["float32"].load(folded).model, tokens),
            "folded, bfloat16": logits(live["bfloat16"].load(folded).model, tokens),
            "explicit, bfloat16": logits(live["bfloat16"].load(plain).model, tokens, scales),
        }
        for name, got in found.items():
            errors[name].append(((got - exact).abs().max() / exact.abs().max()).item())
    print("| against explicit scales in float32 | median | worst |\n|---|---:|---:|")
    for name, values in errors.items():
        print(f"| {name} | {statistics.median(values):.1e} | {max(values):.1e} |")


def switch(folder: Path) -> None:
    """Milliseconds from a recipe to a live model that follows it, for routes never seen, and for the same depth again."""
    if not folder.exists():
        workloads.make(folder, "0.5")
    names = [str(folder / name) for name in ("a", "b")]
    layers = workloads.SHAPES["0.5"].layers
    live, fold, rng = RoutedModel(names), fold_of(Checkpoint(names[0]).config), np.random.default_rng(0)
    for name in names:  # the sources are read from disk once
        live.load(route_recipe([Step(name, layer) for layer in range(layers)], None))
    taken: dict[str, list[float]] = {
        f"{what}, {depth}": [] for what in ("no scales", "scales") for depth in ("a depth seen before", "another")
    }
    depths = {layers}
    for number in range(6 * TIMED):
        route = random_route(names, layers, rng)
        route = route if number % 3 else route[:layers]
        if number % 2:
            route = [Step(step.model, step.layer) for step in route]
        recipe, seen = route_recipe(route, fold), "a depth seen before" if len(route) in depths else "another"
        since = time.perf_counter()
        live.load(recipe)
        taken[f"{'no scales' if number % 2 else 'scales'}, {seen}"].append(1000 * (time.perf_counter() - since))
        depths.add(len(route))
        if number % TIMED == 0:  # forget the shells, so that depths are new again
            live._shells.clear()
            depths = {len(route)}
    print("| a change of route, 24 layers, 0.5 B | median, ms | worst, ms |\n|---|---:|---:|")
    for name, values in taken.items():
        print(f"| {name} ({len(values)}) | {statistics.median(values):.0f} | {max(values):.0f} |")


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    commands.add_parser("exactness")
    commands.add_parser("switch").add_argument("folder", type=Path)
    arguments = parser.parse_args()
    if arguments.what == "exactness":
        exactness()
    else:
        switch(arguments.folder)


if __name__ == "__main__":
    main()
