"""What racing saves on the specialists: `python benchmarks/racing.py run FOLDER --seeds 0 1 2 3 4`, then `table`.

The shipped study, 60 trials, with every search item, with half or a quarter of them, and with `evaluate.race`, for its three tasks and
for the first two; item outcomes are kept in one file. Items asked are those of all trials, known starts included;
the hypervolume is that of the front's scores on held-out items, above the worst source per objective less a tenth of the range, as a
share of what perfect scores would have.
"""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from paretomerge.config.build import load_study
from seeds import arguments, spread

from paretomerge.pareto.front import hypervolume, reference_point
from paretomerge.pareto.ranking import knee

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "examples" / "specialists"
RESULTS = ROOT / "benchmarks" / "results" / "racing"
HALF, RACE = {"search_items": 300}, {"race": True}
KINDS: dict[str, tuple[int, dict[str, Any]]] = {
    "every item": (3, {}),
    "half the items": (3, HALF),
    "a quarter of the items": (3, {"search_items": 150}),
    "race": (3, RACE),
    "race over half the items": (3, HALF | RACE),
    "two objectives, every item": (2, {}),
    "two objectives, race": (2, RACE),
}
"""What the table calls a search -> how many of the three tasks it has, and what its `evaluate` has more."""
WHOLE = {objectives: kind for kind, (objectives, more) in KINDS.items() if not more}


def run(folder: Path, seeds: Sequence[int], kinds: Sequence[str]) -> None:
    """Write `results/racing/seed-N.json`."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        path = RESULTS / f"seed-{seed}.json"
        for kind in kinds:
            found = json.loads(path.read_text()) if path.exists() else {}
            if kind not in found:
                found[kind] = measured(folder, seed, kind)
                path.write_text(json.dumps(found, indent=1) + "\n")
                print(
                    f"seed {seed}  {kind}: {found[kind]['items']} items, {len(found[kind]['front'])} on the front",
                    flush=True,
                )


def measured(folder: Path, seed: int, kind: str) -> dict[str, Any]:
    """One search, and its front on held-out items."""
    here = folder / f"{kind.replace(' ', '-').replace(',', '')}-{seed}"
    here.mkdir(parents=True, exist_ok=True)
    settings = yaml.safe_load((SHIPPED / "study.yaml").read_text())
    settings |= {
        "base": str(SHIPPED / settings["base"]),
        "models": [str(SHIPPED / model) for model in settings["models"]],
    }
    settings["evaluate"] |= {
        "include_path": str(SHIPPED / "tasks"),
        "data_root": str(ROOT),
        "cache": str(folder / "items.db"),
    }
    objectives, more = KINDS[kind]
    settings |= {
        "seed": seed,
        "watch": [],
        "evaluate": settings["evaluate"] | more,
        "objectives": settings["objectives"][:objectives],
    }
    (here / "study.yaml").write_text(yaml.safe_dump(settings))
    study, config = load_study(here / "study.yaml")
    study.run(config.limit)
    front = study.front()
    study.hold_out([*front, *study.trials[: len(study.space.sources)]])
    names, trials = [o.name for o in study.objectives], study.trials
    held_out = {t.number: [t.held_out[name].value for name in names] for t in trials if t.held_out}
    at_knee = front[knee([t.values(study.objectives) for t in front])]
    return {
        "items": sum(
            t.scores[name].n
            for t in trials
            if not t.failure and t.same_as is None
            for name in names
        ),
        "left": sum(not t.final for t in trials),
        "front": [held_out[t.number] for t in front],
        "knee": held_out[at_knee.number],
        "sources": [held_out[n] for n in range(len(study.space.sources))],
    }


def table() -> None:
    """Print the table of docs/evaluation.md."""
    seeds = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("seed-*.json"))]
    print(
        "| | seeds | items asked | trials left early | held-out hypervolume | knee's held-out mean |\n|---|---:|---:|---:|---:|---:|"
    )
    for kind in KINDS:
        whole = WHOLE[KINDS[kind][0]]
        pairs = [(s[kind], s[whole]) for s in seeds if kind in s and whole in s]
        if not pairs:
            continue
        reference = reference_point(pairs[0][1]["sources"])
        scale = hypervolume([[1.0] * len(reference)], reference)
        volumes = [hypervolume(f["front"], reference) / scale for f, _ in pairs]
        share = statistics.mean(f["items"] / w["items"] for f, w in pairs)
        left = statistics.mean(f["left"] for f, _ in pairs)
        knees = [statistics.mean(f["knee"]) for f, _ in pairs]
        print(
            f"| {kind} | {len(pairs)} | {share:.0%} | {left:.0f} | {spread(volumes)} | {spread(knees)} |"
        )


def main() -> None:
    given = arguments(__doc__, "kinds", KINDS)
    if given.what == "run":
        run(given.folder, given.seeds, given.chosen)
    else:
        table()


if __name__ == "__main__":
    main()
