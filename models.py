"""Load policy and tokenizer; log-probabilities of a batch's responses."""

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import parallel
from arrow_cache import cached
from batching import IGNORED, Batch, padded
from checkpoint import Archive, resolve_archive
from parallel import Sharding
from settings import Config
from utils import UserError, file_hash, log

# Buffers in a policy.pt of older versions of transformers, which today's models compute: causal masks and frequencies.
OLD_BUFFERS = (".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias", "rotary_emb.inv_freq")
# What from_pretrained raises for a name or folder it cannot use.
_LOAD_ERRORS = (OSError, ValueError, KeyError, RuntimeError, ImportError, TypeError, SafetensorError)


def pick_device(config: Config) -> torch.device:
    """The device that `device` means; auto takes CUDA, else an Apple GPU, else the CPU. In a group each process
    has the GPU of its number, and Apple GPUs are not used."""
    kind = config.device
    if kind == "auto":
        apple = torch.backends.mps.is_available() and not config.needs_group
        kind = "cuda" if torch.cuda.is_available() else "mps" if apple else "cpu"
    if kind == "cuda" and config.needs_group:
        index, there = parallel.gpu_index(), torch.cuda.device_count()
        if index >= there:
            raise UserError(f"process {index} of this machine has no GPU: there are {there}; start that many processes")
        return torch.device("cuda", index)
    return torch.device(kind)


def load_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """The tokenizer of the configuration. Raises UserError where there is none, or it has no end-of-text token."""
    name = config.model.tokenizer_name_or_path or config.model.name_or_path
    try:
        tokenizer = AutoTokenizer.from_pretrained(local_folder(name, config.cache))
    except _LOAD_ERRORS as error:
        raise UserError(
            f"no tokenizer could be read from {name} ({_first_line(error)}); give one with "
            "model.tokenizer_name_or_path=<hub id or folder>"
        ) from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {name} has no end-of-text token (eos_token), which ends every response")
    return tokenizer


def load_policy(
    config: Config,
    device: torch.device,
    sharding: Sharding | None = None,
    archive: str | None = None,
    trains: bool = True,
) -> PreTrainedModel:
    """The model, in model.policy_dtype, without dropout, with the weights of `archive` where one is given.

    Activation checkpointing is for a model that `trains`: it makes the embeddings require a gradient. With `sharding`
    each process holds, and reads, only its shards. Raises UserError for a name, folder or archive that cannot be read
    or does not fit.
    """
    source = local_folder(config.model.name_or_path, config.cache)
    found = resolve_archive(archive) if archive else None
    if found is not None:
        _check_same_architecture(config.model.name_or_path, source, found)
        if trains:
            log(f"starting from the weights of {found.path}{found.describe()}")
    folder = found.path if found is not None and found.state is None else source
    state = found.state if found is not None else None
    try:
        model = _from_pretrained(folder, state, _loading_options(config, device, sharding), sharding)
    except _LOAD_ERRORS as error:
        if found is not None and state is not None:
            raise UserError(f"model.archive={found.path} is of another architecture: {_first_line(error)}") from error
        raise UserError(f"no model could be read from {folder}: {_first_line(error)}") from error
    disable_dropout(model)
    if trains and config.activation_checkpointing:
        try:
            model.activation_checkpointing_enable({"use_reentrant": False}, config.activation_checkpointing_every)
        except ValueError as error:
            raise UserError(f"activation_checkpointing=true: {_first_line(error)}") from error
    if sharding is not None:
        return parallel.move_buffers(model)
    if not config.model.device_map:
        return model.to(device)  # type: ignore[arg-type]
    outside = {str(place) for place in getattr(model, "hf_device_map", {}).values()} & {"cpu", "disk"}
    if torch.cuda.is_available() and outside:
        raise UserError(f"model.device_map: the GPUs are too small; layers would be on {', '.join(outside)}")
    return model


def _loading_options(config: Config, device: torch.device, sharding: Sharding | None) -> dict[str, Any]:
    options: dict[str, Any] = {"dtype": getattr(torch, config.model.policy_dtype), "output_loading_info": True}
    if sharding is not None:
        return options | parallel.loading_options()
    return options | ({"device_map": config.model.device_map} if config.model.device_map else {})


def check_fits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: Config) -> None:
    """Raise UserError where token ids or positions would lie outside the model's tables."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    if len(tokenizer) > len(weight):
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens but the model embeds {len(weight)}: "
            "is model.tokenizer_name_or_path that of this model?"
        )
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and config.max_length > positions:
        raise UserError(f"max_length={config.max_length} is more than the {positions} positions of the model; lower it")


def _from_pretrained(
    source: str | Path, state: dict[str, Tensor] | None, options: dict[str, Any], sharding: Sharding | None
) -> PreTrainedModel:
    """The model of `source`, with its weights or with those of `state`: a policy.pt of the original code."""
    model_class: Any = AutoModelForCausalLM
    if sharding is not None or state is not None:
        options["config"] = AutoConfig.from_pretrained(source)
        model_class = AutoModelForCausalLM._model_mapping[type(options["config"])]
    if sharding is not None:
        model_class = parallel.sharded(model_class, sharding)
    if state is None:
        model, info = model_class.from_pretrained(source, **options)
    else:
        # Old transformers saved buffers that today's models compute.
        state = {name: tensor for name, tensor in state.items() if not name.endswith(OLD_BUFFERS)}
        model, info = model_class.from_pretrained(None, state_dict=state, **options)
    missing, unknown = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if state is not None and (missing or unknown):
        raise ValueError(f"it lacks {missing[:2] or 'nothing'} and has the unknown {unknown[:2] or 'nothing'}")
    if missing:
        raise UserError(
            f"the weights of {source} lack {len(missing)} tensors that the model needs, such as {missing[0]}; "
            "is the folder complete, and of a causal language model?"
        )
    return model


def _check_same_architecture(name: str, source: str | Path, archive: Archive) -> None:
    """Raise UserError unless the archive's config.json describes the same network as `source`'s."""
    if archive.state is not None:
        return
    configs = []
    for key, place in (("name_or_path", source), ("archive", archive.path)):
        try:
            configs.append(AutoConfig.from_pretrained(place))
        except _LOAD_ERRORS as error:
            raise UserError(f"model.{key}={place}: its config cannot be read: {_first_line(error)}") from error
    for key in ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        wanted, given = (getattr(config, key, None) for config in configs)
        if wanted != given:
            raise UserError(
                f"model.archive={archive.path} is of another architecture than model.name_or_path={name}: "
                f"{key} is {given} there and {wanted} here; set model= to the model it was trained from"
            )


def local_folder(name: str, cache: Path) -> str | Path:
    """`name` itself, or for a .gguf file the folder it is converted to. Raises UserError for a path without a model."""
    path = Path(name).expanduser()
    if name.endswith(".gguf"):
        return _convert_gguf(path, cache)
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local and not path.is_dir():
        raise UserError(f"model.name_or_path={name}: there is no such folder")
    return path if path.is_dir() else name


def _convert_gguf(path: Path, cache: Path) -> Path:
    """Dequantise a GGUF file once, to float32, into a model folder in the cache named by the file's content."""
    if not path.is_file():
        raise UserError(f"model.name_or_path={path}: there is no such file")

    def convert(folder: Path) -> None:
        log(f"reading {path.name} and converting it into {cache / 'models'} (once)")
        try:
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
            model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        except _LOAD_ERRORS as error:
            raise UserError(f"{path} could not be read as a GGUF model: {_first_line(error)}") from error
        # The weights are no longer quantised; transformers refuses to save a model that says they are.
        del model.config.quantization_config
        model.hf_quantizer = None  # type: ignore[assignment]
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return cached(cache / "models", f"{path.stem}-{file_hash(path)[:16]}", convert)


def disable_dropout(model: torch.nn.Module) -> None:
    """Set every dropout probability to 0, so that policy and reference compute the same function."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


@dataclass(frozen=True)
class TokenLogps:
    """log p(token | all before it) in nats, float32 [responses, positions]; `mask` is true at response tokens."""

    logps: Tensor
    mask: Tensor


def response_logps(model: PreTrainedModel, batch: Batch, compute_dtype: torch.dtype) -> TokenLogps:
    """Log-probability of each token of the batch's responses, in the order of its trees.

    Logits are computed only at positions that predict a response token in some row. The log-softmax is float32 whatever
    the model's type. The first token of a response has none where there is neither prompt nor BOS before it.
    """
    rows = padded(batch)
    labels = rows.labels[:, 1:]
    keep = (labels != IGNORED).any(0).nonzero().squeeze(1)
    device = input_device(model)
    with autocast(model, compute_dtype):
        inputs = {"input_ids": rows.input_ids.to(device), "attention_mask": rows.attention_mask.to(device)}
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            logits = model(**inputs, logits_to_keep=keep.to(device), use_cache=False).logits
        else:
            logits = model(**inputs, use_cache=False).logits[:, keep.to(device)]
    labels = labels[:, keep].to(logits.device)
    return TokenLogps(parallel.label_logps(logits, labels, IGNORED), labels != IGNORED)


def input_device(model: PreTrainedModel) -> torch.device:
    """Where a model expects token ids: the device of its embeddings, also when its layers are spread over several."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return parallel.device_of(weight)


@contextlib.contextmanager
def autocast(model: PreTrainedModel, compute: torch.dtype) -> Iterator[None]:
    """Run matrix products in `compute` where it differs from the weights' type, and FSDP does not cast these itself."""
    needed = not parallel.casts_itself(model) and compute != model.dtype
    with torch.autocast(input_device(model).type, compute) if needed else contextlib.nullcontext():
        yield


def quiet_transformers() -> None:
    """Leave warnings and errors; progress bars of loading and saving weights go."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
