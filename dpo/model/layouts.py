"""How prompt trees are laid on a model's rows: `padded` is one row for each response, `tree` one for each prompt, and
`packed` one for all of a batch, which needs attention that skips what no token sees (FlexAttention, on CUDA).

In a tree a response's tokens attend to the prompt and to their own past, and their positions continue the prompt's:
each token sees what it would see in a row of its own, so that all layouts compute the same function. The last token of
a response predicts nothing and is left out.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward

from dpo.data.batching import BLOCK, Batch, n_tokens, packed_width

PADDING = -1
FLEX = "trees_by_flex_attention"


@dataclass(frozen=True)
class Rows:
    """Token ids on rows, padded on the right, and where on them every response token stands.

    `input_ids`, `positions`, `branch` and `prompt` are int64 [rows, width]: `branch` numbers the prompts and responses
    of a row, and `prompt` is the number of the prompt before a response's token, or of that which the token is in; both
    are PADDING if there is no token. The others tell of the n response tokens with a token before them, int64 [n]
    each: the slot (row * width + column) of the token before, whose hidden state predicts it; its id; and its index in
    [responses, longest response], flattened, whose shape is `shape`.
    """

    input_ids: Tensor
    positions: Tensor
    branch: Tensor
    prompt: Tensor
    sources: Tensor
    targets: Tensor
    places: Tensor
    shape: tuple[int, int]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The fields that are tensors."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}


def copied(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return `tensors` of the CPU on `device`, in one copy that the host does not wait for."""
    if device.type == "cpu":
        return dict(tensors)
    is_cuda = device.type == "cuda"
    with torch.cuda.device(device) if is_cuda else contextlib.nullcontext():  # of a thread it is a choice of its own
        # Apple GPUs read memory that is not pinned, perhaps when it is gone.
        return _unpacked(_packed(tensors, is_cuda).to(device, non_blocking=device.type != "mps"), tensors)


def _packed(tensors: Mapping[str, Tensor], pin: bool) -> Tensor:
    """Return the bytes of all `tensors`, each beginning at a multiple of 8, uint8."""
    together = torch.empty(sum(map(_room, tensors.values())), dtype=torch.uint8, pin_memory=pin)
    for part, tensor in zip(together.split([*map(_room, tensors.values())]), tensors.values(), strict=True):
        _view(part, tensor).copy_(tensor)
    return together


def _unpacked(together: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of `_packed`, as views."""
    parts = together.split([*map(_room, like.values())])
    return {name: _view(part, tensor) for part, (name, tensor) in zip(parts, like.items(), strict=True)}


def _room(tensor: Tensor) -> int:
    return -(-tensor.numel() * tensor.element_size() // 8) * 8


def _view(part: Tensor, like: Tensor) -> Tensor:
    """Return the first bytes of `part` as a tensor of the type and shape of `like`."""
    return part[: like.numel() * like.element_size()].view(like.dtype).view(like.shape)


def lay_out(batch: Batch, layout: str) -> Rows:
    """Return the rows of a batch. Responses are numbered through the batch's trees, whatever the layout."""
    trees = [(tree.prompt, tree.responses) for tree in batch.trees]
    if layout == "padded":
        trees = [(prompt, [response]) for prompt, responses in trees for response in responses]
    rows = [trees] if layout == "packed" else [[tree] for tree in trees]
    sizes = [sum(n_tokens(len(prompt), map(len, responses)) for prompt, responses in row) for row in rows]
    width = packed_width(sizes[0]) if layout == "packed" else max(1, *sizes)
    longest = max(len(response) for _, responses in trees for response in responses)
    table = torch.zeros(4, len(rows), width, dtype=torch.long)
    table[2:] = PADDING
    sources: list[int] = []
    targets: list[int] = []
    places: list[int] = []
    number = 0
    for row, some in enumerate(rows):
        line = _Row()
        for prompt, responses in some:
            root = line.branches
            before = line.add(prompt, 0, root)[-1:]  # none if there is no prompt
            for response in responses:
                columns = [*before, *line.add(response[:-1], len(prompt), root)]
                first = len(response) - len(columns)  # without a prompt nothing predicts the first token
                sources += [row * width + column for column in columns]
                targets += response[first:]
                places += range(number * longest + first, number * longest + len(response))
                number += 1
        table[:, row, : len(line.cells[0])] = torch.tensor(line.cells, dtype=torch.long)
    index = [torch.tensor(values, dtype=torch.long) for values in (sources, targets, places)]
    return Rows(table[0], table[1], table[2], table[3], index[0], index[1], index[2], (number, longest))


class _Row:
    """A row as it is filled: ids, positions, branches and prompts of its tokens."""

    def __init__(self) -> None:
        self.cells: list[list[int]] = [[], [], [], []]
        self.branches = 0

    def add(self, tokens: list[int], position: int, prompt: int) -> range:
        """Append the tokens of a branch, the first at `position`. Returns the columns they take."""
        n, start = len(tokens), len(self.cells[0])
        new = (tokens, range(position, position + n), [self.branches] * n, [prompt] * n)
        for cells, values in zip(self.cells, new, strict=True):
            cells += values
        self.branches += 1
        return range(start, start + n)


def model_inputs(
    rows: Rows, layout: str, config: PreTrainedConfig, dtype: torch.dtype, flex: bool = False
) -> dict[str, Any]:
    """Return the inputs with which a model computes `rows`. For trees: positions, and a mask, which is FlexAttention's
    if `flex`, and else added to the scores, in their type.

    Models with several kinds of layers get a mask for each kind. A sliding window is counted in positions, which is how
    far apart two tokens of a sequence are. Raises ValueError for a kind of layer that is not known here.
    """
    if layout == "padded":
        return {"input_ids": rows.input_ids, "attention_mask": (rows.branch != PADDING).long()}

    def mask_of(window: int | None) -> Tensor | BlockMask:
        return block_mask(rows, window) if flex else _additive(visible(rows, window), dtype)

    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    mask: Any = mask_of(None if kinds else window or None)
    if kinds:
        if kinds - {"full_attention", "sliding_attention"}:
            raise ValueError(f"layers of the kinds {', '.join(sorted(kinds))}")
        mask = {"full_attention": mask}
        if "sliding_attention" in kinds:
            mask["sliding_attention"] = mask_of(window)
    return {"input_ids": rows.input_ids, "position_ids": rows.positions, "attention_mask": mask}


class _Tokens(NamedTuple):
    """Where tokens are: their columns, and what `Rows` says of them."""

    column: Tensor
    position: Tensor
    branch: Tensor
    prompt: Tensor

    def sees(self, key: "_Tokens", window: int | None) -> Tensor:
        """Return whether each of these tokens sees that of `key`. Padding sees padding."""
        seen = (self.column >= key.column) & ((self.branch == key.branch) | (self.prompt == key.branch))
        return seen if window is None else seen & (self.position - key.position < window)


def visible(rows: Rows, window: int | None) -> Tensor:
    """Return which tokens (last dimension) each token sees: bool [rows, 1, width, width]."""
    column = torch.arange(rows.branch.shape[1], device=rows.branch.device)[None]
    tokens = (column, rows.positions, rows.branch, rows.prompt)
    query, key = (_Tokens(*(t.unsqueeze(dim)[:, None] for t in tokens)) for dim in (2, 1))
    return query.sees(key, window)


def _additive(sees: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill_(~sees, torch.finfo(dtype).min)


def block_mask(rows: Rows, window: int | None) -> BlockMask:
    """Return the same as `visible`, as FlexAttention takes it: blocks in which nothing is seen are not computed.

    A token sees two runs of columns: its own branch up to itself, and its prompt's, both cut by the window. So the
    number of pairs that a block of keys has with each query is the overlap of two intervals with the block. torch's
    create_block_mask would look at every pair of tokens instead.
    """

    def at(row: Tensor, column: Tensor) -> _Tokens:
        return _Tokens(column, *(t[row, column] for t in (rows.positions, rows.branch, rows.prompt)))

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return at(row, query).sees(at(row, key), window)

    n, width = rows.branch.shape
    first, stop, prompt_first, prompt_stop = _runs(rows, window)
    blocks = -(-width // BLOCK)
    edges = torch.arange(0, blocks * BLOCK + 1, BLOCK, device=rows.branch.device, dtype=torch.int32)

    def overlap(start: Tensor, stop: Tensor) -> Tensor:
        """Return how many columns of each block lie in the runs, [rows, width, blocks]."""
        shared = torch.minimum(stop[..., None], edges[1:]).sub_(torch.maximum(start[..., None], edges[:-1]))
        return shared.clamp_(min=0)

    pairs = overlap(first, stop).add_(overlap(prompt_first, prompt_stop))
    pairs = torch.nn.functional.pad(pairs, (0, 0, 0, blocks * BLOCK - width)).view(n, blocks, BLOCK, blocks).sum(2)
    full = pairs == BLOCK * BLOCK
    partly = _ordered((pairs > 0) & ~full)
    return BlockMask.from_kv_blocks(*partly, *_ordered(full), BLOCK, sees, (width, width))


def _runs(rows: Rows, window: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the columns that each token sees: from and up to (exclusive) in its own branch, and in its prompt's.

    Each is int32 [rows, width]. The second run is empty for tokens of prompts, and if there is no prompt.
    """
    branch, prompt = rows.branch, rows.prompt
    n, width = branch.shape
    column = torch.arange(width, device=branch.device).expand(n, width)
    begins = torch.ones_like(branch, dtype=torch.bool)
    begins[:, 1:] = branch[:, 1:] != branch[:, :-1]
    first = torch.where(begins, column, 0).cummax(-1).values
    # Branch number (+ 1, as padding is -1) -> its first column, and that after its last. Branches may be empty.
    starts = column.new_zeros(n, 2 * rows.shape[0] + 1)  # each response, and at most as many prompts
    stops = starts.scatter_reduce(1, branch + 1, column + 1, "amax")
    starts = starts.scatter_reduce(1, branch + 1, column, "amin", include_self=False)
    is_response = prompt != branch
    prompt_first = torch.where(is_response, starts.gather(1, prompt + 1), 0)
    prompt_stop = torch.where(is_response, stops.gather(1, prompt + 1), 0)
    if window is not None:  # padding has no positions, and sees all padding before it
        first = torch.where(branch == PADDING, first, torch.maximum(first, column - window + 1))
        prompt_first = torch.maximum(prompt_first, prompt_first + rows.positions - window + 1)
    return first.int(), (column + 1).int(), prompt_first.int(), prompt_stop.int()


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return, for each block of queries, the number of key blocks that are true, and their numbers first."""
    chosen = blocks.int()
    order = torch.argsort(chosen, dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32)[:, None], order.int()[:, None]


def set_attention(model: PreTrainedModel, flex: bool) -> None:
    """Let `model` compute attention by FlexAttention, or as it did when it was loaded. Raise ValueError if its
    attention cannot be exchanged."""
    own = vars(model).setdefault("own_attention", model.config._attn_implementation)
    wanted = FLEX if flex else own
    if model.config._attn_implementation != wanted:
        model.set_attn_implementation(wanted)
        if model.config._attn_implementation != wanted:
            raise ValueError("its attention cannot be exchanged for FlexAttention")


def _flex_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: BlockMask, **more: Any
) -> tuple[Tensor, Tensor | None]:
    """transformers' own, in one type: rotary embeddings and norms of heads leave float32 under autocast, which does not
    reach into FlexAttention as it does into other attention."""
    return flex_attention_forward(module, query.to(value.dtype), key.to(value.dtype), value, attention_mask, **more)


AttentionInterface.register(FLEX, _flex_attention)
