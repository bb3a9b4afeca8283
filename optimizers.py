"""The optimizer that an experiment names, and its state: whole on every rank, or shared out over them.

With train.shard_optimizer each rank keeps the state of some parameters alone and updates these; the updated weights
then go to all ranks (ZeRO stage 1, arXiv 1910.02054). The losses are the same, and so are the checkpoints.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from config import Config
from lion import Lion
from model import weight_decay_groups
from sophia import Sophia, SophiaG, SophiaH

CLASSES: dict[str, Any] = {"adamw": AdamW, "lion": Lion, "sophia-g": SophiaG, "sophia-h": SophiaH}


def make_optimizer(config: Config, model: nn.Module) -> Optimizer:
    o = config.optimizer
    options: dict[str, Any] = {"lr": o.lr, "betas": (o.beta1, o.beta2)}
    # AdamW's fused kernel is torch's own; ours are made by the compiler.
    options["fused"] = o.name == "adamw" or config.train.compile
    options |= {key: value for key in ("eps", "rho") if (value := getattr(o, key)) is not None}
    groups = weight_decay_groups(model, o.weight_decay)
    if config.train.shard_optimizer and dist.is_initialized():
        from torch.distributed.optim import ZeroRedundancyOptimizer  # here: it takes a second to import

        return ZeroRedundancyOptimizer(groups, optimizer_class=CLASSES[o.name], **options)
    return CLASSES[o.name](groups, **options)


def local(optimizer: Optimizer) -> Any:
    """The optimizer that holds this rank's state: itself, or the one of its share."""
    return getattr(optimizer, "optim", optimizer)  # ZeroRedundancyOptimizer's name for it


def gather_state(optimizer: Optimizer, model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """{parameter's name: its state}, complete on rank 0. Where it is shared out, all ranks have to call it."""
    state = local(optimizer).state
    own = {name: state[p] for name, p in model.named_parameters() if p in state}
    if local(optimizer) is optimizer:
        return own
    on_cpu = {name: {key: value.cpu() for key, value in tensors.items()} for name, tensors in own.items()}
    shares: list[Any] = [None] * dist.get_world_size()
    dist.gather_object(on_cpu, shares if dist.get_rank() == 0 else None)
    return {name: tensors for share in shares for name, tensors in (share or {}).items()}


def load_state(optimizer: Optimizer, model: nn.Module, saved: dict[str, dict[str, Tensor]]) -> None:
    """Continue with the state that :func:`gather_state` returned, on any number of ranks.

    The state alone: hyperparameters, and which implementation computes the step, are the config's to say.

    Raises:
        ValueError: it is not the state of this model's parameters.
    """
    names = {p: name for name, p in model.named_parameters()}
    if saved.keys() != set(names.values()):
        raise ValueError("the optimizer's state is not complete")
    own = local(optimizer)
    params = [p for group in own.param_groups for p in group["params"]]
    state = {index: saved[names[p]] for index, p in enumerate(params)}
    own.load_state_dict({"state": state, "param_groups": own.state_dict()["param_groups"]})


def sophia_statistics(optimizer: Optimizer) -> dict[str, float]:
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
