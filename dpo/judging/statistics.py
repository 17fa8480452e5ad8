"""Win rates with their intervals, with and without control of length."""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

DRAWS, DRAWS_OF_FITS = 2000, 400
AT_ONCE = 2**20  # prompts of draws in memory
LEAST = 5  # wins, and losses, without which a bootstrap of fits says little
RIDGE = 0.1


class Rate(NamedTuple):
    """A win rate and its 95 % interval, which is None if it is not known."""

    rate: float
    interval: tuple[float, float] | None
    method: str


def interval(values: np.ndarray, prompts: np.ndarray) -> tuple[float, float] | None:
    """Return the 95 % interval of the mean of `values` [n], by bootstrap over their `prompts` [n]; None for a single
    prompt."""
    group = np.unique(prompts, return_inverse=True)[1]
    counts, sums = np.bincount(group), np.bincount(group, values)
    n = len(counts)
    if n == 1:
        return None
    rng, at_once = np.random.default_rng(0), max(AT_ONCE // n, 1)
    draws = (rng.integers(n, size=(min(at_once, DRAWS - start), n)) for start in range(0, DRAWS, at_once))
    means = [sums[draw].sum(1) / counts[draw].sum(1) for draw in draws]
    low, high = np.percentile(np.concatenate(means), _percentiles(n))
    return float(low), float(high)


def _percentiles(n: int) -> tuple[float, float]:
    """Return which percentiles of a bootstrap over n prompts are the ends of a 95 % interval.

    Plain ones are as narrow as if n - 1 were n and t were normal; these make up for it (Hesterberg 2015,
    arXiv:1411.5279, "expanded percentile"). The quantile of t is by the expansion of Cornish and Fisher.
    """
    z, df = NormalDist().inv_cdf(0.975), n - 1
    t = z + (z**3 + z) / (4 * df) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)
    outside = 100 * NormalDist().cdf(-t * math.sqrt(n / df))
    return outside, 100 - outside


def exact_interval(wins: int, n: int) -> tuple[float, float]:
    """Return the 95 % interval of a binomial share (Clopper and Pearson 1934), by bisection on its tails."""

    def lower(k: int) -> float:
        """Return the share at which k or more of n have a probability of 0.025."""
        low, high = 0.0, 1.0
        counts = np.arange(k, n + 1)
        logs = np.array([math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in counts])
        for _ in range(60 * (k > 0)):
            p = (low + high) / 2
            tail = np.exp(logs + counts * math.log(p) + (n - counts) * math.log1p(-p)).sum()
            low, high = (low, p) if tail > 0.025 else (p, high)
        return low

    return lower(wins), 1 - lower(n - wins)


def share_interval(hits: np.ndarray, prompts: np.ndarray) -> tuple[float, float] | None:
    """Return the `interval` of a share. If all `hits` are 1, or all 0, the exact binomial one over prompts: resampling
    equal values would make it certain."""
    n = len(np.unique(prompts))
    if n > 1 and hits[0] in (0, 1) and (hits == hits[0]).all():
        return exact_interval(n * int(hits[0]), n)
    return interval(hits, prompts)


def win_rate(wins: Sequence[float], prompts: Sequence[str]) -> Rate:
    """Return the mean of `wins` [pairs], each 1, 0 or 0.5 for a tie, and its interval over their `prompts` [pairs]: the
    exact binomial one if no prompt has two pairs and nothing ties. Nothing but ties tells no interval.

    The rate and interval of 1 - wins are exactly one minus these.
    """
    values, n = np.array(wins), len(wins)
    exact = len(set(prompts)) == n > 1 and 0.5 not in wins
    ends = exact_interval(int(values.sum()), n) if exact else share_interval(values, np.array(prompts))
    ends = ends if set(wins) != {0.5} else None
    rate = _on_grid((values - 0.5).sum() / n, 52)
    around = ends and (_on_grid(ends[0] - 0.5, 40), _on_grid(ends[1] - 0.5, 40))
    return Rate(rate, around, "exact binomial" if exact else "bootstrap over prompts")


def _on_grid(over_half: float, bits: int) -> float:
    """Return 0.5 + `over_half`, rounded to 2^-bits: one minus it is then exact."""
    return 0.5 + round(over_half * 2**bits) / 2**bits


def length_controlled(wins: Sequence[float], longer: Sequence[int], prompts: Sequence[str]) -> Rate:
    """Return the win rate at equal length. `longer`: characters by which a is longer than b, of each pair.

    After AlpacaEval 2 (Dubois et al. 2024, arXiv:2404.04475, section 3), without its terms of the instruction's
    difficulty: fit P(win) = sigmoid(theta + phi tanh(d / s)), where d is `longer` and s the root of its mean square,
    by maximum likelihood, a tie as half a win, with the penalty RIDGE phi^2 / 2. The rate is sigmoid(theta). Its
    interval is None with fewer than LEAST wins or losses.
    """
    values, d = np.array(wins), np.array(longer, dtype=float)
    x = np.tanh(d / (math.sqrt((d**2).mean()) or 1.0))
    group = np.unique(prompts, return_inverse=True)[1]
    n = int(group.max()) + 1
    rate = float(_fit(values, x, np.ones((1, len(x))))[0])
    if n == 1 or min(values.sum(), (1 - values).sum()) < LEAST:
        return Rate(rate, None, "bootstrap over prompts")
    weights = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), DRAWS_OF_FITS)[:, group]
    low, high = np.percentile(_fit(values, x, weights), _percentiles(n))
    return Rate(rate, (float(low), float(high)), "bootstrap over prompts")


def _fit(wins: np.ndarray, x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return sigmoid(theta) of the fits with each row of `weights` [fits, pairs], by Newton's method. The likelihood
    is concave; steps of up to 1 keep it from overshooting. Of only wins (or losses) the rate is 1 (or 0)."""
    theta, phi = np.zeros((2, len(weights)))
    share = weights @ wins / weights.sum(1)
    mixed = (share > 0) & (share < 1)
    for _ in range(100):
        p = 1 / (1 + np.exp(-(theta[:, None] + phi[:, None] * x)))
        slope, curve = weights * (wins - p), weights * p * (1 - p)
        g0, g1 = slope.sum(1), slope @ x - RIDGE * phi
        h00, h01, h11 = curve.sum(1), curve @ x, curve @ x**2 + RIDGE
        det = np.where(mixed, h00 * h11 - h01**2, 1.0)
        step = np.where(mixed, np.array([h11 * g0 - h01 * g1, h00 * g1 - h01 * g0]) / det, 0.0)
        size = np.maximum(np.abs(step).max(0), 1.0)
        theta, phi = theta + step[0] / size, phi + step[1] / size
        if np.abs(step).max() < 1e-12:
            break
    return np.where(mixed, 1 / (1 + np.exp(-theta)), share)
