"""Evaluations of a run: loss and metrics on held-out examples, samples, and the KL divergence from the reference."""

import functools
import gc
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpo import parallel
from dpo.agreement import must_agree
from dpo.data.batching import Cut, Example, eval_examples, responses_of
from dpo.data.records import PreferenceData, short_names
from dpo.reference import LiveReference
from dpo.run import health, weights
from dpo.run.config import Config
from dpo.run.metrics import RunLogger
from dpo.run.terminal import evaluation_table
from dpo.sampling import Divergence, SampleEvaluator, Sampling, divergence, prompts_of
from dpo.scoring import Metrics, Scorer, evaluate_loss, mean_metrics
from dpo.utils import UserError, log


class Evaluator:
    """Measures a policy on the run's evaluation examples and samples from it.

    `load_reference` gives the reference for the KL divergence if it is not in memory: its weights are read again.
    """

    def __init__(
        self,
        config: Config,
        data: PreferenceData | None,
        tokenizer: PreTrainedTokenizerBase,
        logger: RunLogger,
        load_reference: Callable[[], LiveReference],
    ):
        self.config, self.data, self.logger = config, data, logger
        self.load_reference = load_reference
        self.examples = eval_examples(data, config.n_eval_examples) if data is not None else []
        prompts = prompts_of(data, self.examples, config.n_eval_model_samples) if data is not None else []
        self.last: dict[str, float] = {}  # metrics of the evaluation before
        self.sizes: dict[str, int] = {}  # how many examples, or samples, each is a mean of
        self.sampler: SampleEvaluator | None = None
        if config.sample_during_eval and prompts:
            room = max(config.max_length - max(map(len, prompts)), 1)  # the same for all prompts
            how = Sampling(room, config.eval_batch_size, config.seed, config.compute_dtype)
            repeated = [prompt for prompt in prompts for _ in range(config.n_eval_samples_per_prompt)]
            self.sampler = SampleEvaluator(tokenizer, repeated, how)

    def __call__(self, policy: PreTrainedModel, scorer: Scorer, cut: Cut, seen: int) -> dict[str, float]:
        """Return and log all metrics of `policy` after training on `seen` examples. A collective.

        Raise UserError if one is not finite, or if the policy differs from the reference before the first update.
        """
        if self.data is None:
            return {}
        policy.eval()
        each, mine = evaluate_loss(scorer, policy, self.data, self.examples, cut)
        metrics = mean_metrics(each)
        if broken := [f"{name} {value}" for name, value in metrics.items() if not math.isfinite(value)]:
            raise UserError(f"evaluation after {seen} examples gave {', '.join(broken)}: {health.DIVERGED}")
        if scorer.reference is not None and not seen and scorer.untrained:
            worst = health.difference(self.data, mine, each, "eval")
            must_agree(scorer, worst, f"all {len(self.examples)} evaluation examples")
        by_example = self._gathered(policy, each, mine)
        self.logger.eval_examples(self._known | by_example, seen)
        if self.sampler is not None:
            metrics |= self._sample(policy, scorer, seen)
        parallel.reshard(policy)
        self.logger.log(metrics | {"counters/eval_examples": len(self.examples)}, seen, always=True)
        self.sizes = self._sizes(by_example, metrics)
        log(f"evaluation after {seen} examples\n{evaluation_table(metrics, self.last, self.sizes)}")
        self.last = metrics
        return metrics

    @functools.cached_property
    def _known(self) -> dict[str, list[Any]]:
        """What is known of each evaluation example: keys that other runs on the same rows share, and lengths."""
        assert self.data is not None
        data, sets, first = self.data, short_names(self.data.names), np.cumsum(self.data.n_examples)
        known: dict[str, list[Any]] = {"data set": [], "prompt": [], "example": [], "tokens": []}
        for record, pair in self.examples:
            content = data[record]
            key = data.pair_keys[first[record] - data.n_examples[record] + pair]
            known["data set"].append(sets[data.source[record]])
            known["prompt"].append(f"{data.keys[record]:016x}")
            known["example"].append(f"{key:016x}")
            known["tokens"].append([len(content.responses[i]) for i in responses_of(data, content, pair)])
        return known

    def _gathered(self, policy: PreTrainedModel, each: Metrics, mine: list[Example]) -> dict[str, list[Any]]:
        """Return every metric's values of all processes, in the order of the evaluation examples. A collective."""
        by_example: dict[Example, tuple[float | None, ...]] = {}
        for some, metrics in parallel.gather_over_data(policy, (mine, each)):
            by_example |= zip(some, zip(*metrics.values(), strict=True), strict=True)
        rows = [[v if v is None else float(f"{v:.7g}") for v in by_example[example]] for example in self.examples]
        return dict(zip(each, map(list, zip(*rows)), strict=True))

    def _sizes(self, by_example: Mapping[str, list[Any]], metrics: Mapping[str, float]) -> dict[str, int]:
        """Return the number of evaluation examples, or of samples, that each of `metrics` is a mean of."""
        counts = {name: sum(value is not None for value in values) for name, values in by_example.items()}
        # what follows from the tokens of a side is a mean over the examples that have that side
        base = {name: name.replace("logps_per_token_", "tokens_") for name in metrics}
        sizes = {name: counts.get(base[name], len(self.examples)) for name in metrics}
        sampled = len(self.sampler.prompts) if self.sampler is not None else 0
        return {name: sampled if name.startswith(("samples_", "kl_")) else size for name, size in sizes.items()}

    def _sample(self, policy: PreTrainedModel, scorer: Scorer, seen: int) -> dict[str, float]:
        """Write samples of policy and reference. Return their lengths, and the KL divergence if it is wanted."""
        assert self.sampler is not None
        same = scorer.untrained and scorer.reference is not None
        responses, metrics, rows = self.sampler(policy, is_reference=same)
        self.logger.samples(rows, seen)
        wanted = self.config.kl_during_eval
        if scorer.loss.needs_reference if wanted is None else wanted:
            metrics |= self._divergence(policy, scorer, responses)
            if not scorer.untrained:
                gc.collect()  # a model refers to itself
        return metrics

    def _divergence(self, policy: PreTrainedModel, scorer: Scorer, responses: list[list[int]]) -> dict[str, float]:
        """Return how far the policy is from the reference on its own `responses` to the sampled prompts.

        That is 0 before the first update. Later, a reference that is not in memory is loaded for this, while there are
        no gradients to hold. Return nothing, with a warning, if its weights are gone or have changed.
        """
        assert self.sampler is not None
        if scorer.untrained:
            zeros = [0.0] * len(responses)
            return Divergence(zeros, zeros).metrics(self.sampler.prompts)
        if isinstance(scorer.reference, LiveReference):
            reference = scorer.reference
        else:
            try:
                reference = self.load_reference()
            except UserError as error:
                if parallel.active() and not isinstance(error, weights.OtherWeights):  # others may wait inside load
                    raise
                log(f"warning: the reference cannot be read again: {error}. This evaluation has no kl_eval")
                return {}
        found = divergence(policy, reference, self.sampler.prompts, responses, scorer.how)
        return found.metrics(self.sampler.prompts)
