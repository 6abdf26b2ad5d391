"""docs/lab/pareto-merging.md: families of Pareto Merging beside the plain line and a study.

    python -m benchmarks.pareto_families run FOLDER     # half an hour on one core
    python -m benchmarks.pareto_families table
    python -m benchmarks.pareto_families plot           # writes docs/lab/pareto-merging.svg

Eighteen preferences over the three specialists: the points of the simplex lattice with fifths, but
for the corners. Every system answers each of them with one model, whose scores are held-out ones:

- the plain line theta_0 + lambda K sum_k gamma_k tau_k;
- the closed form at three ranks, around the base and around the mean;
- trained factors; they learn from the prompts of the search split, without the answers;
- a study of 60 evaluations on the search split, asked for each preference without a new evaluation:
  by what is believed of its trials (`decide`), and by the best weighted search score.

lambda is the one of four with the best search scores of the plain line, at the corners, between two
of them, and at equal shares. Nothing looks at a held-out score before the table.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.family import hypervolume_share
from benchmarks.reporting import (
    REPOSITORY,
    RESULTS,
    Entry,
    append_entry,
    documented_parser,
    markdown_table,
    read_entries,
)
from benchmarks.study_api import RecipeScorer, open_fresh, plain_scores, score_held_out
from paretomerge.decide.belief import Belief
from paretomerge.decide.decision import decide
from paretomerge.decide.pick import Choice
from paretomerge.examples import SPECIALISTS
from paretomerge.pareto.front import nondominated, reference_point
from paretomerge.recipe import Recipe
from paretomerge.systems.pareto_merging import (
    LiveFamily,
    ParetoFamily,
    TrainingSettings,
    pareto_merge,
)
from paretomerge.types import Array

FILE = RESULTS / "pareto_families.jsonl"
PLOT = REPOSITORY / "docs" / "lab" / "pareto-merging.svg"
STUDY = SPECIALISTS / "study.yaml"
TASKS = ("sort", "reverse", "translate")
SOURCES = ("order", "mirror", "scribe")
K = len(SOURCES)
SCALES = (0.3, 1 / 3, 0.4, 0.5)
N_TUNED = len(SCALES) * (2 * K + 1)  # evaluations for the choice of lambda
RANKS = (8, 16, 32)
TRAINED_RANK = 16
TRIALS = 60
LINE, DECIDE, WEIGHTED = "plain line", "study, decide", "study, weighted score"

Scores = list[float]
Gamma = Sequence[float]


def closed(rank: int, centre: str) -> str:
    """Name of a closed form."""
    return f"closed form, rank {rank}, around the {centre}"


def trained(rank: int, centre: str) -> str:
    """Name of a trained family."""
    return f"trained, rank {rank}, around the {centre}"


def lattice(parts: int = 5) -> list[tuple[float, ...]]:
    """The points of the simplex over three sources with whole parts, but for the corners."""
    points = []
    for first in range(parts + 1):
        for second in range(parts + 1 - first):
            shares = (first, second, parts - first - second)
            if max(shares) < parts:
                points.append(tuple(share / parts for share in shares))
    return points


# ----- measuring


def run(folder: Path) -> None:
    """Measure what is not in the result file."""
    scorer = RecipeScorer(STUDY)
    finished = {entry["name"]: entry for entry in read_entries(FILE)}

    def measure(name: str, work: Callable[[], Entry]) -> Entry:
        if name not in finished:
            entry = {"name": name} | work()
            append_entry(FILE, entry)
            finished[name] = entry
            print(name, entry, flush=True)
        return finished[name]

    for source in SOURCES:
        measure(source, partial(one_source, scorer, source))
    chosen = measure("lambda", partial(tuned_scale, scorer))
    scale = float(chosen["lambda"])
    measure(LINE, partial(plain_line, scorer, scale))
    for centre in ("base", "mean"):
        for rank in RANKS:
            work = partial(family, scorer, folder, scale, rank, centre, None)
            measure(closed(rank, centre), work)
        settings = TrainingSettings()
        work = partial(family, scorer, folder, scale, TRAINED_RANK, centre, settings)
        measure(trained(TRAINED_RANK, centre), work)
    if not {DECIDE, WEIGHTED} <= finished.keys():
        for name, entry in study(folder).items():
            measure(name, partial(dict, entry))


def one_source(scorer: RecipeScorer, source: str) -> Entry:
    """Held-out scores of a source; seconds of an evaluation on the search split."""
    recipe = line_recipe(scorer, [float(name == source) for name in SOURCES], 1 / K)
    scorer(line_recipe(scorer, [1 / K] * K, 0.2), "search")  # loads models and tasks
    start = time.perf_counter()
    scorer(recipe, "search")
    seconds = time.perf_counter() - start
    return {
        "points": [ordered(scorer.held_out_objectives(recipe))],
        "evaluation_seconds": seconds,
    }


def tuned_scale(scorer: RecipeScorer) -> Entry:
    """The lambda with the best weighted search scores of the plain line."""
    means = []
    for scale in SCALES:
        values = []
        for gamma in tuning_gammas():
            scores = plain_scores(scorer(line_recipe(scorer, gamma, scale), "search"))
            values.append(float(np.dot(gamma, ordered(scores))))
        means.append(statistics.mean(values))
    best = int(np.argmax(means))
    return {"lambda": SCALES[best], "search_scores": means}


def tuning_gammas() -> list[list[float]]:
    """Corners, midpoints of two corners, and equal shares."""
    corners = np.eye(K)
    midpoints = (1 - corners) / (K - 1)
    return [*corners.tolist(), *midpoints.tolist(), [1 / K] * K]


def line_recipe(scorer: RecipeScorer, gamma: Gamma, scale: float) -> Recipe:
    """theta_0 + lambda K sum_k gamma_k tau_k as task arithmetic."""
    models = []
    for source, share in zip(SOURCES, gamma, strict=True):
        weight = scale * K * share
        models.append(
            {"model": scorer.sources[source], "parameters": {"weight": weight}}
        )
    content = {"merge_method": "task_arithmetic", "base_model": scorer.base}
    return Recipe.from_dict({**content, "models": models})


def plain_line(scorer: RecipeScorer, scale: float) -> Entry:
    """The plain line at every preference."""
    points = []
    for gamma in lattice():
        recipe = line_recipe(scorer, gamma, scale)
        points.append(ordered(scorer.held_out_objectives(recipe)))
    return {"points": points, "evaluations": N_TUNED, "seconds": 0.0}


def family(
    scorer: RecipeScorer,
    folder: Path,
    scale: float,
    rank: int,
    centre: str,
    training: TrainingSettings | None,
) -> Entry:
    """A family at every preference; one live model takes on all of them."""
    data = None
    if training is not None:
        data = {}
        for source, task in zip(SOURCES, TASKS, strict=True):
            data[source] = SPECIALISTS / "tasks" / "data" / task / "search.jsonl"
    kind = "closed" if training is None else "trained"
    start = time.perf_counter()
    made = pareto_merge(
        scorer.base,
        dict(scorer.sources),
        folder / f"{kind}-{centre}-{rank}",
        rank=rank,
        scale=scale,
        centre=centre,
        dtype="float32",
        data=data,
        training=training,
        overwrite=True,
    )
    seconds = time.perf_counter() - start
    manifest = made.manifest
    return {
        "points": answers(made, scorer),
        "evaluations": N_TUNED,
        "seconds": seconds,
        "base_bytes": manifest.base_bytes,
        "factor_bytes": manifest.factor_bytes,
        "kept": manifest.kept_in_all,
        "training": manifest.training,
    }


def answers(made: ParetoFamily, scorer: RecipeScorer) -> list[Scores]:
    """Held-out scores of a family at every preference."""
    live = LiveFamily(made)
    points = []
    for gamma in lattice():
        model = live.load(dict(zip(SOURCES, gamma, strict=True)))
        scores = scorer.score_model(model, live.tokenizer, "held_out")
        points.append(ordered(scores))
    return points


def study(folder: Path) -> dict[str, Entry]:
    """A search, and its trials for every preference, chosen by `decide` and by search scores."""
    search = open_fresh(STUDY, folder / "study", [f"trials={TRIALS}"])
    search.run()
    results = search.results()
    seconds = sum(sum(trial.seconds.values()) for trial in results.trials)
    belief = Belief.of(results)
    trials = [trial for trial in search.trials() if trial.feasible]
    picked: dict[str, list[int]] = {DECIDE: [], WEIGHTED: []}
    for gamma in lattice():
        weights = dict(zip(TASKS, gamma, strict=True))
        preference = Choice(prefer=weights).preference(results)
        decision = decide(results, preference, belief)
        picked[DECIDE].append(decision.trial.number)
        values = []
        for trial in trials:
            values.append(np.dot(gamma, ordered(plain_scores(trial.scores))))
        picked[WEIGHTED].append(trials[int(np.argmax(values))].number)
    wanted = {*picked[DECIDE], *picked[WEIGHTED]}
    held_out = score_held_out(search, [t for t in trials if t.number in wanted])
    entries = {}
    for name, numbers in picked.items():
        points = [ordered(held_out[number]) for number in numbers]
        entries[name] = {"points": points, "evaluations": TRIALS, "seconds": seconds}
    return entries


def ordered(scores: "dict[str, float]") -> Scores:
    """Scores in the order of the tasks, which is that of the sources."""
    return [scores[task] for task in TASKS]


# ----- the tables


def systems() -> list[str]:
    """Rows of the table."""
    names = [LINE]
    for centre in ("base", "mean"):
        names += [closed(rank, centre) for rank in RANKS]
        names.append(trained(TRAINED_RANK, centre))
    return [*names, DECIDE, WEIGHTED]


def table() -> str:
    """Quality of the answers and what they cost."""
    entries = {entry["name"]: entry for entry in read_entries(FILE)}
    sources = np.asarray([entries[source]["points"][0] for source in SOURCES])
    seconds = [entries[source]["evaluation_seconds"] for source in SOURCES]
    one_evaluation = statistics.median(seconds)
    rows = []
    for name in systems():
        if name in entries:
            quality = quality_cells(np.asarray(entries[name]["points"]), sources)
            rows.append([name, *quality, *cost_cells(entries[name], one_evaluation)])
    header = [
        "",
        "weighted score",
        "best mean",
        "Tchebycheff regret",
        "hypervolume",
        "points on the front",
        "spacing",
        "evaluations",
        "time, in evaluations",
        "MB",
        "energy kept",
    ]
    return markdown_table(header, rows)


def quality_cells(points: Array, sources: Array) -> list[str]:
    """What the answers are worth.

    points: (n, 3), the held-out scores at the lattice's preferences.
    sources: (3, 3), those of the sources.
    """
    gammas = np.asarray(lattice())
    weighted = (gammas * points).sum(1)
    extent = sources.max(0) - sources.min(0)
    # From the best source of each task, as a share of the sources' range.
    shortfall = np.maximum(sources.max(0) - points, 0) / extent
    regret = (gammas * shortfall).max(1)
    front = np.unique(points[nondominated(points)], axis=0)
    volume = hypervolume_share(points.tolist(), reference_point(sources))
    best_mean = points.mean(1).max()
    cells = [f"{weighted.mean():.3f}", f"{best_mean:.3f}"]
    cells += [f"{regret.mean():.3f}", f"{volume:.3f}"]
    return [*cells, str(len(front)), f"{spacing(front):.3f}"]


def spacing(front: Array) -> float:
    """Standard deviation of the distances to the nearest neighbour (Schott 1995), in scores."""
    if len(front) < 3:
        return float("nan")
    distances = np.abs(front[:, None] - front[None]).sum(2)
    np.fill_diagonal(distances, np.inf)
    return float(np.std(distances.min(1), ddof=1))


def cost_cells(entry: Entry, one_evaluation: float) -> list[str]:
    """What a system costs before it can answer."""
    ratio = entry["seconds"] / one_evaluation
    size, kept = "", ""
    if "factor_bytes" in entry:
        size = f"{(entry['base_bytes'] + entry['factor_bytes']) / 1e6:.2f}"
        kept = f"{100 * entry['kept']:.1f} %" if entry["training"] is None else ""
    return [str(entry["evaluations"]), f"{ratio:.1f}", size, kept]


# ----- the plot

_COLOURS = {
    LINE: "#d97706",
    closed(TRAINED_RANK, "base"): "#94a3b8",
    closed(TRAINED_RANK, "mean"): "#0d9488",
    trained(TRAINED_RANK, "mean"): "#2563eb",
    DECIDE: "#dc2626",
}
_PANEL, _GAP, _TOP = 260, 70, 40
_PAIRS = ((0, 1), (0, 2), (1, 2))
_INK = "#1f2937"


def plot() -> str:
    """The held-out scores of each pair of tasks, as an SVG image."""
    entries = {entry["name"]: entry for entry in read_entries(FILE)}
    shown = {name: entries[name]["points"] for name in _COLOURS if name in entries}
    everything = [point for points in shown.values() for point in points]
    everything += [entries[source]["points"][0] for source in SOURCES]
    low = np.floor(10 * np.min(everything, axis=0)) / 10
    parts: list[str] = []
    for column, (x, y) in enumerate(_PAIRS):
        left = _GAP + column * (_PANEL + _GAP)
        panel = _Panel(left, _TOP, (float(low[x]), float(low[y])))
        parts += panel.frame(TASKS[x], TASKS[y])
        for name, points in shown.items():
            for point in points:
                parts.append(panel.dot(point[x], point[y], _COLOURS[name]))
        for source in SOURCES:
            point = entries[source]["points"][0]
            parts.append(panel.cross(point[x], point[y]))
    legend_y = _TOP + _PANEL + 60
    for row, (name, colour) in enumerate(_COLOURS.items()):
        column, line = divmod(row, 2)
        parts.append(_legend(_GAP + 330 * column, legend_y + 20 * line, name, colour))
    parts.append(_text(_GAP + 668, legend_y + 24, "+ the sources", "start"))
    width = _GAP + 3 * (_PANEL + _GAP)
    height = legend_y + 40
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">'
    )
    title = "One model for each of 18 preferences: held-out scores"
    background = f'<rect width="{width}" height="{height}" fill="white"/>'
    heading = _text(_GAP, 24, title, "start")
    return "\n".join([head, background, heading, *parts, "</svg>", ""])


class _Panel:
    """One pair of tasks, from `low` to 1 on both axes."""

    def __init__(self, left: float, top: float, low: tuple[float, float]) -> None:
        self._left, self._top, self._low = left, top, low

    def _place(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self._low[0]) / (1 - self._low[0])
        up = (y - self._low[1]) / (1 - self._low[1])
        return self._left + _PANEL * across, self._top + _PANEL * (1 - up)

    def frame(self, x_title: str, y_title: str) -> Iterable[str]:
        """The axes, their ticks and titles."""
        left, bottom = self._left, self._top + _PANEL
        yield (
            f'<rect x="{left}" y="{self._top}" width="{_PANEL}" height="{_PANEL}" '
            'fill="none" stroke="#cbd5e1"/>'
        )
        middle = left + _PANEL / 2
        yield _text(middle, bottom + 36, x_title)
        yield _text(left - 40, self._top + _PANEL / 2, y_title, turned=True)
        for share in (0.0, 0.5, 1.0):
            x = self._low[0] + share * (1 - self._low[0])
            y = self._low[1] + share * (1 - self._low[1])
            yield _text(self._place(x, 1)[0], bottom + 18, f"{x:.2f}")
            yield _text(left - 6, self._place(1, y)[1] + 4, f"{y:.2f}", "end")

    def dot(self, x: float, y: float, colour: str) -> str:
        """A model."""
        across, down = self._place(x, y)
        return f'<circle cx="{across:.1f}" cy="{down:.1f}" r="3.5" fill="{colour}" opacity="0.8"/>'

    def cross(self, x: float, y: float) -> str:
        """A source."""
        across, down = self._place(x, y)
        path = f"M{across - 5:.1f} {down:.1f}h10M{across:.1f} {down - 5:.1f}v10"
        return f'<path d="{path}" stroke="{_INK}" stroke-width="2"/>'


def _text(
    x: float, y: float, text: str, anchor: str = "middle", turned: bool = False
) -> str:
    turn = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turned else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{_INK}"{turn}>{text}</text>'


def _legend(x: float, y: float, name: str, colour: str) -> str:
    dot = f'<circle cx="{x}" cy="{y}" r="4" fill="{colour}"/>'
    return dot + _text(x + 10, y + 4, name, "start")


def main() -> None:
    """Measure, print the table, or write the plot."""
    parser = documented_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("run").add_argument("folder", type=Path)
    commands.add_parser("table")
    commands.add_parser("plot")
    arguments = parser.parse_args()
    if arguments.command == "run":
        run(arguments.folder)
    elif arguments.command == "table":
        print(table())
    else:
        PLOT.write_text(plot())


if __name__ == "__main__":
    main()
