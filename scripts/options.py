"""Command lines of the scripts. It imports no torch, so that --help and mistakes are answered at once."""

import argparse
import difflib
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dpo.judging.endpoint import CRITERIA, DEFAULTS
from dpo.utils import ROOT, UserError
from settings import check_keys


def take_overrides(arguments: Sequence[str], texts: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """Return (the other arguments, the KEY=VALUE, in any order). What follows an option of `texts` is no override.
    Raise UserError for a misspelt key."""
    others: list[str] = []
    overrides: list[str] = []
    for a in arguments:
        given = re.match(r"[+~]{0,2}[A-Za-z_][\w.@]*=", a) and not os.path.exists(a)
        (overrides if given and others[-1:] not in [[text] for text in texts] else others).append(a)
    check_keys(overrides)
    return others, overrides


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


def check_runs(given: argparse.Namespace) -> None:
    """Raise UserError for --show, --limit or names of runs that cannot be."""
    if given.show < 0 or (given.limit is not None and given.limit < 1):
        raise UserError(f"--show {given.show} must be at least 0 and --limit {given.limit} at least 1")
    for name in given.runs:
        check_name(name)


def _is_cached(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except ValueError:  # no name that a hub's model may have
        return False


def _close(path: Path) -> str:
    """Return a question that names up to three runs and folders like `path`, newest first; empty if there are none."""
    places = [*(ROOT / "runs").glob("*/*"), *(ROOT / "runs").glob("*/*/*"), *path.parent.glob("*")]
    kept = [place for place in places if place.is_dir() and not place.name.startswith(("step-", "."))]
    folders = {place.resolve(): place for place in kept}.values()  # each once, spelt as `path` is
    names = {folder.name for folder in folders}
    like = [name for name in names if name.startswith(path.name)] or difflib.get_close_matches(path.name, names)
    found = sorted((f for f in folders if f.name in like), key=lambda f: (-f.stat().st_mtime, f))[:3]
    return f"; did you mean {' or '.join(map(str, found))}?" if found else ""


# --- Judges ---


def add_judges(parser: argparse.ArgumentParser) -> None:
    """Add the options that judge.py's `find_judge` reads, besides --out and overrides."""
    judges = parser.add_mutually_exclusive_group(required=True)
    judges.add_argument("--endpoint", metavar="URL", help="judge: --model at an OpenAI-compatible endpoint")
    judges.add_argument("--reward-model", metavar="NAME", help="judge: a sequence classifier with one label")
    judges.add_argument("--function", metavar="MODULE:NAME", help="judge: Python function (prompt, response) -> number")
    judges.add_argument("--sentiment", action="store_true", help="judge: VADER, the sentiment task's true reward")
    parser.add_argument("--model", metavar="NAME", help="the endpoint's model")
    parser.add_argument("--criterion", choices=CRITERIA, default="helpful", help="what the endpoint is asked")
    parser.add_argument("--fields", default=json.dumps(DEFAULTS), metavar="JSON", help="further fields of a request")
    parser.add_argument("--timeout", type=float, default=60, help="seconds to wait for an answer")
    parser.add_argument("--parallel", type=int, default=4, help="requests at a time")
    parser.add_argument("--price-in", type=float, metavar="X", help="of a million tokens of questions")
    parser.add_argument("--price-out", type=float, metavar="X", help="of a million tokens of answers")
    parser.add_argument("--batch-size", type=int, default=16, help="samples, or rows of a reward model, at a time")


def judge_problems(given: argparse.Namespace) -> list[str]:
    """Return what is wrong with the options of `add_judges`."""
    rules = [
        *((key, vars(given)[key] >= 1, "at least 1") for key in ("batch_size", "parallel")),
        ("timeout", given.timeout > 0, "above 0"),
        ("fields", isinstance(read(lambda: json.loads(given.fields)), dict), "a JSON object"),
    ]
    wrong = refused(given, rules)
    for one, other in (("endpoint", "model"), ("price_in", "price_out")):
        if (vars(given)[one] is None) != (vars(given)[other] is None):
            wrong.append(f"--{one} and --{other} go together: give both".replace("_", "-"))
    return wrong


def read(function: Callable[[], Any]) -> Any:
    """Return what `function` reads from text, or None."""
    try:
        return function()
    except ValueError:
        return None
