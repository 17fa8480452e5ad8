"""Memory-mapped Arrow files, built by several processes in cache folders that later runs reuse.

A cache folder's name holds a `digest` of all that its content depends on. Its manifest holds a hash of every file. They
are compared each time the folder is opened: a damaged folder is built again, and never read.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import multiprocessing.util
import os
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import xxhash
from filelock import FileLock

from dpo.utils import UserError, end_with_parent, file_hash_once, log, n_cores

T = TypeVar("T")


class ArrowRows:
    """Rows of Arrow files. They stay on disk: the operating system maps in what is read."""

    def __init__(self, *paths: Path):
        self.table = pa.concat_tables([self._mapped(path) for path in paths])  # copies nothing
        self.batches = self.table.to_batches()
        self.starts = np.cumsum([0] + [batch.num_rows for batch in self.batches])

    @staticmethod
    def _mapped(path: Path) -> pa.Table:
        try:
            return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path}: damaged ({error}); delete {path.parent} to build it again") from error

    def __len__(self) -> int:
        return int(self.starts[-1])

    def row(self, i: int) -> pa.RecordBatch:
        """Return row `i` as a batch of one."""
        number = int(np.searchsorted(self.starts, i, side="right")) - 1
        return self.batches[number].slice(i - int(self.starts[number]), 1)


def write_arrow(path: Path, schema: pa.Schema, batches: Iterable[tuple[pa.RecordBatch, Any]], bar: Any) -> list[Any]:
    """Write batches to an Arrow file; return the second of each pair. A generator `batches` is closed on failure."""
    extras = []
    with contextlib.ExitStack() as stack:
        if hasattr(batches, "close"):  # a generator may hold a pool of processes
            stack.callback(batches.close)
        stack.enter_context(bar)
        file = stack.enter_context(pa.OSFile(str(path), "wb"))
        writer = stack.enter_context(pa.ipc.new_file(file, schema))
        for batch, extra in batches:
            writer.write_batch(batch)
            extras.append(extra)
            bar.update(batch.num_rows)
    return extras


def parallel(function: Callable[[Any], T], chunks: Iterable[Any], num_proc: int) -> Iterator[T]:
    """`map(function, chunks)` over processes, in order. Few chunks are in flight, so memory does not grow.

    Raises what `function` raises, and UserError if a process dies. No process outlives the generator.
    """
    chunks = iter(chunks)
    first = list(itertools.islice(chunks, 2))
    chunks = itertools.chain(first, chunks)
    n_workers = num_proc or n_cores()
    if n_workers == 1 or len(first) < 2:
        yield from map(function, chunks)
        return
    import torch
    from torch.utils.data import DataLoader

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")  # more processes than cores
        loader: Any = DataLoader(
            _Function(function),  # type: ignore[arg-type]
            batch_size=None,
            sampler=chunks,  # its "indices" are the chunks
            num_workers=n_workers,
            collate_fn=_unchanged,
            multiprocessing_context="fork" if sys.platform == "linux" else "spawn",
            worker_init_fn=functools.partial(_start_worker, os.getpid()),
            generator=torch.Generator(),  # the default one would be advanced
        )
    results = iter(loader)
    # At the end of this process, too, and before its daemons are killed: torch would make an error of that.
    close = multiprocessing.util.Finalize(None, results._shutdown_workers, exitpriority=1)
    try:
        for succeeded, value in results:
            if not succeeded:
                raise value
            yield value
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError("a data worker was killed, most likely for want of memory; set num_proc lower") from error
    finally:
        close()


def _unchanged(value: Any) -> Any:
    return value


class _Function:
    """A function as a data set: indexing calls it. It returns exceptions, which a DataLoader would rewrite."""

    def __init__(self, function: Callable[[Any], Any]):
        self.function = function

    def __getitem__(self, chunk: Any) -> tuple[bool, Any]:
        try:
            return True, self.function(chunk)
        except Exception as error:
            error.add_note(traceback.format_exc())
            return False, error


def _start_worker(parent: int, worker: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with_parent(parent)


def digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:20]


MANIFEST = "cache_manifest.json"  # checkpoints have a manifest.json of another form
LOCKS = ".locks"  # a subfolder


def cached(cache_dir: Path, name: str, build: Callable[[Path], None]) -> Path:
    """Return the folder `cache_dir/name`. If it is missing or damaged, `build(temporary folder)` makes it.

    It gets its name once it is complete and on disk. Of two processes that want it, one builds and the other waits.
    Raises UserError if it cannot be written.
    """
    final = cache_dir / name
    _remove_leftovers(cache_dir)
    if damage(final) is None:
        return final
    try:
        with _lock(cache_dir, name):
            if (problem := damage(final)) is None:  # another process built it meanwhile
                return final
            if os.path.lexists(final):
                log(f"{final} is damaged: {problem}; it is built again")
            part = cache_dir / f".{name}.part"
            _remove(part)
            part.mkdir()
            try:
                build(part)
                _seal(part, name)
                _remove(final)
                part.rename(final)
            finally:
                _remove(part)
    except OSError as error:
        raise UserError(f"the cache {cache_dir} cannot be written ({error}); free space or set cache_dir") from error
    return final


def _lock(cache_dir: Path, name: str, timeout: float = -1) -> Any:
    """Return the lock for building a folder."""
    (cache_dir / LOCKS).mkdir(parents=True, exist_ok=True)
    return FileLock(cache_dir / LOCKS / f"{name}.lock", timeout)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _remove_leftovers(cache_dir: Path) -> None:
    """Remove unfinished folders of processes that have died: their locks are free."""
    for folder in cache_dir.glob(".*.part"):
        with contextlib.suppress(OSError), _lock(cache_dir, folder.name[1:-5], timeout=0):
            _remove(folder)


def damage(folder: Path) -> str | None:
    """Return what is wrong with a cache folder's files, by its manifest; None if nothing is.

    Every byte is hashed each time: sizes and times would not show a damaged disk. XXH3 hashes about 10 GB a second,
    faster than the files are read.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = dict(manifest["files"])
        if manifest != _manifest(folder.name, files):
            return f"{MANIFEST} is damaged, or of another folder"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    for name, wanted in files.items():
        try:
            if _hash(folder / name) != wanted:
                return f"{name} has been altered"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    unknown = sorted(set(_names(folder)) - {*files, MANIFEST})
    return f"{unknown[0]} is not in {MANIFEST}" if unknown else None


def _manifest(name: str, files: dict[str, str]) -> dict[str, Any]:
    return {"digest": digest(name, files), "files": files}


def _names(folder: Path) -> list[str]:
    """Return the files of a folder, except hidden ones: file systems and desktops make some, and nothing reads them."""
    paths = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return sorted(str(path.relative_to(folder)) for path in paths)


def _hash(path: Path) -> str:
    return file_hash_once(path, xxhash.xxh3_128)


def _seal(folder: Path, name: str) -> None:
    """Write the manifest and flush everything to disk."""
    files = {file: _hash(folder / file) for file in _names(folder)}
    (folder / MANIFEST).write_text(json.dumps(_manifest(name, files), indent=1), encoding="utf-8")
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
