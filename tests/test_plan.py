"""scripts/plan.py: memory, waits and traffic of a run that is not made."""

import itertools
import json
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, first_fast, train_here
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, GPTJConfig, GPTNeoXConfig, LlamaConfig, MistralConfig

import plan
import trainers
from dpo import parallel
from dpo.data.records import PreferenceData
from dpo.hardware import DEVICES
from dpo.model import adapters
from dpo.model.loading import load_tokenizer, make_ready
from dpo.plan import planning
from dpo.plan.planning import Planner
from dpo.run.config import Config
from dpo.utils import UserError
from preference_datasets import load_data
from settings import data_settings, load_config

CPU = torch.device("cpu")
RUN = ["loss=dpo", "loss.beta=0.1", "batch_size=8", "device=cpu"]
EIGHT_B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8}


@pytest.fixture
def shape(tmp_path: Path) -> str:
    """A model folder with a configuration, and nothing else."""
    config = LlamaConfig(**SIZES, num_key_value_heads=2, vocab_size=8000, architectures=["LlamaForCausalLM"])
    config.save_pretrained(tmp_path / "shape")
    return f"model.name_or_path={tmp_path / 'shape'}"


def loaded(given: list[str]) -> tuple[Config, PreferenceData]:
    config = load_config(given)
    return config, load_data(data_settings(config), load_tokenizer(config), "train")


def allocations(events: Any) -> Iterator[tuple[int, int]]:
    """Yield time and size (negative if freed) of each call of the CPU's allocator, from a profile's tree of events."""
    for event in events:
        fields = event.extra_fields
        if type(fields).__name__ == "_ExtraFields_Allocation" and fields.device.type == "cpu":
            yield event.start_time_ns, fields.alloc_size
        yield from allocations(event.children)


def really_peaks(config: Config, data: PreferenceData) -> int:
    """Return the most bytes that two updates of a real model hold, as torch's allocator reports them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        model = AutoModelForCausalLM.from_config(planning.meta_model(config).config, dtype=torch.float32)
        if config.adapter.peft_type:
            adapters.put_on(model, adapters.peft_config(config.adapter), "x", 0)
        make_ready(model, config, True, compiled=False)
        other = None
        if config.reference.mode == "live":
            other = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32).requires_grad_(False)
            make_ready(other, config, False, compiled=False)
        trainer = trainers.Updates(config, data)
        trainer.scorer = planning.scorer_of(config, model, other, CPU)
        trainer.use(model)
        batch = next(trainer.plan.batches(data))
        for _ in range(2):
            trainer.train_step(batch)
    calls = sorted(allocations(seen.profiler.kineto_results.experimental_event_tree()))
    return max(itertools.accumulate(size for _, size in calls))


@pytest.mark.parametrize("given", first_fast([
    ["optimizer=RMSprop", "microbatch_tokens=256"],
    ["optimizer=AdamW"],
    ["optimizer=SGD", "+optimizer_kwargs.momentum=0.9", "activation_checkpointing=true"],
    ["optimizer=AdamW", "adapter=lora", "microbatch_tokens=256"],
    ["optimizer=RMSprop", "activation_checkpointing=true", "layout=padded"],
    ["optimizer=AdamW", "reference.mode=live", "mixed_precision=bfloat16"],
]))  # fmt: skip
def test_its_memory_is_what_the_allocator_sees(
    given: list[str], overrides: Callable[..., list[str]], shape: str, tiny_model_dir: Path
) -> None:
    tokenizer = f"model.tokenizer_name_or_path={tiny_model_dir}"
    config, data = loaded(overrides(*RUN, *given, "batch_size=24", "max_length=128", shape, tokenizer))
    planned = Planner(data, CPU, DEVICES["H100"], trainers.Updates)(config)
    assert planned.peak == pytest.approx(really_peaks(config, data), rel=0.01)


@pytest.mark.parametrize(("given", "start"), [
    ([], "| float32,"),
    (["model.policy_dtype=bfloat16"], "| `model.policy_dtype=bfloat16` |"),
])  # fmt: skip
def test_the_docs_have_its_bytes_a_parameter(
    given: list[str], start: str, overrides: Callable[..., list[str]], shape: str, tiny_model_dir: Path
) -> None:
    tokenizer = f"model.tokenizer_name_or_path={tiny_model_dir}"
    config, data = loaded(overrides(*RUN, *given, shape, tokenizer))
    found = Planner(data, CPU, DEVICES["H100"], trainers.Updates)(config)
    kinds = found.memory["backward"] | {"gradients": found.memory["clip"]["gradients"]}
    each = [round(kinds[kind] / found.parameters, 1) for kind in ("weights", "gradients", "optimizer state")]
    [row] = [line for line in (ROOT / "docs" / "gpus.md").read_text().splitlines() if line.startswith(start)]
    cells = [float(cell) for cell in re.findall(r"\| \(?(\d+)\)? (?=\|)", row)]
    assert [*cells[:3], cells[-1]] == [*each, sum(each)]


# On a GPU that is not there: in processes of their own, since torch keeps such a device.

PLANTED = """
import sys
sys.path[:0] = ["scripts"]
import plan
from dpo import scoring
place = scoring.place

def misplaced(*arguments):
    laid = place(*arguments)
    laid.others["reference"] = laid.others["reference"].cpu()
    return laid

scoring.place = misplaced
plan.main()
"""


def run(*arguments: str, code: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *(["-c", code] if code else ["scripts/plan.py"]), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


@pytest.fixture
def planned(
    overrides: Callable[..., list[str]], shape: str, tiny_model_dir: Path
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Plan a tiny run with further arguments."""

    def call(*given: str, code: str = "", model: str = shape) -> subprocess.CompletedProcess[str]:
        tokenizer = f"model.tokenizer_name_or_path={tiny_model_dir}"
        tiny = overrides("loss=dpo", "loss.beta=0.1", "batch_size=24", "max_length=128", model, tokenizer)
        dropped = ("device=", "loss") if "loss=sft" in given else ("device=",)
        return run(*[key for key in tiny if not key.startswith(dropped)], *given, code=code)

    return call


def read(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert not done.returncode, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("given", first_fast([
    ["microbatch_tokens=256", "mixed_precision=bfloat16"],
    ["microbatch_tokens=256", "loss=aot", "adapter=lora", "optimizer=AdamW8bit"],
    ["microbatch_tokens=256", "reference.mode=live", "loss=tdpo", "activation_checkpointing=true"],
    ["microbatch_tokens=256", "loss=sft"],
]))  # fmt: skip
def test_the_host_waits_once_an_update(given: list[str], planned: Callable[..., Any]) -> None:
    found = read(planned("--json", "--no-advice", *given))
    assert found["passes"] > 1
    assert sum(found["waits"].values()) == (2 if "loss=aot" in given else 1), found["waits"]  # aot: statistics, too
    assert found["kernels"] and found["tflop"] and found["hours"] > 0


def test_collectives_of_an_update(planned: Callable[..., Any]) -> None:
    blocks, given = SIZES["num_hidden_layers"], ["--json", "--no-advice", "--processes", "4", "trainer=FSDPTrainer"]
    given += ["microbatch_tokens=128", "mixed_precision=bfloat16"]
    each = read(planned(*given))
    passes, calls = each["passes"], each["collectives"]
    assert passes > 1 and each["processes"] == 4 and sum(each["waits"].values()) == 1
    assert calls["_allgather_base_"] <= (2 * blocks + 2) * passes
    assert calls["_reduce_scatter_base_"] == (blocks + 2) * passes  # blocks, embeddings, and the rest
    once = read(planned(*given, "fsdp_reduce_once=true"))
    assert once["collectives"]["_reduce_scatter_base_"] == blocks + 2
    assert once["collectives"]["_allgather_base_"] < calls["_allgather_base_"]
    assert once["peak"] > each["peak"]


@pytest.mark.full
def test_a_tensor_on_another_device_is_found(planned: Callable[..., Any]) -> None:
    done = planned("--no-advice", code=PLANTED)
    assert done.returncode and "FakeTensorDeviceMismatchError" in done.stderr


@pytest.mark.full
def test_what_it_prints(planned: Callable[..., Any]) -> None:
    done = planned("--gpu", "A100", "microbatch_tokens=128")
    assert not done.returncode, done.stderr
    for line in (
        "on 1 x A100",
        "that may be used: fits",
        "estimate, not measured",
        "advice: the largest microbatch_tokens",
    ):
        assert line in done.stdout, done.stdout


@pytest.mark.full
@pytest.mark.parametrize("processes", [8, 64])
def test_llama_3_8b(processes: int, planned: Callable[..., Any], tmp_path: Path) -> None:
    LlamaConfig(
        **EIGHT_B, num_key_value_heads=8, vocab_size=128256, architectures=["LlamaForCausalLM"]
    ).save_pretrained(tmp_path / "8b")
    given = ["trainer=FSDPTrainer", "mixed_precision=bfloat16", "activation_checkpointing=true", "--processes"]
    model, began = f"model.name_or_path={tmp_path / '8b'}", resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    found = read(planned("--json", "--no-advice", *given, str(processes), model=model))
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - began < 60  # seconds of one core
    assert found["parameters"] == 8_030_261_248
    states = sum(found["memory"]["optimizer"].get(kind, 0) for kind in ("weights", "gradients", "optimizer state"))
    assert states == pytest.approx(12 * found["parameters"] / processes, rel=0.01)


# The published shapes: hidden size, size of the MLP, layers, heads, heads of keys, vocabulary.
SHAPES: dict[str, Any] = {
    "hh_dpo": GPTNeoXConfig(hidden_size=2560, intermediate_size=10240, num_hidden_layers=32, num_attention_heads=32),
    "tldr_dpo": GPTJConfig(),
    "zephyr_dpo": MistralConfig(sliding_window=None),
    "tulu3_dpo": LlamaConfig(**EIGHT_B, num_key_value_heads=8, vocab_size=128264),
    "simpo_llama3": LlamaConfig(**EIGHT_B, num_key_value_heads=8, vocab_size=128256),
}


@pytest.mark.full
@pytest.mark.parametrize("recipe", SHAPES)
def test_a_recipe_fits_on_its_gpus(recipe: str, pairs_dir: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    SHAPES[recipe].save_pretrained(tmp_path / "shape")
    given = [f"+experiment={recipe}", f"model.name_or_path={tmp_path / 'shape'}", f"datasets=[{pairs_dir}]"]
    given += [f"model.tokenizer_name_or_path={tiny_model_dir}", "chat_format=auto", f"cache_dir={tmp_path / 'cache'}"]
    found = read(run("--json", "--no-advice", "--gpu", "H100", "--processes", "8", *given))
    assert found["processes"] == found["shards"] == 8 and found["parameters"] > 2.5e9
    assert found["peak"] < found["usable"] and sum(found["waits"].values()) == 1


@pytest.mark.parametrize(("given", "message"), [
    (["--processes", "0"], "--processes 0 must be at least 1"),
    (["trainer=FSDPTrainer", "nproc=2", "--processes", "0"], "--processes 0 must be at least 1"),
    (["adapter=qlora"], "adapter.quantization=nf4 cannot be planned"),
    (["trainer=TensorParallelTrainer"], "TensorParallelTrainer cannot be planned yet"),
    (["batch_sise=3"], "batch_sise"),
])  # fmt: skip
def test_misuse(
    given: list[str], message: str, overrides: Callable[..., list[str]], capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(sys, "argv", ["plan.py", *overrides("loss=dpo", "loss.beta=0.1"), *given])
    with pytest.raises(UserError, match=re.escape(message)):
        plan.main()


LIMITS = """
import sys
from dataclasses import replace
from dpo.hardware import DEVICES
from settings import load_config
from trainers import planner

config = load_config(sys.argv[1:])
plan = planner(config, DEVICES["H100"], 1)
whole = plan(replace(config, microbatch_tokens=None))

def limit_of(share):
    hardware = replace(DEVICES["H100"], memory=share * whole.peak / (plan.usable / plan.hardware.memory))
    small = replace(plan, hardware=hardware)
    limit = small.limits(config)["microbatch_tokens"]
    return limit, *(small.fits(small(replace(config, microbatch_tokens=n))) for n in (limit, int(1.15 * limit) + 128))

print("found", whole.tokens, limit_of(1.1)[0], *limit_of(0.8))
"""


@pytest.mark.full
def test_the_limit_is_the_largest_that_fits(planned: Callable[..., Any]) -> None:
    done = planned("microbatch_tokens=auto", "mixed_precision=bfloat16", code=LIMITS)
    found = re.search(r"found (\d+) (\d+) (\d+) (\w+) (\w+)", done.stdout)
    assert found, done.stderr
    whole, all_of_it, limit = map(int, found.groups()[:3])
    assert 0 <= all_of_it - whole < 128 and 0.5 * whole < limit < whole
    assert found[4] == "True" and found[5] == "False"  # a little more does not fit


@pytest.mark.full
def test_auto_in_a_process_of_its_own(
    overrides: Callable[..., list[str]], shape: str, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """What train.py asks on a machine with GPUs; only their memory is made up."""
    gpus = ["device=auto", "trainer=FSDPTrainer", "nproc=2", "microbatch_tokens=auto", "mixed_precision=bfloat16"]
    tokenizer = f"model.tokenizer_name_or_path={tiny_model_dir}"
    config = load_config(overrides(*RUN, "batch_size=24", "max_length=128", shape, tokenizer, *gpus))
    real, memory = parallel.apart, [float(2**40)]
    monkeypatch.setattr(
        "dpo.parallel.processes.apart",
        lambda function, *given: memory[0] if function is trainers.free_memory else real(function, *given),
    )
    monkeypatch.setattr(trainers, "pick_device", lambda config: torch.device("cuda"))
    found = trainers.with_limits(config)
    assert found.token_limit and found.token_limit % 128 == 0 and found.fsdp_reduce_once is False  # one pass
    assert f"microbatch_tokens=auto is {found.token_limit}; fsdp_reduce_once=False" in capsys.readouterr().out
    memory[0] = 1e6
    with pytest.raises(UserError, match="microbatch_tokens=auto: none fits into"):
        trainers.with_limits(config)


def test_auto_without_a_gpu_and_in_other_scripts(overrides: Callable[..., list[str]]) -> None:
    config = load_config(overrides(*RUN, "microbatch_tokens=auto"))
    with pytest.raises(UserError, match="plans the memory of a GPU, and there is none: set a number"):
        trainers.train(config)
    with pytest.raises(UserError, match="microbatch_tokens=auto is for train"):
        _ = config.token_limit
    with pytest.raises(UserError, match="microbatch_tokens=most"):
        load_config(overrides(*RUN, "microbatch_tokens=most"))


def test_a_resumed_run_keeps_its_limit(overrides: Callable[..., list[str]], capsys: Any) -> None:
    train_here(overrides(*RUN, "microbatch_tokens=384", "n_examples=8"))
    capsys.readouterr()
    train_here(overrides(*RUN, "microbatch_tokens=auto", "n_examples=16", "resume=auto", "resume_allow_changes=true"))
    assert "microbatch_tokens=auto is 384; fsdp_reduce_once=None" in capsys.readouterr().out


@pytest.mark.full
def test_train_py_plans_instead_of_training(
    overrides: Callable[..., list[str]], shape: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    given = overrides(*RUN, shape, f"model.tokenizer_name_or_path={tiny_model_dir}", "plan=true")
    done = subprocess.run([sys.executable, "train.py", *given], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert not done.returncode, done.stderr
    assert "estimate, not measured" in done.stdout and "memory of a GPU" in done.stdout
    assert not [*tmp_path.rglob("metrics.jsonl")]
