"""Optimizers step in pieces: the same numbers, bounded temporaries, stochastic rounding, and states of 8 bits."""

import dataclasses
import shutil
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from conftest import make_model, make_tokenizer, read_jsonl, tiny_overrides, train_here, write_pairs
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dpo import rounding, stepping
from dpo.optimizer import build_optimizer
from dpo.run.config import Config
from dpo.utils import UserError
from settings import load_config

Overrides = Callable[..., list[str]]
[FIELD] = [field for field in dataclasses.fields(Config) if field.name == "optimizer"]
OPTIMIZERS = [name for name in get_args(FIELD.type) if name != "AdamW8bit"]
ODD = [(37, 19), (7, 3), (64, 300), (1, 5)]


class Weights(torch.nn.Module):
    """Parameters of odd shapes, without a model."""

    def __init__(self, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32):
        super().__init__()
        random = torch.Generator().manual_seed(1)
        self.all = torch.nn.ParameterList([torch.randn(shape, generator=random).to(dtype) for shape in shapes])

    def give_gradients(self, step: int) -> None:
        random = torch.Generator().manual_seed(step + 100)
        for number, weight in enumerate(self.all):
            gradient = torch.randn(weight.shape, generator=random) * 1e-2
            weight.grad = None if number == 1 and step < 2 else gradient.to(weight.dtype)


def build(model: torch.nn.Module, name: str, *given: str) -> Any:
    return build_optimizer(model, load_config(["exp_name=x", f"optimizer={name}", "lr=1e-3", *given]))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_in_pieces_are_those_of_torch_bit_for_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = ODD + ([(101,), (3,), (5, 3, 7)] if name != "Muon" else [])
    ways: list[dict[str, Any]] = [{"foreach": foreach} for foreach in (True, False)] if name != "Muon" else [{}]
    ways += [way | {"momentum": 0.9} for way in ways if name in ("SGD", "RMSprop")]
    for kwargs in ways:
        for dtype in (torch.float32, torch.bfloat16):
            ours, theirs = Weights(*shapes, dtype=dtype), Weights(*shapes, dtype=dtype)
            given = [f"+optimizer_kwargs.{key}={value}" for key, value in kwargs.items()]
            optimizer = build(ours, name, "round_to_nearest=true", *given)
            torchs = getattr(torch.optim, name)(theirs.parameters(), lr=1e-3, **kwargs)
            for step in range(4):
                monkeypatch.setattr(stepping, "STEP_BYTES", [16 * 100, 16 * 1000, 2**28, 16][step])
                for model, one in ((ours, optimizer), (theirs, torchs)):
                    model.give_gradients(step)
                    one.step()
            for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
                assert torch.equal(mine, other), (kwargs, dtype)
                assert optimizer.state.get(mine, {}).keys() == torchs.state.get(other, {}).keys()
                for key, value in torchs.state.get(other, {}).items():
                    assert value is None or torch.equal(optimizer.state[mine][key], value), (key, kwargs, dtype)
                    assert value is None or optimizer.state[mine][key].dtype == value.dtype


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations have met and that are alive, and the most at a time."""

    def __init__(self, *known: torch.Tensor):
        super().__init__()
        self.storages: dict[int, int] = {}
        self.now = self.most = 0
        self.see(known)

    def see(self, values: Any) -> None:
        for tensor in tree_leaves(values):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.storages:
                self.storages[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self.gone, storage._cdata)
        self.most = max(self.most, self.now)

    def gone(self, key: int) -> None:
        self.now -= self.storages.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.see((args, kwargs, out))
        return out


def bytes_a_parameter(name: str, dtype: torch.dtype, *given: str) -> list[float]:
    """The most bytes alive during the first step and during the second, for each parameter."""
    model = Weights((1600, 200), *[(200, 200)] * 16, dtype=dtype)
    n = sum(p.numel() for p in model.parameters())
    optimizer, found = build(model, name, "+optimizer_kwargs.foreach=true", *given), []
    for step in (2, 3):
        model.give_gradients(step)
        state = [value for values in optimizer.state.values() for value in values.values()]
        with LiveBytes(*model.parameters(), *[p.grad for p in model.parameters() if p.grad is not None], *state) as live:
            optimizer.step()
        found.append(live.most / n)
    return found


@pytest.mark.parametrize(
    ("name", "dtype", "states"),
    [
        ("RMSprop", torch.float32, 4), ("AdamW", torch.float32, 8), ("SGD", torch.float32, 0),
        ("RMSprop", torch.bfloat16, 2), ("AdamW", torch.bfloat16, 4), ("SGD", torch.bfloat16, 0),
        ("AdamW8bit", torch.float32, 2.04), ("AdamW8bit", torch.bfloat16, 2.04),
    ],
)  # fmt: skip
def test_a_step_needs_half_a_byte_a_parameter_besides_what_stays(
    name: str, dtype: torch.dtype, states: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    n = 1600 * 200 + 16 * 200 * 200
    monkeypatch.setattr(stepping, "STEP_BYTES", n // 4)  # as of a billion weights
    monkeypatch.setattr(rounding, "NOISE_BLOCK", n // 200)
    stays = 2 * dtype.itemsize + states
    for most in bytes_a_parameter(name, dtype):
        assert stays <= most <= stays + 0.5
    if name == "RMSprop" and dtype == torch.float32:
        monkeypatch.setattr(stepping, "STEP_BYTES", 2**28)
        assert bytes_a_parameter(name, dtype)[1] > stays + 3.9


def test_rounding_is_unbiased_and_leaves_bfloat16_numbers_alone() -> None:
    values = torch.tensor([1.0, -1.0, 1.001, -3.1415, 6e-30, 1.1e-39, -65504.7, 0.0, 2**-7 + 2**-20, torch.inf])
    n = 40_000
    many = values.repeat_interleave(n)
    rounded = torch.empty_like(many, dtype=torch.bfloat16)
    rounding.round_stochastically(rounded, many.clone(), rounding.noise("x", 0, many.shape, 2**16, many.device))
    found = rounded.float().view(-1, n)
    below = (values.view(torch.int32) & -(2**16)).view(torch.float32)  # towards 0
    above = ((below.view(torch.int32) + 2**16).view(torch.float32)).where(below != values, values)
    for value, low, high, one in zip(values.tolist(), below.tolist(), above.tolist(), found, strict=True):
        assert {*one.tolist()} <= {low, high} and (low == value or len({*one.tolist()}) == 2)
        share = (value - low) / (high - low) if high != low else 0.0
        error = (share * (1 - share) / n) ** 0.5
        assert abs(float((one == high).float().mean()) - share) <= 5 * error or high == low


def test_random_numbers_depend_on_key_and_position_alone() -> None:
    whole = rounding.noise("a", 0, torch.Size([1000]), 64, torch.device("cpu"))
    for start, count in ((0, 1000), (64, 64), (63, 2), (100, 300), (999, 1), (5, 0)):
        assert torch.equal(rounding.noise("a", start, torch.Size([count]), 64, whole.device), whole[start:][:count])
    assert not torch.equal(whole, rounding.noise("b", 0, torch.Size([1000]), 64, whole.device))
    assert len({*whole.tolist()}) > 980 and 0 <= whole.min() and whole.max() < 2**16


@pytest.mark.parametrize("name", ["RMSprop", "AdamW", "SGD", "AdamW8bit", "Adafactor", "Rprop"])
def test_small_steps_move_bfloat16_weights_as_they_move_float32(name: str) -> None:
    moved = {}
    for dtype, given in ((torch.float32, ""), (torch.bfloat16, "round_to_nearest=true"), (torch.bfloat16, "")):
        model = Weights((300, 300), dtype=dtype)
        optimizer = build(model, name, *given.split())
        before = model.all[0].detach().float().clone()
        for step in range(30):
            model.all[0].grad = (torch.linspace(0.5, 1.5, 90_000).view(300, 300) * 1e-2).to(dtype)
            optimizer.update = step
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 if name == "SGD" else 1e-5
            optimizer.step()
        moved[dtype, given] = float((model.all[0].detach().float() - before).mean())
    wanted, nearest, stochastic = moved.values()
    if name == "Rprop":  # sets its own steps
        return
    assert stochastic == pytest.approx(wanted, rel=0.05)
    assert abs(nearest) < 0.5 * abs(wanted)
