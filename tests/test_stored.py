"""Stored reference log-probabilities as files: what is found, what is never mistaken, and what a process holds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load, save
from test_batching import make_data

from dpo import parallel, stored
from dpo.data.batching import Example, responses_of
from dpo.reference import Wanted, stored_of, wanted_by
from dpo.stored import StoredReference, as_keys, entry_key
from dpo.utils import UserError

Entries = dict[bytes, np.ndarray]


def make_entries(n: int, seed: int = 0) -> Entries:
    rng = np.random.default_rng(seed)
    return {rng.bytes(16): rng.normal(size=rng.integers(1, 9)).astype(np.float32) for _ in range(n)}


def write(folder: Path, entries: Entries) -> Path:
    """Add a file of `entries`."""
    before, store = set(folder.glob("*.safetensors")), StoredReference(folder)
    for key, logps in entries.items():
        store.add(key, logps)
    store.write()
    (path,) = set(folder.glob("*.safetensors")) - before
    return path


def without_checks(path: Path) -> Path:
    """Replace a file by one as earlier versions wrote them."""
    content = save({name: array for name, array in load(path.read_bytes()).items() if name != "checks"})
    path.unlink()
    path = path.with_name(stored.shard_name(content))
    path.write_bytes(content)
    return path


def opened(folder: Path) -> StoredReference:
    store = StoredReference(folder)
    store.read()
    return store


def flip(path: Path, place: int, keep_time: bool = False) -> None:
    """Change a byte of a file, as a disk would (`keep_time`) or another program."""
    time = path.stat().st_mtime_ns
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))
    if keep_time:
        os.utime(path, ns=(time, time))


def test_several_files_are_the_dictionary_of_their_entries(tmp_path: Path) -> None:
    store, expected = StoredReference(tmp_path), {}
    for seed in range(6):
        for part in range(1 + seed % 3):  # several files, or one, at each reading; some of an earlier version
            entries = make_entries(1 + 40 * part, 10 * seed + part)
            path = write(tmp_path, entries)
            expected |= entries
            if seed % 2:
                without_checks(path)
        store.read()
        keys = list(expected)
        np.random.default_rng(seed).shuffle(keys)
        found = store.look_up(keys)
        assert len(store) == len(expected) and len(found) == len(keys)
        assert all(np.array_equal(entry, expected[key]) for key, entry in zip(keys, found))
        absent = [*make_entries(20, 99), bytes(16), b"\xff" * 16]
        assert list(store.find(as_keys([*absent, *keys]))["file"] >= 0) == [False] * 22 + [True] * len(keys)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_an_entry_that_two_jobs_computed_is_the_same_in_every_process(tmp_path: Path) -> None:
    keys = list(make_entries(5))
    paths = [write(tmp_path, {key: np.full(3, value, np.float32) for key in keys}) for value in (1, 2)]
    last = float(load(max(paths).read_bytes())["logps"][0])
    assert all((entry == last).all() for entry in opened(tmp_path).look_up(keys))


def test_a_missing_entry_is_an_error(tmp_path: Path) -> None:
    for store in (opened(tmp_path), (write(tmp_path, make_entries(3)), opened(tmp_path))[1]):
        with pytest.raises(UserError, match="no log-probabilities of a response that training needs"):
            store.look_up([entry_key([1], [2])])


@pytest.mark.parametrize("old", [False, True])
def test_only_a_damaged_file_is_lost(old: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {write(tmp_path, entries): entries for entries in (make_entries(30, seed) for seed in range(3))}
    if old:
        files = {without_checks(path): entries for path, entries in files.items()}
    opened(tmp_path)
    for path, place in ((min(files), 200), (max(files), -1)):
        flip(path, path.stat().st_size + place if place < 0 else place)
        lost = files.pop(path)
        store = opened(tmp_path)
        assert f"{path} is damaged" in capsys.readouterr().out and not path.exists()
        assert (store.find(as_keys(list(lost)))["file"] < 0).all()
        for entries in files.values():
            assert all(np.array_equal(*pair) for pair in zip(store.look_up(list(entries)), entries.values()))


def test_files_are_verified_once_and_again_if_they_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed, file_hash = [], stored.file_hash
    monkeypatch.setattr(stored, "file_hash", lambda path: hashed.append(path) or file_hash(path))
    paths = sorted(write(tmp_path, make_entries(30, seed)) for seed in range(3))
    paths[0] = without_checks(paths[0])

    def verified() -> list[Path]:
        hashed.clear()
        assert len(opened(tmp_path)) == 90
        return sorted(hashed)

    assert verified() == sorted(paths)
    assert verified() == [paths[0]]  # its entries cannot be checked when they are looked up
    os.utime(paths[1])
    assert verified() == sorted(paths[:2])
    for content in ("[", "[]", json.dumps({paths[1].name: "x"})):
        (tmp_path / stored.VERIFIED).write_text(content)
        assert verified() == sorted(paths)


@pytest.mark.parametrize("tensor", ["keys", "lengths", "checks", "logps"])
def test_damage_after_a_file_was_verified_gives_no_wrong_number(tensor: str, tmp_path: Path) -> None:
    """Even if the file's time does not tell of it, be it while the run lasts or between two runs."""
    for restarts in (False, True):
        entries = make_entries(20)
        path = write(tmp_path, entries)
        running = opened(tmp_path)
        header = json.loads(path.read_bytes()[8:][: int.from_bytes(path.read_bytes()[:8], "little")])
        start, _ = header[tensor]["data_offsets"]
        flip(path, 8 + int.from_bytes(path.read_bytes()[:8], "little") + start + 4, keep_time=True)
        if restarts:
            content = json.loads((tmp_path / stored.VERIFIED).read_text())
            content[path.name] = stored._stat(path)
            (tmp_path / stored.VERIFIED).write_text(json.dumps(content))
            try:
                running = opened(tmp_path)
            except UserError as error:  # the lengths do not add up
                assert tensor == "lengths" and "was damaged after it was verified" in str(error)
                continue
        wrong = 0
        for key, logps in entries.items():
            try:
                assert np.array_equal(*running.look_up([key]), logps)
            except UserError as error:
                wrong += 1
                assert "was damaged" in str(error) or (restarts and tensor == "keys")
        expected = tensor == "logps" or restarts  # the index of a run is a copy of the others
        assert (wrong > 0) is expected and path.exists() is not (expected and tensor != "keys")
        path.unlink(missing_ok=True)


def test_what_a_killed_job_left_is_removed(tmp_path: Path) -> None:
    for name, hours in ((".old", 25), (".new", 1)):
        (tmp_path / name).write_bytes(b"half")
        os.utime(tmp_path / name, (0, (tmp_path / name).stat().st_mtime - 3600 * hours))
    opened(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".new"}


OPEN = """
import re, sys
from pathlib import Path
from dpo import stored

def private():
    status = Path("/proc/self/smaps_rollup").read_text()
    return sum(int(n) for n in re.findall(r"^Private_Dirty: +(\\d+)", status, re.M)) / 1024

store = stored.StoredReference(Path(sys.argv[1]))
before = private()
store.read()
at_open = private()
keys = [key.tobytes() for key in store._indices[0][0][::7]]
total = sum(float(store.look_up([key])[0].sum()) for key in keys)
print(before, at_open - before, private() - at_open, len(keys), total)
"""


@pytest.mark.full
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="Linux tells what is private")
def test_a_process_holds_none_of_a_large_store(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for _ in range(4):
        write(tmp_path, {rng.bytes(16): np.full(512, -1, np.float32) for _ in range(20_000)})
    size = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")) / 2**20
    opened(tmp_path)
    out = subprocess.run([sys.executable, "-c", OPEN, str(tmp_path)], cwd=ROOT, capture_output=True, check=True)
    _, opening, reading, n, total = map(float, out.stdout.split())
    assert size > 150 and total == -512 * n
    assert opening < 20 and reading < 20  # MiB; the dictionary took all of it


def read_in_group(folder: Path, out: Path) -> None:
    with parallel.group(torch.device("cpu")):
        data = make_data(30)
        wanted = wanted_by(data, [(i, 0) for i in range(30)])
        store = StoredReference(folder)
        store.read()
        found = stored_of(wanted, store)
        values = [list(wanted), found.tolist(), store._files, [len(store), len(list(folder.glob("*.safetensors")))]]
        (out / f"{parallel.rank()}.json").write_text(json.dumps([[tree[1:] for tree in values[0]], *values[1:]]))
        parallel.gather(None)


@pytest.mark.full
def test_processes_share_the_work_and_agree(tmp_path: Path) -> None:
    data, folder = make_data(30), tmp_path / "store"
    folder.mkdir()
    wanted = wanted_by(data, [(i, 0) for i in range(30)])
    keys = [entry_key(data[r].prompt, data[r].responses[i]) for _, r, some in wanted for i in some]
    for i in range(5):
        path = write(folder, {key: np.full(2, i, np.float32) for key in keys[i : len(keys) : 6]})
    flip(path, path.stat().st_size - 1)
    parallel.launch(read_in_group, (folder, tmp_path), 2, None)
    one, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert one == other and len(one[2]) == one[3][1] == 4
    assert one[0] == [[record, responses] for _, record, responses in wanted]
    assert one[1] == [i % 6 < 4 for i in range(len(keys))]


# What a run wants -----------------------------------------------------------------------------------------------------

DATA = make_data(9)
some_examples = st.lists(st.sampled_from([(i, p) for i in range(9) for p in range(len(DATA[i].pairs))]), max_size=40)


def slowly_wanted(examples: list[Example]) -> list[tuple[int, list[int]]]:
    needed: dict[int, set[int]] = {}
    for record, pair in examples:
        needed.setdefault(record, set()).update(responses_of(DATA, DATA[record], pair))
    return [(record, sorted(responses)) for record, responses in needed.items()]


@given(some_examples, some_examples, st.randoms())
def test_what_is_wanted_is_that_of_a_loop(examples: list[Example], more: list[Example], random: object) -> None:
    wanted = wanted_by(DATA, examples)
    assert [tree[1:] for tree in wanted] == slowly_wanted(examples)
    both = wanted + wanted_by(DATA, np.array(more).reshape(-1, 2))
    trees = [*slowly_wanted(examples), *slowly_wanted(more)]
    assert [tree[1:] for tree in both] == trees and len(both.responses) == sum(len(some) for _, some in trees)
    assert all(tree[0] is DATA for tree in both) and list(Wanted.of(list(both))) == list(both)
    kept = np.random.default_rng(len(examples)).random(len(both.responses)) < 0.5
    left = iter(kept.tolist())
    parts = [(record, [r for r in some if next(left)]) for record, some in trees]
    assert [tree[1:] for tree in both.only(kept)] == [part for part in parts if part[1]]
