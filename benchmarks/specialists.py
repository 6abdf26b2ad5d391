"""The README's table: sources, untuned merges and searches on the specialists, on held-out items.

    python benchmarks/specialists.py run --seeds 0 1 2 3 4     # over an hour on one core; seeds can run side by side
    python benchmarks/specialists.py table                     # prints the table from benchmarks/results/

Every search has the same budget, the same space and the same known starts (which are counted). Search scores choose
the front and the knee; what the table shows is measured on held-out items afterwards. The hypervolume is that of the
chosen front's held-out scores, above the worst source per objective less a tenth of the range. Two picks of each front:
its knee, and the one with the best mean of the search scores.
"""

import argparse
import json
import statistics
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from paretomerge.config.build import load_study, make_sampler
from seeds import spread

from paretomerge.evaluate.evaluator import Score
from paretomerge.pareto.front import hypervolume, nondominated, reference_point
from paretomerge.pareto.ranking import knee
from paretomerge.recipe import Recipe
from paretomerge.study.study import Study

HERE = Path(__file__).resolve().parent
STUDY = HERE.parent / "examples" / "specialists" / "study.yaml"
RESULTS = HERE / "results" / "specialists"
SEARCHES = {
    "random search": "random",
    "NSGA-II": "nsga2",
    "CMA-ES on the mean": "cma",
    "kinship": "kinship",
    "Optuna's GP": "gp",
    "MM-MO (ours)": "mmmo",
}
"""What the table calls a search -> the preset, set up as `sampler: NAME` in the study.yaml sets it up."""
TRIALS = 60


def untuned(study: Study) -> dict[str, Recipe]:
    """Recipes that need no search, at the defaults of their papers."""
    base, sources = study.space.base, study.space.sources

    def recipe(
        method: str, each: dict[str, Any], models: dict[str, str] = sources, **options: Any
    ) -> Recipe:
        listed = [{"model": path, "parameters": dict(each)} for path in models.values()]
        needed = {} if method == "linear" else {"base_model": base}
        return Recipe.from_dict(
            {"merge_method": method, **needed, "models": listed, "parameters": options}
        )

    recipes = {
        name: recipe("linear", {"weight": float(1)}, {name: path}) for name, path in sources.items()
    }
    recipes["uniform soup"] = recipe("linear", {"weight": 1.0})
    recipes["task arithmetic, 0.4"] = recipe("task_arithmetic", {"weight": 0.4})
    recipes["TIES, top 20 %, lambda 1"] = recipe("ties", {"weight": 1.0, "density": 0.2})
    recipes["DARE-TIES, drop 90 %, 0.4"] = recipe(
        "dare_ties", {"weight": 0.4, "density": 0.1}, rescale="inverse_density"
    )
    names = list(sources)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        listed = [{"model": sources[names[a]]}, {"model": sources[names[b]]}]
        recipes[f"SLERP {names[a]} + {names[b]}, 0.5"] = Recipe.from_dict(
            {
                "merge_method": "slerp",
                "base_model": sources[names[a]],
                "models": listed,
                "parameters": {"t": 0.5},
            }
        )
    recipes["Model Stock"] = recipe("model_stock", {})
    return recipes


class Scorer:
    """Scores of recipes, each measured once per split."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self.known: dict[tuple[str, str], dict[str, Score]] = {}

    def __call__(self, recipe: Recipe, kind: str) -> dict[str, Score]:
        """kind: `search`, `held_out` (objectives), `watched` (held-out)."""
        recipe = replace(recipe, dtype=self.study.dtype)
        if (recipe.key, kind) not in self.known:
            live = self.study.live(recipe)
            evaluator = self.study.watched if kind == "watched" else self.study.evaluator
            assert evaluator is not None
            self.known[recipe.key, kind] = dict(
                evaluator.evaluate(live, "search" if kind == "search" else "held_out")
            )
        return self.known[recipe.key, kind]


def search(
    name: str, seed: int, study: Study, config: Any, score: Scorer, trials: int
) -> dict[str, Any]:
    """One search from its starts to the held-out scores of its front and its knee."""
    names = [o.name for o in study.objectives]
    chosen = make_sampler(
        config.model_copy(update={"seed": seed, "sampler": SEARCHES[name], "trials": trials}),
        study.space,
    )
    optimiser = optuna.create_study(directions=["maximize"] * len(names), sampler=chosen)
    for params in study.space.starts().values():
        optimiser.enqueue_trial(params)
    recipes, values = [], []
    for _ in range(trials):
        trial = optimiser.ask(study.space.distributions)
        recipes.append(study.space.recipe(trial.params))
        scores = score(recipes[-1], "search")
        values.append([scores[n].value for n in names])
        trial.set_user_attr("stderr", [scores[n].stderr for n in names])
        optimiser.tell(trial, values[-1])
    front = np.flatnonzero(nondominated(values))
    held_out = [[score(recipes[i], "held_out")[n].value for n in names] for i in front]
    at_knee = recipes[front[knee(np.asarray(values)[front])]]
    best_mean = recipes[int(np.argmax(np.mean(values, axis=1)))]
    return {
        "front": held_out,
        "knee": _plain(score(at_knee, "held_out") | score(at_knee, "watched")),
        "best mean": _plain(score(best_mean, "held_out") | score(best_mean, "watched")),
        "knee on search items": _plain(score(at_knee, "search")),
    }


def _plain(scores: dict[str, Score]) -> dict[str, float]:
    return {name: score.value for name, score in scores.items()}


def run(seeds: list[int], searches: list[str], trials: int) -> None:
    """Write `results/specialists/untuned.json` and one file per seed."""
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    study, config = load_study(STUDY)
    score = Scorer(study)
    RESULTS.mkdir(parents=True, exist_ok=True)
    plain = {
        name: _plain(score(r, "held_out") | score(r, "watched"))
        for name, r in untuned(study).items()
    }
    (RESULTS / "untuned.json").write_text(json.dumps(plain, indent=1) + "\n")
    for seed in seeds:
        path = RESULTS / f"seed-{seed}.json"
        found = json.loads(path.read_text()) if path.exists() else {}
        for name in searches:
            found[name] = search(name, seed, study, config, score, trials)
            print(f"seed {seed}  {name}: knee {found[name]['knee']}", flush=True)
            path.write_text(json.dumps(found, indent=1) + "\n")


def table() -> None:
    """Print the README's table."""
    study, config = load_study(STUDY)
    names = [o.name for o in study.objectives]
    columns = names + list(config.watch)
    plain = json.loads((RESULTS / "untuned.json").read_text())
    seeds = [json.loads(p.read_text()) for p in sorted(RESULTS.glob("seed-*.json"))]
    sources = [[plain[s][n] for n in names] for s in study.space.sources]
    reference = reference_point(sources)
    scale = hypervolume([[1.0] * len(names)], reference)
    print(
        f"| | {' | '.join(names)} | mean | mean of the best mean | hypervolume | {' | '.join(config.watch)} |"
    )
    print("|---|" + "---:|" * (len(columns) + 3))
    for name, scores in plain.items():
        mean = statistics.mean(scores[n] for n in names)
        volume = hypervolume([[scores[n] for n in names]], reference) / scale
        print(
            _row(
                name,
                [f"{scores[n]:.3f}" for n in names],
                f"{mean:.3f}",
                "",
                f"{volume:.3f}",
                [f"{scores[w]:.3f}" for w in config.watch],
            )
        )
    for name in SEARCHES:
        found = [seed[name] for seed in seeds if name in seed]
        if len(found) < len(seeds):
            continue  # not measured, or not on every seed
        cell = {c: spread([f["knee"][c] for f in found]) for c in columns}
        means, best = (
            [statistics.mean(f[pick][n] for n in names) for f in found]
            for pick in ("knee", "best mean")
        )
        volumes = spread([hypervolume(f["front"], reference) / scale for f in found])
        print(
            _row(
                f"{name}, knee",
                [cell[n] for n in names],
                spread(means),
                spread(best),
                volumes,
                [cell[w] for w in config.watch],
            )
        )


def _row(
    name: str, objectives: list[str], mean: str, best: str, volume: str, watched: list[str]
) -> str:
    return f"| {' | '.join([name, *objectives, mean, best, volume, *watched])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument(
        "--searches",
        nargs="+",
        choices=SEARCHES,
        default=list(SEARCHES),
        help="others keep their results",
    )
    parser.add_argument("--trials", type=int, default=TRIALS)
    arguments = parser.parse_args()
    if arguments.what == "run":
        run(arguments.seeds, arguments.searches, arguments.trials)
    else:
        table()


if __name__ == "__main__":
    main()
