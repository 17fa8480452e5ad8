"""Every loss: one class per loss, a pure function of log-probabilities (see dpo/loss.py for what it may ask for).

To add one: a class here and config/loss/<name>.yaml. Its fields are its YAML keys; their types and bounds stand here.
"""

import importlib
from dataclasses import dataclass
from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from dpo.loss import Examples, Loss, Responses
from dpo.utils import UserError

Beta = Annotated[float, Field(gt=0)]


@dataclass(frozen=True)
class SFT(Loss, name="sft"):
    """Negative log-likelihood of the target response, -log pi(y | x), summed over its tokens."""

    needs_rejected = False
    needs_reference = False

    def __call__(self, examples: Examples) -> Tensor:
        return -examples.chosen.sum


@dataclass(frozen=True)
class DPO(Loss, name="dpo"):
    """Direct Preference Optimization, Rafailov et al. 2023 (arXiv:2305.18290), equation 7.

    -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h), with h = log pi(y_w)/ref(y_w) - log pi(y_l)/ref(y_l).
    e = `label_smoothing` is the assumed rate of flipped labels: conservative DPO, Mitchell 2023, "A note on DPO with
    noisy preferences", equation 3. `robust` removes flips at rate e from the loss l: ((1 - e) l(h) - e l(-h)) / (1-2e)
    has the expectation that l has without flips (Chowdhury et al. 2024, arXiv:2403.00409). `reference_free` assumes a
    uniform reference: its ratio drops out of h. Rewards are still measured against the frozen reference.
    """

    beta: Beta
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    reference_free: bool = False
    robust: bool = False

    def __post_init__(self) -> None:
        if self.robust and not self.label_smoothing:
            raise ValueError("loss.robust=true needs loss.label_smoothing: the rate at which labels are flipped")

    def __call__(self, examples: Examples) -> Tensor:
        if self.reference_free:
            difference = examples.chosen.sum - examples.losers.sum
        else:
            difference = examples.logratio_difference()
        h, e = self.beta * difference, self.label_smoothing
        if self.robust:
            return (-F.logsigmoid(h) * (1 - e) + F.logsigmoid(-h) * e) / (1 - 2 * e)
        return -F.logsigmoid(h) * (1 - e) - F.logsigmoid(-h) * e

    def rewards(self, responses: Responses) -> Tensor:
        """beta log pi(y)/ref(y), section 4 of the paper, below equation 7."""
        return self.beta * responses.log_ratio


@dataclass(frozen=True)
class IPO(Loss, name="ipo"):
    """Identity Preference Optimization, Azar et al. 2023 (arXiv:2310.12036), equation 17: (h - 1 / (2 beta))^2.

    beta is the paper's tau. `average_log_prob` takes log-probabilities per token instead of per response, as the
    authors later recommended. The sum is what the original DPO code computes.
    """

    beta: Beta
    average_log_prob: bool = False

    def __call__(self, examples: Examples) -> Tensor:
        return (examples.logratio_difference(mean=self.average_log_prob) - 1 / (2 * self.beta)) ** 2

    def rewards(self, responses: Responses) -> Tensor:
        return self.beta * (responses.mean_log_ratio if self.average_log_prob else responses.log_ratio)


@dataclass(frozen=True)
class Unlikelihood(Loss, name="unlikelihood"):
    """-log pi(y_w) + alpha log pi(y_l): a baseline of Rafailov et al. 2023, section 6. It has no lower bound."""

    alpha: Annotated[float, Field(ge=0, le=1)]
    needs_reference = False

    def __call__(self, examples: Examples) -> Tensor:
        return -examples.chosen.sum + self.alpha * examples.losers.sum


def names() -> list[str]:
    """Return the names of this file's losses."""
    return [kind.name for kind in _classes(Loss)]


def _classes(base: type[Loss]) -> list[type[Loss]]:
    found = [kind for child in base.__subclasses__() for kind in (child, *_classes(child))]
    return [kind for kind in found if kind.__module__ == __name__]


def find(name: str) -> type[Loss]:
    """Return the loss class called `name`: one of this file, or module.Class. Raise UserError if there is none."""
    for kind in _classes(Loss):
        if kind.name == name:
            return kind
    module, dot, attribute = name.rpartition(".")
    if dot:
        try:
            found = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise UserError(f"loss.name={name} cannot be imported: {error}") from error
        if isinstance(found, type) and issubclass(found, Loss):
            return found
        raise UserError(f"loss.name={name} is no subclass of dpo.loss.Loss")
    raise UserError(f"loss.name={name} is not known; choose from: {', '.join(names())}; or give module.Class")
