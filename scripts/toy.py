"""Draw Figure 2: five optimizers on a two-dimensional, non-convex loss.

    python scripts/toy.py --out results/figure2

The loss is sharp in x and flat in y: L(x, y) = L1(x) + L2(y), with
L1(x) = 8 (x − 1)² (1.3 x² + 2 x + 1) and L2(y) = (y − 4)² / 2. The minimum is (1, 4), where the
curvature is 69 in x and 1 in y; (0, 4) is a saddle. Every optimizer gets the exact gradient, Newton
and Sophia also the exact diagonal of the Hessian. The start and the learning rates are ours: the
paper shows its own only in the figure.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from analysis import plots
from runtime.cli import Parser, run_main
from sophia import SophiaG

START = (0.2, 0.0)  # L1 has negative curvature there
STEPS = 50


def loss(point: Tensor) -> Tensor:
    x, y = point
    return 8 * (x - 1) ** 2 * (1.3 * x**2 + 2 * x + 1) + (y - 4) ** 2 / 2


def curvature(point: Tensor) -> Tensor:
    """Return the diagonal of the Hessian."""
    return torch.func.hessian(loss)(point.detach()).diagonal()


def gradient_descent(p: Tensor, g: Tensor) -> None:
    p -= 0.02 * g  # more than 2 / 69 diverges at the minimum


def sign_descent(p: Tensor, g: Tensor) -> None:
    p -= 0.3 * g.sign()


def newton(p: Tensor, g: Tensor) -> None:
    p -= g / curvature(p)


def torch_optimizer(
    make: Callable[[list[Tensor]], torch.optim.Optimizer],
) -> Callable[[Tensor, Tensor], None]:
    """Return a step function that creates an optimizer in its first call and keeps it."""
    made: list[torch.optim.Optimizer] = []

    def step(p: Tensor, g: Tensor) -> None:
        if not made:
            made.append(make([p]))
        optimizer = made[0]
        p.grad = g
        if isinstance(optimizer, SophiaG):
            optimizer.update_hessian({p: curvature(p)})
        optimizer.step()

    return step


def make_adam(params: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=0.3, betas=(0.9, 0.95))


def make_sophia(params: list[Tensor]) -> torch.optim.Optimizer:
    return SophiaG(params, lr=0.3, betas=(0.0, 0.0), rho=0.3, eps=1e-12, weight_decay=0.0)


def methods() -> dict[str, Callable[[Tensor, Tensor], None]]:
    """Return the step function of each method."""
    return {
        "gradient descent": gradient_descent,
        "SignGD": sign_descent,
        "Adam": torch_optimizer(make_adam),
        "Newton": newton,
        "Sophia": torch_optimizer(make_sophia),
    }


def trajectory(step: Callable[[Tensor, Tensor], None], steps: int = STEPS) -> Tensor:
    """Return the points (steps + 1, 2) that a method visits."""
    p = torch.tensor(START, dtype=torch.float64)
    points = [p.clone()]
    for _ in range(steps):
        step(p, torch.func.grad(loss)(p.clone()))
        points.append(p.clone())
    return torch.stack(points)


def draw(paths: dict[str, Tensor], files: list[Path]) -> None:
    plt = plots.pyplot()
    figure, panel = plt.subplots(figsize=(7, 5), layout="constrained")

    xs, ys = torch.linspace(-0.9, 1.6, 200), torch.linspace(-0.5, 5, 200)
    x, y = torch.meshgrid(xs, ys, indexing="xy")
    levels = [0.1, 0.5, 1, 2, 4, 6, 8, 10, 12, 16, 24]
    panel.contour(x, y, loss(torch.stack([x, y])), levels=levels, colors="#cccccc")

    colors = ("#0072B2", "#E69F00", "#56B4E9", "#555555", "#CC3311")
    for (name, points), color in zip(paths.items(), colors, strict=True):
        panel.plot(points[:, 0], points[:, 1], marker="o", ms=2.5, lw=1, color=color, label=name)
    panel.plot(1, 4, marker="*", ms=14, color="black", ls="", label="minimum")
    panel.plot(0, 4, marker="X", ms=8, color="black", ls="", label="saddle")
    panel.set(xlabel="x, sharp", ylabel="y, flat", xlim=(-0.9, 1.6), ylim=(-0.5, 5))
    panel.legend(frameon=False, loc="lower left")
    plots.save(figure, files)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument(
        "--out", metavar="DIR", type=Path, default=Path("out/figure2"), help="folder to write to"
    )
    out = parser.parse_args().out

    paths = {name: trajectory(step) for name, step in methods().items()}
    lines = ["| method | x | y | loss after 50 steps |", "| --- | ---: | ---: | ---: |"]
    for name, points in paths.items():
        x, y = points[-1]
        lines.append(f"| {name} | {x:.3f} | {y:.3f} | {loss(points[-1]):.2e} |")
    print("\n".join(lines))
    draw(paths, [out / "toy.png"])
    (out / "toy.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"wrote toy.md and toy.png to {out}")


if __name__ == "__main__":
    run_main(main)
