"""The check before training: as long as the policy equals the reference, every reward must be 0."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from dpo import parallel
from dpo.data.batching import Cut, Example, as_examples, deal, make_batch
from dpo.data.records import PreferenceData
from dpo.model.verdicts import Verdict, structure
from dpo.reference import LiveReference
from dpo.run import health
from dpo.run.config import Config
from dpo.scoring import Scorer, Share, shares
from dpo.stored import StoredReference
from dpo.utils import UserError, log

ROUNDING = 1e-5  # nats per token, of a live reference
SECONDS = 20.0
LEAST_CHECKED = 256  # examples, as many as an evaluation has by default
Part = tuple[PreferenceData, int, list[Share]]
"""Data, a number of training examples, and this rank's micro-batches of them."""


def check_training_data(
    policy: PreTrainedModel, scorer: Scorer, parts: Iterable[Part], total: int, verdict: Verdict
) -> None:
    """Raise UserError unless rewards are 0 on the examples of `parts`, of `total` training examples. A collective.

    All examples are checked if that takes up to SECONDS; otherwise as many as it allows, at least LEAST_CHECKED: these
    miss a fault of 2 % of all examples in 1 of 176 runs. A full check would cost as much as computing the reference.
    Nothing is computed if an earlier start kept this `verdict`.
    """
    if (found := verdict.read()) is not None:
        log(f"policy and reference agree on {found} of {total} training examples, as an earlier start found")
        return
    policy.train()
    worst, n_checked, until = health.NO_DIFFERENCE, 0, time.monotonic() + SECONDS
    for data, n, micro_batches in parts:
        for part in micro_batches:
            metrics = scorer.differences(policy, part.batch, "train")
            parallel.reshard(policy)  # no backward pass follows
            if part.counts:
                worst = max(worst, health.difference(data, part.examples, metrics, "train"))
        n_checked += n
        if parallel.any_process(n_checked >= LEAST_CHECKED and time.monotonic() > until):
            break
    must_agree(scorer, worst, f"{n_checked} of {total} training examples")
    verdict.keep(n_checked)


def verdict_on(policy: PreTrainedModel, config: Config, scorer: Scorer, *checked: Any) -> Verdict:
    """Return where the verdict of a run's `check_training_data` is kept. `checked`: JSON values that stand for the data
    and examples. A collective.

    It depends on the weights, which the folder of a stored reference is named after, and on the entries, whose files
    are named after their content. Nothing is kept of a live reference: its check is one batch.
    """
    reference, how = scorer.reference, scorer.how
    if not isinstance(reference, StoredReference):
        return Verdict(None)
    entries = sorted(path.name for path in reference.folder.glob("*.safetensors"))
    work = (config.batch_size, config.gradient_accumulation_steps, config.eval_batch_size, config.microbatch_tokens)
    content = [reference.folder.name, entries, how.layout, how.flex, work, LEAST_CHECKED, SECONDS, *checked]
    return Verdict.of(config.cache, "agreement", structure(policy, config), content)


def parts_to_check(
    data: PreferenceData,
    batches: list[np.ndarray],
    scorer: Scorer,
    cut: Callable[[int], Cut],
    evaluation: Iterator[Part],
    resumed: bool,
) -> Iterator[Part]:
    """Yield what `check_training_data` computes, in the micro-batches of training. A collective. `batches`: the global
    batches, int [n, 2] each.

    A live reference runs the same kernels on the same rows as the policy, so one batch tells; a resumed run was checked
    when it began. A stored reference was computed in other micro-batches, perhaps by another program. A model that
    computes a row differently beside a longer one is found whatever is drawn: see health.extremes.
    """
    batches = health.with_new_examples(batches)
    if isinstance(scorer.reference, LiveReference) or resumed:
        batches = batches[:1]
    else:
        layout = scorer.how.layout
        for examples in health.extremes(data, batches, layout, cut(1).tokens):
            together = deal(data, examples, Cut(layout, 1, 1, None))  # the same in every process
            yield data, 0, [Share(make_batch(data, part), True, part) for [part] in together]
        yield from evaluation
    for examples in map(as_examples, batches):
        yield data, len(examples), shares(data, examples, cut(len(examples)))


def must_agree(scorer: Scorer, worst: health.Difference, checked: str) -> None:
    """Raise UserError if policy and reference differ by more than rounding on an example of any process."""
    worst = max(parallel.gather(worst))
    reference = scorer.reference
    difference = f"by up to {worst.per_token:.2g} nats per token (reward {worst.reward:.2g} of {worst.example})"
    if worst.per_token <= (ROUNDING if isinstance(reference, LiveReference) else scorer.how.tolerance):
        rounding = f", up to rounding: {difference}" if worst.per_token else ""
        log(f"policy and reference agree on {checked}{rounding}")
        return
    if not math.isfinite(worst.per_token):
        raise UserError(
            f"log-probabilities are not finite before the first update, such as those of {worst.example}: the model "
            f"overflows in {scorer.how.dtype}, or is damaged. Compute in float32 or bfloat16 (mixed_precision)"
        )
    remove = f", remove {reference.folder}" if isinstance(reference, StoredReference) else ""
    raise UserError(
        f"policy and reference differ before the first update {difference}, so every reward would be off: they must "
        "have the same weights, precision and kernels, and give a response the same log-probability whatever is "
        f"computed beside it. Compute in float32 (mixed_precision=null){remove}, or look for something random in the "
        "model"
    )


def evaluation_part(data: PreferenceData | None, examples: Sequence[Example], cut: Cut) -> Iterator[Part]:
    """Yield the evaluation examples for `parts_to_check`."""
    if data is not None:
        yield data, 0, shares(data, examples, cut)
