"""The command line of train.py, before Hydra sees it. Imports no torch, so mistakes are answered at once."""

import argparse
import json
import re
from collections.abc import Callable, Collection, Sequence
from importlib.util import find_spec
from typing import NoReturn

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.types import Override, OverrideType

from dpo.explained import help_text
from dpo.hints import meant
from dpo.run.config import name_problem
from dpo.utils import ROOT, UserError

PLUGINS = {"launcher": ("basic", "joblib", "submitit_local", "submitit_slurm"), "sweeper": ("basic", "optuna")}


def arranged(arguments: list[str], check: Callable[[list[str]], list[Override]], keys: Collection[str]) -> list[str]:
    """Return the command line as Hydra understands it: settings, then options, wherever these stood.

    In a sweep Hydra is told to name the runs after what is swept. `check` parses the settings; `keys` are those that
    exist. Raise UserError for what cannot be understood, or cannot be a sweep. Answer --help, and end.
    """
    parser = get_args_parser()
    try:
        parser.error = _refuse  # type: ignore[method-assign]
        known, unknown = parser.parse_known_intermixed_args(arguments)
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from error
    if unknown:
        key, _, value = unknown[0].lstrip("-").partition("=")
        hint = meant(key, keys, value) or f": {key}={value or '<value>'}"
        raise UserError(f"{unknown[0]} is no option; settings are written key=value{hint}")
    if known.help:
        print(help_text(ROOT / "config"))
        raise SystemExit(0)
    if known.hydra_help or known.shell_completion:
        return arguments
    overrides = check(known.overrides)
    settings = set(known.overrides)
    options = [argument for argument in arguments if argument not in settings]
    _check_plugins(known.overrides)
    multirun = known.multirun or "hydra.mode=MULTIRUN" in settings
    if multirun and (known.cfg or known.info):
        raise UserError("--cfg and --info show one run's configuration: leave -m out, and give each key one value")
    naming = _naming(overrides) if multirun else []
    return [*(_swept(known.overrides, overrides) if multirun else known.overrides), *naming, *options]


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


def _swept(arguments: Sequence[str], overrides: Sequence[Override]) -> list[str]:
    """Return a sweep's settings, with ++ before keys of a loss that is swept itself: Hydra first composes them with the
    default loss, which may not have these keys."""
    any_loss = any(each.key_or_group in ("loss", "experiment") and each.is_sweep_override() for each in overrides)
    plain = [each.type == OverrideType.CHANGE and each.key_or_group.startswith("loss.") for each in overrides]
    return [f"++{argument}" if any_loss and key else argument for argument, key in zip(arguments, plain, strict=True)]


def _naming(overrides: Sequence[Override]) -> list[str]:
    """Return the argument that makes Hydra name a sweep's runs after what is swept."""
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
        raise UserError(f"{interval} is an interval, which a search is for: hydra/sweeper=optuna (docs/sweeps.md)")
    return [f"hydra.job.config.override_dirname.exclude_keys={json.dumps(sorted(fixed))}"]
