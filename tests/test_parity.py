"""The original implementation's numbers on 8 real HH pairs and the real 135M model, reproduced by overrides alone.

`tests/data/README.md` says where the rows and the numbers come from.
"""

import json
from pathlib import Path

import pytest
from conftest import EVERYTHING, ROOT, first_fast, read_jsonl, train_here

DATA = ROOT / "tests" / "data"
# Overrides and number of updates.
RUNS = [("dpo", 3), ("sft", 3), ("ipo", 3)]
RUNS += [("dpo trainer=FSDPTrainer nproc=2", 3), ("cdpo", 3), ("reffree", 3)] if EVERYTHING else []


@pytest.mark.parametrize(("run", "updates"), first_fast(RUNS, 0))
def test_trajectory_of_the_original(run: str, updates: int, tmp_path: Path, cache_dir: Path) -> None:
    run, *more = run.split()
    expected = json.loads((DATA / "original.json").read_text())["runs"][run]
    given = [f"local_run_dir={tmp_path / 'run'}", f"cache_dir={cache_dir}", f"dataset_sources.hh={DATA / 'hh'}"]
    train_here(["+experiment=parity", *expected["overrides"].split(), *given, f"n_epochs={updates}", *more])

    steps = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    beta = next((float(o.split("=")[1]) for o in expected["overrides"].split() if o.startswith("loss.beta")), 0.0)
    assert len(steps) == updates and len(expected["steps"]) == 3
    for step, expected_step in zip(steps, expected["steps"]):
        for name, value in expected_step.items():
            absolute = 2e-3 * beta * 100 if name.startswith("rewards_train/") else 0.0
            assert step[name] == pytest.approx(value, rel=2e-3, abs=absolute), name
