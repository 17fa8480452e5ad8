"""Weights & Biases and TensorBoard: opened once the run may write."""

import functools
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dpo import parallel
from dpo.run.checkpoint import read_state
from dpo.run.config import Config
from dpo.run.metrics import RunLogger
from dpo.run.resume import resumes_in_place
from dpo.utils import UserError, log, redact


def open_logger(logger: RunLogger, config: Config, begin: Callable[[], None]) -> None:
    """Open W&B and TensorBoard, if they are on, and the metric files, in the main process.

    Call `begin` after all validation, before anything is written to the folder of a resumed run.
    """
    if not parallel.is_main():
        return
    if config.wandb.enabled and not config.debug:
        logger.wandb_run = open_wandb(config, logger.run_dir)
    examples = read_state(config.checkpoint)["examples"] if config.checkpoint else None
    begin()
    if config.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        logger.tensorboard = SummaryWriter(str(logger.run_dir), purge_step=examples and examples + 1)
    logger.open()


def open_wandb(config: Config, run_dir: Path, shown: Mapping[str, Any] | None = None) -> Any:
    """Return a W&B run: online if logged in, else offline with a line that says so. WANDB_MODE decides if it is set.

    `shown`: what W&B shows as the run's configuration, by default all of `config`.
    """
    import wandb

    name = Path(config.exp_name).name
    known = read_state(config.checkpoint)["wandb_id"] if config.checkpoint and resumes_in_place(config) else None
    start = functools.partial(
        wandb.init,
        entity=config.wandb.entity,
        project=config.wandb.project,
        name=config.exp_name if run_dir.name.startswith(name) else f"{config.exp_name} {run_dir.name}",
        dir=str(run_dir),
        config=json.loads(redact(json.dumps(config.to_dict() if shown is None else shown))),
        id=known,
        resume="allow" if known else None,
        settings=wandb.Settings(console="off", silent=True, init_timeout=30),
    )
    mode: Any = os.environ.get("WANDB_MODE")
    try:
        if not mode:
            wandb.setup(wandb.Settings(silent=True))
            mode = "online" if wandb.login(prompt=False, verify=False) else "offline"
        if mode == "online":
            return start(mode=mode)
    except (wandb.errors.Error, OSError) as error:
        log(f"W&B cannot be reached ({error})")
        mode = "offline"
    try:
        run = start(mode=mode)
    except (wandb.errors.Error, ValueError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"W&B cannot start with WANDB_MODE={mode}: {reason}; or set wandb.enabled=false") from error
    if mode == "offline":
        log(f"W&B: offline (not logged in, or no network); upload later with: wandb sync {Path(run.dir).parent}")
    return run
