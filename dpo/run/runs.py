"""A run's folder: one run at a time writes to it, and a run that ended early goes on in it."""

import contextlib
import fcntl
import functools
import json
import mmap
import os
import re
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from omegaconf import DictConfig, OmegaConf

from dpo.config import MayChange, keys
from dpo.data.records import PreferenceData
from dpo.run import checkpoint
from dpo.run.config import Config
from dpo.run.metrics import HISTORY
from dpo.utils import (
    TakenOver,
    UserError,
    default_cache,
    get_local_dir,
    get_local_run_dir,
    log,
    make_dir,
    open_log,
    redact,
)

HEARTBEAT = 15.0
STALE = 90.0  # seconds without a heartbeat after which a run on another machine counts as dead
SETTLE = 2.0  # seconds that another process may take to write its name into a lock, on a file system without locks
FUNNEL, LOG = "data_funnel.json", "log.txt"
WRITTEN = (*HISTORY, LOG, FUNNEL, "config.yaml", ".hydra/overrides.yaml")  # besides folders


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[Callable[[], None]]:
    """Hold the folder's lock, a file that says who does. Raises UserError if another process holds it.

    The system frees the lock of a process that died on this machine. One on another machine, or on a file system
    without locks, may not be seen in this way, so it also touches the file now and then, and counts as dead when it no
    longer does. It may only have stood still: gives a function to call before each write, which raises TakenOver if the
    lock is another's by now.
    """
    path, token = make_dir(run_dir, "local_run_dir") / "lock", uuid.uuid4().hex
    check = functools.partial(_must_be_ours, path, token)
    with open(path, "a+", encoding="utf-8") as file:
        locks = _take(file, path)
        file.truncate(0)
        file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "token": token}))
        file.flush()
        if not locks:  # two may have taken it at once: the last to write has it
            time.sleep(SETTLE)
            if not _is_ours(path, token):
                raise _in_use(path)
        ended = threading.Event()
        threading.Thread(target=_beat, args=(path, token, ended), daemon=True).start()
        try:
            yield check
        finally:
            ended.set()
            if _is_ours(path, token):
                with contextlib.suppress(OSError):
                    file.truncate(0)


def _take(file: IO[str], path: Path) -> bool:
    """Lock the file at `path`; whether the file system has locks. Raises UserError if it is another process's."""
    locks = True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise _in_use(path) from error
    except OSError:
        locks = False
    holder = _holder(path)
    freed = locks and holder.get("host") == socket.gethostname()
    if holder and not freed and _beats(path):
        raise _in_use(path)
    return locks


def _holder(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):  # nobody, or nothing that can be read
        holder = json.loads(path.read_text(encoding="utf-8"))
        return holder if isinstance(holder, dict) else {}
    return {}


def _in_use(path: Path) -> UserError:
    holder = _holder(path)
    return UserError(
        f"local_run_dir={path.parent} is in use by process {holder.get('pid')} on {holder.get('host')}; two runs in "
        "one folder could not be told apart: wait for it, end it, or give another folder"
    )


def _is_ours(path: Path, token: str) -> bool:
    """Whether the lock still holds `token`. Empty, it was another's that has ended; a file that is gone or cannot be
    read now shows no other."""
    try:
        return token in path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return True


def _must_be_ours(path: Path, token: str) -> None:
    if not _is_ours(path, token):
        raise TakenOver(path.parent)


def _beat(path: Path, token: str, ended: threading.Event) -> None:
    while not ended.wait(HEARTBEAT) and _is_ours(path, token):
        with contextlib.suppress(OSError):
            os.utime(path)


def _beats(path: Path) -> bool:
    """Watch another process's lock: whether it is touched within STALE seconds."""
    log(f"{path} names another process, {path.read_text(encoding='utf-8')}: seeing if it lives")
    seen, until = path.stat().st_mtime, time.monotonic() + STALE
    while time.monotonic() < until:
        time.sleep(1)
        if path.stat().st_mtime != seen:
            return True
    return False


def open_run(config: Config, composed: DictConfig, overrides: list[str]) -> None:
    """Start the run's folder, which is locked, or open one that a run goes on in, as it stands: see `begin`."""
    run_dir = Path(config.local_run_dir)
    metrics = run_dir / "metrics.jsonl"
    inside = goes_on_inside(config)
    started = metrics.exists() and (metrics.stat().st_size or checkpoint.checkpoints(run_dir))
    if started and not inside and config.resume != "auto":
        raise UserError(
            f"local_run_dir={run_dir} already holds a run, and two runs in one folder could not be told apart; give "
            "another folder, remove that one, or go on with it: resume=auto"
        )
    for name in WRITTEN:
        _own(run_dir / name)
    open_log(run_dir)
    log(f"run folder: {run_dir}")
    if config.resume == "auto":
        where = f"{run_dir} has" if _is_given(config) else f"the runs of {config.exp_name} in {run_dir.parent} have"
        log(f"resume=auto: {where} no checkpoint yet; starting anew")
    if not inside:
        clear(run_dir)
        metrics.touch()
        for name in HISTORY:
            _cut(run_dir / name, 0)
        _describe(config, composed, overrides)


def goes_on_inside(config: Config) -> bool:
    """Whether the run goes on in the folder that holds the checkpoint it goes on from."""
    run_dir = Path(os.path.realpath(config.local_run_dir))
    return config.checkpoint is not None and config.checkpoint.parent == run_dir


def begin(config: Config, composed: DictConfig, overrides: list[str], funnel: dict[str, Any]) -> None:
    """Make a folder that a run goes on in what it was at the checkpoint, once nothing can be refused any more."""
    if config.checkpoint and goes_on_inside(config):
        clear(Path(config.local_run_dir))
        state = checkpoint.read_state(config.checkpoint)
        for name in HISTORY:
            _cut(Path(config.local_run_dir) / name, state["history"].get(name, 0))
        _abandon_later_ones(config.checkpoint, state["examples"])
        _describe(config, composed, overrides)
    Path(config.local_run_dir, FUNNEL).write_text(json.dumps(funnel, indent=2), encoding="utf-8")


def _describe(config: Config, composed: DictConfig, overrides: list[str]) -> None:
    run_dir = Path(config.local_run_dir)
    (run_dir / "config.yaml").write_text(redact(OmegaConf.to_yaml(composed, resolve=True)), encoding="utf-8")
    hydra_dir = make_dir(run_dir / ".hydra", "local_run_dir")
    OmegaConf.save(OmegaConf.create([redact(override) for override in overrides]), hydra_dir / "overrides.yaml")


def _cut(path: Path, size: int) -> None:
    """Leave the first `size` bytes, up to the end of a line: what was written after the checkpoint is written again."""
    if not path.exists():
        return
    if path.stat().st_size < size:
        log(f"{path} has lost its end: it was {size} bytes long at the checkpoint")
    size = min(size, path.stat().st_size)
    if size:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            size = content.rfind(b"\n", 0, size) + 1
    os.truncate(path, size)


def _own(path: Path) -> None:
    """Part a file from another run's that it shares its content with, as copies made with links do."""
    if path.is_symlink() or (path.exists() and path.stat().st_nlink > 1):
        content = path.read_bytes() if path.exists() else b""
        copied = path.with_name(f".{path.name}-{os.getpid()}")
        copied.write_bytes(content)
        os.replace(copied, path)


def _abandon_later_ones(start: Path, examples: int) -> None:
    """Rename checkpoints that are further on than the one that a run goes on from: they are of another future."""
    for path in checkpoint.checkpoints(start.parent):
        if checkpoint.examples_of(path) <= examples:
            break
        log(f"going on from {start.name}: {path.name} is called {checkpoint.set_aside(path).name} from here on")
    latest = start.parent / checkpoint.LATEST
    if start == latest:  # of a copy without links, the one checkpoint
        start.rename(start.with_name(f"step-{examples}"))
    left = checkpoint.checkpoints(start.parent)
    if left:
        checkpoint.point(start.parent, checkpoint.LATEST, left[0].name)
    elif latest.is_symlink():
        latest.unlink()


def clear(run_dir: Path) -> None:
    """Remove what a process that was killed left half written. The folder must be locked."""
    for old in run_dir.glob(".step-*-old"):  # it made way for one that did not come
        if not (run_dir / old.name[1:-4]).exists():
            old.rename(run_dir / old.name[1:-4])
    for unfinished in (*run_dir.glob(".step-*"), *run_dir.glob(".nonfinite-*")):
        shutil.rmtree(unfinished, ignore_errors=True)


def leave(run_dir: Path, remove: bool = False) -> None:
    """Clear away what a run that failed left half done; if nothing was trained, let its folder be used again, or
    `remove` it."""
    clear(run_dir)
    metrics = run_dir / "metrics.jsonl"
    if metrics.exists() and not metrics.stat().st_size:
        metrics.unlink()
    if remove:
        shutil.rmtree(run_dir, ignore_errors=True)


def find_resume(config: Config) -> tuple[str | None, str]:
    """The checkpoint that `resume` means, and the run's folder.

    For resume=auto:
    1. Where local_run_dir is given, only that folder counts; else those that runs of this exp_name made in local_dirs,
       the newest first.
    2. In a folder, the complete checkpoint with the most examples. A damaged one is named in the log and passed over;
       where all are, that is an error, as there would be nothing left to go on with.
    3. A folder without any is passed over, unless it was given: the run then starts anew in it.
    4. Where nothing is found, the run starts in the folder that local_run_dir means.
    """
    if not config.resume:
        return None, config.local_run_dir
    if config.resume != "auto":
        return str(checkpoint.find_checkpoint(config.resume, config.checkpoint_check)), config.local_run_dir
    for run_dir in [Path(config.local_run_dir)] if _is_given(config) else _runs_of(config):
        found = checkpoint.checkpoints(run_dir)
        latest = Path(os.path.realpath(run_dir)) / checkpoint.LATEST
        if not found and latest.is_dir() and not latest.is_symlink():  # of a copy without links, the one checkpoint
            found = [latest]
        moved = [path for path in run_dir.glob("step-*") if path.is_symlink() and path.is_dir()]
        if not found and moved:
            raise UserError(
                f"resume=auto: {moved[0]} is a link to {moved[0].resolve()}, and a run has its checkpoints in its own "
                "folder; move them back, or resume=<that folder> in another local_run_dir"
            )
        for path in found:
            problem = checkpoint.check(path, config.checkpoint_check)
            if problem is None and checkpoint.weights_only(path) and not _at_its_end(path):
                problem = "it holds weights only (save_weights_only, keep_optimizer_last_n)"
            if problem is None:
                return str(path), str(run_dir)
            log(f"resume=auto: {path} is passed over: {problem}")
        if found:
            raise UserError(
                f"resume=auto: no checkpoint in {run_dir} can be resumed, see above; remove them to start anew"
            )
    return "auto", config.local_run_dir


def _at_its_end(folder: Path) -> bool:
    """Whether nothing is left to train after a checkpoint."""
    state = checkpoint.read_state(folder)
    return state["examples"] >= state["total_examples"]


def _is_given(config: Config) -> bool:
    return config.local_run_dir != get_local_run_dir(config.exp_name, tuple(config.local_dirs))


def _runs_of(config: Config) -> list[Path]:
    """Folders of earlier runs of this exp_name, which may have several parts (team/run1), the newest first. Earlier
    versions kept runs in what is now the default folder of caches."""
    *above, name = Path(config.exp_name).parts
    pattern = re.compile(re.escape(name) + r"_\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d(_\d+)?", re.ASCII)
    places = {Path(folder, *above) for folder in (get_local_dir(list(config.local_dirs)), default_cache())}
    found = [path for place in places if place.is_dir() for path in place.iterdir() if pattern.fullmatch(path.name)]
    return sorted((path for path in found if path.is_dir()), key=lambda path: path.name, reverse=True)


def _changes(config: Config, state: dict[str, Any], free: set[str]) -> tuple[dict[str, str], list[str]]:
    """A line for each key in which this run differs from the one of `state`, and those keys that are not `free`."""
    before, now = flat(state["config"]), flat(config.to_dict())
    # A key that there was not yet has not changed where it is off.
    changed = {key for key, value in now.items() if before.get(key) != value and (key in before or value)}
    lines = {key: f"{key}={now.get(key)} (was {before.get(key)})" for key in sorted(changed)}
    return lines, [key for key in lines if key not in free and key.partition(".")[0] not in free]


def is_finished(config: Config, data: PreferenceData) -> bool:
    """Whether the run would only go on in its own folder from its own end, with the same settings, data and start."""
    if config.checkpoint is None or not goes_on_inside(config):
        return False
    state = checkpoint.read_state(config.checkpoint)
    if not _at_its_end(config.checkpoint) or _changes(config, state, set(keys(type(config), MayChange)))[1]:
        return False
    if config.do_final_eval and config.n_eval_examples and state["evaluated"] != state["examples"]:
        return False  # it was stopped just before
    start = checkpoint.weights_identity(config.model.start)
    return state["training data"] == data.identity and state.get(checkpoint.START) == start


def check_changes(config: Config, state: dict[str, Any]) -> None:
    """Name every key in which this run differs from the one it goes on with.

    Raises UserError for those that change what the run means, unless resume_allow_changes is true.
    """
    # A run at a constant learning rate may be made longer.
    free = set(keys(type(config), MayChange)) | (
        {"n_epochs", "n_examples"} if config.lr_schedule == "constant" else set()
    )
    lines, meaningful = _changes(config, state, free)
    told = [lines[key] for key in lines if key not in (*meaningful, "resume", "local_run_dir")]
    if told:
        log(f"resuming with other settings, of which none changes what an update computes: {', '.join(told)}")
    changed = ", ".join(lines[key] for key in meaningful)
    if changed and not config.resume_allow_changes:
        raise UserError(
            f"resume={config.resume} was trained with other settings: {changed}; train these anew under another "
            "exp_name, or go on with them all the same: resume_allow_changes=true"
        )
    if changed:
        log(f"resume_allow_changes=true: from here on {changed}")


def flat(values: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    """{"loss": {"beta": 1}} as {"loss.beta": 1}."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return out
