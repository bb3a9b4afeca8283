"""The schema of a run: every key with its type, bounds, default and meaning.

A key that does not exist, has another type or is out of bounds is refused in one line.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from model import ModelConfig
from runtime.cli import UserError
from runtime.run_folder import ROOT

PATH = r"^[^\x00-\x1f]+$"  # no control characters
MUP_OPTIMIZERS = ("adamw", "lion", "sophia-g", "sophia-h")
IMPORTED = "package.module:Class"  # how --help calls the name of an imported optimizer


class Section(BaseModel):
    """A strict and immutable section: keys must exist and values must have the right type."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class DataConfig(Section):
    """Where the tokens are."""

    path: str = Field(
        pattern=PATH, description="folder with train.bin, val.bin and, if made here, meta.json"
    )


class TrainConfig(Section):
    """Everything that the optimizers share. A step is one parameter update."""

    max_steps: int = Field(gt=0, le=10**9, description="steps of the whole, fully decayed schedule")
    seed: int = Field(
        1337, ge=0, lt=2**63, description="initial weights, data order, sampled labels, probes"
    )
    batch_size: int = Field(
        480,
        gt=0,
        le=1_000_000,
        description="sequences per step over all ranks; gradient accumulation is derived",
    )
    micro_batch_size: int = Field(
        12, gt=0, le=1_000_000, description="sequences that a rank processes at once"
    )
    warmup_steps: int = Field(2000, ge=0, le=10**9, description="steps of linear warm-up")
    schedule: Literal["cosine", "linear", "wsd"] = Field(
        "cosine",
        description="how the learning rate decays; wsd: it is constant, and decays linearly at "
        "the end (warm-up, stable, decay)",
    )
    decay_share: float = Field(
        0.2, gt=0, le=1, description="share of max_steps in which wsd decays; others ignore it"
    )
    loss_chunk: int = Field(
        0, ge=0, le=10**9, description="compute logits for this many tokens at a time; 0: all"
    )
    shard_optimizer: bool = Field(
        False, description="each rank keeps a part of the optimizer's state (ZeRO-1)"
    )
    final_lr_ratio: float = Field(0.05, ge=0, le=1, description="final / peak learning rate")
    grad_clip: float = Field(
        1.0, ge=0, description="clip the global norm of the gradient to this; 0: off"
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "bfloat16",
        description="autocast type; weights stay fp32. auto: what is fast on this device",
    )
    compile: bool | Literal["auto"] = Field(
        True,
        description="torch.compile the model, estimator and optimizer step. auto: if it saves time",
    )
    deterministic: bool = Field(
        False, description="the same config on the same GPUs gives the same bits; slower"
    )
    device: Literal["auto", "cuda", "mps", "cpu"] = Field(
        "auto", description="auto: CUDA if available, else MPS, else CPU"
    )
    eval_interval: int = Field(1000, gt=0, description="steps between validations")
    eval_windows: int = Field(
        0, ge=0, description="validation windows (of block_size tokens); 0: the whole split"
    )
    max_bad_steps: int = Field(
        10, gt=0, description="stop after this many consecutive non-finite steps"
    )
    log_interval: int = Field(
        10, gt=0, description="steps between log lines; numbers are fetched from the device then"
    )
    checkpoint_interval: int = Field(1000, gt=0, description="steps between checkpoints")
    keep_checkpoints: int = Field(2, gt=0, description="newest checkpoints to keep, plus the best")
    tensorboard: bool = Field(False, description="also write TensorBoard files to the run's folder")
    out_dir: str = Field("out", pattern=PATH, description="a run writes to OUT_DIR/EXPERIMENT/RUN")
    init_from: str = Field(
        "",
        description="start from these weights: a folder in Hugging Face's format, or gpt2, "
        "gpt2-medium, gpt2-large, gpt2-xl",
    )

    @property
    def decay_start(self) -> int:
        """The step at which the learning rate begins to decay."""
        if self.schedule == "wsd":
            return self.max_steps - max(round(self.decay_share * self.max_steps), 1)
        return self.warmup_steps


# ------------------------------------------------------------------------------------------------
# One class per optimizer


class OptimizerConfig(Section):
    """The keys that every optimizer has."""

    name: str = Field(description="one of the list above, or package.module:Class")
    lr: float = Field(gt=0, description="peak learning rate")
    weight_decay: float = Field(
        ge=0, description="decoupled, multiplied by lr; applied to weight matrices only"
    )

    @property
    def hessian_estimator(self) -> str:
        """The estimator of the Hessian's diagonal, or "none"."""
        return "none"


class _WithBetas(OptimizerConfig):
    beta1: float = Field(ge=0, lt=1, description="decay of the momentum")
    beta2: float = Field(
        ge=0, lt=1, description="decay of the second moment, or of Sophia's Hessian estimate"
    )


class _WithEps(_WithBetas):
    eps: float = Field(gt=0, description="added to the denominator; Sophia: lower bound of rho·h")


class _WithHessian(_WithEps):
    hessian_interval: int = Field(gt=0, le=10**9, description="steps between estimates (k)")
    hessian_batch_size: int = Field(
        gt=0, le=10**9, description="sequences per estimate over all ranks"
    )
    hessian_micro_batch_size: int | None = Field(
        None,
        gt=0,
        description="largest micro-batch of an estimate, per rank (default: a training "
        "micro-batch, or for Hutchinson what needs no more memory than one)",
    )


class AdamWConfig(_WithEps):
    """PyTorch's AdamW."""

    name: Literal["adamw"]


class LionConfig(_WithBetas):
    """Lion, optimizers/lion.py."""

    name: Literal["lion"]


RHO = Field(gt=0, description="entries with |m| < rho·h move by less than lr")


class SophiaGConfig(_WithHessian):
    """Sophia with Gauss-Newton-Bartlett estimates, sophia.py."""

    name: Literal["sophia-g"]
    rho: float = RHO

    @property
    def hessian_estimator(self) -> str:
        return "gnb"


class SophiaHConfig(_WithHessian):
    """Sophia with Hutchinson estimates, sophia.py."""

    name: Literal["sophia-h"]
    rho: float = RHO

    @property
    def hessian_estimator(self) -> str:
        return "hutchinson"


class SophiaAblationConfig(_WithEps):
    """Sophia with one part replaced, optimizers/sophia_ablation.py."""

    name: Literal["sophia-ablation"]
    rho: float = RHO
    estimator: Literal["gnb", "hutchinson", "empirical-fisher", "none"] = Field(
        description="source of h; none: h stays 0 and the update is the sign of the momentum"
    )
    average: Literal["mean", "root-mean-square"] = Field(
        description="how estimates are averaged; Sophia uses the mean"
    )
    update: Literal["clip", "divide", "normalize"] = Field(
        description="what bounds the update; Sophia clips"
    )
    hessian_interval: int | None = Field(None, gt=0, le=10**9)
    hessian_batch_size: int | None = Field(None, gt=0, le=10**9)
    hessian_micro_batch_size: int | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _hessian_keys(self) -> SophiaAblationConfig:
        required = ("hessian_interval", "hessian_batch_size")
        for key in (*required, "hessian_micro_batch_size"):
            given = getattr(self, key) is not None
            if self.estimator == "none" and given:
                raise ValueError(f'remove {key}: estimator = "none" makes no estimates')
            if self.estimator != "none" and key in required and not given:
                raise ValueError(f"{key} is missing; add it to the file or to the command line")
        return self

    @property
    def hessian_estimator(self) -> str:
        return self.estimator


class AdaHessianConfig(_WithHessian):
    """AdaHessian, optimizers/adahessian.py."""

    name: Literal["adahessian"]

    @property
    def hessian_estimator(self) -> str:
        return "hutchinson"


class _WithAdamW(_WithEps):
    adamw_lr: float | None = Field(
        None, gt=0, description="peak learning rate of AdamW's part; none: lr"
    )
    adamw_weight_decay: float = Field(0.0, ge=0, description="weight decay of AdamW's part")


class MuonConfig(_WithAdamW):
    """Muon for weight matrices, optimizers/muon.py; AdamW for embeddings, norms and biases."""

    name: Literal["muon"]


class SoapConfig(_WithAdamW):
    """SOAP for weight matrices, optimizers/soap.py; AdamW for embeddings, norms and biases."""

    name: Literal["soap"]


class ImportedConfig(OptimizerConfig):
    """Any other optimizer: PyTorch's, a library's, or one in a file of yours."""

    name: str = Field(pattern=r"^[\w.]+:\w+$")
    options: dict[str, JsonValue] = Field(
        {}, description="package.module:Class: further arguments of its constructor"
    )


BuiltIn = Annotated[
    AdamWConfig
    | LionConfig
    | SophiaGConfig
    | SophiaHConfig
    | SophiaAblationConfig
    | AdaHessianConfig
    | MuonConfig
    | SoapConfig,
    Field(discriminator="name"),
]
OPTIMIZERS: dict[str, type[OptimizerConfig]] = {}
for _schema in get_args(get_args(BuiltIn)[0]):
    OPTIMIZERS[get_args(_schema.model_fields["name"].annotation)[0]] = _schema
OPTIMIZERS[IMPORTED] = ImportedConfig


def _origin(optimizer: Any) -> str:
    """Return which side of the union below a table, or an optimizer's config, belongs to."""
    name = optimizer.get("name") if isinstance(optimizer, dict) else optimizer.name
    return "imported" if ":" in str(name) else "built-in"


AnyOptimizer = Annotated[
    Annotated[BuiltIn, Tag("built-in")] | Annotated[ImportedConfig, Tag("imported")],
    Discriminator(_origin),
]


# ------------------------------------------------------------------------------------------------
# The whole run


class WandbConfig(Section):
    """Mirror of metrics.jsonl at Weights & Biases."""

    mode: Literal["online", "offline", "disabled"] = Field(
        "disabled", description="offline writes to the run's folder"
    )
    project: str = Field(
        "sophia-gpt2",
        pattern=r"^[^/\\#?%:\x00-\x1f]+$",
        description="wandb project; the experiment is the group",
    )
    save_code: bool = Field(False, description="upload the repository's files as an artifact")


class Config(Section):
    """One run, with every key resolved."""

    experiment: str
    run: str
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    optimizer: AnyOptimizer
    wandb: WandbConfig = Field(default_factory=WandbConfig)

    @model_validator(mode="after")
    def _sections_fit(self) -> Config:
        if self.hessian_batch_size > self.train.batch_size:
            raise ValueError(
                "optimizer.hessian_batch_size is larger than train.batch_size; "
                "an estimate uses a part of the step's batch"
            )
        if self.train.warmup_steps >= self.train.max_steps:
            raise ValueError(
                f"train.warmup_steps {self.train.warmup_steps} leave none of train.max_steps "
                f"{self.train.max_steps} for the learning rate to decay; lower train.warmup_steps"
            )
        if self.model.mup_base_width and self.optimizer.name not in MUP_OPTIMIZERS:
            raise ValueError(
                f"model.mup_base_width has no rule for {self.optimizer.name}, only for "
                f"{', '.join(MUP_OPTIMIZERS)}; set it to 0"
            )
        if self.train.decay_start < self.train.warmup_steps:
            raise ValueError(
                f"train.decay_share {self.train.decay_share} begins the decay at step "
                f"{self.train.decay_start}, in the warm-up; lower it or train.warmup_steps"
            )
        return self

    @property
    def run_dir(self) -> Path:
        return Path(self.train.out_dir).expanduser() / self.experiment / self.run

    @property
    def data_folder(self) -> Path:
        """The folder of data.path, which may be relative to the repository."""
        path = Path(self.data.path).expanduser()
        is_in_repository = not path.exists() and (ROOT / path).exists()
        return ROOT / path if is_in_repository else path

    @property
    def tokens_per_step(self) -> int:
        return self.train.batch_size * self.model.block_size

    @property
    def hessian_interval(self) -> int | None:
        """Steps between estimates of the Hessian, or None if the optimizer needs none."""
        return getattr(self.optimizer, "hessian_interval", None)

    @property
    def hessian_batch_size(self) -> int:
        """Sequences per estimate over all ranks, or 0 if the optimizer needs none."""
        return getattr(self.optimizer, "hessian_batch_size", None) or 0


SECTIONS: dict[str, type[BaseModel]] = {
    "model": ModelConfig,
    "data": DataConfig,
    "train": TrainConfig,
    "optimizer": OptimizerConfig,
    "wandb": WandbConfig,
}


def _all_keys() -> dict[str, FieldInfo]:
    keys: dict[str, FieldInfo] = {}
    for section, schema in SECTIONS.items():
        for key, field in schema.model_fields.items():
            keys[f"{section}.{key}"] = field
    for schema in OPTIMIZERS.values():
        for key, field in schema.model_fields.items():
            keys.setdefault(f"optimizer.{key}", field)
    return keys


KEYS = _all_keys()  # dotted name → field, with the keys of all optimizers

# Keys that a resumed run may change. They affect where a run writes, its speed or how often it
# logs, but not its results beyond rounding. (On another kind of device, Hutchinson's probes are
# other random numbers.)
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

# Keys that may differ between the nodes of one run.
LOCAL_KEYS = {"data.path", "train.out_dir", "train.init_from"}


def value_of(tree: dict[str, Any], key: str) -> Any:
    """Return the value of a dotted key in a stored config, or its default if that has none."""
    section, name = key.split(".")
    default = None if KEYS[key].is_required() else KEYS[key].default
    value = tree.get(section, {}).get(name)
    return default if value is None else value


def from_stored(tree: dict[str, Any]) -> Config:
    """Return the Config of a run's config.json or checkpoint.

    Runs of earlier versions stored every optimizer's keys, with None for those that did not apply.

    Raises:
        ValueError: if the tree does not fit the schema (pydantic's ValidationError).
    """
    stored = tree.get("optimizer", {})
    optimizer = {key: value for key, value in stored.items() if value is not None}
    return Config.model_validate(tree | {"optimizer": optimizer})


def validated(tree: dict[str, Any], where: str) -> Config:
    """Return the Config of a tree of tables.

    Raises:
        UserError: if the tree does not fit the schema; names `where` and the key.
    """
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{where}: {_first_problem(error)}") from error


# What nanoGPT calls them.
OTHER_NAMES = {
    "learning_rate": "optimizer.lr",
    "max_iters": "train.max_steps",
    "warmup_iters": "train.warmup_steps",
    "min_lr": "train.final_lr_ratio",
    "gradient_accumulation_steps": "train.batch_size",
    "eval_iters": "train.eval_windows",
    "dataset": "data.path",
    "wandb_project": "wandb.project",
    "wandb_log": "wandb.mode",
}


def nearest(name: str, known: list[str]) -> str:
    """Return "; did you mean …?" if one of the `known` names is similar, else an empty string."""
    other = OTHER_NAMES.get(name.split(".")[-1])
    if other in known:
        return f"; did you mean {other}?"
    names = {key.split(".")[-1]: key for key in known} | {key: key for key in known}
    for spelling in (name, name.split(".")[-1]):
        close = difflib.get_close_matches(spelling, names, 1, 0.7)
        if close:
            return f"; did you mean {names[close[0]]}?"
    return ""


def _first_problem(error: ValidationError) -> str:
    # Report a misspelled key before the key that is missing because of it.
    problem = min(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    kind, value = problem["type"], problem["input"]
    key, optimizer = _key_of(problem)

    if kind == "extra_forbidden" and key in KEYS and optimizer == "imported":
        return (
            f"{key} is not a key of an imported optimizer, which has lr, weight_decay and a table "
            f"[optimizer.options]; give it a run of its own"
        )
    if kind == "extra_forbidden" and key in KEYS:
        return f"{key} is not a key of {optimizer}; remove it"
    if kind == "extra_forbidden":
        return f"unknown key {key}{nearest(key, list(KEYS))}"
    if kind == "missing":
        keys = [_key_of(other)[0] for other in error.errors() if other["type"] == "missing"]
        which = "is missing; add it" if len(keys) == 1 else "are missing; add them"
        return f"{', '.join(keys)} {which} to the file or to the command line"
    if kind == "union_tag_not_found":
        return "optimizer.name is missing; add it to the file or to the command line"
    if kind == "union_tag_invalid":
        return f"optimizer.name = {value.get('name')!r} should be one of {', '.join(OPTIMIZERS)}"
    if kind in ("bool_type", "bool_parsing"):
        choices = "true or false" if KEYS[key].annotation is bool else "true, false or 'auto'"
        return f"{key} = {value!r} should be {choices}"
    if kind == "string_pattern_mismatch":
        return f"{key} = {value!r} is empty or contains a character that is not allowed"

    message = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if isinstance(value, dict):
        return f"{key}: {message}" if key else message
    return f"{key} = {value!r} {message}"


def _key_of(problem: ErrorDetails) -> tuple[str, str]:
    """Return the dotted key of a problem, and the optimizer whose key it is, or ""."""
    # Within the optimizer, pydantic names the members of the unions as well as the key.
    location = [str(part) for part in problem["loc"]]
    optimizer = ""
    if location[:1] == ["optimizer"]:
        members = [part for part in location[1:] if part in (*OPTIMIZERS, "built-in", "imported")]
        location = [part for part in location if part not in members]
        optimizer = members[-1] if members else ""
    if ".".join(location[:-1]) in KEYS:
        location.pop()  # the member of a union such as bool | "auto"
    return ".".join(location), optimizer
