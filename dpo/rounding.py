"""Numbers in fewer bits: bfloat16 by stochastic rounding, and 8 bits in blocks with a scale."""

import functools
import hashlib
import importlib
import logging
import math
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard

NOISE_BLOCK = 2**20  # numbers that are drawn at once
SCALE_BLOCK = 256  # numbers that share a scale, neighbours in the last dimension


def first_position(tensor: Tensor) -> int:
    """Return where the random numbers of this process's part of `tensor` begin.

    Parts of different content have different numbers, and copies the same. If the first dimension alone is sharded,
    this is the part's place in the whole tensor: an element's number then does not depend on the number of processes.
    """
    if not isinstance(tensor, DTensor):
        return 0
    part, sizes = 0, list(tensor.shape)
    for dimension, placement in enumerate(tensor.placements):
        if isinstance(placement, Shard | _StridedShard):
            n = tensor.device_mesh.size(dimension)
            part = part * n + tensor.device_mesh.get_local_rank(dimension)
            sizes[placement.dim] = -(-sizes[placement.dim] // n)
    return part * math.prod(sizes)


def noise(key: str, start: int, shape: torch.Size, block: int, device: torch.device) -> Tensor:
    """Return random whole numbers in [0, 2^16), int32 of `shape`.

    They are the numbers from position `start` of an endless sequence that `key` alone decides on each kind of device.
    It is drawn in whole blocks of `block` numbers.
    """
    count, parts = shape.numel(), [torch.empty(0, dtype=torch.int32, device=device)]
    for number in range(start // block, -(-(start + count) // block)):
        seed = hashlib.blake2b(f"{key}/{number}".encode(), digest_size=8).digest()
        generator = torch.Generator(device).manual_seed(int.from_bytes(seed) >> 1)
        drawn = torch.empty(block, dtype=torch.int32, device=device).random_(0, 2**16, generator=generator)
        parts.append(drawn[max(start - number * block, 0) : start + count - number * block])
    return (parts[1] if len(parts) == 2 else torch.cat(parts)).view(shape)


def round_stochastically(target: Tensor, values: Tensor, random: Tensor) -> None:
    """Write float32 `values`, which are overwritten, into the bfloat16 tensor `target`.

    A value between two neighbouring bfloat16 numbers becomes the one or the other, with probabilities that make its
    expectation the value itself. `random` are numbers in [0, 2^16), int32 of the same shape.
    """
    random = random.masked_fill(values.isnan(), 0)  # the largest NaN would become 0
    bits = values.view(torch.int32)  # sign, exponent and fraction: the upper 16 are the next bfloat16 number towards 0
    target.copy_(bits.add_(random).bitwise_and_(-(2**16)).view(torch.float32))


@functools.cache
def code_of(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the 256 numbers in [-1, 1] or [0, 1] that 8 bits stand for, float32, and the 255 edges between them.

    They are bitsandbytes' dynamic map: Dettmers et al. 2022 (arXiv:2110.02861), section 2.
    """
    logging.getLogger("bitsandbytes.backends").setLevel(logging.ERROR)  # it tells of a kernel it lacks
    functional: Any = importlib.import_module("bitsandbytes.functional")
    numbers: Tensor = functional.create_dynamic_map(signed=signed)
    edges = (numbers[1:] + numbers[:-1]) / 2
    if not signed:
        edges[0] = 0.0  # a second moment above 0 must stay above 0: the step divides by its root
    return numbers.to(device), edges.to(device)


def encode(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Return float32 `values`, which may be overwritten, in 8 bits, uint8, and scales, the largest size in each block.

    The scales are float32 of shape [..., ceil(n / SCALE_BLOCK)] for values of shape [..., n].
    """
    n = values.shape[-1]
    width = min(SCALE_BLOCK, n)
    padded = torch.nn.functional.pad(values, (0, -n % width)) if n % width else values
    blocks = padded.unflatten(-1, (-1, width))
    scales = torch.maximum(blocks.amax(-1), -blocks.amin(-1))
    blocks.div_(scales.clamp_min(torch.finfo(torch.float32).tiny)[..., None])
    codes = torch.bucketize(blocks, code_of(signed, values.device)[1], out_int32=True)
    return codes.to(torch.uint8).flatten(-2)[..., :n], scales


def decode(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """Return the numbers that `encode` gave, float32."""
    numbers, _ = code_of(signed, codes.device)
    n = codes.shape[-1]
    values = numbers.index_select(0, codes.flatten().int()).view(codes.shape)
    return values.mul_(scales.repeat_interleave(min(SCALE_BLOCK, n), -1)[..., :n])
