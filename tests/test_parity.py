"""The original implementation's numbers on 8 real HH pairs and the real 135M model, reproduced by overrides alone.

`tests/data/README.md` says where the rows and the numbers come from.
"""

import json
from pathlib import Path

import pytest
from conftest import EVERYTHING, ROOT, first_fast, read_jsonl, train_here

DATA = ROOT / "tests" / "data"
SETTINGS = (
    "exp_name=parity model=smollm2 datasets=[hh] batch_size=8 gradient_accumulation_steps=1 lr=1e-6 "
    "warmup_steps=0 optimizer=RMSprop max_grad_norm=10 max_length=128 max_prompt_length=64 "
    "n_eval_examples=0 debug=true device=cpu num_proc=1"
)
# Overrides and number of updates. `make test` runs the first: two updates show the gradient and what it changed.
RUNS = [("dpo", 2), ("dpo", 3), ("sft", 3), ("ipo", 3), ("dpo trainer=FSDPTrainer nproc=2", 3)]
RUNS += [("cdpo", 3), ("reffree", 3)] if EVERYTHING else []


@pytest.mark.parametrize(("run", "updates"), first_fast(RUNS))
def test_trajectory_of_the_original(run: str, updates: int, tmp_path: Path, cache_dir: Path) -> None:
    run, *more = run.split()
    expected = json.loads((DATA / "original.json").read_text())["runs"][run]
    given = [f"local_run_dir={tmp_path / 'run'}", f"cache_dir={cache_dir}", f"dataset_sources.hh={DATA / 'hh'}"]
    train_here([*SETTINGS.split(), *expected["overrides"].split(), *given, f"n_epochs={updates}", *more])

    steps = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    beta = next((float(o.split("=")[1]) for o in expected["overrides"].split() if o.startswith("loss.beta")), 0.0)
    assert len(steps) == updates and len(expected["steps"]) == 3
    for step, expected_step in zip(steps, expected["steps"]):
        for name, value in expected_step.items():
            absolute = 2e-3 * beta * 100 if name.startswith("rewards_train/") else 0.0
            assert step[name] == pytest.approx(value, rel=2e-3, abs=absolute), name
