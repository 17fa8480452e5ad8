"""Every loss: pure functions of log-probabilities (see dpo/loss.py for what a loss may ask for).

`Pairs` is one formula for all losses that compare two responses; its presets are files in config/loss. What does not
fit is a class. To add a loss: a preset, or a class here and config/loss/<name>.yaml. A class's fields are its YAML
keys; their types and bounds stand here. docs/losses.md lists all losses with paper and formula.
"""

import functools
import importlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from dpo.config import build
from dpo.hints import meant
from dpo.loss import Examples, Loss, Responses
from dpo.utils import UserError
from utils import CONFIG_DIR, loss_values

Beta = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]
Smoothing = Annotated[float, Field(ge=0, lt=0.5)]
ROUNDING = 1e-5  # nats per token: a smaller log-ratio counts as 0 if a loss has a kink there


def smoothed_logistic(h: Tensor, flipped: float) -> Tensor:
    """Return -(1 - e) log sigmoid(h) - e log sigmoid(-h), with e = `flipped`, the assumed rate of flipped labels."""
    return -F.logsigmoid(h) * (1 - flipped) - F.logsigmoid(-h) * flipped


class LogRatioRewards:
    """The implicit reward of many losses: beta log pi(y)/ref(y)."""

    beta: float

    def rewards(self, responses: Responses) -> Tensor:
        return self.beta * responses.log_ratio


@dataclass(frozen=True)
class SFT(Loss, name="sft"):
    """Negative log-likelihood of the target response, -log pi(y | x), summed over its tokens.

    With `dft`, Dynamic Fine-Tuning (Wu et al. 2025, arXiv:2508.05629): each token's term is multiplied by the token's
    probability, which counts as a constant.
    """

    dft: bool = False
    rows = "targets"
    needs_reference = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set(needs_tokens=self.dft)

    def __call__(self, examples: Examples) -> Tensor:
        if not self.dft:
            return -examples.chosen.sum
        logps = examples.chosen.counted(examples.chosen.tokens)
        return -(logps.detach().exp() * logps).sum(-1)


# --- Pairs: parts of one formula ---


def _reverse_kl(u: Tensor, alpha: float) -> Tensor:
    return u


def _forward_kl(u: Tensor, alpha: float) -> Tensor:
    return -torch.exp(-u)


def _jensen_shannon(u: Tensor, alpha: float) -> Tensor:
    return math.log(2) + F.logsigmoid(u)


def _alpha(u: Tensor, alpha: float) -> Tensor:
    return (1 - torch.exp(-alpha * u)) / alpha


def _chi2_kl(u: Tensor, alpha: float) -> Tensor:
    return torch.exp(u.clamp(-88, 20)) + u


def _log_odds(m: Tensor, alpha: float) -> Tensor:
    return m - torch.log(-torch.expm1(m.clamp(max=-1e-6)))


# f'(pi / ref) as a function of u = log pi / ref: the derivative of the divergence that holds the policy at the
# reference (f-DPO, Wang et al. 2023, arXiv:2309.16240). chi2_kl: Huang et al. 2024, arXiv:2407.13399, z + log z, its
# exponent bounded. log_odds takes the mean log-probability: log p / (1 - p), Hong et al. 2024, arXiv:2403.07691, eq. 4.
DIVERGENCES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "reverse_kl": _reverse_kl,
    "forward_kl": _forward_kl,
    "js": _jensen_shannon,
    "alpha": _alpha,
    "chi2_kl": _chi2_kl,
    "log_odds": _log_odds,
}


def _logistic(loss: "Pairs", a: Tensor, b: Tensor, h: Tensor) -> Tensor:
    e = loss.label_smoothing
    if loss.robust:
        return (-F.logsigmoid(h) * (1 - e) + F.logsigmoid(-h) * e) / (1 - 2 * e)
    return smoothed_logistic(h, e)


def _hinge(loss: "Pairs", a: Tensor, b: Tensor, h: Tensor) -> Tensor:
    return F.relu(loss.delta - h)


def _square(loss: "Pairs", a: Tensor, b: Tensor, h: Tensor) -> Tensor:
    return ((h - 0.5) / loss.beta) ** 2


def _exo(loss: "Pairs", a: Tensor, b: Tensor, h: Tensor) -> Tensor:
    e = loss.label_smoothing
    return F.sigmoid(h) * (F.logsigmoid(h) - math.log1p(-e)) + F.sigmoid(-h) * (F.logsigmoid(-h) - math.log(e))


def _discopop(loss: "Pairs", a: Tensor, b: Tensor, h: Tensor) -> Tensor:
    share = F.sigmoid(h / loss.tau)
    return -F.logsigmoid(h) * (1 - share) + torch.exp(-h) * share


def _nca(loss: "Pairs", a: Tensor, b: Tensor, h: Tensor) -> Tensor:
    return -F.logsigmoid(a) - (F.logsigmoid(-a) + F.logsigmoid(-b)) / 2


def _sppo(loss: "Pairs", a: Tensor, b: Tensor, h: Tensor) -> Tensor:
    return (((a - 0.5) / loss.beta) ** 2 + ((b + 0.5) / loss.beta) ** 2) / 2


def _apo_zero(loss: "Pairs", a: Tensor, b: Tensor, h: Tensor) -> Tensor:
    return F.sigmoid(b) - F.sigmoid(a)


def _apo_down(loss: "Pairs", a: Tensor, b: Tensor, h: Tensor) -> Tensor:
    return F.sigmoid(a) - F.sigmoid(h)


class Link(NamedTuple):
    """`value(loss, a, b, h)` [n]: see Pairs. `compares`: it reads h. `smooths`: it reads label_smoothing."""

    value: Callable[["Pairs", Tensor, Tensor, Tensor], Tensor]
    compares: bool = True
    smooths: bool = False


LINKS = {
    "logistic": Link(_logistic, smooths=True),  # arXiv:2305.18290 eq. 7; robust: arXiv:2403.00409
    "hinge": Link(_hinge),  # arXiv:2309.06657 (delta = 1), arXiv:2305.10425 (delta)
    "square": Link(_square),  # arXiv:2310.12036 eq. 17: (difference - 1 / (2 beta))^2
    "exo": Link(_exo, smooths=True),  # arXiv:2402.00856 eq. 16
    "discopop": Link(_discopop),  # arXiv:2406.08414, log-ratio modulated loss
    "nca": Link(_nca, compares=False),  # arXiv:2402.05369, of two responses
    "sppo": Link(_sppo, compares=False),  # arXiv:2405.00675 eq. 4.7, probability 1 or 0, mean of both responses
    "apo_zero": Link(_apo_zero, compares=False),  # arXiv:2408.06266
    "apo_down": Link(_apo_down),  # arXiv:2408.06266
}


@dataclass(frozen=True)
class Pairs(Loss, name="pairs"):
    """Losses that compare two responses of a prompt: one formula with parts. Its neutral values are those of DPO.

    loss = pair_weight * weight * link(a, b, h) + nll_weight * nll(y_w). For a response y of n tokens,

      s(y) = sum_t c_t (log pi(y_t) - log ref(y_t)), divided by n if `length_normalized`. c_t is 1, or `ld_alpha` for
             tokens beyond the shorter response's length (LD-DPO, arXiv:2409.06411). The reference is left out if
             `reference_free` or not `use_reference`; only with `use_reference` rewards are measured against it.
      r(y) = beta g(s(y)), g being DIVERGENCES[divergence]. Rewards are r(y) less its value at s = 0; LD's weights,
             which depend on the other response, are left out of them.
      a, b = r(y_w), r(y_l)
      h    = clip(a - b, -clip, clip) - beta dpop_weight max(0, -s(y_w)) - gamma - margin: DPOP, arXiv:2402.13228;
             SimPO's gamma, arXiv:2405.14734 eq. 6. `margin`: none; `column`, the row's (ODPO, arXiv:2402.10571); or
             `length`, which adds margin_alpha (n_w - n_l) to h: if the reward less margin_alpha n is what the policy
             maximizes, r(y) + margin_alpha n is what explains the preference (R-DPO, arXiv:2403.19159).

    `label_smoothing` and `robust` are the assumed rate of flipped labels, and its unbiased correction. `weight` is 1;
    the row's (`weighting=column`; it also weighs the nll term); or w(y_w) w(y_l), w(y) = exp of the mean over tokens of
    log p - log sum_v p(v)^2, as a constant (`wpo`, arXiv:2406.11827). nll(y_w) is -log pi(y_w) per token (`mean`, IRPO,
    arXiv:2404.19733), summed (`sum`, CPO, arXiv:2401.08417), or `batch_mean`: all tokens of the global batch weigh the
    same, which is what several trainers compute.
    """

    beta: Beta
    label_smoothing: Smoothing = 0.0
    reference_free: bool = False
    robust: bool = False
    link: Literal[tuple(LINKS)] = "logistic"  # type: ignore[valid-type]
    use_reference: bool = True
    length_normalized: bool = False
    ld_alpha: Annotated[float, Field(ge=0, le=1)] | None = None
    divergence: Literal[tuple(DIVERGENCES)] = "reverse_kl"  # type: ignore[valid-type]
    divergence_alpha: Annotated[float, Field(gt=0, lt=1)] | None = None
    clip: Annotated[float, Field(gt=0)] | None = None
    dpop_weight: Weight = 0.0
    gamma: float = 0.0
    margin: Literal["none", "column", "length"] = "none"
    margin_alpha: float | None = None
    delta: Annotated[float, Field(gt=0)] = 1.0
    tau: Annotated[float, Field(gt=0)] = 0.05
    weighting: Literal["none", "column", "wpo"] = "none"
    pair_weight: Weight = 1.0
    nll_weight: Weight = 0.0
    nll: Literal["mean", "sum", "batch_mean"] = "mean"
    name: str = field(default="pairs", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if problems := [message for wrong, message in self._contradictions() if wrong]:
            raise ValueError("; ".join(problems))
        columns = (("margin",) if self.margin == "column" else ()) + (("weight",) if self.weighting == "column" else ())
        counts_tokens = bool(self.nll_weight) and self.nll == "batch_mean"
        wpo = self.weighting == "wpo"
        self._set(needs_reference=self.use_reference, needs_tokens=self.ld_alpha is not None or wpo, columns=columns)
        self._set(needs_statistics=counts_tokens, needs_squares=wpo)

    @property
    def per_token(self) -> bool:
        """Whether s(y) is divided by the number of tokens."""
        return self.length_normalized

    def _contradictions(self) -> list[tuple[Any, str]]:
        """Return (whether it holds, message) of what keys contradict."""
        link, named = LINKS[self.link], f"loss.link={self.link}"
        smoothing = f"loss.label_smoothing={self.label_smoothing}"
        shifted = self.dpop_weight or self.gamma or self.margin != "none" or self.clip is not None
        by_length, length = self.margin == "length", "loss.margin=length and loss.margin_alpha=<number> need each other"
        alpha = "loss.divergence=alpha and loss.divergence_alpha=<number> need each other"
        needs_smoothing = "needs loss.label_smoothing above 0"
        return [
            (
                self.robust and not self.label_smoothing,
                f"loss.robust=true {needs_smoothing}: the rate of flipped labels",
            ),
            (self.robust and self.link != "logistic", f"loss.robust=true is for loss.link=logistic, not {named}"),
            (self.label_smoothing and not link.smooths, f"{smoothing} is for loss.link=logistic or exo, not {named}"),
            (
                self.link == "exo" and not self.label_smoothing,
                f"{named} {needs_smoothing}, such as 0.001: its target is (1 - e, e)",
            ),
            (
                shifted and not link.compares,
                f"{named} scores each response alone: loss.gamma, margin, dpop_weight and clip do not apply",
            ),
            (by_length != (self.margin_alpha is not None), length),
            ((self.divergence == "alpha") != (self.divergence_alpha is not None), alpha),
            (self.delta != 1 and self.link != "hinge", f"loss.delta={self.delta} is for loss.link=hinge, not {named}"),
            (
                self.tau != 0.05 and self.link != "discopop",
                f"loss.tau={self.tau} is for loss.link=discopop, not {named}",
            ),
            (
                not self.pair_weight and not self.nll_weight,
                "loss.pair_weight=0 and loss.nll_weight=0 leave nothing to learn",
            ),
            *self._contradictions_of_scores(),
        ]

    def _contradictions_of_scores(self) -> list[tuple[Any, str]]:
        compares_reference = self.use_reference and not self.reference_free
        odds, divergence = self.divergence == "log_odds", f"loss.divergence={self.divergence}"
        return [
            (
                self.divergence not in ("reverse_kl", "log_odds") and not compares_reference,
                f"{divergence} is one from a reference, and this loss ignores it",
            ),
            (
                odds and (compares_reference or not self.per_token),
                f"{divergence} takes mean log-probabilities of the policy alone: set loss.length_normalized=true and "
                "loss.use_reference=false",
            ),
            (
                self.reference_free and not self.use_reference,
                "loss.reference_free=true measures rewards against the reference, and loss.use_reference=false has "
                "none: set one of both",
            ),
            (
                self.dpop_weight and not compares_reference,
                f"loss.dpop_weight={self.dpop_weight} needs the reference, which this loss ignores",
            ),
            (
                self.ld_alpha is not None and self.link == "square" and not self.per_token,
                "loss.ld_alpha changes the scale of sums, and IPO's target 1 / (2 beta) does not follow: average "
                "log-probabilities, or choose another loss.link",
            ),
            (
                self.ld_alpha is not None and odds,
                "loss.ld_alpha weighs tokens, and odds are of mean log-probabilities: set it to null",
            ),
        ]

    def __call__(self, examples: Examples) -> Tensor:
        loss = torch.zeros_like(examples.chosen.sum)
        if self.pair_weight:
            loss = self._comparison(examples, *self._scores(examples))
        if self.nll_weight:
            nll = self.nll_weight * self._nll(examples.chosen, examples.statistics)
            loss = loss + (nll * examples.columns["weight"] if self.weighting == "column" else nll)
        return loss

    def _scores(self, examples: Examples) -> tuple[Tensor, Tensor]:
        """Return s(y_w) and s(y_l)."""
        against = self.use_reference and not self.reference_free
        shorter = torch.minimum(examples.chosen.length, examples.losers.length)
        chosen, rejected = (self._score(side, against, shorter) for side in (examples.chosen, examples.losers))
        return chosen, rejected

    def _comparison(self, examples: Examples, s_w: Tensor, s_l: Tensor) -> Tensor:
        """Return pair_weight * weight * link(a, b, h)."""
        chosen, rejected = examples.chosen, examples.losers
        a, b = (self.beta * self._divergence(score) for score in (s_w, s_l))
        h = a - b
        if self.clip is not None:
            h = h.clamp(-self.clip, self.clip)
        if self.dpop_weight:
            fell = s_w.detach() < -ROUNDING * (1 if self.per_token else chosen.length)  # a new policy lies on the kink
            h = h + self.beta * self.dpop_weight * torch.where(fell, s_w, 0.0)
        if self.margin == "column":
            h = h - examples.columns["margin"]
        elif self.margin == "length":
            assert self.margin_alpha is not None
            h = h + self.margin_alpha * (chosen.length - rejected.length).to(h.dtype)
        value = self.pair_weight * LINKS[self.link].value(self, a, b, h - self.gamma)
        if self.weighting == "column":
            return value * examples.columns["weight"]
        return value * (_on_policy(chosen) + _on_policy(rejected)).exp() if self.weighting == "wpo" else value

    def _score(self, responses: Responses, against_reference: bool, shorter: Tensor | None = None) -> Tensor:
        """Return s(y) [n]. LD's weights apply if `shorter`, the shorter length of each pair, is given."""
        if self.ld_alpha is None or shorter is None:
            score = responses.log_ratio if against_reference else responses.sum
        else:
            tokens = responses.counted(responses.tokens)
            if against_reference:
                tokens = tokens - responses.counted(responses.reference_tokens)
            beyond = responses.positions > shorter[:, None]
            score = torch.where(beyond, self.ld_alpha * tokens, tokens).sum(-1)
        return score / responses.length if self.per_token else score

    def _divergence(self, score: Tensor) -> Tensor:
        return DIVERGENCES[self.divergence](score, self.divergence_alpha or 0.0)

    def _nll(self, chosen: Responses, statistics: Mapping[str, Tensor]) -> Tensor:
        if self.nll == "sum":
            return -chosen.sum
        return -chosen.mean if self.nll == "mean" else -chosen.sum / statistics["length"].mean()

    def observe(self, examples: Examples) -> dict[str, Tensor]:
        return {"length": examples.chosen.length.to(examples.chosen.sum.dtype)}

    @property
    def gives_rewards(self) -> bool:
        return self.pair_weight > 0

    @property
    def weighs_gradients(self) -> bool:
        return self.pair_weight > 0

    def rewards(self, responses: Responses) -> Tensor | None:
        """beta g(s(y)), shifted to 0 at s = 0: section 4 of the DPO paper; f-DPO. None without a comparison."""
        if not self.gives_rewards:
            return None
        score = self._score(responses, self.use_reference)
        shift = 0.0 if self.divergence == "log_odds" else self._divergence(torch.zeros_like(score))
        return self.beta * (self._divergence(score) - shift)

    def gradient_weight(self, examples: Examples) -> Tensor | None:
        """-d loss / d r(y_w) of the comparison, with its weights: sigmoid(-h) of DPO."""
        if not self.weighs_gradients:
            return None
        with torch.enable_grad():
            s_w, s_l = (score.detach() for score in self._scores(examples))
            reward = self.beta * self._divergence(s_w.requires_grad_())
            (slope,) = torch.autograd.grad(self._comparison(examples, s_w, s_l).sum(), s_w)
            (unit,) = torch.autograd.grad(reward.sum(), s_w)
        return -slope / unit


def _on_policy(responses: Responses) -> Tensor:
    """Return the mean over tokens of log p - log sum_v p(v)^2 under the policy, without gradients: [n]."""
    relative = responses.counted(responses.tokens).detach() - responses.counted(responses.squares)
    return relative.sum(-1) / responses.length


@dataclass(frozen=True)
class DPO(Pairs, name="dpo"):
    """Direct Preference Optimization, Rafailov et al. 2023 (arXiv:2305.18290), equation 7.

    -(1 - e) log sigmoid(beta d) - e log sigmoid(-beta d), with d = log pi(y_w)/ref(y_w) - log pi(y_l)/ref(y_l).
    e = `label_smoothing` is the assumed rate of flipped labels: conservative DPO, Mitchell 2023, "A note on DPO with
    noisy preferences", equation 3. `robust` removes flips at rate e from the loss l: ((1 - e) l(d) - e l(-d)) / (1-2e)
    has the expectation that l has without flips (Chowdhury et al. 2024, arXiv:2403.00409). `reference_free` assumes a
    uniform reference: its ratio drops out of d. Rewards are still measured against the frozen reference.
    """

    name: str = field(default="dpo", kw_only=True)


@dataclass(frozen=True)
class IPO(Pairs, name="ipo"):
    """Identity Preference Optimization, Azar et al. 2023 (arXiv:2310.12036), equation 17: (d - 1 / (2 beta))^2.

    beta is the paper's tau. `average_log_prob` takes log-probabilities per token instead of per response, as the
    authors later recommended. The sum is what the original DPO code computes.
    """

    link: Literal[tuple(LINKS)] = "square"  # type: ignore[valid-type]
    average_log_prob: bool = False
    name: str = field(default="ipo", kw_only=True)

    @property
    def per_token(self) -> bool:
        return self.length_normalized or self.average_log_prob


@dataclass(frozen=True)
class Unlikelihood(Loss, name="unlikelihood"):
    """-log pi(y_w) + alpha log pi(y_l): a baseline of Rafailov et al. 2023, section 6. It has no lower bound."""

    alpha: Annotated[float, Field(ge=0, le=1)]
    needs_reference = False

    def __call__(self, examples: Examples) -> Tensor:
        return -examples.chosen.sum + self.alpha * examples.losers.sum


@dataclass(frozen=True)
class BCO(LogRatioRewards, Loss, name="bco"):
    """Binary Classifier Optimization, Jung et al. 2024 (arXiv:2404.04656), on pairs.

    -log sigmoid(r(y_w) - delta) - log sigmoid(-(r(y_l) - delta)), r = beta log pi/ref. The reward shift delta is the
    mean of all rewards of both sides that training has seen, this global batch's among them; it counts as a constant.
    """

    beta: Beta
    needs_statistics = True

    def __call__(self, examples: Examples) -> Tensor:
        chosen, rejected = self.rewards(examples.chosen), self.rewards(examples.losers)
        delta = examples.state["delta"]
        return -F.logsigmoid(chosen - delta) - F.logsigmoid(delta - rejected)

    def observe(self, examples: Examples) -> dict[str, Tensor]:
        return {"reward": (self.rewards(examples.chosen) + self.rewards(examples.losers)) / 2}

    def initial_state(self) -> dict[str, float]:
        return {"delta": 0.0, "n": 0.0}

    def next_state(self, state: Mapping[str, float], statistics: Mapping[str, Tensor]) -> dict[str, float]:
        rewards = statistics["reward"].double()
        n = state["n"] + len(rewards)
        return {"delta": (state["delta"] * state["n"] + rewards.sum().item()) / n, "n": n}

    def gradient_weight(self, examples: Examples) -> Tensor:
        return F.sigmoid(examples.state["delta"] - self.rewards(examples.chosen).detach())


@dataclass(frozen=True)
class AOT(LogRatioRewards, Loss, name="aot"):
    """Alignment via Optimal Transport, paired, Melnyk et al. 2024 (arXiv:2406.05882).

    The mean over k of l(beta (x_(k) - z_(k))): x are the policy's differences log pi(y_w) - log pi(y_l) and z the
    reference's, both of the whole global batch and sorted; l(h) = -(1 - e) log sigmoid(h) - e log sigmoid(-h). The
    order counts as a constant. Of examples with equal x each gets the mean over their ranks.
    """

    beta: Beta
    label_smoothing: Smoothing = 0.0
    needs_statistics = True

    def __call__(self, examples: Examples) -> Tensor:
        seen = examples.statistics
        return self._matched(self._values(examples)[0], seen["x"], seen["z"], 1)

    def _values(self, examples: Examples) -> tuple[Tensor, Tensor]:
        """Return what is sorted and matched: x and z, each [n]."""
        chosen, rejected = examples.chosen, examples.losers
        assert chosen.reference_sum is not None and rejected.reference_sum is not None
        return chosen.sum - rejected.sum, chosen.reference_sum - rejected.reference_sum

    def _matched(self, values: Tensor, own: Tensor, others: Tensor, sign: int) -> Tensor:
        """Return l of each of `values` [n] less the `others` [N] of the same rank; `own` [N] has the values of all."""
        own, others = own.sort().values, others.sort().values
        mine = values.detach().contiguous()
        after = torch.searchsorted(own, mine).clamp(max=len(own) - 1)
        before = (after - 1).clamp(min=0)
        # This pass may round differently from the one that gave `own`: take the nearest.
        nearest = torch.where((own[after] - mine).abs() < (own[before] - mine).abs(), own[after], own[before])
        first, last = torch.searchsorted(own, nearest), torch.searchsorted(own, nearest, right=True)
        ranks = torch.arange(len(own), device=own.device)
        same = (ranks >= first[:, None]) & (ranks < last[:, None])
        losses = smoothed_logistic(self.beta * sign * (values[:, None] - others), self.label_smoothing)
        return torch.where(same, losses, 0.0).sum(1) / same.sum(1)

    def observe(self, examples: Examples) -> dict[str, Tensor]:
        return dict(zip(("x", "z"), self._values(examples), strict=True))


@dataclass(frozen=True)
class AOTUnpaired(AOT, name="aot_unpaired"):
    """Alignment via Optimal Transport, unpaired (see AOT): x are the log-ratios to the reference of the chosen
    responses of the global batch, z those of the rejected ones, and gradients pass through both.

    A term of the sum belongs half to the example of its x and half to that of its z.
    """

    def _values(self, examples: Examples) -> tuple[Tensor, Tensor]:
        return examples.chosen.log_ratio, examples.losers.log_ratio

    def __call__(self, examples: Examples) -> Tensor:
        (x, z), seen = self._values(examples), examples.statistics
        both = self._matched(x, seen["x"], seen["z"], 1) + self._matched(z, seen["z"], seen["x"], -1)
        return both - both.detach() / 2  # each half passes the gradient of the whole term


@dataclass(frozen=True)
class KTO(LogRatioRewards, Loss, name="kto"):
    """Kahneman-Tversky Optimization, Ethayarajh et al. 2024 (arXiv:2402.01306), equations 7 and 8, less a constant.

    lambda (1 - sigmoid(r - beta z0)) of a completion that is wanted, lambda (1 - sigmoid(beta z0 - r)) of one that is
    not; r = beta log pi/ref, lambda is `desirable_weight` or `undesirable_weight`. z0, an estimate of the KL from the
    reference, is the mean log-ratio, at least 0, of each prompt of the global batch with the response of another prompt
    of it; it counts as a constant.
    """

    beta: Beta
    desirable_weight: Weight = 1.0
    undesirable_weight: Weight = 1.0
    rows = "labelled"
    columns = ("label",)
    needs_statistics = True
    observes_mismatched = True

    def __call__(self, examples: Examples) -> Tensor:
        weight, value = self._value(examples)
        return weight * (1 - value)

    def _value(self, examples: Examples) -> tuple[Tensor, Tensor]:
        """Return weight and value of each example."""
        wanted = examples.columns["label"] > 0
        found = examples.statistics.get("log_ratio")  # none if all prompts are the same
        z0 = found.mean().clamp(min=0) if found is not None else 0.0
        h = self.beta * (examples.chosen.log_ratio - z0)
        weight = torch.where(wanted, self.desirable_weight, self.undesirable_weight)
        return weight, F.sigmoid(torch.where(wanted, h, -h))

    def observe(self, examples: Examples) -> dict[str, Tensor]:
        return {"log_ratio": examples.chosen.log_ratio}

    def gradient_weight(self, examples: Examples) -> Tensor:
        """|d loss / d r|: lambda sigmoid (1 - sigmoid)."""
        weight, value = self._value(examples)
        return (weight * value * (1 - value)).detach()


@dataclass(frozen=True)
class Listwise(LogRatioRewards, Loss, name="listwise"):
    """Plackett-Luce likelihood of a ranking, Rafailov et al. 2023 (arXiv:2305.18290), appendix A.3.

    -sum_k log(exp(r_k) / sum_{j >= k} exp(r_j)) over all but the last of the ranked responses, r = beta log pi/ref.
    For two responses it is DPO. Metrics of pairs compare the best response with the worst.
    """

    beta: Beta
    rows = "ranked"

    def __call__(self, examples: Examples) -> Tensor:
        assert examples.ranked is not None
        losses = [
            (rewards.flip(0).logcumsumexp(0).flip(0) - rewards)[:-1].sum()
            for rewards in self.rewards(examples.ranked).split(examples.sizes)
        ]
        return torch.stack(losses)


@dataclass(frozen=True)
class TDPO(LogRatioRewards, Loss, name="tdpo"):
    """Token-level DPO, Zeng et al. 2024 (arXiv:2404.11999): TDPO2, or TDPO1 with `version=1`.

    -log sigmoid(beta d - delta). K(y) is the sum over the response's tokens of KL(ref || pi) of the next token.
    TDPO1: delta = beta (K(y_l) - K(y_w)). TDPO2: delta = alpha beta (K(y_l) - K(y_w)), K(y_w) being a constant.
    Rewards leave K out, which other programs would have to compute anew.
    """

    beta: Beta
    version: Literal[1, 2] = 2
    alpha: Weight = 0.5
    needs_tokens = True
    needs_kl = True

    def __call__(self, examples: Examples) -> Tensor:
        return -F.logsigmoid(self._margin(examples))

    def _margin(self, examples: Examples) -> Tensor:
        chosen, rejected = examples.chosen, examples.losers
        ours, theirs = (side.counted(side.kl).sum(-1) for side in (chosen, rejected))
        delta = theirs - ours if self.version == 1 else self.alpha * (theirs - ours.detach())
        return self.beta * (chosen.log_ratio - rejected.log_ratio - delta)

    def gradient_weight(self, examples: Examples) -> Tensor:
        return F.sigmoid(-self._margin(examples).detach())


LIKE = {"sft": "nll", "kto": "bco", "listwise": "dpo"}  # losses that are no terms, and what is


@dataclass(frozen=True)
class Mix(Loss, name="mix"):
    """A weighted sum of losses of pairs, such as MPO (Wang et al. 2024, arXiv:2411.10442): `terms` gives the weight of
    each, by name. `beta` is for all that have one, `settings` gives a term other keys: {simpo: {gamma: 0.5}}.

    Rewards, and gradient weights, are those of the first term that has some, without its weight.
    """

    terms: dict[str, Beta]
    beta: Beta | None = None
    settings: dict[str, dict[str, Any]] | None = None
    name: str = field(default="mix", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = self._built[1].copy()
        if unknown := [name for name in self.settings or {} if name not in self.terms]:
            problems.append(f"loss.settings.{unknown[0]} is no term; loss.terms has {', '.join(self.terms)}")
        if not self.terms:
            problems.append("loss.terms={} names no loss: loss.terms={dpo: 0.8, nll: 1.0}")
        if problems:
            raise ValueError("; ".join(problems))
        losses = self.parts.values()
        self._set(columns=tuple(dict.fromkeys(c for loss in losses for c in loss.columns)), term_names=(*self.terms,))
        for need in ("needs_reference", "needs_tokens", "needs_squares", "needs_kl", "needs_statistics"):
            self._set(**{need: any(getattr(loss, need) for loss in losses)})

    @property
    def parts(self) -> dict[str, Loss]:
        """The losses by name."""
        return self._built[0]

    @functools.cached_property
    def _built(self) -> tuple[dict[str, Loss], list[str]]:
        """Return the losses by name, and what is wrong with them."""
        parts: dict[str, Loss] = {}
        problems: list[str] = []
        for name in self.terms:
            given = (self.settings or {}).get(name, {})
            loss, found = make({"name": name, **given}, {} if self.beta is None else {"beta": self.beta})
            if name in LIKE or (loss is not None and loss.rows != "pairs"):
                like = f"; the term most like it is {LIKE[name]}" if name in LIKE else ""
                found = [f"it does not learn from pairs, and all terms do{like}"]
            problems += [_of_a_term(name, given, problem) for problem in found]
            parts |= {name: loss} if loss is not None else {}
        return parts, problems

    def __call__(self, examples: Examples) -> Tensor:
        losses = [self.terms[name] * loss for name, loss in self.term_losses(examples).items()]
        return torch.stack(losses).sum(0)

    def term_losses(self, examples: Examples) -> dict[str, Tensor]:
        return {name: loss(self._seen(name, examples)) for name, loss in self.parts.items()}

    def _seen(self, name: str, examples: Examples) -> Examples:
        """Return what a term sees: its own statistics and state."""
        return replace(examples, statistics=_of(name, examples.statistics), state=_of(name, examples.state))

    def observe(self, examples: Examples) -> dict[str, Tensor]:
        needing = [(name, loss) for name, loss in self.parts.items() if loss.needs_statistics]
        return {f"{name}.{key}": v for name, loss in needing for key, v in loss.observe(examples).items()}

    def initial_state(self) -> dict[str, float]:
        return {f"{name}.{key}": v for name, loss in self.parts.items() for key, v in loss.initial_state().items()}

    def next_state(self, state: Mapping[str, float], statistics: Mapping[str, Tensor]) -> dict[str, float]:
        found = {name: loss.next_state(_of(name, state), _of(name, statistics)) for name, loss in self.parts.items()}
        return {f"{name}.{key}": value for name, values in found.items() for key, value in values.items()}

    def rewards(self, responses: Responses) -> Tensor | None:
        rewarding = (loss for loss in self.parts.values() if loss.gives_rewards)
        return next((loss.rewards(responses) for loss in rewarding), None)

    @property
    def gives_rewards(self) -> bool:
        return any(loss.gives_rewards for loss in self.parts.values())

    def gradient_weight(self, examples: Examples) -> Tensor | None:
        weighing = ((name, loss) for name, loss in self.parts.items() if loss.weighs_gradients)
        return next((loss.gradient_weight(self._seen(name, examples)) for name, loss in weighing), None)

    @property
    def weighs_gradients(self) -> bool:
        return any(loss.weighs_gradients for loss in self.parts.values())


def _of_a_term(name: str, given: Mapping[str, Any], problem: str) -> str:
    """Return a problem of a term's keys, `given` by loss.settings, in words of the sum's keys."""
    found = re.match(r"loss\.(\w+)(?:: no such key$| is missing: pass )", problem)
    if found is None:
        return f"loss.terms, {name}: {problem}"
    key = found[1]
    if key in given:
        near = "" if key in loss_values("pairs") else meant(key, loss_values(name).keys()).replace("loss.", "")
        return f"loss.settings={{{name}: {{{key}: {given[key]}}}}}: loss={name} has no such key{near}"
    beta = "loss.beta=<value> for all terms, or " if key == "beta" else ""
    return f"loss.terms, {name}: {key} is missing: pass {beta}'loss.settings={{{name}: {{{key}: <value>}}}}'"


def _of(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries called <name>.<key>, by key."""
    return {key.removeprefix(f"{name}."): value for key, value in values.items() if key.startswith(f"{name}.")}


# --- Finding a loss ---


def make(values: Mapping[str, Any], shared: Mapping[str, Any] | None = None) -> tuple[Loss | None, list[str]]:
    """Return the loss of the keys of a file in config/loss, and what is wrong with them: one of both is empty.

    Keys that are missing have the values of the file, if there is one of this name. `shared` are keys that only count
    if the loss has them.
    """
    name = str(values["name"])
    given = {key: value for key, value in loss_values(name).items() if value != "???"} | dict(values)
    try:
        kind = find(given["kind"], "loss.kind") if "kind" in given else find(name)
    except UserError as error:
        return None, [str(error)]
    known = {key.name for key in fields(kind)}  # type: ignore[arg-type]
    given |= {key: value for key, value in (shared or {}).items() if key in known and key not in values}
    named = {"name": name} if "name" in known else {}
    return build(kind, {key: v for key, v in given.items() if key not in ("name", "kind")} | named, "loss.")


def names() -> list[str]:
    """Return the names of this file's classes."""
    return [kind.kind for kind in _classes(Loss)]


def _classes(base: type[Loss]) -> list[type[Loss]]:
    found = [kind for child in base.__subclasses__() for kind in (child, *_classes(child))]
    return [kind for kind in found if kind.__module__ == __name__]


def find(name: str, key: str = "loss.name") -> type[Loss]:
    """Return the loss class called `name`: one of this file, or module.Class. Raise UserError if there is none; it
    says that `key` named the class."""
    for kind in _classes(Loss):
        if kind.kind == name:
            return kind
    module, dot, attribute = name.rpartition(".")
    if dot:
        try:
            found = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise UserError(f"{key}={name} cannot be imported: {error}") from error
        if isinstance(found, type) and issubclass(found, Loss):
            return found
        raise UserError(f"{key}={name} is no subclass of dpo.loss.Loss")
    files = sorted(path.stem for path in (CONFIG_DIR / "loss").glob("*.yaml"))
    raise UserError(f"{key}={name} is not known; choose from: {', '.join(files)}; or give module.Class")
