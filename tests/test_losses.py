"""Losses and their gradients against formulas written out from the papers in float64, one pair at a time."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from dpo.loss import Examples, Loss, Responses, sum_tokens
from losses import AOT, BCO, DPO, IPO, KTO, SFT, AOTUnpaired, Listwise, Mix, Pairs, Unlikelihood, make, names
from settings import CONFIG_DIR, load_config
from utils import loss_values

N, LONGEST = 7, 9
LOSS_FILES = sorted(path.stem for path in (CONFIG_DIR / "loss").glob("*.yaml"))


@dataclass
class Pair:
    """One pair, as a formula of a paper sees it: sums over tokens in nats, and lengths."""

    W: Tensor
    L: Tensor
    RW: Tensor
    RL: Tensor
    nw: int
    nl: int
    w_tokens: Tensor
    l_tokens: Tensor
    rw_tokens: Tensor
    rl_tokens: Tensor
    w_squares: Tensor
    l_squares: Tensor
    kl_w: Tensor
    kl_l: Tensor
    margin: Tensor
    weight: Tensor

    @property
    def u_w(self) -> Tensor:
        return self.W - self.RW

    @property
    def u_l(self) -> Tensor:
        return self.L - self.RL

    @property
    def d(self) -> Tensor:
        return self.u_w - self.u_l


def draw(seed: int = 1) -> tuple[Examples, list[Tensor], list[Pair]]:
    """Return pairs as a loss sees them, the policy's token log-probabilities of both sides, and each pair."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, LONGEST + 1, (2, N), generator=generator)
    policy = [-2 * torch.rand(N, LONGEST, generator=generator, dtype=torch.float64) - 0.05 for _ in range(2)]
    reference = [p + 0.6 * torch.randn(N, LONGEST, generator=generator, dtype=torch.float64) for p in policy]
    columns = {name: torch.rand(N, generator=generator, dtype=torch.float64) for name in ("margin", "weight")}
    policy = [p.requires_grad_() for p in policy]
    squares = [-torch.rand(N, LONGEST, generator=generator, dtype=torch.float64) for _ in range(2)]
    kls = [torch.rand(N, LONGEST, generator=generator, dtype=torch.float64) for _ in range(2)]
    masks = [torch.arange(LONGEST) < n[:, None] for n in lengths]
    sides = [
        Responses(sum_tokens(p, mask), n, sum_tokens(r, mask), p, r, mask, square, kl)
        for p, r, mask, n, square, kl in zip(policy, reference, masks, lengths, squares, kls)
    ]
    pairs = []
    for i in range(N):
        tokens = [p[i, : int(n[i])] for p, n in zip(policy, lengths)]
        theirs = [r[i, : int(n[i])] for r, n in zip(reference, lengths)]
        sums = [t.sum() for t in (*tokens, *theirs)]
        counts = [len(t) for t in tokens]
        more = [s[i, : int(n[i])] for s, n in zip(squares, lengths)] + [
            k[i, : int(n[i])].sum() for k, n in zip(kls, lengths)
        ]
        pairs.append(Pair(*sums, *counts, *tokens, *theirs, *more, columns["margin"][i], columns["weight"][i]))
    return Examples(*sides, columns), policy, pairs


def sigma(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def nls(x: Tensor) -> Tensor:
    """-log sigmoid(x)"""
    return torch.log(1 + torch.exp(-x))


def odds(mean: Tensor) -> Tensor:
    return torch.log(torch.exp(mean) / (1 - torch.exp(mean)))


def ld(p: Pair, alpha: float) -> Tensor:
    k = min(p.nw, p.nl)

    def score(ours: Tensor, theirs: Tensor) -> Tensor:
        return (ours[:k] - theirs[:k]).sum() + alpha * (ours[k:] - theirs[k:]).sum()

    return score(p.w_tokens, p.rw_tokens) - score(p.l_tokens, p.rl_tokens)


def exo(p: Pair, b: float, e: float) -> Tensor:
    s, t = sigma(b * p.d), sigma(-b * p.d)
    return s * (torch.log(s) - math.log(1 - e)) + t * (torch.log(t) - math.log(e))


def wpo(p: Pair) -> Tensor:
    sides = ((p.w_tokens, p.w_squares), (p.l_tokens, p.l_squares))
    w_w, w_l = (torch.exp((ours - squares).mean()).detach() for ours, squares in sides)
    return w_w * w_l


def discopop(p: Pair, b: float, tau: float) -> Tensor:
    x = b * p.d
    return (1 - sigma(x / tau)) * nls(x) + sigma(x / tau) * torch.exp(-x)


def chi2(b: float, clip: float) -> Callable[[Pair], Tensor]:
    def loss(p: Pair) -> Tensor:
        phi_w, phi_l = (torch.exp(u) + torch.log(torch.exp(u)) for u in (p.u_w, p.u_l))
        return nls(torch.clamp(b * (phi_w - phi_l), -clip, clip))

    return loss


# (loss, its keys, the formula of its paper)
FORMULAS: list[tuple[str, dict[str, Any], Callable[[Pair], Tensor]]] = [
    ("dpo", {"beta": 0.3}, lambda p: nls(0.3 * p.d)),
    ("dpo", {"beta": 0.3, "label_smoothing": 0.2}, lambda p: 0.8 * nls(0.3 * p.d) + 0.2 * nls(-0.3 * p.d)),
    (
        "dpo",
        {"beta": 0.3, "label_smoothing": 0.2, "robust": True},
        lambda p: (0.8 * nls(0.3 * p.d) - 0.2 * nls(-0.3 * p.d)) / 0.6,
    ),
    ("dpo", {"beta": 0.3, "reference_free": True}, lambda p: nls(0.3 * (p.W - p.L))),
    ("dpo", {"beta": 3.0, "length_normalized": True}, lambda p: nls(3 * (p.u_w / p.nw - p.u_l / p.nl))),
    ("dpo", {"beta": 0.3, "nll_weight": 0.7}, lambda p: nls(0.3 * p.d) - 0.7 * p.W / p.nw),
    (
        "dpo",
        {"beta": 0.3, "dpop_weight": 5.0},
        lambda p: nls(0.3 * (p.d - 5 * torch.maximum(torch.zeros(()), p.RW - p.W))),
    ),
    ("dpo", {"beta": 0.3, "divergence": "forward_kl"}, lambda p: nls(0.3 * (torch.exp(-p.u_l) - torch.exp(-p.u_w)))),
    (
        "dpo",
        {"beta": 0.3, "divergence": "js"},
        lambda p: nls(0.3 * (torch.log(1 + torch.exp(-p.u_l)) - torch.log(1 + torch.exp(-p.u_w)))),
    ),
    (
        "dpo",
        {"beta": 0.3, "divergence": "alpha", "divergence_alpha": 0.4},
        lambda p: nls(0.3 * (torch.exp(p.u_l) ** -0.4 - torch.exp(p.u_w) ** -0.4) / 0.4),
    ),
    ("dpo", {"beta": 0.05, "divergence": "chi2_kl", "clip": 0.9}, chi2(0.05, 0.9)),
    ("dpo", {"beta": 0.3, "ld_alpha": 0.25}, lambda p: nls(0.3 * ld(p, 0.25))),
    ("dpo", {"beta": 0.3, "margin": "column"}, lambda p: nls(0.3 * p.d - p.margin)),
    ("dpo", {"beta": 0.3, "margin": "length", "margin_alpha": 0.02}, lambda p: nls(0.3 * p.d + 0.02 * (p.nw - p.nl))),
    ("dpo", {"beta": 0.3, "weighting": "column"}, lambda p: p.weight * nls(0.3 * p.d)),
    ("dpo", {"beta": 0.3, "link": "hinge", "length_normalized": True, "nll_weight": 0.5},
     lambda p: torch.clamp(1 - 0.3 * (p.u_w / p.nw - p.u_l / p.nl), min=0) - 0.5 * p.W / p.nw),
    ("dpo", {"beta": 0.3, "weighting": "wpo"}, lambda p: wpo(p) * nls(0.3 * p.d)),
    ("tdpo", {"beta": 0.3, "version": 1}, lambda p: nls(0.3 * p.d - 0.3 * (p.kl_l - p.kl_w))),
    ("tdpo", {"beta": 0.3, "alpha": 0.7}, lambda p: nls(0.3 * p.d - 0.7 * 0.3 * (p.kl_l - p.kl_w))),
    ("ipo", {"beta": 0.4}, lambda p: (p.d - 1 / 0.8) ** 2),
    ("ipo", {"beta": 0.4, "average_log_prob": True}, lambda p: (p.u_w / p.nw - p.u_l / p.nl - 1 / 0.8) ** 2),
    ("hinge", {"beta": 0.3}, lambda p: torch.clamp(1 - 0.3 * p.d, min=0)),
    ("slic", {"delta": 2.0, "nll_weight": 0.2}, lambda p: torch.clamp(2 - p.W + p.L, min=0) - 0.2 * p.W),
    ("simpo", {"beta": 2.5, "gamma": 0.7}, lambda p: nls(2.5 * p.W / p.nw - 2.5 * p.L / p.nl - 0.7)),
    ("cpo", {"beta": 0.2}, lambda p: nls(0.2 * p.W - 0.2 * p.L) - p.W),
    ("orpo", {"pair_weight": 0.3}, lambda p: -p.W / p.nw + 0.3 * nls(odds(p.W / p.nw) - odds(p.L / p.nl))),
    ("exo", {"beta": 0.3, "label_smoothing": 0.01}, lambda p: exo(p, 0.3, 0.01)),
    ("nca", {"beta": 0.3}, lambda p: nls(0.3 * p.u_w) + 0.5 * nls(-0.3 * p.u_w) + 0.5 * nls(-0.3 * p.u_l)),
    ("sppo", {"beta": 0.2}, lambda p: ((p.u_w - 5 * 0.5) ** 2 + (p.u_l + 5 * 0.5) ** 2) / 2),
    ("apo_zero", {"beta": 0.3}, lambda p: -sigma(0.3 * p.u_w) + sigma(0.3 * p.u_l)),
    ("apo_down", {"beta": 0.3}, lambda p: sigma(0.3 * p.u_w) - sigma(0.3 * p.d)),
    ("discopop", {"beta": 0.1}, lambda p: discopop(p, 0.1, 0.05)),
    ("nll", {}, lambda p: -p.W / p.nw),
    ("pairs", {"beta": 0.3}, lambda p: nls(0.3 * p.d)),
    ("unlikelihood", {"alpha": 0.4}, lambda p: -p.W + 0.4 * p.L),
    ("sft", {}, lambda p: -p.W),
    ("sft", {"dft": True}, lambda p: -(torch.exp(p.w_tokens).detach() * p.w_tokens).sum()),
    ("mix", {"terms": {"dpo": 0.8, "simpo": 0.5, "nll": 1.5}, "beta": 0.3, "settings": {"simpo": {"gamma": 0.1}}},
     lambda p: 0.8 * nls(0.3 * p.d) + 0.5 * nls(0.3 * (p.W / p.nw - p.L / p.nl) - 0.1) - 1.5 * p.W / p.nw),
]  # fmt: skip


def build(name: str, keys: dict[str, Any]) -> Loss:
    loss, problems = make({"name": name, **keys})
    assert loss is not None, problems
    return loss


def gradients(values: Tensor, policy: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(values.sum(), policy, allow_unused=True, materialize_grads=True))


@pytest.mark.parametrize(("name", "keys", "formula"), FORMULAS, ids=[f"{n}-{'-'.join(k)}" for n, k, _ in FORMULAS])
def test_loss_and_gradient_are_those_of_the_paper(
    name: str, keys: dict[str, Any], formula: Callable[[Pair], Tensor]
) -> None:
    for seed in range(3):
        examples, policy, pairs = draw(seed)
        found, expected = build(name, keys)(examples), torch.stack([formula(pair) for pair in pairs])
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        for ours, theirs in zip(gradients(found, policy), gradients(expected, policy)):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_every_file_has_a_formula() -> None:
    """Those with statistics of the batch have tests of their own, below."""
    apart = {"bco", "aot", "aot_unpaired", "mpo", "kto", "listwise"}
    assert {name for name, *_ in FORMULAS} | apart == set(LOSS_FILES)
    assert set(names()) <= set(LOSS_FILES)


@pytest.mark.parametrize("name", LOSS_FILES)
def test_a_file_sets_every_key_and_python_has_the_same_values(name: str) -> None:
    """YAML holds every field, so that each can be set on the command line."""
    needed = {"dpo": {"beta": 0.1}, "mix": {"terms": {"nll": 1.0}}, "unlikelihood": {}}
    values = loss_values(name)
    required = {key: needed.get(name, {"beta": 0.1}).get(key, 0.1) for key, value in values.items() if value == "???"}
    overrides = [f"loss.{key}={value}".replace("'", "") for key, value in required.items()]
    live = ["reference.mode=live"] if name == "tdpo" else []
    loss = load_config(["exp_name=x", f"loss={name}", *overrides, *live]).loss
    assert loss == build(name, required) and loss.name == name
    assert set(values) - {"name", "kind"} == set(loss.__dataclass_fields__) - {"name"}


# --- Statistics of the global batch ---


def global_parts(loss: Loss, examples: Examples, cuts: list[slice]) -> Tensor:
    """Return the loss of each example, computed in parts that see the statistics of all."""
    parts = [_part(examples, cut) for cut in cuts]
    seen = [loss.observe(part) for part in parts]
    order = torch.randperm(len(parts), generator=torch.Generator().manual_seed(0)).tolist()
    statistics = {key: torch.cat([seen[i][key] for i in order]).detach() for key in seen[0]}
    state = loss.next_state(loss.initial_state(), statistics)
    return torch.cat([loss(Examples(part.chosen, part.rejected, part.columns, statistics, state)) for part in parts])


def _part(examples: Examples, cut: slice) -> Examples:
    def side(responses: Responses) -> Responses:
        return Responses(*(value[cut] if value is not None else None for value in vars(responses).values()))

    return Examples(side(examples.chosen), side(examples.losers), {k: v[cut] for k, v in examples.columns.items()})


CUTS = [[slice(0, N)], [slice(0, 3), slice(3, N)], [slice(i, i + 1) for i in range(N)]]


def bco(pairs: list[Pair]) -> Tensor:
    rewards = [0.3 * u for p in pairs for u in (p.u_w, p.u_l)]
    delta = (sum(rewards) / len(rewards)).detach()
    return torch.stack([nls(0.3 * p.u_w - delta) + nls(-(0.3 * p.u_l - delta)) for p in pairs])


def aot(pairs: list[Pair]) -> Tensor:
    x = torch.stack([p.W - p.L for p in pairs]).sort().values
    return nls(0.3 * (x - torch.stack([p.RW - p.RL for p in pairs]).sort().values))


def aot_unpaired(pairs: list[Pair]) -> Tensor:
    h = torch.stack([p.u_w for p in pairs]).sort().values - torch.stack([p.u_l for p in pairs]).sort().values
    return 0.9 * nls(0.3 * h) + 0.1 * nls(-0.3 * h)


def batch_mean(pairs: list[Pair]) -> Tensor:
    tokens = sum(p.nw for p in pairs)
    return torch.stack([nls(0.3 * p.d) - 2 * p.W * len(pairs) / tokens for p in pairs])


def mpo(pairs: list[Pair]) -> Tensor:
    return torch.stack([0.8 * nls(0.3 * p.d) - p.W / p.nw for p in pairs]) + 0.2 * bco(pairs)


@pytest.mark.parametrize(
    ("loss", "formula"),
    [
        (BCO(0.3), bco),
        (AOT(0.3), aot),
        (AOTUnpaired(0.3, 0.1), aot_unpaired),
        (DPO(0.3, nll_weight=2.0, nll="batch_mean"), batch_mean),
        (Mix({"dpo": 0.8, "bco": 0.2, "nll": 1.0}, 0.3), mpo),
    ],
    ids=["bco", "aot", "aot_unpaired", "batch_mean", "mpo"],
)
@pytest.mark.parametrize("cuts", CUTS, ids=["1", "2", str(N)])
def test_statistics_are_those_of_the_global_batch(
    loss: Loss, formula: Callable[[list[Pair]], Tensor], cuts: list[slice]
) -> None:
    examples, policy, pairs = draw()
    found, expected = global_parts(loss, examples, cuts).mean(), formula(pairs).mean()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    for ours, theirs in zip(gradients(found, policy), gradients(expected, policy)):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_a_sum_is_that_of_its_terms() -> None:
    loss = build("mix", {"terms": {"dpo": 0.8, "mix": 2.0}, "beta": 0.3, "settings": {"mix": {"terms": {"nll": 1}}}})
    examples = draw()[0]
    terms = loss.term_losses(examples)
    assert loss.term_names == tuple(terms) == ("dpo", "mix") and DPO(0.3).term_names == ()
    torch.testing.assert_close(0.8 * terms["dpo"] + 2 * terms["mix"], loss(examples))


def test_equal_examples_share_their_ranks() -> None:
    """Of a policy that equals the reference all log-ratios are 0, and their order is arbitrary."""
    side = torch.zeros(4, dtype=torch.float64)
    reference = torch.tensor([1.0, -1.0, 3.0, 0.5], dtype=torch.float64)
    length = torch.ones(4)
    examples = Examples(Responses(side, length, reference), Responses(side, length, side))
    for loss in (AOT(1.0), AOTUnpaired(1.0)):
        found = global_parts(loss, examples, CUTS[0][:1])
        z = reference if type(loss) is AOT else -reference
        torch.testing.assert_close(found.mean(), nls((side - z) if type(loss) is AOT else z - side).mean())


def test_the_shift_of_bco_is_the_mean_of_all_batches() -> None:
    loss = BCO(0.5)
    state = loss.initial_state()
    batches = [torch.tensor([1.0, 2.0]), torch.tensor([6.0])]
    for rewards in batches:
        state = loss.next_state(state, {"reward": rewards})
    assert state == {"delta": 3.0, "n": 3.0}


@pytest.mark.parametrize("shift", [-3.0, 3.0])  # of the mismatched log-ratios: z0 is 0, and is not
def test_kto_is_equations_7_and_8_of_its_paper(shift: float) -> None:
    examples, policy, pairs = draw()
    label = torch.tensor([1.0, 0, 1, 1, 0, 1, 0])
    mismatched = torch.randn(5, dtype=torch.float64) + shift
    loss = KTO(0.3, 1.5, 0.5)
    seen = Examples(examples.chosen, None, {"label": label}, {"log_ratio": mismatched})
    z0 = max(0.0, mismatched.mean().item())
    expected = torch.stack(
        [
            1.5 * (1 - sigma(0.3 * (p.u_w - z0))) if good else 0.5 * (1 - sigma(0.3 * (z0 - p.u_w)))
            for p, good in zip(pairs, label)
        ]
    )
    torch.testing.assert_close(loss(seen), expected, rtol=1e-9, atol=1e-9)
    for ours, theirs in zip(gradients(loss(seen), policy), gradients(expected, policy)):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_listwise_is_the_likelihood_of_a_ranking() -> None:
    examples, policy, pairs = draw()
    sizes = [3, 2, 2]
    seen = Examples(examples.chosen, examples.rejected, ranked=examples.chosen, sizes=sizes)
    rewards = [0.3 * p.u_w for p in pairs]
    expected = []
    for size in sizes:
        ranking, rewards = rewards[:size], rewards[size:]
        likelihood = torch.ones((), dtype=torch.float64)
        for k in range(size):
            likelihood = likelihood * torch.exp(ranking[k]) / sum(torch.exp(r) for r in ranking[k:])
        expected.append(-torch.log(likelihood))
    found = Listwise(0.3)(seen)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-9, atol=1e-9)
    for ours, theirs in zip(gradients(found, policy), gradients(torch.stack(expected), policy)):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


# --- What else a loss says ---


@pytest.mark.parametrize("name", [name for name in LOSS_FILES if name not in ("sft", "unlikelihood", "nll")])
def test_a_policy_equal_to_its_reference_has_no_reward(name: str) -> None:
    loss = build(name, {"beta": 0.3} | ({"terms": {"dpo": 1.0}} if name == "mix" else {}))
    side = torch.tensor([-3.0, -70.0])
    rewards = loss.rewards(Responses(side, torch.tensor([2, 9]), side.clone()))
    assert rewards is not None
    if loss.needs_reference:
        assert rewards.tolist() == [0.0, 0.0]
    for divergence in ("forward_kl", "js", "chi2_kl"):
        rewards = DPO(0.3, divergence=divergence).rewards(Responses(side, torch.tensor([2, 9]), side.clone()))
        assert rewards.tolist() == [0.0, 0.0]


def test_rewards_are_those_of_the_papers() -> None:
    examples, _, pairs = draw()
    for loss, reward in (
        (DPO(0.3), lambda p: 0.3 * p.u_l),
        (DPO(0.3, reference_free=True), lambda p: 0.3 * p.u_l),
        (IPO(0.3, average_log_prob=True), lambda p: 0.3 * p.u_l / p.nl),
        (build("simpo", {"beta": 2.0}), lambda p: 2.0 * p.L / p.nl),
        (build("cpo", {"beta": 0.2}), lambda p: 0.2 * p.L),
        (DPO(0.3, divergence="forward_kl"), lambda p: 0.3 * (1 - torch.exp(-p.u_l))),
        (Mix({"nll": 1.0, "bco": 0.5}, 0.3), lambda p: 0.3 * p.u_l),
    ):
        expected = torch.stack([reward(p) for p in pairs])
        torch.testing.assert_close(loss.rewards(examples.losers), expected)


def clipped_margin(p: Pair) -> Tensor:
    return torch.clamp(0.05 * (torch.exp(p.u_w) + p.u_w - torch.exp(p.u_l) - p.u_l), -0.01, 0.01)


def clipped(p: Pair) -> float:
    """0 if the difference of rewards is at its bound, where a pair does not push."""
    return float(clipped_margin(p).abs() < 0.01)


@pytest.mark.parametrize(
    ("loss", "weight"),
    [
        (DPO(0.3), lambda p: sigma(-0.3 * p.d)),
        (DPO(0.3, 0.2), lambda p: 0.8 * sigma(-0.3 * p.d) - 0.2 * sigma(0.3 * p.d)),
        (IPO(0.5), lambda p: -2 * (p.d - 1) / 0.5),
        (Pairs(0.3, link="hinge"), lambda p: (0.3 * p.d < 1).double()),
        (DPO(0.3, weighting="column"), lambda p: p.weight * sigma(-0.3 * p.d)),
        (
            DPO(0.3, dpop_weight=5.0),
            lambda p: (6 if p.u_w < 0 else 1) * sigma(-0.3 * (p.d + 5 * torch.clamp(p.u_w, max=0))),
        ),
        (DPO(0.05, divergence="chi2_kl", clip=0.01), lambda p: clipped(p) * sigma(-clipped_margin(p))),
        (DPO(0.3, margin="column"), lambda p: sigma(p.margin - 0.3 * p.d)),
        (build("apo_zero", {"beta": 0.3}), lambda p: sigma(0.3 * p.u_w) * sigma(-0.3 * p.u_w)),
        (Mix({"nll": 1.0, "dpo": 0.8, "simpo": 0.5}, beta=0.3), lambda p: sigma(-0.3 * p.d)),
    ],
)
def test_gradient_weights_are_slopes_in_the_chosen_reward(loss: Loss, weight: Callable[[Pair], Tensor]) -> None:
    examples, _, pairs = draw()
    with torch.no_grad():
        found = loss.gradient_weight(examples)
    assert found is not None
    torch.testing.assert_close(found, torch.stack([weight(p) for p in pairs]).detach())


def test_robust_dpo_expects_on_flipped_pairs_what_dpo_computes_on_clean_ones() -> None:
    pairs, e = draw()[0], 0.2
    flipped = Examples(pairs.losers, pairs.chosen)
    robust = DPO(0.1, e, robust=True)
    expected = (1 - e) * robust(pairs) + e * robust(flipped)
    torch.testing.assert_close(expected, DPO(0.1)(pairs), rtol=1e-12, atol=0)


def test_large_log_ratios_overflow_nowhere_they_need_not() -> None:
    for name in ("dpo", "hinge", "exo", "nca", "apo_zero", "apo_down", "orpo", "simpo", "bco"):
        loss = build(name, {} if name in ("orpo", "simpo") else {"beta": 1.0})
        for values in ((-4000.0, -1e-3), (-1e-3, -4000.0)):
            sides = [torch.tensor([value], requires_grad=True) for value in values]
            length, reference = torch.tensor([4.0]), torch.tensor([-50.0])
            examples = Examples(*(Responses(side, length, reference) for side in sides), state={"delta": 0.0})
            value = loss(examples)
            assert torch.isfinite(value).all(), (name, values)
            assert all(torch.isfinite(g).all() for g in torch.autograd.grad(value.sum(), sides)), (name, values)


def test_tokens_that_do_not_count_are_left_out() -> None:
    logps = torch.tensor([[-1.0, -2.0, -9.0], [-4.0, float("-inf"), -6.0]])
    mask = torch.tensor([[True, True, False], [True, False, True]])
    assert sum_tokens(logps, mask).tolist() == [-3.0, -10.0]
    side = Responses(sum_tokens(logps, mask), mask.sum(-1), tokens=logps, mask=mask)
    assert side.counted(side.tokens).tolist() == [[-1.0, -2.0, 0.0], [-4.0, 0.0, -6.0]]
    assert side.positions[mask].tolist() == [1, 2, 1, 2]


def test_unlikelihood_and_sft_need_no_reference() -> None:
    for loss in (Unlikelihood(0.3), SFT()):
        assert not loss.needs_reference and not loss.gives_rewards and not loss.weighs_gradients


# --- Misuse ---


@pytest.mark.parametrize(
    ("make_loss", "message"),
    [
        (lambda: DPO(beta=-1), "loss.beta=-1 must be more than 0"),
        (lambda: KTO(True), "loss.beta=true: input should be a number"),
        (lambda: BCO(math.nan), "loss.beta=nan must be a finite number"),
        (lambda: Pairs(0.1, link="hinje", tau=0), "loss.link=hinje is not known; choose from: logistic, hinge"),
        (lambda: Pairs(0.1, link="hinje", tau=0), "; loss.tau=0 must be more than 0"),
        (lambda: DPO(0.1, robust=True), "loss.robust=true needs loss.label_smoothing above 0"),
        (lambda: SFT(dft="perhaps"), "loss.dft=perhaps: input should be a valid boolean"),
        (lambda: Mix({"dpo": 1.0, "nll": 0}, beta=0.1), "loss.terms.nll=0 must be more than 0"),
        (lambda: Mix({"dpo": 1.0}, beta=-1), "loss.beta=-1 must be more than 0"),
    ],
)
def test_a_loss_made_in_python_is_checked(make_loss: Callable[[], Loss], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        make_loss()
    assert len(str(error.value).splitlines()) == 1


MISUSE = [
    (["loss=dpo", "loss.beta=0"], "loss.beta=0 must be more than 0"),
    (["loss=dpo", "loss.beta=1", "loss.robust=true"], "loss.robust=true needs loss.label_smoothing"),
    (
        ["loss=hinge", "loss.beta=1", "loss.label_smoothing=0.1"],
        "is for loss.link=logistic or exo, not loss.link=hinge",
    ),
    (["loss=exo", "loss.beta=1", "loss.label_smoothing=0"], "loss.link=exo needs loss.label_smoothing above 0"),
    (["loss=exo", "loss.beta=1", "loss.robust=true"], "loss.robust=true is for loss.link=logistic, not loss.link=exo"),
    (["loss=sppo", "loss.beta=1", "loss.gamma=1"], "loss.link=sppo scores each response alone"),
    (["loss=nca", "loss.beta=1", "loss.dpop_weight=1"], "loss.link=nca scores each response alone"),
    (["loss=dpo", "loss.beta=1", "loss.margin=length"], "loss.margin=length and loss.margin_alpha=<number> need each"),
    (
        ["loss=dpo", "loss.beta=1", "loss.margin_alpha=0.1"],
        "loss.margin=length and loss.margin_alpha=<number> need each",
    ),
    (["loss=dpo", "loss.beta=1", "loss.divergence=alpha"], "loss.divergence=alpha and loss.divergence_alpha=<number>"),
    (["loss=simpo", "loss.divergence=js"], "loss.divergence=js is one from a reference, and this loss ignores it"),
    (["loss=dpo", "loss.beta=1", "loss.divergence=log_odds"], "loss.divergence=log_odds takes mean log-probabilities"),
    (["loss=cpo", "loss.reference_free=true"], "loss.use_reference=false has none: set one of both"),
    (["loss=simpo", "loss.dpop_weight=1"], "needs the reference, which this loss ignores"),
    (["loss=ipo", "loss.beta=1", "loss.ld_alpha=0.5"], "IPO's target 1 / (2 beta) does not follow"),
    (["loss=orpo", "loss.ld_alpha=0.5"], "odds are of mean log-probabilities"),
    (["loss=dpo", "loss.beta=1", "loss.delta=2"], "loss.delta=2.0 is for loss.link=hinge, not loss.link=logistic"),
    (["loss=dpo", "loss.beta=1", "loss.tau=2"], "loss.tau=2.0 is for loss.link=discopop, not loss.link=logistic"),
    (["loss=nll", "loss.nll_weight=0"], "leave nothing to learn"),
    (["loss=dpo", "loss.beta=1", "loss.link=cubic"], "loss.link=cubic is not known; choose from: logistic, hinge"),
    (["loss=mix", "loss.terms={dpo: 1}"], "or 'loss.settings={dpo: {beta: <value>}}'"),
    (["loss=mix", "loss.terms={mix: 1}"], "mix: terms is missing: pass 'loss.settings={mix: {terms: <value>}}'"),
    (
        ["loss=mix", "loss.beta=1", "loss.terms={dpo: 1}", "loss.settings={dpo: {bata: 0.2}}"],
        "loss.settings={dpo: {bata: 0.2}}: loss=dpo has no such key; did you mean 'beta'?",
    ),
    (
        ["loss=mix", "loss.beta=1", "loss.terms={bco: 1}", "loss.settings={bco: {gamma: 1}}"],
        "loss.settings={bco: {gamma: 1}}: loss=bco has no such key",
    ),
    (["loss=mix", "loss.terms={kto: 1}"], "loss.terms, kto: it does not learn from pairs, and all terms do; the term"),
    (["loss=mix", "loss.terms={dpoo: 1}"], "loss.name=dpoo is not known; choose from: aot, aot_unpaired, apo_down"),
    (["loss=mix", "loss.terms={sft: 1}"], "and all terms do; the term most like it is nll"),
    (["loss=mix", "loss.terms={nll: 1}", "loss.settings={dpo: {beta: 1}}"], "loss.settings.dpo is no term"),
    (["loss=mix", "loss.terms={}"], "loss.terms={} names no loss"),
    (["loss=tdpo", "loss.beta=1"], "loss=tdpo needs the reference's whole distribution: set reference.mode=live"),
    (["loss=simpo", "reference.mode=live"], "reference.mode=live, but loss=simpo needs no reference"),
]


@pytest.mark.parametrize(("given", "message"), MISUSE, ids=[" ".join(given) for given, _ in MISUSE])
def test_misuse_is_one_clear_line(given: list[str], message: str) -> None:
    from dpo.utils import UserError

    with pytest.raises(UserError) as error:
        load_config(["exp_name=x", *given])
    assert message in str(error.value) and len(str(error.value).splitlines()) == 1
