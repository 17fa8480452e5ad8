"""From records to batches: the stateless order of examples, prompt trees, and how batches are cut."""

import heapq
import itertools
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import numpy as np

from dpo.data.records import PreferenceData, Record
from dpo.data.sources import RANKED, TARGETS
from dpo.utils import UserError

Example = tuple[int, int]
"""(record, pair of that record). The second is 0 if a record is one example: a target, a completion, a ranking."""

T = TypeVar("T")
BLOCK = 128
EVAL_SEED = 0
"""Evaluation examples do not depend on a run's seed, so that runs can be compared."""


class Records(Protocol):
    """Data of which batches are made."""

    rows: str  # what a loss learns from: see dpo/data/sources.py

    def __getitem__(self, i: int) -> Record: ...


@dataclass(frozen=True)
class Tree:
    """A prompt and the distinct responses that a batch needs, as token ids.

    `masks` tells which tokens of each response count in the loss and in all metrics; None: all do.
    """

    prompt: list[int]
    responses: list[list[int]]
    masks: list[list[bool]] | None = None


def n_tokens(prompt: int, responses: Iterable[int]) -> int:
    """Return the number of tokens to compute for a tree, from its lengths. A response's last token predicts nothing."""
    return prompt + sum(length - 1 for length in responses)


def packed_width(tokens: int) -> int:
    """Round `tokens` up to whole blocks of FlexAttention."""
    return max(-(-tokens // BLOCK), 1) * BLOCK


@dataclass(frozen=True)
class Batch:
    """Trees, and which of their responses form the examples.

    `chosen` and `rejected` hold, for each example, an index into the responses of all trees in turn. `rejected` is None
    if examples are single responses.
    """

    trees: list[Tree]
    chosen: list[int]
    rejected: list[int] | None
    columns: dict[str, list[float]] = field(default_factory=dict)  # of the loss's columns: a value for each example
    ranked: list[list[int]] | None = None  # of rankings: the responses of each example, best first

    def __len__(self) -> int:
        return len(self.chosen)

    def counted(self, longest: int) -> np.ndarray | None:
        """Return which tokens count, bool [responses, longest], in the trees' order; None: all do."""
        if all(tree.masks is None for tree in self.trees):
            return None
        counted = np.ones((sum(len(tree.responses) for tree in self.trees), longest), dtype=bool)
        rows = iter(counted)
        for tree in self.trees:
            for row, mask in zip(rows, tree.masks or [[]] * len(tree.responses)):
                row[: len(mask)] = mask
        return counted


def make_tree(record: Record, responses: Sequence[int]) -> Tree:
    """Return a record's tree with the given `responses`."""
    masks = [record.masks[i] for i in responses] if record.masks is not None else None
    return Tree(record.prompt, [record.responses[i] for i in responses], masks)


def responses_of(data: Records, record: Record, pair: int) -> Sequence[int]:
    """Return the responses that an example needs, as indices of the record's."""
    if data.rows == RANKED:
        return range(len(record.responses))
    return record.pairs[pair] if record.pairs else (0,)


def make_batch(data: Records, examples: Sequence[Example]) -> Batch:
    """Group `examples` by prompt: each prompt stands once, with each response that it needs once."""
    by_record: dict[int, list[int]] = {}
    for position, (record, _) in enumerate(examples):
        by_record.setdefault(record, []).append(position)
    trees: list[Tree] = []
    sides = np.empty((len(examples), 2), dtype=np.int64)
    columns: dict[str, list[float]] = {}
    n_responses, paired = 0, True
    ranked: list[list[int]] | None = [[]] * len(examples) if data.rows == RANKED else None
    for index, positions in by_record.items():
        content = data[index]
        paired = bool(content.pairs)
        wanted = [content.pairs[examples[p][1]] if paired else (0, 0) for p in positions]
        used = sorted({r for p in positions for r in responses_of(data, content, examples[p][1])})
        number = {response: n_responses + k for k, response in enumerate(used)}
        for name, values in content.columns.items():
            column = columns.setdefault(name, [0.0] * len(examples))
            for p in positions:
                column[p] = values[examples[p][1]]
        sides[positions] = [[number[chosen], number[rejected]] for chosen, rejected in wanted]
        if ranked is not None:
            for p in positions:
                ranked[p] = [number[response] for response in used]
        trees.append(make_tree(content, used))
        n_responses += len(used)
    return Batch(trees, sides[:, 0].tolist(), sides[:, 1].tolist() if paired else None, columns, ranked)


class Mismatched:
    """Data of single responses: each example's prompt with the response of an example before it, of another prompt.

    Record i belongs to example i; the first of a batch look back to its last. Examples that find no other prompt are
    left out. `order`: the examples as an array.
    """

    rows = TARGETS

    def __init__(self, data: PreferenceData, *batches: Sequence[Example] | np.ndarray):
        self.data = data
        # int64 [n, 2]: record of the prompt, record of the response
        self.partners = np.concatenate([_partners(data.keys, np.array(batch)) for batch in batches])
        self.order = np.stack([np.arange(len(self.partners)), np.zeros(len(self.partners), np.int64)], axis=1)

    @property
    def examples(self) -> list[Example]:
        return as_examples(self.order)

    def __getitem__(self, i: int) -> Record:
        prompt, other = (self.data[record] for record in self.partners[i].tolist())
        room = self.data.max_length - len(prompt.prompt)
        masks = [mask[:room] for mask in other.masks[:1]] if other.masks is not None else None
        return Record(prompt.prompt, [other.responses[0][:room]], [], masks)


def _partners(keys: np.ndarray, batch: np.ndarray) -> np.ndarray:
    """Return the records of `batch`, [n, 2], that find another prompt in it, and the record found, int64 [n, 2]."""
    records = batch[:, 0]
    others = np.roll(records, 1)
    for i in np.flatnonzero(keys[others] == keys[records]):
        earlier = (records[i - k] for k in range(2, len(records)))
        others[i] = next((other for other in earlier if keys[other] != keys[records[i]]), -1)
    return np.stack([records, others], axis=1)[others >= 0]


def as_examples(order: np.ndarray) -> list[Example]:
    """Return the examples of an array, int [n, 2]."""
    return [(record, pair) for record, pair in order.tolist()]


def epoch_order(data: PreferenceData, seed: int, epoch: int, weights: Sequence[float] | None = None) -> np.ndarray:
    """Return one epoch's examples in order, int [examples, 2]: record, pair. Depends on (seed, epoch) alone.

    Prompts are shuffled. The pairs of a prompt stay together, so that a batch can share its computation. `weights`
    holds the passes over each of `data.names`: 2 takes every prompt twice, 0.5 a fresh random half.
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
    """Which examples a run trains on: `batch_size` at a time, until `n_epochs` or `n_examples` is reached (None: no
    limit). The last batch of an epoch and of the run may be smaller: no example is left out."""

    seed: int
    batch_size: int
    n_epochs: int | None
    n_examples: int | None
    weights: Sequence[float] | None = None

    def batches(self, data: PreferenceData) -> Iterator[list[Example]]:
        """Yield the run's global batches, each a list of examples."""
        return map(as_examples, self.arrays(data))

    def arrays(self, data: PreferenceData) -> Iterator[np.ndarray]:
        """Yield the run's global batches, each int [n, 2], a part of its epoch's order."""
        epoch, seen = 0, 0
        while self.n_epochs is None or epoch < self.n_epochs:
            order = epoch_order(data, self.seed, epoch, self.weights)
            if not len(order):
                return
            for start in range(0, len(order), self.batch_size):
                left = self.batch_size if self.n_examples is None else self.n_examples - seen
                batch = order[start : start + min(self.batch_size, left)]
                if not len(batch):
                    return
                seen += len(batch)
                yield batch
            epoch += 1

    def batches_after(self, data: PreferenceData, examples: int) -> Iterator[list[Example]]:
        """Yield the global batches after the run's first `examples` examples. Raise UserError if none ends there."""
        seen = 0
        for batch in self.batches(data):
            if seen >= examples:
                yield batch
            seen += len(batch)
            if seen - len(batch) < examples < seen:
                raise UserError(
                    f"the data has changed: no batch ends after {examples} examples, so this run cannot resume"
                )

    def size(self, data: PreferenceData) -> tuple[int, int]:
        """Return the whole run's numbers of examples and of optimizer steps."""
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
    """Return the first `n` examples of the evaluation order, or all if there are fewer."""
    return as_examples(epoch_order(data, EVAL_SEED, 0)[:n])


@dataclass(frozen=True)
class Cut:
    """How a global batch is cut: at least `passes` forward passes of `ranks` processes, each of up to `tokens` tokens
    with padding (None: no limit), in the layout `packed`, `tree` or `padded`."""

    layout: str
    ranks: int
    passes: int
    tokens: int | None
    rank: int | None = None
    """This process's number among the `ranks`; None if the cut is not one process's."""

    def groups(self, prompt: int, responses: Sequence[int], items: Sequence[Sequence[int]], n: int) -> Iterator[range]:
        """Cut one prompt's `items`, each a set of its responses, into runs whose trees fit a micro-batch.

        A run's tree has up to `tokens` tokens, and a run at most a micro-batch's share of the `n` items of the global
        batch. `prompt` and `responses` are lengths in tokens. An item that alone is too long is left whole.
        """
        most = -(-n // (self.passes * self.ranks))
        limit = sys.maxsize if self.tokens is None else self.tokens
        start, used = 0, set[int]()
        for stop, item in enumerate(items):
            grown = used | set(item)
            if stop > start and (stop - start == most or self._tree_tokens(prompt, responses, grown) > limit):
                yield range(start, stop)
                start, grown = stop, set(item)
            used = grown
        if items:
            yield range(start, len(items))

    def _tree_tokens(self, prompt: int, responses: Sequence[int], used: Iterable[int]) -> int:
        """Return the tokens, with padding, of a micro-batch of one tree."""
        lengths = [responses[i] for i in used]
        if self.layout == "padded":
            return len(lengths) * n_tokens(prompt, [max(lengths)])
        return n_tokens(prompt, lengths)

    def deal(self, sizes: Sequence[tuple[int, list[int]]]) -> list[list[list[int]]]:
        """Return [pass][rank] -> indices of `sizes`, each the length of a prompt and those of its responses.

        The micro-batches of a pass are about equal work, and the rows of one about equally long. An empty micro-batch
        still takes part in its pass. A tree of more than `tokens` is left whole.
        """
        if self.layout == "padded":
            items = [_Item(i, len(rest), n_tokens(prompt, [max(rest)])) for i, (prompt, rest) in enumerate(sizes)]
        else:
            trees = [n_tokens(*size) for size in sizes]
            # A packed row has no padding: each token counts as a row of length 1.
            items = [_Item(i, n, 1) if self.layout == "packed" else _Item(i, 1, n) for i, n in enumerate(trees)]
        items.sort(key=lambda item: (-item.length, -item.rows))
        limit = self.tokens or sys.maxsize
        if self.ranks > 1 or self.tokens is None:
            parts = self._share_out(items, limit)
        else:
            smallest = _smallest_limit(items, self.passes) if self.passes > 1 else limit
            parts = _least_padding(items, min(limit, smallest))
        parts.sort(key=lambda part: -_tokens(part))
        indices = [[item.index for item in part] for part in parts]
        return [[*ranks, *([[]] * (self.ranks - len(ranks)))] for ranks in chunks(indices, self.ranks)]

    def _share_out(self, items: Sequence["_Item"], limit: int) -> list[list["_Item"]]:
        """Cut `items` (longest first) into micro-batches of about equal tokens, up to `limit`, in few passes."""
        passes = max(self.passes, -(-len(_fill(items, limit)) // self.ranks))
        if self.layout != "packed":  # neighbours in length go together, for little padding
            return _fill(items, min(limit, _smallest_limit(items, passes * self.ranks)))
        while True:
            parts = _even(items, passes * self.ranks)
            if all(_tokens(part) <= limit for part in parts if len(part) > 1):
                return parts
            passes += 1


def deal(data: Records, examples: Sequence[Example], cut: Cut) -> list[list[list[Example]]]:
    """Cut a global batch into micro-batches, [pass][rank] -> examples. A prompt's pairs stay together if they fit."""
    groups: list[Sequence[Example]] = []
    sizes: list[tuple[int, list[int]]] = []
    for index, run in itertools.groupby(examples, key=lambda example: example[0]):
        record, members = data[index], list(run)
        prompt, responses = len(record.prompt), [*map(len, record.responses)]
        sides = [responses_of(data, record, pair) for _, pair in members]
        for group in cut.groups(prompt, responses, sides, len(examples)):
            used = {response for i in group for response in sides[i]}
            groups.append(members[group.start : group.stop])
            sizes.append((prompt, [responses[r] for r in used]))
    return [[[e for i in part for e in groups[i]] for part in dealt] for dealt in cut.deal(sizes)]


@dataclass(frozen=True)
class _Item:
    index: int
    rows: int
    length: int


def _tokens(part: Sequence[_Item]) -> int:
    """Return the tokens of a micro-batch with padding. Its first item is the longest."""
    return sum(item.rows for item in part) * part[0].length


def _even(items: Sequence[_Item], n: int) -> list[list[_Item]]:
    """Put each item, largest first, into the emptiest of `n` micro-batches. Return those that got one."""
    parts: list[list[_Item]] = [[] for _ in range(n)]
    loads = [(0, number) for number in range(n)]
    for item in items:
        load, number = heapq.heappop(loads)
        parts[number].append(item)
        heapq.heappush(loads, (load + item.rows * item.length, number))
    return [part for part in parts if part]


def _smallest_limit(items: Sequence[_Item], most: int) -> int:
    """Return the smallest limit of tokens with which `items` fit into `most` micro-batches."""
    low, high = max(map(_tokens, zip(items))), sum(item.rows for item in items) * items[0].length
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_fill(items, middle)) <= most else (middle + 1, high)
    return low


def _fill(items: Sequence[_Item], limit: int) -> list[list[_Item]]:
    """Cut `items` (longest first) into as few micro-batches of up to `limit` tokens as possible."""
    parts: list[list[_Item]] = []
    rows = 0
    for item in items:
        rows += item.rows
        if parts and rows * parts[-1][0].length <= limit:
            parts[-1].append(item)
        else:
            parts.append([item])
            rows = item.rows
    return parts


def _least_padding(items: Sequence[_Item], limit: int) -> list[list[_Item]]:
    """Cut `items` (longest first) into micro-batches of up to `limit` tokens with the least padding in all.

    Dynamic programming over the start of the last micro-batch. Each micro-batch also costs limit / 128 tokens, about
    what adding up its gradients takes, so that short items are not computed one by one.
    """
    cost, starts = [0.0], [0]
    for stop in range(1, len(items) + 1):
        best, rows = (math.inf, 0), 0
        for start in range(stop - 1, -1, -1):
            rows += items[start].rows
            tokens = rows * items[start].length
            if tokens > limit and start < stop - 1:
                break
            best = min(best, (cost[start] + tokens + limit / 128, start))
        cost.append(best[0])
        starts.append(best[1])
    parts: list[list[_Item]] = []
    stop = len(items)
    while stop:
        parts.append(list(items[starts[stop] : stop]))
        stop = starts[stop]
    return parts


def chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Cut `items` into runs of `size`; the last may be shorter."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
