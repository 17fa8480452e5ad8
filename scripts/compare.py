"""Two runs on the same held-out pairs: whose implicit rewards rank more of them right, and on which they differ.

    python scripts/compare.py RUN RUN2
    python scripts/compare.py RUN RUN2 --data pairs.jsonl --show 5

RUN and RUN2 are named as in score.py, each with the reference that it was trained against. The difference of accuracies
has a 95 % interval, by bootstrap over prompts, of the pairs' own differences: narrower than two intervals apart.
The p is exact: if the runs were alike, each prompt's difference had either sign (of one pair a prompt it is McNemar's).
KEY=VALUE are overrides as train.py takes them, for both.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dpo.utils import UserError
from options import check_runs, take_overrides
from utils import HelpFormatter, run_main


def read_arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.usage = "%(prog)s RUN RUN2 [options] [KEY=VALUE ...]"
    parser.add_argument("runs", nargs=2, metavar="RUN")
    parser.add_argument("--data", nargs="+", metavar="FILE_OR_SET", help="as datasets=[...] takes them")
    parser.add_argument("--limit", type=int, metavar="N", help="compare on the first N records of each data set")
    parser.add_argument("--show", type=int, default=2, metavar="N", help="pairs to show on which the runs differ")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the comparison as JSON, too")
    others, overrides = take_overrides(sys.argv[1:])
    given = parser.parse_args(others)
    check_runs(given)
    return given, overrides


if __name__ == "__main__":
    run_main(read_arguments)  # before the slow imports: --help and mistakes are answered at once

import numpy as np

from dpo.files import atomic_write
from dpo.judging.statistics import interval, share_interval
from dpo.model.loading import load_tokenizer
from dpo.model.patches import quiet_transformers
from dpo.utils import log, redact, visible
from evaluations import SURE, flip_p, no_difference
from opening import ends, hits_of
from score import load_items, opened, rows_of


def rows_for(name: str, given: argparse.Namespace, overrides: list[str]) -> list[dict[str, Any]]:
    """Return the scored records of a run, as score.py writes them. Raise UserError."""
    policy, reference = opened(name, None, given.data, overrides)
    tokenizer = load_tokenizer(policy.config)
    items = load_items(policy, tokenizer, "test", not given.data, given.limit)
    return [*rows_of(items, policy, reference, policy.config.loss, tokenizer)]


def pairs_of(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """Return prompt, preferred and other response of every pair."""
    texts = ((row["prompt"], [response["text"] for response in row["responses"]], row["pairs"]) for row in rows)
    return [(prompt, said[a], said[b]) for prompt, said, pairs in texts for a, b in pairs]


def rewards_of(rows: Sequence[dict[str, Any]]) -> np.ndarray:
    """Return the rewards of the preferred and the other response of every pair, [pairs, 2]."""
    return np.array([[row["responses"][i]["reward"] for i in pair] for row in rows for pair in row["pairs"]])


def compared(pairs: Sequence[tuple[str, str, str]], first: np.ndarray, second: np.ndarray) -> dict[str, Any]:
    """Return accuracies, their paired difference (first minus second) and the disagreements, of hits [pairs]."""
    prompts = np.array([prompt for prompt, _, _ in pairs])
    found: dict[str, Any] = {"pairs": len(pairs), "prompts": len(set(prompts.tolist()))}
    for name, hits in (("first", first), ("second", second)):
        found[name] = {"accuracy": float(hits.mean()), "interval": share_interval(hits, prompts)}
    found["difference"] = {"mean": float((first - second).mean()), "interval": interval(first - second, prompts)}
    if (first == second).all():  # resampling would make it certain
        found["difference"]["interval"] = list(no_difference(found["prompts"]))
    counts = {"only first": int((first > second).sum()), "only second": int((first < second).sum())}
    return found | counts | {"p": flip_p(2 * (first - second), prompts)}  # twice: ties are halves


def as_text(found: dict[str, Any], names: Sequence[str]) -> str:
    """Return the comparison for people."""
    lines = [f"{found['pairs']} pairs of {found['prompts']} prompts"]
    for label, name in zip(("first", "second"), names, strict=True):
        lines.append(f"accuracy {found[label]['accuracy']:.3f} {ends(found[label])}  {visible(name)}")
    difference = found["difference"]
    lines.append(f"difference {difference['mean']:+.3f} {ends(difference, '+.3f')}, paired")
    counts = f"{found['only first']} pairs are right for the first alone, {found['only second']} for the second alone"
    lines.append(f"{counts}: p = {found['p']:.2g} (exact, over prompts)")
    better = names[difference["mean"] < 0] if found["p"] < SURE else None
    told = f"{visible(better)} is the more accurate one" if better else "these pairs do not tell which is more accurate"
    return "\n".join([*lines, told])


def main() -> None:
    given, overrides = read_arguments()
    quiet_transformers()
    rows = [rows_for(name, given, overrides) for name in given.runs]
    pairs = pairs_of(rows[0])
    if not pairs:
        raise UserError("there are no pairs to compare on: give --data <pairs>")
    if pairs != pairs_of(rows[1]):
        raise UserError(
            "the runs see other held-out pairs (data, max_length, chat_format or tokenizer differ): give --data and "
            "the same settings, such as max_length=512"
        )
    hits = [hits_of(*rewards_of(some).T) for some in rows]
    found = compared(pairs, *hits)
    for i in np.flatnonzero(hits[0] != hits[1])[: given.show]:
        prompt, preferred, other = map(visible, pairs[i])
        right = given.runs[0] if hits[0][i] > hits[1][i] else given.runs[1]
        log(f"\n--- only {visible(right)} is right\n{prompt}\npreferred: {preferred}\nother: {other}")
    log(f"\n{as_text(found, given.runs)}")
    if given.out:
        atomic_write(given.out, redact(json.dumps({"runs": given.runs, **found}, indent=1)) + "\n")


if __name__ == "__main__":
    run_main(main)
