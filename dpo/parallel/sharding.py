"""Sharded models: the mesh of processes, FSDP, tensor parallelism, and the tensors that result.

A mesh has three dimensions: model copies (`replicate`) x FSDP shards (`shard`) x tensor parallelism (`tensor`).
Processes that differ in the first two compute different examples ("data ranks"). Those that differ in the last compute
the same examples together. A sharded model remembers its mesh, so a function that needs data ranks takes the model.
"""

import contextlib
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from transformers import PreTrainedModel
from transformers.distributed.tensor_parallel import apply_tensor_parallelism

from dpo.parallel.processes import T, gather, world_size
from dpo.utils import UserError

MESH_OF_MODEL = "process_mesh"  # attribute of a sharded model
MESH = ("replicate", "shard", "tensor")
# Styles of transformers' tensor-parallel plans that are tested against a single process. Others (experts) are refused.
TESTED_STYLES = set(
    "colwise rowwise colwise_gather_output rowwise_split_input embedding_rowwise replicated_with_grad_allreduce".split()
)
# Styles that dpo.model.patches registers: a replacement of transformers' own, and one for the head.
OUR_STYLES = {"replicated_with_grad_allreduce": "shared_by_heads"}
HEAD_STYLE = "vocabulary_parallel"
# torch warns each time that a tensor sharded by both FSDP and tensor parallelism is gathered, which takes two steps.
logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)


@dataclass(frozen=True)
class Sharding:
    """How a model lies over processes: mesh sizes, FSDP's settings, and the mesh itself after `on_mesh`."""

    replicate: int
    shard: int
    tensor: int
    block_name: str | None = None
    compute_dtype: torch.dtype = torch.float32
    reshard_after_forward: bool = True
    cpu_offload: bool = False
    mesh: DeviceMesh | None = None

    @property
    def fsdp(self) -> bool:
        """Whether FSDP holds the parameters. It does not under tensor parallelism alone."""
        return self.tensor == 1 or self.shard * self.replicate > 1

    @property
    def device(self) -> torch.device:
        """Where this process loads its shards."""
        assert self.mesh is not None
        return torch.device("cpu") if self.cpu_offload else _mesh_device(self.mesh)

    def on_mesh(self, device: torch.device) -> "Sharding":
        """Return a copy that holds a mesh of the group's processes. A collective."""
        sizes = (self.replicate, self.shard, self.tensor)
        return replace(self, mesh=init_device_mesh(device.type, sizes, mesh_dim_names=MESH))

    def __str__(self) -> str:
        """Such as "4 processes: 2 shards x 2 tensor parallel"."""
        sizes = ((self.replicate, "copies"), (self.shard, "shards"), (self.tensor, "tensor parallel"))
        return f"{world_size()} processes: {' x '.join(f'{size} {name}' for size, name in sizes if size > 1)}"


def data_ranks(model: torch.nn.Module) -> int:
    """Return the number of data ranks of a model: into how many shares its batches are dealt."""
    return math.prod(size for size, _ in _data_dimensions(model))


def data_rank(model: torch.nn.Module) -> int:
    """Return which of the `data_ranks` shares this process computes."""
    number = 0
    for size, position in _data_dimensions(model):
        number = number * size + position
    return number


def gather_over_data(model: torch.nn.Module, value: T) -> list[T]:
    """Return the `value` of every data rank of `model`, in their order. A collective."""
    by_rank = dict(gather((data_rank(model), value)))
    return [by_rank[i] for i in sorted(by_rank)]


def _data_dimensions(model: torch.nn.Module) -> list[tuple[int, int]]:
    """Return (size, this process's position) in the mesh's dimensions `replicate` and `shard`.

    The mesh is remembered by `shard_model`: while FSDP has gathered the parameters, they do not tell.
    """
    mesh: DeviceMesh | None = vars(model).get(MESH_OF_MODEL)
    if mesh is None:
        return []
    dimensions = enumerate(mesh.mesh_dim_names or ())
    return [(mesh.size(i), mesh.get_local_rank(i)) for i, name in dimensions if name != "tensor"]


def shard_model(model: PreTrainedModel, sharding: Sharding) -> PreTrainedModel:
    """Turn the parameters into DTensors: by tensor parallelism first, then by FSDP, block by block.

    Raises UserError for a model or block name that does not fit.
    """
    vars(model)[MESH_OF_MODEL] = sharding.mesh
    mesh = sharding.mesh
    assert mesh is not None
    if sharding.tensor > 1:
        _apply_tensor_parallelism(model, mesh["tensor"])
    if not sharding.fsdp:
        return model
    options: dict[str, Any] = {
        "mesh": mesh["replicate", "shard"] if sharding.replicate > 1 else mesh["shard"],
        "mp_policy": MixedPrecisionPolicy(param_dtype=sharding.compute_dtype, reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy() if sharding.cpu_offload else OffloadPolicy(),
        "reshard_after_forward": sharding.reshard_after_forward,
    }
    tied = bool(getattr(model, "all_tied_weights_keys", None))
    # The head is no unit of its own: it runs several times in a forward pass, and would be gathered each time.
    embeddings: list[Any] = [] if tied else [model.get_input_embeddings()]
    for module in [*blocks(model, sharding.block_name), *embeddings]:
        fully_shard(module, **options)
    fully_shard(model, **options | {"reshard_after_forward": False})  # backward begins with the head, which is here
    for module in embeddings:
        module.set_unshard_in_backward(False)  # their gradient needs no weights
    for module in fsdp_modules(model):  # gradients are sums over processes: the loss is divided by the global batch
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    return model


def fsdp_modules(model: torch.nn.Module) -> Iterator[FSDPModule]:
    return (module for module in model.modules() if isinstance(module, FSDPModule))


def blocks(model: PreTrainedModel, name: str | None) -> list[torch.nn.Module]:
    """Return the model's repeated blocks: the modules of class `name`; None: of the classes that the model names."""
    names = {name} if name else set(getattr(model, "_no_split_modules", None) or ())
    found = [module for module in model.modules() if type(module).__name__.removeprefix("FSDP") in names]
    if not found:
        lists = (m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
        classes = sorted({type(module).__name__ for modules in lists for module in modules})
        raise UserError(
            f"model.block_name={name}: {type(model).__name__} has no such module; its repeated blocks are "
            f"{', '.join(classes)}" + ("; leave model.block_name=null to take the model's own" if name else "")
        )
    return found


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
    ends = {model.get_input_embeddings(): "embedding_rowwise", model.get_output_embeddings(): HEAD_STYLE}
    plan |= {path: ends[module] for path, module in model.named_modules() if module in ends}
    plan = {path: OUR_STYLES.get(style, style) for path, style in plan.items()}
    apply_tensor_parallelism(model, mesh, model._expand_parallel_plan(plan))


def with_summed_gradient(weight: Tensor, mesh: DeviceMesh) -> Tensor:
    """Return `weight`, the same on all ranks of `mesh`, with a gradient that is the sum over these ranks."""
    shared = DTensor.from_local(weight, mesh, [Replicate()], run_check=False)
    return shared.to_local(grad_placements=[Partial()])


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor. A collective if it is sharded."""
    if not isinstance(tensor, DTensor):
        return tensor
    on_device: Any = tensor.to(tensor.device_mesh.device_type)
    return on_device.full_tensor()


def contiguous(tensor: Tensor) -> Tensor:
    """Redistribute a DTensor so that each shard is one piece, which torch's checkpoints can write. A collective."""
    if not isinstance(tensor, DTensor):
        return tensor
    placements = [Shard(p.dim) if isinstance(p, _StridedShard) else p for p in tensor.placements]
    return tensor.redistribute(placements=placements)


def as_sharded(tensor: Tensor, like: Tensor) -> Tensor:
    """Undo `contiguous`: redistribute `tensor` as `like` is."""
    if not isinstance(tensor, DTensor) or not isinstance(like, DTensor):
        return tensor
    return tensor.redistribute(placements=like.placements)


def device_of(tensor: Tensor) -> torch.device:
    """Return where a parameter is computed with: the device of its mesh if it is sharded, since it may be offloaded."""
    return _mesh_device(tensor.device_mesh) if isinstance(tensor, DTensor) else tensor.device


def _mesh_device(mesh: DeviceMesh) -> torch.device:
    kind = mesh.device_type
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


def move_buffers(model: PreTrainedModel) -> PreTrainedModel:
    """Put the buffers of a sharded model on the device it computes on. Offloaded weights lie elsewhere."""
    device = next(device_of(p) for p in model.parameters() if isinstance(p, DTensor))
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    return model


def reshard(model: torch.nn.Module) -> None:
    """Free the weights that a forward pass has gathered, if no backward pass follows."""
    for module in fsdp_modules(model):
        module.reshard()
    if isinstance(model, FSDPModule):
        model.reset_iter_state()


def casts_itself(model: torch.nn.Module) -> bool:
    """Return whether FSDP casts the parameters to the compute type, so that autocast is not needed."""
    return isinstance(model, FSDPModule)


def by_mesh(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Group `tensors` by mesh (or none): one fused operation takes tensors of one mesh only."""
    groups: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.device_mesh if isinstance(tensor, DTensor) else None, []).append(tensor)
    return list(groups.values())


def grad_norm(parameters: Sequence[Tensor]) -> Tensor:
    """Return the gradients' L2 norm. A collective; the host does not wait for it."""
    groups = by_mesh([p for p in parameters if p.grad is not None])
    norms = [full(torch.nn.utils.get_total_norm([p.grad for p in group])) for group in groups]  # type: ignore[misc]
    return norms[0] if len(norms) == 1 else torch.stack([norm.double() for norm in norms]).norm()


def clip_gradients(parameters: Sequence[Tensor], max_norm: float, norm: float) -> None:
    """Scale gradients down to L2 norm `max_norm` if theirs, `norm`, is larger.

    A norm that is not finite leaves the gradients as they are, to be looked at.
    """
    factor = float(max_norm / (torch.tensor(norm) + 1e-6))  # float32, as torch.nn.utils.clip_grad_norm_ has it
    if math.isfinite(norm) and factor < 1:
        for group in by_mesh([p for p in parameters if p.grad is not None]):
            torch._foreach_mul_([p.grad for p in group], factor)  # type: ignore[misc]


def reduce_gradients(model: torch.nn.Module, now: bool) -> None:
    """Let the next backward pass of a model under FSDP sum its gradients over processes and free the gathered weights;
    or (`now` false) keep both whole, without traffic. That takes 4 and 2 bytes a parameter, in bfloat16."""
    for module in fsdp_modules(model):
        module.set_requires_gradient_sync(now, recurse=False)
        module.set_reshard_after_backward(now, recurse=False)


@contextlib.contextmanager
def whole_weights(model: torch.nn.Module, read: bool) -> Iterator[None]:
    """Let the modules of a sharded model have their weights whole inside the block, for what looks at them.

    `read`: all are gathered, a collective; otherwise only their shapes are right.
    """
    held: list[tuple[torch.nn.Module, str, Any]] = []
    for module in model.modules():
        held += [(module, name, p) for name, p in module._parameters.items() if isinstance(p, DTensor)]
    for module, name, parameter in held:
        shape, like = parameter.shape, {"dtype": parameter.dtype, "device": parameter.device}
        whole = full(parameter.detach()) if read else torch.empty((), **like).expand(shape)
        module._parameters[name] = torch.nn.Parameter(whole, requires_grad=False)
    try:
        yield
    finally:
        for module, name, parameter in held:
            module._parameters[name] = parameter


def sum_gradients(model: torch.nn.Module) -> None:
    """Sum the gradients of an adapter, which each process of a sharded model holds whole. A collective.

    FSDP does that for what it holds. Tensor parallelism, which has no adapters, gives whole weights whole gradients.
    """
    mesh: DeviceMesh | None = vars(model).get(MESH_OF_MODEL)
    if mesh is None or mesh["tensor"].size() > 1:
        return
    whole = [p for p in model.parameters() if p.requires_grad and not isinstance(p, DTensor)]
    for parameter in whole:
        if parameter.grad is None:  # no example of this process needed it, but those of others may have
            parameter.grad = torch.zeros_like(parameter)
    if whole:
        flat = torch.cat([p.grad.flatten().float() for p in whole])  # type: ignore[union-attr]
        dist.all_reduce(flat)
        for parameter, total in zip(whole, flat.split([p.numel() for p in whole]), strict=True):
            parameter.grad = total.view_as(parameter).to(parameter.dtype)


def all_finite(model: torch.nn.Module) -> bool:
    """Return whether every weight, in every process, is finite. A collective."""
    return all(gather(all(_is_finite(local(p).detach()) for p in model.parameters())))


def _is_finite(tensor: Tensor) -> bool:
    """Return whether all entries are finite. Their sum tells, unless it overflows, in a tenth of the time."""
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


class _LabelLogps(torch.autograd.Function):
    """log softmax(logits)[label]. It keeps one more tensor of the logits' size, which becomes their gradient."""

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
    """Return log softmax(logits)[label] in nats, float32 of the labels' shape.

    Logits of a sharded vocabulary stay sharded: the ranks exchange one maximum, one sum and one logit per position.
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
    in_shard = (index >= 0) & (index < shard.shape[-1])
    logit = shifted.gather(-1, index.clamp(0, shard.shape[-1] - 1)[..., None]).squeeze(-1)
    return total(torch.where(in_shard, logit, 0.0)) - total(shifted.exp().sum(-1)).log()


@contextlib.contextmanager
def whole_logits(model: PreTrainedModel) -> Iterator[None]:
    """Gather the vocabulary of the logits inside the block, for sampling."""
    head: Any = model.get_output_embeddings()
    hook = head.register_forward_hook(lambda module, inputs, logits: full(logits))
    try:
        yield
    finally:
        hook.remove()
