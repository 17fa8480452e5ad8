"""experiments/real.py: what it makes of log-ratios, and a tiny run of all of it."""

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import ROOT, write_pairs

import real
from dpo.utils import UserError

PAIRS = real.Pairs(np.array([0, 1, 2, 2]), np.array([3, -1, 0, 2]), np.array([[0, 1], [2, 3], [4, 5], [6, 5]]))


def test_a_line_of_the_table() -> None:
    runs = [type("Run", (), {"evaluations": [{"kl_eval/rao_blackwell": kl}]}) for kl in (1.0, 2.0)]
    ratios = [np.array([1.0, 0, 0, 2, 5, 4, 4, 0]), np.array([1.0, 0, 3, 2, 4, 4, 3, 0])]
    found = real.compared("hh", ratios, "0.1", PAIRS, runs)
    # By seed: right, right; wrong, right; right, a tie; a tie, wrong.
    hits = [1, 0.5, 0.75, 0.25]
    assert found["accuracy"].startswith(f"{np.mean(hits):.3f} [") and found["pairs"] == "4" and found["seeds"] == "2"
    assert found["longer wins"].startswith("0.625 [") and found["difference"].startswith("+0.000 [")
    assert found["if longer"] == "0.625 (n 2)" and found["if shorter"] == "0.500 (n 1)"
    assert found["log-ratio chosen"].startswith("+2.6") and found["KL"] == "1.50 (1.00 to 2.00)"
    assert found["seeds' accuracies"] == "0.625, 0.625" and found["tokens of a sample"] == "-"


@pytest.mark.parametrize(("arguments", "message"), [
    (["--settings", "big"], "--settings big is none of small, full"),
    (["--sets", "hh,shp"], "--sets: 'shp' is none of hh, tldr, se"),
    (["--sets", "hh"], "--data: there is no"),
])  # fmt: skip
def test_misuse(arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(
        sys, "argv", ["real.py", "--data", str(tmp_path), "--folder", str(tmp_path / "out"), *arguments]
    )
    with pytest.raises(UserError, match=re.escape(message)):
        real.main()


@pytest.mark.full
def test_a_tiny_run(tiny_model_dir: Path, cache_dir: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    settings = yaml.safe_load((ROOT / "experiments" / "real.yaml").read_text())["small"]
    settings |= {"sets": {"hh": "hh"}, "betas": [0.1, 0.5], "seeds": 2, "limit": 6}
    settings["shared"] = ["model=blank_model", *settings["shared"][1:]]
    monkeypatch.setattr(real, "SETTINGS", tmp_path / "real.yaml")
    real.SETTINGS.write_text(yaml.safe_dump({"small": settings}))
    write_pairs(tmp_path / "data" / "hh" / "harmless-base")
    given = [f"model.name_or_path={tiny_model_dir}", f"cache_dir={cache_dir}", "device=cpu", "mixed_precision=null"]
    given += ["n_examples=8", "n_eval_model_samples=2", "num_proc=1"]
    argv = ["real.py", "--data", str(tmp_path / "data"), "--folder", str(tmp_path / "out"), *given]
    monkeypatch.setattr(sys, "argv", argv)
    real.main()
    [head, _, *lines] = [line for line in (tmp_path / "out" / "real.md").read_text().splitlines() if line[:1] == "|"]
    assert head.startswith("| data | beta | seeds | pairs | accuracy") and len(lines) == 2
    assert lines[0].startswith("| hh | 0.1 | 2 | 6 |") and "| hh | 0.5 | 2 | 6 |" in lines[1]
