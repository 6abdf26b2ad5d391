"""Families of Pareto Merging: the command that makes one, and `pick` from one."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from paretomerge.cli import session
from paretomerge.cli.options import AllowMismatch, Overwrite
from paretomerge.errors import ConfigError

if TYPE_CHECKING:
    from paretomerge.systems.pareto_merging import ParetoFamily

_MEGABYTE = 1e6


def pareto_merge(  # noqa: PLR0913 - one argument for each option
    base: Annotated[str, typer.Argument(help="The base model.", show_default=False)],
    models: Annotated[
        list[str],
        typer.Argument(help="Two or more fine-tunes of it.", show_default=False),
    ],
    out: Annotated[
        Path, typer.Option("--out", help="The folder to make.", show_default=False)
    ],
    rank: Annotated[
        int | None,
        typer.Option(
            help="Rank of the factors of each matrix. Set it or --energy.", min=1
        ),
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(
            help="In place of --rank: the share of its deltas' energy that each matrix keeps."
        ),
    ] = None,
    scale: Annotated[
        float | None,
        typer.Option(
            help="lambda of theta_0 + lambda K tau_k. Default: 1 / K, which makes the corners the "
            "sources themselves."
        ),
    ] = None,
    centre: Annotated[
        str,
        typer.Option(
            help="What the factors are added to: mean, which is task arithmetic with lambda, or "
            "base."
        ),
    ] = "mean",
    dtype: Annotated[
        str | None, typer.Option(help="Dtype of the models. Default: the base's.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            help="NAME=FILE: unlabelled texts of a source's task, a line each or JSONL; give one "
            "for every source to train the factors.",
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="With --data: the most steps.", min=1)
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="With --data: that of Adam.")
    ] = None,
    new_tokens: Annotated[
        int | None,
        typer.Option(
            help="With --data: the most tokens that each source writes after its texts; 0 to "
            "train on the texts themselves.",
            min=0,
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="With --data: the random seed.", min=0)
    ] = None,
    overwrite: Overwrite = False,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N")] = "cpu",
    allow_mismatch: AllowMismatch = False,
) -> None:
    """Write one folder that answers any preference over the sources, without a search.

    `paretomerge pick FOLDER --prefer math=0.7,code=0.3 --out merged` then writes a checkpoint. The
    method is Pareto Merging (arXiv 2408.12105): factors of low rank, in closed form, or trained
    with --data.
    """
    options = {
        "steps": steps,
        "learning_rate": learning_rate,
        "new_tokens": new_tokens,
        "seed": seed,
    }
    given = {name: value for name, value in options.items() if value is not None}
    if given and not data:
        option = next(iter(given)).replace("_", "-")
        raise ConfigError(
            f"--{option}: is for training; give --data NAME=FILE for every source"
        )
    files = _named_files(data or ())
    session.hide_progress_bars()
    from paretomerge.systems import pareto_merging

    settings = pareto_merging.TrainingSettings(**given) if files else None  # type: ignore[arg-type]
    family = pareto_merging.pareto_merge(
        base,
        models,
        out,
        rank=rank,
        energy=energy,
        scale=scale,
        centre=centre,
        dtype=dtype,
        data=files or None,
        training=settings,
        overwrite=overwrite,
        device=device,
        allow_mismatch=allow_mismatch,
    )
    _print_facts(family)
    session.print_notes(family.manifest.notes)


def pick_from_family(
    folder: Path, out: Path | None, prefer: str | None, overwrite: bool
) -> None:
    """Write the checkpoint of a family for a preference; without `out`, only show it."""
    from paretomerge.decide.pick import Choice, check_out
    from paretomerge.systems.pareto_merging import ParetoFamily

    family = ParetoFamily.load(folder)
    if prefer is None:
        example = ",".join(f"{name}=1" for name in family.names)
        raise ConfigError(
            f"{folder}: is a family, which needs a preference; add --prefer {example}, with "
            "other weights"
        )
    weights = Choice.parse(prefer, None, False).prefer
    # The knee is a trial's, and refused by name.
    if weights is None or weights == "knee":
        raise ConfigError("--prefer: write mean or source=weight,... for a family")
    gamma = family.gamma(weights)
    heading = f"{family.preference_text(gamma)} of {session.short(folder)}"
    if out is None:
        heading += " (add --out FOLDER to write it)"
    else:
        check_out(out, overwrite)
        family.write(weights, out, overwrite=overwrite)
        heading += f" → {out}"
    session.console().print(heading, highlight=False, soft_wrap=True)


def check_no_trial_options(trial: int | None, knee: bool, refine: int) -> None:
    """Raise ConfigError if `pick` got options that have a meaning for studies alone."""
    given = {"--trial": trial is not None, "--knee": knee, "--refine": bool(refine)}
    for option, is_given in given.items():
        if is_given:
            raise ConfigError(
                f"{option}: is for a study; a family has no trials, so give --prefer "
                "source=weight,..."
            )


def _named_files(entries: Iterable[str]) -> dict[str, str]:
    """Read `--data NAME=FILE`, one file for each name."""
    files = {}
    named = session.named_values("--data", "NAME=FILE", entries)
    for name, (file, *others) in named.items():
        if others:
            raise ConfigError(f"--data: {name!r} is named twice")
        files[name] = file
    return files


def _print_facts(family: "ParetoFamily") -> None:
    """Print where a family is, what it keeps and its size."""
    manifest = family.manifest
    lines = [f"wrote {session.short(family.folder)}"]
    shares = [f"{100 * manifest.kept_in_all:.1f} % in all"]
    for name, kept in manifest.kept.items():
        shares.append(f"{name} -" if kept is None else f"{name} {100 * kept:.1f} %")
    lines.append(f"energy of the deltas that the rank keeps: {', '.join(shares)}")
    base, factors = manifest.base_bytes / _MEGABYTE, manifest.factor_bytes / _MEGABYTE
    lines.append(f"size: {base:.4g} MB of the base, {factors:.4g} MB of factors")
    if manifest.training is not None:
        before = manifest.training["divergence_before"]
        after = manifest.training["divergence_after"]
        step = manifest.training["best_step"]
        lines.append(
            f"divergence from the sources on texts that were split off: {before:.4g} before, "
            f"{after:.4g} after {step} steps"
        )
    for line in lines:
        session.console().print(line, highlight=False, soft_wrap=True)
