"""What a run's eval_examples.jsonl tells: intervals, paired differences of runs on the same examples, a conclusion."""

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dpo.judging.statistics import exact_interval, interval, share_interval
from dpo.sampling import mean_and_error
from dpo.utils import UserError

EXAMPLES, ACCURACY, MARGIN = "counters/examples", "rewards_eval/accuracies", "rewards_eval/margins"
SHARES = (ACCURACY, "chosen_fell_eval")  # metrics that are 0 or 1 of each example
Z95, SURE, MOST_BINS = 1.96, 0.05, 5


class Estimate(NamedTuple):
    """A mean and its 95 % interval, None if it is not known. `n`: values (pairs, samples), of so many `prompts`."""

    value: float
    interval: tuple[float, float] | None
    n: int | None = None
    prompts: int | None = None

    @property
    def half_width(self) -> float:
        """Half the length of the interval, NaN if it is not known."""
        return (self.interval[1] - self.interval[0]) / 2 if self.interval else math.nan


class Evaluation(NamedTuple):
    """One evaluation's numbers of each held-out example. `keys`, `prompts`: hashes that runs share, [examples].

    `tokens`: lengths of the preferred and the other response, or of a single one. `values`: metric -> [examples], NaN
    if an example has no such side.
    """

    seen: int
    keys: list[str]
    prompts: np.ndarray
    sets: list[str]
    tokens: list[list[int]]
    values: dict[str, np.ndarray]

    def at(self, rows: Sequence[int], metric: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the values of a metric, and the prompts, of these examples."""
        return self.values[metric][rows], self.prompts[rows]

    def same_examples(self, other: "Evaluation") -> bool:
        """Return whether `other` is of the same examples, in any order."""
        return {*self.keys} == {*other.keys}


def read_evaluations(path: Path) -> list[Evaluation]:
    """Return a run's evaluations, [] if there is no such file. A truncated last line is left out. Raise UserError."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else [""]
    found = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            row = json.loads(line)
            found.append(_evaluation(row))
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            raise UserError(f"{path}, line {number} is no evaluation: {line[:50]!r}; remove that line") from error
    return found


def _evaluation(row: dict[str, Any]) -> Evaluation:
    seen, texts = row.pop(EXAMPLES), [row.pop(name) for name in ("example", "prompt", "data set")]
    tokens = row.pop("tokens")
    if type(seen) is not int or not all(isinstance(text, str) for column in texts for text in column):
        raise TypeError
    if not all(type(n) is int for lengths in tokens for n in lengths):
        raise TypeError
    values = {name: np.array([math.nan if v is None else v for v in column]) for name, column in row.items()}
    if {len(column) for column in (*texts, tokens, *values.values())} != {len(tokens)}:
        raise ValueError
    if any(column.dtype.kind not in "if" for column in values.values()):
        raise TypeError
    keys, prompts, sets = texts
    return Evaluation(seen, keys, np.array(prompts), sets, tokens, values)


# --- Intervals ---


def estimate(values: np.ndarray, prompts: np.ndarray, share: bool) -> Estimate:
    """Return the mean of `values` [n] and its interval by bootstrap over `prompts` [n]. NaN does not count."""
    there = ~np.isnan(values)
    values, prompts = values[there].astype(float), prompts[there]
    if not len(values):
        return Estimate(math.nan, None, 0, 0)
    alike = not share and len(values) > 1 and bool((values == values[0]).all())  # resampling would make it certain
    ends = None if alike else (share_interval if share else interval)(values, prompts)
    return Estimate(float(values.mean()), ends, len(values), len(np.unique(prompts)))


def quick_estimate(values: Any, prompts: Any, share: bool = False) -> Estimate:
    """Return what `estimate` does, by the normal approximation: for curves of many points. Any sequences will do."""
    values = np.array(values, dtype=float)
    there = ~np.isnan(values)
    values, prompts = values[there], np.array(prompts)[there]
    if not len(values):
        return Estimate(math.nan, None, 0, 0)
    n = len(np.unique(prompts))
    if share and n > 1 and values[0] in (0, 1) and (values == values[0]).all():
        return Estimate(float(values[0]), exact_interval(n * int(values[0]), n), len(values), n)
    mean, error = mean_and_error(values.tolist(), prompts.tolist())
    if error is None or n == 1:
        return Estimate(mean, None, len(values), n)
    low, high = mean - Z95 * error, mean + Z95 * error
    return Estimate(mean, (max(low, 0.0), min(high, 1.0)) if share else (low, high), len(values), n)


# --- Two runs on the same examples ---


class Paired(NamedTuple):
    """How a run differs from another on the examples that both evaluated: mean of the one minus the other.

    `gained`, `lost`: examples that only the one, or only the other, ranks right; `p`: see `flip_p`.
    """

    difference: Estimate
    gained: int
    lost: int
    p: float
    margin: Estimate


def on_both(run: Evaluation, other: Evaluation, metric: str = ACCURACY) -> tuple[list[int], list[int]] | None:
    """Return the examples that two runs share, as rows of each; None unless they have `metric` and two prompts."""
    if not all(metric in evaluation.values for evaluation in (run, other)):
        return None
    place = {key: i for i, key in enumerate(other.keys)}
    mine = [i for i, key in enumerate(run.keys) if key in place]
    return (mine, [place[run.keys[i]] for i in mine]) if len({*run.prompts[mine]}) > 1 else None


def paired(run: Evaluation, other: Evaluation) -> Paired | None:
    """Return how `run` differs from `other`; None if they have too little in common."""
    if (rows := on_both(run, other)) is None:
        return None
    (hits, prompts), (others, _) = run.at(rows[0], ACCURACY), other.at(rows[1], ACCURACY)
    margins = run.at(rows[0], MARGIN)[0] - other.at(rows[1], MARGIN)[0]
    gained, lost = int((hits > others).sum()), int((hits < others).sum())
    difference = estimate(hits - others, prompts, share=False)
    if not gained + lost:
        difference = difference._replace(interval=no_difference(difference.prompts or 0))
    return Paired(difference, gained, lost, flip_p(hits - others, prompts), estimate(margins, prompts, share=False))


def no_difference(prompts: int) -> tuple[float, float]:
    """Return how large a difference may be if none was seen: the exact interval of the share that differs."""
    high = exact_interval(0, prompts)[1]
    return -high, high


def flip_p(differences: np.ndarray, prompts: np.ndarray) -> float:
    """Return the exact two-sided p of a sum of whole `differences` [n]: if the runs were alike, each prompt's sum had
    either sign. Of one pair a prompt this is McNemar's exact test."""
    sums = np.abs(np.rint(np.bincount(np.unique(prompts, return_inverse=True)[1], differences))).astype(int)
    chances = np.ones(1)  # of the sum of signed sums, from -reach to reach
    for size, count in zip(*np.unique(sums[sums > 0], return_counts=True)):
        logs = [math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1) for k in range(count + 1)]
        spread = np.zeros(2 * size * count + 1)
        spread[:: 2 * size] = np.exp(np.array(logs) - count * math.log(2))
        chances = np.convolve(chances, spread)
    reach = len(chances) // 2
    return min(1.0, float(chances[np.abs(np.arange(-reach, reach + 1)) >= round(abs(float(differences.sum())))].sum()))


def holm(ps: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number (Holm 1979), in the same order."""
    corrected, least = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        corrected[i] = least = max(least, min(1.0, (len(ps) - rank) * ps[i]))
    return corrected


# --- Groups of examples ---


def accuracy_by(evaluation: Evaluation, groups: Sequence[Any]) -> dict[Any, Estimate]:
    """Return the accuracy of each group of examples; `groups` names each example's group."""
    rows: dict[Any, list[int]] = {}
    for i, group in enumerate(groups):
        rows.setdefault(group, []).append(i)
    return {group: estimate(*evaluation.at(some, ACCURACY), share=True) for group, some in rows.items()}


def length_bins(evaluation: Evaluation) -> list[float]:
    """Return inner edges of up to MOST_BINS bins of about as many examples, by how many tokens the preferred response
    is longer."""
    longer = [lengths[0] - lengths[-1] for lengths in evaluation.tokens]
    edges = np.quantile(longer, np.linspace(0, 1, MOST_BINS + 1)[1:-1], method="higher")
    return sorted({float(edge) for edge in edges if edge > min(longer)})


# --- A conclusion ---


class Ranked(NamedTuple):
    """A run with its accuracy on held-out pairs, and the last evaluation's numbers if they are known."""

    name: str
    folder: str
    accuracy: Estimate
    evaluation: Evaluation | None


def conclude(runs: Sequence[Ranked]) -> tuple[str, str]:
    """Return which run is best by held-out accuracy and whether the data tell it from the others, and how that is
    known. Every two runs are compared, because the best one is picked after the fact."""
    best = max(runs, key=lambda run: run.accuracy.value)
    equal = [run.name for run in runs if run.accuracy.value == best.accuracy.value]
    most = "the most held-out" if len(runs) > 1 else "held-out"
    first = f"{' and '.join(equal)} rank{'s' * (len(equal) == 1)} {most} pairs right: {_said(best.accuracy)}."
    ends = best.accuracy.interval
    if ends and ends[0] <= 0.5 <= ends[1]:
        first += " That is not told from chance, 0.5."
    if len(runs) == 1:
        return first, _SEEDS
    couples = list(itertools.combinations(range(len(runs)), 2))
    found = {(i, j): _compared(runs[i], runs[j]) for i, j in couples}
    known = [couple for couple in couples if found[couple] is not None]
    ps = dict(zip(known, holm([p for couple in known if (p := found[couple]) is not None])))
    mine = {runs[a if runs[b] is best else b].name: (a, b) for a, b in couples if best in (runs[a], runs[b])}
    told = [name for name, couple in mine.items() if ps.get(couple, 1) < SURE]
    alike = [name for name, couple in mine.items() if ps.get(couple, 0) >= SURE]
    unknown = [name for name, couple in mine.items() if couple not in ps]
    parts = [first]
    if told:
        worst, less = max(ps[mine[name]] for name in told), " or less" * (len(told) > 1)
        parts.append(f"The data tell {best.name} from {_list(told, len(runs) - 1, 'all')} (p {_p(worst)}{less}).")
    if alike:
        least = min(ps[mine[name]] for name in alike)
        more = " or more" * (len(alike) > 1 and least < 1)
        parts.append(
            f"The data do not tell {best.name} from {_list(alike, len(runs) - 1, 'any')} (p {_p(least)}{more})."
        )
    if unknown:
        parts.append(f"Whether {best.name} is better than {_list(unknown, len(runs) - 1, 'any')} is not known.")
    how = ""
    if known:
        how = f"p: exact paired test over prompts, corrected by Holm's method for {len(known)} comparisons. "
    if unknown:
        other = next(run for run in runs if run.name == unknown[0])
        how += "Not every run has numbers of each example in its folder, or the runs saw other examples: "
        how += f"python scripts/compare.py {best.folder} {other.folder} scores both anew. "
    return " ".join(parts), how + _SEEDS


_SEEDS = "Intervals and p tell how other held-out examples might differ, not how another seed of training might."


def _compared(one: Ranked, other: Ranked) -> float | None:
    """Return the p of their difference in accuracy; None if it is not known. Runs that saw other examples, too, are not
    compared: on those that they share the order may be the other one."""
    first, second = one.evaluation, other.evaluation
    if not (first and second) or not first.same_examples(second) or (rows := on_both(first, second)) is None:
        return None
    (hits, prompts), (others, _) = first.at(rows[0], ACCURACY), second.at(rows[1], ACCURACY)
    return flip_p(hits - others, prompts)


def _said(found: Estimate) -> str:
    ends = f", 95 % interval {found.interval[0]:.3f} to {found.interval[1]:.3f}" if found.interval else ""
    prompts = f" of {found.prompts} prompts" if found.prompts not in (None, found.n) else ""
    return f"{found.value:.3f}{ends}" + (f" ({found.n} pairs{prompts})" if found.n else "")


def _p(p: float) -> str:
    return f"= {p:.2g}" if p >= 0.001 else "< 0.001"


def _list(names: Sequence[str], n: int, each: str) -> str:
    """Return `names` for a sentence; if these are all `n` other runs: `each` of them."""
    if len(names) == n > 1:
        return f"{each} of the other {n} runs"
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} and {len(names) - 3} others"
