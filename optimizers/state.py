"""The state of an optimizer: complete on every rank, or sharded over them.

With train.shard_optimizer each rank keeps the state of some of the parameters and updates only
those; the updated weights then go to all ranks (ZeRO stage 1, arXiv 1910.02054). Losses and
checkpoints are the same either way.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from sophia import Sophia

# Some optimizers keep numbers in their parameter groups: SOAP the count of its steps, others an
# estimate of the learning rate. A checkpoint stores them with each parameter, as AdamW's count.
GROUP = "group_"
GROUP_SETTINGS = ("lr", "lr_scale", "weight_decay")  # not state, although they differ


class ChainedOptimizer:
    """Several optimizers that update different parameters of one model."""

    def __init__(self, *parts: Optimizer) -> None:
        self.parts = parts

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)


def is_sharded(optimizer: Any) -> bool:
    """Return whether each rank keeps only a part of the state."""
    return any(_is_zero(part) for part in _parts(optimizer))


def _is_zero(optimizer: Any) -> bool:
    # By name, because the import takes a second.
    return type(optimizer).__name__ == "ZeroRedundancyOptimizer"


def local_shard(optimizer: Any) -> Any:
    """Return the optimizer that holds this rank's state: itself unless it is sharded."""
    return optimizer.optim if _is_zero(optimizer) else optimizer


def not_finite(value: Tensor) -> Tensor:
    """Return 1.0 if `value` (0-dim) is NaN or infinite, else 0.0, on its device: no host sync."""
    return (~torch.isfinite(value)).float()


def skip_if(optimizer: Any, not_finite: Tensor) -> None:
    """Make the next step change nothing if `not_finite`, a 0-dim tensor, is 1. No host sync."""
    for part in _parts(optimizer):
        local_shard(part).found_inf = not_finite


def _parts(optimizer: Any) -> tuple[Any, ...]:
    return optimizer.parts if isinstance(optimizer, ChainedOptimizer) else (optimizer,)


def gather_state(optimizer: Any, model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return {parameter name: its state}, complete on rank 0. All ranks must call it."""
    names = {p: name for name, p in model.named_parameters()}
    own: dict[str, dict[str, Any]] = {}
    for part in map(local_shard, _parts(optimizer)):
        for group in part.param_groups:
            numbers = _group_state(part, group)
            for p in group["params"]:
                state = part.state.get(p, {}) | numbers
                if state:
                    own[names[p]] = state
    if not is_sharded(optimizer):
        return own

    on_cpu: dict[str, dict[str, Any]] = {}
    for name, values in own.items():
        on_cpu[name] = {}
        for key, value in values.items():
            on_cpu[name][key] = value.cpu() if isinstance(value, Tensor) else value
    shards: list[Any] = [None] * dist.get_world_size()
    dist.gather_object(on_cpu, shards if dist.get_rank() == 0 else None)

    complete: dict[str, dict[str, Any]] = {}
    for shard in shards:
        complete |= shard or {}
    return complete


def _group_state(part: Optimizer, group: dict[str, Any]) -> dict[str, Any]:
    """Return the numbers of a group that the optimizer has changed, with GROUP before their names.

    What differs from the constructor's arguments is a state, except for what the trainer sets.
    """
    numbers = {}
    for key, value in group.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and key not in GROUP_SETTINGS and value != part.defaults.get(key):
            numbers[GROUP + key] = value
    return numbers


def load_state(optimizer: Any, model: nn.Module, saved: dict[str, dict[str, Any]]) -> None:
    """Load the state that :func:`gather_state` has returned, on any number of ranks.

    Hyperparameters and the choice of implementation are not loaded; they are the config's.

    Raises:
        ValueError: if the state does not belong to this model's parameters.
    """
    names = {p: name for name, p in model.named_parameters()}
    if not saved.keys() <= set(names.values()):
        raise ValueError("the optimizer's state is not this model's")

    for part in _parts(optimizer):
        local = local_shard(part)
        params = [p for group in local.param_groups for p in group["params"]]
        groups = local.state_dict()["param_groups"]
        state = {}
        for index, p in enumerate(params):
            if names[p] in saved:  # SGD without momentum has no state
                state[index] = dict(saved[names[p]])
        for group in groups:
            for index in group["params"]:
                for key in [key for key in state.get(index, {}) if key.startswith(GROUP)]:
                    group[key.removeprefix(GROUP)] = state[index].pop(key)
        local.load_state_dict({"state": state, "param_groups": groups})

        # ZeroRedundancyOptimizer copies its own groups to its local optimizer before each step.
        for outer, inner in zip(part.param_groups, local.param_groups, strict=True):
            for key in inner.keys() - {"params"}:
                outer[key] = inner[key]


def sophia_statistics(optimizer: Any) -> dict[str, float]:
    """Return Sophia's statistics over all parameters. All ranks must call it.

    * unclipped: share of the entries that move by less than lr
    * hessian_norm: Euclidean norm of h
    * hessian_negative: share of the entries with h < 0
    """
    local: Sophia = local_shard(optimizer)
    statistics = local.statistics()
    sums = torch.tensor([value.item() for value in statistics.values()], dtype=torch.float64)
    if is_sharded(optimizer):
        dist.all_reduce(sums)

    total = dict(zip(statistics, sums.tolist(), strict=True))
    return {
        "unclipped": total["unclipped"] / total["entries"],
        "hessian_norm": total["hessian_squares"] ** 0.5,
        "hessian_negative": total["negative"] / total["entries"],
    }
