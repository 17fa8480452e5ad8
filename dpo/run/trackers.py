"""Weights & Biases, trackio and TensorBoard: opened once the run may write."""

import contextlib
import functools
import io
import json
import os
import shlex
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
    """Open the configuration's trackers and the metric files, in the main process.

    Call `begin` after all validation, before anything is written to the folder of a resumed run.
    """
    if not parallel.is_main():
        return
    if "wandb" in config.trackers:
        logger.wandb_run = open_wandb(config, logger.run_dir)
    if "trackio" in config.trackers:
        logger.trackio_run = open_trackio(config, logger.run_dir)
    examples = read_state(config.checkpoint)["examples"] if config.checkpoint else None
    begin()
    if "tensorboard" in config.trackers:
        from torch.utils.tensorboard import SummaryWriter

        logger.tensorboard = SummaryWriter(str(logger.run_dir), purge_step=examples and examples + 1)
    logger.open()


def run_name(config: Config, run_dir: Path, unique: bool = False) -> str:
    """Return what a tracker calls the run: in a sweep what varies, which is the folder's name; else exp_name. `unique`:
    a name that no run of another folder has, but for one in a folder of the same name elsewhere."""
    if config.wandb.group == config.exp_name and not unique:
        return run_dir.name
    if config.wandb.group != config.exp_name and run_dir.name.startswith(Path(config.exp_name).name):
        return run_dir.name if unique else config.exp_name
    return f"{config.exp_name} {run_dir.name}"


def tags(config: Config) -> list[str]:
    """Return the names of loss, model, adapter and data sets: at most 64 characters each, as W&B asks."""
    adapter = [config.adapter.peft_type.lower()] if config.adapter.peft_type else []
    named = [Path(name).name for name in (config.model.name_or_path, *config.datasets)]
    return [*dict.fromkeys(redact(name)[:64] for name in (config.loss.name, *adapter, *named) if name)]


def open_trackio(config: Config, run_dir: Path) -> Any:
    """Return a trackio run, which a resumed run continues. It lies on this machine (TRACKIO_DIR), unless
    TRACKIO_SPACE_ID or TRACKIO_SERVER_URL says otherwise. Raise UserError if it cannot start."""
    import trackio

    shown = json.loads(redact(json.dumps(config.to_dict() | {"tags": tags(config)})))
    resumed = config.checkpoint is not None and resumes_in_place(config)
    project, name = config.wandb.project, run_name(config, run_dir, unique=True)
    how: dict[str, Any] = {"group": config.wandb.group, "resume": "allow" if resumed else "never", "embed": False}
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints half a page
            run = trackio.init(project=project, name=name, config=shown, **how)
    except Exception as error:  # the library raises whatever its many layers do
        raise UserError(f"trackio cannot start: {error}; or leave it out of tracker={config.tracker}") from error
    log(f"trackio: look at the run with: trackio show --project {shlex.quote(project)}")
    return run


def open_wandb(config: Config, run_dir: Path, shown: Mapping[str, Any] | None = None) -> Any:
    """Return a W&B run: online if logged in, else offline with a line that says so. WANDB_MODE decides if it is set.

    `shown`: what W&B shows as the run's configuration, by default all of `config`.
    """
    import wandb

    known = read_state(config.checkpoint)["wandb_id"] if config.checkpoint and resumes_in_place(config) else None
    start = functools.partial(
        wandb.init,
        entity=config.wandb.entity,
        project=config.wandb.project,
        group=config.wandb.group,
        name=run_name(config, run_dir),
        tags=tags(config) if shown is None else None,
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
