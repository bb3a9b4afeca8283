r"""Sophia (Liu, Li, Hall, Liang, Ma; arXiv 2305.14342): the optimizer and its two estimators of the Hessian diagonal.

Needs torch alone; copy this file into any project. Every :math:`k` steps, before the step, hand an estimate over::

    optimizer = SophiaG(model.parameters(), lr=6e-4)
    for step, (x, y) in enumerate(loader):
        if step % 10 == 0:                                           # k = 10
            sampled_label_loss(model(x), torch.rand(y.shape, device=y.device)).backward()
            optimizer.update_hessian_from_grad(n_labels=y.numel())
            optimizer.zero_grad()
        F.cross_entropy(model(x).flatten(0, -2), y.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

Units. With :math:`h` the moving average of the diagonal of the Hessian **of the mean loss**, a step is

.. math::
    \theta \leftarrow \theta (1 - \eta \lambda), \qquad
    \theta \leftarrow \theta - \eta \, \mathrm{clip}(m / \max(\rho h, \epsilon), 1)

as in the later version of the paper (Algorithm 3, there with :math:`\gamma` for :math:`\rho`). No entry ever moves by
more than :math:`\eta`, besides the decay. For other parameterisations see :func:`convert_rho`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer


class Sophia(Optimizer):
    """The update that SophiaG and SophiaH share: sign-momentum, tempered where the curvature is large.

    Until the first :meth:`update_hessian` h is 0 and the update is the sign of the momentum (times lr). Neither m nor h
    is bias-corrected, as in the paper. Negative estimates stay in the average and meet ``max(rho * h, eps)`` at use.

    Where the attribute ``found_inf`` is set to a 0-dim tensor of 1 (as torch.amp does for fused optimizers), a step
    changes nothing at all, whatever is in the gradients; nothing waits for the device to know.

    Args:
        params: parameters, or dicts of parameter groups.
        lr: learning rate, the most that an entry moves in a step. A number, or a 0-dim CPU tensor.
        betas: decay of the momentum m, and of the estimate h (a decay for each *estimate*, not for each step).
        rho: an entry moves by less than lr where ``abs(m) < rho * h``.
        eps: floor of ``rho * h``.
        weight_decay: decoupled, multiplied by lr.
        foreach: use the multi-tensor path. Default: where all parameters are on CUDA.
        fused: compile the multi-tensor path into one sweep over memory (torch.compile; lr never recompiles it).

    Raises:
        ValueError: for a hyperparameter out of its range.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor,
        betas: tuple[float, float],
        rho: float,
        eps: float,
        weight_decay: float,
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
        if not rho > 0.0:
            raise ValueError(f"Invalid rho value: {rho}")
        if not eps > 0.0:
            raise ValueError(f"Invalid epsilon value: {eps}")
        if not weight_decay >= 0.0:
            raise ValueError(f"Invalid weight_decay value: {weight_decay}")
        if fused and foreach is False:
            raise ValueError("fused compiles the multi-tensor path: leave foreach unset")
        defaults = {"lr": lr, "betas": betas, "rho": rho, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"foreach": foreach, "fused": fused})

    @torch.no_grad()
    def update_hessian(self, estimates: Mapping[Any, Tensor], found_inf: Tensor | None = None) -> None:
        """h ← β₂ h + (1 − β₂) ĥ for each ``{parameter: ĥ}``, ĥ being in units of the mean loss (Algorithm 3).

        Call it before :meth:`step`, with an estimate at the current parameters; a parameter left out keeps its h, and
        all do where `found_inf` is a 0-dim tensor of 1.

        Raises:
            ValueError: for a parameter that this optimizer does not have.
        """
        if not {p for group in self.param_groups for p in group["params"]}.issuperset(estimates):
            raise ValueError("estimates has a tensor that is no parameter of this optimizer")
        for group in self.param_groups:
            params = [p for p in group["params"] if p in estimates]
            if params:
                hessians = [self._state(p)["hessian"] for p in params]
                values = [estimates[p].to(h.dtype) for p, h in zip(params, hessians, strict=True)]
                average = _compiled(_average) if group["fused"] else _average
                average(hessians, values, 1 - group["betas"][1], found_inf)

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
                raise RuntimeError("Sophia does not support sparse gradients")
            foreach = all(p.is_cuda for p in params) if group["foreach"] is None else group["foreach"]
            update = _fused if group["fused"] else _multi_tensor if foreach else _single_tensor
            update(
                params,
                [p.grad for p in params],
                [self._state(p)["exp_avg"] for p in params],
                [self._state(p)["hessian"] for p in params],
                lr=group["lr"],
                beta1=group["betas"][0],
                rho=group["rho"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                found_inf=getattr(self, "found_inf", None),
            )
        return loss

    @torch.no_grad()
    def statistics(self) -> dict[str, Tensor]:
        """How the last step went, as 0-dim tensors on the device, so that asking does not wait for it.

        * unclipped: share of the entries with ``abs(m) < max(rho * h, eps)``, those that Sophia tempers
        * hessian_norm: Euclidean norm of h
        * hessian_negative: share of the entries with h < 0 (Hutchinson's estimates have a sign)
        """
        unclipped, negative, squares, count = [], [], [], 0
        for group in self.param_groups:
            for state in (self.state[p] for p in group["params"] if p in self.state):
                m, h = state["exp_avg"], state["hessian"]
                unclipped.append((m.abs() < (group["rho"] * h).clamp_(min=group["eps"])).sum())
                negative.append((h < 0).sum())
                squares.append(h.square().sum())
                count += h.numel()
        if not count:
            raise RuntimeError("statistics: no step was made yet")
        return {
            "unclipped": torch.stack(unclipped).sum() / count,
            "hessian_norm": torch.stack(squares).sum().sqrt(),
            "hessian_negative": torch.stack(negative).sum() / count,
        }

    def _state(self, param: Tensor) -> dict[str, Tensor]:
        state = self.state[param]
        if not state:
            state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
            state["hessian"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        return state


class SophiaG(Sophia):
    """Sophia for Gauss-Newton-Bartlett estimates (:func:`gnb_estimate`). Defaults: the paper's GPT-2 settings."""

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 6e-4,
        betas: tuple[float, float] = (0.96, 0.99),
        rho: float = 0.05,
        eps: float = 1e-12,
        weight_decay: float = 0.2,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, betas, rho, eps, weight_decay, **options)

    @torch.no_grad()
    def update_hessian_from_grad(self, n_labels: int, found_inf: Tensor | None = None) -> None:
        """``update_hessian(gnb_estimate(params, n_labels), found_inf)``, without a second copy of the gradient.

        With ``fused`` it is one sweep over memory: ĝ and h are read, h is written, 12 bytes a parameter in fp32.
        """
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                hessians = [self._state(p)["hessian"] for p in params]
                average = _compiled(_average_squares) if group["fused"] else _average_squares
                average(hessians, [p.grad for p in params], n_labels, 1 - group["betas"][1], found_inf)


class SophiaH(Sophia):
    """Sophia for Hutchinson estimates (:func:`hutchinson_estimate`). Defaults: the paper's GPT-2 settings."""

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 6e-4,
        betas: tuple[float, float] = (0.96, 0.99),
        rho: float = 0.01,
        eps: float = 1e-12,
        weight_decay: float = 0.2,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, betas, rho, eps, weight_decay, **options)


def _single_tensor(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    hessians: list[Tensor],
    *,
    lr: float | Tensor,
    beta1: float,
    rho: float,
    eps: float,
    weight_decay: float,
    found_inf: Tensor | None,
) -> None:
    """The algorithm as one reads it; the other paths are tested against this one."""
    if found_inf is not None:
        lr, grads = _skip(found_inf, lr, grads, exp_avgs)
    for theta, g, m, h in zip(params, grads, exp_avgs, hessians, strict=True):
        theta.mul_(1 - lr * weight_decay)
        m.lerp_(g, 1 - beta1)
        update = (m / (rho * h).clamp_(min=eps)).clamp_(-1, 1)
        theta.sub_(update.mul_(lr))


def _multi_tensor(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    hessians: list[Tensor],
    *,
    lr: float | Tensor,
    beta1: float,
    rho: float,
    eps: float,
    weight_decay: float,
    found_inf: Tensor | None,
) -> None:
    """The same for all tensors at once, one kernel launch an operation."""
    if found_inf is not None:
        lr, grads = _skip(found_inf, lr, grads, exp_avgs)
    torch._foreach_mul_(params, 1 - lr * weight_decay)
    torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
    bounds = torch._foreach_mul(hessians, rho)
    torch._foreach_clamp_min_(bounds, eps)
    updates = torch._foreach_div(exp_avgs, bounds)
    torch._foreach_clamp_min_(updates, -1)
    torch._foreach_clamp_max_(updates, 1)
    torch._foreach_mul_(updates, lr)
    torch._foreach_sub_(params, updates)


def _skip(
    found_inf: Tensor, lr: float | Tensor, grads: list[Tensor], exp_avgs: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """lr and gradients with which a step changes nothing if found_inf is 1: lr 0, and m averaged with itself."""
    lr = lr * (1 - found_inf.to(grads[0].dtype))
    return lr, [torch.where(found_inf.bool(), m, g) for g, m in zip(grads, exp_avgs, strict=True)]


def _fused(*tensors: list[Tensor], lr: float | Tensor, **others: Any) -> None:
    """The same compiled. lr goes in as a tensor, because a new number would be a new constant and a recompilation."""
    _compiled(_multi_tensor)(*tensors, lr=torch.as_tensor(lr, dtype=torch.float64), **others)


def _average(hessians: list[Tensor], estimates: list[Tensor], weight: float, found_inf: Tensor | None) -> None:
    for h, estimate in zip(hessians, estimates, strict=True):
        h.lerp_(estimate if found_inf is None else torch.where(found_inf.bool(), h, estimate), weight)


def _average_squares(
    hessians: list[Tensor], grads: list[Tensor], n_labels: int, weight: float, found_inf: Tensor | None
) -> None:
    for h, g in zip(hessians, grads, strict=True):
        _average([h], [g.to(h.dtype).square().mul_(n_labels)], weight, found_inf)


@functools.cache
def _compiled(function: Callable[..., None]) -> Callable[..., None]:
    return torch.compile(function, fullgraph=True, dynamic=False)


def sampled_label_loss(logits: Tensor, uniforms: Tensor, reduction: str = "mean") -> Tensor:
    """Cross entropy of labels drawn from the model itself: the loss that Gauss-Newton-Bartlett differentiates.

    Algorithm 2: each ŷ ~ softmax(logits), each independent of the others. In fp32 (or better) whatever
    the logits' type, since a softmax over 50,000 classes in bfloat16 draws the wrong labels.

    Args:
        logits: (..., V) over the real classes alone; cut padding off before.
        uniforms: (...) numbers in [0, 1), one a label. They decide the draw, so whoever makes them decides what it
            depends on: made from (seed, step), the labels are the same for any micro-batch and number of ranks.
        reduction: "mean" over the labels, or "sum".
    """
    labels = sample_labels(logits.detach(), uniforms)
    return F.cross_entropy(_at_least_fp32(logits).flatten(0, -2), labels.flatten(), reduction=reduction)


@torch.no_grad()
def sample_labels(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Labels (...) drawn from softmax(logits) (..., V) by inverting its cumulative distribution at `uniforms` (...)."""
    rows, u = logits.flatten(0, -2), uniforms.flatten()
    if torch.compiler.is_compiling():  # the compiler's sums need no copy of the logits
        return _sample_rows(rows, u).view(uniforms.shape)
    # Eager operations would each make one, in fp32: 1,024 rows at a time.
    pieces = zip(rows.split(1024), u.split(1024), strict=True)
    return torch.cat([_sample_rows(*piece) for piece in pieces]).view(uniforms.shape)


def _sample_rows(logits: Tensor, u: Tensor, block: int = 256) -> Tensor:
    """Labels (N,) for logits (N, V) in two stages, so that the V probabilities are never written down, only summed.

    u first falls into one of the blocks of 256 classes, and what is left of it then into a class of that block.
    """
    N, V = logits.shape
    peak = _at_least_fp32(logits.amax(-1, keepdim=True))
    n_blocks = -(-V // block)
    padded = F.pad(logits, (0, n_blocks * block - V), value=-torch.inf).view(N, n_blocks, block)
    cumulative = (_at_least_fp32(padded) - peak.unsqueeze(-1)).exp().sum(-1).cumsum(-1)  # (N, n_blocks)
    chosen, u = _invert(cumulative, u.to(cumulative.dtype).unsqueeze(-1))
    classes = chosen * block + torch.arange(block, device=logits.device)  # (N, block)
    inside = _at_least_fp32(logits.gather(-1, classes.clamp(max=V - 1))) - peak
    cumulative = inside.exp().masked_fill(classes >= V, 0).cumsum(-1)  # (N, block)
    # Logits that are no numbers leave no order to search in; any label will do then, but it must be one.
    return (chosen * block + _invert(cumulative, u)[0]).squeeze(-1).clamp(max=V - 1)


def _invert(cumulative: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Into which part of cumulative (N, parts) u (N, 1) falls, and how far into it; u and the answer in [0, 1)."""
    # Relative to the last entry, which rounding leaves near the true sum: so no draw falls beyond the last part.
    u = u * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, u, right=True).clamp(max=cumulative.shape[-1] - 1)
    upper = cumulative.gather(-1, index)
    lower = torch.where(index > 0, cumulative.gather(-1, (index - 1).clamp(min=0)), 0)
    return index, ((u - lower) / (upper - lower)).clamp(0, 1 - 2**-24)


@torch.no_grad()
def gnb_estimate(params: Iterable[Tensor], n_labels: int) -> dict[Tensor, Tensor]:
    r"""Gauss-Newton-Bartlett: n ĝ ⊙ ĝ, unbiased for the diagonal of the mean loss's Gauss-Newton matrix (Algorithm 2).

    ĝ is read from ``.grad``: the gradient of :func:`sampled_label_loss`, averaged over everything it was computed on
    (micro-batches, ranks), and not clipped. Averaging divides the variance of ĝ by n, hence the factor.

    Args:
        params: parameters; one without a gradient is left out.
        n_labels: how many labels ĝ is the mean over: for language models the *tokens* of all micro-batches and ranks.
    """
    return {p: p.grad.square().mul_(n_labels) for p in params if p.grad is not None}


def hutchinson_estimate(
    loss: Callable[[dict[str, Tensor]], Tensor], params: dict[str, Tensor], probes: dict[str, Tensor]
) -> dict[str, Tensor]:
    r"""Hutchinson: u ⊙ ∇²L u, unbiased for the diagonal of the Hessian of L (Algorithm 1). Entries can be negative.

    A true Hessian-vector product, forward over reverse: the derivative of the gradient in the direction u. It leaves
    every ``.grad`` alone. The mean over micro-batches and ranks is the estimate for the whole batch if all of them
    use the same u. Attention must run without a fused kernel (``sdpa_kernel(SDPBackend.MATH)``): those have no second
    derivative. It can be compiled, by torch.compile around a function that calls this one.

    Args:
        loss: the mean loss as a function of the parameters, e.g. with :func:`torch.func.functional_call`.
        params: ``dict(model.named_parameters())``, detached.
        probes: u for each of them, from N(0, 1).
    """
    products = torch.func.jvp(torch.func.grad(loss), (params,), (probes,))[1]
    return {name: probes[name] * products[name] for name in params}


def convert_rho(rho: float, *, counted: int, labels: int) -> float:
    """This file's rho for one of a parameterisation that counts another factor B into h.

    Here h has the factor `labels`, the number that the estimate really saw. The released code clips
    ``abs(m) / (rho * bs * EMA(ĝ²))``: its h has the factor `counted` = bs, typed in by the user. Version 1 of the paper
    counts B in sequences (its Sophia-G has rho = 20), and writes lr = rho · η. Example: the released 125M settings,
    rho 0.05, bs 480 × 1024, estimated on 480 × 1024 tokens, are rho 0.05 here. Swap the two counts for the way back.
    """
    return rho * counted / labels


def _at_least_fp32(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
