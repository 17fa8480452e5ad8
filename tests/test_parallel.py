"""Trainers of several processes, held to one process: gloo workers on the CPU, tiny models, real files."""

import functools
import itertools
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from conftest import (
    COSTS,
    EVERYTHING,
    ROOT,
    compose,
    first_fast,
    make_model,
    make_tokenizer,
    read_jsonl,
    tiny_overrides,
    train_here,
    train_in_group,
    write_pairs,
)
from omegaconf import OmegaConf
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dpo import parallel
from dpo.parallel import processes
from dpo.parallel.arrange import sharding_of
from dpo.run import tensors
from dpo.run.folder import locked
from dpo.run.resume import find_checkpoint
from dpo.utils import UserError
from settings import load_config

LOSSES = {"sft": "loss=sft", "dpo": "loss=dpo loss.beta=0.5"}
# Batches that divide by the ranks, and that do not; the last of "b5" has 4 examples.
BATCHES = {
    "b8": "batch_size=8 n_examples=40",
    "b5 checkpointed": "batch_size=5 n_examples=24 activation_checkpointing=true",
    "b12 accumulated": "batch_size=12 n_examples=60 gradient_accumulation_steps=4",
    "b8 both": "batch_size=8 n_examples=40 gradient_accumulation_steps=4 activation_checkpointing=true",
}
ALL = tuple(itertools.product(LOSSES, BATCHES))
# Processes are slow on two cores: both losses and every kind of batch for each group, not all of their products.
MOST = (("sft", "b12 accumulated"), ("dpo", "b5 checkpointed"), ("dpo", "b8"), ("dpo", "b8 both"))
SOME = (("sft", "b8 both"), ("dpo", "b5 checkpointed"))
HARDEST = (("dpo", "b8 both"),)
FSDP, TENSOR = "trainer=FSDPTrainer", "trainer=TensorParallelTrainer"
# World size, trainer, and for each model architecture its runs.
GROUPS: dict[str, tuple[int, str, dict[str, tuple[tuple[str, str], ...]]]] = {
    "FSDP 2": (2, FSDP, {"llama": SOME}),
    "TP 2": (2, TENSOR, {"llama": HARDEST}),
    "FSDP 2 other models": (2, FSDP, {"llama": MOST, "gpt_neox": SOME, "gpt2": SOME}),
    "FSDP 2 reduced once": (2, f"{FSDP} fsdp_reduce_once=true", {"llama": HARDEST}),
    "HSDP 2x2 reduced once": (4, f"{FSDP} fsdp_replicate_size=2 fsdp_reduce_once=true", {"llama": HARDEST}),
    "FSDP 4": (4, FSDP, {"llama": SOME, "gpt_neox": HARDEST, "gpt2": HARDEST}),
    "HSDP 2x2": (4, f"{FSDP} fsdp_replicate_size=2 fsdp_reshard_after_forward=false", {"llama": HARDEST}),
    "TP 2 other models": (2, TENSOR, {"llama": SOME, "gpt_neox": SOME, "qwen3": HARDEST, "olmo2": HARDEST}),
    "FSDP 2 x TP 2": (4, f"{TENSOR} tensor_parallel_size=2", {"llama": SOME[1:], "gpt_neox": SOME[:1]}),  # slow
}
if EVERYTHING:
    GROUPS["TP 2 other models"][2].update(qwen2=ALL, mistral=ALL)
    GROUPS["FSDP 2 x TP 2"][2].update(qwen3=ALL)
    for _, _, kinds in GROUPS.values():
        kinds.update(dict.fromkeys(kinds, ALL))
COMMON = "n_epochs=null optimizer=SGD +optimizer_kwargs.momentum=0.9 lr=0.1 max_grad_norm=1 n_eval_examples=0 "
# Where policy and reference still agree, a live one does so to the last digit, whatever the number of processes.
COMMON += "reference.mode=live"


def runs(group: str) -> list[tuple[str, str, str]]:
    return [(kind, *run) for kind, some in GROUPS[group][2].items() for run in some]


def name_of(group: str, *run: str) -> str:
    return "-".join((group, *run)).replace(" ", "_")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs, a tokenizer, and a model of every architecture."""
    folder = tmp_path_factory.mktemp("parallel")
    write_pairs(folder / "pairs")
    for kind in {kind for _, _, kinds in GROUPS.values() for kind in kinds}:
        make_model(kind).save_pretrained(folder / kind)
    make_tokenizer().save_pretrained(folder / "tokenizer")
    return folder


def overrides_of(folder: Path, name: str, kind: str, *given: str) -> list[str]:
    tokenizer = f"model.tokenizer_name_or_path={folder / 'tokenizer'}"
    words = " ".join(given).split()
    return tiny_overrides(folder / kind, folder / "pairs", folder / "cache", folder / name, tokenizer, *words)


def launch(cases: list[list[str]], n: int) -> None:
    """Train every case in one group of `n` processes.

    torch's collectives on CPUs crash now and then (seen: a segmentation fault in the all-gather of DTensor, once in
    some hundred groups); a group that a library ended in this way is started once more.
    """
    resolved: list[Any] = [OmegaConf.to_container(compose(case), resolve=True) for case in cases]
    try:
        parallel.launch(train_in_group, (resolved,), n, None)
    except UserError as error:
        if not re.search("killed by (SIGSEGV|SIGABRT)", str(error)):
            raise
        for case in resolved:
            shutil.rmtree(case["local_run_dir"], ignore_errors=True)
        parallel.launch(train_in_group, (resolved,), n, None)


def case(folder: Path, group: str, kind: str, loss: str, batch: str) -> list[str]:
    trainer = GROUPS[group][1] if group in GROUPS else "trainer=BasicTrainer"
    name = name_of(group, kind, loss, batch)
    return overrides_of(folder, name, kind, LOSSES[loss], BATCHES[batch], COMMON, trainer)


@pytest.fixture(scope="module")
def trained(folder: Path, request: pytest.FixtureRequest) -> Path:
    """The runs of every group that a selected test needs, by one process and by the group. One launch a world size."""
    tests = [item for item in request.session.items if isinstance(item, pytest.Function) and hasattr(item, "callspec")]
    groups = {test.callspec.params["group"] for test in tests if "group" in test.callspec.params}
    for run in sorted({run for group in groups for run in runs(group)}):
        train_here(case(folder, "one", *run))
    for n in {GROUPS[group][0] for group in groups}:
        same_size = sorted(group for group in groups if GROUPS[group][0] == n)
        launch([case(folder, group, *run) for group in same_size for run in runs(group)], n)
    return folder


def assert_same_events(found: list[dict], wanted: list[dict]) -> None:
    """Every number to a relative 1e-5.

    A reward or KL is a difference of log-probabilities of some 60 nats, whose float32 rounding it keeps: that is its
    scale.
    """
    for one, other in zip(wanted, found, strict=True):
        assert one.keys() == other.keys()
        scale = max(abs(one[name]) for name in one if name.startswith("logps"))
        for name in one.keys() - COSTS:
            rounding = 1e-6 * scale if name.startswith(("rewards", "logratios", "kl_eval")) else 0.0
            assert other[name] == pytest.approx(one[name], rel=1e-5, abs=rounding), (name, one)


def assert_same_run(found: Path, wanted: Path) -> None:
    """The same events, and final weights to 1e-5."""
    assert_same_events(read_jsonl(found / "metrics.jsonl"), read_jsonl(wanted / "metrics.jsonl"))
    final, expected = ((run / "LATEST").resolve() / "model.safetensors" for run in (found, wanted))
    there = load_file(expected)
    for name, tensor in load_file(final).items():
        torch.testing.assert_close(tensor, there[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("group", first_fast(GROUPS, n=2))
def test_five_steps_equal_those_of_one_process(group: str, trained: Path) -> None:
    for run in runs(group):
        assert_same_run(trained / name_of(group, *run), trained / name_of("one", *run))


EVALUATED = "n_eval_examples=7 eval_batch_size=3 n_eval_model_samples=5 loss=dpo loss.beta=0.5 lr=0.1 optimizer=SGD "
EVALUATED += "reference.mode=live"
# GPT-2 here has no more positions than max_length, and processes finish sampling at different lengths.
EVALUATIONS = {"gpt2": f"{FSDP} fsdp_reshard_after_forward=false", "qwen3": TENSOR}


@pytest.mark.full
def test_evaluation_and_samples_are_those_of_one_process(folder: Path) -> None:
    def given(name: str, kind: str, trainer: str) -> list[str]:
        return overrides_of(folder, name + kind, kind, EVALUATED, "batch_size=8", trainer)

    for kind in EVALUATIONS:
        train_here(given("evaluated", kind, "trainer=BasicTrainer"))
    launch([given("evaluated2", kind, trainer) for kind, trainer in EVALUATIONS.items()], 2)
    for kind in EVALUATIONS:
        one, two = (folder / (name + kind) for name in ("evaluated", "evaluated2"))
        assert_same_run(two, one)
        assert read_jsonl(one / "samples.jsonl") == read_jsonl(two / "samples.jsonl")


@pytest.mark.full
@pytest.mark.parametrize("key", ["mixed_precision", "model.policy_dtype"])
def test_bfloat16_is_that_of_one_process_within_its_rounding(key: str, folder: Path) -> None:
    def run(name: str) -> list[str]:
        trainer = {"one": "trainer=BasicTrainer", "fsdp": FSDP, "tensor": TENSOR}[name]
        given = f"{key}=bfloat16 loss=dpo loss.beta=0.5 batch_size=8 n_eval_examples=0 lr=1e-2 optimizer=SGD"
        return overrides_of(folder, key + name, "llama", given, trainer)

    train_here(run("one"))
    launch([run("fsdp"), run("tensor")], 2)
    wanted, *found = ([e["loss/train"] for e in read_jsonl(folder / (key + n) / "metrics.jsonl")] for n in NAMES)
    for losses in found:
        assert losses == pytest.approx(wanted, rel=3e-2)


NAMES = ("one", "fsdp", "tensor")


@pytest.mark.full
@pytest.mark.parametrize(("first", "then"), [(4, 2), (4, 1), (1, 4)])
def test_a_run_goes_on_with_another_number_of_processes(first: int, then: int, folder: Path) -> None:
    def run(name: str, n: int, *given: str) -> list[dict]:
        more = "loss=dpo loss.beta=0.5 batch_size=5 optimizer=AdamW lr=1e-3 n_eval_examples=0 n_epochs=2 eval_every=10"
        trainer = "trainer=BasicTrainer" if n == 1 else FSDP
        overrides = overrides_of(folder, name, "gpt_neox", more, trainer, *given)
        if not (folder / name).exists():
            train_here(overrides) if n == 1 else launch([overrides], n)
        return read_jsonl(folder / name / "metrics.jsonl")

    whole = run(f"whole_{first}", first)
    with pytest.raises(UserError, match=r"was trained with other settings: model\.archive="):
        run(
            f"another_{first}_{then}",
            1,
            f"resume={folder}/whole_{first}/step-20",
            f"model.archive={folder}/whole_{first}",
        )
    rest = run(f"rest_{first}_{then}", then, f"resume={folder}/whole_{first}/step-20")
    expected = [event for event in whole if event["counters/examples"] > 20]
    assert len(rest) == 6
    assert_same_events(rest, expected)


@pytest.mark.full
def test_every_trainer_writes_the_bytes_of_save_pretrained(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "gpt_neox")
    model.save_pretrained(folder / "expected", max_shard_size="20KB")
    given = "lr=0 n_examples=4 n_epochs=null n_eval_examples=0 optimizer=SGD"
    monkeypatch.setattr(tensors, "MAX_FILE_SIZE", "20KB")
    train_here(overrides_of(folder, "bytes1", "gpt_neox", given, "trainer=BasicTrainer"))
    monkeypatch.setattr(processes, "_start", _start_with_small_files)
    launch([overrides_of(folder, "bytes2", "gpt_neox", given, FSDP)], 2)
    launch([overrides_of(folder, "bytes4", "gpt_neox", given, f"{TENSOR} tensor_parallel_size=2")], 4)
    files = sorted(path.name for path in (folder / "expected").glob("model*"))
    assert len(files) > 3
    for name in ("bytes1", "bytes2", "bytes4"):
        assert sorted(path.name for path in (folder / name / "LATEST").glob("model*")) == files
        for file in (*files, "config.json"):
            assert (folder / name / "LATEST" / file).read_bytes() == (folder / "expected" / file).read_bytes(), file


def test_ranks_write_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """To gather a file takes all ranks. So a rank that has a file to write has first helped to gather the others'."""
    model, gathered = make_model(), []
    monkeypatch.setattr(tensors, "MAX_FILE_SIZE", "20KB")
    monkeypatch.setattr(tensors.parallel, "full", lambda tensor: gathered.append(tensor) or tensor, raising=False)
    state, seen = model.state_dict(), []
    for rank in range(3):
        gathered.clear()
        counts = [(file, len(gathered)) for file, _ in tensors._split(model, state, rank, 3) if "index" not in file]
        assert len(gathered) == len(state)
        seen.append(counts)
    assert sum(map(len, seen)) > 3 and len({count for _, count in seen[0]}) == len(seen[0])
    for others in seen[1:]:  # the files of a round are written after the same gathers
        assert [count for _, count in others] == [count for _, count in seen[0]][: len(others)]


def _start_with_small_files(*arguments: Any) -> None:
    tensors.MAX_FILE_SIZE = "20KB"
    START(*arguments)


START = processes._start


def wait_for(condition: Callable[[], Any], seconds: float = 120) -> Any:
    end = time.time() + seconds
    while time.time() < end:
        if value := condition():
            return value
        time.sleep(0.1)
    raise AssertionError("timed out")


@pytest.mark.full
def test_a_killed_worker_ends_the_job(folder: Path) -> None:
    run_dir = folder / "killed"
    given = "n_epochs=100000 eval_every=24 n_eval_examples=0 nproc=2 lr=1e-3"
    command = [sys.executable, str(ROOT / "train.py"), *overrides_of(folder, "killed", "llama", given, FSDP)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: (run_dir / "LATEST").exists())
    workers = [p for p in psutil.Process(process.pid).children() if "spawn_main" in " ".join(p.cmdline())]
    assert len(workers) == 2
    everything = psutil.Process(process.pid).children(recursive=True)
    start = time.time()
    workers[1].kill()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1 and time.time() - start < 30
    assert "killed by SIGKILL" in stderr and "Traceback" not in stderr, stderr
    wait_for(lambda: not any(p.is_running() and p.status() != "zombie" for p in everything), 10)
    AutoModelForCausalLM.from_pretrained(run_dir / "LATEST")
    assert find_checkpoint(str(run_dir)).is_dir()


def still_alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [p for p in processes if p.is_running() and p.status() != "zombie"]


def kill_data_worker(workers: list[psutil.Process]) -> None:
    wait_for(lambda: [p for worker in workers for p in worker.children()])[0].kill()


def kill_one_that_tokenises(workers: list[psutil.Process]) -> None:
    wait_for(lambda: [worker for worker in workers if worker.children()])[0].kill()


FAILURES = [
    pytest.param("bad row", None, ("train.jsonl:40001: invalid JSON", "Mend the row"), id="bad row"),
    pytest.param("full disk", None, ("cannot be written", "File too large"), id="full disk"),
    pytest.param("", kill_data_worker, ("a data worker was killed",), id="data worker killed"),
    pytest.param("", kill_one_that_tokenises, ("killed by SIGKILL",), id="process killed"),
]


@pytest.mark.full
@pytest.mark.parametrize(("data", "kill", "messages"), FAILURES)
def test_a_failure_while_data_is_read_ends_the_job(
    data: str, kill: Callable | None, messages: tuple[str, ...], folder: Path
) -> None:
    pairs = folder / "many_pairs"
    if not pairs.exists():
        write_pairs(pairs, n_train=40_000)
        write_pairs(folder / "bad_pairs", n_train=40_000)
        with open(folder / "bad_pairs" / "train.jsonl", "a") as file:
            file.write("{broken\n")
    cache = f"cache_dir={folder / 'cache of failures'}"
    given = [f"datasets=[{folder / 'bad_pairs' if data == 'bad row' else pairs}]", cache, "num_proc=2", "nproc=2"]
    command = [sys.executable, str(ROOT / "train.py"), *overrides_of(folder, "early", "llama", FSDP), *given]
    full = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (10**6, 10**6))
    pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, **pipes, preexec_fn=full if data == "full disk" else None)
    try:
        workers = wait_for(lambda: [p for p in psutil.Process(process.pid).children() if p.children()], 60)
        everything = psutil.Process(process.pid).children(recursive=True)
        if kill is not None:
            kill(workers)
        _, stderr = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 1 and "Traceback" not in stderr, stderr
    assert stderr.count("error:") == 1 and all(message in stderr for message in messages), stderr
    wait_for(lambda: not still_alive(everything), 10)


@pytest.mark.full
def test_workers_go_with_a_parent_that_is_killed_while_they_import(folder: Path) -> None:
    command = [sys.executable, str(ROOT / "train.py"), *overrides_of(folder, "orphans", "llama", FSDP, "nproc=2")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: sum("spawn_main" in str(p.cmdline()) for p in psutil.Process(process.pid).children()) == 2)
        everything = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.kill()
        process.wait()
    wait_for(lambda: not still_alive(everything), 30)
    assert not (folder / "orphans" / "metrics.jsonl").exists()


def fill_caches(folder: Path, lives: bool) -> None:
    """Two processes of one machine, of which the first fills a cache for longer than it may be silent."""
    silent = not lives and os.environ["RANK"] == "0"
    processes.HEARTBEAT, processes.DEAD_AFTER = 100.0 if silent else 0.1, 1.0
    with parallel.group(torch.device("cpu")):
        for turn in range(2):
            with parallel.one_per_machine_first():
                if parallel.rank() == 0:
                    time.sleep(2)
                    (folder / str(turn)).touch()
                assert (folder / str(turn)).exists()


@pytest.mark.full
def test_a_cache_that_takes_long_is_waited_for_while_its_maker_lives(tmp_path: Path) -> None:
    parallel.launch(fill_caches, (tmp_path, True), 2, None)
    (tmp_path / "0").unlink()
    with pytest.raises(Exception, match=r"process 0 prepares the data, and gave no sign of life for 1 s"):
        parallel.launch(fill_caches, (tmp_path, False), 2, None)


def test_processes_that_do_not_come_are_not_waited_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    monkeypatch.setattr(os, "environ", {**os.environ, **environment})
    monkeypatch.setattr(processes, "JOIN_TIMEOUT", timedelta(seconds=1))
    with pytest.raises(UserError, match="did not find each other within 0:00:01"):
        processes._join("gloo")


@pytest.mark.full
def test_two_machines_under_torchrun(folder: Path) -> None:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    given = "n_examples=8 n_epochs=null n_eval_examples=4 n_eval_model_samples=2 loss=dpo loss.beta=0.1"
    agents = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", f"--node-rank={node}",
             "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "--rdzv-id=test", "--local-addr=localhost",
             str(ROOT / "train.py"), *overrides_of(folder, "torchrun", "llama", given, FSDP)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for node in range(2)
    ]  # fmt: skip
    shown = [agent.communicate(timeout=240)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], shown
    assert "2 processes: 2 shards" in "".join(shown)
    assert len(read_jsonl(folder / "torchrun" / "metrics.jsonl")) == 4
    AutoModelForCausalLM.from_pretrained(folder / "torchrun" / "LATEST")


BAD_GROUPS = [
    ("trainer=TensorParallelTrainer nproc=3", "does not divide num_attention_heads=4"),
    ("trainer=FSDPTrainer nproc=2 model.block_name=GPT2Block", "LlamaDecoderLayer"),
    ("trainer=TensorParallelTrainer nproc=2 model.name_or_path={gpt2}", "transformers has no plan for it"),
    ("trainer=FSDPTrainer nproc=2 resume={pairs}", "so training cannot go on from it"),
]


@pytest.mark.full
@pytest.mark.parametrize(("given", "message"), BAD_GROUPS)
def test_bad_groups_give_one_clear_message(given: str, message: str, folder: Path) -> None:
    for name in ("gpt2", "pairs"):
        given = given.replace("{" + name + "}", str(folder / name))
    overrides = overrides_of(folder, "bad", "llama", given)
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *overrides], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert done.stderr.count("error:") == 1 and message in done.stderr and "Traceback" not in done.stderr, done.stderr


@pytest.mark.full
def test_a_folder_in_use_is_left_as_it_is(folder: Path) -> None:
    (folder / "taken" / ".step-8-1").mkdir(parents=True)
    (folder / "taken" / "metrics.jsonl").touch()
    overrides = overrides_of(folder, "taken", "llama", FSDP, "nproc=2")
    with locked(folder / "taken"):
        command = [sys.executable, str(ROOT / "train.py"), *overrides]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and f"is in use by process {os.getpid()}" in done.stderr, done.stderr
    assert sorted(path.name for path in (folder / "taken").iterdir()) == [".step-8-1", "metrics.jsonl"]


def test_processes_that_cannot_be_arranged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    config = load_config(["exp_name=x", FSDP, "fsdp_replicate_size=3"])
    with pytest.raises(UserError, match=r"2 / \(3 x 1\) = 0.67"):
        sharding_of(config)


@pytest.mark.parametrize(("nodes", "first"), [("gpu[003-004,007]", "gpu003"), ("a1,b2", "a1"), ("solo", "solo")])
def test_srun_tells_what_torchrun_would(nodes: str, first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {
        "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "70123",
        "SLURM_STEP_NODELIST": nodes,
    })  # fmt: skip
    assert parallel.joined() and parallel.rank() == 3 and parallel.local_rank() == 1
    assert parallel.world_size() == 4 and "RANK" not in os.environ
    variables = processes._variables()
    assert (variables["MASTER_ADDR"], variables["MASTER_PORT"]) == (first, "20123")
