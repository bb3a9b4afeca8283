"""GPT-2 in one file, as the Sophia paper trains it: tied embeddings, tanh GELU, no dropout.

Shapes: B sequences of T tokens, C = n_embd channels, H heads of size D = C / H, V = vocab_size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# The embedding table is padded to a multiple of 64 rows (50,257 becomes 50,304), which keeps its
# matrix products on tensor-core tiles. The extra rows are never looked up, and their logits are
# cut off before the softmax.
VOCAB_MULTIPLE = 64


class ModelConfig(BaseModel):
    """The shape of a GPT-2. Unknown keys and values of another type are refused."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    n_layer: int = Field(gt=0, le=1000, description="transformer blocks")
    n_head: int = Field(gt=0, le=1000, description="attention heads per block")
    n_embd: int = Field(gt=0, le=100_000, description="channels, a multiple of n_head")
    block_size: int = Field(1024, gt=0, le=1_000_000, description="context length in tokens")
    vocab_size: int = Field(50257, gt=1, le=65536, description="tokens in the vocabulary")
    scale_attn_by_inverse_layer_idx: bool = Field(
        True, description="layer i (from 1) divides its attention scores by i"
    )
    bias: bool = Field(
        False, description="biases in linear layers and norms, as in OpenAI's weights"
    )
    mup_base_width: int = Field(
        0,
        ge=0,
        le=100_000,
        description="n_embd at which the learning rates were tuned, to transfer them (muP); 0: off",
    )
    causal: bool = Field(
        True, description="predict the next token; false: predict masked tokens from both sides"
    )

    @model_validator(mode="after")
    def _heads_divide_channels(self) -> ModelConfig:
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        return self

    @property
    def relative_width(self) -> float:
        """n_embd in multiples of the width at which the learning rates were tuned; 1 without muP.

        From it follow all of muP's changes: initialization and logits here, learning rates, weight
        decay and Sophia's rho in optimizers/build.py.
        """
        return self.n_embd / (self.mup_base_width or self.n_embd)

    @property
    def mask_token(self) -> int:
        """The token that replaces a masked one: the vocabulary's last, which text must not use."""
        return self.vocab_size - 1

    @property
    def text_vocab_size(self) -> int:
        """The number of different tokens that text may contain."""
        return self.vocab_size if self.causal else self.mask_token

    @property
    def labels_per_sequence(self) -> int:
        """The tokens of a sequence that enter the loss: all, or BERT's 15 % (arXiv 1810.04805)."""
        return self.block_size if self.causal else max(1, round(0.15 * self.block_size))


class Attention(nn.Module):
    """Multi-head self-attention, causal in GPT-2."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.causal = config.causal
        self.scale = 1.0 / math.sqrt(config.n_embd // config.n_head)
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer + 1

        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, cache: list[Tensor] | None = None) -> Tensor:
        B, T, C = x.shape
        heads = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)  # (B, T, 3, H, D)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # each (B, H, T, D)

        if cache is not None:
            if cache:
                k = torch.cat([cache[0], k], dim=2)
                v = torch.cat([cache[1], v], dim=2)
            cache[:] = [k, v]

        causal = self.causal and T > 1  # a single query may attend to every cached key
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=self.scale)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(gelu(self.c_fc(x)))


def gelu(x: Tensor) -> Tensor:
    """Return GPT-2's GELU, x/2 · (1 + tanh z) with z = √(2/π) (x + 0.044715 x³)."""
    if not torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    # The same function, x · sigmoid(2z). On a CPU a compiled training step takes 8 to 9 % less time
    # with it: 145.5 instead of 159.1 ms for the quickstart's model, 1,594 instead of 1,730 ms for
    # 6 layers × 384 channels (2 cores of an AMD EPYC, torch 2.13.0).
    return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: list[Tensor] | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2, with the token embedding as its output head.

    Args:
        config: the model's shape.
        loss_chunk: compute the logits for this many tokens at a time; 0 for all at once.
    """

    def __init__(self, config: ModelConfig, loss_chunk: int = 0) -> None:
        super().__init__()
        self.config = config
        self.loss_chunk = loss_chunk
        self.wte = nn.Embedding(config.vocab_size + padding_rows(config), config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        self._initialize()

    def _initialize(self) -> None:
        """Initialize like GPT-2: N(0, 0.02²), less for projections into the residual stream."""
        linear_std = 0.02 / math.sqrt(self.config.relative_width)
        residual_std = linear_std / math.sqrt(2 * self.config.n_layer)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=residual_std)
            elif parameter.ndim == 2:
                std = linear_std if name.startswith("blocks.") else 0.02
                nn.init.normal_(parameter, std=std)

    def forward(
        self, tokens: Tensor, criterion: Callable[..., Tensor] | None = None, *labels: Tensor
    ) -> Tensor:
        """Return logits (B, T, V) for `tokens` (B, T), or `criterion(logits, *labels)`.

        The criterion runs inside forward, so that `torch.compile` fuses it with the head and
        DistributedDataParallel works with any loss. It must be a sum over tokens, because with
        `loss_chunk` it is called on that many tokens at a time.
        """
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.wte(tokens) + self.wpe(positions)  # (B, T, C)
        for block in self.blocks:
            x = block(x)
        x = self.ln_f(x)

        if criterion is None:
            return self.head(x)
        if not self.loss_chunk:
            return criterion(self.head(x), *labels)

        # The logits are the largest tensor by far. Computing them in chunks, and again in the
        # backward pass, means that they never exist all at once.
        chunk_loss = functools.partial(
            checkpoint, self._chunk_loss, criterion, use_reentrant=False, preserve_rng_state=False
        )
        flat = [tensor.flatten(0, 1) for tensor in (x, *labels)]
        chunks = zip(*(tensor.split(self.loss_chunk) for tensor in flat), strict=True)
        return torch.stack([chunk_loss(*chunk) for chunk in chunks]).sum()

    def next_logits(self, tokens: Tensor, caches: list[list[Tensor]]) -> Tensor:
        """Return logits (B, V) for the token that follows `tokens` (B, T), for sampling.

        `caches` holds one list per block with the keys and values of all earlier tokens, and is
        extended by those of `tokens`. Start with empty lists and the whole prompt, then pass one
        token at a time, block_size tokens at most in total.
        """
        past = caches[0][0].shape[2] if caches[0] else 0
        assert past == 0 or tokens.shape[1] == 1, "pass the whole prompt first, then single tokens"

        positions = torch.arange(past, past + tokens.shape[1], device=tokens.device)
        x = self.wte(tokens) + self.wpe(positions)
        for block, cache in zip(self.blocks, caches, strict=True):
            x = block(x, cache)
        return self.head(self.ln_f(x[:, -1]))

    def head(self, x: Tensor) -> Tensor:
        """Return logits (..., V) for hidden states (..., C), without those of the padding rows."""
        if self.config.relative_width != 1:
            x = x / self.config.relative_width
        return F.linear(x, self.wte.weight)[..., : self.config.vocab_size]

    def _chunk_loss(self, criterion: Callable[..., Tensor], x: Tensor, *labels: Tensor) -> Tensor:
        return criterion(self.head(x), *labels)


def padding_rows(config: ModelConfig) -> int:
    """Return how many rows of the embedding table do not belong to a token."""
    return -config.vocab_size % VOCAB_MULTIPLE


def summed_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross entropy in nats, summed over the tokens whose target is not -1.

    Args:
        logits: (..., V), converted to fp32 if they are 16 bits wide.
        targets: (...).
    """
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    logits = logits.flatten(0, -2)
    return F.cross_entropy(logits, targets.flatten(), ignore_index=-1, reduction="sum")
