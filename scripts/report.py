"""Compare runs on one page: python scripts/report.py SWEEP_OR_RUNS... [--out report] [--samples 8]

Takes run folders, and folders that hold runs up to two levels down. Writes `report.csv` (one line a run) and
`report.html` (settings that differ, curves, reward against KL, samples side by side; one file that needs no network),
and prints the table. The true reward is known for runs on the embedded sentiment task alone: VADER's compound score.
"""

import argparse
import csv
import functools
import glob
import io
import json
import math
import os
import re
import shlex
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jinja2
import matplotlib
import yaml
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from dpo.run.runs import FREE, flat
from dpo.sampling import mean_and_error
from dpo.utils import HelpFormatter, UserError, log, make_dir, redact, run_main, visible

EXAMPLES = "counters/examples"
MOST_POINTS = 400  # of a curve
PANELS = {
    "Accuracy of pairs": "rewards_{}/accuracies",
    "Reward margin": "rewards_{}/margins",
    "Implicit reward of chosen": "rewards_{}/chosen",
    "Implicit reward of rejected": "rewards_{}/rejected",
    "Change of chosen, nats a token": "logratios_per_token_{}/chosen",
    "KL to the reference, nats a response": "kl_{}/rao_blackwell",
    "Length of samples, tokens": "samples_{}/policy_length",
}
"""Title of a chart -> what it shows; {} stands for train and eval."""
Z95 = 1.96
MAIN_KEYS = ["model.name_or_path", "model.archive", "datasets", "loss.name", "loss.beta", "lr", "batch_size"]
MAIN_KEYS += ["n_epochs", "n_examples", "seed"]
SHORT = {"loss/eval": "loss", "rewards_eval/accuracies": "accuracy", "rewards_eval/margins": "margin"}
SHORT |= {"kl_eval/rao_blackwell": "KL", "true_reward": "reward", "samples_eval/policy_length": "length"}
# At least 3:1 on white and on browsers' dark backgrounds; with the marks, 36 runs are told apart.
COLOURS = ["#2b7bd9", "#d9541e", "#1e9461", "#b34fc4", "#a67c00", "#d6407f", "#0f93a8", "#7a7f3c", "#7d6ae0"]
MARKS = {"●": "o", "■": "s", "▲": "^", "◆": "D"}
INK = "#000000"  # as matplotlib draws axes and texts; currentColor on the page
DRAWING: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "report", "font.size": 9.5, "lines.markersize": 4}
DRAWING |= {"axes.spines.top": False, "axes.spines.right": False}
DRAWING |= {"axes.grid": True, "grid.color": "#888888", "grid.alpha": 0.25}


@dataclass
class Run:
    """A run's folder as read. `config`: dotted key -> value; `metrics`, `samples`: objects of the files' lines."""

    name: str
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    finished: bool
    colour: str
    mark: str
    seen: int = 0
    """How many prompts of the test split training has seen, or that of model.archive."""

    @functools.cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        return [row for row in self.metrics if any("eval" in name for name in row)]

    @property
    def status(self) -> str:
        if not self.metrics:
            return "nothing logged"
        state = "finished" if self.finished else f"unfinished, {self.metrics[-1][EXAMPLES]} examples"
        state += f", {self.seen} test prompts seen in training" if self.seen else ""
        return state if self.evaluations else f"{state}, no evaluation"

    @property
    def rewarded(self) -> bool:
        """Whether the true reward of its samples is known."""
        return self.config.get("datasets") == ["sentiment"]

    def reward(self, sample: Mapping[str, Any], model: str) -> float | None:
        """Return the true reward of a sample of `model` (policy or reference), or None if it is not known."""
        return sentiment(sample["prompt"] + sample[model]) if self.rewarded else None

    def last_samples(self) -> dict[str, list[dict[str, Any]]]:
        """Those of the last evaluation, by prompt."""
        found = defaultdict(list)
        for row in self.samples:
            if row[EXAMPLES] == self.samples[-1][EXAMPLES]:
                found[row["prompt"]].append(row)
        return found


class Interval(NamedTuple):
    """A mean over `prompts`, and the half-width of its 95 % interval (nan for a single value)."""

    mean: float
    half_width: float
    prompts: int


def interval(values: Sequence[float], prompts: Sequence[Any]) -> Interval:
    """Of samples' values, each with its prompt."""
    mean, error = mean_and_error(values, prompts)
    return Interval(mean, math.nan if error is None else Z95 * error, len(set(prompts)))


ANALYZER = SentimentIntensityAnalyzer()


@functools.cache
def sentiment(text: str) -> float:
    """VADER's compound score, -1 to 1."""
    return ANALYZER.polarity_scores(text)["compound"]


def sentiment_rewards(rows: Iterable[Mapping[str, Any]], model: str = "policy") -> dict[int, Interval]:
    """Examples -> true reward of prompt + response, from lines of samples.jsonl. `model`: policy or reference."""
    scored: dict[int, list[tuple[float, str]]] = defaultdict(list)
    for row in rows:
        if isinstance(row.get(model), str):
            scored[row[EXAMPLES]].append((sentiment(row["prompt"] + row[model]), row["prompt"]))
    return {examples: interval(*zip(*some)) for examples, some in scored.items()}


class Point(NamedTuple):
    """Of the frontier: KL and its standard error in nats a response, true reward and its interval."""

    examples: int
    kl: float
    kl_error: float
    reward: float
    half_width: float
    prompts: int


def frontier(run: Run) -> list[Point]:
    """The evaluations that have a KL and samples, in order of training; the reward is the samples' sentiment."""
    rewards = sentiment_rewards(run.samples)
    points = []
    for row in run.evaluations:
        name = next((n for n in ("kl_eval/rao_blackwell", "kl_eval/plain") if n in row), None)
        if name and row[EXAMPLES] in rewards:
            error = row.get(f"{name}_error", math.nan)
            points.append(Point(row[EXAMPLES], row[name], error, *rewards[row[EXAMPLES]]))
    return points


def read_lines(path: Path, *texts: str) -> list[dict[str, Any]]:
    """The objects of a file with one a line; none where there is no file. A last line that was cut is left out.

    Raises UserError for any other line that is no object with the count `counters/examples` and `texts`, and for one
    with other values than numbers where no texts are asked for.
    """
    # Not splitlines: samples may hold U+2028 and its like.
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else [""]
    rows = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            row = json.loads(line)
            if type(row[EXAMPLES]) is not int or not all(isinstance(row[key], str) for key in texts):
                raise TypeError
            if not 0 <= row[EXAMPLES] < 2**63 or not (
                texts or all(type(value) in (int, float) for value in row.values())
            ):
                raise TypeError
            rows.append(row if texts else {name: _as_number(value) for name, value in row.items()})
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            what = f"is no JSON object with {' and '.join([EXAMPLES, *texts])}: {line[:50]!r}"
            raise UserError(f"{path}, line {number} {what}; repair or remove that line") from error
    return rows


def _as_number(value: float) -> float:
    float(value)  # OverflowError for whole numbers beyond its range
    return value


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """The run folders that `paths` are or hold, without repeats. Raises UserError for a path without any."""
    found: dict[Path, None] = {}
    for path in paths:
        configs = [file for below in ("", "*/", "*/*/") for file in glob.glob(f"{below}config.yaml", root_dir=path)]
        if not configs:
            what = "holds no run" if path.exists() else "does not exist"
            raise UserError(f"{path} {what}; give run folders, or folders that hold runs up to two levels down")
        found |= dict.fromkeys((path / file).resolve().parent for file in sorted(configs, key=_by_number))
    return list(found)


def _by_number(name: str) -> list[Any]:
    """Sorts beta=0.05 and beta=10 by their numbers."""
    return [float(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+(?:\.\d+)?)", name))]


def load_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs of `find_runs`, named by their paths from the folder that holds all of them. Raises UserError."""
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
            what = str(error).splitlines()[0]
            raise UserError(f"{folder / 'config.yaml'} cannot be read ({what}); leave that run out") from error
        name, finished = visible(str(folder.relative_to(parent))), _finished(folder, metrics)
        look = COLOURS[i % len(COLOURS)], list(MARKS)[i % len(MARKS)]
        runs.append(Run(name, config, metrics, samples, finished, *look, _seen(folder)))
    return runs


def _seen(folder: Path) -> int:
    """`Run.seen`, by data_funnel.json; 0 if that does not tell."""
    try:
        found = json.loads((folder / "data_funnel.json").read_text(encoding="utf-8"))["overlap"]
        return max((int(shared["prompts"]) for shared in found.values()), default=0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return 0


def _finished(folder: Path, metrics: Sequence[Mapping[str, Any]]) -> bool:
    try:
        state = json.loads((folder / "LATEST" / "trainer_state.json").read_text(encoding="utf-8"))
        # A finished run may have been taken up again, for more epochs.
        return state["examples"] == state["total_examples"] >= metrics[-1][EXAMPLES]
    except (OSError, ValueError, LookupError, TypeError):
        return False


def differences(runs: Sequence[Run]) -> list[str]:
    """Keys of the configuration whose values differ, but for those that change nothing of what is trained; a key that
    a run does not have counts as null."""
    keys = dict.fromkeys(key for run in runs for key in run.config if not {key, key.split(".")[0]} & FREE)
    return [key for key in keys if len({repr(run.config.get(key)) for run in runs}) > 1]


def table_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """What report.csv says of each run. `X_error` is the standard error of X; all rows have the same keys."""
    rows, differing = [], differences(runs)
    for run in runs:
        row: dict[str, Any] = {"run": run.name, "status": run.status}
        row |= {key: shown(run.config.get(key)) for key in differing}
        final = run.evaluations[-1] if run.evaluations else {}
        row |= {"examples": run.metrics[-1][EXAMPLES] if run.metrics else 0, "evaluated_after": final.get(EXAMPLES)}
        row |= {name: value for name, value in final.items() if "eval" in name}
        reward = sentiment_rewards(run.samples).get(final.get(EXAMPLES, -1)) if run.rewarded else None
        if reward:
            row |= {"true_reward": reward.mean, "true_reward_error": reward.half_width / Z95, "prompts": reward.prompts}
        rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    first = ["run", "status", *differing, "examples", "evaluated_after", *SHORT]
    return [{name: row.get(name) for name in dict.fromkeys([*first, *names]) if name in names} for row in rows]


def shown(value: Any) -> str:
    """A value as people read it; folders of this machine from the current folder, or by their last two names."""
    if value is None:
        return "–"
    if isinstance(value, list):
        return ", ".join(map(shown, value))
    if isinstance(value, str) and value.startswith("/"):
        path = Path(value)
        value = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else "…/" + "/".join(path.parts[-2:])
    return visible(str(value))


def with_error(row: Mapping[str, Any], name: str) -> str:
    """A cell, with its 95 % interval where its standard error is known."""
    value, error = row[name], row.get(f"{name}_error")
    text = f"{value:.4g}" if isinstance(value, float) else shown(value)
    return text + (f" ± {Z95 * error:.2g}" if error is not None else "")


def text_table(rows: Sequence[Mapping[str, Any]], width: int) -> str:
    """Aligned columns, the most important ones first, and of them those that fit into `width` characters."""
    names = list(rows[0])
    settings = names[2 : names.index("examples")]
    names = ["run", "status", *settings[:2], "examples", *(n for n in SHORT if n in names), *settings[2:]]
    columns = [[SHORT.get(name, name), *(with_error(row, name) for row in rows)] for name in names]
    widths = [max(map(len, column)) for column in columns]
    fitting = max(2, sum(end <= width for end in accumulate(widths, lambda end, own: end + 2 + own)))
    padded = [[text.ljust(own) for text in column] for column, own in zip(columns[:fitting], widths)]
    left_out = ", ".join(column[0] for column in columns[fitting:])
    note = "\n± is a 95 % interval" + (f"; no room for {left_out}: see report.csv" if left_out else "")
    return "\n".join("  ".join(line).rstrip() for line in zip(*padded)) + note


def thin_out(points: Sequence[Any]) -> list[Any]:
    """At most MOST_POINTS of `points`, evenly spaced, with the first and the last."""
    n = min(len(points), MOST_POINTS)
    return [points[i * (len(points) - 1) // max(n - 1, 1)] for i in range(n)]


def curve(run: Run, name: str) -> tuple[list[int], list[float], list[float]]:
    """Examples, values and half-widths of the 95 % interval of a metric, nan where there is none; thinned."""
    rows = thin_out([row for row in run.metrics if name in row])
    widths = [Z95 * row.get(f"{name}_error", math.nan) for row in rows]
    return [row[EXAMPLES] for row in rows], [row[name] for row in rows], widths


def draw_curves(axis: Axes, metric: str, runs: Sequence[Run]) -> None:
    for run in runs:
        axis.plot(*curve(run, metric.format("train"))[:2], color=run.colour, linewidth=0.8, alpha=0.55)
        look: dict[str, Any] = {"color": run.colour, "marker": MARKS[run.mark], "linewidth": 1.8, "zorder": 3}
        axis.errorbar(*curve(run, metric.format("eval")), **look, elinewidth=0.8, capsize=2)
    bottom, top = axis.get_ylim()
    if bottom < 0 < top:
        axis.axhline(0, color=INK, linewidth=0.8, alpha=0.6)
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.set_xlabel("examples")


def draw_points(axis: Axes, points: Sequence[Any], **look: Any) -> None:
    """A line through points of a frontier, with their 95 % intervals."""
    bars = [point.half_width for point in points], [Z95 * point.kl_error for point in points]
    axis.errorbar([point.kl for point in points], [point.reward for point in points], *bars, elinewidth=0.6, **look)


def draw_frontier(axis: Axes, along: Sequence[tuple[Run, list[Point]]]) -> None:
    for run, points in along:
        look = {"color": run.colour, "marker": MARKS[run.mark], "linewidth": 1}
        draw_points(axis, points, **look)
        draw_points(axis, points[-1:], **look, markersize=9)
    for reward in reference_rewards([run for run, points in along if points]):
        draw_points(axis, [Point(0, 0.0, math.nan, *reward)], color=INK, marker="*", markersize=10)
    axis.set(xlabel="KL(policy || reference), nats a response", ylabel="true reward")


def reference_rewards(runs: Sequence[Run]) -> list[Interval]:
    """One for each reference that the runs have among them."""
    found = [list(sentiment_rewards(run.samples, "reference").values())[-1:] for run in runs]
    return list(dict.fromkeys(reward for rewards in found for reward in rewards))


def chart(title: str, draw: Callable[..., None], *data: Any) -> Markup:
    """What `draw` draws, as inline SVG in the page's colours. Its ids begin with its `title`."""
    with matplotlib.rc_context(DRAWING):
        figure = Figure(figsize=(4.6, 2.9), layout="constrained")
        axis = figure.add_subplot()
        axis.locator_params(nbins=6)
        draw(axis, *data)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True)
    svg = file.getvalue()[file.getvalue().index("<svg") :]
    # matplotlib's <style> would hold for the whole page; namespaces mean nothing in HTML.
    svg = re.sub(r"<(metadata|style).*?</\1>", "", svg, flags=re.DOTALL)
    label = f'role="img" aria-label="{escape(visible(title))}"'
    svg = re.sub(r'<svg[^>]*?(viewBox="[^"]*")[^>]*>', lambda found: f"<svg {found[1]} {label}>", svg, count=1)
    key = re.sub(r"\W+", "-", title)
    svg = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{key}-", svg)
    return Markup(re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", svg).replace(INK, "currentColor"))


def table_of(runs: Sequence[Run], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the page's table: `columns`, (run, cells) of each run, and the settings that all runs share."""
    names = [name for name in rows[0] if not name.endswith("_error")]
    cells = [[with_error(row, name) for name in names[1:]] for row in rows]
    differing, config = differences(runs), runs[0].config
    shared = [f"{key}: {shown(config[key])}" for key in MAIN_KEYS if key in config and key not in differing]
    return {"columns": names, "table": list(zip(runs, cells, strict=True)), "shared": shared}


def curves_of(runs: Sequence[Run]) -> list[tuple[str, Markup]]:
    """Return (title, chart): of the loss for each kind of loss, which cannot be compared, then of each other metric."""
    kinds: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        kinds[shown(run.config.get("loss.name"))].append(run)
    panels = [(f"Loss: {kind}", "loss/{}", members) for kind, members in kinds.items()]
    panels += [(title, metric, list(runs)) for title, metric in PANELS.items()]
    charts = []
    for title, metric, members in panels:
        names = {metric.format("train"), metric.format("eval")}
        if any(names & row.keys() for run in members for row in run.metrics):
            charts.append((title, chart(title, draw_curves, metric, members)))
    return charts


def frontier_of(runs: Sequence[Run]) -> dict[str, Any] | None:
    """Return the chart of reward against KL, its number of prompts and the runs without all points; None if empty."""
    along = [(run, [p for p in frontier(run) if math.isfinite(p.kl)] if run.rewarded else []) for run in runs]
    counts = sorted({point.prompts for _, points in along for point in points})
    if not counts:
        return None
    incomplete = [run.name for run, points in along if len(points) < max(1, len(run.evaluations))]
    svg = chart("True reward against KL", draw_frontier, along)
    return {"svg": svg, "prompts": shown(counts), "incomplete": incomplete}


def samples_of(runs: Sequence[Run], n: int) -> list[tuple[str, list[Any], list[Any]]]:
    """Return (prompt, references, policies) for `n` prompts; those that more runs have come first.

    A reference is (text, reward); a policy is (run, examples, number of samples, text, reward) of the first sample. A
    reward is None if it is not known.
    """
    by_run = [(run, run.last_samples()) for run in runs]
    prompts = Counter(prompt for _, by_prompt in by_run for prompt in by_prompt)
    samples = []
    for prompt, _ in prompts.most_common(n):
        references: dict[tuple[str, float | None], None] = {}  # runs that start from the same weights share one
        policies = []
        for run, by_prompt in by_run:
            for row in by_prompt.get(prompt, [])[:1]:
                if "reference" in row:
                    references[row["reference"], run.reward(row, "reference")] = None
                reward = run.reward(row, "policy")
                policies.append((run, row[EXAMPLES], len(by_prompt[prompt]), row["policy"], reward))
        samples.append((prompt, list(references), policies))
    return samples


def make_page(runs: Sequence[Run], rows: Sequence[Mapping[str, Any]], samples: int, command: str) -> str:
    """Return the report as HTML. report.html escapes every value, after `visible`, unless it is Markup."""
    template = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: visible(value) if type(value) is str else value,
        trim_blocks=True,
        keep_trailing_newline=True,
    ).get_template("report.html")
    return template.render(
        title=f"Report of {len(runs)} run{'s' * (len(runs) > 1)}",
        **table_of(runs, rows),
        curves=curves_of(runs),
        most_points=MOST_POINTS,
        frontier=frontier_of(runs),
        samples=samples_of(runs, samples),
        time=f"{datetime.now(UTC):%Y-%m-%d %H:%M}",
        command=command,
    )


def csv_cell(value: Any) -> Any:
    """`value`, but a text that a spreadsheet would take for a formula begins with an apostrophe."""
    if not isinstance(value, str):
        return value
    number = re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", value)
    text = visible(value)
    return f"'{text}" if not number and text.lstrip().startswith(("=", "+", "-", "@")) else text


def write_report(runs: Sequence[Run], out: Path, samples: int, command: str) -> list[dict[str, Any]]:
    """Write report.csv and report.html, made by `command`, into `out`; returns the table's rows."""
    rows = table_rows(runs)
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(map(csv_cell, rows[0]))
    writer.writerows(map(csv_cell, row.values()) for row in rows)
    for name, text in {"report.csv": table.getvalue(), "report.html": make_page(runs, rows, samples, command)}.items():
        try:
            (out / name).write_text(redact(text), encoding="utf-8", newline="")
        except OSError as error:
            raise UserError(f"--out: {out / name} cannot be written: {error.strerror}; give another folder") from error
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="SWEEP_OR_RUN", help="run folders, or folders of runs")
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder for report.csv and report.html")
    parser.add_argument("--samples", type=int, default=8, help="prompts whose samples are shown")
    arguments = parser.parse_args()
    if arguments.samples < 0:
        raise UserError(f"--samples {arguments.samples} must be a number of prompts, 0 or more")
    runs = load_runs(arguments.runs)
    out = make_dir(arguments.out, "--out")
    command = shlex.join(["python", "scripts/report.py", *sys.argv[1:]])
    rows = write_report(runs, out, arguments.samples, command)
    log(text_table(rows, shutil.get_terminal_size((120, 24)).columns))
    log(f"written: {out / 'report.csv'}, {out / 'report.html'}")


if __name__ == "__main__":
    run_main(main)
