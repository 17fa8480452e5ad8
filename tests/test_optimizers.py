"""Optimizers step in pieces: the same numbers, bounded temporaries, stochastic rounding, and states of 8 bits."""

import dataclasses
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from conftest import ROOT, compose, read_jsonl, train_here, train_in_group
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dpo import parallel, rounding, stepping
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
        with LiveBytes(
            *model.parameters(), *[p.grad for p in model.parameters() if p.grad is not None], *state
        ) as live:
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
    assert len({*whole.tolist()}) > 980 and whole.min() >= 0 and whole.max() < 2**16


@pytest.mark.parametrize("name", ["RMSprop", "AdamW", "SGD", "AdamW8bit", "Adafactor"])
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
    assert stochastic == pytest.approx(wanted, rel=0.05)
    assert abs(nearest) < 0.5 * abs(wanted)


def test_states_of_8_bits_keep_each_block_to_a_few_percent() -> None:
    values = torch.randn((50, 700), generator=torch.Generator().manual_seed(0)) ** 3
    values[3] = 0.0
    for signed in (True, False):
        given = values if signed else values.abs()
        codes, scales = rounding.encode(given.clone(), signed)
        assert codes.shape == values.shape and scales.shape == (50, 3)
        again = rounding.decode(codes, scales, signed)
        largest = scales.repeat_interleave(256, -1)[:, :700]
        assert float(((again - given).abs() / largest.clamp_min(1e-30)).max()) < 0.02
        assert torch.equal(again == 0, given == 0) or signed
    assert not again[3].any()


def test_steps_of_8_bits_are_those_of_bitsandbytes() -> None:
    import bitsandbytes

    ours, theirs, plain = Weights((64, 512)), Weights((64, 512)), Weights((64, 512))
    both = [build(ours, "AdamW8bit", "+optimizer_kwargs.betas=[0.9,0.95]"),
            bitsandbytes.optim.AdamW8bit(theirs.parameters(), lr=1e-3, betas=(0.9, 0.95), min_8bit_size=0),
            torch.optim.AdamW(plain.parameters(), lr=1e-3, betas=(0.9, 0.95))]  # fmt: skip
    before = ours.all[0].detach().clone()
    for step in range(20):
        for model, optimizer in zip((ours, theirs, plain), both, strict=True):
            model.give_gradients(step)
            optimizer.step()
    moves = [model.all[0].detach() - before for model in (ours, theirs, plain)]
    sizes = [float((move - moves[2]).norm() / moves[2].norm()) for move in moves[:2]]
    assert sizes[0] < 1.1 * sizes[1] < 0.1  # no farther from AdamW than bitsandbytes
    assert float((moves[0] - moves[1]).norm() / moves[2].norm()) < 0.1


def step_in_group() -> None:
    """Step with parameters sharded over 2 processes, and copied to both, and compare with whole parameters."""
    stepping.STEP_BYTES, rounding.NOISE_BLOCK = 16 * 3000, 512
    for sizes in ((1, 2), (2, 1)):
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("replicate", "shard"))
        for name, dtype in (("RMSprop", torch.bfloat16), ("AdamW8bit", torch.bfloat16), ("AdamW8bit", torch.float32),
                            ("NAdam", torch.bfloat16)):  # fmt: skip
            shapes = [*ODD, (101,), (3,), (5, 3, 7)]
            whole, sharded = Weights(*shapes, dtype=dtype), Weights(*shapes, dtype=dtype)
            for number, p in enumerate(sharded.all):
                shards = distribute_tensor(p.detach(), mesh, [Replicate(), Shard(0)])
                setattr(sharded.all, str(number), torch.nn.Parameter(shards))
            optimizers = [build(model, name) for model in (whole, sharded)]
            for step in range(4):
                whole.give_gradients(step)
                for p, like in zip(sharded.all, whole.all, strict=True):
                    p.grad = like.grad if like.grad is None else distribute_tensor(like.grad, mesh, p.placements)
                for optimizer in optimizers:
                    optimizer.update = step
                    optimizer.step()
            for p, like in zip(sharded.all, whole.all, strict=True):
                assert torch.equal(parallel.full(p.detach()), like), (name, dtype, sizes, like.shape)
                if sizes == (2, 1):
                    first, second = parallel.gather(parallel.local(p.detach()))
                    assert torch.equal(first, second)
                for key, value in optimizers[1].state.get(p, {}).items():
                    if isinstance(value, torch.Tensor):
                        assert torch.equal(parallel.full(value), optimizers[0].state[like][key]), (name, key)
        with pytest.raises(UserError, match="optimizer=Adafactor cannot train sharded weights"):
            build(sharded, "Adafactor")


@pytest.mark.full
def test_processes_draw_the_numbers_of_one() -> None:
    parallel.launch(step_in_group, (), 2, None)


def equal_checkpoints(found: Path, wanted: Path) -> bool:
    """Whether weights and optimizer states of two runs' last checkpoints are equal bit for bit."""
    files = [{p.name: load_file(p) for p in sorted((run / "LATEST").rglob("*.safetensors"))} for run in (found, wanted)]
    assert [*files[0]] == [*files[1]] and len(files[0]) > 1
    both = [(files[0][name], files[1][name]) for name in files[0]]
    return all(a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in both)


@pytest.mark.parametrize("name", ["RMSprop", "AdamW8bit", "NAdam"])
def test_a_resumed_run_draws_the_same_numbers(name: str, overrides: Overrides, tmp_path: Path) -> None:
    given = [f"optimizer={name}", "lr=1e-4", "n_eval_examples=0", "save_every=12", "model.policy_dtype=bfloat16"]
    train_here(overrides(*given))
    train_here(overrides(*given, f"resume={tmp_path / 'run' / 'step-12'}", f"local_run_dir={tmp_path / 'resumed'}"))
    train_here(overrides(*given, "round_to_nearest=true", f"local_run_dir={tmp_path / 'nearest'}"))
    assert equal_checkpoints(tmp_path / "resumed", tmp_path / "run")
    assert not equal_checkpoints(tmp_path / "nearest", tmp_path / "run")
    [path] = (tmp_path / "run" / "LATEST" / "training_state").glob("*.safetensors")
    types = {key.rpartition(".")[2]: value.dtype for key, value in load_file(path).items() if "q_proj" in key}
    states = {"RMSprop": ["square_avg"], "NAdam": ["exp_avg", "exp_avg_sq"]}.get(name, [])
    assert all(types[state] == torch.bfloat16 for state in states)
    if name == "AdamW8bit":
        assert types["exp_avg"] == types["exp_avg_sq"] == torch.uint8 and types["exp_avg_scales"] == torch.float32


def test_float32_weights_are_not_rounded(overrides: Overrides, tmp_path: Path) -> None:
    for way in ("true", "false"):
        train_here(overrides("n_eval_examples=0", f"round_to_nearest={way}", f"local_run_dir={tmp_path / way}"))
    assert equal_checkpoints(tmp_path / "true", tmp_path / "false")


@pytest.mark.full
def test_states_of_8_bits_go_on_with_another_number_of_processes(overrides: Overrides, tmp_path: Path) -> None:
    given = ["optimizer=AdamW8bit", "lr=1e-3", "n_eval_examples=0", "save_every=12", "max_grad_norm=inf"]
    sharded = overrides(*given, "trainer=FSDPTrainer", f"local_run_dir={tmp_path / 'two'}")
    parallel.launch(train_in_group, ([OmegaConf.to_container(compose(sharded), resolve=True)],), 2, None)
    train_here(overrides(*given, f"resume={tmp_path / 'two' / 'step-12'}", f"local_run_dir={tmp_path / 'one'}"))
    events = [[e for e in read_jsonl(tmp_path / run / "metrics.jsonl") if e["counters/examples"] > 12] for run in
              ("one", "two")]  # fmt: skip
    assert [e["loss/train"] for e in events[0]] == pytest.approx([e["loss/train"] for e in events[1]], rel=1e-4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("optimizer=AdamW8bit trainer=TensorParallelTrainer", "AdamW8bit needs whole rows .*trainer=BasicTrainer"),
        ("optimizer=AdamW8bit +optimizer_kwargs.alpha=1", r"AdamW8bit refuses its arguments .*alpha"),
    ],
)  # fmt: skip
def test_what_an_optimizer_cannot_do_is_refused(given: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(["exp_name=x", *given.split()])


def test_a_missing_package_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpo.run.config.find_spec", lambda name: None)
    with pytest.raises(UserError, match="optimizer=AdamW8bit needs the package: pip install bitsandbytes"):
        load_config(["exp_name=x", "optimizer=AdamW8bit"])


@pytest.mark.full
def test_8_bits_alone_import_bitsandbytes() -> None:
    code = "import sys, dpo.optimizer; assert not {'bitsandbytes', 'torchao'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
