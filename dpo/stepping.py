"""An optimizer's step in pieces: temporaries of bounded size, and states and weights in fewer bits than it computes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dpo import parallel, rounding

STEP_BYTES = 2**28  # 256 MiB: temporaries of a step at a time, at four float32 numbers a weight
SCALES = "_scales"  # ends the names of states that hold the scales of states in 8 bits
SIGNED = ("exp_avg",)  # AdamW's states with negative numbers


@dataclass(frozen=True)
class Piece:
    """Rows `first` to `last` of this process's part of a parameter; None: all of the parameter as it is."""

    parameter: Tensor
    number: int
    rows: tuple[int, int] | None
    is_last: bool

    def of(self, tensor: Tensor) -> Tensor:
        """Return the view of this piece of the parameter, or of a tensor that lies like it."""
        return tensor if self.rows is None else parallel.local(tensor)[slice(*self.rows)]

    @property
    def start(self) -> int:
        """Elements of this process's part before the piece."""
        part = parallel.local(self.parameter)
        return self.rows[0] * (part.numel() // max(len(part), 1)) if self.rows else 0


class InPieces(torch.optim.Optimizer):
    """Stands before a torch optimizer in a class's bases, and lets it step on some of the weights at a time.

    The optimizer sees plain tensors, in place of a parameter or of a DTensor's local rows: views, or float32 copies of
    what has fewer bits. The state of each parameter stays in `state`, whole and in the parameter's type.

    `seed`: round bfloat16 weights and states stochastically, with numbers that depend on it, on `update`, and on the
    element; None: compute in bfloat16. `eight_bits`: hold the states of matrices in 8 bits. `elementwise`: whether a
    weight's step depends on this weight's gradients alone; otherwise parameters are not cut.
    """

    seed: int | None = None
    update = 0
    eight_bits = False
    elementwise = True

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Change the weights by their gradients. `closure` must be None."""
        assert closure is None
        groups, number = self.param_groups, 0
        try:
            for group in groups:
                parameters = [(number + i, p) for i, p in enumerate(group["params"]) if p.grad is not None]
                number += len(group["params"])
                for _, p in parameters:  # tensor parallelism may leave a gradient to be summed, or sharded otherwise
                    if getattr(p.grad, "placements", None) != getattr(p, "placements", None):
                        p.grad = parallel.as_sharded(p.grad, p)
                fresh = {p for _, p in parameters if not self.state.get(p)}
                for batch in batches(self._pieces(parameters)):
                    lent = [self._lend(piece, piece.parameter in fresh) for piece in batch]
                    self.param_groups = [group | {"params": lent}]
                    super().step()
                    for piece, weights in zip(batch, lent, strict=True):
                        self._take_back(piece, weights)
        finally:
            self.param_groups = groups

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load as torch does, but keep each state's type: torch converts all but `step` to the parameter's."""
        super().load_state_dict(state_dict)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, Tensor) and value.dtype != self.state[parameter][name].dtype:
                    self.state[parameter][name] = value

    def _pieces(self, parameters: list[tuple[int, Tensor]]) -> Iterator[Piece]:
        for number, parameter in parameters:
            small = parameter.numel() <= STEP_BYTES // 16 or self._in_bfloat16(parameter)
            if not self.elementwise or parameter.ndim == 0 or (small and not isinstance(parameter, DTensor)):
                yield Piece(parameter, number, None, True)
                continue
            part = parallel.local(parameter)
            n = len(part)
            # bfloat16 is not cut: its kernels depend on where a tensor ends (CPU, RMSprop's momentum).
            rows = max(n if self._in_bfloat16(parameter) else STEP_BYTES // 16 * n // max(part.numel(), 1), 1)
            for first in range(0, max(n, 1), rows):
                yield Piece(parameter, number, (first, min(first + rows, n)), first + rows >= n)

    def _in_bfloat16(self, tensor: Tensor) -> bool:
        """Return whether the optimizer computes with `tensor` in bfloat16."""
        return tensor.dtype == torch.bfloat16 and self.seed is None and not self.eight_bits

    def _in_float32(self, tensor: Tensor) -> bool:
        """Return whether the optimizer computes with a float32 copy of `tensor`."""
        return tensor.dtype == torch.bfloat16 and not self._in_bfloat16(tensor)

    def _wide(self, tensor: Tensor) -> Tensor:
        return tensor.float() if self._in_float32(tensor) else tensor

    def _lend(self, piece: Piece, is_fresh: bool) -> Tensor:
        """Return the weights of a piece with gradient and state, for the optimizer to step on: if there is nothing to
        convert or to cut, the parameter itself."""
        parameter = piece.parameter
        if piece.rows is None and not self._in_float32(parameter) and not self.eight_bits:
            return parameter
        weights = torch.nn.Parameter(self._wide(piece.of(parameter.detach())))
        weights.grad = self._wide(piece.of(parameter.grad))  # type: ignore[arg-type]
        state = {} if is_fresh else self.state[parameter]
        for name, value in state.items():
            if name.endswith(SCALES):
                continue
            if isinstance(value, Tensor) and value.dtype == torch.uint8:
                value = rounding.decode(piece.of(value), piece.of(state[name + SCALES]), name in SIGNED)
            elif isinstance(value, Tensor):
                value = self._wide(piece.of(value)) if value.ndim else value.clone()
            self.state[weights][name] = value
        return weights

    def _take_back(self, piece: Piece, weights: Tensor) -> None:
        """Write the weights and the state of a piece back."""
        parameter = piece.parameter
        if weights is parameter:
            return
        weights.grad = None
        self._write(piece, "", parameter, weights)
        for name, value in self.state.pop(weights, {}).items():
            state = self.state[parameter]
            if not isinstance(value, Tensor) or not value.ndim:  # such as `step`: one for all pieces
                if piece.is_last:
                    state[name] = value
            elif self.eight_bits and parameter.ndim > 1:
                if name not in state:
                    state[name] = torch.zeros_like(parameter, dtype=torch.uint8)
                    first_of_blocks = parameter[..., :: min(rounding.SCALE_BLOCK, parameter.shape[-1])]
                    state[name + SCALES] = torch.zeros_like(first_of_blocks, dtype=torch.float32)
                codes, scales = rounding.encode(value, name in SIGNED)
                piece.of(state[name]).copy_(codes)
                piece.of(state[name + SCALES]).copy_(scales)
            else:
                if name not in state:
                    dtype = value.dtype if weights.dtype == parameter.dtype else parameter.dtype
                    state[name] = torch.zeros_like(parameter if piece.rows else value, dtype=dtype)
                self._write(piece, name, state[name], value)

    def _write(self, piece: Piece, name: str, whole: Tensor, values: Tensor) -> None:
        """Write `values` into the piece of the tensor `whole`, unless they are a view of it. Rounding overwrites them.

        `name`: of the state; empty: the weights.
        """
        target, values = parallel.local(piece.of(whole)), parallel.local(values)
        if target.dtype == values.dtype and _place(target) == _place(values):
            return
        if target.dtype == values.dtype or self.seed is None:
            target.copy_(values)
            return
        key, start = f"{self.seed}/{self.update}/{piece.number}/{name}", rounding.first_position(whole) + piece.start
        block = max(min(rounding.NOISE_BLOCK, whole.numel()), 1)
        rounding.round_stochastically(target, values, rounding.noise(key, start, values.shape, block, values.device))


def _place(tensor: Tensor) -> tuple[int, int]:
    """Return where a tensor begins in memory."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())


def batches(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    """Yield lists of pieces, filled up to STEP_BYTES."""
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        n = piece.of(piece.parameter).numel()
        if batch and size + n > STEP_BYTES // 16:
            yield batch
            batch, size = [], 0
        batch.append(piece)
        size += n
    if batch:
        yield batch
