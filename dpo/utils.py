"""Helpers of the whole package: errors for the user, the log, progress bars, folders, hashes."""

import contextlib
import ctypes
import functools
import getpass
import hashlib
import logging
import os
import re
import secrets
import signal
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from dpo.files import Lines

T = TypeVar("T")
R = TypeVar("R")
ROOT = Path(__file__).resolve().parent.parent
"""The project's folder, which holds runs and caches by default, whatever the current folder is."""
SECRETS = re.compile(r"hf_[A-Za-z0-9]{20,}|wandb_v1_\w{20,}")  # how keys of the hub and of W&B look
SECRET_NAMES = re.compile("(KEY|TOKEN|SECRET|PASSWORD)$")
LOGGER = logging.getLogger("dpo")
tqdm.set_lock(threading.RLock())  # the default lock also serves other processes, which draw no bars here, and leaks


def one_ahead(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Yield `function` of each item, computed in a thread while the caller works on the one before."""
    with ThreadPoolExecutor(1) as thread:
        pending: Future[R] | None = None
        for item in items:
            coming = thread.submit(function, item)
            if pending is not None:
                yield pending.result()
            pending = coming
        if pending is not None:
            yield pending.result()


class UserError(Exception):
    """Something the user can put right. Shown as one message without a traceback; the process exits with code 1."""


class TakenOver(SystemExit):
    """Another process took the run's folder over while this one stood still: it must not write there any more.

    It is a SystemExit so that nothing takes it for a failed write.
    """

    def __init__(self, run_dir: Path):
        print(f"error: {run_dir} was taken over by another process while this one stood still", file=sys.stderr)
        super().__init__(1)


class _Stderr:
    """sys.stderr for progress bars, which may go to a file on a full disk. If it is no terminal, each state of a bar is
    a line."""

    def write(self, text: str) -> None:
        if not sys.stderr.isatty():
            text = re.sub(r"\r|\033\[A", "", text).strip()  # of a bar that moves
            text += "\n" if text else ""
        with contextlib.suppress(OSError):
            sys.stderr.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            sys.stderr.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


BARS = _Stderr()
LINE = "{desc}: {n_fmt}/{total_fmt}{unit}, {elapsed} gone, {remaining} left, {rate_fmt}{postfix}"


class _Terminal(logging.Handler):
    """Prints messages to stdout, errors to stderr. Bars on a terminal give way."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stdout.flush()
        away = tqdm.external_write_mode(file=BARS) if sys.stderr.isatty() else contextlib.nullcontext()
        with away, contextlib.suppress(OSError):  # the output may go to a full disk
            print(record.getMessage(), file=sys.stderr if record.levelno >= logging.ERROR else sys.stdout, flush=True)


class _LogFile(logging.Handler):
    """Writes messages to a run's log.txt. A full disk delays them."""

    def __init__(self, run_dir: Path):
        super().__init__()
        self.lines = Lines(run_dir / "log.txt")

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.add(record.getMessage())


LOGGER.addHandler(_Terminal())
LOGGER.setLevel(logging.INFO)
LOGGER.propagate = False


def open_log(run_dir: Path | None) -> None:
    """Send every later message to `run_dir/log.txt` as well, and no longer to an earlier run's. None: to the terminal
    only."""
    for handler in [handler for handler in LOGGER.handlers if isinstance(handler, _LogFile)]:
        LOGGER.removeHandler(handler)
        handler.lines.close()  # not in Handler.close, by which whoever configures logging closes all handlers
    if run_dir is not None:
        LOGGER.addHandler(_LogFile(run_dir))


def be_quiet() -> None:
    """Print only errors, and no progress bars, from this process: another one of its group speaks for it."""
    LOGGER.setLevel(logging.ERROR)


def is_quiet() -> bool:
    """Return whether this process prints only errors."""
    return not LOGGER.isEnabledFor(logging.INFO)


def log(message: str, level: int = logging.INFO) -> None:
    """Print `message`, and write it to the run's `log.txt` once that is open (`open_log`).

    Names of files, states and errors in it may come from anywhere, so control characters are shown as escapes.
    """
    LOGGER.log(level, "%s", visible(redact(message)))


def redact(text: str) -> str:
    """Return `text` without keys of the hub and of W&B: what looks like one, and what the environment holds as one."""
    known = (value for name, value in os.environ.items() if SECRET_NAMES.search(name) and len(value) >= 16)
    return functools.reduce(lambda t, secret: t.replace(secret, "***"), known, SECRETS.sub("***", text))


def visible(text: str) -> str:
    """Return `text` of any origin, with control characters and those that change its direction as escapes."""
    kept = "\n\t\u200c\u200d"
    hidden = ("Cc", "Cf", "Cs", "Zl", "Zp")
    return "".join(repr(c)[1:-1] if c not in kept and unicodedata.category(c) in hidden else c for c in text)


def notice(message: str) -> None:
    """Say something from inside a signal handler, which may have interrupted `log`."""
    if not is_quiet():
        with contextlib.suppress(OSError):
            os.write(2, f"\n{message}\n".encode())


def wants_memory(error: Exception) -> bool:
    """Return whether memory ran out: torch has a type of its own for it on CUDA, and a RuntimeError elsewhere."""
    return isinstance(error, MemoryError) or bool(re.search("out of memory|allocate memory", str(error)))


def another_ended(error: Exception) -> bool:
    """Return whether another process of the group is gone."""
    return bool(re.search("gloo/transport|(closed|reset) by peer", str(error)))


def is_passing(error: Exception) -> bool:
    """Return whether `error` comes from the machine's state (memory, other processes), not from the input."""
    return wants_memory(error) or another_ended(error)


def get_local_dir(prefixes: list[str]) -> Path:
    """Return the user's folder under the first of `prefixes` that exists and can be written, else under the last. Does
    not create it. Raise UserError if there are none."""
    if not prefixes:
        raise UserError("local_dirs is empty; name at least one folder, such as local_dirs=[/data/runs]")
    usable = (prefix for prefix in prefixes if os.path.isdir(prefix) and os.access(prefix, os.W_OK))
    return Path(next(usable, prefixes[-1]), _user())


def default_cache() -> Path:
    """Return the user's folder of caches in the project."""
    return ROOT / ".cache" / _user()


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return str(os.getuid())


@functools.cache
def get_local_run_dir(exp_name: str, prefixes: tuple[str, ...]) -> str:
    """Return a fresh run folder's name, `<local dir>/<exp_name>_<time>`; the same within one process. Does not create
    it.

    The time ends with microseconds and three random digits: runs that start together have names of their own.
    """
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S_%f")
    return str(get_local_dir(list(prefixes)) / f"{exp_name}_{stamp}{secrets.randbelow(1000):03d}")


def make_dir(path: Path, key: str) -> Path:
    """Create the folder `path`, named by the configuration's `key`. Raise UserError if that is not possible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{key}: cannot create the folder {path}: {error.strerror}; give another one") from error
    if not os.access(path, os.W_OK):
        raise UserError(f"{key}: the folder {path} cannot be written; give another one")
    return path


def progress(iterable: Iterable[T] | None = None, **options: Any) -> "tqdm[T]":
    """Return a tqdm bar that redraws often on a terminal, and adds a line every half minute if the output goes
    elsewhere."""
    terminal = sys.stderr.isatty()
    # A bar that would be wiped away leaves a line each time if the output goes to a file.
    options.setdefault("disable", is_quiet() or (not options.get("leave", True) and not terminal))
    options["desc"] = visible(options.get("desc") or "") or None
    options |= {"file": BARS, "bar_format": None if terminal else LINE}
    if not terminal:
        options["unit"] = f" {options.get('unit', 'it').strip()}"
    interval = 0.2 if terminal else 30.0
    return tqdm(iterable, mininterval=interval, maxinterval=max(interval, 10), dynamic_ncols=terminal, **options)


PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def end_with_parent(parent: int) -> None:
    """Let the system kill this process if its parent, process `parent`, dies, and end if it died before this. macOS
    has only the latter."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def n_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def file_hash(path: Path, function: Any = hashlib.sha256) -> str:
    """Return a file's content, hashed by one of hashlib's functions, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, function).hexdigest()


def file_hash_once(path: Path, function: Any = hashlib.sha256) -> str:
    """Return `file_hash`, computed once in this process for as long as the file's size and times stay."""
    found = path.stat()
    return _hash_of(path, function, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


@functools.lru_cache(4096)
def _hash_of(path: Path, function: Any, *stat: int) -> str:
    return file_hash(path, function)
