"""Loss and metrics of a batch, and their means over data and processes."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dpo import parallel
from dpo.data.batching import Batch, Cut, Example, Mismatched, Records, deal, make_batch
from dpo.data.records import PreferenceData
from dpo.data.sources import LABELLED
from dpo.loss import Examples, Loss, Responses, reward_slopes, sum_tokens
from dpo.model.layouts import copied
from dpo.model.logps import Computation, Laid, TokenLogps, input_device, laid_logps, place
from dpo.reference import LiveReference, Reference
from dpo.utils import one_ahead, progress

# By how much a float32 log-probability may change with the order of summation (micro-batches, layouts, number of
# processes, compiled kernels): relative, and in nats. SmolLM2-135M's change by up to 1.3e-6 nats a token (60 pairs).
ROUNDING, TOKEN_ROUNDING = 1e-6, 2e-6
COLUMN = "column "  # before the names of the data's columns among the tensors of a micro-batch
LOW_IS_BEST = ("loss/", "loss_eval/", "perplexity/")  # beginnings of names; of all other metrics high is best
Metrics = dict[str, list[float | None]]
"""Metric name -> one value for each example; None if the example has no such side."""


@dataclass(frozen=True)
class Scored:
    """A batch after the loss. What a metric may use; every tensor has shape [n]."""

    loss: Tensor
    chosen: Responses
    rejected: Responses
    chosen_reward: Tensor
    rejected_reward: Tensor
    rounding: Tensor  # of the reward margin: a smaller margin counts as a tie
    slack: Tensor  # rounding of the chosen response's log-probability, in nats
    gradient_weight: Tensor  # see Loss.gradient_weight
    terms: Mapping[str, Tensor] = field(default_factory=dict)  # see Loss.term_losses

    @property
    def margin(self) -> Tensor:
        """Reward of the chosen response minus that of the rejected one."""
        return self.chosen_reward - self.rejected_reward


@dataclass(frozen=True)
class Metric:
    """A number per example. `needs`: what the loss must have for it: rejected, pairs, reference, rewards,
    gradient_weight. Of labelled rows, those that are wanted count as chosen, the others as rejected."""

    value: Callable[[Scored], Tensor]
    needs: frozenset[str] = frozenset()


def _metric(value: Callable[[Scored], Tensor], *needs: str) -> Metric:
    return Metric(value, frozenset(needs))


def _term(name: str) -> Metric:
    return _metric(lambda s: s.terms[name])


# Name -> metric; {} is "train" or "eval". Names are those of the original code. Log-probabilities are sums in nats.
METRICS = {
    "logps_{}/chosen": _metric(lambda s: s.chosen.sum),
    "loss/{}": _metric(lambda s: s.loss),
    "rewards_{}/chosen": _metric(lambda s: s.chosen_reward, "rewards"),
    "rewards_{}/rejected": _metric(lambda s: s.rejected_reward, "rewards", "rejected"),
    "rewards_{}/accuracies": _metric(lambda s: (s.margin > s.rounding).float(), "rewards", "pairs"),
    "rewards_{}/margins": _metric(lambda s: s.margin, "rewards", "pairs"),
    "logps_{}/rejected": _metric(lambda s: s.rejected.sum, "rejected"),
    "gradient_weight_{}": _metric(lambda s: s.gradient_weight, "gradient_weight"),
    "chosen_fell_{}": _metric(lambda s: (s.chosen.log_ratio < -s.slack).float(), "reference", "pairs"),
    "logratios_per_token_{}/chosen": _metric(lambda s: s.chosen.mean_log_ratio, "reference"),
    "logratios_per_token_{}/rejected": _metric(lambda s: s.rejected.mean_log_ratio, "reference", "rejected"),
    "tokens_{}/chosen": _metric(lambda s: s.chosen.length.float()),
    "tokens_{}/rejected": _metric(lambda s: s.rejected.length.float(), "rejected"),
}


def measured(loss: Loss, split: str) -> dict[str, Metric]:
    """Return the metrics that a batch of `loss` has, under their names in `split` ("train" or "eval")."""
    facts = {"pairs": loss.needs_rejected, "rejected": loss.needs_rejected or loss.rows == LABELLED}
    facts |= {"reference": loss.needs_reference, "rewards": loss.gives_rewards}
    facts |= {"gradient_weight": loss.weighs_gradients}
    found = {name.format(split): m for name, m in METRICS.items() if all(facts[need] for need in m.needs)}
    return found | {f"loss_{split}/{term}": _term(term) for term in loss.term_names}


def choices(loss: Loss) -> list[str]:
    """Return the metrics of an evaluation that tell checkpoints apart: not lengths, which are the data's alone."""
    names = [name for name in measured(loss, "eval") if not name.startswith("tokens_")]
    sides = [side for side in ("chosen", "rejected") if f"logps_eval/{side}" in names]
    names += [f"logps_per_token_eval/{side}" for side in sides]
    return names + (["perplexity/eval"] if sides == ["chosen"] else [])


@dataclass(frozen=True)
class Scorer:
    """Computes the loss and the metrics of a batch under a policy.

    `untrained`: the policy still equals the reference, so they differ by rounding only, and no pair is told apart.
    `statistics` and `state`: see Examples.
    """

    loss: Loss
    how: Computation
    reference: Reference | None
    untrained: bool = False
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    state: Mapping[str, float] = field(default_factory=dict)

    def __call__(self, policy: PreTrainedModel, batch: Batch, split: str) -> tuple[Tensor, Metrics]:
        """Return the loss of each example, shape [n], with gradients, and the metrics of each example."""
        losses, values = self.score(policy, self.lay(batch, input_device(policy)), split)
        tally = self.tally()
        tally.add(values, batch)
        return losses, tally.read()[0]

    def tally(self) -> "Tally":
        """Return what collects the metrics of this scorer's micro-batches."""
        return Tally(labelled=self.loss.rows == LABELLED)

    def lay(self, batch: Batch, device: torch.device) -> Laid:
        """Return a micro-batch on `device`, with what the loss needs besides."""
        numbers = {"chosen": batch.chosen, "rejected": batch.rejected, "ranked": itertools.chain(*(batch.ranked or []))}
        others = {k: torch.tensor([*v], dtype=torch.long) for k, v in numbers.items() if v is not None}
        others |= {COLUMN + name: torch.tensor(values) for name, values in batch.columns.items()}
        if self.reference is not None and not isinstance(self.reference, LiveReference):
            stored = self.reference.response_logps(batch)
            others |= {"reference": stored.logps, "reference mask": stored.mask}
        return place(batch, self.how.layout, device, others)

    def laid(self, policy: PreTrainedModel, parts: "Sequence[Share]") -> Iterator[tuple["Share", Laid]]:
        """Yield each micro-batch, and the same in place. A thread lays out the next one while the caller computes."""
        device = input_device(policy)  # asked here: the policy's parts may be exchanged while it computes
        return one_ahead(lambda share: (share, self.lay(share.batch, device)), parts)

    def score(self, policy: PreTrainedModel, laid: Laid, split: str) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of each example, shape [n], with gradients, and each metric's values [n], for a Tally. The
        host does not wait for the device."""
        live = self.reference if self.loss.needs_kl and isinstance(self.reference, LiveReference) else None
        theirs = live.next_token_logps(laid.batch, self.how) if live is not None else None
        tokens = laid_logps(policy, laid, self.how, self.loss.needs_squares, theirs)
        examples = self.examples(laid, tokens)
        losses = self.loss(examples)
        scored = self._scored(laid, tokens, examples, losses)
        values = {name: metric.value(scored) for name, metric in measured(self.loss, split).items()}
        return losses, {name: value.detach() for name, value in values.items()}

    def differences(self, policy: PreTrainedModel, batch: Batch, split: str) -> Metrics:
        """Return the metrics by which policy and reference are compared. They need no loss.

        Not under `no_grad`: tensor parallelism would take other kernels than the training step's.
        """
        examples = self.examples_of(policy, batch)
        found: Metrics = {}
        for name, side in (("chosen", examples.chosen), ("rejected", examples.rejected)):
            if side is not None:
                rewards = self.loss.rewards(side)
                found[f"logratios_per_token_{split}/{name}"] = side.mean_log_ratio.detach().cpu().tolist()
                rewards = side.log_ratio if rewards is None else rewards
                found[f"rewards_{split}/{name}"] = rewards.detach().cpu().tolist()
        return found

    def examples_of(self, policy: PreTrainedModel, batch: Batch) -> Examples:
        """Return what the loss sees of a batch under `policy`."""
        laid = self.lay(batch, input_device(policy))
        return self.examples(laid, laid_logps(policy, laid, self.how))

    def examples(self, laid: Laid, tokens: TokenLogps) -> Examples:
        """Return what the loss sees of a batch whose response tokens have these log-probabilities."""
        batch, others = laid.batch, laid.others
        reference = None
        if "reference" in others:
            reference = TokenLogps(others["reference"], others["reference mask"])
        elif self.reference is not None:
            reference = self.reference.response_logps(batch)
        sums, lengths = sum_tokens(tokens.logps, tokens.mask), tokens.mask.sum(-1).clamp(min=1)
        reference_sums = sum_tokens(reference.logps, reference.mask) if reference is not None else None

        def side(name: str) -> Responses:
            index = others[name]

            def at(values: Tensor | None) -> Tensor | None:
                return values[index] if values is not None else None

            responses = sums[index], lengths[index], at(reference_sums)
            if not self.loss.needs_tokens:
                return Responses(*responses)
            theirs = reference.logps if reference is not None else None
            return Responses(*responses, *map(at, (tokens.logps, theirs, tokens.mask, tokens.squares, tokens.kl)))

        rejected = side("rejected") if batch.rejected is not None else None
        columns = {name: others[COLUMN + name] for name in batch.columns}
        ranked = side("ranked") if batch.ranked else None
        sizes = [len(responses) for responses in batch.ranked or []]
        return Examples(side("chosen"), rejected, columns, self.statistics, self.state, ranked, sizes)

    def _scored(self, laid: Laid, tokens: TokenLogps, examples: Examples, losses: Tensor) -> Scored:
        """Return what metrics are computed from. Without rejected responses or rewards, these hold stand-ins that no
        metric of such a loss reads."""
        chosen, rejected = examples.chosen, examples.rejected or examples.chosen
        rewards = [self.loss.rewards(side) for side in (chosen, rejected)]
        ours, theirs = [losses if reward is None else reward.detach() for reward in rewards]
        rounding = torch.zeros_like(ours)
        slack = ROUNDING * tokens.logps.detach().abs() + (self.how.tolerance if self.untrained else TOKEN_ROUNDING)
        slack, at = sum_tokens(slack, tokens.mask), laid.others
        if rewards[0] is not None and laid.batch.rejected is not None:
            slopes = [reward_slopes(self.loss, side) for side in (chosen, rejected)]
            assert slopes[0] is not None and slopes[1] is not None
            rounding = (slopes[0][0] * slack[at["chosen"]]).abs() + (slopes[1][0] * slack[at["rejected"]]).abs()
        weight = self.loss.gradient_weight(examples)
        weight = losses if weight is None else weight
        with torch.no_grad():
            terms = self.loss.term_losses(examples)
        return Scored(losses, chosen, rejected, ours, theirs, rounding, slack[at["chosen"]], weight, terms)

    @torch.no_grad()
    def prepare(
        self, policy: PreTrainedModel, data: PreferenceData, examples: Sequence[Example], cut: Cut
    ) -> tuple["Scorer", list["Share"]]:
        """Return this scorer with `Loss.observe` of a global batch, and this process's micro-batches. A collective if
        the loss needs statistics; else the scorer stays as it is."""
        parts = observed = shares(data, examples, cut)
        if not self.loss.needs_statistics:
            return self, parts
        if self.loss.observes_mismatched:
            mismatched = Mismatched(data, examples)
            observed = shares(mismatched, mismatched.examples, cut) if mismatched.examples else []
        tally = Tally(labelled=False)
        for part in observed:
            tally.add(self.loss.observe(self.examples_of(policy, part.batch)), part.batch, part.counts)
            parallel.reshard(policy)  # no backward pass follows
        mine = tally.read()[0]
        every = parallel.gather_over_data(policy, mine)
        names = {name: [value for values in every for value in values[name]] for name in mine}
        statistics = {name: torch.tensor(values) for name, values in names.items()}
        return replace(self, statistics=copied(statistics, input_device(policy))), parts


@dataclass(frozen=True)
class Share:
    """One rank's micro-batch. Dummy batches (`counts` false) run only because collectives need every rank."""

    batch: Batch
    counts: bool
    examples: Sequence[Example] = ()


def shares(data: Records, examples: Sequence[Example], cut: Cut) -> list[Share]:
    """Return this process's micro-batches of a global batch, as many in every process."""
    assert cut.rank is not None, "a cut for one process needs its rank"
    mine = [dealt[cut.rank] for dealt in deal(data, examples, cut)]
    return [Share(make_batch(data, some or examples[:1]), bool(some), some) for some in mine]


class Tally:
    """Metrics of this process's micro-batches. They stay on their device until `read`: the host waits once for all."""

    def __init__(self, labelled: bool):
        self.labelled = labelled  # whether an example is either chosen or rejected, by its column "label"
        self.parts: list[tuple[Batch, Tensor]] = []
        self.names: list[str] = []

    def add(self, values: Mapping[str, Tensor], batch: Batch, counts: bool = True) -> None:
        """Take in each metric's values [n] of a micro-batch, or only the names if they do not count."""
        self.names = [*values]
        if counts:
            self.parts.append((batch, torch.stack([*values.values()])))

    def read(self, *others: Tensor) -> tuple[Metrics, list[float]]:
        """Return the values of all metrics, and those of `others` (tensors of one number)."""
        tensors = [values.flatten() for _, values in self.parts] + [other.flatten().float() for other in others]
        numbers = iter(torch.cat(tensors).tolist() if tensors else [])
        total: Metrics = {name: [] for name in self.names}
        for batch, values in self.parts:
            for name in self.names:
                each: list[float | None] = [*itertools.islice(numbers, values.shape[1])]
                if self.labelled:  # the label of the other side:
                    unlike = {"chosen": 0.0, "rejected": 1.0}.get(name.rpartition("/")[2])
                    labels = batch.columns["label"]
                    each = [v if label != unlike else None for v, label in zip(each, labels, strict=True)]
                total[name] += each
        return total, [*numbers]


def mean_metrics(metrics: Metrics) -> dict[str, float]:
    """Return the mean of every metric over the examples of all processes, and what follows from these means.

    Tensor-parallel ranks hold the same examples, equally often, which leaves the mean as it is.
    """
    given = [[value for value in values if value is not None] for values in metrics.values()]
    every = parallel.gather([(sum(values), len(values)) for values in given])
    totals = ([sum(column) for column in zip(*shares)] for shares in zip(*every))
    means = {name: total / n for name, (total, n) in zip(metrics, totals, strict=True) if n}
    pairs = any(name.startswith("logps_") and name.endswith("/rejected") for name in metrics)
    return means | {k: v for split in ("train", "eval") for k, v in _per_token(means, split, pairs).items()}


def _per_token(means: Mapping[str, float], split: str, pairs: bool) -> dict[str, float]:
    """Return each side's log-probability per token over all tokens of `split`, in nats, long responses counting for
    more; and without `pairs` the perplexity of the targets, whatever the loss makes of them."""
    sides = [side for side in ("chosen", "rejected") if means.get(f"tokens_{split}/{side}")]
    nats = {side: means[f"logps_{split}/{side}"] / means[f"tokens_{split}/{side}"] for side in sides}
    found = {f"logps_per_token_{split}/{side}": value for side, value in nats.items()}
    alone = {} if pairs or not nats else {f"perplexity/{split}": math.exp(min(-nats["chosen"], 700.0))}
    return found | alone


@torch.no_grad()
def evaluate_loss(
    scorer: Scorer, policy: PreTrainedModel, data: PreferenceData, examples: Sequence[Example], cut: Cut
) -> tuple[Metrics, list[Example]]:
    """Return each metric of `Scorer` on this process's share of exactly `examples`, and that share."""
    scorer, parts = scorer.prepare(policy, data, examples, cut)
    tally, laid = scorer.tally(), scorer.laid(policy, parts)
    for share, placed in progress(laid, desc="evaluating", leave=False, total=len(parts)):
        tally.add(scorer.score(policy, placed, "eval")[1], share.batch, share.counts)
    return tally.read()[0], [example for share in parts for example in share.examples]
