"""A loss of one's own: a class in a file of one's own and a YAML folder, and nothing else."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, read_jsonl

LOSS = '''
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field

from dpo.loss import Loss


@dataclass(frozen=True)
class Centred(Loss):
    """A weighted pair loss without a reference, which sees tokens and a statistic of the global batch."""

    gamma: Annotated[float, Field(gt=0, le=2)]
    needs_reference = False
    needs_tokens = True
    needs_statistics = True
    columns = ("weight",)

    def observe(self, examples):
        return {"margin": examples.chosen.mean - examples.losers.mean}

    def __call__(self, examples):
        first = [torch.where(side.mask, side.tokens, 0.0)[:, 0] for side in (examples.chosen, examples.losers)]
        margin = examples.chosen.mean - examples.losers.mean - examples.statistics["margin"].mean()
        loss = -torch.nn.functional.logsigmoid(self.gamma * margin) + 0.1 * (first[1] - first[0])
        return examples.columns["weight"] * loss

    def rewards(self, responses):
        return self.gamma * responses.mean
'''


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Overrides that choose the loss above."""
    (tmp_path / "research.py").write_text(LOSS)
    (tmp_path / "mine" / "loss").mkdir(parents=True)
    (tmp_path / "mine" / "loss" / "centred.yaml").write_text("name: research.Centred\ngamma: ???\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    rows = [
        {"prompt": f"Question {i}:", "chosen": f" green {i}", "rejected": " It is a river.", "weight": i % 3}
        for i in range(24)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    searched = f"hydra.searchpath=[file://{tmp_path / 'mine'}]"
    return [searched, "loss=centred", "loss.gamma=1.5", f"datasets=[{tmp_path / 'rows.jsonl'}]", "holdout_fraction=0.3"]


@pytest.mark.full
def test_it_trains_in_any_number_of_processes_and_micro_batches(
    own: list[str], overrides: Callable[..., list[str]], tmp_path: Path
) -> None:
    common = [
        "n_examples=16",
        "batch_size=8",
        "n_eval_examples=8",
        "lr=1e-2",
        "optimizer=SGD",
        "sample_during_eval=false",
    ]
    cuts = {"one": ["microbatch_tokens=null"], "two": ["trainer=FSDPTrainer", "nproc=2", "microbatch_tokens=60"]}
    metrics = {}
    for name, cut in cuts.items():
        command = [*overrides(*own, *common, *cut, f"local_run_dir={tmp_path / name}")]
        done = subprocess.run(
            [sys.executable, str(ROOT / "train.py"), *command], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        metrics[name] = read_jsonl(tmp_path / name / "metrics.jsonl")
    state = json.loads((tmp_path / "one" / "LATEST" / "trainer_state.json").read_text())
    assert state["config"]["loss"] == {"name": "research.Centred", "gamma": 1.5}
    for event, other in zip(metrics["one"], metrics["two"], strict=True):
        names = [name for name in event if name.startswith(("loss/", "logps", "rewards", "grad_norm"))]
        assert "rewards_eval/accuracies" in event or "rewards_train/accuracies" in event
        assert not any(name.startswith("logratios") for name in event)  # there is no reference
        assert {name: other[name] for name in names} == pytest.approx({name: event[name] for name in names}, rel=2e-4)
    losses = [event["loss/train"] for event in metrics["one"] if "loss/train" in event]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["loss.gamma=0"], "loss.gamma=0 must be more than 0"),
        (["+loss.gama=1"], "loss.gama: no such key of loss=research.Centred"),
        (["loss.name=research.Missing"], "loss.name=research.Missing cannot be imported"),
        (["loss.name=json.JSONDecoder"], "is no subclass of dpo.loss.Loss"),
        (["loss.name=centred"], "loss.name=centred is not known"),
    ],
)
def test_misuse_is_named(own: list[str], given: list[str], message: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "train.py"), "exp_name=x", *own, *given]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=tmp_path)
    assert done.returncode == 1 and message in done.stderr, done.stderr


@pytest.mark.full
def test_its_checkpoint_needs_the_loss_named(
    own: list[str], overrides: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dpo.run.checkpoint import read_state

    monkeypatch.syspath_prepend(str(tmp_path))
    command = overrides(*own, "n_examples=8", "batch_size=8", "n_eval_examples=0", "sample_during_eval=false")
    subprocess.run([sys.executable, str(ROOT / "train.py"), *command], check=True, timeout=200)
    folder = tmp_path / "run"
    assert read_state(folder / "LATEST")["config"]["loss"]["gamma"] == 1.5
    score = [sys.executable, str(ROOT / "scripts" / "score.py"), str(folder), "--out", str(tmp_path / "scores.jsonl")]
    refused = subprocess.run([*score, "device=cpu"], capture_output=True, text=True, timeout=200)
    assert refused.returncode == 1 and "is code outside losses.py" in refused.stderr, refused.stderr
    done = subprocess.run([*score, "device=cpu", *own], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and "reward: that of research.Centred(gamma=1.5)" in done.stdout, done.stderr
    rewards = [r["reward"] for row in read_jsonl(tmp_path / "scores.jsonl") for r in row["responses"]]
    assert torch.tensor(rewards).isfinite().all() and max(rewards) < 0
