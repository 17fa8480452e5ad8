"""What runs reached: their folders' configuration, metrics, samples, true reward, and a table of them."""

import contextlib
import functools
import glob
import json
import math
import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import yaml
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from dpo.config import MayChange
from dpo.config import keys as config_keys
from dpo.data.diagnostics import describe
from dpo.judging.statistics import exact_interval
from dpo.run.config import Config
from dpo.run.metrics import EVAL_EXAMPLES
from dpo.run.resume import flat
from dpo.utils import UserError, visible
from evaluations import (
    ACCURACY,
    EXAMPLES,
    MARGIN,
    SHARES,
    Z95,
    Estimate,
    Evaluation,
    estimate,
    quick_estimate,
    read_evaluations,
)
from utils import CONFIG_DIR, loss_values

REWARDS = [f"rewards_eval/{name}" for name in ("chosen", "rejected", "margins")]
MOST_EXAMPLES = 10**7
LOSS, KL, LENGTH = "loss/eval", "kl_eval/rao_blackwell", "samples_eval/policy_length"
# Result -> its name in tables.
SHORT = {ACCURACY: "accuracy", MARGIN: "margin", LOSS: "loss"}
ALWAYS = ["run", "loss.name", *SHORT]  # columns of the printed table at any width
SHORT |= {KL: "KL", "true_reward": "reward", "win_rate": "win rate", LENGTH: "length"}
# At least 3:1 on white and on browsers' dark backgrounds; with the marks, 36 runs can be told apart.
COLOURS = ["#2b7bd9", "#d9541e", "#1e9461", "#b34fc4", "#a67c00", "#d6407f", "#0f93a8", "#7a7f3c", "#7d6ae0"]
MARKS = {"●": "o", "■": "s", "▲": "^", "◆": "D"}  # character -> matplotlib's marker


@dataclass
class Run:
    """A run's folder. `config`: dotted key -> value; `metrics`, `samples`: the objects of the files' lines."""

    name: str
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    finished: bool
    colour: str
    mark: str
    folder: Path
    n_seen_prompts: int = 0
    """Prompts of the test split that training, or the training of model.archive, has seen."""
    facts: str = ""
    """What its data are like."""
    funnel: dict[str, Any] = field(default_factory=dict)
    """What became of the data's rows: split -> data set -> counts."""
    judged: Estimate | None = None
    """Win rate of its samples, by a judge."""

    @functools.cached_property
    def by_example(self) -> list[Evaluation]:
        """The evaluations whose numbers of each example are known."""
        return read_evaluations(self.folder / EVAL_EXAMPLES)

    @property
    def last_by_example(self) -> Evaluation | None:
        """The last evaluation's numbers of each example, if they are known."""
        last = self.by_example[-1] if self.by_example else None
        return last if last is not None and self.evaluations and last.seen == self.evaluations[-1][EXAMPLES] else None

    @functools.cached_property
    def results(self) -> dict[str, Estimate]:
        return _results(self)  # kept: bootstraps take time

    @functools.cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        return [row for row in self.metrics if any("eval" in name for name in row)]

    @property
    def status(self) -> str:
        if not self.metrics:
            return "nothing logged"
        state = "finished" if self.finished else f"unfinished, {self.metrics[-1][EXAMPLES]} examples"
        state += f", {self.n_seen_prompts} test prompts seen in training" if self.n_seen_prompts else ""
        return state if self.evaluations else f"{state}, no evaluation"

    @property
    def rewarded(self) -> bool:
        """Whether the true reward of the samples is known."""
        return self.config.get("datasets") == ["sentiment"]

    def reward(self, sample: Mapping[str, Any], model: str) -> float | None:
        """Return the true reward of a sample of `model` (policy or reference), or None if it is not known."""
        return sentiment(sample["prompt"] + sample[model]) if self.rewarded else None

    def last_samples(self) -> dict[str, list[dict[str, Any]]]:
        """Return the samples of the last evaluation by prompt."""
        by_prompt = defaultdict(list)
        for row in self.samples:
            if row[EXAMPLES] == self.samples[-1][EXAMPLES]:
                by_prompt[row["prompt"]].append(row)
        return by_prompt


class Point(NamedTuple):
    """A point of the frontier: KL and its standard error in nats a response; true reward."""

    examples: int
    kl: float
    kl_error: float
    reward: Estimate


# --- Reading ---


def read_lines(path: Path, *texts: str) -> list[dict[str, Any]]:
    """Return the objects of a file with one a line, or [] if there is no file. A truncated last line is left out.

    With `texts`, every row must have these keys, as text; without, all values must be numbers. Raises UserError for a
    row that differs, or that has no count `counters/examples`.
    """
    # Not splitlines: samples may hold U+2028 and other line separators.
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else [""]
    rows = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            row = json.loads(line)
            _check_row(row, texts)
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            keys = " and ".join([EXAMPLES, *texts])
            raise UserError(
                f"{path}, line {number} is no JSON object with {keys}: {line[:50]!r}; repair or remove that line"
            ) from error
        rows.append(row)
    return rows


def _check_row(row: Any, texts: Sequence[str]) -> None:
    examples = row[EXAMPLES]
    if type(examples) is not int or not 0 <= examples < 2**63:
        raise TypeError
    if not all(isinstance(row[key], str) for key in texts):
        raise TypeError
    for value in () if texts else row.values():
        if type(value) not in (int, float):
            raise TypeError
        float(value)  # OverflowError if a whole number is too large


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """Return the run folders that `paths` are or hold, without repeats. Raises UserError for a path without any."""
    folders: dict[Path, None] = {}
    for path in paths:
        configs = [file for below in ("", "*/", "*/*/") for file in glob.glob(f"{below}config.yaml", root_dir=path)]
        if not configs:
            problem = "holds no run" if path.exists() else "does not exist"
            raise UserError(f"{path} {problem}; give run folders, or folders that hold runs up to two levels down")
        folders |= dict.fromkeys((path / file).resolve().parent for file in sorted(configs, key=_by_number))
    return list(folders)


def _by_number(name: str) -> list[Any]:
    """Sort beta=0.05 before beta=10, by their numbers."""
    return [float(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+(?:\.\d+)?)", name))]


def load_runs(paths: Sequence[Path]) -> list[Run]:
    """Return the runs of `find_runs`, named by their paths below the folder that holds all. Raise UserError."""
    folders = find_runs(paths)
    parent = os.path.commonpath([folder.parent for folder in folders])
    runs = []
    for i, folder in enumerate(folders):
        try:
            config = flat(dict(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))))
            metrics = read_lines(folder / "metrics.jsonl")
            samples = read_lines(folder / "samples.jsonl", "prompt", "policy")
        except OSError as error:
            raise UserError(f"{error.filename} cannot be read: {error.strerror}; leave that run out") from error
        except (ValueError, TypeError, yaml.YAMLError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{folder / 'config.yaml'} cannot be read ({reason}); leave that run out") from error
        name, finished = visible(str(folder.relative_to(parent))), _is_finished(folder, metrics)
        look = COLOURS[i % len(COLOURS)], list(MARKS)[i % len(MARKS)]
        runs.append(Run(name, config, metrics, samples, finished, *look, folder))
        runs[-1].n_seen_prompts, runs[-1].facts, runs[-1].funnel = _said_of_data(folder)
    return runs


def _said_of_data(folder: Path) -> tuple[int, str, dict[str, Any]]:
    """Read `Run.n_seen_prompts`, `facts` and `funnel` from data_funnel.json; 0, "" and {} if they are not known."""
    seen, facts, funnel = 0, "", {}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        told = json.loads((folder / "data_funnel.json").read_text(encoding="utf-8"))
        funnel = {
            split: {str(name): {str(key): int(n) for key, n in counts.items()} for name, counts in told[split].items()}
            for split in ("train", "test")
            if split in told
        }
        facts = describe(told["facts"]) if "facts" in told else ""
        seen = max((int(shared["prompts"]) for shared in told["overlap"].values()), default=0)
    return seen, facts, funnel


def _is_finished(folder: Path, metrics: Sequence[Mapping[str, Any]]) -> bool:
    try:
        state = json.loads((folder / "LATEST" / "trainer_state.json").read_text(encoding="utf-8"))
        # A finished run may have been resumed for more epochs.
        return state["examples"] == state["total_examples"] >= metrics[-1][EXAMPLES]
    except (OSError, ValueError, LookupError, TypeError):
        return False


def not_begun(sweep: Path) -> list[str]:
    """Return the runs of a sweep that ended before they began: they have a log, and no configuration."""
    return sorted(file.parent.name for file in sweep.glob("*/log.txt") if not (file.parent / "config.yaml").exists())


# --- Statistics ---


@functools.cache
def _analyzer() -> SentimentIntensityAnalyzer:
    return SentimentIntensityAnalyzer()


@functools.cache
def sentiment(text: str) -> float:
    """Return VADER's compound score, -1 to 1."""
    return _analyzer().polarity_scores(text)["compound"]


def sentiment_rewards(rows: Iterable[Mapping[str, Any]], model: str = "policy") -> dict[int, Estimate]:
    """Return examples -> true reward of prompt + response, from rows of samples.jsonl. `model`: policy or reference."""
    scores: dict[int, tuple[list[float], list[str]]] = defaultdict(lambda: ([], []))
    for row in rows:
        if isinstance(row.get(model), str):
            values, prompts = scores[row[EXAMPLES]]
            values.append(sentiment(row["prompt"] + row[model]))
            prompts.append(row["prompt"])
    return {examples: quick_estimate(*found) for examples, found in scores.items()}


def frontier(run: Run) -> list[Point]:
    """Return the evaluations that have a KL and samples, in order of training. The reward is the samples' sentiment."""
    rewards = sentiment_rewards(run.samples)
    points = []
    for row in run.evaluations:
        name = next((n for n in ("kl_eval/rao_blackwell", "kl_eval/plain") if n in row), None)
        if name and row[EXAMPLES] in rewards:
            error = row.get(f"{name}_error", math.nan)
            points.append(Point(row[EXAMPLES], row[name], error, rewards[row[EXAMPLES]]))
    return points


def reference_rewards(runs: Sequence[Run]) -> list[Estimate]:
    """Return the true reward of each distinct reference of the runs."""
    last = [list(sentiment_rewards(run.samples, "reference").values())[-1:] for run in runs]
    return list(dict.fromkeys(reward for rewards in last for reward in rewards))


def results_of(run: Run) -> dict[str, Estimate]:
    """Return the results of a run's last evaluation, and its win rate if it was judged, by the names of SHORT."""
    return run.results | ({"win_rate": run.judged} if run.judged else {})


def _results(run: Run) -> dict[str, Estimate]:
    """Return the results of a run's last evaluation, by the names of SHORT. From numbers of each example if they are
    known; else an accuracy's interval takes pairs for independent, and other intervals are known as far as logged."""
    if not run.evaluations:
        return {}
    final, each = run.evaluations[-1], run.last_by_example
    counted = final.get("counters/eval_examples", 0)
    n = int(counted) if 0 < counted <= MOST_EXAMPLES else None
    drawn = [row["prompt"] for row in run.samples if row[EXAMPLES] == final[EXAMPLES]]
    of_samples = (len(drawn) or None, len(set(drawn)) or None)
    found = {}
    for name in SHORT:
        if each is not None and name in each.values:
            found[name] = estimate(each.values[name], each.prompts, name in SHARES)
        elif name in final:
            error = final.get(f"{name}_error")
            ends = None if error is None else (final[name] - Z95 * error, final[name] + Z95 * error)
            if name == ACCURACY and n and 0 <= final[name] <= 1:
                ends = exact_interval(round(final[name] * n), n)
            found[name] = Estimate(final[name], ends, *(of_samples if name in (KL, LENGTH) else (n, None)))
    reward = sentiment_rewards(run.samples).get(final[EXAMPLES]) if run.rewarded else None
    return found | ({"true_reward": reward} if reward else {})


# --- The table ---


def differences(runs: Sequence[Run]) -> list[str]:
    """Return the configuration's keys whose values differ, without keys that do not change the training. A missing key
    counts as null, and so does a key of the loss that has its file's value: the loss's name tells it."""
    free, given = set(config_keys(Config, MayChange)), [run.config for run in runs]
    names = {path.stem for path in (CONFIG_DIR / "loss").glob("*.yaml")} & {str(c.get("loss.name")) for c in given}
    presets = {name: flat({"loss": loss_values(name) | {"name": None}}).items() for name in names}
    own = [{k: v for k, v in c.items() if (k, v) not in presets.get(str(c.get("loss.name")), ())} for c in given]
    keys = dict.fromkeys(key for config in given for key in config if not {key, key.split(".")[0]} & free)
    return [k for k in keys if all(len({repr(c.get(k)) for c in configs}) > 1 for configs in (given, own))]


def reward_kind(run: Run) -> str:
    """Return what a run's rewards are made of: rewards of different kinds cannot be compared."""
    loss = {key.removeprefix("loss."): value for key, value in run.config.items() if key.startswith("loss.")}
    name = str(loss.get("name"))
    if "." in str(loss.get("kind", name)) or any(key.startswith("terms.") for key in loss):
        return name
    divergence = loss.get("divergence") or "reverse_kl"
    what = "log-ratio" if loss.get("use_reference", True) else "log-probability"
    what += " per token" if loss.get("length_normalized") or loss.get("average_log_prob") else ""
    return what if divergence == "reverse_kl" else f"{what} ({divergence})"


def table_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return the row of report.csv for each run. `X_error` is the standard error of X, `X_low` and `X_high` the ends of
    its 95 % interval, `X_n` its number of pairs or samples. All rows have the same keys."""
    rows, differing = [], differences(runs)
    mixed = len({reward_kind(run) for run in runs}) > 1
    for run in runs:
        row: dict[str, Any] = {"run": run.name, "status": run.status}
        row |= {key: as_text(run.config.get(key)) for key in differing}
        final = run.evaluations[-1] if run.evaluations else {}
        row |= {"examples": run.metrics[-1][EXAMPLES] if run.metrics else 0, "evaluated_after": final.get(EXAMPLES)}
        kind = f" [{reward_kind(run)}]" if mixed else ""
        row |= {name + kind * (name in REWARDS): value for name, value in final.items() if "eval" in name}
        for name, found in results_of(run).items():
            column, (low, high) = name + kind * (name in REWARDS), found.interval or (None, None)
            row |= {column: found.value, f"{column}_low": low, f"{column}_high": high, f"{column}_n": found.n}
        rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    results = [name for name in names if name.partition(" [")[0] in SHORT]
    ends = [f"{name}{end}" for name in results for end in ("", "_low", "_high", "_n")]
    first = ["run", "status", *differing, "examples", "evaluated_after", *ends]
    return [{name: row.get(name) for name in dict.fromkeys([*first, *names]) if name in names} for row in rows]


def as_text(value: Any) -> str:
    """Return a value for people: absolute paths relative to the current folder, or by their last two names."""
    if value is None:
        return "–"
    if isinstance(value, list):
        return ", ".join(map(as_text, value))
    if isinstance(value, str) and value.startswith("/"):
        path = Path(value)
        value = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else "…/" + "/".join(path.parts[-2:])
    return visible(str(value))


def with_error(row: Mapping[str, Any], name: str) -> str:
    """Return a cell (of rewards: that of the row's own kind) as text, with its 95 % interval if it is known."""
    own = next((key for key, value in row.items() if key.partition(" [")[0] == name and value is not None), name)
    value, low, high = row.get(own), row.get(f"{own}_low"), row.get(f"{own}_high")
    if not isinstance(value, float) or math.isnan(value):
        return as_text(value)
    if low is None or high is None:
        return number(value)
    return f"{number(value)} [{number(low)}, {number(high)}]"


def number(value: float) -> str:
    """Return `value` with three digits after the point if it is below 10, else, or if these are 0, with four digits."""
    return f"{value:.3f}" if not value or 0.0005 <= abs(value) < 10 else f"{value:.4g}"


def text_table(rows: Sequence[Mapping[str, Any]], width: int) -> str:
    """Return aligned columns: ALWAYS, then the most important ones, as many as fit into `width` characters."""
    names = list(rows[0])
    settings, known = names[2 : names.index("examples")], {name.partition(" [")[0] for name in names}
    results = [name for name in SHORT if name != LENGTH]
    some = [*ALWAYS, *settings[:2], *results, "status", LENGTH, "examples", *settings[2:]]
    names = [name for name in dict.fromkeys(some) if name in known]
    columns = [[SHORT.get(name, name), *(with_error(row, name) for row in rows)] for name in names]
    widths = [max(map(len, column)) for column in columns]
    ends = accumulate(widths, lambda end, added: end + 2 + added)
    n_fitting = max(len(known & {*ALWAYS}), sum(end <= width for end in ends))
    padded = [[text.ljust(size) for text in column] for column, size in zip(columns[:n_fitting], widths)]
    left_out = ", ".join(column[0] for column in columns[n_fitting:])
    note = "\n[,] is a 95 % interval" + (f"; no room for {left_out}: see report.csv" if left_out else "")
    note += "; margins are of rewards of different kinds" if known - {*rows[0]} else ""
    return "\n".join("  ".join(line).rstrip() for line in zip(*padded)) + note
