"""experiments/frontier.py: its sums against slow ones, and the whole of it on the tiny model."""

import csv
import itertools
import statistics
import sys
from pathlib import Path

import pytest
import yaml
from conftest import read_jsonl

import frontier
from dpo.utils import UserError
from frontier import Point, at_kl, bound_at, expected_best, verdicts


def test_expected_best_is_the_mean_over_all_subsets() -> None:
    scores = [-0.5, -0.5, 0.1, 0.2, 0.9]
    for n in range(1, 6):
        slow = statistics.fmean(max(subset) for subset in itertools.combinations(scores, n))
        assert expected_best(scores, n) == pytest.approx(slow)


def point(method: str, setting: str, kl: float, reward: float, error: float = 0.1) -> Point:
    return Point(method, setting, 480, kl, error, reward, 0.05, 77)


def test_verdicts_say_what_the_points_say() -> None:
    falling = [point("DPO", f"beta {b}", kl, 0.5) for b, kl in ((0.1, 3.0), (1, 2.9), (3, 1.0))]
    assert "falls as beta grows" in verdicts(falling)[0]
    assert "does not change" in verdicts([point("DPO", "beta 0.1", 1, 0.5), point("DPO", "beta 1", 1.1, 0.5)])[0]
    # No step is larger than its error, but the whole is.
    rising = [point("IPO", f"beta {b}", kl, 0.5, 0.4) for b, kl in ((0.1, 1.0), (0.3, 1.9), (1, 2.9))]
    assert "RISES from beta 0.1 to beta 1" in verdicts(rising)[0]

    preferred = point("preferred", "alpha 0", 2.0, 0.3)
    assert "is above" in verdicts([point("DPO", "beta 3", 1.9, 0.5), preferred])[-1]
    assert "is level with" in verdicts([point("DPO", "beta 3", 1.9, 0.32), preferred])[-1]
    assert "is BELOW" in verdicts([point("DPO", "beta 3", 1.9, 0.1), preferred])[-1]
    assert "no DPO run" in verdicts([point("DPO", "beta 3", 2.1, 0.5), preferred])[-1]
    for name in ("unlikelihood", "IPO"):
        assert (
            f"is above {name} (beta 1"
            in verdicts([point("DPO", "beta 3", 1.9, 0.5), point(name, "beta 1", 2, 0.3)])[-1]
        )
    assert at_kl([point("DPO", "beta 1", 1.0, 0.9), point("DPO", "beta 3", 1.5, 0.2)], 2.0).reward == 0.2


def test_the_share_of_best_of_n() -> None:
    best = [point("best of N", f"N {n}", kl, reward) for n, kl, reward in ((1, 0.0, 0.1), (2, 1.0, 0.3), (4, 3.0, 0.7))]
    assert [bound_at(best, kl) for kl in (0.5, 1.0, 2.0, 3.0)] == pytest.approx([0.2, 0.3, 0.5, 0.7])
    flat = [p._replace(reward=0.1) for p in best]
    assert not any("share" in line for line in verdicts([*flat, point("DPO", "beta 1", 2.0, 0.3)]))
    assert bound_at(best, 0.0) is None and bound_at(best, 3.1) is None
    lines = verdicts([*best, point("DPO", "beta 1", 2.0, 0.3), point("DPO", "beta 1", 4.0, 0.9)])
    assert [line for line in lines if "share" in line] == [
        "DPO (beta 1, KL 2.00) gains +0.200, best of N at that KL +0.400: a share of 0.50 ± 0.12"
    ]


def test_settings_are_valid() -> None:
    from settings import load_config

    for settings in yaml.safe_load(frontier.SETTINGS.read_text()).values():
        for method in settings["methods"].values():
            for value in method["values"]:
                swept = f"loss.{method['sweep']}={value}"
                assert load_config([f"+experiment={settings['recipe']}", *method["overrides"], swept])


SMALL = {
    "recipe": "frontier",
    "start": "frontier_start",
    "data": "data/sentiment",
    "methods": {
        "DPO": {"overrides": ["loss=dpo"], "sweep": "beta", "values": [0.1, 1]},
        "preferred": {"overrides": ["loss=unlikelihood"], "sweep": "alpha", "values": [0]},
    },
    "best_of": 4,
}
OVERRIDES = ["max_length=48", "max_prompt_length=24", "warmup_steps=0", "device=cpu", "model=blank_model", "lr=1e-3"]
OVERRIDES += ["n_examples=8", "batch_size=4", "eval_every=4", "save_every=8"]
OVERRIDES += ["n_eval_examples=16", "n_eval_model_samples=3", "eval_batch_size=8"]


@pytest.mark.full
def test_the_experiment_runs_and_goes_on_where_it_ended(
    tmp_path: Path,
    tiny_model_dir: Path,
    cache_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    (tmp_path / "small.yaml").write_text(yaml.safe_dump({"tiny": SMALL}))
    monkeypatch.setattr(frontier, "SETTINGS", tmp_path / "small.yaml")
    folder, overrides = tmp_path / "beta=out", [f"model.name_or_path={tiny_model_dir}", f"cache_dir={cache_dir}"]
    command = ["frontier.py", "--settings", "tiny", "--folder", str(folder), *OVERRIDES, *overrides]
    monkeypatch.setattr(sys, "argv", command)
    frontier.main()
    rows = list(csv.DictReader(open(folder / "frontier.csv")))
    best, runs = rows[:3], rows[3:]
    assert [row["setting"] for row in best] == ["N 1", "N 2", "N 4"]
    assert [float(row["kl"]) for row in best] == pytest.approx([0, 0.193147, 0.636294], abs=1e-6)
    assert [(row["setting"], row["examples"]) for row in runs] == [
        *itertools.product(["beta 0.1", "beta 1", "alpha 0"], ["4", "8"])
    ]
    logged = read_jsonl(folder / "DPO" / "loss.beta-1" / "metrics.jsonl")[-1]
    assert float(runs[3]["kl"]) == logged["kl_eval/rao_blackwell"] > 0
    assert {row["prompts"] for row in rows} == {"3"}
    assert (folder / "frontier.png").stat().st_size > 10_000
    assert "KL at the end of training" in (folder / "frontier.md").read_text()

    before = {path: path.read_bytes() for path in folder.glob("*/*/metrics.jsonl")}
    SMALL["methods"]["DPO"]["values"] = [1]  # the run of the other beta is no longer of the experiment
    (tmp_path / "small.yaml").write_text(yaml.safe_dump({"tiny": SMALL}))
    frontier.main()
    assert {path: path.read_bytes() for path in folder.glob("*/*/metrics.jsonl")} == before
    assert [row["setting"] for row in csv.DictReader(open(folder / "frontier.csv"))][3:] == ["beta 1"] * 2 + [
        "alpha 0"
    ] * 2


def test_misuse_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for given, message in (
        (["--settings", "smal"], "choose from: small, full"),
        (["--settings", "full", "--data", str(frontier.ROOT / "data" / "sentiment")], "needs --start"),
        (["--data", str(tmp_path)], "must be a folder with train.jsonl"),
    ):
        monkeypatch.setattr(sys, "argv", ["frontier.py", "--folder", str(tmp_path / "out"), *given])
        with pytest.raises(UserError, match=message):
            frontier.main()
