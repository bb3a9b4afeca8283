"""Train with Sophia-G in Hugging Face's Trainer: a callback updates the Hessian estimate.

    python examples/huggingface_trainer.py                    # needs requirements-examples.txt
    torchrun --standalone --nproc_per_node=2 -- examples/huggingface_trainer.py --bf16

Gradient accumulation, bf16, fp16 and DDP work as usual.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_cosine_schedule_with_warmup,
    set_seed,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sophia import SophiaG, sampled_label_loss

# Multiplies the summed loss in fp16, where small gradients would vanish. If a gradient
# overflows instead, h stays as it is.
FP16_SCALE = 64.0


class SophiaCallback(TrainerCallback):
    """Updates the Hessian estimate every `interval` steps, before the step.

    Trainer's gradients are not touched: the estimate comes before the first of them, and clears
    its own.

    Args:
        optimizer: the optimizer that Trainer steps.
        loader: batches for the estimates, one per rank and estimate; each rank has its own share.
        interval: the number of steps between two estimates.
    """

    def __init__(self, optimizer: SophiaG, loader: DataLoader, interval: int = 10) -> None:
        self.optimizer = optimizer
        self.interval = interval
        self.batches: Iterator[dict[str, Tensor]] = chain.from_iterable(repeat(loader))
        self.generator: torch.Generator | None = None

    def on_step_begin(
        self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any
    ) -> None:
        if state.global_step % self.interval == 0:
            self.estimate(kwargs["model"], args)

    def estimate(self, model: nn.Module, args: TrainingArguments) -> None:
        """Update h from the next batch of all ranks, and clear the gradients."""
        inputs = {name: tensor.to(args.device) for name, tensor in next(self.batches).items()}
        # The positions where Trainer's loss has a label; padding has none.
        predicts = inputs.pop("labels")[:, 1:] != -100

        if self.generator is None:  # different labels on each rank
            seed = args.seed + args.process_index
            self.generator = torch.Generator(args.device).manual_seed(seed)

        # The gradient of the summed loss on labels sampled from the model
        logits = model(**inputs).logits[:, :-1][predicts]  # (n, V)
        uniforms = torch.rand(len(logits), device=args.device, generator=self.generator)
        scale = FP16_SCALE if args.fp16 else 1.0
        (scale * sampled_label_loss(logits, uniforms, reduction="sum")).backward()

        # The gradient of the mean loss over the labels of all ranks
        count = torch.tensor(float(len(logits)), device=args.device)
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        if args.world_size > 1:
            for tensor in (*grads, count):
                dist.all_reduce(tensor)
        for grad in grads:
            grad.div_(scale * count)

        overflow = (~torch.isfinite(nn.utils.get_total_norm(grads))).float()
        self.optimizer.update_hessian_from_grad(n_labels=int(count), found_inf=overflow)
        self.optimizer.zero_grad()


class Bytes(Dataset):
    """Cuts the source of these examples into windows of `length` bytes."""

    def __init__(self, length: int = 32) -> None:
        text = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
        data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        self.windows = data.unfold(0, length, length)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.windows[index], "labels": self.windows[index]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--fp16", action="store_true")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", default="out/huggingface_trainer")
    arguments = parser.parse_args()

    # Model
    set_seed(0)
    shape = GPT2Config(
        vocab_size=256,
        n_positions=32,
        n_embd=64,
        n_layer=2,
        n_head=2,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = GPT2LMHeadModel(shape)

    # Optimizer, with weight decay on matrices, but not on biases and norms
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = SophiaG(groups, lr=1e-3, betas=(0.9, 0.95), rho=0.05)
    schedule = get_cosine_schedule_with_warmup(optimizer, 5, arguments.steps)

    # Training
    trainer = Trainer(
        model,
        TrainingArguments(
            arguments.out,
            max_steps=arguments.steps,
            per_device_train_batch_size=16,
            gradient_accumulation_steps=2,
            logging_steps=20,
            bf16=arguments.bf16,
            fp16=arguments.fp16,
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            report_to=[],
        ),
        train_dataset=Bytes(),
        optimizers=(optimizer, schedule),
    )
    trainer.add_callback(SophiaCallback(optimizer, trainer.get_train_dataloader()))
    loss = trainer.train().training_loss
    if trainer.is_world_process_zero():
        print(f"loss {loss:.3f}")


if __name__ == "__main__":
    main()
