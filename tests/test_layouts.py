"""Prompt trees against one row a response: log-probabilities and gradients, for models of many kinds."""

import contextlib
import copy
import functools
import itertools
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import EVERYTHING, make_model, read_jsonl, train_here
from hypothesis import given, settings
from hypothesis import strategies as st
from test_batching import Data, make_data
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import create_block_mask, create_mask
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from dpo.data.batching import Batch, Cut, Tree, epoch_order
from dpo.data.records import Record
from dpo.model.checks import disable_dropout, head_difference, pick_computation
from dpo.model.layouts import FLEX, PADDING, _packed, _unpacked, block_mask, lay_out, set_attention, visible
from dpo.model.loading import make_ready
from dpo.model.logps import Computation, add_token_logps, casting_once, response_logps, rows_at_once
from dpo.plan.tracker import Tracker
from dpo.reference import LiveReference, build_reference, model_key, wanted_by
from dpo.run.throughput import cost_of
from dpo.scoring import Scorer, shares
from dpo.utils import UserError
from losses import DPO, SFT
from settings import load_config

SIZES = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": 0, "bos_token_id": 0, "pad_token_id": 0}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
OTHERS = {
    "mistral of a window": ("mistral", {**SIZES, **HEADS, "sliding_window": 5}),
    "gemma2": ("gemma2", {**SIZES, **HEADS, "sliding_window": 5}),  # windows in every second layer, capped logits
    "cohere": ("cohere", {**SIZES, **HEADS, "logit_scale": 0.25}),
    "gpt_oss": ("gpt_oss", {**SIZES, **HEADS, "sliding_window": 5, "num_local_experts": 2, "num_experts_per_tok": 1}),
    "gpt_neo": ("gpt_neo", {"vocab_size": 320, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 5,
                            "attention_types": [[["global", "local"], 1]], "eos_token_id": 0, "bos_token_id": 0}),
    "bloom": ("bloom", {"vocab_size": 320, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
}  # fmt: skip
EXACT = ("llama", "gpt_neox", "gpt2", "qwen3", "mistral of a window", "gemma2", "cohere", "gpt_oss")


@functools.cache
def model_of(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if kind not in OTHERS:
        model = make_model(kind)
    else:
        name, arguments = OTHERS[kind]
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **arguments))
    for parameter in model.parameters():  # so that what a token sees moves its log-probabilities
        parameter.data.mul_(3 if parameter.ndim > 1 else 1)
    disable_dropout(model)
    return add_token_logps(model.train())


def copy_of(kind: str) -> PreTrainedModel:
    own = model_of(kind)
    model = type(own)(copy.deepcopy(own.config))  # which says how attention is computed
    model.load_state_dict(own.state_dict())
    disable_dropout(model)
    return add_token_logps(model.train())


token = st.integers(0, 319)
trees = st.builds(
    Tree, st.lists(token, max_size=9), st.lists(st.lists(token, min_size=1, max_size=9), min_size=1, max_size=6)
)


def computed(model: PreTrainedModel, batch: Batch, layout: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities, their mask, and the gradient of a sum of them that no two tokens enter alike."""
    model.zero_grad()
    tokens = response_logps(model, batch, Computation(torch.float32, layout))
    weights = torch.linspace(-1, 1, tokens.logps.numel()).view(tokens.logps.shape)
    (tokens.logps * weights).sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return tokens.logps.detach(), tokens.mask, gradient


@pytest.mark.parametrize("kind", EXACT)
@settings(max_examples=12, deadline=None)
@given(forest=st.lists(trees, min_size=1, max_size=4), repeat=st.booleans())
def test_trees_equal_one_row_a_response(kind: str, forest: list[Tree], repeat: bool) -> None:
    if repeat:
        forest = [Tree(tree.prompt, [*tree.responses[:5], tree.responses[0]]) for tree in forest]
    model, batch = model_of(kind), Batch(forest, [], None)
    wanted, mask, gradient = computed(model, batch, "padded")
    for layout in ("tree", "packed"):
        found, same_mask, same_gradient = computed(model, batch, layout)
        assert torch.equal(mask, same_mask)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        assert (same_gradient - gradient).norm() <= 1e-5 * gradient.norm() + 3e-6  # rounding, if it is 0


@pytest.mark.parametrize("layout", ["tree", "packed"])
@settings(max_examples=30, deadline=None)
@given(forest=st.lists(trees, min_size=1, max_size=4), window=st.none() | st.integers(1, 6))
def test_a_token_sees_what_it_would_see_alone(layout: str, forest: list[Tree], window: int | None) -> None:
    rows = lay_out(Batch(forest, [], None), layout)
    sees = visible(rows, window)[:, 0]
    start = 0
    for number, tree in enumerate(forest):
        row, start = (0, start) if layout == "packed" else (number, 0)
        prompt = [*range(start, start + len(tree.prompt))]
        stops = np.cumsum([start + len(tree.prompt), *(len(response) - 1 for response in tree.responses)])
        for first, stop in itertools.pairwise(stops):
            alone = [*prompt, *range(first, stop)]
            for place, column in enumerate(alone):
                left = 0 if window is None else max(place - window + 1, 0)
                assert sees[row, column].nonzero().flatten().tolist() == alone[left : place + 1]
        start = int(stops[-1])
    empty = rows.branch == PADDING
    assert not (sees & (empty[:, :, None] != empty[:, None, :])).any()
    blocks = block_mask(rows, window)  # what FlexAttention computes by
    n, width = rows.branch.shape
    assert torch.equal(create_mask(blocks.mask_mod, n, 1, width, width, device="cpu")[:, 0], sees)


def test_blocks_are_those_of_torch() -> None:
    rng = random.Random(0)
    for _ in range(4):
        sizes = [(rng.choice([0, 1, rng.randint(2, 300)]), rng.randint(1, 3)) for _ in range(rng.randint(1, 4))]
        forest = [Tree([1] * n, [[2] * rng.choice([1, rng.randint(2, 400)]) for _ in range(k)]) for n, k in sizes]
        for layout in ("packed", "tree"):
            rows = lay_out(Batch(forest, [], None), layout)
            n, width = rows.branch.shape
            for window in (None, 1, 150):
                ours = block_mask(rows, window)
                theirs = create_block_mask(ours.mask_mod, n, None, width, width, device="cpu")
                assert torch.equal(ours.to_dense(), theirs.to_dense())
                for kind in ("kv", "full_kv"):
                    counts, places = (getattr(ours, f"{kind}_{part}") for part in ("num_blocks", "indices"))
                    others = getattr(theirs, f"{kind}_num_blocks"), getattr(theirs, f"{kind}_indices")
                    assert torch.equal(counts, others[0])
                    for row, query in itertools.product(range(n), range(counts.shape[2])):
                        used = int(counts[row, 0, query])
                        assert {*places[row, 0, query, :used].tolist()} == {*others[1][row, 0, query, :used].tolist()}


def test_the_block_mask_takes_little_memory() -> None:
    trees = [Tree([1] * 100, [[2] * 150, [2] * 200]) for _ in range(9)]
    rows, seen = lay_out(Batch(trees, [], None), "packed"), Tracker("cpu")
    with seen:
        block_mask(rows, 100)
    assert seen.peak[""].total() < 0.3 * rows.branch.numel() ** 2 and not seen.waits


def test_what_is_copied_together_comes_apart_again() -> None:
    given = {
        "odd": torch.tensor([True, False, True]), "none": torch.zeros(0, 3), "ids": torch.arange(5).view(5, 1),
        "half": torch.ones(3, dtype=torch.bfloat16), "logps": torch.randn(2, 3),
    }  # fmt: skip
    found = _unpacked(_packed(given, False), given)
    assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in given.items())


def test_logits_at_once() -> None:
    cpu, gpu = (rows_at_once(128256, torch.device(kind)) for kind in ("cpu", "cuda"))
    assert cpu == 2**25 // 128256 and gpu == 2048
    assert rows_at_once(2**29, torch.device("cuda")) == 256 and rows_at_once(2**29, torch.device("cpu")) == 1


def flex(model: PreTrainedModel, forest: list[Tree]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities by FlexAttention, and those of a row for each response."""
    batch, dtype = Batch(forest, [], None), torch.float32
    ways = (Computation(dtype, "packed", flex=True), Computation(dtype))
    found, wanted = (response_logps(model, batch, how) for how in ways)
    return found.logps, wanted.logps


FOREST = [Tree([*range(60)], [[5] * 40, [6, 7, 8]]), Tree([1], [[2, 3]]), Tree([], [[*range(90)], [9]])]


@pytest.mark.full
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@torch.no_grad()
def test_flex_attention_computes_a_packed_row() -> None:
    model = copy_of("gemma2")  # masks of both kinds, capped scores
    torch.testing.assert_close(*flex(model, FOREST), rtol=1e-5, atol=1e-5)
    assert model.config._attn_implementation != FLEX  # the second was computed as ever
    how = Computation(torch.float32)
    before = model_key(model, how)
    set_attention(model, flex=True)
    assert model_key(model, how) == before  # the stored reference of one is that of the other


@pytest.mark.cuda
@pytest.mark.parametrize("kind", EXACT)
def test_gradients_of_flex_attention(kind: str) -> None:
    model, gradients = copy_of(kind).cuda(), []
    for logps in flex(model, FOREST):
        model.zero_grad()
        (logps * torch.linspace(-1, 1, logps.numel(), device="cuda").view(logps.shape)).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert (gradients[0] - gradients[1]).norm() <= 1e-3 * gradients[1].norm()  # TF32


def test_attention_that_cannot_be_exchanged_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be exchanged"):
        set_attention(model_of("bloom"), flex=True)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "cohere"])
def test_log_probabilities_are_those_of_the_models_own_logits(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpo.model.logps.LOGITS_AT_ONCE", 3 * 320)
    assert head_difference(copy_of(kind), torch.float32) < 1e-6


def test_layouts_that_are_not_exact_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    lengths = ["exp_name=x", "max_length=24", "max_prompt_length=12"]
    assert pick_computation(model_of("gpt_oss"), load_config(lengths)).layout == "tree"
    for kind, reason in (("gpt_neo", "differ by"), ("bloom", "unpack")):
        assert pick_computation(model_of(kind), load_config(lengths)).layout == "padded"
        assert reason in capsys.readouterr().out
        with pytest.raises(UserError, match="layout=tree is not exact"):
            pick_computation(model_of(kind), load_config([*lengths, "layout=tree"]))


def gradient(policy: PreTrainedModel, data: Data, scorer: Scorer, cut: Cut) -> tuple[float, torch.Tensor, int]:
    examples = [(int(record), int(pair)) for record, pair in epoch_order(data, 0, 0)]
    policy.zero_grad()
    total, passes = 0.0, shares(data, examples, cut)
    for share in passes:
        losses, _ = scorer(policy, share.batch, "train")
        (losses.sum() / len(examples)).backward()
        total += float(losses.sum()) / len(examples)
    return total, torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]), len(passes)


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "gpt2", "qwen3", "mistral of a window"])
def test_everything_on_gives_the_gradient_of_everything_off(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, policy = make_data(16), model_of(kind)
    data.records.append(Record([], [[5], [7, 8, 9]], [(0, 1)]))
    data.source = np.array([*data.source, 0])
    other = copy_of(kind)
    other.load_state_dict({k: v + 0.01 * v.abs().mean() * torch.randn_like(v) for k, v in policy.state_dict().items()})
    plain = Computation(torch.float32)
    slow = Scorer(DPO(0.1), plain, LiveReference(other, plain))
    loss, wanted, passes = gradient(policy, data, slow, Cut("padded", 1, 1, None, 0))
    assert passes == 1
    examples = [(int(record), int(pair)) for record, pair in epoch_order(data, 0, 0)]
    for layout in ("tree", "packed"):
        how, cut = Computation(torch.float32, layout), Cut(layout, 1, 1, 60, 0)
        stored = build_reference(other, how, cut, tmp_path / layout, wanted_by(data, examples))
        again, found, passes = gradient(policy, data, Scorer(DPO(0.1), how, stored), cut)
        assert passes > 3
        assert again == pytest.approx(loss, rel=1e-5)
        assert (found - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_casts_that_last_for_an_update_change_nothing(checkpointing: bool) -> None:
    data, policy = make_data(12), copy_of("llama")
    if checkpointing:
        policy.activation_checkpointing_enable({"use_reentrant": False}, 1)
    scorer = Scorer(SFT(), Computation(torch.bfloat16, "tree"), None)
    for _ in range(2):  # the second update is of other weights
        found = []
        for lasting in (casting_once(policy), contextlib.nullcontext()):
            with lasting:
                found.append(gradient(policy.train(), data, scorer, Cut("tree", 1, 4, None, 0)))
        (loss, ours, passes), (expected, wanted, _) = found
        assert passes > 2 and loss == expected and torch.equal(ours, wanted) and ours.any()
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))


@settings(max_examples=20, deadline=None)
@given(st.lists(trees, min_size=1, max_size=4))
def test_costs_are_those_of_the_rows(forest: list[Tree]) -> None:
    batch = Batch(forest, [], None)
    packed, tree, padded = (lay_out(batch, layout) for layout in ("packed", "tree", "padded"))
    for rows, layout in ((packed, "packed"), (tree, "tree"), (padded, "padded")):
        cost = cost_of(batch, layout)
        assert max(cost.computed, len(rows.input_ids)) == rows.input_ids.numel()
        assert cost.distinct == (tree.branch != PADDING).sum()
        assert cost.alone == (padded.branch != PADDING).sum()
        assert cost.predicted == sum(len(response) for tree in forest for response in tree.responses)


@pytest.mark.parametrize("kind", ["llama", pytest.param("mixtral", marks=pytest.mark.full)])
def test_widths_and_blocks_share_graphs(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """30 widths, one row and several, 12 blocks, training and evaluation: four graphs. Sampling compiles nothing."""
    graphs: list[Any] = []

    def kept(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=kept))
    torch._dynamo.reset()
    counters.clear()
    more = {"num_hidden_layers": 12, **(EXPERTS if kind == "mixtral" else {})}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **HEADS, **more}))
    compiled = copy.deepcopy(model)
    config = load_config(["exp_name=x", "model.block_name=null"])
    make_ready(model, config, trains=True, compiled=False)
    make_ready(compiled, config, trains=True, compiled=True)
    how, random = Computation(torch.float32, "tree"), np.random.default_rng(0)
    for width in range(6, 36):
        ids = random.integers(1, 320, width).tolist()
        trees = [Tree(ids[:3], [ids[3:], ids[4:]]), Tree(ids[:2], [ids[2:]])][: 1 + width % 2]
        found, wanted = (response_logps(m.train(), Batch(trees, [], None), how).logps for m in (compiled, model))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        found.sum().backward()
        with torch.no_grad():
            response_logps(compiled.eval(), Batch(trees, [], None), how)
    assert len(graphs) == 4
    for batch in (1, 2):
        compiled.generate(torch.ones(batch, 4, dtype=torch.long), max_new_tokens=4)
    assert len(graphs) == 4 and not counters["graph_break"] and not counters["unimplemented"]
    torch._dynamo.reset()


@pytest.mark.full
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("kind", ["llama", *(["mixtral"] if EVERYTHING else [])])
@pytest.mark.parametrize("trainer", ["BasicTrainer", *(["FSDPTrainer nproc=2"] if EVERYTHING else [])])
def test_compiled_blocks_compute_the_same(
    kind: str, trainer: str, overrides: Callable[..., list[str]], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model = AutoConfig.for_model(kind, **{**SIZES, **HEADS, **(EXPERTS if kind == "mixtral" else {})})
    AutoModelForCausalLM.from_config(model).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")

    def losses(name: str, *given: str) -> list[float]:
        given = ("n_examples=12", "lr=1e-3", "n_eval_examples=0", f"local_run_dir={tmp_path / name}", *given)
        train_here(overrides(f"model.name_or_path={tmp_path / 'model'}", "model.block_name=null", *given))
        return [event["loss/train"] for event in read_jsonl(tmp_path / name / "metrics.jsonl")]

    compiled = losses("compiled", "compile=true", *f"trainer={trainer}".split())
    assert compiled == pytest.approx(losses("eager"), rel=1e-4)
