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
import random
import re
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from huggingface_hub import split_torch_state_dict_into_shards, try_to_load_from_cache
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from dpo import parallel
from dpo.run import stopping
from dpo.utils import TakenOver, UserError, file_hash, log, redact, visible

T = TypeVar("T")
WeightFile = tuple[str, dict[str, Tensor] | str]
"""Name and content of a file of weights, or of their index."""
STATE_FILE = "trainer_state.json"
TRAINING_STATE = "training_state"
RANDOM_STATE = "random_state"
MANIFEST = "manifest.json"
BATCH_FILE = "batch.json"
START = "start content"  # in STATE_FILE: the weights_identity of what training started from
LATEST, BEST = "LATEST", "BEST"
DESCRIBED = ("config.json", "adapter_config.json")
READ_BY_NAME = (".safetensors", ".json", ".py", ".bin", ".model", ".jinja", ".txt")
ALWAYS_HASHED = 16 * 2**20  # bytes: files up to here are hashed even by the fast check
MAX_FILE_SIZE = "5GB"
SLOW_DISK = 100e6  # bytes a second
SHORT_HASH = functools.partial(hashlib.blake2b, digest_size=16)
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)  # names such as "state.lm_head.weight.exp_avg"
# One process needs no group to write its state.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


@dataclass(frozen=True)
class Archive:
    """Weights to start from: a model folder at `path`, or the `state` read from a policy.pt of the original code."""

    path: Path
    state: dict[str, Tensor] | None
    info: dict[str, Any]

    def describe(self) -> str:
        """What is known of the training that made it, for the log."""
        metrics, examples = self.info.get("metrics"), self.info.get("examples")
        loss = metrics.get("loss/eval") if isinstance(metrics, dict) else None
        known = [self.info["config"]["loss"]["name"]] if "config" in self.info else []
        known += [f"{examples} examples"] if _is_count(examples) and examples else []
        known += [f"loss/eval {loss:.5g}"] if _is_number(loss) else []
        return f" ({', '.join(known)})" if known else ""


def resolve_archive(name: str) -> Archive:
    """Open what `model.archive=name` means; see `find_archive`. Raises UserError naming what is wrong."""
    path = find_archive(name)
    if path.is_file():
        return _read_policy_pt(path)
    info = {}
    with contextlib.suppress(UserError):  # it is only described in the log
        info = read_state(path)
    return Archive(path, None, info)


def find_archive(name: str, how: str = "fast") -> Path:
    """The model folder or policy.pt that `model.archive=name` means: itself, or the LATEST of a run's folder.

    `<folder>/policy.pt` means `<folder>` where that holds a checkpoint of ours, so that commands of the original run
    unchanged. Raises UserError where there is none.
    """
    path = Path(name).expanduser()
    if path.suffix == ".pt" and path.is_file():
        return path
    if path.name == "policy.pt":
        path = path.parent
    path = _newest(path)
    if not path.exists():
        raise UserError(f"model.archive={name}: there is no such file or folder")
    if not (path / "config.json").is_file():
        raise UserError(
            f"model.archive={name}: {path} holds no config.json; expected a checkpoint folder (step-<n> or LATEST), a "
            "run's folder with a LATEST, or a policy.pt of the original code"
        )
    if not any(path.glob("*.safetensors")):
        raise UserError(f"model.archive={name}: {path} holds no weights (*.safetensors)")
    if (path / MANIFEST).exists():
        _must_be_whole(path, f"model.archive={name}", how)
    return path


class OtherWeights(UserError):
    """What stands under a name is not what stood there when the run began. Raised in all processes or in none."""


class Start:
    """The weights that training starts from: a model folder, a file or a hub's model. Their content, not their name,
    says which they are. It is taken when they are first read, and compared each time they are read again."""

    def __init__(self, name: str):
        self.name = name
        self.identity: str | None = None

    def read(self, load: Callable[[], T]) -> T:
        """Return what `load` makes of these weights. A collective.

        Raises OtherWeights if they are not those that were read first, or if they changed while they were read.
        """
        before = parallel.from_main(_file_states(self.name) if parallel.is_main() else None)
        if before or self.identity:  # else it may be a hub's model, which is not downloaded yet
            self._compare()
        loaded = load()
        after = parallel.from_main(_file_states(self.name) if parallel.is_main() else None)
        if before and after != before:
            raise OtherWeights(f"{self.name} was changed while it was read; wait for what writes to it")
        if not before:
            self._compare()
        return loaded

    def _compare(self) -> None:
        found = parallel.from_main(weights_identity(self.name) if parallel.is_main() else None)
        if self.identity not in (None, found):
            now = "has other content than when this run began" if found else "is gone since this run began"
            raise OtherWeights(f"{self.name} {now}")
        self.identity = found


def weights_identity(name: str) -> str | None:
    """A hash of all of `weights_files`, which tells these weights from any others under the same name; None: there are
    none, or they cannot be read."""
    try:
        files = weights_files(name)
        with ThreadPoolExecutor(4) as threads:
            hashes = list(threads.map(file_hash, files))
    except OSError:
        return None
    names = [file.name for file in files] if len(files) > 1 else [""]
    lines = "".join(f"{name} {digest}\n" for name, digest in zip(names, hashes))
    return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest() if lines else None


def weights_files(name: str) -> list[Path]:
    """The files that decide what a model computes: weights, configuration and code, in a folder or in the hub's cache.

    Not the optimizer's state, tokenizer or texts: a checkpoint that loses these is the same model.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return [path]
    if not path.is_dir():
        try:
            config = try_to_load_from_cache(name, "config.json")
        except ValueError:  # no name that a hub's model may have
            return []
        if not isinstance(config, str):
            return []
        path = Path(config).parent
    files = sorted(file for file in path.iterdir() if file.is_file())
    weights = [f for f in files if f.suffix == ".safetensors"] or [f for f in files if f.suffix == ".bin"]
    described = [f for f in files if f.name in DESCRIBED or f.name.endswith((".py", ".index.json"))]
    return weights and weights + described


def _file_states(name: str) -> list[tuple[str, int, int, int, int]]:
    """Of each of `weights_files`: path, inode, size and times of the last changes, by which a write shows."""
    with contextlib.suppress(OSError):
        found = [(str(file), file.stat()) for file in weights_files(name)]
        return [(path, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for path, s in found]
    return []


def _read_policy_pt(path: Path) -> Archive:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"model.archive={path} cannot be read as a file of tensors ({type(error).__name__}); it may be cut off, or "
            "hold objects other than weights, which are not opened for safety"
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("state"), dict):
        raise UserError(f"model.archive={path} is no policy.pt: it has no 'state' with weights")
    return Archive(path, content["state"], {"examples": content.get("step_idx"), "metrics": content.get("metrics")})


def find_checkpoint(name: str, how: str = "fast") -> Path:
    """The checkpoint that `resume=name` means: itself, or the LATEST of a run's folder. Raises UserError."""
    path = _newest(Path(name).expanduser())
    if not path.is_dir():
        raise UserError(f"resume={name}: there is no such folder; give auto, null, a run's folder or a step-<n> folder")
    if not (path / STATE_FILE).is_file() and not (path / MANIFEST).is_file():
        raise UserError(
            f"resume={name}: {path} holds no {STATE_FILE} and {TRAINING_STATE}/, so training cannot go on from it; to "
            "start a new run from its weights, set model.archive"
        )
    _must_be_whole(path, f"resume={name}", how)
    must_have_states(path)
    return path


def must_have_states(folder: Path) -> None:
    """Raise UserError if training cannot be resumed from a complete checkpoint."""
    if weights_only(folder):
        raise UserError(
            f"{folder} holds weights only (save_weights_only, keep_optimizer_last_n), so training cannot be resumed "
            "from it. Resume from one with the optimizer's state, or start a new run from its weights: model.archive"
        )


def _newest(path: Path) -> Path:
    """The newest checkpoint of a run's folder; any other path itself. LATEST counts if it names one of the folder's own
    checkpoints, or if there are none. A copy may have lost it, or have it as a folder or as a link to another run."""
    if path.name == LATEST and not path.exists():
        path = path.parent
    path = Path(os.path.realpath(path))
    own, latest = checkpoints(path), Path(os.path.realpath(path / LATEST))
    if latest in own or (not own and latest.is_dir()):
        return latest
    return own[0] if own else path


def checkpoints(run_dir: Path) -> list[Path]:
    """A run's checkpoints, those of the most examples first. Links are left out: they may lead to another run's."""
    folder = Path(os.path.realpath(run_dir))
    found = [path for path in folder.glob("step-*") if re.fullmatch("step-[0-9]+", path.name)]
    return sorted((p for p in found if p.is_dir() and not p.is_symlink()), key=examples_of, reverse=True)


def examples_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def read_state(folder: Path) -> dict[str, Any]:
    """What trainer_state.json says. Raises UserError if it is not what this program writes there."""
    path = folder / STATE_FILE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); take another checkpoint") from error
    wrong = _wrong_entry(state)
    if wrong:
        raise UserError(
            f"{path} is damaged, or of another version of this program: {visible(wrong)}; take another checkpoint"
        )
    return state


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_each(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Of a dictionary's values."""
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


def _are(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Of a list's values."""
    return lambda value: isinstance(value, list) and all(map(check, value))


# What entries of trainer_state.json have to be; a dot leads into a dictionary.
STATE_RULES: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("examples", "updates", "skipped", "skipped_in_a_row"), _is_count),
    **dict.fromkeys(("evaluated", "saved", "total_examples"), _is_count),
    "best": lambda best: isinstance(best, list) and len(best) == 2 and (best[1] is None or _is_number(best[1])),
    "metrics": _is_each(_is_number),
    "scaler": _is_each(_is_number),
    "history": _is_each(_is_count),
    "wandb_id": lambda name: name is None or _is_text(name),
    "command": _is_text,
    "config": lambda config: isinstance(config, dict),
    "config.model": lambda model: isinstance(model, dict),
    **dict.fromkeys(("config.device", "config.model.name_or_path", "config.model.policy_dtype"), _is_text),
    "config.model.archive": lambda name: name is None or _is_text(name),
    "config.loss": lambda loss: isinstance(loss, dict),
    "config.loss.name": lambda name: _is_text(name) and all(map(str.isidentifier, name.split("."))),
    "config.datasets": _are(_is_text),
}


# Entries that older states do not have.
OPTIONAL_RULES: dict[str, Callable[[Any], bool]] = {
    START: _is_text,
    "eval_examples": _is_count,
    "formats": _are(_is_text),
    "sources": _is_each(_are(_is_each(lambda value: _is_text(value) or _are(_is_text)(value)))),
}


def _wrong_entry(state: Any) -> str | None:
    """What is wrong with the first entry that breaks STATE_RULES or OPTIONAL_RULES."""
    if not isinstance(state, dict):
        return "it holds no object"
    for name, holds in STATE_RULES.items():
        value = state
        for key in name.split("."):
            if key not in value:
                return f"{name} is missing"
            value = value[key]
        if not holds(value):
            return f"{name} is {json.dumps(value)[:60]}"
    optional = [
        name for name, holds in OPTIONAL_RULES.items() if state.get(name) is not None and not holds(state[name])
    ]
    return f"{optional[0]} is {json.dumps(state[optional[0]])[:60]}" if optional else None


def check(folder: Path, how: str) -> str | None:
    """What is wrong with a checkpoint's files, by its manifest; None: nothing.

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
    """Name -> size and hash, by the manifest. Raises OSError, or ValueError if it is damaged."""
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
    """Whether a complete checkpoint is one for model.archive only: it has no states to resume training with."""
    return not _has_states(_listed(folder))


def prune(folder: Path) -> None:
    """Make a complete checkpoint one of weights only. At any moment of this it is complete, as one or the other."""
    files = _listed(folder)
    if _has_states(files):
        temporary = folder.with_name(f".{folder.name}-manifest")
        temporary.mkdir(exist_ok=True)
        (temporary / MANIFEST).write_text(_manifest({name: f for name, f in files.items() if not _is_state(name)}))
        _sync(temporary / MANIFEST)
        os.replace(temporary / MANIFEST, folder / MANIFEST)
        temporary.rmdir()
        _sync(folder)
    for name in (TRAINING_STATE, RANDOM_STATE):
        shutil.rmtree(folder / name, ignore_errors=True)


def _must_be_whole(path: Path, given: str, how: str) -> None:
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
    """What to raise for an error of `CheckpointWriter._together`."""
    return NoSpace(message) if isinstance(error, _DiskFull) else UserError(message)


def _is_disk_full(error: BaseException) -> bool:
    """safetensors and torch report a full disk with exception types of their own, in the system's words."""
    codes = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, _DiskFull) or (isinstance(error, OSError) and error.errno in codes):
        return True
    return any(re.search(rf"\(os error {code}\)|{os.strerror(code)}", str(error)) for code in codes)


class CheckpointWriter:
    """Writes a run's checkpoints, at most one at a time; in the `background`, training waits for a copy in host memory.

    Of those in the run's folder, the newest `keep_last` are kept (None: all), and those that LATEST and BEST name; all
    but the newest `keep_states` (None: all) lose what only resuming needs. `files` are names and contents of what else
    each has.
    `check` raises TakenOver if the folder is another process's by now; nothing in it is then changed.
    """

    def __init__(
        self,
        run_dir: Path,
        background: bool = False,
        keep_last: int | None = None,
        keep_states: int | None = None,
        files: Mapping[str, bytes] | None = None,
        check: Callable[[], None] = lambda: None,
    ):
        self.run_dir, self.background, self.keep_last, self.keep_states = run_dir, background, keep_last, keep_states
        self.check = check
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
        weights came about; see `_card`. `batch` is what batch.json says, where there is to be one. Without an optimizer
        it is a checkpoint of weights only.

        A collective: every process writes its part. Raises UserError, in all processes, if it cannot be written, or the
        one before could not be: NoSpace if the disk is full. Checkpoints written before stay as they are.
        """
        try:
            self.wait()
        except NoSpace as error:
            log(f"warning: {error}")
        described, begin = self._begun(model, tokenizer, state, optimizer, batch)
        target = self.run_dir / (name or f"step-{described['examples']}")
        links = [] if name else [BEST, LATEST] if is_best else [LATEST]
        work = (target, links, begin, _tensor_writer(model, optimizer, self.background, self._group))
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
        """Write all that a checkpoint will hold into a folder, and remove it, so that what prevents one shows before
        training. An optimizer without a state gets one for this. A collective; raises as `save` does."""
        folder = self.run_dir / ".step-trial"
        fresh = optimizer is not None and not optimizer.state
        try:
            _, begin = self._begun(model, tokenizer, state, optimizer, None)
            self._together(lambda: shutil.rmtree(folder, ignore_errors=True), parallel.is_main())  # of a killed run
            self._together(lambda: begin(folder), parallel.is_main())
            self._together(lambda: _tensor_writer(model, optimizer, False, self._group, made_up=True)(folder))
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
        """What trainer_state.json will say, and what makes a checkpoint's folder with all its texts."""
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
        """How long writing a checkpoint takes: as the last one did, or a slow disk would take."""
        return self._seconds if self._seconds is not None else _needed_bytes(model, optimizer) / SLOW_DISK

    def close(self) -> None:
        """End the thread; what it was writing, if that failed, is not there."""
        with contextlib.suppress(UserError):
            self.wait()
        self._thread.shutdown()

    def wait(self) -> None:
        """Until nothing is written any more. Raises UserError where that failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(
        self, target: Path, links: list[str], begin: Callable[[Path], None], write_tensors: Callable[[Path], None]
    ) -> None:
        start, folder = time.monotonic(), target.with_name(f".{target.name}-new")

        def look() -> dict[str, list[Any]]:
            names = _names(folder)[parallel.rank() :: parallel.world_size()]
            return {name: [os.path.getsize(folder / name), file_hash(folder / name, SHORT_HASH)] for name in names}

        def finish() -> None:
            self.check()
            (folder / MANIFEST).write_text(_manifest(files), encoding="utf-8")
            for file in [*folder.rglob("*"), folder]:
                _sync(file)
            _put_in_place(folder, target)
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
        """Run `action` where `here`: what it gave in each process. Raises OSError in all if it failed in any, _DiskFull
        if that is all that failed."""
        result: T | None = None
        message: str | None = None
        full = True
        try:
            result = action() if here else None
        except (Exception, CheckpointException) as error:
            stopping.at_once()
            message, full = f"{type(error).__name__}: {error}", _is_disk_full(error)
        results, messages, fulls = zip(*parallel.gather((result, message, full), self._group))
        # One that is not for want of space says more.
        failed = sorted((full, message) for message, full in zip(messages, fulls) if message)
        if failed:
            raise (_DiskFull if all(fulls) else OSError)(failed[0][1].strip().splitlines()[-1])
        return list(results)

    def _prune(self) -> None:
        if self.keep_states is None:
            return
        for path in checkpoints(self.run_dir)[self.keep_states :]:
            with contextlib.suppress(OSError, ValueError):  # it is damaged, or the disk is full: it stays as it is
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


def _put_in_place(temporary: Path, target: Path) -> None:
    """Rename; a checkpoint of that name from before, of steps that were made again, makes way."""
    old = target.with_name(f".{target.name}-old")
    if target.is_symlink() or target.is_file():
        set_aside(target)
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    temporary.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _configs(model: PreTrainedModel) -> list[Any]:
    """Copies of the model's configurations, as a checkpoint has them."""
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
    (folder / "README.md").write_text(visible(redact(_card(state))), encoding="utf-8")
    (folder / STATE_FILE).write_text(redact(json.dumps(state, indent=2)), encoding="utf-8")


def _tensor_writer(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer | None, copied: bool, group: Any, made_up: bool = False
) -> Callable[[Path], None]:
    """What writes this process's part of weights and, with an optimizer, of states (its own and of the random
    generators): from where they are, or, `copied`, from a copy in host memory that is made now. An optimizer without a
    state has none written, or, `made_up`, the one that torch makes up with a step at lr 0."""
    random_state = _random_state()
    tensors: Any = {}
    if optimizer is not None and (optimizer.state or made_up):
        tensors = _contiguous_tensors(get_optimizer_state_dict(model, optimizer, options=FLAT))
    files: Iterable[WeightFile] = weight_files(model)
    if copied:
        tensors = tensors and DefaultStager(StagingOptions(False, False, False, False)).stage(tensors)
        files = [(file, _clones(content)) for file, content in files]

    def write(folder: Path) -> None:
        if optimizer is not None:
            (folder / RANDOM_STATE).mkdir(exist_ok=True)
            (folder / RANDOM_STATE / f"{parallel.rank()}.json").write_text(random_state, encoding="utf-8")
        if tensors:
            writer = HuggingFaceStorageWriter(str(folder / TRAINING_STATE), save_distributed=True)
            dcp.save(tensors, storage_writer=writer, process_group=group, no_dist=not parallel.active())
        _write_weights(files, folder)

    return write


def _clones(content: dict[str, Tensor] | str) -> dict[str, Tensor] | str:
    return content if isinstance(content, str) else {name: tensor.clone() for name, tensor in content.items()}


def _random_state() -> str:
    """The state of this process's random generators, as JSON."""
    states = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }
    return json.dumps(states, default=lambda numbers: numbers.tolist())


def load_random_state(folder: Path) -> None:
    """Give the random generators the state that a checkpoint has for a process of this number, if it has one."""
    path = folder / RANDOM_STATE / f"{parallel.rank()}.json"
    if not path.exists():
        return
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        version, numbers, gauss = state["python"]
        random.setstate((version, tuple(numbers), gauss))
        np.random.set_state(state["numpy"])
        torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
        if state["cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state(torch.tensor(state["cuda"], dtype=torch.uint8))
    except (ValueError, TypeError, KeyError, OverflowError, RuntimeError) as error:
        raise UserError(f"{path} holds no states of random generators ({error}); take another checkpoint") from error


def load_optimizer(folder: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
    """Fill the optimizer's state from a checkpoint, written by any number of processes: of exactly the parameters that
    have a state there, as one that never had a gradient has none. Settings stay. Raises UserError if it does not fit.
    """
    if not (folder / TRAINING_STATE).is_dir():  # there was none yet
        return
    state: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=FLAT)  # of all: torch makes it up
    parameters = dict(model.named_parameters())

    def owner(key: str) -> str:
        name = key.removeprefix("state.")
        while name and name not in parameters:
            name = name.rpartition(".")[0]
        return name

    reader = HuggingFaceStorageReader(str(folder / TRAINING_STATE))
    try:
        saved = {owner(key) for key in reader.read_metadata().state_dict_metadata}
        tensors = {key: value for key, value in _contiguous_tensors(state).items() if owner(key) in saved}
        dcp.load(tensors, storage_reader=reader, no_dist=not parallel.active())
    except (Exception, CheckpointException) as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"resume={folder}: its optimizer state does not fit this run's optimizer: {reason}") from error
    state |= {name: parallel.as_sharded(tensor, state[name]) for name, tensor in tensors.items()}
    set_optimizer_state_dict(model, optimizer, state, options=FLAT)
    for name, parameter in parameters.items():
        if name not in saved:
            optimizer.state.pop(parameter, None)


def _contiguous_tensors(state: dict[str, Any]) -> dict[str, Any]:
    return {name: parallel.contiguous(value) for name, value in state.items() if isinstance(value, Tensor)}


def _write_weights(files: Iterable[WeightFile], folder: Path) -> None:
    failure: Exception | None = None
    for file, content in files:
        try:
            if isinstance(content, str):
                (folder / file).write_text(content, encoding="utf-8")
            else:
                save_file(content, folder / file, {"format": "pt"})
        except Exception as error:  # the other processes still need this one for their files
            failure = failure or error
        del content
    if failure is not None:
        raise failure


def weight_files(model: PreTrainedModel) -> Iterator[WeightFile]:
    """The files that `model.save_pretrained` of the whole model writes, byte for byte, one after the other.

    A collective: process i has the files i, i + n, ... of n processes.
    """
    left_out = {*(model.all_tied_weights_keys or {}), *(model._keys_to_ignore_on_save or ())}
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in left_out}
    # Some models are saved under other names than they have in memory; few, under a mixture of their tensors.
    empty = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    names = {id(tensor): name for name, tensor in empty.items()}
    saved = revert_weight_conversion(model, dict(empty))
    if all(id(tensor) in names for tensor in saved.values()):
        named = {name: tensors[names[id(tensor)]] for name, tensor in saved.items()}
        yield from _split(model, named, parallel.rank(), parallel.world_size())
        return
    whole = {}
    for name, tensor in tensors.items():
        gathered = parallel.full(tensor)
        if parallel.is_main():
            whole[name] = gathered.cpu()
    if parallel.is_main():
        yield from _split(model, revert_weight_conversion(model, whole), 0, 1)


def _split(model: PreTrainedModel, tensors: dict[str, Tensor], rank: int, n: int) -> Iterator[WeightFile]:
    """Files of up to MAX_FILE_SIZE: those whose turn is `rank`'s of `n`."""
    shapes = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in tensors.items()}
    split = split_torch_state_dict_into_shards(
        shapes, filename_pattern="model{suffix}.safetensors", max_shard_size=MAX_FILE_SIZE
    )
    for turn, (file, names) in enumerate(split.filename_to_tensors.items()):
        content = {}
        for name in names:
            tensor = parallel.full(tensors[name])
            if turn % n == rank:
                content[name] = tensor.detach().cpu().contiguous()
        if content:
            yield file, content
    if split.is_sharded and rank == 0:
        total = {"total_parameters": model.num_parameters(), **split.metadata}
        index = {"metadata": total, "weight_map": split.tensor_to_filename}
        yield "model.safetensors.index.json", json.dumps(index, indent=2, sort_keys=True) + "\n"


def _needed_bytes(model: PreTrainedModel, optimizer: torch.optim.Optimizer | None) -> int:
    states = optimizer.state.values() if optimizer is not None else ()
    values = [*model.parameters(), *(value for state in states for value in state.values())]
    return sum(t.numel() * t.element_size() for t in values if isinstance(t, Tensor)) + 16 * 2**20


def _space_problem(run_dir: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer | None) -> str | None:
    needed = _needed_bytes(model, optimizer)
    free = shutil.disk_usage(run_dir).free
    return f"it needs {needed / 2**30:.2f} GiB and the disk has {free / 2**30:.2f} GiB free" if free < needed else None


def set_aside(path: Path) -> Path:
    """Rename to abandoned-<name>, over an earlier one. Of a link the link itself: it may lead to another run."""
    aside = path.with_name(f"abandoned-{path.name}")
    if aside.is_symlink() or aside.is_file():
        aside.unlink()
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    return aside


def point(run_dir: Path, link: str, name: str) -> None:
    """Make `link` a link to `name`. A folder or file of that name, as in a copy without links, is set aside."""
    if (run_dir / link).exists() and not (run_dir / link).is_symlink():
        log(f"{run_dir / link} is no link: it is called {set_aside(run_dir / link).name} from here on")
    temporary = run_dir / f".{link}-{os.getpid()}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(name)
    os.replace(temporary, run_dir / link)
    _sync(run_dir)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _card(state: dict[str, Any]) -> str:
    """A model card (Markdown with the hub's front matter) from a checkpoint's state."""
    n = f", n = {state['eval_examples']}" if state.get("eval_examples") else ""
    metrics = "\n".join(f"| {name} | {value:.5g} |" for name, value in state["metrics"].items())
    config = state["config"]
    model, name = config["model"], config["loss"]["name"]
    loss = ", ".join(f"{key} {value}" for key, value in config["loss"].items() if key != "name" and value is not None)
    start = f"`{model['name_or_path']}`" + (f", from the weights of `{model['archive']}`" if model["archive"] else "")
    return f"""---
library_name: transformers
tags: [{name}]
---
# {Path(model["name_or_path"]).name} after {name}

- base model: {start}
- data: {", ".join(f"`{data}`" for data in config["datasets"])}, seed {config["seed"]}
- loss: {name}{f" ({loss})" if loss else ""}
- trained for {state["examples"]} examples in {state["updates"]} updates
- command: `{state["command"]}`

| held-out metric{n} | value |
|---|---|
{metrics or "| none measured | |"}
"""
