"""All that `resume` means: find the checkpoint, refuse changes of meaning, rewind the run's folder."""

import mmap
import os
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from dpo.config import MayChange, keys
from dpo.data.records import PreferenceData
from dpo.files import set_aside
from dpo.run import checkpoint
from dpo.run.checkpoint import LATEST, STATE_FILE, TRAINING_STATE, checkpoints, examples_of, read_state
from dpo.run.config import Config
from dpo.run.metrics import HISTORY
from dpo.run.weights import weights_identity
from dpo.utils import UserError, default_cache, get_local_dir, get_local_run_dir, log

# Find the checkpoint -----------------------------------------------------------------------------------------------


def find_resume(config: Config) -> tuple[str | None, str]:
    """Return the checkpoint that `resume` means, and the run's folder. Raise UserError if it cannot be resumed.

    For resume=auto:
    1. If local_run_dir is given, only that folder counts; otherwise those of this exp_name in local_dirs, newest first.
    2. In a folder, take the complete checkpoint of the most examples. A damaged one is logged and skipped. If all are
       damaged, that is an error.
    3. A folder without checkpoints is skipped. If it was given, the run starts anew in it.
    4. If nothing is found, the run starts in the folder that local_run_dir means.
    """
    if not config.resume:
        return None, config.local_run_dir
    if config.resume != "auto":
        return str(find_checkpoint(config.resume, config.checkpoint_check)), config.local_run_dir
    for run_dir in [Path(config.local_run_dir)] if local_run_dir_is_given(config) else _runs_of(config):
        if (newest := _newest_to_resume(run_dir, config.checkpoint_check)) is not None:
            return str(newest), str(run_dir)
    return "auto", config.local_run_dir


def _newest_to_resume(run_dir: Path, how: str) -> Path | None:
    """Return a folder's newest checkpoint that can be resumed; None if it has no checkpoints at all."""
    found = checkpoints(run_dir)
    latest = Path(os.path.realpath(run_dir)) / LATEST
    if not found and latest.is_dir() and not latest.is_symlink():  # the one checkpoint of a copy without links
        found = [latest]
    moved = [path for path in run_dir.glob("step-*") if path.is_symlink() and path.is_dir()]
    if not found and moved:
        raise UserError(
            f"resume=auto: {moved[0]} is a link to {moved[0].resolve()}, and a run has its checkpoints in its own "
            "folder; move them back, or resume=<that folder> in another local_run_dir"
        )
    for path in found:
        problem = checkpoint.check(path, how)
        if problem is None and checkpoint.weights_only(path) and not _at_its_end(read_state(path)):
            problem = "it holds weights only (save_weights_only, keep_optimizer_last_n)"
        if problem is None:
            return path
        log(f"resume=auto: {path} is passed over: {problem}")
    if found:
        raise UserError(f"resume=auto: no checkpoint in {run_dir} can be resumed, see above; remove them to start anew")
    return None


def find_checkpoint(name: str, how: str = "fast") -> Path:
    """Return the checkpoint that `resume=name` means: itself, or the LATEST of a run's folder. Raise UserError."""
    path = checkpoint.newest(Path(name).expanduser())
    if not path.is_dir():
        raise UserError(f"resume={name}: there is no such folder; give auto, null, a run's folder or a step-<n> folder")
    if not (path / STATE_FILE).is_file() and not (path / checkpoint.MANIFEST).is_file():
        raise UserError(
            f"resume={name}: {path} holds no {STATE_FILE} and {TRAINING_STATE}/, so training cannot go on from it; to "
            "start a new run from its weights, set model.archive"
        )
    checkpoint.must_be_whole(path, f"resume={name}", how)
    must_have_states(path)
    return path


def must_have_states(folder: Path) -> None:
    """Raise UserError if a complete checkpoint holds weights only."""
    if checkpoint.weights_only(folder):
        raise UserError(
            f"{folder} holds weights only (save_weights_only, keep_optimizer_last_n), so training cannot be resumed "
            "from it. Resume from one with the optimizer's state, or start a new run from its weights: model.archive"
        )


def local_run_dir_is_given(config: Config) -> bool:
    """Return whether local_run_dir is the user's, not the default."""
    return config.local_run_dir != get_local_run_dir(config.exp_name, tuple(config.local_dirs))


def _runs_of(config: Config) -> list[Path]:
    """Return the folders of earlier runs of this exp_name (which may have parts: team/run1), newest first. Earlier
    versions kept runs in the folder that now is the default for caches."""
    *above, name = Path(config.exp_name).parts
    pattern = re.compile(re.escape(name) + r"_\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d(_\d+)?", re.ASCII)
    places = {Path(folder, *above) for folder in (get_local_dir(list(config.local_dirs)), default_cache())}
    found = [path for place in places if place.is_dir() for path in place.iterdir() if pattern.fullmatch(path.name)]
    return sorted((path for path in found if path.is_dir()), key=lambda path: path.name, reverse=True)


# Refuse changes ----------------------------------------------------------------------------------------------------


def check_settings(config: Config) -> None:
    """Log every key that differs from the checkpoint's run.

    Raise UserError for those that change what the run means, unless resume_allow_changes is true.
    """
    if config.checkpoint is None:
        return
    # A run at a constant learning rate may be made longer.
    longer = {"n_epochs", "n_examples"} if config.lr_schedule == "constant" else set()
    lines, meaningful = _changes(config, read_state(config.checkpoint), longer)
    harmless = [lines[key] for key in lines if key not in (*meaningful, "resume", "local_run_dir")]
    if harmless:
        log(f"resuming with other settings, of which none changes what an update computes: {', '.join(harmless)}")
    changed = ", ".join(lines[key] for key in meaningful)
    if changed and not config.resume_allow_changes:
        raise UserError(
            f"resume={config.resume} was trained with other settings: {changed}; train these anew under another "
            "exp_name, or go on with them all the same: resume_allow_changes=true"
        )
    if changed:
        log(f"resume_allow_changes=true: from here on {changed}")


def check_identity(config: Config, state: dict[str, Any], identity: dict[str, Any]) -> None:
    """Compare data and reference with those of the checkpoint's `state`. None in either is not compared.

    Raise UserError for a difference, unless resume_allow_changes is true.
    """
    for name, value in identity.items():
        if value is None or state.get(name) in (None, value):
            continue
        if not config.resume_allow_changes:
            raise UserError(
                f"resume={config.resume}: {name} has changed: the files it was read from (or the program) are others; "
                "give the same, or set resume_allow_changes=true"
            )
        log(f"resume_allow_changes=true: {name} has changed")


def is_finished(config: Config, data: PreferenceData) -> bool:
    """Return whether the run would resume in its own folder at its own end, with the same settings, data and start."""
    if config.checkpoint is None or not resumes_in_place(config):
        return False
    state = read_state(config.checkpoint)
    if not _at_its_end(state) or _changes(config, state)[1]:
        return False
    if config.do_final_eval and config.n_eval_examples and state["evaluated"] != state["examples"]:
        return False  # it was stopped just before
    start = weights_identity(config.model.start)
    other = weights_identity(config.reference.archive) if config.reference.archive else None
    same = state.get(checkpoint.START) == start and state.get(checkpoint.REFERENCE) == other
    return state["training data"] == data.identity and same


def _at_its_end(state: dict[str, Any]) -> bool:
    return state["examples"] >= state["total_examples"]


def _changes(
    config: Config, state: dict[str, Any], may_change: set[str] | None = None
) -> tuple[dict[str, str], list[str]]:
    """Return a line for each key that differs from the run of `state`, and the keys among them that change its meaning:
    those without the mark MayChange that are not in `may_change`."""
    free = set(keys(type(config), MayChange)) | (may_change or set())
    before, now = flat(state["config"]), flat(config.to_dict())
    # A key that did not exist in the checkpoint's version has not changed if it is off, or has a loss's neutral value.
    neutral = {f"loss.{key.name}": key.default for key in fields(config.loss)} | {"loss.kind": config.loss.kind}
    new = {key for key, value in now.items() if key not in before and (not value or value == neutral.get(key))}
    changed = sorted(key for key, value in now.items() if before.get(key) != value and key not in new)
    lines = {key: f"{key}={now.get(key)} (was {before.get(key)})" for key in changed}
    return lines, [key for key in lines if key not in free and key.partition(".")[0] not in free]


def flat(values: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Return {"loss": {"beta": 1}} as {"loss.beta": 1}."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return out


# Rewind the folder -------------------------------------------------------------------------------------------------


def resumes_in_place(config: Config) -> bool:
    """Return whether the run resumes in the folder that holds its checkpoint."""
    run_dir = Path(os.path.realpath(config.local_run_dir))
    return config.checkpoint is not None and config.checkpoint.parent == run_dir


def rewind(folder: Path) -> None:
    """Bring the run's folder back to what it was at the checkpoint `folder`: cut its metrics, rename later checkpoints
    to abandoned-<name>, point LATEST at the newest of the rest."""
    state, run_dir = read_state(folder), folder.parent
    for name in HISTORY:
        cut(run_dir / name, state["history"].get(name, 0))
    for path in checkpoints(run_dir):
        if examples_of(path) <= state["examples"]:
            break
        log(f"resuming from {folder.name}: {path.name} is called {set_aside(path).name} from here on")
    latest = run_dir / LATEST
    if folder == latest:  # the one checkpoint of a copy without links
        folder.rename(folder.with_name(f"step-{state['examples']}"))
    left = checkpoints(run_dir)
    if left:
        checkpoint.point(run_dir, LATEST, left[0].name)
    elif latest.is_symlink():
        latest.unlink()


def cut(path: Path, size: int) -> None:
    """Truncate to the last whole line within the first `size` bytes. Later lines are written again."""
    if not path.exists():
        return
    if path.stat().st_size < size:
        log(f"{path} has lost its end: it was {size} bytes long at the checkpoint")
    size = min(size, path.stat().st_size)
    if size:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            size = content.rfind(b"\n", 0, size) + 1
    os.truncate(path, size)
