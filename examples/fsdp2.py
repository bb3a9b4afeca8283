"""Train with Sophia-G under FSDP2, on two CPU processes or two GPUs.

    torchrun --standalone --nproc_per_node=2 -- examples/fsdp2.py

Parameters, gradients and both of Sophia's states are DTensors; each rank holds its own shard.
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

from model import GPT, ModelConfig
from optimizers.build import weight_decay_groups
from sophia import SophiaG, sampled_label_loss


def estimate(
    model: nn.Module, optimizer: SophiaG, x: Tensor, uniforms: Tensor, world_size: int
) -> None:
    """Update h from the inputs of all ranks.

    Args:
        model: the sharded model.
        optimizer: its optimizer.
        x: this rank's inputs.
        uniforms: this rank's numbers in [0, 1), one per label.
        world_size: the number of ranks.
    """
    sampled_label_loss(model(x), uniforms).backward()
    # FSDP averages the gradient over the ranks, so the labels of all ranks count.
    optimizer.update_hessian_from_grad(n_labels=uniforms.numel() * world_size)
    optimizer.zero_grad()


def main() -> None:
    # Process group and device
    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if on_gpu else "cpu")
    if on_gpu:
        torch.cuda.set_device(device)

    # Model and optimizer
    torch.manual_seed(0)  # the same weights on all ranks
    config = ModelConfig(n_layer=2, n_head=2, n_embd=64, block_size=32, vocab_size=256)
    model = GPT(config).to(device)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    optimizer = SophiaG(weight_decay_groups(model, 0.2), lr=1e-3, betas=(0.9, 0.95), rho=0.05)

    # The training data is the source of these examples, byte by byte.
    text = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(rank)  # different batches and labels on each rank

    for step in range(60):
        starts = torch.randint(len(data) - 33, (16, 1), generator=generator) + torch.arange(33)
        x, y = data[starts][:, :-1].to(device), data[starts][:, 1:].to(device)

        if step % 10 == 0:
            uniforms = torch.rand(y.shape, generator=generator).to(device)
            estimate(model, optimizer, x, uniforms, world_size)

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
