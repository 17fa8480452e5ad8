"""The store of reference log-probabilities: what it reuses, what it never mistakes, what it survives."""

import copy
import dataclasses
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import COSTS, ROOT, make_model, make_tokenizer, read_jsonl, train_here
from safetensors.numpy import load, save
from test_batching import Data, crowded, make_data
from transformers import AutoModelForCausalLM, Phi3Config, PreTrainedModel

import trainers
from dpo import agreement, reference, stored
from dpo.data.batching import Batch, Cut, Tree, epoch_order
from dpo.data.records import Record
from dpo.model import layouts
from dpo.model.checks import disable_dropout
from dpo.model.logps import Computation, add_token_logps, response_logps
from dpo.reference import build_reference, model_key, wanted_by
from dpo.run import health
from dpo.stored import StoredReference, entry_key
from dpo.utils import UserError

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
    tree_logps = reference.tree_logps

    def counting(*arguments: object) -> object:
        for computed in tree_logps(*arguments):  # type: ignore[arg-type]
            counts.append(len(computed[1].responses))
            yield computed

    monkeypatch.setattr(reference, "tree_logps", counting)
    return counts


def build(model: PreTrainedModel, data: Data, folder: Path, how: Computation = HOW) -> StoredReference:
    examples = [(int(record), int(pair)) for record, pair in epoch_order(data, 0, 0)]
    return build_reference(model, how, Cut(how.layout, 1, 1, 60), folder, wanted_by(data, examples))


def n_responses(data: Data) -> int:
    return sum(len({r for pair in record.pairs for r in pair}) for record in data.records)


def test_entries_are_the_log_probabilities_of_each_response_alone(model: PreTrainedModel, tmp_path: Path) -> None:
    data = make_data()
    data.records[3] = Record([], [[5], [7, 8, 9]], [(0, 1)])
    built = build(model, data, tmp_path)
    for record in data.records:
        tree = Tree(record.prompt, [record.responses[r] for r in sorted({r for pair in record.pairs for r in pair})])
        batch = Batch([tree], [], None)
        with torch.no_grad():
            wanted = response_logps(model, batch, Computation(torch.float32))
        found = built.response_logps(batch)
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


def test_keys_of_other_versions_name_other_folders(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    key = model_key(model, HOW)
    monkeypatch.setattr(reference, "KEY_VERSION", reference.KEY_VERSION + 1)
    assert key != model_key(model, HOW)


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
    monkeypatch.setattr(stored, "SECONDS_PER_SHARD", 0)
    data, add = make_data(), StoredReference.add

    def interrupted(self: StoredReference, key: bytes, logps: np.ndarray) -> None:
        if len(list(self.folder.glob("*.safetensors"))) == 5:
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
    del shard["checks"]  # as in older files
    content = save({**shard, "logps": shard["logps"] + np.float32(0.01)})
    path.unlink()
    (path.parent / stored.shard_name(content)).write_bytes(content)
    with pytest.raises(UserError, match=r"differ from those this model computes by 0.01"):
        build(model, data, tmp_path)


def test_numbers_that_are_not_finite_do_not_pass_for_equal(model: PreTrainedModel, tmp_path: Path) -> None:
    data = make_data()
    built = build(model, data, tmp_path)
    (path,) = built.folder.glob("*.safetensors")
    shard = load(path.read_bytes())
    del shard["checks"]
    content = save({**shard, "logps": shard["logps"] * np.float32("nan")})
    path.unlink()
    (path.parent / stored.shard_name(content)).write_bytes(content)
    with pytest.raises(UserError, match="differ from those this model computes by nan"):
        build(model, data, tmp_path)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    build(model, data, tmp_path)  # the check of all examples refuses this model
    with pytest.raises(UserError, match="log-probabilities are not finite: the model overflows"):
        build(model, data, tmp_path)


def test_a_token_alone_has_nothing_to_compare(model: PreTrainedModel, tmp_path: Path) -> None:
    data = make_data()
    data.records[0] = Record([], [[5], [6]], [(0, 1)])
    for _ in range(2):
        assert len(build_reference(model, HOW, Cut("tree", 1, 1, 60), tmp_path, wanted_by(data, [(0, 0)]))) == 2


WRITER = """
import sys
import numpy as np
from dpo import stored
from pathlib import Path
stored.SECONDS_PER_SHARD = 0
store = stored.StoredReference(Path(sys.argv[1]))
for i in range(200):
    store.add(stored.entry_key([int(sys.argv[2])], [i]), np.full(3, i, dtype=np.float32))
"""


@pytest.mark.full
def test_two_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    jobs = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), str(i)], cwd=ROOT) for i in range(2)]
    store, seen = StoredReference(tmp_path), 0
    while any(job.poll() is None for job in jobs):  # and a third reads meanwhile
        store.read()
        assert len(store) >= seen
        seen = len(store)
        time.sleep(0.02)
    assert [job.wait(120) for job in jobs] == [0, 0]
    store.read()
    assert len(store) == 400
    found = store.look_up([entry_key([job], [i]) for job in range(2) for i in range(200)])
    assert all(len(entry) == 3 and (entry == i % 200).all() for i, entry in enumerate(found))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_stored_and_live_train_the_same_and_a_sweep_computes_nothing_twice(
    overrides: Callable[..., list[str]], tmp_path: Path, counted: list[int]
) -> None:
    def run(name: str, *given: str) -> tuple[list[dict], int]:
        counted.clear()
        where = (f"local_run_dir={tmp_path / name}", f"cache_dir={tmp_path / 'cache'}")
        train_here(overrides("loss=dpo", "loss.beta=0.5", "lr=1e-2", "n_eval_examples=4", *where, *given))
        return read_jsonl(tmp_path / name / "metrics.jsonl"), sum(counted)

    first, computed = run("stored")
    assert computed == 2 * (24 + 4)
    live, computed = run("live", "reference.mode=live", "layout=padded", "microbatch_tokens=null")
    assert computed == 0
    for one, other in zip(first, live, strict=True):
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
        built = build_reference(model, how, Cut(layout, 1, passes, tokens), tmp_path, wanted_by(data, examples))
    assert len(built) == n_responses(data)
    for used, rows in seen:
        assert used <= tokens or rows == 1 if tokens else rows <= 3 * n_responses(data) / passes
    record = data.records[1]
    with torch.no_grad():
        alone = response_logps(model, Batch([Tree(record.prompt, record.responses[:5])], [], None), HOW)
    found = built.look_up([entry_key(record.prompt, response) for response in record.responses[:5]])
    for row, mask, entry in zip(alone.logps, alone.mask, found):
        np.testing.assert_allclose(row[mask].numpy(), entry, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["tree", "padded"])
def test_many_trees_are_dealt_a_stretch_at_a_time(
    layout: str, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = crowded(60)
    wanted = wanted_by(data, [(int(record), int(pair)) for record, pair in epoch_order(data, 0, 0)])
    how, cut = dataclasses.replace(HOW, layout=layout), Cut(layout, 1, 6, 100, 0)

    def computed() -> tuple[dict, list[int]]:
        trees = list(reference.tree_logps(model, how, wanted, cut))
        values = {(i, r): row[0] for (_, i, some), _, rows in trees for r, row in zip(some, rows, strict=True)}
        return values, [len(tree.prompt) + sum(map(len, tree.responses)) for _, tree, _ in trees]

    expected, _ = computed()
    monkeypatch.setattr(reference, "STRETCH", 4)
    found, sizes = computed()
    assert found.keys() == expected.keys() and len(found) == n_responses(data) and len(sizes) > 8
    assert all(np.allclose(found[key], expected[key], rtol=1e-5, atol=1e-5) for key in found)
    if layout == "tree":
        assert all(max(sizes[i:]) == max(sizes[i : i + 4]) for i in range(0, len(sizes), 4))


# Rewards before the first update --------------------------------------------------------------------------------------

DPO = ("loss=dpo", "loss.beta=0.5", "sample_during_eval=false", "n_eval_examples=8")


def long_rope(folder: Path, original: int) -> str:
    """A Phi-3 that computes all rows of a micro-batch otherwise if the longest exceeds `original` tokens."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    rope["original_max_position_embeddings"] = sizes["original_max_position_embeddings"] = original
    config = Phi3Config(**sizes, rope_parameters=rope, bos_token_id=0, eos_token_id=0, pad_token_id=None)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.ndim > 1 else 1)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return f"model.name_or_path={folder}"


@pytest.mark.parametrize("layout", ["padded", "tree"])
@pytest.mark.parametrize(("original", "refused"), [(20, False), (36, True), (48, True), (60, True), (100, False)])
def test_a_model_whose_numbers_depend_on_the_micro_batch_is_refused(
    original: int, refused: bool, layout: str, overrides: Callable[..., list[str]], tmp_path: Path, monkeypatch: Any
) -> None:
    """Rows here have 35 to 62 tokens. Only the shortest and the longest example are looked at, and the limit of the
    models that are known to do this is left out."""
    monkeypatch.setattr(trainers, "check_fits", lambda *_: None)
    monkeypatch.setattr(trainers.Trainer, "cut", lambda trainer, n, size=None: Cut(layout, 1, n, None, 0))
    monkeypatch.setattr(trainers, "checked_computation", lambda *_, **__: Computation(torch.float32, layout))
    monkeypatch.setattr("dpo.scoring.ROUNDING", 0)
    given = overrides(
        *DPO, long_rope(tmp_path / "phi", original), f"cache_dir={tmp_path / 'cache'}", f"layout={layout}"
    )
    if refused:
        with pytest.raises(UserError, match="policy and reference differ before the first update by up to 0"):
            train_here(given)
    else:
        train_here(given)


def alter(cache: Path, which: int, by: float) -> None:
    """Add `by` to a token's log-probability of entry `which` of the store."""
    (path,) = (cache / "reference").rglob("*.safetensors")
    shard = load(path.read_bytes())
    shard.pop("checks", None)  # as in older files
    shard["logps"][int(shard["lengths"][:which].sum())] += np.float32(by)
    path.unlink()
    (path.parent / stored.shard_name(save(shard))).write_bytes(save(shard))


@pytest.mark.parametrize("first_eval", ["true", "false"])
def test_one_wrong_entry_of_the_store_stops_the_run(
    first_eval: str, overrides: Callable[..., list[str]], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    given = overrides(*DPO, f"cache_dir={cache}", f"do_first_eval={first_eval}")
    train_here([*given, f"local_run_dir={tmp_path / 'first'}"])
    found = []
    for which in range(0, 2 * (24 + 8), 9):  # of training and of evaluation
        alter(cache, which, 0.5)
        with pytest.raises(
            UserError, match=r"differ (before the first update|from those this model computes)"
        ) as error:
            train_here(given)
        found.append(str(error.value))
        alter(cache, which, -0.5)
    named = [message for message in found if ":0), so every reward would be off" in message]
    assert len(named) >= len(found) - 1 and all(f", remove {cache / 'reference'}" in message for message in named)
    train_here(given)


def test_what_is_checked_has_a_limit_and_is_said(
    overrides: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    given = overrides(*DPO, f"cache_dir={tmp_path / 'cache'}", "layout=tree", "batch_size=4")
    monkeypatch.setattr(agreement, "LEAST_CHECKED", 10)
    for seconds, n in ((60.0, 24), (0.0, 12)):
        monkeypatch.setattr(agreement, "SECONDS", seconds)
        train_here([*given, f"local_run_dir={tmp_path / str(n)}"])
        assert f"policy and reference agree on {n} of 24 training examples" in capsys.readouterr().out


def test_extremes_and_examples_that_are_new() -> None:
    data = make_data()
    batches = [[(0, 0), (1, 0)], [(1, 0), (0, 0)], [(2, 0)], [(3, 0), (2, 0)]]
    found = health.with_new_examples(batches)
    assert found[0] == batches[0] and sorted(found[1:]) == sorted([batches[2], batches[3]])

    def length(example: tuple[int, int]) -> int:
        record = data.records[example[0]]
        return len(record.prompt) + max(len(record.responses[r]) for r in record.pairs[example[1]])

    everything = [(record, pair) for record in range(len(data.records)) for pair in range(data.n_examples[record])]
    alone, beside = health.extremes(data, [everything], "tree", None)
    assert length(alone[0]) == min(map(length, everything)) and beside[0] == alone[0]
    assert length(beside[1]) == max(map(length, everything))
    assert health.extremes(data, [everything], "tree", 1) == [alone]


def test_weights_that_are_not_finite_are_an_error_of_the_input(
    overrides: Callable[..., list[str]], tmp_path: Path, tiny_model_dir: Path
) -> None:
    model = make_model()
    model.model.norm.weight.data[3] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    make_tokenizer().save_pretrained(tmp_path / "nan")
    for given in ("loss=sft", "loss=dpo loss.beta=0.1", "loss=dpo loss.beta=0.1 reference.mode=live"):
        with pytest.raises(UserError, match=r"nan: weights that are not finite: model\.norm\.weight \(of "):
            train_here(overrides(*given.split(), f"model.archive={tmp_path / 'nan'}"))


@pytest.mark.parametrize("mode", ["stored", "live"])
def test_a_model_that_overflows_is_an_error_of_the_input(
    mode: str, overrides: Callable[..., list[str]], tmp_path: Path
) -> None:
    model = make_model()
    model.model.layers[0].mlp.down_proj.weight.data.mul_(1e9)
    model.save_pretrained(tmp_path / "large")
    make_tokenizer().save_pretrained(tmp_path / "large")
    given = overrides("loss=dpo", "loss.beta=0.1", f"model.name_or_path={tmp_path / 'large'}", "layout=padded")
    with pytest.raises(UserError, match=r"log-probabilities .*are not finite.*float16"):
        train_here([*given, "mixed_precision=float16", f"reference.mode={mode}"])
