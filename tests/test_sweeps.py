"""python train.py -m: what fails holds up nothing, what is finished is left alone, what is not goes on."""

import os
import re
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, read_jsonl, train_here
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

import settings
import trainers
from dpo import commandline
from dpo.run import stopping, sweeps
from dpo.utils import UserError
from settings import all_keys, check_command

Overrides = Callable[..., list[str]]


def arranged(arguments: list[str]) -> list[str]:
    return commandline.arranged(arguments, check_command, all_keys())


@pytest.fixture
def sweep(overrides: Overrides, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`python train.py -m` with the tiny model and `given`, into tmp_path/out/<user>/tuned."""

    def run(*given: str) -> subprocess.CompletedProcess[str]:
        own = ("local_run_dir=", "exp_name=tuned", f"local_dirs=[{tmp_path / 'out'}]", "loss=dpo", "n_eval_examples=4")
        command = [sys.executable, str(ROOT / "train.py"), "-m", *overrides(*own, *given)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, env={**os.environ})

    return run


@pytest.mark.full
def test_a_sweep_finishes_what_it_can_and_the_second_call_trains_nothing(
    sweep: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    first = sweep("loss.beta=0.1,-1,0.3")
    (folder,) = (tmp_path / "out").glob("*/tuned")
    assert first.returncode == 1 and "Traceback" not in first.stderr
    assert "loss.beta=-1 must be more than 0" in first.stderr
    assert "the same command runs those again that are not finished" in first.stderr.replace("\n", " ")
    assert "loss.beta=-1 must be" in (folder / "loss.beta--1" / "log.txt").read_text()
    runs = [folder / "loss.beta-0.1", folder / "loss.beta-0.3"]
    files = {path: path.read_bytes() for run in runs for path in (run / "metrics.jsonl", run / "samples.jsonl")}
    betas = [read_jsonl(run / "metrics.jsonl")[-1]["rewards_eval/margins"] for run in runs]
    assert betas[1] / betas[0] == pytest.approx(3, rel=0.2)  # the second run is not the first once more
    assert "loss.beta=-1 must" not in (runs[0] / "log.txt").read_text()
    for run in runs:
        assert "log-probabilities: " in (run / "log.txt").read_text()
    assert "log-probabilities: 0 to compute" in (runs[1] / "log.txt").read_text()

    page = (folder / "report.html").read_text()
    assert "not begun, for the reason see their log.txt: loss.beta--1" in first.stdout
    assert f"written: {folder / 'report.csv'}, {folder / 'report.html'}" in first.stdout
    assert re.search(r"^loss\.beta-0\.1 +\d\.\d{3} \[", first.stdout, re.M) and "of 2 runs" in page
    (folder / "report.html").unlink()
    (folder / "report.html").mkdir()  # a report that cannot be written fails no sweep

    second = sweep("loss.beta=0.1,0.3,0.5")
    assert second.returncode == 0, second.stderr
    assert "report.html cannot be written" in second.stderr and "loss.beta-0.5" in second.stdout
    (folder / "report.html").rmdir()
    assert second.stdout.count("nothing to do") == 2
    assert (folder / "loss.beta-0.5" / "LATEST").exists()
    assert all(path.read_bytes() == content for path, content in files.items())

    other = sweep("loss.beta=0.1,0.3", "lr=1e-3")
    assert other.returncode == 1 and other.stdout.count("=== tuned: ") == 2
    assert "of 3 runs" in (folder / "report.html").read_text() and "loss.beta-0.3" in other.stdout
    assert other.stderr.count("lr=0.001 (was 5e-07)") == 2 and "another exp_name" in other.stderr


def finished(overrides: Overrides, run_dir: Path, *given: str) -> bool:
    """Train in this process with resume=auto; whether there was nothing to do."""
    before = (run_dir / "log.txt").read_text() if (run_dir / "log.txt").exists() else ""
    train_here(overrides("loss=dpo", "loss.beta=0.1", "resume=auto", *given))
    return "nothing to do" in (run_dir / "log.txt").read_text().removeprefix(before)


def test_finished_means_the_same_settings_data_and_start(overrides: Overrides, tmp_path: Path, pairs_dir: Path) -> None:
    run_dir, pairs = tmp_path / "run", tmp_path / "pairs"
    shutil.copytree(pairs_dir, pairs)
    start = tmp_path / "start"
    train_here(overrides("loss=sft", f"local_run_dir={start}", "n_eval_examples=0"))
    given = (f"datasets=[{pairs}]", f"model.archive={start}/LATEST/")
    assert not finished(overrides, run_dir, *given, "n_examples=8", "n_eval_examples=4")
    assert finished(overrides, run_dir, *given, "n_examples=8", "n_eval_examples=0")  # more or less is measured
    assert not finished(overrides, run_dir, *given, "n_examples=12")  # it goes on to there
    assert finished(overrides, run_dir, *given, "n_examples=12")
    with pytest.raises(UserError, match=r"loss\.beta=0\.2 \(was 0\.1\)"):
        finished(overrides, run_dir, *given, "n_examples=12", "loss.beta=0.2")
    # Other weights under the same path.
    shutil.rmtree(start)
    train_here(overrides("loss=sft", f"local_run_dir={start}", "n_eval_examples=0", "lr=1e-3"))
    with pytest.raises(UserError, match=r"start has changed|reference has changed"):
        finished(overrides, run_dir, *given, "n_examples=12")


def test_a_run_stopped_before_its_last_evaluation_is_not_finished(
    overrides: Overrides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = trainers.Trainer.stop_if_asked
    with monkeypatch.context() as patch:

        def asked(trainer: trainers.Trainer) -> None:
            at_the_end = trainer.examples == trainer.total_examples
            trainer.stop.name = "the test" if at_the_end else None
            stop(trainer)

        patch.setattr(trainers.Trainer, "stop_if_asked", asked)
        with pytest.raises(stopping.Stopped):
            finished(overrides, tmp_path / "run", "n_eval_examples=4")
    events = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert events[-1]["counters/examples"] == 24 and "loss/eval" not in events[-1]
    assert not finished(overrides, tmp_path / "run", "n_eval_examples=4")
    assert "loss/eval" in read_jsonl(tmp_path / "run" / "metrics.jsonl")[-1]
    assert finished(overrides, tmp_path / "run", "n_eval_examples=4")


def test_a_failed_run_leaves_nothing_in_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Large:
        pass

    def run(stop: stopping.StopRequest) -> None:
        large = Large()
        large.itself = large  # type: ignore[attr-defined]
        seen.append(weakref.ref(large))
        sys.exit(1)

    seen: list[weakref.ref] = []
    job = {"overrides": {"task": ["resume=null"]}, "runtime": {"output_dir": str(tmp_path / "b")}}
    monkeypatch.setattr(HydraConfig, "get", lambda: OmegaConf.create(job))
    composed = OmegaConf.create({"exp_name": "x", "local_run_dir": "a/b", "resume": None, "keep_best": None})
    with pytest.raises(sweeps.RunFailed) as failure:
        sweeps.run_in_sweep(composed, run)
    assert composed.wandb.group == "x"
    assert failure.value.__context__ is None and seen[0]() is None


def test_sweeps_and_torchrun_exclude_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeps.parallel, "world_size", lambda: 2)
    with pytest.raises(UserError, match="a sweep cannot run inside torchrun"):
        sweeps.run_in_sweep(OmegaConf.create(), lambda stop: None)


def test_the_folder_of_a_swept_run_can_be_named_in_an_override(overrides: Overrides, tmp_path: Path) -> None:
    folder = tmp_path / settings._run_name("lr-1e-3_seed-2")
    train_here(overrides("loss=sft", f"local_run_dir={folder}", "n_eval_examples=0"))
    train_here(overrides("loss=dpo", "loss.beta=0.1", f"model.archive={folder}", "n_eval_examples=0"))


def test_changed_data_is_not_finished(overrides: Overrides, tmp_path: Path, pairs_dir: Path) -> None:
    pairs = tmp_path / "pairs"
    shutil.copytree(pairs_dir, pairs)
    assert not finished(overrides, tmp_path / "run", f"datasets=[{pairs}]")
    rows = (pairs / "train.jsonl").read_text().splitlines(keepends=True)
    (pairs / "train.jsonl").write_text("".join(rows[1:] + rows[:1]))
    with pytest.raises(UserError, match="training data has changed"):
        finished(overrides, tmp_path / "run", f"datasets=[{pairs}]")


def test_runs_are_named_by_what_is_swept() -> None:
    arguments = ["-m", "exp_name=x", "loss=dpo", "loss.beta=0.1,0.3", "+optimizer_kwargs.betas=[0.9,0.95],[0.8,0.9]"]
    arguments += ["lr=choice(1e-6,1e-5)", "hydra.sweep.dir=/a", "dataset_sources.hh=/b"]
    for given in (arguments, [*arguments[1:], "-m"], [*arguments[1:3], "--multirun", *arguments[3:]]):
        naming = [word for word in arranged(given) if "exclude_keys" in word]
        assert naming == ['hydra.job.config.override_dirname.exclude_keys=["dataset_sources.hh", "exp_name", "loss"]']
    one = ["exp_name=x", "loss=dpo", "loss.beta=0.1"]
    assert arranged(one) == one
    assert "loss.beta=0.1" in arranged([*one, "seed=0,1", "-m"])
    several = ["exp_name=x", "loss=dpo,ipo", "loss.beta=0.1", "-m"]  # composed with the default loss at first
    assert arranged(several)[:3] == ["exp_name=x", "loss=dpo,ipo", "++loss.beta=0.1"]
    assert settings._run_name("++loss.beta-0.1_loss-dpo") == "loss.beta-0.1_loss-dpo"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["seed=0,1"], "exp_name is missing"),
        (["exp_name=x", "seed=0"], "no key has several values"),
        (["exp_name=x", "seed=0,1", "local_run_dir=/a"], "set hydra.sweep.dir instead"),
        (["exp_name=x", "loss=dpo", "loss.beta=interval(0.1,1)"], "loss.beta is an interval"),
        (["exp_name=x", "seed=0,1", "hydra/launcher=joblib"], "pip install -r requirements-sweeps.txt"),
        (["exp_name=x", "seed=0,1", "hydra/launcher=submitit_local"], "pip install -r requirements-sweeps.txt"),
        (["exp_name=x", "seed=0,1", "hydra/sweeper=optuna"], "pip install -r requirements-sweeps.txt"),
        (["exp_name=x", "seed=0,1", "hydra/launcher=slurm"], "is not known; choose from: basic, joblib"),
        (["exp_name=x", "seed=0,1", "--cfg", "job"], "leave -m out"),
        (["exp_name=x,y"], "exp_name is the sweep's name"),
        (["exp_name=../x", "seed=0,1"], r"exp_name='\.\./x' must be a name"),
        (["exp_name=x", "seed=0,1", "--learning_rate=3"], "here that is lr="),
        (["exp_name=x", "seed=[1"], "cannot be read"),
        (["exp_name=x", "loss=dpo,sft", "loss.beta=1"], "loss=sft has no such key: sweep losses that have it"),
        (["exp_name=x", "loss=dpo,ipo", "loss.bata=1"], "did you mean 'loss.beta'?"),
    ],
)
def test_sweeps_that_cannot_be(arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commandline, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=message):
        arranged(["-m", *arguments])
    with pytest.raises(UserError, match=message):
        arranged([*arguments, "-m"])
    monkeypatch.setattr(commandline, "find_spec", lambda name: name)
    sweep = ["-m", "exp_name=x", "loss=dpo"]
    assert len(arranged([*sweep, "loss.beta=choice(0.1)"])) == 5
    assert len(arranged([*sweep, "loss.beta=interval(0.1,1)", "hydra/sweeper=optuna"])) == 6


@pytest.mark.full
def test_losses_are_swept_with_keys_that_the_default_loss_lacks(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "train.py"), "-m", "exp_name=x", f"local_dirs=[{tmp_path}]", "n_epochs=0"]
    command += ["loss=dpo,ipo", "loss.beta=0.1,-1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    runs = sorted(folder.name for folder in tmp_path.glob("*/x/*/"))
    assert runs == [f"loss.beta-{beta}_loss-{loss}" for beta in ("-1", "0.1") for loss in ("dpo", "ipo")], done.stderr
    assert done.stderr.count("n_epochs=0 must be") == 4 and done.stderr.count("loss.beta=-1 must be more") == 2


def test_names_of_runs_suit_folders() -> None:
    name = settings._run_name
    assert name("loss.beta-0.1_seed-2") == "loss.beta-0.1_seed-2" and name("") == "run"
    assert name("model.archive=/a/b") != name("model.archive=/a_b")
    long = name(f"datasets=[{'x' * 500}]")
    assert "/" not in name("model.archive=/a/b") + long and len(long) < 150
