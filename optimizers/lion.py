r"""Lion (Chen et al., arXiv 2302.06675, Algorithm 2): the sign of an interpolated momentum.

.. math::
    \theta \leftarrow \theta (1 - \eta \lambda) - \eta \, \mathrm{sign}(\beta_1 m + (1 - \beta_1) g)
    \qquad m \leftarrow \beta_2 m + (1 - \beta_2) g

This file needs only torch; copy it into any project.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Lion(Optimizer):
    """Implements Lion.

    Apart from weight decay, every entry with a momentum moves by exactly lr, so a good lr is 3 to
    10 times smaller than AdamW's.

    If the attribute ``found_inf`` is set to a 0-dim tensor of 1, as torch.amp does for fused
    optimizers, a step changes nothing, whatever the gradients contain. No host sync is needed.

    Args:
        params: parameters, or dicts of parameter groups.
        lr: learning rate. A number, or a 0-dim CPU tensor.
        betas: (β₁, β₂); the default is the paper's for language models (section 4.4).
        weight_decay: decoupled weight decay, multiplied by lr; 3 to 10 times larger than AdamW's
            for the same strength.
        foreach: use the multi-tensor path. Default: if all parameters are on CUDA.
        fused: compile the multi-tensor path with torch.compile into one pass over memory. A new lr
            does not recompile it.

    Raises:
        ValueError: if a hyperparameter is out of range.
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

        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "foreach": foreach,
            "fused": fused,
        }
        super().__init__(params, defaults)

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
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            if any(p.grad.is_sparse for p in params):
                raise RuntimeError("Lion does not support sparse gradients")
            for p in params:
                if not self.state[p]:
                    zeros = torch.zeros_like(p, memory_format=torch.preserve_format)
                    self.state[p]["exp_avg"] = zeros

            foreach = group["foreach"]
            if foreach is None:
                foreach = all(p.is_cuda for p in params)
            update = _single_tensor
            if group["fused"]:
                update = _fused
            elif foreach:
                update = _multi_tensor

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
    """Apply the update tensor by tensor. The reference: the other paths are tested against it."""
    for theta, g, m in zip(params, grads, exp_avgs, strict=True):
        step_size = lr
        if found_inf is not None:
            step_size, (g,) = skip_update(found_inf, lr, [g], [m])

        theta.mul_(1 - step_size * weight_decay)
        theta.sub_(m.lerp(g, 1 - beta1).sign_().mul_(step_size))
        m.lerp_(g, 1 - beta2)


def _multi_tensor(*tensors: list[Tensor], **others: Any) -> None:
    """Apply the update to many tensors at once, with one kernel launch per operation.

    The temporaries are twice as large as the tensors, so not all tensors are updated at once.
    """
    for start, end in _pieces(tensors[0]):
        _update_together(*(part[start:end] for part in tensors), **others)


def _pieces(params: list[Tensor], entries: int = 2**26) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of consecutive parts of the list with about `entries` entries each."""
    start, size = 0, 0
    for end, p in enumerate(params, start=1):
        size += p.numel()
        if size >= entries or end == len(params):
            yield start, end
            start, size = end, 0


def _update_together(
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
    if found_inf is not None:
        lr, grads = skip_update(found_inf, lr, grads, exp_avgs)

    torch._foreach_mul_(params, 1 - lr * weight_decay)
    updates = torch._foreach_lerp(exp_avgs, grads, 1 - beta1)
    torch._foreach_sign_(updates)
    torch._foreach_mul_(updates, lr)
    torch._foreach_sub_(params, updates)
    torch._foreach_lerp_(exp_avgs, grads, 1 - beta2)


def _fused(*tensors: list[Tensor], lr: float | Tensor, **others: Any) -> None:
    """Apply the update in one compiled pass.

    lr is passed as a tensor: a Python number would be a constant, and every new one a
    recompilation.
    """
    _compiled(_update_together)(*tensors, lr=torch.as_tensor(lr, dtype=torch.float64), **others)


def skip_update(
    found_inf: Tensor, lr: float | Tensor, grads: list[Tensor], exp_avgs: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Return an lr and gradients with which a step changes nothing if found_inf is 1.

    The lr is then 0, and the momentum is averaged with itself.
    """
    # Types of a group may be mixed: in that of a bfloat16 gradient, the lr would be rounded.
    is_double = any(g.dtype == torch.float64 for g in grads)
    lr = lr * (1 - found_inf.to(torch.float64 if is_double else torch.float32))
    skip = found_inf.bool()
    return lr, [torch.where(skip, m, g) for g, m in zip(grads, exp_avgs, strict=True)]


@functools.cache
def _compiled(function: Callable[..., None]) -> Callable[..., None]:
    return torch.compile(function, fullgraph=True, dynamic=False)
