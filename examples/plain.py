"""Train with Sophia-G in a plain PyTorch loop.

    python examples/plain.py            # seconds on a CPU

To do the same in your own loop, copy sophia.py and add the five lines marked with an arrow (<-).
The model is a small byte-level language model, trained on the source of these examples.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sophia import SophiaG, sampled_label_loss

text = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def get_batch(size: int = 32, length: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random windows of the data, and the same windows shifted by one byte."""
    starts = torch.randint(len(data) - length, (size, 1)) + torch.arange(length)
    return data[starts], data[starts + 1]


class Model(nn.Module):
    """Predicts the next byte with a recurrent network."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 64)
        self.rnn = nn.GRU(64, 64, batch_first=True)
        self.head = nn.Linear(64, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(self.embedding(x))[0])


def main() -> None:
    torch.manual_seed(0)
    model = Model()
    optimizer = SophiaG(model.parameters(), lr=3e-3, betas=(0.9, 0.95), rho=0.05, weight_decay=0.1)

    for step in range(200):
        x, y = get_batch()

        # Update h, the moving average of the Hessian diagonal.
        if step % 10 == 0:  # <- every k steps
            uniforms = torch.rand(y.shape, device=y.device)  # <- one number in [0, 1) per label
            sampled_label_loss(model(x), uniforms).backward()  # <- labels sampled from the model
            optimizer.update_hessian_from_grad(n_labels=y.numel())  # <- n · grad² into h
            optimizer.zero_grad()  # <-

        # The usual training step.
        loss = F.cross_entropy(model(x).flatten(0, -2), y.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

        if step % 50 == 49:
            print(f"step {step + 1}  loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
