"""What preferences look like before training: lengths, what "the longer wins" gets, contradictions, near duplicates."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from dpo.data.cache import cached, digest
from dpo.data.records import PreferenceData
from dpo.data.sources import PAIRS

FORMAT = 1  # of the cached results
GRAM = 6  # tokens that are compared together
SKETCH = 24  # grams of a prompt that stand for it: those with the lowest hashes
NEAR = 0.8  # of the grams of a sketch that a near duplicate shares
COMMON = 64  # a gram of more training prompts is a phrase of the data
RECORDS_AT_ONCE, HASH_BITS = 2**13, np.uint64(51)  # a record and a hash together are 64 bits


def diagnose(train: PreferenceData, test: PreferenceData | None, cache_dir: Path) -> dict[str, Any]:
    """Return facts of each split, and how many test prompts nearly equal one of training. Cached by content."""
    identities = [FORMAT, train.identity, test.identity if test is not None else None]

    def build(folder: Path) -> None:
        splits = {"train": train, **({"test": test} if test is not None else {})}
        facts: dict[str, Any] = {name: facts_of(data) for name, data in splits.items()}
        if test is not None:
            facts["near duplicates"] = int(near_duplicates(train, test).sum())
        (folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")

    folder = cached(cache_dir, f"facts-{digest(identities)}", build)
    facts: dict[str, Any] = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    return facts


def facts_of(data: PreferenceData) -> dict[str, Any]:
    """Return counts of prompts and tokens (after truncation); of pairs also the lengths of both sides, the share in
    which the longer wins (as long: half a win), and how many pairs prefer what another of the same prompt does not."""
    prompts, counts, responses = data.lengths()
    facts: dict[str, Any] = {"prompts": len(data), "examples": int(data.n_examples.sum())}
    facts["tokens"] = {"prompt": _spread(prompts), "response": _spread(responses)}
    if data.rows == PAIRS:
        pairs, records = data.pairs()
        first = (np.cumsum(counts) - counts)[records]
        chosen, rejected = (responses[first + pairs[:, side]] for side in (0, 1))
        wins = (chosen > rejected) + 0.5 * (chosen == rejected)
        most = int(counts.max())
        stated, opposite = ((records * most + a) * most + b for a, b in (pairs.T, pairs.T[::-1]))
        facts |= {"chosen": _spread(chosen), "rejected": _spread(rejected), "longer wins": float(wins.mean())}
        facts["contradictions"] = int(np.isin(stated, opposite).sum())
    return facts


def _spread(lengths: np.ndarray) -> dict[str, float]:
    """Return mean, median, 95th percentile, largest and sum of lengths in tokens."""
    quantiles = {"median": float(np.median(lengths)), "p95": float(np.percentile(lengths, 95))}
    return {"mean": float(lengths.mean()), **quantiles, "max": int(lengths.max()), "sum": int(lengths.sum())}


def near_duplicates(train: PreferenceData, test: PreferenceData) -> np.ndarray:
    """Return which prompts of `test` nearly equal one of `train`, bool [test records]; equal ones count, too.

    Prompts are compared by sketches (Broder 1997, "On the resemblance and containment of documents"): of all runs of
    GRAM tokens those SKETCH with the lowest hashes. Near: NEAR of a sketch is in the other's.
    """
    grams, owners = _sketches(train)
    common, counts = np.unique(grams, return_counts=True)
    wanted, theirs = _sketches(test)
    sizes = np.bincount(theirs, minlength=len(test))
    wanted_here = ~np.isin(wanted, common[counts > COMMON])
    wanted, theirs = wanted[wanted_here], theirs[wanted_here]
    order = np.argsort(grams, kind="stable")
    grams, owners = grams[order], owners[order]
    start, stop = np.searchsorted(grams, wanted, "left"), np.searchsorted(grams, wanted, "right")
    n = stop - start
    at = np.repeat(start - (np.cumsum(n) - n), n) + np.arange(n.sum())
    met, shared = np.unique(np.repeat(theirs, n) * len(train) + owners[at], return_counts=True)
    mine = met // len(train)
    near = np.isin(np.arange(len(test)), mine[shared >= NEAR * sizes[mine]])
    return near | np.isin(test.keys, train.keys)


def _sketches(data: PreferenceData) -> tuple[np.ndarray, np.ndarray]:
    """Return the grams that stand for each prompt, uint64 [n], and the records that they are of, int64 [n]. A prompt of
    fewer than GRAM tokens is one gram."""
    grams, owners = [], []
    for first in range(0, len(data), RECORDS_AT_ONCE):
        ids, counts = data.prompt_ids(first, first + RECORDS_AT_ONCE)
        record = np.repeat(np.arange(len(counts)), counts)
        hashes, n = np.zeros(len(ids), np.uint64), len(ids)
        padded = np.concatenate([ids, np.zeros(GRAM, ids.dtype)]).astype(np.uint64)
        same = np.concatenate([record, np.full(GRAM, -1)])
        whole = same[GRAM - 1 : n + GRAM - 1] == record  # the gram that starts here lies in one prompt
        whole[(np.cumsum(counts) - counts)[(counts > 0) & (counts < GRAM)]] = True
        for k in range(GRAM):
            inside = same[k : n + k] == record
            token = np.where(inside, padded[k : n + k] + np.uint64(1), np.uint64(0))
            hashes = (hashes ^ token) * np.uint64(0x9E3779B97F4A7C15)
            hashes ^= hashes >> np.uint64(29)
        keys = np.unique(record[whole].astype(np.uint64) << HASH_BITS | hashes[whole] >> (np.uint64(64) - HASH_BITS))
        records = (keys >> HASH_BITS).astype(np.int64)
        kept = np.arange(len(records)) - np.searchsorted(records, records) < SKETCH
        grams.append(keys[kept] & (np.uint64(1) << HASH_BITS) - np.uint64(1))
        owners.append(records[kept] + first)
    return np.concatenate(grams), np.concatenate(owners)


def describe(facts: dict[str, Any]) -> str:
    """Return the facts for people, a few lines."""
    lines = []
    for split in ("train", "test"):
        if (found := facts.get(split)) is None:
            continue
        prompt, response = (found["tokens"][side] for side in ("prompt", "response"))
        line = f"{split}: {prompt['sum'] + response['sum']:,} tokens; median {prompt['median']:.0f} of a prompt"
        if "chosen" in found:
            sides = "/".join(f"{found[side]['median']:.0f}" for side in ("chosen", "rejected"))
            line += f", {sides} of chosen/rejected; the longer wins {found['longer wins']:.1%} of "
            line += f"{found['examples']:,} pairs"
            if found["contradictions"]:
                line += f"; {found['contradictions']} pairs contradict each other"
        else:
            line += f", {response['median']:.0f} of a response"
        lines.append(line)
    if n := facts.get("near duplicates"):
        lines.append(f"{n} of {facts['test']['prompts']} test prompts equal a training prompt, or nearly")
    return "\n".join(lines)
