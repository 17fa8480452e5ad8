"""Sweeps: python train.py -m loss.beta=0.1,0.3 ... One folder for the sweep, in it one for each run, which is called
after what the sweep varies, so that the same command finds what is finished and what is not."""

import argparse
import atexit
import gc
import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import torch
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from hydra.errors import CompactHydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from dpo import parallel
from dpo.hints import meant
from dpo.run import stopping
from dpo.run.checkpoint import checkpoints, read_state
from dpo.run.config import name_problem
from dpo.run.runs import LOG, locked
from dpo.utils import ROOT, UserError, log, open_log
from settings import all_keys, check_command

PLUGINS = {"launcher": ("basic", "joblib", "submitit_local", "submitit_slurm"), "sweeper": ("basic", "optuna")}


class RunFailed(CompactHydraException):
    """One run of a sweep failed. Hydra goes on with the others, then shows this and exits with code 1."""


class TableAtEnd(Callback):
    """Hydra's callback that has a sweep end with a table of its runs, however it ends."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        atexit.register(show_table, Path(config.hydra.sweep.dir))


def show_table(folder: Path) -> None:
    """Print what came of a sweep's runs, and the command of their report."""
    sys.path.insert(0, str(ROOT / "scripts"))
    from report import load_runs, table_rows, text_table

    begun = [path.parent for path in folder.glob("*/config.yaml")]
    others = sorted(path.parent.name for path in folder.glob(f"*/{LOG}") if path.parent not in begun)
    try:
        table = text_table(table_rows(load_runs(begun)), shutil.get_terminal_size((120, 24)).columns) if begun else ""
    except UserError as error:
        table = str(error)
    failed = f"\nnot begun, for the reason see their {LOG}: {', '.join(others)}" if others else ""
    report = shlex.join(["python", "scripts/report.py", str(folder)])
    print(f"\n=== {folder.name}\n{table}{failed}\ncurves and samples: {report}", flush=True)


def arranged(arguments: list[str]) -> list[str]:
    """The command line as Hydra understands it: settings, then its options, wherever these stood. In a sweep Hydra is
    told to name the runs by what is swept. Raises UserError for what cannot be understood, or be a sweep."""
    parser = get_args_parser()
    try:
        parser.error = _refuse  # type: ignore[method-assign]
        known, unknown = parser.parse_known_intermixed_args(arguments)
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from error
    if unknown:
        key, _, value = unknown[0].lstrip("-").partition("=")
        hint = meant(key, all_keys()) or f": {key}={value or '<value>'}"
        raise UserError(f"{unknown[0]} is no option; settings are written key=value{hint}")
    if known.help or known.hydra_help or known.shell_completion:
        return arguments
    overrides = check_command(known.overrides)
    settings = set(known.overrides)
    options = [argument for argument in arguments if argument not in settings]
    _check_plugins(known.overrides)
    multirun = known.multirun or "hydra.mode=MULTIRUN" in settings
    if multirun and (known.cfg or known.info):
        raise UserError("--cfg and --info show one run's configuration: leave -m out, and give each key one value")
    naming = _naming(overrides) if multirun else []
    return [*known.overrides, *naming, *options]


def _refuse(message: str) -> NoReturn:
    raise UserError(f"{message}; settings are written key=value, options are listed by --help")


def _check_plugins(arguments: list[str]) -> None:
    for argument in arguments:
        found = re.fullmatch(r"hydra/(launcher|sweeper)=(\w+)", argument)
        if not found or found[2] == "basic":
            continue
        kind, name = found[1], found[2]
        try:
            installed = find_spec(f"hydra_plugins.hydra_{name.partition('_')[0]}_{kind}") is not None
        except ModuleNotFoundError:  # hydra_plugins itself
            installed = False
        if not installed and name not in PLUGINS[kind]:
            raise UserError(f"{argument} is not known; choose from: {', '.join(PLUGINS[kind])}")
        if not installed:
            raise UserError(f"{argument} is not installed: pip install -r requirements-sweeps.txt")


def _naming(overrides: Sequence[Override]) -> list[str]:
    """The argument that makes Hydra name a sweep's runs by what is swept."""
    own = [override for override in overrides if not override.is_hydra_override()]
    swept = {override.key_or_group: override for override in own if override.is_sweep_override()}
    fixed = {override.key_or_group: override for override in own if override.key_or_group not in swept}
    hydras = [override.key_or_group for override in overrides if override.is_hydra_override()]
    if "exp_name" in swept:
        raise UserError("exp_name is the sweep's name, and its folder's: give one, and sweep other keys")
    if "exp_name" not in fixed:
        raise UserError("exp_name is missing: pass exp_name=<value>")
    if problem := name_problem(str(fixed["exp_name"].value())):
        raise UserError(problem)
    if "local_run_dir" in fixed:
        raise UserError("local_run_dir is one folder, and a sweep's runs have one each: set hydra.sweep.dir instead")
    if not swept and not any(key.startswith("hydra.sweeper.params") for key in hydras):
        raise UserError("-m, but no key has several values: leave -m out, or write <key>=choice(<value>) for one value")
    interval = next((key for key, override in swept.items() if override.is_interval_sweep()), None)
    if interval and "hydra/sweeper" not in hydras:
        raise UserError(f"{interval} is an interval, which a search is for: hydra/sweeper=optuna (see README)")
    return [f"hydra.job.config.override_dirname.exclude_keys={json.dumps(sorted(fixed))}"]


def run_in_sweep(composed: DictConfig, run: Callable[[], Any]) -> float | None:
    """Do one run of a sweep; returns the metric by which Hydra's sweepers search: keep_best, or the evaluation's loss.

    The run goes on where an earlier one of the same sweep ended; a finished one is left as it is. Raises RunFailed.
    """
    if parallel.world_size() > 1:
        raise UserError("a sweep cannot run inside torchrun or srun: its runs start processes of their own (nproc)")
    hydra_config = HydraConfig.get()
    given = {str(override).partition("=")[0] for override in hydra_config.overrides.task}
    if "local_run_dir" not in given:
        composed.local_run_dir = hydra_config.runtime.output_dir
    if "resume" not in given:
        composed.resume = "auto"
    run_dir = Path(composed.local_run_dir)
    try:
        with locked(run_dir):  # the log of a run that another process trains is not to be written to
            open_log(run_dir)
    except UserError as error:
        raise RunFailed(f"error: {error}") from None
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
