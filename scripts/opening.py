"""What the scripts share: the model that a command line names, with the settings of its run and KEY=VALUE overrides."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dpo.config import Inherited, keys
from dpo.data.checks import format_warning
from dpo.model.loading import load_tokenizer
from dpo.run.checkpoint import STATE_FILE, read_state
from dpo.run.config import Config
from dpo.run.resume import flat
from dpo.run.saved import CHANGED, Saved, reference_of
from dpo.run.weights import find_archive, weights_identity
from dpo.utils import ROOT, UserError, log
from options import check_name, key_of
from settings import LOSS_NAMES, load_config, quoted


def ends(found: Mapping[str, Any], form: str = ".3f") -> str:
    """Return the `interval` of something found, as text."""
    low_high = found["interval"]
    return f"[{low_high[0]:{form}}, {low_high[1]:{form}}]" if low_high else "[unknown]"


def hits_of(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return 1 if the first is larger, 0 if the second is, and 0.5 if both are equal, float of their shape."""
    hits: np.ndarray = (first > second) + 0.5 * (first == second)
    return hits


def run_train(arguments: Sequence[str]) -> None:
    """Run train.py as a process, and say how. Raise UserError if it fails."""
    log(f"\npython train.py {shlex.join(arguments)}")
    if subprocess.run([sys.executable, str(ROOT / "train.py"), *arguments], check=False).returncode:
        raise UserError("train.py failed; see above. Run the same command again to resume")


def find_saved(name: str, overrides: list[str]) -> Saved:
    """Return the model that `name` means: a run's folder, a checkpoint, a policy.pt, any model folder, .gguf file or
    hub id.

    Settings are those of the run if that is known, then `overrides` as train.py takes them. Nothing that a file says
    is interpolated. Raise UserError if there is no such model.
    """
    check_name(name)
    model = ["model=blank_model"]
    own: dict[str, Any] = {"model.name_or_path": name}
    state: dict[str, Any] = {}
    if Path(name).expanduser().exists() and not name.endswith(".gguf"):
        path = find_archive(name)
        own["model.name_or_path"] = str(path)
        if path.is_file():  # the original code's, which does not say what it is
            if not any(re.match(r"model(\.name_or_path)?=", override) for override in overrides):
                raise UserError(f"{path} does not say which model it is of: add model=<name>, such as model=pythia28")
            model, own = [], {"model.archive": str(path)}
        elif (path / STATE_FILE).exists():
            state = read_state(path)
            own["model.policy_dtype"] = state["config"]["model"]["policy_dtype"]
    saved = Saved(_configure(model, own, state.get("config", {}), overrides), state)
    saved.architecture()
    return saved


def _configure(model: list[str], values: dict[str, Any], known: dict[str, Any], overrides: list[str]) -> Config:
    """Return the configuration of `overrides`; what they do not give is taken from `values`, then from the run's
    `known`."""
    given = set(map(key_of, overrides))
    inherited = set(keys(Config, Inherited))  # keys, and groups of them
    # A group that is chosen anew, such as adapter=none, brings all its keys.
    settings = {k: v for k, v in flat(known).items() if (p := k.partition(".")[0]) not in given and {k, p} & inherited}
    chosen = []
    if "loss" not in given and "loss" in known:
        loss = known["loss"]
        if code := next((loss[key] for key in LOSS_NAMES if "." in loss.get(key, "")), None):
            raise UserError(
                f"{code} is code outside losses.py, which no checkpoint may choose: add what chooses "
                "it, hydra.searchpath=[...] loss=<name>, and its keys"
            )
        settings |= {f"loss.{key}": value for key, value in loss.items() if key not in LOSS_NAMES and value is not None}
        chosen = [f"loss={loss['name']}"]
    settings = {key: value for key, value in (settings | values).items() if key not in given}
    return replace(load_config(["exp_name=saved", *model, *chosen, *overrides], settings), trainer="BasicTrainer")


def find_reference(policy: Saved, given: str | None, overrides: list[str]) -> Saved:
    """Return the reference `given`, or else the one `policy` was trained against, to be computed as the policy is.

    Raise UserError if there is none, or if its vocabulary is another.
    """
    own, (name, identity) = policy.config.model, reference_of(policy.state)
    name = given or name
    if name is None:
        raise UserError("it is not known what the policy was trained against: give --reference <run, folder or hub id>")
    overrides = [override for override in overrides if not override.startswith("loss")]  # which are the policy's
    if name.endswith(".pt") and not given:  # of the original code, which does not say what it is
        overrides += ["model=blank_model", f"model.name_or_path={quoted(policy.trained['model']['name_or_path'])}"]
    try:
        found = find_saved(name, overrides).config.model
        if given:
            vocabularies = [load_tokenizer(replace(policy.config, model=model)).get_vocab() for model in (own, found)]
            if vocabularies[0] != vocabularies[1]:
                raise UserError("it has another vocabulary than the policy")
        elif identity is not None and weights_identity(name) not in (None, identity):
            raise UserError(CHANGED)
    except UserError as error:
        raise UserError(f"reference {name}: {error}\nGive one with --reference <run, folder or hub id>") from error
    tokenizer = own.tokenizer_name_or_path or own.name_or_path
    shared = replace(found, policy_dtype=own.policy_dtype, tokenizer_name_or_path=tokenizer)
    return Saved(replace(policy.config, model=shared), {}, identity=None if given else identity)


def warn_of_formats(policy: Saved, formats: Iterable[str], rows: str) -> None:
    """Log it if `rows` are rendered in another way than those that the policy was trained on."""
    if warning := format_warning(sorted(formats), policy.state.get("formats") or []):
        log(f"warning: {rows}: {warning}")
