"""The training loop: one `fit`, one `train_step`, one `evaluate`. The trainers differ in where the model lies."""

import dataclasses
import gc
import inspect
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpo import parallel
from dpo.data.batching import Cut, Example, Plan, deal, eval_examples, make_batch
from dpo.data.checks import trained_on
from dpo.model.loading import check_fits, check_noise, pick_computation
from dpo.parallel import Sharding
from dpo.reference import LiveReference, Reference, StoredReference, build_reference, wanted_by
from dpo.run import checkpoint, health, stopping
from dpo.run.config import Config
from dpo.run.throughput import Cost, cost_of, throughput
from dpo.sampling import SampleEvaluator, Sampling, divergence, prompts_of
from dpo.scoring import Metrics, Scorer, Share, evaluate_loss, extend_metrics, mean_metrics, shares
from dpo.utils import RunLogger, UserError, log, progress
from preference_datasets import PreferenceData
from settings import command_line

MOST_SKIPPED = 25  # in a row: from its start at 2^16, the loss scale is then far below 1
SECONDS_BETWEEN_TRIES = 10
ROUNDING = 1e-5  # nats per token, of a live reference
SECONDS_TO_CHECK = 20.0
LEAST_CHECKED = 256  # examples, as many as an evaluation has by default
ADVICE = (
    "Lower lr, compute in float32 (mixed_precision=null) where it is not, or look at the data with "
    "scripts/inspect_data.py; to go on from an earlier checkpoint: resume=<folder> resume_allow_changes=true"
)
DIVERGED = f"training stopped, and nothing of this state was saved. {ADVICE}"


def plan_of(config: Config) -> Plan:
    """Which examples the configuration asks to train on."""
    return Plan(config.seed, config.batch_size, config.n_epochs, config.n_examples, config.dataset_weights)


def parameter_groups(model: torch.nn.Module, config: Config) -> list[dict[str, Any]]:
    """Trainable parameters for the optimizer, those of one dimension (norms, biases) apart if they are not to decay."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if config.decay_norms_and_biases:
        return [{"params": group} for group in parallel.by_mesh(parameters)]
    matrices, vectors = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim <= 1]
    return [
        *({"params": group} for group in parallel.by_mesh(matrices)),
        *({"params": group, "weight_decay": 0.0} for group in parallel.by_mesh(vectors)),
    ]


def build_optimizer(model: torch.nn.Module, config: Config) -> torch.optim.Optimizer:
    """The torch.optim class that `optimizer` names. Raises UserError for arguments that it refuses."""
    chosen = getattr(torch.optim, config.optimizer)
    arguments = config.optimizer_arguments
    on_cuda = all(p.device.type == "cuda" for p in model.parameters())
    if on_cuda and "fused" in inspect.signature(chosen).parameters and "foreach" not in arguments:
        arguments.setdefault("fused", True)
    try:
        return chosen(parameter_groups(model, config), **arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"optimizer={config.optimizer} refuses its arguments {arguments}: {error}") from error


def lr_factor(step: int, total: int, config: Config) -> float:
    """What the learning rate is multiplied by at optimizer step `step` (from 0) of `total`."""
    warmup = config.warmup(total)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = min((step - warmup) / max(total - warmup, 1), 1.0)
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[config.lr_schedule]
    return config.lr_min_ratio + (1 - config.lr_min_ratio) * shape


class BasicTrainer:
    """Trains in one process, on one device (or with the layers spread over several, where the policy was loaded so)."""

    @staticmethod
    def sharding(config: Config) -> Sharding | None:
        """How the model lies over the processes of the group; None: whole, in each."""
        return None

    def __init__(
        self,
        config: Config,
        load: Callable[..., PreTrainedModel],
        tokenizer: PreTrainedTokenizerBase,
        train_data: PreferenceData,
        eval_data: PreferenceData | None,
        logger: RunLogger,
    ):
        """`load(archive, trains=True, compiled=True)` gives a new model with the weights of `archive`; None: the base
        model's."""
        self.config, self.load, self.tokenizer, self.logger = config, load, tokenizer, logger
        self.train_data, self.eval_data = train_data, eval_data
        self.plan = plan_of(config)
        self.total_examples, self.total_steps = self.plan.size(train_data)
        self.eval_examples = eval_examples(eval_data, config.n_eval_examples) if eval_data is not None else []
        self.examples = self.updates = self.skipped = self.skipped_in_a_row = 0
        self.evaluated = self.saved = 0  # after how many examples that was done as planned
        self.eval_metrics: dict[str, float] = {}
        self.best: float | None = None
        archive = Path(config.model.archive) if config.model.archive else None
        kept = (config.keep_last_n, config.keep_optimizer_last_n)
        files = trained_on(train_data, archive)
        self.writer = checkpoint.CheckpointWriter(logger.run_dir, config.async_save, *kept, files, logger.check)
        self.save_failed = False
        self.watch = health.Watch(config.warn_loss_spike, config.warn_chosen_drop)
        self.deadline = stopping.Deadline(config.max_runtime)
        self.start = checkpoint.Start(config.model.start)
        self.use(self.start.read(lambda: load(config.model.archive)))
        check_fits(self.policy, tokenizer, config)
        if not parallel.all_finite(self.policy):
            raise UserError(f"{config.model.start}: {health.broken_parameters(self.policy)}; it cannot be trained")
        health.warn_of_lost_steps(self.policy, config.lr, config.optimizer)
        self.scorer = Scorer(config.loss, pick_computation(self.policy, config), None)
        check_noise(self.policy, self.scorer.how)
        self.sampler = self._sampler()
        self.reference_seconds = 0.0
        if self.scorer.loss.needs_reference:
            self.prepare_reference()
        parallel.reshard(self.policy)

    def use(self, policy: PreTrainedModel) -> None:
        """Train `policy` from here on, with a fresh optimizer."""
        self.policy = policy
        self.optimizer = build_optimizer(policy, self.config)
        scaled = self.config.compute_dtype == torch.float16 and policy.dtype == torch.float32
        self.scaler = torch.amp.GradScaler(policy.device.type, enabled=scaled)

    def prepare_reference(self) -> None:
        """Take what is needed of the reference, which the policy still is: log-probabilities, and samples."""
        config, start = self.config, time.perf_counter()
        reference: Reference
        if config.reference.mode == "live":
            frozen = self.start.read(lambda: self.load(config.model.archive, False))
            reference = LiveReference(frozen, self.scorer.how)
        else:
            planned = (example for batch in self.plan.batches(self.train_data) for example in batch)
            wanted = wanted_by(self.train_data, planned)
            wanted += wanted_by(self.eval_data, self.eval_examples) if self.eval_data is not None else []
            n_responses = sum(len(responses) for *_, responses in wanted)
            cut = self.cut(n_responses, n_responses if config.microbatch_tokens else 2 * config.eval_batch_size)
            reference = build_reference(self.policy, self.scorer.how, cut, config.cache / "reference", wanted)
        self.scorer = dataclasses.replace(self.scorer, reference=reference)
        self.check_reference()
        if self.sampler is not None:
            self.sampler.remember(self.policy)
        self.reference_seconds = time.perf_counter() - start

    def _sampler(self) -> SampleEvaluator | None:
        config = self.config
        prompts = prompts_of(self.eval_data, self.eval_examples, config.n_eval_model_samples) if self.eval_data else []
        if not config.sample_during_eval or not prompts:
            return None
        room = max(config.max_length - max(map(len, prompts)), 1)  # the same for all prompts
        how = Sampling(room, config.eval_batch_size, config.seed, self.scorer.how.dtype)
        repeated = [prompt for prompt in prompts for _ in range(config.n_eval_samples_per_prompt)]
        return SampleEvaluator(self.tokenizer, repeated, how)

    def divergence(self, responses: list[list[int]]) -> dict[str, float]:
        """How far the policy is from the reference on its own `responses` to the sampled prompts. A reference that is
        not in memory is loaded for that, while there are no gradients to hold. Nothing, with a warning, if its weights
        are no longer there or have changed: no number is better than that of another reference."""
        assert self.sampler is not None
        if isinstance(self.scorer.reference, LiveReference):
            reference = self.scorer.reference.model
        else:
            try:
                reference = self.start.read(lambda: self.load(self.config.model.archive, False, False))
            except UserError as error:
                if parallel.active() and not isinstance(error, checkpoint.OtherWeights):  # others may wait inside load
                    raise
                log(f"warning: the reference cannot be read again: {error}. This evaluation has no kl_eval")
                return {}
            reference.requires_grad_(False).eval()
        prompts = self.sampler.prompts
        found = divergence(self.policy, reference, prompts, responses, self.scorer.how)
        parallel.reshard(reference)
        return found.metrics(prompts)

    def resume(self, folder: Path) -> None:
        """Go on from a checkpoint. Raises UserError if it is of other data or another reference."""
        checkpoint.must_have_states(folder)
        state = checkpoint.read_state(folder)
        for what, value in self._identity().items():
            if state.get(what) not in (None, value) and value is not None:
                if not self.config.resume_allow_changes:
                    raise UserError(
                        f"resume={folder}: {what} has changed: the files it was read from (or the program) are others; "
                        "give the same, or set resume_allow_changes=true"
                    )
                log(f"resume_allow_changes=true: {what} has changed")
        del self.policy, self.optimizer  # before there are others
        gc.collect()  # a model refers to itself
        self.use(self.load(str(folder)))
        for name in ("examples", "updates", "skipped", "skipped_in_a_row", "evaluated", "saved"):
            setattr(self, name, state[name])
        metric, self.best = state["best"]
        if metric != self.config.keep_best:
            self.best = None  # of another metric
        self.eval_metrics = state["metrics"]
        checkpoint.load_optimizer(folder, self.policy, self.optimizer)
        checkpoint.load_random_state(folder)
        if state["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        log(f"resuming {folder} after {self.examples} examples and {self.updates} updates")
        if self.examples >= self.total_examples:
            log(f"nothing is left to train: this run has {self.total_examples} examples; raise n_epochs to go on")

    def cut(self, n: int, pass_size: int | None = None) -> Cut:
        """How `n` examples are cut into passes, of about `pass_size` examples or as training's are."""
        config, ranks = self.config, parallel.data_ranks()
        size = max(pass_size or config.batch_size // config.gradient_accumulation_steps, ranks)
        return Cut(self.scorer.how.layout, ranks, -(-n // size), config.microbatch_tokens)

    def fit(self) -> None:
        """Train to the end of the plan, evaluating and saving on the way. Raises Stopped where asked to end early."""
        self.try_to_save()
        if not self.examples and self.config.do_first_eval:
            with stopping.gracefully():
                self.evaluate()
        with (
            stopping.gracefully(),
            progress(total=self.total_examples, initial=self.examples, unit="ex", desc=self.config.exp_name) as bar,
        ):
            self.deadline.start()
            self.evaluate_and_save()
            for examples in self.plan.batches_after(self.train_data, self.examples):
                metrics = self.train_step(examples)
                self.logger.log(metrics, self.examples)
                self.watch.update(metrics, self.examples)
                bar.set_postfix(_shown(metrics), refresh=False)
                bar.update(len(examples))
                self.stop_if_asked()
                self.evaluate_and_save()
            if self.evaluated != self.examples and self.config.do_final_eval and self.eval_data is not None:
                self.evaluated, self.saved = self.examples, 0  # what is saved has to know of it
                self.evaluate()
            self.save_the_last()

    def try_to_save(self) -> None:
        """Raise UserError if no checkpoint could be written, whatever the reason but a disk that is full now."""
        if self.config.debug:
            return
        if self.config.save_weights_only:
            log("save_weights_only=true: no checkpoint of this run can be resumed")
        try:
            self.writer.try_out(self.policy, self.tokenizer, self._state, self.saved_optimizer)
        except checkpoint.NoSpace as error:
            log(f"warning: {error}. Training goes on; free space before the first checkpoint")

    @property
    def saved_optimizer(self) -> torch.optim.Optimizer | None:
        """The optimizer, whose state checkpoints hold; None: weights only."""
        return None if self.config.save_weights_only else self.optimizer

    def save_the_last(self) -> None:
        """Have a checkpoint of where training ends, if that one is not written yet."""
        try:
            self.writer.wait()
        except checkpoint.NoSpace as error:
            log(f"warning: {error}")
            self.save_failed = True
        if self.saved != self.examples or self.save_failed:
            self.saved = self.examples
            self.save(last=True)

    def evaluate_and_save(self) -> None:
        """Do what is due after this many examples and has not been done."""
        every = self.config.eval_every
        evaluation = self.examples // every > self.evaluated // every
        save_every = self.config.save_every
        save = self.examples // save_every > self.saved // save_every if save_every else evaluation
        if evaluation:
            self.evaluated = self.examples
            self.evaluate()
            self.stop_if_asked()
        if save:
            self.saved = self.examples
            self.save()

    def stop_if_asked(self) -> None:
        """Save, and raise Stopped, if a signal or the deadline asks for it; what is due then is done on going on."""
        reason = stopping.reason(self.deadline, self.writer.seconds(self.policy, self.optimizer))
        if not parallel.any_process(reason is not None):
            return
        reason = next(found for found in parallel.gather(reason) if found)
        self.save(last=True)
        go_on = "; to go on: the same command, with resume=auto unless it is a sweep"
        if self.config.debug or self.config.save_weights_only:
            go_on = "; it cannot be resumed: there are no checkpoints, or only weights"
        log(f"stopped by {reason} after {self.examples} of {self.total_examples} examples{go_on}")
        raise stopping.Stopped

    def check_reference(self) -> None:
        """Raise UserError unless rewards are 0 while the policy is still the reference.

        A live reference runs the same kernels on the same rows as the policy in every pass, so one batch tells. A
        stored one was computed in other micro-batches, perhaps by another program. So training's examples are computed
        again in the micro-batches that training will make of them: all of them if that takes up to SECONDS_TO_CHECK,
        else as many of them as it allows, in random order, and at least LEAST_CHECKED: of these one misses a fault that
        2 % of all examples have in 1 of 176 runs. A full check of large data would cost as much as computing the
        reference did. A model that computes a row differently beside a longer one (LongRoPE) is found whatever is
        drawn: see health.extremes. A run that resumes has been checked when it began. Evaluation's examples are checked
        by the evaluation before the first update, or here if do_first_eval=false.
        """
        self.policy.train()
        worst, n_checked, until = health.NO_DIFFERENCE, 0, time.monotonic() + SECONDS_TO_CHECK
        for data, n, parts in self._parts_to_check():
            worst = max(worst, *(self._difference(data, part) for part in parts))
            n_checked += n
            if parallel.any_process(n_checked >= LEAST_CHECKED and time.monotonic() > until):
                break
        self._must_agree(worst, f"{n_checked} of {self.total_examples} training examples")

    def _parts_to_check(self) -> Iterator[tuple[PreferenceData, int, list[Share]]]:
        """What `check_reference` computes: data, a number of training examples, and their micro-batches here."""
        data, layout = self.train_data, self.scorer.how.layout
        batches = health.with_new_examples(self.plan.batches(data))
        if isinstance(self.scorer.reference, LiveReference) or self.config.checkpoint:
            batches = batches[:1]
        else:
            for some in health.extremes(data, batches, layout, self.config.microbatch_tokens):
                together = deal(data, some, Cut(layout, 1, 1, None))  # the same in every process
                yield data, 0, [Share(make_batch(data, part), True, part) for [part] in together]
            if self.eval_data is not None and not self.config.do_first_eval:
                some = self.eval_examples
                yield self.eval_data, 0, shares(self.eval_data, some, self.cut(len(some), self.config.eval_batch_size))
        for batch in batches:
            yield data, len(batch), shares(data, batch, self.cut(len(batch)))

    def _difference(self, data: PreferenceData, part: Share) -> health.Difference:
        _, metrics = self.scorer(self.policy, part.batch, "train")
        parallel.reshard(self.policy)  # no backward pass comes
        return health.difference(data, part.examples, metrics, "train") if part.counts else health.NO_DIFFERENCE

    def _must_agree(self, worst: health.Difference, checked: str) -> None:
        """Raise UserError if policy and reference differ on an example by more than rounding, in any process."""
        worst = max(parallel.gather(worst))
        live = isinstance(self.scorer.reference, LiveReference)
        found = f"by up to {worst.per_token:.2g} nats per token (reward {worst.reward:.2g} of {worst.example})"
        if worst.per_token <= (ROUNDING if live else self.scorer.how.tolerance):
            log(f"policy and reference agree on {checked}" + (f", up to rounding: {found}" if worst.per_token else ""))
        elif not math.isfinite(worst.per_token):
            raise UserError(
                f"log-probabilities are not finite before the first update, such as those of {worst.example}: the "
                f"model overflows in {self.scorer.how.dtype}, or is damaged. Compute in float32 or bfloat16 "
                "(mixed_precision)"
            )
        else:
            reference = self.scorer.reference
            folder = f", remove {reference.folder}" if isinstance(reference, StoredReference) else ""
            raise UserError(
                f"policy and reference differ before the first update {found}, so every reward would be off: they "
                "must have the same weights, precision and kernels, and give a response the same log-probability "
                f"whatever is computed beside it. Compute in float32 (mixed_precision=null){folder}, or look for "
                "something random in the model"
            )

    def train_step(self, examples: list[Example]) -> dict[str, float]:
        """One optimizer update on a global batch. The gradient is that of the mean loss over `examples`, however they
        are cut into micro-batches. Returns the batch's mean metrics. Raises UserError where loss or gradient is not
        finite."""
        start = time.perf_counter()
        self.policy.train()
        total: Metrics = {}
        mine: list[Example] = []
        cost, parts = Cost(), shares(self.train_data, examples, self.cut(len(examples)))
        scorer = dataclasses.replace(self.scorer, untrained=not self.updates).with_statistics(self.policy, parts)
        for share in parts:
            cost += cost_of(share.batch, self.scorer.how.layout) if share.counts else Cost()
            losses, metrics = scorer(self.policy, share.batch, "train")
            self.scaler.scale(losses.sum() * share.counts / len(examples)).backward()
            extend_metrics(total, metrics, share.counts)
            mine += share.examples
        means = mean_metrics(total)
        lr = self.config.lr * lr_factor(self.updates, self.total_steps, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        grad_norm = self.clip_gradients()
        if not math.isfinite(means["loss/train"]) or not self.may_step(grad_norm):
            self.on_nonfinite(examples, health.broken_examples(self.train_data, mine, total["loss/train"]), grad_norm)
            means = {name: value for name, value in means.items() if math.isfinite(value)}
        else:
            self.update(grad_norm)
        self.optimizer.zero_grad(set_to_none=True)
        self.examples += len(examples)
        self.eval_metrics = {}  # they were of other weights
        seconds = time.perf_counter() - start
        spent = {"examples_per_second": len(examples) / seconds, "reference_seconds": self.reference_seconds}
        spent |= throughput(self.policy, cost, seconds)
        counters = {"counters/examples": self.examples, "counters/updates": self.updates}
        counters |= {"counters/skipped": self.skipped} if self.skipped else {}
        return means | {"grad_norm": grad_norm, "lr": lr} | spent | counters

    def clip_gradients(self) -> float:
        """Scale the accumulated gradients down to max_grad_norm. Returns their L2 norm before that."""
        self.scaler.unscale_(self.optimizer)
        return parallel.clip_grad_norm(list(self.policy.parameters()), self.config.max_grad_norm)

    def may_step(self, grad_norm: float) -> bool:
        """Whether the gradient is finite, or overflowed as it does now and then under loss scaling, which skips such a
        step at a lower scale; not so if it goes on and on."""
        return math.isfinite(grad_norm) or (self.scaler.is_enabled() and self.skipped_in_a_row < MOST_SKIPPED)

    def update(self, grad_norm: float) -> None:
        """Take the optimizer step."""
        self.scaler.step(self.optimizer)
        self.scaler.update()
        finite = math.isfinite(grad_norm)
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        self.updates += finite

    def on_nonfinite(self, examples: list[Example], culprits: str, grad_norm: float) -> None:
        """Write what is needed to see it again, and raise UserError, or leave the step out (on_nonfinite=skip)."""
        stop = self.config.on_nonfinite == "stop" or self.skipped_in_a_row + 1 >= MOST_SKIPPED
        what = (
            f"update {self.updates + 1} (examples {self.examples + 1} to {self.examples + len(examples)}) is not "
            f"finite: {culprits}; gradient norm {grad_norm}; {health.broken_parameters(self.policy)}. "
        )
        if parallel.all_finite(self.policy) and not self.config.debug and (stop or not self.skipped):  # one will do
            what += self._save_nonfinite(examples)
        if stop:
            raise UserError(f"{what}Training stopped. {ADVICE}")
        self.skipped += 1
        self.skipped_in_a_row += 1
        self.scaler.update()
        log(f"warning: {what}on_nonfinite=skip: the update is left out")

    def _save_nonfinite(self, examples: list[Example]) -> str:
        """Write the state before this update, and its batch, as a checkpoint under a name of its own."""
        self.optimizer.zero_grad(set_to_none=True)
        folder = self.logger.run_dir / f"nonfinite-{self.examples}"
        try:
            loss = self.config.to_dict()["loss"]
            batch = health.batch_text(self.train_data, examples, self.scorer.reference, loss)
            self.writer.save(self.policy, self.tokenizer, self._state, self.optimizer, name=folder.name, batch=batch)
            self.writer.wait()
        except UserError as error:
            return f"What would show it again was not written ({error}). "
        return (
            "Examples computed together may infect each other; to see it again, one by one: "
            f"python scripts/replay.py {folder}. "
        )

    def evaluate(self) -> dict[str, float]:
        """Measure the policy on the evaluation examples, sample from it, and log both."""
        if self.eval_data is None:
            return {}
        self.policy.eval()
        cut = self.cut(len(self.eval_examples), self.config.eval_batch_size)
        scorer = dataclasses.replace(self.scorer, untrained=not self.updates)
        each, mine = evaluate_loss(scorer, self.policy, self.eval_data, self.eval_examples, cut)
        metrics = mean_metrics(each)
        broken = [f"{name} {value}" for name, value in metrics.items() if not math.isfinite(value)]
        if broken:
            raise UserError(f"evaluation after {self.examples} examples gave {', '.join(broken)}: {DIVERGED}")
        if self.scorer.reference is not None and not self.examples:
            found = health.difference(self.eval_data, mine, each, "eval")
            self._must_agree(found, f"all {len(self.eval_examples)} evaluation examples")
        if self.config.keep_best not in (None, *metrics):
            raise UserError(f"keep_best={self.config.keep_best} is not measured; choose from: {', '.join(metrics)}")
        self.watch.evaluation(metrics, self.examples)
        if self.sampler is not None:
            metrics |= self.sample()
        parallel.reshard(self.policy)
        self.eval_metrics = metrics
        n = len(self.eval_examples)
        self.logger.log(metrics | {"counters/eval_examples": n}, self.examples, always=True)
        shown = ", ".join(f"{name} {value:.5g}" for name, value in metrics.items())
        log(f"evaluation after {self.examples} examples, n={n}: {shown}")
        return metrics

    def sample(self) -> dict[str, float]:
        """Write samples of policy and reference; returns what they measure: lengths, and the KL between the two."""
        assert self.sampler is not None
        responses, metrics, rows = self.sampler(self.policy)
        self.logger.samples(rows, self.examples)
        wanted = self.config.kl_during_eval
        if self.scorer.loss.needs_reference if wanted is None else wanted:
            metrics |= self.divergence(responses)
            gc.collect()  # a model refers to itself
        return metrics

    def save(self, last: bool = False) -> None:
        """Write a checkpoint of this moment, unless debug=true. Raises UserError if it cannot be written. Only lack of
        space may pass: the `last` one waits save_patience for it; an earlier one is left to the next."""
        if self.config.debug:
            log("debug=true: no checkpoint is written")
            return
        if not parallel.all_finite(self.policy):
            raise UserError(f"the weights are not finite after {self.examples} examples: {DIVERGED}")
        best_before, is_best = self.best, self._is_best()
        tries = 1 + self.config.save_patience // SECONDS_BETWEEN_TRIES if last else 1
        for left in reversed(range(tries)):
            try:
                self.writer.save(self.policy, self.tokenizer, self._state, self.saved_optimizer, is_best=is_best)
                if last:
                    self.writer.wait()
                self.save_failed = False
                break
            except checkpoint.NoSpace as error:
                self.save_failed = True
                if not last:
                    self.best = best_before
                    log(f"warning: {error}. Training goes on")
                elif left:
                    log(f"warning: {error}. Trying again; free space")
                    time.sleep(SECONDS_BETWEEN_TRIES)
                else:
                    raise

    def _is_best(self) -> bool:
        """Whether this moment's evaluation gave the best keep_best so far, which is then remembered."""
        metric = self.config.keep_best
        if metric is None or not self.eval_metrics:
            return False
        value = self.eval_metrics[metric]
        better = self.best is None or (value < self.best if metric.startswith("loss/") else value > self.best)
        self.best = value if better else self.best
        return better

    def _state(self) -> dict[str, Any]:
        """What trainer_state.json says of this moment."""
        names = ("examples", "updates", "skipped", "skipped_in_a_row", "evaluated", "saved", "total_examples")
        return {
            **{name: getattr(self, name) for name in names},
            "best": [self.config.keep_best, self.best],
            "metrics": self.eval_metrics,
            "eval_examples": len(self.eval_examples),
            "command": command_line(),
            "scaler": self.scaler.state_dict(),
            "config": self.config.to_dict(),
            "history": self.logger.history(),
            "wandb_id": self.logger.wandb_id,
            "formats": self.train_data.formats,
            "sources": {"train": _absolute(self.train_data), "test": _absolute(self.eval_data)},
            **self._identity(),
        }

    def _identity(self) -> dict[str, Any]:
        """What a run that goes on from a checkpoint must share with it besides settings: data, and the reference."""
        reference = self.scorer.reference
        name = reference.folder.name if isinstance(reference, StoredReference) else None
        return {"training data": self.train_data.identity, "reference": name, checkpoint.START: self.start.identity}


class FSDPTrainer(BasicTrainer):
    """Shards weights, gradients and optimizer state over all processes (FSDP2)."""

    @staticmethod
    def sharding(config: Config) -> Sharding:
        return _sharding(config, 1)


class TensorParallelTrainer(BasicTrainer):
    """Splits each matrix over `tensor_parallel_size` processes (DTensor), and shards over the rest (FSDP2)."""

    @staticmethod
    def sharding(config: Config) -> Sharding:
        return _sharding(config, config.tensor_parallel_size or parallel.world_size() // config.fsdp_replicate_size)


def _sharding(config: Config, tensor: int) -> Sharding:
    replicate, processes = config.fsdp_replicate_size, parallel.world_size()
    shard, rest = divmod(processes, replicate * tensor)
    if rest or not shard:
        raise UserError(
            f"{processes} processes cannot be arranged as fsdp_replicate_size={replicate} x tensor parallel {tensor} x "
            f"FSDP shards: {processes} / ({replicate} x {tensor}) = {processes / (replicate * tensor):.2f}; "
            "change one of them, or nproc"
        )
    sharding = Sharding(
        replicate=replicate,
        shard=shard,
        tensor=tensor,
        block_name=config.model.block_name or config.model.block,
        compute_dtype=config.compute_dtype,
        reshard_after_forward=config.fsdp_reshard_after_forward,
        cpu_offload=config.fsdp_cpu_offload,
    )
    if not sharding.fsdp and (sharding.cpu_offload or not sharding.reshard_after_forward):
        raise UserError(
            f"fsdp_cpu_offload and fsdp_reshard_after_forward are FSDP's, and with tensor_parallel_size={tensor} of "
            f"{processes} processes nothing is left for it: leave them out, or lower tensor_parallel_size"
        )
    return sharding


def _absolute(data: PreferenceData | None) -> list[dict[str, Any]]:
    """Where the rows of `data` come from, whatever the current folder is."""
    sources: list[dict[str, Any]] = [dict(source) for source in data.sources] if data is not None else []
    return [s | {"path": str(Path(s["path"]).resolve())} if Path(s["path"]).exists() else s for s in sources]


def _shown(metrics: dict[str, float]) -> dict[str, str]:
    names = {"loss": "loss/train", "acc": "rewards_train/accuracies", "margin": "rewards_train/margins"}
    return {short: f"{metrics[name]:.3g}" for short, name in names.items() if name in metrics}
