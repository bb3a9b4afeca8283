"""Curves of runs: a picture for print (matplotlib), and a page to look into (plotly), readable without a network."""

from __future__ import annotations

import html
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from analysis.runs import Run, step_flops

# Colour-blind safe (Okabe and Ito, Tol), one colour an optimizer in all pictures of this repository.
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
AXES = {"step": "steps", "tokens": "million tokens", "flops": "TFLOP, estimates counted", "seconds": "seconds"}


def curves(runs: list[Run]) -> Iterator[tuple[str, str, dict[str, list[float]], list[float]]]:
    """(label, optimizer, {axis: values}, losses) of each run; the loss before training is left out."""
    one_experiment = len({run.config["experiment"] for run in runs}) == 1
    for run in runs:
        points = [r for r in run.validations if r["step"] > 0] or run.validations
        name = run.config["run"] if one_experiment else run.name
        flops = step_flops(run.config)
        axes = {
            "step": [r["step"] for r in points],
            "tokens": [r["tokens"] / 1e6 for r in points],
            "flops": [r["step"] * flops / 1e12 for r in points],
            "seconds": [r["seconds"] for r in points],
        }
        yield f"{name}  {points[-1]['val_loss']:.3f}", run.optimizer, axes, [r["val_loss"] for r in points]


def draw_curves(runs: list[Run], paths: list[Path]) -> None:
    """A panel an axis; they share the loss axis."""
    plt = pyplot()
    figure, panels = plt.subplots(1, len(AXES), figsize=(16, 4), sharey=True, layout="constrained")
    drawn: dict[str, int] = {}
    crowded = len(runs) > 16  # a sweep: then the legend names each optimizer once
    for label, optimizer, axes, losses in curves(runs):
        if crowded:
            label = f"_{label}" if optimizer in drawn else optimizer
        style = LINE_STYLES[drawn.get(optimizer, 0) % len(LINE_STYLES)]
        drawn[optimizer] = drawn.get(optimizer, 0) + 1
        look = {"color": COLORS.get(optimizer, OTHER), "lw": 1.4, "marker": "o", "ms": 2.5, "alpha": 0.85}
        for panel, axis in zip(panels, AXES, strict=True):
            panel.plot(axes[axis], losses, style, label=label.replace("$", r"\$"), **look)
    for panel, label in zip(panels, AXES.values(), strict=True):
        panel.set_xlabel(label)
    panels[0].set_ylabel("validation loss, nats a token")
    # Curves of whole schedules: their ends may be compared, their middles not.
    panels[-1].legend(frameon=False, title="optimizer" if crowded else "run, final loss", fontsize="small")
    save(figure, paths)


def pyplot() -> Any:
    """matplotlib without a screen, with the look of all our pictures."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    look: Any = {"axes.grid": True, "grid.color": "#dddddd", "grid.linewidth": 0.6, "axes.spines.top": False} | {
        "axes.spines.right": False,
        "svg.hashsalt": "",
        "svg.fonttype": "none",
    }
    plt.rcParams.update(look)
    return plt


def save(figure: Any, paths: list[Path]) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        # No date in it: the same runs make the same file.
        figure.savefig(path, dpi=130, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot().close(figure)


def write_page(runs: list[Run], report: str, path: Path) -> None:
    """One HTML file, complete in itself: the report, and a chart for each axis with values under the pointer."""
    from plotly import graph_objects
    from plotly.io import to_html

    charts: list[str] = []
    for axis, title in AXES.items():
        figure = graph_objects.Figure()
        for label, optimizer, axes, losses in curves(runs):
            line = {"color": COLORS.get(optimizer, OTHER)}
            figure.add_scatter(x=axes[axis], y=losses, name=label, mode="lines+markers", line=line)
        figure.update_layout(xaxis_title=title, yaxis_title="validation loss, nats a token", template="plotly_white")
        charts.append(to_html(figure, full_html=False, include_plotlyjs=not charts))
    body = f"<pre>{html.escape(report)}</pre>{''.join(charts)}"
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Runs compared</title><body>{body}</body></html>'
    )
    path.write_text(page, encoding="utf-8")
