"""Variants of Sophia with one part replaced, after the ablation in the paper's later version.

They show what each part contributes and are not meant for training. The normalization is ours: we
have not checked it against the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from optimizers.lion import skip_update
from sophia import SophiaG, gnb_estimate


class SophiaAblation(SophiaG):
    """Implements Sophia with another average of the estimates, or another bound on the update.

    With the defaults it is Sophia itself.

    Args:
        params, lr, betas, rho, eps, weight_decay: see :class:`sophia.Sophia`.
        average: "mean", h ← β₂ h + (1 − β₂) ĥ as in Sophia; or "root-mean-square",
            h² ← β₂ h² + (1 − β₂) ĥ² as in AdaHessian, which counts an estimate's noise as
            curvature.
        update: "clip", clip(m / max(ρ h, ε), 1) as in Sophia; "divide", the same without the clip;
            or "normalize", m / √mean(m²) per tensor, which ignores the curvature.

    Raises:
        ValueError: if a hyperparameter is out of its range.
    """

    def __init__(
        self, params: Any, *, average: str = "mean", update: str = "clip", **options: Any
    ) -> None:
        if average not in ("mean", "root-mean-square"):
            raise ValueError(f"Invalid average: {average}")
        if update not in ("clip", "divide", "normalize"):
            raise ValueError(f"Invalid update: {update}")
        super().__init__(params, **options)
        self.average = average
        self.update = update

    @torch.no_grad()
    def update_hessian(
        self, estimates: Mapping[Any, Tensor], found_inf: Tensor | None = None
    ) -> None:
        """Average new estimates, like :meth:`sophia.Sophia.update_hessian`."""
        if self.average == "mean":
            super().update_hessian(estimates, found_inf)
            return
        for group in self.param_groups:
            for p in group["params"]:
                if p not in estimates:
                    continue
                h = self._state(p)["hessian"]
                averaged = h.square().lerp(estimates[p].square(), 1 - group["betas"][1]).sqrt()
                if found_inf is not None:
                    averaged = torch.where(found_inf.bool(), h, averaged)
                h.copy_(averaged)

    @torch.no_grad()
    def update_hessian_from_grad(self, n_labels: int, found_inf: Tensor | None = None) -> None:
        """Average the estimate n ĝ ⊙ ĝ, where ĝ is in ``.grad``."""
        params = [p for group in self.param_groups for p in group["params"]]
        self.update_hessian(gnb_estimate(params, n_labels), found_inf)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        """Update all parameters that have a gradient.

        Args:
            closure: re-evaluates the model and returns the loss.
        """
        if self.update == "clip":
            return super().step(closure)

        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update_unclipped(p, group, getattr(self, "found_inf", None))
        return loss

    def _warn_without_estimate(self) -> None:
        """Do nothing: an ablation may have no estimates on purpose."""

    def _update_unclipped(self, p: Tensor, group: dict[str, Any], found_inf: Tensor | None) -> None:
        state = self._state(p)
        lr, g, m = group["lr"], p.grad, state["exp_avg"]
        assert g is not None
        if found_inf is not None:
            lr, (g,) = skip_update(found_inf, lr, [g], [m])

        m.lerp_(g, 1 - group["betas"][0])
        if self.update == "normalize":
            update = m / m.square().mean().sqrt().clamp(min=group["eps"])
        else:
            update = m / (group["rho"] * state["hessian"]).clamp(min=group["eps"])
        p.mul_(1 - lr * group["weight_decay"]).sub_(lr * update)
