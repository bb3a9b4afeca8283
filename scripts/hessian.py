"""Look at the diagonal of the Hessian: its distribution in a model, and how well it is estimated.

    python scripts/hessian.py histogram out/gpt2_30m-cpu/adamw --out results/figure3
    python scripts/hessian.py estimators --out results/estimators

`histogram` is Figure 3: the positive entries of a checkpoint's diagonal, as the mean of many
Hutchinson estimates on validation text. `estimators` draws each estimator many times on a model so
small that the exact diagonals are known, and prints bias, variance and cost; Hutchinson's with
Gaussian probes and with random signs.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from analysis import plots
from analysis.report import Row, format_table
from data.batches import validation_windows
from data.token_files import open_tokens
from model import GPT, ModelConfig, summed_loss
from runtime import checkpoint
from runtime.cli import Parser, number, run_main
from runtime.distributed import Ranks
from sophia import gnb_estimate, hutchinson_estimate, sampled_label_loss


def main() -> None:
    arguments = parse_arguments()
    if arguments.command == "histogram":
        figure, table = histogram(arguments.checkpoint, arguments.windows, arguments.probes)
    else:
        figure, table = estimators(arguments.draws)

    out, name = arguments.out, arguments.command
    plots.save(figure, [out / f"{name}.png"])
    (out / f"{name}.md").write_text(table + "\n", encoding="utf-8")
    print(table)
    print(f"wrote {name}.md and {name}.png to {out}")


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    whole = number(int, 1, 10**6)

    one = commands.add_parser("histogram", help="Figure 3, of a checkpoint", description=__doc__)
    add = one.add_argument
    add("checkpoint", metavar="RUN", type=Path, help="a run's folder, or a step_….pt file")
    add("--probes", metavar="N", type=whole, default=100, help="estimates to average")
    add("--windows", metavar="N", type=whole, default=32, help="validation windows")

    text = "bias, variance and cost against the exact diagonals"
    two = commands.add_parser("estimators", help=text, description=__doc__)
    two.add_argument("--draws", metavar="N", type=whole, default=300, help="estimates of each")
    for command in (one, two):
        command.add_argument(
            "--out", metavar="DIR", type=Path, default=Path("out/hessian"), help="where to write"
        )
    return parser.parse_args()


# ---- Figure 3 ------------------------------------------------------------------------------------


def histogram(path: Path, n_windows: int, n_probes: int) -> tuple[Any, str]:
    """Return a histogram of a checkpoint's positive diagonal entries, and a table."""
    config, model, step = checkpoint.load_model(path)
    shape = config.model
    tokens = open_tokens(config.data_folder, "val", shape.text_vocab_size, shape.block_size)
    x, y = next(iter(validation_windows(tokens, shape, n_windows, n_windows, Ranks())))

    generator = torch.Generator().manual_seed(0)

    def gaussian(p: Tensor) -> Tensor:
        return torch.randn(p.shape, generator=generator)

    mean = torch.zeros(sum(p.numel() for p in model.parameters()))
    for _ in range(n_probes):
        mean += flat(hutchinson(model, x, y, gaussian)) / n_probes

    positive = mean[mean > 0].log10()
    low, middle, high = (float("nan"),) * 3
    if len(positive) < 2**24:  # the most that torch.quantile takes
        quantiles = positive.quantile(torch.tensor([0.05, 0.5, 0.95]))
        low, middle, high = (10**quantiles).tolist()
    row = {
        "run": f"{config.experiment}/{config.run}",
        "step": str(step),
        "positive": f"{len(positive) / len(mean):.1%}",
        "5 % below": f"{low:.1e}",
        "median": f"{middle:.1e}",
        "95 % below": f"{high:.1e}",
    }

    plt = plots.pyplot()
    figure, panel = plt.subplots(figsize=(7, 4), layout="constrained")
    panel.hist(positive.numpy(), bins=100, color="#0072B2")
    panel.set(xlabel="log₁₀ of the positive entries", ylabel="parameters", title=row["run"])
    return figure, format_table([row])


# ---- The estimators against the exact diagonals --------------------------------------------------


def estimators(n_draws: int) -> tuple[Any, str]:
    """Return a plot of the two exact diagonals, and a table of each estimator's errors."""
    torch.set_num_threads(1)  # the model is too small for a second thread
    model, x, y = tiny_problem()
    generator = torch.Generator().manual_seed(0)
    parameters = list(model.parameters())
    hessian = exact_hessian(model, x, y)
    gauss_newton = exact_gauss_newton(model, x)

    def gaussian(p: Tensor) -> Tensor:
        return torch.randn(p.shape, generator=generator, dtype=p.dtype)

    def signs(p: Tensor) -> Tensor:
        return torch.randint(2, p.shape, generator=generator).to(p.dtype) * 2 - 1

    def by_labels(criterion: Callable[..., Tensor], labels: Tensor) -> Tensor:
        model.zero_grad()
        model(x, criterion, labels).backward()
        return flat(gnb_estimate(parameters, n_labels=y.numel()))

    def gnb() -> Tensor:
        return by_labels(sampled_label_loss, torch.rand(y.shape, generator=generator))

    def empirical_fisher() -> Tensor:
        return by_labels(mean_loss, y)

    draws: dict[str, tuple[Callable[[], Tensor], Tensor]] = {
        "Hutchinson, Gaussian": (lambda: flat(hutchinson(model, x, y, gaussian)), hessian),
        "Hutchinson, signs": (lambda: flat(hutchinson(model, x, y, signs)), hessian),
        "Gauss-Newton-Bartlett": (gnb, gauss_newton),
        "the same, of the Hessian": (gnb, hessian),
        "empirical Fisher": (empirical_fisher, gauss_newton),
    }
    gradient_seconds = seconds(empirical_fisher)
    rows = []
    for name, (draw, exact) in draws.items():
        count = 1 if draw is empirical_fisher else n_draws  # it is not random
        samples = torch.stack([draw() for _ in range(count)])
        cost = seconds(draw) / gradient_seconds
        rows.append(error_row(name, samples, exact) | {"time in gradients": f"{cost:.2f}"})

    plt = plots.pyplot()
    figure, panel = plt.subplots(figsize=(5, 5), layout="constrained")
    panel.loglog(hessian.clamp(min=1e-9), gauss_newton, ".", ms=2, color="#0072B2")
    panel.loglog([1e-8, 1], [1e-8, 1], color="black", lw=0.7)
    panel.set(
        xlabel="diagonal of the Hessian (positive entries)",
        ylabel="diagonal of the Gauss-Newton matrix",
    )
    return figure, format_table(rows)


def error_row(name: str, samples: Tensor, exact: Tensor) -> Row:
    """Return the errors of samples (draws, entries), relative to the norm of the exact diagonal.

    The mean of n unbiased draws is off by the deviation of one over √n. A bias is what exceeds it.
    """
    norm = exact.norm()
    n = len(samples)
    bias = ((samples.mean(0) - exact).norm() / norm).item()
    deviation = (samples.var(0).sum().sqrt() / norm).item() if n > 1 else 0.0
    return {
        "run": name,
        "error of the mean": f"{bias:.3f}",
        "expected if unbiased": f"{deviation / n**0.5:.3f}" if n > 1 else "0",
        "deviation of one draw": f"{deviation:.2f}",
    }


def tiny_problem() -> tuple[GPT, Tensor, Tensor]:
    """Return a GPT of 1,368 parameters in float64 with inputs and targets.

    It is trained for a while, so that its Hessian is not that of random weights.
    """
    torch.manual_seed(0)
    shape = ModelConfig(n_layer=1, n_head=2, n_embd=8, block_size=8, vocab_size=17)
    model = GPT(shape).double()
    x = torch.randint(17, (8, 8))
    y = (2 * x + 1) % 17
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model(x, mean_loss, y).backward()
        optimizer.step()
    return model, x, y


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return summed_loss(logits, targets) / (targets >= 0).sum()


def hutchinson(
    model: GPT, x: Tensor, y: Tensor, probe: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """Return {parameter name: one Hutchinson estimate}."""
    params = {name: p.detach() for name, p in model.named_parameters()}
    probes = {name: probe(p) for name, p in params.items()}

    def loss(p: dict[str, Tensor]) -> Tensor:
        return mean_loss(functional_call(model, p, (x,)), y)

    with sdpa_kernel(SDPBackend.MATH):
        return hutchinson_estimate(loss, params, probes)


def exact_hessian(model: GPT, x: Tensor, y: Tensor) -> Tensor:
    """Return the diagonal (parameters,) of the Hessian of the mean loss, entry by entry."""
    parameters = list(model.parameters())
    entries = []
    with sdpa_kernel(SDPBackend.MATH):
        gradients = torch.autograd.grad(model(x, mean_loss, y), parameters, create_graph=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            for index, entry in enumerate(gradient.flatten()):
                (row,) = torch.autograd.grad(entry, parameter, retain_graph=True)
                entries.append(row.flatten()[index])
    return torch.stack(entries)


def exact_gauss_newton(model: GPT, x: Tensor) -> Tensor:
    """Return the diagonal (parameters,) of the Gauss-Newton matrix of the mean loss.

    It is the mean over tokens of Jᵀ (diag(p) − p pᵀ) J, where J is the Jacobian of the logits and
    p = softmax(logits).
    """
    parameters: list[nn.Parameter] = list(model.parameters())
    logits = model(x).flatten(0, 1)  # (tokens, V)
    p = logits.detach().softmax(-1)
    exact = torch.zeros(sum(q.numel() for q in parameters), dtype=logits.dtype)
    for n in range(len(logits)):
        rows = []
        for logit in logits[n]:
            gradients = torch.autograd.grad(logit, parameters, retain_graph=True)
            rows.append(torch.cat([g.flatten() for g in gradients]))
        jacobian = torch.stack(rows)  # (V, parameters)
        exact += (p[n] @ jacobian**2 - (p[n] @ jacobian) ** 2) / len(logits)
    return exact


def flat(tensors: dict) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors.values()])


def seconds(work: Callable[[], object], times: int = 30) -> float:
    """Return the median CPU time of `work`."""
    taken = []
    for _ in range(times):
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return sorted(taken)[times // 2]


if __name__ == "__main__":
    run_main(main)
