"""GPT-2 in one file, as the Sophia paper trains it: no biases (but where asked), no dropout, tied embeddings, tanh
GELU.

Shapes: B sequences, T tokens each, C = n_embd channels, H heads of size D = C / H, V = vocab_size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from runtime.config import ModelConfig

# The embedding table gets rows up to a multiple of 64, so that its matrix products fall on tensor-core tiles
# (50,257 becomes 50,304). The extra rows are never looked up and their logits are cut off before the softmax.
VOCAB_MULTIPLE = 64


class Attention(nn.Module):
    """Self-attention, causal in GPT-2. With inverse-layer scaling, layer i (from 1) divides its scores by i too."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.n_head, self.causal = config.n_head, config.causal
        self.scale = 1.0 / math.sqrt(config.n_embd // config.n_head)
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer + 1
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, cache: list[Tensor] | None = None) -> Tensor:
        B, T, C = x.shape
        heads = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)  # (B, T, 3, H, D)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # 3 × (B, H, T, D)
        if cache is not None:  # the keys and values of the tokens before, with which a new one is compared
            cache[:] = (
                [torch.cat([old, new], dim=2) for old, new in zip(cache, (k, v), strict=True)] if cache else [k, v]
            )
            k, v = cache
        causal = self.causal and T > 1  # a single query may see every key there is
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=self.scale)  # (B, H, T, D)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """Two linear maps with GPT-2's tanh-approximated GELU between them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(gelu(self.c_fc(x)))


def gelu(x: Tensor) -> Tensor:
    """GPT-2's GELU: x/2 · (1 + tanh z) with z = √(2/π) (x + 0.044715 x³)."""
    if not torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    # The same as x · sigmoid 2z, which takes the compiler's code half the time on a CPU.
    return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))


class Block(nn.Module):
    """Pre-norm transformer block."""

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
    """GPT-2. The output head is the token embedding itself, so each weight exists, and is optimized, once."""

    def __init__(self, config: ModelConfig, loss_chunk: int = 0) -> None:
        super().__init__()
        self.config = config
        self.loss_chunk = loss_chunk
        self.wte = nn.Embedding(config.vocab_size + padding_rows(config), config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        self._initialise()

    def _initialise(self) -> None:
        """GPT-2's: N(0, 0.02²); the two projections into the residual stream N(0, 0.02² / (2 n_layer)); biases 0."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            if parameter.ndim == 2:
                residual = name.endswith("c_proj.weight")
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02)

    def forward(self, tokens: Tensor, criterion: Callable[..., Tensor] | None = None, *labels: Tensor) -> Tensor:
        """Logits (B, T, V) for `tokens` (B, T), or `criterion(logits, *labels)` summed over all tokens.

        The criterion runs inside forward so that `torch.compile` sees it together with the head, and so that
        DistributedDataParallel serves the training loss and Sophia's sampled-label loss alike. It has to be a sum over
        tokens: with a loss_chunk it sees that many of them at a time.
        """
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))  # (B, T, C)
        for block in self.blocks:
            x = block(x)
        x = self.ln_f(x)
        if criterion is None:
            return self.head(x)
        if not self.loss_chunk:
            return criterion(self.head(x), *labels)
        # The logits are the largest tensor by far. Made chunk by chunk, and once more in backward, they need no room.
        chunks = zip(*(t.flatten(0, 1).split(self.loss_chunk) for t in (x, *labels)), strict=True)
        again = functools.partial(checkpoint, self._loss, criterion, use_reentrant=False, preserve_rng_state=False)
        return torch.stack([again(*chunk) for chunk in chunks]).sum()

    def next_logits(self, tokens: Tensor, caches: list[list[Tensor]]) -> Tensor:
        """Logits (B, V) for what follows `tokens` (B, T), for writing text token by token.

        The caches, a list a block, hold the keys and values of all tokens so far and get those of these. They begin
        empty, with the whole prompt; after it T is 1. All tokens together are at most block_size.
        """
        past = caches[0][0].shape[2] if caches[0] else 0
        assert past == 0 or tokens.shape[1] == 1, "attention's mask is made for a whole prompt, or for one token"
        positions = torch.arange(past, past + tokens.shape[1], device=tokens.device)
        x = self.wte(tokens) + self.wpe(positions)
        for block, cache in zip(self.blocks, caches, strict=True):
            x = block(x, cache)
        return self.head(self.ln_f(x[:, -1]))

    def head(self, x: Tensor) -> Tensor:
        """Logits (..., V) from (..., C), without those of the padding rows."""
        V = self.config.vocab_size
        if x.is_cuda:
            return F.linear(x, self.wte.weight)[..., :V]
        return F.linear(x, self.wte.weight[:V])  # no tensor cores: no reason to compute the padding

    def _loss(self, criterion: Callable[..., Tensor], x: Tensor, *labels: Tensor) -> Tensor:
        return criterion(self.head(x), *labels)


def summed_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy in nats, in fp32 or better, summed over the tokens; those with target -1 are left out.

    logits (..., V), targets (...).
    """
    logits = _at_least_fp32(logits).flatten(0, -2)
    return F.cross_entropy(logits, targets.flatten(), ignore_index=-1, reduction="sum")


def _at_least_fp32(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def weight_decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Parameter groups as in the paper: the linear layers' matrices decay, embeddings and norms do not."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    matrices = [p for p in model.parameters() if p.ndim == 2 and id(p) not in embeddings]
    others = [p for p in model.parameters() if p.ndim != 2 or id(p) in embeddings]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def padding_rows(config: ModelConfig) -> int:
    """Rows of the embedding table that are no tokens."""
    return -config.vocab_size % VOCAB_MULTIPLE


@functools.cache
def num_parameters(config: ModelConfig) -> int:
    """Parameters that are stored and optimized (padding rows counted), found without allocating any."""
    with torch.device("meta"):
        return sum(p.numel() for p in GPT(config).parameters())


def flops_per_token(config: ModelConfig) -> int:
    """Floating-point operations of one forward and backward a token: 6 N + 12 n_layer C T (PaLM, appendix B).

    N leaves out the position embedding, which is looked up and never multiplied.
    """
    n = num_parameters(config) - config.block_size * config.n_embd
    return 6 * n + 12 * config.n_layer * config.n_embd * config.block_size


def activation_bytes(config: ModelConfig, dtype: str, sequences: int, loss_chunk: int = 0) -> int:
    """Memory that forward keeps for backward; a rule of thumb, for fused attention.

    A block keeps 36 bytes a channel and token with a 16-bit autocast and 64 in fp32 (counted on autograd's saved
    tensors); the head keeps fp32 log-probabilities, and the gradient of the loss twice as much.
    """
    tokens = sequences * config.block_size
    block = 64 if dtype == "float32" else 36
    return tokens * block * config.n_layer * config.n_embd + min(loss_chunk or tokens, tokens) * 12 * config.vocab_size


def hvp_bytes(config: ModelConfig, dtype: str, compiled: bool) -> int:
    """The same for the Hessian-vector product of one sequence, which keeps every tensor with its derivative.

    Attention runs in plain operations there, so that each head keeps T × T scores, 24 bytes each; a channel and token
    of a block takes 144 bytes (fp32: 240), a logit 16 (20). Counted in eager mode; compiled, it took 0.46 of it (CPU).
    """
    T = config.block_size
    channel, logit = (240, 20) if dtype == "float32" else (144, 16)
    block = 24 * config.n_head * T + channel * config.n_embd
    return T * (config.n_layer * block + logit * config.vocab_size) // (2 if compiled else 1)
