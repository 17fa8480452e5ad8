"""provenance.json: the code, versions, devices, data and costs of each start of a run."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import read_jsonl, train_here

from dpo import installation
from dpo.installation import Checkout, checkout, gpu_energy
from dpo.run import provenance
from dpo.run.checkpoint import START
from dpo.run.metrics import RunLogger
from dpo.utils import TakenOver, UserError

Overrides = Callable[..., list[str]]


def starts(run_dir: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((run_dir / "provenance.json").read_text())["starts"]
    return found


def git(folder: Path, *arguments: str) -> str:
    known = ("-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "init.defaultBranch=main")
    command = ["git", "-C", str(folder), *known, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A git checkout that looks like this project's."""
    folder = tmp_path / "project"
    (folder / "dpo").mkdir(parents=True)
    (folder / "dpo" / "__init__.py").write_bytes(b"one = 1\r\n")
    git(folder, "init")
    git(folder, "add", ".")
    git(folder, "commit", "-m", "first")
    return folder


def test_the_state_of_a_checkout(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = git(repository, "rev-parse", "HEAD")
    monkeypatch.setenv("GIT_DIR", "/nowhere")  # as inside a hook of another repository
    checkout.cache_clear()
    assert checkout(repository) == Checkout(commit) and str(checkout(repository)) == commit[:12]
    (repository / "dpo" / "__init__.py").write_bytes(b"one = 2\r\n")
    (repository / "größe.py").write_text("")
    checkout.cache_clear()
    found = checkout(repository)
    assert (
        found.diff is not None
        and b"-one = 1\r\n+one = 2\r\n" in found.diff
        and not found.cut
        and found.untracked == ("größe.py",)
    )
    assert str(found) == f"{commit[:12]}, with changes, with new files"
    (repository / "dpo" / "__init__.py").write_text("x" * 2 * installation.LONGEST_DIFF)
    checkout.cache_clear()
    assert checkout(repository).cut and len(checkout(repository).diff or b"") == installation.LONGEST_DIFF


def test_new_code_is_a_change_and_a_long_list_says_so(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (repository / "notes.txt").write_text("")
    checkout.cache_clear()
    assert checkout(repository).dirty is False
    for i in range(60):
        (repository / f"new_{i}.py").write_text("")
    checkout.cache_clear()
    code = checkout(repository)
    assert code.dirty and code.diff == b"" and code.n_untracked == 61 and len(code.untracked) == 50
    monkeypatch.setattr(provenance, "checkout", lambda: code)
    found = provenance.code_state(repository)
    assert found["dirty"] is True and found["n_untracked"] == 61 and "diff" not in found


@pytest.mark.parametrize("does, problem", [("exit 3", "exit status 3"), ("exec sleep 20", "more than 1 s")])
def test_a_diff_that_fails_is_no_clean_checkout(
    does: str, problem: str, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a git that fails, or hangs, in `diff` only."""
    commit, real = git(repository, "rev-parse", "HEAD"), shutil.which("git")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "git").write_text(f'#!/bin/sh\ncase "$*" in *no-textconv*) {does};; esac\nexec {real} "$@"\n')
    (tmp_path / "bin" / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(installation, "GIT_SECONDS", 1)
    checkout.cache_clear()
    code = checkout(repository)
    assert code.commit == commit and code.diff is None and code.problem and problem in code.problem
    monkeypatch.setattr(provenance, "checkout", lambda: code)
    assert provenance.code_state(tmp_path) == {"commit": commit, "dirty": "unknown", "reason": code.problem}
    assert str(code).startswith(f"{commit[:12]}, changes not known (git diff ")


def test_an_image_says_what_it_was_built_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(installation.COMMIT, "c0ffee\n")
    checkout.cache_clear()
    code = checkout(tmp_path)
    assert code.commit == "c0ffee" and code.dirty is None and code.problem and "no git checkout" in code.problem


def test_a_full_disk_stops_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    seen: list[str] = []
    monkeypatch.setattr(provenance, "checkout", lambda: seen.append("code") or Checkout("c0ffee", None, b"+1\n"))
    record = provenance.Provenance(tmp_path, torch.device("cpu"))
    assert seen == ["code"]  # as the code is now, not when training begins
    monkeypatch.setattr(provenance, "atomic_write", full)
    record.begin({}, {}, None, False)
    record.end()
    assert capsys.readouterr().out.count("No space left on device. Training continues") == 2


def test_trackers_are_closed_if_the_folder_was_taken_over(tmp_path: Path) -> None:
    def taken() -> None:
        raise TakenOver("another process")

    logger = RunLogger(tmp_path, taken, 1, provenance.Provenance(tmp_path, torch.device("cpu")))
    codes: list[int] = []
    logger.wandb_run = types.SimpleNamespace(finish=lambda exit_code: codes.append(exit_code))
    with pytest.raises(TakenOver):
        logger.close(1)
    assert codes == [1]


def test_what_is_no_checkout(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    inside = repository / "unpacked"  # in a repository that does not hold it
    (inside / "dpo").mkdir(parents=True)
    (inside / "dpo" / "__init__.py").write_text("")
    for folder in (alone, inside):
        assert checkout(folder).problem == "the project's folder is no git checkout"
    assert str(checkout(alone)) == "not known (the project's folder is no git checkout)"
    monkeypatch.setenv("PATH", str(alone))
    checkout.cache_clear()
    assert checkout(repository) == Checkout(problem="git is not installed")


def test_a_run_says_what_it_was_made_of(
    overrides: Overrides, tmp_path: Path, pairs_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "hf_" + "abcDEF123" * 4
    code = Checkout("c0ffee", None, f"+token = '{secret}'\n".encode(), True, ("mine.py",), 1, True)
    monkeypatch.setattr(provenance, "checkout", lambda: code)
    train_here(overrides("n_eval_examples=8"))
    run_dir = tmp_path / "run"
    (entry,) = starts(run_dir)
    assert entry["ended"] == "finished" and entry["resumed_from"] is None
    assert entry["command"].startswith("python train.py exp_name=test")
    known = {"commit": "c0ffee", "dirty": True, "diff_cut": True, "redacted": True, "untracked": ["mine.py"]}
    assert entry["code"].items() >= known.items()
    assert (run_dir / entry["code"]["diff"]).read_text() == "+token = '***'\n"
    assert entry["versions"]["torch"] == torch.__version__ and "python" in entry["versions"]
    hardware = entry["hardware"]
    assert hardware["device"] == "cpu" and hardware["processes"] == 1 and hardware["devices"][-1].startswith("CPU: ")
    for split in ("train", "test"):
        (source,) = entry["data"][split]
        assert source["files"] == [f"{split}.jsonl"]
        assert source["hashes"] == [hashlib.sha256((pairs_dir / f"{split}.jsonl").read_bytes()).hexdigest()]
    assert len(entry["content"]["training data"]) == 1 and len(entry["content"][START]) == 64
    assert "gpu_joules" not in entry and 0 < entry["seconds"] < 300 and entry["examples"] == 24
    updates = [row for row in read_jsonl(run_dir / "metrics.jsonl") if "flops_per_second" in row]
    flop = sum(4 / row["examples_per_second"] * row["flops_per_second"] for row in updates)
    assert entry["training_flop"] == pytest.approx(flop) and flop > 1e6


def test_each_start_of_a_run_is_listed(overrides: Overrides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import trainers

    monkeypatch.setattr(provenance, "checkout", lambda: Checkout(problem="git is not installed"))
    given = overrides("n_eval_examples=0", "save_every=8", "resume=auto")
    step = trainers.Trainer.train_step

    def broken(trainer: trainers.Trainer, examples: Any) -> Any:
        if trainer.examples == 12:
            raise UserError("the lamp is broken\nbadly")
        return step(trainer, examples)

    with monkeypatch.context() as patch, pytest.raises(UserError):
        patch.setattr(trainers.Trainer, "train_step", broken)
        train_here(given)
    train_here(given)
    first, second = starts(tmp_path / "run")
    assert first["ended"] == "UserError: the lamp is broken" and first["examples"] == 12
    assert first["code"] == {"commit": None, "reason": "git is not installed"}
    assert second["ended"] == "finished" and second["examples"] == 24
    assert second["resumed_from"] == str(tmp_path / "run" / "step-8")
    per_example = [entry["training_flop"] / n for entry, n in ((first, 12), (second, 16))]
    assert per_example[0] == pytest.approx(per_example[1], rel=0.2)
    train_here(given)  # finished: this is no start
    assert len(starts(tmp_path / "run")) == 2


@pytest.mark.full
def test_other_folders_and_damaged_files_begin_anew(overrides: Overrides, tmp_path: Path) -> None:
    given = overrides("n_eval_examples=0", "save_every=8", "resume=auto")
    train_here(given)
    (tmp_path / "run" / "provenance.json").write_text("{")
    train_here([*given, "n_epochs=2", "lr_schedule=constant", "resume_allow_changes=true"])
    assert [entry["examples"] for entry in starts(tmp_path / "run")] == [48]
    other = [item for item in given if not item.startswith(("local_run_dir", "resume"))]
    train_here([*other, f"local_run_dir={tmp_path / 'other'}", f"resume={tmp_path / 'run' / 'step-16'}"])
    (entry,) = starts(tmp_path / "other")
    assert entry["resumed_from"].endswith("run/step-16") and entry["examples"] == 24


def test_a_killed_run_has_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(provenance, "checkout", lambda: Checkout(problem="-"))
    record = provenance.Provenance(tmp_path / "run", torch.device("cpu"))
    record.end()
    assert not (tmp_path / "run" / "provenance.json").exists()  # before all validation nothing is written
    record.begin({}, {"start": None}, None, False)
    record.note({"flops_per_second": 100.0, "examples_per_second": 2.0}, 8)
    assert starts(tmp_path / "run")[0]["training_flop"] == 0
    monkeypatch.setattr(provenance, "SECONDS_BETWEEN_WRITES", 0)
    record.note({"loss/eval": 1.0}, 8)
    (entry,) = starts(tmp_path / "run")
    assert entry["training_flop"] == 400 and entry["ended"] is None and entry["content"] == {}


def test_energy_is_counted_if_the_gpu_counts_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a stand-in for NVML."""
    used = {"GPU-a": 1000, "GPU-b": 5000}  # millijoules
    nvml = types.ModuleType("pynvml")
    nvml.NVMLError = type("NVMLError", (Exception,), {})  # type: ignore[attr-defined]
    nvml.nvmlInit = lambda: None  # type: ignore[attr-defined]
    nvml.nvmlDeviceGetHandleByUUID = lambda name: name  # type: ignore[attr-defined]
    nvml.nvmlDeviceGetTotalEnergyConsumption = used.__getitem__  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(installation, "find_spec", lambda name: nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda n: types.SimpleNamespace(uuid="ab"[n]))
    assert gpu_energy([0, 1]) == 6 and gpu_energy([1]) == 5 and gpu_energy([]) is None

    monkeypatch.setattr(provenance, "devices", lambda cuda: ["a GPU"])
    monkeypatch.setattr(provenance, "checkout", lambda: Checkout(problem="-"))
    with monkeypatch.context() as patch:  # before training CUDA is not touched
        patch.setattr(torch.cuda, "get_device_properties", None)
        record = provenance.Provenance(tmp_path, torch.device("cuda", 1))
    record.begin({}, {}, None, False)
    used["GPU-b"] += 2500
    record.end()
    assert starts(tmp_path)[0]["gpu_joules"] == 2.5

    def refuse(handle: str) -> int:
        raise nvml.NVMLError("not supported")

    nvml.nvmlDeviceGetTotalEnergyConsumption = refuse  # type: ignore[attr-defined]
    assert gpu_energy([0]) is None

    def no_such_device(number: int) -> None:
        raise AssertionError("Invalid device id")

    monkeypatch.setattr(torch.cuda, "get_device_properties", no_such_device)
    assert gpu_energy([1]) is None
    monkeypatch.setattr(installation, "find_spec", lambda name: None)
    assert gpu_energy([0]) is None


def test_which_gpus_a_run_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    cuda = torch.device("cuda")
    assert provenance._gpus(torch.device("cpu"), False) == []
    assert provenance._gpus(cuda, False) == [3] and provenance._gpus(cuda, True) == [*range(8)]
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert provenance._gpus(torch.device("cuda", 0), False) == [0, 1, 2, 3]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # the others are in another machine
    assert provenance._gpus(torch.device("cuda", 0), False) == []
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name)
    slurm = {"STEP_NUM_TASKS": "4", "STEP_NODELIST": "a", "PROCID": "0", "LOCALID": "0", "JOB_ID": "1"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    for nodes, expected in (("1", [0, 1, 2, 3]), ("2", [])):
        monkeypatch.setenv("SLURM_STEP_NUM_NODES", nodes)
        assert provenance._gpus(torch.device("cuda", 0), False) == expected
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # srun --gpus-per-task shows one each
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "1")
    assert provenance._gpus(torch.device("cuda", 0), False) == []
