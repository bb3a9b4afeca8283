"""The reference for train.py: GPT-2 as nanoGPT's README trains it, rebuilt without our modules.

Compiled model, flash attention, bf16 autocast, fused AdamW, and gradients accumulated over
micro-batches of random windows of a memory map, each read while the device works on the one before.
No inverse-layer scaling, exact GELU, loss over the padded vocabulary: nanoGPT's own choices.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import ModelConfig


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(channels, bias=False)
        self.norm2 = nn.LayerNorm(channels, bias=False)
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.out = nn.Linear(channels, channels, bias=False)
        self.up = nn.Linear(channels, 4 * channels, bias=False)
        self.down = nn.Linear(4 * channels, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.qkv(self.norm1(x)).split(C, dim=2)
        q = q.view(B, T, self.heads, C // self.heads).transpose(1, 2)
        k = k.view(B, T, self.heads, C // self.heads).transpose(1, 2)
        v = v.view(B, T, self.heads, C // self.heads).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).contiguous().view(B, T, C))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Model(nn.Module):
    """GPT-2 with its loss."""

    def __init__(self, shape: ModelConfig) -> None:
        super().__init__()
        rows = shape.vocab_size
        if rows > 1000:
            rows = 64 * math.ceil(rows / 64)
        self.tokens = nn.Embedding(rows, shape.n_embd)
        self.positions = nn.Embedding(shape.block_size, shape.n_embd)
        blocks = (Block(shape.n_embd, shape.n_head) for _ in range(shape.n_layer))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(shape.n_embd, bias=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        h = self.tokens(x) + self.positions(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            h = block(h)
        logits = F.linear(self.norm(h), self.tokens.weight)
        logits = logits.view(-1, logits.shape[-1])
        return F.cross_entropy(logits, targets.view(-1), ignore_index=-1)


def make_reference_step(
    shape: ModelConfig, data: Path, batch: int, micro: int, device: torch.device, compiled: bool
) -> Callable[[], None]:
    """Return a function that makes one update. bf16 on CUDA, otherwise fp32.

    Args:
        shape: of the model.
        data: folder with train.bin.
        batch: sequences per update.
        micro: sequences at once.
        device: where to train.
        compiled: whether to use torch.compile.
    """
    model: Any = Model(shape).to(device)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    norms = [p for p in model.parameters() if p.ndim != 2]
    groups = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": norms, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95), fused=True)
    if compiled:
        model = torch.compile(model)
    is_cuda = device.type == "cuda"
    context = torch.autocast("cuda", torch.bfloat16) if is_cuda else contextlib.nullcontext()

    def read() -> tuple[Tensor, Tensor]:
        tokens = np.memmap(data / "train.bin", dtype=np.uint16, mode="r")
        T = shape.block_size
        starts = torch.randint(len(tokens) - T, (micro,)).tolist()
        xs, ys = [], []
        for i in starts:
            xs.append(torch.from_numpy(tokens[i : i + T].astype(np.int64)))
            ys.append(torch.from_numpy(tokens[i + 1 : i + 1 + T].astype(np.int64)))
        x, y = torch.stack(xs), torch.stack(ys)
        if is_cuda:
            x = x.pin_memory().to(device, non_blocking=True)
            y = y.pin_memory().to(device, non_blocking=True)
        return x, y

    waiting = [read()]

    def step() -> None:
        for _ in range(batch // micro):
            x, y = waiting.pop()
            with context:
                loss = model(x, y) / (batch // micro)
            waiting.append(read())
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
