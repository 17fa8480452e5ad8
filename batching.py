"""From records to batches: the stateless order of examples, prompt trees, and how a tree is laid on a model's rows."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from preference_datasets import PreferenceData
from utils import UserError

Example = tuple[int, int]
"""(record, pair of that record); in SFT the second is 0: the record's one target."""

T = TypeVar("T")
IGNORED = -100
EVAL_SEED = 0
"""The evaluation examples are the same whatever a run's seed, so that runs can be compared."""


@dataclass(frozen=True)
class Tree:
    """A prompt and those of its distinct responses that a batch needs, as token ids."""

    prompt: list[int]
    responses: list[list[int]]


@dataclass(frozen=True)
class Batch:
    """Trees, and which of their responses form the examples.

    `chosen` and `rejected` hold, for each example, a response's index in the trees' responses counted through;
    `rejected` is None in SFT.
    """

    trees: list[Tree]
    chosen: list[int]
    rejected: list[int] | None

    def __len__(self) -> int:
        return len(self.chosen)


def make_batch(data: PreferenceData, examples: Sequence[Example]) -> Batch:
    """Group `examples` by prompt: each prompt stands once, with each of its needed responses once."""
    by_record: dict[int, list[int]] = {}
    for position, (record, _) in enumerate(examples):
        by_record.setdefault(record, []).append(position)
    trees: list[Tree] = []
    sides = np.empty((len(examples), 2), dtype=np.int64)
    n_responses, paired = 0, True
    for index, positions in by_record.items():
        content = data[index]
        paired = bool(content.pairs)
        wanted = [content.pairs[examples[p][1]] if paired else (0, 0) for p in positions]
        used = sorted({response for pair in wanted for response in pair})
        number = {response: n_responses + k for k, response in enumerate(used)}
        sides[positions] = [[number[chosen], number[rejected]] for chosen, rejected in wanted]
        trees.append(Tree(content.prompt, [content.responses[response] for response in used]))
        n_responses += len(used)
    return Batch(trees, sides[:, 0].tolist(), sides[:, 1].tolist() if paired else None)


@dataclass(frozen=True)
class PaddedRows:
    """The `padded` layout: one row for each response, prompt + response, padded on the right.

    All are int64 of shape [responses, longest row]. `labels` holds the token ids of responses and IGNORED elsewhere.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


def padded(batch: Batch) -> PaddedRows:
    """Lay a batch out as one row a response. This layout works for every model and defines what others must equal."""
    rows = [(tree.prompt, response) for tree in batch.trees for response in tree.responses]
    width = max(len(prompt) + len(response) for prompt, response in rows)
    shape = (len(rows), width)
    input_ids = torch.zeros(shape, dtype=torch.long)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORED, dtype=torch.long)
    for row, (prompt, response) in enumerate(rows):
        start, stop = len(prompt), len(prompt) + len(response)
        input_ids[row, :stop] = torch.tensor(prompt + response)
        attention_mask[row, :stop] = 1
        labels[row, start:stop] = torch.tensor(response)
    return PaddedRows(input_ids, attention_mask, labels)


def epoch_order(data: PreferenceData, seed: int, epoch: int, weights: Sequence[float] | None = None) -> np.ndarray:
    """Every example of one epoch in its order, a function of (seed, epoch) alone. Shape [examples, 2]: record, pair.

    Prompts are shuffled; the pairs of a prompt stay together, so that a batch can share its computation. `weights`
    gives how many times each of `data.names` is passed over: 2 takes every prompt twice, 0.5 a fresh random half.
    """
    rng = np.random.default_rng([seed, epoch])
    passes = [1.0] * len(data.names) if weights is None else weights
    chosen: list[np.ndarray] = []
    for source, weight in enumerate(passes):
        records = np.flatnonzero(data.source == source)
        whole, part = divmod(weight, 1.0)
        chosen += [records] * int(whole)
        chosen.append(rng.permutation(records)[: round(part * len(records))])
    order = np.concatenate(chosen)
    rng.shuffle(order)
    counts = data.n_examples[order]
    first = np.cumsum(counts) - counts
    pair = np.arange(counts.sum()) - np.repeat(first, counts)
    return np.stack([np.repeat(order, counts), pair], axis=1)


@dataclass(frozen=True)
class Plan:
    """Which examples a run trains on: `batch_size` at a time, until `n_epochs` or `n_examples` ends, the first that
    does (None: no such end). The last batch of an epoch, and of the run, may be smaller; nothing is left out."""

    seed: int
    batch_size: int
    n_epochs: int | None
    n_examples: int | None
    weights: Sequence[float] | None = None

    def batches(self, data: PreferenceData) -> Iterator[list[Example]]:
        """The run's global batches, each a list of examples."""
        epoch, seen = 0, 0
        while self.n_epochs is None or epoch < self.n_epochs:
            order = epoch_order(data, self.seed, epoch, self.weights)
            if not len(order):
                return
            for start in range(0, len(order), self.batch_size):
                left = self.batch_size if self.n_examples is None else self.n_examples - seen
                batch = [(int(r), int(p)) for r, p in order[start : start + min(self.batch_size, left)]]
                if not batch:
                    return
                seen += len(batch)
                yield batch
            epoch += 1

    def batches_after(self, data: PreferenceData, examples: int) -> Iterator[list[Example]]:
        """The global batches that are left after those with the first `examples` examples of the run."""
        seen = 0
        for batch in self.batches(data):
            if seen >= examples:
                yield batch
            seen += len(batch)
            if seen - len(batch) < examples < seen:
                raise UserError(
                    f"the data has changed: no batch of this run ends after {examples} examples, to go on from"
                )

    def size(self, data: PreferenceData) -> tuple[int, int]:
        """(examples, optimizer steps) of the whole run."""
        examples, steps, epoch = 0, 0, 0
        while self.n_epochs is None or epoch < self.n_epochs:
            whole = int(data.n_examples.sum())
            size = whole if self.weights is None else len(epoch_order(data, self.seed, epoch, self.weights))
            if not size:
                break
            if self.n_examples is not None:
                size = min(size, self.n_examples - examples)
            examples, steps, epoch = examples + size, steps + -(-size // self.batch_size), epoch + 1
            if self.n_examples is not None and examples >= self.n_examples:
                break
        return examples, steps


def eval_examples(data: PreferenceData, n: int) -> list[Example]:
    """The first `n` examples of the evaluation order (all, where there are fewer)."""
    return [(int(record), int(pair)) for record, pair in epoch_order(data, EVAL_SEED, 0)[:n]]


def deal(data: PreferenceData, examples: Sequence[Example], passes: int, ranks: int) -> list[list[list[Example]]]:
    """Cut a global batch into at most `passes` forward passes of `ranks` processes: [pass][rank] -> examples.

    Examples of a prompt stay together where the shares allow it. Sorted by length and cut so that the largest
    micro-batch computes as few tokens as it can, those of one pass being about equally large. An empty one still has
    to make the pass.
    """
    shares = passes * ranks
    if shares == 1:
        return [[list(examples)]]
    groups = sorted(_groups(data, examples, -(-len(examples) // shares)), key=lambda g: -g.longest)
    low, high = max(g.rows * g.longest for g in groups), sum(g.rows for g in groups) * groups[0].longest
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_fill(groups, middle)) <= shares else (middle + 1, high)
    parts = _fill(groups, low)
    parts.sort(key=lambda part: -sum(g.rows for g in part) * part[0].longest)
    dealt = [[example for g in part for example in g.examples] for part in parts]
    return [[*some, *([[]] * (ranks - len(some)))] for some in chunks(dealt, ranks)]


@dataclass(frozen=True)
class _Group:
    examples: Sequence[Example]
    rows: int
    longest: int


def _groups(data: PreferenceData, examples: Sequence[Example], most: int) -> Iterator[_Group]:
    """Runs of up to `most` examples of one prompt, with their rows in the padded layout."""
    for index, run in itertools.groupby(examples, key=lambda example: example[0]):
        record = data[index]
        for some in chunks(list(run), most):
            used = {response for _, pair in some for response in (record.pairs[pair] if record.pairs else (0,))}
            yield _Group(some, len(used), len(record.prompt) + max(len(record.responses[r]) for r in used))


def _fill(groups: Sequence[_Group], capacity: int) -> list[list[_Group]]:
    """Consecutive `groups` (longest first) in as few parts as `capacity`, in tokens with padding, allows."""
    parts: list[list[_Group]] = []
    rows = 0
    for g in groups:
        if parts and (rows + g.rows) * parts[-1][0].longest <= capacity:
            parts[-1].append(g)
            rows += g.rows
        else:
            parts.append([g])
            rows = g.rows
    return parts


def chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Cut `items` into runs of `size`; the last may be shorter."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
