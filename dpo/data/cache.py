"""Arrow files that are read from disk without loading them, made by several processes in folders that outlive the run.

A cache folder's name holds a `digest` of all that its content depends on. Its manifest holds a hash of every file, and
these are compared each time the folder is opened: a damaged folder is made anew, and never read.
"""

import contextlib
import fcntl
import hashlib
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import sys
import traceback
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import xxhash

from dpo.utils import UserError, end_with_parent, file_hash_once, log, n_cores

T = TypeVar("T")


class ArrowRows:
    """Rows of Arrow files that stay on disk: the operating system maps in what is read."""

    def __init__(self, *paths: Path):
        self.table = pa.concat_tables([self._mapped(path) for path in paths])  # copies nothing
        self.batches = self.table.to_batches()
        self.starts = np.cumsum([0] + [batch.num_rows for batch in self.batches])

    @staticmethod
    def _mapped(path: Path) -> pa.Table:
        try:
            return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path}: damaged ({error}); delete {path.parent} to have it made anew") from error

    def __len__(self) -> int:
        return int(self.starts[-1])

    def row(self, i: int) -> pa.RecordBatch:
        """Row `i`, as a batch of one."""
        number = int(np.searchsorted(self.starts, i, side="right")) - 1
        return self.batches[number].slice(i - int(self.starts[number]), 1)


def write_arrow(path: Path, schema: pa.Schema, batches: Iterable[tuple[pa.RecordBatch, Any]], bar: Any) -> list[Any]:
    """Write the batches to an Arrow file and return what came with them. `batches` are closed if that fails."""
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
    """`map(function, chunks)` over processes, in order, with few chunks in flight so that memory does not grow.

    Raises what `function` raises, and UserError if a process dies. No process outlives the generator.
    """
    chunks = iter(chunks)
    first = list(itertools.islice(chunks, 2))
    chunks = itertools.chain(first, chunks)
    n_workers = num_proc or n_cores()
    if n_workers == 1 or len(first) < 2:
        yield from map(function, chunks)
        return
    workers = [_Worker(function) for _ in range(n_workers)]
    try:
        yield from _in_order(workers, enumerate(chunks))
    finally:
        for worker in workers:
            worker.end()


def _in_order(workers: "list[_Worker]", chunks: Iterator[tuple[int, Any]]) -> Iterator[Any]:
    """The results of numbered chunks. Each worker has one chunk at a time; results wait for those before them."""
    idle = list(workers)
    busy: dict[Any, tuple[int, _Worker]] = {}
    results: dict[int, Any] = {}
    turn = 0
    while True:
        while idle and len(results) <= len(workers) and (numbered := next(chunks, None)):
            worker = idle.pop()
            worker.send(numbered[1])
            busy[worker.connection] = (numbered[0], worker)
        if turn in results:
            yield results.pop(turn)
            turn += 1
            continue
        if not busy:
            return
        for connection in multiprocessing.connection.wait(busy):
            number, worker = busy.pop(connection)
            results[number] = worker.result()
            idle.append(worker)


class _Worker:
    """A process that applies a function to what it is sent. concurrent.futures' pool does not notice a worker that is
    killed while it sends a result, and cannot be left without waiting for it: a pipe for each process can."""

    def __init__(self, function: Callable[[Any], Any]):
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        self.connection, other = context.Pipe()
        # A daemon ends with this process, also if an exception keeps the generator above from being closed.
        arguments = (other, function, os.getpid())
        self.process: Any = context.Process(target=_work, args=arguments, daemon=True)  # type: ignore[attr-defined]
        self.process.start()
        other.close()  # the process alone has it: if it dies, nothing can come any more

    def send(self, chunk: Any) -> None:
        with _if_killed():
            self.connection.send(chunk)

    def result(self) -> Any:
        """Its next result. Raises what the function raised."""
        with _if_killed():
            done, value = self.connection.recv()
        if not done:
            raise value
        return value

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


@contextlib.contextmanager
def _if_killed() -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError) as error:
        raise UserError("a data worker was killed, most likely for want of memory; set num_proc lower") from error


def _work(connection: Any, function: Callable[[Any], Any], parent: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which then ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # A parent that is killed cannot end them, and its pipes, which they inherited, would seem alive.
    end_with_parent(parent)
    while True:
        chunk = connection.recv()
        try:
            answer = (True, function(chunk))
        except Exception as error:
            error.add_note(traceback.format_exc())
            answer = (False, error)
        connection.send(answer)


def digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:20]


MANIFEST = "cache_manifest.json"  # checkpoints have a manifest.json of another form
LOCK = ".lock"


def cached(cache_dir: Path, name: str, build: Callable[[Path], None]) -> Path:
    """The folder `cache_dir/name`, made by `build(temporary folder)` if it is missing or damaged.

    It gets its name only when it is complete and on disk, so neither an interrupted run nor two runs that make it at
    once leave a folder that is taken for more than it is. Raises UserError if it cannot be written.
    """
    final = cache_dir / name
    _remove_leftovers(cache_dir)
    problem = damage(final)
    if problem is None:
        return final
    if os.path.lexists(final):
        log(f"{final} is damaged: {problem}; it is made anew")
    try:
        with _workplace(cache_dir, name) as temporary:
            build(temporary)
            _seal(temporary, name)
            _put_in_place(temporary, final)
    except OSError as error:
        if damage(final) is not None:  # else another process was faster
            raise UserError(
                f"the cache {cache_dir} cannot be written ({error}); free space or set cache_dir"
            ) from error
    return final


def damage(folder: Path) -> str | None:
    """What is wrong with a cache folder's files, by its manifest; None: nothing.

    Every byte is hashed each time. Sizes and times would not show a damaged disk, and XXH3 hashes some 10 GB a second:
    next to reading the files that costs nothing, also for a converted model.
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
    """The files of a folder. Hidden ones are not read by anyone; file systems and desktops make some."""
    paths = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return sorted(str(path.relative_to(folder)) for path in paths)


def _hash(path: Path) -> str:
    return file_hash_once(path, xxhash.xxh3_128)


@contextlib.contextmanager
def _workplace(cache_dir: Path, name: str) -> Iterator[Path]:
    """A temporary folder, and the lock in it that tells other processes that this one lives. Removed on leaving."""
    cache_dir.mkdir(parents=True, exist_ok=True)
    folder = cache_dir / f".{name}.{uuid.uuid4().hex[:8]}.part"
    with contextlib.ExitStack() as stack:
        with _locked(cache_dir):  # nobody takes the folder for a leftover before it has its lock
            folder.mkdir()
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            stack.enter_context(_locked(folder / LOCK, os.O_RDWR | os.O_CREAT))
        yield folder


@contextlib.contextmanager
def _locked(path: Path, flags: int = os.O_RDONLY) -> Iterator[None]:
    """Hold the lock of a file or folder, opened with `flags`; or do without it on a file system that has no locks."""
    descriptor = os.open(path, flags, 0o666)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _remove_leftovers(cache_dir: Path) -> None:
    """Remove unfinished folders of processes that have died: nobody holds their locks."""
    with contextlib.suppress(OSError), _locked(cache_dir):
        for folder in cache_dir.glob(".*.part"):
            with contextlib.suppress(OSError), open(folder / LOCK, "a", encoding="utf-8") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)


def _seal(folder: Path, name: str) -> None:
    """Write the manifest, and see everything onto the disk."""
    files = {file: _hash(folder / file) for file in _names(folder)}
    (folder / MANIFEST).write_text(json.dumps(_manifest(name, files), indent=1), encoding="utf-8")
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _put_in_place(temporary: Path, final: Path) -> None:
    """Give a folder its final name, in place of a damaged one; another process's whole one stays."""
    with _locked(final.parent):  # no two processes move each other's aside
        if damage(final) is None:
            return
        _exchange(temporary, final)


def _exchange(temporary: Path, final: Path) -> None:
    aside = temporary.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}.part")
    if os.path.lexists(final):
        final.rename(aside)
    temporary.rename(final)
    (final / LOCK).unlink(missing_ok=True)
    if aside.is_dir() and not aside.is_symlink():
        shutil.rmtree(aside, ignore_errors=True)
    else:
        aside.unlink(missing_ok=True)
