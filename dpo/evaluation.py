"""Evaluations of a run: loss and metrics on held-out examples, samples, and the KL divergence from the reference."""

import gc
import math
from collections.abc import Callable, Mapping

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpo import parallel
from dpo.agreement import must_agree
from dpo.data.batching import Cut, eval_examples
from dpo.data.records import PreferenceData
from dpo.reference import LiveReference
from dpo.run import health, weights
from dpo.run.config import Config
from dpo.run.metrics import RunLogger
from dpo.run.terminal import evaluation_table
from dpo.sampling import Divergence, SampleEvaluator, Sampling, divergence, prompts_of
from dpo.scoring import Metrics, Scorer, evaluate_loss, mean_metrics, totals
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
        if self.sampler is not None:
            metrics |= self._sample(policy, scorer, seen)
        parallel.reshard(policy)
        self.logger.log(metrics | {"counters/eval_examples": len(self.examples)}, seen, always=True)
        log(f"evaluation after {seen} examples\n{evaluation_table(metrics, self.last, self._sizes(each, metrics))}")
        self.last = metrics
        return metrics

    def _sizes(self, each: Metrics, metrics: Mapping[str, float]) -> dict[str, int]:
        """Return the number of evaluation examples, or of samples, that each of `metrics` is a mean of."""
        n, counts = len(self.examples), totals(each)
        every = counts["loss/eval"][1]  # more than n if tensor-parallel ranks hold the same examples
        sizes = {name: counts[name][1] * n // every if name in counts else n for name in metrics}
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
