"""What a run needs of its GPUs: its own training step, on a GPU that does not exist; see scripts/plan.py."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from dpo import parallel
from dpo.data.batching import BLOCK, Batch, Example, deal, make_batch, packed_width
from dpo.data.records import PreferenceData
from dpo.hardware import REACHED_LINK, Device, GiB
from dpo.model import adapters
from dpo.model.checks import computation_of, layouts_to_try, refusing
from dpo.model.loading import make_ready
from dpo.model.logps import Laid, TokenLogps
from dpo.parallel.arrange import sharding_of
from dpo.plan import gpu
from dpo.plan.tracker import GRADIENTS, KINDS, STATES, TEMPORARY, WEIGHTS, Tracker
from dpo.reference import LiveReference
from dpo.run.config import Config
from dpo.run.saved import Saved
from dpo.run.throughput import cost_of
from dpo.scoring import Scorer
from dpo.utils import UserError

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


class Watched:
    """A trainer, with its policy, whose updates a tracker watches."""

    def __init__(self, trainer: Any, tracker: Tracker):
        self.trainer, self.tracker = trainer, tracker
        self.seen = 1.0  # share of a row's pairs of tokens that attention computes
        trainer.scorer = _WatchedScorer(**vars(trainer.scorer), announce=self._announce)
        for phase, name in (("backward", "backward"), ("clip", "prepare"), ("optimizer", "step")):
            setattr(trainer.updater, name, self._phase(phase, getattr(trainer.updater, name)))
        tracker.label([*trainer.policy.parameters(), *trainer.policy.buffers()], WEIGHTS)
        for parameter in adapters.trained(trainer.policy).values():
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
        self.trainer.train_step(examples)
        self.tracker.phase = "between updates"
        kept = self.trainer.updater.optimizer.state.values()
        states = [tensor for state in kept for tensor in state.values() if isinstance(tensor, Tensor)]
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
    """Return the scorer of a policy, with the live reference `other`. That a layout is exact is taken for granted, if
    the model's class has what it needs."""
    layouts = [layout for layout in layouts_to_try(config, device) if layout != "packed" or policy._supports_flex_attn]
    if not layouts:
        raise UserError(f"layout={config.layout}: {type(policy).__name__} has no FlexAttention; set layout=auto")
    how = computation_of(config, device, layouts[0])
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


@dataclasses.dataclass(frozen=True)
class Planner:
    """Plans runs on these data and GPUs. `make(config, data)` gives what makes a run's updates, without a policy."""

    data: PreferenceData
    device: torch.device
    hardware: Device
    make: Callable[[Config, PreferenceData], Any]
    known: dict[str, Planned] = dataclasses.field(init=False, default_factory=dict)  # by configuration

    @property
    def usable(self) -> float:
        """The bytes that tensors may take."""
        return self.hardware.memory * (1 - RESERVE)

    def __call__(self, config: Config) -> Planned:
        """Return what the run needs, from the largest of its first LOOKED_AT updates."""
        key = repr(config)
        self.known[key] = found = self.known.get(key) or self._plan(config)
        return found

    def _plan(self, config: Config) -> Planned:
        device, hardware, sharding = self.device, self.hardware, sharding_of(config)
        sharding = sharding.on_mesh(device) if sharding is not None else None
        mode, n_models = FakeTensorMode(allow_non_fake_inputs=True), 2 if _has_second_model(config) else 1
        models = [arranged(meta_model(config), config, sharding, trains, mode) for trains in (True, False)[:n_models]]
        tracker = Tracker(device.type, models[0].config.get_text_config().vocab_size)
        held: list[Watched] = []
        attention = gpu.attention(lambda *numbers: held[0].on_attention(*numbers)) if device.type != "cpu" else None
        with gpu.pretending(mode, attention), tracker:
            for model in models:
                model.to_empty(device=sharding.device if sharding is not None else device).tie_weights()
            trainer = self.make(config, self.data)
            trainer.scorer = scorer_of(config, models[0], models[1] if n_models > 1 else None, device)
            trainer.use(models[0])
            held.append(watched := Watched(trainer, tracker))
            batches = [*itertools.islice(trainer.plan.batches(self.data), LOOKED_AT)]
            sizes = [_sizes(trainer, batch) for batch in batches]
            work = [sum(map(max, passes)) for passes in sizes]  # of the busiest process
            largest = max(range(len(batches)), key=lambda i: (max(map(max, sizes[i])), work[i]))
            watched.step(batches[largest])  # makes the optimizer's states
            first = tracker.peak
            tracker.reset()
            tracker.cost = (replace(hardware, float32=hardware.tf32) if config.allow_tf32 else hardware).seconds
            watched.step(batches[largest])
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
        memory = {phase: {k: kinds[k] for k in KINDS if kinds[k]} for phase, kinds in peaks.items() if phase}
        return Planned(
            processes=processes,
            shards=processes // config.fsdp_replicate_size,
            parameters=trainer.policy.num_parameters(),
            trained=trainer.policy.num_parameters(only_trainable=True),
            updates=trainer.total_steps,
            passes=len(sizes[largest]),
            tokens=max(map(max, sizes[largest])),
            useful=sum(n for passes in sizes for some in passes for n in some) / (ranks * sum(work)),
            memory=memory,
            tflop=tracker.flops / 1e12,
            kernels=tracker.kernels,
            moved=tracker.bytes,
            waits=dict(tracker.waits),
            collectives=dict(tracker.collectives),
            traffic=dict(tracker.traffic),
            seconds=seconds,
            hours=mean * trainer.total_steps / 3600,
        )

    def fits(self, found: Planned) -> bool:
        """Return whether a GPU holds what was `found`."""
        return found.peak <= self.usable

    def largest_limit(self, config: Config, found: Planned) -> int:
        """Return the largest microbatch_tokens that fits, in steps of BLOCK; 0 if none does. It is planned, not only
        extrapolated from the memory that a token takes. `found` is the plan of `config`."""
        kept, gradients = (found.memory.get(phase, {}) for phase in ("between updates", "clip"))
        if sum(kept.values()) + gradients.get(GRADIENTS, 0) > self.usable:
            return 0
        other = self(replace(config, microbatch_tokens=max(found.tokens // 2, 1)))
        if other.tokens == found.tokens:  # one prompt's responses are as long
            return found.tokens if self.fits(found) else 0
        a_token = (_passing(found) - _passing(other)) / (found.tokens - other.tokens)
        limit = found.tokens + (self.usable - _passing(found)) / max(a_token, 1)
        while (limit := int(limit) // BLOCK * BLOCK) > 0:
            there = self(replace(config, microbatch_tokens=limit))
            if self.fits(there):
                return limit
            if there.tokens > limit:
                return 0
            limit = int(limit * 0.9)
        return 0

    def limits(self, config: Config) -> dict[str, Any]:
        """Return the keys that microbatch_tokens=auto stands for: the largest that fits, at most the largest update
        whole, and whether with it gradients are summed once an update. Raise UserError if nothing fits."""
        given = replace(config, microbatch_tokens=None, fsdp_reduce_once=bool(config.fsdp_reduce_once))
        found = self(given)
        limit = packed_width(found.tokens) if self.fits(found) else self.largest_limit(given, found)
        if not limit:
            raise UserError(
                f"microbatch_tokens=auto: none fits into {self.hardware.memory / GiB:.1f} GiB. "
                "`python scripts/plan.py`, with the same settings and a number, says what takes it, and what helps"
            )
        chosen, once = replace(given, microbatch_tokens=limit), given.fsdp_reduce_once
        if config.fsdp_reduce_once is None and config.may_reduce_once and self(chosen).passes > 1:
            once = self.fits(self(replace(chosen, fsdp_reduce_once=True)))
        return {"microbatch_tokens": limit, "fsdp_reduce_once": once}

    def advice(self, config: Config, found: Planned, gpu_name: str) -> Iterator[str]:
        """Yield sentences on what to change. Each may take as long as the plan."""
        fits = self.fits(found)
        if not fits and not config.activation_checkpointing:
            smaller = self(replace(config, activation_checkpointing=True))
            there = "which fits" if self.fits(smaller) else "which does not fit either"
            yield f"activation_checkpointing=true takes {smaller.peak / GiB:.1f} GiB, {there}"
        if fits and found.passes == 1:
            yield f"the largest update, of {found.tokens} tokens a process, fits into one pass"
        else:
            limit = self.largest_limit(config, found)
            most = f"the largest microbatch_tokens that fits is {limit}"
            yield most if limit else "no microbatch_tokens fits: weights, gradients and states leave too little room"
        if fits and found.passes > 1 and config.may_reduce_once and not config.fsdp_reduce_once:
            once = self(replace(config, fsdp_reduce_once=True))
            there = "which fits" if self.fits(once) else "which does not fit"
            less, now = (sum(plan.traffic.values()) / 1e9 for plan in (once, found))
            sent = f"{less:.1f} GB, not {now:.1f}"
            yield f"fsdp_reduce_once=true takes {once.peak / GiB:.1f} GiB, {there}, and sends {sent}"
        if not fits:
            keys = ("model.policy_dtype=bfloat16", "adapter=lora", "optimizer=AdamW8bit", "mixed_precision=bfloat16")
            yield f"less memory: {', '.join(keys)}"
            fewest = fewest_processes(found, self.usable)
            enough = f"trainer=FSDPTrainer with about {fewest} {gpu_name} for each copy fits (by arithmetic)"
            yield enough if fewest else "no number of GPUs is enough: a micro-batch is too large"
        if _sending(found.traffic, self.hardware) > found.seconds * 0.99:
            yield "traffic takes longer than the computation: a larger batch_size helps"


def _sending(traffic: Mapping[str, int], hardware: Device) -> float:
    """Return the seconds that the links need for the bytes of collectives."""
    return sum(traffic.values()) / hardware.link / REACHED_LINK


def _has_second_model(config: Config) -> bool:
    live = config.reference.mode == "live" and config.loss.needs_reference
    return live and (not config.adapter.peft_type or config.reference.archive is not None)


def _sizes(trainer: Any, batch: list[Example]) -> list[list[int]]:
    """Return the tokens of each micro-batch of a global batch, [pass][rank]."""
    data, layout = trainer.train_data, trainer.scorer.how.layout
    dealt = deal(data, batch, trainer.cut(len(batch)))
    return [[cost_of(make_batch(data, part), layout).computed if part else 0 for part in ranks] for ranks in dealt]


def _passing(found: Planned) -> int:
    """Return the most memory of forward and backward passes."""
    return max(sum(kinds.values()) for phase, kinds in found.memory.items() if phase in ("forward", "backward"))


def fewest_processes(found: Planned, usable: float) -> int | None:
    """Return over how many shards under FSDP the run would fit into `usable` bytes, as it is cut now: a power of 2."""
    for n in (2**i for i in range(11)):
        shared = (WEIGHTS, GRADIENTS, STATES, TEMPORARY)
        peaks = (
            sum(size * found.shards / n if kind in shared else size for kind, size in kinds.items())
            for kinds in found.memory.values()
        )
        if max(peaks) <= usable:
            return n
    return None


def check_planned(config: Config) -> None:
    """Raise UserError for what cannot be planned."""
    if config.adapter.quantization:
        raise UserError(f"adapter.quantization={config.adapter.quantization} cannot be planned; plan adapter=lora")
    if config.trainer == "TensorParallelTrainer":
        raise UserError("trainer=TensorParallelTrainer cannot be planned yet; plan trainer=FSDPTrainer")
