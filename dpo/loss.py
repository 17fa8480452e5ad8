"""The seam between losses and the rest: what a loss sees of a batch, and what it says about itself."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, make_dataclass, replace
from typing import Any, ClassVar, get_type_hints

import torch
from torch import Tensor

from dpo.config import build


def sum_tokens(token_logps: Tensor, mask: Tensor) -> Tensor:
    """Return the sum over tokens of `token_logps` [n, t] where `mask` [n, t] is true: shape [n]."""
    return torch.where(mask, token_logps, 0.0).sum(-1)


@dataclass(frozen=True)
class Responses:
    """One side (chosen or rejected) of n examples. Log-probabilities are in nats; each tensor has shape [n].

    The reference is None if the loss needs none. `tokens`, `reference_tokens` and `mask` (true for the tokens that
    count) have shape [n, t]; they are None unless the loss has `needs_tokens`. So are `squares`, log sum_v p(v)^2 of
    the policy's next token, unless it has `needs_squares`; and `kl`, KL(reference || policy) of the next token, unless
    it has `needs_kl`.
    """

    sum: Tensor
    length: Tensor
    reference_sum: Tensor | None = None
    tokens: Tensor | None = None
    reference_tokens: Tensor | None = None
    mask: Tensor | None = None
    squares: Tensor | None = None
    kl: Tensor | None = None

    @property
    def mean(self) -> Tensor:
        """Log-probability per token under the policy."""
        return self.sum / self.length

    @property
    def reference_mean(self) -> Tensor:
        """Log-probability per token under the reference."""
        return self._reference / self.length

    @property
    def log_ratio(self) -> Tensor:
        """log policy(y | x) - log reference(y | x)."""
        return self.sum - self._reference

    @property
    def mean_log_ratio(self) -> Tensor:
        """`log_ratio` per token."""
        return self.mean - self.reference_mean

    @property
    def positions(self) -> Tensor:
        """The place of each token among those that count, from 1: [n, t]."""
        assert self.mask is not None, "the loss has needs_tokens=False"
        return self.mask.cumsum(-1)

    def counted(self, tokens: Tensor | None) -> Tensor:
        """Return `tokens` [n, t] with 0 for those that do not count."""
        assert self.mask is not None and tokens is not None, "the loss has needs_tokens=False"
        return torch.where(self.mask, tokens, 0.0)

    @property
    def _reference(self) -> Tensor:
        assert self.reference_sum is not None, "the loss has needs_reference=False"
        return self.reference_sum


@dataclass(frozen=True)
class Examples:
    """What a loss sees of n examples."""

    chosen: Responses  # of rows of targets and of labelled rows: the response
    rejected: Responses | None = None  # None unless the loss has `needs_rejected`
    columns: Mapping[str, Tensor] = field(default_factory=dict)  # the data columns that the loss names, each [n]
    statistics: Mapping[str, Tensor] = field(default_factory=dict)  # `Loss.observe` of all N global examples, each [N]
    state: Mapping[str, float] = field(default_factory=dict)  # see `Loss.next_state`
    ranked: Responses | None = None  # of rankings: all responses, best first, of one example after the other
    sizes: list[int] = field(default_factory=list)  # of rankings: the number of responses of each example

    @property
    def losers(self) -> Responses:
        """The rejected side of a loss that has `needs_rejected`."""
        assert self.rejected is not None, "the loss has needs_rejected=False"
        return self.rejected


class Loss:
    """Base of all losses. A subclass is a frozen dataclass; its fields are the keys of its YAML file in config/loss.

    `class MyLoss(Loss, name="mine")` is found by that name in losses.py; without a name, as module.MyLoss in any
    module that can be imported. What a loss needs are facts of the class, or of the object: `__post_init__` may `_set`
    them, after the base's.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid", "allow_inf_nan": False}
    kind: ClassVar[str]
    rows = "pairs"  # what it learns from: pairs, targets (demonstrations), labelled (completions), ranked (responses)
    needs_reference = True
    needs_tokens = False
    needs_squares = False  # with needs_tokens
    needs_kl = False  # with needs_tokens; computed by a live reference
    needs_statistics = False
    observes_mismatched = False  # `observe` sees each prompt of the global batch with another prompt's response
    columns: tuple[str, ...] = ()  # numeric columns of the data, one value per example
    term_names: tuple[str, ...] = ()  # of a sum of losses: the keys of `term_losses`

    def __init_subclass__(cls, name: str | None = None) -> None:
        if "needs_rejected" in vars(cls):
            raise TypeError(f"{cls.__qualname__}: set `rows` instead of `needs_rejected`, such as rows = 'targets'")
        if cls.rows == "labelled" and "label" not in cls.columns:
            raise TypeError(f"{cls.__qualname__}: rows = 'labelled' needs columns = ('label',)")
        cls.kind = name or f"{cls.__module__}.{cls.__qualname__}"

    def __post_init__(self) -> None:
        """Check the keys of a loss that is made in Python as those of a file are. Raise ValueError."""
        hints = get_type_hints(type(self), include_extras=True)
        kind = make_dataclass("Keys", hints.items(), namespace={"__pydantic_config__": self.__pydantic_config__})
        values, problems = build(kind, {key.name: getattr(self, key.name) for key in fields(kind)}, "loss.")
        if problems:
            raise ValueError("; ".join(problems))
        self._set(**vars(values))

    @property
    def needs_rejected(self) -> bool:
        """Whether an example has a rejected response."""
        return self.rows in ("pairs", "ranked")

    @property
    def name(self) -> str:
        """What the run's files call the loss."""
        return self.kind

    def __str__(self) -> str:
        """Return the name, and the keys that do not have their neutral values."""
        own = ((key.name, getattr(self, key.name), key.default) for key in fields(self) if key.name != "name")  # type: ignore[arg-type]
        return f"{self.name}({', '.join(f'{key}={value}' for key, value, neutral in own if value != neutral)})"

    def _set(self, **facts: Any) -> None:
        for fact, value in facts.items():
            object.__setattr__(self, fact, value)

    def __call__(self, examples: Examples) -> Tensor:
        """Return the loss of each example, shape [n]."""
        raise NotImplementedError

    def term_losses(self, examples: Examples) -> dict[str, Tensor]:
        """Return each term of a sum of losses before its weight, shape [n], for metrics."""
        return {}

    def rewards(self, responses: Responses) -> Tensor | None:
        """Return the implicit reward of each response, shape [n]; None if the loss defines none."""
        return None

    def observe(self, examples: Examples) -> dict[str, Tensor]:
        """Return values [n] that the loss needs from every example of the global batch (`needs_statistics`).

        They are computed without gradients before the loss, and gathered in no particular order.
        """
        raise NotImplementedError

    def initial_state(self) -> dict[str, float]:
        """Return the numbers that the loss carries from update to update; {} if it has none."""
        return {}

    def next_state(self, state: Mapping[str, float], statistics: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the state with which a global batch of these `statistics` is trained on. Checkpoints hold it."""
        return dict(state)

    def gradient_weight(self, examples: Examples) -> Tensor | None:
        """Return how much each example still pushes, shape [n]: -d loss / d reward of the chosen response, such as
        sigmoid(-margin) of DPO. Those of different losses cannot be compared. None if the loss does not say."""
        return None

    @property
    def weighs_gradients(self) -> bool:
        """Whether the loss defines `gradient_weight`."""
        return type(self).gradient_weight is not Loss.gradient_weight

    @property
    def gives_rewards(self) -> bool:
        """Whether the loss defines implicit rewards."""
        return type(self).rewards is not Loss.rewards


@torch.enable_grad()
def reward_slopes(loss: Loss, responses: Responses) -> tuple[Tensor, Tensor] | None:
    """Return by how much a loss's rewards change per nat of the policy's and of the reference's sum, two of shape [n].

    None if the loss defines no rewards. Rewards that are linear in both are their slopes times them.
    """
    policy = responses.sum.detach().requires_grad_()
    given = responses.reference_sum
    reference = (torch.zeros_like(policy) if given is None else given.detach()).requires_grad_()
    rewards = loss.rewards(replace(responses, sum=policy, reference_sum=None if given is None else reference))
    if rewards is None:
        return None
    slopes = torch.autograd.grad(rewards.sum(), (policy, reference), allow_unused=True, materialize_grads=True)
    return slopes[0], slopes[1]
