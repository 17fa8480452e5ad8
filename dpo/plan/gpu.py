"""A GPU without memory and arithmetic, on any machine: torch's fake tensors on a device of their own.

torch's CPU build knows no CUDA device. PrivateUse1, torch's place for devices of other makers, can be filled from
Python. What is missing there, autocast, stands here, after CUDA's lists of operations (torch 2.13).
"""

import contextlib
import functools
import importlib
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend
from transformers import AttentionInterface

from dpo import parallel, rounding, scoring
from dpo.model.layouts import FLEX
from dpo.parallel import processes, sharding

NAME = "gpu"
# Operations of language models that CUDA's autocast computes in the lower type, and in float32. Others promote.
LOWER = "matmul mm bmm addmm linear baddbmm scaled_dot_product_attention conv1d".split()
FLOAT32 = (
    "exp log pow.Tensor_Scalar rsqrt softplus layer_norm softmax.int log_softmax.int logsumexp cumsum cumprod sum "
    "norm.Scalar"
).split()
KEY = "AutocastPrivateUse1"


class _Stream:
    """A stream of a device that computes nothing: all is done at once."""

    def __init__(self, *arguments: Any, **more: Any):
        self.device = torch.device(NAME, 0)

    def record_event(self, event: Any = None) -> Any:
        return event or _Event()

    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def synchronize(self) -> None: ...


class _Event:
    def __init__(self, *arguments: Any, **more: Any): ...
    def record(self, stream: Any = None) -> None: ...
    def wait(self, stream: Any = None) -> None: ...
    def synchronize(self) -> None: ...


class _Module(_DummyBackendModule):
    """What torch.cuda is for CUDA."""

    Stream, Event = _Stream, _Event

    def current_stream(self, device: Any = None) -> _Stream:
        return _Stream()

    def stream(self, stream: Any) -> Any:
        return contextlib.nullcontext()

    def synchronize(self, device: Any = None) -> None: ...
    def set_device(self, device: Any) -> None: ...
    def set_rng_state(self, state: Tensor, device: Any = None) -> None: ...

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


class _Casts:
    """autocast's cache: the casts of trained float32 weights, until the outermost autocast block ends."""

    def __init__(self) -> None:
        self.kept: dict[int, tuple[Any, Tensor]] = {}

    def __call__(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        if not tensor.is_floating_point() or tensor.dtype in (dtype, torch.float64) or tensor.device.type != NAME:
            return tensor
        kept = tensor.requires_grad and tensor.is_leaf and torch.is_autocast_cache_enabled()
        if not kept or dtype == torch.float32:
            return tensor.to(dtype)
        found = self.kept.get(id(tensor))
        if found is None or found[0]() is not tensor:
            found = self.kept[id(tensor)] = weakref.ref(tensor), tensor.to(dtype)
        return found[1]


CASTS = _Casts()


def _autocast(name: str, dtype: Callable[[], torch.dtype]) -> Callable[..., Any]:
    """Return the kernel of an operation that casts its arguments, then computes."""
    packet, _, overload = name.partition(".")
    operation = getattr(getattr(torch.ops.aten, packet), overload or "default")
    key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, KEY))

    def kernel(*arguments: Any, **more: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(key):
            wanted = dtype()
            cast = functools.partial(CASTS, dtype=wanted)
            return operation(*tree_map_only(Tensor, cast, arguments), **tree_map_only(Tensor, cast, more))

    return kernel


@functools.cache
def register() -> torch.device:
    """Make the device known to torch, once in a process. Return it."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    _add_kernels()
    return torch.device(NAME, 0)


@functools.cache
def _add_kernels() -> tuple[Any, ...]:
    """Add kernels to torch, and return their libraries: the cache keeps them, as torch forgets those that are gone."""
    others, aten = torch.library.Library("_", "IMPL", KEY), torch.library.Library("aten", "IMPL", KEY)
    others.fallback(torch.library.fallthrough_kernel)
    # Without a kernel, which is never called, torch would take this operation apart, as CUDA does not.
    kernels = torch.library.Library("aten", "IMPL", "PrivateUse1")
    kernels.impl("silu_backward", lambda *arguments: NotImplemented)
    for names, dtype in ((LOWER, lambda: torch.get_autocast_dtype(NAME)), (FLOAT32, lambda: torch.float32)):
        for name in names:
            aten.impl(name, _autocast(name, dtype), KEY)
    return others, aten, kernels


class _Attention(torch.autograd.Function):
    """What a fused attention kernel allocates and keeps: its output and the rows' log-sum-exp, then three gradients."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, count: Callable[[int, int, int], None]) -> Tensor:
        output, sums = torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, sums)
        ctx.count = count
        count(4, query.numel() * key.shape[2], query.element_size())
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        query, key, value, _, sums = ctx.saved_tensors
        torch.empty_like(sums)
        ctx.count(10, query.numel() * key.shape[2], query.element_size())
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


def attention(count: Callable[[int, int, int], None]) -> Callable[..., Any]:
    """Return what transformers calls for attention: a kernel without arithmetic. `count` is told the operations for
    each query, key and feature, the number of these, and the bytes of a number."""

    def compute(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **more: Any
    ) -> tuple[Tensor, None]:
        found = _Attention.apply(query.to(value.dtype), key.to(value.dtype), value, count)
        return found.transpose(1, 2).contiguous(), None

    return compute


@contextlib.contextmanager
def pretending(mode: FakeTensorMode, fake_attention: Callable[..., Any] | None) -> Iterator[None]:
    """Make tensors fake inside the block, in `mode`: they have a device and a size, and no content.

    Patched for that: reading tensors as lists, which gives ones; the end of autocast's cache; the thread that lays out
    batches, since modes of torch are a thread's own; the numbers of rounding; what other processes tell, who say the
    same; that an optimizer's foreach steps are for real tensors only; and transformers' attention, unless
    `fake_attention` is None.
    """
    clear = torch.clear_autocast_cache

    def tolist(tensor: Tensor) -> Any:
        first = tensor.flatten()[:1]
        return _ones(tensor.shape, first.item() if first.numel() else 1.0)

    def noise(key: str, start: int, shape: torch.Size, block: int, device: torch.device) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    def code_of(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
        return torch.empty(256, device=device), torch.empty(255, device=device)

    def gather(value: Any, group: Any = None) -> list[Any]:
        return [value] * parallel.world_size()

    def forget() -> None:
        clear()
        CASTS.kept.clear()

    known, optimizers = AttentionInterface._global_mapping, importlib.import_module("torch.optim.optimizer")
    foreach = [*optimizers._foreach_supported_types, FakeTensor]
    names = (FLEX, "sdpa", "eager") if fake_attention is not None else ()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(FakeTensor, "tolist", tolist))
        stack.enter_context(mock.patch.object(torch, "clear_autocast_cache", forget))
        stack.enter_context(mock.patch.object(scoring, "one_ahead", map))
        stack.enter_context(mock.patch.object(rounding, "noise", noise))
        stack.enter_context(mock.patch.object(rounding, "code_of", code_of))
        for module in (processes, sharding):
            stack.enter_context(mock.patch.object(module, "gather", gather))
        stack.enter_context(mock.patch.object(optimizers, "_foreach_supported_types", foreach))
        stack.enter_context(mock.patch.dict(known, dict.fromkeys(names, fake_attention)))
        stack.enter_context(mode)
        yield


def _ones(shape: Sequence[int], value: float) -> Any:
    return [_ones(shape[1:], value) for _ in range(shape[0])] if len(shape) else value


def join_fake_group(processes: int) -> None:
    """Make this process the first of a group of `processes` that do not exist: its collectives return at once."""
    os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(processes)})
    create: Any = dist.Backend._plugins["FAKE"].creator_fn
    dist.Backend.register_backend("fake_gpu", create, extended_api=True, devices=["cpu", NAME])
    dist.init_process_group(f"cpu:fake,{NAME}:fake_gpu", rank=0, world_size=processes, store=FakeStore())
