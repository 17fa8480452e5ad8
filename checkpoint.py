"""Write and find checkpoints. A checkpoint is a Hugging Face model folder plus `trainer_state.json`; it appears under
its final name only when every file is complete."""

import contextlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from utils import UserError

STATE_FILE = "trainer_state.json"
LATEST = "LATEST"


@dataclass(frozen=True)
class Archive:
    """Weights to start from: a model folder at `path`, or the `state` read from a policy.pt of the original code."""

    path: Path
    state: dict[str, Tensor] | None
    info: dict[str, Any]

    def describe(self) -> str:
        """What is known of the training that made it, for the log."""
        loss, metrics = (self.info.get(key) or {} for key in ("loss", "metrics"))
        known = [loss["name"]] if "name" in loss else []
        known += [f"{self.info['examples']} examples"] if self.info.get("examples") else []
        known += [f"loss/eval {metrics['loss/eval']:.5g}"] if "loss/eval" in metrics else []
        return f" ({', '.join(known)})" if known else ""


def resolve_archive(name: str) -> Archive:
    """Open what `model.archive=name` means; see `find_archive`. Raises UserError naming what is wrong."""
    path = find_archive(name)
    if path.is_file():
        return _read_policy_pt(path)
    info = {}
    with contextlib.suppress(OSError, ValueError):  # it is only described in the log
        info = json.loads((path / STATE_FILE).read_text())
    return Archive(path, None, info)


def find_archive(name: str) -> Path:
    """The model folder or policy.pt that `model.archive=name` means: itself, or the LATEST of a run's folder.

    `<folder>/policy.pt` means `<folder>` where that holds a checkpoint of ours, so that commands of the original run
    unchanged. Raises UserError where there is none.
    """
    path = Path(name).expanduser()
    if path.suffix == ".pt" and path.is_file():
        return path
    if path.name == "policy.pt":
        path = path.parent
    if (path / LATEST).is_dir():
        path = path / LATEST
    if not path.exists():
        raise UserError(f"model.archive={name}: there is no such file or folder")
    path = path.resolve()
    if not (path / "config.json").is_file():
        raise UserError(
            f"model.archive={name}: {path} holds no config.json; expected a checkpoint folder (step-<n> or LATEST), a "
            "run's folder with a LATEST, or a policy.pt of the original code"
        )
    if not any(path.glob("*.safetensors")):
        raise UserError(f"model.archive={name}: {path} holds no weights (*.safetensors)")
    return path


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


def save_checkpoint(
    run_dir: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, state: dict[str, Any]
) -> Path:
    """Write `run_dir/step-<examples>` and point LATEST at it. `state` says how the weights came about; see `_card`.

    Everything is written and synced under a temporary name first. Raises UserError where the disk is full or refuses;
    checkpoints written before stay as they are.
    """
    target = run_dir / f"step-{state['examples']}"
    temporary = None
    try:
        _check_space(run_dir, model)
        temporary = Path(tempfile.mkdtemp(dir=run_dir, prefix=f".{target.name}-"))
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        (temporary / "README.md").write_text(_card(state), encoding="utf-8")
        (temporary / STATE_FILE).write_text(json.dumps(state, indent=2), encoding="utf-8")
        for file in [*temporary.iterdir(), temporary]:
            _sync(file)
        temporary.chmod(0o777 & ~_umask())
        os.rename(temporary, target)
        _point_latest(run_dir, target.name)
    except Exception as error:
        # safetensors reports a full disk with an exception type of its own, so the type does not tell.
        previous = (run_dir / LATEST).resolve() if (run_dir / LATEST).is_dir() else None
        kept = f"the last complete checkpoint is {previous}" if previous else "there is no earlier checkpoint"
        raise UserError(f"the checkpoint {target} could not be written: {error}; {kept}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return target


def _check_space(run_dir: Path, model: PreTrainedModel) -> None:
    needed = sum(p.numel() * p.element_size() for p in model.parameters()) + 16 * 2**20
    free = shutil.disk_usage(run_dir).free
    if free < needed:
        raise OSError(f"it needs {needed / 2**30:.2f} GiB and the disk has {free / 2**30:.2f} GiB free")


def _point_latest(run_dir: Path, name: str) -> None:
    temporary = run_dir / f".{LATEST}-{os.getpid()}"
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()
    temporary.symlink_to(name)
    os.replace(temporary, run_dir / LATEST)
    _sync(run_dir)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _card(state: dict[str, Any]) -> str:
    """A model card (Markdown with the hub's front matter) from a checkpoint's state."""
    metrics = "\n".join(f"| {name} | {value:.5g} |" for name, value in state["metrics"].items())
    loss = ", ".join(f"{key} {value}" for key, value in state["loss"].items() if key != "name")
    start = f"`{state['base_model']}`" + (f", from the weights of `{state['archive']}`" if state["archive"] else "")
    return f"""---
library_name: transformers
tags: [{state["loss"]["name"]}]
---
# {Path(state["base_model"]).name} after {state["loss"]["name"]}

- base model: {start}
- data: {", ".join(f"`{name}`" for name in state["datasets"])}, seed {state["seed"]}
- loss: {state["loss"]["name"]}{f" ({loss})" if loss else ""}
- trained for {state["examples"]} examples in {state["updates"]} updates
- command: `{state["command"]}`

| held-out metric | value |
|---|---|
{metrics or "| none measured | |"}
"""
