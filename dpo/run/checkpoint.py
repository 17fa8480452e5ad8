"""Write, find and check checkpoints. A checkpoint is a Hugging Face model folder plus `trainer_state.json`, the
optimizer's state in `training_state/`, random generators' in `random_state/` and, written last, a manifest of sizes and
hashes. It appears under its final name only when every file is complete."""

import contextlib
import copy
import errno
import functools
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch.distributed.checkpoint import CheckpointException
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpo import parallel
from dpo.files import atomic_link, atomic_write, replace_folder, set_aside, sync
from dpo.model import adapters
from dpo.run.card import card
from dpo.run.tensors import RANDOM_STATE, TRAINING_STATE, needed_bytes, tensor_writer
from dpo.utils import TakenOver, UserError, file_hash, log, redact, visible

T = TypeVar("T")
STATE_FILE = "trainer_state.json"
MANIFEST = "manifest.json"
BATCH_FILE = "batch.json"
REFERENCE = "reference content"  # in STATE_FILE: the weights_identity of reference.archive
START = "start content"  # in STATE_FILE: the weights_identity of what training started from
LATEST, BEST = "LATEST", "BEST"
READ_BY_NAME = (".safetensors", ".json", ".py", ".bin", ".model", ".jinja", ".txt")
ALWAYS_HASHED = 16 * 2**20  # bytes: files up to here are hashed even by the fast check
SLOW_DISK = 100e6  # bytes a second
SHORT_HASH = functools.partial(hashlib.blake2b, digest_size=16)


def newest(path: Path) -> Path:
    """Return the newest checkpoint of a run's folder; any other path itself.

    LATEST counts if it names one of the folder's own checkpoints, or if there are none. In a copy, LATEST may be lost,
    a folder, or a link to another run.
    """
    if path.name == LATEST and not path.exists():
        path = path.parent
    path = Path(os.path.realpath(path))
    own, latest = checkpoints(path), Path(os.path.realpath(path / LATEST))
    if latest in own or (not own and latest.is_dir()):
        return latest
    return own[0] if own else path


def checkpoints(run_dir: Path) -> list[Path]:
    """Return a run's checkpoints, most examples first. Links are left out: they may lead to another run."""
    folder = Path(os.path.realpath(run_dir))
    found = [path for path in folder.glob("step-*") if re.fullmatch("step-[0-9]+", path.name)]
    return sorted((p for p in found if p.is_dir() and not p.is_symlink()), key=examples_of, reverse=True)


def examples_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, protected_namespaces=())


class _Model(_Strict):
    name_or_path: str
    policy_dtype: str
    archive: str | None


Name = Annotated[str, Field(pattern=r"^[^\W\d]\w*(\.[^\W\d]\w*)*$")]  # an identifier, or a dotted path of them


class _Loss(_Strict):
    name: Name
    kind: Name | None = None


class _Config(_Strict):
    model: _Model
    loss: _Loss
    device: str
    datasets: list[str]


Count = Annotated[int, Field(ge=0, lt=2**63)]


class _State(_Strict):
    """The entries of trainer_state.json that the program relies on. Those with a default may be missing."""

    examples: Count
    updates: Count
    skipped: Count
    skipped_in_a_row: Count
    evaluated: Count
    saved: Count
    total_examples: Count
    best: Annotated[tuple[Any, float | None], Field(strict=False)]  # JSON has no tuples
    metrics: dict[str, float]
    scaler: dict[str, float]
    history: dict[str, Count]
    wandb_id: str | None
    command: str
    config: _Config
    start: Annotated[str | None, Field(alias=START)] = None
    reference_start: Annotated[str | None, Field(alias=REFERENCE)] = None
    loss: str | None = None
    loss_state: dict[str, float] | None = None
    metric_sizes: dict[str, Count] | None = None
    formats: list[str] | None = None
    sources: dict[str, list[dict[str, str | list[str]]]] | None = None


def read_state(folder: Path) -> dict[str, Any]:
    """Return the content of trainer_state.json. Raise UserError if it is not of this program's form."""
    path = folder / STATE_FILE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        _State.model_validate(state)
        return state
    except ValidationError as error:
        wrong = error.errors(include_url=False, include_context=False)[0]
        name, value = ".".join(map(str, wrong["loc"])), json.dumps(wrong["input"], default=str)[:60]
        problem = f"{name} is {value}: {wrong['msg']}"
        raise UserError(
            f"{path} is damaged, or of another version of this program: {visible(problem)}; take another checkpoint"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); take another checkpoint") from error


def check(folder: Path, how: str) -> str | None:
    """Return what is wrong with a checkpoint's files, by its manifest, or None.

    `fast` compares all sizes, and the content of small files, and looks for further files of the kinds that loaders
    find by their names; `full` compares the content of all, and looks for any further file.
    """
    try:
        files = _listed(folder)
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError):
        return f"{MANIFEST} is damaged"
    for name, (size, digest) in files.items():
        file = folder / name
        if not file.resolve().is_relative_to(folder.resolve()):
            return f"{MANIFEST} names {name}, which is outside"
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
        if (how == "full" or size <= ALWAYS_HASHED) and file_hash(file, SHORT_HASH) != digest:
            return f"{name} has been altered"
    unknown = set(_names(folder)) - {*files, MANIFEST}
    if not _has_states(files):  # what `prune` could not remove any more
        unknown = {name for name in unknown if not _is_state(name)}
    more = sorted(name for name in unknown if how == "full" or name.endswith(READ_BY_NAME))
    return f"{more[0]} is not in {MANIFEST}" if more else None


def _listed(folder: Path) -> dict[str, tuple[int, str]]:
    """Return name -> (size, hash) of the manifest. Raise OSError, or ValueError if it is damaged."""
    text = (folder / MANIFEST).read_text(encoding="utf-8")
    try:
        files = {str(name): (int(size), str(digest)) for name, (size, digest) in json.loads(text)["files"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError from error
    if text != _manifest(files):
        raise ValueError
    return files


def _is_state(name: str) -> bool:
    return name.startswith((f"{TRAINING_STATE}/", f"{RANDOM_STATE}/"))


def _has_states(files: Iterable[str]) -> bool:
    return any(map(_is_state, files))


def weights_only(folder: Path) -> bool:
    """Return whether a complete checkpoint has no states to resume training with."""
    return not _has_states(_listed(folder))


def prune(folder: Path) -> None:
    """Remove the states of a complete checkpoint. It is complete at any moment, with states or as weights only."""
    files = _listed(folder)
    if _has_states(files):
        left = {name: file for name, file in files.items() if not _is_state(name)}
        atomic_write(folder / MANIFEST, _manifest(left), folder.with_name(f".{folder.name}-manifest"))
    for name in (TRAINING_STATE, RANDOM_STATE):
        shutil.rmtree(folder / name, ignore_errors=True)


def must_be_whole(path: Path, given: str, how: str) -> None:
    problem = check(path, how)
    if problem is None:
        return
    others = checkpoints(path.parent)
    older = others[others.index(path) + 1 :] if path in others else []
    whole = next((p for p in older if check(p, how) is None), None)
    raise UserError(
        f"{given}: the checkpoint {path} is damaged: {problem}; "
        + (f"the next older complete one is {whole}" if whole else "there is no older complete one")
    )


def _manifest(files: Mapping[str, Sequence[Any]]) -> str:
    listed = json.dumps(files, indent=1, sort_keys=True)
    digest = SHORT_HASH(listed.encode()).hexdigest()
    return json.dumps({"digest": digest, "files": files}, indent=1, sort_keys=True) + "\n"


def _names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


class NoSpace(UserError):
    """A checkpoint could not be written for want of space on the disk: the only failure that may pass by itself."""


class _DiskFull(OSError):
    pass


def _failure(error: OSError, message: str) -> UserError:
    """Return the exception to raise for an error of `CheckpointWriter._together`."""
    return NoSpace(message) if isinstance(error, _DiskFull) else UserError(message)


def _is_disk_full(error: BaseException) -> bool:
    """Return whether the disk is full. safetensors and torch report that with exceptions of their own, in the
    system's words."""
    codes = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, _DiskFull) or (isinstance(error, OSError) and error.errno in codes):
        return True
    return any(re.search(rf"\(os error {code}\)|{os.strerror(code)}", str(error)) for code in codes)


class CheckpointWriter:
    """Writes a run's checkpoints, at most one at a time; in the `background`, training waits for a copy in host memory.

    In the run's folder the newest `keep_last` stay (None: all), and those that LATEST and BEST name; all
    but the newest `keep_states` (None: all) lose what only resuming needs. `files` are names and contents of what else
    each has.
    `check` raises TakenOver if the folder is another process's by now; nothing in it is then changed. `stop_at_once`
    raises KeyboardInterrupt if a second signal came: libraries may have made another exception of it.
    """

    def __init__(
        self,
        run_dir: Path,
        background: bool = False,
        keep_last: int | None = None,
        keep_states: int | None = None,
        files: Mapping[str, bytes] | None = None,
        check: Callable[[], None] = lambda: None,
        stop_at_once: Callable[[], None] = lambda: None,
    ):
        self.run_dir, self.background, self.keep_last, self.keep_states = run_dir, background, keep_last, keep_states
        self.check, self.stop_at_once = check, stop_at_once
        self.files = files or {}
        self._group = parallel.side_group() if background else None
        self._thread = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None
        self._seconds: float | None = None

    def save(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        state: Callable[[], dict[str, Any]],
        optimizer: torch.optim.Optimizer | None = None,
        is_best: bool = False,
        name: str | None = None,
        batch: str | None = None,
    ) -> None:
        """Write `<run folder>/<name>`, by default step-<examples>, which LATEST then names. `state` says how the
        weights came about; see `card`. `batch` is the text of batch.json, if there is to be one. Without an optimizer
        it is a checkpoint of weights only.

        A collective: every process writes its part. Raise UserError in all processes if this checkpoint or the pending
        one cannot be written: NoSpace if the disk is full. Checkpoints written before stay as they are.
        """
        try:
            self.wait()
        except NoSpace as error:
            log(f"warning: {error}")
        described, begin = self._begun(model, tokenizer, state, optimizer, batch)
        target = self.run_dir / (name or f"step-{described['examples']}")
        links = [] if name else [BEST, LATEST] if is_best else [LATEST]
        work = (target, links, begin, tensor_writer(model, optimizer, self.background, self._group))
        if self.background:
            self._pending = self._thread.submit(self._write, *work)
        else:
            self._write(*work)

    def try_out(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        state: Callable[[], dict[str, Any]],
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        """Write a whole checkpoint and remove it, so that an error shows before training.

        An optimizer without a state gets one for this. A collective; raises as `save` does.
        """
        folder = self.run_dir / ".step-trial"
        fresh = optimizer is not None and not optimizer.state
        try:
            _, begin = self._begun(model, tokenizer, state, optimizer, None)
            self._together(lambda: shutil.rmtree(folder, ignore_errors=True), parallel.is_main())  # of a killed run
            self._together(lambda: begin(folder), parallel.is_main())
            self._together(lambda: tensor_writer(model, optimizer, False, self._group, made_up=True)(folder))
        except OSError as error:
            raise _failure(error, f"no checkpoint can be written to {self.run_dir}: {error}") from error
        finally:
            if optimizer is not None and fresh:
                optimizer.state.clear()
                optimizer.zero_grad(set_to_none=True)
            if parallel.is_main():
                shutil.rmtree(folder, ignore_errors=True)

    def _begun(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        state: Callable[[], dict[str, Any]],
        optimizer: torch.optim.Optimizer | None,
        batch: str | None,
    ) -> tuple[dict[str, Any], Callable[[Path], None]]:
        """Return the content of trainer_state.json, and a function that creates a folder with all texts."""
        try:
            described: Any = self._together(state, parallel.is_main())[0]
        except OSError as error:
            raise _failure(error, f"no checkpoint can be written to {self.run_dir}: {error}") from error
        space = _space_problem(self.run_dir, model, optimizer)
        configs = _configs(model)  # now: from another thread the model is not looked at while it computes

        def begin(folder: Path) -> None:
            if space:
                raise _DiskFull(space)
            folder.mkdir()
            _write_texts(folder, configs, tokenizer, described)
            for file, content in self.files.items():
                (folder / file).parent.mkdir(exist_ok=True)
                (folder / file).write_bytes(content)
            if batch is not None:
                (folder / BATCH_FILE).write_text(batch, encoding="utf-8")

        return described, begin

    def seconds(self, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> float:
        """Return the seconds that the last checkpoint took; before the first, those of a slow disk."""
        return self._seconds if self._seconds is not None else needed_bytes(model, optimizer) / SLOW_DISK

    def close(self) -> None:
        """Wait for the pending write, ignoring its failure, and end the thread."""
        with contextlib.suppress(UserError):
            self.wait()
        self._thread.shutdown()

    def wait(self) -> None:
        """Wait for the pending write. Raise UserError if it failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(
        self, target: Path, links: list[str], begin: Callable[[Path], None], write_tensors: Callable[[Path], None]
    ) -> None:
        start, folder = time.monotonic(), target.with_name(f".{target.name}-new")

        def look() -> dict[str, list[Any]]:
            names = _names(folder)[parallel.rank() :: parallel.world_size()]
            for name in names:  # each rank some; `finish` then finds little left to wait for
                sync(folder / name)
            return {name: [os.path.getsize(folder / name), file_hash(folder / name, SHORT_HASH)] for name in names}

        def finish() -> None:
            self.check()
            (folder / MANIFEST).write_text(_manifest(files), encoding="utf-8")
            for file in [*folder.rglob("*"), folder]:
                sync(file)
            replace_folder(folder, target)
            for link in links:
                point(self.run_dir, link, target.name)
            self._forget()
            self._prune()
            log(f"checkpoint: {target}")

        try:
            self._together(lambda: begin(folder), parallel.is_main())
            self._together(lambda: write_tensors(folder))
            files = {name: found for share in self._together(look) for name, found in (share or {}).items()}
            self._together(finish, parallel.is_main())
            self._seconds = time.monotonic() - start
        except OSError as error:
            previous = (self.run_dir / LATEST).resolve() if (self.run_dir / LATEST).is_dir() else None
            kept = f"the last complete checkpoint is {previous}" if previous else "there is no earlier checkpoint"
            raise _failure(error, f"the checkpoint {target} could not be written: {error}; {kept}") from error
        finally:
            if parallel.is_main() and folder.exists() and not isinstance(sys.exception(), TakenOver):
                self.check()
                shutil.rmtree(folder, ignore_errors=True)

    def _together(self, action: Callable[[], T], here: bool = True) -> list[T | None]:
        """Run `action` in the processes that have `here`, and return all results, by rank.

        If it failed in any process, raise in all: _DiskFull if every failure was a full disk, otherwise OSError.
        """
        result: T | None = None
        message: str | None = None
        full = True
        try:
            result = action() if here else None
        except (Exception, CheckpointException) as error:
            self.stop_at_once()
            message, full = f"{type(error).__name__}: {error}", _is_disk_full(error)
        results, messages, fulls = zip(*parallel.gather((result, message, full), self._group))
        # Prefer a failure other than a full disk: it says more.
        failed = sorted((full, message) for message, full in zip(messages, fulls) if message)
        if failed:
            raise (_DiskFull if all(fulls) else OSError)(failed[0][1].strip().splitlines()[-1])
        return list(results)

    def _prune(self) -> None:
        if self.keep_states is None:
            return
        for path in checkpoints(self.run_dir)[self.keep_states :]:
            with contextlib.suppress(OSError, ValueError):  # damaged, or the disk is full: leave it
                if path.parent == self.run_dir.resolve():  # else a link to another run's
                    prune(path)

    def _forget(self) -> None:
        if self.keep_last is None:
            return
        named = {Path(os.path.realpath(self.run_dir / link)) for link in (LATEST, BEST)}
        for path in checkpoints(self.run_dir)[self.keep_last :]:
            if path not in named:
                gone = path.with_name(f".{path.name}-gone")
                path.rename(gone)  # at once: half of a checkpoint must not have its name
                shutil.rmtree(gone, ignore_errors=True)


def _configs(model: PreTrainedModel) -> list[Any]:
    """Return copies of the model's configurations, as save_pretrained writes them; an adapter's, if there is one."""
    if adapters.config_of(model) is not None:
        return [adapters.saved_config(model)]
    config = copy.deepcopy(model.config)
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__.removeprefix("FSDP")]
    return [config, copy.deepcopy(model.generation_config)] if model.can_generate() else [config]


def _write_texts(
    folder: Path, configs: Iterable[Any], tokenizer: PreTrainedTokenizerBase, state: dict[str, Any]
) -> None:
    for config in configs:
        config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(card(state), encoding="utf-8")
    (folder / STATE_FILE).write_text(redact(json.dumps(state, indent=2)), encoding="utf-8")


def _space_problem(run_dir: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer | None) -> str | None:
    needed = needed_bytes(model, optimizer)
    free = shutil.disk_usage(run_dir).free
    return f"it needs {needed / 2**30:.2f} GiB and the disk has {free / 2**30:.2f} GiB free" if free < needed else None


def point(run_dir: Path, link: str, name: str) -> None:
    """Make LATEST or BEST lead to `name`. A folder of that name, as in a copy without links, is set aside."""
    if (run_dir / link).exists() and not (run_dir / link).is_symlink():
        log(f"{run_dir / link} is no link: it is called {set_aside(run_dir / link).name} from here on")
    atomic_link(run_dir / link, name)
