"""Reward against KL, for DPO over betas and for its baselines: python scripts/frontier.py [--folder frontier]

The controlled sentiment experiment of the DPO paper (arXiv:2305.18290, section 6.1 and figure 2): the true reward is
known, so that each method shows how much reward it buys with how much KL from the policy it starts from. Trains every
method of scripts/frontier.yaml through train.py, measures each along training on held-out prompts, samples best-of-N,
and writes `frontier.csv`, `frontier.png` and `frontier.md` into the folder. Given again, it goes on where it ended.
"""

import argparse
import csv
import dataclasses
import gzip
import itertools
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "scripts"))

import yaml

from models import quiet_transformers
from preference_datasets import load_data
from report import EXAMPLES, Z95, read_lines, sentiment, sentiment_rewards
from sampling import ESTIMATORS, Sampling, mean_and_error, sample
from saved import find_saved
from settings import data_settings
from utils import UserError, log, make_dir, run_main

SETTINGS = ROOT / "scripts" / "frontier.yaml"
START, BEST_OF = "start", "best of N"


@dataclass(frozen=True)
class Point:
    """One policy: its KL from the starting policy (nats a response, standard error) and reward (95 % half-width)."""

    method: str
    setting: str
    examples: int
    kl: float
    kl_error: float
    kl_plain: float
    kl_plain_error: float
    reward: float
    half_width: float
    prompts: int


def train(name: str, folder: Path, sweep: bool, overrides: Sequence[str]) -> None:
    """Run train.py; a sweep's folder is `folder`, and a run's too."""
    where = [f"hydra.sweep.dir={folder}"] if sweep else [f"local_run_dir={folder}", "resume=auto"]
    arguments = [*(["-m"] if sweep else []), f"exp_name={name}", *where, "wandb.enabled=false", *overrides]
    log(f"\n=== {name} ===")
    if subprocess.run([sys.executable, str(ROOT / "train.py"), *arguments], check=False).returncode:
        raise UserError(f"{name} failed; see above. The same command goes on from here")


def fine_tune(folder: Path, data: Path, settings: dict[str, Any], given: list[str]) -> Path:
    """The starting policy: SFT on every response of the training rows. Returns its run's folder."""
    rows_file = folder / "responses.jsonl"
    rows = [json.loads(line) for line in gzip.open(next(data.glob("train.jsonl*")), "rt", encoding="utf-8")]
    pairs = ({"prompt": row["prompt"], "completion": response} for row in rows for response in row["responses"])
    rows_file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    only = ["holdout_fraction=0", "n_eval_examples=0", "loss=sft", "n_epochs=null", f"datasets=[{rows_file}]"]
    train("frontier_sft", folder / START, False, [*settings["common"], *settings["sft"], *only, *given])
    return folder / START


def train_methods(folder: Path, start: Path, data: str, settings: dict[str, Any], given: list[str]) -> None:
    """Every method as a sweep of its own, evaluated along training."""
    measured = settings["evaluation"]
    evaluation = [f"n_eval_examples={measured['pairs']}", f"n_eval_model_samples={measured['prompts']}"]
    evaluation += [f"n_eval_samples_per_prompt={measured['samples']}", f"eval_batch_size={measured['batch']}"]
    evaluation += ["do_first_eval=false", "kl_during_eval=true", f"datasets=[{data}]", f"model.archive={start}"]
    methods = dict(settings["methods"])
    common = [*settings["common"], *methods.pop("common"), *evaluation]
    for name, overrides in methods.items():
        train(f"frontier_{name.replace(' ', '_')}", folder / name, True, [*common, *overrides, *given])


def points_of(folder: Path, methods: Sequence[str]) -> list[Point]:
    """Every evaluation of every run, in order of training."""
    found: list[Point] = []
    for method in methods:
        for run in (path.parent for path in (folder / method).glob("*/metrics.jsonl")):
            rewards = sentiment_rewards(read_lines(run / "samples.jsonl", "prompt"))
            for row in read_lines(run / "metrics.jsonl"):
                if "kl_eval/plain" in row:
                    kl = [row[f"kl_eval/{name}{end}"] for name in reversed(ESTIMATORS) for end in ("", "_error")]
                    reward = rewards[row[EXAMPLES]]
                    setting = run.name if "=" in run.name else ""  # a sweep of one run
                    found.append(Point(method, setting, row[EXAMPLES], *kl, *reward))
    return sorted(found, key=lambda p: (list(methods).index(p.method), float(_value(p) or 0), p.examples))


def _value(point: Point) -> str:
    """What its setting is set to, such as 0.1."""
    return point.setting.rpartition("=")[2]


def best_of(start: Path, data: str, settings: dict[str, Any], given: list[str]) -> list[Point]:
    """Best of N samples of the starting policy, N = 1, 2, 4 ... The expected best of N is over all N of the samples.

    KL = log N - (N - 1) / N is an upper bound, close where no response is likely by itself (Beirami et al. 2024,
    arXiv:2401.01879). It is 0 at N = 1: the starting policy itself.
    """
    saved = find_saved(str(start), [f"datasets=[{data}]", "loss=dpo", "loss.beta=1", *settings["common"], *given])
    model, tokenizer, how = saved.open()
    test = load_data(data_settings(saved.config), tokenizer, "test")
    n, prompts = settings["best_of"], [test[i].prompt for i in range(min(len(test), settings["evaluation"]["prompts"]))]
    room = saved.config.max_length - max(map(len, prompts))
    sampling = Sampling(room, settings["evaluation"]["batch"], 1, how.dtype)
    responses = tokenizer.batch_decode(
        sample(model, tokenizer, [p for p in prompts for _ in range(n)], sampling), skip_special_tokens=True
    )
    texts = tokenizer.batch_decode(prompts, skip_special_tokens=True)
    scores = [sorted(sentiment(text + r) for r in responses[i * n : (i + 1) * n]) for i, text in enumerate(texts)]
    found = []
    for best in itertools.takewhile(lambda size: size <= n, (2**k for k in itertools.count())):
        mean, error = mean_and_error([expected_best(row, best) for row in scores], range(len(scores)))
        kl = math.log(best) - (best - 1) / best
        found.append(Point(BEST_OF, f"N={best}", 0, kl, 0.0, kl, 0.0, mean, Z95 * (error or math.nan), len(scores)))
    return found


def expected_best(scores: Sequence[float], n: int) -> float:
    """The mean, over all subsets of `n` of the sorted `scores`, of their largest."""
    total = math.comb(len(scores), n)
    return sum(math.comb(i, n - 1) / total * score for i, score in enumerate(scores))


def verdicts(points: Sequence[Point]) -> list[str]:
    """What the points say of the paper's two claims: larger beta, smaller KL; DPO above the preferred responses."""
    last = {(p.method, p.setting): p for p in points}  # a run's last evaluation is its last point
    lines = []
    for method in ("DPO", "conservative DPO", "IPO"):
        runs = [p for p in last.values() if p.method == method]
        rises = [(a, b) for a, b in itertools.pairwise(runs) if b.kl - a.kl > 2 * math.hypot(a.kl_error, b.kl_error)]
        shown = ", ".join(f"{p.setting}: {p.kl:.2f} ± {p.kl_error:.2f}" for p in runs)
        how = "falls with beta within error" if not rises else f"RISES with beta from {rises[0][0].setting}"
        lines.append(f"{method}: KL at the end {how} ({shown})")
    for p in (p for p in points if p.method == "preferred"):
        rival = at_equal_kl([q for q in points if q.method == "DPO"], p.kl)
        if rival is None:
            lines.append(f"preferred after {p.examples} examples: no DPO run has been as near as KL {p.kl:.2f}")
            continue
        low, high = rival.reward - rival.half_width, rival.reward + rival.half_width
        above = (
            "above" if low > p.reward + p.half_width else "below" if high < p.reward - p.half_width else "level with"
        )
        lines.append(
            f"at KL {p.kl:.2f}: DPO's {rival.setting} at KL {rival.kl:.2f} has reward {rival.reward:.3f} ± "
            f"{rival.half_width:.3f}, {above} fine-tuning on preferred, {p.reward:.3f} ± {p.half_width:.3f}"
        )
    return lines


def at_equal_kl(points: Sequence[Point], kl: float) -> Point | None:
    """The best of `points` with no more KL than `kl`, within two standard errors; None where there is none."""
    near = [p for p in points if p.kl <= kl + 2 * p.kl_error]
    return max(near, key=lambda p: p.reward, default=None)


def draw(points: Sequence[Point], path: Path) -> None:
    """As the paper's figure 2: a colour for each method, a line for each run along training."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    methods = list(dict.fromkeys(p.method for p in points))
    for number, method in enumerate(methods):
        own = [p for p in points if p.method == method]
        runs = [("", own)] if method == BEST_OF else itertools.groupby(own, lambda p: p.setting)
        for turn, (_, group) in enumerate(runs):
            run = list(group)
            style: dict[str, Any] = {"color": f"C{number}", "label": method if not turn else None, "alpha": 0.8}
            errors: dict[str, Any] = {"yerr": [p.half_width for p in run], "xerr": [2 * p.kl_error for p in run]}
            marker = "os^Dvx*P"[number % 8]
            axes.errorbar(
                [p.kl for p in run], [p.reward for p in run], **errors, marker=marker, elinewidth=0.5, **style
            )
            if method != BEST_OF:
                axes.annotate(_value(run[-1]), (run[-1].kl, run[-1].reward), fontsize=7, color=f"C{number}")
    axes.set(xlabel="KL(policy || starting policy), nats a response", ylabel="true reward (VADER), held-out prompts")
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlim(left=-0.05)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def write(folder: Path, points: Sequence[Point], minutes: float) -> str:
    """frontier.csv and frontier.png, and the table as Markdown, which is returned."""
    with open(folder / "frontier.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in dataclasses.fields(Point)])
        writer.writeheader()
        writer.writerows(dataclasses.asdict(p) for p in points)
    draw(points, folder / "frontier.png")
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    lines = [
        f"Measured {datetime.now(UTC):%Y-%m-%d} in {minutes:.0f} minutes: {_hardware()}, torch {version('torch')}, "
        f"transformers {version('transformers')}, commit {commit.stdout.strip() or 'unknown'}. Reward: VADER's score, "
        f"mean over {points[0].prompts} held-out prompts, 95 % interval; KL: nats a response, Rao-Blackwellised and, "
        "as plain KL, the mean log-ratio, each with its standard error.",
        "",
        "| method | setting | examples | KL | plain KL | reward |",
        "|---|---|---|---|---|---|",
    ]
    for p in points:
        kl = f"{p.kl:.2f} ± {p.kl_error:.2f} | {p.kl_plain:.2f} ± {p.kl_plain_error:.2f}"
        lines.append(f"| {p.method} | {p.setting} | {p.examples} | {kl} | {p.reward:+.3f} ± {p.half_width:.3f} |")
    text = "\n".join([*lines, "", *(f"- {line}" for line in verdicts(points))])
    (folder / "frontier.md").write_text(text + "\n")
    return text


def _hardware() -> str:
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return f"{name}, {len(os.sched_getaffinity(0))} CPU cores"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "frontier", help="runs and results go here")
    parser.add_argument("--settings", default="small", help="of scripts/frontier.yaml")
    parser.add_argument("--start", help="the starting policy, a run's folder; default: an SFT of its own")
    parser.add_argument("--data", type=Path, help="folder of train and test rows with prompt, responses, scores")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for every run, as train.py takes them")
    arguments = parser.parse_args()
    known = yaml.safe_load(SETTINGS.read_text())
    if arguments.settings not in known:
        raise UserError(f"--settings {arguments.settings} is not in {SETTINGS}; choose from: {', '.join(known)}")
    settings = known[arguments.settings]
    data = arguments.data or (settings["data"] and ROOT / settings["data"])
    if data is None or not list(Path(data).glob("train.jsonl*")):
        raise UserError(f"--data {data} must be a folder with train.jsonl(.gz) and test.jsonl(.gz)")
    if settings["sft"] is None and not arguments.start:
        raise UserError(f"--settings {arguments.settings} needs --start, the policy to start from")
    began, folder = time.time(), make_dir(arguments.folder.resolve(), "--folder")
    quiet_transformers()
    start = (
        Path(arguments.start).resolve() if arguments.start else fine_tune(folder, data, settings, arguments.overrides)
    )
    name = "sentiment" if data == ROOT / "data" / "sentiment" else str(Path(data).resolve())
    train_methods(folder, start, name, settings, arguments.overrides)
    methods = [method for method in settings["methods"] if method != "common"]
    points = [*best_of(start, name, settings, arguments.overrides), *points_of(folder, methods)]
    log(f"\n{write(folder, points, (time.time() - began) / 60)}\n\nwritten: {folder}/frontier.csv, .png and .md")


if __name__ == "__main__":
    run_main(main)
