"""SFT, then DPO from it, on every data set with preferences: real rows if DPO_REAL_DATA is set, else committed ones."""

import math
import os
from pathlib import Path

import pytest
from conftest import ROOT, first_fast, read_jsonl, real_data, tiny_overrides, train_here

COMMITTED_HH = ROOT / "tests" / "data" / "hh"
REAL = {
    ("tldr", "sft"): "tldr/sft.jsonl.gz",
    ("tldr", "dpo"): "tldr/preference_gpt4judged.jsonl.gz",
    ("se", "sft"): "stack_exchange",
    ("se", "dpo"): "stack_exchange",
}


def check(sft: Path, dpo: Path) -> None:
    first, *_, last = [event for event in read_jsonl(dpo / "metrics.jsonl") if "loss/eval" in event]
    assert first["loss/eval"] == pytest.approx(math.log(2)) and first["rewards_eval/margins"] == 0
    assert last["loss/eval"] != first["loss/eval"] and last["logps_eval/chosen"] < 0
    for run in (sft, dpo):
        assert (run / "LATEST" / "model.safetensors").is_file()


def source_of(name: str, loss: str) -> Path:
    if (name, loss) in REAL and "DPO_REAL_DATA" in os.environ:
        return real_data(REAL[name, loss])
    return COMMITTED_HH if name == "hh" else ROOT / "tests" / "fixtures" / name


@pytest.mark.parametrize("name", first_fast(["hh", "tldr", "se", "shp", "ultrafeedback"]))
def test_sft_then_dpo(name: str, tiny_model_dir: Path, cache_dir: Path, tmp_path: Path) -> None:
    for loss in ("sft", "dpo"):
        given = [f"datasets=[{name}]", f"dataset_sources.{name}={source_of(name, loss)}", "holdout_fraction=0.2"]
        given += [
            "lr=1e-3",
            "max_length=192",
            "max_prompt_length=96",
            "n_examples=16",
            "n_epochs=8",
            "n_eval_examples=4",
        ]
        given += [f"loss={loss}", *(["loss.beta=0.1", f"model.archive={tmp_path / 'sft'}"] if loss == "dpo" else [])]
        train_here(tiny_overrides(tiny_model_dir, tmp_path, cache_dir, tmp_path / loss, *given))
    check(tmp_path / "sft", tmp_path / "dpo")


@pytest.mark.full
def test_sft_then_dpo_of_the_real_model_on_real_dialogues(cache_dir: Path, tmp_path: Path) -> None:
    common = ["exp_name=real", "model=smollm2", "datasets=[hh]", f"dataset_sources.hh={COMMITTED_HH}", "device=cpu"]
    common += [f"cache_dir={cache_dir}", "max_length=64", "max_prompt_length=32", "n_examples=2", "wandb.enabled=false"]
    common += ["n_eval_examples=2", "sample_during_eval=false", "warmup_steps=0", "lr=1e-6"]
    train_here([*common, "loss=sft", f"local_run_dir={tmp_path / 'sft'}"])
    archive = [f"model.archive={tmp_path / 'sft'}", f"local_run_dir={tmp_path / 'dpo'}"]
    train_here([*common, "loss=dpo", "loss.beta=0.1", *archive])
    check(tmp_path / "sft", tmp_path / "dpo")
