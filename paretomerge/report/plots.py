"""Plots of a study's results, as plotly figures.

Their methods `show()`, `write_image()` and `to_html()` work as usual.
"""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from paretomerge.record.results import Results
from paretomerge.record.trial import Trial

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_INK = "#1f2937"
OTHER_COLOUR = "#cbd5e1"
_LEFT_EARLY = "#99f6e4"
_INFEASIBLE = "#e9d5ff"
FRONT_COLOUR = "#2563eb"
PICKED_COLOUR = "#dc2626"
BASELINE_COLOUR = "#d97706"
_SOURCES = ("#fcd34d", "#fbbf24", "#d97706", "#92400e")

_PANELS_IN_A_ROW = 3
_PANEL = 320  # height of a panel in pixels
_GAP = 80  # pixels between rows, where the axes' titles stand
_MARGIN = 50  # pixels above and below the panels
_LEGEND = 64  # pixels from the panels down to the legend


@dataclass(frozen=True)
class _Group:
    """Trials that share a colour."""

    name: str
    colour: str
    size: int
    trials: list[Trial]
    error_bars: bool = True
    ring: str | None = None  # colour of a line around the markers


def plot_front(results: Results, picked: Trial | None = None) -> "Figure":
    """Plot every pair of objectives, on the search examples, with one standard error.

    Args:
        results: The study's results.
        picked: A trial to mark.

    Returns:
        The figure.
    """
    from plotly.subplots import make_subplots

    names = [objective.name for objective in results.objectives]
    pairs = list(combinations(names, 2))
    if not pairs:
        # A single objective is plotted against itself: its trials then lie on the diagonal.
        pairs = [(names[0], names[0])]
    columns = min(len(pairs), _PANELS_IN_A_ROW)
    rows = math.ceil(len(pairs) / _PANELS_IN_A_ROW)
    height = rows * _PANEL + (rows - 1) * _GAP
    # plotly takes the spacing as a share of the height, but the axes' titles need a fixed gap.
    spacing = _GAP / height
    figure = make_subplots(
        cols=columns, rows=rows, horizontal_spacing=0.08, vertical_spacing=spacing
    )
    groups = _groups(results, picked)
    for i, (x, y) in enumerate(pairs):
        row, column = divmod(i, _PANELS_IN_A_ROW)
        # plotly counts panels from 1.
        panel = {"row": row + 1, "col": column + 1}
        # Groups look alike in all panels, so the legend shows those of the first.
        in_legend = i == 0
        for group in groups:
            trace = _scatter(group, x, y)
            figure.add_scatter(**trace, **panel, showlegend=in_legend)
        figure.update_xaxes(title_text=x, **panel)
        figure.update_yaxes(title_text=y, **panel)
    heading = "Objectives, on the search examples (one standard error)"
    return styled(figure, heading, height + 2 * _MARGIN)


def plot_hypervolume(results: Results) -> "Figure":
    """Plot the hypervolume after each trial, and the level that the baselines reach alone.

    Args:
        results: The study's results.

    Returns:
        The figure.
    """
    from plotly.graph_objects import Figure, Scatter

    # From the first trial on, so that the plot shows what the baselines contribute.
    volumes = []
    numbers = []
    for trial, volume in zip(results.trials, results.hypervolumes(), strict=True):
        if not trial.failure:
            volumes.append(volume)
            numbers.append(trial.number + 1)
    # A step and no slope: the volume changes when a trial ends.
    line = {"color": FRONT_COLOUR, "shape": "hv"}
    steps = Scatter(x=numbers, y=volumes, line=line, name="search")
    figure = Figure(steps)
    if results.baselines:
        figure.add_hline(
            results.hypervolume(results.baselines),
            line={"color": BASELINE_COLOUR, "dash": "dot"},
            annotation_text="baselines alone",
        )
    figure.update_xaxes(title_text="trials")
    figure.update_yaxes(title_text="hypervolume")
    return styled(figure, "Hypervolume over the search", _PANEL)


def plot_sizes(results: Results, picked: Trial) -> list["Figure"]:
    """Plot quality against each minimised count, such as the number of layers.

    Quality is the mean of the maximised scores on examples, or the only maximised objective.

    Args:
        results: The study's results.
        picked: The trial to mark.

    Returns:
        One figure for each objective that counts something; none where nothing is a quality.
    """
    sizes: list[str] = []
    maximised: list[str] = []
    qualities: list[str] = []
    for objective in results.objectives:
        score = picked.scores[objective.name]
        if objective.maximise:
            maximised.append(objective.name)
            # A mean of accuracies and of sparsity would be no quality.
            if score.n > 1:
                qualities.append(objective.name)
        # A minimised mean, such as a perplexity, is another quality and not a size.
        elif score.is_count:
            sizes.append(objective.name)
    if not qualities and len(maximised) == 1:
        qualities = maximised
    if not qualities:
        return []
    return [_quality_against(size, qualities, results, picked) for size in sizes]


def plot_held_out(results: Results, picked: Trial) -> list["Figure"]:
    """Plot held-out scores of the sources and the picked merge as bars, watched tasks included.

    Args:
        results: The study's results.
        picked: The trial to compare.

    Returns:
        One figure; none before anything is scored on held-out examples.
    """
    from plotly.graph_objects import Figure

    shown = []
    for trial in results.trials:
        is_source = trial.label in results.sources and trial.number != picked.number
        if trial.held_out and is_source:
            shown.append(trial)
    if picked.held_out:
        shown.append(picked)
    if not shown:
        return []
    # Minimised objectives, such as layers or seconds, have other units than the axis.
    minimised: set[str] = set()
    for objective in results.objectives:
        if not objective.maximise:
            minimised.add(objective.name)
    names = [name for name in results.score_names if name not in minimised]
    figure = Figure()
    for i, trial in enumerate(shown):
        held_out = trial.held_out or {}
        scored = [name for name in names if name in held_out]
        values = [held_out[name].value for name in scored]
        errors = [held_out[name].stderr for name in scored]
        title = trial_title(trial)
        colour = _SOURCES[i % len(_SOURCES)]
        if trial is picked:
            title = f"picked: {title}"
            colour = PICKED_COLOUR
        figure.add_bar(
            x=scored,
            y=values,
            error_y={"array": errors, "thickness": 0.8, "width": 2},
            name=title,
            marker_color=colour,
        )
    heading = (
        "Held-out examples: the sources and the picked merge, watched tasks included"
    )
    return [styled(figure, heading, 380)]


def trial_title(trial: Trial) -> str:
    """The name of a trial, followed by the constraints that it breaks."""
    if not trial.violations:
        return trial.name
    return f"{trial.name}, infeasible: {trial.violations}"


def _groups(results: Results, picked: Trial | None) -> list[_Group]:
    on_front = {trial.number for trial in results.front}
    others = []
    left_early = []
    infeasible = []
    for trial in results.trials:
        if trial.failure or trial.number in on_front:
            continue
        if not trial.feasible:
            if not trial.is_baseline:
                infeasible.append(trial)
        elif not trial.final:
            left_early.append(trial)
        elif not trial.is_baseline:
            others.append(trial)
    # Baselines have groups of their own, on the front or not.
    proposed: list[Trial] = []
    front_baselines: list[Trial] = []
    for trial in results.front:
        kind = front_baselines if trial.is_baseline else proposed
        kind.append(trial)
    dominated = [trial for trial in results.baselines if trial.number not in on_front]
    # Later groups are drawn over earlier ones, so the most important comes last.
    groups = [
        _Group("other trials", OTHER_COLOUR, 6, others, error_bars=False),
        _Group("left early", _LEFT_EARLY, 6, left_early),
        _Group("infeasible", _INFEASIBLE, 6, infeasible),
        _Group("baselines", BASELINE_COLOUR, 9, dominated),
        _Group("front", FRONT_COLOUR, 9, proposed),
        _Group(
            "front: baselines", BASELINE_COLOUR, 9, front_baselines, ring=FRONT_COLOUR
        ),
    ]
    groups = [group for group in groups if group.trials]
    if picked is not None:
        groups.append(_Group("picked", PICKED_COLOUR, 13, [picked]))
    return groups


def _scatter(group: _Group, x: str, y: str) -> dict[str, object]:
    trials = group.trials
    # plotly reads markup in texts: a failure or a name with `<` would vanish.
    titles = [html.escape(trial_title(trial)) for trial in trials]
    trace: dict[str, object] = {
        "x": [trial.scores[x].value for trial in trials],
        "y": [trial.scores[y].value for trial in trials],
        "text": titles,
        "hovertemplate": f"%{{text}}<br>{x} %{{x:.3f}}<br>{y} %{{y:.3f}}<extra></extra>",
        "mode": "markers",
        "marker": _marker(group),
        "name": group.name,
        "legendgroup": group.name,
    }
    if group.error_bars:
        for axis, name in (("error_x", x), ("error_y", y)):
            errors = [trial.scores[name].stderr for trial in trials]
            trace[axis] = {"array": errors, "thickness": 0.7, "width": 0}
    return trace


def _marker(group: _Group) -> dict[str, object]:
    marker: dict[str, object] = {"color": group.colour, "size": group.size}
    if group.ring:
        marker["line"] = {"color": group.ring, "width": 2}
    return marker


def _quality_against(
    size: str, qualities: Sequence[str], results: Results, picked: Trial
) -> "Figure":
    """Plot merged and stacked models, and the best quality up to each size as a staircase."""
    from plotly.graph_objects import Figure

    points: dict[int, tuple[float, float]] = {}
    routes: list[Trial] = []
    merges: list[Trial] = []
    for trial in results.trials:
        if trial.failure:
            continue
        values = [trial.scores[name].value for name in qualities]
        quality = float(np.mean(values))
        size_score = trial.scores[size]
        points[trial.number] = (size_score.value, quality)
        kind = routes if _is_route(trial) else merges
        kind.append(trial)
    figure = Figure()
    kinds = (
        ("merged in place", merges, "circle", BASELINE_COLOUR),
        ("routes", routes, "diamond", FRONT_COLOUR),
    )
    for name, trials, symbol, colour in kinds:
        if trials:
            titles = [html.escape(trial_title(trial)) for trial in trials]
            figure.add_scatter(
                x=[points[trial.number][0] for trial in trials],
                y=[points[trial.number][1] for trial in trials],
                mode="markers",
                name=name,
                text=titles,
                marker={"symbol": symbol, "color": colour, "size": 8},
            )
    # The running maximum from the smallest on: a larger model is worth its size only above this.
    by_size = sorted(points.values())
    sorted_qualities = [quality for _, quality in by_size]
    best_so_far = np.maximum.accumulate(sorted_qualities)
    figure.add_scatter(
        x=[x for x, _ in by_size],
        y=best_so_far,
        mode="lines",
        name="best with as little",
        line={"color": OTHER_COLOUR, "shape": "hv"},
    )
    x, y = points[picked.number]
    marker = {"color": PICKED_COLOUR, "size": 13}
    figure.add_scatter(x=[x], y=[y], mode="markers", name="picked", marker=marker)
    figure.update_xaxes(title_text=size)
    figure.update_yaxes(title_text=f"mean of {', '.join(qualities)}")
    return styled(figure, f"Quality against {size}, search examples", 420)


def _is_route(trial: Trial) -> bool:
    # The second level searches routes only; a first level of routes shows in the recipe.
    return bool(trial.level) or trial.recipe.merge_method == "passthrough"


def styled(figure: "Figure", heading: str, height: int) -> "Figure":
    """Give a figure its heading, its height in pixels, and the look that all have in common."""
    # plotly places the legend in shares of the panels' height, which differs between figures.
    legend_y = -_LEGEND / (height - 2 * _MARGIN)
    return figure.update_layout(
        title={"text": heading, "font": {"size": 15}},
        height=height,
        template="plotly_white",
        font={"family": "system-ui, sans-serif", "color": _INK},
        margin={"l": 60, "r": 20, "t": _MARGIN, "b": _MARGIN},
        legend={"orientation": "h", "y": legend_y},
    )
