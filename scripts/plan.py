"""Say before a run what it needs: python scripts/plan.py [--gpu H100] [--processes 8] KEY=VALUE ... (as for train.py)

The run's own training step computes its own batches on a GPU without memory and arithmetic (torch's fake tensors), with
the processes of a group that does not exist. So no GPU is needed, and no weights: of the model only its configuration.
Printed are memory by phase and kind, operations, traffic and waits of an update, an estimate of its time, and advice.
Not planned: evaluations and samples, torch.compile (ignored), fragmentation of memory, quantised weights, experts,
tensor parallelism. The time takes all GPUs for linked as those of one machine are.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from dpo import parallel
from dpo.data.batching import BLOCK, Batch, Example, deal, make_batch
from dpo.data.records import PreferenceData
from dpo.model import adapters
from dpo.model.checks import computation_of, layouts_to_try, refusing
from dpo.model.loading import load_tokenizer, make_ready
from dpo.model.logps import Laid, TokenLogps
from dpo.model.patches import quiet_transformers
from dpo.parallel.arrange import sharding_of
from dpo.plan import gpu
from dpo.plan.hardware import DEVICES, REACHED_LINK, Device, GiB
from dpo.plan.tracker import GRADIENTS, KINDS, STATES, TEMPORARY, WEIGHTS, Tracker
from dpo.reference import LiveReference
from dpo.run.config import Config
from dpo.run.saved import Saved
from dpo.run.throughput import cost_of
from dpo.scoring import Scorer
from dpo.utils import UserError
from opening import take_overrides
from preference_datasets import load_data
from settings import data_settings, load_config
from trainers import Trainer, plan_of
from utils import HelpFormatter, run_main

LOOKED_AT = 64  # global batches from which the largest is chosen
RESERVE = 0.08  # of the memory: fragmentation, and the CUDA context


class _ZeroReference:
    """Stands in for stored log-probabilities of the reference."""

    def response_logps(self, batch: Batch) -> TokenLogps:
        lengths = [len(response) for tree in batch.trees for response in tree.responses]
        shape = (len(lengths), max(lengths))
        return TokenLogps(torch.zeros(shape), torch.ones(shape, dtype=torch.bool))


@dataclasses.dataclass(frozen=True)
class _WatchedScorer(Scorer):
    """A Scorer that says what it computes next."""

    announce: Callable[[Laid], None] = lambda laid: None

    def score(self, policy: PreTrainedModel, laid: Laid, split: str) -> Any:
        self.announce(laid)
        return super().score(policy, laid, split)


class PlannedTrainer(Trainer):
    """A Trainer whose model is given, and whose steps are watched by a tracker."""

    def __init__(self, config: Config, policy: PreTrainedModel, scorer: Scorer, data: PreferenceData, tracker: Tracker):
        self.config, self.train_data, self.tracker = config, data, tracker
        self.scorer = _WatchedScorer(**vars(scorer), announce=self._announce)
        self.plan = plan_of(config)
        self.total_examples, self.total_steps = self.plan.size(data)
        self.examples, self.reference_seconds, self.other = 0, 0.0, None
        self.seen = 1.0  # share of a row's pairs of tokens that attention computes
        self.use(policy)
        for phase, name in (("backward", "backward"), ("clip", "prepare"), ("optimizer", "step")):
            setattr(self.updater, name, self._phase(phase, getattr(self.updater, name)))
        tracker.label([*policy.parameters(), *policy.buffers()], WEIGHTS)
        for parameter in adapters.trained(policy).values():
            parameter.register_post_accumulate_grad_hook(lambda p: tracker.label([p.grad], GRADIENTS))

    def _announce(self, laid: Laid) -> None:
        self.tracker.phase, self.seen = "forward", _share_seen(laid)

    def _phase(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            self.tracker.phase = name
            return function(*arguments)

        return run

    def on_attention(self, operations: int, pairs: int, size: int) -> None:
        """Count an attention kernel; see `gpu.attention`."""
        self.tracker.work("attention", int(operations * pairs * self.seen), size, 0)

    def step(self, examples: list[Example]) -> None:
        """Make one update, and label what it leaves behind."""
        self.train_step(examples)
        self.tracker.phase = "between updates"
        states = [s for state in self.updater.optimizer.state.values() for s in state.values() if isinstance(s, Tensor)]
        self.tracker.label(states, STATES)


def _share_seen(laid: Laid) -> float:
    """Return the share of the rows' pairs of tokens of which one sees the other."""
    rows, width = laid.rows.branch.shape
    pairs = 0
    for tree in laid.batch.trees:
        lengths = [len(response) - 1 for response in tree.responses]
        pairs += len(tree.prompt) ** 2 // 2 + sum(n * len(tree.prompt) + n**2 // 2 for n in lengths)
    return min(pairs / (rows * width**2), 1.0)


# Build -------------------------------------------------------------------------------------------------------------


def _experts(config: Any) -> bool:
    """Return whether a model's configuration names experts."""
    text, names = config.get_text_config(), ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    return any((getattr(text, name, None) or 0) > 1 for name in names)


def meta_model(config: Config) -> PreTrainedModel:
    """Return the model without weights. Raise UserError if it has no configuration that can be read."""
    name, dtype = config.model.name_or_path, getattr(torch, config.model.policy_dtype)
    known = Saved(config, {}).architecture()  # an archive has the same
    if _experts(known):
        raise UserError(f"{name} has experts, whose work depends on the tokens: it cannot be planned")
    own_code = {"trust_remote_code": config.model.trust_remote_code}
    with refusing(f"no model could be made of {name}"), torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(known, dtype=dtype, **own_code)
    return model


def arranged(
    model: PreTrainedModel, config: Config, sharding: parallel.Sharding | None, trains: bool, mode: FakeTensorMode
) -> PreTrainedModel:
    """Return `model` sharded, with its adapter, on the meta device."""
    if sharding is not None:
        with mode:
            parallel.shard_model(model, sharding)
    if trains and config.adapter.peft_type:
        adapters.put_on(model, adapters.peft_config(config.adapter), config.model.start, config.seed)
    make_ready(model, config, trains, compiled=False)
    return model if trains else model.requires_grad_(False)


def scorer_of(config: Config, policy: PreTrainedModel, other: PreTrainedModel | None, device: torch.device) -> Scorer:
    """Return the scorer of a policy, with the live reference `other`. That a layout is exact is taken for granted."""
    how = computation_of(config, device, layouts_to_try(config, device)[0])
    reference: Any = None
    if config.loss.needs_reference:
        reference = LiveReference(other, how) if other is not None else _ZeroReference()
        if config.reference.mode == "live" and other is None:
            reference = LiveReference(policy, how, adapters.Starting(policy))
    return Scorer(config.loss, how, reference, state=config.loss.initial_state())


# Measure -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Planned:
    """What the largest update looked at needs of the busiest GPU. Memory and traffic are in bytes.

    `seconds` and `hours` (of the whole run) are estimates. `useful`: the work of all processes, as a share of what the
    busiest one's would be if all had as much. `waits` of the host for the GPU, and `collectives`, are of an update.
    """

    processes: int
    shards: int
    parameters: int
    trained: int
    updates: int
    passes: int
    tokens: int
    useful: float
    memory: dict[str, dict[str, int]]
    tflop: float
    kernels: int
    moved: int
    waits: dict[str, int]
    collectives: dict[str, int]
    traffic: dict[str, int]
    seconds: float
    hours: float

    @property
    def peak(self) -> int:
        """The most memory of any phase."""
        return max(sum(kinds.values()) for kinds in self.memory.values())


def plan_run(config: Config, data: PreferenceData, device: torch.device, hardware: Device) -> Planned:
    """Return what the run needs, from the largest of its first LOOKED_AT updates."""
    sharding = sharding_of(config)
    sharding = sharding.on_mesh(device) if sharding is not None else None
    mode, n_models = FakeTensorMode(allow_non_fake_inputs=True), 2 if _has_second_model(config) else 1
    models = [arranged(meta_model(config), config, sharding, trains, mode) for trains in (True, False)[:n_models]]
    tracker = Tracker(device.type, models[0].config.get_text_config().vocab_size)
    held: list[PlannedTrainer] = []
    attention = gpu.attention(lambda *numbers: held[0].on_attention(*numbers)) if device.type != "cpu" else None
    with gpu.pretending(mode, attention), tracker:
        for model in models:
            model.to_empty(device=sharding.device if sharding is not None else device).tie_weights()
        scorer = scorer_of(config, models[0], models[1] if n_models > 1 else None, device)
        trainer = PlannedTrainer(config, models[0], scorer, data, tracker)
        held.append(trainer)
        batches = [*itertools.islice(trainer.plan.batches(data), LOOKED_AT)]
        sizes = [_sizes(trainer, batch) for batch in batches]
        work = [sum(map(max, passes)) for passes in sizes]  # of the busiest process
        largest = max(range(len(batches)), key=lambda i: (max(map(max, sizes[i])), work[i]))
        trainer.step(batches[largest])  # makes the optimizer's states
        first = tracker.peak
        tracker.reset()
        tracker.cost = (replace(hardware, float32=hardware.tf32) if config.allow_tf32 else hardware).seconds
        trainer.step(batches[largest])
        tracker.phase = ""
    peaks = {p: max(kinds, first.get(p, kinds), key=lambda k: k.total()) for p, kinds in tracker.peak.items()}
    made = peaks.get("optimizer", Counter())  # in the first step states are made, and labelled at its end
    late = min(made[TEMPORARY], max(tracker.now[STATES] - made[STATES], 0))
    made[STATES] += late
    made[TEMPORARY] -= late
    ranks, processes = parallel.data_ranks(trainer.policy), parallel.world_size()
    sent = _sending(tracker.traffic, hardware) * (processes - 1) / processes
    seconds = max(tracker.seconds, sent)  # they overlap
    mean = seconds * sum(work) / len(work) / work[largest]
    return Planned(
        processes=processes,
        shards=processes // config.fsdp_replicate_size,
        parameters=trainer.policy.num_parameters(),
        trained=trainer.policy.num_parameters(only_trainable=True),
        updates=trainer.total_steps,
        passes=len(sizes[largest]),
        tokens=max(map(max, sizes[largest])),
        useful=sum(n for passes in sizes for some in passes for n in some) / (ranks * sum(work)),
        memory={phase: {kind: kinds[kind] for kind in KINDS if kinds[kind]} for phase, kinds in peaks.items() if phase},
        tflop=tracker.flops / 1e12,
        kernels=tracker.kernels,
        moved=tracker.bytes,
        waits=dict(tracker.waits),
        collectives=dict(tracker.collectives),
        traffic=dict(tracker.traffic),
        seconds=seconds,
        hours=mean * trainer.total_steps / 3600,
    )


def _sending(traffic: Mapping[str, int], hardware: Device) -> float:
    """Return the seconds that the links need for the bytes of collectives."""
    return sum(traffic.values()) / hardware.link / REACHED_LINK


def _has_second_model(config: Config) -> bool:
    live = config.reference.mode == "live" and config.loss.needs_reference
    return live and (not config.adapter.peft_type or config.reference.archive is not None)


def _sizes(trainer: PlannedTrainer, batch: list[Example]) -> list[list[int]]:
    """Return the tokens of each micro-batch of a global batch, [pass][rank]."""
    data, layout = trainer.train_data, trainer.scorer.how.layout
    dealt = deal(data, batch, trainer.cut(len(batch)))
    return [[cost_of(make_batch(data, part), layout).computed if part else 0 for part in ranks] for ranks in dealt]


# Advise ------------------------------------------------------------------------------------------------------------


def usable(hardware: Device) -> float:
    """Return the bytes that tensors may take."""
    return hardware.memory * (1 - RESERVE)


def largest_limit(config: Config, data: PreferenceData, device: torch.device, hardware: Device, found: Planned) -> int:
    """Return the largest microbatch_tokens that fits, in steps of BLOCK; 0 if none does. It is planned, not only
    extrapolated from the memory that a token takes."""
    kept, gradients = (found.memory.get(phase, {}) for phase in ("between updates", "clip"))
    if sum(kept.values()) + gradients.get(GRADIENTS, 0) > usable(hardware):
        return 0
    other = plan_run(replace(config, microbatch_tokens=max(found.tokens // 2, 1)), data, device, hardware)
    if other.tokens == found.tokens:  # one prompt's responses are as long
        return found.tokens if found.peak <= usable(hardware) else 0
    a_token = (_passing(found) - _passing(other)) / (found.tokens - other.tokens)
    limit = found.tokens + (usable(hardware) - _passing(found)) / max(a_token, 1)
    while (limit := int(limit) // BLOCK * BLOCK) > 0:
        there = plan_run(replace(config, microbatch_tokens=limit), data, device, hardware)
        if there.peak <= usable(hardware):
            return limit
        if there.tokens > limit:
            return 0
        limit = int(limit * 0.9)
    return 0


def _passing(found: Planned) -> int:
    """Return the most memory of forward and backward passes."""
    return max(sum(kinds.values()) for phase, kinds in found.memory.items() if phase in ("forward", "backward"))


def fewest_processes(found: Planned, hardware: Device) -> int | None:
    """Return over how many shards under FSDP the run would fit, as it is cut now: a power of 2, or None."""
    for n in (2**i for i in range(11)):
        shared = (WEIGHTS, GRADIENTS, STATES, TEMPORARY)
        peaks = (
            sum(size * found.shards / n if kind in shared else size for kind, size in kinds.items())
            for kinds in found.memory.values()
        )
        if max(peaks) <= usable(hardware):
            return n
    return None


def advice(config: Config, data: PreferenceData, device: torch.device, name: str, found: Planned) -> Iterator[str]:
    """Yield sentences on what to change. Each may take as long as the plan."""
    hardware = DEVICES[name]
    fits = found.peak <= usable(hardware)
    if not fits and not config.activation_checkpointing:
        smaller = plan_run(replace(config, activation_checkpointing=True), data, device, hardware)
        there = "which fits" if smaller.peak <= usable(hardware) else "which does not fit either"
        yield f"activation_checkpointing=true takes {smaller.peak / GiB:.1f} GiB, {there}"
    if fits and found.passes == 1:
        yield f"the largest update, of {found.tokens} tokens a process, fits into one pass"
    else:
        limit = largest_limit(config, data, device, hardware, found)
        most = f"the largest microbatch_tokens that fits is {limit}"
        yield most if limit else "no microbatch_tokens fits: weights, gradients and states leave too little room"
    if not fits:
        yield "less memory: model.policy_dtype=bfloat16, adapter=lora, optimizer=AdamW8bit, mixed_precision=bfloat16"
        fewest = fewest_processes(found, hardware)
        enough = f"trainer=FSDPTrainer with about {fewest} {name} for each copy of the model fits (by arithmetic)"
        yield enough if fewest else "no number of GPUs is enough: a micro-batch is too large"
    if _sending(found.traffic, hardware) > found.seconds * 0.99:
        yield "traffic takes longer than the computation: a larger batch_size, or fsdp_reduce_once=true"


# Show --------------------------------------------------------------------------------------------------------------


def as_text(found: Planned, name: str) -> str:
    """Return the plan for people."""
    hardware = DEVICES[name]
    kinds = [kind for kind in KINDS if any(kind in phase for phase in found.memory.values())]
    rows = [["phase", *kinds, "together"]]
    for phase, sizes in found.memory.items():
        cells = [sizes.get(kind, 0) for kind in kinds]
        rows.append([phase, *(f"{size / GiB:.2f}" for size in (*cells, sum(cells)))])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    fits = "fits" if found.peak <= usable(hardware) else "DOES NOT FIT"
    trained = f" ({found.trained / 1e6:.1f}M trained)" if found.trained != found.parameters else ""
    sent = {call: n for call, n in found.collectives.items() if call != "wait_tensor"}
    traffic = ", ".join(f"{n} {call.strip('_')} ({found.traffic[call] / 1e9:.2f} GB)" for call, n in sent.items())
    hours = f"{found.hours:.1f} h" if found.hours >= 1 else f"{found.hours * 60:.1f} minutes"
    waits = ", ".join(f"{n} x {where}" for where, n in found.waits.items())
    return "\n".join(
        [
            f"{found.parameters / 1e9:.2f}B parameters{trained} on {found.processes} x {name}",
            "memory of a GPU in GiB, when most of it is in use:",
            *table,
            f"peak {found.peak / GiB:.1f} GiB of {usable(hardware) / GiB:.1f} that may be used: {fits}",
            f"largest update: {found.passes} passes of up to {found.tokens} tokens, {found.tflop:.1f} TFLOP, "
            f"{found.kernels} kernels, {found.moved / 1e9:.0f} GB moved; {found.useful:.2f} of the work is useful",
            f"traffic: {traffic or 'none'}",
            f"the host waits for the GPU: {waits or 'never'}",
            f"estimate, not measured: {found.seconds:.2f} s for that update, {hours} for {found.updates} updates",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--gpu", choices=[*DEVICES], default="H100", help="the GPU to plan for")
    parser.add_argument(
        "--processes", type=int, help="GPUs of all machines, unless trainer=BasicTrainer; else nproc, or 8"
    )
    parser.add_argument("--no-advice", action="store_true", help="do not look for better settings, which takes longer")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.usage = "%(prog)s [options] KEY=VALUE ..."
    others, overrides = take_overrides(sys.argv[1:])
    arguments = parser.parse_args(others)
    if arguments.processes is not None and arguments.processes < 1:
        raise UserError(f"--processes {arguments.processes} must be at least 1")
    given = [] if any(override.startswith("exp_name=") for override in overrides) else ["exp_name=plan"]
    config = load_config([*given, *overrides])
    check_planned(config)
    quiet_transformers()
    with contextlib.redirect_stdout(sys.stderr):
        data = load_data(data_settings(config), load_tokenizer(config), "train")
    device = torch.device("cpu") if config.device == "cpu" else gpu.register()
    if config.needs_group:
        gpu.join_fake_group(arguments.processes or config.nproc or 8)
    found = plan_run(config, data, device, DEVICES[arguments.gpu])
    lines = () if arguments.no_advice else advice(config, data, device, arguments.gpu, found)
    if arguments.json:
        facts = {"gpu": arguments.gpu, "peak": found.peak, "usable": int(usable(DEVICES[arguments.gpu]))}
        print(json.dumps({**dataclasses.asdict(found), **facts, "advice": [*lines]}))
        return
    print(as_text(found, arguments.gpu), flush=True)
    for line in lines:
        print(f"advice: {line}", flush=True)


def check_planned(config: Config) -> None:
    """Raise UserError for what cannot be planned."""
    if config.adapter.quantization:
        raise UserError(f"adapter.quantization={config.adapter.quantization} cannot be planned; plan adapter=lora")
    if config.trainer == "TensorParallelTrainer":
        raise UserError("trainer=TensorParallelTrainer cannot be planned yet; plan trainer=FSDPTrainer")


if __name__ == "__main__":
    run_main(main)
