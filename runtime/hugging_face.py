"""Weights in Hugging Face's GPT-2 format, in both directions.

The two models differ in names, in the linear layers (theirs are transposed and always have biases)
and in the padding rows of the embedding (only ours has them). Weights are read directly from
config.json and *.safetensors, so transformers is not needed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model import GPT, ModelConfig
from runtime.cli import UserError, reason
from runtime.distributed import errors_on_all_ranks
from runtime.run_folder import METRICS

OPENAI = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
# Our key in [model] → theirs in config.json, and GPT-2's own value if the file has none.
SHAPE = {
    "n_layer": ("n_layer", 12),
    "n_head": ("n_head", 12),
    "n_embd": ("n_embd", 768),
    "vocab_size": ("vocab_size", 50257),
    "scale_attn_by_inverse_layer_idx": ("scale_attn_by_inverse_layer_idx", False),
}
# Settings for which our model supports only one value.
FIXED = {
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "tie_word_embeddings": True,
    "add_cross_attention": False,
}


# ---- Ours to theirs ------------------------------------------------------------------------------


def to_hugging_face(model: GPT) -> dict[str, Tensor]:
    """Return our weights with the names and shapes of GPT2LMHeadModel; missing biases are 0."""
    tensors: dict[str, Tensor] = {}
    for name, weight in model.state_dict().items():
        if name == "wte.weight":
            weight = weight[: model.config.vocab_size]
        elif _is_linear(name):
            weight = weight.T
        elif name.startswith("ln_f"):
            weight = weight / model.config.relative_width  # muP divides what the head multiplies
        tensors[_their_name(name)] = weight.contiguous()

        if not model.config.bias and not name.startswith(("wte", "wpe")):
            bias = _their_name(name).removesuffix("weight") + "bias"
            tensors[bias] = weight.new_zeros(weight.shape[-1])
    return tensors


def hugging_face_config(config: ModelConfig, end_of_text: int) -> dict[str, Any]:
    """Return the arguments of transformers' GPT2Config for a model of this shape."""
    arguments: dict[str, Any] = {name: getattr(config, key) for key, (name, _) in SHAPE.items()}
    arguments |= FIXED
    arguments |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    arguments |= {"bos_token_id": end_of_text, "eos_token_id": end_of_text}
    return arguments | {"n_positions": config.block_size}


# ---- Theirs to ours ------------------------------------------------------------------------------


def load_weights_on_all_ranks(model: GPT, source: str) -> None:
    """Load weights on rank 0 and send them to the other ranks.

    Raises:
        UserError: on all ranks; see :func:`load_weights`.
    """
    with errors_on_all_ranks():
        if not dist.is_initialized() or dist.get_rank() == 0:
            load_weights(model, source)
    if dist.is_initialized():
        for weight in model.state_dict().values():
            dist.broadcast(weight, src=0)


def load_weights(model: GPT, source: str) -> None:
    """Copy weights into our model; a shorter block_size takes the first positions.

    Args:
        model: its shape must fit.
        source: a folder in Hugging Face's format, or the name of one of OpenAI's models.

    Raises:
        UserError: if the weights cannot be read, or the shapes or kinds of model differ.
    """
    config, tensors = read_folder(source)
    check_shape(source, config, model.config)
    copy_weights(source, tensors, model)


def read_folder(source: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the config (without null values) and the tensors of a folder or an OpenAI model."""
    folder = _find_folder(source)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("config.json is not a JSON object")
        tensors = _read_tensors(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        message = f"{source}: not weights in Hugging Face's format ({reason(error)})"
        if (folder / METRICS).exists():
            message += "; this is a run's folder: export it first with scripts/export_hf.py"
        raise UserError(message) from error
    return {key: value for key, value in config.items() if value is not None}, tensors


def check_shape(source: str, theirs: dict[str, Any], ours: ModelConfig) -> None:
    """Refuse a config.json that describes another model than ours."""
    for key, (name, default) in SHAPE.items():
        found = theirs.get(name, default)
        if found != getattr(ours, key):
            value = json.dumps(found)
            raise UserError(
                f"{source}: has {name} = {value}, the model {getattr(ours, key)}; "
                f"add --model.{key}={value}"
            )

    positions = theirs.get("n_positions", 1024)
    if type(positions) is not int or positions < ours.block_size:
        raise UserError(
            f"{source}: has {positions} positions, the model {ours.block_size}; "
            f"add --model.block_size={positions}"
        )
    for key, fixed in FIXED.items():
        if theirs.get(key, fixed) != fixed:
            raise UserError(
                f"{source}: has {key} = {theirs[key]}; this model supports only {fixed}"
            )
    if ours.mup_base_width:
        raise UserError(f"{source}: was not made for muP; add --model.mup_base_width=0")
    if not ours.causal:
        raise UserError(
            f"{source}: predicts the next token and cannot initialize a model with "
            f"model.causal = false"
        )


@torch.no_grad()
def copy_weights(source: str, tensors: dict[str, Tensor], model: GPT) -> None:
    """Copy tensors with GPT2LMHeadModel's names into our model."""
    has_biases = any(name.endswith(".bias") and t.any() for name, t in tensors.items())
    if has_biases and not model.config.bias:
        raise UserError(f"{source}: has biases; add --model.bias=true")

    # Check everything before the first weight is changed.
    pairs = []
    for name, weight in model.state_dict().items():
        their_name = _their_name(name)
        if their_name not in tensors:
            raise UserError(f"{source}: has no tensor {their_name}; is it a GPT2LMHeadModel?")
        theirs = tensors[their_name]
        if _is_linear(name):
            theirs = theirs.T
        elif name == "wte.weight":
            weight = weight[: len(theirs)]  # not the padding rows
        elif name == "wpe.weight":
            theirs = theirs[: len(weight)]
        if weight.shape != theirs.shape:
            shapes = f"{tuple(theirs.shape)}, not {tuple(weight.shape)}"
            raise UserError(f"{source}: {their_name} has shape {shapes}")
        if not theirs.isfinite().all():
            raise UserError(f"{source}: {their_name} has entries that are NaN or infinite")
        pairs.append((weight, theirs))
    for weight, theirs in pairs:
        weight.copy_(theirs)


def _their_name(name: str) -> str:
    return "transformer." + name.replace("blocks.", "h.")


def _is_linear(name: str) -> bool:
    """Return whether the parameter is the weight of a linear layer."""
    return name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


def _find_folder(source: str) -> Path:
    """Return the folder itself, or download one of OpenAI's models."""
    if source not in OPENAI or Path(source).exists():
        return Path(source)
    from huggingface_hub import snapshot_download

    repository = f"openai-community/{source}"
    try:
        patterns = ["config.json", "*.safetensors"]
        return Path(snapshot_download(repository, allow_patterns=patterns))
    except Exception as error:  # the hub's own errors, and those of its HTTP library
        raise UserError(
            f"{source}: cannot be downloaded ({reason(error)}); a folder with its config.json and "
            f"model.safetensors works as well"
        ) from error


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise UserError(
            "safetensors is missing: python -m pip install -r requirements-hub.txt"
        ) from error

    names = {"model.safetensors"}
    index = folder / "model.safetensors.index.json"  # of a model in several files
    if index.exists():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())

    tensors: dict[str, Tensor] = {}
    for file in names:
        try:
            loaded = load_file(folder / file)
        except SafetensorError as error:
            raise ValueError(f"{file}: {reason(error)}") from error
        for name, tensor in loaded.items():
            # OpenAI's files lack the prefix, and contain the causal mask as attn.bias.
            if not name.endswith((".attn.bias", ".attn.masked_bias")):
                tensors[f"transformer.{name.removeprefix('transformer.')}"] = tensor
    return tensors
