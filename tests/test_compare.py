"""scripts/compare.py: two runs on the same pairs."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import train_here

import compare
from dpo.utils import UserError


def test_a_paired_difference() -> None:
    pairs = [(f"prompt {i // 2}", "a", "b") for i in range(40)]
    first, second = np.ones(40), np.ones(40)
    second[:12] = 0
    second[39] = 0.5
    found = compare.compared(pairs, first, second)
    assert found["difference"]["mean"] == pytest.approx(12.5 / 40) and found["prompts"] == 20
    low, high = found["difference"]["interval"]
    assert 0.1 < low < 12.5 / 40 < high < 0.6
    assert (found["only first"], found["only second"]) == (13, 0)
    assert found["p"] == pytest.approx(2 / 2**7)  # 13 pairs, but of 7 prompts
    text = compare.as_text(found, ["one", "two"])
    assert "difference +0.312" in text and text.endswith("one is the more accurate one")
    assert found["first"]["interval"][0] < 0.9  # 20 of 20 prompts are not certain
    alike = compare.as_text(compare.compared(pairs, second, second), ["one", "two"])
    assert "difference +0.000 [-0.168, +0.168]" in alike and alike.endswith("do not tell which is more accurate")


@pytest.mark.full
def test_runs_of_two_betas(overrides: Callable[..., list[str]], tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    runs = [str(tmp_path / name) for name in ("one", "two")]
    for run, beta in zip(runs, ("0.1", "0.5")):
        train_here(overrides("loss=dpo", f"loss.beta={beta}", "lr=1e-2", "n_eval_examples=8", f"local_run_dir={run}"))
    out = tmp_path / "found.json"
    monkeypatch.setattr(sys, "argv", ["compare.py", *runs, "--show", "20", "--out", str(out), "device=cpu"])
    compare.main()
    found, said = json.loads(out.read_text()), capsys.readouterr().out
    assert found["pairs"] == 8 and f"{found['pairs']} pairs of" in said
    assert said.count("--- only") == found["only first"] + found["only second"]
    monkeypatch.setattr(sys, "argv", ["compare.py", runs[0], runs[0]])
    compare.main()
    assert "difference +0.000 [-" in capsys.readouterr().out
    other = overrides("loss=dpo", "loss.beta=0.1", "max_length=40", f"local_run_dir={tmp_path / 'three'}")
    train_here([*other, "n_eval_examples=8"])
    monkeypatch.setattr(sys, "argv", ["compare.py", runs[0], str(tmp_path / "three")])
    with pytest.raises(UserError, match="the runs see other held-out pairs"):
        compare.main()
