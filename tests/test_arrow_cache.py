"""Cache folders: damaged ones are made anew, leftovers of dead processes go, data workers never outlive their work."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pyarrow as pa
import pytest
from conftest import ROOT, make_tokenizer, write_pairs

from dpo.data import cache as arrow_cache
from dpo.data.records import PreferenceData
from dpo.data.sources import DataSettings
from dpo.utils import UserError, progress
from preference_datasets import load_data


def build(folder: Path) -> None:
    (folder / "a.arrow").write_bytes(bytes(range(256)) * 1000)
    (folder / "inner").mkdir()
    (folder / "inner" / "b.json").write_text("{}")


def names(cache: Path) -> list[str]:
    """What a cache holds, except its locks."""
    return sorted(path.name for path in cache.iterdir() if path.name != arrow_cache.LOCKS)


def flip(path: Path, at: int) -> None:
    """Flip a bit, and keep the file's size and time of change."""
    stat = path.stat()
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def copied_from_another(folder: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name("other"), folder)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "flip": (lambda f: flip(f / "a.arrow", 200_000), "a.arrow has been altered"),
    "cut": (lambda f: os.truncate(f / "a.arrow", 100), "a.arrow has been altered"),
    "empty": (lambda f: os.truncate(f / "a.arrow", 0), "a.arrow has been altered"),
    "missing": (lambda f: (f / "inner" / "b.json").unlink(), "b.json cannot be read"),
    "a folder": (lambda f: ((f / "a.arrow").unlink(), (f / "a.arrow").mkdir()), "a.arrow cannot be read"),
    "more": (lambda f: (f / "chat_template.jinja").touch(), "chat_template.jinja is not in cache_manifest.json"),
    "no manifest": (lambda f: (f / "cache_manifest.json").unlink(), "cache_manifest.json is missing"),
    "cut manifest": (lambda f: os.truncate(f / "cache_manifest.json", 30), "cache_manifest.json cannot be read"),
    "other manifest": (lambda f: (f / "cache_manifest.json").write_text("[1]"), "cache_manifest.json cannot be read"),
    "manifest of less": (
        lambda f: (f / "cache_manifest.json").write_text('{"files": {}}'),
        "cache_manifest.json is damaged",
    ),
    "another's": (copied_from_another, "cache_manifest.json is damaged, or of another folder"),
    "a file": (lambda f: (shutil.rmtree(f), f.touch()), "cache_manifest.json cannot be read"),
    "a dangling link": (lambda f: (shutil.rmtree(f), f.symlink_to("nowhere")), "cache_manifest.json is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_made_anew_and_that_is_said(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("name", "other"):
        arrow_cache.cached(tmp_path, name, build)
    hurt, said = DAMAGES[damage]
    hurt(tmp_path / "name")
    assert arrow_cache.cached(tmp_path, "name", build) == tmp_path / "name"
    assert "is damaged: " in (out := capsys.readouterr().out) and said in out
    assert (tmp_path / "name" / "a.arrow").stat().st_size == 256_000
    assert arrow_cache.damage(tmp_path / "name") is None
    assert names(tmp_path) == ["name", "other"]


def test_a_whole_folder_is_not_made_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made: list[Path] = []
    for _ in range(3):
        folder = arrow_cache.cached(tmp_path / "cache", "name", lambda folder: (made.append(folder), build(folder)))  # type: ignore[func-returns-value]
    assert len(made) == 1 and capsys.readouterr().out == ""
    os.utime(folder / "a.arrow")  # copied, say
    (folder / ".nfs0001").touch()
    assert arrow_cache.damage(folder) is None
    moved = folder.with_name("moved")
    folder.rename(moved)
    assert arrow_cache.damage(moved)


def test_what_cannot_be_mended_is_refused(tmp_path: Path) -> None:
    def refuse(folder: Path) -> None:
        raise OSError("disk full")

    folder = arrow_cache.cached(tmp_path, "name", build)
    flip(folder / "a.arrow", 0)
    with pytest.raises(UserError, match=r"cannot be written \(disk full"):
        arrow_cache.cached(tmp_path, "name", refuse)
    assert arrow_cache.cached(tmp_path, "name", build) and arrow_cache.damage(folder) is None


MAKER = """
import sys, time
from pathlib import Path
from dpo.data import cache as arrow_cache

def build(folder):
    (folder / "x").touch()
    print(folder, flush=True)
    time.sleep(float(sys.argv[3]))

arrow_cache.cached(Path(sys.argv[1]), sys.argv[2], build)
"""


def start_maker(cache: Path, name: str, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", MAKER, str(cache), name, str(seconds)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_of_two_processes_one_makes_a_folder_and_the_other_waits(tmp_path: Path) -> None:
    makers = [start_maker(tmp_path, "name", seconds=1) for _ in range(2)]
    built = [maker.communicate()[0] for maker in makers]
    assert [maker.returncode for maker in makers] == [0, 0] and sorted(map(bool, built)) == [False, True]
    assert names(tmp_path) == ["name"]


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(tmp_path: Path) -> None:
    makers = [start_maker(tmp_path, name, seconds=100) for name in ("dead", "alive")]
    try:
        folders = [Path(str(maker.stdout and maker.stdout.readline().strip())) for maker in makers]
        makers[0].kill()
        makers[0].wait()
        (tmp_path / ".mine").mkdir()
        arrow_cache.cached(tmp_path, "another", build)
        assert [folder.exists() for folder in folders] == [False, True]
        makers[1].kill()
        makers[1].wait()
        arrow_cache.cached(tmp_path, "another", build)  # nothing to make
    finally:
        for maker in makers:
            maker.kill()
    assert names(tmp_path) == [".mine", "another"]


@pytest.fixture
def load(tmp_path: Path) -> Callable[[], PreferenceData]:
    tokenizer, pairs = make_tokenizer(), write_pairs(tmp_path / "pairs", 600)
    settings = DataSettings((str(pairs),), {}, False, 64, 32, cache_dir=str(tmp_path / "cache"), num_proc=2)
    return lambda: load_data(settings, tokenizer, "train")


@pytest.mark.parametrize("file", ["records.arrow", "funnel.json", "rows.arrow", "tally.json"])
@pytest.mark.parametrize("how", ["flip every byte", "cut", "remove"])
def test_damaged_data_is_read_by_nobody(
    file: str, how: str, load: Callable[[], PreferenceData], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = load()
    records = [wanted[i] for i in range(len(wanted))]
    del wanted
    (path,) = (tmp_path / "cache").glob(f"*/{file}")
    content = path.read_bytes()
    if how == "remove":
        path.unlink()
    else:
        path.write_bytes(content[:-20] if how == "cut" else bytes(byte ^ 255 for byte in content))
    if path.parent.name.startswith("rows"):  # which are opened for what is missing
        shutil.rmtree(next((tmp_path / "cache").glob("tokens-*")))
    capsys.readouterr()
    found = load()
    assert [found[i] for i in range(len(found))] == records
    assert f"is damaged: {file}" in capsys.readouterr().out


def double(x: int) -> int:
    time.sleep(0.001 * (x % 3))
    return 2 * x


def test_results_come_in_order() -> None:
    assert list(arrow_cache.parallel(double, range(300), 3)) == [2 * x for x in range(300)]


def fail(x: int) -> bytes:
    if x == 7:
        raise {1: ValueError, 2: EOFError}[2 if os.environ.get("EOF") else 1]("seven")
    return bytes(3_000_000)


@pytest.mark.parametrize("error", [ValueError, EOFError])
def test_what_a_worker_raises_is_raised(error: type, monkeypatch: pytest.MonkeyPatch) -> None:
    before = psutil.Process().children()
    monkeypatch.setenv("EOF", "1" if error is EOFError else "")
    with pytest.raises(error, match="seven"):
        list(arrow_cache.parallel(fail, range(100), 2))
    assert not set(psutil.Process().children()) - set(before)


def send_and_die(x: int) -> bytes:
    """For 7 a result that takes a while to send, in a process that dies meanwhile."""
    if x == 7:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
    return bytes(400_000_000 if x == 7 else 1)


def test_a_worker_killed_while_it_sends_is_noticed() -> None:
    with pytest.raises(UserError, match="a data worker was killed"):
        list(arrow_cache.parallel(send_and_die, range(100), 2))


def test_a_full_disk_ends_the_workers(tmp_path: Path) -> None:
    before = psutil.Process().children()
    schema = pa.schema({"x": pa.int64()})

    def batches() -> Iterator:
        for _ in arrow_cache.parallel(double, range(100), 2):
            yield pa.RecordBatch.from_pylist([{"x": "no number"}], schema=schema), None

    with pytest.raises((pa.ArrowException, OSError, TypeError)):
        arrow_cache.write_arrow(tmp_path / "x", schema, batches(), progress(disable=True))
    assert not set(psutil.Process().children()) - set(before)


LEFT = """
import multiprocessing, sys
from dpo.data import cache as arrow_cache

def work():
    global left
    left = arrow_cache.parallel(abs, range(100), 2)
    next(left)
    sys.exit(3)

process = multiprocessing.get_context("fork").Process(target=work)
process.start()
process.join(20)
print(process.exitcode)
process.kill()
"""


@pytest.mark.full
def test_an_open_pool_does_not_hold_up_a_child_process() -> None:
    done = subprocess.run([sys.executable, "-c", LEFT], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "3\n", done


ORPHANS = """
import os, sys, time
from dpo.data import cache as arrow_cache

end = arrow_cache.end_with_parent

def late(parent):
    time.sleep(2)  # the parent dies before this asks to die with it
    end(parent)

arrow_cache.end_with_parent = late

def chunk():
    yield 0
    yield 1
    import multiprocessing
    print(*(p.pid for p in multiprocessing.active_children()), flush=True)
    os._exit(1)

next(arrow_cache.parallel(abs, chunk(), 2))
"""


def test_workers_go_with_a_parent_that_dies_before_they_ask_to() -> None:
    done = subprocess.run([sys.executable, "-c", ORPHANS], cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=60)
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2
    end = time.monotonic() + 20
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids):
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_manifest_names_every_file(tmp_path: Path) -> None:
    folder = arrow_cache.cached(tmp_path, "name", build)
    assert set(json.loads((folder / "cache_manifest.json").read_text())["files"]) == {"a.arrow", "inner/b.json"}


START = """
import sys
import numpy as np
import pyarrow as pa
from dpo.data.records import _numbers

buffer = pa.py_buffer(np.array([7, 8, 9], dtype=np.uint64))
whole = pa.Array.from_buffers(pa.uint64(), 3, [None, buffer])
found = [_numbers(whole).tolist(), _numbers(pa.chunked_array([whole[:2], whole[2:]])[1:]).tolist()]
print("pandas" in sys.modules, *found)
"""


def test_numbers_of_arrow_need_no_pandas() -> None:
    found = subprocess.run([sys.executable, "-c", START], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout == "False [7, 8, 9] [8, 9]\n"
