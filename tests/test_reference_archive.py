"""A reference other than the model that training starts from: reference.archive."""

import json
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import COSTS, ROOT, make_model, read_jsonl, train_here
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import dpo
import trainers
from dpo.utils import UserError

Overrides = Callable[..., list[str]]
DPO = ("loss=dpo", "loss.beta=0.5", "lr=1e-3", "n_examples=16", "batch_size=8", "n_eval_examples=4", "optimizer=SGD")


@pytest.fixture
def other(run_dir: Path) -> Path:
    """Another run of the same tokenizer, whose policy has moved."""
    return run_dir


@pytest.fixture
def trained(overrides: Overrides, other: Path, tmp_path: Path) -> Callable[..., Path]:
    def train(name: str, *given: str) -> Path:
        folder = tmp_path / name
        train_here(overrides(*DPO, f"reference.archive={other}", f"local_run_dir={folder}", *given))
        return folder

    return train


def first(folder: Path) -> dict:
    return next(row for row in read_jsonl(folder / "metrics.jsonl") if "rewards_eval/chosen" in row)


def test_rewards_are_against_the_other_model(
    trained: Callable[..., Path], other: Path, tiny_model_dir: Path, pairs_dir: Path, tmp_path: Path
) -> None:
    folder = trained("stored", "n_eval_examples=24")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(path).double().eval() for path in (tiny_model_dir, other / "LATEST")
    )

    def logp(model: torch.nn.Module, prompt: list[int], response: list[int]) -> float:
        with torch.no_grad():
            logps = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        return sum(float(logps[len(prompt) + i - 1, token]) for i, token in enumerate(response))

    rewards = []
    for row in read_jsonl(pairs_dir / "test.jsonl"):
        end = row["chosen"].rfind("Assistant:") + len("Assistant:")
        prompt = tokenizer(row["chosen"][:end])["input_ids"]
        response = tokenizer(row["chosen"][end:], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        rewards.append(0.5 * (logp(policy, prompt, response) - logp(reference, prompt, response)))
    assert first(folder)["rewards_eval/chosen"] == pytest.approx(sum(rewards) / len(rewards), rel=1e-4)
    assert abs(sum(rewards)) > 0.1


def test_stored_and_live_agree_and_a_resumed_run_too(
    trained: Callable[..., Path], other: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored, live = trained("stored"), trained("live", "reference.mode=live", "layout=padded")
    assert "is not where training starts: rewards do not start at 0" in capsys.readouterr().out
    for one, two in zip(*(read_jsonl(folder / "metrics.jsonl") for folder in (stored, live)), strict=True):
        for name in one.keys() - COSTS:
            assert one[name] == pytest.approx(two[name], rel=1e-4, abs=2e-5), name
    parts = trained("parts", "n_examples=8", "save_every=8", "sample_during_eval=false", "do_final_eval=false")
    trained("parts", "resume=auto", "save_every=8", "sample_during_eval=false", "do_final_eval=false")
    whole = trained("whole", "save_every=8", "sample_during_eval=false", "do_final_eval=false")
    weights = [load_file(folder / "LATEST" / "model.safetensors") for folder in (parts, whole)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    state = json.loads((whole / "LATEST" / "trainer_state.json").read_text())
    assert (
        state["config"]["reference"]["archive"] == str(other / "LATEST")
        or "step-" in state["config"]["reference"]["archive"]
    )
    with pytest.raises(UserError, match=r"was trained with other settings: reference\.archive=None"):
        trained("parts", "resume=auto", "reference.archive=null")


def test_the_run_is_scored_against_it(trained: Callable[..., Path], other: Path, tmp_path: Path) -> None:
    folder = trained("scored")
    out = tmp_path / "scores.jsonl"
    command = [sys.executable, str(ROOT / "scripts" / "score.py"), str(folder), "--out", str(out), "--limit", "3"]
    subprocess.run(command, check=True, timeout=200, cwd=tmp_path)
    row = read_jsonl(out)[0]
    run = dpo.load_run(folder)
    theirs = AutoModelForCausalLM.from_pretrained(other / "LATEST")
    assert torch.equal(run.reference.get_input_embeddings().weight, theirs.get_input_embeddings().weight)
    pair = {"prompt": row["prompt"], "chosen": row["responses"][0]["text"], "rejected": row["responses"][1]["text"]}
    [score] = run.score([pair])
    assert score["chosen"]["reference"] == pytest.approx(row["responses"][0]["logp_reference"], rel=1e-5)


def test_misuse_is_named(overrides: Overrides, tiny_model_dir: Path, tmp_path: Path) -> None:
    def refused(message: str, *given: str) -> None:
        with pytest.raises(UserError, match=message):
            train_here(overrides(*DPO, *given))

    refused(
        "reference.archive=x, but loss=simpo needs no reference", "loss=simpo", "loss.beta=1", "reference.archive=x"
    )
    refused("reference.archive=.*: there is no such file or folder", f"reference.archive={tmp_path / 'nowhere'}")
    refused("reference.archive=.*: there is no such file or folder", f"reference.archive={tmp_path / 'nowhere'}")
    strange = tmp_path / "strange"
    make_model().save_pretrained(strange)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(strange)
    refused("has another vocabulary than the policy", f"reference.archive={strange}")
    wide = make_model()
    wide.resize_token_embeddings(wide.config.vocab_size + 8)
    wide.save_pretrained(tmp_path / "wide")
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(tmp_path / "wide")
    refused("reference.archive has a vocabulary of", f"reference.archive={tmp_path / 'wide'}")


def test_a_stored_reference_leaves_memory(trained: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    models: list[weakref.ref] = []
    load_reference = trainers.load_reference

    def load(*arguments: Any) -> PreTrainedModel:
        model = load_reference(*arguments)
        models.append(weakref.ref(model))
        return model

    fit = trainers.Trainer.fit

    def checked(trainer: trainers.Trainer) -> None:
        assert len(models) == 1 and models[0]() is None
        fit(trainer)

    monkeypatch.setattr(trainers, "load_reference", load)
    monkeypatch.setattr(trainers.Trainer, "fit", checked)
    trained("freed")
