"""When a run saves, and what a checkpoint says of its run."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpo import parallel
from dpo.run import checkpoint, health
from dpo.run.config import Config
from dpo.scoring import LOW_IS_BEST
from dpo.utils import UserError, log

SECONDS_BETWEEN_TRIES = 10


class Saver:
    """Writes a run's checkpoints, as the configuration asks. `state()` gives what trainer_state.json says."""

    def __init__(
        self,
        config: Config,
        writer: checkpoint.CheckpointWriter,
        tokenizer: PreTrainedTokenizerBase,
        state: Callable[[], dict[str, Any]],
    ):
        self.config, self.writer, self.tokenizer, self.state = config, writer, tokenizer, state
        self.saved = 0  # examples seen at the last checkpoint that was due; the caller sets it
        self.failed = False  # the last checkpoint was not written for want of space
        self.best: float | None = None

    def try_out(self, policy: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
        """Raise UserError if no checkpoint could be written, for any reason but a disk that is full now."""
        if self.config.debug:
            return
        if self.config.save_weights_only:
            log("save_weights_only=true: no checkpoint of this run can be resumed")
        try:
            self.writer.try_out(policy, self.tokenizer, self.state, self._optimizer(optimizer))
        except checkpoint.NoSpace as error:
            log(f"warning: {error}. Training continues; free space before the first checkpoint")

    def _optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer | None:
        return None if self.config.save_weights_only else optimizer

    def save(
        self,
        policy: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        examples: int,
        metrics: dict[str, float],
        last: bool = False,
    ) -> None:
        """Write a checkpoint after `examples` examples, whose evaluation gave `metrics`, unless debug=true.

        Raise UserError if it cannot be written. If the disk is full, the `last` checkpoint waits save_patience seconds
        for space; an earlier one is a warning, and the next is tried in its turn.
        """
        if self.config.debug:
            log("debug=true: no checkpoint is written")
            return
        if not parallel.all_finite(policy):
            raise UserError(f"the weights are not finite after {examples} examples: {health.DIVERGED}")
        best_before, is_best = self.best, self._is_best(metrics)
        tries = 1 + self.config.save_patience // SECONDS_BETWEEN_TRIES if last else 1
        for left in reversed(range(tries)):
            try:
                self.writer.save(policy, self.tokenizer, self.state, self._optimizer(optimizer), is_best=is_best)
                if last:
                    self.writer.wait()
                self.failed = False
                break
            except checkpoint.NoSpace as error:
                self.failed = True
                if not last:
                    self.best = best_before
                    log(f"warning: {error}. Training continues")
                elif left:
                    log(f"warning: {error}. Trying again; free space")
                    time.sleep(SECONDS_BETWEEN_TRIES)
                else:
                    raise

    def needs_last(self, examples: int) -> bool:
        """Wait for the pending write. Return whether the end of training still needs a checkpoint."""
        try:
            self.writer.wait()
        except checkpoint.NoSpace as error:
            log(f"warning: {error}")
            self.failed = True
        return self.saved != examples or self.failed

    def _is_best(self, metrics: dict[str, float]) -> bool:
        """Return whether `metrics` have the best keep_best so far, and remember it."""
        metric = self.config.keep_best
        if metric is None or not metrics:
            return False
        if metric not in metrics:
            log(f"warning: this evaluation has no {metric} (keep_best): its examples are all of the other kind")
            return False
        value = metrics[metric]
        falls = metric.startswith(LOW_IS_BEST)
        better = self.best is None or (value < self.best if falls else value > self.best)
        self.best = value if better else self.best
        return better

    def save_nonfinite(
        self, policy: PreTrainedModel, optimizer: torch.optim.Optimizer, examples: int, batch: str
    ) -> str:
        """Write the state before an update that is not finite, and its batch. Return a sentence for the message."""
        optimizer.zero_grad(set_to_none=True)
        folder = Path(self.writer.run_dir, f"nonfinite-{examples}")
        try:
            self.writer.save(policy, self.tokenizer, self.state, optimizer, name=folder.name, batch=batch)
            self.writer.wait()
        except UserError as error:
            return f"The state that shows it was not written ({error}). "
        return (
            "Examples computed together may infect each other; to see it again, one by one: "
            f"python scripts/replay.py {folder}. "
        )
