"""Curves of runs: images with matplotlib, and an interactive page with plotly."""

from __future__ import annotations

import html
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis.runs import StoredRun, step_flops

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
OTHER = "#555555"
LINE_STYLES = ("-", "--", ":", "-.")
AXES = {
    "step": "steps",
    "tokens": "million tokens",
    "flops": "TFLOP, with estimates",
    "seconds": "seconds",
}
MAX_LABELS = 16  # with more runs the legend names each optimizer once


@dataclass(frozen=True)
class Curve:
    """A run's validation losses against each of AXES."""

    label: str
    optimizer: str
    x: dict[str, list[float]]
    losses: list[float]


def curves(runs: list[StoredRun]) -> Iterator[Curve]:
    """Yield the runs' curves, without the loss before training."""
    one_experiment = len({run.config["experiment"] for run in runs}) == 1
    for run in runs:
        points = [point for point in run.validations if point["step"] > 0] or run.validations
        name = run.config["run"] if one_experiment else run.name
        flops = step_flops(run.config)
        x = {
            "step": [point["step"] for point in points],
            "tokens": [point["tokens"] / 1e6 for point in points],
            "flops": [point["step"] * flops / 1e12 for point in points],
            "seconds": [point["seconds"] for point in points],
        }
        losses = [point["val_loss"] for point in points]
        yield Curve(f"{name}  {losses[-1]:.3f}", run.optimizer, x, losses)


def color_of(optimizer: str) -> str:
    """Return the optimizer's colour."""
    return COLORS.get(optimizer, OTHER)


def draw_curves(runs: list[StoredRun], paths: list[Path]) -> None:
    """Draw one panel per axis, with a shared loss axis."""
    plt = pyplot()
    figure, panels = plt.subplots(1, len(AXES), figsize=(16, 4), sharey=True, layout="constrained")
    is_crowded = len(runs) > MAX_LABELS
    drawn: dict[str, int] = {}
    for curve in curves(runs):
        label = curve.label.replace("$", r"\$")
        if is_crowded:
            # matplotlib leaves out labels that start with an underscore.
            label = f"_{label}" if curve.optimizer in drawn else curve.optimizer
        index = drawn.get(curve.optimizer, 0)
        drawn[curve.optimizer] = index + 1
        for panel, axis in zip(panels, AXES, strict=True):
            panel.plot(
                curve.x[axis],
                curve.losses,
                LINE_STYLES[index % len(LINE_STYLES)],
                label=label,
                color=color_of(curve.optimizer),
                lw=1.4,
                marker="o",
                ms=2.5,
                alpha=0.85,
            )

    for panel, label in zip(panels, AXES.values(), strict=True):
        panel.set_xlabel(label)
    panels[0].set_ylabel("validation loss, nats per token")
    title = "optimizer" if is_crowded else "run, final loss"
    panels[-1].legend(frameon=False, title=title, fontsize="small")
    save(figure, paths)


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


def write_page(runs: list[StoredRun], report: str, path: Path) -> bool:
    """Write a self-contained HTML page with the report and an interactive chart per axis.

    Returns False, and writes nothing, if plotly is not installed.
    """
    if not importlib.util.find_spec("plotly"):
        return False
    from plotly import graph_objects
    from plotly.io import to_html

    charts: list[str] = []
    for axis, title in AXES.items():
        figure = graph_objects.Figure()
        for curve in curves(runs):
            figure.add_scatter(
                x=curve.x[axis],
                y=curve.losses,
                name=curve.label,
                mode="lines+markers",
                line={"color": color_of(curve.optimizer)},
            )
        figure.update_layout(
            xaxis_title=title,
            yaxis_title="validation loss, nats per token",
            template="plotly_white",
        )
        # The library itself, several MB, is embedded with the first chart only.
        charts.append(to_html(figure, full_html=False, include_plotlyjs=not charts))

    body = f"<pre>{html.escape(report)}</pre>{''.join(charts)}"
    head = '<meta charset="utf-8"><title>Comparison of runs</title>'
    page = f'<!doctype html><html lang="en">{head}<body>{body}</body></html>'
    path.write_text(page, encoding="utf-8")
    return True
