"""Where metrics go besides the run's folder: Weights & Biases, TensorBoard, trackio."""

import importlib.util
import json
import os
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from conftest import RunTrain, read_jsonl, train_here

from dpo.run.trackers import open_wandb, run_name, tags
from dpo.utils import UserError
from settings import load_config

Overrides = Callable[..., list[str]]


def wandb_records(file: Path) -> Iterator:
    """Records of a .wandb file: a 7-byte header, then LevelDB's log format (blocks of 32 KiB; each piece has 4 bytes of
    checksum, 2 of length, 1 of type: 1 whole, 2 first, 3 middle, 4 last)."""
    from wandb.proto import wandb_internal_pb2

    data, position, parts = file.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


@pytest.mark.full
def test_an_offline_wandb_run_holds_the_metrics(train_process: RunTrain, tmp_path: Path) -> None:
    env = {"HOME": str(tmp_path), "WANDB_API_KEY": "", "NETRC": str(tmp_path / "none")}
    done = train_process("wandb.enabled=true", "n_eval_examples=8", "minimum_log_interval_secs=0", **env)
    assert done.returncode == 0, done.stderr
    assert "W&B: offline" in done.stdout
    (file,) = (tmp_path / "run").glob("wandb/offline-run-*/run-*.wandb")
    logged: dict[int, dict[str, float]] = {}
    for record in wandb_records(file):
        if record.WhichOneof("record_type") == "history":
            items = {(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in record.history.item}
            logged.setdefault(items["counters/examples"], {}).update(items)
    check_logged(tmp_path / "run", logged)


def test_tensorboard_files_hold_the_metrics(overrides: Overrides, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train_here(overrides("tensorboard=true", "n_eval_examples=0"))
    reader = EventAccumulator(str(tmp_path / "run"))
    reader.Reload()
    found = [(e.step, e.value) for e in reader.Scalars("loss/train")]
    expected = [(e["counters/examples"], e["loss/train"]) for e in read_jsonl(tmp_path / "run" / "metrics.jsonl")]
    assert found == [(step, pytest.approx(value, rel=1e-6)) for step, value in expected]


def test_one_key_names_all_trackers() -> None:
    def trackers(*given: str) -> list[str]:
        return [*load_config(["exp_name=x", *given]).trackers]

    assert trackers() == ["wandb"] and trackers("tensorboard=true") == ["wandb", "tensorboard"]
    assert trackers("wandb.enabled=false") == [] and trackers("tracker=[]") == []
    assert trackers("wandb.enabled=false", "tensorboard=true") == ["tensorboard"]
    assert trackers("tracker=[tensorboard]") == trackers("tracker=tensorboard") == ["tensorboard"]
    assert trackers("tracker=[wandb,tensorboard]", "debug=true") == ["tensorboard"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["tracker=[mlflow]"], "mlflow is not known; choose from: wandb, tensorboard, trackio"),
        (["tracker=[wandb]", "tensorboard=true"], "tensorboard=true, but tracker=.* leaves it out: set tracker alone"),
        (["tracker=[wandb]", "wandb.enabled=false"], "wandb.enabled=false, but tracker=.*: set tracker alone"),
        (["tracker=[trackio]"], "tracker=.* needs the package: pip install trackio"),
        (["tensorboard=true"], "tensorboard=true needs the package: pip install tensorboard"),
    ],
)
def test_what_cannot_be_tracked(given: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    missing = ("trackio", "tensorboard") if "needs" in message else ()
    monkeypatch.setattr("dpo.run.config.find_spec", lambda name: None if name in missing else found(name))
    with pytest.raises(UserError, match=message):
        load_config(["exp_name=x", *given])


def test_runs_are_named_by_what_varies_and_grouped_by_sweep() -> None:
    swept = load_config(["exp_name=team/hh", "wandb.group=team/hh"])
    folder = Path("runs/me/team/hh/loss.beta-0.1")
    assert (run_name(swept, folder), run_name(swept, folder, unique=True)) == ("loss.beta-0.1", "team/hh loss.beta-0.1")
    assert run_name(load_config(["exp_name=lr", "wandb.group=lr"]), Path("lr/lr-0.1")) == "lr-0.1"
    alone = load_config(["exp_name=hh"])
    names = run_name(alone, Path("runs/me/hh_2026")), run_name(alone, Path("runs/me/hh_2026"), unique=True)
    assert names == ("hh", "hh_2026")
    assert run_name(alone, Path("runs/first")) == run_name(alone, Path("runs/first"), unique=True) == "hh first"
    given = ["exp_name=x", "datasets=[/data/a.jsonl,org/b]", "adapter=lora", "loss=dpo", "loss.beta=1"]
    names_of = tags(load_config([*given, "model=pythia28"]))
    assert names_of == ["dpo", "lora", "pythia-2.8b", "a.jsonl", "b"]
    assert tags(load_config([f"datasets=[{'n' * 99}.csv]", "exp_name=x"]))[-1] == "n" * 64


def test_wandb_gets_name_group_and_tags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = tmp_path / "hh" / "loss.beta-0.1"
    folder.mkdir(parents=True)
    given = ["exp_name=hh", "wandb.group=hh", "loss=dpo", "loss.beta=0.1", "datasets=[org/b]", "model=pythia28"]
    open_wandb(load_config(given), folder).finish()
    wandb.teardown()  # the file is whole
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    (run,) = [record.run for record in wandb_records(file) if record.WhichOneof("record_type") == "run"]
    assert (run.display_name, run.run_group) == ("loss.beta-0.1", "hh")
    assert sorted(run.tags) == ["b", "dpo", "pythia-2.8b"]
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["loss"]["beta"] == 0.1


def test_trackio_gets_the_metrics(overrides: Overrides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in that takes what trackio 0.43 takes."""
    calls: list[dict[str, Any]] = []
    logged: dict[int, dict[str, float]] = {}

    def init(project: str, name: str, group: str | None, config: dict, resume: str, embed: bool) -> Any:
        calls.append({"project": project, "name": name, "config": config, "resume": resume})
        print("* Trackio project initialized")
        return types.SimpleNamespace(
            log=lambda metrics, step: logged.setdefault(step, {}).update(metrics),
            finish=lambda: calls.append({"finished": len(logged)}),
        )

    module = types.ModuleType("trackio")
    module.init = init  # type: ignore[attr-defined]
    module.__spec__ = importlib.util.spec_from_loader("trackio", None)
    monkeypatch.setitem(sys.modules, "trackio", module)
    given = overrides("tracker=[trackio]", "wandb.enabled=", "n_eval_examples=8", "minimum_log_interval_secs=0")
    train_here(given)
    check_logged(tmp_path / "run", logged)
    assert calls[0]["name"] == "test run" and calls[0]["resume"] == "never" and calls[1] == {"finished": len(logged)}
    assert calls[0]["config"]["tags"][0] == "sft"
    assert "trackio show --project" in (tmp_path / "run" / "log.txt").read_text()
    train_here([*given, "resume=auto", "n_epochs=2", "lr_schedule=constant", "resume_allow_changes=true"])
    assert calls[2]["resume"] == "allow" and calls[2]["name"] == "test run"
    check_logged(tmp_path / "run", logged)


@pytest.mark.full
def test_trackio_itself(overrides: Overrides, tmp_path: Path) -> None:
    """In a process of its own: trackio reads TRACKIO_DIR when it is imported."""
    pytest.importorskip("trackio")
    given = ["tracker=[trackio]", "wandb.enabled=", "n_eval_examples=0", "minimum_log_interval_secs=0"]
    code = f"""
import os, sys
os.environ["TRACKIO_DIR"] = {str(tmp_path / "trackio")!r}
import conftest
conftest.train_here({overrides(*given)!r})
import trackio
[run] = trackio.Api().runs("direct-preference-optimization")
assert run.name == "test run" and run.config["tags"][0] == "sft", (run.name, run.config)
from trackio.sqlite_storage import SQLiteStorage
rows = SQLiteStorage.get_logs("direct-preference-optimization", "test run")
assert [row["step"] for row in rows][-1] == 24 and "loss/train" in rows[-1], rows
"""
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-3000:]


def check_logged(run_dir: Path, logged: dict[int, dict[str, float]]) -> None:
    """Check that a tracker got every event of metrics.jsonl."""
    for event in read_jsonl(run_dir / "metrics.jsonl"):
        for name in event.keys() - {"time"}:
            assert logged[event["counters/examples"]][name] == pytest.approx(event[name]), name
