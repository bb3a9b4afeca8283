"""The reference for prepare.py: nanoGPT's way, datasets.map to lists that fill a memory map.

python benchmarks/nanogpt_prepare.py OUT PROCESSES FILE.parquet …
"""

import os
import sys
from pathlib import Path

import numpy as np
import tiktoken
from datasets import load_dataset

if __name__ == "__main__":
    out, processes, *files = sys.argv[1:]
    cache = Path(__file__).resolve().parents[1] / "data/tiktoken_cache"
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(cache))
    encoding = tiktoken.get_encoding("gpt2")

    def tokenize(document: dict) -> dict:
        ids = [*encoding.encode_ordinary(document["text"]), encoding.eot_token]
        return {"ids": ids, "len": len(ids)}

    documents = load_dataset("parquet", data_files=files, split="train", cache_dir=f"{out}/cache")
    splits = documents.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    tokenized_splits = splits.map(tokenize, remove_columns=["text"], num_proc=int(processes))

    for split, tokenized in tokenized_splits.items():
        n_tokens = sum(tokenized["len"])
        tokens = np.memmap(f"{out}/{split}.bin", np.uint16, "w+", shape=(n_tokens,))
        shards, position = min(1024, len(tokenized)), 0
        for index in range(shards):
            shard = tokenized.shard(num_shards=shards, index=index, contiguous=True)
            ids = np.concatenate(shard.with_format("numpy")["ids"])
            tokens[position : position + len(ids)] = ids
            position += len(ids)
        tokens.flush()
