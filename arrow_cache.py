"""Arrow files that are read from disk without loading them, made by several processes in folders that outlive the run.

A cache folder's name holds a `digest` of all that its content depends on, so a name that exists is never wrong.
"""

import ctypes
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from utils import UserError, n_cores

T = TypeVar("T")


class ArrowRows:
    """Rows of an Arrow file that stays on disk: the operating system maps in what is read. Can be pickled."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()  # maps the file, copies nothing
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path}: damaged ({error}); delete {path.parent} to have it made anew") from error
        self.batches = self.table.to_batches()
        self.starts = np.cumsum([0] + [batch.num_rows for batch in self.batches])

    def __reduce__(self) -> Any:
        return ArrowRows, (self.path,)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def locate(self, i: int) -> tuple[pa.RecordBatch, int]:
        """Row `i` as a batch and the row's number in it."""
        number = int(np.searchsorted(self.starts, i, side="right")) - 1
        return self.batches[number], i - int(self.starts[number])

    def rows(self, indices: np.ndarray) -> dict[int, dict[str, Any]]:
        """The rows of these indices. Batch by batch: `Table.take` would first join each column's batches in memory."""
        numbers = np.searchsorted(self.starts, indices, side="right") - 1
        found: dict[int, dict[str, Any]] = {}
        for number in np.unique(numbers).tolist():
            wanted = indices[numbers == number]
            taken = self.batches[number].take(pa.array(wanted - self.starts[number])).to_pylist()
            found.update(zip(wanted.tolist(), taken, strict=True))
        return found


def write_arrow(path: Path, schema: pa.Schema, batches: Iterable[tuple[pa.RecordBatch, Any]], bar: Any) -> list[Any]:
    """Write the batches to an Arrow file and return what came with them."""
    extras = []
    with bar, pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        for batch, extra in batches:
            writer.write_batch(batch)
            extras.append(extra)
            bar.update(batch.num_rows)
    return extras


PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_function: Callable[[Any], Any]


def _set_function(function: Callable[[Any], Any]) -> None:
    global _function
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which then ends its workers
    if sys.platform == "linux":
        # A parent that is killed cannot end them, and what they inherited of it (its pipes) would seem alive.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    _function = function


def _call(chunk: Any) -> Any:
    return _function(chunk)


def parallel(function: Callable[[Any], T], chunks: Iterable[Any], num_proc: int) -> Iterator[T]:
    """`map(function, chunks)` over processes, in order, with few chunks in flight so that memory does not grow."""
    chunks = iter(chunks)
    first = list(itertools.islice(chunks, 2))
    chunks = itertools.chain(first, chunks)
    n_workers = num_proc or n_cores()
    if n_workers == 1 or len(first) < 2:
        yield from map(function, chunks)
        return
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with ProcessPoolExecutor(n_workers, context, _set_function, (function,)) as pool:
        pending: deque[Any] = deque()
        try:
            for chunk in chunks:
                pending.append(pool.submit(_call, chunk))
                if len(pending) > n_workers + 2:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            raise UserError("a data worker was killed, most likely for want of memory; set num_proc lower") from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:20]


def cached(cache_dir: Path, name: str, build: Callable[[Path], None]) -> Path:
    """The folder `cache_dir/name`, made by `build(temporary folder)` if it is not there.

    It gets its name only when it is complete and on disk, so neither an interrupted run nor two runs that make it at
    once leave a folder that is taken for more than it is. Raises UserError if it cannot be written.
    """
    final = cache_dir / name
    if final.is_dir():
        return final
    temporary = cache_dir / f".{name}.{uuid.uuid4().hex[:8]}"
    try:
        for left in cache_dir.glob(f".{name}.*"):
            if time.time() - left.stat().st_mtime > 24 * 3600:  # of a run that was killed
                shutil.rmtree(left, ignore_errors=True)
        temporary.mkdir(parents=True)
        build(temporary)
        for path in temporary.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        try:
            temporary.rename(final)
        except OSError:
            if not final.is_dir():  # else another process was faster
                raise
    except OSError as error:
        raise UserError(f"the cache {cache_dir} cannot be written ({error}); free space or set cache_dir") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final
