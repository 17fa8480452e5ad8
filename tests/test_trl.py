"""Trajectories of TRL 1.16 for its losses, reached by overrides alone: four updates of a tiny model, tests/data/trl."""

import json
from pathlib import Path

import pytest
from conftest import ROOT, read_jsonl, train_here

FOLDER = ROOT / "tests" / "data" / "trl"
TOLERANCE = 3e-4  # relative; rewards: of the largest reward
ALL = ("loss", "grad_norm", "logps", "rewards")

# TRL's name -> (overrides, numbers that mean the same, what to add to our loss). TRL logs beta times the log-ratio as
# rewards whatever the loss, so rewards are compared if that is the loss's reward.
CASES: dict[str, tuple[list[str], tuple[str, ...], float]] = {
    "dpo_sigmoid": (["loss=dpo", "loss.beta=0.1"], ALL, 0),
    "dpo_sigmoid_norm": (["loss=dpo", "loss.beta=0.1", "loss.length_normalized=true"], ALL[:3], 0),
    "dpo_hinge": (["loss=hinge", "loss.beta=0.1"], ALL, 0),
    "dpo_exo_pair": (["loss=exo", "loss.beta=0.1", "loss.label_smoothing=0.001"], ALL, 0),
    "dpo_sppo_hard": (["loss=sppo", "loss.beta=0.1", "loss.pair_weight=2"], ALL, 0),  # TRL sums over the responses
    "dpo_aot": (["loss=aot", "loss.beta=0.1"], ALL, 0),
    "dpo_apo_zero": (["loss=apo_zero", "loss.beta=0.1"], ALL, 1),  # TRL adds a constant
    "dpo_sft": (["loss=nll", "loss.nll=batch_mean"], ALL[:3], 0),
    "dpo_sigmoid_js": (["loss=dpo", "loss.beta=0.1", "loss.divergence=js"], ALL[:3], 0),
    "dpo_sigmoid_ld0.5": (["loss=dpo", "loss.beta=0.1", "loss.ld_alpha=0.5"], ALL[:2], 0),  # TRL logs weighted sums
    "cpo_sigmoid": (["loss=cpo", "loss.nll=batch_mean"], ALL, 0),
    "simpo": (["loss=simpo"], ("loss", "grad_norm", "rewards"), 0),  # TRL logs means
    "cpo_simpo": (["loss=simpo", "loss.nll_weight=1", "loss.nll=batch_mean"], ("loss", "grad_norm", "rewards"), 0),
}
NAMES = {"loss": ["loss/train"], "grad_norm": ["grad_norm"]}
NAMES |= {kind: [f"{kind}_train/{side}" for side in ("chosen", "rejected")] for kind in ("logps", "rewards")}


def trajectories() -> dict[str, dict]:
    found: dict[str, dict] = json.loads((FOLDER / "trajectories.json").read_text())["losses"]
    return found


def overrides_of(folder: Path) -> list[str]:
    """Overrides that train as TRL did, in `folder`, but for loss and learning rate."""
    overrides = ["exp_name=trl", "model=blank_model", f"model.name_or_path={FOLDER / 'model'}", "trainer=BasicTrainer"]
    overrides += [f"datasets=[{FOLDER / 'rows.jsonl'}]", "holdout_fraction=0", "n_eval_examples=0", "batch_size=8"]
    overrides += ["gradient_accumulation_steps=1", "n_epochs=4", "optimizer=SGD", "lr_schedule=constant", "lr=0.05"]
    overrides += ["warmup_steps=0", "max_grad_norm=inf", "max_length=256", "max_prompt_length=128", "debug=true"]
    overrides += [f"local_run_dir={folder / 'run'}", f"cache_dir={folder / 'cache'}", "wandb.enabled=false"]
    return [*overrides, "minimum_log_interval_secs=0"]


def updates_in(folder: Path) -> list[dict]:
    """Return the metrics of each update of the run that `overrides_of(folder)` names."""
    return [row for row in read_jsonl(folder / "run" / "metrics.jsonl") if "loss/train" in row]


@pytest.mark.parametrize("name", CASES)
def test_updates_are_those_of_trl(name: str, tmp_path: Path) -> None:
    given, compared, added = CASES[name]
    expected = trajectories()[name]
    train_here([*overrides_of(tmp_path), f"lr={expected['lr']}", *given])
    updates = updates_in(tmp_path)
    assert len(updates) == len(expected["steps"]) == 4
    largest = max(abs(step[f"rewards/{side}"]) for step in expected["steps"] for side in ("chosen", "rejected"))
    for update, step in zip(updates, expected["steps"]):
        for kind in compared:
            for ours in NAMES[kind]:
                theirs = step[ours.replace("_train", "").replace("loss/train", "loss")] - (
                    added if kind == "loss" else 0
                )
                slack = TOLERANCE * max(1.0, largest) if kind == "rewards" else 1e-7
                assert update[ours] == pytest.approx(theirs, rel=TOLERANCE, abs=slack), (ours, step)


def test_kto_is_that_of_trl(tmp_path: Path) -> None:
    """On 16 completions. In which order they are decides which are mismatched; z0 is 0 in all updates, here too."""
    pairs = read_jsonl(FOLDER / "rows.jsonl")
    rows = [
        {"prompt": p["prompt"], "completion": p[side], "label": side == "chosen"}
        for side in ("chosen", "rejected")
        for p in pairs
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = trajectories()["kto_paired16"]
    given = [
        f"datasets=[{tmp_path / 'rows.jsonl'}]",
        "batch_size=16",
        f"lr={expected['lr']}",
        "loss=kto",
        "loss.beta=0.1",
    ]
    train_here([*overrides_of(tmp_path), *given])
    for update, step in zip(updates_in(tmp_path), expected["steps"], strict=True):
        assert step["kl"] == 0
        for kind in ALL:
            for ours in NAMES[kind]:
                theirs = step[ours.replace("_train", "").replace("loss/train", "loss")]
                assert update[ours] == pytest.approx(theirs, rel=TOLERANCE, abs=TOLERANCE), (ours, step)


def test_where_trl_and_the_paper_differ_the_default_is_the_papers(tmp_path: Path) -> None:
    """On the weights before the first update, which are the same."""
    papers = {
        "dpo_sppo_hard": ["loss=sppo", "loss.beta=0.1"],
        "dpo_apo_zero": ["loss=apo_zero", "loss.beta=0.1"],
        "dpo_sft": ["loss=nll"],
        "cpo_sigmoid": ["loss=cpo"],
        "cpo_simpo": ["loss=simpo"],
        "orpo": ["loss=orpo", "loss.nll=batch_mean"],  # "paper" there: without the prompt, the mean over all tokens
    }
    for name, given in papers.items():
        train_here([*overrides_of(tmp_path / name), "n_epochs=1", *given])
        first = updates_in(tmp_path / name)[0]
        expected = trajectories()[name]["steps"][0]["loss_by_paper_formula"]
        assert first["loss/train"] == pytest.approx(expected, rel=TOLERANCE, abs=1e-7), name
