"""What a policy is measured by: the loss and metrics of a batch, and their means over data and processes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dpo import parallel
from dpo.data.batching import Batch, Cut, Example, deal, make_batch
from dpo.model.loading import Computation, TokenLogps, response_logps
from dpo.reference import Reference
from dpo.utils import progress
from losses import Loss, SequenceLogps, implicit_rewards, reduce_tokens
from preference_datasets import PreferenceData

# What a float32 log-probability may be off by for another order of summation (other micro-batches, layouts, numbers of
# processes, compiled kernels): relative, and in nats. SmolLM2-135M's differ by up to 1.3e-6 nats a token (60 pairs).
ROUNDING, TOKEN_ROUNDING = 1e-6, 2e-6
Metrics = dict[str, list[float]]
"""Metric name -> one value for each example."""


@dataclass(frozen=True)
class Scorer:
    """Computes the loss of a batch under a policy, and the metrics that go with it.

    `untrained`: the policy still is the reference, so they differ by rounding only, and no pair is told apart.
    """

    loss: Loss
    how: Computation
    reference: Reference | None
    untrained: bool = False

    def __call__(self, policy: PreTrainedModel, batch: Batch, split: str) -> tuple[Tensor, Metrics]:
        """Returns the loss of each example, shape [n], with gradients, and the metrics of each example.

        Metric names end in `split` ("train" or "eval") as in the original code. `logps_*` are sums over tokens, in
        nats, whatever the loss averages; rewards are beta times the log-ratio that the loss uses.
        """
        tokens = response_logps(policy, batch, self.how)
        device = tokens.logps.device
        reference = self.reference.response_logps(batch).to(device) if self.reference is not None else None
        sums = self._sequences(batch, tokens, reference, average=False)
        means = self._sequences(batch, tokens, reference, average=True)
        logps = means if self.loss.average_log_prob else sums
        losses = self.loss(logps)
        metrics = {f"logps_{split}/chosen": sums.policy_chosen, f"loss/{split}": losses}
        if logps.policy_rejected is not None and sums.policy_rejected is not None:
            chosen, rejected = implicit_rewards(logps, self.loss.beta)
            chosen_change, rejected_change = implicit_rewards(means, 1.0)
            slack = ROUNDING * tokens.logps.detach().abs() + (self.how.tolerance if self.untrained else TOKEN_ROUNDING)
            slack = reduce_tokens(slack, tokens.mask, self.loss.average_log_prob)
            rounding = self.loss.beta * (slack[batch.chosen] + slack[batch.rejected])  # of the margin: a tie up to this
            metrics |= {
                f"rewards_{split}/chosen": chosen,
                f"rewards_{split}/rejected": rejected,
                f"rewards_{split}/accuracies": (chosen - rejected > rounding).float(),
                f"rewards_{split}/margins": chosen - rejected,
                f"logps_{split}/rejected": sums.policy_rejected,
                f"logratios_per_token_{split}/chosen": chosen_change,
                f"logratios_per_token_{split}/rejected": rejected_change,
            }
        return losses, {name: value.detach().cpu().tolist() for name, value in metrics.items()}

    @staticmethod
    def _sequences(batch: Batch, policy: TokenLogps, reference: TokenLogps | None, average: bool) -> SequenceLogps:
        def sides(tokens: TokenLogps) -> tuple[Tensor, Tensor | None]:
            responses = reduce_tokens(tokens.logps, tokens.mask, average)
            return responses[batch.chosen], responses[batch.rejected] if batch.rejected is not None else None

        return SequenceLogps(*sides(policy), *(sides(reference) if reference is not None else (None, None)))


@dataclass(frozen=True)
class Share:
    """This process's part of a forward pass. Its examples do not count where it only keeps others company."""

    batch: Batch
    counts: bool
    examples: Sequence[Example] = ()


def shares(data: PreferenceData, examples: Sequence[Example], cut: Cut) -> list[Share]:
    """This process's micro-batches of a global batch, as many in every process."""
    mine = [dealt[parallel.data_rank()] for dealt in deal(data, examples, cut)]
    return [Share(make_batch(data, some or examples[:1]), bool(some), some) for some in mine]


def extend_metrics(total: Metrics, more: Metrics, counts: bool = True) -> None:
    """Append the values of `more` to those of `total`, or only its names where they do not count."""
    for name, values in more.items():
        total.setdefault(name, []).extend(values if counts else [])


def mean_metrics(metrics: Metrics) -> dict[str, float]:
    """Mean of every metric over the examples of all processes."""
    sums = parallel.sum_over_data([sum(values) for values in metrics.values()])
    counts = parallel.sum_over_data([len(values) for values in metrics.values()])
    return {name: total / n for name, total, n in zip(metrics, sums, counts, strict=True)}


@torch.no_grad()
def evaluate_loss(
    scorer: Scorer, policy: PreTrainedModel, data: PreferenceData, examples: Sequence[Example], cut: Cut
) -> tuple[Metrics, list[Example]]:
    """Each metric of `Scorer` on this process's share of exactly `examples`, and that share."""
    total: Metrics = {}
    mine: list[Example] = []
    for share in progress(shares(data, examples, cut), desc="evaluating", leave=False):
        _, metrics = scorer(policy, share.batch, "eval")
        extend_metrics(total, metrics, share.counts)
        mine += share.examples
    return total, mine
