"""Sweeps: python train.py -m loss.beta=0.1,0.3 ... One folder for the sweep, in it one for each run, which is called
after what the sweep varies, so that the same command finds what is finished and what is not."""

import gc
import json
import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import CompactHydraException, HydraException
from omegaconf import DictConfig

import parallel
import stopping
from checkpoint import checkpoints, read_state
from utils import UserError, log, make_dir, open_log

SWEPT_BY = ("-m", "--multirun", "hydra.mode=MULTIRUN")
PLUGINS = {
    "hydra/launcher=joblib": "hydra_joblib_launcher",
    "hydra/launcher=submitit": "hydra_submitit_launcher",
    "hydra/sweeper=optuna": "hydra_optuna_sweeper",
}


class RunFailed(CompactHydraException):
    """One run of a sweep failed. Hydra goes on with the others, then shows this and exits with code 1."""


def naming(arguments: list[str]) -> list[str]:
    """The argument that makes Hydra name a sweep's runs by what is swept; none where `arguments` are of one run.

    Raises UserError for a sweep that cannot be.
    """
    if not any(argument in SWEPT_BY for argument in arguments):
        return []
    given = [argument for argument in arguments if "=" in argument and not argument.startswith(("-", "hydra"))]
    try:
        overrides = OverridesParser.create().parse_overrides(given)
    except HydraException:
        return []  # Hydra will say what is wrong
    swept = {override.key_or_group: override for override in overrides if override.is_sweep_override()}
    fixed = sorted({override.key_or_group for override in overrides} - swept.keys())
    _check([argument for argument in arguments if argument.startswith("hydra")], swept, fixed)
    return [f"hydra.job.config.override_dirname.exclude_keys={json.dumps(fixed)}"]


def _check(hydras: list[str], swept: dict[str, Any], fixed: list[str]) -> None:
    for start, module in PLUGINS.items():
        plugin = next((argument for argument in hydras if argument.startswith(start)), None)
        if plugin and find_spec(f"hydra_plugins.{module}") is None:
            raise UserError(f"{plugin} is not installed: pip install -r requirements-sweeps.txt")
    if "exp_name" not in {*fixed, *swept}:
        raise UserError("exp_name is missing: pass exp_name=<value>")
    if "local_run_dir" in fixed:
        raise UserError("local_run_dir is one folder, and a sweep's runs have one each: set hydra.sweep.dir instead")
    if not swept and not any(argument.startswith("hydra.sweeper.params") for argument in hydras):
        raise UserError("-m, but no key has several values: leave -m out, or write <key>=choice(<value>) for one value")
    interval = next((key for key, override in swept.items() if override.is_interval_sweep()), None)
    if interval and not any(argument.startswith("hydra/sweeper=") for argument in hydras):
        raise UserError(f"{interval} is an interval, which a search is for: hydra/sweeper=optuna (see README)")


def run_in_sweep(composed: DictConfig, run: Callable[[], Any]) -> float | None:
    """Do one run of a sweep; returns the metric by which Hydra's sweepers search: keep_best, or the evaluation's loss.

    The run goes on where an earlier one of the same sweep ended; a finished one is left as it is. Raises RunFailed.
    """
    if parallel.joined() and int(os.environ["WORLD_SIZE"]) > 1:
        raise UserError("a sweep cannot run inside torchrun or srun: its runs start processes of their own (nproc)")
    hydra_config = HydraConfig.get()
    given = {str(override).partition("=")[0] for override in hydra_config.overrides.task}
    if "local_run_dir" not in given:
        composed.local_run_dir = hydra_config.runtime.output_dir
    if "resume" not in given:
        composed.resume = "auto"
    run_dir = Path(composed.local_run_dir)
    open_log(make_dir(run_dir, "local_run_dir"))
    log(f"\n=== {run_dir.parent.name}: {run_dir.name} ===")
    code: Any = 0
    try:
        run()
    except SystemExit as ended:
        code = ended.code
    gc.collect()  # before the next run loads its model: one refers to itself
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if code in (1, 2):  # raised here, where nothing holds on to what the run had in memory
        raise RunFailed(
            f"error: {run_dir.name} failed: for the reason see {run_dir / 'log.txt'}. Every run was tried; the same "
            "command runs those again that are not finished"
        )
    if code or stopping.asked():
        sys.exit(code or stopping.EXIT_CODE)  # it was asked to stop, and so is the sweep
    newest = next(iter(checkpoints(run_dir)), None)
    metrics = read_state(newest)["metrics"] if newest is not None else {}
    value = metrics.get(composed.keep_best or "loss/eval")
    return None if value is None else float(value)
