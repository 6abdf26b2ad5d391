"""Do the points exist that the surrogate calls best? A dozen of its front, really merged and scored."""

import json
from pathlib import Path

import numpy as np

from paretomerge.pareto.ranking import knee

from .bench import Bench, check_made
from .design import SPREAD
from .landscape import Landscape
from .nsga2 import thinned

RESULT = Path(__file__).resolve().parents[1] / "results" / "landscape" / "verify.json"


def verify(landscape: Landscape, count: int = 12, file: Path = RESULT) -> None:
    """Merge and score the knee, the best mean, the best of each task and points far from these; print and write the result."""
    bench = Bench()
    check_made(landscape.merges, bench, SPREAD)
    front = landscape.front
    predicted = landscape.scores(front)
    first = [knee(predicted), int(predicted.mean(1).argmax())]
    chosen = list(dict.fromkeys([*first, *thinned(predicted, count).tolist()]))[:count]
    points = []
    print(
        f"| method | {' | '.join(f'{t} predicted | measured' for t in landscape.tasks)} |\n|---|{'---:|' * (2 * len(landscape.tasks))}"
    )
    for i in chosen:
        measured = bench.measure(front[i]).mean(1)
        points.append(
            {
                "params": front[i],
                "predicted": predicted[i].round(5).tolist(),
                "measured": measured.round(5).tolist(),
            }
        )
        cells = (f"{p:.3f} | {m:.3f}" for p, m in zip(predicted[i], measured, strict=True))
        print(f"| {front[i]['method']} | {' | '.join(cells)} |", flush=True)
    error = np.array([np.subtract(p["predicted"], p["measured"]) for p in points])
    floor = np.sqrt((predicted[chosen] * (1 - predicted[chosen]) / landscape.merges.items).mean(0))
    summary = {
        "tasks": landscape.tasks,
        "merges": len(landscape.merges),
        "items": landscape.merges.items,
        "bias": error.mean(0).round(5).tolist(),
        "rmse": np.sqrt((error**2).mean(0)).round(5).tolist(),
        "binomial standard error": floor.round(5).tolist(),
    }
    print("\n".join(f"{name}: {value}" for name, value in summary.items()))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(summary | {"points": points}, indent=1) + "\n")
