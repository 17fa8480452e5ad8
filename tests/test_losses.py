"""Losses against their formulas written out in float64, gradients against finite differences."""

import math

import pytest
import torch

from losses import LOSSES, DPOLoss, IPOLoss, SequenceLogps, SFTLoss, UnlikelihoodLoss, implicit_rewards, reduce_tokens


def random_logps(n: int = 7) -> SequenceLogps:
    generator = torch.Generator().manual_seed(1)
    sides = (-50 * torch.rand(n, generator=generator, dtype=torch.float64) for _ in range(4))
    return SequenceLogps(*sides)


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > -30 else x


@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("reference_free", [False, True])
def test_dpo_is_equation_7_of_the_paper(beta: float, smoothing: float, reference_free: bool) -> None:
    logps = random_logps()
    found = DPOLoss(beta, smoothing, reference_free)(logps).tolist()
    for i, value in enumerate(found):
        win, lose, ref_win, ref_lose = (float(side[i]) for side in vars(logps).values())
        h = (win - lose) - (0.0 if reference_free else ref_win - ref_lose)
        expected = -(1 - smoothing) * log_sigmoid(beta * h) - smoothing * log_sigmoid(-beta * h)
        assert value == pytest.approx(expected, rel=1e-12)


def test_ipo_is_equation_17_of_its_paper() -> None:
    logps = random_logps()
    for i, value in enumerate(IPOLoss(0.2)(logps).tolist()):
        win, lose, ref_win, ref_lose = (float(side[i]) for side in vars(logps).values())
        assert value == pytest.approx(((win - ref_win) - (lose - ref_lose) - 2.5) ** 2, rel=1e-12)


def test_sft_is_the_negative_log_likelihood() -> None:
    logps = random_logps()
    assert torch.equal(SFTLoss()(logps), -logps.policy_chosen)


def test_robust_dpo_expects_on_flipped_pairs_what_dpo_computes_on_clean_ones() -> None:
    logps, e = random_logps(), 0.2
    flipped = SequenceLogps(*(side for a, b in zip(*[iter(vars(logps).values())] * 2) for side in (b, a)))
    robust = DPOLoss(0.1, e, robust=True)
    expected = (1 - e) * robust(logps) + e * robust(flipped)
    torch.testing.assert_close(expected, DPOLoss(0.1)(logps), rtol=1e-12, atol=0)


def test_unlikelihood_is_its_formula() -> None:
    logps = random_logps()
    assert torch.equal(UnlikelihoodLoss(0.3)(logps), 0.3 * logps.policy_rejected - logps.policy_chosen)


LOSSES_OF_PAIRS = [DPOLoss(0.1), DPOLoss(0.5, 0.1), DPOLoss(0.3, 0.0, True), DPOLoss(0.3, 0.1, False, True)]


@pytest.mark.parametrize("loss", [*LOSSES_OF_PAIRS, IPOLoss(0.1), UnlikelihoodLoss(0.5)])
def test_gradients_equal_finite_differences(loss: DPOLoss | IPOLoss | UnlikelihoodLoss) -> None:
    logps = random_logps()
    assert torch.autograd.gradcheck(
        lambda chosen, rejected: loss(
            SequenceLogps(chosen, rejected, logps.reference_chosen, logps.reference_rejected)
        ),
        (logps.policy_chosen.requires_grad_(), logps.policy_rejected.requires_grad_()),  # type: ignore[union-attr]
    )


def test_policy_equal_to_reference_gives_log_2_and_no_reward() -> None:
    side = torch.tensor([-3.0, -70.0])
    logps = SequenceLogps(side, 2 * side, side, 2 * side)
    assert DPOLoss(0.1)(logps).tolist() == pytest.approx([math.log(2)] * 2)
    assert [r.tolist() for r in implicit_rewards(logps, 0.1)] == [[0.0, 0.0], [0.0, 0.0]]


def test_sum_and_average_of_tokens() -> None:
    logps = torch.tensor([[-1.0, -2.0, -9.0], [-4.0, float("-inf"), -6.0]])
    mask = torch.tensor([[True, True, False], [True, False, True]])
    assert reduce_tokens(logps, mask, average=False).tolist() == [-3.0, -10.0]
    assert reduce_tokens(logps, mask, average=True).tolist() == [-1.5, -5.0]


def test_every_loss_states_its_facts() -> None:
    for name, build in LOSSES.items():
        loss = build(**{"sft": {}, "unlikelihood": {"alpha": 1.0}}.get(name, {"beta": 0.1}))
        assert loss.needs_reference == loss.needs_pairs == (name != "sft")
        assert loss.average_log_prob is False
