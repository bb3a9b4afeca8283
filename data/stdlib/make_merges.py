"""Train the byte-pair encoding of merges.txt on Python's standard library.

    python data/stdlib/make_merges.py  # needs requirements-hub.txt

merges.txt is part of the repository, so that its tokens are the same for every version of Python.
It was made with Python 3.11.7 and tokenizers 0.23.3.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.stdlib.prepare import find_modules, read_modules
from data.tokenizer import STDLIB_MERGES

N_TOKENS = 1024  # 256 bytes, 767 merges and end of text


def main() -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # GPT-2's
    trainer = trainers.BpeTrainer(
        vocab_size=N_TOKENS - 1, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(read_modules(find_modules()), trainer)

    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    STDLIB_MERGES.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"wrote {STDLIB_MERGES}: {len(merges)} merges")


if __name__ == "__main__":
    main()
