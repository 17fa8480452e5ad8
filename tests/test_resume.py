"""A run that is stopped, killed or fails, and goes on, is the run that was not."""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import COSTS, read_jsonl
from restarts import start
from safetensors.torch import load_file

from checkpoint import check, checkpoints
from stopping import EXIT_CODE

Overrides = Callable[..., list[str]]
LOSSES = {"sft": ["loss=sft"], "dpo": ["loss=dpo", "loss.beta=0.2"]}
# Twenty epochs of 24 examples; evaluations with samples, and checkpoints, in the middle of epochs.
LONG = ["n_epochs=20", "batch_size=5", "eval_every=35", "n_eval_examples=8", "optimizer=AdamW", "lr=1e-3"]
LONG += ["lr_schedule=cosine", "warmup_steps=3"]


def train_steps(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_text().count("loss/train") if path.exists() else 0


def ended(given: list[str], log: Path) -> int:
    process = start(given, log)
    process.join(300)
    assert process.exitcode is not None, log.read_text()
    return process.exitcode


def interrupted(given: list[str], run_dir: Path, log: Path, number: int, step: int) -> int:
    """Train, send the signal after `step` updates at the earliest, and give the exit code."""
    process = start(given, log)
    until = time.monotonic() + 300
    while train_steps(run_dir) < step and process.is_alive() and time.monotonic() < until:
        time.sleep(0.005)
    assert process.is_alive() and process.pid, log.read_text()
    os.kill(process.pid, number)
    process.join(120)
    return process.exitcode or 0


def without_costs(event: dict) -> dict:
    return {key: value for key, value in event.items() if key not in COSTS}


def assert_same_run(found: Path, wanted: Path) -> None:
    """Bit for bit: every logged number but costs, every sample, and the last checkpoint's weights and states."""
    for name in ("metrics.jsonl", "samples.jsonl"):
        events = [[without_costs(event) for event in read_jsonl(folder / name)] for folder in (found, wanted)]
        assert events[0] == events[1], name
    last = [(folder / "LATEST").resolve() for folder in (found, wanted)]
    assert last[0].name == last[1].name
    assert (last[0] / "model.safetensors").read_bytes() == (last[1] / "model.safetensors").read_bytes()
    states = [{p.name: load_file(p) for p in sorted((d / "training_state").glob("*.safetensors"))} for d in last]
    assert states[0].keys() == states[1].keys() and states[0]
    for name, tensors in states[0].items():
        assert tensors.keys() == states[1][name].keys()
        assert all(torch.equal(tensor, states[1][name][key]) for key, tensor in tensors.items())


@pytest.mark.parametrize("loss", LOSSES)
def test_stopped_and_killed_runs_equal_one_that_was_not(loss: str, overrides: Overrides, tmp_path: Path) -> None:
    log = tmp_path / "log"
    given = overrides(*LOSSES[loss], *LONG, "resume=auto")
    assert ended([*given, f"local_run_dir={tmp_path / 'whole'}"], log) == 0, log.read_text()
    run_dir, pick = tmp_path / "run", random.Random(loss)
    for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGUSR1, signal.SIGINT):
        steps = train_steps(run_dir) + pick.randrange(1, 12)  # of 100
        code = interrupted(given, run_dir, log, number, steps)
        assert code == (-signal.SIGKILL if number == signal.SIGKILL else EXIT_CODE), log.read_text()
        assert all(check(path, "full") is None for path in checkpoints(run_dir))
    assert ended(given, log) == 0
    assert_same_run(run_dir, tmp_path / "whole")
    before = (run_dir / "metrics.jsonl").read_bytes()
    assert ended(given, log) == 0 and (run_dir / "metrics.jsonl").read_bytes() == before  # nothing is left to do


def test_an_fsdp_run_that_is_stopped_and_killed_equals_one_that_was_not(overrides: Overrides, tmp_path: Path) -> None:
    log, run_dir = tmp_path / "log", tmp_path / "run"
    loss = os.environ.get("DPO_FSDP_LOSS", "dpo")
    given = overrides(*LOSSES[loss], *LONG, "trainer=FSDPTrainer", "nproc=2", "resume=auto")
    assert ended([*given, f"local_run_dir={tmp_path / 'whole'}"], log) == 0, log.read_text()
    assert interrupted(given, run_dir, log, signal.SIGTERM, 11) == EXIT_CODE, log.read_text()
    stopped_at = train_steps(run_dir)
    assert interrupted(given, run_dir, log, signal.SIGKILL, stopped_at + 20) == -signal.SIGKILL
    time.sleep(5)  # its processes are told by the system that it is gone
    assert ended(given, log) == 0, log.read_text()
    assert_same_run(run_dir, tmp_path / "whole")


@pytest.mark.parametrize("more", [[], ["async_save=true"]])
def test_kills_at_any_moment(
    more: list[str], overrides: Overrides, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """DPO_KILLS=50 pytest -k any_moment prints the tally of so many kills."""
    kills, pick, log = int(os.environ.get("DPO_KILLS", "8")), random.Random(0), tmp_path / "log"
    given = overrides(*LOSSES["dpo"], *LONG, "save_every=5", "keep_last_n=3", "resume=auto", *more)
    begun = time.monotonic()
    assert ended([*given, f"local_run_dir={tmp_path / 'whole'}"], log) == 0, log.read_text()
    length = time.monotonic() - begun
    tally = {"kills": 0, "with a checkpoint to go on from": 0, "while one was being written": 0, "runs completed": 0}
    while tally["kills"] < kills:
        run_dir = tmp_path / f"run-{tally['runs completed']}"
        mine = [*given, f"local_run_dir={run_dir}"]
        process = start(mine, log)
        process.join(pick.uniform(0.1, length) if tally["kills"] < kills else None)
        if process.exitcode is None:
            process.kill()
            process.join()
            tally["kills"] += 1
            tally["while one was being written"] += bool(list(run_dir.glob(".step-*")))
            assert all(check(path, "full") is None for path in checkpoints(run_dir)), "half a checkpoint has a name"
            tally["with a checkpoint to go on from"] += bool(checkpoints(run_dir))
            assert bool(checkpoints(run_dir)) == (run_dir / "LATEST").is_dir() or len(checkpoints(run_dir)) == 1
        else:
            assert process.exitcode == 0, log.read_text()
            assert_same_run(run_dir, tmp_path / "whole")
            tally["runs completed"] += 1
    assert ended(mine, log) == 0, log.read_text()
    assert_same_run(run_dir, tmp_path / "whole")
    tally["runs completed"] += 1
    with capsys.disabled():
        print(f"\nkill harness {more}: {tally}; none of them differs")
