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

# SOAP and others count their steps per parameter group. A checkpoint stores the count with each
# parameter, as AdamW does.
GROUP_STEP = "group_step"


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
    # ZeroRedundancyOptimizer calls its local optimizer `optim`.
    return any(hasattr(part, "optim") for part in _parts(optimizer))


def local_shard(optimizer: Any) -> Any:
    """Return the optimizer that holds this rank's state: itself unless it is sharded."""
    return getattr(optimizer, "optim", optimizer)


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
            counter = {GROUP_STEP: group["step"]} if "step" in group else {}
            for p in group["params"]:
                state = part.state.get(p)
                if state:
                    own[names[p]] = state | counter
    if not is_sharded(optimizer):
        return own

    on_cpu: dict[str, dict[str, Any]] = {}
    for name, tensors in own.items():
        on_cpu[name] = {}
        for key, value in tensors.items():
            on_cpu[name][key] = value.cpu() if isinstance(value, Tensor) else value
    shards: list[Any] = [None] * dist.get_world_size()
    dist.gather_object(on_cpu, shards if dist.get_rank() == 0 else None)

    complete: dict[str, dict[str, Any]] = {}
    for shard in shards:
        complete |= shard or {}
    return complete


def load_state(optimizer: Any, model: nn.Module, saved: dict[str, dict[str, Any]]) -> None:
    """Load the state that :func:`gather_state` has returned, on any number of ranks.

    Hyperparameters and the choice of implementation are not loaded; they are the config's.

    Raises:
        ValueError: if the state does not belong to this model's parameters.
    """
    names = {p: name for name, p in model.named_parameters()}
    if saved.keys() != set(names.values()):
        raise ValueError("the optimizer's state is not complete")

    for part in map(local_shard, _parts(optimizer)):
        params = [p for group in part.param_groups for p in group["params"]]
        state = {index: dict(saved[names[p]]) for index, p in enumerate(params)}
        groups = part.state_dict()["param_groups"]
        for group in groups:
            for index in group["params"]:
                counter = state[index].pop(GROUP_STEP, None)
                if counter is not None:
                    group["step"] = counter
        part.load_state_dict({"state": state, "param_groups": groups})


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
