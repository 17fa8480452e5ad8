"""What runs reached, on one page: python scripts/report.py SWEEP_OR_RUNS... [--baseline NAME] [--watch]

Takes run folders, and folders that hold runs up to two levels down. Writes `report.csv` (one line a run) and
`report.html` (one file that needs no network), and prints the table. The page: results with their intervals, which run
is best and how sure that is, differences from a baseline on the same held-out examples, curves, accuracy by length
and data set, samples side by side, what became of the data, settings. The true reward is known only for runs on the
embedded sentiment task: VADER's compound score. A finished sweep writes its report by itself.
"""

import argparse
import base64
import csv
import difflib
import hashlib
import io
import json
import math
import re
import shlex
import shutil
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dpo.utils import UserError
from utils import HelpFormatter, run_main


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="SWEEP_OR_RUN", help="run folders, or folders of runs")
    parser.add_argument("--baseline", metavar="NAME", help="the run that others are compared with (default: the first)")
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder for report.csv and report.html")
    parser.add_argument("--samples", type=int, default=8, help="prompts whose samples are shown")
    parser.add_argument(
        "--watch", type=float, nargs="?", const=60.0, metavar="SECONDS", help="write it anew every 60 (or SECONDS) s"
    )
    parser.add_argument(
        "--win-rates",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="results.json of scripts/judge.py",
    )
    given = parser.parse_args()
    if given.samples < 0:
        raise UserError(f"--samples {given.samples} must be 0 or more prompts")
    if given.watch is not None and not 1 <= given.watch < math.inf:
        raise UserError(f"--watch {given.watch:g} must be at least 1 second")
    return given


if __name__ == "__main__":
    run_main(read_arguments)  # before the slow imports: --help and mistakes are answered at once

import jinja2
import numpy as np
from markupsafe import Markup

from dpo.files import atomic_write
from dpo.utils import log, make_dir, redact, visible
from evaluations import (
    ACCURACY,
    SHARES,
    Estimate,
    Ranked,
    accuracy_by,
    conclude,
    estimate,
    holm,
    length_bins,
    on_both,
    paired,
    quick_estimate,
)
from results import (
    EXAMPLES,
    LOSS,
    MARGIN,
    REWARDS,
    SHORT,
    Z95,
    Run,
    as_text,
    differences,
    frontier,
    load_runs,
    not_begun,
    number,
    reference_rewards,
    results_of,
    reward_kind,
    table_rows,
    text_table,
)

HERE = Path(__file__).resolve().parent
MOST_POINTS = 400  # of a curve
OUTSIDE = 0.02  # of the training points lie above, and below, what an axis shows
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

# --- Curves ---


def thin_out(points: Sequence[Any]) -> list[Any]:
    """Return at most MOST_POINTS of `points`, evenly spaced, with the first and the last."""
    n = min(len(points), MOST_POINTS)
    return [points[i * (len(points) - 1) // max(n - 1, 1)] for i in range(n)]


def line(run: int, kind: str, points: Sequence[tuple[float, Estimate]]) -> dict[str, Any]:
    """Return a line of a chart, of (x, y): of `kind` train, which may be smoothed, or eval, with marks."""
    ends = [found.interval or (None, None) for _, found in points]
    columns: dict[str, list[Any]] = {"x": [x for x, _ in points], "y": [found.value for _, found in points]}
    columns |= {"low": [low for low, _ in ends], "high": [high for _, high in ends]} if kind != "train" else {}
    return {"run": run, "kind": kind, **columns}


def curve(run: Run, metric: str) -> tuple[list[tuple[float, Estimate]], list[tuple[float, Estimate]]]:
    """Return examples and values of a metric in training, and in evaluations with 95 % intervals; thinned out.

    An accuracy begins once the policy has left the reference: until then no pair counts as right.
    """
    train, final = metric.format("train"), metric.format("eval")
    begun = {
        name: next((row[EXAMPLES] for row in run.metrics if row.get(name)), math.inf) if final == ACCURACY else 0
        for name in (train, final)
    }
    each = {evaluation.seen: evaluation for evaluation in run.by_example}
    evaluations = []
    for row in thin_out([row for row in run.metrics if final in row and row[EXAMPLES] >= begun[final]]):
        known, error = each.get(row[EXAMPLES]), row.get(f"{final}_error", math.nan)
        if known is not None and final in known.values:
            found = quick_estimate(known.values[final], known.prompts, final in SHARES)
        else:
            ends = (row[final] - Z95 * error, row[final] + Z95 * error)
            found = Estimate(row[final], ends if math.isfinite(error) else None)
        evaluations.append((row[EXAMPLES], found))
    rows = thin_out([row for row in run.metrics if train in row and row[EXAMPLES] >= begun[train]])
    return [(row[EXAMPLES], Estimate(row[train], None)) for row in rows], evaluations


def limits(lines: Sequence[Mapping[str, Any]]) -> list[float] | None:
    """Return the range of an axis: all evaluations with their intervals, and training but for its extreme OUTSIDE."""
    shown: list[float] = []
    for each in lines:
        values = [y for y in each["y"] if math.isfinite(y)]
        if each["kind"] == "train" and values:
            shown += np.quantile(values, [OUTSIDE, 1 - OUTSIDE]).tolist()
        elif each["kind"] != "train":
            shown += [*values, *(y for side in ("low", "high") for y in each[side] if y is not None)]
    shown = [y for y in shown if math.isfinite(y)]
    if not shown:
        return None
    low, high = min(shown), max(shown)
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return [low - room, high + room]


def chart(title: str, x: str, lines: Sequence[Mapping[str, Any]], y: str = "") -> dict[str, Any]:
    return {"title": title, "x": x, "y": y, "lines": lines, "range": limits(lines)}


def curves_of(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return a chart of the loss for each kind of loss, which cannot be compared, then of each other metric."""
    kinds: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        kinds[as_text(run.config.get("loss.name"))].append(run)
    losses = [(f"Loss: {kind}", "loss/{}", members) for kind, members in kinds.items()]
    panels = []
    for title, metric in PANELS.items():
        by_kind: dict[str, list[Run]] = defaultdict(list)
        for run in runs:
            by_kind[reward_kind(run) if metric.format("eval") in REWARDS else ""].append(run)
        panels += [(f"{title}: {kind}" if len(by_kind) > 1 else title, metric, some) for kind, some in by_kind.items()]
    charts = []
    for title, metric, members in panels[:1] + losses + panels[1:]:
        found = {runs.index(run): curve(run, metric) for run in members}
        lines = [line(i, "train", train) for i, (train, _) in found.items() if train]
        lines += [line(i, "eval", points) for i, (_, points) in found.items() if points]
        if lines:
            charts.append(chart(title, "examples", lines))
    return charts


def frontier_of(runs: Sequence[Run]) -> dict[str, Any] | None:
    """Return the chart of reward against KL, its number of prompts and the runs without all points; None if empty."""
    along = [[p for p in frontier(run) if math.isfinite(p.kl)] if run.rewarded else [] for run in runs]
    counts = sorted({point.reward.prompts or 0 for points in along for point in points})
    if not counts:
        return None
    lines = []
    for i, points in enumerate(along):
        found = [(p.kl, p.reward) for p in points]
        widths = [Z95 * p.kl_error for p in points]
        sides = {
            "left": [p.kl - w for p, w in zip(points, widths)],
            "right": [p.kl + w for p, w in zip(points, widths)],
        }
        lines += [line(i, "path", found) | sides] if points else []
    starts = reference_rewards([run for run, points in zip(runs, along) if points])
    lines += [line(-1, "path", [(0, reward)]) for reward in starts]
    incomplete = [run.name for run, points in zip(runs, along) if len(points) < max(1, len(run.evaluations))]
    drawn = chart("Reward against KL", "KL(policy || reference), nats a response", lines, "true reward")
    return {"chart": drawn, "prompts": as_text(counts), "incomplete": incomplete}


def by_length(runs: Sequence[Run]) -> dict[str, Any] | None:
    """Return the chart of accuracy against how many tokens the preferred response is longer; None if not known."""
    ranked = [(i, e) for i, run in enumerate(runs) if (e := run.last_by_example) and ACCURACY in e.values]
    if not ranked:
        return None
    edges = length_bins(ranked[0][1])
    lines = []
    for i, evaluation in ranked:
        longer = np.array([lengths[0] - lengths[-1] for lengths in evaluation.tokens])
        bins = np.digitize(longer, edges)
        found = accuracy_by(evaluation, bins.tolist())
        lines.append(line(i, "eval", [(float(longer[bins == b].mean()), found[b]) for b in sorted(found)]))
    return chart("Accuracy by length", "tokens by which the preferred response is longer", lines)


# --- Tables ---


def cells(found: Sequence[Estimate | None]) -> list[dict[str, Any] | None]:
    """Return a column's cells: text, and where value and interval lie in the column's range, in percent."""
    finite = [y for e in found if e for y in (e.value, *(e.interval or ())) if math.isfinite(y)]
    low, high = min(finite, default=0.0), max(finite, default=1.0)

    def at(value: float) -> float:
        return round(100 * (value - low) / (high - low), 2) if high > low and math.isfinite(value) else 50.0

    column: list[dict[str, Any] | None] = []
    for e in found:
        if e is None or math.isnan(e.value):
            column.append(None if e is None else {"value": e.value, "text": "nan", "n": e.n, "ends": None})
            continue
        ends = [number(end) for end in e.interval] if e.interval else None
        where = {"left": at(e.interval[0]), "right": 100 - at(e.interval[1]), "dot": at(e.value)} if e.interval else {}
        column.append({"value": e.value, "text": number(e.value), "n": e.n, "ends": ends, **where})
    return column


def table_of(runs: Sequence[Run]) -> dict[str, Any]:
    """Return the page's table of results: settings that differ, then results, then how far each run is."""
    kinds = [reward_kind(run) for run in runs]
    found = [results_of(run) for run in runs]
    columns: dict[str, list[Estimate | None]] = {}
    for name, title in sorted(SHORT.items(), key=lambda item: item[0] == LOSS):
        for kind in dict.fromkeys(kinds) if name == MARGIN and len(set(kinds)) > 1 else [None]:
            some = [e.get(name) if kind in (None, own) else None for e, own in zip(found, kinds)]
            if any(some):
                columns[title if kind is None else f"{title} ({kind})"] = some
    keys = differences(runs)
    config = runs[0].config
    varied = [[as_text(run.config.get(key)) for key in keys] for run in runs]
    short = [key.rpartition(".")[2] for key in keys]
    labels = [  # for a narrow page, on which the settings have no columns
        ", ".join(f"{k} {v}" for k, v in zip(short, values) if k not in run.name and v != "–")
        for run, values in zip(runs, varied)
    ]
    same = [key for key in MAIN_KEYS if key in config and len({repr(run.config.get(key)) for run in runs}) == 1]
    return {
        "settings": keys,
        "varied": varied,
        "labels": labels,
        "columns": list(columns),
        "results": list(zip(*map(cells, columns.values()))) if columns else [()] * len(runs),
        "after": [run.metrics[-1][EXAMPLES] if run.metrics else 0 for run in runs],
        "shared": [f"{key}: {as_text(config[key])}" for key in same],
    }


def to_paste(folder: Path) -> str:
    """Return a folder as a command line names it from here."""
    return shlex.quote(str(folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder))


def conclusion_of(runs: Sequence[Run]) -> tuple[str, str]:
    """Return the sentence that says which run is best, and how that is known."""
    found = [(run, e) for run in runs if (e := results_of(run).get(ACCURACY)) and math.isfinite(e.value)]
    if found:
        ranked = [Ranked(run.name, to_paste(run.folder), e, run.last_by_example) for run, e in found]
        said, how = conclude(ranked)
        n = sum(not run.finished for run, _ in found)
        return said + (f" {n} of these runs {'are' if n > 1 else 'is'} unfinished." if n else ""), how
    losses = [(e.value, run) for run in runs if (e := results_of(run).get(LOSS)) and math.isfinite(e.value)]
    if not losses:
        return "No run has been evaluated yet.", ""
    if len({as_text(run.config.get("loss.name")) for run in runs}) > 1:
        return "No run ranks held-out pairs, and losses of different kinds cannot be compared.", ""
    (least, best), *others = sorted(losses, key=lambda found: found[0])
    said = f"{best.name} has the lowest held-out loss, {number(least)}"
    if others:
        said += f"; {loss_gap(best, others[0][1])}"
    return f"{said}.", "No run ranks held-out pairs."


def loss_gap(best: Run, second: Run) -> str:
    """Return how much higher the loss of the second-best run is, in words: on the same held-out examples, paired."""
    mine, other = best.last_by_example, second.last_by_example
    if not (mine and other) or not mine.same_examples(other) or (rows := on_both(mine, other, LOSS)) is None:
        return f"whether that is less than {second.name}'s by more than chance is not known"
    (losses, prompts), (others, _) = mine.at(rows[0], LOSS), other.at(rows[1], LOSS)
    found = estimate(others - losses, prompts, share=False)
    ends = f", 95 % interval {number(found.interval[0])} to {number(found.interval[1])}" if found.interval else ""
    return f"that of {second.name} is higher by {number(found.value)}{ends}, not corrected for the number of runs"


def find_baseline(runs: Sequence[Run], name: str | None) -> int:
    """Return the number of the run that `name` names, by its path or its folder's name; 0 for None. Raise UserError."""
    found = [i for i, run in enumerate(runs) if name in (None, run.name, run.folder.name)]
    if name is not None and len(found) != 1:
        problem = "names several runs" if found else "names no run"
        raise UserError(f"--baseline {name} {problem}; give one of: {', '.join(run.name for run in runs)}")
    return found[0]


def reward_difference(run: Run, other: Run) -> Estimate | None:
    """Return the true reward of a run's samples minus that of another's, paired by prompt; None if not known."""
    if not (run.rewarded and other.rewarded):
        return None
    means = []
    for each in (run, other):
        rewards = {p: [each.reward(row, "policy") for row in rows] for p, rows in each.last_samples().items()}
        means.append({p: sum(r for r in some if r is not None) / len(some) for p, some in rewards.items()})
    both = [prompt for prompt in means[0] if prompt in means[1]]
    values = np.array([means[0][prompt] - means[1][prompt] for prompt in both])
    return estimate(values, np.array(both), share=False) if len(both) > 1 else None


def differences_of(runs: Sequence[Run], baseline: int) -> dict[str, Any] | None:
    """Return the table of paired differences from a baseline; None for a single run."""
    base, others = runs[baseline], [run for i, run in enumerate(runs) if i != baseline]
    if not others:
        return None
    mine = base.last_by_example
    found = [paired(e, mine) if (e := run.last_by_example) and mine else None for run in others]
    ps = iter(holm([each.p for each in found if each]))
    kinds = [(reward_kind(run), run.config.get("loss.beta")) for run in (base, *others)]
    alike = [kind == kinds[0] for kind in kinds[1:]]  # margins grow with beta by themselves
    columns: dict[str, list[Estimate | None]] = {
        "accuracy": [each and each.difference for each in found],
        "margin": [each.margin if each and same else None for each, same in zip(found, alike)],
        "reward": [reward_difference(run, base) for run in others],
    }
    columns = {name: column for name, column in columns.items() if any(column)}
    rows = zip(others, *map(cells, columns.values())) if columns else ((run,) for run in others)
    tests = [{"p": next(ps), "gained": each.gained, "lost": each.lost} if each else None for each in found]
    missing = [run for run, each in zip(others, found) if each is None and ACCURACY in results_of(run)]
    folders = [to_paste(run.folder) for run in (*missing[:1], base)]
    return {
        "base": base,
        "columns": list(columns),
        "rows": [(run, list(each), test) for (run, *each), test in zip(rows, tests, strict=True)],
        "command": f"python scripts/compare.py {' '.join(folders)}",
        "n_missing": len(missing),
    }


def by_set(runs: Sequence[Run]) -> dict[str, Any] | None:
    """Return the table of accuracies by data set; None if no run evaluates more than one."""
    known = [(run, e) for run in runs if (e := run.last_by_example) and ACCURACY in e.values]
    sets = list(dict.fromkeys(name for _, e in known for name in e.sets))
    if len(sets) < 2:
        return None
    found = [accuracy_by(e, e.sets) for _, e in known]
    rows = zip(*(cells([each.get(name) for each in found]) for name in sets))
    return {"columns": sets, "rows": list(zip([run for run, _ in known], rows))}


def funnels_of(runs: Sequence[Run]) -> list[tuple[list[Run], list[str], list[tuple[str, list[str]]]]]:
    """Return (runs, columns, rows) of each distinct funnel: counts that are not 0, by split and data set."""
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        if run.funnel:
            groups[json.dumps(run.funnel)].append(run)
    tables = []
    for members in groups.values():
        sides = {f"{split}: {name}": c for split, sets in members[0].funnel.items() for name, c in sets.items()}
        keys = dict.fromkeys(key for counts in sides.values() for key, n in counts.items() if n)
        rows = [(key, [f"{c[key]:,}" if key in c else "–" for c in sides.values()]) for key in keys]
        tables.append((members, [as_text(name) for name in sides], rows))
    return tables


def settings_of(runs: Sequence[Run]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return each key of the configuration with its values, and the runs that have each; those that differ first."""
    found = []
    for key in dict.fromkeys(key for run in runs for key in run.config):
        by_value: dict[str, list[str]] = defaultdict(list)
        for run in runs:
            by_value[as_text(run.config.get(key))].append(run.name)
        found.append((key, [(value, ", ".join(names)) for value, names in by_value.items()]))
    return sorted(found, key=lambda item: len(item[1]) == 1)


# --- Samples ---


def marked(text: str, first: str) -> list[tuple[str, bool]]:
    """Return `text` in parts, and whether each is not in `first`, word by word."""
    words, others = (re.findall(r"\s*\S+|\s+$", each) for each in (text, first))
    matcher = difflib.SequenceMatcher(None, others, words, autojunk=False)
    return [("".join(words[a:b]), how != "equal") for how, _, _, a, b in matcher.get_opcodes() if b > a]


def samples_of(runs: Sequence[Run], n: int) -> list[tuple[str, list[Any], list[Any]]]:
    """Return (prompt, references, policies) for `n` prompts; those that more runs have come first.

    A reference is (parts, reward); a policy is (run, examples, number of samples, parts, reward) of the first sample. A
    reward is None if it is not known. Parts are `marked` against the first text of the prompt.
    """
    by_run = [(run, run.last_samples()) for run in runs]
    prompts = Counter(prompt for _, by_prompt in by_run for prompt in by_prompt)
    samples = []
    for prompt, _ in prompts.most_common(n):
        found = [(run, by_prompt[prompt]) for run, by_prompt in by_run if prompt in by_prompt]
        references: dict[tuple[str, float | None], None] = {}  # runs that start from the same weights share one
        for run, rows in found:
            if isinstance(rows[0].get("reference"), str):
                references[rows[0]["reference"], run.reward(rows[0], "reference")] = None
        first = next(iter(references))[0] if references else found[0][1][0]["policy"]
        policies = [
            (run, rows[0][EXAMPLES], len(rows), marked(rows[0]["policy"], first), run.reward(rows[0], "policy"))
            for run, rows in found
        ]
        samples.append((prompt, [(marked(text, first), reward) for text, reward in references], policies))
    return samples


# --- The page ---


def as_json(value: Any) -> Markup:
    """Return `value` as JSON that may stand inside a script element; numbers that JSON does not have become null."""

    def clean(each: Any) -> Any:
        if isinstance(each, float):
            return float(f"{each:.7g}") if math.isfinite(each) else None
        if isinstance(each, Mapping):
            return {key: clean(one) for key, one in each.items()}
        if isinstance(each, list | tuple):
            return [clean(one) for one in each]
        return visible(each) if isinstance(each, str) else each

    text = json.dumps(clean(value), separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def scripts() -> tuple[list[Markup], str]:
    """Return the page's programs, and the policy that lets a browser run these and nothing else."""
    texts = [(HERE / name).read_text(encoding="utf-8") for name in ("vendor/uPlot.iife.min.js", "report.js")]
    digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return [*map(Markup, texts)], f"default-src 'none'; style-src 'unsafe-inline'; script-src {allowed}"


def make_page(runs: Sequence[Run], samples: int, command: str, baseline: int = 0, refresh: float | None = None) -> str:
    """Return the report as HTML. report.html escapes every value, after `visible`, unless it is Markup. `refresh`:
    seconds after which a browser loads it again."""
    template = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: visible(value) if type(value) is str else value,
        trim_blocks=True,
        keep_trailing_newline=True,
    ).get_template("report.html")
    curves, by_reward, lengths = curves_of(runs), frontier_of(runs), by_length(runs)
    charts = [*curves, *([by_reward["chart"]] if by_reward else []), *([lengths] if lengths else [])]
    looks = [{"name": run.name, "colour": run.colour, "mark": run.mark} for run in runs]
    programs, policy = scripts()
    return template.render(
        title=f"Report of {len(runs)} run{'s' * (len(runs) > 1)}",
        runs=runs,
        **table_of(runs),
        conclusion=conclusion_of(runs),
        differences=differences_of(runs, baseline),
        n_curves=len(curves),
        most_points=MOST_POINTS,
        frontier=by_reward,
        lengths=lengths,
        charts=charts,
        sets=by_set(runs),
        samples=samples_of(runs, samples),
        facts=[*dict.fromkeys(run.facts for run in runs if run.facts)],
        funnels=funnels_of(runs),
        all_settings=settings_of(runs),
        data=as_json({"runs": looks, "charts": charts}),
        style=Markup((HERE / "vendor" / "uPlot.min.css").read_text(encoding="utf-8")),
        programs=programs,
        policy=Markup(policy),
        refresh=refresh,
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


def write_report(runs: Sequence[Run], out: Path, samples: int, command: str, **how: Any) -> list[dict[str, Any]]:
    """Write report.csv and report.html, made by `command`, into `out`. Return the table's rows. `how`: see
    `make_page`."""
    rows = table_rows(runs)
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(map(csv_cell, rows[0]))
    writer.writerows(map(csv_cell, row.values()) for row in rows)
    for name, text in {"report.csv": table.getvalue(), "report.html": make_page(runs, samples, command, **how)}.items():
        try:
            atomic_write(out / name, redact(text))
        except OSError as error:
            raise UserError(f"--out: {out / name} cannot be written: {error.strerror}; give another folder") from error
    return rows


# --- The command ---


def add_win_rates(runs: Sequence[Run], files: Sequence[Path]) -> None:
    """Set the win rate of each run that a results.json of judge.py is about, as its A. Raise UserError, also if files
    differ in the opponent, the judge, the prompts or the temperature."""
    before: dict[str, Any] | None = None
    for file in files:
        try:
            told = json.loads(file.read_text(encoding="utf-8"))
            name, how = told["settings"]["a"], {k: v for k, v in told["settings"].items() if k != "a"}
            how["temperatures"], found = next(iter(told["results"].items()))
            several = len(told["results"]) > 1
            low_high = found["win_rate"]["interval"]
            ends = (float(low_high[0]), float(low_high[1])) if low_high else None
            won = Estimate(float(found["win_rate"]["rate"]), ends, int(found["pairs"]), int(found["prompts"]))
            [run] = [run for run in runs if run.folder in (Path(name).resolve(), Path(name).resolve().parent)]
        except (OSError, ValueError, LookupError, TypeError, AttributeError, StopIteration) as error:
            raise UserError(
                f"--win-rates {file} is no results.json of scripts/judge.py about one of the runs"
            ) from error
        if several:
            raise UserError(f"--win-rates {file} has several temperatures: judge at one for the report")
        if before is not None and how != before:
            apart = ", ".join(k for k in how.keys() | before.keys() if how.get(k) != before.get(k))
            raise UserError(f"--win-rates: {file} differs from {files[0]} in {apart}: win rates cannot be compared")
        run.judged, before = won, how
    if before is not None:
        log(f"win rate: against {before.get('b')}, by {before.get('judge')}, temperature {before['temperatures']}")


def make_report(given: argparse.Namespace, command: str) -> None:
    """Read the runs, print their table, write the report, and say where."""
    failed = [name for path in given.runs for name in not_begun(path)]
    if failed:
        log(f"not begun, for the reason see their log.txt: {', '.join(failed)}")
    runs = load_runs(given.runs)
    add_win_rates(runs, given.win_rates)
    baseline = find_baseline(runs, given.baseline)
    log(f"\n=== {', '.join(str(path.resolve().name) for path in given.runs)}")
    log(text_table(table_rows(runs), shutil.get_terminal_size((120, 24)).columns))
    log(conclusion_of(runs)[0])
    make_dir(given.out, "--out")
    write_report(runs, given.out, given.samples, command, baseline=baseline, refresh=given.watch)
    log(f"written: {given.out / 'report.csv'}, {given.out / 'report.html'}")


def watch(given: argparse.Namespace, command: str) -> None:
    """Write the report anew whenever a run has something new, until Ctrl-C. What cannot be read yet is tried again."""
    before = None
    while True:
        try:
            now = sorted((str(p), p.stat().st_size) for path in given.runs for p in path.rglob("*.jsonl"))
            if now != before:
                make_report(given, command)
                before = now
        except (UserError, OSError) as error:  # a file can go while they are listed
            log(f"{error}\ntrying again in {given.watch:g} s")
        time.sleep(given.watch)


def main() -> None:
    given = read_arguments()
    command = shlex.join(["python", "scripts/report.py", *sys.argv[1:]])
    (make_report if given.watch is None else watch)(given, command)


if __name__ == "__main__":
    run_main(main)
