"""scripts/demo.py on the tiny model: everything but the result."""

import sys
from pathlib import Path

import pytest

import demo
from demo import Measured
from sampling import Divergence
from utils import UserError


def test_the_demo_runs_and_writes_table_and_curves(
    tmp_path: Path, tiny_model_dir: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    common = ["model=blank_model", f"model.name_or_path={tiny_model_dir}", f"cache_dir={cache_dir}", "device=cpu"]
    monkeypatch.setattr(demo, "COMMON", [*common, "datasets=[sentiment]", "max_length=48", "max_prompt_length=24"])
    monkeypatch.setattr(demo, "SFT", ["loss=sft", "n_examples=16", "batch_size=8"])
    monkeypatch.setattr(demo, "DPO", ["loss=dpo", "loss.beta=0.1", "n_examples=16", "batch_size=8"])
    monkeypatch.setattr(demo, "EVALUATION", ["n_eval_examples=8", "n_eval_model_samples=2", "wandb.enabled=false"])
    monkeypatch.setattr(sys, "argv", ["demo.py", "--folder", str(tmp_path / "out")])
    (tmp_path / "out" / "sft").mkdir(parents=True)
    (tmp_path / "out" / "sft" / "metrics.jsonl").write_text("{}")  # of an earlier demo, to be replaced
    (tmp_path / "out" / demo.MARKER).touch()
    demo.main()
    table = (tmp_path / "out" / "table.txt").read_text()
    assert [line.split()[0] for line in table.splitlines()[1:]] == ["base", "SFT", "DPO"]
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert table in capfd.readouterr().out


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sft").mkdir()
    (tmp_path / "thesis.tex").write_text("mine")
    monkeypatch.setattr(sys, "argv", ["demo.py", "--folder", str(tmp_path)])
    with pytest.raises(UserError, match="no demo"):
        demo.main()
    assert (tmp_path / "thesis.tex").exists()


def test_table() -> None:
    rewards, divergence = [0.25, 0.75] * 2, Divergence([0.0] * 4, [1.0, 3.0] * 2)
    measured = Measured(list("aabb"), list("stuv"), rewards, divergence, [4, 6] * 2)
    rows = demo.table({"DPO": measured}, 0.75).splitlines()
    assert rows[1].split() == ["DPO", "+0.500", "[+0.500,", "+0.500]", "2.00", "0.750", "5.0"]
