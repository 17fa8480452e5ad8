"""What a training step asks of its device: memory by phase and kind, operations, bytes, waits, collectives.

It watches every operation as it is dispatched, of fake tensors or of real ones.
"""

import contextlib
import traceback
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from dpo import parallel
from dpo.utils import ROOT

# Operations that start no kernel: they make a tensor without filling it, or another view of one.
NO_KERNEL = set(
    "empty empty_like new_empty empty_strided new_empty_strided detach alias _unsafe_view lift_fresh record_stream "
    "_reshape_alias set_ resize_".split()
)
# Operations that read or write a few entries of their first tensor.
PICKING = ("gather", "index", "index_select", "embedding", "scatter_add_", "index_put_", "index_add_")
ACTIVATIONS, LOGITS, WEIGHTS, GRADIENTS, STATES = "activations", "logits", "weights", "gradients", "optimizer state"
GATHERED, TEMPORARY = "gathered weights", "temporary"
KINDS = (WEIGHTS, GRADIENTS, STATES, GATHERED, ACTIVATIONS, LOGITS, TEMPORARY)
aten = torch.ops.aten


class Tracker(TorchDispatchMode):
    """Counts what the operations inside its block do on a kind of device. `vocabulary` tells logits from the rest.

    `peak[phase]` holds the bytes by kind at the moment when most were allocated; `flops`, `bytes` (moved) and `seconds`
    are of all phases; `waits` and `collectives` by what they are. `cost` gives the seconds of a kernel from its
    operations, the bytes of its numbers, and the bytes that it moves. `reset` forgets all but what is allocated.
    """

    def __init__(self, device: str, vocabulary: int = 0):
        super().__init__()
        self.device, self.vocabulary, self.phase = device, vocabulary, ""
        self.sizes: dict[int, tuple[int, str]] = {}
        self.now: Counter[str] = Counter()
        self.reset()

    def reset(self) -> None:
        """Forget what was counted. What is allocated stays known."""
        self.peak: dict[str, Counter[str]] = {}
        self.kernels = self.flops = self.bytes = 0
        self.waits: Counter[str] = Counter()
        self.collectives: Counter[str] = Counter()
        self.traffic: Counter[str] = Counter()
        self.seconds = 0.0
        self.cost: Callable[[int, int, int], float] = lambda flops, size, moved: 0.0

    # Memory ------------------------------------------------------------------------------------------------------

    def _see(self, tensor: Tensor, kind: str | None = None) -> None:
        """Take in a tensor's storage if it is new, or label it anew if `kind` is given."""
        if tensor.device.type != self.device:
            return
        storage = parallel.local(tensor).untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        is_new = key not in self.sizes
        if is_new or kind is not None:
            self._hold(key, size, kind or self._kind_of(tensor))
        if is_new:
            weakref.finalize(storage, self._forget, key)

    def _kind_of(self, tensor: Tensor) -> str:
        if self.phase == "optimizer":
            return TEMPORARY
        is_logits = tensor.ndim > 1 and tensor.shape[-1] == self.vocabulary
        return LOGITS if is_logits else ACTIVATIONS

    def _hold(self, key: int, size: int, kind: str) -> None:
        self._forget(key)
        self.sizes[key] = size, kind
        self.now[kind] += size
        if self.phase not in self.peak or self.now.total() > self.peak[self.phase].total():
            self.peak[self.phase] = self.now.copy()

    def _forget(self, key: int) -> None:
        size, kind = self.sizes.pop(key, (0, ACTIVATIONS))
        self.now[kind] -= size

    def label(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Say what kind of memory `tensors` hold."""
        for tensor in tensors:
            self._see(tensor, kind)

    def __enter__(self) -> Any:
        """Watch operations; storages that change their size, by which FSDP frees gathered weights; and not what DTensor
        computes of whole tensors to learn their shapes (torch 2.13)."""
        resize, learn = torch.UntypedStorage.resize_, ShardingPropagator._propagate_tensor_meta_non_cached

        def resize_(storage: Any, size: int) -> Any:
            found = resize(storage, size)
            if storage._cdata in self.sizes:
                self._hold(storage._cdata, size, GATHERED)
            return found

        def learn_(*arguments: Any, **more: Any) -> Any:
            with _disable_current_modes():
                return learn(*arguments, **more)

        self._patches = contextlib.ExitStack()
        self._patches.enter_context(mock.patch.object(torch.UntypedStorage, "resize_", resize_))
        self._patches.enter_context(mock.patch.object(ShardingPropagator, learn.__name__, learn_))
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._patches.close()

    # Operations --------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it calls operations of its local tensors, which come here
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default and args[0].device.type == self.device:
            self.wait("read one number")
            if isinstance(args[0], FakeTensor):
                return 1.0 if args[0].is_floating_point() else 1
        result = func(*args, **kwargs)
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        for tensor in (*given, *made):
            self._see(tensor)
        if any(t.device.type == self.device for t in (*given, *made)):
            self._count(func, args, kwargs, given, made, result)
        return result

    def _count(self, func: Any, args: Any, kwargs: Any, given: list[Tensor], made: list[Tensor], result: Any) -> None:
        name = func._schema.name.partition("::")[2]
        if "c10d" in func.namespace:
            self.collectives[name] += 1
            self.traffic[name] += max((_bytes(t) for t in given), default=0)
            return
        if func in (aten._to_copy.default, aten.copy_.default):
            source, target = (given[0], made[0]) if func is aten._to_copy.default else (given[1], given[0])
            if source.device.type != target.device.type and self.device != "cpu":
                queued = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
                if not queued:
                    self.wait(f"copy from {source.device.type} to {target.device.type}")
        if func.is_view or name in NO_KERNEL or func.namespace == "prim":
            return
        if name in PICKING:
            picked = _bytes(made[0]) if name[-1] != "_" else _bytes(given[-1])
            self.work(name, 0, 4, 2 * picked + sum(_bytes(t) for t in given[1:]))
            return
        inputs = {id(t) for t in given}
        moved = sum(map(_bytes, given)) + sum(_bytes(t) for t in made if id(t) not in inputs)
        if name.endswith("_") and name != "copy_":  # in place: read and written
            moved += sum(_bytes(t) for t in tree_leaves(args[0]) if isinstance(t, Tensor))
        counter = flop_registry.get(func._overloadpacket)
        flops = int(counter(*args, **kwargs, out_val=result)) if counter is not None else 0
        self.work(name, flops, min((t.element_size() for t in given), default=4), moved)

    def work(self, name: str, flops: int, size: int, moved: int) -> None:
        """Count a kernel of `flops` operations on numbers of `size` bytes that moves `moved` bytes."""
        self.kernels += 1
        self.flops += flops
        self.bytes += moved
        self.seconds += self.cost(flops, size, moved)

    def wait(self, reason: str) -> None:
        """Count that the host waits for the device, and where in the project."""
        frames = [f for f in traceback.extract_stack() if Path(f.filename).is_relative_to(ROOT)]
        own = [f for f in frames if ".venv" not in f.filename and "/plan/" not in f.filename]
        place = f"{Path(own[-1].filename).relative_to(ROOT)}, {own[-1].name}" if own else "?"
        self.waits[f"{reason}: {place}"] += 1


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
