"""Small helpers without a home of their own: user-facing errors, the run's log and metric files, local folders."""

import argparse
import contextlib
import ctypes
import errno
import functools
import getpass
import hashlib
import io
import json
import math
import os
import re
import secrets
import signal
import sys
import threading
import time
import traceback
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")
ROOT = Path(__file__).resolve().parent.parent
"""The project's folder, in which runs and caches lie by default, whatever folder a command is given in."""
LESS_MEMORY = (
    "Any of these needs less: a larger gradient_accumulation_steps, a smaller eval_batch_size or max_length, "
    "activation_checkpointing=true, mixed_precision=bfloat16"
)
SECRETS = re.compile(r"hf_[A-Za-z0-9]{20,}|wandb_v1_\w{20,}")  # what keys of the hub and of W&B look like
SECRET_NAMES = re.compile("(KEY|TOKEN|SECRET|PASSWORD)$")
HISTORY = ("metrics.jsonl", "samples.jsonl")  # files of a run that only grow
tqdm.set_lock(threading.RLock())  # its own is also for other processes, which draw no bars here, and is left behind
_log_file: "Lines | None" = None
_quiet = False


class UserError(Exception):
    """Something the user can put right. Shown as one message without a traceback; the process exits with code 1."""


class TakenOver(SystemExit):
    """Another process has taken the run's folder over while this one stood still. No exception that a failed write
    would be taken for: this process must not write there any more."""

    def __init__(self, run_dir: Path):
        print(f"error: {run_dir} was taken over by another process while this one stood still", file=sys.stderr)
        super().__init__(1)


def be_quiet() -> None:
    """No more `log` lines and progress bars from this process: another one speaks for it."""
    global _quiet
    _quiet = True


def redact(text: str) -> str:
    """`text` without keys of the hub and of W&B: what looks like one, and what the environment holds as one."""
    known = (value for name, value in os.environ.items() if SECRET_NAMES.search(name) and len(value) >= 16)
    return functools.reduce(lambda t, secret: t.replace(secret, "***"), known, SECRETS.sub("***", text))


def log(message: str) -> None:
    """Print `message` and, once a run's folder is known (`open_log`), write it to the run's `log.txt` too.

    Names of files, states and errors in it may come from anywhere, so control characters are shown as escapes.
    """
    if _quiet:
        return
    message = visible(redact(message))
    with contextlib.suppress(OSError):  # where the output goes to a full disk
        print(message, flush=True)
    if _log_file is not None:
        _log_file.add(message)


def visible(text: str) -> str:
    """`text` of any origin, with control characters and those that change its direction as escapes."""
    kept = "\n\t\u200c\u200d"
    hidden = ("Cc", "Cf", "Cs", "Zl", "Zp")
    return "".join(repr(c)[1:-1] if c not in kept and unicodedata.category(c) in hidden else c for c in text)


def notice(message: str) -> None:
    """Say something from inside a signal handler, which may have interrupted `log`."""
    if not _quiet:
        with contextlib.suppress(OSError):
            os.write(2, f"\n{message}\n".encode())


class Lines:
    """A file that lines are added to. What a full disk does not take waits in memory for the next line."""

    def __init__(self, path: Path):
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self._waiting = b""

    def add(self, line: str) -> bool:
        """Add a line; whether all lines are written."""
        self._waiting += line.encode("utf-8", "replace") + b"\n"
        return self.flush()

    def flush(self) -> bool:
        """Write what waits; whether nothing does any more."""
        with contextlib.suppress(OSError):
            while self._waiting:
                self._waiting = self._waiting[os.write(self._file, self._waiting) :]
        return not self._waiting

    def size(self) -> int:
        """Bytes on disk. Raises OSError where not all of them get there."""
        if not self.flush():
            raise OSError(errno.ENOSPC, "lines wait for space on the disk")
        os.fsync(self._file)
        return os.fstat(self._file).st_size

    def close(self) -> None:
        self.flush()
        os.close(self._file)


def open_log(run_dir: Path) -> None:
    """Send every later `log` line to `run_dir/log.txt` as well."""
    global _log_file
    if _log_file is not None:
        _log_file.close()
    _log_file = Lines(run_dir / "log.txt")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of a script's docstring, and adds each option's default if it has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        shown = action.default not in (None, False, argparse.SUPPRESS, []) and action.option_strings
        return f"{action.help} (default: %(default)s)" if shown else action.help


def _use_utf8() -> None:
    """Start this program again in Python's UTF-8 mode under a locale of another encoding: Arrow, tokenizers and
    safetensors take names of files as UTF-8 whatever the locale. What a terminal cannot show it gets as escapes."""
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1" and sys.executable:
        os.environ["PYTHONUTF8"] = "1"
        os.environ.setdefault("PYTHONIOENCODING", sys.stdout.encoding)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def run_main(main: Callable[[], Any], speaks: Callable[[], bool] = lambda: True) -> Any:
    """Call `main` as a command does: a `UserError` becomes one message and exit code 1, Ctrl-C exit code 130.

    In a group of processes that fail together only one `speaks`.
    """
    _use_utf8()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        return main()
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    except Exception as error:
        message, code = _explain(error)
        message = visible(redact(message)) if speaks() else ""
    if message:
        sys.stdout.flush()
        print(message, file=sys.stderr, flush=True)
        if _log_file is not None:
            _log_file.add(message)
    sys.exit(code)


def _wants_memory(error: Exception) -> bool:
    # torch's own type on CUDA, a plain RuntimeError elsewhere
    return isinstance(error, MemoryError) or bool(re.search("out of memory|allocate memory", str(error)))


def _another_ended(error: Exception) -> bool:
    return bool(re.search("gloo/transport|(closed|reset) by peer", str(error)))


def is_passing(error: Exception) -> bool:
    """Whether `error` comes from the machine's state (memory, other processes) and says nothing about the input."""
    return _wants_memory(error) or _another_ended(error)


def _explain(error: Exception) -> tuple[str, int]:
    """What to show for `error`, and the exit code."""
    text = str(error)
    if isinstance(error, UserError):
        return f"error: {text}", 1
    if _wants_memory(error):
        return f"error: out of memory: {text.splitlines()[0] if text else 'host'}\n{LESS_MEMORY}", 1
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return f"error: {text}", 1
    if _another_ended(error):
        return f"error: another process of the group is gone ({text.splitlines()[0]}); it says why, or was killed", 1
    return f"{traceback.format_exc()}\nerror: this is a defect of the program, not of your input; see above", 2


def get_local_dir(prefixes: list[str]) -> Path:
    """The user's folder under the first of `prefixes` that exists and can be written, else under the last. Does not
    create it. Raises UserError if there are none.
    """
    if not prefixes:
        raise UserError("local_dirs is empty; name at least one folder, such as local_dirs=[/data/runs]")
    usable = (prefix for prefix in prefixes if os.path.isdir(prefix) and os.access(prefix, os.W_OK))
    return Path(next(usable, prefixes[-1]), _user())


def default_cache() -> Path:
    """The user's folder of caches in the project."""
    return ROOT / ".cache" / _user()


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return str(os.getuid())


@functools.cache
def get_local_run_dir(exp_name: str, prefixes: tuple[str, ...]) -> str:
    """A fresh run folder's name, `<local dir>/<exp_name>_<time>`; the same within one process. Does not create it.

    The time ends with microseconds and three random digits: runs that start together have names of their own.
    """
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S_%f")
    return str(get_local_dir(list(prefixes)) / f"{exp_name}_{stamp}{secrets.randbelow(1000):03d}")


def make_dir(path: Path, key: str) -> Path:
    """Create the folder `path`, named by the configuration's `key`. Raises UserError where that is not possible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{key}: cannot create the folder {path}: {error.strerror}; give another one") from error
    if not os.access(path, os.W_OK):
        raise UserError(f"{key}: the folder {path} cannot be written; give another one")
    return path


class _Stderr:
    """sys.stderr for progress bars, which may go to a file on a full disk."""

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            sys.stderr.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            sys.stderr.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


def progress(iterable: Iterable[T] | None = None, **options: Any) -> "tqdm[T]":
    """A tqdm bar that redraws often on a terminal and every few seconds where the output goes to a file."""
    interval = 0.2 if sys.stderr.isatty() else 5.0
    # A bar that would be wiped away leaves a line each time where the output goes to a file.
    options.setdefault("disable", _quiet or (not options.get("leave", True) and not sys.stderr.isatty()))
    options.setdefault("file", _Stderr())
    options["desc"] = visible(options.get("desc") or "") or None
    return tqdm(iterable, mininterval=interval, maxinterval=max(interval, 10), dynamic_ncols=True, **options)


class RunLogger:
    """Writes a run's numbers: every event to `metrics.jsonl` and TensorBoard, W&B at most once in `wandb_interval` s.

    `wandb_run` and `tensorboard` are open writers or None. No file is written before `open`. `check` raises TakenOver
    if the folder is another process's by now. In processes that are quiet it does nothing.
    """

    def __init__(self, run_dir: Path, check: Callable[[], None] = lambda: None, wandb_interval: float = 1.0):
        self.run_dir, self.check, self.wandb_interval = run_dir, check, wandb_interval
        self.wandb_run: Any = None
        self.tensorboard: Any = None
        self._files: dict[str, Lines] = {}
        self._last_wandb = -math.inf

    def open(self) -> None:
        """Open the metric files."""
        self._files = {} if _quiet else {name: Lines(self.run_dir / name) for name in HISTORY}

    def log(self, metrics: Mapping[str, float], step: int, always: bool = False) -> None:
        """Record one event at `step` (examples seen). `always` ignores W&B's interval, as evaluations do."""
        if not self._files:
            return
        self.check()
        # JSON has no infinity, which a gradient norm under loss scaling may be; nothing else gets here non-finite.
        metrics = {name: value for name, value in metrics.items() if name != "grad_norm" or math.isfinite(value)}
        record = {"counters/examples": step, **metrics, "time": round(time.time(), 3)}
        if not self._files["metrics.jsonl"].add(json.dumps(record)):
            log(f"warning: {self.run_dir} is full; metrics wait in memory")
        if self.tensorboard is not None:
            with contextlib.suppress(OSError):
                for name, value in metrics.items():
                    self.tensorboard.add_scalar(name, value, step)
        if self.wandb_run is not None and (always or time.monotonic() - self._last_wandb >= self.wandb_interval):
            self.wandb_run.log({"counters/examples": step, **metrics}, step=step)
            self._last_wandb = time.monotonic()

    def samples(self, rows: list[dict[str, Any]], step: int) -> None:
        """Append sampled responses to `samples.jsonl` and to W&B tables, one for each sampled model."""
        if not self._files or not rows:
            return
        self.check()
        for row in rows:
            self._files["samples.jsonl"].add(json.dumps({"counters/examples": step, **row}, ensure_ascii=False))
        if self.wandb_run is None:
            return
        import wandb

        for model in [key for key in rows[0] if key != "prompt"]:
            table = wandb.Table(columns=["step", "prompt", "sample"])
            for row in rows:
                table.add_data(step, row["prompt"], row[model])
            self.wandb_run.log({f"{model}_samples": table}, step=step)

    def history(self) -> dict[str, int]:
        """Bytes that each file has so far, once they are on disk: what a run that goes on from here starts with. Raises
        OSError where they cannot get there."""
        self.check()
        return {name: file.size() for name, file in self._files.items()}

    @property
    def wandb_id(self) -> str | None:
        """W&B's id of the run, under which it can be taken up again."""
        return self.wandb_run.id if self.wandb_run is not None else None

    def close(self, exit_code: int = 0) -> None:
        for file in self._files.values():
            file.close()
        if self.tensorboard is not None:
            self.tensorboard.close()
        if self.wandb_run is not None:
            self.wandb_run.finish(exit_code=exit_code)


PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def end_with_parent(parent: int) -> None:
    """Let the system kill this process if its parent, process `parent`, dies, and end if it died before this. macOS
    has only the latter."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def n_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def file_hash(path: Path, function: Any = hashlib.sha256) -> str:
    """A file's content, hashed by one of hashlib's functions, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, function).hexdigest()


def file_hash_once(path: Path, function: Any = hashlib.sha256) -> str:
    """As `file_hash`; computed once in this process for as long as the file's size and times stay."""
    found = path.stat()
    return _hash_of(path, function, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


@functools.lru_cache(4096)
def _hash_of(path: Path, function: Any, *stat: int) -> str:
    return file_hash(path, function)
