"""Health checks of a run: numbers that are not finite, a loss that jumps, chosen responses that get unlikely."""

import itertools
import json
import math
import random
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from dpo import parallel
from dpo.data.batching import Batch, Example, Tree, as_examples, make_batch, n_tokens, responses_of
from dpo.data.records import PreferenceData
from dpo.model.logps import TokenLogps
from dpo.reference import Reference, shared
from dpo.run.checkpoint import BATCH_FILE
from dpo.run.config import TrainingConfig
from dpo.utils import UserError, log

RECENT = 64  # updates
MOST_NAMED = 4
ADVICE = (
    "Lower lr, compute in float32 (mixed_precision=null) if it is not, or look at the data with "
    "scripts/inspect_data.py; to go on from an earlier checkpoint: resume=<folder> resume_allow_changes=true"
)
DIVERGED = f"training stopped, and nothing of this state was saved. {ADVICE}"
LOST_STEPS = 0.1  # share of the weights that a step does not change, from which a run warns


class Watch:
    """Warns of a training loss beyond `spike` times its recent median, and of chosen responses that have become less
    likely than under the reference by more than `drop` nats per token, once each time that begins. None: never."""

    def __init__(self, spike: float | None, drop: float | None):
        self.spike, self.drop = spike, drop
        self.losses: deque[float] = deque(maxlen=RECENT)
        self.changes: deque[float] = deque(maxlen=RECENT)
        self.fell = False

    def update(self, metrics: dict[str, float], examples: int) -> None:
        """Look at an update's metrics."""
        loss = metrics.get("loss/train")
        if loss is None:  # this update was left out
            return
        if self.spike is not None and len(self.losses) == RECENT:
            usual = statistics.median(self.losses)
            if loss > self.spike * usual > 0:
                log(f"warning: loss {loss:.4g} after {examples} examples, {loss / usual:.1f} times the recent median")
        self.losses.append(loss)
        if "logratios_per_token_train/chosen" in metrics:
            self.changes.append(metrics["logratios_per_token_train/chosen"])
            if len(self.changes) == RECENT:
                self._look(statistics.fmean(self.changes), f"the last {RECENT} updates", examples)

    def evaluation(self, metrics: dict[str, float], examples: int) -> None:
        """Look at an evaluation's metrics."""
        if examples and "logratios_per_token_eval/chosen" in metrics:  # before training, another reference may differ
            self._look(metrics["logratios_per_token_eval/chosen"], "the evaluation", examples)

    def _look(self, change: float, where: str, examples: int) -> None:
        falls = self.drop is not None and change < -self.drop
        if falls and not self.fell:
            log(
                f"warning: chosen responses have become less likely than under the reference by {-change:.3g} nats per "
                f"token in {where} (after {examples} examples): only the margin is trained, and the text may get "
                "worse. Look at samples (sample_during_eval=true); to hold the policy back, raise loss.beta or lower lr"
            )
        self.fell = falls


def broken_examples(data: PreferenceData, examples: Sequence[Example], losses: Sequence[float | None]) -> str:
    """Name the examples of all processes whose loss is not finite, for a message. A collective."""
    mine = [name_of(data, e) for e, loss in zip(examples, losses, strict=True) if not math.isfinite(loss or 0)]
    found = sorted({name for names in parallel.gather(mine) for name in names})
    return f"the loss of {_first(found)} is not finite" if found else "every example's loss is finite"


def _first(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


def name_of(data: PreferenceData, example: Example) -> str:
    """Return an example's name in messages: its data set, and the numbers of record and pair in the run's data."""
    record, pair = example
    return f"{data.names[int(data.source[record])]}:{record}:{pair}"


def broken_parameters(model: PreTrainedModel) -> str:
    """Name the parameters that are not finite, or else the gradients, for a message. A collective."""
    for what, tensors in (
        ("weights", dict(model.named_parameters())),
        ("gradients", {n: p.grad for n, p in model.named_parameters() if p.grad is not None}),
    ):
        mine = [n for n, tensor in tensors.items() if not bool(parallel.local(tensor).isfinite().all())]
        found = list(dict.fromkeys(n for names in parallel.gather(mine) for n in names))
        if found:
            return f"{what} that are not finite: {_first(found)} (of {len(tensors)})"
    return "weights and gradients are finite"


@dataclass(frozen=True, order=True)
class Difference:
    """Difference of policy and reference on an example: nats per token (infinite if NaN), reward."""

    per_token: float
    reward: float = 0.0
    example: str = ""


NO_DIFFERENCE = Difference(0.0)


def difference(
    data: PreferenceData, examples: Sequence[Example], metrics: Mapping[str, Sequence[float | None]], split: str
) -> Difference:
    """Return the largest difference among `examples`. `metrics` are theirs, in the same order."""
    found = NO_DIFFERENCE
    for side in ("chosen", "rejected"):
        ratios = metrics.get(f"logratios_per_token_{split}/{side}", [])
        rewards = metrics.get(f"rewards_{split}/{side}", ratios)
        for example, per_token, reward in zip(examples, ratios, rewards):
            if per_token is None or reward is None:  # the example has no such side
                continue
            size = abs(per_token) if math.isfinite(per_token) else math.inf
            if size > found.per_token:
                found = Difference(size, reward, name_of(data, example))
    return found


def _codes(examples: np.ndarray) -> np.ndarray:
    """Return a number for each of `examples`, int [n, 2], in their order."""
    return examples[:, 0] * (examples[:, 1].max(initial=0) + 1) + examples[:, 1]


def with_new_examples(batches: list[np.ndarray]) -> list[np.ndarray]:
    """Return the global batches that hold an example for the first time: the first, then the rest shuffled."""
    first = np.unique(_codes(np.concatenate(batches)), return_index=True)[1]
    ends = np.cumsum([len(batch) for batch in batches])
    found = np.unique(np.searchsorted(ends, first, "right")).tolist()
    rest = found[1:]
    random.Random(0).shuffle(rest)
    return [batches[i] for i in [*found[:1], *rest]]


def extremes(data: PreferenceData, batches: list[np.ndarray], layout: str, room: int | None) -> list[list[Example]]:
    """Return two micro-batches: the shortest example alone, and beside the longest with which it fits into `room`
    tokens. A collective.

    A model may compute a row differently if the longest row beside it exceeds some length. The stored reference was
    computed sorted by length: the shortest example beside short ones. So, whatever that length is, the shortest example
    was computed on one side of it and is on the other in one of these micro-batches, if any micro-batches of the data
    lie on both sides.
    """
    examples = np.concatenate(batches)
    examples = examples[np.unique(_codes(examples), return_index=True)[1]]

    def measure(part: range) -> list[np.ndarray]:
        lengths: list[tuple[int, int]] = []  # of an example's longest side, and of its row
        for index, some in itertools.groupby(examples[part.start : part.stop].tolist(), key=lambda e: e[0]):
            record = data[index]
            for _, pair in some:
                sides = [len(record.responses[side]) for side in responses_of(data, record, pair)]
                row = n_tokens(len(record.prompt), sides if layout != "padded" else [max(sides)])
                lengths.append((len(record.prompt) + max(sides), row))
        return [np.array(lengths, dtype=np.int32).reshape(-1, 2)]

    [lengths] = shared(len(examples), measure)
    order = np.lexsort((lengths[:, 1], lengths[:, 0]))  # stable: of equal lengths in the examples' order
    shortest, others = order[0], order[1:]
    rows = 4 if layout == "padded" else 2
    fitting = others[rows * lengths[others, 1] <= room] if room is not None else others
    alone, *longest = as_examples(examples[[shortest, *fitting[-1:]]])
    return [[alone]] + [[alone, *longest]] * bool(longest)


@torch.no_grad()
def warn_of_lost_steps(model: PreTrainedModel, config: TrainingConfig) -> None:
    """Warn if bfloat16 weights are too coarse for steps of `lr`: with round_to_nearest, a step of less than half the
    distance between two neighbouring numbers changes nothing. Adam and its kin, RMSprop too, take steps of about lr,
    whatever the gradient. A collective."""
    lr, optimizer = config.lr, config.optimizer
    if not config.round_to_nearest:
        return
    lost = total = 0
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype == torch.bfloat16:
            weights = parallel.local(parameter)
            lost += int((weights + lr == weights).sum())
            total += weights.numel()
    lost, total = (sum(counts) for counts in zip(*parallel.gather((lost, total))))
    if total and lost / total >= LOST_STEPS and optimizer not in ("SGD", "ASGD"):
        log(
            f"warning: bfloat16 weights with round_to_nearest=true are too coarse for lr={lr:.2g}. A step of "
            f"{optimizer} is about as large as lr, and {lost / total:.1%} of the weights stay as they are after such a "
            "step: bfloat16 numbers lie 0.4 % to 0.8 % of their size apart. Set round_to_nearest=false, or "
            "model.policy_dtype=float32 mixed_precision=bfloat16"
        )


def batch_text(
    data: PreferenceData, examples: Sequence[Example], reference: Reference | None, loss: dict[str, Any]
) -> str:
    """Return the text of batch.json: token ids and reference log-probabilities of every example. A collective."""
    rows = []
    for example in examples:
        batch = make_batch(data, [example])
        [tree] = batch.trees
        found = reference.response_logps(batch) if reference is not None else None
        row: dict[str, Any] = {"name": name_of(data, example), "prompt": tree.prompt, "responses": tree.responses}
        row |= {"masks": tree.masks} if tree.masks else {}
        row |= {name: getattr(batch, name) for name in ("chosen", "rejected", "columns", "ranked")}
        rows.append(row | {"reference": [found.logps.tolist(), found.mask.tolist()] if found is not None else None})
    return json.dumps({"loss": loss, "examples": rows})


@dataclass(frozen=True)
class Recorded:
    """An example of batch.json. As a `reference` it answers for its own batch alone."""

    name: str
    batch: Batch
    logps: TokenLogps | None

    def response_logps(self, batch: Batch) -> TokenLogps:
        """Return log-probabilities as `dpo.model.logps.response_logps` does."""
        assert batch is self.batch and self.logps is not None
        return self.logps


def read_batch(folder: Path) -> tuple[dict[str, Any], list[Recorded]]:
    """Return the loss's configuration and the examples of batch.json. Raise UserError."""
    path = folder / BATCH_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        examples = []
        for row in content["examples"]:
            trees = [Tree(row["prompt"], row["responses"], row.get("masks"))]
            batch = Batch(trees, row["chosen"], row["rejected"], row.get("columns", {}), row.get("ranked"))
            logps = TokenLogps(*map(torch.tensor, row["reference"])) if row["reference"] else None
            examples.append(Recorded(row["name"], batch, logps))
        return content["loss"], examples
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is no batch that a run wrote ({type(error).__name__}); give a nonfinite-<examples> folder"
        ) from error
