"""What a run was made of and what it cost: provenance.json, with an entry for each start of the run."""

import contextlib
import hashlib
import json
import platform
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo import parallel
from dpo.files import atomic_write
from dpo.installation import checkout, devices, gpu_energy, versions
from dpo.run.checkpoint import read_state
from dpo.run.stopping import Stopped
from dpo.utils import log, redact

if TYPE_CHECKING:
    import torch

FILE = "provenance.json"
SECONDS_BETWEEN_WRITES = 60.0  # what a killed run may lose of its costs


class Provenance:
    """One start of the run in `run_dir`. Its time counts from here. Use it in the main process only."""

    def __init__(self, run_dir: Path, device: "torch.device", device_map: str | None = None, command: str = ""):
        self.run_dir, self.device, self.command = run_dir, device, command
        self.started, self._start = datetime.now(UTC), time.monotonic()
        self._spread = device_map is not None
        self._gpus: list[int] = []
        self._energy: float | None = None
        checkout()  # as it was loaded: a file may change while data are read
        self._starts: list[dict[str, Any]] = []  # of the run; the last is this one, once `begin` was called
        self._examples, self._flop, self._written = 0, 0.0, 0.0

    def begin(self, data: Any, identity: Mapping[str, Any], resumed_from: Path | None, in_place: bool) -> None:
        """Add an entry to the run's file, or begin a new file unless the run is resumed `in_place`. Call after all
        validation. `data` names what was read, with hashes; `identity`, the content of what training starts from.
        Energy counts from here: CUDA is not started before."""
        self._gpus = _gpus(self.device, self._spread)
        self._energy = gpu_energy(self._gpus)
        self._starts = _read(self.run_dir / FILE) if in_place else []
        self._examples = read_state(resumed_from)["examples"] if resumed_from else 0
        self._starts.append(
            {
                "started": self.started.isoformat(timespec="seconds"),
                "command": self.command,
                "resumed_from": resumed_from and str(resumed_from),
                "code": code_state(self.run_dir),
                "versions": versions(),
                "hardware": self._hardware(),
                "data": data,
                "content": {name: value for name, value in identity.items() if value},
                "ended": None,  # finished, stopped or the error; null while it runs, or if it was killed
            }
        )
        try:
            self._write()
        except OSError as error:
            log(f"warning: {FILE} cannot be written: {error}. Training continues")

    def note(self, metrics: Mapping[str, float], examples: int) -> None:
        """Count the cost of an update that led to `examples` examples. Write now and then."""
        if "flops_per_second" in metrics:
            seconds = (examples - self._examples) / metrics["examples_per_second"]
            self._flop += metrics["flops_per_second"] * seconds
            self._examples = examples
        if self._starts and time.monotonic() - self._written > SECONDS_BETWEEN_WRITES:
            with contextlib.suppress(OSError):  # of a full disk: it is written again
                self._write()

    def end(self) -> None:
        """Note how the run ended: by the exception that is being handled, if there is one."""
        error = sys.exception()
        if not self._starts:
            return
        ended = "finished" if error is None else "stopped" if isinstance(error, Stopped) else type(error).__name__
        text = "" if error is None or ended == "stopped" else str(error)
        self._starts[-1]["ended"] = f"{ended}: {text.splitlines()[0]}" if text else ended
        with contextlib.suppress(OSError):
            self._write()

    def _write(self) -> None:
        entry, seconds = self._starts[-1], time.monotonic() - self._start
        entry |= {"seconds": round(seconds, 1), "examples": self._examples, "training_flop": self._flop}
        now = gpu_energy(self._gpus) if self._energy is not None else None
        if now is not None and self._energy is not None:
            entry["gpu_joules"] = round(now - self._energy, 1)
        atomic_write(self.run_dir / FILE, redact(json.dumps({"starts": self._starts}, indent=1)) + "\n")
        self._written = time.monotonic()

    def _hardware(self) -> dict[str, Any]:
        """Return what computes. The lines are about the main process's machine."""
        cuda = self.device.type == "cuda"
        return {
            "device": self.device.type,
            "processes": parallel.world_size(),
            "system": platform.platform(),
            "devices": [*devices(cuda)],
        }


def code_state(run_dir: Path) -> dict[str, Any]:
    """Return the code's state. Write its diff to a file, named by its content, unless an earlier start did."""
    code = checkout()
    if code.commit is None:
        return {"commit": None, "reason": code.problem}
    known: dict[str, Any] = {"commit": code.commit, "dirty": "unknown" if code.dirty is None else code.dirty}
    known |= {"reason": code.problem} if code.problem else {}
    if code.diff:
        text = code.diff.decode("utf-8", "surrogateescape")
        content = redact(text).encode("utf-8", "surrogateescape")
        known["diff"] = f"code-{hashlib.sha256(content).hexdigest()[:8]}.diff"
        known |= {"diff_cut": True} if code.cut else {}
        known |= {"redacted": True} if content != code.diff else {}
        if not (run_dir / known["diff"]).exists():
            try:
                atomic_write(run_dir / known["diff"], content)
            except OSError as error:
                log(f"warning: {known['diff']} cannot be written: {error}. Training continues")
    more = {"n_untracked": code.n_untracked} if code.n_untracked > len(code.untracked) else {}
    return known | ({"untracked": [*code.untracked]} | more if code.untracked else {})


def _gpus(device: "torch.device", spread: bool) -> list[int]:
    """Return the GPUs that the run uses, or none if they are not all known to be in this machine."""
    import torch

    if device.type != "cuda":
        return []
    if spread:
        return [*range(torch.cuda.device_count())]
    if parallel.world_size() == 1:
        return [torch.cuda.current_device() if device.index is None else device.index]
    everyone_here = parallel.local_world_size() == parallel.world_size() <= torch.cuda.device_count()
    return [*range(parallel.world_size())] if everyone_here else []


def _read(path: Path) -> list[dict[str, Any]]:
    """Return the entries of a file; none if it is missing or damaged."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(path.read_text(encoding="utf-8"))["starts"]
        return found if isinstance(found, list) else []
    return []
