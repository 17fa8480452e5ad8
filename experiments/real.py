"""SFT, then DPO over betas, on real preferences: python experiments/real.py --data <folder> [--folder real]

The embedded model learns from real rows of Anthropic's dialogues (hh), TL;DR and StackExchange, in the hub's layout or
as files below --data: first SFT on the preferred responses, then DPO from there with several betas and seeds. Every run
is measured on the same held-out pairs: accuracy of the implicit reward, also by which response is longer, against the
rule "the longer wins"; how far log-probabilities moved; KL and lengths of samples. Settings: experiments/real.yaml.
Writes `real.md` and `real.csv` into the folder. Run it again to resume.
"""

import argparse
import csv
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "benchmarks")]

import numpy as np
import yaml

from benchmark import machine
from demo import train
from dpo.judging.statistics import interval, share_interval
from dpo.model.loading import load_tokenizer
from dpo.model.patches import quiet_transformers
from dpo.tables import markdown
from dpo.utils import UserError, make_dir
from opening import find_reference, find_saved, hits_of
from results import load_runs
from score import Item, load_items, logps_of
from settings import quoted
from utils import HelpFormatter, run_main

SETTINGS = ROOT / "experiments" / "real.yaml"
NOTE = """[,]: 95 %, bootstrap over prompts, of the mean over seeds. Accuracy: share of held-out pairs whose preferred
response has the higher implicit reward. Difference: to the rule that the longer response wins, paired; lengths are
tokens after truncation, and as long counts half. Log-ratio: log policy / reference of a response, in nats. KL and
tokens: mean over seeds, with their range."""


@dataclass(frozen=True)
class Pairs:
    """Held-out pairs: the prompt that each is of [n], tokens by which the preferred response is longer [n], and the
    places of both among all responses [n, 2]."""

    prompts: np.ndarray
    longer: np.ndarray
    places: np.ndarray


def pairs_of(items: Sequence[Item]) -> Pairs:
    prompts, longer, places, start = [], [], [], 0
    for number, item in enumerate(items):
        record = item.record
        for a, b in record.pairs:
            prompts.append(number)
            longer.append(len(record.responses[a]) - len(record.responses[b]))
            places.append((start + a, start + b))
        start += len(record.responses)
    return Pairs(np.array(prompts), np.array(longer), np.array(places))


def sums(rows: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """Return the log-probability of each response, in nats, from those of its tokens (NaN: not counted)."""
    return np.array([np.nansum(tokens, dtype=np.float64) for row in rows for tokens in row])


def shown(values: np.ndarray, prompts: np.ndarray, form: str = "{:.3f}", share: bool = False) -> str:
    """Return the mean of `values` [n], which may be hits of a `share`, with its 95 % interval over prompts [n]."""
    found = (share_interval if share else interval)(values, prompts)
    ends = f" [{form.format(found[0])}, {form.format(found[1])}]" if found else ""
    return form.format(values.mean()) + ends


def compared(name: str, ratios: Sequence[np.ndarray], beta: str, pairs: Pairs, runs: Sequence[Any]) -> dict[str, str]:
    """Return a line of the table, from the log-ratios of all responses of each seed's run. Hits are means over seeds,
    so that intervals are over prompts."""
    sides = np.stack([ratio[pairs.places] for ratio in ratios])  # [seeds, pairs, 2]
    by_seed = hits_of(sides[..., 0], sides[..., 1])
    hits, rule = by_seed.mean(0), hits_of(pairs.longer, np.zeros(len(pairs.longer)))
    cells = {"data": name, "beta": beta, "seeds": str(len(ratios)), "pairs": str(len(hits))}
    cells["accuracy"] = shown(hits, pairs.prompts, share=True)
    cells["seeds' accuracies"] = ", ".join(f"{accuracy:.3f}" for accuracy in by_seed.mean(1))
    cells["longer wins"] = shown(rule, pairs.prompts, share=True)
    cells["difference"] = shown(hits - rule, pairs.prompts, "{:+.3f}")
    sizes = {"if longer": pairs.longer > 0, "if shorter": pairs.longer < 0, "if as long": pairs.longer == 0}
    for label, there in sizes.items():
        cells[label] = f"{hits[there].mean():.3f} (n {there.sum()})" if there.any() else "-"
    for side, label in enumerate(("chosen", "rejected")):
        cells[f"log-ratio {label}"] = shown(sides[..., side].mean(0), pairs.prompts, "{:+.1f}")
    final = [run.evaluations[-1] for run in runs]
    for label, key in (("KL", "kl_eval/rao_blackwell"), ("tokens of a sample", "samples_eval/policy_length")):
        values = [row[key] for row in final if key in row]
        cells[label] = f"{np.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})" if values else "-"
    return cells


def measure(name: str, folder: Path, betas: Sequence[Any], given: Sequence[str], limit: int) -> list[dict[str, str]]:
    """Return the lines of a data set, one a beta, after scoring its held-out pairs by every run."""
    first = next((folder / f"beta-{betas[0]}").glob("seed-*"))
    policy = find_saved(str(first), [*given])
    items = load_items(policy, load_tokenizer(policy.config), "test", True, limit)
    pairs, reference = pairs_of(items), sums(logps_of(find_reference(policy, None, [*given]), items, "reference"))
    lines = []
    for beta in betas:
        runs = sorted((folder / f"beta-{beta}").glob("seed-*"))
        ratios = [sums(logps_of(find_saved(str(run), [*given]), items, run.name)) - reference for run in runs]
        lines.append(compared(name, ratios, str(beta), pairs, load_runs(runs)))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the rows that the settings name")
    parser.add_argument("--folder", type=Path, default=ROOT / "real", help="runs and results go here")
    parser.add_argument("--settings", default="small", help="a part of experiments/real.yaml")
    parser.add_argument("--sets", help="data sets, separated by commas; all by default")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for all runs, as train.py takes them")
    arguments = parser.parse_args()
    settings = yaml.safe_load(SETTINGS.read_text(encoding="utf-8"))
    if arguments.settings not in settings:
        raise UserError(f"--settings {arguments.settings} is none of {', '.join(settings)} ({SETTINGS})")
    chosen = settings[arguments.settings]
    names = arguments.sets.split(",") if arguments.sets else [*chosen["sets"]]
    if unknown := [name for name in names if name not in chosen["sets"]]:
        raise UserError(f"--sets: {unknown[0]!r} is none of {', '.join(chosen['sets'])}")
    places = {name: arguments.data.expanduser().resolve() / chosen["sets"][name] for name in names}
    if missing := [path for path in places.values() if not path.exists()]:
        raise UserError(f"--data: there is no {missing[0]}; give the folder that holds it, or leave it out by --sets")
    quiet_transformers()
    folder, lines, began = make_dir(arguments.folder.resolve(), "--folder"), [], time.time()
    for name, path in places.items():
        source = [f"datasets=[{name}]", f"dataset_sources.{name}={quoted(path)}"]
        shared = [*source, *chosen["shared"], *arguments.overrides]
        sft = folder / name / "sft"
        train([*shared, *chosen["sft"], "loss=sft", f"exp_name=real_{name}_sft", f"local_run_dir={quoted(sft)}"])
        for beta in chosen["betas"]:
            where = [f"exp_name=real_{name}", f"hydra.sweep.dir={quoted(folder / name / f'beta-{beta}')}"]
            own = ["loss=dpo", f"loss.beta={beta}", f"model.archive={quoted(sft)}", *chosen["dpo"]]
            seeds = f"seed=choice({','.join(map(str, range(chosen['seeds'])))})"
            train([*shared, *own, *where, seeds], sweep=True)
        given = [o for o in arguments.overrides if o.startswith(("device=", "mixed_precision=", "cache_dir="))]
        lines += measure(name, folder / name, chosen["betas"], given, chosen["limit"])
        write(folder, lines, chosen, arguments, time.time() - began)


def write(
    folder: Path, lines: Sequence[dict[str, str]], chosen: dict[str, Any], given: argparse.Namespace, spent: float
) -> None:
    """Write the table so far, and print it."""
    with open(folder / "real.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, [*lines[0]])
        table.writeheader()
        table.writerows(lines)
    facts = {**machine(), "settings": f"{given.settings}, {' '.join(given.overrides)}"}
    facts["minutes of the last start"] = f"{spent / 60:.0f}"
    facts |= {part: f"`{' '.join(chosen[part])}`" for part in ("shared", "sft", "dpo")}
    text = ["# Real preferences", "", *(f"- {name}: {value}" for name, value in facts.items()), ""]
    text += [*markdown([[*lines[0]], *([*line.values()] for line in lines)]), ""]
    text += [NOTE]
    (folder / "real.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    print("\n".join(text))


if __name__ == "__main__":
    run_main(main)
