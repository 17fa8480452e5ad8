"""The original implementation's numbers on 8 real HH pairs and the real 135M model, reproduced by overrides alone.

The numbers (commit f8b8c0f of eric-mitchell/direct-preference-optimization, run once on a CPU in float32) are read
from the folder `parity` beside DPO_REAL_DATA.
"""

import json
from pathlib import Path

import pytest
from conftest import EVERYTHING, read_jsonl, real_data, train_here

RUNS = ["sft", "dpo", "ipo", "dpo trainer=FSDPTrainer nproc=2", *(["cdpo", "reffree"] if EVERYTHING else [])]


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_trajectory_of_the_original(run: str, tmp_path: Path, cache_dir: Path) -> None:
    run, *more = run.split()
    parity = real_data().parent / "parity"
    expected = json.loads((parity / "reference_trajectories.json").read_text())["runs"][run]
    source = tmp_path / "hh"
    source.mkdir()
    for split in ("train", "test"):
        (source / f"{split}.jsonl").write_bytes((parity / "hh8.jsonl").read_bytes())
    folders = [f"local_run_dir={tmp_path / 'run'}", f"cache_dir={cache_dir}", f"dataset_sources.hh={source}"]
    train_here(["+experiment=parity", *expected["overrides"].split(), *folders, *more])

    steps = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    beta = next((float(o.split("=")[1]) for o in expected["overrides"].split() if o.startswith("loss.beta")), 0.0)
    assert len(steps) == len(expected["steps"])
    for found, wanted in zip(steps, expected["steps"]):
        for name, value in wanted.items():
            absolute = 2e-3 * beta * 100 if name.startswith(("rewards_train/",)) else 0.0
            assert found[name] == pytest.approx(value, rel=2e-3, abs=absolute), name
