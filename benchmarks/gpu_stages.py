"""The stages of gpu.py. Each function measures one thing; its docstring is the method that gpu.md gives."""

import argparse
import functools
import gc
import json
import os
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, PreTrainedModel

import benchmark
import speed
from dpo.data.batching import Example, make_batch
from dpo.hardware import DEVICES, GiB
from dpo.model import adapters
from dpo.model.loading import load_policy, load_tokenizer, make_ready
from dpo.model.logps import Computation
from dpo.model.patches import quiet_transformers
from dpo.optimizer import build_optimizer
from dpo.plan.planning import RESERVE, scorer_of
from dpo.run.config import Config
from dpo.run.saved import Saved
from dpo.run.throughput import Cost, cost_of, peak_memory, throughput
from dpo.sampling import Sampling, prompts_of, sample
from dpo.scoring import Scorer, shares
from dpo.stored import StoredReference
from dpo.utils import ROOT, UserError
from preference_datasets import load_data
from settings import data_settings, load_config, quoted
from trainers import Updates

ONE_B, EIGHT_B, TINY = "16x2048", "32x4096", "1x512"  # LAYERSxWIDTH, see speed.random_model
BATCH = ["batch_size=64", "n_examples=64"]  # one batch: a plan of it, and its update
# Largest relative difference of the GPU from the CPU in float32.
BOUNDS = {"loss": 1e-4, "gradient norm": 1e-4, "gradient": 1e-3, "log-probabilities": 1e-4}
SYNCHRONISE = ("cudaStreamSynchronize", "cudaEventSynchronize")
MEMORY_GOAL, TIME_GOAL = 0.05, 0.25  # of scripts/plan.py


@dataclass
class Found:
    """A stage's result: a table whose first row is its head, and what is not as it should be. `skipped`: why there is
    nothing; `note`: what else a reader must know."""

    table: list[list[str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    skipped: str = ""
    note: str = ""


@dataclass(frozen=True)
class Setting:
    """Where a stage keeps models and caches, and whether it only tries itself out, on the CPU."""

    folder: Path
    tiny: bool = False

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.tiny else "cuda")

    def given(self, shape: str | None, *more: str, weights: bool = False) -> list[str]:
        """Return overrides of a DPO run: of a model of this shape with random weights on made-up dialogues, or of the
        embedded model on the sentiment task. `weights`: write them, too. A tiny setting always takes the first."""
        quiet_transformers()
        given = ["exp_name=gpu", "loss=dpo", "loss.beta=0.1", "n_eval_examples=0", "holdout_fraction=0", "num_proc=1"]
        given += [f"cache_dir={quoted(self.folder / 'cache')}"]
        given += ["max_length=96", "max_prompt_length=48"] if self.tiny else []
        shape, weights = (TINY, True) if self.tiny else (shape, weights)
        if shape is None:
            return [*given, "datasets=[sentiment]", *more]
        rows, model = self.folder / "dialogues.jsonl", self.folder / f"{'weights' if weights else 'config'}_{shape}"
        if not rows.exists():
            benchmark.write_dialogues(rows, 8 if self.tiny else 512)
        if not (model / "tokenizer.json").exists():
            speed.random_model(shape, model, given, weights)
        chosen = ["model=blank_model", f"model.name_or_path={quoted(model)}", f"datasets=[{quoted(rows)}]"]
        return [*given, *chosen, *more]

    def config(self, given: list[str]) -> Config:
        """Return the configuration, on this setting's device."""
        config = load_config([*given, f"device={self.device}"])
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.allow_tf32
        return config


def seconds_of(function: Callable[[], Any], n: int, warm_up: int = 2) -> float:
    """Return the median time of `n` calls, after some that are not timed."""
    times = []
    for _ in range(warm_up + n):
        start = _now()
        function()
        times.append(_now() - start)
    return statistics.median(times[warm_up:])


def _now() -> float:
    """Return the time in seconds at which the GPU has done all its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def forget() -> None:
    """Free the memory of models that are no longer used, and count its peak anew."""
    gc.collect()  # a model refers to itself
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def random_weights(config: Config, device: torch.device) -> PreTrainedModel:
    """Return the configuration's model with random weights. Its files are not read."""
    torch.manual_seed(0)
    known, dtype = Saved(config, {}).architecture(), getattr(torch, config.model.policy_dtype)
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(known, dtype=dtype)
    return model


def trainer_of(setting: Setting, given: list[str]) -> tuple[Updates, list[Example]]:
    """Return what scripts/plan.py watches, with a real model with random weights, and its first batch."""
    config = setting.config(given)
    forget()
    model = random_weights(config, setting.device)
    if config.adapter.peft_type:
        adapters.put_on(model, adapters.peft_config(config.adapter), "random weights", config.seed)
    make_ready(model, config, True, config.compile)
    data = load_data(data_settings(config), load_tokenizer(config), "train")
    trainer = Updates(config, data)
    trainer.scorer = scorer_of(config, model, None, setting.device)
    trainer.use(model)
    return trainer, next(trainer.plan.batches(data))


def planned(given: list[str]) -> dict[str, Any]:
    """Return what scripts/plan.py says of a run on this GPU, in a process that sees no GPU."""
    gpu = next((name for name in DEVICES if torch.cuda.is_available() and name in torch.cuda.get_device_name()), "H100")
    command = [sys.executable, "scripts/plan.py", "--json", "--no-advice", "--gpu", gpu, *given]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"scripts/plan.py failed: {done.stderr.strip().rpartition(chr(10))[2]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


# Right -------------------------------------------------------------------------------------------------------------


def tests(setting: Setting) -> Found:
    """`python -m pytest -m cuda tests`: the tests that need a CUDA device."""
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-n", "0", "tests"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout, done.stderr)
    counts = dict.fromkeys(("passed", "failed", "error", "skipped"), 0)
    counts |= {kind: int(n) for n, kind in re.findall(r"(\d+) (\w+)", done.stdout[-200:]) if kind in counts}
    right = not done.returncode and (setting.tiny or (counts["passed"] and not counts["skipped"]))
    problems = [] if right else [f"exit code {done.returncode}, {counts}"]
    return Found([["outcome", "tests"], *([kind, str(n)] for kind, n in counts.items())], problems)


def correctness(setting: Setting) -> Found:
    """Largest relative differences of a DPO step of 32 pairs from the CPU's in float32, layout padded; of the gradient,
    the L2 norm. The policy is the embedded model plus noise; the CPU stored the reference. TF32 is off. bfloat16
    (autocast) is for information.
    """
    given, pairs = setting.given(None, "layout=padded", "allow_tf32=false"), 4 if setting.tiny else 32
    work = speed.prepare(load_config([*given, "device=cpu"]), pairs, pairs)
    config, stored = setting.config(given), speed.store(work)
    policy = load_policy(config, setting.device).train()
    policy.load_state_dict(work.policy.state_dict())
    truth = step_of(work, work.policy, Computation(torch.float32), stored)
    table, problems = [["layout, type", *BOUNDS]], []
    for layout, dtype in (*((x, torch.float32) for x in ("padded", "tree", "packed")), ("packed", torch.bfloat16)):
        flex = layout == "packed" and setting.device.type == "cuda"
        found = step_of(work, policy, Computation(dtype, layout, flex), stored)
        off = {name: float(((found[name] - truth[name]) / truth[name]).abs().max()) for name in BOUNDS}
        off["gradient"] = float((found["gradient"] - truth["gradient"]).norm() / truth["gradient norm"])
        label = f"{layout}, {str(dtype).removeprefix('torch.')}"
        table.append([label, *(f"{value:.1e}" for value in off.values())])
        wrong = [f"{label}: {name} is off by {off[name]:.1e}" for name, most in BOUNDS.items() if not off[name] <= most]
        problems += wrong if dtype == torch.float32 else []
    table.append(["allowed in float32", *(f"{most:.0e}" for most in BOUNDS.values())])
    return Found(table, problems)


def step_of(work: speed.Work, policy: PreTrainedModel, how: Computation, stored: StoredReference) -> dict[str, Tensor]:
    """Return the numbers of BOUNDS of a step, on the CPU."""
    policy.zero_grad()
    losses, metrics = Scorer(work.config.loss, how, stored)(policy, make_batch(work.data, work.examples), "train")
    losses.mean().backward()
    gradient = speed.gradient(policy).double().cpu()
    logps = [value for side in ("chosen", "rejected") for value in metrics[f"logps_train/{side}"]]
    found = {"loss": losses.mean().detach().cpu(), "gradient norm": gradient.norm(), "gradient": gradient}
    return {**found, "log-probabilities": torch.tensor(logps)}


def waits(setting: Setting) -> Found:
    """How often the host waits for the GPU in the third update of 64 pairs of the sentiment task, by the warnings of
    torch.cuda.set_sync_debug_mode, and in the fourth by the profiler (cudaStreamSynchronize, cudaEventSynchronize). The
    embedded model's shape, autocast to bfloat16, micro-batches of 1024 tokens.
    """
    table, problems = [["trained", "warnings", "profiler", "planned", "places"]], []
    for label, more in (("all weights", []), ("LoRA", ["adapter=lora"])):
        given = setting.given(None, "batch_size=64", "microbatch_tokens=1024", "mixed_precision=bfloat16", *more)
        trainer, batch = trainer_of(setting, given)
        for _ in range(2):
            trainer.train_step(batch)
        found = synchronisations(trainer, batch)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            trainer.train_step(batch)
        profiled = sum(event.count for event in seen.key_averages() if event.key in SYNCHRONISE)
        expected, places = sum(planned(given)["waits"].values()), ", ".join(f"{n} x {at}" for at, n in found.items())
        table.append([label, str(found.total()), str(profiled), str(expected), places])
        if not setting.tiny and found.total() != expected:
            problems.append(f"{label}: {found.total()} waits ({places}), and scripts/plan.py says {expected}")
    return Found(table, problems)


def synchronisations(trainer: Updates, batch: list[Example]) -> Counter[str]:
    """Return how often the host waits for the GPU in an update, by the place in the program."""
    mode = torch.cuda.set_sync_debug_mode if torch.cuda.is_available() else lambda name: None
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        mode("warn")
        try:
            trainer.train_step(batch)
        finally:
            mode("default")
    found = [warning for warning in seen if "called a synchronizing" in str(warning.message)]
    return Counter(f"{Path(warning.filename).name}:{warning.lineno}" for warning in found)


def plan_1b(setting: Setting) -> Found:
    """scripts/plan.py against the same update of 64 pairs of made-up dialogues: 16x2048 with random weights in float32,
    autocast to bfloat16. Seconds are the median of 3 updates after 2. Goals: memory within 5 %, time within 25 %.
    """
    table = [["optimizer", "planned, GiB", "measured", "ratio", "planned, s", "measured", "ratio", "goals"]]
    for optimizer in ("RMSprop", "AdamW"):
        given = setting.given(ONE_B, "mixed_precision=bfloat16", f"optimizer={optimizer}", "microbatch_tokens=8192")
        given += BATCH
        expected, measured = planned(given), update(setting, given)
        peaks = expected["peak"] / GiB, measured["peak_memory_mib"] / 1024
        memory, seconds = peaks[1] / peaks[0], measured["seconds"] / expected["seconds"]
        met = abs(memory - 1) <= MEMORY_GOAL and abs(seconds - 1) <= TIME_GOAL
        sizes = [f"{peak:.2f}" for peak in peaks]
        times = [f"{expected['seconds']:.3f}", f"{measured['seconds']:.3f}", f"{seconds:.3f}"]
        table.append([optimizer, *sizes, f"{memory:.3f}", *times, "met" if met else "MISSED"])
    return Found(table)


def update(setting: Setting, given: list[str]) -> dict[str, float]:
    """Return the median seconds of 3 updates after 2, and their `throughput`."""
    trainer, batch = trainer_of(setting, given)
    seconds = seconds_of(lambda: trainer.train_step(batch), 1 if setting.tiny else 3)
    parts, layout = shares(trainer.train_data, batch, trainer.cut(len(batch))), trainer.scorer.how.layout
    cost = sum((cost_of(part.batch, layout) for part in parts), Cost())
    return {"seconds": seconds, **throughput(trainer.policy, cost, seconds)}


# Fast --------------------------------------------------------------------------------------------------------------


def dpo_embedded(setting: Setting) -> Found:
    """`benchmark.py dpo`: the embedded model in float32 against the original's formulation, sentiment task."""
    return dpo_table(setting, setting.given(None, "microbatch_tokens=8192"))


def dpo_1b(setting: Setting) -> Found:
    """`benchmark.py dpo`: 16x2048, random weights in bfloat16, against the original's formulation; made-up rows."""
    given = setting.given(ONE_B, "microbatch_tokens=8192", "model.policy_dtype=bfloat16", weights=True)
    return dpo_table(setting, given)


def dpo_table(setting: Setting, given: list[str]) -> Found:
    """Return the table of `benchmark.py dpo`, with its facts as a note."""
    options: dict[str, Any] = {"overrides": [*given, f"device={setting.device}"], "shape": "", "sweep": False}
    sizes = {"pairs": 4, "micro": 2, "repeats": 1} if setting.tiny else {"pairs": 64, "micro": 8, "repeats": 3}
    method, facts, rows = benchmark.dpo_table(argparse.Namespace(**options, **sizes, only=None))
    facts |= {} if any(row[0] == "TRL" for row in rows) else {"TRL": "not measured: the package trl is not installed"}
    return Found(rows, note=" ".join([method, *(f"{key}: {value}." for key, value in facts.items())]))


def mfu_1b(setting: Setting) -> Found:
    """Updates of 64 pairs of made-up dialogues: 16x2048 with random weights in float32, autocast to bfloat16, RMSprop.
    Seconds are the median of 3 updates after 2, with the optimizer's step; dpo/run/throughput.py counts the rest.
    """
    return utilisation(setting, ONE_B, ["mixed_precision=bfloat16", "microbatch_tokens=8192", *BATCH])


def mfu_8b(setting: Setting) -> Found:
    """The same of 32x4096 in bfloat16, in the first way that fits by scripts/plan.py: all weights; with activation
    checkpointing; LoRA.
    """
    total = psutil.virtual_memory().total if setting.tiny else torch.cuda.get_device_properties(0).total_memory
    usable, tried = total * (1 - RESERVE), []
    more = ["model.policy_dtype=bfloat16", "microbatch_tokens=4096", *BATCH]
    for extra in ([], ["activation_checkpointing=true"], ["adapter=lora"]):
        more += extra
        peak = planned(setting.given(EIGHT_B, *more))["peak"]
        if peak <= usable:
            return utilisation(setting, EIGHT_B, more)
        tried.append(f"{' '.join(more)} needs {peak / GiB:.1f} GiB")
    return Found(skipped=f"{'; '.join(tried)}, by scripts/plan.py; usable are {usable / GiB:.1f} GiB")


def utilisation(setting: Setting, shape: str, more: list[str]) -> Found:
    """Measure tokens and operations a second of updates, plain and compiled."""
    table = [["compile", "seconds an update", "distinct tokens/s", "TFLOP/s", "MFU", "peak, GiB"]]
    for compiled in ("false", "true"):
        found = update(setting, setting.given(shape, *more, f"compile={compiled}"))
        rates = [f"{found['tokens_per_second']:.0f}", f"{found['flops_per_second'] / 1e12:.3g}"]
        share = f"{found['mfu']:.1%}" if "mfu" in found else "-"
        table.append([compiled, f"{found['seconds']:.3f}", *rates, share, f"{found['peak_memory_mib'] / 1024:.1f}"])
    return Found(table, note=f"Settings: {' '.join(more)}.")


def sampling(setting: Setting) -> Found:
    """`dpo.sampling.sample`: up to 128 new tokens for each of 64 prompts, bfloat16 weights, after one batch that is not
    timed. The embedded model continues sentiment prompts, 16x2048 (random weights) made-up dialogues. Tokens count up
    to a response's end.
    """
    table = [["model", "prompts at a time", "tokens", "seconds", "tokens/s"]]
    new, bfloat16 = 8 if setting.tiny else 128, "model.policy_dtype=bfloat16"
    for label, shape, at_once in (("embedded", None, 64), (ONE_B, ONE_B, 16), (ONE_B, ONE_B, 64)):
        config = setting.config(setting.given(shape, bfloat16))
        forget()
        model = (load_policy if shape is None else random_weights)(config, setting.device).eval()
        tokenizer = load_tokenizer(config)
        data = load_data(data_settings(config), tokenizer, "train")
        prompts = prompts_of(data, [(i, 0) for i in range(len(data))], 4 if setting.tiny else 64)
        how = Sampling(new, at_once, 0, torch.bfloat16)
        sample(model, tokenizer, prompts[:at_once], how)
        start = _now()
        n = sum(map(len, sample(model, tokenizer, prompts, how)))
        seconds = _now() - start
        table.append([label, str(at_once), str(n), f"{seconds:.2f}", f"{n / seconds:.0f}"])
        del model
    return Found(table)


def optimizers(setting: Setting) -> Found:
    """The median of 5 steps after 2, of 16x2048 with constant gradients: by `build_optimizer` (in pieces of 256 MiB,
    dpo/stepping.py; bfloat16 weights are rounded stochastically), and by torch's own step with the same arguments
    (AdamW: fused). Bytes a parameter are the peak, weights and gradients included.
    """
    table = [["optimizer", "weights", "in pieces, ms", "bytes a parameter", "torch's own, ms", "bytes a parameter"]]
    types = {"RMSprop": ("float32", "bfloat16"), "AdamW": ("float32", "bfloat16"), "AdamW8bit": ("float32",)}
    for name, dtype in ((name, dtype) for name, dtypes in types.items() for dtype in dtypes):
        config = setting.config(setting.given(ONE_B, f"model.policy_dtype={dtype}", f"optimizer={name}"))
        torchs = stepped(setting, config, torchs=True) if name == config.torch_optimizer else ["-", "-"]
        table.append([name, dtype, *stepped(setting, config), *torchs])
    return Found(table)


def stepped(setting: Setting, config: Config, torchs: bool = False) -> list[str]:
    """Return milliseconds and peak bytes a parameter of steps: ours, or those of torch's class."""
    forget()
    model = random_weights(config, setting.device)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer = build_optimizer(model, config)
    own = getattr(torch.optim, config.torch_optimizer).step
    step = functools.partial(own, optimizer) if torchs else optimizer.step
    seconds = seconds_of(step, 5 if not setting.tiny else 1)
    size = peak_memory(setting.device.type == "cuda") * 2**20 / model.num_parameters()
    return [f"{seconds * 1e3:.1f}", f"{size:.2f}"]
