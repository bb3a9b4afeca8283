r"""AdaHessian (Yao et al., arXiv 2006.00719, Algorithm 1): Adam with the Hessian's diagonal for the gradient's square.

.. math::
    m \leftarrow \beta_1 m + (1 - \beta_1) g, \qquad v \leftarrow \beta_2 v + (1 - \beta_2) D^2, \qquad
    \theta \leftarrow \theta (1 - \eta \lambda) - \eta \, \hat m / (\hat v^{k/2} + \epsilon)

D is Hutchinson's estimate with Rademacher probes (:func:`sophia.hutchinson_estimate`), m̂ and v̂ are bias-corrected, k is
the Hessian power. The paper averages D over blocks of a weight, of a size that its own code chooses in three different
ways; here nothing is averaged, as in its code for image models. Needs torch alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class AdaHessian(Optimizer):
    """Hand an estimate over by :meth:`update_hessian` before the first step, and every step or every few after it.

    Where the attribute ``found_inf`` is set to a 0-dim tensor of 1 (as torch.amp does for fused optimizers), a step
    changes nothing; nothing waits for the device to know.

    Args:
        params: parameters, or dicts of parameter groups.
        lr: learning rate. The defaults are those of the authors' code.
        betas: decay of m and of v (a decay for each *estimate*, not for each step).
        eps: added to the denominator.
        weight_decay: decoupled, multiplied by lr.
        hessian_power: k, from 0 (momentum SGD) to 1.

    Raises:
        ValueError: for a hyperparameter out of its range.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.15,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-4,
        weight_decay: float = 0.0,
        hessian_power: float = 1.0,
    ) -> None:
        if not lr >= 0.0:
            raise ValueError(f"Invalid learning rate: {lr}")
        for index, beta in enumerate(betas):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"Invalid beta parameter at index {index}: {beta}")
        if not eps > 0.0:
            raise ValueError(f"Invalid epsilon value: {eps}")
        if not weight_decay >= 0.0:
            raise ValueError(f"Invalid weight_decay value: {weight_decay}")
        if not 0.0 <= hessian_power <= 1.0:
            raise ValueError(f"Invalid Hessian power: {hessian_power}")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "hessian_power": hessian_power}
        super().__init__(params, defaults)

    @torch.no_grad()
    def update_hessian(self, estimates: Mapping[Any, Tensor], found_inf: Tensor | None = None) -> None:
        """v ← β₂ v + (1 − β₂) D² for each ``{parameter: D}``, D of all ranks together; none if found_inf is 1."""
        for group in self.param_groups:
            for p in (p for p in group["params"] if p in estimates):
                state = self._state(p)
                keep = torch.zeros((), device=p.device) if found_inf is None else found_inf
                averaged = state["exp_hessian_sq"].lerp(estimates[p].square(), 1 - group["betas"][1])
                state["exp_hessian_sq"].copy_(torch.where(keep.bool(), state["exp_hessian_sq"], averaged))
                state["estimates"].add_(1 - keep)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of all parameters that have a gradient. `closure` re-evaluates the model and returns the loss.

        Raises:
            RuntimeError: no estimate was handed over yet.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                if p not in self.state:
                    raise RuntimeError("AdaHessian needs update_hessian before the first step")
                self._step(p, group, getattr(self, "found_inf", None))
        return loss

    def _step(self, p: Tensor, group: dict[str, Any], found_inf: Tensor | None) -> None:
        state, (beta1, beta2) = self.state[p], group["betas"]
        skip = torch.zeros((), device=p.device) if found_inf is None else found_inf
        state["steps"].add_(1 - skip)
        m = torch.where(skip.bool(), state["exp_avg"], state["exp_avg"].lerp(p.grad, 1 - beta1))
        state["exp_avg"].copy_(m)
        corrected_m = m / (1 - beta1 ** state["steps"].clamp(min=1))
        corrected_v = state["exp_hessian_sq"] / (1 - beta2 ** state["estimates"].clamp(min=1))
        update = corrected_m / (corrected_v.sqrt().pow(group["hessian_power"]) + group["eps"])
        lr = group["lr"] * (1 - skip.to(p.dtype))
        p.mul_(1 - lr * group["weight_decay"]).sub_(lr * update)

    def _state(self, param: Tensor) -> dict[str, Tensor]:
        state = self.state[param]
        if not state:
            # Not "step": Optimizer.load_state_dict would leave a tensor of that name on the CPU.
            state["steps"] = torch.zeros((), device=param.device)
            state["estimates"] = torch.zeros((), device=param.device)
            state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
            state["exp_hessian_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        return state
