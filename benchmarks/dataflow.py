"""What routes through layers are worth: parameters alone, routes alone, both, on specialists of eight layers, at equal budgets.

    python examples/specialists/train.py --out FOLDER/models --layers 8 --drop 0.1 --base-steps 650     # some ten minutes
    python benchmarks/dataflow.py run FOLDER --seeds 0 1 2 3 4            # 1 to 4 minutes a search on one core
    python benchmarks/dataflow.py table                                   # from results/dataflow/

A search is a study.yaml in FOLDER and goes on where it was interrupted. All have 60 evaluations, their known starts included,
but for those that say 120; item outcomes are kept in one file.
Search scores (300 items a task) choose each front; the hypervolume is that of its held-out scores (600 other items), above the
worst source per objective less a tenth of the range, as a share of what perfect scores would have.
"""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from seeds import arguments, spread

from paretomerge.config.build import load_study
from paretomerge.pareto.front import hypervolume, nondominated, reference_point
from paretomerge.record.record import Trial
from paretomerge.study.study import Study

ROOT = Path(__file__).resolve().parent.parent
TASKS = ROOT / "examples" / "specialists" / "tasks"
RESULTS = ROOT / "benchmarks" / "results" / "dataflow"
SKILLS = ("sort", "reverse", "translate")
LAYERS = 8
BUDGET, FIRST, LARGER = 60, 40, 120
PARAMETERS = {"methods": ["task_arithmetic", "ties", "dare_ties"], "weight": {"bounds": [0, 1.5]}}
EDITS: dict[str, Any] = {"routes": {"blocks": LAYERS}}
INDICATORS: dict[str, Any] = {"routes": {"blocks": LAYERS, "form": "indicators"}}
SIZE = {"size": "layers"}


def two_levels(
    sampler: str, first: int = FIRST, budget: int = BUDGET, **routes: Any
) -> dict[str, Any]:
    then = {"routes": EDITS["routes"] | routes, "trials": budget - first, "sampler": sampler}
    return {"space": PARAMETERS, "trials": first, "then": then}


SEARCHES: dict[str, dict[str, Any]] = {
    "parameters alone, MM-MO": {"space": PARAMETERS},
    "hierarchy, MM-MO": two_levels("mmmo"),
    "hierarchy 50 + 10 without scales, MM-MO": two_levels("mmmo", 50, scale=False, most=1),
    "hierarchy 55 + 5 without scales, MM-MO": two_levels("mmmo", 55, scale=False, most=1),
    "parameters alone, 120, MM-MO": {"space": PARAMETERS, "trials": LARGER},
    "hierarchy 100 + 20 without scales, MM-MO": two_levels(
        "mmmo", 100, LARGER, scale=False, most=1
    ),
    "routes alone, random edits": {"space": EDITS, "sampler": "random"},
    "routes alone, MM-MO": {"space": EDITS},
    "routes alone, policy": {"space": EDITS, "sampler": "policy"},
    "routes alone, CMA-ES": {"space": EDITS, "sampler": "cma"},
    "routes alone, NSGA-II": {"space": EDITS, "sampler": "nsga2"},
    "indicators, CMA-ES": {"space": INDICATORS, "sampler": "cma"},
    "indicators, NSGA-II": {"space": INDICATORS, "sampler": "nsga2"},
    "indicators, policy": {"space": INDICATORS, "sampler": "policy"},
    "hierarchy with size, MM-MO": two_levels("mmmo", BUDGET // 2) | {"objectives": [SIZE]},
    "hierarchy with size, policy": two_levels("policy", BUDGET // 2) | {"objectives": [SIZE]},
}
"""What the table calls a search -> what its study.yaml has beside the common part. Layers are an objective of the last two alone."""


def study_of(folder: Path, name: str, seed: int) -> tuple[Study, Any]:
    """The study of one search, in a folder of its own."""
    here = folder / "studies" / f"{name.replace(' ', '-').replace(',', '')}-{seed}"
    here.mkdir(parents=True, exist_ok=True)
    models = [str((folder / "models" / model).resolve()) for model in ("order", "mirror", "scribe")]
    common = {
        "base": str((folder / "models" / "base").resolve()),
        "models": models,
        "evaluate": {
            "include_path": str(TASKS),
            "data_root": str(ROOT),
            "splits": {"search": "search", "held_out": "held_out"},
            "search_items": 300,
            "batch_size": 128,
            "cache": str((folder / "items.db").resolve()),
        },
        "trials": BUDGET,
        "seed": seed,
        "dtype": "float32",
    }
    more = SEARCHES[name]
    objectives = [{"task": skill} for skill in SKILLS] + more.get("objectives", [])
    (here / "study.yaml").write_text(yaml.safe_dump(common | more | {"objectives": objectives}))
    return load_study(here / "study.yaml")


def measured(study: Study, limit: Any) -> dict[str, Any]:
    """Run a search and score on held-out items what the table needs: its front, its known starts, the best of each depth."""
    study.run(limit)
    done = [t for t in study.trials if t.feasible]
    starts, shortest = [t for t in done if t.is_start], best_by_depth(study, done)
    study.hold_out([*study.front(), *starts, *shortest])
    numbers = {
        name: {t.number for t in some}
        for name, some in (("front", study.front()), ("starts", starts), ("depths", shortest))
    }
    by_number = {t.number: t for t in study.trials}
    found = {
        name: [told(study, by_number[n]) for n in sorted(some)] for name, some in numbers.items()
    }
    return found | {
        "failed": sum(bool(t.failure) for t in study.trials),
        "second": sum(t.level for t in study.trials),
    }


def told(study: Study, trial: Trial) -> dict[str, Any]:
    held_out = trial.held_out or {}
    return {
        "label": trial.label,
        "layers": depth(study, trial),
        "level": trial.level,
        "search": [trial.scores[s].value for s in SKILLS],
        "held_out": [held_out[s].value for s in SKILLS],
    }


def best_by_depth(study: Study, trials: Sequence[Trial]) -> list[Trial]:
    """The trials that no other beats in the mean of the search scores with as many layers or fewer."""
    pairs = [(-depth(study, t), statistics.mean(t.scores[s].value for s in SKILLS)) for t in trials]
    return [t for t, on in zip(trials, nondominated(pairs), strict=True) if on]


def depth(study: Study, trial: Trial) -> int:
    """Layers of a trial's merge: those of its slices, or of the base where it is merged in place."""
    ranges = [piece.sources[0].layer_range for piece in study.recipe(trial).slices]
    return sum(r[1] - r[0] for r in ranges if r) or LAYERS


def run(folder: Path, seeds: Sequence[int], searches: Sequence[str]) -> None:
    """Write `results/dataflow/seed-N.json`."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        path = RESULTS / f"seed-{seed}.json"
        for name in searches:
            found = json.loads(path.read_text()) if path.exists() else {}
            if name not in found:
                study, config = study_of(folder, name, seed)
                found[name] = measured(study, config.limit)
                path.write_text(json.dumps(found, indent=1) + "\n")
                print(f"seed {seed}  {name}: {len(found[name]['front'])} on the front", flush=True)


def table() -> None:
    """Print the tables of docs/routes.md."""
    seeds = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("seed-*.json"))]
    plain = next(s["parameters alone, MM-MO"] for s in seeds)["starts"]
    sources = [t for t in plain if t["label"] in ("order", "mirror", "scribe")]
    reference = reference_point([t["held_out"] for t in sources])
    scale = hypervolume([[1.0] * len(SKILLS)], reference)

    def volume(trials: Sequence[dict[str, Any]]) -> float:
        return hypervolume([t["held_out"] for t in trials], reference) / scale

    print(
        "| search | seeds | hypervolume | best mean | layers at 95 % of it |\n|---|---:|---:|---:|---:|"
    )
    print(row("the sources", [volume(sources)], [best(sources)], []))
    print(row("untuned merges (known starts)", [volume(plain)], [best(plain)], []))
    stacks = next(
        (
            s["routes alone, random edits"]["starts"]
            for s in seeds
            if "routes alone, random edits" in s
        ),
        [],
    )
    print(row("static stacking (known starts)", [volume(stacks)], [best(stacks)], []))
    for name in SEARCHES:
        found = [s[name] for s in seeds if name in s]
        if found:
            means = [best([*f["front"], *f["depths"]]) for f in found]
            short = [fewest(f["depths"], 0.95 * m) for f, m in zip(found, means, strict=True)]
            print(row(name, [volume(f["front"]) for f in found], means, short))
    print(
        "\n| best held-out mean with at most so many layers | "
        + " | ".join(map(str, range(4, 10)))
        + " |\n|---|"
        + "---:|" * 6
    )
    for name in SEARCHES:
        found = [s[name] for s in seeds if name in s]
        if found:
            cells = [
                [best([t for t in f["depths"] if t["layers"] <= n]) for f in found]
                for n in range(4, 10)
            ]
            print(f"| {name} | " + " | ".join(f"{statistics.mean(c):.3f}" for c in cells) + " |")


def best(trials: Sequence[dict[str, Any]]) -> float:
    """The held-out mean of whoever has the best mean of the search scores; 0 where there is nobody."""
    if not trials:
        return 0.0
    return float(np.mean(max(trials, key=lambda t: float(np.mean(t["search"])))["held_out"]))


def fewest(trials: Sequence[dict[str, Any]], least: float) -> float:
    """Layers of the shortest whose held-out mean reaches `least`."""
    return min(
        (t["layers"] for t in trials if np.mean(t["held_out"]) >= least), default=float("nan")
    )


def row(name: str, volumes: Sequence[float], means: Sequence[float], short: Sequence[float]) -> str:
    return f"| {name} | {len(volumes)} | {spread(volumes)} | {spread(means)} | {spread(short, 1) if short else ''} |"


def main() -> None:
    given = arguments(__doc__, "searches", SEARCHES)
    if given.what == "run":
        run(given.folder, given.seeds, given.chosen)
    else:
        table()


if __name__ == "__main__":
    main()
