"""Compare runs on one page: python scripts/report.py SWEEP_OR_RUNS... [--out report] [--samples 8]

Takes run folders, and folders that hold runs up to two levels down. Writes `report.csv` (one line a run) and
`report.html` (settings that differ, curves, reward against KL, samples side by side; one file that needs no network),
and prints the table. The true reward is known only for runs on the embedded sentiment task: VADER's compound score.
"""

import argparse
import csv
import io
import math
import re
import shlex
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jinja2
import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from dpo.utils import UserError, log, make_dir, redact, visible
from results import (
    EXAMPLES,
    MARKS,
    REWARDS,
    Z95,
    Point,
    Run,
    as_text,
    frontier,
    load_runs,
    reference_rewards,
    reward_kind,
    table_rows,
    text_table,
    with_error,
)
from utils import HelpFormatter, run_main

MOST_POINTS = 400  # of a curve
# Title of a chart -> its metric; {} stands for train and eval.
PANELS = {
    "Accuracy of pairs": "rewards_{}/accuracies",
    "Reward margin": "rewards_{}/margins",
    "Implicit reward of chosen": "rewards_{}/chosen",
    "Implicit reward of rejected": "rewards_{}/rejected",
    "Gradient weight: how much pairs still push (compare runs of one loss)": "gradient_weight_{}",
    "Chosen responses less likely than under the reference, share": "chosen_fell_{}",
    "Change of chosen, nats a token": "logratios_per_token_{}/chosen",
    "KL to the reference, nats a response": "kl_{}/rao_blackwell",
    "Length of samples, tokens": "samples_{}/policy_length",
}
MAIN_KEYS = ["model.name_or_path", "model.archive", "datasets", "loss.name", "loss.beta", "lr", "batch_size"]
MAIN_KEYS += ["n_epochs", "n_examples", "seed"]
INK = "#000000"  # as matplotlib draws axes and texts; currentColor on the page
DRAWING: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "report", "font.size": 9.5, "lines.markersize": 4}
DRAWING |= {"axes.spines.top": False, "axes.spines.right": False}
DRAWING |= {"axes.grid": True, "grid.color": "#888888", "grid.alpha": 0.25}


def thin_out(points: Sequence[Any]) -> list[Any]:
    """Return at most MOST_POINTS of `points`, evenly spaced, with the first and the last."""
    n = min(len(points), MOST_POINTS)
    return [points[i * (len(points) - 1) // max(n - 1, 1)] for i in range(n)]


def curve(run: Run, name: str) -> tuple[list[int], list[float], list[float]]:
    """Return examples, values and half-widths of the 95 % interval (NaN if unknown) of a metric, thinned out."""
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
    """Draw a line through points of a frontier, with their 95 % intervals."""
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


def chart(title: str, draw: Callable[..., None], *data: Any) -> Markup:
    """Return the drawing of `draw` as inline SVG in the page's colours. Its ids begin with its `title`."""
    with matplotlib.rc_context(DRAWING):
        figure = Figure(figsize=(4.6, 2.9), layout="constrained")
        axis = figure.add_subplot()
        axis.locator_params(nbins=6)
        draw(axis, *data)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True)
    svg = file.getvalue()[file.getvalue().index("<svg") :]
    # matplotlib's <style> would apply to the whole page; namespaces mean nothing in HTML.
    svg = re.sub(r"<(metadata|style).*?</\1>", "", svg, flags=re.DOTALL)
    label = f'role="img" aria-label="{escape(visible(title))}"'
    svg = re.sub(r'<svg[^>]*?(viewBox="[^"]*")[^>]*>', lambda match: f"<svg {match[1]} {label}>", svg, count=1)
    key = re.sub(r"\W+", "-", title)
    svg = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{key}-", svg)
    return Markup(re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", svg).replace(INK, "currentColor"))


def table_of(runs: Sequence[Run], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the page's table: `columns`, (run, cells) of each run, and the settings that all runs share."""
    names = [name for name in rows[0] if not name.endswith("_error")]
    cells = [[with_error(row, name) for name in names[1:]] for row in rows]
    config = runs[0].config
    same = [key for key in MAIN_KEYS if key in config and len({repr(run.config.get(key)) for run in runs}) == 1]
    shared = [f"{key}: {as_text(config[key])}" for key in same]
    return {"columns": names, "table": list(zip(runs, cells, strict=True)), "shared": shared}


def curves_of(runs: Sequence[Run]) -> list[tuple[str, Markup]]:
    """Return (title, chart): of the loss for each kind of loss, which cannot be compared, then of each other metric."""
    kinds: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        kinds[as_text(run.config.get("loss.name"))].append(run)
    panels = [(f"Loss: {kind}", "loss/{}", members) for kind, members in kinds.items()]
    for title, metric in PANELS.items():
        by_kind: dict[str, list[Run]] = defaultdict(list)
        for run in runs:
            by_kind[reward_kind(run) if metric.format("eval") in REWARDS else ""].append(run)
        panels += [(f"{title}: {kind}" if len(by_kind) > 1 else title, metric, some) for kind, some in by_kind.items()]
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
    return {"svg": svg, "prompts": as_text(counts), "incomplete": incomplete}


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
        facts=[*dict.fromkeys(run.facts for run in runs if run.facts)],
        time=f"{datetime.now(UTC):%Y-%m-%d %H:%M}",
        command=command,
    )


def csv_cell(value: Any) -> Any:
    """Return `value`; a text that a spreadsheet would take for a formula gets an apostrophe before it."""
    if not isinstance(value, str):
        return value
    number = re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", value)
    text = visible(value)
    return f"'{text}" if not number and text.lstrip().startswith(("=", "+", "-", "@")) else text


def write_report(runs: Sequence[Run], out: Path, samples: int, command: str) -> list[dict[str, Any]]:
    """Write report.csv and report.html, made by `command`, into `out`. Return the table's rows."""
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
        raise UserError(f"--samples {arguments.samples} must be 0 or more prompts")
    runs, out = load_runs(arguments.runs), make_dir(arguments.out, "--out")
    rows = write_report(runs, out, arguments.samples, shlex.join(["python", "scripts/report.py", *sys.argv[1:]]))
    log(text_table(rows, shutil.get_terminal_size((120, 24)).columns))
    log(f"written: {out / 'report.csv'}, {out / 'report.html'}")


if __name__ == "__main__":
    run_main(main)
