"""Write text from a checkpoint.

    python scripts/sample.py out/gpt2_125m/sophia-g --prompt "The meaning of life"
    python scripts/sample.py out/quickstart/adamw/step_00000600.pt --prompt "def " --tokens 300 --temperature 0.8

Given a run's folder it takes the newest checkpoint. The tokenizer is the one that the run's data was made with, or
GPT-2's where the data does not say.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.write_tokens import load_tokenizer
from model import GPT
from runtime import checkpoint
from runtime.cli import Parser, UserError, number, run_main
from runtime.metrics import tokenizer_name


def main() -> None:
    arguments = _parser().parse_args()
    path = arguments.checkpoint
    config, model, _ = checkpoint.load_model(path)
    if not config.model.causal:
        raise UserError(f"{path}: fills in masked tokens (model.causal = false) and cannot continue a text")
    tokenizer = load_tokenizer(tokenizer_name(path, config))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).eval()

    prompt = tokenizer.encode(arguments.prompt.encode(errors="replace").decode()).tolist() or [tokenizer.end_of_text]
    generator = torch.Generator(device).manual_seed(arguments.seed)
    tokens = torch.tensor([prompt], device=device)
    limits = (arguments.temperature, arguments.top_k, arguments.top_p)
    tokens = generate(model, tokens, arguments.tokens, generator, *limits)
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
    """Append `count` sampled tokens to `tokens` (B, T); see :func:`draw`."""
    caches: list[list[Tensor]] = [[] for _ in model.blocks]
    for _ in range(count):
        if tokens.shape[1] <= model.config.block_size:
            logits = model.next_logits(tokens[:, -1:] if caches[0] else tokens, caches)
        else:  # every token's position moves: what was cached is of no use
            logits = model(tokens[:, -model.config.block_size :])[:, -1]
        tokens = torch.cat([tokens, draw(logits.float(), temperature, top_k, top_p, generator)], dim=1)
    return tokens


def draw(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> Tensor:
    """Tokens (B, 1) from logits (B, V): of the top_k likeliest (0: all), and of the fewest that make up top_p.

    Temperature 0 takes the likeliest.
    """
    if temperature < 1e-3:  # below, the division overflows, and the likeliest is certain anyway
        return logits.argmax(-1, keepdim=True)
    ordered, tokens = logits.sort(-1, descending=True)
    probabilities = (ordered[:, : top_k or None] / temperature).softmax(-1)
    if top_p < 1:
        before = probabilities.cumsum(-1) - probabilities  # what likelier tokens make up already
        probabilities = probabilities * (before < top_p)
    return tokens.gather(-1, torch.multinomial(probabilities, 1, generator=generator))


def _parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", type=Path, help="a run's folder, or one of its .pt files")
    add("--prompt", default="", metavar="TEXT", help="text to continue (default: begin a document)")
    add("--tokens", metavar="N", type=number(int, 1), default=200, help="tokens to write")
    warmth = "above 0: the higher, the wilder; 0: the likeliest token"
    add("--temperature", metavar="T", type=number(float, 0, 100), default=0.8, help=warmth)
    add("--top-k", metavar="K", type=number(int, 0), default=200, help="keep the K likeliest tokens; 0: all")
    share = "keep the likeliest tokens that make up the share P"
    add("--top-p", metavar="P", type=number(float, 1e-6, 1), default=1.0, help=share)
    add("--seed", metavar="N", type=number(int, 0, 2**63 - 1), default=0, help="seed of the draws")
    return parser


if __name__ == "__main__":
    run_main(main)
