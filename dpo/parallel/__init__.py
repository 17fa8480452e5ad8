"""Processes and sharded models: the only file that talks to torch.distributed.

Every function also works without a process group, as the one process of its group. A mesh has three dimensions: model
copies (`replicate`) x FSDP shards (`shard`) x tensor parallelism (`tensor`). Processes that differ in the first two see
different examples ("data ranks"); those that differ in the last compute the same examples together.
"""

import contextlib
import faulthandler
import logging
import math
import os
import re
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from transformers import PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES
from transformers.distributed.tensor_parallel import ColwiseParallel, TensorParallelLayer, apply_tensor_parallelism

from dpo.run import stopping
from dpo.utils import UserError, end_with_parent, n_cores

T = TypeVar("T")
# A dead process closes its connections, which the others see at once; this bounds the wait for one on a machine that is
# gone, and for what one process does alone between two collectives, such as a checkpoint's way to a slow disk.
TIMEOUT = timedelta(minutes=30)
TO_JOIN = timedelta(minutes=10)  # from the first process of a group to the last: how far apart they may start
SECONDS_TO_SPEAK = 10.0
SECONDS_TO_END = 5.0  # for processes whose group has failed, before each signal
HEARTBEAT, DEAD_AFTER = 2.0, 60.0  # seconds between signs of life, and without any
MESH = ("replicate", "shard", "tensor")
# Styles of transformers' tensor-parallel plans that the tests hold to one process. Others (experts) are refused.
TESTED_STYLES = set(
    "colwise rowwise colwise_gather_output rowwise_split_input embedding_rowwise replicated_with_grad_allreduce".split()
)
OUR_STYLES = {"replicated_with_grad_allreduce": "shared_by_heads"}
_mesh: DeviceMesh | None = None
# Gathering a tensor that both FSDP and tensor parallelism shard takes two steps; torch warns each time.
logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)


@dataclass(frozen=True)
class Sharding:
    """How a model is laid over processes: mesh sizes, and FSDP's settings."""

    replicate: int
    shard: int
    tensor: int
    block_name: str | None = None
    compute_dtype: torch.dtype = torch.float32
    reshard_after_forward: bool = True
    cpu_offload: bool = False

    @property
    def fsdp(self) -> bool:
        """Whether FSDP holds the parameters; tensor parallelism alone does without it."""
        return self.tensor == 1 or self.shard * self.replicate > 1


# Processes ------------------------------------------------------------------------------------------------------------


def joined() -> bool:
    """Whether this process is one of a group: started by torchrun, by srun with several tasks, or by `launch`."""
    if "RANK" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        _take_slurms_word()
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def _take_slurms_word() -> None:
    """Set torch's variables from those of `srun`. The first machine of the step holds the store."""
    names = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS"}
    os.environ.update({ours: os.environ[slurms] for ours, slurms in names.items()})
    first = re.sub(r"\[(\d+).*", r"\1", os.environ["SLURM_STEP_NODELIST"]).split(",")[0]
    os.environ.setdefault("MASTER_ADDR", first)
    os.environ.setdefault("MASTER_PORT", str(20_000 + int(os.environ["SLURM_JOB_ID"]) % 10_000))


def launch(worker: Callable[..., None], arguments: tuple[Any, ...], n: int, port: int | None) -> None:
    """Run `worker(*arguments)` in `n` new processes of one group. `port` is the store's; None: any that is free.

    When one fails the others are ended. Raises SystemExit with its exit code where it has said why, and UserError where
    a signal killed it.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(n_cores() // n, 1)))
    try:
        store = dist.TCPStore("localhost", port or 0, is_master=True, wait_for_workers=False)
    except RuntimeError as error:
        raise UserError(f"fsdp_port={port} cannot be used: {str(error).splitlines()[0]}; leave it null") from error
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    context: Any = torch.multiprocessing.start_processes(
        _start, (os.getpid(), worker, arguments, n, store.port), nprocs=n, join=False, start_method="spawn"
    )
    try:
        with stopping.passing_on(context.pids()):
            while not context.join(grace_period=SECONDS_TO_END):
                pass
    except torch.multiprocessing.ProcessExitedException as error:
        if error.signal_name is None:
            raise SystemExit(error.exit_code) from None
        if error.signal_name == "SIGTERM":  # before training, when there is nothing to save
            raise stopping.Stopped from None
        if error.signal_name == "SIGINT":
            raise KeyboardInterrupt from None
        raise UserError(
            f"process {error.error_index} of {n} was killed by {error.signal_name} (by the system, if memory ran out), "
            "and the others were stopped; checkpoints already written are complete"
        ) from error
    finally:
        for process in context.processes:
            process.kill()
            process.join()


def _start(index: int, parent: int, worker: Callable[..., None], arguments: tuple[Any, ...], n: int, port: int) -> None:
    end_with_parent(parent)
    values: dict[str, Any] = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n}
    values |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
    os.environ.update({name: str(value) for name, value in values.items()})
    faulthandler.enable()  # a process that the system or a library ends says where it was
    code: Any = 0
    try:
        worker(*arguments)
    except SystemExit as end:  # the reason is printed already
        code = end.code
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    # Python's own shutdown can hang or abort while threads of libraries still run, and nothing is left for it to do.
    os._exit(code if isinstance(code, int) else 1)


@contextlib.contextmanager
def group(device: torch.device) -> Iterator[None]:
    """Join the group of processes on entering, and leave it when all is well or training stopped as it was asked to."""
    # Signals must end a process that waits for others inside a collective, where Python's own handlers do not run.
    for number in stopping.ENDS:
        signal.signal(number, signal.SIG_DFL)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    _join("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield
        dist.barrier()
    except stopping.Stopped:
        dist.barrier()  # the first process to exit ends the others
        raise
    finally:
        global _mesh
        _mesh = None
    dist.destroy_process_group()


def _join(backend: str) -> None:
    """Find the other processes, and connect to them. Raises UserError if some do not come."""
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=TO_JOIN))
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"the processes of this job did not find each other within {TO_JOIN} ({reason}): look whether all of them "
            "were started, and can reach MASTER_ADDR and MASTER_PORT"
        ) from error
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)


def active() -> bool:
    """Whether this process has joined a group."""
    return dist.is_initialized()


def rank() -> int:
    """This process's number among all of the group."""
    return dist.get_rank() if active() else int(os.environ.get("RANK", "0")) if joined() else 0


def world_size() -> int:
    return dist.get_world_size() if active() else 1


def local_rank() -> int:
    """This process's number on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0")) if joined() else 0


def gpu_index() -> int:
    """Which of the GPUs that this process sees is its own; `srun --gpus-per-task` shows it no other."""
    return 0 if "SLURM_GPUS_PER_TASK" in os.environ else local_rank()


def is_main() -> bool:
    """Whether this process writes the run's files and speaks for all."""
    return rank() == 0


def fails_first() -> bool:
    """Whether this process is the one that says why the group fails: the first that asks."""
    if not active():
        if not is_main():
            # If the main process fails in the same way, this one is ended meanwhile; else it has something to say.
            time.sleep(SECONDS_TO_SPEAK)
        return True
    try:
        return _store().add("failures", 1) == 1
    except RuntimeError:  # the store is gone, and with it whoever held it
        return True


def from_main(value: T) -> T:
    """The main process's `value`, in every process."""
    values = [value]
    if active():
        dist.broadcast_object_list(values)
    return values[0]


def gather(value: T, group: Any = None) -> list[T]:
    """Every process's `value`, in the order of ranks. `group`: a `side_group`, None for the usual one."""
    values: list[Any] = [value]
    if active():
        values = [None] * world_size()
        dist.all_gather_object(values, value, group=group)
    return values


def side_group() -> Any:
    """A group of the same processes for a thread that talks besides the main one. A collective."""
    return dist.new_group(backend="gloo", timeout=TIMEOUT) if active() else None


@contextlib.contextmanager
def one_per_machine_first() -> Iterator[None]:
    """The first process of each machine runs the block (which fills a cache), then the others.

    That may take hours. So nobody waits for it in a collective, which ends in time: the first processes give signs of
    life, and the others look for them. Raises UserError if they end before the block does.
    """
    if not active():
        yield
        return
    first = local_rank() == 0
    key = f"{from_main(uuid.uuid4().hex)}/{rank()}"
    keys = gather(key if first else "")
    if first:
        with _signs_of_life(key):
            yield
        _store().set(f"{key}/done", "")
    for other, its_key in enumerate(keys):
        if its_key:
            _wait_for(other, its_key)
    if not first:
        yield


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


@contextlib.contextmanager
def _signs_of_life(key: str) -> Iterator[None]:
    """While inside, count up `key` in the store every few seconds."""
    store, left = _store(), threading.Event()

    def beat() -> None:
        with contextlib.suppress(RuntimeError):  # the store is gone, and with it whoever looks
            while not left.wait(HEARTBEAT):
                store.add(key, 1)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        left.set()
        thread.join()


def _wait_for(process: int, key: str) -> None:
    """Until `process` is done with what `key` stands for. Raises UserError once it gives no signs of life."""
    store = _store()
    seen, since = -1, time.monotonic()
    while not store.check([f"{key}/done"]):
        signs = store.add(key, 0)
        if signs != seen:
            seen, since = signs, time.monotonic()
        elif time.monotonic() - since > DEAD_AFTER:
            raise UserError(f"process {process} prepares the data, and gave no sign of life for {DEAD_AFTER:.0f} s")
        time.sleep(HEARTBEAT / 10)


# The mesh -------------------------------------------------------------------------------------------------------------


def build_mesh(sharding: Sharding | None, device: torch.device) -> None:
    """Arrange the group's processes as `sharding` asks; None: each for itself."""
    global _mesh
    if sharding is not None:
        sizes = (sharding.replicate, sharding.shard, sharding.tensor)
        _mesh = init_device_mesh(device.type, sizes, mesh_dim_names=MESH)


def data_rank() -> int:
    """Which share of a batch is this process's, of `data_ranks()`."""
    if _mesh is None:
        return 0
    return _mesh.get_local_rank("replicate") * _mesh["shard"].size() + _mesh.get_local_rank("shard")


def data_ranks() -> int:
    return 1 if _mesh is None else _mesh["replicate"].size() * _mesh["shard"].size()


def sum_over_data(values: Sequence[float]) -> list[float]:
    """Element-wise sum over data ranks, in float64."""
    if _mesh is None:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64)
    if _mesh.get_local_rank("tensor"):
        total.zero_()  # the same numbers as those of tensor rank 0
    dist.all_reduce(total)
    return total.tolist()


def any_process(here: bool) -> bool:
    """Whether `here` is true in any process of the group."""
    return any(gather(here))


def gather_over_data(values: list[T]) -> list[list[T]]:
    """Every data rank's list, in the order of data ranks."""
    found = dict(gather((data_rank(), values)))
    return [found[i] for i in sorted(found)]


# Models ---------------------------------------------------------------------------------------------------------------


def sharded(model_class: type[PreTrainedModel], sharding: Sharding) -> type[PreTrainedModel]:
    """A subclass whose `from_pretrained` shards the model while it is on the meta device, then reads only its shards.

    The subclass stands in for the two steps of transformers' own distributed loading that build a mesh and apply FSDP:
    ours have the settings of `Sharding`.
    """
    assert _mesh is not None
    mesh = SimpleNamespace(get_mesh=lambda names: _mesh)
    place = torch.device("cpu") if sharding.cpu_offload else mesh_device(_mesh)

    def prepare_distribute_model(cls: Any, config: Any, device_map: Any = None) -> Any:
        return config, place, mesh

    def maybe_distribute_model(model: PreTrainedModel, config: Any, mesh: Any) -> PreTrainedModel:
        return shard_model(model, sharding)

    steps = {
        "__module__": model_class.__module__,  # by which transformers knows the model, and its names in files
        "prepare_distribute_model": classmethod(prepare_distribute_model),
        "maybe_distribute_model": staticmethod(maybe_distribute_model),
    }
    return type(model_class.__name__, (model_class,), steps)


def loading_options() -> dict[str, Any]:
    """What `from_pretrained` of a `sharded` class needs besides its usual arguments."""
    return {"distributed_config": DistributedConfig()}


def shard_model(model: PreTrainedModel, sharding: Sharding) -> PreTrainedModel:
    """Turn the parameters into DTensors, tensor parallelism first, and let FSDP gather them block by block.

    Raises UserError for a model or block name that does not fit.
    """
    assert _mesh is not None
    if sharding.tensor > 1:
        _apply_tensor_parallelism(model, _mesh["tensor"])
    if not sharding.fsdp:
        return model
    options: dict[str, Any] = {
        "mesh": _mesh["replicate", "shard"] if sharding.replicate > 1 else _mesh["shard"],
        "mp_policy": MixedPrecisionPolicy(param_dtype=sharding.compute_dtype, reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy() if sharding.cpu_offload else OffloadPolicy(),
        "reshard_after_forward": sharding.reshard_after_forward,
    }
    tied = bool(getattr(model, "all_tied_weights_keys", None))
    # The head stays with the model as a whole: it runs several times in a forward pass, and would be gathered as often.
    embeddings: list[Any] = [] if tied else [model.get_input_embeddings()]
    for module in [*blocks(model, sharding.block_name), *embeddings, model]:
        fully_shard(module, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):  # gradients are sums over processes: the loss is divided by the global batch
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return model


def blocks(model: PreTrainedModel, name: str | None) -> list[torch.nn.Module]:
    names = {name} if name else set(getattr(model, "_no_split_modules", None) or ())
    found = [module for module in model.modules() if type(module).__name__ in names]
    if not found:
        lists = (m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
        there = sorted({type(module).__name__ for modules in lists for module in modules})
        raise UserError(
            f"model.block_name={name}: {type(model).__name__} has no such module; its repeated blocks are "
            f"{', '.join(there)}" + ("; leave model.block_name=null to take the model's own" if name else "")
        )
    return found


class _SharedByHeads(TensorParallelLayer):
    """A norm whose weight every rank applies to its own heads: the weight's gradient is the sum over ranks.

    transformers' own style adds up `.grad` after each backward pass, which is wrong once gradients accumulate.
    """

    @contextlib.contextmanager
    def context_around_forward(self, module: Any, mesh: DeviceMesh) -> Iterator[None]:
        own = dict(module._parameters)
        for name, weight in own.items():
            shared = DTensor.from_local(weight, mesh, [Replicate()], run_check=False)
            module._parameters[name] = shared.to_local(grad_placements=[Partial()])
        try:
            yield
        finally:
            module._parameters.update(own)


ALL_PARALLEL_STYLES.register("vocabulary_parallel", ColwiseParallel(use_local_output=False))  # type: ignore[arg-type]
ALL_PARALLEL_STYLES.register("shared_by_heads", _SharedByHeads())  # type: ignore[arg-type]


def _apply_tensor_parallelism(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    plan = dict(model.tp_plan or {})
    name = f"{type(model).__name__} (model_type {model.config.model_type})"
    unknown = sorted(set(plan.values()) - TESTED_STYLES)
    if not plan or unknown:
        reason = f"its plan uses {', '.join(unknown)}" if unknown else "transformers has no plan for it"
        raise UserError(
            f"trainer=TensorParallelTrainer cannot split {name}: {reason}. It works for models such as llama, mistral, "
            "qwen2, qwen3, gpt_neox and olmo2; use trainer=FSDPTrainer"
        )
    config = model.config.get_text_config()
    for key in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, key, None)
        if heads is not None and heads % mesh.size():
            fits = [n for n in range(1, heads + 1) if heads % n == 0]
            raise UserError(f"tensor_parallel_size={mesh.size()} does not divide {key}={heads} of {name}; try {fits}")
    ends = {
        model.get_input_embeddings(): "embedding_rowwise",
        model.get_output_embeddings(): "vocabulary_parallel",
    }
    plan |= {path: ends[module] for path, module in model.named_modules() if module in ends}
    plan = {path: OUR_STYLES.get(style, style) for path, style in plan.items()}
    apply_tensor_parallelism(model, mesh, model._expand_parallel_plan(plan))


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor; a collective where it is sharded."""
    if not isinstance(tensor, DTensor):
        return tensor
    there: Any = tensor.to(tensor.device_mesh.device_type)
    return there.full_tensor()


def contiguous(tensor: Tensor) -> Tensor:
    """A DTensor sharded in whole pieces only, as torch's checkpoints can write; a collective."""
    if not isinstance(tensor, DTensor):
        return tensor
    placements = [Shard(p.dim) if isinstance(p, _StridedShard) else p for p in tensor.placements]
    return tensor.redistribute(placements=placements)


def as_sharded(tensor: Tensor, like: Tensor) -> Tensor:
    """Undo `contiguous`."""
    if not isinstance(tensor, DTensor) or not isinstance(like, DTensor):
        return tensor
    return tensor.redistribute(placements=like.placements)


def device_of(tensor: Tensor) -> torch.device:
    """Where a parameter is computed with: its device, or that of its mesh where it is offloaded."""
    return mesh_device(tensor.device_mesh) if isinstance(tensor, DTensor) else tensor.device


def mesh_device(mesh: DeviceMesh) -> torch.device:
    """This process's device of a mesh."""
    kind = mesh.device_type
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


def move_buffers(model: PreTrainedModel) -> PreTrainedModel:
    """Put buffers where the model computes, which is elsewhere than its weights where those are offloaded."""
    assert _mesh is not None
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(mesh_device(_mesh)))
    return model


def reshard(model: torch.nn.Module) -> None:
    """Free the gathered weights that a forward pass leaves for a backward pass, where none comes."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    if isinstance(model, FSDPModule):
        model.reset_iter_state()


def casts_itself(model: torch.nn.Module) -> bool:
    """Whether FSDP gives the model its parameters in the compute type, so that autocast is not needed."""
    return isinstance(model, FSDPModule)


def by_mesh(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """`tensors` in groups that one fused operation can handle: the same mesh, or none."""
    groups: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.device_mesh if isinstance(tensor, DTensor) else None, []).append(tensor)
    return list(groups.values())


def clip_grad_norm(parameters: Sequence[Tensor], max_norm: float) -> float:
    """Scale gradients down to L2 norm `max_norm` where theirs is larger. Returns the norm before that."""
    groups = by_mesh([p for p in parameters if p.grad is not None])
    norms = [torch.nn.utils.get_total_norm([p.grad for p in group]) for group in groups]  # type: ignore[misc]
    total = math.hypot(*(float(full(norm)) for norm in norms))
    if not math.isfinite(total):
        return total  # the gradients stay as they are, to be looked at
    for parameters in groups:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, torch.tensor(total))
    return total


class _LabelLogps(torch.autograd.Function):
    """log softmax(logits)[label] with one more tensor of the logits' size, which backward turns into their gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        logps = torch.log_softmax(logits, -1, dtype=torch.float32)
        ctx.save_for_backward(logps, labels)
        ctx.dtype = logits.dtype
        return logps.gather(-1, labels[..., None]).squeeze(-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        logps, labels = ctx.saved_tensors
        ours = logps.exp_().mul_(-grad[..., None])
        return ours.scatter_add_(-1, labels[..., None], grad[..., None]).to(ctx.dtype), None


def label_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """log softmax(logits)[label] in nats, float32 of the labels' shape.

    Logits whose vocabulary is sharded stay so: the ranks exchange one maximum, one sum and one logit a position.
    """
    if not isinstance(logits, DTensor):
        return _LabelLogps.apply(logits, labels)
    mesh, shard = logits.device_mesh, logits.to_local().float()

    def total(part: Tensor) -> Tensor:
        return DTensor.from_local(part, mesh, [Partial()], run_check=False).full_tensor()

    highest = shard.detach().amax(-1)
    dist.all_reduce(highest, dist.ReduceOp.MAX, mesh.get_group())
    shifted = shard - highest[..., None]
    index = labels - math.ceil(logits.shape[-1] / mesh.size()) * mesh.get_local_rank()
    here = (index >= 0) & (index < shard.shape[-1])
    logit = shifted.gather(-1, index.clamp(0, shard.shape[-1] - 1)[..., None]).squeeze(-1)
    return total(torch.where(here, logit, 0.0)) - total(shifted.exp().sum(-1)).log()


@contextlib.contextmanager
def whole_logits(model: PreTrainedModel) -> Iterator[None]:
    """Gather the vocabulary of the logits, for sampling."""
    head: Any = model.get_output_embeddings()
    hook = head.register_forward_hook(lambda module, inputs, logits: full(logits))
    try:
        yield
    finally:
        hook.remove()


def all_finite(model: torch.nn.Module) -> bool:
    """Whether every weight, in every process, is finite."""
    return all(gather(all(bool(local(p).isfinite().all()) for p in model.parameters())))


def describe() -> str:
    """The group for the log, such as "4 processes: 2 shards x 2 tensor parallel"."""
    if _mesh is None or world_size() == 1:
        return "one process"
    sizes = zip(_mesh.shape, ("copies", "shards", "tensor parallel"))
    return f"{world_size()} processes: {' x '.join(f'{size} {name}' for size, name in sizes if size > 1)}"
