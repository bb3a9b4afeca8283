"""Generate text from a checkpoint.

    python scripts/sample.py out/gpt2_125m/sophia-g --prompt "The meaning of life"
    python scripts/sample.py out/quickstart/adamw/step_00000240.pt --prompt "def " --tokens 300

For a run's folder, the newest checkpoint is used. The tokenizer is the one that the run's data was
made with, or GPT-2's if that is not recorded.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.tokenizer import load_tokenizer, tokenizer_of_run
from model import GPT
from runtime import checkpoint
from runtime.cli import Parser, UserError, number, run_main


def main() -> None:
    arguments = make_parser().parse_args()
    path = arguments.checkpoint
    config, model, _ = checkpoint.load_model(path)
    if not config.model.causal:
        raise UserError(
            f"{path}: predicts masked tokens (model.causal = false) and cannot continue a text"
        )
    tokenizer = load_tokenizer(tokenizer_of_run(path, config))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).eval()

    # Without a prompt, start a new document.
    text = arguments.prompt.encode(errors="replace").decode()
    prompt = tokenizer.encode(text).tolist() or [tokenizer.end_of_text]
    tokens = generate(
        model,
        torch.tensor([prompt], device=device),
        arguments.tokens,
        torch.Generator(device).manual_seed(arguments.seed),
        arguments.temperature,
        arguments.top_k,
        arguments.top_p,
    )
    written = [token for token in tokens[0].tolist() if token != tokenizer.end_of_text]
    print(tokenizer.decode(written))


@torch.no_grad()
def generate(
    model: GPT,
    tokens: Tensor,
    count: int,
    generator: torch.Generator,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Tensor:
    """Append `count` sampled tokens to `tokens` (B, T); see :func:`draw` for the options."""
    block_size = model.config.block_size
    caches: list[list[Tensor]] = [[] for _ in model.blocks]
    for _ in range(count):
        if tokens.shape[1] <= block_size:
            logits = model.next_logits(tokens[:, -1:] if caches[0] else tokens, caches)
        else:
            # The window moves, and with it every token's position: cached keys are of no use.
            logits = model(tokens[:, -block_size:])[:, -1]
        drawn = draw(logits.float(), temperature, top_k, top_p, generator)
        tokens = torch.cat([tokens, drawn], dim=1)
    return tokens


def draw(
    logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator
) -> Tensor:
    """Draw tokens (B, 1) from logits (B, V).

    Args:
        logits: (B, V).
        temperature: 0 takes the most likely token.
        top_k: keep only the k most likely tokens; 0 keeps all.
        top_p: keep only the fewest most likely tokens whose probabilities sum to this.
        generator: source of randomness, on the logits' device.
    """
    if temperature < 1e-3:  # the division below would overflow, and the result is certain anyway
        return logits.argmax(-1, keepdim=True)
    ordered, tokens = logits.sort(-1, descending=True)
    probabilities = (ordered[:, : top_k or None] / temperature).softmax(-1)
    if top_p < 1:
        before = probabilities.cumsum(-1) - probabilities  # the sum over more likely tokens
        probabilities = probabilities * (before < top_p)
    return tokens.gather(-1, torch.multinomial(probabilities, 1, generator=generator))


def make_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", type=Path, help="a run's folder, or one of its files")
    add("--prompt", default="", metavar="TEXT", help="text to continue (default: a new document)")
    add("--tokens", metavar="N", type=number(int, 1), default=200, help="tokens to generate")
    temperature = "higher is more random; 0 takes the most likely token"
    add("--temperature", metavar="T", type=number(float, 0, 100), default=0.8, help=temperature)
    top_k = "keep the K most likely tokens; 0: all"
    add("--top-k", metavar="K", type=number(int, 0), default=200, help=top_k)
    top_p = "keep the most likely tokens whose probabilities sum to P"
    add("--top-p", metavar="P", type=number(float, 1e-6, 1), default=1.0, help=top_p)
    add("--seed", metavar="N", type=number(int, 0, 2**63 - 1), default=0, help="random seed")
    return parser


if __name__ == "__main__":
    run_main(main)
