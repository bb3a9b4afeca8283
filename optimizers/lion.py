r"""Lion (Chen et al., arXiv 2302.06675, Algorithm 2): the sign of an interpolated momentum. Needs torch alone.

.. math::
    \theta \leftarrow \theta (1 - \eta \lambda) - \eta \, \mathrm{sign}(\beta_1 m + (1 - \beta_1) g), \qquad
    m \leftarrow \beta_2 m + (1 - \beta_2) g
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Lion(Optimizer):
    """Every entry moves by exactly lr (besides the decay), so lr is 3 to 10 times smaller than AdamW's.

    Where the attribute ``found_inf`` is set to a 0-dim tensor of 1 (as torch.amp does for fused optimizers), a step
    changes nothing at all, whatever is in the gradients; nothing waits for the device to know.

    Args:
        params: parameters, or dicts of parameter groups.
        lr: learning rate. A number, or a 0-dim CPU tensor.
        betas: (β₁, β₂); the default is the paper's for language models (section 4.4).
        weight_decay: decoupled, multiplied by lr; 3 to 10 times larger than AdamW's for the same strength.
        foreach: use the multi-tensor path. Default: where all parameters are on CUDA.
        fused: compile the multi-tensor path into one sweep over memory (torch.compile; lr never recompiles it).

    Raises:
        ValueError: for a hyperparameter out of its range.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.95, 0.98),
        weight_decay: float = 0.0,
        *,
        foreach: bool | None = None,
        fused: bool = False,
    ) -> None:
        if not lr >= 0.0:
            raise ValueError(f"Invalid learning rate: {lr}")
        if len(betas) != 2:
            raise ValueError(f"Invalid betas: {betas}, two are needed")
        for index, beta in enumerate(betas):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"Invalid beta parameter at index {index}: {beta}")
        if not weight_decay >= 0.0:
            raise ValueError(f"Invalid weight_decay value: {weight_decay}")
        if fused and foreach is False:
            raise ValueError("fused compiles the multi-tensor path: leave foreach unset")
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "foreach": foreach, "fused": fused}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of all parameters that have a gradient. `closure` re-evaluates the model and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            if any(p.grad.is_sparse for p in params):
                raise RuntimeError("Lion does not support sparse gradients")
            for p in params:
                if not self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            foreach = all(p.is_cuda for p in params) if group["foreach"] is None else group["foreach"]
            update = _fused if group["fused"] else _multi_tensor if foreach else _single_tensor
            beta1, beta2 = group["betas"]
            update(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                lr=group["lr"],
                beta1=beta1,
                beta2=beta2,
                weight_decay=group["weight_decay"],
                found_inf=getattr(self, "found_inf", None),
            )
        return loss


def _single_tensor(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    weight_decay: float,
    found_inf: Tensor | None,
) -> None:
    """The algorithm as one reads it; the other paths are tested against this one."""
    if found_inf is not None:
        lr, grads = _skip(found_inf, lr, grads, exp_avgs)
    for theta, g, m in zip(params, grads, exp_avgs, strict=True):
        theta.mul_(1 - lr * weight_decay)
        theta.sub_(m.lerp(g, 1 - beta1).sign_().mul_(lr))
        m.lerp_(g, 1 - beta2)


def _multi_tensor(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    weight_decay: float,
    found_inf: Tensor | None,
) -> None:
    """The same for all tensors at once, one kernel launch an operation."""
    if found_inf is not None:
        lr, grads = _skip(found_inf, lr, grads, exp_avgs)
    torch._foreach_mul_(params, 1 - lr * weight_decay)
    updates = torch._foreach_lerp(exp_avgs, grads, 1 - beta1)
    torch._foreach_sign_(updates)
    torch._foreach_mul_(updates, lr)
    torch._foreach_sub_(params, updates)
    torch._foreach_lerp_(exp_avgs, grads, 1 - beta2)


def _skip(
    found_inf: Tensor, lr: float | Tensor, grads: list[Tensor], exp_avgs: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """lr and gradients with which a step changes nothing if found_inf is 1: lr 0, and m averaged with itself."""
    lr = lr * (1 - found_inf.to(grads[0].dtype))
    return lr, [torch.where(found_inf.bool(), m, g) for g, m in zip(grads, exp_avgs, strict=True)]


def _fused(*tensors: list[Tensor], lr: float | Tensor, **others: Any) -> None:
    """The same compiled. lr goes in as a tensor, because a new number would be a new constant and a recompilation."""
    _compiled(_multi_tensor)(*tensors, lr=torch.as_tensor(lr, dtype=torch.float64), **others)


@functools.cache
def _compiled(function: Callable[..., None]) -> Callable[..., None]:
    return torch.compile(function, fullgraph=True, dynamic=False)
