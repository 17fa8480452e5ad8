"""Adapters: a frozen model with a few trained parameters. PEFT makes and reads them; here they are put on a model in
place, so that it stays a model of its own class.

Each process holds an adapter whole, whatever holds the frozen weights, and gradients are summed once an update.
"""

import contextlib
import copy
import dataclasses
import importlib
import json
import logging
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dpo import parallel
from dpo.model.checks import refusing
from dpo.model.config import MUTATING, AdapterConfig
from dpo.utils import UserError

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
NAME = "default"  # PEFT's own name for the one adapter of a model
PREFIX = "base_model.model."  # in files PEFT writes names as its wrapper of a model has them
# Methods that need more than parameters in the model (a schedule of ranks, a term of the loss, a choice of tasks), or
# whose layers share tensors.
NOT_IN_PLACE = ("ADALORA", "LILY", "POLY", "RANDLORA", "SHADOW", "XLORA")
# Attribute of a model: what a MUTATING initialisation took out of the weights. Files hold what was learnt, an adapter
# of twice the rank on the weights as they were.
TAKEN = "taken_out_of_weights"
# Entries of adapter_config.json that say nothing about what a model with the adapter computes.
NOT_COMPUTED = ("base_model_name_or_path", "peft_version", "inference_mode", "task_type", "revision", "auto_mapping")


def _peft(module: str = "peft") -> Any:
    """Return a module of PEFT. It is imported when it is first needed, as that takes more than a second."""
    logging.getLogger("bitsandbytes.backends").setLevel(logging.ERROR)  # PEFT imports it; it tells of a kernel it lacks
    return importlib.import_module(module)


# Configuration -----------------------------------------------------------------------------------------------------


def peft_types() -> list[str]:
    """Return the methods of PEFT that can be put on a model in place."""
    known = _peft("peft.mapping")
    tuners, configs = known.PEFT_TYPE_TO_TUNER_MAPPING.items(), known.PEFT_TYPE_TO_CONFIG_MAPPING
    fit = (kind for kind, tuner in tuners if getattr(tuner, "uses_shared_state", True) is False)
    return sorted(k.value for k in fit if hasattr(configs[k], "target_modules") and k.value not in NOT_IN_PLACE)


def peft_config(adapter: AdapterConfig) -> Any:
    """Return PEFT's configuration for the keys of the group `adapter`. Raise UserError for what PEFT refuses."""
    if adapter.peft_type not in peft_types():
        raise UserError(f"adapter.peft_type={adapter.peft_type} is none of {', '.join(peft_types())}")
    kind = _peft("peft.mapping").PEFT_TYPE_TO_CONFIG_MAPPING[adapter.peft_type]
    names = [f.name for f in dataclasses.fields(kind) if f.name not in (*NOT_COMPUTED, "peft_type")]
    names = [name for name in names if "dropout" not in name]
    arguments: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    given: dict[str, tuple[Any, ...]] = {
        "rank": (adapter.rank, "r"),
        "alpha": (adapter.alpha, "lora_alpha", "alpha"),
        "target_modules": (adapter.target_modules, "target_modules"),
        "layers": (adapter.layers, "layers_to_transform"),
        "modules_to_save": (adapter.modules_to_save, "modules_to_save"),
        "init": (adapter.init, "init_lora_weights", "init_weights"),
        "dora": (adapter.dora or None, "use_dora"),
        "rslora": (adapter.rslora or None, "use_rslora"),
    }
    for key, (value, *theirs) in given.items():
        name: str | None = next((name for name in theirs if name in names), None)
        if value is not None and name is None:
            raise UserError(f"adapter.{key}={value}: {adapter.peft_type} has no such setting; set adapter.{key}=null")
        arguments |= {name: value} if value is not None and name is not None else {}
    for key, value in adapter.peft_kwargs.items():
        if key not in names or key in arguments:
            further = ", ".join(name for name in names if name not in arguments)
            raise UserError(f"adapter.peft_kwargs.{key}={value}: further settings of {adapter.peft_type} are {further}")
    with refusing(f"adapter.peft_type={adapter.peft_type}"):
        return kind(**arguments, **adapter.peft_kwargs)


# Put on a model ----------------------------------------------------------------------------------------------------


def config_of(model: torch.nn.Module) -> Any:
    """Return the configuration of the model's adapter; None if it has none."""
    return getattr(model, "peft_config", {}).get(NAME)


def trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the parameters that training changes, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def put_on(model: PreTrainedModel, config: Any, base: str, seed: int) -> PreTrainedModel:
    """Put a fresh adapter on `model`, whose weights are those of `base` (a folder or hub id), and freeze the rest.

    Raise UserError if the adapter does not fit the model, or would not compute the same after merging.
    """
    names = dict(model.named_modules())
    linear = {name.split(".")[-1] for name, m in names.items() if isinstance(m, torch.nn.Linear | Conv1D)}
    if problem := next(_problems(config, [*names], parallel.data_ranks(model) > 1), None):
        raise UserError(f"the adapter cannot be used: {problem}")
    # A folder's name is made absolute: the checkpoint may be opened elsewhere.
    config.base_model_name_or_path = str(Path(base).resolve()) if Path(base).is_dir() else base
    config.inference_mode = False
    model.requires_grad_(False)
    message = f"the adapter does not fit {type(model).__name__}, whose matrices are {', '.join(sorted(linear))}"
    with (
        parallel.whole_weights(model, _looks_at_weights(config)),
        torch.random.fork_rng(),
        warnings.catch_warnings(),
        refusing(message),
    ):
        torch.manual_seed(seed)
        warnings.filterwarnings("ignore", message="fan_in_fan_out")  # PEFT then sets it right itself
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # PEFT asks for it by its old name
        _peft().inject_adapter_in_model(config, model, NAME)
        _peft("peft.tuners.tuners_utils").cast_adapter_dtype(model, NAME)  # to float32: steps are small
    if not trained(model):
        raise UserError("the adapter has nothing to train; see adapter.target_modules and adapter.modules_to_save")
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    if model.all_tied_weights_keys and any(f".{NAME}" in name for end in ends for name, _ in end.named_parameters()):
        raise UserError(
            f"the embeddings and the output layer of {type(model).__name__} are one matrix: with an adapter on one of "
            "them the merged model would be another; leave them out of adapter.target_modules and modules_to_save"
        )
    if _changes_base(config):
        taken = {name: parameter.detach().clone() for name, parameter in trained(model).items()}
        for name, tensor in taken.items():
            if not re.search(r"\.lora_[AB]\.", name) or tensor.shape[_dim(name)] != config.r:
                place = name.partition(".lora_")[0]
                raise UserError(
                    f"init={config.init_lora_weights} cannot take rank {config.r} out of {place}: "
                    "lower adapter.rank, or leave that module out of adapter.target_modules"
                )
        vars(model)[TAKEN] = taken
    return model


def _problems(config: Any, names: Sequence[str], sharded: bool) -> Iterator[str]:
    """Yield what an adapter's configuration asks for that does not work on a model with modules of these names."""
    for key in ("target_modules", "modules_to_save"):
        wanted = getattr(config, key, None)
        for module in wanted if isinstance(wanted, list | set | tuple) else ():
            if not any(name == module or name.endswith(f".{module}") for name in names):
                last = sorted({name.split(".")[-1] for name in names if not name.split(".")[-1].isdigit()} - {""})
                yield f"{key}: no module is called {module}; there are {', '.join(last)}"
    if getattr(config, "alora_invocation_tokens", None):
        yield "alora_invocation_tokens takes effect in PEFT's own wrapper only"
    patterns = [key for key in ("rank_pattern", "alpha_pattern") if getattr(config, key, None)]
    if _changes_base(config) and (config.use_dora or config.modules_to_save or config.bias != "none" or patterns):
        yield (
            f"init={config.init_lora_weights} is saved as LoRA of twice the rank, so it goes with neither dora, "
            "modules_to_save, bias, rank_pattern nor alpha_pattern"
        )
    if sharded and getattr(config, "bias", "none") not in ("none", False):
        yield f"bias={config.bias} trains a part of the weights, which FSDPTrainer holds in shards; use BasicTrainer"


def _looks_at_weights(config: Any) -> bool:
    """Return whether making the adapter may read the weights, not only their shapes."""
    if config.peft_type == "IA3":
        return bool(config.modules_to_save)
    plain = config.peft_type == "LORA" and config.init_lora_weights in (True, "gaussian")
    return not plain or config.use_dora or bool(config.modules_to_save)


def _changes_base(config: Any) -> bool:
    init = getattr(config, "init_lora_weights", None)
    return isinstance(init, str) and init.startswith(MUTATING)


def read_config(folder: Path) -> Any:
    """Return the configuration of the adapter in `folder`. Raise UserError if it cannot be used."""
    with refusing(f"{folder}: its adapter cannot be read"):
        values = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        config = _peft().PeftConfig.from_peft_type(**values)
    if _changes_base(config):
        raise UserError(
            f"{folder} is an adapter that began with init={config.init_lora_weights} and was not converted: it belongs "
            "to weights from which that was taken. Save it with PEFT's path_initial_model_for_weight_conversion"
        )
    if config.peft_type not in peft_types():
        raise UserError(f"{folder} is an adapter of {config.peft_type}, which cannot be put on a model in place")
    if getattr(config, "lora_dropout", 0):
        config.lora_dropout = 0.0  # as a model's own dropout is switched off
    return config


def read(folder: Path) -> tuple[Any, dict[str, Tensor]]:
    """Return configuration and weights of the adapter in `folder`. Raise UserError if they cannot be read."""
    config = read_config(folder)
    with refusing(f"{folder}: its adapter cannot be read"):
        state = load_file(folder / WEIGHTS_FILE)
    return config, {name.removeprefix(PREFIX): tensor for name, tensor in state.items()}


def load(model: PreTrainedModel, state: dict[str, Tensor], folder: Path) -> None:
    """Give the adapter of `model` the weights `state`, read from `folder`. Raise UserError if they are of another."""
    wanted = {name.removeprefix(PREFIX): tensor for name, tensor in state_of(model).items()}
    own = model.state_dict()
    frozen = {
        n for n in state.keys() - wanted.keys() if n in own and torch.equal(parallel.full(own[n]).cpu(), state[n])
    }
    state = {name: tensor for name, tensor in state.items() if name not in frozen}  # PEFT may write embeddings, too
    missing, unknown = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    shapes = sorted(name for name in wanted.keys() & state.keys() if wanted[name].shape != state[name].shape)
    for names, problem in ((missing, "lacks"), (unknown, "has the unknown"), (shapes, "has another shape of")):
        if names:
            raise UserError(f"{folder}: the adapter does not fit {type(model).__name__}: it {problem} {names[0]}")
    if TAKEN in vars(model):
        halves = {name: tensor.chunk(2, _dim(name)) for name, tensor in state.items()}
        if not all(torch.equal(half, wanted[name].chunk(2, _dim(name))[1]) for name, (_, half) in halves.items()):
            raise UserError(
                f"{folder}: its adapter began with other singular vectors than this machine computes of the same "
                "weights; resume where it was begun, or start a new run from it: model.archive"
            )
        state = {name: half for name, (half, _) in halves.items()}
    _peft().set_peft_model_state_dict(model, state, NAME)


def _dim(name: str) -> int:
    """Return the dimension of a tensor of LoRA that has the size of the rank."""
    return 0 if "lora_A" in name else 1


def state_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the adapter's tensors under the names of PEFT's files, on the CPU."""
    own = model.state_dict()

    def named(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        found = _peft().get_peft_model_state_dict(model, tensors, NAME, save_embedding_layers=False)
        return {PREFIX + name: parallel.full(tensor).detach().cpu().contiguous() for name, tensor in found.items()}

    state, taken = named(own), vars(model).get(TAKEN)
    if taken is None:
        return state
    others = {name: -tensor if "lora_B" in name else tensor for name, tensor in named(own | taken).items()}
    return {name: torch.cat([tensor, others[name]], _dim(name)) for name, tensor in state.items()}


def saved_config(model: PreTrainedModel) -> Any:
    """Return the configuration that belongs to `state_of`."""
    config: Any = copy.deepcopy(config_of(model))
    config.inference_mode = True
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)  # the same file each time
    if TAKEN in vars(model):
        config.init_lora_weights, config.r = True, 2 * config.r
        config.lora_alpha *= math.sqrt(2) if config.use_rslora else 2
    return config


def own_keys(config: Any) -> dict[str, Any]:
    """Return what an adapter's configuration says for the numbers and switches of the group `adapter`."""
    names = {"r": "rank", "lora_alpha": "alpha", "use_dora": "dora", "use_rslora": "rslora"}
    return {key: getattr(config, name) for name, key in names.items() if hasattr(config, name)}


def described(model: PreTrainedModel) -> str:
    """Return the adapter's kind, rank and scale, for people."""
    config = config_of(model).to_dict()
    kind = str(config["peft_type"]).removeprefix("PeftType.")
    facts = (("r", "rank"), ("lora_alpha", "alpha"), ("use_dora", "DoRA"), ("use_rslora", "rsLoRA"))
    return ", ".join([kind, *(f"{word} {config[key]}" for key, word in facts if config.get(key))])


# What a model with an adapter computes -----------------------------------------------------------------------------


def _added(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the tensors of the model's state that the adapter added, and those besides that are trained."""
    state = model.state_dict()
    return {name: state[name] for name in state if f".{NAME}" in name} | trained(model)


def adds_nothing(model: PreTrainedModel) -> bool:
    """Return whether the model certainly computes what it does without its adapter: a product with B = 0 is added."""
    added = _added(model)
    factors = {name: tensor for name, tensor in added.items() if re.search(rf"\.lora_[AB]\.{NAME}\.weight$", name)}
    products = [tensor for name, tensor in factors.items() if ".lora_B." in name]
    return bool(products) and factors.keys() == added.keys() and not any(bool(b.any()) for b in products)


def computed_by(model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what decides what the model computes besides its own configuration: tensors, and an adapter's settings.

    With an adapter that adds nothing it is what it would be without.
    """
    state, config = model.state_dict(), config_of(model)
    if config is None:
        return state, {}
    if adds_nothing(model):
        names = _added(model)
        return {name.replace(".base_layer.", "."): t for name, t in state.items() if name not in names}, {}
    return state, {key: value for key, value in config.to_dict().items() if key not in NOT_COMPUTED}


class Starting:
    """The trained parameters of a model as they are now, before the first update."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.weights = {name: parameter.detach().clone() for name, parameter in trained(model).items()}

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Let the model compute with these parameters inside the block, without gradients."""
        self._swap()
        try:
            with torch.no_grad():
                yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, parameter in trained(self.model).items():
            parameter.data, self.weights[name] = self.weights[name], parameter.data
        torch.clear_autocast_cache()  # of casts of the others


def merged(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Return `model`, which is used up, with the adapter in `folder` added to its weights. Raise UserError if it does
    not fit."""
    read(folder)  # so that no pickle is opened
    with warnings.catch_warnings(action="ignore"), refusing(f"{folder} does not fit {type(model).__name__}"):
        return _peft().PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
