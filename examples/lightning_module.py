"""Train with Sophia-G in Lightning: a hook before the batch updates the Hessian estimate.

python examples/lightning_module.py          # seconds on a CPU; needs requirements-examples.txt
"""

from __future__ import annotations

import sys
from pathlib import Path

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sophia import SophiaG, sampled_label_loss


class Classifier(lightning.LightningModule):
    """Predicts which of four corners a noisy point is nearest to.

    Args:
        interval: the number of steps between two Hessian estimates.
    """

    def __init__(self, interval: int = 10) -> None:
        super().__init__()
        self.interval = interval
        self.generator: torch.Generator | None = None
        self.layers = nn.Sequential(nn.Linear(2, 32), nn.GELU(), nn.Linear(32, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def configure_optimizers(self) -> SophiaG:
        """Return SophiaG with weight decay on matrices, but not on biases."""
        matrices = [p for p in self.parameters() if p.ndim >= 2]
        biases = [p for p in self.parameters() if p.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": 0.1},
            {"params": biases, "weight_decay": 0.0},
        ]
        return SophiaG(groups, lr=3e-3, betas=(0.9, 0.95), rho=0.05)

    def on_train_batch_start(self, batch: list[Tensor], batch_idx: int) -> None:
        """Update the Hessian estimate every `interval` steps, before gradients accumulate."""
        begins_step = batch_idx % self.trainer.accumulate_grad_batches == 0
        if begins_step and self.trainer.global_step % self.interval == 0:
            self.estimate(batch[0])

    def estimate(self, x: Tensor) -> None:
        """Update h from the inputs `x` of all ranks, and clear the gradients."""
        if self.generator is None:  # different labels on each rank
            self.generator = torch.Generator(self.device).manual_seed(self.global_rank)
        uniforms = torch.rand(len(x), device=self.device, generator=self.generator)

        with self.trainer.precision_plugin.forward_context():
            loss = sampled_label_loss(self(x), uniforms)
        loss.backward()

        # Average the gradients over the ranks.
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad = self.trainer.strategy.reduce(parameter.grad, reduce_op="mean")

        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, SophiaG)
        optimizer.update_hessian_from_grad(n_labels=len(x) * self.trainer.world_size)
        optimizer.zero_grad()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("loss", loss)
        return loss


def main() -> None:
    lightning.seed_everything(0, verbose=False)
    corners = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    labels = torch.randint(4, (4096,))
    data = TensorDataset(corners[labels] + 0.5 * torch.randn(4096, 2), labels)

    trainer = lightning.Trainer(
        max_epochs=4,
        accelerator="cpu",
        devices=1,
        accumulate_grad_batches=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(), DataLoader(data, batch_size=64, shuffle=True))
    print(f"loss {trainer.callback_metrics['loss'].item():.3f}")


if __name__ == "__main__":
    main()
