"""Measure what a stored reference of many pairs takes of a machine's memory and time.

    python benchmarks/reference_scale.py --pairs 250000 1000000 --nproc 8 --out benchmarks/reference_scale.md

A synthetic store has two responses a pair. A group of processes does what a run does at its start, without the model:
deal the examples, list the responses it wants, open the store, find out which of them are there. Then each process
looks up batches. Memory is RssAnon of /proc/self/status, the pages that belong to one process alone, beyond what the
interpreter has; its peak is sampled every 10 ms. Pages of files are shared, and taken back when memory is short.
Growth is the slope between the two numbers of pairs.
"""

import argparse
import json
import re
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from benchmark import machine
from dpo import parallel
from dpo.data.batching import Batch, Plan, Tree
from dpo.data.records import Record
from dpo.reference import stored_of, wanted_by
from dpo.stored import StoredReference, entry_key
from dpo.tables import markdown

PROMPT, RESPONSE = 64, 128  # tokens
PER_FILE = 20_000  # pairs
BATCH, BATCHES = 64, 200  # pairs; batches that each process looks up
TARGET = 10_000_000, 8  # pairs, processes


class Pairs:
    """Records of a prompt and two responses, made when they are read."""

    rows, names = "pairs", ("synthetic",)

    def __init__(self, n: int):
        self.n_examples, self.source = np.ones(n, np.int64), np.zeros(n, np.int64)

    def __getitem__(self, i: int) -> Record:
        return Record([i] * PROMPT, [[i] * RESPONSE, [i + 1] * RESPONSE], [(0, 1)])


def entries(pairs: range) -> Iterator[tuple[bytes, np.ndarray]]:
    data = Pairs(0)
    for record in map(data.__getitem__, pairs):
        for response in record.responses:
            yield entry_key(record.prompt, response), np.full(RESPONSE, -record.prompt[0] % 7, np.float32)


def write(folder: Path, pairs: int) -> None:
    for first in range(0, pairs, PER_FILE):
        store = StoredReference(folder)
        store._new.update(entries(range(first, min(first + PER_FILE, pairs))))
        store.write()


def private() -> float:
    """Return this process's own memory in MiB."""
    found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def dictionary(pairs: int) -> float:
    """Return the MiB of what one process held before: a dictionary of all entries, and what is wanted as tuples."""
    before = private()
    held = dict(entries(range(pairs))), [[(i + 0, 0)] for i in range(pairs)], [(0, i + 0, [0, 1]) for i in range(pairs)]
    assert len(held[0]) == 2 * pairs
    return private() - before


def measure(folder: Path, out: Path, pairs: int) -> None:
    """Write what each step took in this process of a group: {step: [seconds, MiB after it, peak MiB in it]}."""
    with parallel.group(torch.device("cpu")):
        data: Any = Pairs(pairs)
        before, steps, ended = private(), {}, threading.Event()
        peak, start = before, time.perf_counter()

        def sample() -> None:
            nonlocal peak
            while not ended.wait(0.01):
                peak = max(peak, private())

        def note(step: str, n: int = 1) -> None:
            nonlocal peak, start
            steps[step] = [(time.perf_counter() - start) / n, private() - before, max(peak, private()) - before]
            parallel.gather(None)
            peak, start = private(), time.perf_counter()

        thread = threading.Thread(target=sample)
        thread.start()
        batches = list(Plan(0, BATCH, 1, None).arrays(data))
        note("deal the examples")
        wanted = wanted_by(data, np.concatenate(batches))
        note("list what is wanted")
        store = StoredReference(folder)
        store.read()
        note("open the store")
        assert stored_of(wanted, store).all() and len(store) == 2 * pairs
        note("find what is there")
        mine = (batch[:, 0].tolist() for batch in batches[parallel.rank() :: parallel.world_size()][:BATCHES])
        ready = [Batch([Tree(data[i].prompt, data[i].responses) for i in records], [], None) for records in mine]
        before += private() - before - steps["find what is there"][1]  # batches are not what is measured
        peak, start = private(), time.perf_counter()
        for step in ("look a batch up, first time", "look a batch up, again"):
            for batch in ready:
                store.response_logps(batch)
            note(step, len(ready))
        ended.set()
        thread.join()
        (out / f"{parallel.rank()}.json").write_text(json.dumps(steps))


def run(folder: Path, pairs: int, nproc: int) -> dict[str, np.ndarray]:
    """Return step -> float [processes, 3], see `measure`."""
    with tempfile.TemporaryDirectory() as out:
        parallel.launch(measure, (folder, Path(out), pairs), nproc, None)
        found = [json.loads(path.read_text()) for path in sorted(Path(out).iterdir())]
    return {step: np.array([steps[step] for steps in found]) for step in found[0]}


def table(pairs: int, first: dict[str, np.ndarray], steps: dict[str, np.ndarray]) -> list[str]:
    rows = [[f"{pairs:,} pairs", "seconds", "MiB of a process after it", "peak MiB, sum of all processes"]]
    for step, values in steps.items():
        if step == "open the store":
            new = first[step]
            rows.append([f"{step}, all files new", f"{new[:, 0].max():.3g}", "", f"{new[:, 2].sum():.0f}"])
        seconds, after, peak = values[:, 0].max(), values[:, 1].mean(), values[:, 2].sum()
        rows.append([step, f"{seconds:.3g}", f"{after:.0f}", f"{peak:.0f}"])
    return [*markdown(rows), ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs=2, default=(250_000, 1_000_000))
    parser.add_argument("--nproc", type=int, default=8)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    lines, held, peaks, before = [], [], [], []
    for pairs in given.pairs:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            parallel.apart(write, folder, pairs)
            gib = sum(path.stat().st_size for path in folder.iterdir()) / 2**30
            first, steps = (run(folder, pairs, given.nproc) for _ in range(2))
        lines += [f"{gib:.2f} GiB of log-probabilities, {given.nproc} processes.", "", *table(pairs, first, steps)]
        held.append(max(values[:, 1].max() for values in steps.values()))
        peaks.append(max(values[:, 2].sum() for values in [*first.values(), *steps.values()]) / given.nproc)
        before.append(parallel.apart(dictionary, pairs))
    growth = (TARGET[0] - given.pairs[1]) / (given.pairs[1] - given.pairs[0])
    sizes = [f"{n:,} pairs" for n in given.pairs]
    rows = [["MiB of a process", *sizes, f"{TARGET[0]:,} pairs, extrapolated", f"{TARGET[1]} of these, GiB"]]
    for what, values in (("this", held), ("this, at its peak", peaks), ("dictionary and tuples, before", before)):
        there = values[1] + growth * (values[1] - values[0])
        shown = [f"{value:.0f}" for value in [*values, there]]
        rows.append([what, *shown, f"{there * TARGET[1] / 1024:.1f}"])
    lines += markdown(rows)
    command = f"`python benchmarks/reference_scale.py --pairs {given.pairs[0]} {given.pairs[1]} --nproc {given.nproc}`"
    head = ["# A stored reference of many pairs", "", f"{command}; the method stands in the script.", ""]
    text = "\n".join([*head, *(f"- {key}: {value}" for key, value in machine().items()), "", *lines, ""])
    print(text)
    if given.out:
        given.out.write_text(text)


if __name__ == "__main__":
    main()
