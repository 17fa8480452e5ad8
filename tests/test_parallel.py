"""Trainers of several processes, held to one process: gloo workers on the CPU, tiny models, real files."""

import itertools
from pathlib import Path

import pytest
import torch
from conftest import make_model, make_tokenizer, read_jsonl, tiny_overrides, train_here, write_pairs
from safetensors.torch import load_file

import parallel

LOSSES = {"sft": "loss=sft", "dpo": "loss=dpo loss.beta=0.5"}
# Batches that divide by the ranks, and that do not; the last of "b5" has 4 examples.
BATCHES = {
    "b8": "batch_size=8 n_examples=40",
    "b5 checkpointed": "batch_size=5 n_examples=24 activation_checkpointing=true",
    "b12 accumulated": "batch_size=12 n_examples=60 gradient_accumulation_steps=4",
    "b8 both": "batch_size=8 n_examples=40 gradient_accumulation_steps=4 activation_checkpointing=true",
}
# World size, trainer, model architectures.
GROUPS: dict[str, tuple[int, str, tuple[str, ...]]] = {
    "FSDP 2": (2, "trainer=FSDPTrainer", ("llama", "gpt_neox", "gpt2")),
    "FSDP 4": (4, "trainer=FSDPTrainer", ("llama", "gpt_neox", "gpt2")),
    "HSDP 2x2": (4, "trainer=FSDPTrainer fsdp_replicate_size=2", ("llama",)),
    "TP 2": (2, "trainer=TensorParallelTrainer", ("llama", "gpt_neox", "qwen3", "olmo2", "mistral", "qwen2")),
    "FSDP 2 x TP 2": (4, "trainer=TensorParallelTrainer tensor_parallel_size=2", ("llama", "gpt_neox", "qwen3")),
}
COMMON = "n_epochs=null optimizer=SGD +optimizer_kwargs.momentum=0.9 lr=0.1 max_grad_norm=1 n_eval_examples=0"


def runs(models: tuple[str, ...]) -> list[tuple[str, str, str]]:
    return list(itertools.product(models, LOSSES, BATCHES))


def name_of(group: str, *run: str) -> str:
    return "-".join((group, *run)).replace(" ", "_")


def worker(cases: list[list[str]]) -> None:
    """Train every case, one after the other, in one group of processes."""
    import torch

    torch.set_num_threads(1)
    with parallel.group(torch.device("cpu")):
        for case in cases:
            train_here(case, in_group=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of every group and of one process, in folders by name."""
    folder = tmp_path_factory.mktemp("parallel")
    write_pairs(folder / "pairs")
    for kind in {kind for _, _, kinds in GROUPS.values() for kind in kinds}:
        make_model(kind).save_pretrained(folder / kind)
    make_tokenizer().save_pretrained(folder / "tokenizer")
    return folder


def case(folder: Path, group: str, kind: str, loss: str, batch: str, trainer: str) -> list[str]:
    tokenizer = f"model.tokenizer_name_or_path={folder / 'tokenizer'}"
    given = f"{LOSSES[loss]} {BATCHES[batch]} {COMMON} {trainer} {tokenizer}".split()
    run_dir = folder / name_of(group, kind, loss, batch)
    return tiny_overrides(folder / kind, folder / "pairs", folder / "cache", run_dir, *given)


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    kinds = {kind for _, _, kinds in GROUPS.values() for kind in kinds}
    for run in runs(tuple(kinds)):
        train_here(case(folder, "one", *run, "trainer=BasicTrainer"))
    for n in (2, 4):
        cases = [
            case(folder, group, *run, trainer)
            for group, (size, trainer, kinds) in GROUPS.items()
            if size == n
            for run in runs(kinds)
        ]
        parallel.launch(worker, (cases,), n, None)
    return folder


def assert_same_run(found: Path, wanted: Path) -> None:
    """Loss, rewards, gradient norm to a relative 1e-5, final weights to 1e-5.

    A reward is a difference of log-probabilities of some 60 nats, whose float32 rounding it keeps: that is its scale.
    """
    for one, other in zip(read_jsonl(wanted / "metrics.jsonl"), read_jsonl(found / "metrics.jsonl"), strict=True):
        assert one.keys() == other.keys()
        scale = max(abs(one[name]) for name in one if name.startswith("logps_train"))
        for name in one.keys() - {"time", "examples_per_second"}:
            rounding = 1e-6 * scale if name.startswith(("rewards", "logratios")) else 0.0
            assert other[name] == pytest.approx(one[name], rel=1e-5, abs=rounding), (name, one["counters/updates"])
    final, expected = ((run / "LATEST").resolve() / "model.safetensors" for run in (found, wanted))
    there = load_file(expected)
    for name, tensor in load_file(final).items():
        torch.testing.assert_close(tensor, there[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("group", GROUPS)
def test_five_steps_equal_those_of_one_process(group: str, trained: Path) -> None:
    for run in runs(GROUPS[group][2]):
        assert_same_run(trained / name_of(group, *run), trained / name_of("one", *run))
