"""Check that SophiaG under FSDP2 equals one process with the whole batch, in float64.

Run by test_examples.py with torchrun, on two ranks.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from examples.fsdp2 import estimate
from sophia import SophiaG


def main() -> None:
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)

    plain = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 11))
    sharded = copy.deepcopy(plain)
    fully_shard(sharded)
    settings: Any = {"lr": 1e-2, "betas": (0.9, 0.9), "rho": 1.0}
    plain_optimizer = SophiaG(plain.parameters(), **settings)
    sharded_optimizer = SophiaG(sharded.parameters(), **settings)

    for step in range(20):
        x, y = torch.randint(11, (2, 8, 6))
        uniforms = torch.rand(8, 6)
        mine = slice(rank * 4, rank * 4 + 4)

        if step % 5 == 0:
            estimate(plain, plain_optimizer, x, uniforms, 1)
            estimate(sharded, sharded_optimizer, x[mine], uniforms[mine], world_size)
        F.cross_entropy(plain(x).flatten(0, 1), y.flatten()).backward()
        F.cross_entropy(sharded(x[mine]).flatten(0, 1), y[mine].flatten()).backward()
        for optimizer in (plain_optimizer, sharded_optimizer):
            optimizer.step()
            optimizer.zero_grad()

    for p, q in zip(plain.parameters(), sharded.parameters(), strict=True):
        expected = plain_optimizer.state[p]["hessian"]
        hessian = sharded_optimizer.state[q]["hessian"]
        assert isinstance(hessian, DTensor)
        assert isinstance(q.data, DTensor)
        torch.testing.assert_close(q.data.full_tensor(), p.data)
        torch.testing.assert_close(hessian.full_tensor(), expected)
        assert (hessian.full_tensor() > 0).any()

    dist.destroy_process_group()


if __name__ == "__main__":
    main()
