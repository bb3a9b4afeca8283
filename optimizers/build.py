"""The optimizer of a config. AdamW is torch's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import AdamW, Optimizer

from optimizers import imported
from optimizers.adahessian import AdaHessian
from optimizers.lion import Lion
from optimizers.muon import Muon
from optimizers.soap import SOAP
from optimizers.sophia_ablation import SophiaAblation
from optimizers.state import ChainedOptimizer, local_shard
from runtime.cli import UserError, reason, warn
from runtime.config import Config, ImportedConfig, MuonConfig, SoapConfig
from sophia import SophiaG, SophiaH

CLASSES: dict[str, Any] = {
    "adamw": AdamW,
    "lion": Lion,
    "sophia-g": SophiaG,
    "sophia-h": SophiaH,
    "sophia-ablation": SophiaAblation,
    "adahessian": AdaHessian,
}
# Keys of the config that are passed to the constructor under the same name.
OPTIONS = ("eps", "rho", "average", "update")


def check_optimizer(config: Config) -> None:
    """Refuse an optimizer that cannot be imported, or arguments that it does not take."""
    optimizer = config.optimizer
    if isinstance(optimizer, ImportedConfig):
        options = imported.constructor_arguments(optimizer)
        with refusals(optimizer):
            imported.find_class(optimizer)([nn.Parameter(torch.zeros(2, 2))], **options)


def make_optimizer(config: Config, model: nn.Module) -> Any:
    """Return the config's optimizer: an Optimizer, or something with the same methods."""
    optimizer, width = config.optimizer, config.model.relative_width
    groups = weight_decay_groups(model, optimizer.weight_decay)
    if width != 1:  # muP, see docs/method.md
        matrices = groups[0]
        matrices["lr_scale"] = 1 / width
        matrices["weight_decay"] *= width
    if isinstance(optimizer, MuonConfig | SoapConfig):
        return make_with_adamw(config, optimizer, groups)
    if isinstance(optimizer, ImportedConfig):
        return make_imported(config, optimizer, groups)

    options: dict[str, Any] = {"lr": optimizer.lr, "betas": (optimizer.beta1, optimizer.beta2)}
    for key in OPTIONS:
        if hasattr(optimizer, key):
            options[key] = getattr(optimizer, key)
    if "rho" in options:
        options["rho"] *= width
    if optimizer.name != "adahessian":
        # torch's AdamW has a fused kernel; ours are made by torch.compile.
        options["fused"] = optimizer.name == "adamw" or config.train.compile

    return construct(config, CLASSES[optimizer.name], groups, options)


def construct(
    config: Config,
    optimizer_class: type[Optimizer],
    groups: list[dict[str, Any]],
    options: dict[str, Any],
) -> Optimizer:
    """Return an optimizer, which shares its state out over the ranks if the config says so."""
    if config.train.shard_optimizer and dist.is_initialized():
        # Imported here because it takes a second.
        from torch.distributed.optim import ZeroRedundancyOptimizer

        return ZeroRedundancyOptimizer(groups, optimizer_class=optimizer_class, **options)
    return optimizer_class(groups, **options)


def weight_decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return two parameter groups as in the paper: weight matrices decay, all others do not.

    The others are embeddings, norms and biases.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in model.parameters():
        is_matrix = parameter.ndim == 2 and id(parameter) not in embeddings
        (matrices if is_matrix else others).append(parameter)
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def make_with_adamw(
    config: Config, optimizer: MuonConfig | SoapConfig, groups: list[dict[str, Any]]
) -> ChainedOptimizer:
    """Return Muon or SOAP for the weight matrices, with AdamW for the rest.

    AdamW's learning rate is always the same multiple of the other one.
    """
    matrices, others = groups
    betas = (optimizer.beta1, optimizer.beta2)
    if isinstance(optimizer, MuonConfig):
        main = construct(config, Muon, [matrices], {"momentum": optimizer.beta1})
    else:
        options = {"betas": betas, "eps": optimizer.eps}
        main = construct(config, SOAP, [matrices], options)

    others["weight_decay"] = optimizer.adamw_weight_decay
    if optimizer.adamw_lr is not None:
        others["lr_scale"] = optimizer.adamw_lr / optimizer.lr
    options = {"betas": betas, "eps": optimizer.eps, "fused": True}
    return ChainedOptimizer(main, construct(config, AdamW, [others], options))


@contextmanager
def refusals(optimizer: ImportedConfig) -> Iterator[None]:
    """Turn the errors of a constructor that is not ours into UserErrors."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise UserError(f"{optimizer.name} refuses its arguments: {reason(error)}") from error


def make_imported(
    config: Config, optimizer: ImportedConfig, groups: list[dict[str, Any]]
) -> Optimizer:
    """Return the optimizer that optimizer.name = "package.module:Class" names.

    Raises:
        UserError: if its constructor refuses the arguments.
    """
    optimizer_class = imported.skipping(imported.find_class(optimizer))
    options = imported.constructor_arguments(optimizer)
    with refusals(optimizer):
        made = construct(config, optimizer_class, groups, options)

    is_first_rank = not dist.is_initialized() or dist.get_rank() == 0
    if is_first_rank and not imported.can_skip(local_shard(made)):
        warn(
            f"{optimizer.name} cannot skip a step whose gradient is not finite on the device, so "
            f"every step waits for it"
        )
    return made
