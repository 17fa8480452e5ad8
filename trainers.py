"""The training loop: `fit`, `train_step`, `evaluate`. `train` builds what they need from a configuration.

BasicTrainer, FSDPTrainer and TensorParallelTrainer are one loop: they differ in the `Sharding` of the model.
"""

import contextlib
import dataclasses
import functools
import gc
import hashlib
import math
import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from omegaconf import OmegaConf
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpo import parallel
from dpo.agreement import check_training_data, evaluation_part, parts_to_check, verdict_on
from dpo.data.batching import Cut, Example, Mismatched, Plan
from dpo.data.checks import check_format, check_overlap, trained_on
from dpo.data.diagnostics import describe, diagnose
from dpo.data.records import PreferenceData, format_funnel
from dpo.data.sources import HUB_ID, find_source
from dpo.evaluation import Evaluator
from dpo.hardware import DEVICES, Device, free_memory
from dpo.model import adapters
from dpo.model.checks import check_fits, checked_computation
from dpo.model.loading import load_policy, load_tokenizer, local_folder, merged_folder, pick_device
from dpo.model.logps import casting_once
from dpo.model.patches import quiet_transformers
from dpo.model.verdicts import Verdict
from dpo.optimizer import Updater
from dpo.parallel.arrange import sharding_of
from dpo.reference import LiveReference, Reference, Wanted, build_reference, wanted_by
from dpo.run import checkpoint, health, resume, stopping, tensors, weights
from dpo.run.config import Config
from dpo.run.folder import begin, leave, locked, open_run
from dpo.run.metrics import RunLogger
from dpo.run.provenance import Provenance
from dpo.run.saved import formats_of, load_reference
from dpo.run.saving import Saver
from dpo.run.terminal import closing_block
from dpo.run.throughput import Cost, cost_of, throughput
from dpo.run.trackers import open_logger
from dpo.scoring import Scorer, Share, Tally, mean_metrics
from dpo.stored import StoredReference
from dpo.utils import TakenOver, UserError, be_quiet, log, open_log, progress
from preference_datasets import REGISTRY, load_data
from settings import data_settings, literal
from utils import run_main

if TYPE_CHECKING:
    from dpo.plan.planning import Planner

SHOWN = {"loss": "loss/train", "acc": "rewards_train/accuracies", "margin": "rewards_train/margins"}


def plan_of(config: Config) -> Plan:
    """Return which examples the configuration trains on."""
    return Plan(config.seed, config.batch_size, config.n_epochs, config.n_examples, config.dataset_weights)


class Updates:
    """Makes updates of `policy` by `scorer`, which are set later, on the batches that the configuration asks for."""

    def __init__(self, config: Config, train_data: PreferenceData):
        self.config, self.train_data = config, train_data
        self.plan = plan_of(config)
        self.total_examples, self.total_steps = self.plan.size(train_data)
        self.examples = 0  # seen by training
        self.reference_seconds = 0.0
        self.eval_metrics: dict[str, float] = {}
        self.other: weights.Start | None = None  # of a reference that training does not start from
        self.scorer: Scorer

    def use(self, policy: PreTrainedModel) -> None:
        """Train `policy` from here on, with a fresh optimizer."""
        self.policy = policy
        scaled = self.config.compute_dtype == torch.float16 and policy.dtype == torch.float32
        self.updater = Updater(policy, self.config, scaled)

    def cut(self, n: int, pass_size: int | None = None) -> Cut:
        """Return how `n` examples are cut into passes, of about `pass_size` examples or as in training."""
        config, ranks = self.config, parallel.data_ranks(self.policy)
        size = max(pass_size or config.batch_size // config.gradient_accumulation_steps, ranks)
        rank = parallel.data_rank(self.policy)
        return Cut(self.scorer.how.layout, ranks, -(-n // size), config.token_limit, rank)

    @property
    def untrained(self) -> bool:
        """Whether the policy still equals the reference."""
        return not self.updater.updates and self.other is None

    def train_step(self, examples: list[Example]) -> dict[str, float]:
        """Make one update on a global batch. Return the batch's mean metrics.

        The gradient is that of the mean loss over `examples`, however they are cut into micro-batches. Raise UserError
        if loss or gradient is not finite.
        """
        start = time.perf_counter()
        self.policy.train()
        scorer = dataclasses.replace(self.scorer, untrained=self.untrained)
        scorer, parts = scorer.prepare(self.policy, self.train_data, examples, self.cut(len(examples)))
        scorer = dataclasses.replace(scorer, state=scorer.loss.next_state(scorer.state, scorer.statistics))
        statistics_seconds = time.perf_counter() - start
        tally = self.accumulate(scorer, parts, len(examples))
        lr, norm = self.updater.prepare(self.total_steps)
        total, [grad_norm] = tally.read(norm)  # the host waits for the device here, once an update
        self.updater.clip(grad_norm)
        means = mean_metrics(total)
        if math.isfinite(means["loss/train"]) and self.updater.may_step(grad_norm):
            self.updater.step(grad_norm)
            self.scorer = dataclasses.replace(self.scorer, state=scorer.state)
        else:
            mine = [example for share in parts for example in share.examples]
            self.on_nonfinite(examples, health.broken_examples(self.train_data, mine, total["loss/train"]), grad_norm)
            means = {name: value for name, value in means.items() if math.isfinite(value)}
        self.updater.optimizer.zero_grad(set_to_none=True)
        self.examples += len(examples)
        self.eval_metrics = {}  # they were of other weights
        seconds = time.perf_counter() - start
        spent = {"examples_per_second": len(examples) / seconds, "reference_seconds": self.reference_seconds}
        spent |= {"statistics_seconds": statistics_seconds} if scorer.loss.needs_statistics else {}
        costs = [cost_of(share.batch, scorer.how.layout) for share in parts if share.counts]
        spent |= throughput(self.policy, sum(costs, Cost()), seconds)
        counters = {"counters/examples": self.examples, "counters/updates": self.updater.updates}
        counters |= {"counters/skipped": self.updater.skipped} if self.updater.skipped else {}
        return means | {"grad_norm": grad_norm, "lr": lr} | spent | counters

    def accumulate(self, scorer: Scorer, parts: list[Share], n: int) -> Tally:
        """Add the gradients of this process's micro-batches of a global batch of `n` examples. Return their metrics."""
        tally, laid = scorer.tally(), scorer.laid(self.policy, parts)
        with casting_once(self.policy):
            for i, (share, placed) in enumerate(laid, start=1):
                if self.config.fsdp_reduce_once:
                    parallel.reduce_gradients(self.policy, i == len(parts))
                losses, values = scorer.score(self.policy, placed, "train")
                self.updater.backward(losses.sum() * share.counts / n)
                tally.add(values, share.batch, share.counts)
        return tally

    def on_nonfinite(self, examples: list[Example], culprits: str, grad_norm: float) -> None:
        """Raise UserError for an update that is not finite."""
        raise UserError(f"the update of examples {examples} is not finite: {culprits}; gradient norm {grad_norm}")


class Trainer(Updates):
    """Trains a policy. `load(archive)` gives a new model with the weights of `archive`, or with the base model's if it
    is None, and `load_reference(compiled)` a new reference; they decide how models lie on devices and processes."""

    def __init__(
        self,
        config: Config,
        load: Callable[[str | None], PreTrainedModel],
        load_reference: Callable[[bool], PreTrainedModel],
        tokenizer: PreTrainedTokenizerBase,
        train_data: PreferenceData,
        eval_data: PreferenceData | None,
        logger: RunLogger,
        command: str = "",
        stop: stopping.StopRequest | None = None,
    ):
        super().__init__(config, train_data)
        self.load, self.logger, self.command = load, logger, command
        self.read_reference = load_reference
        self.stop = stop or stopping.StopRequest()
        self.evaluated = 0  # examples at the last evaluation that was due
        self.watch = health.Watch(config.warn_loss_spike, config.warn_chosen_drop)
        self.deadline = stopping.Deadline(config.max_runtime)
        self.start = weights.Start(config.model.start)
        self.other = weights.Start(config.reference.archive) if config.reference.archive else None
        self.use(self.start.read(lambda: load(config.model.archive)))
        self.starting = adapters.Starting(self.policy) if config.adapter.peft_type else None
        check_fits(self.policy, tokenizer, config)
        if not parallel.all_finite(self.policy):
            raise UserError(f"{config.model.start}: {health.broken_parameters(self.policy)}; it cannot be trained")
        health.warn_of_lost_steps(self.policy, config)
        how = checked_computation(self.policy, config, trains=True)
        self.scorer = Scorer(config.loss, how, None, state=config.loss.initial_state())
        self.evaluator = Evaluator(config, eval_data, tokenizer, logger, self.live_reference)
        archive = Path(config.model.archive) if config.model.archive else None
        kept = (config.keep_last_n, config.keep_optimizer_last_n)
        files = trained_on(train_data, archive)
        checks = (logger.check, self.stop.at_once)
        writer = checkpoint.CheckpointWriter(logger.run_dir, config.async_save, *kept, files, *checks)
        self.saver = Saver(config, writer, tokenizer, self.state)
        if config.loss.needs_reference:
            self.prepare_reference()
        parallel.reshard(self.policy)

    def live_reference(self, compiled: bool = False) -> LiveReference:
        """Return the reference in memory: the policy with its adapter as it was in the beginning, or a second model.
        That is read now: reference.archive, or the weights that training started from."""
        if self.starting is not None and self.other is None:
            return LiveReference(self.policy, self.scorer.how, self.starting)
        model = (self.other or self.start).read(lambda: self.read_reference(compiled))
        return LiveReference(model, self.scorer.how)

    def prepare_reference(self) -> None:
        """Compute reference log-probabilities and samples while the policy is still untrained, and check them."""
        config, start = self.config, time.perf_counter()
        batches = list(self.plan.arrays(self.train_data))
        reference: Reference
        live = self.live_reference(compiled=True) if self.other or config.reference.mode == "live" else None
        other = live.model if live is not None else self.policy
        sizes = [model.config.get_text_config().vocab_size for model in (self.policy, other)]
        if len(set(sizes)) > 1:
            raise UserError(f"reference.archive has a vocabulary of {sizes[1]} tokens, and the policy of {sizes[0]}")
        how = checked_computation(other, config, trains=False) if self.other else self.scorer.how
        if how.layout != self.scorer.how.layout:  # both compute one batch for the KL
            how = dataclasses.replace(how, layout="padded")
            self.scorer = dataclasses.replace(self.scorer, how=how)
        if live is not None and config.reference.mode == "live":
            live.how, reference = how, live
        else:
            wanted = self.wanted_of_reference(batches)
            n_responses = len(wanted.responses)
            cut = self.cut(n_responses, n_responses if config.token_limit else 2 * config.eval_batch_size)
            folder = config.cache / "reference"
            reference = build_reference(other, how, cut, folder, wanted, functools.partial(self.agreed, batches))
        self.scorer = dataclasses.replace(self.scorer, reference=reference)
        if self.other is None:
            self.check_agreement(batches)
        else:
            log(
                f"reference.archive={self.other.name} is not where training starts: rewards do not start at 0, and "
                "whether policy and reference agree is not checked"
            )
        evaluates_first = config.do_first_eval and config.checkpoint is None
        if self.evaluator.sampler is not None and (self.other or not evaluates_first):
            self.evaluator.sampler.remember(other)  # else the first evaluation does, of the policy, which equals it
        del other
        if live is not None:
            del live  # a second model, unless it is a live reference
            gc.collect()  # a model refers to itself
        self.reference_seconds = time.perf_counter() - start

    def check_agreement(self, batches: list[np.ndarray]) -> None:
        """Raise UserError unless rewards are 0 on the examples of the global `batches`."""
        evaluation = evaluation_part(self.unseen, self.evaluator.examples, self.eval_cut)
        resumed = self.config.checkpoint is not None
        parts = parts_to_check(self.train_data, batches, self.scorer, self.cut, evaluation, resumed)
        verdict = self.verdict(batches, self.scorer)
        check_training_data(self.policy, self.scorer, parts, self.total_examples, verdict)

    @property
    def unseen(self) -> PreferenceData | None:
        """The evaluation data that is checked before training: the first evaluation checks its examples itself."""
        return self.evaluator.data if not self.config.do_first_eval else None

    def verdict(self, batches: list[np.ndarray], scorer: Scorer) -> Verdict:
        """Return what `check_agreement` found on the global `batches`, or where to keep it. A collective."""
        order, unseen = hashlib.sha256(np.concatenate(batches).tobytes()).hexdigest(), self.unseen
        evaluation = [unseen.identity, self.evaluator.examples] if unseen else None
        checked = [self.train_data.identity, order, evaluation, self.config.checkpoint is not None]
        parallel.reshard(self.policy)  # weights that a pass has gathered may be of another type
        return verdict_on(self.policy, self.config, scorer, *checked)

    def agreed(self, batches: list[np.ndarray], reference: StoredReference) -> bool:
        """Return whether an earlier start found that policy and `reference` agree on the global `batches`."""
        scorer = dataclasses.replace(self.scorer, reference=reference)
        return self.other is None and self.verdict(batches, scorer).read() is not None

    def wanted_of_reference(self, batches: list[np.ndarray]) -> Wanted:
        """Return all responses whose reference log-probabilities a run of these global batches needs."""
        data, eval_data, eval_examples = self.train_data, self.evaluator.data, self.evaluator.examples
        wanted = wanted_by(data, np.concatenate(batches))
        views = [Mismatched(data, *batches)] if self.config.loss.observes_mismatched else []
        if eval_data is not None:
            wanted += wanted_by(eval_data, eval_examples)
            views += [Mismatched(eval_data, eval_examples)] if views else []
        for view in views:
            wanted += wanted_by(view, view.order)
        return wanted

    @property
    def eval_cut(self) -> Cut:
        """How the evaluation examples are cut into passes."""
        return self.cut(len(self.evaluator.examples), self.config.eval_batch_size)

    # The loop ----------------------------------------------------------------------------------------------------

    def fit(self) -> None:
        """Train to the end of the plan, evaluating and saving on the way. Raise Stopped if asked to end early."""
        self.saver.try_out(self.policy, self.updater.optimizer)
        if not self.examples and self.config.do_first_eval:
            with self.stop.gracefully():
                self.evaluate()
        bar = progress(total=self.total_examples, initial=self.examples, unit="ex", desc=self.config.exp_name)
        with self.stop.gracefully(), bar:
            self.deadline.start()
            self.evaluate_and_save()
            for examples in self.plan.batches_after(self.train_data, self.examples):
                metrics = self.train_step(examples)
                self.logger.log(metrics, self.examples)
                self.watch.update(metrics, self.examples)
                bar.set_postfix(
                    {k: f"{metrics[name]:.3g}" for k, name in SHOWN.items() if name in metrics}, refresh=False
                )
                bar.update(len(examples))
                self.stop_if_asked()
                self.evaluate_and_save()
            if self.evaluated != self.examples and self.config.do_final_eval and self.evaluator.data is not None:
                self.evaluated, self.saver.saved = self.examples, 0  # force a checkpoint that includes this evaluation
                self.evaluate()
            if self.saver.needs_last(self.examples):
                self.saver.saved = self.examples
                self.save(last=True)

    def on_nonfinite(self, examples: list[Example], culprits: str, grad_norm: float) -> None:
        """Write the state before an update that is not finite. Raise UserError, or skip the update (on_nonfinite)."""
        updater, stop = self.updater, self.updater.must_stop
        message = (
            f"update {updater.updates + 1} (examples {self.examples + 1} to {self.examples + len(examples)}) is not "
            f"finite: {culprits}; gradient norm {grad_norm}; {health.broken_parameters(self.policy)}. "
        )
        first = stop or not updater.skipped  # one written state is enough
        if parallel.all_finite(self.policy) and not self.config.debug and first:
            loss = self.config.to_dict()["loss"]
            batch = health.batch_text(self.train_data, examples, self.scorer.reference, loss)
            message += self.saver.save_nonfinite(self.policy, updater.optimizer, self.examples, batch)
        if stop:
            raise UserError(f"{message}Training stopped. {health.ADVICE}")
        updater.skip()
        log(f"warning: {message}on_nonfinite=skip: the update is left out")

    def evaluate(self) -> None:
        """Measure the policy on the evaluation examples, and log it."""
        scorer = dataclasses.replace(self.scorer, untrained=self.untrained)
        self.eval_metrics = self.evaluator(self.policy, scorer, self.eval_cut, self.examples)
        self.watch.evaluation(self.eval_metrics, self.examples)

    def save(self, last: bool = False) -> None:
        """Write a checkpoint of this moment."""
        self.saver.save(self.policy, self.updater.optimizer, self.examples, self.eval_metrics, last)

    def evaluate_and_save(self) -> None:
        """Do what is due after this many examples and has not been done."""
        every, save_every = self.config.eval_every, self.config.save_every
        evaluation = self.examples // every > self.evaluated // every
        save = self.examples // save_every > self.saver.saved // save_every if save_every else evaluation
        if evaluation:
            self.evaluated = self.examples
            self.evaluate()
            self.stop_if_asked()
        if save:
            self.saver.saved = self.examples
            self.save()

    def stop_if_asked(self) -> None:
        """Save and raise Stopped if a signal or the deadline asks for it. The resumed run does what is due then."""
        passed = self.deadline.passed(self.saver.writer.seconds(self.policy, self.updater.optimizer))
        reason = self.stop.name or ("max_runtime" if passed else None)
        if not parallel.any_process(reason is not None):
            return
        reason = next(given for given in parallel.gather(reason) if given)
        self.save(last=True)
        go_on = "; to go on: the same command, with resume=auto unless it is a sweep"
        if self.config.debug or self.config.save_weights_only:
            go_on = "; it cannot be resumed: there are no checkpoints, or only weights"
        log(f"stopped by {reason} after {self.examples} of {self.total_examples} examples{go_on}")
        raise stopping.Stopped

    # Resuming ----------------------------------------------------------------------------------------------------

    def resume(self, folder: Path) -> None:
        """Continue from a checkpoint. Raise UserError if it is of other data or another reference."""
        resume.must_have_states(folder)
        state = checkpoint.read_state(folder)
        resume.check_identity(self.config, state, self.identity())
        if self.starting is not None:
            adapters.load(self.policy, adapters.read(folder)[1], folder)
            self.use(self.policy)
        else:
            del self.policy, self.updater  # before there are others
            gc.collect()  # a model refers to itself
            self.use(self.load(str(folder)))
        self.examples, self.evaluated, self.saver.saved = state["examples"], state["evaluated"], state["saved"]
        for name in ("updates", "skipped", "skipped_in_a_row"):
            setattr(self.updater, name, state[name])
        metric, best = state["best"]
        self.saver.best = best if metric == self.config.keep_best else None
        self.eval_metrics = self.evaluator.last = state["metrics"]
        self.evaluator.sizes = state.get("metric_sizes") or {}
        carried = state.get("loss_state") or {}
        if carried.keys() == self.scorer.state.keys():  # else it is of another loss
            self.scorer = dataclasses.replace(self.scorer, state=carried)
        tensors.load_optimizer(folder, self.policy, self.updater.optimizer)
        tensors.load_random_state(folder)
        if state["scaler"] and self.updater.scaler.is_enabled():
            self.updater.scaler.load_state_dict(state["scaler"])
        log(f"resuming {folder} after {self.examples} examples and {self.updater.updates} updates")
        if self.examples >= self.total_examples:
            log(f"nothing is left to train: this run has {self.total_examples} examples; raise n_epochs to go on")

    def state(self) -> dict[str, Any]:
        """Return what trainer_state.json says of this moment."""
        updater = self.updater
        return {
            "examples": self.examples,
            **{name: getattr(updater, name) for name in ("updates", "skipped", "skipped_in_a_row")},
            "evaluated": self.evaluated,
            "saved": self.saver.saved,
            "total_examples": self.total_examples,
            "best": [self.config.keep_best, self.saver.best],
            "metrics": self.eval_metrics,
            "metric_sizes": self.evaluator.sizes,
            "command": self.command,
            "loss": str(self.config.loss),
            "adapter": adapters.described(self.policy) if self.starting is not None else None,
            "scaler": updater.scaler.state_dict(),
            "loss_state": dict(self.scorer.state),
            "config": self.config.to_dict(),
            "history": self.logger.history(),
            "wandb_id": self.logger.wandb_id,
            "formats": self.train_data.formats,
            "sources": {"train": _sources(self.train_data), "test": _sources(self.evaluator.data)},
            **self.identity(),
        }

    def identity(self) -> dict[str, Any]:
        """Return what a resumed run must share with its checkpoint besides settings: data, and the reference."""
        reference = self.scorer.reference
        name = reference.folder.name if isinstance(reference, StoredReference) else None
        starts = {checkpoint.START: self.start.identity, checkpoint.REFERENCE: self.other and self.other.identity}
        return {"training data": self.train_data.identity, "stored reference": name, **starts}


def _sources(data: PreferenceData | None) -> list[dict[str, Any]]:
    """Return where the rows of `data` come from; paths are absolute."""
    sources: list[dict[str, Any]] = [dict(source) for source in data.sources] if data is not None else []
    return [s | {"path": str(Path(s["path"]).resolve())} if Path(s["path"]).exists() else s for s in sources]


# From a configuration ---------------------------------------------------------------------------------------------


@stopping.final()
def train(config: Config, overrides: list[str] | None = None, stop: stopping.StopRequest | None = None) -> None:
    """Train from a configuration, in this process, or in new ones if the trainer works in a group of them.

    `overrides` are those of the command line, if it came from there, for the run's folder. `stop` shows the caller
    whether a signal asked to stop. Raise UserError for what a user can put right, and Stopped (a SystemExit) if the
    run was asked to end early.
    """
    find_archives(config)  # a wrong path should not wait for the data
    if parallel.is_main():
        check_sources(config)
        found, run_dir = resume.find_resume(config)
        config = with_limits(dataclasses.replace(config, resume=found, local_run_dir=run_dir))
    arguments = (config, overrides)
    if not config.needs_group:
        if parallel.world_size() > 1:
            raise UserError(f"trainer={config.trainer} is one process; inside torchrun or srun set trainer=FSDPTrainer")
        train_in_process(*arguments, stop)
    elif parallel.joined():
        with parallel.group(pick_device(config)):
            train_in_process(*parallel.from_main(arguments), stop)
    else:
        train_in_new_processes(config, arguments)


def train_in_new_processes(config: Config, arguments: tuple[Any, ...]) -> None:
    """Start a group of processes that train. This one waits, and clears up if they fail."""
    pick_device(config)
    try:
        parallel.launch(work, arguments, processes_of(config), config.fsdp_port)
    except BaseException:  # Ctrl-C among them
        run_dir = Path(config.local_run_dir)
        if run_dir.exists():
            with contextlib.suppress(UserError), locked(run_dir):
                leave(run_dir)
                open_log(run_dir)  # for the reason, if no process could give one
        raise


def processes_of(config: Config) -> int:
    """Return how many processes `train` starts, if it has to start them."""
    return config.nproc or (torch.cuda.device_count() if torch.cuda.is_available() and config.device != "cpu" else 2)


def with_limits(config: Config) -> Config:
    """Return the configuration with a number for microbatch_tokens=auto: that of the checkpoint which is resumed, or
    the largest for which `limits_on_gpu` finds room. Raise UserError if there is none."""
    if config.microbatch_tokens != "auto":
        return config
    if config.checkpoint is not None:
        known = checkpoint.read_state(config.checkpoint)["config"]
        once = known.get("fsdp_reduce_once") if config.may_reduce_once else None
        found = {"microbatch_tokens": known["microbatch_tokens"], "fsdp_reduce_once": once}
    elif parallel.joined():
        raise UserError("microbatch_tokens=auto plans before the processes join: set a number inside torchrun or srun")
    elif pick_device(config).type != "cuda":
        raise UserError("microbatch_tokens=auto plans the memory of a GPU, and there is none: set a number")
    else:
        log("microbatch_tokens=auto: planning the memory of an update ...")
        n = processes_of(config) if config.needs_group else 1
        memory = parallel.apart(free_memory, config.device, n)
        found = parallel.apart(limits_on_gpu, config, memory, n)
    if config.fsdp_reduce_once is not None:
        found["fsdp_reduce_once"] = config.fsdp_reduce_once
    log(f"microbatch_tokens=auto is {found['microbatch_tokens']}; fsdp_reduce_once={found['fsdp_reduce_once']}")
    return dataclasses.replace(config, **found)


def limits_on_gpu(config: Config, memory: float, processes: int) -> dict[str, Any]:
    """Return the keys that microbatch_tokens=auto stands for, with `memory` bytes free on each GPU. Patches torch for
    good and hides the GPUs, so it is to run in a process of its own."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    return planner(config, dataclasses.replace(DEVICES["H100"], memory=memory), processes).limits(config)


def planner(config: Config, hardware: Device, processes: int) -> "Planner":
    """Return what plans runs on the configuration's data and a group of `processes`. Patches torch for good."""
    from dpo.plan import gpu
    from dpo.plan.planning import Planner, check_planned

    check_planned(config)
    quiet_transformers()
    data = load_data(data_settings(config), load_tokenizer(config), "train")
    device = torch.device("cpu") if config.device == "cpu" else gpu.register()
    if config.needs_group:
        gpu.join_fake_group(processes)
    return Planner(data, device, hardware, Updates)


def work(config: Config, overrides: list[str] | None) -> None:
    """Run as a process that `train` started."""
    run_main(lambda: train(config, overrides), parallel.fails_first)


def train_in_process(config: Config, overrides: list[str] | None, stop: stopping.StopRequest | None = None) -> None:
    """Train from a configuration that is the same in every process of the group."""
    stop = stop or stopping.StopRequest()
    stop.listen()
    quiet_transformers()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.allow_tf32
    torch.manual_seed(config.seed)
    if not parallel.is_main():
        be_quiet()
    sharding = sharding_of(config)
    config = with_archives(config, overrides or [])
    resume.check_settings(config)
    run_dir = Path(config.local_run_dir)
    command = shlex.join(["python", "train.py", *overrides]) if overrides is not None else "trainers.train(config)"
    fit = functools.partial(build_and_fit, config, sharding, command, stop)
    if not parallel.is_main():
        fit(RunLogger(run_dir), lambda funnel, identity: None)
        return
    fresh, accepted = not run_dir.exists(), False
    composed = OmegaConf.create(literal(config.to_dict()))
    record = Provenance(run_dir, pick_device(config), config.model.device_map, command)

    def accept(funnel: dict[str, Any], identity: dict[str, Any]) -> None:
        nonlocal accepted
        begin(config, composed, overrides or [], funnel)
        record.begin(funnel["sources"], identity, config.checkpoint, resume.resumes_in_place(config))
        accepted = True

    with locked(run_dir) as check:
        try:
            open_run(config, composed, overrides or [])
            fit(RunLogger(run_dir, check, config.minimum_log_interval_secs, record), accept)
        except TakenOver:
            raise
        except BaseException as error:
            check()
            leave(run_dir, fresh and not accepted and isinstance(error, UserError))
            raise


def find_archives(config: Config, check: str = "fast") -> dict[str, str]:
    """Return where model.archive and reference.archive lie, under "model" and "reference". Raise UserError if one is no
    checkpoint. The reference may also be a hub id or a GGUF file: these are left out."""
    found = {}
    for part, archive in (("model", config.model.archive), ("reference", config.reference.archive)):
        local = archive and (archive.startswith(("/", ".", "~")) or Path(archive).exists())
        if archive and (part == "model" or (local and not archive.endswith(".gguf"))):
            found[part] = str(weights.find_archive(archive, check, f"{part}.archive"))
    return found


def with_archives(config: Config, overrides: list[str]) -> Config:
    """Return the configuration with the checkpoints that LATEST names now, in all processes. An adapter that is trained
    further brings its own settings; raise UserError if one of the `overrides` contradicts them."""
    found = find_archives(config, config.checkpoint_check) if parallel.is_main() else {}
    found = parallel.from_main(found)
    if config.adapter.stack:
        if not weights.base_of(found.get("model", "")):
            raise UserError(f"adapter.stack=true merges an adapter, and model.archive={config.model.archive} is none")
        with parallel.one_per_machine_first():
            found["model"] = str(merged_folder(config, Path(found["model"])))
    for part, archive in found.items():
        config = dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), archive=archive)})
    if config.adapter.peft_type and not config.adapter.stack and weights.base_of(found.get("model", "")):
        own = adapters.own_keys(adapters.read_config(Path(found["model"])))
        given = {override.partition("=")[0].lstrip("+").removeprefix("adapter.") for override in overrides}
        for key in own.keys() & given:
            if getattr(config.adapter, key) != own[key]:
                raise UserError(
                    f"adapter.{key}={getattr(config.adapter, key)}, but the adapter {found['model']}, which is trained "
                    f"further, has {own[key]}: leave adapter.{key} out, or adapter.stack=true for a fresh one on top"
                )
        config = dataclasses.replace(config, adapter=dataclasses.replace(config.adapter, **own))
    return config


def build_and_fit(
    config: Config,
    sharding: parallel.Sharding | None,
    command: str,
    stop: stopping.StopRequest,
    logger: RunLogger,
    accept: Callable[[dict[str, Any], dict[str, Any]], None],
) -> None:
    """Load tokenizer, data and model, and train. Call `accept` after all validation, with the data's funnel and what
    identifies data and starting weights."""
    device, run_dir = pick_device(config), Path(config.local_run_dir)
    with parallel.one_per_machine_first():
        tokenizer = load_tokenizer(config)
        train_data, eval_data, funnel = load_splits(config, tokenizer)
        if resume.is_finished(config, train_data):
            log(f"{run_dir} is finished, with these settings and data: nothing to do")
            return
        local_folder(config.model.name_or_path, config.cache)  # converts a .gguf file
    sharding = sharding and sharding.on_mesh(device)
    if not parallel.is_main() and run_dir.exists():
        open_log(run_dir)  # for an error of this process
    trainer = None
    try:
        load = functools.partial(load_policy, config, device, sharding)
        read = functools.partial(load_reference, config, device, sharding)
        trainer = Trainer(config, load, read, tokenizer, train_data, eval_data, logger, command, stop)
        if config.checkpoint:
            trainer.resume(config.checkpoint)
        n_parameters = trainer.policy.num_parameters()
        n_trained = trainer.policy.num_parameters(only_trainable=True)
        log(
            f"policy: {n_parameters / 1e6:.1f}M parameters"
            + (f" ({n_trained / 1e6:.2f}M of them trained, {config.adapter.peft_type})" if trainer.starting else "")
            + f" on {device} ({sharding or 'one process'}), "
            f"a {config.model.name_or_path}, layout {trainer.scorer.how.layout}"
        )
        open_logger(logger, config, lambda: accept(funnel, trainer.identity()))
        trainer.fit()
    finally:
        if trainer is not None:
            trainer.saver.writer.close()
        logger.close(exit_code=int(not isinstance(sys.exception(), stopping.Stopped | None)))
    if parallel.is_main():
        log(closing_block(config))


def check_sources(config: Config) -> None:
    """Raise UserError for an unknown data set or path. Hub ids are checked when they are loaded."""
    settings = data_settings(config)
    for name in config.datasets:
        on_hub = name in REGISTRY or HUB_ID.fullmatch(name)
        if settings.sources.get(name) or not on_hub:
            find_source(name, settings, "train", REGISTRY)


def note_split_prompts(data: PreferenceData, config: Config) -> None:
    """Log how many prompts have pairs that do not all fit into a micro-batch."""
    limit, padded = config.token_limit or math.inf, config.layout == "padded"
    tokens = data.row_tokens(padded)[data.n_examples > 1]
    if n := int((tokens > limit).sum()):
        log(
            f"note: microbatch_tokens={limit}: the responses of {n} of {len(data)} prompts together take more, up to "
            f"{tokens.max()} tokens: their pairs go into several micro-batches, and each computes the prompt again"
        )


def load_splits(
    config: Config, tokenizer: PreTrainedTokenizerBase
) -> tuple[PreferenceData, PreferenceData | None, dict[str, Any]]:
    """Return training and evaluation data, and the content of data_funnel.json. Print what became of every row."""
    settings = data_settings(config)
    train_data = load_data(settings, tokenizer, "train")
    test = load_data(settings, tokenizer, "test") if config.n_eval_examples else None
    examples, steps = plan_of(config).size(train_data)
    log(f"training data\n{format_funnel(train_data)}")
    if test is not None:
        log(f"evaluation data\n{format_funnel(test)}")
        available = int(test.n_examples.sum())
        if available < config.n_eval_examples:
            log(f"n_eval_examples={config.n_eval_examples}, but the test split has {available}: evaluating on those")
    if not examples:
        raise UserError(f"dataset_weights={config.dataset_weights} of these data sets leave no example; raise them")
    log(f"this run: {examples} examples in {steps} updates of up to {config.batch_size}")
    note_split_prompts(train_data, config)
    if steps <= (warmup := config.warmup(steps)):
        reached = config.lr * steps / (warmup + 1)
        log(f"note: warmup_steps={warmup} outlasts the run: lr reaches {reached:.2g} of {config.lr:.2g}")
    archive = Path(config.model.archive) if config.model.archive else None
    check_format(train_data, formats_of(archive), tokenizer)
    splits = {"train": train_data, **({"test": test} if test is not None else {})}
    funnel: dict[str, Any] = {name: split.funnel for name, split in splits.items()} | {"examples": examples}
    funnel |= {"updates": steps, "overlap": check_overlap(train_data, test, archive)}
    funnel |= {"notes": {name: split.notes for name, split in splits.items()}}
    funnel |= {"sources": {name: split.sources for name, split in splits.items()}}
    funnel["facts"] = diagnose(train_data, test, config.cache)
    log(describe(funnel["facts"]))
    return train_data, test, funnel
