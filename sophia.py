r"""Sophia (Liu, Li, Hall, Liang, Ma; arXiv 2305.14342) and its estimators of the Hessian diagonal.

This file needs only torch; copy it into any project. Every :math:`k` steps, before the step, pass
an estimate to the optimizer::

    optimizer = SophiaG(model.parameters(), lr=6e-4)
    for step, (x, y) in enumerate(loader):
        if step % 10 == 0:                                           # k = 10
            uniforms = torch.rand(y.shape, device=y.device)
            sampled_label_loss(model(x), uniforms).backward()
            optimizer.update_hessian_from_grad(n_labels=y.numel())
            optimizer.zero_grad()
        F.cross_entropy(model(x).flatten(0, -2), y.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

Units. With :math:`h` the moving average of the Hessian diagonal **of the mean loss**, a step is

.. math::
    \theta \leftarrow \theta (1 - \eta \lambda), \qquad
    \theta \leftarrow \theta - \eta \, \mathrm{clip}(m / \max(\rho h, \epsilon), 1)

as in the later version of the paper (Algorithm 3, where :math:`\rho` is called :math:`\gamma`).
Apart from weight decay, no entry ever moves by more than :math:`\eta`. See :func:`convert_rho` for
other parameterizations.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer


class Sophia(Optimizer):
    """Implements the update that SophiaG and SophiaH share.

    It is signed momentum, with smaller steps where the curvature is large. Until the first
    :meth:`update_hessian`, h is 0 and the update is lr times the sign of the momentum (where
    ``abs(m) >= eps``). As in the paper, neither m nor h is bias-corrected. Negative estimates stay
    in the average; only ``max(rho * h, eps)`` is used.

    If the attribute ``found_inf`` is set to a 0-dim tensor of 1, as torch.amp does for fused
    optimizers, a step changes nothing, whatever the gradients contain. No host sync is needed.

    Args:
        params: parameters, or dicts of parameter groups.
        lr: learning rate, the largest change of an entry per step. A number, or a 0-dim CPU tensor.
        betas: decay of the momentum m, and of the average h (per *estimate*, not per step).
        rho: entries with ``abs(m) < rho * h`` move by less than lr.
        eps: lower bound of ``rho * h``.
        weight_decay: decoupled weight decay, multiplied by lr.
        foreach: use the multi-tensor path. Default: if all parameters are on CUDA.
        fused: compile the multi-tensor path with torch.compile into one pass over memory. A new lr
            does not recompile it.

    Raises:
        ValueError: if a hyperparameter is out of range.
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

        defaults = {
            "lr": lr,
            "betas": betas,
            "rho": rho,
            "eps": eps,
            "weight_decay": weight_decay,
            "foreach": foreach,
            "fused": fused,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def update_hessian(
        self, estimates: Mapping[Any, Tensor], found_inf: Tensor | None = None
    ) -> None:
        """Average new estimates of the Hessian diagonal: h ← β₂ h + (1 − β₂) ĥ (Algorithm 3).

        Call it before :meth:`step`, with estimates at the current parameters.

        Args:
            estimates: ``{parameter: ĥ}``, with ĥ of the parameter's shape and in units of the mean
                loss. Parameters that are missing keep their h.
            found_inf: 0-dim tensor; if it is 1, every h stays as it is.

        Raises:
            ValueError: if an estimate belongs to a tensor that is not a parameter of this
                optimizer.
        """
        own = {p for group in self.param_groups for p in group["params"]}
        if not own.issuperset(estimates):
            raise ValueError("estimates contains a tensor that this optimizer does not update")

        for group in self.param_groups:
            params = [p for p in group["params"] if p in estimates]
            if not params:
                continue
            hessians = [self._state(p)["hessian"] for p in params]
            values = [estimates[p].to(h.dtype) for p, h in zip(params, hessians, strict=True)]
            average = _compiled(_average) if group["fused"] else _average
            average(hessians, values, 1 - group["betas"][1], found_inf)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        """Update all parameters that have a gradient.

        Warns if the first step comes before any estimate of the Hessian.

        Args:
            closure: re-evaluates the model and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        self._warn_without_estimate()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            if any(p.grad.is_sparse for p in params):
                raise RuntimeError("Sophia does not support sparse gradients")

            foreach = group["foreach"]
            if foreach is None:
                foreach = all(p.is_cuda for p in params)
            update = _single_tensor
            if group["fused"]:
                update = _fused
            elif foreach:
                update = _multi_tensor

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
        """Return sums over all entries, which can be added up over ranks. No host sync.

        Returns:
            0-dim tensors:

            * entries: number of entries that have a state
            * unclipped: entries with ``abs(m) < max(rho * h, eps)``, which move by less than lr
            * negative: entries with h < 0 (Hutchinson's estimates can be negative)
            * hessian_squares: sum of the squares of h
        """
        entries = 0
        unclipped, negative, squares = [], [], []
        for group in self.param_groups:
            for p in group["params"]:
                if p not in self.state:
                    continue
                m, h = self.state[p]["exp_avg"], self.state[p]["hessian"]
                bound = (group["rho"] * h).clamp_(min=group["eps"])
                entries += h.numel()
                unclipped.append((m.abs() < bound).sum())
                negative.append((h < 0).sum())
                squares.append(h.square().sum())

        def total(sums: list[Tensor]) -> Tensor:
            return torch.stack(sums).sum() if sums else torch.tensor(0.0)

        return {
            "entries": torch.tensor(entries),
            "unclipped": total(unclipped),
            "negative": total(negative),
            "hessian_squares": total(squares),
        }

    def _warn_without_estimate(self) -> None:
        own = [p for group in self.param_groups for p in group["params"]]
        if not self.state and any(p.grad is not None for p in own):
            warnings.warn(
                "Sophia's first step comes before any estimate of the Hessian, so its update is "
                "the sign of the momentum; call update_hessian() before step(), every k steps",
                stacklevel=5,  # where step() was called: torch wraps it twice
            )

    def _state(self, param: Tensor) -> dict[str, Tensor]:
        state = self.state[param]
        if not state:
            state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
            state["hessian"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        return state


class SophiaG(Sophia):
    """Implements Sophia for Gauss-Newton-Bartlett estimates (:func:`gnb_estimate`).

    The defaults are the paper's settings for GPT-2. See :class:`Sophia` for the arguments.
    """

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
        """Average the estimate n ĝ ⊙ ĝ, where ĝ is in ``.grad``.

        The same as ``update_hessian(gnb_estimate(params, n_labels), found_inf)``, but without
        storing the estimate. With ``fused`` it is one pass over memory that reads ĝ and h and
        writes h, 12 bytes per parameter in fp32.

        Args:
            n_labels: see :func:`gnb_estimate`.
            found_inf: 0-dim tensor; if it is 1, every h stays as it is.

        Raises:
            RuntimeError: if no parameter has a gradient.
        """
        own = [p for group in self.param_groups for p in group["params"]]
        if own and all(p.grad is None for p in own):
            raise RuntimeError("no parameter has a gradient; call backward() on the sampled loss")

        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            hessians = [self._state(p)["hessian"] for p in params]
            grads = [p.grad for p in params]
            average = _compiled(_average_squares) if group["fused"] else _average_squares
            average(hessians, grads, n_labels, 1 - group["betas"][1], found_inf)


class SophiaH(Sophia):
    """Implements Sophia for Hutchinson estimates (:func:`hutchinson_estimate`).

    The defaults are the paper's settings for GPT-2. See :class:`Sophia` for the arguments.
    """

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


# ------------------------------------------------------------------------------------------------
# The update


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
    """Apply the update tensor by tensor. The reference: the other paths are tested against it."""
    for theta, g, m, h in zip(params, grads, exp_avgs, hessians, strict=True):
        step_size = lr
        if found_inf is not None:
            step_size, (g,) = _skip(found_inf, lr, [g], [m])

        theta.mul_(1 - step_size * weight_decay)
        m.lerp_(g, 1 - beta1)
        update = (m / (rho * h).clamp_(min=eps)).clamp_(-1, 1)
        theta.sub_(update.mul_(step_size))


def _multi_tensor(*tensors: list[Tensor], **others: Any) -> None:
    """Apply the update to many tensors at once, with one kernel launch per operation.

    The temporaries are three times as large as the tensors, so not all tensors are updated at once.
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
    hessians: list[Tensor],
    *,
    lr: float | Tensor,
    beta1: float,
    rho: float,
    eps: float,
    weight_decay: float,
    found_inf: Tensor | None,
) -> None:
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


def _fused(*tensors: list[Tensor], lr: float | Tensor, **others: Any) -> None:
    """Apply the update in one compiled pass.

    lr is passed as a tensor: a Python number would be a constant, and every new one a
    recompilation.
    """
    _compiled(_update_together)(*tensors, lr=torch.as_tensor(lr, dtype=torch.float64), **others)


def _skip(
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


def _average(
    hessians: list[Tensor], estimates: list[Tensor], weight: float, found_inf: Tensor | None
) -> None:
    for h, estimate in zip(hessians, estimates, strict=True):
        if found_inf is not None:
            estimate = torch.where(found_inf.bool(), h, estimate)
        h.lerp_(estimate, weight)


def _average_squares(
    hessians: list[Tensor],
    grads: list[Tensor],
    n_labels: int,
    weight: float,
    found_inf: Tensor | None,
) -> None:
    for h, g in zip(hessians, grads, strict=True):
        _average([h], [g.to(h.dtype).square().mul_(n_labels)], weight, found_inf)


@functools.cache
def _compiled(function: Callable[..., None]) -> Callable[..., None]:
    return torch.compile(function, fullgraph=True, dynamic=False)


# ------------------------------------------------------------------------------------------------
# Gauss-Newton-Bartlett


def sampled_label_loss(logits: Tensor, uniforms: Tensor, reduction: str = "mean") -> Tensor:
    """Return the cross entropy of labels sampled from the model, which Gauss-Newton-Bartlett needs.

    Algorithm 2: each ŷ ~ softmax(logits), independently of the others. Computed in fp32 or better
    whatever the type of the logits, because a softmax over 50,000 classes in bfloat16 samples the
    wrong labels.

    Args:
        logits: (..., V) over the real classes; cut off padding first.
        uniforms: (...) numbers in [0, 1), one per label, that decide which label is drawn. A
            negative number leaves its token out. If they are a function of (seed, step), the labels
            do not depend on the micro-batch size or the number of ranks.
        reduction: "mean" over the labels, or "sum".
    """
    # The log-probabilities come before the labels. In the other order the compiler does not compute
    # them again in the backward pass, but stores them, twice the size of the logits in bfloat16.
    log_probs = F.log_softmax(_at_least_fp32(logits).flatten(0, -2), dim=-1)
    labels = sample_labels(logits.detach(), uniforms).masked_fill(uniforms < 0, -1)
    return F.nll_loss(log_probs, labels.flatten(), ignore_index=-1, reduction=reduction)


@torch.no_grad()
def sample_labels(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Draw labels (...) from softmax(logits), by inverting its cumulative distribution.

    Args:
        logits: (..., V).
        uniforms: (...) numbers in [0, 1) at which the distribution is inverted.
    """
    rows, u = logits.flatten(0, -2), uniforms.flatten()
    if torch.compiler.is_compiling():  # the compiler fuses the sums and copies no logits
        return _sample_rows(rows, u).view(uniforms.shape)

    # Each eager operation copies its rows in fp32, so take 1,024 of them at a time.
    pieces = zip(rows.split(1024), u.split(1024), strict=True)
    with _cumsum_allowed():
        return torch.cat([_sample_rows(*piece) for piece in pieces]).view(uniforms.shape)


@contextmanager
def _cumsum_allowed() -> Iterator[None]:
    """Suspend torch.use_deterministic_algorithms, which refuses every cumsum on CUDA.

    The rows are short here, and each is summed by one thread block, in a fixed order.
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


def _sample_rows(logits: Tensor, u: Tensor, block: int = 256) -> Tensor:
    """Draw labels (N,) for logits (N, V) in two stages: first a block of classes, then one of them.

    Compiled, the V probabilities of a row are only summed, and never stored.
    """
    N, V = logits.shape
    peak = _at_least_fp32(logits.amax(-1, keepdim=True))

    # Which block of 256 classes does u fall into, and where in it? The last block may be shorter;
    # padding it would store another copy of the logits.
    whole = V // block * block
    parts = []
    for part in (logits[:, :whole].view(N, whole // block, block), logits[:, whole:].unsqueeze(1)):
        if part.numel():
            parts.append((_at_least_fp32(part) - peak.unsqueeze(-1)).exp().sum(-1))
    cumulative = torch.cat(parts, dim=-1).cumsum(-1)  # (N, number of blocks)
    chosen, u = _invert(cumulative, u.to(cumulative.dtype).unsqueeze(-1))

    # Which class of that block?
    classes = chosen * block + torch.arange(block, device=logits.device)  # (N, block)
    inside = _at_least_fp32(logits.gather(-1, classes.clamp(max=V - 1))) - peak
    cumulative = inside.exp().masked_fill(classes >= V, 0).cumsum(-1)  # (N, block)
    index, _ = _invert(cumulative, u)

    # NaN logits have no order to search in. Any label will do then, but it must be a valid one.
    return (chosen * block + index).squeeze(-1).clamp(max=V - 1)


def _invert(cumulative: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Return the part of `cumulative` (N, parts) that u (N, 1) falls into, and how far into it.

    Both u and the second result are in [0, 1).
    """
    # Scale by the last entry instead of the true sum. They differ by rounding, and u must not fall
    # beyond the last part.
    u = u * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, u, right=True).clamp(max=cumulative.shape[-1] - 1)
    upper = cumulative.gather(-1, index)
    lower = torch.where(index > 0, cumulative.gather(-1, (index - 1).clamp(min=0)), 0)
    return index, ((u - lower) / (upper - lower)).clamp(0, 1 - 2**-24)


@torch.no_grad()
def gnb_estimate(params: Iterable[Tensor], n_labels: int) -> dict[Tensor, Tensor]:
    r"""Return the Gauss-Newton-Bartlett estimate, n ĝ ⊙ ĝ, from the gradients in ``.grad``.

    It is unbiased for the diagonal of the Gauss-Newton matrix of the mean loss (Algorithm 2), if ĝ
    is the gradient of :func:`sampled_label_loss`, averaged over everything it was computed on
    (micro-batches, ranks) and not clipped. Averaging divides the variance of ĝ by n, hence the
    factor.

    Args:
        params: parameters; those without a gradient are left out.
        n_labels: the number of labels that ĝ is the mean over. For language models: the *tokens*
            of all micro-batches and ranks.
    """
    return {p: p.grad.square().mul_(n_labels) for p in params if p.grad is not None}


# ------------------------------------------------------------------------------------------------
# Hutchinson


def hutchinson_estimate(
    loss: Callable[[dict[str, Tensor]], Tensor],
    params: dict[str, Tensor],
    probes: dict[str, Tensor],
) -> dict[str, Tensor]:
    r"""Return Hutchinson's estimate, u ⊙ ∇²L u, which can be negative.

    It is unbiased for the diagonal of the Hessian of L (Algorithm 1). The Hessian-vector product
    is exact: the derivative of the gradient in the direction u (forward over reverse). It does not
    touch ``.grad``. If all micro-batches and ranks use the same u, the mean of their estimates is
    the estimate for the whole batch.

    Attention must not use a fused kernel, because those have no second derivative: call this under
    ``sdpa_kernel(SDPBackend.MATH)``. To compile it, apply torch.compile to a function around it.

    Args:
        loss: the mean loss as a function of the parameters, for example with
            :func:`torch.func.functional_call`.
        params: ``dict(model.named_parameters())``, detached.
        probes: u for each of them, from N(0, 1).
    """
    products = torch.func.jvp(torch.func.grad(loss), (params,), (probes,))[1]
    return {name: probes[name] * products[name] for name in params}


# ------------------------------------------------------------------------------------------------
# Units


def convert_rho(rho: float, *, counted: int, labels: int) -> float:
    """Convert a rho from a parameterization that scales h differently.

    Here h has the factor `labels`, the number of labels that the estimate has really seen. The
    released code clips ``abs(m) / (rho * bs * EMA(ĝ²))``, so its h has the factor `counted` = bs,
    which the user passes. Version 1 of the paper counts sequences (its Sophia-G has rho = 20) and
    writes lr = rho · η. To convert back, swap `counted` and `labels`.

    Example: the released settings for 125M, rho 0.05 and bs 480 × 1024, estimated on 480 × 1024
    tokens, are rho 0.05 here.
    """
    return rho * counted / labels


def _at_least_fp32(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
