r"""SOAP (Vyas et al., arXiv 2409.11321): Adam in the eigenbasis of Shampoo's preconditioner.

.. math::
    L \leftarrow \beta_2 L + (1 - \beta_2) g g^T, \qquad
    R \leftarrow \beta_2 R + (1 - \beta_2) g^T g

Adam's second moment belongs to :math:`Q_L^T g Q_R`, where the columns of :math:`Q_L` and
:math:`Q_R` are eigenvectors of L and R. Every `frequency` steps these are brought up to date by one
step of power iteration and a QR decomposition.

This file needs only torch; copy it into any project.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

FREQUENCY = 10  # steps between updates of the eigenbases, by default


class SOAP(Optimizer):
    """Implements SOAP for matrices.

    The first step only initializes the eigenbases, as in the authors' code. If the attribute
    ``found_inf`` is set to a 0-dim tensor of 1, a step changes no tensor, whatever the gradients
    contain, but counts as a step. No host sync is needed, except in the first step.

    Args:
        params: matrices, or dicts of parameter groups.
        lr: learning rate.
        betas: decay of the momentum, and of the second moment and the preconditioner.
        eps: added to the denominator.
        weight_decay: decoupled weight decay, multiplied by lr.
        frequency: steps between updates of the eigenbases.

    Raises:
        ValueError: if a hyperparameter is out of range, or a parameter is not a matrix.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        frequency: int = FREQUENCY,
    ) -> None:
        if not lr >= 0.0:
            raise ValueError(f"Invalid learning rate: {lr}")
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"Invalid betas: {betas}")
        if not eps >= 0.0:
            raise ValueError(f"Invalid epsilon value: {eps}")
        if not weight_decay >= 0.0:
            raise ValueError(f"Invalid weight_decay value: {weight_decay}")
        if frequency < 1:
            raise ValueError(f"Invalid frequency: {frequency}")

        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"frequency": frequency, "step": 0})
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim != 2:
                    raise ValueError(f"SOAP updates matrices, not a tensor of shape {p.shape}")

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        """Update all parameters that have a gradient.

        Args:
            closure: re-evaluates the model and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        found_inf = getattr(self, "found_inf", None)
        for group in self.param_groups:
            group["step"] += 1
            for p in group["params"]:
                if p.grad is not None:
                    _update(p, self.state[p], group, found_inf)
        return loss


def _update(
    p: Tensor, state: dict[str, Any], group: dict[str, Any], found_inf: Tensor | None
) -> None:
    grad, step, (beta1, beta2) = p.grad, group["step"] - 1, group["betas"]
    assert grad is not None
    weight: float | Tensor = 1.0  # 0 if the step is to change nothing
    if found_inf is not None:
        weight = 1 - found_inf.float()
        grad = torch.where(found_inf.bool(), 0.0, grad)

    if not state:
        rows, columns = p.shape
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        state["left"], state["right"] = p.new_zeros(rows, rows), p.new_zeros(columns, columns)
        _average(state, grad, (1 - beta2) * weight)
        state["left_basis"] = torch.linalg.eigh(state["left"])[1].flip(1)
        state["right_basis"] = torch.linalg.eigh(state["right"])[1].flip(1)
    if step == 0:
        return

    # Adam, with the second moment in the eigenbasis.
    left, right = state["left_basis"], state["right_basis"]
    state["exp_avg"].lerp_(grad, (1 - beta1) * weight)
    state["exp_avg_sq"].lerp_((left.T @ grad @ right).square(), (1 - beta2) * weight)
    momentum = left.T @ state["exp_avg"] @ right / (1 - beta1**step)
    denominator = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt() + group["eps"]
    update = left @ (momentum / denominator) @ right.T

    p.mul_(1 - group["lr"] * group["weight_decay"] * weight)
    p.sub_(update * (group["lr"] * weight))

    _average(state, grad, (1 - beta2) * weight)
    if step % group["frequency"] == 0:
        _turn_bases(state, found_inf)


def _average(state: dict[str, Any], grad: Tensor, weight: float | Tensor) -> None:
    """Update the averages of g gᵀ and gᵀ g."""
    state["left"].lerp_(grad @ grad.T, weight)
    state["right"].lerp_(grad.T @ grad, weight)


def _turn_bases(state: dict[str, Any], found_inf: Tensor | None) -> None:
    """Bring both eigenbases up to date, with eigenvalues in descending order."""
    for dim, side in enumerate(("left", "right")):
        basis = state[f"{side}_basis"]
        product = state[side] @ basis
        order = (basis * product).sum(dim=0).argsort(descending=True)
        turned = {
            f"{side}_basis": torch.linalg.qr(product.index_select(1, order))[0],
            "exp_avg_sq": state["exp_avg_sq"].index_select(dim, order),
        }
        for key, value in turned.items():
            if found_inf is not None:
                value = torch.where(found_inf.bool(), state[key], value)
            state[key].copy_(value)
