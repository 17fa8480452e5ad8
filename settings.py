"""The configuration: composed of the components' config classes, and validated once, here."""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.override_parser.types import ChoiceSweep, Override
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, MissingMandatoryValue, OmegaConfBaseException

from dpo.config import build, keys
from dpo.hints import meant, parsed
from dpo.run.config import Config
from dpo.utils import ROOT, UserError, get_local_dir, get_local_run_dir
from utils import CONFIG_DIR, loss_values

if TYPE_CHECKING:
    from dpo.data.sources import DataSettings

LONGEST_NAME = 120
MIXED = ", or add terms to a loss of pairs: loss=mix 'loss.terms={bco: 1, nll: 1}'"
LOSS_NAMES = ("name", "kind")  # what a loss is called, and its class


@functools.cache
def loss_keys() -> dict[str, list[str]]:
    """Return name -> keys of every file in config/loss."""
    files = sorted((CONFIG_DIR / "loss").glob("*.yaml"))
    return {file.stem: [key for key in loss_values(file.stem) if key not in LOSS_NAMES] for file in files}


def all_keys() -> list[str]:
    """Return every key's dotted name, and the groups' names."""
    own = keys(Config)
    groups = list(dict.fromkeys(key.partition(".")[0] for key in own if "." in key))
    return own + groups + sorted({f"loss.{key}" for found in loss_keys().values() for key in (*LOSS_NAMES, *found)})


def register_resolvers() -> None:
    """Make the functions that config/*.yaml interpolates known to OmegaConf."""
    OmegaConf.register_new_resolver(  # a name may look like a number
        "get_local_run_dir", lambda name, dirs: get_local_run_dir(str(name), tuple(dirs)), replace=True
    )
    OmegaConf.register_new_resolver("project", lambda name: str(ROOT / name), replace=True)
    OmegaConf.register_new_resolver("last_local_dir", lambda dirs: str(get_local_dir(list(dirs))), replace=True)
    OmegaConf.register_new_resolver("package_file", _package_file, replace=True)
    OmegaConf.register_new_resolver("run_name", _run_name, replace=True)


def _package_file(package: str, file: str) -> str:
    """Return the path of a data file inside an installed package, found without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise UserError(
            f"the package {package}, which holds the embedded model {file}, is not installed: run `make setup`, "
            "or choose another model= (see config/model)"
        )
    return str(Path(spec.origin).parent / file)


def _run_name(swept: str) -> str:
    """Return the name of a run's folder in a sweep, made of its overrides, such as loss.beta-0.1_seed-2. Signs that do
    not suit the name of a folder, or an override that names it, are replaced; a hash then keeps names apart."""
    swept = swept.replace("++loss.", "loss.")  # of commandline.arranged
    name = re.sub(r"[^\w.+-]", "_", swept)[:LONGEST_NAME]
    if not swept:
        return "run"
    return name if name == swept else f"{name}-{hashlib.sha256(swept.encode()).hexdigest()[:8]}"


def quoted(value: Any) -> str:
    """Return a value as an override writes it: text stands for itself, whatever signs it has."""
    if isinstance(value, list | tuple):
        return f"[{','.join(map(quoted, value))}]"
    if not isinstance(value, str | Path):
        return json.dumps(value)
    escaped = re.sub(r'(\\*)("|\Z)', lambda m: m[1] * 2 + (r"\"" if m[2] else ""), literal(str(value)))
    return f'"{escaped}"'


def literal(value: Any) -> Any:
    """Return `value` with its texts as OmegaConf has to be given them to leave each ${...} in them as it stands."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    if isinstance(value, Mapping):
        return {key: literal(entry) for key, entry in value.items()}
    return [literal(entry) for entry in value] if isinstance(value, list | tuple) else value


def load_config(overrides: list[str], values: Mapping[str, Any] | None = None) -> Config:
    """Compose config/ with command-line `overrides`, for scripts and tests, then set `values`: dotted key -> value,
    which is taken as it stands. Raises UserError."""
    register_resolvers()
    with hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        try:
            composed = hydra.compose("config", overrides)
            for key, value in (values or {}).items():
                OmegaConf.update(composed, key, literal(value), force_add=True)
            return build_config(composed)
        except (OmegaConfBaseException, hydra.errors.HydraException, ValueError) as error:
            raise UserError(str(error)) from error


def build_config(composed: DictConfig) -> Config:
    """Return Hydra's composed configuration as typed, validated dataclasses.

    Raise UserError with every problem: missing values, unknown keys, wrong types and values; if there are none of
    these, what `Config.problems` lists.
    """
    values, problems = _resolved(composed)
    chosen = values.pop("loss", {})
    config, found = build(Config, values | {"loss": None})
    problems += [line for line in found if line not in problems]
    if not problems or chosen != loss_values(str(chosen.get("name"))):  # otherwise an answer need not wait for torch
        loss, found = _loss(chosen)
        problems += [line for line in found if line not in problems]
    if problems:
        raise UserError("\n".join(problems))
    config = dataclasses.replace(config, loss=loss)
    if problems := [*config.problems(), *_top_problems(config)]:
        raise UserError("\n".join(problems))
    return config


def _top_problems(config: Config) -> Iterator[str]:
    """Yield what contradicts the data sets and metrics that there are. Imports torch."""
    from dpo.scoring import choices
    from preference_datasets import REGISTRY

    names = choices(config.loss)
    if config.keep_best is not None and config.keep_best not in names:
        constant = config.keep_best.startswith("tokens_eval/")
        reason = "the same at every evaluation" if constant else "not measured"
        yield f"keep_best={config.keep_best} is {reason}; choose from: {', '.join(names)}"
    for name in sorted(config.dataset_sources.keys() - REGISTRY.keys()):
        yield f"dataset_sources.{name} is no built-in data set; choose from: {', '.join(REGISTRY)}"


def build_loss(values: Any) -> Any:
    """Return the loss that the keys of the group `loss` describe. Raise UserError."""
    loss, problems = _loss(values)
    if problems:
        raise UserError("\n".join(problems))
    return loss


def _loss(values: Any) -> tuple[Any, list[str]]:
    """Return the loss of the group `loss`, and what is wrong with it."""
    if not isinstance(values, dict) or not isinstance(values.get("name"), str):
        return None, [f"loss={values} is no group of keys; choose one of config/loss: {', '.join(loss_keys())}"]
    import losses

    name = values["name"]
    loss, problems = losses.make(values)
    others = [key for key in all_keys() if key.startswith("loss.")]
    for i, problem in enumerate(problems):
        if problem.endswith(": no such key"):
            key = problem.partition(":")[0]
            problems[i] = f"{problem} of loss={name}" + ("" if key in others else meant(key, others))
    return loss, problems


def _resolved(composed: DictConfig) -> tuple[dict[str, Any], list[str]]:
    """Return the values of all known keys, nested, and a message for each that is missing or not known."""
    known = set(keys(Config))
    groups = {key.partition(".")[0] for key in known if "." in key} | {"loss"}
    values: dict[str, Any] = {}
    problems: list[str] = []
    for name in _names(composed, groups):
        group, dot, _ = name.partition(".")
        if name in known or name in groups or group == "loss":
            _read(composed, name, values.setdefault(group, {}) if dot else values, problems)
        else:
            problems.append(f"{name}: no such key{meant(name, all_keys())}")
    return values, problems


def _names(composed: DictConfig, groups: set[str]) -> Iterator[str]:
    """Yield the name of every key, dotted inside groups."""
    for name in map(str, composed):
        group = None
        if name in groups:
            with contextlib.suppress(OmegaConfBaseException):  # reported when the value is read
                group = composed.get(name)
        if group and OmegaConf.is_dict(group):
            yield from (f"{name}.{key}" for key in group)
        else:
            yield name


def _read(composed: DictConfig, name: str, into: dict[str, Any], problems: list[str]) -> None:
    """Set the last part of the dotted `name` in `into` to its resolved value, or add to `problems`."""
    try:
        value = OmegaConf.select(composed, name, throw_on_missing=True)
        into[name.rpartition(".")[2]] = (
            OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        )
    except MissingMandatoryValue:
        problems.append(f"{name} is missing: pass {name}=<value>")
    except InterpolationToMissingValueError:  # the missing key is named itself
        into[name.rpartition(".")[2]] = ""
    except OmegaConfBaseException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from error
        problems.append(f"{name}: {str(error).splitlines()[0]}")


def data_settings(config: Config) -> "DataSettings":
    """Return the settings that the data depends on."""
    from dpo.data.sources import DataSettings

    return DataSettings.of(config, str(config.cache), config.loss.rows, config.loss.columns)


def check_keys(overrides: list[str]) -> None:
    """Raise UserError for a misspelt key among command-line overrides, with the key that was probably meant."""
    own_losses = any(override.lstrip("+").startswith("hydra.searchpath=") for override in overrides)
    for override in overrides:
        key, equals, value = override.partition("=")
        free = key.partition(".")[0] in ("hydra", "optimizer_kwargs", "dataset_sources", "columns")
        free |= key.startswith("adapter.peft_kwargs.") or (own_losses and key.startswith("loss."))
        if equals and key[:1].isalpha() and "/" not in key and not free and key not in all_keys():
            places = "config/config.yaml, config/model/blank_model.yaml, config/adapter/none.yaml and config/loss"
            raise UserError(f"there is no key {key!r}{meant(key, all_keys(), value)} (every key stands in {places})")


def check_command(overrides: list[str]) -> list[Override]:
    """Return train.py's settings as Hydra understands them.

    Raise UserError, which says what to write, for those that Hydra does not understand, for an unknown key or model,
    and for a key of a loss that was not chosen.
    """
    check_keys(overrides)
    settings = [parsed(override) for override in overrides]
    given = {override.key_or_group: _values(override) for override in settings if not override.is_delete()}
    _check_choice(given, "model", advice=". Any other model: model=blank_model model.name_or_path={}")
    _check_choice(given, "adapter")
    if not any(override.startswith("hydra.searchpath=") for override in overrides):
        for name in given.get("loss", []):
            if name not in (known := loss_keys()):
                near = meant(name, list(known))
                raise UserError(f"loss={name} is none of {', '.join(known)} (config/loss, docs/losses.md){near}")
    _check_choice(given, "experiment", mark="+")
    _check_loss_keys(given)
    return settings


def _check_choice(given: dict[str, list[str]], group: str, mark: str = "", advice: str = "") -> None:
    """Raise UserError for a choice of a group that is no file of its folder."""
    options = sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml"))
    for name in given.get(group, []):
        if name not in options:
            listed = f"{mark}{group}={name} is none of {', '.join(options)} (config/{group})"
            near = meant(name, options)
            raise UserError(listed + near + ("" if near else advice.format(name)))


def _check_loss_keys(given: dict[str, list[str]]) -> None:
    """Raise UserError for a key that a chosen loss does not have, and others have."""
    default = next(part["loss"] for part in OmegaConf.load(CONFIG_DIR / "config.yaml").defaults if "loss" in part)
    if "experiment" in given and "loss" not in given:  # the recipe chooses the loss
        return
    chosen, known = given.get("loss", [default]), loss_keys()
    for key in given:
        part = key.removeprefix("loss.")
        having = sorted((loss for loss, names in known.items() if part in names), key=lambda loss: loss != "dpo")
        lacking = [loss for loss in chosen if loss in known and loss not in having]
        if not key.startswith("loss.") or not having or not lacking:
            continue
        theirs = " or ".join(f"loss={loss}" for loss in having[:3]) + (" and others" if len(having) > 3 else "")
        run = f"loss={','.join(lacking)} has no such key"
        if "loss" not in given:
            run = f"this run has loss={default}, the default: add loss={having[0]}"
        elif len(chosen) > 1:
            run += f": sweep losses that have it, or leave {key} out"
        elif "settings" in known[lacking[0]]:
            run += f": a term's own keys stand in 'loss.settings={{{having[0]}: {{{part}: <value>}}}}'"
        else:
            mixed = part in known["pairs"] and part != "beta"
            run += f": leave it out, or choose a loss that has it{MIXED if mixed else ''}"
        raise UserError(f"{key} is for {theirs}, and {run}")


def _values(override: Override) -> list[str]:
    """Return the value, or those that are swept."""
    value = override.value()
    return [str(v) for v in value.list] if isinstance(value, ChoiceSweep) else [str(value)]
