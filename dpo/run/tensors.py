"""A checkpoint's tensors: weights, the optimizer's state, and the state of random generators."""

import json
import random
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from dpo import parallel
from dpo.model import adapters
from dpo.utils import UserError

WeightFile = tuple[str, dict[str, Tensor] | str]
"""Name and content of a file of weights, or of their index."""
TRAINING_STATE = "training_state"
RANDOM_STATE = "random_state"
MAX_FILE_SIZE = "5GB"
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)  # names such as "state.lm_head.weight.exp_avg"
# One process needs no group to write its state.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def tensor_writer(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer | None, copied: bool, group: Any, made_up: bool = False
) -> Callable[[Path], None]:
    """Return a function that writes this process's part of the weights into a folder. With an optimizer it also writes
    the states of the optimizer and of the random generators.

    `copied`: write a copy in host memory, made now. `made_up`: if the optimizer has no state yet, write the one that
    torch makes up by a step at lr 0; otherwise none is written.
    """
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
    """Return the states of this process's random generators, as JSON."""
    states = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }
    return json.dumps(states, default=lambda numbers: numbers.tolist())


def load_random_state(folder: Path) -> None:
    """Set the random generators to the states that a checkpoint holds for this rank, if it holds any."""
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
    """Fill the optimizer's state from a checkpoint, written by any number of processes. Its settings stay.

    Exactly the parameters with a state in the checkpoint get one: a parameter that never had a gradient has none. Raise
    UserError if the state does not fit.
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
    """Yield the files that `model.save_pretrained` of the whole model would write, byte for byte; of a model with an
    adapter, the adapter's as PEFT writes it.

    A collective: rank i of n yields the files i, i + n, ... So no process holds more than one file of a sharded model,
    and the ranks write at the same time. transformers gathers the whole model on rank 0, and writes it there.
    """
    if adapters.config_of(model) is not None:  # whole in each process
        if parallel.is_main():
            yield adapters.WEIGHTS_FILE, adapters.state_of(model)
        return
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
    """Yield files of up to MAX_FILE_SIZE: every n-th, starting with file `rank`, once the next n are gathered."""
    shapes = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in tensors.items()}
    split = split_torch_state_dict_into_shards(
        shapes, filename_pattern="model{suffix}.safetensors", max_shard_size=MAX_FILE_SIZE
    )
    files = [*split.filename_to_tensors.items()]
    for start in range(0, len(files), n):
        mine: list[WeightFile] = []
        for turn, (file, names) in enumerate(files[start : start + n]):
            content = {}
            for name in names:
                tensor = parallel.full(tensors[name])
                if turn == rank:
                    content[name] = tensor.detach().cpu().contiguous()
            mine += [(file, content)] if content else []
        yield from mine  # not before: to gather a file takes all ranks, and a rank that writes would keep them waiting
    if split.is_sharded and rank == 0:
        total = {"total_parameters": model.num_parameters(), **split.metadata}
        index = {"metadata": total, "weight_map": split.tensor_to_filename}
        yield "model.safetensors.index.json", json.dumps(index, indent=2, sort_keys=True) + "\n"


def needed_bytes(model: PreTrainedModel, optimizer: torch.optim.Optimizer | None) -> int:
    states = optimizer.state.values() if optimizer is not None else ()
    saved = (p for p in model.parameters() if p.requires_grad)
    values = [*saved, *(value for state in states for value in state.values())]
    return sum(t.numel() * t.element_size() for t in values if isinstance(t, Tensor)) + 16 * 2**20
