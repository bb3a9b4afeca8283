"""What follows from groups of runs: differences, times, and data efficiency."""

from __future__ import annotations

import math
import statistics
import warnings
from dataclasses import dataclass

from analysis.runs import Group, StoredRun, tokens_of


@dataclass(frozen=True)
class Difference:
    """The mean difference of two groups' losses, and its p-value."""

    mean: float
    p: float | None  # two-sided; None with fewer than two seeds, or if no difference varies
    seeds: int


def compare_losses(a: Group, b: Group) -> Difference:
    """Return a's losses minus b's, with a paired t-test over the seeds that both have.

    The same seed means the same initial weights and batches.
    """
    from scipy import stats

    seeds = sorted(a.losses.keys() & b.losses.keys())
    if not seeds:
        return Difference(a.mean - b.mean, None, 0)
    a_losses = [a.losses[seed] for seed in seeds]
    b_losses = [b.losses[seed] for seed in seeds]
    mean = statistics.fmean(a_losses) - statistics.fmean(b_losses)
    p = float(stats.ttest_rel(a_losses, b_losses).pvalue) if len(seeds) > 1 else math.nan
    return Difference(mean, p if math.isfinite(p) else None, len(seeds))


def step_times(runs: list[StoredRun]) -> tuple[float | None, float | None]:
    """Return T(step) and T(Hessian) in milliseconds.

    They are medians over all steps of all runs, so that compilation does not count.
    """
    steps, estimates = [], []
    for run in runs:
        steps += [record["step_ms"] for record in run.records if "step_ms" in record]
        estimates += [record["hessian_ms"] for record in run.records if "hessian_ms" in record]
    step = statistics.median(steps) if steps else None
    estimate = statistics.median(estimates) if estimates else None
    return step, estimate


def overhead(runs: list[StoredRun]) -> float | None:
    """Return T(Hessian) / (k T(step)): the share of time that the estimates add per step."""
    step, estimate = step_times(runs)
    interval = runs[0].config["optimizer"].get("hessian_interval")
    if not step or not estimate or not interval:
        return None
    return estimate / (interval * step)


@dataclass(frozen=True)
class PowerLaw:
    """The loss after D tokens, a · D^(−b) + c, with D in units of the shortest horizon."""

    a: float
    b: float
    c: float
    unit: float
    shortest: float  # tokens
    longest: float

    def loss(self, tokens: float) -> float:
        return self.a * (tokens / self.unit) ** -self.b + self.c

    def tokens(self, loss: float) -> float | None:
        """Return the tokens that the law needs for a loss, or None below its floor c."""
        if loss <= self.c:
            return None
        return self.unit * (self.a / (loss - self.c)) ** (1 / self.b)

    def covers(self, tokens: float) -> bool:
        """Return whether the number is between measured horizons, not extrapolated."""
        return self.shortest <= tokens <= self.longest


def fit_power_law(groups: list[Group]) -> PowerLaw | None:
    """Fit a power law to the final losses of one optimizer's horizons.

    Returns None for fewer than three horizons, or if the fit does not converge.
    """
    import numpy as np
    from scipy.optimize import curve_fit

    points = sorted((tokens_of(group.runs[0].config), group.mean) for group in groups)
    if len({tokens for tokens, _ in points}) < 3:
        return None
    tokens = np.array([point[0] for point in points], float)
    losses = np.array([point[1] for point in points], float)
    spread = losses.max() - losses.min()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # three points determine no covariance; it is not used
            (a, b, c), _ = curve_fit(
                lambda d, a, b, c: a * d**-b + c,
                tokens / tokens[0],
                losses,
                p0=(2 * spread, 0.5, max(0.0, losses.min() - spread)),
                bounds=((0, 1e-2, 0), (np.inf, 5, np.inf)),
                max_nfev=20_000,
            )
    except (RuntimeError, ValueError):
        return None
    shortest, longest = float(tokens[0]), float(tokens[-1])
    return PowerLaw(float(a), float(b), float(c), shortest, shortest, longest)
