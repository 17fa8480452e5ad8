"""benchmarks/gpu.py: its stages end, fail and resume as they should, and compute on a CPU what they will on a GPU."""

import contextlib
import os
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import EVERYTHING, ROOT

import gpu
import gpu_stages
from gpu_stages import Found, Setting

DAY = pytest.mark.skipif(not EVERYTHING, reason="takes minutes on a CPU: DPO_ALL=1")
RUN = [sys.executable, str(ROOT / "benchmarks" / "gpu.py")]
# Stage -> the code of its process; {} is where its result goes, and {counts} a file to which each run adds a sign.
STAGES = {
    "good": "open('{out}', 'w').write('{{\"table\": [[\"tokens\"], [\"17\"]]}}')",
    "broken": "print('loss 0.69'); raise ValueError('no kernel')",
    "slow": "import subprocess; p = subprocess.Popen(['sleep', '99']); "
    "open('{counts}.pid', 'w').write(str(p.pid)); p.wait()",
    "wrong": "open('{out}', 'w').write('{{\"problems\": [\"off by 2\"]}}')",
    "silent": "pass",
    "last": "open('{out}', 'w').write('{{\"skipped\": \"80 GiB are needed\"}}')",
}
LIMITS = dict.fromkeys(STAGES, 60.0) | {"slow": 1.0}


def run_all(folder: Path, place: str = "here") -> dict[str, Any]:
    def command(name: str) -> list[str]:
        counts = folder / f"{name}.count"
        code = STAGES[name].format(out=folder / f".{name}", counts=counts)
        return [sys.executable, "-c", f"open({str(counts)!r}, 'a').write('x'); {code}"]

    return gpu.run_all(LIMITS, command, folder, place)


def counts(folder: Path) -> dict[str, int]:
    return {name: len((folder / f"{name}.count").read_text()) for name in STAGES}


def is_running(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return "zombie" not in Path(f"/proc/{pid}/status").read_text()
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_stages_end_and_resume(tmp_path: Path) -> None:
    found = run_all(tmp_path)
    assert [gpu.outcome(result) for result in found.values()] == [
        "done",
        "FAILED: ValueError: no kernel",
        "FAILED: killed: it took longer than its 1 s",
        "FAILED: off by 2",
        "FAILED: exit code 0",
        "skipped: 80 GiB are needed",
    ]
    child = int((tmp_path / "slow.count.pid").read_text())
    until = time.monotonic() + 10
    while is_running(child) and time.monotonic() < until:
        time.sleep(0.05)
    assert not is_running(child)
    page = (tmp_path / "gpu.md").read_text()
    assert "| broken | FAILED: ValueError: no kernel |" in page and "| tokens |\n| --- |\n| 17 |" in page
    assert "- GPU: here\n" in page and "- commit: " in page and "- date: " in page and "- versions: torch" in page
    assert "loss 0.69" in (tmp_path / "broken.log").read_text()
    again = run_all(tmp_path)
    assert again["good"] == found["good"]
    assert counts(tmp_path) == dict.fromkeys(STAGES, 2) | {"good": 1, "last": 1}
    run_all(tmp_path, "on another GPU")
    assert counts(tmp_path) == dict.fromkeys(STAGES, 3) | {"good": 2, "last": 2}


def test_a_stage_of_another_commit_says_so_and_one_that_did_not_run() -> None:
    result = {"place": "here", "machine": {"commit": "1"}, "seconds": 2.0}
    page = gpu.report({"good": result | {"machine": {"commit": "0"}}, "wrong": result}, LIMITS)
    assert "- commit: 1\n" in page and "## good\n\n- commit: 0\n" in page and "| last | not run yet |  |" in page


def test_the_last_line_of_a_failed_stage_is_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(setting: Setting) -> Found:
        raise RuntimeError("CUDA error: out of luck\nCompile with TORCH_USE_CUDA_DSA")

    monkeypatch.setattr(gpu_stages, "waits", fail)
    with pytest.raises(SystemExit, match=r"^RuntimeError: CUDA error: out of luck$"):
        gpu.work("waits", tmp_path, True)
    assert "TORCH_USE_CUDA_DSA" in capsys.readouterr().err


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*RUN, "--folder", str(tmp_path / "day")], env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: no CUDA device") and done.stderr.count("\n") == 1
    assert not [*tmp_path.iterdir()]


def test_the_limits_are_25_minutes_and_each_stage_says_its_method() -> None:
    assert sum(gpu.LIMITS.values()) <= 25 * 60
    assert all(getattr(gpu_stages, name).__doc__ for name in gpu.LIMITS)


def test_waits_are_counted_by_place(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []

    def train_step(batch: Any) -> None:
        assert modes == ["warn"]
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        thread = threading.Thread(target=warnings.warn, args=("called a synchronizing CUDA operation",))
        thread.start()
        thread.join()
        warnings.warn("something else", stacklevel=1)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    trainer: Any = SimpleNamespace(train_step=train_step)
    found = gpu_stages.synchronisations(trainer, [])
    assert sorted(found.values()) == [1, 2] and modes == ["warn", "default"]


@pytest.mark.parametrize(("peaks", "chosen"), [
    ([1], ""), ([2**60, 1], "activation_checkpointing=true"), ([2**60, 2**60, 1], "adapter=lora"), ([2**60] * 3, None),
])  # fmt: skip
def test_8b_is_trained_in_the_first_way_that_fits(
    peaks: list[int], chosen: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = iter(peaks)
    monkeypatch.setattr(Setting, "given", lambda *arguments: [])
    monkeypatch.setattr(gpu_stages, "planned", lambda given: {"peak": next(left)})
    monkeypatch.setattr(gpu_stages, "utilisation", lambda setting, shape, more: Found(note=more[-1]))
    found = gpu_stages.mfu_8b(Setting(tmp_path, tiny=True))
    if chosen is None:
        assert found.skipped.count("needs 1073741824.0 GiB") == 3 and "usable are" in found.skipped
    else:
        assert found.note == (chosen or "n_examples=64") and next(left, None) is None


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Setting:
    folder = tmp_path_factory.mktemp("day")
    cache_dir.mkdir(exist_ok=True)
    (folder / "cache").symlink_to(cache_dir)
    return Setting(folder, tiny=True)


@DAY
@pytest.mark.full
def test_correctness_on_a_cpu(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    found = gpu_stages.correctness(setting)
    assert not found.problems
    head, padded, tree, packed, bfloat16, _ = found.table
    assert head[1:] == [*gpu_stages.BOUNDS] and padded[1:] == ["0.0e+00"] * 4
    assert all(float(value) < 1e-5 for row in (tree, packed) for value in row[1:])
    assert float(bfloat16[3]) > 1e-3
    monkeypatch.setattr(gpu_stages, "BOUNDS", dict.fromkeys(gpu_stages.BOUNDS, 0.0))
    assert any("packed, float32: gradient is off by" in problem for problem in gpu_stages.correctness(setting).problems)


@DAY
@pytest.mark.full
@pytest.mark.parametrize(("stage", "rows"), [
    ("waits", 2), ("plan_1b", 2), ("dpo_embedded", 6), ("sampling", 3), ("optimizers", 5),
])  # fmt: skip
def test_stages_on_a_cpu(stage: str, rows: int, setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = {"peak": 2**30, "seconds": 1.0, "waits": {"tally": 1}}
    monkeypatch.setattr(gpu_stages, "planned", lambda given: plan)  # which takes long; see the next test
    monkeypatch.setattr("dpo.parallel.processes.apart", lambda function, *arguments: function(*arguments))
    found = getattr(gpu_stages, stage)(setting)
    assert not found.problems and not found.skipped
    assert len(found.table) == 1 + rows and all(len(row) == len(found.table[0]) for row in found.table)


@pytest.mark.full
def test_an_update_and_its_plan(setting: Setting) -> None:
    given = setting.given(None, "adapter=lora", "batch_size=4")
    found, planned = gpu_stages.update(setting, given), gpu_stages.planned(given)
    assert planned["peak"] > 0 and planned["seconds"] > 0 and sum(planned["waits"].values()) == 1
    assert found["seconds"] > 0 and found["tokens_per_second"] > 0 and found["flops_per_second"] > 0


@DAY
@pytest.mark.full
def test_the_command(setting: Setting) -> None:
    """One stage of the command in its own process: the tests that need a GPU, which are skipped here."""
    code = "import gpu; gpu.LIMITS = {'tests': 300}; gpu.main()"
    path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "scripts")])
    command = [sys.executable, "-c", code, "--tiny", "--folder", str(setting.folder)]
    before = (ROOT / "benchmarks" / "gpu.md").exists()
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (setting.folder / "gpu.md").read_text()
    assert "| tests | done |" in page and "TINY, ON A CPU" in page and "| passed | 0 |" in page
    assert (ROOT / "benchmarks" / "gpu.md").exists() == before
