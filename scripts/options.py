"""Command lines of the scripts. It imports no torch, so that --help and mistakes are answered at once."""

import argparse
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo.utils import ROOT, UserError
from settings import check_keys


def take_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return (the other arguments, the KEY=VALUE, in any order). Raise UserError for a misspelt key."""
    overrides = [a for a in arguments if re.match(r"[+~]{0,2}[A-Za-z_][\w.@]*=", a) and not Path(a).exists()]
    check_keys(overrides)
    return [a for a in arguments if a not in overrides], overrides


def key_of(override: str) -> str:
    """Return the key that a command-line override sets."""
    return override.partition("=")[0].lstrip("+")


def refused(given: argparse.Namespace, rules: Sequence[tuple[str, Any, str]]) -> list[str]:
    """Return a message for each (option, whether its value is allowed, what is allowed) that is not."""
    wrong = [(key, allowed) for key, ok, allowed in rules if not ok]
    return [f"--{key.replace('_', '-')} {vars(given)[key]} must be {allowed}" for key, allowed in wrong]


def check_name(name: str) -> None:
    """Raise UserError if `name` is no file or folder, and cannot be a hub id, organisation/name, either."""
    path = Path(name).expanduser()
    if path.exists() or path.name == "policy.pt":
        return
    owner, _, model = name.partition("/")
    if model and "/" not in model and not name.startswith((".", "/", "~")) and not Path(owner).exists():
        return  # the hub is asked
    if "/" not in name and _is_cached(name):
        return
    advice = "" if "/" in name else "; a model of the hub is written organisation/name, such as openai-community/gpt2"
    raise UserError(f"{name}: there is no such folder{_close(path)}{advice}")


def _is_cached(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except ValueError:  # no name that a hub's model may have
        return False


def _close(path: Path) -> str:
    """Return a question that names up to three runs and folders like `path`, newest first; empty if there are none."""
    places = {*path.parent.glob("*"), *(ROOT / "runs").glob("*/*"), *(ROOT / "runs").glob("*/*/*")}
    folders = {place.name: place for place in places if place.is_dir() and not place.name.startswith(("step-", "."))}
    names = [name for name in folders if name.startswith(path.name)] or difflib.get_close_matches(path.name, folders)
    found = sorted((folders[name] for name in names), key=lambda folder: -folder.stat().st_mtime)[:3]
    return f"; did you mean {' or '.join(map(str, found))}?" if found else ""
