"""What follows from groups of runs: differences, times, and data efficiency."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from analysis.runs import Group, StoredRun

CONFIDENCE = 0.95
MARGIN = 0.02  # nats per token: differences below it are called equal
POWER = 0.8
BOOTSTRAP = 200  # draws of seeds
BOOTSTRAP_SEEDS = 5  # at least
EXPONENTS = (0.01, 5.0)  # of a power law, bounds of the fit


@dataclass(frozen=True)
class PairedTest:
    """What two or more paired differences show."""

    low: float  # of the 95 % interval of the mean, t distribution
    high: float
    p: float  # of a t-test for a mean of 0, two-sided
    p_equal: float  # of two one-sided t-tests for a mean beyond the margin (TOST)
    p_not_worse: float  # of the one of them for a mean above the margin
    detectable: float  # the true difference that the t-test would find with 80 % power


@dataclass(frozen=True)
class Difference:
    """The losses of one group minus those of another, paired over the seeds that both have."""

    mean: float
    pairs: int
    test: PairedTest | None  # None for a single pair, or if all pairs differ by the same


def compare_losses(a: Group, b: Group, margin: float = MARGIN) -> Difference | None:
    """Return the difference of two groups, or None without a common seed or if a run has diverged.

    The same seed means the same initial weights and batches.
    """
    seeds = sorted(a.losses.keys() & b.losses.keys())
    if not seeds or a.diverged or b.diverged:
        return None
    differences = [a.losses[seed] - b.losses[seed] for seed in seeds]
    test = paired_test(differences, margin) if len(set(differences)) > 1 else None
    return Difference(statistics.fmean(differences), len(seeds), test)


def paired_test(differences: list[float], margin: float = MARGIN) -> PairedTest:
    """Test paired differences, one per seed, of which two are different."""
    from scipy import stats

    n, mean = len(differences), statistics.fmean(differences)
    deviation = statistics.stdev(differences)
    error = deviation / math.sqrt(n)
    t = stats.t(n - 1)
    half = float(t.ppf(0.5 + CONFIDENCE / 2)) * error
    p_not_worse = float(t.cdf((mean - margin) / error))
    p_not_better = float(t.sf((mean + margin) / error))
    return PairedTest(
        low=mean - half,
        high=mean + half,
        p=2 * float(t.sf(abs(mean) / error)),
        p_equal=max(p_not_worse, p_not_better),
        p_not_worse=p_not_worse,
        detectable=detectable_difference(deviation, n),
    )


def describe(difference: Difference, p: float | None, margin: float) -> str:
    """Return what a difference shows in a word or two, given its p after Holm's correction."""
    if difference.test is None or p is None:
        return "one seed" if difference.pairs == 1 else "the same for all seeds"
    is_small = difference.test.p_equal < 1 - CONFIDENCE
    if p < 1 - CONFIDENCE:
        side = "lower" if difference.mean < 0 else "higher"
        return f"{side}, by less than {margin:g}" if is_small else side
    return f"equal within {margin:g}" if is_small else "not resolved"


def detectable_difference(deviation: float, n: int) -> float:
    """Return the true difference that a two-sided paired t-test finds with 80 % power.

    Args:
        deviation: standard deviation of the paired differences.
        n: pairs, at least 2.
    """
    from scipy import optimize, stats

    threshold = float(stats.t(n - 1).ppf(0.5 + CONFIDENCE / 2))

    def missing_power(noncentrality: float) -> float:
        # A significant difference of the wrong sign is too rare to count.
        return float(stats.nct.sf(threshold, n - 1, noncentrality)) - POWER

    # In units of the mean's standard error. Power grows with it, from 5 % at 0.
    return optimize.brentq(missing_power, 0.0, 20 * threshold) * deviation / math.sqrt(n)


def holm(p_values: list[float | None]) -> list[float | None]:
    """Return p-values corrected for their number (Holm's method); None stays None."""
    known = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        corrected[index] = largest
    return corrected


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
    points: tuple[tuple[float, float], ...]  # the tokens and losses that it was fitted to

    def loss(self, tokens: float) -> float:
        return self.a * (tokens / self.points[0][0]) ** -self.b + self.c

    def tokens(self, loss: float) -> float | None:
        """Return the tokens that the law needs for a loss, or None below its floor c."""
        if loss <= self.c:
            return None
        return self.points[0][0] * (self.a / (loss - self.c)) ** (1 / self.b)

    def covers(self, tokens: float) -> bool:
        """Return whether the number is between measured horizons, not extrapolated."""
        return self.points[0][0] <= tokens <= self.points[-1][0]

    def largest_residual(self) -> float:
        """Return by how much the law misses the loss of a horizon, at most."""
        return max(abs(loss - self.loss(tokens)) for tokens, loss in self.points)

    def doubts(self) -> list[str]:
        """Return what speaks against the fit, as text."""
        doubts = []
        if any(later >= earlier for (_, earlier), (_, later) in pairwise(self.points)):
            doubts.append("the losses do not fall with the horizon")
        if len(self.points) <= 3:
            doubts.append("three horizons leave no degree of freedom")
        if self.c < 1e-6:
            doubts.append("the floor is at its bound of 0")
        if self.b < 1.01 * EXPONENTS[0] or self.b > 0.99 * EXPONENTS[1]:
            doubts.append(f"the exponent is at a bound, {self.b:.3g}")
        return doubts


def fit_power_law(points: Sequence[tuple[float, float]]) -> PowerLaw | None:
    """Fit a power law to (tokens, final loss) of one optimizer's horizons.

    Returns None for fewer than three horizons, or if the fit does not converge.
    """
    import numpy as np
    from scipy.optimize import curve_fit

    points = sorted((float(tokens), loss) for tokens, loss in points)
    if len({tokens for tokens, _ in points}) < 3:
        return None
    tokens, losses = np.array(points, float).T
    spread = losses.max() - losses.min()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # three points determine no covariance; it is not used
            (a, b, c), _ = curve_fit(
                lambda d, a, b, c: a * d**-b + c,
                tokens / tokens[0],
                losses,
                p0=(2 * spread, 0.5, max(0.0, losses.min() - spread)),
                bounds=((0, EXPONENTS[0], 0), (np.inf, EXPONENTS[1], np.inf)),
                max_nfev=20_000,
            )
    except (RuntimeError, ValueError):
        return None
    return PowerLaw(float(a), float(b), float(c), tuple(points))


def data_efficiency(group: Group, reference: list[Group]) -> tuple[float, float, float] | None:
    """Return the tokens that the reference needs for a group's loss, over the group's own.

    Also returns the bounds of a 95 % interval, by a bootstrap over the seeds that all have: it
    draws the reference's losses at all horizons and the group's together. Returns None without a
    common seed or a fit. Values are infinite where the loss is below the fitted law's floor, and
    the bounds NaN with less than five seeds, with which a bootstrap is far too narrow.
    """
    import numpy as np

    def ratio(seeds: list[int]) -> float | None:
        points = []
        for horizon in reference:
            mean = statistics.fmean(horizon.losses[seed] for seed in seeds)
            points.append((horizon.tokens, mean))
        law = fit_power_law(points)
        if law is None:
            return None
        needed = law.tokens(statistics.fmean(group.losses[seed] for seed in seeds))
        return math.inf if needed is None else needed / group.tokens

    seeds = sorted(set(group.losses).intersection(*(horizon.losses for horizon in reference)))
    value = ratio(seeds) if seeds else None
    if value is None:
        return None
    if len(seeds) < BOOTSTRAP_SEEDS:
        return value, math.nan, math.nan

    draws = np.random.default_rng(0).choice(seeds, (BOOTSTRAP, len(seeds)))
    ratios = []
    for draw in draws:
        drawn = ratio(draw.tolist())
        if drawn is not None:
            ratios.append(drawn)
    low, high = np.quantile(ratios, [0.5 - CONFIDENCE / 2, 0.5 + CONFIDENCE / 2], method="nearest")
    return value, float(low), float(high)
