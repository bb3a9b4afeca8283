"""Sophia with one ingredient exchanged: the variants of the paper's ablation (its later version, section 4.4 ?).

They tell what each ingredient is worth; nobody would train with them. "?" marks what was recalled from the paper and
not verified: the normalization is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sophia import SophiaG, gnb_estimate


class SophiaAblation(SophiaG):
    """Sophia whose average, or whose bound on the update, is another one. With the defaults it is Sophia itself.

    Args:
        params, lr, betas, rho, eps, weight_decay: as :class:`sophia.Sophia` has them.
        average: "mean", h ← β₂ h + (1 − β₂) ĥ as in Sophia; or "root-mean-square", h² ← β₂ h² + (1 − β₂) ĥ² as in
            AdaHessian, which counts an estimate's noise as curvature.
        update: "clip", clip(m / max(ρ h, ε), 1) as in Sophia; "divide", the same without the clip; or "normalize",
            m / √mean(m²) of each tensor ?, which knows no curvature at all.
    """

    def __init__(self, params: Any, *, average: str = "mean", update: str = "clip", **options: Any) -> None:
        if average not in ("mean", "root-mean-square"):
            raise ValueError(f"Invalid average: {average}")
        if update not in ("clip", "divide", "normalize"):
            raise ValueError(f"Invalid update: {update}")
        super().__init__(params, **options)
        self.average, self.update = average, update

    @torch.no_grad()
    def update_hessian(self, estimates: Mapping[Any, Tensor], found_inf: Tensor | None = None) -> None:
        if self.average == "mean":
            super().update_hessian(estimates, found_inf)
            return
        for group in self.param_groups:
            for p in (p for p in group["params"] if p in estimates):
                h = self._state(p)["hessian"]
                averaged = h.square().lerp(estimates[p].square(), 1 - group["betas"][1]).sqrt()
                h.copy_(averaged if found_inf is None else torch.where(found_inf.bool(), h, averaged))

    @torch.no_grad()
    def update_hessian_from_grad(self, n_labels: int, found_inf: Tensor | None = None) -> None:
        params = [p for group in self.param_groups for p in group["params"]]
        self.update_hessian(gnb_estimate(params, n_labels), found_inf)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        if self.update == "clip":
            return super().step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                self._step_unclipped(p, group, getattr(self, "found_inf", None))
        return loss

    def _step_unclipped(self, p: Tensor, group: dict[str, Any], found_inf: Tensor | None) -> None:
        state = self._state(p)
        assert p.grad is not None
        m = state["exp_avg"].lerp(p.grad, 1 - group["betas"][0])
        if self.update == "normalize":
            update = m / m.square().mean().sqrt().clamp(min=group["eps"])
        else:
            update = m / (group["rho"] * state["hessian"]).clamp(min=group["eps"])
        new = p * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * update
        skip = torch.zeros((), device=p.device) if found_inf is None else found_inf
        state["exp_avg"].copy_(torch.where(skip.bool(), state["exp_avg"], m))
        p.copy_(torch.where(skip.bool(), p, new))
