"""Reference log-probabilities on disk: files of entries that are mapped into memory, and an index that finds them.

Processes of one machine share the pages that they map, and the system takes them back if memory is short. So a process
holds none of the entries, however many there are.
"""

import contextlib
import functools
import hashlib
import json
import os
import time
import uuid
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from safetensors.numpy import save

from dpo import parallel
from dpo.data.batching import Batch
from dpo.files import atomic_write
from dpo.model.logps import TokenLogps
from dpo.utils import UserError, file_hash, log

SECONDS_PER_SHARD = 60.0
MOST_MAPPED = 16_384  # files that a process maps at once; Linux allows 65,530
SECONDS_OF_A_WRITE = 86_400  # a hidden file that is older was left by a job that was killed
VERIFIED = "verified.json"
# States of a file. CHECKED: whole, and its entries have checksums. UNCHECKED: whole, without checksums, so that it is
# hashed at each start. GONE: another job removed it meanwhile.
STATES = CHECKED, UNCHECKED, DAMAGED, GONE = "checked", "unchecked", "damaged", "gone"
TYPES = {"F32": np.float32, "I32": np.int32, "U32": np.uint32, "U8": np.uint8}
KEY = np.dtype("V16")
PLACE = np.dtype([("file", "<i4"), ("length", "<i4"), ("start", "<i8"), ("check", "<u4")])
"""Where an entry is: the number of its file (-1: in none), tokens, first token in the file, and its `entry_check`."""
Shard = dict[str, np.ndarray]
"""keys uint8 [n, 16]; lengths int32 [n]; logps float32 [sum of lengths]; checks uint32 [n], not in older files."""


def entry_key(prompt: Sequence[int], response: Sequence[int]) -> bytes:
    """Return 16 bytes that stand for these token ids, split here."""
    ids = np.array([len(prompt), *prompt, *response], dtype=np.int32)
    return hashlib.blake2b(ids.tobytes(), digest_size=16).digest()


def entry_check(key: bytes, logps: np.ndarray) -> int:
    """Return a checksum by which an entry is checked each time it is read."""
    return zlib.crc32(key + logps.tobytes())


def as_keys(keys: Sequence[bytes]) -> np.ndarray:
    """Return `keys` as an array, KEY [n]."""
    return np.frombuffer(b"".join(keys), KEY)


class StoredReference:
    """Entries of float32 log-probabilities, one for each response, in the files of a folder.

    A file is called by the hash of its content and written under another name first, so that several processes, jobs
    and interrupted runs can add to a folder: what is there under its right name is complete. A file's hash is checked
    when the file is met for the first time or has changed since, an entry's checksum whenever it is looked up.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._new: dict[bytes, np.ndarray] = {}
        self._written = time.monotonic()
        self._files: list[str] = []
        self._indices: list[tuple[np.ndarray, np.ndarray]] = []  # of each `read`: sorted KEY [n], their PLACE [n]
        self._shard = functools.lru_cache(MOST_MAPPED)(lambda name: read_shard(folder / name))

    def __len__(self) -> int:
        return sum(len(keys) for keys, _ in self._indices)

    # Reading ---------------------------------------------------------------------------------------------------------

    def read(self) -> None:
        """Take in the files that have come since the last time; one that is damaged is removed.

        A collective: the processes share the work, and take in the same files. Raise UserError if the disk is full.
        """
        names, unknown = parallel.from_main(self._come() if parallel.is_main() else ([], []))
        mine = unknown[parallel.rank() :: parallel.world_size()]
        found = parallel.gather([(name, *_verify(self.folder / name)) for name in mine])
        states = {name: state for some in found for name, state, _ in some}
        for name in unknown:
            if states[name] == DAMAGED:
                log(f"{self.folder / name} is damaged; its log-probabilities are computed again")
        verified = {name: stat for some in found for name, state, stat in some if state == CHECKED}
        if verified and parallel.is_main():
            with contextlib.suppress(OSError):  # they are verified again
                atomic_write(self.folder / VERIFIED, json.dumps(self._known() | verified), self._hidden())
        names = [name for name in names if states.get(name) not in (DAMAGED, GONE)]
        if names:
            self._add_index(names)

    def _come(self) -> tuple[list[str], list[str]]:
        """Return the files that have come since the last time, and those of them that must be verified."""
        for path in self.folder.glob(".*"):
            if path.name.startswith(".nfs"):  # the file system's: another job has such a file open
                continue
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > SECONDS_OF_A_WRITE:
                    path.unlink()
        names = sorted({path.name for path in self.folder.glob("*.safetensors")}.difference(self._files))
        known = self._known()
        return names, [name for name in names if known.get(name) != _stat(self.folder / name)]

    def _known(self) -> dict[str, list[int]]:
        """Return the `_stat` of files when they were last verified."""
        try:
            known = json.loads((self.folder / VERIFIED).read_bytes())
        except (OSError, ValueError):
            return {}
        return known if isinstance(known, dict) else {}

    def _hidden(self) -> Path:
        return self.folder / f".{uuid.uuid4().hex}"

    def _add_index(self, names: list[str]) -> None:
        """Write the index of the files `names`, map it, and unlink it. The first process of each machine writes; all of
        the machine map one file."""
        path = self.folder / f".{parallel.from_main(uuid.uuid4().hex)}-{os.uname().nodename}"
        with parallel.one_per_machine_first():
            if not path.exists():
                self._put(path, self._places(names))
            content = _mapped(path)
        parallel.gather(None)  # all have mapped it
        path.unlink(missing_ok=True)
        n = len(content) // (KEY.itemsize + PLACE.itemsize)
        self._files += names
        self._indices.append((content[: n * KEY.itemsize].view(KEY), content[n * KEY.itemsize :].view(PLACE)))

    def _places(self, names: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return the keys of the files `names`, sorted, KEY [n], and where their entries are, PLACE [n]."""
        keys, places = [], []
        for number, name in enumerate(names, len(self._files)):
            shard = self._open(name)
            place = np.zeros(len(shard["keys"]), PLACE)
            place["file"], place["length"] = number, shard["lengths"]
            place["start"] = np.cumsum(shard["lengths"], dtype=np.int64) - shard["lengths"]
            place["check"] = shard["checks"] if "checks" in shard else _checks(shard)
            keys.append(np.ascontiguousarray(shard["keys"]).view(KEY).reshape(-1))
            places.append(place)
        joined = np.concatenate(keys)
        order = np.argsort(joined, kind="stable")  # of equal keys, that of the last file is found
        return joined[order], np.concatenate(places)[order]

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Return where the entries of `keys`, KEY [n], are: PLACE [n], of file -1 for those that are not there."""
        places = np.zeros(len(keys), PLACE)
        places["file"] = -1
        for known, where in self._indices:
            at = np.searchsorted(known, keys, "right") - 1
            found = known[at] == keys
            places[found] = where[at[found]]
        return places

    def look_up(self, keys: Sequence[bytes]) -> list[np.ndarray]:
        """Return entries of `keys`, each float32 [tokens], in nats. Raise UserError if one is missing or damaged."""
        return [self._entry(key, *place) for key, place in zip(keys, self.find(as_keys(keys)).tolist(), strict=True)]

    def _entry(self, key: bytes, file: int, length: int, start: int, check: int) -> np.ndarray:
        if file < 0:
            raise UserError(
                f"{self.folder} has no log-probabilities of a response that training needs: the data has changed since "
                "the start. Start again, and they are computed"
            )
        logps = self._open(self._files[file])["logps"][start : start + length]
        if len(logps) != length or entry_check(key, logps) != check:
            raise self._damaged(self._files[file])
        return logps

    def _open(self, name: str) -> Shard:
        try:
            return self._shard(name)
        except OSError as error:
            raise UserError(f"{self.folder / name} cannot be read: {error}; start again") from error
        except (ValueError, KeyError):
            raise self._damaged(name) from None

    def _damaged(self, name: str) -> UserError:
        (self.folder / name).unlink(missing_ok=True)
        return UserError(
            f"{self.folder / name} was damaged after it was verified, and is removed. Start again (resume=auto): its "
            "log-probabilities are computed again"
        )

    def response_logps(self, batch: Batch) -> TokenLogps:
        """Return log-probabilities as `dpo.model.logps.response_logps` does, from the entries."""
        found = self.look_up([entry_key(tree.prompt, r) for tree in batch.trees for r in tree.responses])
        starts = [0 if tree.prompt else 1 for tree in batch.trees for _ in tree.responses]
        logps = torch.zeros(len(found), max(map(len, found)))
        mask = torch.zeros(logps.shape, dtype=torch.bool)
        for row, (first, entry) in enumerate(zip(starts, found, strict=True)):
            logps.numpy()[row, : len(entry)] = entry
            mask[row, first : len(entry)] = True
        return TokenLogps(logps, mask).of(batch)

    # Writing ---------------------------------------------------------------------------------------------------------

    def add(self, key: bytes, logps: np.ndarray) -> None:
        self._new[key] = logps
        if time.monotonic() - self._written > SECONDS_PER_SHARD:
            self.write()

    def write(self) -> None:
        """Put the entries added since the last time into a file. Raise UserError if the disk refuses."""
        if self._new:
            shard: Shard = {
                "keys": np.frombuffer(b"".join(self._new), dtype=np.uint8).reshape(len(self._new), -1),
                "lengths": np.array([len(logps) for logps in self._new.values()], dtype=np.int32),
                "checks": np.array([entry_check(*entry) for entry in self._new.items()], dtype=np.uint32),
                "logps": np.concatenate(list(self._new.values())),
            }
            content = save(shard)
            self._put(self.folder / shard_name(content), [np.frombuffer(content, np.uint8)])
        self._new, self._written = {}, time.monotonic()

    def _put(self, path: Path, content: Iterable[np.ndarray]) -> None:
        """Write arrays to a file that appears at `path` when it is complete. Raise UserError if the disk refuses."""
        try:
            atomic_write(path, (part.data for part in content), self._hidden())
        except OSError as error:
            raise UserError(
                f"reference log-probabilities cannot be written to {self.folder}: {error}; free space, set "
                "cache_dir, or set reference.mode=live"
            ) from error


def shard_name(content: bytes) -> str:
    """Return the name of the file of this content."""
    return _named(hashlib.sha256(content).hexdigest())


def _named(digest: str) -> str:
    return f"{digest[:32]}.safetensors"


def read_shard(path: Path) -> Shard:
    """Map a file of entries. Raise OSError if it cannot be read, and ValueError or KeyError if it holds no entries."""
    content = _mapped(path)
    end = 8 + int.from_bytes(content[:8].tobytes(), "little")
    shard = {}
    for name, tensor in json.loads(content[8:end].tobytes()).items():
        if name != "__metadata__":
            first, last = tensor["data_offsets"]
            shard[name] = content[end + first : end + last].view(TYPES[tensor["dtype"]]).reshape(tensor["shape"])
    if not len(shard["keys"]) == len(shard["lengths"]) or shard["lengths"].sum() != len(shard["logps"]):
        raise ValueError(f"{path}: lengths that do not match")
    return shard


def _mapped(path: Path) -> np.ndarray:
    """Return a file's bytes, mapped for reading, uint8 [n]. The file does not stay open. Raise OSError."""
    with pa.memory_map(str(path)) as file:
        return np.frombuffer(file.read_buffer(), np.uint8)


def _checks(shard: Shard) -> list[int]:
    """Return the `entry_check` of each entry of a file that has none."""
    entries = np.split(shard["logps"], np.cumsum(shard["lengths"])[:-1])
    return [entry_check(key.tobytes(), logps) for key, logps in zip(shard["keys"], entries, strict=True)]


def _stat(path: Path) -> list[int]:
    """Return what changes if a file is written to; [] if there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return []
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _verify(path: Path) -> tuple[str, list[int]]:
    """Return a file's state, one of STATES, and its `_stat` before that was looked at. Remove it if it is damaged."""
    stat = _stat(path)
    try:
        if _named(file_hash(path)) != path.name:
            raise ValueError
        return CHECKED if "checks" in read_shard(path) else UNCHECKED, stat
    except FileNotFoundError:
        return GONE, stat
    except (ValueError, KeyError):
        path.unlink(missing_ok=True)
        return DAMAGED, stat
