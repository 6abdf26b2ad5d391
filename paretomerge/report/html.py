"""The report: one self-contained HTML file that opens without a network."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

from paretomerge.decide.optimism import optimism
from paretomerge.decide.pick import Choice, choose
from paretomerge.errors import ConfigError
from paretomerge.record.results import Results
from paretomerge.record.trial import Trial
from paretomerge.report import plots
from paretomerge.report.lineage import plot_lineage
from paretomerge.report.tables import best_first

_TEMPLATE = Path(__file__).with_name("report.html")
# Without "record", which is noted after the trial has been written and so is not in it.
_STAGES = ("ask", "merge", "evaluate")
_PACKAGES = ("paretomerge", "torch", "transformers", "lm_eval", "optuna", "botorch")


def write_report(
    results: Results,
    out: Path,
    choice: Choice | None = None,
    picked: Trial | None = None,
) -> Path:
    """Write the present state of a study as one HTML file.

    Args:
        results: The study's results.
        out: The file; its folder is created.
        choice: Which trial to show as picked; by default the knee of the front.
        picked: The trial that the choice has picked, where that is known.

    Returns:
        The file.

    Raises:
        ConfigError: Nothing has finished yet, the choice names no trial, or the file cannot be
            written.
    """
    # Imported late, as plotly below: no other command needs them.
    import jinja2

    choice = choice or Choice()
    picked = picked or choose(results, choice)
    scored = [trial for trial in results.trials if not trial.failure]
    on_front = {trial.number for trial in results.front}
    off_front = [trial for trial in results.baselines if trial.number not in on_front]
    objectives = [objective.name for objective in results.objectives]
    watched = [name for name in results.score_names if name not in objectives]
    front = best_first(results, results.front)
    failed = [trial for trial in results.trials if trial.failure]
    infeasible = [trial for trial in scored if trial.violations]
    # Escaped: labels, names of tasks and failures are other people's text.
    source = _TEMPLATE.read_text(encoding="utf-8")
    template = jinja2.Template(source, autoescape=True)
    page = template.render(
        objectives=objectives,
        watched=watched,
        front=[_row(results, trial, picked) for trial in front],
        has_mean=results.has_mean,
        baselines=[_row(results, trial, picked) for trial in off_front],
        picked=_row(results, picked, picked),
        choice=choice.text,
        recipe=picked.recipe_yaml,
        optimism=optimism(results),
        failures=[(trial.number, trial.failure) for trial in failed],
        infeasible=[(trial.number, trial.violations) for trial in infeasible],
        n=len(results.trials),
        seconds=_seconds(results),
        versions={name: version(name) for name in _PACKAGES},
        plots=_plots(results, picked),
    )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{out}: the report cannot be written: {error.strerror}; name another file"
        ) from error
    return out


def _plots(results: Results, picked: Trial) -> list[str]:
    from plotly.io import to_html

    figures = [
        plots.plot_front(results, picked),
        plots.plot_hypervolume(results),
        *plots.plot_sizes(results, picked),
        *plots.plot_held_out(results, picked),
        *plot_lineage(results, picked),
    ]
    # plotly's script is megabytes, so it stands in the page once, before the first figure. It is
    # in the page and not linked, so that the report opens without a network.
    parts = []
    for i, figure in enumerate(figures):
        is_first = i == 0
        part = to_html(figure, full_html=False, include_plotlyjs=is_first)
        parts.append(part)
    return parts


def _row(results: Results, trial: Trial, picked: Trial) -> dict[str, Any]:
    # Spaces with one method have no such parameter, but the recipe names the method.
    method = trial.params.get("method")
    if not method:
        method = "route" if trial.level else trial.recipe.merge_method
    return {
        "name": plots.trial_title(trial),
        "picked": trial.number == picked.number,
        "method": method,
        "search": dict(trial.scores),
        "held_out": dict(trial.held_out or {}),
        "mean": results.mean(trial.scores),
        "held_out_mean": results.mean(trial.held_out),
    }


def _seconds(results: Results) -> dict[str, float]:
    seconds = dict.fromkeys(_STAGES, 0.0)
    for trial in results.trials:
        for stage in _STAGES:
            seconds[stage] += trial.seconds.get(stage, 0.0)
    return seconds
