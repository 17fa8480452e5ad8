"""A run that is stopped, killed or fails, and goes on, is the run that was not."""

import errno
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from conftest import (
    COSTS,
    first_fast,
    make_model,
    make_tokenizer,
    read_jsonl,
    tiny_overrides,
    train_here,
    write_pairs,
)
from restarts import start
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dpo import utils
from dpo.model.logps import Computation
from dpo.run import checkpoint, resume
from dpo.run.checkpoint import check, checkpoints
from dpo.run.folder import locked
from dpo.run.health import Watch
from dpo.run.metrics import HISTORY
from dpo.run.stopping import EXIT_CODE
from dpo.run.weights import find_archive
from dpo.utils import UserError
from settings import quoted

Overrides = Callable[..., list[str]]
LOSSES = {"sft": ["loss=sft"], "dpo": ["loss=dpo", "loss.beta=0.2"]}
# Twenty epochs of 24 examples; evaluations with samples, and checkpoints, in the middle of epochs.
LONG = ["n_epochs=20", "batch_size=5", "eval_every=115", "n_eval_examples=8", "optimizer=AdamW", "lr=1e-3"]
LONG += ["lr_schedule=cosine", "warmup_steps=3"]


def train_steps(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_text().count("loss/train") if path.exists() else 0


def ended(given: list[str], log: Path) -> int:
    process = start(given, log)
    process.join(300)
    assert process.exitcode is not None, log.read_text()[-3000:]
    return process.exitcode


def interrupted(given: list[str], run_dir: Path, log: Path, number: int, step: int) -> int:
    """Train, send the signal after `step` updates at the earliest, and give the exit code."""
    process = start(given, log)
    until = time.monotonic() + 300
    while train_steps(run_dir) < step and process.is_alive() and time.monotonic() < until:
        time.sleep(0.005)
    assert process.is_alive() and process.pid, log.read_text()[-3000:]
    os.kill(process.pid, number)
    process.join(120)
    return process.exitcode or 0


def without_costs(event: dict) -> dict:
    return {key: value for key, value in event.items() if key not in COSTS}


def assert_same_run(found: Path, wanted: Path) -> None:
    """Bit for bit: every logged number but costs, every sample, and the last checkpoint's weights and states."""
    for name in HISTORY:
        events = [[without_costs(event) for event in read_jsonl(folder / name)] for folder in (found, wanted)]
        assert events[0] == events[1], name
    last = [(folder / "LATEST").resolve() for folder in (found, wanted)]
    assert last[0].name == last[1].name
    assert (last[0] / "model.safetensors").read_bytes() == (last[1] / "model.safetensors").read_bytes()
    states = [{p.name: load_file(p) for p in sorted((d / "training_state").glob("*.safetensors"))} for d in last]
    assert states[0].keys() == states[1].keys() and states[0]
    for name, tensors in states[0].items():
        assert tensors.keys() == states[1][name].keys()
        assert all(torch.equal(tensor, states[1][name][key]) for key, tensor in tensors.items())


@pytest.mark.parametrize("loss", first_fast(reversed(LOSSES)))
def test_stopped_and_killed_runs_equal_one_that_was_not(loss: str, overrides: Overrides, tmp_path: Path) -> None:
    log = tmp_path / "log"
    given = overrides(*LOSSES[loss], *LONG, "resume=auto")
    assert ended([*given, f"local_run_dir={tmp_path / 'whole'}"], log) == 0, log.read_text()[-3000:]
    run_dir, pick = tmp_path / "run", random.Random(loss)
    for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGUSR1, signal.SIGINT):
        steps = train_steps(run_dir) + pick.randrange(1, 12)  # of 100
        code = interrupted(given, run_dir, log, number, steps)
        assert code == (-signal.SIGKILL if number == signal.SIGKILL else EXIT_CODE), log.read_text()[-3000:]
        assert all(check(path, "full") is None for path in checkpoints(run_dir))
    assert ended(given, log) == 0
    assert_same_run(run_dir, tmp_path / "whole")
    before = (run_dir / "metrics.jsonl").read_bytes()
    assert ended(given, log) == 0 and (run_dir / "metrics.jsonl").read_bytes() == before  # nothing is left to do


@pytest.mark.parametrize("loss", first_fast(["bco", "aot", "kto", "mpo"]))
def test_losses_with_statistics_resume_bit_for_bit(loss: str, overrides: Overrides, tmp_path: Path) -> None:
    pairs = Path(next(g for g in overrides() if g.startswith("datasets=")).removeprefix("datasets=[").removesuffix("]"))
    given = [
        f"loss={loss}",
        "loss.beta=0.5",
        "lr=1e-2",
        "n_epochs=2",
        "batch_size=8",
        "n_eval_examples=8",
        "save_every=8",
    ]
    if loss == "kto":
        rows = read_jsonl(pairs / "train.jsonl")
        ends = [row["chosen"].rfind("Assistant:") + len("Assistant:") for row in rows]
        rows = [
            {"prompt": r["chosen"][:e], "completion": r["chosen"][e:], "label": i % 3 > 0}
            for i, (r, e) in enumerate(zip(rows, ends))
        ]
        (tmp_path / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        given += [f"datasets=[{tmp_path / 'labelled.jsonl'}]", "holdout_fraction=0.4"]
    train_here(overrides(*given, f"local_run_dir={tmp_path / 'whole'}"))
    train_here(overrides(*given, f"local_run_dir={tmp_path / 'run'}", "n_examples=8", "do_final_eval=false"))
    folder = (tmp_path / "run" / "LATEST").resolve()
    assert folder.name == "step-8"
    state = json.loads((folder / "trainer_state.json").read_text())
    assert bool(state["loss_state"]) == (loss in ("bco", "mpo"))
    if loss == "bco":  # another loss starts with a state of its own
        changed = ["loss=mpo", "resume_allow_changes=true", f"resume={folder}", "n_examples=16"]
        train_here(overrides(*given, *changed, f"local_run_dir={tmp_path / 'other'}"))
    train_here(overrides(*given, f"local_run_dir={tmp_path / 'run'}", "resume=auto"))
    wanted, found = (
        {
            row["counters/examples"]: without_costs(row)
            for row in read_jsonl(tmp_path / name / "metrics.jsonl")
            if "loss/train" in row
        }
        for name in ("whole", "run")
    )
    assert wanted == found and len(wanted) > 2
    one, other = ((tmp_path / name / "LATEST" / "model.safetensors").read_bytes() for name in ("whole", "run"))
    assert one == other


@pytest.mark.full
def test_an_fsdp_run_that_is_stopped_and_killed_equals_one_that_was_not(overrides: Overrides, tmp_path: Path) -> None:
    log, run_dir = tmp_path / "log", tmp_path / "run"
    loss = os.environ.get("DPO_FSDP_LOSS", "dpo")
    given = overrides(
        *LOSSES[loss], *LONG, "n_epochs=8", "trainer=FSDPTrainer", "nproc=2", "resume=auto", "save_every=35"
    )
    assert ended([*given, f"local_run_dir={tmp_path / 'whole'}"], log) == 0, log.read_text()[-3000:]
    given.append("async_save=true")
    assert interrupted(given, run_dir, log, signal.SIGTERM, 11) == EXIT_CODE, log.read_text()[-3000:]
    process, steps = start(given, log), train_steps(run_dir) + 20
    while train_steps(run_dir) < steps and process.is_alive():
        time.sleep(0.01)
    workers = [p for p in psutil.Process(process.pid).children() if "spawn_main" in " ".join(p.cmdline())]
    workers[-1].kill()
    process.join(120)
    assert process.exitcode == 1 and len(workers) == 2, log.read_text()[-3000:]
    assert ended(given, log) == 0, log.read_text()[-3000:]
    assert_same_run(run_dir, tmp_path / "whole")


@pytest.mark.full
def test_kills_at_any_moment(overrides: Overrides, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """DPO_KILLS=50 pytest -s -n 0 -k any_moment prints the tally of so many kills. Each restart saves in the background
    or not, by chance."""
    kills, pick, log = int(os.environ.get("DPO_KILLS", "3")), random.Random(0), tmp_path / "log"
    given = overrides(*LOSSES["dpo"], *LONG, "n_epochs=8", "save_every=5", "keep_last_n=3", "resume=auto")
    begun = time.monotonic()
    assert ended([*given, f"local_run_dir={tmp_path / 'whole'}"], log) == 0, log.read_text()[-3000:]
    length = time.monotonic() - begun
    tally = {"kills": 0, "with a checkpoint to go on from": 0, "while one was being written": 0, "runs completed": 0}
    while tally["kills"] < kills:
        run_dir = tmp_path / f"run-{tally['runs completed']}"
        mine = [*given, f"local_run_dir={run_dir}", f"async_save={pick.choice(['true', 'false'])}"]
        process = start(mine, log)
        process.join(pick.uniform(0.1, length) if tally["kills"] < kills else None)
        if process.exitcode is None:
            process.kill()
            process.join()
            tally["kills"] += 1
            tally["while one was being written"] += bool(list(run_dir.glob(".step-*")))
            assert all(check(path, "full") is None for path in checkpoints(run_dir)), "half a checkpoint has a name"
            tally["with a checkpoint to go on from"] += bool(checkpoints(run_dir))
            assert bool(checkpoints(run_dir)) == (run_dir / "LATEST").is_dir() or len(checkpoints(run_dir)) == 1
        else:
            assert process.exitcode == 0, log.read_text()[-3000:]
            assert_same_run(run_dir, tmp_path / "whole")
            tally["runs completed"] += 1
    assert ended(mine, log) == 0, log.read_text()[-3000:]
    assert_same_run(run_dir, tmp_path / "whole")
    tally["runs completed"] += 1
    with capsys.disabled():
        print(f"\nkill harness: {tally}; none of them differs")


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    for process in multiprocessing.active_children():
        process.kill()


@pytest.fixture(scope="module")
def finished(tiny_model_dir: Path, pairs_dir: Path, cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with the checkpoints step-12 and step-24."""
    folder = tmp_path_factory.mktemp("finished")
    more = ("eval_every=12", "n_eval_examples=8")
    train_here(tiny_overrides(tiny_model_dir, pairs_dir, cache_dir, folder / "run", *more))
    return folder / "run"


def alterations(file: Path) -> dict[str, Callable[[], object]]:
    content = file.read_bytes()
    middle = len(content) // 2
    return {
        "cut short": lambda: file.write_bytes(content[:-1]),
        "emptied": lambda: file.write_bytes(b""),
        "removed": file.unlink,
        "flipped": lambda: file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]),
    }


@pytest.mark.parametrize("how", ["fast", "full"])
def test_every_altered_file_is_named_and_the_older_checkpoint_offered(
    how: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "full":  # as if every file were large
        monkeypatch.setattr(checkpoint, "ALWAYS_HASHED", -1)
    shutil.copytree(finished, tmp_path / "run", symlinks=True)
    newest, older = tmp_path / "run" / "step-24", tmp_path / "run" / "step-12"
    files = [path for path in newest.rglob("*") if path.is_file()]
    assert len(files) >= 9 and check(newest, how) is None
    for file in files:
        content = file.read_bytes()
        for what, alter in alterations(file).items():
            if what == "cut short" and not content:
                continue
            alter()
            with pytest.raises(UserError) as error:
                resume.find_checkpoint(str(tmp_path / "run"), how)
            message = str(error.value)
            assert file.name in message and f"the next older complete one is {older}" in message, (file, what)
            if file.name != "manifest.json":  # without it, a folder is any model
                with pytest.raises(UserError, match=r"is damaged|holds no"):
                    find_archive(str(newest), how)
            file.write_bytes(content)
    (newest / "notes.md").write_text("mine")
    assert (check(newest, how) is None) == (how == "fast")
    (newest / "notes.md").unlink()
    (newest / "more.safetensors").write_bytes(b"")
    assert check(newest, how) == "more.safetensors is not in manifest.json"


def test_a_large_file_is_hashed_by_the_full_check_only(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "ALWAYS_HASHED", 1000)
    file = finished / "step-24" / "model.safetensors"
    content = file.read_bytes()
    try:
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert check(finished / "step-24", "fast") is None
        assert check(finished / "step-24", "full") == "model.safetensors has been altered"
    finally:
        file.write_bytes(content)


def test_auto_passes_over_a_damaged_checkpoint(
    finished: Path, overrides: Overrides, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished, tmp_path / "run", symlinks=True)
    (tmp_path / "run" / "step-24" / "model.safetensors").write_bytes(b"")
    train_here(overrides("eval_every=12", "n_eval_examples=8", "resume=auto"))
    shown = capsys.readouterr().out
    assert "step-24 is passed over: model.safetensors has 0 bytes" in shown and "after 12 examples" in shown
    assert_same_run(tmp_path / "run", finished)


def test_a_manifest_cannot_name_files_outside(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "step-24", tmp_path / "step-24")
    (tmp_path / "secret").write_text("x")
    (tmp_path / "step-24" / "manifest.json").write_text(checkpoint._manifest({"../secret": [1, "00"]}))
    assert check(tmp_path / "step-24", "fast") == "manifest.json names ../secret, which is outside"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("lr=1e-4 loss.beta=0.3", "loss.beta=0.3 (was 0.2), lr=0.0001 (was 5e-07)"),
        ("n_epochs=2 lr_schedule=linear", "lr_schedule=linear (was constant), n_epochs=2 (was 1)"),
        ("max_length=60", "max_length=60 (was 64)"),
        ("datasets=[{more}]", "datasets="),
    ],
)
def test_a_resumed_run_keeps_its_meaning(given: str, message: str, overrides: Overrides, tmp_path: Path) -> None:
    more = write_pairs(tmp_path / "more", 30)
    dpo = [*LOSSES["dpo"], "n_eval_examples=0"]
    train_here(overrides(*dpo, "eval_every=12"))
    changed = overrides(*dpo, *given.replace("{more}", str(more)).split(), f"resume={tmp_path / 'run'}")
    changed = [*changed, f"local_run_dir={tmp_path / 'again'}"]
    with pytest.raises(UserError) as error:
        train_here(changed)
    assert "was trained with other settings: " in str(error.value) and message in str(error.value)
    if "datasets" not in given:
        train_here([*changed, "resume_allow_changes=true"])


def test_harmless_changes_are_told(overrides: Overrides, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_here(overrides("n_eval_examples=0", "eval_every=12"))
    train_here(overrides("n_eval_examples=0", "n_epochs=2", "microbatch_tokens=64", "resume=auto"))
    shown = capsys.readouterr().out
    assert "none changes what an update computes: eval_every=20000 (was 12), " in shown
    assert "n_epochs=2 (was 1)" in shown and "after 24 examples" in shown
    assert (tmp_path / "run" / "LATEST").resolve().name == "step-48"


def test_changed_data_and_references_are_refused(overrides: Overrides, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs")
    shutil.copytree(overrides()[2].partition("=")[2], tmp_path / "model")
    given = [*LOSSES["dpo"], "n_eval_examples=0", "eval_every=12", "resume=auto", f"datasets=[{pairs}]"]
    given += [f"model.name_or_path={tmp_path / 'model'}"]
    train_here(overrides(*given))
    write_pairs(pairs, 25)
    with pytest.raises(UserError, match="training data has changed"):
        train_here(overrides(*given))
    write_pairs(pairs)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="reference has changed"):
        train_here(overrides(*given))


def test_auto_finds_the_newest_run_of_its_name(overrides: Overrides, tmp_path: Path) -> None:
    given = overrides("local_run_dir=", f"local_dirs=[{tmp_path}]", "n_eval_examples=0", "eval_every=12", "resume=auto")
    log = tmp_path / "log"
    assert ended(given, log) == 0, log.read_text()[-3000:]
    [run_dir] = tmp_path.glob("*/test_*")
    other = run_dir.with_name(f"test_more_{run_dir.name.removeprefix('test_')}")  # of exp_name=test_more
    other.mkdir()
    shutil.rmtree(run_dir / "step-24")
    assert ended(given, log) == 0, log.read_text()[-3000:]
    assert f"resuming {run_dir / 'step-12'}" in log.read_text() and (run_dir / "step-24").is_dir()
    assert ended([*given, "exp_name=another"], log) == 0 and len(list(tmp_path.glob("*/another_*"))) == 1


def test_checkpoints_that_are_kept(overrides: Overrides, tmp_path: Path) -> None:
    given = ["eval_every=8", "save_every=4", "keep_last_n=2", "n_eval_examples=8", "n_epochs=2", "lr=1e-2"]
    train_here(overrides(*given, "keep_best=loss/eval", "optimizer=SGD"))
    events = {
        e["counters/examples"]: e["loss/eval"]
        for e in read_jsonl(tmp_path / "run" / "metrics.jsonl")
        if "loss/eval" in e
    }
    del events[0]
    best = min(events, key=lambda examples: events[examples])
    run_dir = tmp_path / "run"
    assert (run_dir / "BEST").resolve().name == f"step-{best}" and (run_dir / "LATEST").resolve().name == "step-48"
    assert {path.name for path in checkpoints(run_dir)} == {"step-44", "step-48", f"step-{best}"}
    with pytest.raises(UserError, match=r"keep_best=loss/val is not measured; choose from: .*loss/eval"):
        train_here(overrides(*given, "keep_best=loss/val", f"local_run_dir={tmp_path / 'other'}"))


@pytest.mark.parametrize("optimizer", ["RMSprop", "AdamW"])
def test_parameters_without_a_gradient_do_not_prevent_resuming(
    optimizer: str, overrides: Overrides, tmp_path: Path
) -> None:
    config = make_model("gpt2").config
    config.add_cross_attention = True  # which texts alone never reach
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    given = [f"model.name_or_path={tmp_path / 'model'}", f"optimizer={optimizer}", "max_length=48", "save_every=12"]
    train_here(overrides(*given, "n_eval_examples=8"))
    run_dir = tmp_path / "run"
    resumed = overrides(*given, "n_eval_examples=8", f"resume={run_dir / 'step-12'}")
    train_here([*resumed, f"local_run_dir={tmp_path / 'resumed'}"])
    assert without_seconds(tmp_path / "resumed")[-1] == without_seconds(run_dir)[-1]
    last = [(folder / "LATEST").resolve() for folder in (run_dir, tmp_path / "resumed")]
    [wanted, found] = [{p.name: load_file(p) for p in sorted(folder.rglob("*.safetensors"))} for folder in last]
    assert [*wanted] == [*found] and len(wanted) > 1
    for name, tensors in wanted.items():
        assert tensors.keys() == found[name].keys()
        assert all(torch.equal(tensor, found[name][key]) for key, tensor in tensors.items())
        assert any("crossattention" in key for key in tensors) is (name == "model.safetensors")


def without_seconds(run_dir: Path) -> list[dict]:
    return [without_costs(event) for event in read_jsonl(run_dir / "metrics.jsonl")]


def test_checkpoints_of_weights_only(overrides: Overrides, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir, given = tmp_path / "run", ["save_weights_only=true", "save_every=8", "n_eval_examples=0"]
    train_here(overrides(*given))
    assert "no checkpoint of this run can be resumed" in capsys.readouterr().out
    assert {path.name for path in checkpoints(run_dir)} == {"step-8", "step-16", "step-24"}
    assert not {"training_state", "random_state"} & {path.name for path in run_dir.rglob("*")}
    with pytest.raises(UserError, match=r"step-24 holds weights only .*model\.archive"):
        train_here(overrides(*given, f"resume={run_dir}"))
    train_here(overrides(*given, "resume=auto"))  # it is finished
    shutil.rmtree(run_dir / "step-24")
    with pytest.raises(UserError, match=r"no checkpoint in .* can be resumed"):
        train_here(overrides(*given, "resume=auto"))
    train_here(overrides(f"model.archive={run_dir / 'step-16'}", f"local_run_dir={tmp_path / 'other'}"))


@pytest.mark.parametrize("background", ["true", "false"])
def test_older_checkpoints_become_weights_only(background: str, overrides: Overrides, tmp_path: Path) -> None:
    run_dir, given = tmp_path / "run", ["save_every=4", "n_eval_examples=0", f"async_save={background}"]
    train_here(overrides(*given, "keep_optimizer_last_n=2", "loss=dpo", "loss.beta=0.1"))
    assert [checkpoint.weights_only(path) for path in checkpoints(run_dir)] == [False, False, True, True, True, True]
    for path in checkpoints(run_dir):
        assert check(path, "full") is None
        assert (path / "training_state").exists() is not checkpoint.weights_only(path)
        find_archive(str(path), "full")
    assert not list(run_dir.glob(".step*"))
    dpo = overrides(*given, "loss=dpo", "loss.beta=0.1", f"local_run_dir={tmp_path / 'other'}")
    with pytest.raises(UserError, match="step-16 holds weights only"):
        train_here([*dpo, f"resume={run_dir / 'step-16'}"])
    train_here([*dpo, f"resume={run_dir / 'step-20'}"])
    files = [(folder / "LATEST" / "model.safetensors").read_bytes() for folder in (run_dir, tmp_path / "other")]
    assert files[0] == files[1]
    train_here(overrides(f"model.archive={run_dir / 'step-4'}", f"local_run_dir={tmp_path / 'sft'}"))


@pytest.mark.parametrize("cut_off", ["replace", "rmtree"])
def test_a_checkpoint_is_complete_at_every_moment_of_its_pruning(
    cut_off: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree((finished / "LATEST").resolve(), tmp_path / "step-24")

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr({"replace": os, "rmtree": shutil}[cut_off], cut_off, killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.prune(tmp_path / "step-24")
    assert check(tmp_path / "step-24", "full") is None
    assert checkpoint.weights_only(tmp_path / "step-24") is (cut_off == "rmtree")
    checkpoint.prune(tmp_path / "step-24")
    assert check(tmp_path / "step-24", "full") is None and not (tmp_path / "step-24" / "training_state").exists()
    (tmp_path / "step-24" / "more.json").touch()
    assert check(tmp_path / "step-24", "fast") == "more.json is not in manifest.json"


NO_SPACE = "Error while serializing: I/O error: No space left on device (os error 28)"
FAILURES = [
    (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), True),
    (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), True),
    (SafetensorError(NO_SPACE), True),
    (OSError(errno.EACCES, os.strerror(errno.EACCES)), False),
    (OSError(errno.EROFS, os.strerror(errno.EROFS)), False),
    (UnicodeEncodeError("utf-8", "a\udcff", 1, 2, "surrogates not allowed"), False),
    (SafetensorError("Some tensors share memory"), False),
    (ValueError("2800 is no step"), False),
]


@pytest.mark.parametrize(("failure", "passes"), FAILURES, ids=lambda value: str(value)[:30])
def test_only_want_of_space_is_waited_for(
    failure: Exception,
    passes: bool,
    overrides: Overrides,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write, begun = checkpoint._write_texts, []

    def fails(folder: Path, *given: object) -> None:
        begun.append(folder.name)
        if failing(folder.name):
            raise failure
        write(folder, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint, "_write_texts", fails)
    given, began = overrides("save_every=8", "n_eval_examples=0", "save_patience=600"), time.monotonic()
    for failing in (lambda name: name == ".step-trial", lambda name: name == ".step-8-new"):
        begun.clear()
        run = [*given, f"local_run_dir={tmp_path / str(passes)}-{failing('.step-trial')}"]
        if passes:
            train_here(run)
            assert list(dict.fromkeys(begun)) == [".step-trial", ".step-8-new", ".step-16-new", ".step-24-new"]
            assert "Training continues" in capsys.readouterr().out
        else:
            with pytest.raises(UserError, match=r"(no checkpoint can|could not) be written.*" + type(failure).__name__):
                train_here(run)
            assert begun == [".step-trial"] + ([] if failing(".step-trial") else [".step-8-new"])
    assert time.monotonic() - began < 60
    assert not list(tmp_path.rglob(".step*"))


def test_the_trial_changes_nothing(overrides: Overrides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ("lr=1e-2", "n_eval_examples=8")
    for optimizer in ("AdamW", "RMSprop", "Adagrad"):
        folders = [tmp_path / f"{optimizer}-{tried}" for tried in (True, False)]
        for folder in folders:
            with monkeypatch.context() as patch:
                if folder == folders[1]:
                    patch.setattr(checkpoint.CheckpointWriter, "try_out", lambda *_: None)
                train_here(overrides(*given, f"optimizer={optimizer}", f"local_run_dir={folder}"))
        assert without_seconds(folders[0]) == without_seconds(folders[1])
        weights = [(folder / "LATEST" / "model.safetensors").read_bytes() for folder in folders]
        assert weights[0] == weights[1]


def test_a_data_folder_whose_name_is_no_utf8(
    overrides: Overrides, pairs_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    shutil.copytree(pairs_dir, data)
    train_here(overrides(f"datasets=[{quoted(data)}]", "save_every=12", "n_eval_examples=8"))
    assert "could not be written" not in capsys.readouterr().out
    assert [check(path, "full") for path in checkpoints(tmp_path / "run")] == [None, None]
    train_here(
        overrides(
            f"datasets=[{quoted(data)}]",
            "save_every=12",
            "n_eval_examples=8",
            "resume=auto",
            "n_epochs=2",
            "lr_schedule=constant",
        )
    )
    assert (tmp_path / "run" / "LATEST").resolve().name == "step-48"


@pytest.mark.full
def test_a_run_ends_before_its_deadline(overrides: Overrides, tmp_path: Path) -> None:
    log = tmp_path / "log"
    begun = time.monotonic()
    hours = 15 / 3600
    assert ended(overrides("n_epochs=100000", "n_eval_examples=0", f"max_runtime={hours}"), log) == EXIT_CODE
    assert "stopped by max_runtime" in log.read_text() and time.monotonic() - begun < 25
    assert check((tmp_path / "run" / "LATEST").resolve(), "full") is None


def test_one_run_at_a_time_writes_to_a_folder(overrides: Overrides, tmp_path: Path) -> None:
    log = tmp_path / "log"
    given = overrides("n_epochs=100000", "n_eval_examples=0", "resume=auto")
    first = start(given, log)
    while not train_steps(tmp_path / "run"):
        time.sleep(0.05)
    with pytest.raises(UserError, match=f"is in use by process {first.pid} on {socket.gethostname()}"):
        train_here(given)
    first.kill()
    first.join()
    with locked(tmp_path / "run"):
        pass


@pytest.mark.parametrize("alive", [True, False])
def test_a_lock_of_another_machine(alive: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = tmp_path / "lock"
    lock.write_text(f"filelock/2\npid=1\nhost=elsewhere\nmode=lease\ntoken={'0' * 32}\nduration=3.0\n")
    monkeypatch.setattr("dpo.run.folder.STALE", 3.0)
    monkeypatch.setattr("dpo.run.folder.HEARTBEAT", 0.5)
    beat = threading.Timer(1.0, lambda: os.utime(lock, (0, 0)))
    if alive:
        beat.start()
        with pytest.raises(UserError, match="in use by process 1 on elsewhere"), locked(tmp_path):
            pass
    else:
        with locked(tmp_path):
            assert f"pid={os.getpid()}\n" in lock.read_text()
        assert not lock.exists()


@pytest.mark.full
def test_a_disk_that_fills_up_costs_a_checkpoint_and_not_the_run(overrides: Overrides, tmp_path: Path) -> None:
    disk, log = tmp_path / "disk", tmp_path / "log"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here (needs root)")
    try:
        run_dir, filler = disk / "run", disk / "filler"
        given = overrides(
            f"local_run_dir={run_dir}", "n_eval_examples=0", "n_epochs=60", "eval_every=24", "keep_last_n=2"
        )
        process = start([*given, "save_patience=60"], log)
        while not checkpoints(run_dir):
            time.sleep(0.01)
        filler.write_bytes(b"0" * (os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize - 400_000))
        while "Trying again; free space" not in log.read_text() and process.is_alive():
            time.sleep(0.1)
        shown = log.read_text()
        assert "Training continues" in shown and "the disk has 0.00 GiB free; the last complete checkpoint is" in shown
        assert all(check(path, "full") is None for path in checkpoints(run_dir))
        filler.unlink()
        process.join(60)
        assert process.exitcode == 0, log.read_text()[-3000:]
        assert (run_dir / "LATEST").resolve().name == "step-1440"
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def poisoned(folder: Path, pairs: Path, at: int) -> tuple[list[str], int]:
    """A GPT-NeoX model whose embedding of a token is not a number, and data where one record alone has that token."""
    write_pairs(pairs)
    rows = read_jsonl(pairs / "train.jsonl")
    for side in ("chosen", "rejected"):
        rows[at][side] = rows[at][side].replace("What", "~ What")
    (pairs / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model, tokenizer = make_model("gpt_neox"), make_tokenizer()
    [token] = tokenizer.encode("~")
    model.get_input_embeddings().weight.data[token] = float("nan")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return [f"model.name_or_path={folder}", f"datasets=[{pairs}]"], token


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_planted_nan_stops_there_with_what_shows_it_again(
    policy: str,
    overrides: Overrides,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given, token = poisoned(tmp_path / "model", tmp_path / "poisoned", 17)
    monkeypatch.setattr("dpo.parallel.all_finite", lambda model: True)  # the planted weight itself is not
    monkeypatch.setattr("trainers.checked_computation", lambda *_, **__: Computation(torch.float32, "tree"))
    given = overrides(*given, "n_eval_examples=0", "lr=1e-3", f"on_nonfinite={policy}")
    if policy == "skip":
        train_here(given)
        shown = capsys.readouterr().out
    else:
        with pytest.raises(UserError) as error:
            train_here(given)
        shown = str(error.value)
    [folder] = (tmp_path / "run").glob("nonfinite-*")
    before = int(folder.name.removeprefix("nonfinite-"))
    events = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    steps = [event["counters/examples"] for event in events]
    assert f"update {before // 4 + 1} (examples {before + 1} to {before + 4}) is not finite" in shown
    assert f"scripts/replay.py {folder}" in shown
    record = re.search(r"the loss of \S*?:(\d+):0 is not finite", shown)
    assert record and "weights that are not finite: gpt_neox.embed_in.weight (of" in shown
    content = json.loads((folder / "batch.json").read_text())
    [culprit] = [row for row in content["examples"] if token in row["prompt"]]
    assert culprit["name"].endswith(f":{record[1]}:0")
    if policy == "stop":
        assert steps == list(range(4, before + 1, 4))
    else:
        assert steps == list(range(4, 25, 4)) and events[-1]["counters/skipped"] == 1
        assert events[-1]["counters/updates"] == 5 and "loss/train" not in events[before // 4]
    import replay

    replay.replay(folder, [])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": loss ")[0] for line in lines if ": loss nan" in line] == [culprit["name"]]


def test_warnings_of_a_jump_and_of_falling_chosen_responses(capsys: pytest.CaptureFixture[str]) -> None:
    watch = Watch(3.0, 0.5)
    for step in range(200):
        watch.update({"loss/train": 0.6 + (step == 150) * 2, "logratios_per_token_train/chosen": -step / 150}, step)
    watch.evaluation({"logratios_per_token_eval/chosen": -2.0}, 200)
    watch.evaluation({"logratios_per_token_eval/chosen": -0.1}, 201)
    watch.evaluation({"logratios_per_token_eval/chosen": -0.7}, 202)
    first, second, jump = sorted(capsys.readouterr().out.splitlines())
    assert "in the last 64 updates (after 107" in first + second and "in the evaluation (after 202" in first + second
    assert "loss 2.6 after 150 examples, 4.3 times" in jump
    assert "Look at samples (sample_during_eval=true)" in first and "samples.jsonl" not in first  # there may be none


def test_secrets_reach_no_file(overrides: Overrides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret, token = "0123456789abcdef" * 2, "hf_" + "abcDEF123" * 4
    monkeypatch.setenv("WANDB_API_KEY", secret)
    monkeypatch.setenv("WANDB_MODE", "offline")
    more = [f"wandb.project={secret}", "+optimizer_kwargs.foreach=false", f"wandb.entity={token}", "wandb.enabled=true"]
    train_here(overrides(*more, "n_eval_examples=0"))
    utils.log(f"{secret} {token}")
    for path in (tmp_path / "run").rglob("*"):
        if path.is_file() and "wandb" not in path.parts:
            assert secret.encode() not in path.read_bytes() and token.encode() not in path.read_bytes(), path


@pytest.mark.full
def test_a_wandb_run_is_taken_up_again(overrides: Overrides, tmp_path: Path) -> None:
    given = overrides("wandb.enabled=true", "resume=auto", "n_eval_examples=0", *LONG[:2])
    log = tmp_path / "log"
    assert interrupted(given, tmp_path / "run", log, signal.SIGTERM, 5) == EXIT_CODE, log.read_text()[-3000:]
    assert ended(given, log) == 0, log.read_text()[-3000:]
    found = [path.name.rpartition("-")[2] for path in (tmp_path / "run" / "wandb").glob("offline-run-*")]
    assert len(found) == 2 and len(set(found)) == 1


def test_a_refused_resume_changes_nothing(overrides: Overrides, tmp_path: Path) -> None:
    given = ["n_eval_examples=0", "eval_every=8"]
    train_here(overrides(*given))
    run_dir = tmp_path / "run"

    def content() -> dict[str, bytes]:
        left_out = ("log.txt", "lock")
        return {str(p): p.read_bytes() for p in run_dir.rglob("*") if p.is_file() and p.name not in left_out}

    before, link = content(), (run_dir / "LATEST").readlink()
    for changed in ("lr=1", "datasets=[/none] resume_allow_changes=true", "model.archive=/none", "device=cuda:99"):
        with pytest.raises(UserError):
            train_here(overrides(*given, f"resume={run_dir / 'step-8'}", *changed.split()))
        assert content() == before and (run_dir / "LATEST").readlink() == link, changed
    train_here(overrides(*given, f"resume={run_dir / 'step-8'}", "lr=1e-5", "resume_allow_changes=true"))
    names = {"step-8", "step-16", "step-24", "abandoned-step-16", "abandoned-step-24"}
    assert {path.name for path in run_dir.glob("*step*")} == names
    assert [e["lr"] for e in read_jsonl(run_dir / "metrics.jsonl")] == [5e-7] * 2 + [1e-5] * 4


def test_a_nonfinite_folder_is_gone_on_from(overrides: Overrides, tmp_path: Path) -> None:
    given = ["n_eval_examples=0", "save_every=8", "keep_best=null"]
    train_here(overrides(*given))
    run_dir = tmp_path / "run"
    shutil.copytree(run_dir / "step-16", run_dir / "nonfinite-16")
    train_here(overrides(*given, f"resume={run_dir / 'nonfinite-16'}"))
    assert {path.name for path in run_dir.glob("*step*")} == {"step-8", "step-16", "step-24", "abandoned-step-24"}
    assert (run_dir / "LATEST").readlink() == Path("step-24")
