"""Arguments and options that several commands take."""

from pathlib import Path
from typing import Annotated

import typer

StudyFile = Annotated[Path, typer.Argument(help="study.yaml", show_default=False)]
RecipeFile = Annotated[
    Path, typer.Argument(help="Recipe in mergekit's YAML.", show_default=False)
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress, only the result.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace OUT if it exists.")
]
AsJson = Annotated[bool, typer.Option("--json", help="For programs.")]
AllowMismatch = Annotated[
    bool,
    typer.Option(
        "--allow-mismatch", help="Take models that do not seem to belong together."
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Set a key of the file, such as evaluate.batch_size=32; may be given again.",
    ),
]
Prefer = Annotated[
    str | None,
    typer.Option(
        help="mean, or weights of the objectives: sort=0.7,reverse=0.3. Default: the study's own."
    ),
]
Knee = Annotated[
    bool,
    typer.Option(
        "--knee",
        help="The trial nearest to the ideal point (the default without preferences).",
    ),
]
Trials = Annotated[
    int | None, typer.Option(help="Evaluations in all, baselines included.", min=1)
]
Number = Annotated[int | None, typer.Option("--trial", help="The number of one trial.")]
StudyOption = Annotated[
    Path,
    typer.Option(
        "--study", help="The study.yaml whose tasks to run.", show_default=False
    ),
]
SplitOption = Annotated[str, typer.Option(help="search or held_out")]
