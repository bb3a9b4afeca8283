"""What runs say about optimizers: their final losses, the spread over seeds, what they cost, and what follows.

Read by compare.py, run.py and the figures. Losses are compared at the end of a fully decayed schedule, never in its
middle, where the learning rate and not the optimizer decides. Runs are grouped: a group's runs have the same settings
but their seed. A horizon is the number of steps of a whole schedule.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from runtime import plan
from runtime.cli import UserError, reason
from runtime.config import FREE_KEYS, KEYS, ModelConfig, OptimizerConfig, value_of
from runtime.metrics import read_environment, read_metrics

# Keys that decide a run's losses. A run may be resumed where its data have moved to, but another path is other data
# until someone says otherwise; and how often a run is validated changes none of its losses.
DECISIVE = KEYS.keys() - FREE_KEYS - {"train.eval_interval"} | {"data.path"}
# Of these, what may differ between runs that are compared: what is compared, and what is repeated over.
COMPARED = {key for key in KEYS if key.startswith("optimizer.")} | {"train.seed", "train.max_steps"}


@dataclass(frozen=True)
class Run:
    """A run's folder, or its copy at wandb: what was asked for (config), where it ran, and what it logged."""

    config: dict[str, Any]
    environment: dict[str, Any]
    records: list[dict[str, Any]]  # of steps
    validations: list[dict[str, Any]]

    @property
    def name(self) -> str:
        return f"{self.config['experiment']}/{self.config['run']}"

    @property
    def table(self) -> str:
        """The run's name in its experiment file, without what varies from it."""
        return self.config["run"].split(",")[0]

    @property
    def optimizer(self) -> str:
        return self.config["optimizer"]["name"]

    @property
    def horizon(self) -> int:
        return self.config["train"]["max_steps"]

    @property
    def seed(self) -> int:
        return self.config["train"]["seed"]

    @property
    def is_finished(self) -> bool:
        return bool(self.validations) and self.validations[-1]["step"] == self.horizon

    @property
    def final_loss(self) -> float:
        return self.validations[-1]["val_loss"]

    @cached_property
    def settings(self) -> str:
        """All that decides the result but the seed, as a text that equals that of a run with another seed."""
        kept = sorted(DECISIVE - {"train.seed"})
        return json.dumps([self.table, *(value_of(self.config, key) for key in kept)])


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone, all of them finished."""

    runs: list[Run]

    @property
    def name(self) -> str:
        """The run's name without its seed."""
        parts = self.runs[0].name.split(",")
        return ",".join(part for part in parts if not part.startswith("seed="))

    @property
    def losses(self) -> dict[int, float]:
        return {run.seed: run.final_loss for run in self.runs}

    @property
    def mean(self) -> float:
        return statistics.fmean(self.losses.values())

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation over the seeds; None of a single one."""
        return statistics.stdev(self.losses.values()) if len(self.losses) > 1 else None

    @property
    def table(self) -> str:
        return self.runs[0].table

    @property
    def optimizer(self) -> str:
        return self.runs[0].optimizer

    @property
    def horizon(self) -> int:
        return self.runs[0].horizon


def find_runs(folders: Iterable[Path]) -> list[Run]:
    """The validated runs below the folders. Raises UserError for a folder without any."""
    found: list[Run] = []
    for folder in folders:
        runs = []
        for path in sorted(folder.rglob("metrics.jsonl")):
            if run := read_run(path.parent):
                runs.append(run)
            else:
                print(f"warning: {path.parent}: has no validation yet, left out", file=sys.stderr)
        if not runs:
            raise UserError(f"{folder}: no run with a validation in it; train one, e.g. with scripts/quickstart.sh")
        found += runs
    return found


def read_run(folder: Path) -> Run | None:
    """One run's numbers; None where it was not validated yet."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        records = read_metrics(folder / "metrics.jsonl")
        run = Run(config, read_environment(folder), *split_records(records))
        if not (run.name and run.optimizer and run.horizon > 0 and run.seed >= 0 and step_flops(config)):
            raise ValueError("not a config of ours")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        problem = f"{type(error).__name__}: {reason(error)}"
        raise UserError(f"{folder}: config.json or metrics.jsonl is damaged ({problem}); leave it out") from None
    return run if run.validations else None


def split_records(records: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Lines of metrics.jsonl → those of steps, those of validations."""
    return [r for r in records if "loss" in r], [r for r in records if "val_loss" in r]


def wandb_runs(path: str) -> list[Run]:
    """The runs of ENTITY/PROJECT/GROUP at wandb, which is where train.py mirrors an experiment.

    wandb has the last step of each log interval and every validation; T(step) is then the median of those steps.
    """
    import wandb

    parts = path.split("/")
    if len(parts) != 3 or not all(parts):
        raise UserError(f"--wandb={path}: must be ENTITY/PROJECT/GROUP; the group is the experiment's name")
    try:
        found = list(wandb.Api().runs("/".join(parts[:2]), filters={"group": parts[2]}))
        runs = [_from_wandb(run) for run in found if "optimizer" in run.config]  # not what compare.py uploaded
    except (wandb.errors.Error, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--wandb={path}: wandb cannot be read ({reason(error)}); is the path right?") from None
    validated = [run for run in runs if run.validations]
    if not validated:
        raise UserError(f"--wandb={path}: no run with a validation in it; is the group's name right?")
    return validated


def _from_wandb(run: Any) -> Run:
    config = dict(run.config)
    environment = config.pop("environment", {})
    rows = [{key: _number(value) for key, value in row.items() if value is not None} for row in run.scan_history()]
    return Run(config, environment, *split_records(sorted(rows, key=lambda row: row["step"])))


def _number(value: Any) -> Any:
    """wandb's service writes NaN and infinity as text."""
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else value


def group_runs(runs: Iterable[Run]) -> list[Group]:
    """The finished runs, gathered by everything but their seed, in the order in which they came."""
    groups: dict[str, dict[int, Run]] = {}
    for run in runs:
        if run.is_finished:
            groups.setdefault(run.settings, {})[run.seed] = run
    return [Group(list(by_seed.values())) for by_seed in groups.values()]


def confounders(runs: list[Run]) -> list[str]:
    """What differs between the runs though it is not the optimizer: `key: value, value`, a line a key."""
    lines = []
    for key in sorted(DECISIVE - COMPARED):
        values = sorted({json.dumps(value_of(run.config, key)) for run in runs})
        if len(values) > 1:
            lines.append(f"{key}: {', '.join(values)}")
    return lines


def step_flops(config: dict[str, Any]) -> float:
    """plan.step_flops of a stored config."""
    model, optimizer = ModelConfig(**config["model"]), OptimizerConfig(**config["optimizer"])
    return plan.step_flops(model, config["train"]["batch_size"], optimizer)


def step_times(runs: list[Run]) -> tuple[float | None, float | None]:
    """T(step) and T(Hessian) in milliseconds: medians over all steps of all runs, so that compiling does not count."""
    steps = [r["step_ms"] for run in runs for r in run.records if "step_ms" in r]
    estimates = [r["hessian_ms"] for run in runs for r in run.records if "hessian_ms" in r]
    return (statistics.median(steps) if steps else None), (statistics.median(estimates) if estimates else None)


def overhead(runs: list[Run]) -> float | None:
    """T(Hessian) / (k T(step)): what the estimates add to the time of a step, as a share."""
    step, estimate = step_times(runs)
    interval = runs[0].config["optimizer"].get("hessian_interval")
    return estimate / (interval * step) if step and estimate and interval else None


@dataclass(frozen=True)
class Difference:
    """Mean of a's losses less b's, and how likely one at least so large is if the optimizer made none."""

    mean: float
    p: float | None  # None: too few seeds to say, or no difference in any
    seeds: int


def compare_losses(a: Group, b: Group) -> Difference:
    """Over the seeds that both have, which are the same weights and batches: their difference, by a paired t-test."""
    from scipy import stats

    seeds = sorted(a.losses.keys() & b.losses.keys())
    if not seeds:
        return Difference(a.mean - b.mean, None, 0)
    pairs = [[group.losses[seed] for seed in seeds] for group in (a, b)]
    mean = statistics.fmean(pairs[0]) - statistics.fmean(pairs[1])
    p = float(stats.ttest_rel(*pairs).pvalue) if len(seeds) > 1 else math.nan
    return Difference(mean, p if math.isfinite(p) else None, len(seeds))


@dataclass(frozen=True)
class PowerLaw:
    """Loss after D tokens: a · D^(−b) + c, D in units of the shortest horizon. Of one optimizer, a point a horizon."""

    a: float
    b: float
    c: float
    unit: float
    shortest: float  # tokens
    longest: float

    def loss(self, tokens: float) -> float:
        return self.a * (tokens / self.unit) ** -self.b + self.c

    def tokens(self, loss: float) -> float | None:
        """How many tokens the law asks for a loss; None below its floor c."""
        return self.unit * (self.a / (loss - self.c)) ** (1 / self.b) if loss > self.c else None

    def covers(self, tokens: float) -> bool:
        """Whether the number lies between measured horizons, and is not extrapolated."""
        return self.shortest <= tokens <= self.longest


def fit_power_law(groups: list[Group]) -> PowerLaw | None:
    """Fit to the final losses of one optimizer's horizons. None of fewer than three, or where nothing fits."""
    import numpy as np
    from scipy.optimize import curve_fit

    points = sorted((tokens_of(group.runs[0].config), group.mean) for group in groups)
    if len({tokens for tokens, _ in points}) < 3:
        return None
    tokens, losses = (np.array(values, float) for values in zip(*points, strict=True))
    scaled = tokens / tokens[0]
    spread = losses.max() - losses.min()
    try:
        with warnings.catch_warnings():  # three points leave no covariance, and none is asked for
            warnings.simplefilter("ignore")
            (a, b, c), _ = curve_fit(
                lambda d, a, b, c: a * d**-b + c,
                scaled,
                losses,
                p0=(2 * spread, 0.5, max(0.0, losses.min() - spread)),
                bounds=((0, 1e-2, 0), (np.inf, 5, np.inf)),
                max_nfev=20_000,
            )
    except (RuntimeError, ValueError):
        return None
    return PowerLaw(float(a), float(b), float(c), float(tokens[0]), float(tokens[0]), float(tokens[-1]))


def tokens_of(config: dict[str, Any]) -> int:
    """Tokens of the whole schedule."""
    return config["train"]["max_steps"] * config["train"]["batch_size"] * config["model"]["block_size"]
