"""The rewards that a policy stands for, beta log policy(y | x) / reference(y | x), of responses and of their tokens.

    python scripts/score.py RUN --data pairs.jsonl --out scores.jsonl
    python scripts/score.py RUN RUN2 RUN3      # one table, a row a run; compare.py: two runs, pair by pair

RUN is a run's folder, a checkpoint, a model folder or a hub id; the reference is the one it was trained against. These
rewards (Rafailov et al. 2023, section 4) are known up to a function of the prompt: compare responses to one prompt.
Without --data: the held-out part of what the run was trained on. Rows have pairs (chosen, rejected; or prompt,
responses, scores), and then those of one prompt become one record; or single responses (prompt, completion). KEY=VALUE
are overrides as train.py takes them: device=cpu, max_length=1024, loss.beta=0.2.
"""

import argparse
import gc
import itertools
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dpo.utils import UserError
from options import check_runs, take_overrides
from utils import HelpFormatter, run_main


def read_arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.usage = "%(prog)s RUN [RUN ...] [options] [KEY=VALUE ...]"
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run's folder, checkpoint, model folder or hub id")
    parser.add_argument("--reference", metavar="NAME", help="run, checkpoint, model folder or hub id")
    parser.add_argument("--data", nargs="+", metavar="FILE_OR_SET", help="as datasets=[...] takes them")
    parser.add_argument("--split", choices=("test", "train"), default="test", help="test: all rows, if undivided")
    parser.add_argument("--out", type=Path, default=Path("scores.jsonl"), help="file of the result")
    parser.add_argument("--overwrite", action="store_true", help="replace --out")
    parser.add_argument("--show", type=int, default=3, metavar="N", help="records of a run to show, token by token")
    parser.add_argument("--limit", type=int, metavar="N", help="score the first N records of each data set")
    others, overrides = take_overrides(sys.argv[1:])
    arguments = parser.parse_intermixed_args(others)
    if arguments.out.is_dir() or (arguments.out.exists() and not arguments.overwrite):
        raise UserError(f"--out {arguments.out} exists: give another file, or --overwrite to replace a file")
    if arguments.data and len(set(arguments.data)) < len(arguments.data):
        raise UserError(f"--data {' '.join(arguments.data)} names a data set twice; name each once")
    if len(set(arguments.runs)) < len(arguments.runs):
        raise UserError(f"{' '.join(arguments.runs)} names a run twice; name each once")
    check_runs(arguments)
    return arguments, overrides


if __name__ == "__main__":
    run_main(read_arguments)  # before the slow imports: --help and mistakes are answered at once

import numpy as np
import torch

from dpo.data.files import Source, numbered_rows
from dpo.data.records import PreferenceData, Record, short_names
from dpo.data.sources import LABELLED, PAIRS, TARGETS, DataSet, DataSettings, find_source
from dpo.data.tokenise import own_bos
from dpo.judging.statistics import share_interval
from dpo.loss import Loss, Responses, reward_slopes
from dpo.model.loading import load_tokenizer
from dpo.model.patches import quiet_transformers
from dpo.run.config import Config
from dpo.run.saved import Saved, token_logps
from dpo.tables import aligned
from dpo.utils import log, make_dir, redact, visible
from inspect_data import DIM, RESET, in_colour, pieces
from opening import find_reference, find_saved, hits_of, warn_of_formats
from preference_datasets import REGISTRY, load_data
from settings import data_settings, quoted

GREENS, REDS = (22, 28, 34, 40, 46), (52, 88, 124, 160, 196)  # of a terminal's 256 colours, small to large


@dataclass(frozen=True)
class Item:
    """A record to score: number `number` of `data`, the data set `name`."""

    name: str
    data: PreferenceData
    number: int

    @property
    def record(self) -> Record:
        return self.data[self.number]


# --- Data ---


def load_items(policy: Saved, tokenizer: Any, split: str, own: bool, limit: int | None) -> list[Item]:
    """Return the first `limit` records of each of the configuration's data sets.

    `split` test is everything of data that has no test split, or of the run's `own` data what training held out. Raises
    UserError for what cannot be loaded, for `own` data that has changed, and if single responses come with pairs.
    """
    items: list[Item] = []
    kinds: dict[str, str] = {}
    for name in policy.config.datasets:
        source = _source_of(policy, name, split) if own else {}
        settings = _settings_of(policy.config, name, source.get("path"))
        [place], here, shown = settings.names, split, f"{split} split"
        if split == "test" and find_source(place, settings, split, REGISTRY)[1].held_out:
            if not own:
                here, shown, settings = "train", "all rows", replace(settings, holdout_fraction=0.0)
            elif settings.holdout_fraction == 0:
                raise UserError(f"the run held nothing of {name} out: it trained on all rows; say --split train")
        found = {settings.rows: name} if name in REGISTRY else _kinds(*find_source(place, settings, here, REGISTRY))
        kinds = found | kinds
        if PAIRS in kinds and len(kinds) > 1:
            single = next(kind for kind in kinds if kind != PAIRS)
            raise UserError(f"{kinds[single]} is a single response, but {kinds[PAIRS]} has pairs: score them apart")
        data = load_data(replace(settings, rows=next(iter(found), PAIRS)), tokenizer, here)
        if source and data.sources[0]["digest"] != source["digest"]:
            raise UserError(
                f"{source['path']} has changed since the run read it; give what is to be scored with --data"
            )
        warn_of_formats(policy, data.formats, name)
        lost = [f"{key}: {n}" for key, n in data.funnel[place].items() if n and re.search("dropped|truncated", key)]
        log(", ".join([f"{name}, {shown}: {len(data)} records", *lost]))
        items += [Item(name, data, number) for number in range(len(data))[:limit]]
    return items


def _source_of(policy: Saved, name: str, split: str) -> dict[str, Any]:
    """Return where the run read the data set `name`, and a hash of it; {} if that is not known."""
    sources = policy.state.get("sources") or {}
    found = [source for source in sources.get(split, []) if {"name", "path", "digest"} <= source.keys()]
    return next((source for source in found if source["name"] == name), {})


def _settings_of(config: Config, name: str, path: str | None) -> DataSettings:
    """Return how the data set `name` is read: from `path`, which the run noted, if that is a local one."""
    known = name in REGISTRY
    rows = TARGETS if known and REGISTRY[name].sft_only else PAIRS
    settings = replace(data_settings(config), names=(name,), rows=rows, pair_columns=())
    if path is None or not Path(path).is_absolute():
        return settings
    if not known:
        return replace(settings, names=(path,))
    local = settings.sources.get(name) is not None
    return replace(settings, sources={**settings.sources, name: path}) if local else settings


def _kinds(facts: DataSet, source: Source) -> dict[str, str]:
    """Return kind -> where the first row of it is: pairs, labelled (completions) or targets (others)."""
    kinds: dict[str, str] = {}
    for where, row in itertools.chain.from_iterable(map(numbered_rows, source.chunks())):
        try:
            judged = facts.parse(json.loads(row) if isinstance(row, bytes) else row)
        except Exception:  # load_data will say what is wrong with the row
            continue
        single = LABELLED if judged.label is not None else TARGETS
        kinds.setdefault(single if judged.demonstration else PAIRS, where)
    return kinds


# --- Scores ---


def logps_of(saved: Saved, items: Sequence[Item], who: str) -> list[list[np.ndarray]]:
    """Return the `token_logps` of each item's responses. The model is in memory only for as long as that takes."""
    model, _, how = saved.open()
    wanted = [(item.data, item.number, [*range(len(item.record.responses))]) for item in items]
    found = token_logps(saved.config, model, how, wanted, who)
    del model
    gc.collect()
    torch.cuda.empty_cache()
    return found


def token_rewards(loss: Loss, policy: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return each token's part in the loss's reward of a response, from float64 log-probabilities [n] of its tokens.

    The parts are to first order, and scaled to add up to the reward: if it is linear in log-probabilities, they do
    anyway. A loss without rewards gives the log-ratios.
    """
    sums = [torch.tensor([logps.sum()]) for logps in (policy, reference)]
    response = Responses(sums[0], torch.tensor([max(len(policy), 1)]), sums[1])
    slopes, reward = reward_slopes(loss, response), loss.rewards(response)
    if slopes is None or reward is None:
        return policy - reference
    parts = slopes[0].item() * policy + slopes[1].item() * reference
    return parts * (reward.item() / parts.sum()) if parts.sum() else parts


def rows_of(items: Sequence[Item], policy: Saved, reference: Saved, loss: Loss, tokenizer: Any) -> Iterator[dict]:
    """Yield the lines of the result. Texts are those after truncation; log-probabilities are sums, in nats. A token's
    reward is its part in the response's: 0 if the token does not count."""

    def text(ids: list[int]) -> str:
        return tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def scored(ids: list[int], ours: np.ndarray, theirs: np.ndarray) -> dict[str, Any]:
        counted = ~np.isnan(ours)
        parts = np.zeros(len(ours))
        parts[counted] = token_rewards(loss, ours[counted].astype(np.float64), theirs[counted].astype(np.float64))
        return {
            "text": text(ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids),
            "reward": float(parts.sum()),
            "logp_policy": float(ours[counted].sum(dtype=np.float64)),
            "logp_reference": float(theirs[counted].sum(dtype=np.float64)),
            "token_rewards": parts.tolist(),
            "tokens": pieces(ids, tokenizer),
        }

    n_bos = len(own_bos(tokenizer))
    for item, *logps in zip(items, logps_of(policy, items, "policy"), logps_of(reference, items, "reference")):
        record = item.record
        responses = [scored(*response) for response in zip(record.responses, *logps)]
        row = {"dataset": item.name, "record": item.number, "prompt": text(record.prompt[n_bos:])}
        yield row | {"responses": responses, "pairs": record.pairs}


PairScore = tuple[int, str, float, int]
"""Of a pair: prompt, data set, reward of the preferred minus that of the other, and how many tokens longer it is."""


def accuracy(prompts: np.ndarray, margins: np.ndarray) -> list[str]:
    """Return the numbers of pairs and prompts, how often the preferred response has the higher reward (equal: half),
    with an interval, and the mean margin."""
    hits = hits_of(margins, np.zeros(len(margins)))
    found = share_interval(hits, prompts)
    shown = f"[{found[0]:.3f}, {found[1]:.3f}]" if found else "unknown: 1 prompt"
    return [str(len(hits)), str(len(np.unique(prompts))), f"{hits.mean():.3f}", shown, f"{margins.mean():+.4f}"]


COLUMNS = ["", "pairs", "prompts", "accuracy", "95 % interval", "mean margin"]


def table_of_runs(pairs: Mapping[str, Sequence[PairScore]], losses: Mapping[str, Loss]) -> str:
    """Return a row for each run. Margins of runs with other rewards cannot be compared."""
    rows = [[*COLUMNS, "reward of"]]
    for name, scores in pairs.items():
        prompts, _, margins, _ = map(np.array, zip(*scores)) if scores else [np.array([])] * 4
        found = accuracy(prompts, margins) if scores else ["0", "0", "-", "-", "-"]
        rows.append([visible(name), *found, str(losses[name])])
    return aligned(rows)


def table(pairs: Sequence[PairScore]) -> str:
    """Return the accuracy on all pairs, on those of each data set, and by which response is longer."""
    prompts, names, margins, longer = map(np.array, zip(*pairs))
    groups = {"all": np.ones(len(pairs), dtype=bool)}
    sets = list(dict.fromkeys(names.tolist()))
    if len(sets) > 1:
        groups |= {short: names == name for short, name in zip(short_names(sets), sets)}
    sizes = {"longer": longer > 0, "as long": longer == 0, "shorter": longer < 0}
    groups |= {f"preferred is {size}": there for size, there in sizes.items()}
    rows = [[name, *accuracy(prompts[there], margins[there])] for name, there in groups.items() if there.any()]
    return aligned([COLUMNS, *rows])


# --- Showing and writing ---


def coloured(token: str, value: float, largest: float, colours: bool) -> str:
    """Return a token on green (its `value` is positive) or red, the stronger the larger; without `colours` with its
    value."""
    if not colours:
        return f"{visible(token)}[{value:+.2g}]"
    level = round(5 * abs(value) / largest) if largest else 0
    if not level:
        return visible(token)
    start = f"\033[38;5;{16 if level > 3 else 231};48;5;{(GREENS if value > 0 else REDS)[level - 1]}m"
    return start + visible(token).replace("\n", f"{RESET}\n{start}") + RESET


def show(row: Mapping[str, Any], colours: bool) -> str:
    dim, reset = (DIM, RESET) if colours else ("", "")
    largest = max(abs(value) for response in row["responses"] for value in response["token_rewards"])
    lines = [f"\n--- {visible(row['dataset'])}, record {row['record']}", f"{dim}{visible(row['prompt'])}{reset}"]
    for number, response in enumerate(row["responses"]):
        below = [other for better, other in row["pairs"] if better == number]
        over = f", preferred to {', '.join(map(str, below))}" if below else ""
        lines.append(f"response {number}: reward {response['reward']:+.3g}, {len(response['tokens'])} tokens{over}")
        tokens = zip(response["tokens"], response["token_rewards"])
        lines.append("".join(coloured(token, value, largest, colours) for token, value in tokens))
    return "\n".join(lines)


def write(file: TextIO, rows: Iterable[dict[str, Any]], n_shown: int) -> tuple[list[PairScore], list[float]]:
    """Write `rows`, and show the first. Return the scores of their pairs, and all rewards."""
    pairs, every = [], []
    for number, row in enumerate(rows):
        print(json.dumps(row, ensure_ascii=False), file=file)
        if number < n_shown:
            print(redact(show(row, in_colour())), flush=True)  # which has made it visible; colours stay
        every += [response["reward"] for response in row["responses"]]
        for a, b in ((row["responses"][a], row["responses"][b]) for a, b in row["pairs"]):
            longer = len(a["tokens"]) - len(b["tokens"])
            pairs.append((number, row["dataset"], a["reward"] - b["reward"], longer))
    return pairs, every


def opened(run: str, reference: str | None, data: Sequence[str] | None, overrides: list[str]) -> tuple[Saved, Saved]:
    """Return a run's policy, set to score `data` (None: the run's own), and its reference. Raise UserError."""
    chosen = [f"datasets={quoted(data)}"] if data else []
    policy = find_saved(run, [*overrides, *chosen])
    if not policy.trained and not chosen:
        raise UserError(f"it is not known what {run} was trained on: give --data <files or data sets>")
    return policy, find_reference(policy, reference, overrides)


def score_run(
    name: str, policy: Saved, reference: Saved, given: argparse.Namespace, overrides: list[str], file: TextIO
) -> list[PairScore]:
    """Score a run, write its rows, and say what was found. Return its pairs' scores."""
    tokenizer, loss = load_tokenizer(policy.config), policy.config.loss
    items = load_items(policy, tokenizer, given.split, not given.data, given.limit)
    rows = rows_of(items, policy, reference, loss, tokenizer)
    several = {"run": name} if len(given.runs) > 1 else {}
    pairs, every = write(file, ({**several, **row} for row in rows), given.show)
    known = bool(policy.trained) or any(override.startswith("loss") for override in overrides)
    why = f"loss={loss.name} has none" if known else "the run's loss is not known"
    log(f"\nreward: that of {loss}" if loss.gives_rewards else f"\nreward: log policy / reference ({why})")
    log(f"{len(items)} records, {len(every)} responses, mean reward {np.mean(every):+.4f}: {given.out}")
    log(table(pairs) if pairs else "no pairs: no accuracy")
    return pairs


def main() -> None:
    given, overrides = read_arguments()
    quiet_transformers()
    runs = {name: opened(name, given.reference, given.data, overrides) for name in given.runs}
    make_dir(given.out.parent, "--out")
    temporary = given.out.with_name(f".{given.out.name}.{os.getpid()}")  # --out appears when complete
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            pairs = {name: score_run(name, *models, given, overrides, file) for name, models in runs.items()}
        os.replace(temporary, given.out)
    finally:
        temporary.unlink(missing_ok=True)
    if len(runs) > 1:
        log(f"\n{table_of_runs(pairs, {name: policy.config.loss for name, (policy, _) in runs.items()})}")


if __name__ == "__main__":
    run_main(main)
