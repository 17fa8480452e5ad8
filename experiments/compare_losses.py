"""Compare the losses of config/loss on one budget: python experiments/compare_losses.py [--folder losses]

On the controlled sentiment task, whose true reward is known, every loss trains from the same SFT policy with several
seeds. With --hh every loss also trains on real rows of Anthropic's dialogues, from the embedded model. Settings:
experiments/compare_losses.yaml. Writes `losses.csv`, `losses.md` and `losses.png` into the folder. Run it again to
resume; finished runs are not trained again.
"""

import argparse
import csv
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "benchmarks")]

import yaml
from matplotlib.figure import Figure

from benchmark import machine
from demo import train
from dpo.tables import markdown
from dpo.utils import UserError, log, make_dir
from frontier import fine_tune
from results import COLOURS, EXAMPLES, MARKS, Z95, Run, as_text, load_runs, sentiment_rewards
from settings import loss_keys, quoted
from utils import HelpFormatter, loss_values, run_main

SETTINGS = ROOT / "experiments" / "compare_losses.yaml"
NOT_COMPARED = ("sft", "pairs", "mix", "nll", "kto", "listwise")  # not of pairs, or only a part of a loss
START, SENTIMENT, HH = "start", "sentiment", "hh"
HEAD = ["task", "loss", "accuracy", "KL", "true reward", "length", "seconds"]
MEASURES = ("accuracy", "kl", "reward", "length", "seconds")
# 97.5 % quantiles of Student's t for 1 to 9 degrees of freedom.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


class Estimate(NamedTuple):
    """A mean over seeds, and the half-width of its 95 % interval (None for a single seed)."""

    mean: float
    half_width: float | None


class Row(NamedTuple):
    """A loss on a task: the number of seeds, and an estimate of each measure that was taken."""

    task: str
    loss: str
    seeds: int
    measured: dict[str, Estimate]


# --- Training ---


def choose_losses(names: str | None) -> list[str]:
    """Return the losses of a list separated by commas, or all. Raise UserError for an unknown name."""
    known = [name for name in loss_keys() if name not in NOT_COMPARED]
    chosen = list(dict.fromkeys(names.split(","))) if names is not None else known
    if unknown := [name for name in chosen if name not in known]:
        raise UserError(f"--losses: {unknown[0]!r} is not compared here; choose from: {', '.join(known)}")
    return chosen


def loss_overrides(name: str, settings: dict[str, Any]) -> list[str]:
    """Return the overrides of a loss. Raise UserError if a key that it requires has no value in the settings."""
    missing = [key for key, value in loss_values(name).items() if value == "???"]
    if unknown := [key for key in missing if key not in settings["required"]]:
        raise UserError(f"loss={name} requires loss.{unknown[0]}; give it a value under `required` in {SETTINGS}")
    own = [f"loss.{key}={settings['required'][key]}" for key in missing]
    return [f"loss={name}", *own, *settings["losses"].get(name, [])]


def train_losses(
    folder: Path, shared: Sequence[str], own: dict[str, list[str]], seeds: int, last: list[str]
) -> list[str]:
    """Train every loss with every seed, each loss as a sweep in `folder`. Return the losses that failed."""
    failed = []
    for name, overrides in own.items():
        where = [f"exp_name=losses_{name}", f"hydra.sweep.dir={quoted(folder / name)}", "save_weights_only=true"]
        swept = f"seed=choice({','.join(map(str, range(seeds)))})"
        try:
            train(["+experiment=losses", *shared, *where, *overrides, swept, *last], sweep=True)
        except UserError as error:
            log(f"{name} failed: {error}")
            failed.append(name)
    return failed


# --- Results ---


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean of `values` and its 95 % interval by Student's t."""
    n = len(values)
    if n == 1:
        return Estimate(values[0], None)
    quantile = T95[n - 2] if n - 2 < len(T95) else Z95 + 2.4 / (n - 1) + 3 / (n - 1) ** 2
    return Estimate(statistics.fmean(values), quantile * statistics.stdev(values) / math.sqrt(n))


def measure(run: Run, model: str = "policy") -> dict[str, float]:
    """Return what the run's last evaluation says of `model` (policy or reference), and the seconds of all updates."""
    final = run.evaluations[-1]
    found = {"length": final.get(f"samples_eval/{model}_length")}
    if run.rewarded and (reward := sentiment_rewards(run.samples, model).get(final[EXAMPLES])):
        found["reward"] = reward.value
    if model == "policy":
        found |= {"accuracy": final.get("rewards_eval/accuracies"), "kl": final.get("kl_eval/rao_blackwell")}
        steps = [row for row in run.metrics if "examples_per_second" in row]
        before = [0, *(row[EXAMPLES] for row in steps)]
        found["seconds"] = sum((row[EXAMPLES] - n) / row["examples_per_second"] for row, n in zip(steps, before))
    return {name: value for name, value in found.items() if value is not None}


def combine(task: str, loss: str, found: Sequence[dict[str, float]]) -> Row:
    """Return the row of one loss from what each seed's run measured."""
    names = [name for name in MEASURES if all(name in values for values in found)]
    return Row(task, loss, len(found), {name: estimate([values[name] for values in found]) for name in names})


def read_rows(folder: Path, task: str, losses: Sequence[str], seeds: int) -> list[Row]:
    """Return a row for each loss, after that of the start if it was sampled. Raise UserError for unfinished runs."""
    rows: list[Row] = []
    for name in losses:
        runs = [r for r in load_runs([folder / name]) if r.config["seed"] < seeds and r.finished and r.evaluations]
        if len(runs) < seeds:
            raise UserError(f"{folder / name} has {len(runs)} finished runs of {seeds}. Run the same command again")
        start = combine(task, START, [measure(run, "reference") for run in runs])
        if "reward" in start.measured and START not in [row.loss for row in rows]:
            rows.insert(0, start)
        rows.append(combine(task, name, [measure(run) for run in runs]))
    return rows


def as_cell(row: Row, name: str) -> str:
    """Return a cell of the Markdown table."""
    if name not in row.measured:
        return "–"
    digits = {"kl": 2, "length": 1, "seconds": 0}.get(name, 3)
    mean, half_width = row.measured[name]
    return f"{mean:.{digits}f}" + (f" ± {half_width:.{digits}f}" if half_width is not None else "")


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw true reward against KL: a point with both intervals for each loss, and a star for the start."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot()
    for number, row in enumerate(row for row in rows if "reward" in row.measured):
        reward, kl = row.measured["reward"], row.measured.get("kl", Estimate(0.0, None))
        marks = list(MARKS.values())
        look: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)], "marker": marks[number % len(marks)]}
        look |= {"color": "black", "marker": "*", "markersize": 11} if row.loss == START else {}
        axes.errorbar(kl.mean, reward.mean, reward.half_width, kl.half_width, elinewidth=0.5, alpha=0.85, **look)
        text: dict[str, Any] = {"xytext": (4, 4), "textcoords": "offset points", "fontsize": 8}
        axes.annotate(row.loss, (kl.mean, reward.mean), **text, color=look["color"])
    axes.set(xlabel="KL(policy || starting policy), nats a response", ylabel="true reward (VADER), held-out prompts")
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlim(left=-0.05)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


def write(folder: Path, rows: Sequence[Row], budgets: dict[str, list[str]]) -> str:
    """Write losses.csv, losses.png and losses.md, and return the table as Markdown."""
    with open(folder / "losses.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["task", "loss", "seeds", *(f"{name}{end}" for name in MEASURES for end in ("", "_half_width"))])
        for row in rows:
            cells = [row.measured.get(name, (None, None)) for name in MEASURES]
            table.writerow([row.task, row.loss, row.seeds, *(value for cell in cells for value in cell)])
    draw(rows, folder / "losses.png")
    command = " ".join(["python experiments/compare_losses.py", *map(as_text, sys.argv[1:])])
    facts = {"command": f"`{command}`", **machine()}
    facts |= {f"overrides, {task}": f"`{' '.join(map(as_text, given)) or 'none'}`" for task, given in budgets.items()}
    lines = [
        *(f"- {key}: {value}" for key, value in facts.items()),
        f"- ±: 95 % interval over seeds (Student's t), n = {rows[0].seeds}. Seeds differ in training pairs, their "
        "order, and samples. They share the start and the held-out prompts",
        "- accuracy: share of held-out pairs that the implicit reward ranks right. KL: kl_eval/rao_blackwell, nats a "
        "response from the start. Reward: VADER's score of samples, -1 to 1. Length: tokens of a sample. Seconds: of "
        "all updates, without evaluation",
        "- one setting a loss, not tuned: this shows what each loss does, and ranks no methods",
        "",
        *markdown([HEAD, *([row.task, row.loss, *(as_cell(row, name) for name in MEASURES)] for row in rows)]),
    ]
    text = "\n".join(lines)
    (folder / "losses.md").write_text(f"# Losses compared\n\n{text}\n", encoding="utf-8")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "losses", help="runs and results go here")
    parser.add_argument(
        "--losses", help="files of config/loss, separated by commas; default: all that compare responses"
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each loss")
    parser.add_argument("--scale", choices=("small", "full"), default="small", help="budget of each run")
    parser.add_argument("--hh", type=Path, help="also train on these rows, a folder as for dataset_sources.hh")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for every run, as train.py takes them")
    arguments = parser.parse_args()
    settings = yaml.safe_load(SETTINGS.read_text(encoding="utf-8"))
    own = {name: loss_overrides(name, settings) for name in choose_losses(arguments.losses)}
    if arguments.seeds < 1:
        raise UserError(f"--seeds {arguments.seeds} must be at least 1")
    if arguments.hh and not arguments.hh.is_dir():
        raise UserError(f"--hh {arguments.hh} is no folder; give one as for dataset_sources.hh")
    began, folder, last = time.time(), make_dir(arguments.folder.resolve(), "--folder"), arguments.overrides
    budgets = settings["scales"][arguments.scale]
    sft = {"start": "frontier_start", "overrides": [*budgets[START], *last]}
    start = fine_tune(folder, ROOT / "data" / "sentiment", sft)
    tasks = {SENTIMENT: [f"model.archive={quoted(start)}", *budgets[SENTIMENT]]}
    if arguments.hh:
        rows_of = [f"datasets=[{HH}]", f"dataset_sources.{HH}={quoted(arguments.hh.resolve())}"]
        tasks[HH] = [*rows_of, "sample_during_eval=false", "kl_during_eval=false", *budgets[HH]]
    rows, failed = [], []
    for task, shared in tasks.items():
        bad = train_losses(folder / task, shared, own, arguments.seeds, last)
        rows += read_rows(folder / task, task, [name for name in own if name not in bad], arguments.seeds)
        failed += [f"{task}/{name}" for name in bad]
    if rows:
        text = write(folder, rows, {name: budgets[name] for name in (START, *tasks)})
        log(f"\n{text}\n\nwritten: {folder}/losses.csv, .png and .md")
    if failed:
        raise UserError(f"failed: {', '.join(failed)}; see above. Run the same command again to resume")
    log(f"finished in {(time.time() - began) / 60:.1f} minutes")


if __name__ == "__main__":
    run_main(main)
