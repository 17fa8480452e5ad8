"""One run of a sweep: python train.py -m loss.beta=0.1,0.3 ...

A sweep has a folder, in it one for each run, named after what the sweep varies. So the same command finds what is
finished and what is not.
"""

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from omegaconf import DictConfig, OmegaConf

from dpo import parallel
from dpo.run import stopping
from dpo.run.checkpoint import checkpoints, read_state
from dpo.run.folder import locked
from dpo.utils import UserError, log, open_log


class RunFailed(CompactHydraException):
    """One run of a sweep failed. Hydra runs the others, then shows this and exits with code 1."""


def run_in_sweep(composed: DictConfig, run: Callable[[stopping.StopRequest], Any]) -> float | None:
    """Run once in a sweep. Return the metric that Hydra's sweepers search by: keep_best, or the evaluation's loss.

    Resume the run if an earlier call of the same sweep began it; leave a finished one as it is. Raise RunFailed.
    """
    if parallel.world_size() > 1:
        raise UserError("a sweep cannot run inside torchrun or srun: its runs start processes of their own (nproc)")
    hydra_config = HydraConfig.get()
    given = {str(override).partition("=")[0] for override in hydra_config.overrides.task}
    if "local_run_dir" not in given:
        composed.local_run_dir = hydra_config.runtime.output_dir
    if "resume" not in given:
        composed.resume = "auto"
    if "wandb.group" not in given:
        OmegaConf.update(composed, "wandb.group", composed.get("exp_name"))
    run_dir = Path(composed.local_run_dir)
    try:
        with locked(run_dir):  # the log of a run that another process trains is not to be written to
            open_log(run_dir)
    except UserError as error:
        raise RunFailed(f"error: {error}") from None
    log(f"\n=== {run_dir.parent.name}: {run_dir.name} ===")
    stop, code = stopping.StopRequest(), None
    try:
        run(stop)
    except SystemExit as ended:
        code = ended.code
    gc.collect()  # before the next run loads its model: one refers to itself
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if code in (1, 2):  # raised here: nothing keeps the run's memory alive
        raise RunFailed(
            f"error: {run_dir.name} failed: for the reason see {run_dir / 'log.txt'}. Every run was tried; the same "
            "command runs those again that are not finished"
        )
    if code or stop.name:
        sys.exit(code or stopping.EXIT_CODE)  # it was asked to stop, and so is the sweep
    newest = next(iter(checkpoints(run_dir)), None)
    metrics = read_state(newest)["metrics"] if newest is not None else {}
    value = metrics.get(composed.keep_best or "loss/eval")
    return None if value is None else float(value)
