"""Weights in Hugging Face's GPT-2 format, both ways.

The two models differ in names, in the linear maps (theirs are transposed and always have biases) and in the embedding's
padding rows (ours alone). Theirs are read from the files themselves, config.json and *.safetensors; transformers is
not needed for that.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import GPT
from runtime.cli import UserError, reason
from runtime.config import ModelConfig

OPENAI = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
# Our key of [model] → theirs in config.json, with GPT-2's own value where the file says nothing.
SHAPE = {
    "n_layer": ("n_layer", 12),
    "n_head": ("n_head", 12),
    "n_embd": ("n_embd", 768),
    "vocab_size": ("vocab_size", 50257),
    "scale_attn_by_inverse_layer_idx": ("scale_attn_by_inverse_layer_idx", False),
}
# What our model cannot do otherwise.
FIXED = {
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "tie_word_embeddings": True,
    "add_cross_attention": False,
}


def to_hugging_face(model: GPT) -> dict[str, Tensor]:
    """Our weights under the names and in the shapes of GPT2LMHeadModel; biases that the model has not are 0."""
    tensors: dict[str, Tensor] = {}
    for name, weight in model.state_dict().items():
        if name == "wte.weight":
            weight = weight[: model.config.vocab_size]
        elif _is_linear(name):
            weight = weight.T
        tensors[_their_name(name)] = weight.contiguous()
        if not model.config.bias and not name.startswith(("wte", "wpe")):
            tensors[_their_name(name).removesuffix("weight") + "bias"] = weight.new_zeros(weight.shape[-1])
    return tensors


@torch.no_grad()
def load_weights(model: GPT, source: str) -> None:
    """Copy the weights of a folder in Hugging Face's format, or of one of OpenAI's models, into ours.

    A shorter block_size takes the first positions. Raises UserError where the shapes or the kind of model differ.
    """
    folder = _folder(source)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("config.json is no object")
        tensors = _read_tensors(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        ours = "; it is a run's folder: export it first with scripts/export_hf.py" * (folder / "metrics.jsonl").exists()
        raise UserError(f"{source}: no weights in Hugging Face's format ({reason(error)}){ours}") from None
    config = {key: value for key, value in config.items() if value is not None}
    _refuse_other_shape(source, config, model.config)
    biased = any(name.endswith(".bias") and tensor.any() for name, tensor in tensors.items())
    if biased and not model.config.bias:
        raise UserError(f"{source}: has biases; add --model.bias=true")
    weights = model.state_dict()
    missing = [name for name in weights if _their_name(name) not in tensors]
    if missing:
        raise UserError(f"{source}: has no tensor {_their_name(missing[0])}; is it a GPT2LMHeadModel?")
    for name, weight in weights.items():
        theirs = tensors[_their_name(name)]
        theirs = theirs.T if _is_linear(name) else theirs
        rows = weight[: len(theirs)] if name == "wte.weight" else weight  # not the padding
        if name == "wpe.weight":
            theirs = theirs[: len(weight)]
        if rows.shape != theirs.shape:
            raise UserError(f"{source}: {_their_name(name)} is {tuple(theirs.shape)}, not {tuple(rows.shape)}")
        if not theirs.isfinite().all():
            raise UserError(f"{source}: {_their_name(name)} has entries that are no numbers")
        rows.copy_(theirs)


def _their_name(name: str) -> str:
    return "transformer." + name.replace("blocks.", "h.")


def _is_linear(name: str) -> bool:
    """Of a matrix that is no embedding."""
    return name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


def _folder(source: str) -> Path:
    if source not in OPENAI or Path(source).exists():
        return Path(source)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(f"openai-community/{source}", allow_patterns=["config.json", "*.safetensors"]))
    except Exception as error:  # the hub's own errors, requests', and httpx's
        raise UserError(
            f"{source}: cannot be downloaded ({reason(error)}); a folder with its config.json and model.safetensors "
            f"does as well"
        ) from None


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    index = folder / "model.safetensors.index.json"  # of a model in several files
    names = {"model.safetensors"}
    if index.exists():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    tensors: dict[str, Tensor] = {}
    for name in names:
        try:
            tensors |= load_file(folder / name)
        except SafetensorError as error:
            raise ValueError(f"{name}: {reason(error)}") from None
    # OpenAI's files lack the prefix, and hold the causal mask as attn.bias.
    named = {f"transformer.{name.removeprefix('transformer.')}": tensor for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in named.items() if not name.endswith((".attn.bias", ".attn.masked_bias"))}


def _refuse_other_shape(source: str, theirs: dict[str, Any], ours: ModelConfig) -> None:
    for key, (name, default) in SHAPE.items():
        if theirs.get(name, default) != getattr(ours, key):
            value = json.dumps(theirs.get(name, default))
            raise UserError(
                f"{source}: has {name} = {value}, the model {getattr(ours, key)}; add --model.{key}={value}"
            )
    positions = theirs.get("n_positions", 1024)
    if type(positions) is not int or positions < ours.block_size:
        raise UserError(
            f"{source}: knows {positions} positions, the model has {ours.block_size}; "
            f"add --model.block_size={positions}"
        )
    for key, fixed in FIXED.items():
        if theirs.get(key, fixed) != fixed:
            raise UserError(f"{source}: has {key} = {theirs[key]}, and this model only knows {fixed}")
    if not ours.causal:
        raise UserError(f"{source}: predicts the next token; it is no start for model.causal = false")


def hugging_face_config(config: ModelConfig, end_of_text: int) -> dict[str, Any]:
    """The arguments of transformers' GPT2Config for a model of this shape, without dropout."""
    shape = {name: getattr(config, key) for key, (name, _) in SHAPE.items()}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    tokens = {"bos_token_id": end_of_text, "eos_token_id": end_of_text}
    return shape | FIXED | dropout | tokens | {"n_positions": config.block_size}
