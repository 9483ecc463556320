"""The statistics behind a verdict on norms: intervals over seeds, paired tests over images, both resampled, power, Holm.

Values over seeds are in the metric's own unit; a difference of percentages is in points. Per-image results are bool
arrays, True where the image counts for the metric (was right, for an accuracy); their means are in percent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

from anorm.tasks import Metric

LEVEL = 0.95
POWER = 0.8
USUAL_SD = {"top1": 0.16}
"""By the metric's name: the standard deviation between seeds where too few were run to measure it. top1: points, ResNet-50
on ImageNet; published values are 0.11 to 0.16."""
SMALL_POINTS = 0.2
"""A difference of percentages that papers argue about; sentences say how many seeds would find it."""
RESAMPLES = 10_000


@dataclass(frozen=True)
class Interval:
    """A mean with its interval and, where it is known, the standard deviation behind it; low and high are nan for n = 1."""

    mean: float
    low: float
    high: float
    n: int
    sd: float = math.nan

    @property
    def half(self) -> float:
        return (self.high - self.low) / 2

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


def mean_interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """mean +- t(n - 1) s / sqrt(n). Raises ValueError without values."""
    x = np.asarray(values, dtype=float)
    if x.size == 0:
        raise ValueError("there are no values to take a mean of")
    if x.size == 1:
        return Interval(float(x[0]), math.nan, math.nan, 1)
    sd = float(x.std(ddof=1))
    half = float(stats.t.ppf((1 + level) / 2, x.size - 1)) * sd / math.sqrt(x.size)
    return Interval(float(x.mean()), float(x.mean()) - half, float(x.mean()) + half, x.size, sd)


def pooled_sd(samples: Sequence[Sequence[float]]) -> tuple[float, int]:
    """(standard deviation within samples, its degrees of freedom); (nan, 0) where no sample has two values."""
    squares = sum(float(((np.asarray(s, float) - np.mean(s)) ** 2).sum()) for s in samples if len(s) > 1)
    freedom = sum(len(s) - 1 for s in samples if len(s) > 1)
    return (math.sqrt(squares / freedom), freedom) if freedom else (math.nan, 0)


def noise_of_gap(
    samples: Sequence[Sequence[float]], n: int, usual_sd: float | None = None, level: float = LEVEL
) -> float:
    """Return the half width within which a mean over n seeds and one printed number lie when nothing but the seed differs.

    q * s * sqrt(1 + 1/n), with s pooled over ``samples`` (a list of values for each row of a table) and q Student's
    quantile; with fewer than 5 degrees of freedom s is ``usual_sd`` and q the normal quantile; nan without it.
    """
    sd, freedom = pooled_sd(samples)
    if freedom < 5:
        usual = math.nan if usual_sd is None else usual_sd
        return float(stats.norm.ppf((1 + level) / 2)) * usual * math.sqrt(1 + 1 / n)
    return float(stats.t.ppf((1 + level) / 2, freedom)) * sd * math.sqrt(1 + 1 / n)


@dataclass(frozen=True)
class Pair:
    """Two sets of weights on the same images, b against a. difference: points; p_exact and p_chi2: McNemar's."""

    difference: Interval
    only_a: int
    only_b: int
    p_exact: float
    p_chi2: float
    agreement: float  # share of images on which both are right or both wrong


def compare_pair(
    a: np.ndarray, b: np.ndarray, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> Pair:
    """a, b: bool (N,), image by image whether it was right. The interval is the paired bootstrap's over images.

    McNemar's test is on the images that only one has right: exact (binomial), and chi-square with continuity correction.
    """
    a, b = _flags(a), _flags(b)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"results of {a.shape} and {b.shape} images cannot be paired")
    n, only_a, only_b = a.size, int((a & ~b).sum()), int((b & ~a).sum())
    # images are exchangeable: resampling them is drawing the three counts
    draws = np.random.default_rng(seed).multinomial(
        n, np.array([only_a, only_b, n - only_a - only_b]) / n, size=resamples
    )
    low, high = _percentiles(100 * (draws[:, 1] - draws[:, 0]) / n, level)
    differing = only_a + only_b
    exact = float(stats.binomtest(min(only_a, only_b), differing, 0.5).pvalue) if differing else 1.0
    chi2 = float(stats.chi2.sf(max(abs(only_a - only_b) - 1, 0) ** 2 / differing, 1)) if differing else 1.0
    return Pair(
        Interval(100 * (only_b - only_a) / n, low, high, n), only_a, only_b, exact, chi2, 1 - differing / n
    )


@dataclass(frozen=True)
class Methods:
    """Two methods over seeds, b against a, in the metric's unit.

    difference: over seeds (t). bootstrap: seeds resampled first, then images; None without per-image results. p: of the t
    test. paired: whether equal seeds were paired; pairing_gain: the share of the variance that pairing removes (negative:
    it adds), None where it cannot be measured. detectable: the smallest true difference that as many seeds find with
    probability 0.8, None where the deviation between seeds is unknown; seeds_for: (difference, seeds of each that find
    it), None where no difference was asked about.
    """

    difference: Interval
    p: float
    paired: bool
    pairing_gain: float | None
    detectable: float | None
    seeds_for: tuple[float, int | None] | None
    bootstrap: Interval | None = None

    @property
    def settled(self) -> bool:
        """Whether both intervals leave zero out."""
        return (
            self.difference.n > 1
            and 0 not in self.difference
            and (self.bootstrap is None or 0 not in self.bootstrap)
        )


def compare_methods(
    a: Sequence[float],
    b: Sequence[float],
    same_seeds: bool,
    images_a: np.ndarray | None = None,
    images_b: np.ndarray | None = None,
    usual_sd: float | None = None,
    small: float | None = SMALL_POINTS,
    level: float = LEVEL,
    resamples: int = 2000,
) -> Methods:
    """Compare a and b: one value a seed; same_seeds: a[i] and b[i] have the same seed.

    images_a, images_b: bool (seeds, N), of which the values are the means in percent. usual_sd: one method's deviation
    between seeds, for where too few were run to measure it. small: a difference that is asked about. Raises ValueError
    without values.
    """
    a, b = np.asarray(a, float), np.asarray(b, float)
    if not a.size or not b.size:
        raise ValueError("a comparison needs at least one run on each side")
    same_seeds = same_seeds and a.size == b.size
    gain = None
    if same_seeds and a.size > 1 and (apart := a.var(ddof=1) + b.var(ddof=1)) > 0:
        gain = float(1 - (b - a).var(ddof=1) / apart)
    paired = gain is not None and gain > 0
    if paired:
        difference = mean_interval(b - a, level)
        se, freedom = difference.sd / math.sqrt(a.size), a.size - 1
    else:
        difference, se, freedom = _welch(a, b, level)
    n = min(a.size, b.size)
    p = (
        float(2 * stats.t.sf(abs(difference.mean) / se, freedom))
        if se > 0
        else float(difference.mean == 0 or n < 2)
    )
    sd = se * math.sqrt(n) if n > 1 else math.nan
    if not sd > 0:
        sd = None if usual_sd is None else usual_sd * math.sqrt(2)
    bootstrap = None
    if images_a is not None and images_b is not None and n > 1:
        bootstrap = resample(images_a, images_b, paired, level, resamples)
    return Methods(
        difference,
        p,
        paired,
        gain,
        None if sd is None else detectable(n, sd, paired, level),
        None if sd is None or small is None else (small, seeds_needed(small, sd, paired, level)),
        bootstrap,
    )


def _welch(a: np.ndarray, b: np.ndarray, level: float) -> tuple[Interval, float, float]:
    """(interval of mean(b) - mean(a), its standard error, degrees of freedom) without assuming equal variances."""
    mean, n = float(b.mean() - a.mean()), min(a.size, b.size)
    if n < 2:
        return Interval(mean, math.nan, math.nan, n), math.nan, math.nan
    parts = np.array([a.var(ddof=1) / a.size, b.var(ddof=1) / b.size])
    se = math.sqrt(parts.sum())
    freedom = (
        float(parts.sum() ** 2 / (parts**2 / [a.size - 1, b.size - 1]).sum())
        if se > 0
        else a.size + b.size - 2
    )
    half = float(stats.t.ppf((1 + level) / 2, freedom)) * se
    return Interval(mean, mean - half, mean + half, n), se, freedom


def resample(
    a: np.ndarray, b: np.ndarray, paired: bool, level: float = LEVEL, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Bootstrap interval of the difference: seeds are drawn first (together when paired), then images, the same for all.

    a, b: bool (seeds, N). Images with equal results in all runs are exchangeable, so their counts are what is drawn.
    """
    a, b = _flags(a), _flags(b)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"results of {a.shape} and {b.shape} (seeds, images) cannot be compared")
    if paired and len(a) != len(b):
        raise ValueError("paired methods need the same seeds")
    images, rng = a.shape[1], np.random.default_rng(seed)
    patterns, counts = np.unique(np.concatenate([a, b]).T, axis=0, return_counts=True)
    right_a, right_b = patterns[:, : len(a)].astype(float), patterns[:, len(a) :].astype(float)
    found = np.empty(resamples)
    for i in range(resamples):
        share = rng.multinomial(images, counts / images) / images
        top_a, top_b = share @ right_a, share @ right_b
        of_a = rng.integers(len(a), size=len(a))
        of_b = of_a if paired else rng.integers(len(b), size=len(b))
        found[i] = top_b[of_b].mean() - top_a[of_a].mean()
    low, high = _percentiles(100 * found, level)
    return Interval(float(100 * (b.mean() - a.mean())), low, high, min(len(a), len(b)))


def power(difference: float, seeds: int, sd: float, paired: bool, level: float = LEVEL) -> float:
    """Probability that a two-sided t test finds a true difference.

    sd: of the difference of one seed's two values; unpaired, that is sqrt(2) times one method's, on 2 (seeds - 1) degrees.
    """
    freedom = (seeds - 1) * (1 if paired else 2)
    limit, shift = stats.t.ppf((1 + level) / 2, freedom), difference * math.sqrt(seeds) / sd
    # the noncentral t distribution as a mean over the estimated deviation; scipy's gives nan far out
    estimated = limit * np.sqrt(stats.chi2.ppf((np.arange(4000) + 0.5) / 4000, freedom) / freedom)
    return float((stats.norm.sf(estimated - shift) + stats.norm.cdf(-estimated - shift)).mean())


def detectable(seeds: int, sd: float, paired: bool, level: float = LEVEL, wanted: float = POWER) -> float:
    """The smallest true difference that ``seeds`` seeds of each method find with probability ``wanted``; inf for one."""
    if seeds < 2:
        return math.inf
    unit = sd / math.sqrt(seeds)
    return float(
        optimize.brentq(lambda d: power(d, seeds, sd, paired, level) - wanted, 0.5 * unit, 100 * unit)
    )


def seeds_needed(
    difference: float, sd: float, paired: bool, level: float = LEVEL, wanted: float = POWER
) -> int | None:
    """Seeds of each method that find ``difference`` with probability ``wanted``; None for more than 10,000."""
    low, high = 2, 10_000
    if power(difference, high, sd, paired, level) < wanted:
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (
            (low, middle) if power(difference, middle, sd, paired, level) >= wanted else (middle + 1, high)
        )
    return low


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction: adjusted p values, in the order given."""
    order, adjusted, highest = np.argsort(p, kind="stable"), [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = highest
    return adjusted


def changes_by_class(a: np.ndarray, b: np.ndarray, labels: np.ndarray) -> list[tuple[int, float, int]]:
    """(class, points gained by b over a, images of the class), most gained first. a, b: bool (seeds, N); labels (N,)."""
    gained = _flags(b).mean(0) - _flags(a).mean(0)
    images, sums = np.bincount(labels), np.bincount(labels, weights=gained)
    found = [(k, float(100 * sums[k] / images[k]), int(images[k])) for k in np.flatnonzero(images)]
    return sorted(found, key=lambda entry: (-entry[1], entry[0]))


def words(
    found: Methods,
    a: str,
    b: str,
    metric: Metric,
    p: float | None = None,
    usual_sd: float | None = None,
    level: float = LEVEL,
) -> str:
    """Return the verdict in a sentence. p: corrected for the number of comparisons, by Holm's method."""
    value, n, unit = found.difference, found.difference.n, points_of(metric)
    head = f"{b} - {a} = {value.mean:+.{metric.digits}f}{unit}"
    if n < 2:
        alone = "" if usual_sd is None else f" (seeds alone differ by about {usual_sd})"
        return f"{head}: one pair of runs, which says nothing about the methods{alone}"
    head += f" [{value.low:+.{metric.digits}f}, {value.high:+.{metric.digits}f}] over {n} seeds"
    settled = found.settled and (p is None or p <= 1 - level)
    corrected = "" if p is None else f"; p = {p:.2g} after Holm's correction"
    if settled:
        return f"{head}: {b} is {'better' if metric.better(value.mean, 0) else 'worse'}{corrected}"
    return f"{head}: inside the noise{corrected}{_power_words(found, metric)}"


def _power_words(found: Methods, metric: Metric) -> str:
    """Return what as many seeds can find, and how many would find a small difference."""
    if found.detectable is None:
        return ""
    unit = points_of(metric)
    said = f"; {found.difference.n} seeds find differences from {found.detectable:.{metric.digits}f}{unit} on"
    if found.seeds_for:
        small, seeds = found.seeds_for
        said += f", {small:g}{unit} would need {f'{seeds} seeds' if seeds else 'more than 10,000 seeds'}"
    return said


def points_of(metric: Metric) -> str:
    """Return the unit of a difference: " points" of percentages."""
    return " points" if metric.unit == "%" else f" {metric.unit}" if metric.unit else ""


def small_of(metric: Metric) -> float | None:
    """Return the difference that a comparison of this metric asks about."""
    return SMALL_POINTS if metric.unit == "%" else None


def _flags(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x)
    if x.dtype != bool:
        raise ValueError(f"per-image results are true or false, not {x.dtype}")
    return x


def _percentiles(values: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
