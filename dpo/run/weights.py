"""The weights that training starts from: find them, and tell whether they have changed."""

import contextlib
import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor

from dpo import parallel
from dpo.model.adapters import CONFIG_FILE
from dpo.run.checkpoint import MANIFEST, must_be_whole, newest, read_state
from dpo.utils import UserError, file_hash

T = TypeVar("T")
DESCRIBED = ("config.json", CONFIG_FILE)


@dataclass(frozen=True)
class Archive:
    """Weights to start from: a model folder at `path`, or the `state` read from a policy.pt of the original code."""

    path: Path
    state: dict[str, Tensor] | None
    info: dict[str, Any]

    def describe(self) -> str:
        """Return what is known of the training that made it, for the log."""
        metrics, examples = self.info.get("metrics"), self.info.get("examples")
        loss = metrics.get("loss/eval") if isinstance(metrics, dict) else None
        known = [self.info["config"]["loss"]["name"]] if "config" in self.info else []
        known += [f"{examples} examples"] if isinstance(examples, int) and examples else []
        known += [f"loss/eval {loss:.5g}"] if isinstance(loss, int | float) else []
        return f" ({', '.join(known)})" if known else ""


def resolve_archive(name: str) -> Archive:
    """Open what `model.archive=name` means; see `find_archive`. Raise UserError if it cannot be used."""
    path = find_archive(name)
    if path.is_file():
        return _read_policy_pt(path)
    info = {}
    with contextlib.suppress(UserError):  # it is only described in the log
        info = read_state(path)
    return Archive(path, None, info)


def find_archive(name: str, how: str = "fast", key: str = "model.archive") -> Path:
    """Return the model folder or policy.pt that `key`=`name` means: itself, or the LATEST of a run's folder.

    `<folder>/policy.pt` means `<folder>` if that holds a checkpoint of this program, so that commands of the original
    run unchanged. Raise UserError if there is none.
    """
    path = Path(name).expanduser()
    if path.suffix == ".pt" and path.is_file():
        return path
    if path.name == "policy.pt":
        path = path.parent
    path = newest(path)
    if not path.exists():
        raise UserError(f"{key}={name}: there is no such file or folder")
    if not any((path / file).is_file() for file in DESCRIBED):
        raise UserError(
            f"{key}={name}: {path} holds no config.json or {CONFIG_FILE}; expected a checkpoint folder (step-<n> or "
            "LATEST), a run's folder with a LATEST, a PEFT adapter, or a policy.pt of the original code"
        )
    if not any(path.glob("*.safetensors")):
        pickles = sorted(file.name for file in path.glob("*.bin"))
        advice = f", but {pickles[0]}, which could run a program when it is opened; convert it" if pickles else ""
        raise UserError(f"{key}={name}: {path} holds no weights (*.safetensors){advice}")
    if (path / MANIFEST).exists():
        must_be_whole(path, f"{key}={name}", how)
    return path


def base_of(folder: str | Path) -> str | None:
    """Return the model that the adapter in `folder` lies on, as its own file names it; None if it holds no adapter.

    Raise UserError if it names none.
    """
    file = Path(folder).expanduser() / CONFIG_FILE
    if not file.is_file():
        return None
    try:
        name = dict(json.loads(file.read_text(encoding="utf-8"))).get("base_model_name_or_path")
        if isinstance(name, str) and name:
            return name
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({type(error).__name__}: {error})") from error
    raise UserError(f"{file} names no base_model_name_or_path; write there which model the adapter is for")


class OtherWeights(UserError):
    """The weights under a name have changed since the run began. Raised in all processes or in none."""


class Start:
    """The weights that training starts from: a model folder, a file or a hub's model. They are identified by
    their content, not their name. It is hashed at the first read, and compared at each later read."""

    def __init__(self, name: str):
        self.name = name
        self.identity: str | None = None

    def read(self, load: Callable[[], T]) -> T:
        """Return what `load` makes of these weights. A collective.

        Raise OtherWeights if they differ from those read first, or if they changed while they were read.
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
    """Return a hash of all `weights_files`; None if there are none, or if they cannot be read."""
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
    """Return the files that decide what a model computes: weights, configuration, code; of a folder or the hub's cache.

    An adapter's base counts too. The optimizer's state, the tokenizer and texts are left out: a checkpoint without
    these is the same model.
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
    base = base_of(path)
    under = weights_files(base) if base and not base_of(base) else []
    return [*weights, *described, *under] if weights and (under or not base) else []


def _file_states(name: str) -> list[tuple[str, int, int, int, int]]:
    """Return path, inode, size and times of each of `weights_files`. A write changes one of them."""
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
