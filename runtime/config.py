"""The typed schema of a run: every key with its type, bounds, default and meaning.

What is unknown, of another type or out of range is refused; experiment.py says so in one line.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

PATH = r"^[^\x00-\x1f]+$"  # no control characters


class Section(BaseModel):
    """Strict: an unknown key or a value of another type is an error, and nothing changes after loading."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class ModelConfig(Section):
    """The GPT-2 shape."""

    n_layer: int = Field(gt=0, le=1000, description="transformer blocks")
    n_head: int = Field(gt=0, le=1000, description="attention heads a block")
    n_embd: int = Field(gt=0, le=100_000, description="channels, a multiple of n_head")
    block_size: int = Field(1024, gt=0, le=1_000_000, description="context length, tokens")
    vocab_size: int = Field(50257, gt=1, le=65536, description="tokens in the vocabulary")
    scale_attn_by_inverse_layer_idx: bool = Field(True, description="layer i (from 1) divides attention scores by i")
    bias: bool = Field(False, description="biases in linear maps and norms, which OpenAI's weights have")
    causal: bool = Field(True, description="predict the next token; false: fill in masked ones, seeing both sides")

    @model_validator(mode="after")
    def _heads_divide_channels(self) -> ModelConfig:
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is no multiple of n_head {self.n_head}")
        return self

    @property
    def mask_token(self) -> int:
        """What stands in a masked token's place: the vocabulary's last token, which no text may have."""
        return self.vocab_size - 1

    @property
    def text_vocab_size(self) -> int:
        """Tokens that a text may have."""
        return self.vocab_size if self.causal else self.mask_token

    @property
    def labels_per_sequence(self) -> int:
        """How many tokens of a sequence the loss predicts: all, or BERT's 15 % (arXiv 1810.04805, section 3.1)."""
        return self.block_size if self.causal else max(1, round(0.15 * self.block_size))


class DataConfig(Section):
    """Where the tokens are."""

    path: str = Field(pattern=PATH, description="folder with train.bin, val.bin and (if made here) meta.json")


class TrainConfig(Section):
    """All that is shared by the optimizers. A step is one parameter update."""

    max_steps: int = Field(gt=0, le=10**9, description="steps of the whole, fully decayed schedule")
    seed: int = Field(1337, ge=0, lt=2**63, description="initial weights, data order, sampled labels, probes")
    batch_size: int = Field(
        480, gt=0, le=1_000_000, description="sequences a step over all ranks; accumulation is derived"
    )
    micro_batch_size: int = Field(12, gt=0, le=1_000_000, description="sequences a rank processes at once")
    warmup_steps: int = Field(2000, ge=0, le=10**9, description="steps of linear warm-up")
    loss_chunk: int = Field(
        0, ge=0, le=10**9, description="tokens whose logits are in memory at once; 0: a micro-batch's"
    )
    shard_optimizer: bool = Field(False, description="each rank keeps a share of the optimizer's state (ZeRO-1)")
    final_lr_ratio: float = Field(0.05, ge=0, le=1, description="last learning rate / peak, by a cosine")
    grad_clip: float = Field(1.0, ge=0, description="clip the gradient's global norm here; 0 is off")
    dtype: Literal["bfloat16", "float16", "float32"] = Field("bfloat16", description="autocast type; weights stay fp32")
    compile: bool = Field(True, description="torch.compile the model, Sophia's estimator and step")
    device: Literal["auto", "cuda", "mps", "cpu"] = Field("auto", description="auto: CUDA, else MPS, else CPU")
    eval_interval: int = Field(1000, gt=0, description="steps between validations")
    eval_windows: int = Field(0, ge=0, description="validation windows (block_size tokens each); 0: the whole split")
    max_bad_steps: int = Field(10, gt=0, description="stop after so many steps in a row whose loss is no number")
    log_interval: int = Field(10, gt=0, description="steps between log lines, where the device is waited for")
    checkpoint_interval: int = Field(1000, gt=0, description="steps between checkpoints")
    keep_checkpoints: int = Field(2, gt=0, description="newest checkpoints kept, besides the best")
    tensorboard: bool = Field(False, description="write the numbers for TensorBoard too, into the run's folder")
    out_dir: str = Field("out", pattern=PATH, description="a run writes to OUT_DIR/EXPERIMENT/RUN")
    init_from: str = Field(
        "", description="start from these weights: a folder in Hugging Face's format, or gpt2, gpt2-medium, -large, -xl"
    )


class OptimizerConfig(Section):
    """One optimizer; a key that it does not have is refused."""

    name: Literal[
        "adamw",
        "lion",
        "sophia-g",
        "sophia-h",
        "sophia-ablation",
        "adahessian",
        "muon",
        "soap",
    ] = Field(description="the optimizer")
    lr: float = Field(gt=0, description="peak learning rate")
    beta1: float = Field(ge=0, lt=1, description="decay of the momentum")
    beta2: float = Field(ge=0, lt=1, description="decay of the second moment, or of Sophia's Hessian estimate")
    weight_decay: float = Field(ge=0, description="decoupled, times lr, on matrices alone")
    eps: float | None = Field(None, gt=0, description="sophia: floor of rho·h; others: added to the root")
    rho: float | None = Field(None, gt=0, description="sophia: an entry moves less than lr where |m| < rho·h")
    hessian_interval: int | None = Field(None, gt=0, le=10**9, description="sophia: steps between estimates (k)")
    hessian_batch_size: int | None = Field(
        None, gt=0, le=10**9, description="sophia: sequences an estimate over all ranks"
    )
    hessian_micro_batch_size: int | None = Field(
        None, gt=0, description="sophia: most sequences a rank estimates on at once (default: as fit)"
    )
    estimator: Literal["gnb", "hutchinson", "empirical-fisher", "none"] | None = Field(
        None, description="sophia-ablation: where h comes from; none: h is 0, the sign of the momentum"
    )
    average: Literal["mean", "root-mean-square"] | None = Field(
        None, description="sophia-ablation: of the estimates; Sophia takes the mean"
    )
    update: Literal["clip", "divide", "normalize"] | None = Field(
        None, description="sophia-ablation: what bounds a step; Sophia clips"
    )

    @model_validator(mode="after")
    def _keys_of_this_optimizer(self) -> OptimizerConfig:
        hessian: set[str] = set() if self.hessian_estimator == "none" else {"hessian_interval", "hessian_batch_size"}
        sophia = {"eps", "rho", *hessian}
        of_name: dict[str, set[str]] = {
            "lion": set(),
            "sophia-g": sophia,
            "sophia-h": sophia,
            "sophia-ablation": {*sophia, "estimator", "average", "update"},
            "adahessian": {"eps", *hessian},
        }
        required = of_name.get(self.name, {"eps"})
        optional = {"hessian_micro_batch_size"} if hessian else set()
        keys = list(type(self).model_fields)[5:]  # after those that all have
        given = {key for key in keys if getattr(self, key) is not None}
        for key in (key for key in keys if key in required - given):
            raise ValueError(f"{self.name} needs {key}")
        for key in (key for key in keys if key in given - required - optional):
            raise ValueError(f"{key} is no key of {self.name}")
        return self

    @property
    def is_sophia(self) -> bool:
        return self.name.startswith("sophia")

    @property
    def hessian_estimator(self) -> str:
        """Where the diagonal of the Hessian comes from: "gnb", "hutchinson", "empirical-fisher", or "none"."""
        of_name = {"sophia-g": "gnb", "sophia-h": "hutchinson", "adahessian": "hutchinson"}
        return of_name.get(self.name) or self.estimator or "none"


class WandbConfig(Section):
    """Mirror of metrics.jsonl at Weights & Biases."""

    mode: Literal["online", "offline", "disabled"] = Field("disabled", description="offline writes to the run's folder")
    project: str = Field(
        "sophia-gpt2", pattern=r"^[^/\\#?%:\x00-\x1f]+$", description="wandb project; the experiment is the group"
    )
    save_code: bool = Field(False, description="upload the repository's files as an artifact")


class Config(Section):
    """One run, resolved."""

    experiment: str
    run: str
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    optimizer: OptimizerConfig
    wandb: WandbConfig = Field(default_factory=WandbConfig)

    @model_validator(mode="after")
    def _sections_fit(self) -> Config:
        if (self.optimizer.hessian_batch_size or 0) > self.train.batch_size:
            raise ValueError("optimizer.hessian_batch_size is larger than train.batch_size, of which it is a part")
        if self.train.warmup_steps >= self.train.max_steps:
            raise ValueError(
                f"train.warmup_steps {self.train.warmup_steps} leave none of train.max_steps {self.train.max_steps} "
                f"for the learning rate to decay in; lower train.warmup_steps"
            )
        if self.train.shard_optimizer and self.optimizer.name in ("muon", "soap"):
            raise ValueError(f"train.shard_optimizer cannot share out {self.optimizer.name}; set it to false")
        return self

    @property
    def run_dir(self) -> Path:
        return Path(self.train.out_dir) / self.experiment / self.run


SECTIONS: dict[str, type[Section]] = {
    "model": ModelConfig,
    "data": DataConfig,
    "train": TrainConfig,
    "optimizer": OptimizerConfig,
    "wandb": WandbConfig,
}
KEYS = {f"{section}.{key}": field for section, schema in SECTIONS.items() for key, field in schema.model_fields.items()}

# Keys that a resumed run may change: they alter where, how fast or how often, not what is computed (beyond rounding).
FREE_KEYS = {
    "data.path",
    "train.micro_batch_size",
    "train.loss_chunk",
    "train.shard_optimizer",
    "train.compile",
    "train.device",
    "train.max_bad_steps",
    "train.log_interval",
    "train.checkpoint_interval",
    "train.keep_checkpoints",
    "train.tensorboard",
    "train.out_dir",
    "optimizer.hessian_micro_batch_size",
    "wandb.mode",
    "wandb.project",
    "wandb.save_code",
}


def value_of(tree: dict[str, Any], key: str) -> Any:
    """The value of a dotted key in a stored config; the key's default where the config is older than the key."""
    section, name = key.split(".")
    default = None if KEYS[key].is_required() else KEYS[key].default
    return tree.get(section, {}).get(name, default)
