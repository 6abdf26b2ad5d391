"""docs/systems.md: every system on the same models, tasks and held-out examples.

    python -m benchmarks.systems run specialists          # a quarter of an hour on one core
    python -m benchmarks.systems run smollm               # an hour; needs `make smollm`
    python -m benchmarks.systems table

A system is made from a base and three fine-tunes, and scored on each one's task. Calibration texts
and prompts are search examples. `cost` is the time to make the system, as a multiple of the time
of the uniform average that the same run wrote to disk; evaluations on search examples are counted
apart. `size` is what must be stored, in checkpoints of the base's size; where a system needs the
base besides, that is counted. Systems with a random part are made with five seeds on the
specialists, and with one on SmolLM2.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.family import same_for_all
from benchmarks.reporting import (
    RESULTS,
    Entry,
    append_entry,
    documented_parser,
    markdown_table,
    mean_and_deviation,
    read_entries,
)
from benchmarks.smollm import EXAMPLE, OVERRIDES
from benchmarks.study_api import RecipeScorer
from paretomerge.calibration import calibrate, learn_weights
from paretomerge.examples import SPECIALISTS
from paretomerge.merging.engine import merge
from paretomerge.merging.statistics import StatisticKind
from paretomerge.recipe import Recipe
from paretomerge.record.trial import Trial
from paretomerge.study.calibration import task_examples
from paretomerge.study.study import load_study
from paretomerge.suggest import suggest
from paretomerge.systems.emr import emr
from paretomerge.systems.expand import expand
from paretomerge.systems.lora import extract_lora
from paretomerge.systems.moe import write_moe
from paretomerge.systems.pareto_merging import TrainingSettings, pareto_merge
from paretomerge.systems.twin import build_twin, study_prompts

FILE = RESULTS / "systems.jsonl"
UNIFORM = "uniform average"


@dataclass(frozen=True)
class Family:
    """Models of one base, and the task of each.

    Attributes:
        study: Their study.yaml.
        overrides: Keys of it that are set here.
        tasks: Source -> its task.
        texts: Search examples of each task that calibration reads.
        seeds: Seeds of systems with a random part.
        trials: Evaluations of a search.
    """

    study: Path
    overrides: tuple[str, ...]
    tasks: Mapping[str, str]
    texts: int
    seeds: tuple[int, ...]
    trials: int

    @cached_property
    def scorer(self) -> RecipeScorer:
        """What scores recipes and checkpoints."""
        return RecipeScorer(self.study, self.overrides)


FAMILIES = {
    "specialists": Family(
        study=SPECIALISTS / "study.yaml",
        overrides=("watch=[]",),
        tasks={"order": "sort", "mirror": "reverse", "scribe": "translate"},
        texts=256,
        seeds=(0, 1, 2, 3, 4),
        trials=60,
    ),
    "smollm": Family(
        study=EXAMPLE / "study.yaml",
        overrides=(*OVERRIDES, "watch=[]", "evaluate.held_out_items=100"),
        tasks={
            "arithmetic": "smollm_arithmetic",
            "french": "smollm_french",
            "extraction": "smollm_extraction",
        },
        texts=40,  # all that the study searches on
        seeds=(0,),
        trials=40,
    ),
}


@dataclass
class Workshop:
    """Where systems of one family are made.

    Attributes:
        family: The models.
        folder: An empty folder.
        unit: Seconds of the uniform average.
    """

    family: Family
    folder: Path
    unit: float = 0.0
    _used: int = field(default=0, repr=False)

    @property
    def scorer(self) -> RecipeScorer:
        """What scores recipes and checkpoints."""
        return self.family.scorer

    def new_folder(self) -> Path:
        """The path of a folder that does not exist yet."""
        self._used += 1
        return self.folder / str(self._used)

    def recipe(self, method: str, each: Mapping[str, Any], **options: Any) -> Recipe:
        """A recipe with the same parameters for all sources."""
        return same_for_all(self.scorer, method, each, **options)

    def prompts(self) -> dict[str, list[str]]:
        """Source -> prompts of its task's search examples."""
        tasks = {source: [task] for source, task in self.family.tasks.items()}
        return {
            source: list(prompts)
            for source, prompts in study_prompts(self.scorer.study, tasks).items()
        }


@dataclass(frozen=True)
class Made:
    """A system that was made.

    Attributes:
        seconds: Seconds that it took, without evaluations.
        n_bytes: Size of its files.
        scores: Task -> held-out score.
        evaluations: Merges that were scored on search examples.
        detail: What was chosen, in a word.
    """

    seconds: float
    n_bytes: int
    scores: Mapping[str, float]
    evaluations: int = 0
    detail: str = ""


@dataclass(frozen=True)
class System:
    """A row of the table.

    Attributes:
        name: Its name.
        page: The page that explains it.
        needs: What it needs beside the models; `{texts}` stands for the family's number.
        gives: What a user gets.
        make: Makes it, for a seed.
        is_random: Whether it depends on the seed.
    """

    name: str
    page: str
    needs: str
    gives: str
    make: Callable[[Workshop, int], Made]
    is_random: bool = False


def size_of(folder: Path) -> int:
    """Bytes of the weights in a folder."""
    files = folder.rglob("*.safetensors")
    return sum(file.stat().st_size for file in files)


def merged(
    workshop: Workshop, recipe: Recipe, evaluations: int = 0, detail: str = ""
) -> Made:
    """Write a recipe's merge, and score it."""
    out = workshop.new_folder()
    start = time.perf_counter()
    merge(recipe, out)
    seconds = time.perf_counter() - start
    scores = workshop.scorer.held_out_objectives(recipe)
    return Made(seconds, size_of(out), scores, evaluations, detail)


def best_expert(workshop: Workshop, seed: int) -> Made:
    """The source with the best mean on search examples."""
    scorer = workshop.scorer
    means = {}
    for source, path in scorer.sources.items():
        recipe = Recipe.from_dict(
            {"merge_method": "passthrough", "models": [{"model": path}]}
        )
        search = scorer(recipe, "search")
        means[source] = mean(score.value for score in search.values())
    best = max(means, key=means.__getitem__)
    chosen = {
        "merge_method": "passthrough",
        "models": [{"model": scorer.sources[best]}],
    }
    return merged(workshop, Recipe.from_dict(chosen), len(means), best)


def of_method(
    method: str, each: Mapping[str, Any], **options: Any
) -> Callable[[Workshop, int], Made]:
    """Makes a merge with the same parameters for all sources."""

    def make(workshop: Workshop, seed: int) -> Made:
        return merged(workshop, workshop.recipe(method, each, **options))

    return make


def suggested(workshop: Workshop, seed: int) -> Made:
    """The first recipe of `suggest`, from the weights alone."""
    scorer = workshop.scorer
    start = time.perf_counter()
    suggestion = suggest(scorer.base, scorer.sources)
    seconds = time.perf_counter() - start
    first = suggestion.recipes[0]
    made = merged(workshop, first.recipe, detail=first.method)
    return Made(seconds + made.seconds, made.n_bytes, made.scores, 0, made.detail)


def masks(workshop: Workshop, seed: int) -> Made:
    """EMR-Merging: each task with its own expansion."""
    scorer = workshop.scorer
    out = workshop.new_folder()
    start = time.perf_counter()
    emr(scorer.base, scorer.sources, out)
    seconds = time.perf_counter() - start
    scores = {}
    for source, task in workshop.family.tasks.items():
        expanded = expand(out, source, workshop.new_folder())
        scores[task] = scorer.checkpoint(str(expanded))[task]
    base_bytes = size_of(Path(scorer.base))
    return Made(seconds, size_of(out) + base_bytes, scores)


def mixture_of_experts(workshop: Workshop, seed: int) -> Made:
    """A mixture of experts with a router made of search prompts."""
    scorer = workshop.scorer
    prompts = workshop.prompts()
    experts = []
    for source, path in scorer.sources.items():
        positive = prompts[source][:_ROUTER_PROMPTS]
        experts.append({"source_model": path, "positive_prompts": positive})
    base = workshop.new_folder()
    out = workshop.new_folder()
    start = time.perf_counter()
    # The experts' MLPs get the attention of the base: that of their average suits them best.
    merge(workshop.recipe("linear", {"weight": 1.0}), base)
    config = {"base_model": str(base), "gate_mode": "hidden", "experts": experts}
    write_moe(config, out)
    seconds = time.perf_counter() - start
    return Made(seconds, size_of(out), scorer.checkpoint(str(out)))


def adapter(workshop: Workshop, seed: int) -> Made:
    """The suggested merge as an adapter of the base, at 90 % of the energy."""
    scorer = workshop.scorer
    first = suggest(scorer.base, scorer.sources).recipes[0]
    whole = workshop.new_folder()
    merge(first.recipe, whole)
    out = workshop.new_folder()
    start = time.perf_counter()
    extract_lora(whole, scorer.base, out, energy=0.9, drop_others=True)
    seconds = time.perf_counter() - start
    scores = scorer.checkpoint(f"{scorer.base}+{out}")
    return Made(seconds, size_of(out), scores, 0, first.method)


def twin(workshop: Workshop, seed: int) -> Made:
    """Twin-Merging, its router trained on search prompts."""
    scorer = workshop.scorer
    out = workshop.new_folder()
    prompts = workshop.prompts()
    start = time.perf_counter()
    build_twin(scorer.base, scorer.sources, prompts, out, seed=seed)
    seconds = time.perf_counter() - start
    return Made(seconds, size_of(out), scorer.checkpoint(str(out)))


def texts(workshop: Workshop) -> dict[str, Any]:
    """Model -> its task's search examples, prompts with answers."""
    of_model = {}
    for source, path in workshop.scorer.sources.items():
        task = workshop.family.tasks[source]
        examples = task_examples(workshop.scorer.study.settings, task)
        of_model[path] = examples[: workshop.family.texts]
        assert len(of_model[path]) == workshop.family.texts
    return of_model


def calibrated(
    method: str, kind: StatisticKind, **options: Any
) -> Callable[[Workshop, int], Made]:
    """Makes a merge that needs statistics."""

    def make(workshop: Workshop, seed: int) -> Made:
        scorer = workshop.scorer
        out = workshop.new_folder()
        examples = texts(workshop)
        models = list(scorer.sources.values())
        start = time.perf_counter()
        calibrate(scorer.base, models, examples, out, kinds=(kind,))
        seconds = time.perf_counter() - start
        plain = workshop.recipe(method, {"weight": 1.0}, **options)
        recipe = Recipe.from_dict(plain.to_dict() | {"calibration": str(out)})
        made = merged(workshop, recipe)
        return Made(seconds + made.seconds, made.n_bytes, made.scores)

    return make


def learned(workshop: Workshop, seed: int) -> Made:
    """AdaMerging's weights for language models: one per source and layer group, by gradient."""
    scorer = workshop.scorer
    examples = texts(workshop)
    start = time.perf_counter()
    found = learn_weights(scorer.base, list(scorer.sources.values()), examples)
    seconds = time.perf_counter() - start
    made = merged(workshop, found.recipe)
    return Made(seconds + made.seconds, made.n_bytes, made.scores)


def pareto_family(workshop: Workshop, seed: int) -> Made:
    """Pareto Merging in closed form, asked for equal weights."""
    scorer = workshop.scorer
    out = workshop.new_folder()
    start = time.perf_counter()
    # 0.4 K times the mean of the deltas: task arithmetic at 0.4, as above.
    family = pareto_merge(scorer.base, scorer.sources, out, rank=16, scale=0.4)
    seconds = time.perf_counter() - start
    merge_folder = family.write("mean", workshop.new_folder())
    return Made(seconds, size_of(out), scorer.checkpoint(str(merge_folder)))


def trained_family(workshop: Workshop, seed: int) -> Made:
    """Pareto Merging, trained on search prompts, asked for equal weights."""
    scorer = workshop.scorer
    files = {}
    for source, prompts in workshop.prompts().items():
        file = workshop.new_folder().with_suffix(".jsonl")
        lines = [json.dumps({"prompt": prompt}) for prompt in prompts]
        file.write_text("\n".join(lines))
        files[source] = file
    out = workshop.new_folder()
    training = TrainingSettings(seed=seed)
    start = time.perf_counter()
    family = pareto_merge(
        scorer.base, scorer.sources, out, rank=16, data=files, training=training
    )
    seconds = time.perf_counter() - start
    merge_folder = family.write("mean", workshop.new_folder())
    return Made(seconds, size_of(out), scorer.checkpoint(str(merge_folder)))


def regmean_search(workshop: Workshop, seed: int) -> Made:
    """A search over weights and alpha of RegMean; the trial with the best mean search score."""
    scorer = workshop.scorer
    family = workshop.family
    data = []
    for source, path in scorer.sources.items():
        data.append(f"{path}: {{task: {family.tasks[source]}}}")
    overrides = (
        *family.overrides,
        "space={methods: [regmean]}",
        f"calibration={{data: {{{', '.join(data)}}}}}",
        f"out={workshop.new_folder()}",
        f"trials={family.trials}",
        f"seed={seed}",
    )
    with load_study(family.study, overrides) as study:
        start = time.perf_counter()
        study.optimize(held_out=False, show_progress_bar=False)
        trials = [trial for trial in study.get_trials() if not trial.failure]
        evaluating = sum(trial.seconds.get("evaluate", 0.0) for trial in trials)
        seconds = time.perf_counter() - start - evaluating
        best = max(trials, key=mean_of_search_scores)
        recipe = best.recipe
    content = recipe.to_dict()
    # Written in the dtype of the base, as all others, and not in that of the study.
    content.pop("dtype", None)
    made = merged(workshop, Recipe.from_dict(content))
    return Made(seconds + made.seconds, made.n_bytes, made.scores, len(trials))


def mean_of_search_scores(trial: Trial) -> float:
    """The mean of a trial's scores."""
    return mean(score.value for score in trial.scores.values())


_ROUTER_PROMPTS = 20

SYSTEMS = (
    System("best model alone", "search.md", "examples", "one model", best_expert),
    System(
        UNIFORM,
        "methods.md",
        "nothing",
        "one model",
        of_method("linear", {"weight": 1.0}),
    ),
    System(
        "task arithmetic, 0.4",
        "methods.md",
        "nothing",
        "one model",
        of_method("task_arithmetic", {"weight": 0.4}),
    ),
    System(
        "TIES, top 20 %",
        "methods.md",
        "nothing",
        "one model",
        of_method("ties", {"weight": 1.0, "density": 0.2}),
    ),
    System("TSV", "methods.md", "nothing", "one model", of_method("tsv", {})),
    System("first suggestion", "suggest.md", "nothing", "one model", suggested),
    System(
        "its adapter, 90 % of the energy", "lora.md", "nothing", "an adapter", adapter
    ),
    System(
        "RegMean",
        "data-informed.md",
        "{texts} answered examples of each task",
        "one model",
        calibrated("regmean", "regmean", alpha=0.9),
    ),
    System(
        "RegMean++",
        "data-informed.md",
        "{texts} answered examples of each task",
        "one model",
        calibrated("regmean_pp", "regmean_pp", alpha=0.9),
    ),
    System(
        "Fisher merging",
        "data-informed.md",
        "{texts} answered examples of each task, gradients",
        "one model",
        calibrated("fisher", "fisher"),
    ),
    System(
        "learned weights",
        "data-informed.md",
        "128 answered examples of each task, a quarter to stop by; gradients",
        "one model",
        learned,
    ),
    System(
        "Pareto Merging, rank 16, equal weights",
        "pareto-merging.md",
        "nothing",
        "a model for any preference",
        pareto_family,
    ),
    System(
        "Pareto Merging, trained, equal weights",
        "pareto-merging.md",
        "prompts of each task, gradients",
        "a model for any preference",
        trained_family,
        is_random=True,
    ),
    System(
        "search over RegMean",
        "data-informed.md",
        "{texts} answered examples of each task",
        "one model",
        regmean_search,
        is_random=True,
    ),
    System(
        "EMR-Merging",
        "emr.md",
        "the task of each input, at inference",
        "a model per task",
        masks,
    ),
    System(
        "Twin-Merging",
        "twin.md",
        "prompts of each task",
        "one model that routes prompts",
        twin,
        is_random=True,
    ),
    System(
        "mixture of experts",
        "moe.md",
        "some prompts of each task",
        "one model that routes tokens",
        mixture_of_experts,
    ),
)


@dataclass(frozen=True)
class StoredSearch:
    """A search that another script has run.

    Attributes:
        name: Its name there.
        page: The page of the docs.
        file: The result file.
        evaluations: How many merges it scored.
        needs: What it needs, as of a `System`.
    """

    name: str
    page: str
    file: str
    evaluations: int
    needs: str = "search examples"


STORED = {
    "specialists": (
        StoredSearch("MM-MO (ours)", "search.md", "specialists.jsonl", 60),
        StoredSearch("Evolver, dominance", "lineages.md", "lineages.jsonl", 60),
        StoredSearch("Model Kinship, dominance", "lineages.md", "lineages.jsonl", 60),
    ),
    "smollm": (
        StoredSearch("MM-MO (ours)", "search.md", "smollm.jsonl", 40),
        StoredSearch(
            "MM-MO over RegMean",
            "data-informed.md",
            "smollm.jsonl",
            40,
            "{texts} answered examples of each task",
        ),
    ),
}


def run(name: str, chosen: Sequence[str]) -> None:
    """Make and score the systems that the result file lacks."""
    family = FAMILIES[name]
    known = set()
    for line in read_entries(FILE):
        if line["family"] == name:
            known.add((line["system"], line["seed"]))
    with TemporaryDirectory(prefix="systems-") as folder:
        workshop = Workshop(family, Path(folder))
        uniform = workshop.recipe("linear", {"weight": 1.0})
        # Once without a clock: the first merge reads the files from the disk.
        merged(workshop, uniform)
        workshop.unit = merged(workshop, uniform).seconds
        base_bytes = size_of(Path(workshop.scorer.base))
        for system in SYSTEMS:
            if chosen and system.name not in chosen:
                continue
            for seed in family.seeds if system.is_random else family.seeds[:1]:
                if (system.name, seed) in known:
                    continue
                made = system.make(workshop, seed)
                entry: Entry = {
                    "family": name,
                    "system": system.name,
                    "seed": seed,
                    "cost": made.seconds / workshop.unit,
                    "size": made.n_bytes / base_bytes,
                    "evaluations": made.evaluations,
                    "detail": made.detail,
                    "scores": dict(made.scores),
                }
                append_entry(FILE, entry)
                print(f"{name} {system.name} {seed}: {made.scores}", flush=True)


def table() -> str:
    """A table for each family, a row for each system."""
    parts = []
    for name, family in FAMILIES.items():
        entries = [e for e in read_entries(FILE) if e["family"] == name]
        rows = []
        for system in SYSTEMS:
            own = [e for e in entries if e["system"] == system.name]
            if own:
                rows.append(row(system, own, family))
        rows += search_rows(name, family)
        if rows:
            header = ["system", "needs", "gives", "cost", "evaluations", "size"]
            columns = [*header, *family.tasks.values(), "mean"]
            parts.append(markdown_table(columns, rows, text_columns=3))
    return "\n\n".join(parts)


def search_rows(name: str, family: Family) -> list[list[str]]:
    """Searches that other scripts have run: the trial with the best mean search score."""
    rows = []
    for search in STORED[name]:
        entries = []
        for entry in read_entries(RESULTS / search.file):
            if entry["search"] == search.name:
                entries.append(entry["best mean"])
        if not entries:
            continue
        title = f"[{search.name}, best mean]({search.page})"
        needs = search.needs.format(texts=family.texts)
        cells = [title, needs, "a front of models", ""]
        cells += [f"{search.evaluations}", "1.00"]
        for task in family.tasks.values():
            cells.append(mean_and_deviation([entry[task] for entry in entries]))
        means = []
        for entry in entries:
            means.append(mean(entry[task] for task in family.tasks.values()))
        rows.append([*cells, mean_and_deviation(means)])
    return rows


def row(system: System, entries: Sequence[Entry], family: Family) -> list[str]:
    """One system over its seeds."""
    title = f"[{system.name}]({system.page})"
    details = {entry["detail"] for entry in entries if entry["detail"]}
    if details:
        title += f": {', '.join(sorted(details))}"
    cost = mean(float(entry["cost"]) for entry in entries)
    size = mean(float(entry["size"]) for entry in entries)
    evaluations = mean(entry["evaluations"] for entry in entries)
    needs = system.needs.format(texts=family.texts)
    cells = [title, needs, system.gives]
    cells += [f"{cost:.1f}", f"{evaluations:.0f}", f"{size:.2f}"]
    means = []
    for entry in entries:
        means.append(mean(entry["scores"][task] for task in family.tasks.values()))
    for task in family.tasks.values():
        cells.append(mean_and_deviation([entry["scores"][task] for entry in entries]))
    return [*cells, mean_and_deviation(means)]


def main() -> None:
    """Make systems, or print the tables."""
    parser = documented_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run")
    runner.add_argument("families", nargs="+", choices=list(FAMILIES))
    runner.add_argument("--systems", nargs="+", default=[])
    commands.add_parser("table")
    arguments = parser.parse_args()
    if arguments.command == "table":
        print(table())
        return
    for name in arguments.families:
        run(name, arguments.systems)


if __name__ == "__main__":
    main()
