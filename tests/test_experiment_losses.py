"""experiments/compare_losses.py: its intervals, its settings, and the whole of it on the tiny model."""

import csv
import math
import statistics
import sys
from pathlib import Path

import pytest
import yaml
from conftest import EVERYTHING, write_pairs

import compare_losses
from compare_losses import choose_losses, estimate, loss_overrides
from dpo.utils import UserError

OVERRIDES = ["max_length=48", "max_prompt_length=24", "warmup_steps=0", "device=cpu", "model=blank_model", "lr=1e-3"]
OVERRIDES += ["n_examples=8", "batch_size=4", "n_eval_examples=16", "n_eval_model_samples=3", "eval_batch_size=8"]
OVERRIDES += ["n_eval_samples_per_prompt=2", "num_proc=1"]


def test_intervals_are_those_of_students_t() -> None:
    values = [0.1, 0.4, 0.25]
    found = estimate(values)
    assert found.mean == pytest.approx(0.25) and found.half_width == pytest.approx(4.3027 * 0.15 / math.sqrt(3), 1e-3)
    assert estimate([0.3]) == (0.3, None)
    many = [float(i) for i in range(12)]  # 11 degrees of freedom: 2.201
    assert estimate(many).half_width == pytest.approx(2.201 * statistics.stdev(many) / math.sqrt(12), 3e-3)


def test_every_loss_has_valid_settings() -> None:
    from settings import load_config

    settings = yaml.safe_load(compare_losses.SETTINGS.read_text())
    losses = choose_losses(None)
    assert {"dpo", "ipo", "simpo", "unlikelihood"} <= {*losses} and not {*losses} & {*compare_losses.NOT_COMPARED}
    assert {*settings["losses"]} <= {*losses}
    for scale in settings["scales"].values():
        assert load_config(["+experiment=frontier_start", *scale["start"]])
        assert load_config(["+experiment=losses", *scale["hh"], *loss_overrides("dpo", settings)])
    for name in losses:
        given = ["+experiment=losses", *settings["scales"]["small"]["sentiment"], *loss_overrides(name, settings)]
        assert load_config(given).loss.name == name


def test_misuse_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for given, message in (
        (["--losses", "dpo,dop"], "'dop' is not compared here; choose from: aot, .*dpo"),
        (["--losses", "sft"], "'sft' is not compared here"),
        (["--seeds", "0"], "--seeds 0 must be at least 1"),
        (["--hh", str(tmp_path / "none")], "is no folder"),
    ):
        monkeypatch.setattr(sys, "argv", ["compare_losses.py", "--folder", str(tmp_path / "out"), *given])
        with pytest.raises(UserError, match=message):
            compare_losses.main()
    with pytest.raises(UserError, match=r"loss=dpo requires loss\.beta"):
        loss_overrides("dpo", {"required": {}, "losses": {}})


@pytest.mark.full
@pytest.mark.skipif(not EVERYTHING, reason="takes minutes on a CPU: DPO_ALL=1")
def test_the_comparison_runs_and_trains_nothing_twice(
    tmp_path: Path, tiny_model_dir: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pairs(tmp_path / "hh" / "harmless-base")
    folder, overrides = tmp_path / "out", [f"model.name_or_path={tiny_model_dir}", f"cache_dir={cache_dir}"]
    command = ["compare_losses.py", "--folder", str(folder), "--losses", "simpo,dpo", "--seeds", "1"]
    monkeypatch.setattr(sys, "argv", [*command, "--hh", str(tmp_path / "hh"), *OVERRIDES, *overrides])
    compare_losses.main()
    rows = list(csv.DictReader(open(folder / "losses.csv")))
    columns = [f"{name}{end}" for name in compare_losses.MEASURES for end in ("", "_half_width")]
    assert list(rows[0]) == ["task", "loss", "seeds", *columns]
    named = [("sentiment", "start"), ("sentiment", "simpo"), ("sentiment", "dpo"), ("hh", "simpo"), ("hh", "dpo")]
    assert [(row["task"], row["loss"]) for row in rows] == named and {row["seeds"] for row in rows} == {"1"}
    taken = {"start": {"reward", "length"}, "sentiment": {*compare_losses.MEASURES}, "hh": {"accuracy", "seconds"}}
    for row in rows:
        expected = taken["start" if row["loss"] == "start" else row["task"]]
        assert {name for name in columns if row[name]} == expected  # one seed has no interval
        assert all(math.isfinite(float(row[name])) for name in expected)
        assert "kl" not in expected or float(row["kl"]) > 0
    assert (folder / "losses.png").stat().st_size > 10_000
    text = (folder / "losses.md").read_text()
    assert "- commit: " in text and "--losses simpo,dpo" in text and "| hh | simpo | " in text

    before = {path: path.read_bytes() for path in folder.rglob("metrics.jsonl")}
    assert len(before) == 5
    compare_losses.main()
    assert {path: path.read_bytes() for path in folder.rglob("metrics.jsonl")} == before
    assert list(csv.DictReader(open(folder / "losses.csv"))) == rows
