"""Losses against their formulas written out in float64, gradients against finite differences."""

import math

import pytest
import torch

from dpo.loss import Examples, Loss, Responses, sum_tokens
from losses import DPO, IPO, SFT, Unlikelihood, find, names
from settings import CONFIG_DIR, load_config


def pairs_of(sides: dict[str, torch.Tensor]) -> Examples:
    """Pairs of responses of 3 and 5 tokens."""
    lengths = (torch.full_like(sides["win"], 3), torch.full_like(sides["win"], 5))
    chosen = Responses(sides["win"], lengths[0], sides["ref_win"])
    return Examples(chosen, Responses(sides["lose"], lengths[1], sides["ref_lose"]))


def random_sides(n: int = 7) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: -50 * torch.rand(n, generator=generator, dtype=torch.float64)
        for name in ("win", "lose", "ref_win", "ref_lose")
    }


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > -30 else x


@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("reference_free", [False, True])
def test_dpo_is_equation_7_of_the_paper(beta: float, smoothing: float, reference_free: bool) -> None:
    sides = random_sides()
    for i, value in enumerate(DPO(beta, smoothing, reference_free)(pairs_of(sides)).tolist()):
        win, lose, ref_win, ref_lose = (float(side[i]) for side in sides.values())
        h = (win - lose) - (0.0 if reference_free else ref_win - ref_lose)
        expected = -(1 - smoothing) * log_sigmoid(beta * h) - smoothing * log_sigmoid(-beta * h)
        assert value == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("average", [False, True])
def test_ipo_is_equation_17_of_its_paper(average: bool) -> None:
    sides = random_sides()
    for i, value in enumerate(IPO(0.2, average)(pairs_of(sides)).tolist()):
        win, lose, ref_win, ref_lose = (float(side[i]) for side in sides.values())
        n_win, n_lose = (3, 5) if average else (1, 1)
        h = (win - ref_win) / n_win - (lose - ref_lose) / n_lose
        assert value == pytest.approx((h - 2.5) ** 2, rel=1e-12)


def test_sft_is_the_negative_log_likelihood() -> None:
    sides = random_sides()
    assert torch.equal(SFT()(pairs_of(sides)), -sides["win"])


def test_robust_dpo_expects_on_flipped_pairs_what_dpo_computes_on_clean_ones() -> None:
    pairs, e = pairs_of(random_sides()), 0.2
    flipped = Examples(pairs.losers, pairs.chosen)
    robust = DPO(0.1, e, robust=True)
    expected = (1 - e) * robust(pairs) + e * robust(flipped)
    torch.testing.assert_close(expected, DPO(0.1)(pairs), rtol=1e-12, atol=0)


def test_unlikelihood_is_its_formula_and_needs_no_reference() -> None:
    sides = random_sides()
    pairs = Examples(Responses(sides["win"], sides["win"]), Responses(sides["lose"], sides["lose"]))
    assert torch.equal(Unlikelihood(0.3)(pairs), 0.3 * sides["lose"] - sides["win"])
    assert not Unlikelihood(0.3).needs_reference and not Unlikelihood(0.3).gives_rewards


LOSSES_OF_PAIRS = [DPO(0.1), DPO(0.5, 0.1), DPO(0.3, 0.0, True), DPO(0.3, 0.1, False, True)]


@pytest.mark.parametrize("loss", [*LOSSES_OF_PAIRS, IPO(0.1), IPO(0.1, True), Unlikelihood(0.5)])
def test_gradients_equal_finite_differences(loss: Loss) -> None:
    sides = random_sides()
    assert torch.autograd.gradcheck(
        lambda win, lose: loss(pairs_of(sides | {"win": win, "lose": lose})),
        (sides["win"].requires_grad_(), sides["lose"].requires_grad_()),
    )


def test_policy_equal_to_reference_gives_log_2_and_no_reward() -> None:
    side = torch.tensor([-3.0, -70.0])
    pairs = pairs_of({"win": side, "lose": 2 * side, "ref_win": side, "ref_lose": 2 * side})
    assert DPO(0.1)(pairs).tolist() == pytest.approx([math.log(2)] * 2)
    for loss in (DPO(0.1), IPO(0.1), IPO(0.1, True)):
        assert [loss.rewards(responses).tolist() for responses in (pairs.chosen, pairs.losers)] == [[0.0, 0.0]] * 2


def test_rewards_are_those_of_the_papers() -> None:
    sides = random_sides()
    ratio = sides["lose"] - sides["ref_lose"]
    rejected = pairs_of(sides).losers
    assert torch.equal(DPO(0.3).rewards(rejected), 0.3 * ratio)
    torch.testing.assert_close(IPO(0.3, True).rewards(rejected), 0.3 * ratio / 5)


def test_tokens_that_do_not_count_are_left_out_of_the_sum() -> None:
    logps = torch.tensor([[-1.0, -2.0, -9.0], [-4.0, float("-inf"), -6.0]])
    mask = torch.tensor([[True, True, False], [True, False, True]])
    assert sum_tokens(logps, mask).tolist() == [-3.0, -10.0]


def test_every_loss_has_a_file_of_its_values_and_each_file_a_loss() -> None:
    files = sorted(path.stem for path in (CONFIG_DIR / "loss").glob("*.yaml"))
    assert sorted(names()) == files
    required = {"dpo": {"beta": 0.1}, "ipo": {"beta": 0.1}}
    for name in names():
        given = required.get(name, {})
        loss = load_config(
            ["exp_name=x", f"loss={name}", *(f"loss.{key}={value}" for key, value in given.items())]
        ).loss
        assert loss == find(name)(**(given or ({"alpha": 1.0} if name == "unlikelihood" else {})))
        assert loss.name == name and loss.needs_rejected == (name != "sft")
