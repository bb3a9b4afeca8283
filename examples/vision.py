"""Compare Sophia with AdamW on images.

    python examples/vision.py           # seconds on a CPU; needs requirements-examples.txt

The model is a small convolutional network, the data scikit-learn's 1,797 handwritten digits
(8 × 8 pixels). Both estimators work for any classifier: Gauss-Newton-Bartlett needs only its
logits, Hutchinson any twice differentiable loss. The learning rates were not tuned: the example
shows how to use the optimizers, not which one is better.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import AdamW, Optimizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sophia import SophiaG, SophiaH, hutchinson_estimate, sampled_label_loss


def make_model() -> nn.Module:
    """Return the network, with the same initial weights at every call."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.GELU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


def estimate_gnb(model: nn.Module, optimizer: SophiaG, x: Tensor, y: Tensor) -> None:
    """Update h with a Gauss-Newton-Bartlett estimate."""
    sampled_label_loss(model(x), torch.rand(len(y))).backward()
    optimizer.update_hessian_from_grad(n_labels=len(y))
    optimizer.zero_grad()


def estimate_hutchinson(model: nn.Module, optimizer: SophiaH, x: Tensor, y: Tensor) -> None:
    """Update h with a Hutchinson estimate."""

    def loss(params: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(functional_call(model, params, (x,)), y)

    params = {name: p.detach() for name, p in model.named_parameters()}
    probes = {name: torch.randn_like(p) for name, p in params.items()}
    estimates = hutchinson_estimate(loss, params, probes)
    optimizer.update_hessian({p: estimates[name] for name, p in model.named_parameters()})


def train(
    make: Callable[..., Optimizer], estimate: Callable[..., None] | None, epochs: int = 8
) -> float:
    """Train on all images but the last 360, and return the share of errors on these.

    Args:
        make: returns the optimizer of the given parameters.
        estimate: updates the Hessian estimate, every 10 steps; None for AdamW.
        epochs: the number of passes over the training images.
    """
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)

    model = make_model()
    optimizer = make(model.parameters())

    step = 0
    for _ in range(epochs):
        for batch in torch.randperm(1437).split(64):
            x, y = images[batch], labels[batch]
            if estimate and step % 10 == 0:
                estimate(model, optimizer, x, y)

            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1

    with torch.no_grad():
        return (model(images[1437:]).argmax(1) != labels[1437:]).float().mean().item()


def main() -> None:
    def sophia(kind: type[SophiaG] | type[SophiaH]) -> Callable[..., Optimizer]:
        return lambda params: kind(params, lr=1e-3, betas=(0.9, 0.95), rho=0.05, weight_decay=0.1)

    errors = train(lambda params: AdamW(params, lr=1e-3, weight_decay=0.1), None)
    print(f"AdamW     errors {errors:.1%}")

    errors = train(sophia(SophiaG), estimate_gnb)
    print(f"Sophia-G  errors {errors:.1%}")

    errors = train(sophia(SophiaH), estimate_hutchinson)
    print(f"Sophia-H  errors {errors:.1%}")


if __name__ == "__main__":
    main()
