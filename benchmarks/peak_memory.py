"""Count how much memory the tensors of a computation need.

It works on any device, and on tensors without storage, where nothing is computed:

    with FakeTensorMode(), PeakMemory() as memory:
        model(tokens, summed_loss, tokens).backward()
    memory.peak  # bytes
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of storages that operations have created and that are still referenced."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}  # storage → bytes
        self.peak = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in self.alive:
                self.alive[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, storage._cdata)
                self.peak = max(self.peak, sum(self.alive.values()))
        return result
