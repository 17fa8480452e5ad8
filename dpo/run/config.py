"""Configuration keys of training, and of a run's folder, checkpoints and resuming; explained in config/config.yaml."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from dpo.config import AboveZero, Component, Count, MayChange, NotNegative, Positive, Share
from dpo.data.config import DataConfig
from dpo.model.config import ParallelConfig

Tracker = Literal["wandb", "tensorboard", "trackio"]
LONGEST_WARMUP = 150  # updates: the original's warm-up


@dataclass(kw_only=True)
class WandbConfig(Component):
    """Weights & Biases."""

    enabled: bool
    entity: str | None
    project: str
    group: str | None


@dataclass(kw_only=True)
class TrainingConfig(Component):
    """The loop of trainers.py: batches, optimizer, schedule, evaluations."""

    seed: Annotated[int, Field(ge=0, lt=2**63)]
    batch_size: Positive
    gradient_accumulation_steps: Annotated[Positive, MayChange]
    n_epochs: Positive | None
    n_examples: Positive | None
    lr: NotNegative
    lr_schedule: Literal["constant", "linear", "cosine"]
    lr_min_ratio: Share
    warmup_steps: Count | None
    max_grad_norm: AboveZero
    on_nonfinite: Annotated[Literal["stop", "skip"], MayChange]
    optimizer: Literal[
        "ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "AdamW8bit", "Adamax", "Muon", "NAdam", "RAdam",
        "RMSprop", "Rprop", "SGD",
    ]  # fmt: skip
    optimizer_kwargs: dict[str, Any]
    round_to_nearest: bool
    weight_decay: NotNegative | None
    decay_norms_and_biases: bool
    eval_every: Annotated[Positive, MayChange]
    eval_batch_size: Annotated[Positive, MayChange]
    n_eval_examples: Annotated[Count, MayChange]
    do_first_eval: Annotated[bool, MayChange]
    do_final_eval: Annotated[bool, MayChange]
    sample_during_eval: Annotated[bool, MayChange]
    n_eval_model_samples: Annotated[Count, MayChange]
    n_eval_samples_per_prompt: Annotated[Positive, MayChange]
    kl_during_eval: Annotated[bool | None, MayChange]

    def warmup(self, updates: int) -> int:
        """Return the updates of warm-up of a run of `updates`."""
        return min(LONGEST_WARMUP, updates // 10) if self.warmup_steps is None else self.warmup_steps

    @property
    def torch_optimizer(self) -> str:
        """The class of torch.optim that computes the steps of `optimizer`."""
        return self.optimizer.removesuffix("8bit")

    @property
    def optimizer_arguments(self) -> dict[str, Any]:
        """The keyword arguments of the optimizer's class."""
        decay = {} if self.weight_decay is None else {"weight_decay": self.weight_decay}
        return {"lr": self.lr, **self.optimizer_kwargs, **decay}

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.n_epochs is None and self.n_examples is None:
            yield "n_epochs and n_examples are both null: the run would never end; set one of them"
        steps = self.gradient_accumulation_steps
        if self.batch_size % steps:
            division = f"{self.batch_size} / {steps} = {self.batch_size / steps:.2f}"
            yield f"batch_size={self.batch_size} is not divisible by gradient_accumulation_steps={steps}: {division}"
        if self.kl_during_eval and not (self.sample_during_eval and self.n_eval_model_samples and self.n_eval_examples):
            yield "kl_during_eval=true: it needs sample_during_eval=true, n_eval_model_samples and n_eval_examples"
        if self.optimizer == "AdamW8bit" and find_spec("bitsandbytes") is None:
            yield "optimizer=AdamW8bit needs the package: pip install bitsandbytes"

    def optimizer_problems(self) -> Iterator[str]:
        """Yield what the optimizer's class says of its arguments. Imports torch."""
        import torch

        try:
            getattr(torch.optim, self.torch_optimizer)(
                [torch.nn.Parameter(torch.zeros(1, 1))], **self.optimizer_arguments
            )
        except (TypeError, ValueError) as error:
            yield f"optimizer={self.optimizer} refuses its arguments {self.optimizer_arguments}: {error}"
        except RuntimeError:  # of a device
            return


@dataclass(kw_only=True)
class RunConfig(Component):
    """A run's folder: its name, what is written into it, and how it is resumed."""

    exp_name: Annotated[str, BeforeValidator(lambda name: str(name) if isinstance(name, bool) else name), MayChange]
    local_dirs: Annotated[list[str], MayChange]
    local_run_dir: Annotated[str, MayChange]
    debug: Annotated[bool, MayChange]
    plan: Annotated[bool, MayChange]
    wandb: Annotated[WandbConfig, MayChange]
    tensorboard: Annotated[bool, MayChange]
    tracker: Annotated[list[Tracker] | None, BeforeValidator(lambda v: [v] if isinstance(v, str) else v), MayChange]
    minimum_log_interval_secs: Annotated[NotNegative, MayChange]
    resume: Annotated[str | None, MayChange]
    resume_allow_changes: Annotated[bool, MayChange]
    save_every: Annotated[Positive | None, MayChange]
    keep_last_n: Annotated[Positive | None, MayChange]
    keep_optimizer_last_n: Annotated[Positive | None, MayChange]
    save_weights_only: Annotated[bool, MayChange]
    keep_best: Annotated[str | None, MayChange]
    async_save: Annotated[bool, MayChange]
    save_patience: Annotated[Count, MayChange]
    checkpoint_check: Annotated[Literal["fast", "full"], MayChange]
    max_runtime: Annotated[AboveZero | None, MayChange]
    warn_loss_spike: Annotated[Annotated[float, Field(gt=1, allow_inf_nan=True)] | None, MayChange]
    warn_chosen_drop: Annotated[AboveZero | None, MayChange]

    @property
    def trackers(self) -> list[str]:
        """Where metrics go besides the run's folder. With debug=true nothing leaves it."""
        switches = {"wandb": self.wandb.enabled, "tensorboard": self.tensorboard}
        chosen = [name for name, on in switches.items() if on] if self.tracker is None else self.tracker
        return [name for name in chosen if name == "tensorboard" or not self.debug]

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint that the run resumes from."""
        return Path(self.resume) if self.resume not in (None, "auto") else None

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if problem := name_problem(self.exp_name):
            yield problem
        if self.save_weights_only and self.keep_optimizer_last_n is not None:
            both = f"keep_optimizer_last_n={self.keep_optimizer_last_n} and save_weights_only=true"
            yield f"{both} exclude each other"
        if self.tracker is not None and self.tensorboard and "tensorboard" not in self.tracker:
            yield f"tensorboard=true, but tracker={self.tracker} leaves it out: set tracker alone"
        if self.tracker is not None and "wandb" in self.tracker and not self.wandb.enabled:
            yield f"wandb.enabled=false, but tracker={self.tracker}: set tracker alone"
        for name in self.trackers:
            if find_spec(name) is None:
                given = f"tracker={self.tracker}" if self.tracker is not None else f"{name}=true"
                yield f"{given} needs the package: pip install {name}"


@dataclass(kw_only=True)
class Config(TrainingConfig, DataConfig, ParallelConfig, RunConfig):
    """Every key of config/config.yaml. `loss` is the loss itself, made of the group config/loss."""

    loss: Any

    def to_dict(self) -> dict[str, Any]:
        """Return the keys as nested dictionaries, for files."""
        values = asdict(self)
        kind = {"kind": self.loss.kind} if self.loss.kind != self.loss.name else {}
        return values | {"loss": {"name": self.loss.name, **kind, **values["loss"]}}

    def problems(self) -> Iterator[str]:
        """Yield what keys contradict, and what this machine lacks, one message each. Imports torch."""
        yield from super().problems()
        if self.keep_best is not None and not self.n_eval_examples:
            yield f"keep_best={self.keep_best} needs evaluations: set n_eval_examples"
        if self.reference.archive and not self.loss.needs_reference:
            yield f"reference.archive={self.reference.archive}, but loss={self.loss.name} needs no reference"
        if self.optimizer == "AdamW8bit" and self.trainer == "TensorParallelTrainer":
            yield "optimizer=AdamW8bit needs whole rows of each matrix: set trainer=BasicTrainer or FSDPTrainer"
        if self.loss.needs_kl and self.reference.mode != "live":
            yield f"loss={self.loss.name} needs the reference's whole distribution: set reference.mode=live"
        if self.reference.mode == "live" and self.loss.needs_rejected and not self.loss.needs_reference:
            yield f"reference.mode=live, but loss={self.loss.name} needs no reference: leave reference.mode out"
        yield from self.device_problems()
        yield from self.optimizer_problems()


def name_problem(name: str) -> str | None:
    """Return what is wrong with an exp_name, or None. It is part of a path, and stays inside local_dirs."""
    if name.isprintable() and all(part not in ("", ".", "..") for part in name.split("/")):
        return None
    return f"exp_name={name!r} must be a name, or several with / between (team/run1), and no part may be . or .."
