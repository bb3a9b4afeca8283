"""Write text from a checkpoint.

    python scripts/sample.py out/gpt2_125m/sophia-g --prompt "The meaning of life"
    python scripts/sample.py out/quickstart/adamw/step_00000600.pt --prompt "def " --tokens 300 --temperature 0.8

Given a run's folder it takes the newest checkpoint. The tokenizer is the one in the meta.json of the run's data, or
GPT-2's where there is none.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import checkpoint
from data.token_files import read_meta
from data.tokenize import load_tokenizer
from errors import UserError, number, run_main
from model import GPT


def main() -> None:
    arguments = _parser().parse_args()
    path = arguments.checkpoint
    config, model, _ = checkpoint.load_model(path)
    if not config.model.causal:
        raise UserError(f"{path}: fills in masked tokens (model.causal = false) and cannot continue a text")
    tokenizer = load_tokenizer(read_meta(Path(config.data.path)).get("tokenizer", "gpt2"))
    if tokenizer.vocab_size != config.model.vocab_size:
        raise UserError(
            f"{path}: was trained on {config.model.vocab_size} tokens, the tokenizer of {config.data.path} has "
            f"{tokenizer.vocab_size}; put the data it was trained on back there"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).eval()

    prompt = tokenizer.encode(arguments.prompt.encode(errors="replace").decode()).tolist() or [tokenizer.end_of_text]
    generator = torch.Generator(device).manual_seed(arguments.seed)
    tokens = torch.tensor([prompt], device=device)
    tokens = generate(model, tokens, arguments.tokens, arguments.temperature, arguments.top_k, generator)
    written = [token for token in tokens[0].tolist() if token != tokenizer.end_of_text]
    print(tokenizer.decode(written))


@torch.no_grad()
def generate(
    model: GPT, tokens: Tensor, count: int, temperature: float, top_k: int, generator: torch.Generator
) -> Tensor:
    """Append `count` sampled tokens to `tokens` (B, T). Temperature 0 takes the most likely one; top_k 0 allows all."""
    for _ in range(count):
        logits = model(tokens[:, -model.config.block_size :])[:, -1].float()  # (B, V)
        if top_k:
            kept = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
            logits[logits < kept] = -torch.inf
        if temperature < 1e-3:  # below, the division overflows, and the most likely token is certain anyway
            new = logits.argmax(-1, keepdim=True)
        else:
            new = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        tokens = torch.cat([tokens, new], dim=1)
    return tokens


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="a run's folder, or one of its .pt files")
    parser.add_argument("--prompt", default="", metavar="TEXT", help="text to continue (default: begin a document)")
    parser.add_argument("--tokens", type=number(int, 1), default=200, metavar="N", help="default %(default)s")
    parser.add_argument(
        "--temperature", type=number(float, 0, 100), default=0.8, metavar="T", help="default %(default)s"
    )
    parser.add_argument("--top-k", type=number(int, 0), default=200, metavar="K", help="0: all (default %(default)s)")
    parser.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=0, metavar="N", help="default %(default)s")
    return parser


if __name__ == "__main__":
    run_main(main)
