"""What a policy is measured by: the loss and metrics of a batch, evaluators that yield (name, value), and sampling."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

import parallel
from batching import Batch, Cut, Example, chunks, deal, make_batch
from losses import Loss, SequenceLogps, implicit_rewards, reduce_tokens
from models import Computation, TokenLogps, autocast, input_device, response_logps
from preference_datasets import PreferenceData
from reference import Reference
from utils import progress

ROUNDING = 1e-6  # relative, of a float32 log-probability
Metrics = dict[str, list[float]]
"""Metric name -> one value for each example."""


@dataclass(frozen=True)
class Scorer:
    """Computes the loss of a batch under a policy, and the metrics that go with it."""

    loss: Loss
    how: Computation
    reference: Reference | None

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
            # Where policy and reference agree up to rounding, nothing is preferred yet.
            rounding = ROUNDING * self.loss.beta * (logps.policy_chosen.abs() + logps.policy_rejected.abs()).detach()
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
) -> Iterator[tuple[str, float]]:
    """Yields each metric of `Scorer` as its mean over exactly `examples`."""
    total: Metrics = {}
    for share in progress(shares(data, examples, cut), desc="evaluating", leave=False):
        _, metrics = scorer(policy, share.batch, "eval")
        extend_metrics(total, metrics, share.counts)
    yield from mean_metrics(total).items()


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    max_length: int,
    batch_size: int,
    seed: int,
    compute_dtype: torch.dtype,
) -> list[list[int]]:
    """One sampled response for each prompt, as token ids with EOS where the model ended it.

    Sampled from the model's own distribution (temperature 1, no top-k or top-p) until the longest prompt and a response
    have `max_length` tokens together. The result depends on `seed`, the prompts and `batch_size`, and not on
    the number of processes, which take turns at the batches; other random state is left as it was.
    """
    device, end = input_device(model), tokenizer.eos_token_id
    plain = GenerationConfig(do_sample=True, top_k=0, eos_token_id=end, pad_token_id=end, use_cache=True)
    # generate() fills in what is not set from the model's own settings, such as a repetition penalty.
    own, model.generation_config = model.generation_config, plain
    batches, ranks = list(chunks(prompts, batch_size)), parallel.data_ranks()
    # One width for all: processes that wait for each other then also have as many positions left.
    width = max(map(len, prompts))
    mine: list[list[list[int]]] = []
    rng_devices = [device] if device.type == "cuda" else []
    try:
        with (
            torch.random.fork_rng(rng_devices),
            autocast(model, compute_dtype),
            parallel.whole_logits(model),
        ):
            for start in progress(range(0, len(batches), ranks), desc="sampling", leave=False):
                turn = start + parallel.data_rank()
                some = batches[turn] if turn < len(batches) else batches[start]
                torch.manual_seed(seed + turn)
                ids, mask = left_padded(some, end, width)
                # Processes end at different lengths; synced_gpus makes each go on with the others' forward passes.
                out: Any = model.generate(  # type: ignore[operator]
                    ids.to(device),
                    attention_mask=mask.to(device),
                    max_new_tokens=max(max_length - width, 1),
                    synced_gpus=parallel.active(),
                )
                mine.append([_until_end(row, end) for row in out[:, width:].tolist()])
    finally:
        model.generation_config = own
    by_rank = parallel.gather_over_data(mine)
    return [response for i in range(len(batches)) for response in by_rank[i % ranks][i // ranks]]


def left_padded(prompts: Sequence[list[int]], pad: int, width: int) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, int64 [prompts, width], padded on the left for generation."""
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


def _until_end(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end) + 1] if end in ids else ids


def prompts_of(data: PreferenceData, examples: Iterable[Example], n: int) -> list[list[int]]:
    """The first `n` distinct prompts of `examples`."""
    records = list(dict.fromkeys(record for record, _ in examples))[:n]
    return [data[record].prompt for record in records]


class SampleEvaluator:
    """Samples from policy and reference for fixed prompts. The reference is frozen, so it is sampled once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], **settings: object):
        self.tokenizer, self.prompts, self.settings = tokenizer, prompts, settings
        self._reference: list[list[int]] | None = None

    def remember(self, reference: PreTrainedModel) -> None:
        """Sample from the reference; `reference` may train from here on."""
        self._reference = sample(reference, self.tokenizer, self.prompts, **self.settings)  # type: ignore[arg-type]

    def __call__(self, policy: PreTrainedModel) -> tuple[dict[str, float], list[dict[str, str]]]:
        """Returns mean length (tokens) and share of samples that ended with EOS, and rows of prompt and responses."""
        sampled = {"policy": sample(policy, self.tokenizer, self.prompts, **self.settings)}  # type: ignore[arg-type]
        if self._reference is not None:
            sampled["reference"] = self._reference
        end = self.tokenizer.eos_token_id
        metrics: dict[str, float] = {}
        for model, responses in sampled.items():
            metrics[f"samples_eval/{model}_length"] = sum(map(len, responses)) / len(responses)
            metrics[f"samples_eval/{model}_eos_rate"] = sum(r[-1:] == [end] for r in responses) / len(responses)
        texts = {model: self.tokenizer.batch_decode(r, skip_special_tokens=True) for model, r in sampled.items()}
        prompts = self.tokenizer.batch_decode(self.prompts)
        return metrics, [
            {"prompt": prompt, **{model: texts[model][i] for model in texts}} for i, prompt in enumerate(prompts)
        ]
