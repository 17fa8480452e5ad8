"""What the commands share: how a program ends, and how its options are shown."""

import argparse
import errno
import io
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

from omegaconf import OmegaConf

from dpo.utils import ROOT, UserError, another_ended, log, wants_memory

CONFIG_DIR = ROOT / "config"

LESS_MEMORY = (
    "Any of these needs less: a larger gradient_accumulation_steps, a smaller eval_batch_size or max_length, "
    "activation_checkpointing=true, mixed_precision=bfloat16"
)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of a script's docstring, and adds each option's default if it has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        shown = action.default not in (None, False, argparse.SUPPRESS, []) and action.option_strings
        return f"{action.help} (default: %(default)s)" if shown else action.help


def loss_values(name: str) -> dict[str, Any]:
    """Return the keys of config/loss/<name>.yaml and of the files that its defaults list names, {} if there is no such
    file. Missing values are ???."""
    file = CONFIG_DIR / "loss" / f"{name}.yaml"
    own = OmegaConf.to_container(OmegaConf.load(file)) if file.is_file() else {}
    assert isinstance(own, dict)
    values: dict[str, Any] = {}
    for base in own.pop("defaults", []):
        values |= loss_values(base) if base != "_self_" else {}
    return values | {str(key): value for key, value in own.items()}


def _use_utf8() -> None:
    """Start this program again in Python's UTF-8 mode under a locale of another encoding: Arrow, tokenizers and
    safetensors take names of files as UTF-8 whatever the locale. What a terminal cannot show it gets as escapes."""
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1" and sys.executable:
        os.environ["PYTHONUTF8"] = "1"
        os.environ.setdefault("PYTHONIOENCODING", sys.stdout.encoding)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def run_main(main: Callable[[], Any], speaks: Callable[[], bool] = lambda: True) -> Any:
    """Call `main` as a command does: a `UserError` becomes one message and exit code 1, Ctrl-C exit code 130.

    In a group of processes that fail together only one `speaks`.
    """
    _use_utf8()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        return main()
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    except Exception as error:
        message, code = _explain(error)
        message = message if speaks() else ""
    if message:
        log(message, logging.ERROR)
    sys.exit(code)


def _explain(error: Exception) -> tuple[str, int]:
    """Return the message for `error`, and the exit code."""
    text = str(error)
    if isinstance(error, UserError):
        return f"error: {text}", 1
    if wants_memory(error):
        return f"error: out of memory: {text.splitlines()[0] if text else 'host'}\n{LESS_MEMORY}", 1
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return f"error: {text}", 1
    if another_ended(error):
        return f"error: another process of the group is gone ({text.splitlines()[0]}); it says why, or was killed", 1
    return f"{traceback.format_exc()}\nerror: this is a defect of the program, not of your input; see above", 2
