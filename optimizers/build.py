"""The optimizer that an experiment names, and its state: whole on every rank, or shared out over them.

AdamW and Muon are torch's, SOAP is pytorch-optimizer's, the others are this repository's.

With train.shard_optimizer each rank keeps the state of some parameters alone and updates these; the updated weights
then go to all ranks (ZeRO stage 1, arXiv 1910.02054). The losses are the same, and so are the checkpoints.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from model import weight_decay_groups
from optimizers.adahessian import AdaHessian
from optimizers.lion import Lion
from optimizers.sophia_ablation import SophiaAblation
from runtime.cli import UserError
from runtime.config import Config
from sophia import Sophia, SophiaG, SophiaH

CLASSES: dict[str, Any] = {
    "adamw": AdamW,
    "lion": Lion,
    "sophia-g": SophiaG,
    "sophia-h": SophiaH,
    "sophia-ablation": SophiaAblation,
    "adahessian": AdaHessian,
}


# SOAP counts its steps in the parameter group; a checkpoint keeps the number with each parameter, as AdamW's.
GROUP_STEP = "group_step"


class Together:
    """Optimizers that update a model's parameters together, and that cannot skip a bad step without waiting for it."""

    def __init__(self, *parts: Optimizer) -> None:
        self.parts = parts
        self.found_inf: Tensor | None = None

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    def step(self) -> None:
        if self.found_inf is None or not self.found_inf.item():
            for part in self.parts:
                part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)


def make_optimizer(config: Config, model: nn.Module) -> Any:
    """The optimizer of the config: torch's Optimizer, or what has the part of its interface that train.py uses."""
    o = config.optimizer
    groups = weight_decay_groups(model, o.weight_decay)
    if o.name == "muon":
        return make_muon(config, groups)
    if o.name == "soap":
        return make_soap(config, groups)
    options: dict[str, Any] = {"lr": o.lr, "betas": (o.beta1, o.beta2)}
    if o.name != "adahessian":
        # AdamW's fused kernel is torch's own; ours are made by the compiler.
        options["fused"] = o.name == "adamw" or config.train.compile
    options |= {key: v for key in ("eps", "rho", "average", "update") if (v := getattr(o, key)) is not None}
    if config.train.shard_optimizer and dist.is_initialized():
        from torch.distributed.optim import ZeroRedundancyOptimizer  # here: it takes a second to import

        return ZeroRedundancyOptimizer(groups, optimizer_class=CLASSES[o.name], **options)
    return CLASSES[o.name](groups, **options)


def make_muon(config: Config, groups: list[dict[str, Any]]) -> Together:
    """Muon for the matrices that decay, AdamW for embeddings and norms; beta1 is both's momentum.

    Muon's updates are brought to the size of AdamW's (arXiv 2502.16982), so that one learning rate serves both.
    """
    o = config.optimizer
    matrices, others = groups
    muon = Muon([matrices], lr=o.lr, momentum=o.beta1, adjust_lr_fn="match_rms_adamw")
    return Together(muon, AdamW([others], lr=o.lr, betas=(o.beta1, o.beta2), eps=o.eps or 1e-8, fused=True))


def make_soap(config: Config, groups: list[dict[str, Any]]) -> Together:
    """SOAP (arXiv 2409.11321) with the library's defaults but for what the config has."""
    try:
        from pytorch_optimizer import SOAP
    except ImportError:
        raise UserError('optimizer.name = "soap" needs a library: pip install pytorch-optimizer==4.1.0') from None
    o = config.optimizer
    return Together(SOAP(groups, lr=o.lr, betas=(o.beta1, o.beta2), eps=o.eps or 1e-8))


def local(optimizer: Any) -> Any:
    """The optimizer that holds this rank's state: itself, or the one of its share."""
    return getattr(optimizer, "optim", optimizer)  # ZeroRedundancyOptimizer's name for it


def parts_of(optimizer: Any) -> tuple[Any, ...]:
    return getattr(optimizer, "parts", (local(optimizer),))


def gather_state(optimizer: Any, model: nn.Module) -> dict[str, dict[str, Any]]:
    """{parameter's name: its state}, complete on rank 0. Where it is shared out, all ranks have to call it."""
    names = {p: name for name, p in model.named_parameters()}
    own: dict[str, dict[str, Any]] = {}
    for group in (group | {"of": part} for part in parts_of(optimizer) for group in part.param_groups):
        counter = {GROUP_STEP: group["step"]} if "step" in group else {}
        own |= {names[p]: state | counter for p in group["params"] if (state := group["of"].state.get(p))}
    if local(optimizer) is optimizer:
        return own
    on_cpu = {name: {key: value.cpu() for key, value in tensors.items()} for name, tensors in own.items()}
    shares: list[Any] = [None] * dist.get_world_size()
    dist.gather_object(on_cpu, shares if dist.get_rank() == 0 else None)
    return {name: tensors for share in shares for name, tensors in (share or {}).items()}


def load_state(optimizer: Any, model: nn.Module, saved: dict[str, dict[str, Any]]) -> None:
    """Continue with the state that :func:`gather_state` returned, on any number of ranks.

    The state alone: hyperparameters, and which implementation computes the step, are the config's to say.

    Raises:
        ValueError: it is not the state of this model's parameters.
    """
    names = {p: name for name, p in model.named_parameters()}
    if saved.keys() != set(names.values()):
        raise ValueError("the optimizer's state is not complete")
    for part in parts_of(optimizer):
        groups = part.state_dict()["param_groups"]
        params = [p for group in part.param_groups for p in group["params"]]
        state = {index: dict(saved[names[p]]) for index, p in enumerate(params)}
        for group in groups:
            counters = [state[index].pop(GROUP_STEP, None) for index in group["params"]]
            group |= {"step": counters[0]} if counters and counters[0] is not None else {}
        part.load_state_dict({"state": state, "param_groups": groups})


def sophia_statistics(optimizer: Any) -> dict[str, float]:
    """:meth:`Sophia.statistics` of all parameters. Where the state is shared out, all ranks have to call it."""
    own: Sophia = local(optimizer)
    if own is optimizer:
        return {name: value.item() for name, value in own.statistics().items()}
    sums = torch.zeros(4, dtype=torch.float64)
    if own.state:  # with more ranks than parameters, some have none
        count = sum(p.numel() for p in own.state)
        unclipped, norm, negative = (value.item() for value in own.statistics().values())
        sums += torch.tensor([count * unclipped, norm**2, count * negative, count], dtype=torch.float64)
    dist.all_reduce(sums)
    unclipped, squares, negative, count = sums.tolist()
    return {"unclipped": unclipped / count, "hessian_norm": squares**0.5, "hessian_negative": negative / count}
