"""experiments/demo.py on the tiny model."""

import sys
from pathlib import Path

import pytest

import demo
from results import load_runs, sentiment_rewards


@pytest.mark.full
def test_the_demo_runs_and_writes_table_and_page(
    tmp_path: Path, tiny_model_dir: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    overrides = ["model=blank_model", f"model.name_or_path={tiny_model_dir}", f"cache_dir={cache_dir}", "device=cpu"]
    overrides += ["max_length=48", "max_prompt_length=24", "n_examples=16", "batch_size=8", "lr=1e-2", "warmup_steps=0"]
    overrides += ["n_eval_samples_per_prompt=1"]
    monkeypatch.setattr(sys, "argv", ["demo.py", "--folder", str(tmp_path / "out"), *overrides])
    (tmp_path / "out" / "sft").mkdir(parents=True)
    (tmp_path / "out" / "sft" / "metrics.jsonl").write_text("{}")  # of an earlier demo that was ended early
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    demo.main()
    assert (tmp_path / "out" / "thesis.tex").read_text() == "mine"
    table = (tmp_path / "out" / "table.txt").read_text()
    base, sft, dpo = (line.split() for line in table.splitlines()[1:])
    assert [base[0], sft[0], dpo[0]] == ["base", "SFT", "DPO"]
    runs = load_runs([tmp_path / "out" / name for name in ("sft", "dpo")])
    rewards = [sentiment_rewards(runs[1].samples, model)[16] for model in ("reference", "policy")]
    assert [sft[1], dpo[1]] == [f"{reward.value:+.3f}" for reward in rewards] and rewards[0].prompts == 77
    last = [run.evaluations[-1] for run in runs]
    assert sft[4] == f"{last[0]['kl_eval/rao_blackwell']:.2f}" != "0.00" and base[4] == "-"
    assert dpo[-1] == f"{last[1]['rewards_eval/accuracies']:.3f}" and sft[-1] == "-"
    assert "<h2>Reward against KL</h2>" in (tmp_path / "out" / "report.html").read_text()
    assert table in capfd.readouterr().out

    logged = [(tmp_path / "out" / name / "metrics.jsonl").read_bytes() for name in ("sft", "dpo")]
    demo.main()  # which is finished
    assert [(tmp_path / "out" / name / "metrics.jsonl").read_bytes() for name in ("sft", "dpo")] == logged
    assert table in capfd.readouterr().out
