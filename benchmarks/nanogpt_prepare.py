"""What bench.py measures prepare.py against: nanoGPT's way, datasets.map to lists and a memory map filled from them.

python benchmarks/nanogpt_prepare.py OUT PROCESSES FILE.parquet …      # needs `datasets`
"""

import os
import sys
from pathlib import Path

import numpy as np
import tiktoken
from datasets import load_dataset

if __name__ == "__main__":
    out, processes, *files = sys.argv[1:]
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(Path(__file__).parents[1] / "data/tiktoken_cache"))
    encoding = tiktoken.get_encoding("gpt2")

    def tokenize(document: dict) -> dict:
        ids = [*encoding.encode_ordinary(document["text"]), encoding.eot_token]
        return {"ids": ids, "len": len(ids)}

    documents = load_dataset("parquet", data_files=files, split="train", cache_dir=f"{out}/cache")
    splits = documents.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    for split, tokenized in splits.map(tokenize, remove_columns=["text"], num_proc=int(processes)).items():
        tokens = np.memmap(f"{out}/{split}.bin", np.uint16, "w+", shape=(sum(tokenized["len"]),))
        shards, position = min(1024, len(tokenized)), 0
        for index in range(shards):
            shard = tokenized.shard(num_shards=shards, index=index, contiguous=True).with_format("numpy")
            ids = np.concatenate(shard["ids"])
            tokens[position : position + len(ids)] = ids
            position += len(ids)
        tokens.flush()
