"""train.py end to end, on a tiny model: run folders, checkpoints, archives, metrics, W&B, precision, errors."""

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import COSTS, ROOT, RunTrain, first_fast, make_model, make_tokenizer, read_jsonl, train_here
from transformers import AutoModelForCausalLM, AutoTokenizer

import trainers
from dpo.model.logps import add_token_logps
from dpo.optimizer import Updater
from dpo.run import checkpoint, saved
from dpo.run.checkpoint import CheckpointWriter
from dpo.run.stopping import SAME_REQUEST
from dpo.run.weights import weights_identity
from dpo.sampling import Sampling, sample
from dpo.utils import UserError, file_hash
from opening import find_reference, find_saved
from settings import load_config
from utils import run_main

Overrides = Callable[..., list[str]]
DPO = ("loss=dpo", "loss.beta=0.1")


def test_sft_then_dpo_as_processes(train_process: RunTrain, tmp_path: Path) -> None:
    sft = train_process(f"local_run_dir={tmp_path / 'sft'}", "lr=1e-3", "eval_every=12", "n_eval_examples=8")
    assert sft.returncode == 0, sft.stderr
    steps = sorted(path.name for path in (tmp_path / "sft").glob("step-*"))
    assert steps == ["step-12", "step-24"]
    assert os.readlink(tmp_path / "sft" / "LATEST") == "step-24"
    events = read_jsonl(tmp_path / "sft" / "metrics.jsonl")
    train = [e for e in events if "loss/train" in e]
    evals = [e for e in events if "loss/eval" in e]
    assert [e["counters/examples"] for e in train] == [4, 8, 12, 16, 20, 24]
    assert [e["counters/examples"] for e in evals] == [0, 12, 24]
    assert {e["counters/eval_examples"] for e in evals} == {8}
    assert "evaluation after 12 examples\n" in sft.stdout
    card = (tmp_path / "sft" / "LATEST" / "README.md").read_text()
    assert "| held-out metric | value | n |" in card and re.search(r"\| loss/eval \| [\d.]+ \| 8 \|", card)
    assert evals[-1]["loss/eval"] < evals[0]["loss/eval"]
    assert not list((tmp_path / "sft").glob(".step*"))
    for name in ("config.yaml", "log.txt", "samples.jsonl", "data_funnel.json", ".hydra/overrides.yaml"):
        assert (tmp_path / "sft" / name).stat().st_size > 0
    # The form in which the original's README passes the SFT result on.
    archive = f"model.archive={tmp_path / 'sft' / 'LATEST' / 'policy.pt'}"
    dpo = train_process(*DPO, archive, f"local_run_dir={tmp_path / 'dpo'}", "n_eval_examples=8", "lr=1e-3")
    assert dpo.returncode == 0, dpo.stderr
    events = read_jsonl(tmp_path / "dpo" / "metrics.jsonl")
    assert events[0]["loss/eval"] == pytest.approx(math.log(2)) and events[0]["rewards_eval/margins"] == 0
    assert {f"rewards_train/{k}" for k in ("chosen", "rejected", "accuracies", "margins")} <= set(events[1])
    assert {"logps_train/chosen", "logps_train/rejected", "grad_norm", "examples_per_second", "lr"} <= set(events[1])
    assert events[-1]["rewards_eval/margins"] > 0
    rows = read_jsonl(tmp_path / "dpo" / "samples.jsonl")
    assert set(rows[0]) == {"counters/examples", "prompt", "policy", "reference"}
    by_step = {step: [r for r in rows if r["counters/examples"] == step] for step in (0, 24)}
    assert by_step[0][0]["policy"] == by_step[0][0]["reference"] == by_step[24][0]["reference"]
    card = (tmp_path / "dpo" / "LATEST" / "README.md").read_text()
    for fact in ("beta=0.1", "24 examples", "rewards_eval/accuracies", "weights of `sft/step-24`", "python train.py"):
        assert fact in card
    assert str(tmp_path) not in card


def test_each_term_of_a_sum_of_losses_is_logged(overrides: Overrides, tmp_path: Path) -> None:
    given = ("loss=mpo", "loss.beta=0.1", "n_eval_examples=8", "eval_every=12", "lr=1e-3", "sample_during_eval=false")
    train_here(overrides(*given, "keep_best=loss_eval/dpo"))
    events = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    for split in ("train", "eval"):
        rows = [e for e in events if f"loss/{split}" in e]
        assert len(rows) == {"train": 6, "eval": 3}[split]
        for row in rows:
            dpo, bco, nll = (row[f"loss_{split}/{term}"] for term in ("dpo", "bco", "nll"))
            assert row[f"loss/{split}"] == pytest.approx(0.8 * dpo + 0.2 * bco + nll, rel=1e-5)
    found = {e["counters/examples"]: e["loss_eval/dpo"] for e in events if "loss_eval/dpo" in e}
    assert found.pop(0) == pytest.approx(math.log(2), rel=1e-5) and len(set(found.values())) == 2
    best = min(found, key=lambda examples: found[examples])  # of a term, too, the lowest is best
    assert (tmp_path / "run" / "BEST").resolve().name == f"step-{best}"


@pytest.mark.full
def test_kl_is_seen_while_training(overrides: Overrides, tmp_path: Path) -> None:
    given = ("n_eval_examples=8", "n_eval_model_samples=4", "n_eval_samples_per_prompt=3", "lr=1e-3", "eval_every=12")
    for mode in ("stored", "live"):
        train_here(overrides(*DPO, *given, f"reference.mode={mode}", f"local_run_dir={tmp_path / mode}"))
    stored, live = (
        [e for e in read_jsonl(tmp_path / mode / "metrics.jsonl") if "loss/eval" in e] for mode in ("stored", "live")
    )
    names = [f"kl_eval/{name}{end}" for name in ("plain", "rao_blackwell") for end in ("", "_error")]
    assert [e["counters/examples"] for e in stored] == [0, 12, 24]
    assert {stored[0][name] for name in names} == {0.0}
    assert 0.01 < stored[1]["kl_eval/rao_blackwell"] < stored[2]["kl_eval/rao_blackwell"]
    for one, other in zip(stored, live):
        assert [other[name] for name in names] == pytest.approx([one[name] for name in names], rel=1e-5, abs=1e-6)
    rows = read_jsonl(tmp_path / "stored" / "samples.jsonl")
    assert len(rows) == 3 * 12 and len({row["prompt"] for row in rows}) == 4

    # SFT has no reference, but a beginning.
    train_here(overrides(*given, "loss=sft", f"local_run_dir={tmp_path / 'sft'}"))
    train_here(overrides(*given, "loss=sft", "kl_during_eval=true", f"local_run_dir={tmp_path / 'far'}"))
    without, far = (read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("sft", "far"))
    assert not any(name in event for event in without for name in names)
    assert far[0]["kl_eval/plain"] == 0 and far[-1]["kl_eval/rao_blackwell"] > 0.01


def test_kl_of_the_last_evaluation_is_that_of_the_checkpoint(overrides: Overrides, tmp_path: Path) -> None:
    train_here(overrides(*DPO, "n_eval_examples=8", "n_eval_model_samples=4", "lr=1e-3"))
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "LATEST").double()
    reference, tokenizer = make_model().double(), make_tokenizer()
    last = read_jsonl(tmp_path / "run" / "metrics.jsonl")[-1]
    rows = [r for r in read_jsonl(tmp_path / "run" / "samples.jsonl") if r["counters/examples"] == 24]
    prompts = [tokenizer(row["prompt"]).input_ids for row in rows]
    how = Sampling(64 - max(map(len, prompts)), 16, 0, torch.float32)
    found = sample(AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "LATEST"), tokenizer, prompts, how)
    assert tokenizer.batch_decode(found, skip_special_tokens=True) == [row["policy"] for row in rows]
    plain, exact = [], []
    with torch.no_grad():
        for prompt, response in zip(prompts, found):
            ids = torch.tensor([prompt + response])
            ours, theirs = (m(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for m in (policy, reference))
            tokens = torch.tensor(response)[:, None]
            plain.append(float((ours.gather(1, tokens) - theirs.gather(1, tokens)).sum()))
            exact.append(float((ours.exp() * (ours - theirs)).sum()))
    assert last["kl_eval/plain"] == pytest.approx(sum(plain) / 4, abs=1e-4)
    assert last["kl_eval/rao_blackwell"] == pytest.approx(sum(exact) / 4, abs=1e-4)


def other_weights(folder: Path) -> None:
    """Write other weights over those in `folder`, into the same files."""
    model = make_model()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    model.save_pretrained(folder.parent / "others")
    shutil.copyfile(folder.parent / "others" / "model.safetensors", folder / "model.safetensors")


def retrained(archive: Path) -> None:
    other_weights(archive)
    if (archive / "manifest.json").exists():
        files = json.loads((archive / "manifest.json").read_text())["files"]
        weights = archive / "model.safetensors"
        files["model.safetensors"] = [weights.stat().st_size, file_hash(weights, checkpoint.SHORT_HASH)]
        (archive / "manifest.json").write_text(checkpoint._manifest(files))


@pytest.mark.parametrize("what", first_fast(["folder", "checkpoint", "base model"]))
@pytest.mark.parametrize("change", ["retrained", "removed"])
def test_an_archive_that_changes_during_the_run_is_not_taken_for_the_reference(
    what: str,
    change: str,
    overrides: Overrides,
    tiny_model_dir: Path,
    run_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    archive, given = tmp_path / "archive", [*DPO, "n_eval_examples=8", "lr=1e-2", "eval_every=12"]
    shutil.copytree((run_dir / "LATEST").resolve() if what == "checkpoint" else tiny_model_dir, archive)
    given.append(f"model.{'name_or_path' if what == 'base model' else 'archive'}={archive}")
    train_here(overrides(*given, f"local_run_dir={tmp_path / 'whole'}"))
    before = weights_identity(str(archive))
    evaluate = trainers.Trainer.evaluate

    def change_it(trainer: trainers.Trainer) -> None:
        if trainer.examples == 12:
            retrained(archive) if change == "retrained" else shutil.rmtree(archive)
        evaluate(trainer)

    monkeypatch.setattr(trainers.Trainer, "evaluate", change_it)
    capsys.readouterr()
    train_here(overrides(*given))
    shown = capsys.readouterr().out
    assert shown.count("warning: the reference cannot be read again: ") == 2, shown
    assert ("has other content than" if change == "retrained" else "is gone since") in shown
    whole, found = (read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("whole", "run"))
    for one, other in zip(whole, found, strict=True):  # nothing but KL is missing
        left_out = {*COSTS} | {name for name in one if name.startswith("kl_eval/") and one["counters/examples"]}
        assert {k: v for k, v in one.items() if k not in left_out} == {k: v for k, v in other.items() if k not in COSTS}
    last = tmp_path / "run" / "LATEST"
    assert json.loads((last / "trainer_state.json").read_text())[checkpoint.START] == before
    assert (last / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "LATEST" / "model.safetensors"
    ).read_bytes()
    policy = find_saved(str(tmp_path / "run"), ["device=cpu"])
    with pytest.raises(UserError, match="weights have changed since" if change == "retrained" else "no such f"):
        find_reference(policy, None, ["device=cpu"])
    if change == "retrained":
        with pytest.raises(UserError, match=f"{checkpoint.START} has changed|reference has changed"):
            train_here(overrides(*given, "n_epochs=2", "resume=auto"))


def test_weights_are_identified_by_all_their_content_and_nothing_else(run_dir: Path, tmp_path: Path) -> None:
    folder, original = tmp_path / "same", (run_dir / "LATEST").resolve()
    shutil.copytree(original, folder)
    identity = weights_identity(str(folder))
    assert identity and identity == weights_identity(str(original))
    for name in ("manifest.json", "README.md", "tokenizer.json", "generation_config.json"):
        (folder / name).unlink()
    shutil.rmtree(folder / "training_state")
    assert weights_identity(str(folder)) == identity
    big = tmp_path / "big"
    big.mkdir()
    content = bytearray(3 * 2**20)  # a change in the middle, far from both ends
    for name in ("model.safetensors", "policy.pt", "model.gguf"):
        (big / name).write_bytes(content)
        given = str(big if name == "model.safetensors" else big / name)
        before = weights_identity(given)
        content[len(content) // 2] ^= 1
        (big / name).write_bytes(content)
        assert before and weights_identity(given) not in (None, before), name
    assert weights_identity(str(tmp_path / "none")) is None
    assert weights_identity("org/not-on-the-hub") is None


@pytest.mark.full
def test_a_checkpoint_gives_the_same_logits_in_a_fresh_process(overrides: Overrides, tmp_path: Path) -> None:
    train_here(overrides("n_eval_examples=0", "lr=1e-2"))
    folder = tmp_path / "run" / "LATEST"
    ids = torch.arange(1, 20)[None]
    here = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
    assert not torch.equal(here, make_model()(ids).logits)
    program = (
        "import sys, torch; from transformers import AutoModelForCausalLM as M; "
        "torch.save(M.from_pretrained(sys.argv[1])(torch.arange(1, 20)[None]).logits, sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", program, str(folder), str(tmp_path / "logits.pt")], check=True)
    assert torch.equal(here, torch.load(tmp_path / "logits.pt"))
    assert AutoTokenizer.from_pretrained(folder)("film").input_ids == make_tokenizer()("film").input_ids


@pytest.mark.full
def test_every_form_of_archive_gives_the_same_start(overrides: Overrides, tmp_path: Path) -> None:
    train_here(overrides("n_eval_examples=0", "lr=1e-2", f"local_run_dir={tmp_path / 'sft'}"))
    weights = AutoModelForCausalLM.from_pretrained(tmp_path / "sft" / "LATEST").state_dict()
    torch.save({"step_idx": 24, "state": weights, "metrics": {"loss/eval": 1.0}}, tmp_path / "policy.pt")
    first = []
    forms = ("sft", "sft/step-24", "sft/LATEST", "sft/LATEST/policy.pt", "policy.pt")
    for i, form in enumerate(forms):
        run = tmp_path / f"dpo{i}"
        train_here(overrides(*DPO, f"model.archive={tmp_path / form}", f"local_run_dir={run}", "n_eval_examples=4"))
        first.append(read_jsonl(run / "metrics.jsonl")[0]["logps_eval/chosen"])
    assert len(set(first)) == 1


@pytest.mark.parametrize("steps", [2, 8])
def test_training_does_not_depend_on_gradient_accumulation(steps: int, overrides: Overrides, tmp_path: Path) -> None:
    def run(n: int) -> list[dict]:
        folder = tmp_path / f"run{n}"
        train_here(
            overrides(*DPO, f"gradient_accumulation_steps={n}", "batch_size=16", "lr=1e-3", "n_eval_examples=0",
                      f"local_run_dir={folder}", "optimizer=AdamW")
        )  # fmt: skip
        return read_jsonl(folder / "metrics.jsonl")

    for one, other in zip(run(1), run(steps), strict=True):
        for name in one.keys() - COSTS:
            assert other[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name


def test_the_last_partial_batch_and_n_examples_are_exact(overrides: Overrides, tmp_path: Path) -> None:
    train_here(overrides("batch_size=10", "n_eval_examples=0", "n_epochs=null", "n_examples=37"))
    counts = [e["counters/examples"] for e in read_jsonl(tmp_path / "run" / "metrics.jsonl")]
    assert counts == [10, 20, 24, 34, 37]


def test_one_seed_one_run_and_another_seed_another(overrides: Overrides, tmp_path: Path) -> None:
    losses = []
    for i, seed in enumerate((1, 1, 2)):
        run = tmp_path / f"run{i}"
        train_here(overrides(f"seed={seed}", f"local_run_dir={run}", "n_eval_examples=4"))
        losses.append([e["loss/train"] for e in read_jsonl(run / "metrics.jsonl") if "loss/train" in e])
    assert losses[0] == losses[1] != losses[2]
    samples = [(tmp_path / f"run{i}" / "samples.jsonl").read_text() for i in range(2)]
    assert samples[0] == samples[1]


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_margin_is_exactly_zero_before_the_first_update(precision: str, overrides: Overrides, tmp_path: Path) -> None:
    train_here(
        overrides(
            *DPO, f"mixed_precision={precision}", "n_eval_examples=8", "lr=1e-3", "batch_size=8", "reference.mode=live"
        )
    )
    events = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert events[0]["rewards_eval/margins"] == events[0]["rewards_eval/chosen"] == 0
    assert events[1]["rewards_train/margins"] == 0 and events[-1]["loss/eval"] < events[0]["loss/eval"]


def test_margin_is_rounding_before_the_first_update_with_a_stored_reference(
    overrides: Overrides, tmp_path: Path
) -> None:
    train_here(overrides(*DPO, "n_eval_examples=8", "batch_size=8", "gradient_accumulation_steps=4"))
    for event, split in zip(read_jsonl(tmp_path / "run" / "metrics.jsonl"), ("eval", "train")):
        assert abs(event[f"rewards_{split}/margins"]) < 1e-6 and event[f"rewards_{split}/accuracies"] == 0


def test_a_reference_that_differs_stops_the_run(overrides: Overrides, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []

    def load(*arguments: object, **_: object) -> torch.nn.Module:
        model = make_model()
        with torch.no_grad():
            model.lm_head.weight.add_(1e-3 * len(loaded) * torch.randn(model.lm_head.weight.shape))
        loaded.append(model)
        return add_token_logps(model)

    for module in (trainers, saved):
        monkeypatch.setattr(module, "load_policy", load)
    with pytest.raises(UserError, match="differ before the first update"):
        train_here(overrides(*DPO, "reference.mode=live"))


@pytest.mark.parametrize(
    ("given", "warned"),
    [
        ("round_to_nearest=true model.policy_dtype=bfloat16 lr=5e-7", True),
        ("round_to_nearest=true model.policy_dtype=bfloat16 lr=5e-7 optimizer=AdamW", True),
        ("round_to_nearest=true model.policy_dtype=bfloat16 lr=1e-1", False),
        ("round_to_nearest=true model.policy_dtype=bfloat16 lr=5e-7 optimizer=SGD", False),
        ("round_to_nearest=true model.policy_dtype=float32 lr=5e-7 mixed_precision=bfloat16", False),
        ("model.policy_dtype=bfloat16 lr=5e-7", False),
    ],
)
def test_steps_that_the_weights_are_too_coarse_for(
    given: str, warned: bool, overrides: Overrides, capsys: pytest.CaptureFixture[str]
) -> None:
    train_here(overrides(*given.split(), "n_eval_examples=0", "n_examples=4"))
    found = re.search(
        r"too coarse for lr=\S+\. A step of .*, and (\S+)% of the weights stay .*", capsys.readouterr().out
    )
    assert bool(found) == warned
    if found:
        dtype = torch.bfloat16
        weights = torch.cat([p.flatten() for p in make_model().parameters()]).to(dtype)
        spacing = torch.nextafter(weights.abs(), torch.tensor(torch.inf, dtype=dtype)).float() - weights.abs().float()
        share = float((float(given.split("lr=")[1].split()[0]) < spacing / 2).float().mean())
        assert float(found[1]) / 100 == pytest.approx(share, abs=2e-3)
        assert "Set round_to_nearest=false, or model.policy_dtype=float32 mixed_precision=bfloat16" in found[0]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_learning_rates(schedule: str, overrides: Overrides, tmp_path: Path) -> None:
    train_here(
        overrides("lr=1e-3", "warmup_steps=3", f"lr_schedule={schedule}", "lr_min_ratio=0.1", "n_eval_examples=0",
                  "batch_size=2", "optimizer=SGD", "weight_decay=0.1", "decay_norms_and_biases=false")
    )  # fmt: skip
    found = [e["lr"] / 1e-3 for e in read_jsonl(tmp_path / "run" / "metrics.jsonl")]
    done = [(s - 3) / 9 for s in range(3, 12)]
    after = {
        "constant": [1.0] * 9,
        "linear": [0.1 + 0.9 * (1 - d) for d in done],
        "cosine": [0.1 + 0.45 * (1 + math.cos(math.pi * d)) for d in done],
    }
    assert found == pytest.approx([0.25, 0.5, 0.75, *after[schedule]])


def test_weight_decay_spares_norms_and_biases() -> None:
    from dpo.optimizer import build_optimizer
    from settings import load_config

    config = load_config(["exp_name=x", "optimizer=AdamW", "weight_decay=0.1", "decay_norms_and_biases=false"])
    groups = build_optimizer(make_model("gpt2"), config).param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert all(p.ndim > 1 for p in groups[0]["params"]) and all(p.ndim == 1 for p in groups[1]["params"])


def test_activation_checkpointing_changes_nothing(overrides: Overrides, tmp_path: Path) -> None:
    losses = []
    for flag in ("false", "true"):
        run = tmp_path / flag
        train_here(overrides(*DPO, f"activation_checkpointing={flag}", f"local_run_dir={run}", "n_eval_examples=4"))
        losses.append([e["loss/train"] for e in read_jsonl(run / "metrics.jsonl") if "loss/train" in e])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.full
def test_a_device_map_changes_nothing(overrides: Overrides, tmp_path: Path) -> None:
    losses = []
    for placement in ("null", "balanced"):
        run = tmp_path / placement
        given = (*DPO, f"model.device_map={placement}", "device=auto", f"local_run_dir={run}", "n_eval_examples=4")
        train_here(overrides(*given))
        losses.append([e["loss/train"] for e in read_jsonl(run / "metrics.jsonl") if "loss/train" in e])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.full
def test_without_local_run_dir_a_fresh_folder_is_made(train_process: RunTrain, tmp_path: Path) -> None:
    done = train_process("local_run_dir=", "local_dirs=[/does/not/exist,runs]", "debug=true", "n_eval_examples=0")
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "runs").glob("*/test_*")
    assert (run / "metrics.jsonl").exists() and not (run / "LATEST").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["runs"]


# Errors ---------------------------------------------------------------------------------------------------------------


def files(tmp_path: Path) -> dict[str, Path]:
    """Broken things a user may point at, by name."""
    other = make_model(hidden=64)
    other.save_pretrained(tmp_path / "wider")
    make_tokenizer().save_pretrained(tmp_path / "wider")
    make_model().save_pretrained(tmp_path / "no_tokenizer")
    make_model().save_pretrained(tmp_path / "no_weights")
    make_tokenizer().save_pretrained(tmp_path / "no_weights")
    (tmp_path / "no_weights" / "model.safetensors").unlink()
    make_model().save_pretrained(tmp_path / "cut_weights")
    make_tokenizer().save_pretrained(tmp_path / "cut_weights")
    with open(tmp_path / "cut_weights" / "model.safetensors", "r+b") as file:
        file.truncate(1000)
    torch.save({"state": other.state_dict(), "step_idx": 1, "metrics": {}}, tmp_path / "wider.pt")
    torch.save({"weights": 1}, tmp_path / "other.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "wider.pt").read_bytes()[:5000])
    torch.save({"state": {}, "step_idx": Path("x")}, tmp_path / "objects.pt")
    (tmp_path / "empty_dir").mkdir()
    (tmp_path / "not_a.gguf").write_text("hello")
    bigger = make_tokenizer()
    bigger.add_tokens(["<|more|>"])
    bigger.save_pretrained(tmp_path / "more_tokens")
    make_model().save_pretrained(tmp_path / "cut_config")
    (tmp_path / "cut_config" / "config.json").write_text('{"model_type": "lla')
    (tmp_path / "empty_gz").mkdir()
    (tmp_path / "empty_gz" / "train.jsonl.gz").write_bytes(b"\x1f\x8b\x08\x00")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "file").write_text("")
    return {path.name: path for path in tmp_path.iterdir()}


BAD_RUNS = [
    ("model.name_or_path={none}", "there is no such folder"),
    ("model.name_or_path=org/not-on-the-hub", "org/not-on-the-hub"),
    ("model.name_or_path={no_tokenizer}", "model.tokenizer_name_or_path"),
    ("model.name_or_path={no_weights}", "no model could be read"),
    ("model.name_or_path={cut_weights}", "no model could be read"),
    ("model.name_or_path={not_a.gguf}", "not_a.gguf"),
    ("model.tokenizer_name_or_path={empty_dir}", "no tokenizer could be read"),
    ("model.archive={none}", "no such file or folder"),
    ("model.archive={empty_dir}", "holds no config.json"),
    ("model.archive={no_weights}", "holds no weights"),
    ("model.archive={wider}", "hidden_size is 64 there and 32 here"),
    ("model.archive={wider.pt}", "of another architecture"),
    ("model.archive={other.pt}", "no 'state'"),
    ("model.archive={cut.pt}", "cannot be read"),
    ("model.archive={objects.pt}", "not opened for safety"),
    ("local_run_dir={taken}", "already holds a run"),
    ("local_run_dir={file}", "cannot create the folder"),
    ("local_run_dir={file}/run", "cannot create the folder"),
    ("cache_dir={file}", "cannot be written"),
    ("datasets=[{none}]", "no such file or folder"),
    ("datasets=[nope]", "sentiment"),
    ("datasets=[{empty_dir}]", "holds no data file"),
    ("dataset_sources.hh={none}", "no such file or folder"),
    ("dataset_sources.hh={empty_gz}", "gzip"),
    ("dataset_weights=[0.001]", "leave no example"),
    ("model.tokenizer_name_or_path={more_tokens}", "the tokenizer has 321 tokens but the model embeds 320"),
    ("max_length=4096", "is more than the 2048 positions"),
    ("model.archive={cut_config}", "its config cannot be read"),
    ("+optimizer_kwargs.alpha=2 optimizer=AdamW", "refuses its arguments"),
    ("lr=1e30 optimizer=SGD max_grad_norm=1e30", "Training stopped"),
]


@pytest.mark.parametrize(("given", "message"), BAD_RUNS)
def test_bad_runs_give_one_clear_message(
    given: str, message: str, overrides: Overrides, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = tmp_path / "files"
    here.mkdir()
    paths = {**files(here), "none": here / "none"}
    for name, path in paths.items():
        given = given.replace("{" + name + "}", str(path))
    extra = ["datasets=[hh]"] if given.startswith("dataset_sources") else []
    arguments = overrides(*extra, *given.split(), "n_eval_examples=0")
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: train_here(arguments))
    assert stop.value.code == 1
    shown = capsys.readouterr().err.split("error: ")[-1]
    assert message in shown and "Traceback" not in shown and len(shown) < 1500
    assert not (tmp_path / "run" / "metrics.jsonl").exists() or "Training stopped" in message


def test_a_run_that_diverges_at_its_last_update_saves_nothing(overrides: Overrides, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing of this state was saved"):
        train_here(overrides("batch_size=24", "optimizer=SGD", "lr=1e30", "max_grad_norm=1e30", "n_eval_examples=8"))
    assert not list((tmp_path / "run").glob("step-*"))


def test_weights_that_are_not_finite_are_not_saved(
    overrides: Overrides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poison(updater: Updater, grad_norm: float) -> None:
        next(updater.policy.parameters()).data[0] = float("nan")

    monkeypatch.setattr(Updater, "step", poison)
    with pytest.raises(UserError, match="weights are not finite"):
        train_here(overrides("batch_size=24", "n_eval_examples=0"))
    assert not list((tmp_path / "run").glob("step-*"))


def test_gradients_that_never_become_finite_stop_a_scaled_run(
    overrides: Overrides, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = trainers.load_policy

    def broken(*arguments: object, **_: object) -> torch.nn.Module:
        model = load(*arguments)
        model.lm_head.weight.register_hook(lambda gradient: gradient * float("nan"))
        return model

    monkeypatch.setattr(trainers, "load_policy", broken)
    with pytest.raises(UserError, match="gradient norm nan"):
        train_here(overrides("mixed_precision=float16", "n_epochs=20", "n_eval_examples=0"))


def test_a_gradient_that_is_not_finite_is_named(overrides: Overrides, monkeypatch: pytest.MonkeyPatch) -> None:
    load = trainers.load_policy

    def broken(*arguments: object, **_: object) -> torch.nn.Module:
        model = load(*arguments)
        model.model.norm.weight.register_hook(lambda gradient: gradient * float("inf"))
        return model

    monkeypatch.setattr(trainers, "load_policy", broken)
    named = r"every example's loss is finite; .* gradients that are not finite: model\.norm\.weight \(of \d+\)"
    with pytest.raises(UserError, match=named):
        train_here(overrides("n_eval_examples=0"))


def test_samples_do_not_take_the_models_own_generation_settings() -> None:
    model, tokenizer = make_model().eval(), make_tokenizer()
    plain = sample(model, tokenizer, [[5, 6], [7]], Sampling(22, 2, 0, torch.float32))
    model.generation_config.repetition_penalty = 5.0
    assert sample(model, tokenizer, [[5, 6], [7]], Sampling(22, 2, 0, torch.float32)) == plain
    assert model.generation_config.repetition_penalty == 5.0


@pytest.mark.parametrize("given", first_fast(["bacth_size=4", "model=gpt5", "model.archive=/none"]))
def test_errors_of_the_process_have_no_traceback(given: str, train_process: RunTrain, tmp_path: Path) -> None:
    done = train_process(given)
    assert done.returncode == 1
    expected = {"bacth_size=4": "did you mean 'batch_size'?"}
    assert expected.get(given, given.split("=")[1]) in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert not (tmp_path / "run" / "LATEST").exists()


def test_a_full_disk_leaves_the_previous_checkpoint(train_process: RunTrain, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    # Room for one checkpoint (plus the margin that a second would need), not for two.
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=17m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here (needs root)")
    try:
        filler = disk / "filler"
        done = train_process(f"local_run_dir={disk / 'run'}", "n_eval_examples=0")
        assert done.returncode == 0, done.stderr
        before = (disk / "run" / "LATEST").resolve()
        weights = (before / "model.safetensors").read_bytes()
        filler.write_bytes(b"0" * (os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize - 60_000))
        config = {"loss": {"name": "sft"}, "model": {"name_or_path": "m", "archive": None}, "datasets": [], "seed": 0}
        state = {"examples": 99, "updates": 1, "metrics": {}, "command": "c", "config": config}
        writer = CheckpointWriter(disk / "run")
        for checked in (True, False):
            with pytest.MonkeyPatch.context() as patch:
                if not checked:  # the space runs out while writing
                    patch.setattr("dpo.run.checkpoint._space_problem", lambda *_: None)
                with pytest.raises(UserError, match=f"last complete checkpoint is {before}"):
                    writer.save(make_model(), make_tokenizer(), lambda: state)
            assert (disk / "run" / "LATEST").resolve() == before
            assert (before / "model.safetensors").read_bytes() == weights
            assert sorted(p.name for p in (disk / "run").glob("*step*")) == ["step-24"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_ctrl_c_says_what_is_left(overrides: Overrides, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "train.py"), *overrides("n_epochs=100000", "n_eval_examples=0")]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 75 and "Traceback" not in stderr, stderr
    assert "SIGINT: this step is finished and saved" in stderr
    assert "to go on: the same command, with resume=auto" in stdout
    assert (tmp_path / "run" / "LATEST").is_dir()


def test_a_second_ctrl_c_stops_at_once(overrides: Overrides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(trainer: trainers.Trainer, examples: list) -> None:
        signal.raise_signal(signal.SIGINT)
        time.sleep(SAME_REQUEST + 0.1)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(trainers.Trainer, "train_step", slow)
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: train_here(overrides("n_eval_examples=0")))
    assert stop.value.code == 130 and not list((tmp_path / "run").glob("step-*"))


def test_a_run_ends_with_commands_to_paste(overrides: Callable[..., list[str]], tmp_path: Path, capsys: Any) -> None:
    train_here(overrides("loss=sft"))
    said = capsys.readouterr().out
    _, _, commands = said.partition("next:\n")
    report, chat, sample, dpo = (shlex.split(line.partition("<")[0]) for line in commands.strip().splitlines()[:4])
    assert report == ["python", "scripts/report.py", str(tmp_path / "run")] and sample[1] == "scripts/sample.py"
    assert chat[1:] == ["scripts/chat.py", str(tmp_path / "run")]
    assert load_config([*dpo[2:], "exp_name=x"]).model.archive == str(tmp_path / "run")
    assert "pairs dropped" not in said and "responses truncated" not in said  # nothing was
    train_here(overrides("loss=sft", "debug=true", f"local_run_dir={tmp_path / 'other'}"))
    assert "next:" not in capsys.readouterr().out
