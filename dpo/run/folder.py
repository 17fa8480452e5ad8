"""A run's folder: its lock, its files at the start, and what a failed or killed run leaves in it."""

import contextlib
import functools
import json
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import SoftFileLease, Timeout
from omegaconf import DictConfig, OmegaConf

from dpo.files import atomic_write
from dpo.run.checkpoint import checkpoints
from dpo.run.config import Config
from dpo.run.metrics import HISTORY
from dpo.run.resume import cut, local_run_dir_is_given, resumes_in_place, rewind
from dpo.utils import TakenOver, UserError, log, make_dir, open_log, redact

HEARTBEAT = 15.0  # seconds between two signs of life in the lock
STALE = 90.0  # seconds without one after which a process on another machine counts as dead
RELEASED = 1.0  # seconds that a lock may be missing while another process examines it
FUNNEL, LOG = "data_funnel.json", "log.txt"
WRITTEN = (*HISTORY, LOG, FUNNEL, "config.yaml", ".hydra/overrides.yaml")  # besides folders


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[Callable[[], None]]:
    """Hold the folder's lock, a file that names the holder. Raise UserError if another process holds it.

    The lock of a process that died on this machine is free at once. A process on another machine counts as dead after
    STALE seconds without a heartbeat, but it may only have been suspended. So call the yielded function before each
    write: it raises TakenOver if another process took the lock.
    """
    path = make_dir(run_dir, "local_run_dir") / "lock"
    lease = SoftFileLease(path, lease_duration=STALE, heartbeat_interval=HEARTBEAT, thread_local=False)
    try:
        if not path.exists() or _holder(path).get("host") == socket.gethostname():
            lease.acquire(timeout=0)
        else:
            _wait_for(lease, path)
    except Timeout:
        holder = _holder(path)
        raise UserError(
            f"local_run_dir={path.parent} is in use by process {holder.get('pid')} on {holder.get('host')}; two runs "
            "in one folder could not be told apart: wait for it, end it, or give another folder"
        ) from None
    try:
        yield functools.partial(_must_hold, path, str(lease.token))
    finally:
        lease.release()


def _wait_for(lease: SoftFileLease, path: Path) -> None:
    """Take a lock of another machine, or of an earlier version, if its holder is dead. Raise Timeout at its next
    heartbeat."""
    if holder := _holder(path):
        name = f"process {holder.get('pid')} on {holder.get('host')}"
        log(f"{path} is held by {name}: waiting up to {STALE:.0f} s for a sign of life")

    def touched() -> float | None:
        with contextlib.suppress(FileNotFoundError):
            return path.stat().st_mtime
        return None  # released

    last = touched()

    def beats() -> bool:
        return touched() not in (None, last)

    lease.acquire(timeout=STALE + HEARTBEAT, poll_interval=min(1.0, STALE / 10), cancel_check=beats)


def _holder(path: Path) -> dict[str, str]:
    """Return the fields of a lock file (pid, host, token); none if there is no holder."""
    with contextlib.suppress(OSError, ValueError):
        return dict(line.split("=", 1) for line in path.read_text(encoding="utf-8").splitlines()[1:])
    return {}


def _must_hold(path: Path, token: str) -> None:
    """Raise TakenOver if the lock has another holder, or if that holder has ended and removed it."""
    until = time.monotonic() + RELEASED
    while (holder := _holder(path).get("token")) is None and time.monotonic() < until:
        time.sleep(RELEASED / 20)
    if holder != token:
        raise TakenOver(path.parent)


def open_run(config: Config, composed: DictConfig, overrides: list[str]) -> None:
    """Start a new run in its locked folder, or open the folder of a run that is resumed in place: see `begin`."""
    run_dir = Path(config.local_run_dir)
    metrics = run_dir / "metrics.jsonl"
    in_place = resumes_in_place(config)
    started = metrics.exists() and (metrics.stat().st_size or checkpoints(run_dir))
    if started and not in_place and config.resume != "auto":
        raise UserError(
            f"local_run_dir={run_dir} already holds a run, and two runs in one folder could not be told apart; give "
            "another folder, remove that one, or resume it: resume=auto"
        )
    for name in WRITTEN:
        _unshare(run_dir / name)
    open_log(run_dir)
    log(f"run folder: {run_dir}")
    if config.resume == "auto":
        given = local_run_dir_is_given(config)
        subject = f"{run_dir} has" if given else f"the runs of {config.exp_name} in {run_dir.parent} have"
        log(f"resume=auto: {subject} no checkpoint yet; starting anew")
    if not in_place:
        clear(run_dir)
        metrics.touch()
        for name in HISTORY:
            cut(run_dir / name, 0)
        _describe(config, composed, overrides)


def begin(config: Config, composed: DictConfig, overrides: list[str], funnel: dict[str, Any]) -> None:
    """Write the data's funnel, after rewinding a resumed run's folder to its checkpoint. Call after all validation."""
    run_dir = Path(config.local_run_dir)
    if config.checkpoint and resumes_in_place(config):
        clear(run_dir)
        rewind(config.checkpoint)
        _describe(config, composed, overrides)
    (run_dir / FUNNEL).write_text(json.dumps(funnel, indent=2), encoding="utf-8")


def _describe(config: Config, composed: DictConfig, overrides: list[str]) -> None:
    run_dir = Path(config.local_run_dir)
    (run_dir / "config.yaml").write_text(redact(OmegaConf.to_yaml(composed, resolve=True)), encoding="utf-8")
    hydra_dir = make_dir(run_dir / ".hydra", "local_run_dir")
    OmegaConf.save(OmegaConf.create([redact(override) for override in overrides]), hydra_dir / "overrides.yaml")


def _unshare(path: Path) -> None:
    """Copy a file that is a link, or a hard link to another run's file, so that writing leaves the other run alone."""
    if path.is_symlink() or (path.exists() and path.stat().st_nlink > 1):
        atomic_write(path, path.read_bytes() if path.exists() else b"")


def clear(run_dir: Path) -> None:
    """Remove what a killed process left half written. The folder must be locked."""
    for old in run_dir.glob(".step-*-old"):  # it was replaced by a checkpoint that was not finished
        if not (run_dir / old.name[1:-4]).exists():
            old.rename(run_dir / old.name[1:-4])
    for unfinished in (*run_dir.glob(".step-*"), *run_dir.glob(".nonfinite-*")):
        if unfinished.is_file():
            unfinished.unlink(missing_ok=True)
        shutil.rmtree(unfinished, ignore_errors=True)


def leave(run_dir: Path, remove: bool = False) -> None:
    """Remove what a failed run left half written. If it trained nothing, free its folder for reuse, or `remove` it."""
    clear(run_dir)
    metrics = run_dir / "metrics.jsonl"
    if metrics.exists() and not metrics.stat().st_size:
        metrics.unlink()
    if remove:
        shutil.rmtree(run_dir, ignore_errors=True)
