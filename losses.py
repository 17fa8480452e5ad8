"""Losses as pure functions of sequence log-probabilities. Facts about a loss are attributes of its class."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class SequenceLogps:
    """log p(response | prompt) of the responses of `n` examples; each tensor is float32 of shape [n], in nats.

    Sums over response tokens, or averages where the loss has `average_log_prob`. The rejected and the reference sides
    are None where the loss needs neither.
    """

    policy_chosen: Tensor
    policy_rejected: Tensor | None = None
    reference_chosen: Tensor | None = None
    reference_rejected: Tensor | None = None


@dataclass(frozen=True)
class SFTLoss:
    """Negative log-likelihood of the target response, -log pi(y | x), summed over its tokens."""

    needs_pairs: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = False
    average_log_prob: ClassVar[bool] = False
    beta: ClassVar[float] = 0.0

    def __call__(self, logps: SequenceLogps) -> Tensor:
        """Returns the loss of each example, shape [n]."""
        return -logps.policy_chosen


@dataclass(frozen=True)
class DPOLoss:
    """Direct Preference Optimization, Rafailov et al. 2023 (arXiv:2305.18290), equation 7.

    -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h), h = log pi(y_w)/ref(y_w) - log pi(y_l)/ref(y_l), where
    e = `label_smoothing` is the assumed share of flipped labels: conservative DPO, Mitchell 2023, "A note on DPO with
    noisy preferences", equation 3. `robust` takes flips at rate e out of the loss l instead: ((1 - e) l(h) - e l(-h)) /
    (1 - 2e) has the expectation that l has without flips (Chowdhury et al. 2024, arXiv:2403.00409). `reference_free`
    takes a uniform reference: its ratio drops out of h. Implicit rewards are still reported against the frozen one.
    """

    beta: float
    label_smoothing: float = 0.0
    reference_free: bool = False
    robust: bool = False
    needs_pairs: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = True
    average_log_prob: ClassVar[bool] = False

    def __call__(self, logps: SequenceLogps) -> Tensor:
        """Returns the loss of each pair, shape [n]."""
        h, e = self.beta * _logratio_difference(logps, self.reference_free), self.label_smoothing
        if self.robust:
            return (-F.logsigmoid(h) * (1 - e) + F.logsigmoid(-h) * e) / (1 - 2 * e)
        return -F.logsigmoid(h) * (1 - e) - F.logsigmoid(-h) * e


@dataclass(frozen=True)
class IPOLoss:
    """Identity Preference Optimization, Azar et al. 2023 (arXiv:2310.12036), equation 17: (h - 1 / (2 beta))^2.

    beta is the paper's tau. `average_log_prob` takes log-probabilities per token instead of per response, as the
    authors later recommended; the sum is what the original DPO code computes.
    """

    beta: float
    average_log_prob: bool = False
    needs_pairs: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = True

    def __call__(self, logps: SequenceLogps) -> Tensor:
        """Returns the loss of each pair, shape [n]."""
        return (_logratio_difference(logps) - 1 / (2 * self.beta)) ** 2


@dataclass(frozen=True)
class UnlikelihoodLoss:
    """-log pi(y_w) + alpha log pi(y_l): the baseline of Rafailov et al. 2023, section 6, with its coefficient alpha.

    It has no lower bound, and does not look at the reference. Rewards are reported against it all the same, as plain
    log-ratios (beta 1).
    """

    alpha: float
    needs_pairs: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = True
    average_log_prob: ClassVar[bool] = False
    beta: ClassVar[float] = 1.0

    def __call__(self, logps: SequenceLogps) -> Tensor:
        """Returns the loss of each pair, shape [n]."""
        assert logps.policy_rejected is not None
        return -logps.policy_chosen + self.alpha * logps.policy_rejected


Loss = SFTLoss | DPOLoss | IPOLoss | UnlikelihoodLoss
LOSSES: dict[str, Callable[..., Loss]] = {
    "sft": SFTLoss,
    "dpo": DPOLoss,
    "ipo": IPOLoss,
    "unlikelihood": UnlikelihoodLoss,
}


def _logratio_difference(logps: SequenceLogps, reference_free: bool = False) -> Tensor:
    """log pi(y_w)/pi(y_l) - log ref(y_w)/ref(y_l), shape [n]."""
    assert logps.policy_rejected is not None
    difference = logps.policy_chosen - logps.policy_rejected
    if reference_free:
        return difference
    assert logps.reference_chosen is not None and logps.reference_rejected is not None
    return difference - (logps.reference_chosen - logps.reference_rejected)


def implicit_rewards(logps: SequenceLogps, beta: float) -> tuple[Tensor, Tensor]:
    """beta log pi(y)/ref(y) of chosen and rejected (the paper's section 4, below equation 7), two of shape [n]."""
    assert logps.policy_rejected is not None
    assert logps.reference_chosen is not None and logps.reference_rejected is not None
    chosen = beta * (logps.policy_chosen - logps.reference_chosen)
    rejected = beta * (logps.policy_rejected - logps.reference_rejected)
    return chosen.detach(), rejected.detach()


def reduce_tokens(token_logps: Tensor, mask: Tensor, average: bool) -> Tensor:
    """Sum (or mean) of per-token log-probabilities [r, t] where `mask` [r, t] is true. Returns shape [r]."""
    total = torch.where(mask, token_logps, 0.0).sum(-1)
    return total / mask.sum(-1).clamp(min=1) if average else total
