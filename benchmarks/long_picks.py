"""docs/lab/long-studies.md: what a pick loses where hyperparameters are fitted to few trials.

    python -m benchmarks.long_picks run      # ten minutes on one core
    python -m benchmarks.long_picks table

NSGA-II makes 600 noisy evaluations of the merge landscape, whose true scores are known. A belief is
formed as `pick` forms it, from hyperparameters that were fitted to 200 trials, and from those of a
fit to all. The regret is what the best trial for a preference is truly better than the picked one,
in hundredths of the range of the true front; the mean of ten preferences.
"""

import statistics
import time
from collections.abc import Sequence
from unittest import mock

import numpy as np
import optuna
import torch
from optuna.study import StudyDirection

from benchmarks.picks import wanted
from benchmarks.reporting import (
    RESULTS,
    Entry,
    append_entry,
    documented_parser,
    markdown_table,
    mean_and_deviation,
    read_entries,
)
from paretomerge.decide import belief
from paretomerge.decide.belief import Belief
from paretomerge.decide.decision import decide
from paretomerge.evaluate.evaluator import Objective, Score
from paretomerge.pareto.front import nondominated
from paretomerge.pareto.preference import Preference, Scale
from paretomerge.problems import MergeLandscape
from paretomerge.record.results import Parameters, Results
from paretomerge.record.trial import Trial
from paretomerge.types import Array

FILE = RESULTS / "long_picks.jsonl"
N_TRIALS = 600
N_EXAMPLES = 200
SEEDS = range(4)
LIMITS = {"200 trials": 200, "all trials": N_TRIALS}


def searched(seed: int) -> tuple[Results, Array]:
    """The trials of a search, and their true scores `(n, m)`."""
    landscape = MergeLandscape.load()
    sampler = optuna.samplers.NSGAIISampler(seed=seed)
    directions = [StudyDirection.MAXIMIZE] * len(landscape.tasks)
    study = optuna.create_study(directions=directions, sampler=sampler)
    trials = []
    for number in range(N_TRIALS):
        asked = study.ask(dict(landscape.space))
        rng = np.random.default_rng([seed, number])
        values, stderr = landscape.evaluate(asked.params, N_EXAMPLES, rng)
        study.tell(asked, values.tolist())
        scores = {}
        for k, name in enumerate(landscape.tasks):
            scores[name] = Score(values[k], stderr[k], N_EXAMPLES)
        trials.append(Trial(number, asked.params, scores))
    results = Results(
        objectives=tuple(Objective(name) for name in landscape.tasks),
        sources=(),
        trials=tuple(trials),
        parameters={0: Parameters(landscape.space, landscape.conditions)},
    )
    return results, landscape.scores([trial.params for trial in trials])


def regret(results: Results, truth: Array, formed: Belief) -> float:
    """The mean regret of the picks of ten preferences, in hundredths."""
    names = [objective.name for objective in results.objectives]
    scale = Scale.of(truth[nondominated(truth)])
    losses = []
    for prefer in wanted(names):
        preference = Preference.parse(prefer, names)
        values = preference.values(truth, scale)
        picked = decide(results, preference, formed).trial.number
        losses.append(float(values.max() - values[picked]))
    return 100 * statistics.mean(losses)


def regret_of_scores(results: Results, truth: Array) -> float:
    """The same, for the trial with the best search scores."""
    names = [objective.name for objective in results.objectives]
    y = np.array([trial.values(results.objectives) for trial in results.trials])
    scales = [Scale.of(scores[nondominated(scores)]) for scores in (y, truth)]
    losses = []
    for prefer in wanted(names):
        preference = Preference.parse(prefer, names)
        picked = int(preference.values(y, scales[0]).argmax())
        values = preference.values(truth, scales[1])
        losses.append(float(values.max() - values[picked]))
    return 100 * statistics.mean(losses)


def run() -> None:
    """Measure every seed."""
    for seed in SEEDS:
        results, truth = searched(seed)
        entry: Entry = {"seed": seed, "scores": regret_of_scores(results, truth)}
        for name, limit in LIMITS.items():
            with mock.patch.object(belief, "_MOST_FITTED", limit):
                begun = time.process_time()
                formed = Belief.of(results)
                entry[f"{name}, seconds"] = time.process_time() - begun
            entry[name] = regret(results, truth, formed)
        append_entry(FILE, entry)
        print(entry)


def table(entries: Sequence[Entry]) -> str:
    """The published table."""
    header = ["hyperparameters fitted to", "regret of the pick, points", "CPU seconds"]
    scores = [entry["scores"] for entry in entries]
    rows = [["(best search scores)", mean_and_deviation(scores, 2), ""]]
    for name in LIMITS:
        regrets = [entry[name] for entry in entries]
        seconds = statistics.mean(entry[f"{name}, seconds"] for entry in entries)
        rows.append([name, mean_and_deviation(regrets, 2), f"{seconds:.1f}"])
    return markdown_table(header, rows)


def main() -> None:
    """Read the arguments."""
    parser = documented_parser(__doc__)
    parser.add_argument("what", choices=("run", "table"))
    if parser.parse_args().what == "table":
        print(table(read_entries(FILE)))
        return
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    run()


if __name__ == "__main__":
    main()
