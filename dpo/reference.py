"""Log-probabilities of the frozen reference: the policy before its first update, or reference.archive.

They are computed once, before training, and kept in files under what they depend on: the model's
weights and configuration, the type of matrix products, and the token ids of prompt and response as they are after
truncation. Another beta, loss, learning rate, seed or layout reads the same entries; nothing else can.
"""

import contextlib
import functools
import hashlib
import json
import math
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import xxhash
from torch import Tensor
from transformers import PreTrainedModel

from dpo import parallel
from dpo.data.batching import Batch, Cut, Example, Records, Tree, make_tree, responses_of
from dpo.model.adapters import Starting, computed_by
from dpo.model.logps import Computation, TokenLogps, next_token_logps, response_logps
from dpo.stored import StoredReference, as_keys, entry_key
from dpo.utils import UserError, log, make_dir, progress

STRETCH = 65_536  # trees that are Python objects at a time
KEY_VERSION = 2
"""Version of `model_key`. Raise it if the key changes: a key of another version must not name the same folder."""
# Parts of a model's configuration that say nothing about what it computes.
NOT_COMPUTED = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "use_cache")


class LiveReference:
    """A frozen model in memory, computed on the same rows and in the same precision as the policy: a second one, or the
    policy itself with its adapter as it was in the beginning (`starting`)."""

    def __init__(self, model: PreTrainedModel, how: Computation, starting: Starting | None = None):
        self.model = model if starting is not None else model.requires_grad_(False).eval()
        self.how, self.starting = how, starting

    @contextlib.contextmanager
    def _frozen(self) -> Iterator[PreTrainedModel]:
        """Give the model inside the block. There are no gradients, as nothing requires one; under `no_grad` tensor
        parallelism would take other kernels than the policy's."""
        with self.starting() if self.starting is not None else contextlib.nullcontext():
            yield self.model
        if self.starting is None:  # else the policy's own passes follow
            parallel.reshard(self.model)

    def response_logps(self, batch: Batch) -> TokenLogps:
        """Return log-probabilities as `dpo.model.logps.response_logps` does."""
        with self._frozen() as model:
            found = response_logps(model, batch, self.how)
        assert not found.logps.requires_grad
        return found

    def next_token_logps(self, batch: Batch, how: Computation) -> Tensor:
        """Return the reference's log p of every token of the vocabulary, [n, vocabulary]. `how`: the policy's."""
        with torch.no_grad(), self._frozen() as model:
            found, _ = next_token_logps(model, batch, how)
        return found


class Reference(Protocol):
    """Gives the frozen reference's log-probabilities."""

    def response_logps(self, batch: Batch) -> TokenLogps: ...


def model_key(model: PreTrainedModel, how: Computation) -> str:
    """Return a name for what a model computes: its weights bit by bit, an adapter's too unless it adds nothing, its
    configuration, and the type of matrix products.

    A collective: process i hashes every n-th tensor, by XXH3, in a tenth of BLAKE2's time. The same for any sharding.
    """
    left_out = set(model.all_tied_weights_keys or {})
    mine: dict[str, str] = {}
    tensors, adapter = computed_by(model)
    for turn, (name, tensor) in enumerate(sorted(tensors.items())):
        if name in left_out:
            continue
        whole = parallel.full(tensor)
        if turn % parallel.world_size() == parallel.rank():
            content = whole.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
            mine[name] = f"{whole.dtype} {tuple(whole.shape)} {xxhash.xxh3_128_hexdigest(content)}"
    weights = {name: digest for found in parallel.gather(mine) for name, digest in found.items()}
    config = {key: value for key, value in model.config.to_dict().items() if key not in NOT_COMPUTED}
    parts = [KEY_VERSION, weights, config, str(how.dtype), *([adapter] if adapter else [])]
    described = json.dumps(parts, sort_keys=True, default=lambda v: sorted(v) if isinstance(v, set) else str(v))
    return hashlib.sha256(described.encode()).hexdigest()[:24]


WantedTree = tuple[Records, int, list[int]]
"""Data, a record of it, and the numbers of responses of that record."""


@dataclass(frozen=True)
class Wanted:
    """Responses of which log-probabilities are wanted, as trees: arrays, as there may be millions.

    A tree is of record `records[i]` of `data[sources[i]]`, and of the next `counts[i]` of `responses`.
    """

    data: tuple[Records, ...]
    sources: np.ndarray  # int32 [trees]
    records: np.ndarray  # int64 [trees]
    counts: np.ndarray  # int32 [trees]
    responses: np.ndarray  # int32 [sum of counts]

    @classmethod
    def of(cls, trees: Iterable[WantedTree]) -> "Wanted":
        """Return `trees` as arrays."""
        data: dict[int, Records] = {}
        numbers: dict[int, int] = {}
        columns = array("i"), array("q"), array("i"), array("i")
        for some, record, responses in trees:
            data[id(some)] = some
            for column, value in zip(columns, (numbers.setdefault(id(some), len(numbers)), record, len(responses))):
                column.append(value)
            columns[3].extend(responses)
        return cls(tuple(data.values()), *map(np.array, columns))

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        return self.sources, self.records, self.counts, self.responses

    @functools.cached_property
    def starts(self) -> np.ndarray:
        """The first of each tree's `responses`, int64 [trees]."""
        return np.cumsum(self.counts, dtype=np.int64) - self.counts

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> WantedTree:
        start = self.starts[i]
        responses = self.responses[start : start + self.counts[i]].tolist()
        return self.data[self.sources[i]], int(self.records[i]), responses

    def __add__(self, other: "Wanted") -> "Wanted":
        moved = other.sources + np.int32(len(self.data)), *other.arrays[1:]
        return Wanted(self.data + other.data, *map(np.concatenate, zip(self.arrays, moved)))

    def only(self, kept: np.ndarray) -> "Wanted":
        """Return the part of the responses that is `kept`, bool [responses]."""
        tree = np.repeat(np.arange(len(self)), self.counts)[kept]
        counts = np.bincount(tree, minlength=len(self)).astype(np.int32)
        left = counts > 0
        return Wanted(self.data, self.sources[left], self.records[left], counts[left], self.responses[kept])


def shared(n: int, work: Callable[[range], Sequence[np.ndarray]]) -> list[np.ndarray]:
    """Return the arrays that `work` gives for range(n), joined from parts of up to STRETCH. A collective: each process
    does its share of the range, and gets those of all."""
    rank, size = (parallel.rank(), parallel.world_size()) if parallel.active() else (0, 1)
    mine = range(n * rank // size, n * (rank + 1) // size)
    parts = [work(mine[start : start + STRETCH]) for start in range(0, max(len(mine), 1), STRETCH)]
    every = parallel.gather([np.concatenate(arrays) for arrays in zip(*parts)])
    return [np.concatenate(arrays) for arrays in zip(*every)]


def wanted_by(data: Records, examples: Sequence[Example] | np.ndarray) -> Wanted:
    """Return the responses that `examples`, [n, 2], need: a tree for each record, in the order of first occurrence. A
    collective."""
    records, pairs = np.asarray(examples, dtype=np.int64).reshape(-1, 2).T
    width = int(pairs.max(initial=0)) + 1
    needed = np.unique(records * width + pairs)
    distinct, first = np.unique(records, return_index=True)
    starts, order = np.searchsorted(needed, distinct * width), np.argsort(first)
    ends = np.append(starts[1:], len(needed))

    def trees(part: range) -> Iterator[WantedTree]:
        for i in order[part.start : part.stop].tolist():
            record = int(distinct[i])
            content = data[record]
            mine = (needed[starts[i] : ends[i]] % width).tolist()
            yield data, record, sorted({r for pair in mine for r in responses_of(data, content, pair)})

    return Wanted((data,), *shared(len(order), lambda part: Wanted.of(trees(part)).arrays))


def build_reference(
    model: PreTrainedModel,
    how: Computation,
    cut: Cut,
    folder: Path,
    wanted: Wanted,
    agreed: Callable[[StoredReference], bool] = lambda reference: False,
) -> StoredReference:
    """Return the entries that a run wants: read from `folder`, or computed by `model` and added to it.

    A collective: the processes share the work, sorted by length over the whole run. Raise UserError if entries of
    the folder are not what `model` computes; one is computed again, unless it is known that they `agreed`.
    """
    folder = make_dir(folder / model_key(model, how), "cache_dir")
    reference = StoredReference(folder)
    reference.read()
    there = stored_of(wanted, reference)
    present, missing = wanted.only(there), wanted.only(~there)
    n_missing, n_present = len(missing.responses), len(present.responses)
    if n_present and not agreed(reference):
        _check(model, how, reference, _tree(*_fitting(Wanted.of([present[len(present) // 2]]), cut)[0][0]))
    cut = replace(cut, passes=math.ceil(cut.passes * n_missing / max(n_missing + n_present, 1)) or 1)
    log(f"reference log-probabilities: {n_missing} to compute, {n_present} found in {folder}")
    with progress(total=n_missing, desc="reference", unit="responses") as bar:
        for _, tree, rows in tree_logps(model, how, missing, cut):
            for response, (entry, _) in zip(tree.responses, rows, strict=True):
                reference.add(entry_key(tree.prompt, response), entry)
            bar.update(len(tree.responses) * cut.ranks)
    reference.write()
    parallel.gather(None)
    reference.read()
    return reference


def _tree(data: Records, record: int, responses: list[int]) -> Tree:
    return make_tree(data[record], responses)


def stored_of(wanted: Wanted, reference: StoredReference) -> np.ndarray:
    """Return which of the wanted responses are in the store, bool [responses]. A collective."""

    def look(part: range) -> list[np.ndarray]:
        trees = (_tree(*wanted[i]) for i in part)
        keys = as_keys([entry_key(tree.prompt, response) for tree in trees for response in tree.responses])
        return [reference.find(keys)["file"] >= 0]

    return shared(len(wanted), look)[0]


def _fitting(wanted: Wanted, cut: Cut) -> tuple[Wanted, np.ndarray, np.ndarray]:
    """Return `wanted`, with each prompt's responses on as many trees as fit into micro-batches, and the tokens of the
    trees' prompts, int32 [trees], and of the responses, int32 [responses]. A collective."""
    n = len(wanted.responses)

    def fit(part: range) -> list[np.ndarray]:
        origins, counts, prompts, lengths = array("q"), array("i"), array("i"), array("i")
        for i in part:
            tree = _tree(*wanted[i])
            sizes = [*map(len, tree.responses)]
            lengths.extend(sizes)
            for group in cut.groups(len(tree.prompt), sizes, [(k,) for k in range(len(sizes))], n):
                origins.append(i)
                counts.append(len(group))
                prompts.append(len(tree.prompt))
        return [*map(np.array, (origins, counts, prompts, lengths))]

    origins, counts, prompts, lengths = shared(len(wanted), fit)
    fitting = Wanted(wanted.data, wanted.sources[origins], wanted.records[origins], counts, wanted.responses)
    return fitting, prompts, lengths


def _stretches(fitting: Wanted, prompts: np.ndarray, lengths: np.ndarray, padded: bool) -> Iterator[np.ndarray]:
    """Yield the numbers of the trees, up to STRETCH at a time: what deals them out makes objects of each. If there are
    more, the stretches go from the longest to the shortest."""
    trees = np.arange(len(fitting))
    if len(trees) > STRETCH:
        if padded:
            sizes = prompts + np.maximum.reduceat(lengths, fitting.starts)
        else:
            sizes = prompts + np.add.reduceat(lengths, fitting.starts) - fitting.counts
        trees = np.argsort(-sizes, kind="stable")
    yield from (trees[start : start + STRETCH] for start in range(0, len(trees), STRETCH))


@torch.no_grad()
def tree_logps(
    model: PreTrainedModel, how: Computation, wanted: Wanted, cut: Cut
) -> Iterator[tuple[WantedTree, Tree, list[tuple[np.ndarray, np.ndarray]]]]:
    """Yield this process's share of `wanted`, a tree that fits into a micro-batch at a time. A collective.

    With each tree come, for each of its responses, the tokens' float32 log-probabilities in nats and which of them
    count: two of shape [tokens].
    """
    fitting, prompts, lengths = _fitting(wanted, cut)
    for stretch in _stretches(fitting, prompts, lengths, cut.layout == "padded"):
        parts = (lengths[fitting.starts[i] :][: fitting.counts[i]].tolist() for i in stretch)
        sizes = [*zip(prompts[stretch].tolist(), parts, strict=True)]
        for shares in replace(cut, passes=-(-cut.passes * len(stretch) // len(fitting))).deal(sizes):
            mine = [fitting[stretch[i]] for i in shares[parallel.data_rank(model)]]
            trees = [_tree(*which) for which in mine or [fitting[stretch[shares[0][0]]]]]
            tokens = response_logps(model, Batch(trees, [], None), how)
            rows = zip(tokens.logps.cpu().numpy(), tokens.mask.cpu().numpy())
            for which, tree in zip(mine, trees):
                yield which, tree, [(ls[: len(r)].copy(), m[: len(r)]) for r, (ls, m) in zip(tree.responses, rows)]


@torch.no_grad()
def _check(model: PreTrainedModel, how: Computation, reference: StoredReference, tree: Tree) -> None:
    """Raise UserError unless the entries of `tree` are what `model` computes, up to rounding."""
    batch = Batch([tree], [], None)
    computed, stored = response_logps(model, batch, how), reference.response_logps(batch)
    gaps = (computed.logps.cpu() - stored.logps).abs()[stored.mask]
    difference = float(gaps.mean()) if len(gaps) else 0.0  # a lone token, with nothing before it, has none
    if not computed.logps[computed.mask].isfinite().all():
        raise UserError(
            f"the reference's log-probabilities are not finite: the model overflows in {how.dtype}, or is damaged. "
            "Compute in float32 or bfloat16 (mixed_precision)"
        )
    if not difference <= how.tolerance:  # NaN among them
        raise UserError(
            f"the reference log-probabilities in {reference.folder} differ from those this model computes by "
            f"{difference:.3g} nats per token (allowed for rounding: {how.tolerance}): remove the folder, or set "
            "reference.mode=live"
        )
