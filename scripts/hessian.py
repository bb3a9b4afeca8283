"""The diagonal of the Hessian itself: what it looks like in a trained model, and how well it can be estimated.

    python scripts/hessian.py histogram out/gpt2_30m-cpu/adamw --out results/figure3
    python scripts/hessian.py estimators --out results/estimators

`histogram` is Figure 3: the positive entries of a checkpoint's diagonal, the mean of many Hutchinson estimates on
validation text. `estimators` draws each estimator many times on a model so small that the exact diagonals are known,
and prints its bias, its variance and what it costs; Hutchinson's with Gaussian probes and with random signs.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from analysis import plots as pictures
from data.batches import validation_windows
from data.token_files import open_tokens
from model import GPT, summed_loss
from runtime import checkpoint
from runtime.cli import Parser, number, run_main
from runtime.config import ModelConfig
from scripts.compare import format_table
from sophia import gnb_estimate, hutchinson_estimate, sampled_label_loss


def main() -> None:
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    whole = number(int, 1, 10**6)
    one = commands.add_parser("histogram", help="Figure 3, of a checkpoint", description=__doc__)
    one.add_argument("checkpoint", metavar="RUN", type=Path, help="a run's folder, or a step_….pt file")
    one.add_argument("--probes", metavar="N", type=whole, default=100, help="estimates averaged")
    one.add_argument("--windows", metavar="N", type=whole, default=32, help="validation windows")
    two = commands.add_parser(
        "estimators", help="bias, variance and cost against the exact diagonals", description=__doc__
    )
    two.add_argument("--draws", metavar="N", type=whole, default=300, help="estimates of each")
    for command in (one, two):
        command.add_argument("--out", metavar="DIR", type=Path, default=Path("out/hessian"), help="folder to write to")
    arguments = parser.parse_args()
    (histogram if arguments.command == "histogram" else estimators)(arguments)


def histogram(arguments: argparse.Namespace) -> None:
    config, model, step = checkpoint.load_model(arguments.checkpoint)
    tokens = open_tokens(Path(config.data.path), "val", config.model.text_vocab_size, config.model.block_size)
    (x, y), *_ = validation_windows(tokens, config.model, arguments.windows, arguments.windows, 0, 1)
    generator = torch.Generator().manual_seed(0)
    mean = torch.zeros(sum(p.numel() for p in model.parameters()))
    for _ in range(arguments.probes):
        mean += flat(hutchinson(model, x, y, lambda p: torch.randn(p.shape, generator=generator))) / arguments.probes
    positive = mean[mean > 0].log10()
    shares = torch.tensor([0.05, 0.5, 0.95])
    low, middle, high = (10 ** positive.quantile(shares)).tolist() if len(positive) < 2**24 else (float("nan"),) * 3
    row = {
        "run": f"{config.experiment}/{config.run}",
        "step": str(step),
        "positive": f"{len(positive) / len(mean):.1%}",
        "5 % below": f"{low:.1e}",
        "median": f"{middle:.1e}",
        "95 % below": f"{high:.1e}",
    }
    plt = pictures.pyplot()
    figure, panel = plt.subplots(figsize=(7, 4), layout="constrained")
    panel.hist(positive.numpy(), bins=100, color="#0072B2")
    panel.set(xlabel="log₁₀ of the entry, of those above 0", ylabel="parameters", title=row["run"])
    finish(arguments.out, "histogram", figure, format_table([row]))


def estimators(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)  # so small that a second one only waits
    model, x, y = tiny_problem()
    generator = torch.Generator().manual_seed(0)
    hessian, gauss_newton = exact_hessian(model, x, y), exact_gauss_newton(model, x)
    parameters = list(model.parameters())

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

    gradient = seconds(lambda: by_labels(mean_loss, y))
    draws: dict[str, tuple[Callable[[], Tensor], Tensor]] = {
        "Hutchinson, Gaussian": (lambda: flat(hutchinson(model, x, y, gaussian)), hessian),
        "Hutchinson, signs": (lambda: flat(hutchinson(model, x, y, signs)), hessian),
        "Gauss-Newton-Bartlett": (gnb, gauss_newton),
        "the same, of the Hessian": (gnb, hessian),
        "empirical Fisher": (lambda: by_labels(mean_loss, y), gauss_newton),
    }
    rows = []
    for name, (draw, exact) in draws.items():
        count = 1 if name == "empirical Fisher" else arguments.draws  # there is nothing random in it
        samples = torch.stack([draw() for _ in range(count)])
        rows.append(error_row(name, samples, exact) | {"time in gradients": f"{seconds(draw) / gradient:.2f}"})
    plt = pictures.pyplot()
    figure, panel = plt.subplots(figsize=(5, 5), layout="constrained")
    panel.loglog(hessian.clamp(min=1e-9), gauss_newton, ".", ms=2, color="#0072B2")
    panel.loglog([1e-8, 1], [1e-8, 1], color="black", lw=0.7)
    panel.set(xlabel="diagonal of the Hessian (those above 0)", ylabel="diagonal of the Gauss-Newton matrix")
    finish(arguments.out, "estimators", figure, format_table(rows))


def error_row(name: str, samples: Tensor, exact: Tensor) -> dict[str, str]:
    """Errors (draws, entries) relative to the norm of the exact diagonal.

    The mean of n unbiased draws is off by the deviation of one over √n: a bias is what exceeds that.
    """
    norm = exact.norm()
    bias = ((samples.mean(0) - exact).norm() / norm).item()
    n = len(samples)
    deviation = (samples.var(0).sum().sqrt() / norm).item() if n > 1 else 0.0
    return {
        "run": name,
        "error of the mean": f"{bias:.3f}",
        "expected if unbiased": f"{deviation / n**0.5:.3f}" if n > 1 else "0",
        "deviation of one draw": f"{deviation:.2f}",
    }


def tiny_problem() -> tuple[GPT, Tensor, Tensor]:
    """A GPT of 1,368 parameters in float64, taught for a while, so that its Hessian is not that of noise."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=8, block_size=8, vocab_size=17)).double()
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


def hutchinson(model: GPT, x: Tensor, y: Tensor, probe: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    params = {name: p.detach() for name, p in model.named_parameters()}
    with sdpa_kernel(SDPBackend.MATH):
        return hutchinson_estimate(
            lambda p: mean_loss(functional_call(model, p, (x,)), y), params, {n: probe(p) for n, p in params.items()}
        )


def exact_hessian(model: GPT, x: Tensor, y: Tensor) -> Tensor:
    """The diagonal (parameters,) of the Hessian of the mean loss, an entry at a time."""
    parameters, entries = list(model.parameters()), []
    with sdpa_kernel(SDPBackend.MATH):
        gradients = torch.autograd.grad(model(x, mean_loss, y), parameters, create_graph=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            for index, entry in enumerate(gradient.flatten()):
                entries.append(torch.autograd.grad(entry, parameter, retain_graph=True)[0].flatten()[index])
    return torch.stack(entries)


def exact_gauss_newton(model: GPT, x: Tensor) -> Tensor:
    """The diagonal of the mean over tokens of Jᵀ (diag(p) − p pᵀ) J, J being the logits' Jacobian and p = softmax."""
    parameters: list[nn.Parameter] = list(model.parameters())
    logits = model(x).flatten(0, 1)  # (tokens, V)
    p = logits.detach().softmax(-1)
    exact = torch.zeros(sum(q.numel() for q in parameters), dtype=logits.dtype)
    for n in range(len(logits)):
        rows = [torch.autograd.grad(logit, parameters, retain_graph=True) for logit in logits[n]]
        jacobian = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])  # (V, parameters)
        exact += (p[n] @ jacobian**2 - (p[n] @ jacobian) ** 2) / len(logits)
    return exact


def flat(tensors: dict) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors.values()])


def seconds(work: Callable[[], object], times: int = 30) -> float:
    """The median time of `work` on the processor, whatever else it does meanwhile."""
    taken = []
    for _ in range(times):
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return sorted(taken)[times // 2]


def finish(out: Path, name: str, figure: object, table: str) -> None:
    pictures.save(figure, [out / f"{name}.png"])
    (out / f"{name}.md").write_text(table + "\n", encoding="utf-8")
    print(table)
    print(f"wrote {name}.md and {name}.png to {out}")


if __name__ == "__main__":
    run_main(main)
