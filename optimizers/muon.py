r"""Muon (Jordan et al., 2024), with updates scaled to the size of AdamW's (arXiv 2502.16982).

.. math::
    m \leftarrow \beta m + (1 - \beta) g \qquad
    \theta \leftarrow \theta (1 - \eta \lambda)
        - 0.2 \, \eta \sqrt{\max(\mathrm{rows}, \mathrm{columns})} \;
        \mathrm{orthogonalize}(\beta m + (1 - \beta) g)

This file needs only torch; copy it into any project.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

# Of Newton and Schulz's iteration, from Keller Jordan's post: steep at zero, so that five steps
# bring all singular values between 0.5 and 1.5 or so.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
AT_ONCE = 2**26  # entries that are updated together, because the temporaries are as large


class Muon(Optimizer):
    """Implements Muon for matrices.

    The same as ``torch.optim.Muon(..., adjust_lr_fn="match_rms_adamw")``, with two differences:
    matrices of equal shape are orthogonalized together, and if the attribute ``found_inf`` is set
    to a 0-dim tensor of 1, a step changes nothing, whatever the gradients contain. No host sync is
    needed.

    Args:
        params: matrices, or dicts of parameter groups.
        lr: learning rate; one for AdamW fits.
        momentum: β; the momentum is Nesterov's.
        weight_decay: decoupled weight decay, multiplied by lr.

    Raises:
        ValueError: if a hyperparameter is out of range, or a parameter is not a matrix.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
    ) -> None:
        if not lr >= 0.0:
            raise ValueError(f"Invalid learning rate: {lr}")
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"Invalid momentum value: {momentum}")
        if not weight_decay >= 0.0:
            raise ValueError(f"Invalid weight_decay value: {weight_decay}")

        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim != 2:
                    raise ValueError(f"Muon updates matrices, not a tensor of shape {p.shape}")

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

        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                by_shape.setdefault(p.shape, []).append(p)

            for params in by_shape.values():
                together = max(AT_ONCE // params[0].numel(), 1)
                for start in range(0, len(params), together):
                    piece = params[start : start + together]
                    _update(
                        piece,
                        [p.grad for p in piece],
                        [self.state[p]["momentum_buffer"] for p in piece],
                        lr=group["lr"],
                        momentum=group["momentum"],
                        weight_decay=group["weight_decay"],
                        found_inf=getattr(self, "found_inf", None),
                    )
        return loss


def _update(
    params: list[Tensor],
    grads: list[Any],
    buffers: list[Tensor],
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    found_inf: Tensor | None,
) -> None:
    """Apply the update to matrices of equal shape."""
    step_size: float | Tensor = lr
    if found_inf is not None:
        # With an lr of 0, and a momentum that is averaged with itself, nothing changes.
        step_size = lr * (1 - found_inf.float())
        skip = found_inf.bool()
        grads = [torch.where(skip, m, g) for g, m in zip(grads, buffers, strict=True)]

    torch._foreach_lerp_(buffers, grads, 1 - momentum)
    updates = orthogonalize(torch.stack(torch._foreach_lerp(grads, buffers, momentum)))
    scale = 0.2 * max(params[0].shape) ** 0.5
    updates = updates.to(params[0].dtype) * (step_size * scale)

    torch._foreach_mul_(params, 1 - step_size * weight_decay)
    torch._foreach_sub_(params, updates.unbind())


def orthogonalize(matrices: Tensor) -> Tensor:
    """Return the matrices with all singular values near 1, computed in bfloat16.

    Args:
        matrices: (N, rows, columns).
    """
    a, b, c = COEFFICIENTS
    x = matrices.bfloat16()
    is_tall = x.shape[1] > x.shape[2]
    if is_tall:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # no singular value is above 1 then

    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x
