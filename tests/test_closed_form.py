"""DPO against its theory, where all responses can be enumerated."""

import csv
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import closed_form
from closed_form import measure, optimum, preferences, random_world, reward_error, total_variation, train
from losses import DPO

WORLD = random_world(1)


def drawn(probabilities: Tensor, labels: int, seed: int) -> Tensor:
    """The shares of `labels` labels that each pair gets, instead of their probabilities."""
    generator = torch.Generator().manual_seed(seed)
    upper = torch.triu(torch.ones_like(probabilities), diagonal=1)
    wins = torch.binomial(torch.full_like(probabilities, labels), probabilities, generator=generator) / labels
    return wins * upper + ((1 - wins) * upper).transpose(1, 2)


@pytest.mark.parametrize("beta", [0.05, 0.1, 0.5, 1.0, 5.0])
def test_dpo_reaches_the_optimum_and_the_rewards(beta: float) -> None:
    policy = train(WORLD, DPO(beta), preferences(WORLD))
    assert total_variation(policy, optimum(WORLD, beta)) < 1e-3
    assert reward_error(WORLD, policy, beta) < 1e-2


def test_a_larger_beta_stays_closer_to_the_reference() -> None:
    points = [measure(WORLD, train(WORLD, DPO(beta), preferences(WORLD))) for beta in (0.05, 0.2, 1.0, 5.0)]
    assert points == sorted(points, reverse=True)


@pytest.mark.parametrize("flipped", [0.05, 0.2])
def test_what_flipped_labels_do(flipped: float) -> None:
    """Conservative DPO computes on clean labels what DPO expects on flipped ones; on flipped labels it is off twice."""
    beta, clean, noisy = 0.5, preferences(WORLD), preferences(WORLD, flipped)
    best = optimum(WORLD, beta)
    plain = train(WORLD, DPO(beta), noisy)
    assert total_variation(train(WORLD, DPO(beta, flipped), clean), plain) < 1e-6
    # Its differences of implicit rewards are logits of what it was told: (1 - e) q + e (1 - q), q the labels it sees.
    twice = train(WORLD, DPO(beta, flipped), noisy)
    told = ((1 - flipped) * noisy + flipped * (1 - noisy)).logit()
    implied = beta * (twice - WORLD.reference)
    # Five responses have ten pairs and four differences: exact only where the pairs agree with each other, so close.
    assert float((implied[:, :, None] - implied[:, None, :] - told).abs().max()) < 0.5
    assert total_variation(best, plain) > 1e-2 and total_variation(best, twice) > total_variation(best, plain)


@pytest.mark.parametrize("flipped", [0.05, 0.2])
def test_robust_dpo_reaches_the_optimum_with_flipped_labels(flipped: float) -> None:
    for beta in (0.05, 0.5, 5.0):
        policy = train(WORLD, DPO(beta, flipped, robust=True), preferences(WORLD, flipped))
        assert total_variation(policy, optimum(WORLD, beta)) < 1e-3
        assert reward_error(WORLD, policy, beta) < 1e-2
    drawn_labels = drawn(preferences(WORLD, flipped), 20_000, 0)
    policy = train(WORLD, DPO(0.5, flipped, robust=True), drawn_labels)
    # A label's share is off by up to 0.0035 / (1 - 2e) once flips are taken out: as in the next test.
    assert total_variation(policy, optimum(WORLD, 0.5)) < 0.05 / (1 - 2 * flipped)


def test_drawn_labels_agree_within_sampling_error() -> None:
    beta, flipped, labels = 0.5, 0.1, 20_000
    plain = train(WORLD, DPO(beta), drawn(preferences(WORLD, flipped), labels, 0))
    conservative = train(WORLD, DPO(beta, flipped), drawn(preferences(WORLD), labels, 1))
    # The standard error of a label's share is at most 0.0035; a policy's log-ratios are 1 / beta times its logits.
    assert total_variation(plain, conservative) < 0.05
    shares = drawn(preferences(WORLD), labels, 0)
    off = torch.eye(shares.shape[1], dtype=torch.bool)
    assert float((shares - preferences(WORLD)).abs()[:, ~off].max()) < 5 * 0.0036


def test_the_script_writes_table_and_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["closed_form.py", "--betas", "0.1,1", "--out", str(tmp_path / "out")])
    closed_form.main()
    rows = list(csv.DictReader(open(tmp_path / "out" / "closed_form.csv")))
    assert len(rows) == 12 and (tmp_path / "out" / "closed_form.png").stat().st_size > 10_000
    assert "conservative DPO, flipped labels" in capsys.readouterr().out
