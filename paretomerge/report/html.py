"""The report: one self-contained HTML file that opens without a network."""

import html
import math
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import plotly.graph_objects as go
import plotly.io
import plotly.subplots

from paretomerge.decide.optimism import optimism
from paretomerge.decide.pick import Choice, choose
from paretomerge.record.record import Trial
from paretomerge.report.tables import best_first, title
from paretomerge.study.study import Study

_TEMPLATE = Path(__file__).with_name("report.html")
_INK, _DIM, _LEFT, _BROKEN = "#1f2937", "#cbd5e1", "#99f6e4", "#e9d5ff"
_FRONT, _PICK, _SOURCE = "#2563eb", "#dc2626", "#d97706"

_ACROSS, _PANEL, _GAP = (
    3,
    320,
    80,
)  # panels in a row; pixels of a panel, and between rows, where the axes' titles stand
_MARGIN, _LEGEND = 50, 64  # pixels above and below the panels, and from them down to the legend


def write_report(study: Study, out: Path, choice: Choice | None = None) -> Path:
    """Write the study as it stands to `out`. Raises ConfigError where nothing has finished yet."""
    picked = choose(study, choice or Choice())
    trials = [t for t in study.trials if not t.failure]
    front = study.front()
    known = [t for t in trials if t.is_start and t not in front]
    figures = [_scatter(study, trials, front, picked), _progress(study, trials)]
    bars = [*_sizes(study, trials, picked), *_bars(study, trials, picked)]
    page = jinja2.Template(_TEMPLATE.read_text(encoding="utf-8"), autoescape=True).render(
        objectives=[o.name for o in study.objectives],
        watched=[
            n for n in study.objectives_and_watched() if n not in {o.name for o in study.objectives}
        ],
        front=[_row(study, t, picked) for t in best_first(study, front)],
        averaged=study.goals.averaged,
        known=[_row(study, t, picked) for t in known],
        picked=_row(study, picked, picked),
        choice=(choice or Choice()).text,
        recipe=study.recipe(picked).to_yaml(),
        optimism=optimism(study),
        failures=[(t.number, t.failure) for t in study.trials if t.failure],
        infeasible=[(t.number, t.broken) for t in trials if not t.feasible],
        n=len(study.trials),
        seconds=_seconds(study.trials),
        versions={
            name: version(name)
            for name in ("paretomerge", "torch", "transformers", "lm_eval", "optuna", "botorch")
        },
        plots=[
            plotly.io.to_html(f, full_html=False, include_plotlyjs=i == 0)
            for i, f in enumerate([*figures, *bars])
        ],
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")
    return out


def _scatter(study: Study, trials: list[Trial], front: list[Trial], picked: Trial) -> go.Figure:
    """Every pair of objectives: all trials pale, known starts in amber, the front in blue, the pick in red."""
    names = [o.name for o in study.objectives]
    pairs = list(combinations(names, 2)) or [(names[0], names[0])]
    columns, rows = min(len(pairs), _ACROSS), math.ceil(len(pairs) / _ACROSS)
    inside = rows * _PANEL + (rows - 1) * _GAP
    figure = plotly.subplots.make_subplots(
        cols=columns, rows=rows, horizontal_spacing=0.08, vertical_spacing=_GAP / inside
    )
    groups = [
        (
            "other trials",
            _DIM,
            6,
            [t for t in trials if t not in front and t.feasible and t.final and not t.is_start],
        ),
        (
            "left early",
            _LEFT,
            6,
            [t for t in trials if t not in front and t.feasible and not t.final],
        ),
        ("infeasible", _BROKEN, 6, [t for t in trials if not t.feasible and not t.is_start]),
        ("known starts", _SOURCE, 9, [t for t in trials if t.is_start]),
        ("front", _FRONT, 9, [t for t in front if not t.is_start]),
        ("picked", _PICK, 13, [picked]),
    ]
    for i, (x, y) in enumerate(pairs):
        place = {"row": i // _ACROSS + 1, "col": i % _ACROSS + 1}
        for name, colour, size, members in groups:
            figure.add_scatter(
                x=[t.scores[x].value for t in members],
                y=[t.scores[y].value for t in members],
                error_x={
                    "array": [t.scores[x].stderr for t in members],
                    "thickness": 0.7,
                    "width": 0,
                }
                if name != "other trials"
                else None,
                error_y={
                    "array": [t.scores[y].stderr for t in members],
                    "thickness": 0.7,
                    "width": 0,
                }
                if name != "other trials"
                else None,
                text=[html.escape(title(t)) for t in members],
                hovertemplate="%{text}<br>" + f"{x} %{{x:.3f}}<br>{y} %{{y:.3f}}<extra></extra>",
                mode="markers",
                marker={"color": colour, "size": size},
                name=name,
                legendgroup=name,
                showlegend=i == 0,
                **place,
            )
        figure.update_xaxes(title_text=x, **place)
        figure.update_yaxes(title_text=y, **place)
    return _styled(
        figure, "Objectives, on the search items (one standard error)", inside + 2 * _MARGIN
    )


def _progress(study: Study, trials: list[Trial]) -> go.Figure:
    """Hypervolume after each trial, and the level that the known starts reach alone."""
    volumes = [study.hypervolume(trials[: i + 1]) for i in range(len(trials))]
    figure = go.Figure(
        go.Scatter(
            x=[t.number + 1 for t in trials],
            y=volumes,
            line={"color": _FRONT, "shape": "hv"},
            name="search",
        )
    )
    starts = [t for t in trials if t.is_start]
    if starts:
        figure.add_hline(
            study.hypervolume(starts),
            line={"color": _SOURCE, "dash": "dot"},
            annotation_text="known starts alone",
        )
    figure.update_xaxes(title_text="trials")
    figure.update_yaxes(title_text="hypervolume")
    return _styled(figure, "Hypervolume over the search", 320)


def _sizes(study: Study, trials: list[Trial], picked: Trial) -> list[go.Figure]:
    """Quality against size, pruned and stacked models on one plot: the mean of what is maximised over each thing that is minimised,
    and the best of what is no larger as a staircase.
    """
    sizes = [o.name for o in study.objectives if not o.maximise]
    quality = [o.name for o in study.objectives if o.maximise]
    if not quality:
        return []
    made = []
    for size in sizes:
        routed = [t for t in trials if t.level or study.space.routed]
        levels = {"merged in place": [t for t in trials if t not in routed], "routes": routed}
        figure = go.Figure()
        points = {
            t.number: (t.scores[size].value, float(np.mean([t.scores[n].value for n in quality])))
            for t in trials
        }
        for (name, members), symbol, colour in zip(
            levels.items(), ("circle", "diamond"), (_SOURCE, _FRONT), strict=True
        ):
            if members:
                x, y = zip(*(points[t.number] for t in members), strict=True)
                names = [html.escape(title(t)) for t in members]
                figure.add_scatter(
                    x=x,
                    y=y,
                    mode="markers",
                    name=name,
                    text=names,
                    marker={"symbol": symbol, "color": colour, "size": 8},
                )
        order = sorted(points.values())
        best = np.maximum.accumulate([mean for _, mean in order])
        figure.add_scatter(
            x=[x for x, _ in order],
            y=best,
            mode="lines",
            name="best with as little",
            line={"color": _DIM, "shape": "hv"},
        )
        at = points[picked.number]
        figure.add_scatter(
            x=at[:1], y=at[1:], mode="markers", name="picked", marker={"color": _PICK, "size": 13}
        )
        figure.update_xaxes(title_text=size)
        figure.update_yaxes(title_text=f"mean of {', '.join(quality)}")
        made.append(_styled(figure, f"Quality against {size}, search items", 420))
    return made


def _bars(study: Study, trials: list[Trial], picked: Trial) -> list[go.Figure]:
    """Held-out scores of the sources and the pick, objectives and watched tasks."""
    sources = [t for t in trials if t.label in study.space.sources]
    shown = [t for t in [*sources, picked] if t.held_out]
    if not shown:
        return []
    minimised = {
        o.name for o in study.objectives if not o.maximise
    }  # layers, seconds: of other units
    names = [name for name in study.objectives_and_watched() if name not in minimised]
    figure = go.Figure()
    shades = ["#fcd34d", "#fbbf24", "#d97706", "#92400e"]
    for i, trial in enumerate(shown):
        scores = trial.held_out or {}
        figure.add_bar(
            x=[n for n in names if n in scores],
            y=[scores[n].value for n in names if n in scores],
            error_y={
                "array": [scores[n].stderr for n in names if n in scores],
                "thickness": 0.8,
                "width": 2,
            },
            name="picked" if trial is picked else title(trial),
            marker_color=_PICK if trial is picked else shades[i % len(shades)],
        )
    return [
        _styled(
            figure, "Held-out items: the sources and the picked merge, watched tasks included", 380
        )
    ]


def _styled(figure: go.Figure, heading: str, height: int) -> go.Figure:
    return figure.update_layout(
        title={"text": heading, "font": {"size": 15}},
        height=height,
        template="plotly_white",
        font={"family": "system-ui, sans-serif", "color": _INK},
        margin={"l": 60, "r": 20, "t": _MARGIN, "b": _MARGIN},
        legend={"orientation": "h", "y": -_LEGEND / (height - 2 * _MARGIN)},
    )


def _row(study: Study, trial: Trial, picked: Trial) -> dict[str, Any]:
    return {
        "name": title(trial),
        "picked": trial.number == picked.number,
        "method": trial.params.get("method")
        or ("route" if trial.level else study.recipe(trial).merge_method),
        "search": dict(trial.scores),
        "held_out": dict(trial.held_out or {}),
        "mean": study.goals.mean(trial.scores),
        "held_out_mean": study.goals.mean(trial.held_out),
    }


def _seconds(trials: list[Trial]) -> dict[str, float]:
    return {k: sum(t.seconds.get(k, 0.0) for t in trials) for k in ("ask", "merge", "evaluate")}
