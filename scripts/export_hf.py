"""Write a checkpoint as a folder that Hugging Face's transformers loads, with nothing of this repository installed.

    python scripts/export_hf.py out/gpt2_125m/sophia-g hf/gpt2_125m-sophia-g
    python scripts/export_hf.py out/quickstart/adamw/step_00000600.pt /tmp/small

Then, anywhere: transformers.pipeline("text-generation", "hf/gpt2_125m-sophia-g"). The folder holds the weights
(model.safetensors, fp32), the tokenizer and a model card. Given a run's folder it takes the newest checkpoint.
Needs requirements-hub.txt.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.write_tokens import gpt2_files, load_tokenizer
from model import num_parameters, padding_rows
from runtime import checkpoint
from runtime.cli import Parser, UserError, run_main
from runtime.config import Config
from runtime.hugging_face import hugging_face_config, to_hugging_face
from runtime.metrics import data_meta, read_environment, read_metrics, tokenizer_name

END_OF_TEXT = "<|endoftext|>"
CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [gpt2, {optimizer}]
---
# {name}

GPT-2 of {parameters:,} parameters, trained with {optimizer} for {step:,} of {max_steps:,} steps by a reproduction of
Sophia (arXiv 2305.14342). A base model: it continues text, and was not made safe or helpful.

* Started from: {start}
* Training data: {data}, {tokens:,} tokens seen ({batch_size} sequences of {block_size} a step)
* Validation loss: {loss}
* Trained at: {where}

```python
from transformers import pipeline
pipeline("text-generation", "PATH OF THIS FOLDER")("Once upon a time")
```

{scaling}The whole recipe:

```json
{recipe}
```
"""

SCALING = """Layer i divides its attention scores by i (`scale_attn_by_inverse_layer_idx`). The default attention of
transformers ignored that until March 2026 (its pull request 44397); to an older one pass `attn_implementation="eager"`.

"""


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("checkpoint", metavar="CKPT", type=Path, help="a run's folder, or one of its .pt files")
    parser.add_argument("out", metavar="DIR", type=Path, help="folder to write; must be new or empty")
    arguments = parser.parse_args()
    if arguments.out.is_file() or (arguments.out.is_dir() and any(arguments.out.iterdir())):
        raise UserError(f"{arguments.out}: is there already; name a new folder")
    export(arguments.checkpoint, arguments.out)
    print(f"wrote {arguments.out}: " + ", ".join(sorted(path.name for path in arguments.out.iterdir())))


def export(path: Path, out: Path) -> None:
    config, model, step = checkpoint.load_model(path)
    if not config.model.causal:
        raise UserError(f"{path}: fills in masked tokens (model.causal = false); transformers' GPT-2 cannot")
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        raise UserError("transformers is missing: python -m pip install -r requirements-hub.txt") from None
    tokenizer = make_tokenizer(tokenizer_name(path, config), config.model.block_size)
    card = model_card(path, config, step)  # before anything is written: it reads files that may be damaged
    exported = GPT2LMHeadModel(GPT2Config(**hugging_face_config(config.model, tokenizer.eos_token_id)))
    missing, unexpected = exported.load_state_dict(to_hugging_face(model), strict=False)
    assert missing == ["lm_head.weight"], missing  # which is the embedding itself
    assert not unexpected, unexpected
    exported.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "README.md").write_text(card, encoding="utf-8")


def make_tokenizer(name: str, block_size: int) -> Any:
    """transformers' tokenizer with our token ids; but it takes a text's own "<|endoftext|>" for the token."""
    from transformers import GPT2Tokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    load_tokenizer(name)  # refuses an unknown name
    if name == "gpt2":
        files = gpt2_files()
        vocabulary = json.loads(files["encoder.json"])
        lines = files["vocab.bpe"].decode().splitlines()[1:]  # after the version
        merges: Any = [tuple(line.split()) for line in lines if line]
    else:
        vocabulary = {character: byte for byte, character in bytes_to_unicode().items()} | {END_OF_TEXT: 256}
        merges = []
    return GPT2Tokenizer(vocab=vocabulary, merges=merges, model_max_length=block_size)


def model_card(path: Path, config: Config, step: int) -> str:
    folder = path if path.is_dir() else path.parent
    environment, loss = read_environment(folder), "not measured"
    known = [f"{key} {environment[key]}" for key in ("commit", "world_size", "device") if environment.get(key)]
    if (folder / "metrics.jsonl").exists():
        at = [r for r in read_metrics(folder / "metrics.jsonl") if "val_loss" in r and r["step"] == step]
        loss = f"{at[-1]['val_loss']:.4f} nats a token" if at else loss
    recipe = config.model_dump(exclude_none=True, exclude={"wandb"})
    recipe["train"].pop("out_dir")
    path_of_data = recipe.pop("data")["path"]
    source = data_meta(path, config).get("recipe", {}).get("source")
    return CARD.format(
        name=f"{config.experiment}/{config.run}",
        optimizer=config.optimizer.name,
        parameters=num_parameters(config.model) - padding_rows(config.model) * config.model.n_embd,
        step=step,
        max_steps=config.train.max_steps,
        start=config.train.init_from or "random weights",
        scaling=SCALING if config.model.scale_attn_by_inverse_layer_idx else "",
        data=json.dumps(source) if source else Path(path_of_data).name,
        tokens=step * config.train.batch_size * config.model.block_size,
        batch_size=config.train.batch_size,
        block_size=config.model.block_size,
        loss=loss,
        where=", ".join(known) or "a place that is not recorded",
        recipe=json.dumps(recipe, indent=2),
    )


if __name__ == "__main__":
    run_main(main)
