"""The store of reference log-probabilities: what it reuses, what it never mistakes, what it survives."""

import copy
import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import COSTS, ROOT, make_model, read_jsonl, train_here
from safetensors.numpy import load, save
from test_batching import Data, crowded, make_data
from transformers import PreTrainedModel

import layouts
import reference
from batching import Batch, Cut, Tree, epoch_order
from models import Computation, add_token_logps, disable_dropout, response_logps
from preference_datasets import Record
from reference import StoredReference, build_reference, entry_key, model_key, wanted_by
from utils import UserError

HOW = Computation(torch.float32, "tree")


@pytest.fixture
def model() -> PreTrainedModel:
    model = make_model()
    disable_dropout(model)
    return add_token_logps(model)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of responses of every batch that is computed for the store."""
    counts: list[int] = []
    own = reference._computed

    def counting(*arguments: object) -> object:
        for tree, logps in own(*arguments):  # type: ignore[arg-type]
            counts.append(len(tree.responses))
            yield tree, logps

    monkeypatch.setattr(reference, "_computed", counting)
    return counts


def build(model: PreTrainedModel, data: Data, folder: Path, how: Computation = HOW) -> StoredReference:
    examples = [(int(record), int(pair)) for record, pair in epoch_order(data, 0, 0)]
    return build_reference(model, how, Cut(how.layout, 1, 1, 60), folder, wanted_by(data, examples))


def n_responses(data: Data) -> int:
    return sum(len({r for pair in record.pairs for r in pair}) for record in data.records)


def test_entries_are_the_log_probabilities_of_each_response_alone(model: PreTrainedModel, tmp_path: Path) -> None:
    data = make_data()
    data.records[3] = Record([], [[5], [7, 8, 9]], [(0, 1)])
    stored = build(model, data, tmp_path)
    for record in data.records:
        tree = Tree(record.prompt, [record.responses[r] for r in sorted({r for pair in record.pairs for r in pair})])
        batch = Batch([tree], [], None)
        with torch.no_grad():
            wanted = response_logps(model, batch, Computation(torch.float32))
        found = stored.response_logps(batch)
        assert torch.equal(found.mask, wanted.mask)
        torch.testing.assert_close(found.logps, wanted.logps, rtol=1e-5, atol=1e-5)


def test_only_what_changed_is_computed(model: PreTrainedModel, tmp_path: Path, counted: list[int]) -> None:
    def computed_now() -> int:
        total = sum(counted)
        counted.clear()
        return total

    data = make_data()
    build(model, data, tmp_path)
    assert computed_now() == n_responses(data)
    build(model, data, tmp_path)
    build(model, data, tmp_path, dataclasses.replace(HOW, layout="padded"))
    assert computed_now() == 0
    data.records[2].responses[0][0] ^= 1
    build(model, data, tmp_path)
    assert computed_now() == 1
    data.records[2].prompt.append(3)
    build(model, data, tmp_path)
    assert computed_now() == len({r for pair in data.records[2].pairs for r in pair})
    build(model, make_data(14), tmp_path)
    assert 0 < computed_now() < n_responses(make_data(14))
    with torch.no_grad():
        weight = model.model.layers[0].mlp.up_proj.weight
        weight.view(torch.int32)[0, 0] ^= 1  # one bit
    build(model, data, tmp_path)
    assert computed_now() == n_responses(data)


def test_a_key_parts_prompt_and_response() -> None:
    assert (
        len({entry_key([1, 2], [3]), entry_key([1], [2, 3]), entry_key([], [1, 2, 3]), entry_key([1, 2], [3, 0])}) == 4
    )


def test_the_model_key_knows_configuration_and_type(model: PreTrainedModel) -> None:
    key = model_key(model, HOW)
    assert key == model_key(model, dataclasses.replace(HOW, layout="padded"))
    assert key != model_key(model, dataclasses.replace(HOW, dtype=torch.bfloat16))
    other = copy.deepcopy(model.config)
    other.rms_norm_eps *= 2
    model.config, own = other, model.config
    assert key != model_key(model, HOW)
    model.config = own
    own._name_or_path = "elsewhere"
    assert key == model_key(model, HOW)


@pytest.mark.parametrize("damage", ["cut", "empty", "flip"])
def test_a_damaged_shard_is_computed_again(
    damage: str, model: PreTrainedModel, tmp_path: Path, counted: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_data()
    build(model, data, tmp_path)
    (shard,) = tmp_path.rglob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "flip": bytes(content)}[damage])
    counted.clear()
    build(model, data, tmp_path)
    assert sum(counted) == n_responses(data)
    assert "is damaged" in capsys.readouterr().out


def test_an_interrupted_computation_goes_on(
    model: PreTrainedModel, tmp_path: Path, counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "SECONDS_PER_SHARD", 0)
    data, add = make_data(), StoredReference.add

    def interrupted(self: StoredReference, key: bytes, logps: np.ndarray) -> None:
        if len(list(self.folder.iterdir())) == 5:
            raise KeyboardInterrupt
        add(self, key, logps)

    monkeypatch.setattr(StoredReference, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(model, data, tmp_path)
    monkeypatch.setattr(StoredReference, "add", add)
    counted.clear()
    build(model, data, tmp_path)
    assert sum(counted) == n_responses(data) - 5


def test_entries_that_are_not_the_models_stop_the_run(model: PreTrainedModel, tmp_path: Path) -> None:
    data = make_data()
    build(model, data, tmp_path)
    (path,) = tmp_path.rglob("*.safetensors")
    shard = load(path.read_bytes())
    content = save({**shard, "logps": shard["logps"] + np.float32(0.01)})
    path.unlink()
    (path.parent / f"{reference._hash(content)}.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"differ from those this model computes by 0.01"):
        build(model, data, tmp_path)


WRITER = """
import sys
import numpy as np
import reference
from pathlib import Path
reference.SECONDS_PER_SHARD = 0
store = reference.StoredReference(Path(sys.argv[1]))
for i in range(200):
    store.add(reference.entry_key([int(sys.argv[2])], [i]), np.full(3, i, dtype=np.float32))
"""


def test_two_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    jobs = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), str(i)], cwd=ROOT) for i in range(2)]
    assert [job.wait(120) for job in jobs] == [0, 0]
    store = StoredReference(tmp_path)
    store.read()
    assert len(store.entries) == 400
    assert all((store.entries[entry_key([job], [i])] == i).all() for job in range(2) for i in range(200))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_stored_and_live_train_the_same_and_a_sweep_computes_nothing_twice(
    overrides: Callable[..., list[str]], tmp_path: Path, counted: list[int]
) -> None:
    def run(name: str, *given: str) -> tuple[list[dict], int]:
        counted.clear()
        where = (f"local_run_dir={tmp_path / name}", f"cache_dir={tmp_path / 'cache'}")
        train_here(overrides("loss=dpo", "loss.beta=0.5", "lr=1e-2", "n_eval_examples=4", *where, *given))
        return read_jsonl(tmp_path / name / "metrics.jsonl"), sum(counted)

    stored, computed = run("stored")
    assert computed == 2 * (24 + 4)
    live, computed = run("live", "reference.mode=live", "layout=padded", "microbatch_tokens=null")
    assert computed == 0
    for one, other in zip(stored, live, strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - COSTS:
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=2e-5), name
    sampled = [read_jsonl(tmp_path / name / "samples.jsonl") for name in ("stored", "live")]
    assert sampled[0] == sampled[1]
    for number, given in enumerate(("loss.beta=0.1", "loss=ipo", "seed=3", "optimizer=SGD")):
        assert run(f"other{number}", given)[1] == 0
    assert 0 < run("shorter", "max_length=40")[1] < 2 * (24 + 4)


@pytest.mark.parametrize("layout", ["tree", "padded"])
@pytest.mark.parametrize(("passes", "tokens"), [(1, 100), (1, 1), (40, None)])
def test_a_prompt_with_many_responses_stands_on_several_trees(
    layout: str,
    passes: int,
    tokens: int | None,
    model: PreTrainedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data, seen = crowded(300), []

    def watched(model: PreTrainedModel, batch: Batch, how: Computation) -> object:
        rows = layouts.lay_out(batch, how.layout)
        seen.append((rows.input_ids.numel(), rows.shape[0]))
        return response_logps(model, batch, how)

    monkeypatch.setattr(reference, "response_logps", watched)
    examples = [(int(record), int(pair)) for record, pair in epoch_order(data, 0, 0)]
    how = dataclasses.replace(HOW, layout=layout)
    for _ in range(2):  # the second time all are there, and some are checked
        stored = build_reference(model, how, Cut(layout, 1, passes, tokens), tmp_path, wanted_by(data, examples))
    assert len(stored.entries) == n_responses(data)
    for used, rows in seen:
        assert used <= tokens or rows == 1 if tokens else rows <= 3 * n_responses(data) / passes
    record = data.records[1]
    with torch.no_grad():
        alone = response_logps(model, Batch([Tree(record.prompt, record.responses[:5])], [], None), HOW)
    found = [stored.entries[entry_key(record.prompt, response)] for response in record.responses[:5]]
    for row, mask, entry in zip(alone.logps, alone.mask, found):
        np.testing.assert_allclose(row[mask].numpy(), entry, rtol=1e-5, atol=1e-5)
