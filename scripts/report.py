"""Compare runs on one page: python scripts/report.py SWEEP_OR_RUNS... [--out report] [--samples 8]

Takes run folders, and folders that hold runs up to two levels down. Writes `report.csv` (one line a run) and
`report.html` (settings that differ, curves, reward against KL, samples side by side; one file that needs no network),
and prints the table. The true reward is known for runs on the embedded sentiment task alone: VADER's compound score.
"""

import argparse
import csv
import functools
import html
import io
import json
import math
import os
import re
import shlex
import shutil
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import matplotlib
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from runs import FREE, flat
from utils import UserError, log, make_dir, redact, run_main, visible

EXAMPLES = "counters/examples"
EVALUATED = re.compile("(^|[_/])eval(/|$)")
MOST_POINTS = 400  # of a curve
Z95 = 1.96
MAIN_KEYS = ["model.name_or_path", "model.archive", "datasets", "loss.name", "loss.beta", "lr", "batch_size"]
MAIN_KEYS += ["n_epochs", "n_examples", "seed"]
SHORT = {"loss/eval": "loss", "rewards_eval/accuracies": "accuracy", "rewards_eval/margins": "margin"}
SHORT |= {"kl_eval/rao_blackwell": "KL", "true_reward": "reward", "samples_eval/policy_length": "length"}
# At least 3:1 on white and on the page's dark background; with the marks, 36 runs are told apart.
COLOURS = ["#2b7bd9", "#d9541e", "#1e9461", "#b34fc4", "#a67c00", "#d6407f", "#0f93a8", "#7a7f3c", "#7d6ae0"]
MARKS = {"●": "o", "■": "s", "▲": "^", "◆": "D"}
INK = "#010203"  # stands for currentColor while matplotlib draws
DRAWING: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "report", "font.size": 9.5, "axes.spines.top": False}
DRAWING |= {"axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.15, "lines.markersize": 4}
DRAWING |= {f"{part}.color": INK for part in ("text", "xtick", "ytick", "grid")}
DRAWING |= {"axes.labelcolor": INK, "axes.edgecolor": INK}
STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1c2128; --soft: #59636e; --line: #d1d9e0; --box: #f6f8fa }
@media (prefers-color-scheme: dark) {
  :root { --page: #0f1318; --ink: #e6e9ed; --soft: #9aa5b1; --line: #343c46; --box: #181d24 } }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1, h2, h3, h4, p, ul { margin: 0 0 .4rem } h1 { font-size: 1.6rem } h2 { font-size: 1.25rem; margin-top: 2.5rem }
h3 { font-size: 1rem } h4, .samples p, table { font-size: .9rem }
small, figcaption, footer, .note { color: var(--soft); font-size: .85rem; font-weight: 400 }
ul { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .25rem 1.5rem }
.grid, .samples { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)) }
figure { margin: 0; max-width: 34rem } svg { display: block; width: 100%; height: auto; stroke-linejoin: round }
.scroll { overflow-x: auto; border: 1px solid var(--line); overflow-wrap: normal }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .35rem .7rem; text-align: left; white-space: nowrap; border-bottom: 1px solid var(--line) }
thead, .samples > div { background: var(--box) } tbody tr:last-child > * { border-bottom: 0 }
article { margin-bottom: 2rem } blockquote { margin: 0 0 .6rem } blockquote, .samples p { white-space: pre-wrap }
.samples { gap: .6rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr)) }
.samples > div { border-left: 4px solid var(--line); padding: .5rem .7rem }
footer { margin-top: 3rem; border-top: 1px solid var(--line) }
"""


class Panel(NamedTuple):
    """A chart of one metric, and of `thin`, dashed. `{}` stands for train and eval."""

    title: str
    metric: str
    note: str = ""
    thin: str = ""
    zero: bool = False


PANELS = [
    Panel("Accuracy of pairs", "rewards_{}/accuracies"),
    Panel("Reward margin", "rewards_{}/margins", zero=True),
    Panel("Implicit reward of chosen", "rewards_{}/chosen", zero=True),
    Panel("Implicit reward of rejected", "rewards_{}/rejected", zero=True),
    Panel("Change of chosen, nats a token", "logratios_per_token_{}/chosen", "log policy / reference", zero=True),
    Panel("KL to the reference, nats a response", "kl_{}/rao_blackwell", "dashed: plain estimate", "kl_{}/plain", True),
    Panel("Length of samples, tokens", "samples_{}/policy_length", "dashed: reference", "samples_{}/reference_length"),
]


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

    @functools.cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        return [row for row in self.metrics if any(EVALUATED.search(name) for name in row)]

    @property
    def status(self) -> str:
        if not self.metrics:
            return "nothing logged"
        state = "finished" if self.finished else f"unfinished, {self.metrics[-1][EXAMPLES]} examples"
        return state if self.evaluations else f"{state}, no evaluation"

    @property
    def rewarded(self) -> bool:
        """Whether the true reward of its samples is known."""
        return self.config.get("datasets") == ["sentiment"]

    def last_samples(self) -> dict[str, list[dict[str, Any]]]:
        """Those of the last evaluation, by prompt."""
        found = defaultdict(list)
        for row in self.samples:
            if row[EXAMPLES] == self.samples[-1][EXAMPLES]:
                found[row["prompt"]].append(row)
        return found


class Reward(NamedTuple):
    """Mean over `n` prompts, and the half-width of its 95 % interval (nan for one prompt)."""

    mean: float
    half_width: float
    n: int


@functools.cache
def sentiment(text: str) -> float:
    """VADER's compound score, -1 to 1."""
    return _analyzer().polarity_scores(text)["compound"]


@functools.cache
def _analyzer() -> SentimentIntensityAnalyzer:
    return SentimentIntensityAnalyzer()


def sentiment_rewards(rows: Iterable[Mapping[str, Any]], model: str = "policy") -> dict[int, Reward]:
    """Examples -> true reward of prompt + response, from lines of samples.jsonl. `model`: policy or reference.

    The samples of one prompt are not independent, so they are averaged before the prompts are.
    """
    scores: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if isinstance(row.get(model), str):
            scores[row[EXAMPLES]][row["prompt"]].append(sentiment(row["prompt"] + row[model]))
    return {examples: _mean([statistics.fmean(s) for s in by.values()]) for examples, by in scores.items()}


def _mean(values: Sequence[float]) -> Reward:
    width = Z95 * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Reward(statistics.fmean(values), width, len(values))


class Point(NamedTuple):
    """Of the frontier; KL and its standard error in nats a response."""

    examples: int
    kl: float
    kl_error: float
    reward: Reward


def frontier(run: Run) -> list[Point]:
    """The evaluations that have a KL and a known reward, in order of training."""
    return points_along(run) if run.rewarded else []


def points_along(run: Run) -> list[Point]:
    """The evaluations that have a KL, with the sentiment of their samples."""
    rewards = sentiment_rewards(run.samples)
    points = []
    for row in run.evaluations:
        name = next((n for n in ("kl_eval/rao_blackwell", "kl_eval/plain") if n in row), None)
        if name and row[EXAMPLES] in rewards:
            error = row.get(f"{name}_error", math.nan)
            points.append(Point(row[EXAMPLES], row[name], error, rewards[row[EXAMPLES]]))
    return points


def read_lines(path: Path, *needed: str) -> list[dict[str, Any]]:
    """The objects of a file with one a line; none where there is no file. A last line that was cut is left out.

    Raises UserError for any other line that is no object with `counters/examples` and the texts `needed`.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    # Not splitlines: samples may hold U+2028 and its like.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    rows = []
    for number, line in lines:
        try:
            row = json.loads(line)
            if not isinstance(row[EXAMPLES], int) or not all(isinstance(row[key], str) for key in needed):
                raise TypeError
            rows.append(row)
        except (ValueError, TypeError, KeyError) as error:
            if number != lines[-1][0]:
                keys = " and ".join([EXAMPLES, *needed])
                what = f"is no JSON object with {keys}: {line[:50]!r}; repair or remove that line"
                raise UserError(f"{path}, line {number} {what}") from error
    return rows


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """The run folders that `paths` are or hold, without repeats. Raises UserError where one holds none."""
    found: dict[Path, None] = {}
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} does not exist; give run folders, or folders that hold runs")
        try:
            runs = _runs_in(path, 2)
        except OSError as error:
            raise UserError(f"{error.filename} cannot be read: {error.strerror}; leave it out") from error
        if not runs:
            log(f"left out: {path} holds no run (no config.yaml in it or up to two levels down)")
        found |= dict.fromkeys(run.resolve() for run in runs)
    if not found:
        raise UserError(f"{', '.join(map(str, paths))} holds no run; give run folders, or folders that hold runs")
    return list(found)


def _runs_in(folder: Path, depth: int) -> list[Path]:
    if (folder / "config.yaml").is_file():
        return [folder]
    inside = [p for p in folder.iterdir() if p.is_dir() and p.name[0] != "."] if depth and folder.is_dir() else []
    return [run for child in sorted(inside, key=_by_number) for run in _runs_in(child, depth - 1)]


def _by_number(path: Path) -> list[Any]:
    """Sorts beta=0.05 and beta=10 by their numbers."""
    return [float(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+(?:\.\d+)?)", path.name))]


def load_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs of `find_runs`, named by their paths from the folder that holds all of them. Raises UserError."""
    folders = find_runs(paths)
    parent = Path(os.path.commonpath(folders)) if len(folders) > 1 else folders[0].parent
    runs = []
    for i, folder in enumerate(folders):
        name = visible(str(folder.relative_to(parent)))
        config = _read_config(folder / "config.yaml")
        metrics = [
            {name: value for name, value in row.items() if isinstance(value, int | float)}
            for row in read_lines(folder / "metrics.jsonl")
        ]
        samples = read_lines(folder / "samples.jsonl", "prompt", "policy")
        finished = bool(metrics) and _finished(folder, metrics[-1][EXAMPLES])
        look = COLOURS[i % len(COLOURS)], list(MARKS)[i % len(MARKS)]
        runs.append(Run(name, config, metrics, samples, finished, *look))
    return runs


def _read_config(path: Path) -> dict[str, Any]:
    """Dotted key -> value."""
    try:
        config = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path} cannot be read ({str(error).splitlines()[0]}); leave that run out") from error
    return {visible(key): value for key, value in flat(config).items()} if isinstance(config, dict) else {}


def _finished(folder: Path, logged: float) -> bool:
    try:
        state = json.loads((folder / "LATEST" / "trainer_state.json").read_text())
        # A finished run may have been taken up again, for more epochs.
        return state["examples"] == state["total_examples"] >= logged
    except (OSError, ValueError, KeyError, TypeError):
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
        row: dict[str, Any] = {"run": run.name} | {key: shown(run.config.get(key)) for key in differing}
        final = run.evaluations[-1] if run.evaluations else {}
        row |= {"examples": run.metrics[-1][EXAMPLES] if run.metrics else 0, "evaluated_after": final.get(EXAMPLES)}
        row |= {name: value for name, value in final.items() if EVALUATED.search(name)}
        reward = sentiment_rewards(run.samples).get(final.get(EXAMPLES, -1)) if run.rewarded else None
        if reward:
            row |= {"true_reward": reward.mean, "true_reward_error": reward.half_width / Z95, "prompts": reward.n}
        rows.append(row | {"status": run.status})
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
    """Aligned columns, the most important ones that fit into `width` characters."""
    names = list(rows[0])
    settings, short = names[2 : names.index("examples")], [name for name in SHORT if name in names]
    cells = {name: [SHORT.get(name, name), *(with_error(row, name) for row in rows)] for name in names}
    widths = {name: max(map(len, column)) for name, column in cells.items()}
    wanted = ["run", "status", *settings[:2], "examples", *short, *settings[2:]]
    fitting = {n for i, n in enumerate(wanted) if i < 2 or sum(widths[w] + 2 for w in wanted[: i + 1]) <= width}
    columns = [[text.ljust(widths[name]) for text in cells[name]] for name in names if name in fitting]
    left_out = [SHORT.get(name, name) for name in wanted if name not in fitting]
    note = "\n± is a 95 % interval" + (f"; no room for {', '.join(left_out)}: see report.csv" if left_out else "")
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns)) + note


def thin_out(points: Sequence[Any], most: int = MOST_POINTS) -> list[Any]:
    """At most `most` of `points`, evenly spaced, with the first and the last."""
    if len(points) <= most:
        return list(points)
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def curve(run: Run, name: str) -> tuple[list[int], list[float], list[float]]:
    """Examples, values and half-widths of the 95 % interval of a metric, nan where there is none; thinned."""
    rows = thin_out([row for row in run.metrics if name in row])
    values = [row[name] if math.isfinite(row[name]) else math.nan for row in rows]
    return [row[EXAMPLES] for row in rows], values, [Z95 * abs(row.get(f"{name}_error", math.nan)) for row in rows]


def draw_panel(axis: Axes, panel: Panel, runs: Sequence[Run]) -> None:
    for run in runs:
        axis.plot(*curve(run, panel.metric.format("train"))[:2], color=run.colour, linewidth=0.8, alpha=0.55)
    for run in runs:
        colour = INK if "reference" in panel.thin else run.colour
        axis.plot(*curve(run, panel.thin.format("eval"))[:2], color=colour, linewidth=0.9, linestyle="--", marker=".")
        x, y, error = curve(run, panel.metric.format("eval"))
        look: dict[str, Any] = {"color": run.colour, "marker": MARKS[run.mark], "linewidth": 1.8}
        axis.errorbar(x, y, error, **look, elinewidth=0.8, capsize=2, zorder=3)
    if panel.zero:
        axis.axhline(0, color=INK, linewidth=0.8, alpha=0.6)
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.set_xlabel("examples")


def draw_frontier(axis: Axes, runs: Sequence[Run]) -> None:
    for run in runs:
        points = [point for point in frontier(run) if math.isfinite(point.kl)]
        x, y = [point.kl for point in points], [point.reward.mean for point in points]
        bars = [point.reward.half_width for point in points], [Z95 * abs(point.kl_error) for point in points]
        look: dict[str, Any] = {"color": run.colour, "marker": MARKS[run.mark], "linewidth": 1}
        axis.errorbar(x, y, *bars, color=run.colour, fmt="none", elinewidth=0.8, alpha=0.5)
        axis.plot(x, y, **look)
        axis.plot(x[-1:], y[-1:], **look, markersize=9)
    for reward in reference_rewards(runs):
        axis.errorbar([0], [reward.mean], [reward.half_width], color=INK, marker="*", markersize=10, elinewidth=0.8)
    axis.set(xlabel="KL(policy || reference), nats a response", ylabel="true reward")


def reference_rewards(runs: Sequence[Run]) -> list[Reward]:
    """One for each reference that the runs have among them."""
    found = [list(sentiment_rewards(run.samples, "reference").values())[-1:] for run in runs if frontier(run)]
    return list(dict.fromkeys(reward for rewards in found for reward in rewards))


def chart(number: int, label: str, draw: Callable[[Axes], None]) -> str:
    """What `draw` draws, as inline SVG in the page's colours. Its ids begin with its `number` on the page."""
    with matplotlib.rc_context(DRAWING):
        figure = Figure(figsize=(4.6, 2.9), layout="constrained")
        axis = figure.add_subplot()
        axis.locator_params(nbins=6)
        draw(axis)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()[file.getvalue().index("<svg") :]
    # matplotlib's <style> would hold for the whole page; namespaces mean nothing in HTML.
    svg = re.sub(r"<(metadata|style).*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg[^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img" aria-label="{e(label)}">', svg, count=1)
    svg = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>c{number}-", svg.replace("xlink:href", "href"))
    return re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", svg).replace(INK, "currentColor")


def e(text: str) -> str:
    """`text` as HTML that shows it and nothing else."""
    return html.escape(visible(text))


def mark_of(run: Run) -> str:
    return f'<span style="color: {run.colour}" aria-hidden="true">{run.mark}</span>'


def header_html(runs: Sequence[Run]) -> str:
    """The legend, and what all runs share."""
    items = []
    for run in runs:
        state = f" <small>{e(run.status)}</small>" if run.status != "finished" else ""
        items.append(f"<li>{mark_of(run)} {e(run.name)}{state}</li>")
    differing = set(differences(runs))
    shared = [f"{key}: {shown(runs[0].config[key])}" for key in MAIN_KEYS if key in {*runs[0].config} - differing]
    same = "All runs" if len(runs) > 1 else "Settings"
    return f'<ul class="legend">{"".join(items)}</ul><p><small>{same}: {e("; ".join(shared))}</small></p>'


def table_html(runs: Sequence[Run], rows: Sequence[Mapping[str, Any]]) -> str:
    names = [name for name in rows[0] if not name.endswith("_error")]
    head = "".join(f'<th scope="col">{e(name)}</th>' for name in names)
    body = ""
    for run, row in zip(runs, rows, strict=True):
        cells = "".join(f"<td>{e(with_error(row, name))}</td>" for name in names[1:])
        body += f'<tr><th scope="row">{mark_of(run)} {e(run.name)}</th>{cells}</tr>'
    return (
        "<h2>Settings that differ, and the last evaluation</h2>"
        f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        '<p class="note">± is a 95 % interval. Losses of different kinds are not comparable.</p>'
    )


def curves_html(runs: Sequence[Run]) -> str:
    """A chart of the loss for each kind of loss, which cannot be compared, and one of each other panel with data."""
    kinds: dict[Any, list[Run]] = defaultdict(list)
    for run in runs:
        kinds[run.config.get("loss.name")].append(run)
    panels = [(Panel(f"Loss: {shown(kind)}", "loss/{}"), some) for kind, some in kinds.items()]
    figures = ""
    for number, (panel, some) in enumerate([*panels, *((panel, list(runs)) for panel in PANELS)]):
        names = [panel.metric.format("train"), panel.metric.format("eval"), panel.thin.format("eval")]
        if any(name in row for run in some for row in run.metrics for name in names):
            notes = [panel.note] * bool(panel.note) + [
                note for run in some for name in names for note in _gaps(run, name)
            ]
            svg = chart(number, panel.title, functools.partial(draw_panel, panel=panel, runs=some))
            caption = f"<figcaption>{e('; '.join(notes))}</figcaption>"
            figures += f"<figure><h3>{e(panel.title)}</h3>{svg}{caption}</figure>"
    note = (
        f"Thin: training batches. Thick with marks: evaluation. Curves of more than {MOST_POINTS} points are thinned "
    )
    note += "evenly. Bars: 95 % intervals. Implicit reward: beta times log policy / reference."
    return f'<h2>Curves</h2><p class="note">{note}</p><div class="grid">{figures}</div>' if figures else ""


def _gaps(run: Run, name: str) -> list[str]:
    """What a curve cannot show."""
    strange = sum(name in row and not math.isfinite(row[name]) for row in run.metrics)
    return [f"{run.name}: {strange} of {name} nan or infinite"] if strange else []


def frontier_html(runs: Sequence[Run]) -> str:
    points = {run.name: frontier(run) for run in runs}
    counts = sorted({point.reward.n for some in points.values() for point in some})
    if not counts:
        return ""
    note = f"True reward: VADER's compound score (-1 to 1) of prompt and sampled response, mean over {shown(counts)} "
    note += "held-out prompts. A line follows training, to the larger mark; star: the reference. Bars: 95 % intervals, "
    note += "of the reward over prompts."
    drawn = {run.name: sum(math.isfinite(point.kl) for point in points[run.name]) for run in runs}
    missing = [run.name for run in runs if drawn[run.name] < max(1, len(run.evaluations))]
    note += f" Evaluations without a KL or a known reward are left out: of {', '.join(missing)}." if missing else ""
    svg = chart(99, "True reward against KL", functools.partial(draw_frontier, runs=runs))
    return f"<h2>Reward against KL</h2><figure>{svg}<figcaption>{e(note)}</figcaption></figure>"


def samples_html(runs: Sequence[Run], n: int) -> str:
    """The first `n` prompts, those that more runs have first."""
    found = {run.name: run.last_samples() for run in runs}
    prompts = [prompt for by_prompt in found.values() for prompt in by_prompt]
    prompts = sorted(dict.fromkeys(prompts), key=lambda prompt: -prompts.count(prompt))[:n]
    articles = ""
    for prompt in prompts:
        rows = [(run, found[run.name][prompt]) for run in runs if prompt in found[run.name]]
        # Runs that start from the same weights share a reference.
        own = {_box("reference", run, some[0], "reference"): None for run, some in rows if "reference" in some[0]}
        for run, some in rows:
            which = f", first of {len(some)} samples" if len(some) > 1 else ""
            title = f"{mark_of(run)} {e(run.name)} <small>after {some[0][EXAMPLES]} examples{which}</small>"
            own[_box(title, run, some[0], "policy", f' style="border-color: {run.colour}"')] = None
        boxes = "".join(own)
        articles += (
            f'<article><h3>Prompt</h3><blockquote>{e(prompt)}</blockquote><div class="samples">{boxes}</div></article>'
        )
    return f"<h2>Samples of the last evaluation</h2>{articles}" if articles else ""


def _box(title: str, run: Run, row: Mapping[str, Any], model: str, style: str = "") -> str:
    reward = f"<small>, reward {sentiment(row['prompt'] + row[model]):+.2f}</small>" if run.rewarded else ""
    return f"<div{style}><h4>{title}{reward}</h4><p>{e(row[model]) or '<em>(empty)</em>'}</p></div>"


def page(runs: Sequence[Run], rows: Sequence[Mapping[str, Any]], samples: int, command: str) -> str:
    """The whole report as HTML."""
    title = f"Report of {len(runs)} run{'s' * (len(runs) > 1)}"
    parts = [header_html(runs), table_html(runs, rows), curves_html(runs), frontier_html(runs)]
    made = f"{len(runs)} run{'s' * (len(runs) > 1)}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC."
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>'
        f"<h1>{title}</h1>{''.join(parts)}{samples_html(runs, samples)}"
        f"<footer><p>{made} Made by <code>{e(command)}</code></p></footer></body></html>\n"
    )


def write(path: Path, text: str) -> None:
    try:
        path.write_text(redact(text), encoding="utf-8", errors="backslashreplace", newline="")
    except OSError as error:
        raise UserError(f"--out: {path} cannot be written: {error.strerror}; give another folder") from error


def write_report(runs: Sequence[Run], out: Path, samples: int, command: str) -> list[dict[str, Any]]:
    """Write report.csv and report.html, made by `command`, into `out`; returns the table's rows."""
    rows = table_rows(runs)
    table = io.StringIO()
    writer = csv.DictWriter(table, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write(out / "report.csv", table.getvalue())
    write(out / "report.html", page(runs, rows, samples, command))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
