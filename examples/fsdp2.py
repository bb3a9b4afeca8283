"""Sophia-G under FSDP2: parameters, gradients and both of Sophia's states are DTensors, each rank has its shard.

torchrun --standalone --nproc_per_node=2 -- examples/fsdp2.py        # two processes on a CPU, or two GPUs
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model import GPT, weight_decay_groups
from runtime.config import ModelConfig
from sophia import SophiaG, sampled_label_loss


def estimate(model: nn.Module, optimizer: SophiaG, x: Tensor, uniforms: Tensor, world_size: int) -> None:
    """h from this rank's inputs and its own numbers in [0, 1): FSDP averages the gradient over the ranks."""
    sampled_label_loss(model(x), uniforms).backward()
    optimizer.update_hessian_from_grad(n_labels=uniforms.numel() * world_size)  # so their labels count together
    optimizer.zero_grad()


def main() -> None:
    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if on_gpu else "cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    torch.manual_seed(0)  # the same weights on all ranks
    model = GPT(ModelConfig(n_layer=2, n_head=2, n_embd=64, block_size=32, vocab_size=256)).to(device)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    optimizer = SophiaG(weight_decay_groups(model, 0.2), lr=1e-3, betas=(0.9, 0.95), rho=0.05)

    text = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(rank)  # other batches and other labels on each
    for step in range(60):
        starts = torch.randint(len(data) - 33, (16, 1), generator=generator) + torch.arange(33)
        x, y = data[starts][:, :-1].to(device), data[starts][:, 1:].to(device)
        if step % 10 == 0:
            estimate(model, optimizer, x, torch.rand(y.shape, generator=generator).to(device), world_size)
        loss = F.cross_entropy(model(x).flatten(0, -2), y.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0 and step % 20 == 19:
            print(f"step {step + 1}  loss {loss.item():.3f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
