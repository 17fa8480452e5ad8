"""Training in processes that start quickly, forked from one that has imported everything."""

import multiprocessing
import os
from pathlib import Path

import datasets  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401
from conftest import ROOT, compose

import train
from utils import run_main


def run(given: list[str], log: Path) -> None:
    """train.py with these overrides, its output in the file `log`."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    run_main(lambda: train.train(compose(given), given))


def start(given: list[str], log: Path) -> multiprocessing.Process:
    """A process that trains."""
    os.environ["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["restarts"])
    process = context.Process(target=run, args=(given, log))
    process.start()
    return process
