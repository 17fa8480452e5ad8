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
        try:
            pending = deque(pool.submit(_call, chunk) for chunk in itertools.islice(chunks, n_workers + 3))
            while pending:
                yield pending.popleft().result()
                pending.extend(pool.submit(_call, chunk) for chunk in itertools.islice(chunks, 1))
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
        temporary.rename(final)
    except OSError as error:
        if not final.is_dir():  # else another process was faster
            raise UserError(
                f"the cache {cache_dir} cannot be written ({error}); free space or set cache_dir"
            ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final
