"""How much memory the tensors of a computation need, counted anywhere; on storage-less tensors without computing.

with FakeTensorMode(), PeakMemory() as memory:
    model(tokens, summed_loss, tokens).backward()
memory.peak                                              # bytes
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class PeakMemory(TorchDispatchMode):
    """Bytes of the storages that operations made and nobody has dropped yet: now, and the most so far."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.alive:
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, storage._cdata)
                self.peak = max(self.peak, sum(self.alive.values()))
        return result
