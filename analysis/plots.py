"""Curves of runs: images with matplotlib, and an interactive page with plotly."""

from __future__ import annotations

import html
import importlib.util
import itertools
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis.runs import Group, StoredRun, step_flops, tokens_per_step
from runtime.config import from_stored
from runtime.cost import num_parameters

# Safe for colour-blind readers (Okabe and Ito, Tol), the same per optimizer in all our plots.
COLORS = {
    "adamw": "#0072B2",
    "lion": "#E69F00",
    "sophia-g": "#009E73",
    "sophia-h": "#CC3311",
    "muon": "#AA4499",
    "soap": "#56B4E9",
    "adahessian": "#882255",
}
OTHERS = ("#555555", "#999933", "#117733", "#332288", "#DDCC77", "#88CCEE")  # in this order
LINE_STYLES = ("-", "--", ":", "-.")  # from the longest horizon to the shortest
AXES = {
    "step": "steps",
    "tokens": "million tokens",
    "flops": "TFLOP, with estimates",
    "seconds": "seconds",
}


@dataclass(frozen=True)
class Curve:
    """Validation losses of a run of the experiment file at one horizon, the mean over seeds."""

    name: str
    horizon: int
    color: str
    style: str
    label: str
    x: dict[str, list[float]]  # by AXES
    losses: list[float]
    low: list[float]  # the lowest and highest of the seeds
    high: list[float]


def curves(runs: list[StoredRun]) -> list[Curve]:
    """Return one curve for each run of the experiment file, model and horizon.

    Among several settings, as in a sweep, the best finished one is drawn, and of its seeds those
    that have finished. Losses before training and those that are not finite are left out.
    """
    chosen = best_settings(runs)
    horizons = sorted({seeds[0].horizon for seeds in chosen}, reverse=True)
    one_task = len({seeds[0].task for seeds in chosen}) == 1
    names = [seeds[0].table if one_task else Group(seeds).name for seeds in chosen]
    optimizers = {name: seeds[0].optimizer for name, seeds in zip(names, chosen, strict=True)}
    colors = colors_of(optimizers)

    found = []
    for name, seeds in zip(names, chosen, strict=True):
        horizon = seeds[0].horizon
        steps, losses = common_validations(seeds)
        if not steps:
            continue
        tokens, flops = tokens_per_step(seeds[0].config), step_flops(seeds[0].config)
        x = {
            "step": [float(step) for step in steps],
            "tokens": [step * tokens / 1e6 for step in steps],
            "flops": [step * flops / 1e12 for step in steps],
            "seconds": [mean_seconds(seeds, step) for step in steps],
        }
        state = "" if all(run.is_finished for run in seeds) else ", unfinished"
        if any(run.is_diverged for run in seeds):
            state = ", diverged"
        final = f"{statistics.fmean(losses[-1]):.3f}"
        if len(horizons) > 1:
            final += f" at {horizon:,} steps"
        found.append(
            Curve(
                name,
                horizon,
                colors[name],
                LINE_STYLES[horizons.index(horizon) % len(LINE_STYLES)],
                f"{name}  {final}{state}",
                x,
                [statistics.fmean(values) for values in losses],
                [min(values) for values in losses],
                [max(values) for values in losses],
            )
        )
    return found


def best_settings(runs: list[StoredRun]) -> list[list[StoredRun]]:
    """Return the runs with the best settings, one per seed, of each table, task and horizon."""
    by_settings: dict[str, dict[int, StoredRun]] = {}
    for run in runs:
        by_settings.setdefault(run.settings, {}).setdefault(run.seed, run)

    chosen: dict[tuple[str, str, int], list[StoredRun]] = {}
    for seeds in by_settings.values():
        ended = [run for run in seeds.values() if run.is_finished or run.is_diverged]
        candidate = ended or list(seeds.values())
        key = (candidate[0].table, candidate[0].task, candidate[0].horizon)
        if key not in chosen or rank(candidate) < rank(chosen[key]):
            chosen[key] = candidate
    return list(chosen.values())


def rank(runs: list[StoredRun]) -> tuple[bool, tuple[bool, int, float]]:
    """Return what sorts settings: finished ones first, then as in the tables."""
    return (not all(run.is_finished for run in runs), Group(runs).rank)


def common_validations(runs: list[StoredRun]) -> tuple[list[int], list[list[float]]]:
    """Return the steps after 0 at which all runs had a finite loss, and the losses there."""
    by_step: dict[int, list[float]] = {}
    for run in runs:
        for point in run.validations:
            by_step.setdefault(point["step"], []).append(point["val_loss"])

    steps, losses = [], []
    for step in sorted(by_step):
        values = by_step[step]
        is_common = len(values) == len(runs) and all(math.isfinite(value) for value in values)
        if step > 0 and is_common:
            steps.append(step)
            losses.append(values)
    return steps, losses


def mean_seconds(runs: list[StoredRun], step: int) -> float:
    """Return the seconds that the runs took for their first steps."""
    seconds = []
    for run in runs:
        seconds += [point["seconds"] for point in run.validations if point["step"] == step]
    return statistics.fmean(seconds)


def color_of(optimizer: str) -> str:
    """Return the optimizer's colour."""
    return COLORS.get(optimizer, OTHERS[0])


def colors_of(optimizers: dict[str, str]) -> dict[str, str]:
    """Return a colour for each run of an experiment file: its optimizer's, if that is free."""
    colors: dict[str, str] = {}
    free = itertools.cycle(OTHERS)
    for table, optimizer in optimizers.items():
        color = COLORS.get(optimizer)
        colors[table] = color if color and color not in colors.values() else next(free)
    return colors


def draw_curves(runs: list[StoredRun], paths: list[Path]) -> None:
    """Draw one panel per axis, with a shared loss axis."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator, NullFormatter

    plt = pyplot()
    figure, panels = plt.subplots(
        1, len(AXES), figsize=(16, 4.4), sharey=True, layout="constrained"
    )
    drawn = curves(runs)
    for curve in drawn:
        for panel, axis in zip(panels, AXES, strict=True):
            x = curve.x[axis]
            panel.plot(x, curve.losses, curve.style, color=curve.color, lw=1.4, marker="o", ms=2.5)
            panel.fill_between(x, curve.low, curve.high, color=curve.color, alpha=0.2, lw=0)

    is_logarithmic = spans_decades(drawn)
    for panel, label in zip(panels, AXES.values(), strict=True):
        panel.set_xlabel(label)
        if is_logarithmic:
            panel.set_xscale("log")
            panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.xaxis.set_major_formatter("{x:g}")
            panel.xaxis.set_minor_formatter(NullFormatter())
    panels[0].set_ylabel("validation loss, nats per token")
    figure.suptitle(heading(runs).replace("$", r"\$"), fontsize="medium")

    # Colours stand for runs of the file, with their losses at the longest horizon; dashes for
    # horizons.
    entries: list[Line2D] = []
    names: set[str] = set()
    horizons: dict[int, str] = {}
    for curve in sorted(drawn, key=lambda curve: -curve.horizon):
        if curve.name not in names:
            names.add(curve.name)
            label = curve.label.replace("$", r"\$")
            entries.append(Line2D([], [], color=curve.color, label=label))
        horizons.setdefault(curve.horizon, curve.style)
    if len(horizons) > 1:
        for horizon, style in horizons.items():
            steps = f"{horizon:,} steps"
            entries.extend(panels[-1].plot([], [], style, color="black", label=steps))
    panels[-1].legend(handles=entries, frameon=False, title="run, final loss", fontsize="small")
    save(figure, paths)


def spans_decades(drawn: list[Curve]) -> bool:
    """Return whether a logarithmic axis helps: the longest horizon is four times the shortest."""
    horizons = [curve.horizon for curve in drawn]
    return bool(horizons) and max(horizons) >= 4 * min(horizons)


def heading(runs: list[StoredRun]) -> str:
    """Return what the runs are, as far as they agree: experiment, model, batch, seeds."""
    experiments = ", ".join(dict.fromkeys(run.config["experiment"] for run in runs))
    shapes = set()
    for run in runs:
        config = from_stored(run.config)
        train, T = config.train, config.model.block_size
        n = num_parameters(config.model)
        shapes.add(f"{n / 1e6:,.3g}M parameters, batches of {train.batch_size} × {T:,} tokens")
    seeds = len({run.seed for run in runs})
    parts = [experiments, *(shapes if len(shapes) == 1 else [])]
    if seeds > 1:
        parts.append("mean, lowest and highest over seeds")
    return ": ".join(parts[:2]) + "".join(f"; {part}" for part in parts[2:])


def pyplot() -> Any:
    """Return matplotlib's pyplot without a display, in the style of all our plots."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update(
        {
            "axes.grid": True,
            "grid.color": "#dddddd",
            "grid.linewidth": 0.6,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "svg.hashsalt": "",
            "svg.fonttype": "none",
        }
    )
    return plt


def save(figure: Any, paths: list[Path]) -> None:
    """Write a figure to files of the types that their names say, and close it."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Without a date, so that the same runs give the same file.
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, dpi=130, metadata=metadata)
    pyplot().close(figure)


STYLE = """
body { font-family: system-ui, sans-serif; line-height: 1.4; max-width: 70rem; margin: 1rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.3rem; }
h2 { font-size: 1.1rem; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.85rem; }
th, td { border-bottom: 1px solid #ddd; padding: 0.3rem 0.6rem; text-align: right;
         white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
"""


def write_page(runs: list[StoredRun], texts: tuple[str, str], path: Path) -> bool:
    """Write a self-contained HTML page: verdict, interactive charts, tables.

    Args:
        runs: what to draw.
        texts: HTML above and below the first chart.
        path: file to write.

    Returns False, and writes nothing, if plotly is not installed.
    """
    if not importlib.util.find_spec("plotly"):
        return False
    from plotly.io import to_html

    drawn = curves(runs)
    charts: list[str] = []
    for axis, title in AXES.items():
        # The library itself, several MB, is embedded with the first chart only.
        figure = make_chart(drawn, axis, title)
        options = {"responsive": True, "displaylogo": False}
        charts.append(to_html(figure, full_html=False, include_plotlyjs=not charts, config=options))

    first, *others = charts
    above, below = texts
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head += f"<title>Comparison of runs</title><style>{STYLE}</style>"
    title = f"<h1>{html.escape(heading(runs))}</h1>"
    more = f"<h2>Against tokens, FLOPs and seconds</h2>{''.join(others)}"
    body = f"{title}{above}{first}{below}{more}"
    page = f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>'
    path.write_text(page, encoding="utf-8")
    return True


def make_chart(drawn: list[Curve], axis: str, title: str) -> Any:
    """Return plotly's figure of the losses against one axis, with a band over seeds."""
    from plotly import graph_objects

    dashes = {"-": "solid", "--": "dash", ":": "dot", "-.": "dashdot"}
    one_horizon = len({curve.horizon for curve in drawn}) == 1
    figure = graph_objects.Figure()
    for curve in drawn:
        x = curve.x[axis]
        name = curve.label if one_horizon else f"{curve.label} ({curve.horizon:,} steps)"
        band = {"x": x + x[::-1], "y": curve.high + curve.low[::-1], "fill": "toself"}
        figure.add_scatter(
            **band,
            fillcolor=curve.color,
            opacity=0.15,
            line={"width": 0},
            mode="lines",
            hoverinfo="skip",
            showlegend=False,
            legendgroup=name,
        )
        figure.add_scatter(
            x=x,
            y=curve.losses,
            name=name,
            legendgroup=name,
            mode="lines+markers",
            line={"color": curve.color, "dash": dashes[curve.style]},
        )
    figure.update_layout(
        xaxis_title=title,
        yaxis_title="validation loss, nats per token",
        xaxis_type="log" if spans_decades(drawn) else "linear",
        template="plotly_white",
        legend={"orientation": "h", "y": -0.25},
        margin={"l": 50, "r": 10, "t": 20},
    )
    return figure
