"""scripts/demo.py on the tiny model: everything but the result."""

import math
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_model, make_tokenizer

import demo
from demo import Measured
from models import add_token_logps
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


def test_interval_and_table() -> None:
    mean, width = demo.mean_and_interval([0.0, 0.0, 1.0, 1.0] * 50)  # two samples for each of 100 prompts
    assert mean == 0.5 and width == pytest.approx(1.96 * math.sqrt(0.25 * 100 / 99) / 10)
    rows = demo.table({"DPO": Measured(list("abcd"), [0.5] * 4, [1.0, 3.0] * 2, [4, 6] * 2)}, 0.75).splitlines()
    assert rows[1].split() == ["DPO", "+0.500", "[+0.500,", "+0.500]", "2.00", "0.750", "5.0"]


def test_sampled_logratio_is_that_of_the_sampled_tokens(tiny_model_dir: Path) -> None:
    from settings import load_config

    lengths = ["max_length=12", "max_prompt_length=8"]
    config = load_config(["exp_name=x", "model=blank_model", f"model.name_or_path={tiny_model_dir}", *lengths])
    model, other = (add_token_logps(make_model()).eval() for _ in range(2))
    with torch.no_grad():
        other.lm_head.weight.mul_(1.5)
    task = demo.Task(config, make_tokenizer(), [[5, 6, 7], [9]], ["a", "b"])
    measured = demo.measure(model, other, task)
    assert measured.lengths and all(value != 0 for value in measured.logratios)
    assert demo.measure(model, model, task).logratios == [0.0, 0.0]
