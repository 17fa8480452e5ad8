"""Samples of a policy, and how far they show it to be from the reference: estimates of KL(policy || reference)."""

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from dpo import parallel
from dpo.data.batching import Batch, Cut, Example, Tree, chunks
from dpo.data.records import PreferenceData
from dpo.data.tokenise import own_bos
from dpo.model.layouts import set_attention
from dpo.model.logps import LOGITS_AT_ONCE, Computation, autocast, input_device, next_token_logps
from dpo.reference import LiveReference
from dpo.utils import progress

ESTIMATORS = ("plain", "rao_blackwell")


@dataclass(frozen=True)
class Sampling:
    """How responses are sampled: up to `max_new_tokens` each, `batch_size` prompts at a time.

    Temperature 1 and top_p 1 are the model's own distribution; temperature 0 takes the likeliest token each time.
    """

    max_new_tokens: int
    batch_size: int
    seed: int
    dtype: torch.dtype
    temperature: float = 1.0
    top_p: float = 1.0
    first_batch: int = 0
    """The number of the first batch, if some have been sampled before."""

    def batch_seed(self, number: int) -> int:
        """Return the seed of a batch. Not seed + number: batches of neighbouring seeds would be the same."""
        return int(np.random.SeedSequence([self.seed, self.first_batch + number]).generate_state(1)[0])

    @property
    def own_distribution(self) -> bool:
        """Whether samples are the model's own, as an estimate of a KL divergence needs them."""
        return self.temperature == 1 and self.top_p == 1


@torch.no_grad()
def sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]], how: Sampling
) -> list[list[int]]:
    """Return one sampled response for each prompt, as token ids with EOS if the model ended it.

    The result depends on `how` and the prompts, and not on the number of processes, which take turns at the batches;
    other random state is left as it was.
    """
    device, end = input_device(model), tokenizer.eos_token_id
    set_attention(model, flex=False)  # which is for whole responses
    # generate() fills in what is not set from the model's own settings, such as a repetition penalty.
    own, model.generation_config = model.generation_config, _generation(how, end)
    batches, ranks = list(chunks(prompts, how.batch_size)), parallel.data_ranks(model)
    width = max(map(len, prompts))
    mine: list[list[list[int]]] = []
    rng_devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(rng_devices), autocast(model, how.dtype), parallel.whole_logits(model):
            for start in progress(range(0, len(batches), ranks), desc="sampling", leave=False):
                turn = start + parallel.data_rank(model)
                some = batches[turn] if turn < len(batches) else batches[start]
                torch.manual_seed(how.batch_seed(turn))
                ids, mask = left_padded(some, end, width)
                # Processes end at different lengths; synced_gpus makes each go on with the others' forward passes.
                out: Any = model.generate(  # type: ignore[operator]
                    ids.to(device),
                    attention_mask=mask.to(device),
                    max_new_tokens=how.max_new_tokens,
                    synced_gpus=parallel.active(),
                )
                mine.append([_until_end(row, end) for row in out[:, width:].tolist()])
    finally:
        model.generation_config = own
    by_rank = parallel.gather_over_data(model, mine)
    return [response for i in range(len(batches)) for response in by_rank[i % ranks][i // ranks]]


def _generation(how: Sampling, end: int) -> GenerationConfig:
    common = {"eos_token_id": end, "pad_token_id": end, "use_cache": True}
    if how.temperature == 0:
        return GenerationConfig(do_sample=False, **common)
    return GenerationConfig(
        do_sample=True, top_k=0, top_p=float(how.top_p), temperature=float(how.temperature), **common
    )


def left_padded(prompts: Sequence[list[int]], pad: int, width: int) -> tuple[Tensor, Tensor]:
    """Return token ids and attention mask, int64 [prompts, width], padded on the left for generation."""
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


def _until_end(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end) + 1] if end in ids else ids


def continuation(tokenizer: PreTrainedTokenizerBase, prompt: list[int], response: list[int]) -> str:
    """Return the text that a response adds to its prompt, without special tokens. Decoded alone it would lose its first
    space with some tokenizers."""
    before = prompt[-8:]
    start, whole = tokenizer.batch_decode([before, before + response], skip_special_tokens=True)
    alone = tokenizer.decode(response, skip_special_tokens=True)
    return whole[len(start) :] if whole.startswith(start) else str(alone)


def prompts_of(data: PreferenceData, examples: Iterable[Example], n: int) -> list[list[int]]:
    """Return the first `n` distinct prompts of `examples`."""
    records = list(dict.fromkeys(record for record, _ in examples))[:n]
    return [data[record].prompt for record in records]


@dataclass(frozen=True)
class Divergence:
    """Estimates of KL(policy || reference), in nats a response: one of each sort for each sampled response.

    `plain` is log policy(y) / reference(y). `rao_blackwell` adds up, over the positions of y, the divergence of the two
    next-token distributions, computed exactly over the vocabulary: its mean is the same, its variance never larger
    (Amini et al. 2025, arXiv:2504.10637). Responses must be sampled from the policy's own distribution. If a limit
    cuts them, both estimate the divergence of the distributions that are cut there.
    """

    plain: list[float]
    rao_blackwell: list[float]

    def metrics(self, prompts: Sequence[list[int]]) -> dict[str, float]:
        """Return the mean of each estimator and its standard error over prompts (over samples, if there is one prompt):
        the samples of a prompt are averaged first."""
        metrics: dict[str, float] = {}
        for name in ESTIMATORS:
            mean, error = mean_and_error(getattr(self, name), prompts)
            metrics[f"kl_eval/{name}"] = mean
            if error is not None:
                metrics[f"kl_eval/{name}_error"] = error
        return metrics


def mean_and_error(values: Sequence[float], prompts: Sequence[Any]) -> tuple[float, float | None]:
    """Return the mean of `values`, and its standard error over their `prompts`; None for a single value."""
    by_prompt: dict[str, list[float]] = {}
    for value, prompt in zip(values, prompts, strict=True):
        by_prompt.setdefault(str(prompt), []).append(value)
    groups = list(by_prompt.values()) if len(by_prompt) > 1 else [[value] for value in values]
    n, mean = len(groups), sum(values) / len(values)
    if n == 1:
        return mean, None
    # The mean is a ratio of sums over prompts, which may have unequal numbers of samples.
    squares = sum(sum(value - mean for value in group) ** 2 for group in groups)
    return mean, math.sqrt(squares * n / (n - 1)) / len(values)


@torch.no_grad()
def divergence(
    policy: PreTrainedModel,
    reference: LiveReference,
    prompts: Sequence[list[int]],
    responses: Sequence[list[int]],
    how: Computation,
) -> Divergence:
    """Compare both on `responses`, sampled from `policy`. A collective: the processes share the work."""
    at_once = max(LOGITS_AT_ONCE // policy.config.get_text_config().vocab_size, 1)
    sizes = [(len(prompt), [len(response)]) for prompt, response in zip(prompts, responses, strict=True)]
    ranks = parallel.data_ranks(policy)
    mine: list[tuple[int, float, float]] = []
    for dealt in progress(Cut("padded", ranks, 1, at_once).deal(sizes), desc="KL", leave=False):
        some = dealt[parallel.data_rank(policy)]
        trees = [Tree(prompts[i], [responses[i]]) for i in some or dealt[0][:1]]
        found = _compare(policy, reference, Batch(trees, [], None), how)
        mine += [(i, *values) for i, values in zip(some, found, strict=False)]
    by_response = {i: values for share in parallel.gather(mine) for i, *values in share}
    plain, exact = zip(*(by_response[i] for i in range(len(responses))), strict=True)
    return Divergence(list(plain), list(exact))


def _compare(
    policy: PreTrainedModel, reference: LiveReference, batch: Batch, how: Computation
) -> list[tuple[float, float]]:
    """Return (log ratio, sum of next-token divergences) of each response, in nats."""
    how = replace(how, layout="padded", flex=False)
    ours, rows = next_token_logps(policy, batch, how)
    theirs = reference.next_token_logps(batch, how)
    # In place, as these are large. A token that the model rules out adds nothing: 0 log 0.
    logratios = theirs.to(ours.device).neg_().add_(ours).masked_fill_(ours.isneginf(), 0.0)
    plain = logratios.gather(-1, rows.targets.to(ours.device)[:, None]).squeeze(-1)
    exact = logratios.mul_(ours.exp_()).sum(-1)
    sums = torch.zeros(2, rows.shape[0], dtype=torch.float64)
    sums.index_add_(1, rows.places.cpu() // rows.shape[1], torch.stack([plain, exact]).cpu().double())
    return [(float(a), float(b)) for a, b in sums.T.tolist()]


@dataclass
class SampleEvaluator:
    """Samples from policy and reference for fixed prompts. The reference is frozen, so it is sampled once."""

    tokenizer: PreTrainedTokenizerBase
    prompts: list[list[int]]
    how: Sampling
    _reference: list[list[int]] | None = field(default=None, init=False)

    def remember(self, reference: PreTrainedModel) -> None:
        """Sample from the reference; `reference` may train from here on."""
        self._reference = sample(reference, self.tokenizer, self.prompts, self.how)

    def __call__(
        self, policy: PreTrainedModel, is_reference: bool = False
    ) -> tuple[list[list[int]], dict[str, float], list[dict[str, str]]]:
        """Returns the policy's responses as token ids; mean length (tokens) and share of samples that ended with EOS;
        and rows of prompt and responses as text. `is_reference`: the policy still equals the reference, so its samples,
        of the same seeds, are the reference's."""
        if is_reference and self._reference is None:
            self.remember(policy)
        known = self._reference if is_reference else None
        sampled = {"policy": known or sample(policy, self.tokenizer, self.prompts, self.how)}
        if self._reference is not None:
            sampled["reference"] = self._reference
        end = self.tokenizer.eos_token_id
        metrics: dict[str, float] = {}
        for model, responses in sampled.items():
            mean, error = mean_and_error([*map(len, responses)], self.prompts)
            metrics[f"samples_eval/{model}_length"] = mean
            if error is not None:
                metrics[f"samples_eval/{model}_length_error"] = error
            metrics[f"samples_eval/{model}_eos_rate"] = sum(r[-1:] == [end] for r in responses) / len(responses)
        told = functools.partial(continuation, self.tokenizer)
        texts = {model: [*map(told, self.prompts, responses)] for model, responses in sampled.items()}
        bos = len(own_bos(self.tokenizer))
        prompts = self.tokenizer.batch_decode([prompt[bos:] for prompt in self.prompts])
        rows = [{"prompt": prompt, **{model: texts[model][i] for model in texts}} for i, prompt in enumerate(prompts)]
        return sampled["policy"], metrics, rows
