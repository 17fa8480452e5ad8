"""The optimizer of a run, its learning-rate schedule, and one update: unscale, clip, step."""

import inspect
import math
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from dpo import parallel
from dpo.run.config import TrainingConfig
from dpo.stepping import InPieces
from dpo.utils import UserError

MOST_SKIPPED = 25  # updates in a row: from its start at 2^16 the loss scale is then far below 1


def parameter_groups(model: torch.nn.Module, config: TrainingConfig) -> list[dict[str, Any]]:
    """Return the trainable parameters for the optimizer; norms and biases apart if they must not decay."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if config.decay_norms_and_biases:
        return [{"params": group} for group in parallel.by_mesh(parameters)]
    matrices, vectors = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim <= 1]
    return [
        *({"params": group} for group in parallel.by_mesh(matrices)),
        *({"params": group, "weight_decay": 0.0} for group in parallel.by_mesh(vectors)),
    ]


def build_optimizer(model: torch.nn.Module, config: TrainingConfig) -> InPieces:
    """Return the optimizer that `optimizer` names, which steps in pieces. Raise UserError for arguments it refuses."""
    chosen = getattr(torch.optim, config.torch_optimizer)
    arguments = config.optimizer_arguments
    pieces = {
        "seed": None if config.round_to_nearest else config.seed,
        "eight_bits": config.optimizer != config.torch_optimizer,
        "elementwise": config.optimizer not in ("Adafactor", "Muon"),
    }
    if not pieces["elementwise"] and any(isinstance(p, DTensor) for p in model.parameters() if p.requires_grad):
        raise UserError(
            f"optimizer={config.optimizer} cannot train sharded weights (torch {torch.__version__} fails on them); "
            "choose another, such as AdamW8bit, or trainer=BasicTrainer"
        )
    in_pieces: Any = type(config.optimizer, (InPieces, chosen), pieces)
    on_cuda = all(p.device.type == "cuda" for p in model.parameters())
    if on_cuda and "fused" in inspect.signature(chosen).parameters and "foreach" not in arguments:
        arguments.setdefault("fused", True)
    try:
        return in_pieces(parameter_groups(model, config), **arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"optimizer={config.optimizer} refuses its arguments {arguments}: {error}") from error


def lr_factor(step: int, total: int, config: TrainingConfig) -> float:
    """Return the factor of the learning rate at optimizer step `step` (from 0) of `total`."""
    warmup = config.warmup(total)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = min((step - warmup) / max(total - warmup, 1), 1.0)
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[config.lr_schedule]
    return config.lr_min_ratio + (1 - config.lr_min_ratio) * shape


class Updater:
    """Updates a policy: the optimizer, loss scaling for float16, and counts of updates.

    `updates` counts the updates that were made, `skipped` those left out by on_nonfinite=skip.
    """

    def __init__(self, policy: PreTrainedModel, config: TrainingConfig, scale_loss: bool):
        self.config = config
        self.policy = policy
        self.optimizer = build_optimizer(policy, config)
        self.scaler = torch.amp.GradScaler(policy.device.type, enabled=scale_loss)
        self.updates = self.skipped = self.skipped_in_a_row = 0

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of `loss` to those of the update."""
        self.scaler.scale(loss).backward()

    def prepare(self, total: int) -> tuple[float, torch.Tensor]:
        """Set the learning rate of this update of `total`. Return it, and the gradients' L2 norm, a tensor."""
        lr = self.config.lr * lr_factor(self.updates, total, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        parallel.sum_gradients(self.policy)
        self.scaler.unscale_(self.optimizer)
        return lr, parallel.grad_norm(list(self.policy.parameters()))

    def clip(self, grad_norm: float) -> None:
        """Scale the gradients down to max_grad_norm if their norm is larger."""
        parallel.clip_gradients(list(self.policy.parameters()), self.config.max_grad_norm, grad_norm)

    def may_step(self, grad_norm: float) -> bool:
        """Return whether the gradient is finite, or overflowed under loss scaling, which then lowers its scale.

        Too many overflows in a row are a fault.
        """
        return math.isfinite(grad_norm) or (self.scaler.is_enabled() and self.skipped_in_a_row < MOST_SKIPPED)

    def step(self, grad_norm: float) -> None:
        """Change the weights."""
        self.optimizer.update = self.updates
        self.scaler.step(self.optimizer)
        self.scaler.update()
        finite = math.isfinite(grad_norm)
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        self.updates += finite

    def skip(self) -> None:
        """Leave this update out."""
        self.skipped += 1
        self.skipped_in_a_row += 1
        self.scaler.update()

    @property
    def must_stop(self) -> bool:
        """Whether an update that is not finite stops the run: by on_nonfinite, or after too many in a row."""
        return self.config.on_nonfinite == "stop" or self.skipped_in_a_row + 1 >= MOST_SKIPPED
