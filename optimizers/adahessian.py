r"""AdaHessian (Yao et al., arXiv 2006.00719, Algorithm 1).

Adam with the Hessian's diagonal in place of the gradient in the second moment:

.. math::
    m \leftarrow \beta_1 m + (1 - \beta_1) g, \qquad v \leftarrow \beta_2 v + (1 - \beta_2) D^2
    \qquad \theta \leftarrow \theta (1 - \eta \lambda) - \eta \, \hat m / (\hat v^{k/2} + \epsilon)

D is Hutchinson's estimate with Rademacher probes (:func:`sophia.hutchinson_estimate`), m̂ and v̂
are bias-corrected, and k is the Hessian power. The paper averages D over blocks of each weight, but
its code uses three different block sizes. We do not average, as in its code for image models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from optimizers.lion import skip_update


def random_signs(shape: torch.Size, generator: torch.Generator, device: torch.device) -> Tensor:
    """Return a Rademacher probe: entries of +1 and -1 with equal probability."""
    return torch.randint(2, shape, generator=generator, device=device).float() * 2 - 1


class AdaHessian(Optimizer):
    """Implements AdaHessian.

    Call :meth:`update_hessian` before the first step, and then every step or every few steps.

    If the attribute ``found_inf`` is set to a 0-dim tensor of 1, as torch.amp does for fused
    optimizers, a step changes nothing. No host sync is needed.

    Args:
        params: parameters, or dicts of parameter groups.
        lr: learning rate. The defaults are those of the authors' code.
        betas: decay of m, and of v (per *estimate*, not per step).
        eps: added to the denominator.
        weight_decay: decoupled weight decay, multiplied by lr.
        hessian_power: k, from 0 (momentum SGD) to 1.

    Raises:
        ValueError: if a hyperparameter is out of range.
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

        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "hessian_power": hessian_power,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def update_hessian(
        self, estimates: Mapping[Any, Tensor], found_inf: Tensor | None = None
    ) -> None:
        """Average new estimates: v ← β₂ v + (1 − β₂) D².

        Args:
            estimates: ``{parameter: D}``; under several ranks, D is the mean over all of them.
            found_inf: 0-dim tensor; if it is 1, nothing changes.
        """
        for group in self.param_groups:
            for p in group["params"]:
                if p not in estimates:
                    continue
                state = self._state(p)
                v = state["exp_hessian_sq"]
                averaged = v.lerp(estimates[p].square(), 1 - group["betas"][1])
                skip = torch.zeros((), device=p.device) if found_inf is None else found_inf
                v.copy_(torch.where(skip.bool(), v, averaged))
                state["estimates"].add_(1 - skip)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        """Update all parameters that have a gradient.

        Args:
            closure: re-evaluates the model and returns the loss.

        Raises:
            RuntimeError: if :meth:`update_hessian` has not been called yet.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p not in self.state:
                    raise RuntimeError("AdaHessian needs update_hessian before the first step")
                self._update(p, group, getattr(self, "found_inf", None))
        return loss

    def _update(self, p: Tensor, group: dict[str, Any], found_inf: Tensor | None) -> None:
        state = self.state[p]
        beta1, beta2 = group["betas"]
        lr, g, m = group["lr"], p.grad, state["exp_avg"]
        assert g is not None

        counted: float | Tensor = 1.0
        if found_inf is not None:
            lr, (g,) = skip_update(found_inf, lr, [g], [m])
            counted = 1 - found_inf
        state["steps"].add_(counted)
        m.lerp_(g, 1 - beta1)

        # At least 1: nothing is counted yet if the very first step is skipped.
        corrected_m = m / (1 - beta1 ** state["steps"].clamp(min=1))
        corrected_v = state["exp_hessian_sq"] / (1 - beta2 ** state["estimates"].clamp(min=1))
        denominator = corrected_v.sqrt().pow(group["hessian_power"]) + group["eps"]
        p.mul_(1 - lr * group["weight_decay"]).sub_(lr * corrected_m / denominator)

    def _state(self, param: Tensor) -> dict[str, Tensor]:
        state = self.state[param]
        if not state:
            # Not called "step", which Optimizer.load_state_dict would leave on the CPU.
            state["steps"] = torch.zeros((), device=param.device)
            state["estimates"] = torch.zeros((), device=param.device)
            state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
            state["exp_hessian_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        return state
