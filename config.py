"""The typed schema of an experiment, its TOML file and the command line.

An experiment file holds what all its runs share, then one table a run that overrides any key. A scale, [scales.cpu]
say, is such a file within the file: it overrides what is shared and the runs it names. The command line overrides
both. A file may stand on another, its base, and then holds what differs. Whatever is unknown, of the wrong type or out
of range is refused before anything else happens.
"""

from __future__ import annotations

import argparse
import difflib
import re
import tomllib
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from errors import Parser, UserError, reason

PATH = r"^[^\x00-\x1f]+$"  # no control characters
TABLE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")  # a run's table; becomes a folder's name
RUN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,=+-]*")  # one of its variations: adamw,lr=0.001,seed=2
PAPER = "paper"  # the scale that the file itself is
DESCRIPTION = """Train one run of an experiment file.

    python train.py configs/quickstart.toml --run=sophia-g
    torchrun --standalone --nproc_per_node=8 -- train.py configs/gpt2_125m.toml --run=sophia-g --resume

Keys that the file leaves out have the defaults below; a key given here comes before the file's."""


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

SHORT = {"init_from": ["--init-from"]}  # beside --train.init_from

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


def parse_command_line(argv: list[str]) -> tuple[Config, argparse.Namespace]:
    """`EXPERIMENT.toml --run=NAME [--scale=S] [--resume] [--section.key=value …]` → the resolved run and the flags.

    Raises UserError for anything that cannot be read or does not fit the schema.
    """
    flags, rest = _parser().parse_known_args(argv)
    overrides = {key: getattr(flags, key) for key in KEYS if getattr(flags, key) is not None}
    if rest:
        raise UserError(f"unknown argument {rest[0]}{_nearest(rest[0].lstrip('-').split('=')[0])}; see train.py --help")
    config = load_experiment(Path(flags.experiment), flags.run, overrides, flags.scale)
    if flags.name is None:
        return config, flags
    if not RUN_NAME.fullmatch(flags.name):
        raise UserError(f"--name={flags.name!r} cannot name a folder; use letters, digits and any of _ . , = + -")
    return config.model_copy(update={"run": flags.name}), flags


def load_experiment(path: Path, run: str | None, overrides: dict[str, str] | None = None, scale: str = PAPER) -> Config:
    """The run named `run` of the experiment file at `path`, with `overrides` (dotted key → text) on top."""
    shared, runs = read_experiment(path, scale)
    if run is None or run not in runs:
        asked = f"no run named {run!r}." if run else "which run?"
        raise UserError(f"{path}: {asked} Add --run=NAME, NAME one of: {', '.join(runs)}")
    experiment = path.stem if scale == PAPER else f"{path.stem}-{scale}"
    given = {run: overrides or {}}
    trees = {name: _merge(shared, table) for name, table in runs.items()}
    # All of them, so that a mistake in the last run's table is found before the first run begins.
    return {name: _resolve(path, experiment, name, tree, given.get(name, {})) for name, tree in trees.items()}[run]


def read_experiment(path: Path, scale: str = PAPER) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """What the runs of the file share, and each run's own table without its grid, at a scale."""
    shared = _at_scale(path, scale)
    runs = shared.pop("runs", None)
    for key in shared:
        if key not in SECTIONS:
            raise UserError(f"{path}: unknown key {key}{_nearest(key)}")
    if not isinstance(runs, dict) or not runs or not all(isinstance(table, dict) for table in runs.values()):
        raise UserError(f"{path}: no runs; add a table such as [runs.adamw.optimizer]")
    if wrong := [name for name in runs if not TABLE_NAME.fullmatch(name)]:
        raise UserError(f"{path}: {wrong[0]!r} cannot name a run's folder; use letters, digits, '-', '_' and '.'")
    return shared, {name: _without(table, "grid") for name, table in runs.items()}


def read_grid(path: Path, run: str, scale: str = PAPER) -> dict[str, list[str]]:
    """What to try of a run, {dotted key: values as text}: its table [runs.NAME.grid], optimizer.lr = [1e-3, 2e-3]."""
    grid = _at_scale(path, scale)["runs"][run].get("grid", {})
    if not isinstance(grid, dict) or not all(isinstance(table, dict) for table in grid.values()):
        raise UserError(f"{path}, run {run}: a grid looks like this: optimizer.lr = [1e-3, 2e-3]")
    axes = {f"{section}.{key}": values for section, table in grid.items() for key, values in table.items()}
    for key, values in axes.items():
        if key not in KEYS:
            raise UserError(f"{path}, run {run}: unknown key {key} in its grid{_nearest(key)}")
        if not isinstance(values, list) or not values or not all(isinstance(v, int | float | str) for v in values):
            raise UserError(f"{path}, run {run}: {key} in its grid must be a list of values, such as [1e-3, 2e-3]")
    return {key: [str(v).lower() if isinstance(v, bool) else str(v) for v in values] for key, values in axes.items()}


def _at_scale(path: Path, scale: str) -> dict[str, Any]:
    """The tree of the file with that of its scale laid upon it. The file itself is the paper's scale."""
    tree = _read_tree(path, [])
    scales = tree.pop("scales", {})
    if scale == PAPER:
        return tree
    if scale not in scales:
        raise UserError(f"{path}: has no scale {scale!r}; use one of: {', '.join([PAPER, *scales])}")
    return _merge(tree, scales[scale])


def _read_tree(path: Path, above: list[Path]) -> dict[str, Any]:
    """The file laid upon its base, which may have one itself; `above` are the files that led here."""
    tree = _read_toml(path)
    _check_tables(path, tree)
    if "base" not in tree:
        return tree
    below = path.parent / str(tree.pop("base"))
    if not below.is_file():
        raise UserError(f"{path}: its base {below} is not there")
    if below in above:
        raise UserError(f"{path}: its base {below.name} stands on this file itself")
    return _extend(path, _read_tree(below, [*above, path]), tree)


def _check_tables(path: Path, tree: dict[str, Any]) -> None:
    scales = tree.get("scales", {})
    if not isinstance(scales, dict) or not all(isinstance(table, dict) for table in scales.values()):
        raise UserError(f"{path}: scales must be tables, such as [scales.cpu.train]")
    for runs in (part.get("runs", {}) for part in (tree, *scales.values())):
        if not isinstance(runs, dict) or not all(isinstance(table, dict) for table in runs.values()):
            raise UserError(f"{path}: no runs; add a table such as [runs.adamw.optimizer]")


def _extend(path: Path, base: dict[str, Any], tree: dict[str, Any]) -> dict[str, Any]:
    """`tree` laid upon `base`, with the runs that `tree` names alone, without the grids of the base.

    A run stands on the base's run of the same name, or on the one that its own key `base` names.
    """
    runs = tree.get("runs", {})
    origins = {name: table.get("base", name) for name, table in runs.items()}
    for name, table in runs.items():
        if "base" in table and str(table["base"]) not in base.get("runs", {}):
            raise UserError(f"{path}, run {name}: base = {table['base']!r} is no run of the base file")

    def runs_of(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
        lent = {name: dict(below.get("runs", {}).get(str(origin), {})) for name, origin in origins.items()}
        own = above.get("runs", {})
        return {name: _merge(_without(lent[name], "grid"), _without(own.get(name, {}), "base")) for name in origins}

    merged = _merge(base, tree) | {"runs": runs_of(base, tree)}
    below, above = base.get("scales", {}), tree.get("scales", {})
    for scale, table in above.items():
        if lost := table.get("runs", {}).keys() - runs.keys():
            raise UserError(f"{path}: [scales.{scale}.runs.{min(lost)}] is no run of this file; name it in [runs] too")
    for scale, table in merged.get("scales", {}).items():
        table["runs"] = runs_of(below.get(scale, {}), above.get(scale, {}))
    return merged


def _without(table: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in table.items() if name != key}


def run_names(path: Path, scale: str = PAPER) -> list[str]:
    """The names of the runs of an experiment file, in its order."""
    return list(read_experiment(path, scale)[1])


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read the experiment file ({reason(error)}); see configs/") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid TOML: {reason(error)}") from None


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid upon `base`, table by table; neither is changed, no table is shared with `base`."""
    merged = {key: _merge(value, {}) if isinstance(value, dict) else value for key, value in base.items()}
    for key, value in over.items():
        both_tables = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both_tables else value
    return merged


def _resolve(path: Path, experiment: str, run: str, tree: dict[str, Any], overrides: dict[str, str]) -> Config:
    for key, text in overrides.items():
        section, name = key.split(".")
        tree = _merge(tree, {section: {name: _literal(key, text)}})
    try:
        return Config.model_validate({**tree, "experiment": experiment, "run": run})
    except ValidationError as error:
        raise UserError(f"{path}, run {run}: {_first_problem(error)}") from None


def _literal(key: str, text: str) -> Any:
    """A command-line value, read as TOML would read it; text stays text."""
    if KEYS[key].annotation is str:
        return text
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return parsed["value"] if len(parsed) == 1 else text


def _first_problem(error: ValidationError) -> str:
    problem = min(error.errors(), key=lambda p: p["type"] != "extra_forbidden")  # a misspelt key, before it is missing
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key}{_nearest(key)}"
    if problem["type"] == "missing":
        return f"{key} is missing; add it to the file or to the command line"
    key = key or "this run"
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if problem["type"] == "string_pattern_mismatch":
        message = "is empty, or has a character that cannot be in it"
    return f"{key} = {problem['input']!r} {message}" if not isinstance(problem["input"], dict) else f"{key}: {message}"


def _nearest(key: str) -> str:
    names = {known: known for known in KEYS} | {known.split(".")[1]: known for known in KEYS}
    names |= {flag: flag for flag in ("resume", "scale", "name")}
    close = difflib.get_close_matches(key, names, 1, 0.7) or difflib.get_close_matches(
        key.split(".")[-1], names, 1, 0.7
    )
    return f"; did you mean {names[close[0]]}?" if close else ""


def _parser() -> Parser:
    parser = Parser(
        DESCRIPTION,
        prog="train.py",
        usage="train.py EXPERIMENT.toml --run=NAME [--scale=NAME] [--resume] [--dry-run] [--SECTION.KEY=VALUE …]",
    )
    parser.add_argument("experiment", metavar="EXPERIMENT.toml", help="experiment file, e.g. configs/quickstart.toml")
    parser.add_argument("--run", metavar="NAME", help="which of the file's runs, e.g. sophia-g")
    parser.add_argument("--scale", metavar="NAME", default=PAPER, help="cpu, gpu or paper (default)")
    parser.add_argument("--name", metavar="NAME", help="folder and wandb name of the run (default: that of --run)")
    parser.add_argument("--resume", action="store_true", help="go on from the run's newest checkpoint, if it has one")
    parser.add_argument("--dry-run", action="store_true", help="print sizes, steps and memory, then exit")
    for section, schema in SECTIONS.items():
        group = parser.add_argument_group(f"[{section}]", schema.__doc__)
        for key, field in schema.model_fields.items():
            default = "" if field.is_required() or field.default in (None, "") else f" (default: {field.default})"
            text = f"{field.description}{default}".replace("True", "true").replace("False", "false").replace("%", "%%")
            group.add_argument(f"--{section}.{key}", *SHORT.get(key, ()), metavar=_kind(field.annotation), help=text)
    return parser


def _kind(annotation: Any) -> str:
    """What --help calls a type: int, or the values of a Literal; None stands for a key left out, and is not named."""
    parts = [part for part in get_args(annotation) if part is not type(None)]
    if not parts:
        return annotation.__name__
    return "|".join(part if isinstance(part, str) else _kind(part) for part in parts)
