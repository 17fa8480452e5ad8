"""The benchmark of DPO: every formulation that it times gives the same loss and gradient."""

from collections.abc import Callable
from pathlib import Path

import pytest

import speed
from dpo.utils import UserError
from settings import load_config


@pytest.fixture
def work(overrides: Callable[..., list[str]]) -> speed.Work:
    return speed.prepare(load_config(overrides("loss=dpo", "loss.beta=0.1", "microbatch_tokens=300")), 16, 4)


def test_all_formulations_agree(work: speed.Work) -> None:
    seconds = speed.compare(work, speed.variants(work), 2, 1e-5)
    assert next(iter(seconds)) == speed.ORIGINAL and all(len(times) == 2 for times in seconds.values())
    assert len(speed.compare(work, speed.sweeps(work, (0.1, 0.5)), 1, 1e-5)) == 2
    counts = speed.tokens(work)
    assert counts["distinct"] <= counts["ours"] < counts["original"]
    one, two = (float(speed.useful(work, seconds)) for seconds in (1, 2))
    assert two > 0 and one == pytest.approx(2 * two, rel=0.02)
    assert all(speed.step_memory(work, name) > 0 for name in (speed.ORIGINAL, speed.OURS))


def test_a_formulation_that_differs_is_refused(work: speed.Work) -> None:
    steps = speed.variants(work)

    def wrong() -> float:
        loss = steps[speed.ORIGINAL]()
        work.policy.lm_head.weight.grad.mul_(1.01)
        return loss

    with pytest.raises(UserError, match="wrong computes another loss or gradient"):
        speed.compare(work, {speed.ORIGINAL: steps[speed.ORIGINAL], "wrong": wrong}, 1, 1e-5)


@pytest.mark.full
def test_a_model_of_random_weights(tmp_path: Path, cache_dir: Path) -> None:
    given = ["loss=dpo", "loss.beta=0.1", "datasets=[sentiment]", f"cache_dir={cache_dir}"]
    given += speed.random_model("1x512", tmp_path / "model", given)
    work = speed.prepare(load_config(["exp_name=x", *given]), 4, 4)
    assert work.policy.config.num_hidden_layers == 1 and work.policy.config.hidden_size == 512
    with pytest.raises(UserError, match="give LAYERSxWIDTH"):
        speed.random_model("16x1000", tmp_path, [])


def test_too_few_pairs(overrides: Callable[..., list[str]]) -> None:
    with pytest.raises(UserError, match="--pairs 100, and the data has 24"):
        speed.prepare(load_config(overrides("loss=dpo", "loss.beta=0.1")), 100, 4)
