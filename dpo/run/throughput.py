"""The cost of a step: tokens, floating-point operations, memory."""

import resource
import sys
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from dpo import parallel
from dpo.data.batching import Batch, n_tokens, packed_width
from dpo.hardware import DEVICES


@dataclass(frozen=True)
class Cost:
    """Tokens of some batches: to compute each once, with padding, as a row for each response, and of responses."""

    distinct: int = 0
    computed: int = 0
    alone: int = 0
    predicted: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def cost_of(batch: Batch, layout: str) -> Cost:
    """Return the tokens of `batch` under `layout`."""
    trees = [n_tokens(len(tree.prompt), map(len, tree.responses)) for tree in batch.trees]
    rows = [n_tokens(len(tree.prompt), [len(r)]) for tree in batch.trees for r in tree.responses]
    computed = {"packed": packed_width(sum(trees)), "tree": len(trees) * max(trees), "padded": len(rows) * max(rows)}
    predicted = sum(len(response) for tree in batch.trees for response in tree.responses)
    return Cost(sum(trees), computed[layout], sum(rows), predicted)


def throughput(model: PreTrainedModel, cost: Cost, seconds: float) -> dict[str, float]:
    """Return metrics of a step of all processes that took `seconds`.

    Operations are 6 for each weight and each token that passes through it, as usual (Kaplan et al. 2020, section 2.1),
    4 for a frozen weight: those of the body for distinct tokens, those of the head for response tokens; attention
    scores, padding and what is computed twice are left out. `mfu` is their share of the device's peak in bfloat16, if
    that is known.
    """
    total = Cost(*map(sum, zip(*parallel.gather_over_data(model, astuple(cost)))))
    ends = {id(module.weight) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    body = sum(_operations(p) for p in model.parameters() if id(p) not in ends)
    head = _operations(model.get_output_embeddings().weight)
    flops = (body * total.distinct + head * total.predicted) / seconds
    device = torch.cuda.get_device_name() if parallel.device_of(next(model.parameters())).type == "cuda" else ""
    peak = next((known.bfloat16 for name, known in DEVICES.items() if name in device), None)
    return {
        "tokens_per_second": total.distinct / seconds,
        "tokens_distinct_over_computed": total.distinct / total.computed,
        "tokens_alone_over_distinct": total.alone / total.distinct,
        "flops_per_second": flops,
        "peak_memory_mib": peak_memory(bool(device)),
        **({"mfu": flops / peak / parallel.world_size()} if peak else {}),
    }


def _operations(weight: Any) -> int:
    """Return the operations of a weight tensor for each token. One of 4-bit weights holds two of them in a number."""
    packed = getattr(weight, "quant_state", None)
    return (6 if weight.requires_grad else 4) * (packed.shape.numel() if packed is not None else weight.numel())


def peak_memory(cuda: bool) -> float:
    """Return the peak memory of this process in MiB: allocated on its GPU, or resident."""
    if cuda:
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # Linux, whose ru_maxrss also counts what the parent had when it started this process
        return int(status.read_text(encoding="utf-8").partition("VmHWM:")[2].split()[0]) / 1024
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
