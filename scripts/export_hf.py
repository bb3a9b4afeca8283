"""Export a checkpoint to a folder that Hugging Face's transformers loads, without this repository.

    python scripts/export_hf.py out/gpt2_125m/sophia-g hf/gpt2_125m-sophia-g
    python scripts/export_hf.py out/quickstart/adamw/step_00000240.pt /tmp/small

Then, anywhere: transformers.pipeline("text-generation", "hf/gpt2_125m-sophia-g"). The folder has
the weights (model.safetensors, fp32), the tokenizer and a model card. For a run's folder, the
newest checkpoint is exported. Needs requirements-hub.txt.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.tokenizer import (
    END_OF_TEXT,
    STDLIB_MERGES,
    byte_characters,
    data_meta,
    gpt2_files,
    load_tokenizer,
    read_merges,
    tokenizer_of_run,
)
from model import GPT, padding_rows
from runtime import checkpoint
from runtime.cli import Parser, UserError, run_main
from runtime.config import Config
from runtime.cost import num_parameters
from runtime.hugging_face import hugging_face_config, to_hugging_face
from runtime.run_folder import METRICS, read_environment, read_metrics

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [gpt2, {optimizer}]
---
# {name}

GPT-2 with {parameters:,} parameters, trained with {optimizer} for {step:,} of {max_steps:,} steps
by a reproduction of Sophia (arXiv 2305.14342). This is a base model: it continues text, and was not
made safe or helpful.

* Started from: {start}
* Training data: {data}, {tokens:,} tokens seen ({batch_size} sequences of {block_size} per step)
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

SCALING = """Layer i divides its attention scores by i (`scale_attn_by_inverse_layer_idx`). The
default attention of transformers ignored that until March 2026 (its pull request 44397); with an
older one pass `attn_implementation="eager"`.

"""


def main() -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("checkpoint", metavar="CKPT", type=Path, help="a run's folder, or one of its .pt files")
    add("out", metavar="DIR", type=Path, help="folder to write; must be new or empty")
    arguments = parser.parse_args()
    out = arguments.out
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"{out}: exists already; name a new folder")
    export(arguments.checkpoint, out)
    print(f"wrote {out}: " + ", ".join(sorted(path.name for path in out.iterdir())))


def export(path: Path, out: Path) -> None:
    """Write a checkpoint's weights, tokenizer and model card to the folder `out`."""
    config, model, step = checkpoint.load_model(path)
    if not config.model.causal:
        raise UserError(
            f"{path}: predicts masked tokens (model.causal = false), which transformers' GPT-2 "
            f"cannot"
        )
    # Everything that may fail comes before the first write.
    tokenizer = make_tokenizer(tokenizer_of_run(path, config), config.model.block_size)
    card = model_card(path, config, step)
    exported = make_model(model, tokenizer.eos_token_id)

    exported.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "README.md").write_text(card, encoding="utf-8")


def make_model(model: GPT, end_of_text: int) -> Any:
    """Return transformers' GPT-2 with our weights."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError as error:
        raise UserError(
            "transformers is missing: python -m pip install -r requirements-hub.txt"
        ) from error
    theirs = GPT2LMHeadModel(GPT2Config(**hugging_face_config(model.config, end_of_text)))
    missing, unexpected = theirs.load_state_dict(to_hugging_face(model), strict=False)
    assert missing == ["lm_head.weight"], missing  # which is the embedding itself
    assert not unexpected, unexpected
    return theirs


def make_tokenizer(name: str, block_size: int) -> Any:
    """Return transformers' tokenizer with our token ids.

    Unlike ours, it reads "<|endoftext|>" in a text as the token.
    """
    try:
        from transformers import GPT2Tokenizer
    except ImportError as error:
        raise UserError(
            "transformers is missing: python -m pip install -r requirements-hub.txt"
        ) from error

    load_tokenizer(name)  # refuses an unknown name
    merges: Any = []
    if name == "bytes":
        vocabulary = byte_characters() | {END_OF_TEXT: 256}
    elif name == "stdlib":
        merges = read_merges(STDLIB_MERGES.read_text(encoding="utf-8"))
        tokens = [*byte_characters(), *(left + right for left, right in merges), END_OF_TEXT]
        vocabulary = {token: index for index, token in enumerate(tokens)}
    else:
        files = gpt2_files()
        merges = read_merges(files["vocab.bpe"].decode())
        vocabulary = json.loads(files["encoder.json"])
    return GPT2Tokenizer(vocab=vocabulary, merges=merges, model_max_length=block_size)


def model_card(path: Path, config: Config, step: int) -> str:
    """Return the model card of a checkpoint."""
    folder = path if path.is_dir() else path.parent
    environment = read_environment(folder)
    known = []
    for key in ("commit", "world_size", "device"):
        if environment.get(key):
            known.append(f"{key} {environment[key]}")

    loss = "not measured"
    if (folder / METRICS).exists():
        for record in read_metrics(folder / METRICS):
            if "val_loss" in record and record["step"] == step:
                loss = f"{record['val_loss']:.4f} nats per token"

    recipe = config.model_dump(exclude_none=True, exclude={"wandb"})
    recipe["train"].pop("out_dir")
    data_path = recipe.pop("data")["path"]
    source = data_meta(path, config).get("recipe", {}).get("source")
    n_padding = padding_rows(config.model) * config.model.n_embd
    return CARD.format(
        name=f"{config.experiment}/{config.run}",
        optimizer=config.optimizer.name,
        parameters=num_parameters(config.model) - n_padding,
        step=step,
        max_steps=config.train.max_steps,
        start=config.train.init_from or "random weights",
        scaling=SCALING if config.model.scale_attn_by_inverse_layer_idx else "",
        data=json.dumps(source) if source else Path(data_path).name,
        tokens=step * config.tokens_per_step,
        batch_size=config.train.batch_size,
        block_size=config.model.block_size,
        loss=loss,
        where=", ".join(known) or "not recorded",
        recipe=json.dumps(recipe, indent=2),
    )


if __name__ == "__main__":
    run_main(main)
