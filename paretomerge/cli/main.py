"""The command line: reads arguments, calls one function, prints. `paretomerge --help`."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from paretomerge.cli import session as terminal
from paretomerge.errors import ConfigError, ParetoMergeError

app = typer.Typer(
    help="Merge fine-tunes of one base model, search for the best merges, and pick from the Pareto front.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
StudyFile = Annotated[Path, typer.Argument(help="study.yaml", show_default=False)]
RecipeFile = Annotated[Path, typer.Argument(help="Recipe in mergekit's YAML.", show_default=False)]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress, only the result.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")]
Prefer = Annotated[str | None, typer.Option(help="Weights of the objectives: sort=0.7,reverse=0.3")]
Knee = Annotated[
    bool, typer.Option("--knee", help="The point nearest to the ideal one (the default).")
]
Number = Annotated[int | None, typer.Option("--trial", help="The number of one trial.")]


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Options before the command hold for every command."""


@app.command()
def quickstart(quiet: Quiet = False) -> None:
    """Search over merges of the shipped specialists: the main job in a few minutes on a laptop. Run again to resume."""
    study_file = terminal.shipped()
    study, config = terminal.open_study(study_file)
    terminal.search(study, config.limit, quiet)
    from paretomerge.decide.pick import Choice, write_pick
    from paretomerge.report.html import write_report

    choice = Choice()
    trial = terminal.show(study, most=15)
    picked = write_pick(study, trial, study.folder / "picked", choice, overwrite=True)
    write_report(study, study.folder / "report.html", choice)
    shown = terminal.short(study_file)
    terminal.console().print(
        f"\nThe picked merge is an ordinary checkpoint: {terminal.short(picked)}\n"
        f"The report: {terminal.short(study.folder / 'report.html')}\n\n"
        f"Next:  paretomerge pick {shown} --prefer translate=0.7,reverse=0.3 --out my-merge\n"
        f"       paretomerge evaluate my-merge --study {shown}",
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def search(
    study_yaml: StudyFile,
    trials: Annotated[int | None, typer.Option(help="Instead of the file's.", min=1)] = None,
    quiet: Quiet = False,
) -> None:
    """Search until the study's budget is spent, then score the front on held-out items. Resumes by itself."""
    study, config = terminal.open_study(study_yaml)
    terminal.search(study, replace(config.limit, trials=trials) if trials else config.limit, quiet)
    terminal.show(study, most=15)


@app.command()
def status(study_yaml: StudyFile) -> None:
    """How far a study is."""
    study, config = terminal.open_study(study_yaml)
    from paretomerge.cli.progress import tally, volume_text
    from paretomerge.study.budget import evaluated

    done = study.trials
    told = f"{evaluated(done)} of {config.limit.trials} trials, {tally(done)}, {len(study.front())} on the front, "
    lines = [f"{told}hypervolume {volume_text(study.hypervolume(done))}"]
    lines += [f"latest failure: trial {t.number}: {t.failure}" for t in done if t.failure][-1:]
    lines += [f"latest infeasible: trial {t.number}: {t.broken}" for t in done if t.broken][-1:]
    lines += [study.ended] if study.ended else []
    for line in lines:
        terminal.console().print(line, highlight=False, soft_wrap=True)


@app.command()
def front(
    study_yaml: StudyFile,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """The Pareto front: scores on the search items and on held-out ones."""
    study, _ = terminal.open_study(study_yaml)
    if not as_json:
        terminal.show(study)
        return
    from paretomerge.report.tables import rows

    print(
        json.dumps(
            {"objectives": [o.name for o in study.objectives], "front": rows(study.front())},
            indent=2,
        )
    )


@app.command()
def pick(
    study_yaml: StudyFile,
    out: Annotated[
        Path, typer.Option("--out", help="A new folder for the checkpoint.", show_default=False)
    ],
    prefer: Prefer = None,
    knee: Knee = False,
    trial: Number = None,
    overwrite: Overwrite = False,
) -> None:
    """Write one merge of the front as a Hugging Face checkpoint."""
    study, _ = terminal.open_study(study_yaml)
    from paretomerge.decide.pick import Choice, check_out, choose, write_pick
    from paretomerge.report.tables import terminal_table

    choice = Choice.parse(prefer, trial, knee)
    chosen = choose(study, choice)
    check_out(out, overwrite)
    study.hold_out([chosen], watched=True)
    chosen = next(t for t in study.trials if t.number == chosen.number)
    write_pick(study, chosen, out, choice, overwrite)
    terminal.console().print(
        terminal_table(study, [chosen], f"{choice.text} → {out}", chosen.number)
    )


@app.command()
def merge(
    recipe: RecipeFile,
    out: Path,
    overwrite: Overwrite = False,
    threads: Annotated[
        int | None,
        typer.Option(
            help="Tensors merged at a time. Default: 2, or fewer by OMP_NUM_THREADS.", min=1
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N")] = "cpu",
    shard_size: Annotated[str, typer.Option(help="Largest file: 5GB, 500MB, ...")] = "5GB",
    allow_nan: Annotated[
        bool, typer.Option("--allow-nan", help="Merge NaN and infinite weights like others.")
    ] = False,
) -> None:
    """Merge one recipe to disk."""
    from paretomerge.merging.plan.make import make_plan
    from paretomerge.recipe import Recipe

    shard_bytes = terminal.bytes_of(shard_size)
    plan = make_plan(Recipe.load(recipe), allow_nan=allow_nan)
    terminal.note(plan.notes)
    from paretomerge.merging.engine import write

    write(plan, out, overwrite=overwrite, shard_bytes=shard_bytes, threads=threads, device=device)
    terminal.console().print(f"wrote {terminal.short(out)}", highlight=False, soft_wrap=True)


@app.command()
def plan(
    recipe: RecipeFile,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Check a recipe from headers alone: every error at once, or what will be read, written and needed."""
    from dataclasses import asdict

    from paretomerge.merging.plan.cost import cost
    from paretomerge.merging.plan.make import make_plan
    from paretomerge.recipe import Recipe

    made = make_plan(Recipe.load(recipe), download=False)
    terminal.note(made.notes)
    told = {
        "method": made.recipe.merge_method,
        "models": list(made.recipe.files),
        "layers": len(made.route),
        "tensors": len(made.jobs),
        "dtype": made.dtype,
        **asdict(cost(made)),
    }
    if as_json:
        print(json.dumps(told, indent=2))
        return
    from paretomerge.report.recipes import plan_table

    terminal.console().print(plan_table(told))


@app.command()
def methods(as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False) -> None:
    """The table of merge methods: what each does, its parameters and their defaults."""
    from paretomerge.report.recipes import method_rows, methods_table

    if as_json:
        print(json.dumps(method_rows(), indent=2))
        return
    terminal.console().print(methods_table())


@app.command()
def kinship(
    models: Annotated[
        list[str], typer.Argument(help="BASE MODEL..., or a study.yaml.", show_default=False)
    ],
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """How alike fine-tunes are, and which layers they moved: one reading of each checkpoint."""
    from paretomerge.merging.delta_profile import profile
    from paretomerge.merging.plan.make import open_weights
    from paretomerge.report.delta_profile import kinship_rows, kinship_tables
    from paretomerge.space.sources import named_sources

    base, sources = models[0], named_sources(models[1:])
    if len(models) == 1 and Path(base).suffix in (".yaml", ".yml"):
        from paretomerge.config.build import study_models
        from paretomerge.config.schema import load_config

        base, sources = study_models(load_config(base), Path(base).resolve().parent)
    if not sources:
        raise ConfigError(
            "kinship: expected a base and at least one model, or a study.yaml; got one name"
        )
    opened = open_weights((base, *sources.values()))
    found, architecture = profile(base, sources, opened), opened[base].architecture
    if as_json:
        print(json.dumps(kinship_rows(found, architecture), indent=2))
        return
    terminal.console().print(kinship_tables(found, architecture), highlight=False)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="A checkpoint.")],
    study: Annotated[Path, typer.Option("--study", help="The study.yaml whose tasks to run.")],
    split: Annotated[str, typer.Option(help="search or held_out")] = "held_out",
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Score a checkpoint with a study's tasks: what the study recorded, reproduced from disk."""
    opened, _ = terminal.open_study(study)
    from paretomerge.decide.rescore import score_checkpoint

    scores = score_checkpoint(opened, model, terminal.split_of(split))
    if as_json:
        told = {
            name: {"value": s.value, "stderr": s.stderr, "n": s.n, "items": s.example_scores}
            for name, s in scores.items()
        }
        print(json.dumps(told))
        return
    for name, score in scores.items():
        terminal.console().print(
            f"{name:24s} {score.value:.4f} ± {score.stderr:.4f}  n = {score.n}", highlight=False
        )


@app.command()
def compare(
    one: Annotated[
        str,
        typer.Argument(
            help="A trial's number, a known start's name, or a checkpoint.", show_default=False
        ),
    ],
    other: Annotated[str, typer.Argument(help="Likewise.", show_default=False)],
    study: Annotated[Path, typer.Option("--study", help="The study.yaml whose tasks to run.")],
    task: Annotated[
        list[str], typer.Option("--task", help="A score's name; may be given again. Default: all.")
    ] = [],  # noqa: B006
    split: Annotated[str, typer.Option(help="search or held_out")] = "held_out",
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Two models on the same items: the paired difference, its 95 % interval, and McNemar's test."""
    opened, _ = terminal.open_study(study)
    from dataclasses import asdict

    from paretomerge.decide.compare import compare as compared
    from paretomerge.report.tables import comparison_table

    found = compared(opened, one, other, task, terminal.split_of(split))
    if as_json:
        print(json.dumps([asdict(c) | {"difference": c.difference} for c in found], indent=2))
        return
    terminal.console().print(comparison_table(found, one, other), highlight=False)


@app.command()
def report(
    study_yaml: StudyFile,
    out: Annotated[
        Path | None, typer.Option("--out", help="Default: report.html in the study's folder.")
    ] = None,
    prefer: Prefer = None,
    knee: Knee = False,
    trial: Number = None,
) -> None:
    """Write the study as one HTML file."""
    study, _ = terminal.open_study(study_yaml)
    from paretomerge.decide.pick import Choice
    from paretomerge.report.html import write_report

    written = write_report(
        study, out or study.folder / "report.html", Choice.parse(prefer, trial, knee)
    )
    terminal.console().print(f"wrote {terminal.short(written)}", highlight=False, soft_wrap=True)


def main() -> None:
    """The entry point: one clear message instead of a traceback, unless --debug asks for it."""
    try:
        app()
    except ParetoMergeError as error:
        if "--debug" in sys.argv:
            raise
        sys.stderr.write(f"error: {error}\n")
        sys.exit(1)


if __name__ == "__main__":
    main()
