"""Log-probabilities of a batch's responses."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from dpo import parallel
from dpo.data.batching import Batch
from dpo.model.layouts import Rows, copied, lay_out, model_inputs, set_attention
from dpo.model.patches import logits_of

LOGITS_AT_ONCE, LOGITS_AT_ONCE_ON_GPU = 2**25, 2**28
"""Logits (positions x vocabulary) that exist at a time: 128 MiB in float32, and 1 GiB on a GPU, which needs more work
at a time to be busy."""
TILE = 256  # rows of a matrix product that GPUs compute together


@dataclass(frozen=True)
class TokenLogps:
    """log p(token | all before it) in nats, float32 [responses, longest response].

    `mask` is true for tokens that have a log-probability and count (see `batching.Tree`). Of the same shape, if asked
    for: `squares`, log sum_v p(v)^2 over the vocabulary, a constant; `kl`, KL(reference || model) of the next token.
    """

    logps: Tensor
    mask: Tensor
    squares: Tensor | None = None
    kl: Tensor | None = None

    def of(self, batch: Batch) -> "TokenLogps":
        """Return these, which are on the CPU, without the tokens of `batch` that do not count."""
        counted = batch.counted(self.mask.shape[1])
        return self if counted is None else replace(self, mask=self.mask & torch.from_numpy(counted))


@dataclass(frozen=True)
class Computation:
    """How log-probabilities are computed: the type of matrix products, and how trees lie on rows."""

    dtype: torch.dtype
    layout: str = "padded"
    flex: bool = False
    """Whether FlexAttention computes a packed row, instead of attention with a mask of all pairs of tokens."""
    tolerance: float = 1e-4
    """Largest difference between two ways of computing the same, in nats per token: rounding of `dtype`."""


@dataclass(frozen=True)
class Laid:
    """A micro-batch on the device that computes it: its rows; which response tokens count, bool [responses, longest
    response] (None: all do); and other tensors that were copied with them."""

    batch: Batch
    rows: Rows
    counted: Tensor | None
    others: Mapping[str, Tensor]


def place(batch: Batch, layout: str, device: torch.device, others: Mapping[str, Tensor] | None = None) -> Laid:
    """Return `batch`, and `others` of the CPU, on `device`. The host does not wait for it."""
    rows = lay_out(batch, layout)
    counted = batch.counted(rows.shape[1])
    masks = {"counted": torch.from_numpy(counted)} if counted is not None else {}
    moved: Any = copied({**rows.tensors, **masks, **(others or {})}, device)
    rows = replace(rows, **{name: moved[name] for name in rows.tensors})
    return Laid(batch, rows, moved.get("counted"), {name: moved[name] for name in others or {}})


def add_token_logps(model: PreTrainedModel) -> PreTrainedModel:
    """Let `model(sources=..., targets=..., **inputs)` return log p(targets) [n], read at the slots `sources` [n].

    Without targets it returns those of every token: [n, vocabulary]. With `squares`, or `reference` (the reference's of
    every token), it returns [n, 2 or 3]: see TokenLogps. Logits for targets exist only at these slots,
    `rows_at_once` at a time. If that is not all, backward computes them again: it would hold them all. This
    is a part of the model's forward because FSDP gathers the model's weights there.
    """
    own = model.forward
    vocabulary = model.config.get_text_config().vocab_size

    def logps(hidden: Tensor, targets: Tensor, squares: bool, reference: Tensor | None) -> Tensor:
        logits = logits_of(model, own, hidden)
        values = [parallel.label_logps(logits, targets.to(hidden.device))]
        if squares or reference is not None:
            every = parallel.full(logits).float().log_softmax(-1)
            values += [(2 * every.detach()).logsumexp(-1)] if squares else []
            values += [(reference.exp() * (reference - every)).sum(-1)] if reference is not None else []
        return torch.stack(values, -1) if len(values) > 1 else values[0]

    @functools.wraps(own)
    def forward(
        *args: Any,
        sources: Tensor | None = None,
        targets: Tensor | None = None,
        squares: bool = False,
        reference: Callable[[], Tensor] | None = None,  # not a tensor: FSDP would cast it to the type it computes in
        **inputs: Any,
    ) -> Any:
        if sources is None:
            return own(*args, **inputs)
        states = model.get_decoder()(*args, use_cache=False, **inputs).last_hidden_state.flatten(0, 1)
        states = states[sources.to(states.device)]
        if targets is None:
            return parallel.full(logits_of(model, own, states)).float().log_softmax(-1)
        step = rows_at_once(vocabulary, states.device)
        parts = zip(states.split(step), targets.split(step), strict=True)
        references = reference().split(step) if reference is not None else itertools.repeat(None)
        chunks = [(*part, squares, theirs) for part, theirs in zip(parts, references)]
        again = functools.partial(checkpoint, logps, use_reentrant=False, preserve_rng_state=False)
        return torch.cat([again(*chunk) if len(chunks) > 1 else logps(*chunk) for chunk in chunks])

    model.forward = forward  # type: ignore[method-assign]
    return model


def rows_at_once(vocabulary: int, device: torch.device) -> int:
    """Return for how many tokens logits exist at a time."""
    if device.type == "cpu":
        return max(LOGITS_AT_ONCE // vocabulary, 1)
    return max(LOGITS_AT_ONCE_ON_GPU // vocabulary // TILE * TILE, TILE)


def response_logps(model: PreTrainedModel, batch: Batch, how: Computation, **wanted: Any) -> TokenLogps:
    """Return the log-probability of each token of the batch's responses, in the order of its trees.

    The log-softmax is float32 whatever the model's type. The first token of a response without prompt and BOS has none.
    `wanted` is that of `laid_logps`.
    """
    return laid_logps(model, place(batch, how.layout, input_device(model)), how, **wanted)


def laid_logps(
    model: PreTrainedModel, laid: Laid, how: Computation, squares: bool = False, reference: Tensor | None = None
) -> TokenLogps:
    """Return the same of a batch in place. With `squares`, and with the `next_token_logps` of a reference on the same
    batch, see TokenLogps."""
    rows = laid.rows
    held = (lambda: reference) if reference is not None else None
    # The head of a model on several devices is on the last one; the loss is computed on the first.
    found = _forward(model, rows, how, targets=rows.targets, squares=squares, reference=held).to(rows.places.device)
    places = rows.places
    mask = torch.zeros(rows.shape, dtype=torch.bool, device=found.device).flatten().index_fill(0, places, True)
    columns = found.unbind(-1) if found.ndim > 1 else [found]
    on_grid = [column.new_zeros(mask.shape).index_put((places,), column).view(rows.shape) for column in columns]
    names = ["logps", *["squares"] * squares, *["kl"] * (reference is not None)]
    values = dict(zip(names, on_grid, strict=True))
    values |= {"squares": values["squares"].detach()} if squares else {}
    mask = mask.view(rows.shape)
    return TokenLogps(mask=mask if laid.counted is None else mask & laid.counted, **values)


def next_token_logps(model: PreTrainedModel, batch: Batch, how: Computation) -> tuple[Tensor, Rows]:
    """Return log p(token | all before it) of every token of the vocabulary at the n response tokens, and the rows.

    Shape [n, vocabulary], float32. All exist at once, so this is for few rows.
    """
    rows = place(batch, how.layout, input_device(model)).rows
    return _forward(model, rows, how), rows


def _forward(model: PreTrainedModel, rows: Rows, how: Computation, **wanted: Any) -> Tensor:
    set_attention(model, how.flex)
    inputs = model_inputs(rows, how.layout, model.config.get_text_config(), how.dtype, how.flex)
    with autocast(model, how.dtype):
        return model(**inputs, sources=rows.sources, **wanted)


def input_device(model: PreTrainedModel) -> torch.device:
    """Return where a model expects token ids: on its embeddings' device. Its layers may be on several."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return parallel.device_of(weight)


@contextlib.contextmanager
def autocast(model: PreTrainedModel, compute: torch.dtype) -> Iterator[None]:
    """Run matrix products in `compute` if it is not the weights' type, unless FSDP casts the weights itself."""
    needed = not parallel.casts_itself(model) and compute != model.dtype
    with torch.autocast(input_device(model).type, compute) if needed else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def casting_once(model: PreTrainedModel) -> Iterator[None]:
    """Let the casts of trained weights that `autocast` makes last until the block ends, not one forward pass only.

    On GPUs a pass that computes activations or logits again, in the thread of backward, ends them before (torch 2.13).
    Weights must not change in the block.
    """
    with torch.autocast(input_device(model).type, enabled=False):
        yield
