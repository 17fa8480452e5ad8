"""A run's folder: who writes to it, what a refused or copied run leaves in it, and what its command may be."""

import fcntl
import hashlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import ROOT, read_jsonl, train_here
from restarts import run_on_another_machine, start

from dpo import utils
from dpo.hints import HERE, meant
from dpo.run import resume, stopping
from dpo.run.folder import STALE, locked
from dpo.run.stopping import EXIT_CODE
from dpo.utils import TakenOver, UserError, get_local_run_dir
from settings import all_keys, check_keys, load_config

Overrides = Callable[..., list[str]]
SHORT = ["n_examples=8", "batch_size=4", "n_eval_examples=0", "save_every=4"]


def content(folder: Path) -> dict[str, str]:
    """Every file below a folder, by its hash; links by where they lead."""
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


# Names


@pytest.mark.parametrize(("name", "folder"), [("42", "42"), ("1e3", "1000.0"), ("true", "True")])
def test_a_name_that_looks_like_a_number_is_one_name(name: str, folder: str, tmp_path: Path) -> None:
    get_local_run_dir.cache_clear()
    config = load_config([f"exp_name={name}", f"local_dirs=[{tmp_path}]"])
    assert config.exp_name == folder and not resume.local_run_dir_is_given(config)
    assert Path(config.local_run_dir).name.startswith(f"{folder}_")


def test_runs_that_start_together_have_names_of_their_own(tmp_path: Path) -> None:
    names = set()
    for _ in range(50):
        get_local_run_dir.cache_clear()
        names.add(get_local_run_dir("x", (str(tmp_path),)))
    assert len(names) == 50


@pytest.mark.parametrize("name", ["../../x", "/abs", "a/../b", ".", "a//b", "..", "x/"])
def test_names_stay_inside(overrides: Overrides, name: str) -> None:
    with pytest.raises(UserError, match="exp_name="):
        train_here(overrides(f"exp_name={name}", "local_run_dir=", "n_eval_examples=0"))


@pytest.mark.parametrize("name", ["plain", "team/run1", "a/b/c", "a.b-c_d", "ü", "run[1]", "run_2024-01-02_03-04-05"])
def test_a_run_of_any_name_is_gone_on_with(overrides: Overrides, tmp_path: Path, name: str) -> None:
    given = [f"exp_name='{name}'", "local_run_dir=", f"local_dirs=[{tmp_path / 'out'}]", *SHORT, "resume=auto"]
    for expected in (8, 12):
        get_local_run_dir.cache_clear()
        train_here(overrides(*given, f"n_examples={expected}"))
    (folder,) = {path.parent for path in (tmp_path / "out").rglob("metrics.jsonl")}
    assert read_jsonl(folder / "metrics.jsonl")[-1]["counters/examples"] == 12
    assert folder.relative_to(tmp_path / "out").parts[1:-1] == Path(name).parts[:-1]


# Locks


def lock_of(host: str) -> str:
    """The lock file of a process 1 on `host`."""
    return f"filelock/2\npid=1\nhost={host}\nmode=lease\ntoken={'0' * 32}\nduration={STALE}\n"


def test_a_lock_that_is_anothers_by_now_stops_all_writing(tmp_path: Path) -> None:
    with locked(tmp_path) as check:
        check()
        (tmp_path / "theirs").write_text(lock_of("other"))
        os.replace(tmp_path / "theirs", tmp_path / "lock")
        with pytest.raises(TakenOver):
            check()
    assert (tmp_path / "lock").read_text() == lock_of("other")  # it is not removed either


def test_a_lock_that_was_anothers_and_is_gone_stops_all_writing(tmp_path: Path) -> None:
    with locked(tmp_path) as check:
        (tmp_path / "lock").unlink()
        with pytest.raises(TakenOver):
            check()


def test_two_on_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr("dpo.run.folder.STALE", 1.5)
    monkeypatch.setattr("dpo.run.folder.HEARTBEAT", 1.4)
    with locked(tmp_path) as check:
        os.utime(tmp_path / "lock", (0, 0))
        stands_still = (tmp_path / "lock").read_text().replace(f"host={socket.gethostname()}", "host=elsewhere")
        (tmp_path / "theirs").write_text(stands_still)
        os.replace(tmp_path / "theirs", tmp_path / "lock")  # no thread touches this one
        with locked(tmp_path) as other:
            other()
            with pytest.raises(TakenOver):
                check()


def test_a_writer_that_stood_still_does_not_go_on_beside_the_next(overrides: Overrides, tmp_path: Path) -> None:
    metrics, logs = tmp_path / "run/metrics.jsonl", [tmp_path / "first", tmp_path / "second"]
    given = overrides("n_epochs=100000", "n_eval_examples=0", "save_every=48", "keep_last_n=2", "resume=auto")

    def wait_for(n: int, log: Path) -> None:
        until = time.monotonic() + 120
        while not metrics.exists() or metrics.read_text().count("loss/train") < n:
            assert time.monotonic() < until, log.read_text()[-2000:]
            time.sleep(0.05)

    for log in logs:
        log.touch()
    first = start(given, logs[0], run_on_another_machine)
    wait_for(15, logs[0])
    os.kill(first.pid or 0, signal.SIGSTOP)
    second = start(given, logs[1], run_on_another_machine)
    try:
        until = time.monotonic() + 120
        while "resuming" not in logs[1].read_text():
            assert time.monotonic() < until and second.is_alive(), logs[1].read_text()[-2000:]
            time.sleep(0.05)
        wait_for(30, logs[1])
        os.kill(first.pid or 0, signal.SIGCONT)
        first.join(60)
        assert first.exitcode == 1 and logs[0].read_text().count("was taken over by another process") == 1
        wait_for(40, logs[1])
        os.kill(second.pid or 0, signal.SIGTERM)
        second.join(60)
        assert second.exitcode == EXIT_CODE, logs[1].read_text()[-2000:]
    finally:
        first.kill()
        second.kill()
    examples = [event["counters/examples"] for event in read_jsonl(metrics)]
    assert examples == list(range(4, examples[-1] + 1, 4))


def test_a_taken_lock_is_met_before_anything_is_written(overrides: Overrides, tmp_path: Path) -> None:
    train_here(overrides(*SHORT))
    before = content(tmp_path / "run")
    with locked(tmp_path / "run"), pytest.raises(UserError, match="is in use by process"):
        train_here(overrides(*SHORT, "n_examples=12", "resume=auto"))
    after = content(tmp_path / "run")
    same = {"lock": "", "log.txt": ""}  # the lock is gone; this process still has the log of the first run open
    assert before | same == after | same


# What a refused, cut or copied run leaves


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["lr=1"], r"lr=1\.0 \(was"),
        (["datasets=[/nowhere/at/all]"], "no such file or folder"),
        (["model.archive=/nowhere"], "there is no such file"),
        (["+optimizer_kwargs.nonsense=1"], "nonsense"),
        (["max_length=100000"], "max_length=100000"),
    ],
)
def test_a_refused_resume_changes_nothing(overrides: Overrides, tmp_path: Path, given: list[str], message: str) -> None:
    train_here(overrides(*SHORT, "tensorboard=true"))
    before = content(tmp_path / "run")
    with pytest.raises(UserError, match=message):
        train_here(overrides(*SHORT, "n_examples=16", "tensorboard=true", "resume=auto", *given))
    after = content(tmp_path / "run")
    for changed in ("log.txt", "lock"):  # the refusal stands in the log
        before.pop(changed, None), after.pop(changed, None)
    assert after == before


def test_a_line_that_was_cut_is_cut_off(overrides: Overrides, tmp_path: Path) -> None:
    train_here(overrides(*SHORT))
    metrics = tmp_path / "run/metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True)
    os.truncate(metrics, len(b"".join(lines)) - 7)
    train_here(overrides(*SHORT, "n_examples=16", "resume=auto"))
    found = read_jsonl(metrics)  # which reads every line as JSON
    assert found[-1]["counters/examples"] == 16 and len(found) == len(lines) + 1


def test_only_the_runs_own_checkpoints_are_removed(overrides: Overrides, tmp_path: Path) -> None:
    other = tmp_path / "other/step-8"
    other.mkdir(parents=True)
    (other / "model.safetensors").write_text("theirs")
    run = tmp_path / "run"
    train_here(overrides(*SHORT))
    shutil.rmtree(run / "step-4")
    (run / "step-4").symlink_to(other, target_is_directory=True)
    train_here(overrides(*SHORT, "n_examples=16", "resume=auto", "keep_last_n=1"))
    assert (other / "model.safetensors").read_text() == "theirs"
    assert sorted(p.name for p in run.glob("step-*") if not p.is_symlink()) == ["step-16"]


def test_checkpoints_that_were_moved_are_not_taken_for_none(overrides: Overrides, tmp_path: Path) -> None:
    train_here(overrides(*SHORT))
    for name in ("step-4", "step-8"):
        shutil.move(tmp_path / "run" / name, tmp_path / name)
        (tmp_path / "run" / name).symlink_to(tmp_path / name, target_is_directory=True)
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"is a link to .* move them back"):
        train_here(overrides(*SHORT, "n_examples=16", "resume=auto"))
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("target", ["gone", "LATEST", "step-8/../LATEST"])
def test_a_link_that_leads_nowhere_is_made_anew(overrides: Overrides, tmp_path: Path, target: str) -> None:
    run = tmp_path / "run"
    train_here(overrides(*SHORT))
    (run / "LATEST").unlink()
    (run / "LATEST").symlink_to(target)
    train_here(overrides(*SHORT, "n_examples=16", "resume=auto"))
    assert (run / "LATEST").resolve().name == "step-16"
    assert resume.find_checkpoint(str(run)).name == "step-16"


def test_a_copy_without_links_is_gone_on_with(overrides: Overrides, tmp_path: Path) -> None:
    train_here(overrides(*SHORT))
    copied = tmp_path / "copied"
    shutil.copytree(tmp_path / "run", copied, symlinks=False)
    for path in copied.glob("step-*"):
        shutil.rmtree(path)
    assert (copied / "LATEST").is_dir() and not (copied / "LATEST").is_symlink()
    train_here(overrides(*SHORT, "n_examples=16", "resume=auto", f"local_run_dir={copied}"))
    assert (copied / "LATEST").resolve().name == "step-16" and (copied / "step-8").is_dir()


def test_links_of_a_copy_do_not_lead_back_to_its_run(
    overrides: Overrides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, copied = tmp_path / "run", tmp_path / "copied"
    train_here(overrides(*SHORT))
    utils.open_log(None)  # the copy is trained in another process
    shutil.copytree(run, copied, copy_function=os.link, symlinks=True)  # as cp -al does
    (copied / "LATEST").unlink()
    (copied / "LATEST").symlink_to(run / "step-4")
    before = content(run)
    train_here(overrides(*SHORT, "n_examples=16", "resume=auto", "keep_last_n=1", f"local_run_dir={copied}"))
    after = content(run)
    assert after == before
    assert len(read_jsonl(copied / "metrics.jsonl")) == 4 and resume.find_checkpoint(str(copied)).name == "step-16"


# Signals, and time


def test_max_runtime_does_not_follow_a_clock_that_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "process_age", lambda: 3000.0)
    deadline = stopping.Deadline(1.0)
    for clock in (0.0, 1e12):
        monkeypatch.setattr(time, "time", lambda clock=clock: clock)
        assert not deadline.passed(0.0) and deadline.passed(700.0)


@pytest.mark.parametrize("signals", [("SIGTERM", "SIGTERM"), ("SIGUSR1", "SIGTERM"), ("SIGINT", "SIGTERM")])
def test_a_request_that_comes_twice_is_one(overrides: Overrides, tmp_path: Path, signals: tuple[str, ...]) -> None:
    log, run = tmp_path / "log", tmp_path / "run"
    process = start(overrides("n_epochs=200", "batch_size=4", "n_eval_examples=4", "eval_every=8"), log)
    until = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or "loss/train" not in (run / "metrics.jsonl").read_text():
        assert process.is_alive() and time.monotonic() < until, log.read_text()[-2000:]
        time.sleep(0.01)
    for name in signals:
        os.kill(process.pid or 0, getattr(signal, name))
        time.sleep(0.3)
        if not process.is_alive():
            break
    process.join(60)
    assert process.exitcode == EXIT_CODE, log.read_text()[-2000:]
    assert (run / "LATEST").exists()


# Commands


def command(folder: Path, *given: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, str(ROOT / "train.py"), *given]
    return subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    ("given", "code", "said"),
    [
        (["exp_name=x", "learning_rate=1e-6"], 1, "here that is lr=1e-6 "),
        (["exp_name=x", "seed=1", "-m"], 1, "no key has several values"),
        (["-m", "seed=0,1"], 1, "exp_name is missing"),
        (["exp_name=x", "seed=0,1", "hydra/launcher=joblib", "-m"], 1, "pip install -r requirements-sweeps.txt"),
        (["exp_name=x", "datasets=[a=b.jsonl]"], 1, "quotes"),
        (["exp_name=x", "model=gpt2"], 1, "blank_model"),
        (["exp_name=x", "loss.beta=0.1"], 1, "add loss=dpo"),
        (["exp_name=x", "loss=simpoo"], 1, "(config/loss, docs/losses.md); did you mean 'simpo'?"),
        (["exp_name=x", "loss=sigmoid_norm"], 1, "here that is loss=dpo loss.length_normalized=true"),
        (["exp_name=x", "rpo_alpha=1"], 1, "loss.nll_weight=1, "),
        (["exp_name=x", "loss=dpo", "loss.rpo_alpha=1"], 1, "loss.nll_weight=1, "),
        (["exp_name=x", "datasets=[nope]"], 1, "unknown data set 'nope'"),
        (["exp_name=x", "--nonsense"], 1, "--nonsense is no option"),
        (["exp_name=x", "--cfg", "job"], 0, "batch_size: 4"),
    ],
)
def test_commands_that_are_answered_at_once(tmp_path: Path, given: list[str], code: int, said: str) -> None:
    if "hydra/launcher=joblib" in given and find_spec("hydra_plugins"):
        pytest.skip("a launcher is installed")
    ended = command(tmp_path, *given, f"local_dirs=[{tmp_path / 'out'}]")
    assert ended.returncode == code, ended.stderr
    text = ended.stdout + ended.stderr
    assert said in text and "Traceback" not in text and "converting" not in text
    assert not (tmp_path / "out").exists()  # no folder is left behind


def test_hints_name_keys_that_exist() -> None:
    for name in HERE:
        if name in all_keys():
            continue
        with pytest.raises(UserError, match="here that is"):
            check_keys([f"{name}=1"])
    for name in (
        *("learning_rate per_device_train_batch_size max_steps eval_steps output_dir bf16 num_train_epochs").split(),
        *("gradient_checkpointing save_steps logging_steps lr_scheduler_type warmup_ratio beta loss_type").split(),
        *("ref_model_name_or_path model_name_or_path use_peft lora_r report_to optim").split(),
    ):
        assert name in HERE, name
    known = set(all_keys()) | {"hydra", "experiment"}
    for text in HERE.values():  # whatever a hint tells to write is a key
        written = re.findall(r"(?:^|[\s'+(])\+?([a-z_][\w.]*)=", text)
        assert not [key for key in written if key not in known and not key.startswith("optimizer_kwargs.")], text
    assert meant("Batch-Size", all_keys()) == "; did you mean 'batch_size'?" and meant("zzzz", all_keys()) == ""


# make clean


def test_make_clean_keeps_runs_and_caches(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    kept = [tmp_path / "runs/me/x/LATEST/model.safetensors", tmp_path / ".cache/me/tokens/x"]
    for path in kept:
        path.parent.mkdir(parents=True)
        path.write_text("trained")
    subprocess.run(["make", "clean"], cwd=tmp_path, check=True, capture_output=True, timeout=60)
    assert all(path.read_text() == "trained" for path in kept)
    assert "runs" in (ROOT / ".gitignore").read_text()


def test_runs_and_caches_lie_in_the_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(["exp_name=x", "local_dirs=[/nowhere,${oc.select:nothing,/none}]", "n_eval_examples=0"])
    assert config.cache.is_relative_to(ROOT / ".cache")
    defaults = load_config(["exp_name=x"])
    assert Path(defaults.local_dirs[-1]) == ROOT / "runs"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("lrr=1", "did you mean 'lr'?"),
        ("+experiment=sentiment_dop", "did you mean 'sentiment_dpo'?"),
        ("model=qwen3-0.6b", "did you mean 'qwen3-06b'?"),
        ("max_steps=100", "here that is n_examples=<steps x batch_size>"),
        ("batch_size=four", "batch_size=four"),
        ("--help", "lr=5e-7"),
    ],
)
def test_mistakes_are_answered_without_importing_torch(given: str, message: str, tmp_path: Path) -> None:
    for name in ("torch", "transformers"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(99)")
    command = [sys.executable, str(ROOT / "train.py"), "exp_name=x", given]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == (0 if given == "--help" else 1) and message in done.stdout + done.stderr, done.stderr
