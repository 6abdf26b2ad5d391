"""The commands: each reads its arguments, calls one function and prints.

`paretomerge --help` lists them.
"""

import gc
import json
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from paretomerge.cli import (
    emr,
    extract,
    families,
    moe,
    session,
    sigterm,
    twin,
    watching,
)
from paretomerge.cli.calibrate import calibrate, learn_weights
from paretomerge.cli.options import (
    AllowMismatch,
    AsJson,
    Knee,
    Number,
    Overrides,
    Overwrite,
    Prefer,
    Quiet,
    RecipeFile,
    SplitOption,
    StudyFile,
    StudyOption,
    Trials,
)
from paretomerge.cli.suggest import suggest
from paretomerge.errors import (
    ConfigError,
    ParetoMergeError,
    missing_search_library,
)

if TYPE_CHECKING:
    from paretomerge.study.study import Study


class _Commands(TyperGroup):
    """The commands; Ctrl-C ends each of them with the shell's exit status of an interrupt."""

    # Any: typer has its own copy of click, whose classes it does not export.
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            sys.stderr.write("\nStopped.\n")
            raise typer.Exit(session.INTERRUPTED) from None


# Imports of the library stand inside the commands: `--help`, `plan` and `methods` must not wait
# seconds for torch (tests/cli/test_cli.py checks that they do not load it).
app = typer.Typer(
    cls=_Commands,
    help="Merge fine-tunes of one base model, search for the best merges, and pick from the "
    "Pareto front.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
MAX_SHOWN = 15  # members of the front that `search` and `quickstart` print


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"paretomerge {version('paretomerge')}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[
        bool, typer.Option(session.DEBUG, help="Show tracebacks.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Show the version.",
            callback=_print_version,
            is_eager=True,
        ),
    ] = False,
    unsafe_code: Annotated[
        bool,
        typer.Option(
            "--confirm-run-unsafe-code",
            help="Allow tasks that run code that the model writes.",
        ),
    ] = False,
) -> None:
    """Options before the command apply to every command."""
    if unsafe_code:
        # Read by `evaluate.tasks`, and by the metric of Hugging Face that runs the code.
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"


@app.command(short_help="Try it: search merges of the example models.")
def quickstart(trials: Trials = None, quiet: Quiet = False) -> None:
    """Search over merges of the shipped specialists, in a few minutes on a laptop.

    Run it again to resume.
    """
    from paretomerge.cli.quickstart import unpack_specialists

    study_file = unpack_specialists(Path.cwd())
    study = session.open_study(study_file)
    session.search(study, trials, quiet)
    session.show(study, MAX_SHOWN)
    # Overwritten, since a second run may pick another trial.
    out = study.folder / "picked"
    picked_by = study.default_choice.text
    picked = study.save(study.picked(), out, overwrite=True, picked_by=picked_by)
    report_file = study.report()
    shown = session.short(study_file)
    session.console().print(
        f"\nThe picked merge is an ordinary checkpoint: {session.short(picked)}\n"
        f"The report: {session.short(report_file)}\n\n"
        f"Next:  paretomerge pick {shown} --prefer translate=0.7,reverse=0.3 --out my-merge\n"
        f"       paretomerge evaluate my-merge --study {shown}",
        highlight=False,
        soft_wrap=True,
    )


@app.command(short_help="Write a commented study.yaml.")
def init(
    base: Annotated[str, typer.Argument(help="The base model.", show_default=False)],
    models: Annotated[
        list[str],
        typer.Argument(help="Two or more fine-tunes of it.", show_default=False),
    ],
    task: Annotated[
        list[str] | None,
        typer.Option("--task", help="An objective; may be given again."),
    ] = None,
    file: Annotated[Path, typer.Option("--file", help="Where to write it.")] = Path(
        "study.yaml"
    ),
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N")] = "cpu",
) -> None:
    """Write a commented study.yaml to begin with."""
    from paretomerge.cli.init import next_step, write_study_file

    tasks = task or ()
    write_study_file(file, base, models, tasks, device)
    shown = session.short(file)
    session.console().print(
        f"wrote {shown}; {next_step(shown, tasks)}",
        highlight=False,
        soft_wrap=True,
    )


@app.command(short_help="Print the JSON schema of study.yaml.")
def schema() -> None:
    """Print the JSON schema of study.yaml, for editors."""
    from paretomerge.config.schema import StudyConfig

    print(json.dumps(StudyConfig.model_json_schema(), indent=2))


@app.command(short_help="Search, then score the front.")
def search(
    study_yaml: StudyFile,
    trials: Trials = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
    override: Overrides = None,
    allow_mismatch: AllowMismatch = False,
    log_json: Annotated[
        Path | None,
        typer.Option(
            "--log-json", help="Add one line of JSON for each trial to this file."
        ),
    ] = None,
) -> None:
    """Search until the study's budget is spent, then score the front on held-out examples.

    A search that was interrupted continues.
    """
    study = session.open_study(study_yaml, override, allow_mismatch)
    session.search(study, trials, quiet or as_json, log_json)
    if as_json:
        _print_front(study)
        return
    session.show(study, MAX_SHOWN)


def _print_front(study: "Study") -> None:
    """Print the front as JSON."""
    from paretomerge.report.tables import rows

    results = study.results()
    objectives = [objective.name for objective in results.objectives]
    content = {"objectives": objectives, "front": rows(results.front)}
    # `print` and not the console, which would wrap lines: this is for programs.
    print(json.dumps(content, indent=2))


app.command()(watching.status)
app.command(short_help="Show a study in a browser.")(watching.dashboard)


@app.command(short_help="Show the Pareto front.")
def front(study_yaml: StudyFile, as_json: AsJson = False) -> None:
    """Show the Pareto front with its scores on search and held-out examples."""
    study = session.open_study(study_yaml)
    if as_json:
        _print_front(study)
        return
    session.show(study)


@app.command(short_help="Choose a merge and write its checkpoint.")
def pick(
    study_yaml: Annotated[
        Path,
        typer.Argument(
            help="study.yaml, or a folder of `pareto-merge`.", show_default=False
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="A new folder for the checkpoint. Without it the choice is only shown.",
        ),
    ] = None,
    prefer: Prefer = None,
    knee: Knee = False,
    trial: Number = None,
    refine: Annotated[
        int,
        typer.Option(
            help="First evaluate so many new merges that the preference may prefer.",
            min=0,
        ),
    ] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Choose one merge, say how sure the choice is, and write it as a checkpoint.

    From the folder of a family it writes the merge for a preference over the sources.
    """
    if study_yaml.is_dir():
        families.check_no_trial_options(trial, knee, refine)
        families.pick_from_family(study_yaml, out, prefer, overwrite)
        return
    from paretomerge.decide.pick import Choice, check_out, choose
    from paretomerge.report.tables import trials_table

    study = session.open_study(study_yaml)
    # A wrong choice is reported before anything is loaded or written.
    choice = Choice.parse(prefer, trial, knee)
    if choice == Choice():
        choice = study.default_choice
    if refine and choice.trial is not None:
        raise ConfigError("--refine: needs a preference, not --trial")
    if out is not None:
        check_out(out, overwrite)
    if refine:
        session.refine(study, choice, refine)
    decision = None
    if choice.trial is None:
        decision = session.decide(study, choice)
        number = decision.trial.number
    else:
        number = choose(study.results(), choice).number
    heading = f"Picked by {choice.text}"
    if out is None:
        heading += " (add --out FOLDER to write it)"
    else:
        study.save(number, out, overwrite=overwrite, picked_by=choice.text)
        heading += f" → {out}"
    results = study.results()
    picked = choose(results, Choice(trial=number))
    table = trials_table(results, [picked], heading, number)
    session.console().print(table)
    if decision is not None:
        session.show_decision(decision)


app.command("pareto-merge", short_help="Write one folder for all preferences.")(
    families.pareto_merge
)


@app.command()
def merge(
    recipe: RecipeFile,
    out: Path,
    overwrite: Overwrite = False,
    workers: Annotated[
        int | None,
        typer.Option(
            help="Processes that merge. Default: 1 for a small merge, else the processors, or "
            "fewer by OMP_NUM_THREADS.",
            min=1,
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N")] = "cpu",
    shard_size: Annotated[
        str, typer.Option(help="Largest file: 5GB, 500MB, ...")
    ] = "5GB",
    allow_nan: Annotated[
        bool,
        typer.Option("--allow-nan", help="Merge NaN and infinite weights like others."),
    ] = False,
    allow_mismatch: AllowMismatch = False,
) -> None:
    """Merge one recipe to disk."""
    from paretomerge.cli.plan import is_study_file
    from paretomerge.merging.plan.make import make_plan
    from paretomerge.recipe import Recipe

    if recipe.is_file() and is_study_file(recipe):
        raise ConfigError(
            f"{recipe}: a study, and not a recipe; search it with `paretomerge search {recipe}`, "
            "then write a merge with `paretomerge pick`"
        )
    shard_bytes = session.size_in_bytes(shard_size)
    plan = make_plan(
        Recipe.load(recipe), allow_nan=allow_nan, allow_mismatch=allow_mismatch
    )
    session.print_notes(plan.notes)
    from paretomerge.merging.plan.cost import default_workers, processors
    from paretomerge.merging.worker_start import started_workers

    if workers is None:
        workers = 1
        if device == "cpu":
            workers = default_workers(plan, processors())
    # Workers import torch while this process does.
    helpers = workers - 1 if device == "cpu" else 0
    with started_workers(helpers) as started:
        # After the plan, which finds every error of a recipe without torch. The collector of
        # garbage would look again and again through what torch makes, for a sixth of the time.
        gc.disable()
        from paretomerge.merging.engine import write

        gc.freeze()
        gc.enable()
        write(
            plan,
            out,
            overwrite=overwrite,
            shard_bytes=shard_bytes,
            workers=workers,
            device=device,
            started=started,
        )
    session.console().print(
        f"wrote {session.short(out)}", highlight=False, soft_wrap=True
    )


@app.command(short_help="Write a GGUF file as a checkpoint.")
def convert(
    file: Annotated[Path, typer.Argument(help="model.gguf", show_default=False)],
    out: Annotated[Path, typer.Argument(help="A new folder.", show_default=False)],
    overwrite: Overwrite = False,
    allow_mismatch: Annotated[
        bool,
        typer.Option(
            "--allow-mismatch",
            help="Convert it although the scaling of rotary positions is lost.",
        ),
    ] = False,
) -> None:
    """Write a GGUF file as a checkpoint that can be merged.

    Quantised weights are dequantised to bfloat16, which does not bring back what the quantisation
    lost. It needs the extra `paretomerge[gguf]`.
    """
    from paretomerge.checkpoint.gguf import convert as convert_gguf

    session.hide_progress_bars()
    convert_gguf(file, out, overwrite, allow_mismatch)
    session.console().print(
        f"wrote {session.short(out)}", highlight=False, soft_wrap=True
    )


app.command(short_help="Write a merge as a LoRA adapter.")(extract.extract_lora)
app.command(short_help="Write fine-tunes as one model with masks.")(emr.emr)
app.command(short_help="Write one task's model from emr or twin.")(emr.expand)
app.command(short_help="Route between fine-tunes by the prompt.")(twin.twin)
app.command(short_help="Build a mixture of experts.")(moe.moe)


@app.command(short_help="Check a recipe or a study, and estimate its cost.")
def plan(
    file: Annotated[
        Path,
        typer.Argument(
            help="A recipe in mergekit's YAML, or a study.yaml.", show_default=False
        ),
    ],
    as_json: AsJson = False,
    override: Overrides = None,
    allow_mismatch: AllowMismatch = False,
    no_measure: Annotated[
        bool,
        typer.Option(
            "--no-measure",
            help="Of a study: make no merge in memory to estimate the time.",
        ),
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Of a study: plan memory and time for so many workers. Default: the study's.",
        ),
    ] = None,
) -> None:
    """Check a recipe or a study without writing anything.

    Shows every error at once. Of a recipe, it reads the headers of the models alone, and shows what
    the merge will read, write and need. Of a study, it checks all that a search checks before its
    first trial, and shows what the search will do, what memory it needs, what does not fit, and how
    long it will take.
    """
    from paretomerge.cli.plan import is_study_file, print_study_plan

    if is_study_file(file):
        print_study_plan(
            file,
            override or (),
            allow_mismatch,
            as_json,
            measure=not no_measure,
            workers=workers,
        )
        return
    if override or no_measure or workers is not None:
        raise ConfigError(
            f"{file}: --set, --no-measure and --workers are for studies, not recipes"
        )
    _print_recipe_plan(file, as_json, allow_mismatch)


def _print_recipe_plan(file: Path, as_json: bool, allow_mismatch: bool) -> None:
    """Check a recipe and print what its merge will read, write and need."""
    from paretomerge.cli.plan import plan_recipe
    from paretomerge.merging.plan.cost import estimate_cost
    from paretomerge.report.recipes import PlanFacts, plan_table

    merge_plan = plan_recipe(file, allow_mismatch)
    session.print_notes(merge_plan.notes)
    cost = estimate_cost(merge_plan)
    facts: PlanFacts = {
        "method": merge_plan.recipe.merge_method,
        "models": list(merge_plan.recipe.source_models),
        "layers": len(merge_plan.route),
        "tensors": len(merge_plan.jobs),
        "dtype": merge_plan.dtype,
        "read": cost.read,
        "written": cost.written,
        "memory": cost.memory,
        "seconds": cost.seconds,
    }
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    session.console().print(plan_table(facts))
    if merge_plan.recipe.steps:
        from paretomerge.report.lineage import lineage_tree

        session.console().print(lineage_tree(merge_plan.recipe))


@app.command(short_help="Show the merge methods.")
def methods(as_json: AsJson = False) -> None:
    """Show the merge methods, their parameters and the defaults."""
    from paretomerge.report.recipes import method_rows, methods_table

    if as_json:
        print(json.dumps(method_rows(), indent=2))
        return
    session.console().print(methods_table())


app.command(short_help="Measure models on text, for merges that need data.")(calibrate)
app.command(short_help="Learn merge weights from text.")(learn_weights)


@app.command(short_help="Show how similar fine-tunes are.")
def kinship(
    models: Annotated[
        list[str],
        typer.Argument(help="BASE MODEL..., or a study.yaml.", show_default=False),
    ],
    as_json: AsJson = False,
    allow_mismatch: AllowMismatch = False,
) -> None:
    """Show how similar fine-tunes are and which layers they changed."""
    from paretomerge.merging.delta_profile import profile
    from paretomerge.merging.plan.make import open_weights
    from paretomerge.report.delta_profile import kinship_rows, kinship_tables
    from paretomerge.space.sources import named_sources

    base = models[0]
    sources = named_sources(models[1:])
    is_study = Path(base).suffix in (".yaml", ".yml")
    if is_study and not sources:
        from paretomerge.study.parts import study_pool

        study = session.open_study(Path(base))
        pool = study_pool(study.settings)
        allow_mismatch = allow_mismatch or pool.allow_mismatch
        base = pool.base
        sources = dict(pool.sources)
    if not sources:
        raise ConfigError(
            "kinship: name a base and at least one model, or a study.yaml"
        )
    opened = open_weights((base, *sources.values()))
    deltas = profile(base, sources, opened, allow_mismatch)
    architecture = opened[base].architecture
    if as_json:
        print(json.dumps(kinship_rows(deltas, architecture), indent=2))
        return
    session.console().print(kinship_tables(deltas, architecture), highlight=False)


app.command(short_help="Suggest which merges to try first.")(suggest)


@app.command(short_help="Score a checkpoint with a study's tasks.")
def evaluate(
    model: Annotated[str, typer.Argument(help="A checkpoint, or a folder of `twin`.")],
    study: StudyOption,
    split: SplitOption = "held_out",
    as_json: AsJson = False,
) -> None:
    """Score a checkpoint with a study's tasks, loaded from disk as its users load it."""
    split_name = session.split_named(split)
    opened = session.open_study(study)
    session.set_up_process(opened)
    from paretomerge.study.checkpoint_scores import score_checkpoint
    from paretomerge.systems.emr_files import is_unified_folder
    from paretomerge.systems.twin import is_twin_folder, score_twin

    if is_unified_folder(Path(model).expanduser()):
        typer.echo(
            f"{model}: this is the unified checkpoint of `paretomerge emr`, which is no good model "
            "by itself; `paretomerge expand` writes the model of a task",
            err=True,
        )
    if is_twin_folder(model):
        scores = score_twin(opened, model, split_name)
    else:
        scores = score_checkpoint(opened.search(), model, split_name)
    if as_json:
        rows = {}
        for name, score in scores.items():
            fields = {"value": score.value, "stderr": score.stderr, "n": score.n}
            # The per-example scores let a program pair two models, as `compare` does.
            rows[name] = {**fields, "items": score.example_scores}
        print(json.dumps(rows))
        return
    for name, score in scores.items():
        number = f"{score.value:.4f} ± {score.stderr:.4f}"
        line = f"{name:24s} {number}  n = {score.n}"
        session.console().print(line, highlight=False)


@app.command(short_help="Compare two models on the same examples.")
def compare(
    one: Annotated[
        str,
        typer.Argument(
            help="A trial's number, a baseline's name, or a checkpoint.",
            show_default=False,
        ),
    ],
    other: Annotated[str, typer.Argument(help="Likewise.", show_default=False)],
    study: StudyOption,
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task", help="A score's name; may be given again. Default: all."
        ),
    ] = None,
    split: SplitOption = "held_out",
    as_json: AsJson = False,
) -> None:
    """Compare two models on the same examples.

    Shows the paired difference, its 95 % interval and a p-value: of McNemar's test, or of the
    paired t-test where scores are not right or wrong.
    """
    from dataclasses import asdict

    from paretomerge.report.tables import comparison_table

    split_name = session.split_named(split)
    opened = session.open_study(study)
    session.set_up_process(opened)
    comparisons = opened.compare(one, other, task or (), split_name)
    if as_json:
        rows = []
        for comparison in comparisons:
            difference = {"difference": comparison.difference}
            rows.append(asdict(comparison) | difference)
        print(json.dumps(rows, indent=2))
        return
    table = comparison_table(comparisons, one, other)
    session.console().print(table, highlight=False)


@app.command()
def report(
    study_yaml: StudyFile,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Default: report.html in the study's folder."),
    ] = None,
    prefer: Prefer = None,
    knee: Knee = False,
    trial: Number = None,
) -> None:
    """Write the study as one HTML file."""
    from paretomerge.decide.pick import Choice

    study = session.open_study(study_yaml)
    choice = Choice.parse(prefer, trial, knee)
    file = study.report(out, choice.prefer, trial=choice.trial)
    session.console().print(
        f"wrote {session.short(file)}", highlight=False, soft_wrap=True
    )


def main() -> None:
    """Run a command.

    An error of ours is one message without a traceback, unless --debug asks for it. docs/search.md
    lists the exit statuses.
    """
    # Any other exception is a bug, so its traceback is what a report needs.
    try:
        with sigterm.taken_as_ctrl_c():
            app()
    except ParetoMergeError as error:
        # From `sys.argv`: the error has left typer, and with it the parsed option.
        if session.DEBUG in sys.argv:
            raise
        sys.stderr.write(f"error: {error}\n")
        sys.exit(session.ERROR)
    except ModuleNotFoundError as error:
        cure = missing_search_library(error)
        if cure is None or session.DEBUG in sys.argv:
            raise
        sys.stderr.write(f"error: {cure}\n")
        sys.exit(session.ERROR)


if __name__ == "__main__":
    main()
