"""How prompt trees are laid on a model's rows: `padded` is one row for each response, `tree` one for each prompt.

In a tree a response's tokens attend to the prompt and to their own past, and their positions go on from the prompt's:
each token sees what it would see in a row of its own, so that both layouts compute the same function. The last token of
a response predicts nothing and is left out.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from batching import Batch, n_tokens

PROMPT, PADDING = 0, -1


@dataclass(frozen=True)
class Rows:
    """Token ids on rows, padded on the right, and where on them every response token stands.

    `input_ids`, `positions` and `branch` are int64 [rows, width]; `branch` is PADDING, PROMPT, or k in the k-th
    response of its row. The others tell of the n response tokens with a token before them, int64 [n] each: the slot
    (row * width + column) of the token before, whose hidden state predicts it; its id; and its index in [responses,
    longest response], flattened, whose shape is `shape`.
    """

    input_ids: Tensor
    positions: Tensor
    branch: Tensor
    sources: Tensor
    targets: Tensor
    places: Tensor
    shape: tuple[int, int]

    def to(self, device: torch.device) -> "Rows":
        """The same with every tensor on `device`."""
        moved: Any = {name: v.to(device) for name, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)


def lay_out(batch: Batch, layout: str) -> Rows:
    """The rows of a batch. Responses are numbered through the batch's trees, whatever the layout."""
    trees = [(tree.prompt, tree.responses) for tree in batch.trees]
    if layout == "padded":
        trees = [(prompt, [response]) for prompt, responses in trees for response in responses]
    lengths = [len(response) for _, responses in trees for response in responses]
    width = max(1, *(n_tokens(len(prompt), map(len, responses)) for prompt, responses in trees))
    input_ids, positions = torch.zeros(2, len(trees), width, dtype=torch.long)
    branch = torch.full((len(trees), width), PADDING)
    sources: list[int] = []
    targets: list[int] = []
    places: list[int] = []
    number = 0
    for row, (prompt, responses) in enumerate(trees):
        input_ids[row, : len(prompt)] = torch.tensor(prompt, dtype=torch.long)
        positions[row, : len(prompt)] = torch.arange(len(prompt))
        branch[row, : len(prompt)] = PROMPT
        start = len(prompt)
        for k, response in enumerate(responses, 1):
            stop = start + len(response) - 1
            input_ids[row, start:stop] = torch.tensor(response[:-1])
            positions[row, start:stop] = torch.arange(len(prompt), len(prompt) + len(response) - 1)
            branch[row, start:stop] = k
            before = [len(prompt) - 1, *range(start, stop)]
            known = 0 if prompt else 1  # without a prompt nothing predicts the first token
            sources += [row * width + column for column in before[known:]]
            targets += response[known:]
            places += range(number * max(lengths) + known, number * max(lengths) + len(response))
            start, number = stop, number + 1
    shape = (number, max(lengths))
    index = [torch.tensor(values, dtype=torch.long) for values in (sources, targets, places)]
    return Rows(input_ids, positions, branch, index[0], index[1], index[2], shape)


def model_inputs(rows: Rows, layout: str, config: PreTrainedConfig, dtype: torch.dtype) -> dict[str, Any]:
    """What a model needs to compute `rows`. For a tree: positions, and an additive mask in the type of its scores.

    Models with several kinds of layers get a mask for each kind. A sliding window is counted in positions, which is how
    far apart two tokens of a sequence are. Raises ValueError for a kind of layer that is not known here.
    """
    if layout == "padded":
        return {"input_ids": rows.input_ids, "attention_mask": (rows.branch != PADDING).long()}
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    sees = visible(rows, None)
    mask: Any = _additive(sees if kinds or not window else visible(rows, window), dtype)
    if kinds:
        if kinds - {"full_attention", "sliding_attention"}:
            raise ValueError(f"layers of the kinds {', '.join(sorted(kinds))}")
        mask = {"full_attention": mask}
        if "sliding_attention" in kinds:
            mask["sliding_attention"] = _additive(visible(rows, window), dtype)
    return {"input_ids": rows.input_ids, "position_ids": rows.positions, "attention_mask": mask}


def visible(rows: Rows, window: int | None) -> Tensor:
    """Which tokens (last dimension) each token sees: bool [rows, 1, width, width]. Padding sees padding."""
    query, key = rows.branch[:, None, :, None], rows.branch[:, None, None, :]
    order = torch.arange(rows.branch.shape[1], device=rows.branch.device)
    sees = (order[:, None] >= order) & ((key == query) | ((key == PROMPT) & (query != PADDING)))
    if window is not None:
        sees &= rows.positions[:, None, :, None] - rows.positions[:, None, None, :] < window
    return sees


def _additive(sees: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill_(~sees, torch.finfo(dtype).min)
