"""Log-probabilities of the frozen reference: the policy before its first update, or reference.archive.

They are computed once, before training, and kept in files under what they depend on: the model's
weights and configuration, the type of matrix products, and the token ids of prompt and response as they are after
truncation. Another beta, loss, learning rate, seed or layout reads the same entries; nothing else can.
"""

import contextlib
import hashlib
import json
import math
import os
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load, save
from torch import Tensor
from transformers import PreTrainedModel

from dpo import parallel
from dpo.data.batching import Batch, Cut, Example, Records, Tree, make_tree, responses_of
from dpo.model.adapters import Starting, computed_by
from dpo.model.logps import Computation, TokenLogps, next_token_logps, response_logps
from dpo.utils import UserError, log, make_dir, progress

SECONDS_PER_SHARD = 60.0
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


class StoredReference:
    """Entries of float32 log-probabilities, one for each response, read from the files of a folder.

    A file is called by the hash of its content and written under another name first, so that several processes, jobs
    and interrupted runs can add to a folder: what is there under its right name is complete.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.entries: dict[bytes, np.ndarray] = {}
        self._new: dict[bytes, np.ndarray] = {}
        self._written = time.monotonic()
        self._read: set[str] = set()

    def read(self) -> None:
        """Take in the files that have come since the last time; one that is damaged is removed."""
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name in self._read:
                continue
            try:
                content = path.read_bytes()
            except FileNotFoundError:  # another process found it damaged
                continue
            try:
                if _hash(content) != path.stem:
                    raise ValueError
                shard = load(content)
            except (SafetensorError, ValueError):
                log(f"{path} is damaged; its log-probabilities are computed again")
                path.unlink(missing_ok=True)
                continue
            self._read.add(path.name)
            ends = np.cumsum(shard["lengths"])[:-1]
            keys = (key.tobytes() for key in shard["keys"])
            self.entries.update(zip(keys, np.split(shard["logps"], ends), strict=True))

    def add(self, key: bytes, logps: np.ndarray) -> None:
        self._new[key] = logps
        if time.monotonic() - self._written > SECONDS_PER_SHARD:
            self.write()

    def write(self) -> None:
        """Put the entries added since the last time into a file. Raise UserError if the disk refuses."""
        if self._new:
            shard: dict[str, np.ndarray] = {
                "keys": np.frombuffer(b"".join(self._new), dtype=np.uint8).reshape(len(self._new), -1),
                "lengths": np.array([len(logps) for logps in self._new.values()], dtype=np.int32),
                "logps": np.concatenate(list(self._new.values())),
            }
            content = save(shard)
            temporary = self.folder / f".{uuid.uuid4().hex}"
            try:
                with open(temporary, "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                temporary.rename(self.folder / f"{_hash(content)}.safetensors")
            except OSError as error:
                temporary.unlink(missing_ok=True)
                raise UserError(
                    f"reference log-probabilities cannot be written to {self.folder}: {error}; free space, set "
                    "cache_dir, or set reference.mode=live"
                ) from error
        self._new, self._written = {}, time.monotonic()

    def response_logps(self, batch: Batch) -> TokenLogps:
        """Return log-probabilities as `dpo.model.logps.response_logps` does, from the entries."""
        found = [self.entries[entry_key(tree.prompt, r)] for tree in batch.trees for r in tree.responses]
        starts = [0 if tree.prompt else 1 for tree in batch.trees for _ in tree.responses]
        logps = torch.zeros(len(found), max(map(len, found)))
        mask = torch.zeros(logps.shape, dtype=torch.bool)
        for i, (first, entry) in enumerate(zip(starts, found, strict=True)):
            logps[i, : len(entry)] = torch.from_numpy(entry)
            mask[i, first : len(entry)] = True
        return TokenLogps(logps, mask).of(batch)


class Reference(Protocol):
    """Gives the frozen reference's log-probabilities."""

    def response_logps(self, batch: Batch) -> TokenLogps: ...


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def entry_key(prompt: Sequence[int], response: Sequence[int]) -> bytes:
    """Return 16 bytes that stand for these token ids, split here."""
    ids = np.array([len(prompt), *prompt, *response], dtype=np.int32)
    return hashlib.blake2b(ids.tobytes(), digest_size=16).digest()


def model_key(model: PreTrainedModel, how: Computation) -> str:
    """Return a name for what a model computes: its weights bit by bit, an adapter's too unless it adds nothing, its
    configuration, and the type of matrix products.

    A collective: process i hashes every n-th tensor. The same for any sharding.
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
            mine[name] = f"{whole.dtype} {tuple(whole.shape)} {hashlib.blake2b(content, digest_size=32).hexdigest()}"
    weights = {name: digest for found in parallel.gather(mine) for name, digest in found.items()}
    config = {key: value for key, value in model.config.to_dict().items() if key not in NOT_COMPUTED}
    parts = [weights, config, str(how.dtype), *([adapter] if adapter else [])]
    described = json.dumps(parts, sort_keys=True, default=lambda v: sorted(v) if isinstance(v, set) else str(v))
    return hashlib.sha256(described.encode()).hexdigest()[:24]


Wanted = tuple[Records, int, list[int]]
"""Data, a record of it, and responses of that record."""


def wanted_by(data: Records, examples: Iterable[Example]) -> list[Wanted]:
    """Return the responses that `examples` need, by record."""
    needed: dict[int, set[int]] = {}
    for record, pair in examples:
        needed.setdefault(record, set()).add(pair)
    wanted: list[Wanted] = []
    for record, pairs in needed.items():
        content = data[record]
        wanted.append((data, record, sorted({r for pair in pairs for r in responses_of(data, content, pair)})))
    return wanted


def build_reference(
    model: PreTrainedModel, how: Computation, cut: Cut, folder: Path, wanted: Sequence[Wanted]
) -> StoredReference:
    """Return the entries that a run wants: read from `folder`, or computed by `model` and added to it.

    A collective: the processes share the work, sorted by length over the whole run. Raise UserError if entries of
    the folder are not what `model` computes.
    """
    folder = make_dir(folder / model_key(model, how), "cache_dir")
    reference = StoredReference(folder)
    reference.read()
    there = parallel.from_main(set(reference.entries))
    reference.read()  # what other jobs may have added before the main process looked
    present, missing = _split(wanted, there)
    n_missing, n_present = (sum(len(responses) for *_, responses in some) for some in (missing, present))
    if present:
        _check(model, how, reference, _tree(*_fitting(present[len(present) // 2 :][:1], cut)[0][0]))
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


def _split(wanted: Sequence[Wanted], there: set[bytes]) -> tuple[list[Wanted], list[Wanted]]:
    """Return the part of `wanted` that is there, and the part that is not."""
    present: list[Wanted] = []
    missing: list[Wanted] = []
    for data, record, responses in wanted:
        tree = _tree(data, record, responses)
        found = [entry_key(tree.prompt, response) in there for response in tree.responses]
        for some, value in ((present, True), (missing, False)):
            if value in found:
                some.append((data, record, [r for r, f in zip(responses, found) if f is value]))
    return present, missing


def _fitting(wanted: Sequence[Wanted], cut: Cut) -> tuple[list[Wanted], list[tuple[int, list[int]]]]:
    """Return `wanted`, with each prompt's responses on as many trees as fit into micro-batches, and the trees' lengths
    as `Cut.deal` takes them."""
    fitting: list[Wanted] = []
    sizes: list[tuple[int, list[int]]] = []
    n = sum(len(responses) for *_, responses in wanted)
    for data, record, responses in wanted:
        tree = _tree(data, record, responses)
        prompt, lengths = len(tree.prompt), [*map(len, tree.responses)]
        for group in cut.groups(prompt, lengths, [(i,) for i in range(len(lengths))], n):
            fitting.append((data, record, [responses[i] for i in group]))
            sizes.append((prompt, [lengths[i] for i in group]))
    return fitting, sizes


@torch.no_grad()
def tree_logps(
    model: PreTrainedModel, how: Computation, wanted: Sequence[Wanted], cut: Cut
) -> Iterator[tuple[Wanted, Tree, list[tuple[np.ndarray, np.ndarray]]]]:
    """Yield this process's share of `wanted`, a tree that fits into a micro-batch at a time.

    With each tree come, for each of its responses, the tokens' float32 log-probabilities in nats and which of them
    count: two of shape [tokens].
    """
    fitting, sizes = _fitting(wanted, cut)
    for shares in cut.deal(sizes) if sizes else []:
        mine = shares[parallel.data_rank(model)]
        trees = [_tree(*fitting[i]) for i in mine or shares[0][:1]]
        tokens = response_logps(model, Batch(trees, [], None), how)
        rows = zip(tokens.logps.cpu().numpy(), tokens.mask.cpu().numpy())
        for i, tree in zip(mine, trees):
            yield fitting[i], tree, [(ls[: len(r)].copy(), m[: len(r)]) for r, (ls, m) in zip(tree.responses, rows)]


@torch.no_grad()
def _check(model: PreTrainedModel, how: Computation, reference: StoredReference, tree: Tree) -> None:
    """Raise UserError unless the entries of `tree` are what `model` computes, up to rounding."""
    batch = Batch([tree], [], None)
    computed, stored = response_logps(model, batch, how), reference.response_logps(batch)
    difference = float((computed.logps.cpu() - stored.logps).abs()[stored.mask].mean())
    if difference > how.tolerance:
        raise UserError(
            f"the reference log-probabilities in {reference.folder} differ from those this model computes by "
            f"{difference:.3g} nats per token (allowed for rounding: {how.tolerance}): remove the folder, or set "
            "reference.mode=live"
        )
