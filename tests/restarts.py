"""Training in processes that start quickly, forked from one that has imported everything."""

import errno
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import datasets  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401
from conftest import ROOT, compose

import train
from dpo.run import runs
from utils import run_main


def run(given: list[str], log: Path) -> None:
    """train.py with these overrides, its output in the file `log`."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    run_main(lambda: train.train(compose(given), given))


def run_without_locks(given: list[str], log: Path) -> None:
    """The same on a file system that has no locks, with heartbeats in quick time."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks here")

    runs.fcntl.flock, runs.HEARTBEAT, runs.STALE, runs.SETTLE = refuse, 0.5, 3.0, 0.5  # type: ignore[assignment]
    run(given, log)


def start(
    given: list[str], log: Path, target: Callable[[list[str], Path], None] = run
) -> multiprocessing.process.BaseProcess:
    """A process that trains."""
    os.environ["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["restarts"])
    process = context.Process(target=target, args=(given, log))
    process.start()
    return process
