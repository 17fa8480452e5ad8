"""Write and find checkpoints. A checkpoint is a Hugging Face model folder plus `trainer_state.json` and the optimizer's
state in `training_state/`; it appears under its final name only when every file is complete."""

import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

import parallel
from utils import UserError

STATE_FILE = "trainer_state.json"
TRAINING_STATE = "training_state"
LATEST = "LATEST"
MAX_FILE_SIZE = "5GB"
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
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


def find_checkpoint(name: str) -> Path:
    """The checkpoint that `resume=name` means: itself, or the LATEST of a run's folder. Raises UserError."""
    path = _newest(Path(name).expanduser())
    if not path.is_dir():
        raise UserError(f"resume={name}: there is no such folder")
    if not (path / STATE_FILE).is_file() or not (path / TRAINING_STATE).is_dir():
        raise UserError(
            f"resume={name}: {path} holds no {STATE_FILE} and {TRAINING_STATE}/, so training cannot go on from it; to "
            "start a new run from its weights, set model.archive"
        )
    return path


def _newest(path: Path) -> Path:
    """The LATEST checkpoint of a run's folder; any other path itself."""
    return (path / LATEST if (path / LATEST).is_dir() else path).resolve()


def save_checkpoint(
    run_dir: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    state: dict[str, Any],
    optimizer: torch.optim.Optimizer | None = None,
) -> Path:
    """Write `run_dir/step-<examples>` and point LATEST at it. `state` says how the weights came about; see `_card`.

    A collective: every process writes its part. Everything is written and synced under a temporary name first. Raises
    UserError, in all processes, where the disk is full or refuses; checkpoints written before stay as they are.
    """
    target = run_dir / f"step-{state['examples']}"
    temporary = run_dir / f".{target.name}-{parallel.from_main(os.getpid())}"

    def begin() -> None:
        _check_space(run_dir, model, optimizer)
        temporary.mkdir()

    def finish() -> None:
        _write_texts(temporary, model, tokenizer, state)
        for file in [*temporary.rglob("*"), temporary]:
            _sync(file)
        os.rename(temporary, target)
        _point_latest(run_dir, target.name)

    try:
        _together(begin, parallel.is_main())
        _together(lambda: _write_tensors(temporary, model, optimizer), True)
        _together(finish, parallel.is_main())
    except OSError as error:
        previous = (run_dir / LATEST).resolve() if (run_dir / LATEST).is_dir() else None
        kept = f"the last complete checkpoint is {previous}" if previous else "there is no earlier checkpoint"
        raise UserError(f"the checkpoint {target} could not be written: {error}; {kept}") from error
    finally:
        if parallel.is_main():
            shutil.rmtree(temporary, ignore_errors=True)
    return target


def _together(action: Callable[[], None], here: bool) -> None:
    """Run `action` where `here`, and raise OSError in every process if it failed in any."""
    message = None
    try:
        if here:
            action()
    # safetensors and torch report a full disk with exception types of their own, so the type does not tell
    except (Exception, CheckpointException) as error:
        message = f"{type(error).__name__}: {error}"
    failed = [found for found in parallel.gather(message) if found]
    if failed:
        raise OSError(failed[0].strip().splitlines()[-1])


def _write_texts(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, state: dict[str, Any]
) -> None:
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__.removeprefix("FSDP")]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)  # type: ignore[union-attr]
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(_card(state), encoding="utf-8")
    (folder / STATE_FILE).write_text(json.dumps(state, indent=2), encoding="utf-8")


def _write_tensors(folder: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer | None) -> None:
    if optimizer is not None:
        writer = HuggingFaceStorageWriter(str(folder / TRAINING_STATE), save_distributed=True)
        state = _contiguous_tensors(optimizer_state(model, optimizer))
        dcp.save(state, storage_writer=writer, no_dist=not parallel.active())
    write_weights(model, folder)


def optimizer_state(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state under parameter names, such as "state.lm_head.weight.exp_avg", and its settings."""
    return get_optimizer_state_dict(model, optimizer, options=FLAT)


def load_optimizer(folder: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
    """Fill the optimizer's state from a checkpoint, written by any number of processes. Settings stay."""
    state = optimizer_state(model, optimizer)
    tensors = _contiguous_tensors(state)
    reader = HuggingFaceStorageReader(str(folder / TRAINING_STATE))
    try:
        dcp.load(tensors, storage_reader=reader, no_dist=not parallel.active())
    except (Exception, CheckpointException) as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"resume={folder}: its optimizer state does not fit this run's optimizer: {reason}") from error
    state |= {name: parallel.as_sharded(tensor, state[name]) for name, tensor in tensors.items()}
    set_optimizer_state_dict(model, optimizer, state, options=FLAT)


def _contiguous_tensors(state: dict[str, Any]) -> dict[str, Any]:
    return {name: parallel.contiguous(value) for name, value in state.items() if isinstance(value, Tensor)}


def write_weights(model: PreTrainedModel, folder: Path) -> None:
    """Write the files that `model.save_pretrained` of the whole model writes, byte for byte.

    A collective: process i writes the files i, i + n, ... of n processes, and holds one of them in memory at a time.
    """
    left_out = {*(model.all_tied_weights_keys or {}), *(model._keys_to_ignore_on_save or ())}
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in left_out}
    # Some models are saved under other names than they have in memory; few, under a mixture of their tensors.
    empty = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    names = {id(tensor): name for name, tensor in empty.items()}
    saved = revert_weight_conversion(model, dict(empty))
    if all(id(tensor) in names for tensor in saved.values()):
        _write_files(
            model, folder, {name: tensors[names[id(tensor)]] for name, tensor in saved.items()}, parallel.rank()
        )
        return
    whole = {}
    for name, tensor in tensors.items():
        gathered = parallel.full(tensor)
        if parallel.is_main():
            whole[name] = gathered.cpu()
    if parallel.is_main():
        _write_files(model, folder, revert_weight_conversion(model, whole), None)


def _write_files(model: PreTrainedModel, folder: Path, tensors: dict[str, Tensor], rank: int | None) -> None:
    """Write `tensors` in files of up to MAX_FILE_SIZE: those whose turn is `rank`'s, or all where it is None."""
    shapes = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in tensors.items()}
    split = split_torch_state_dict_into_shards(
        shapes, filename_pattern="model{suffix}.safetensors", max_shard_size=MAX_FILE_SIZE
    )
    failure: Exception | None = None
    for turn, (file, names) in enumerate(split.filename_to_tensors.items()):
        mine = rank is None or turn % parallel.world_size() == rank
        content = {}
        for name in names:
            tensor = parallel.full(tensors[name]) if rank is not None else tensors[name]
            if mine:
                content[name] = tensor.detach().cpu().contiguous()
        try:
            if mine:
                save_file(content, folder / file, {"format": "pt"})
        except Exception as error:  # the other processes still need this one for their files
            failure = error
    if failure is not None:
        raise failure
    if split.is_sharded and not rank:
        total = {"total_parameters": model.num_parameters(), **split.metadata}
        index = {"metadata": total, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _check_space(run_dir: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer | None) -> None:
    states = optimizer.state.values() if optimizer is not None else ()
    tensors = [
        *model.parameters(),
        *(value for state in states for value in state.values() if isinstance(value, Tensor)),
    ]
    needed = sum(t.numel() * t.element_size() for t in tensors) + 16 * 2**20
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
