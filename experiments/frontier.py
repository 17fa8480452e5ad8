"""Reward against KL, for DPO over betas and for its baselines: python experiments/frontier.py [--folder frontier]

The controlled sentiment experiment of the DPO paper (arXiv:2305.18290, section 6.1 and figure 2): the true reward is
known, so each method shows how much reward it buys with how much KL from the policy it starts from. Trains every method
of experiments/frontier.yaml through train.py, measures each on held-out prompts, and samples best of N.
Writes `frontier.csv`, `frontier.png` and `frontier.md` into the folder. Run it again to resume.
"""

import argparse
import csv
import gzip
import itertools
import json
import math
import shlex
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
from dpo.data.batching import eval_examples
from dpo.model.patches import quiet_transformers
from dpo.sampling import Sampling, continuation, prompts_of, sample
from dpo.tables import markdown
from dpo.utils import UserError, log, make_dir
from opening import find_saved
from preference_datasets import load_data
from results import Z95, Estimate, frontier, load_runs, quick_estimate, sentiment
from settings import data_settings, quoted
from utils import HelpFormatter, run_main

SETTINGS = ROOT / "experiments" / "frontier.yaml"
START, BEST_OF = "start", "best of N"
BASELINES = ("preferred", "unlikelihood", "IPO")


class Point(NamedTuple):
    """One policy: its KL from the starting policy (nats a response, standard error) and reward (95 % half-width)."""

    method: str
    setting: str
    examples: int
    kl: float
    kl_error: float
    reward: float
    half_width: float
    prompts: int


def fine_tune(folder: Path, data: Path, settings: dict[str, Any]) -> Path:
    """Train the starting policy: SFT on every response of the training rows. Return its run's folder."""
    source = next(data.glob("train.jsonl*"))
    opener: Any = gzip.open if source.suffix == ".gz" else open
    with opener(source, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    responses = folder / "responses.jsonl"
    pairs = ({"prompt": row["prompt"], "completion": response} for row in rows for response in row["responses"])
    responses.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    run_dir = folder / START
    own = [f"datasets=[{quoted(responses)}]", "n_eval_examples=0", f"local_run_dir={quoted(run_dir)}"]
    train([f"+experiment={settings['start']}", *settings["overrides"], *own])
    return run_dir


def train_methods(folder: Path, start: Path, data: str, settings: dict[str, Any]) -> None:
    """Train every method as a sweep in a folder of its own."""
    shared = [f"+experiment={settings['recipe']}", f"datasets=[{data}]", f"model.archive={quoted(start)}"]
    for name, method in settings["methods"].items():
        sweep_dir = [f"exp_name=frontier_{name.replace(' ', '_')}", f"hydra.sweep.dir={quoted(folder / name)}"]
        swept = f"loss.{method['sweep']}=choice({','.join(map(str, method['values']))})"
        train([*shared, *sweep_dir, *method["overrides"], swept, *settings["overrides"]], sweep=True)


def point_of(method: str, setting: str, examples: int, kl: float, kl_error: float, reward: Estimate) -> Point:
    return Point(method, setting, examples, kl, kl_error, reward.value, reward.half_width, reward.prompts or 0)


def points_of(folder: Path, methods: dict[str, Any]) -> list[Point]:
    """Return a point for every evaluation of every run of `methods`, in their order and that of training."""
    points: list[Point] = []
    for name, method in methods.items():
        key, values = method["sweep"], method["values"]
        runs = {run.config.get(f"loss.{key}"): run for run in load_runs([folder / name])}
        along = ((f"{key} {value}", point) for value in values for point in frontier(runs[value]))
        points += [point_of(name, setting, p.examples, p.kl, p.kl_error, p.reward) for setting, p in along]
    return points


def best_of(start: Path, data: str, settings: dict[str, Any]) -> list[Point]:
    """Return points of best of N samples of the starting policy, N = 1, 2, 4 ... up to the setting `best_of`.

    The reward is the mean of the best of N over all subsets of N of the samples.
    KL = log N - (N - 1) / N is an upper bound, close if no response and no reward is likely by itself (Beirami et
    al. 2024, arXiv:2401.01879). It is 0 at N = 1: the starting policy itself.
    """
    recipe = [f"+experiment={settings['recipe']}", f"datasets=[{data}]", "loss=dpo", "loss.beta=1"]
    saved, n = find_saved(str(start), [*recipe, *settings["overrides"]]), settings["best_of"]
    model, tokenizer, computation = saved.open()
    config = saved.config
    test = load_data(data_settings(config), tokenizer, "test")
    examples = eval_examples(test, config.n_eval_examples)  # as in training
    prompts = prompts_of(test, examples, config.n_eval_model_samples)
    repeated = [prompt for prompt in prompts for _ in range(n)]
    max_new_tokens = config.max_length - max(map(len, prompts))
    log(f"sampling {n} responses of each of {len(prompts)} prompts")
    sampled = sample(model, tokenizer, repeated, Sampling(max_new_tokens, config.eval_batch_size, 1, computation.dtype))
    responses = [continuation(tokenizer, *each) for each in zip(repeated, sampled, strict=True)]
    texts = tokenizer.batch_decode(prompts, skip_special_tokens=True)
    scores = [sorted(sentiment(text + r) for r in responses[i * n : (i + 1) * n]) for i, text in enumerate(texts)]
    points = []
    for size in (2**k for k in range(n.bit_length())):
        reward = quick_estimate([expected_best(row, size) for row in scores], range(len(scores)))
        points.append(point_of(BEST_OF, f"N {size}", 0, math.log(size) - (size - 1) / size, 0.0, reward))
    return points


def expected_best(scores: Sequence[float], n: int) -> float:
    """Return the largest of `n` of the sorted `scores`, as the mean over all subsets of that size."""
    total = math.comb(len(scores), n)
    return sum(math.comb(i, n - 1) / total * score for i, score in enumerate(scores))


def verdicts(points: Sequence[Point]) -> list[str]:
    """Return a line for each test of the paper's two claims: KL falls with beta; DPO is above every baseline; and DPO's
    share of what best of N gains."""
    last = {(p.method, p.setting): p for p in points}  # a run's last evaluation is its last point
    lines = []
    for method in dict.fromkeys(p.method for p in points if p.setting.startswith("beta")):
        runs = [p for p in last.values() if p.method == method]
        if len(runs) == 1:
            continue
        values = ", ".join(f"{p.setting}: {p.kl:.2f} ± {p.kl_error:.2f}" for p in runs)
        rises = [f"{a.setting} to {b.setting}" for a, b in itertools.combinations(runs, 2) if above(b, a)]
        falls = above(runs[0], runs[-1])
        trend = f"RISES from {rises[0]}" if rises else "falls as beta grows" if falls else "does not change with beta"
        lines.append(f"{method}: KL at the end of training {trend}, beyond error ({values})")
    known = [p for p in points if p.method == BEST_OF]
    for p in (p for p in points if p.method == "DPO"):
        bound = bound_at(known, p.kl)
        if bound is not None and bound > known[0].reward:
            gain, most = p.reward - known[0].reward, bound - known[0].reward
            lines.append(
                f"DPO ({p.setting}, KL {p.kl:.2f}) gains {gain:+.3f}, best of N at that KL {most:+.3f}: a share of "
                f"{gain / most:.2f} ± {p.half_width / most:.2f}"
            )
    for p in (p for p in points if p.method in BASELINES):
        rival = at_kl([q for q in points if q.method == "DPO"], p.kl)
        if rival is None:
            lines.append(f"{p.method} ({p.setting}), KL {p.kl:.2f}: no DPO run was measured as near to the start")
            continue
        gap, error = rival.reward - p.reward, math.hypot(rival.half_width, p.half_width)
        order = "above" if gap > error else "BELOW" if gap < -error else "level with"
        lines.append(
            f"DPO ({rival.setting}, KL {rival.kl:.2f}, reward {rival.reward:+.3f}) is {order} {p.method} "
            f"({p.setting}, KL {p.kl:.2f}, reward {p.reward:+.3f}): difference {gap:+.3f} ± {error:.3f}"
        )
    return lines


def above(a: Point, b: Point) -> bool:
    """Return whether the KL of `a` is larger than the KL of `b` by more than two standard errors."""
    return a.kl - b.kl > 2 * math.hypot(a.kl_error, b.kl_error)


def bound_at(points: Sequence[Point], kl: float) -> float | None:
    """Return the reward of best of N at a KL, between measured N on a straight line; None at 0 and beyond them."""
    for a, b in itertools.pairwise(points):
        if a.kl < kl <= b.kl:
            return a.reward + (b.reward - a.reward) * (kl - a.kl) / (b.kl - a.kl)
    return None


def at_kl(points: Sequence[Point], kl: float) -> Point | None:
    """Return the point with the largest KL of up to `kl`, or None."""
    return max((p for p in points if p.kl <= kl), key=lambda p: p.kl, default=None)


def draw(points: Sequence[Point], path: Path) -> None:
    """Draw the paper's figure 2: a colour for each method, a line for each run along training."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for number, (method, members) in enumerate(itertools.groupby(points, lambda p: p.method)):
        look: dict[str, Any] = {"color": f"C{number}", "marker": "os^Dvx*P"[number % 8], "alpha": 0.8, "label": method}
        for _, group in itertools.groupby(members, lambda p: p.method == BEST_OF or p.setting):
            run = list(group)
            text: dict[str, Any] = {"textcoords": "offset points", "fontsize": 7, "color": look["color"]}
            bars = [p.half_width for p in run], [Z95 * p.kl_error for p in run]  # 95 % intervals
            axes.errorbar([p.kl for p in run], [p.reward for p in run], *bars, elinewidth=0.6, **look)
            look["label"] = None
            if method != BEST_OF:
                axes.annotate(run[-1].setting.split()[-1], (run[-1].kl, run[-1].reward), (5, 5), **text)
    axes.set(xlabel="KL(policy || starting policy), nats a response", ylabel="true reward (VADER), held-out prompts")
    if max(p.kl for p in points) > 5:
        axes.set_xscale("symlog", linthresh=1)
    axes.set_xlim(left=-0.05)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def write(folder: Path, points: Sequence[Point], command: str) -> str:
    """Write frontier.csv, frontier.png and frontier.md, and return the table as Markdown. `command` made the points."""
    if len({p.prompts for p in points}) > 1:
        raise UserError(f"{folder} holds runs measured on different numbers of prompts; give another --folder")
    with open(folder / "frontier.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([Point._fields, *points])
    draw(points, folder / "frontier.png")
    lines = [
        *(f"- {key}: {value}" for key, value in {"command": command, **machine()}.items()),
        f"- reward: VADER's score of prompt and response, -1 to 1: the mean over {points[0].prompts} held-out prompts, "
        "and its 95 % interval",
        "- KL: kl_eval/rao_blackwell, nats a response from the starting policy, and its standard error; of best of N, "
        "an upper bound",
        "",
    ]
    rows = [["method", "setting", "examples", "KL", "reward"]]
    for p in points:
        kl = f"≤ {p.kl:.2f}" if p.method == BEST_OF else f"{p.kl:.2f} ± {p.kl_error:.2f}"
        rows.append([p.method, p.setting, str(p.examples), kl, f"{p.reward:+.3f} ± {p.half_width:.3f}"])
    text = "\n".join([*lines, *markdown(rows), "", *(f"- {line}" for line in verdicts(points))])
    (folder / "frontier.md").write_text(f"# Reward against KL\n\n{text}\n", encoding="utf-8")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "frontier", help="runs and results go here")
    parser.add_argument("--settings", default="small", help="of experiments/frontier.yaml")
    parser.add_argument("--start", type=Path, help="the starting policy, a run's folder; default: an SFT of its own")
    parser.add_argument("--data", type=Path, help="folder of train and test rows with prompt, responses, scores")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for every run, as train.py takes them")
    arguments = parser.parse_args()
    known = yaml.safe_load(SETTINGS.read_text(encoding="utf-8"))
    if arguments.settings not in known:
        raise UserError(f"--settings {arguments.settings} is not in {SETTINGS}; choose from: {', '.join(known)}")
    settings = known[arguments.settings] | {"overrides": arguments.overrides}
    data = arguments.data or (settings["data"] and ROOT / settings["data"])
    if data is None or not list(data.glob("train.jsonl*")):
        raise UserError(f"--data {data} must be a folder with train.jsonl(.gz) and test.jsonl(.gz)")
    if settings["start"] is None and not arguments.start:
        raise UserError(f"--settings {arguments.settings} needs --start, the policy to start from")
    began, folder = time.time(), make_dir(arguments.folder.resolve(), "--folder")
    quiet_transformers()
    start = arguments.start.resolve() if arguments.start else fine_tune(folder, data, settings)
    name = "sentiment" if data == ROOT / "data" / "sentiment" else quoted(data.resolve())
    train_methods(folder, start, name, settings)
    points = [*best_of(start, name, settings), *points_of(folder, settings["methods"])]
    command = f"`python experiments/frontier.py {shlex.join(sys.argv[1:])}`"
    log(f"\n{write(folder, points, command)}\n\nwritten: {folder}/frontier.csv, .png and .md")
    log(f"finished in {(time.time() - began) / 60:.1f} minutes")


if __name__ == "__main__":
    run_main(main)
