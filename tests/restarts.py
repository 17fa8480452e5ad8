"""Training in processes that start quickly, forked from one that has imported everything."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path

import datasets  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401
from conftest import ROOT, compose

import train
from dpo.run import folder
from utils import run_main


def run(given: list[str], log: Path) -> None:
    """train.py with these overrides, its output in the file `log`."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    run_main(lambda: train.train(compose(given), given))


def run_on_another_machine(given: list[str], log: Path) -> None:
    """The same as if on a machine of its own, with heartbeats in quick time."""
    name = f"machine-{os.getpid()}"
    socket.gethostname = lambda: name
    folder.HEARTBEAT, folder.STALE = 0.5, 3.0
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
