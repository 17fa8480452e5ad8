"""Load the tokenizer and the policy: from a model folder, a hub id, a GGUF file or an archive."""

import contextlib
import functools
import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from dpo import parallel
from dpo.data.cache import cached
from dpo.data.checks import TRAINED_ON
from dpo.model import adapters, patches, quantization
from dpo.model.checks import disable_dropout, refusing
from dpo.model.logps import add_token_logps, input_device
from dpo.run.checkpoint import STATE_FILE, read_state
from dpo.run.config import Config
from dpo.run.weights import Archive, base_of, find_archive, resolve_archive, weights_identity
from dpo.utils import UserError, file_hash_once, log, visible

# Buffers in files of older versions of transformers, which today's models compute: causal masks and frequencies.
OLD_BUFFERS = (".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias", "rotary_emb.inv_freq")
GGUF_VERSION = 2
"""Version of the folders that GGUF files are converted to. Raise it if the conversion changes."""
MERGED_VERSION = 1
"""Version of the folders that adapters are merged into. Raise it if merging changes."""
# Graphs of a block: training and evaluation have two each, of one row and of several. The checks before training, an
# adapter's first block, activation checkpointing and a live reference add some. Beyond the limit nothing is compiled.
MOST_GRAPHS = 32


def pick_device(config: Config) -> torch.device:
    """Return the device that `device` means: `auto` takes CUDA, else an Apple GPU, else the CPU.

    In a group each process has the GPU of its number, and Apple GPUs are not used.
    """
    kind = config.device
    if kind == "auto":
        apple = torch.backends.mps.is_available() and not config.needs_group
        kind = "cuda" if torch.cuda.is_available() else "mps" if apple else "cpu"
    if kind == "cuda" and config.needs_group:
        index, n_gpus = parallel.gpu_index(), torch.cuda.device_count()
        if index >= n_gpus:
            raise UserError(f"process {index} of this machine has no GPU: it has {n_gpus}; start that many processes")
        return torch.device("cuda", index)
    return torch.device(kind)


def _own_code(config: Config) -> dict[str, Any]:
    """Return whether code of a model's folder may run. Without it transformers would ask on the terminal."""
    return {"trust_remote_code": config.model.trust_remote_code}


def load_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """Return the tokenizer that model.tokenizer_name_or_path names, else the archive's, else the model's.

    Logs how it differs from the next of these. Raises UserError if there is none, or it has no end-of-text token.
    """
    names = [config.model.tokenizer_name_or_path, _archive_tokenizer(config), config.model.name_or_path]
    name, *others = [name for name in names if name]
    advice = "give one with model.tokenizer_name_or_path=<hub id or folder>"
    with refusing(f"no tokenizer could be read from {name}; {advice}"):
        tokenizer = _read_tokenizer(name, config)
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {name} has no end-of-text token (eos_token), which ends every response")
    if config.model.archive and others:
        with contextlib.suppress(Exception):  # the other tokenizer is not needed
            ours, theirs = _facts(tokenizer), _facts(_read_tokenizer(others[0], config))
            if different := [fact for fact, value in ours.items() if value != theirs[fact]]:
                log(f"the tokenizer is that of {name}; that of {others[0]} differs in its {', '.join(different)}")
    return tokenizer


def _read_tokenizer(name: str, config: Config) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(local_folder(name, config.cache), **_own_code(config))


def _archive_tokenizer(config: Config) -> str | None:
    """Return the folder of model.archive if it has a tokenizer."""
    path = find_archive(config.model.archive) if config.model.archive else None
    files = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")
    return str(path) if path is not None and any((path / file).is_file() for file in files) else None


def _facts(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return all that determines which ids a tokenizer gives to a text, by name."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else {}
    return {
        "vocabulary": tokenizer.get_vocab(),
        "special tokens": tokenizer.special_tokens_map,
        "chat template": tokenizer.chat_template,
        "rules": {key: rules.get(key) for key in ("normalizer", "pre_tokenizer", "post_processor", "model")},
    }


def load_policy(
    config: Config,
    device: torch.device,
    sharding: parallel.Sharding | None = None,
    archive: str | None = None,
    trains: bool = True,
    compiled: bool = True,
) -> PreTrainedModel:
    """Return the model in model.policy_dtype, without dropout, with the weights of `archive` if one is given.

    `trains` allows activation checkpointing, which makes the embeddings require a gradient. `compiled` allows
    torch.compile. With `sharding` each process holds and reads only its shards. Raises UserError for a name, folder or
    archive that cannot be read or does not fit.
    """
    source = local_folder(config.model.name_or_path, config.cache)
    found = resolve_archive(archive) if archive else None
    if found is not None and trains and archive == config.model.archive:
        log(f"starting from the weights of {found.path}{found.describe()}")
    place = Path(source if found is None else found.path)
    adapter = place if base_of(place) else None
    if adapter is not None:
        base = _base_of(config, adapter, source)
        if str(adapter) != str(source):
            _check_same_architecture(config, source, Archive(Path(base), None, {}))
        source, found = base, None
    if found is not None:
        _check_same_architecture(config, source, found)
    model = _read_model(config, source, found, sharding, device)
    if adapters.config_of(model) is not None:  # transformers puts it on by itself
        raise UserError(f"{source} is an adapter on the hub, or holds one; download it, and give its folder")
    if adapter is not None or (trains and config.adapter.peft_type):
        _put_adapter_on(model, config, str(source if found is None else found.path), adapter, trains)
    if (device.type == "cpu" or sharding is not None) and not config.adapter.quantization:
        # On CPUs weights are views of their files: a file that is overwritten during the run would change the model.
        model._apply(lambda tensor: tensor.clone() if tensor.device.type == "cpu" else tensor)
    make_ready(model, config, trains, config.compile and compiled)
    if sharding is not None:
        return parallel.move_buffers(model)
    if not config.model.device_map:
        return model if config.adapter.quantization else model.to(device)  # type: ignore[arg-type]
    outside = {str(place) for place in getattr(model, "hf_device_map", {}).values()} & {"cpu", "disk"}
    if torch.cuda.is_available() and outside:
        raise UserError(f"model.device_map: the GPUs are too small; layers would be on {', '.join(outside)}")
    return model


def make_ready(model: PreTrainedModel, config: Config, trains: bool, compiled: bool) -> None:
    """Let a model compute log-probabilities as the configuration asks. Raise UserError if it cannot."""
    disable_dropout(model)
    if trains and config.activation_checkpointing:
        with refusing("activation_checkpointing=true"):
            model.activation_checkpointing_enable({"use_reentrant": False}, config.activation_checkpointing_every)
    with refusing(f"{type(model).__name__} is not supported"):
        add_token_logps(model)
    if compiled:
        _compile_blocks(model, config)


def _compile_blocks(model: PreTrainedModel, config: Config) -> None:
    """Compile the model's blocks for passes over whole rows, in which all blocks share a graph.

    The model's own forward pass stays as it is: in sampling, with a cache, each block would have a graph of its own.
    """
    # Numbers of the blocks, such as the size of a head, are constants. FSDP would make variables of them, and blocks of
    # experts would then compile for minutes.
    torch._dynamo.config.specialize_int = torch._dynamo.config.specialize_float = True
    torch._dynamo.config.recompile_limit = MOST_GRAPHS
    for block in parallel.blocks(model, config.model.block_name or config.model.block):
        block.forward = torch.compile(block.forward, dynamic=True)  # without hooks, which are FSDP's
    forward = model.forward

    @functools.wraps(forward)
    def forward_by_rows(*args: Any, **inputs: Any) -> Any:
        if "sources" in inputs:
            return forward(*args, **inputs)
        with torch.compiler.set_stance("force_eager"):
            return forward(*args, **inputs)

    model.forward = forward_by_rows  # type: ignore[method-assign]


def whole_model(name: str, config: Config) -> str | Path:
    """Return the folder or hub id of the model that `name` means: for an adapter's folder, of what it lies on."""
    source = local_folder(name, config.cache)
    return _base_of(config, Path(source), source) if base_of(source) else source


def _base_of(config: Config, adapter: Path, source: str | Path) -> str | Path:
    """Return the model that `adapter` lies on: a folder or hub id that the adapter names, or `source`, which the
    configuration names. Raise UserError if it is not known that they belong together."""
    name = base_of(adapter)
    assert name is not None
    if base_of(name):
        raise UserError(f"the adapter {adapter} lies on {name}, which is an adapter itself; merge that one first")
    if Path(name).is_dir() or name == str(source) or (adapter == Path(source) and not name.startswith((".", "/", "~"))):
        return name
    with contextlib.suppress(UserError):  # it may be an adapter of another program
        known = read_state(adapter)["config"]["model"]
        if not known["archive"]:  # such as a converted file, whose folder is gone
            again = local_folder(known["name_or_path"], config.cache)
            if str(source) in (str(adapter), str(again)) and Path(again).name == Path(name).name:
                return again
    if adapter == Path(source):
        raise UserError(
            f"the adapter {adapter} lies on {name}, which is gone; put it back. A merged model in the cache is made "
            "again by the command that made it (adapter.stack=true)"
        )
    raise UserError(
        f"the adapter {adapter} lies on {name}, and this run's model is {source}: set model= to that model. If it is "
        f"the same one, under another name, write that as base_model_name_or_path into its {adapters.CONFIG_FILE}"
    )


def _put_adapter_on(model: PreTrainedModel, config: Config, base: str, folder: Path | None, trains: bool) -> None:
    """Put the adapter in `folder` on the model, or a fresh one if there is none."""
    if folder is None:
        before = _logps_of_any(model)
        adapters.put_on(model, adapters.peft_config(config.adapter), base, config.seed)
        exact = config.compute_dtype == model.dtype == torch.float32
        if not (change := float((_logps_of_any(model) - before).abs().mean())) <= (1e-3 if exact else 0.1):
            raise UserError(
                f"this adapter changes the model before it is trained, by {change:.2g} nats a token, and that model "
                "would be lost: policies are compared with where they began. Choose one that adds nothing at first "
                "(adapter.init=true)"
            )
        return
    if trains and not config.adapter.peft_type:
        raise UserError(
            f"{folder} is an adapter. To train it further: adapter=lora; to merge it and put a fresh one on: "
            "adapter=lora adapter.stack=true; to train all weights: first scripts/export.py --merge"
        )
    found, state = adapters.read(folder)
    known, stored = stored_quantization(folder)
    if trains and known and stored != config.adapter.quantization:
        raise UserError(
            f"adapter.quantization={config.adapter.quantization}, but model.archive={folder} was trained with "
            f"{stored}: on other weights it is another policy. Set adapter.quantization={stored or 'null'}, or "
            "adapter.stack=true to merge it first"
        )
    kind = str(found.peft_type).removeprefix("PeftType.")
    if trains and kind != config.adapter.peft_type:
        raise UserError(
            f"adapter.peft_type={config.adapter.peft_type}, but model.archive={folder} holds an adapter of "
            f"{kind}: set adapter.peft_type={kind} to train it further, or adapter.stack=true for a fresh one on top"
        )
    adapters.put_on(model, found, base, config.seed)
    adapters.load(model, state, folder)
    if trains:
        log(f"the adapter of {folder} is trained further, with its own settings: {adapters.described(model)}")


@torch.no_grad()
def _logps_of_any(model: PreTrainedModel) -> Tensor:
    """Return the model's log-probabilities of every token after some tokens."""
    size = model.config.get_text_config().vocab_size
    ids = torch.arange(16, device=input_device(model))[None] * 7919 % size
    found = model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
    parallel.reshard(model)
    return found


def stored_quantization(folder: Path) -> tuple[bool, Any]:
    """Return whether it is known how the weights were quantised when the adapter in a folder was trained, and how."""
    with contextlib.suppress(UserError, KeyError):  # of another program
        return (True, read_state(folder)["config"]["adapter"]["quantization"]) if base_of(folder) else (False, None)
    return False, None


def merged_folder(config: Config, adapter: Path) -> Path:
    """Return a model folder in the cache: what `adapter` lies on, with the adapter added to its weights. Made once."""

    def merge(folder: Path) -> None:
        log(f"merging {adapter} into its base (once)")
        merged_model(config, adapter).save_pretrained(folder)
        load_tokenizer(config).save_pretrained(folder)
        for file in (STATE_FILE, TRAINED_ON):  # what is known of the adapter's training
            if (adapter / file).is_file():
                (folder / file).parent.mkdir(exist_ok=True)
                shutil.copy(adapter / file, folder / file)

    content = weights_identity(str(adapter)), config.model.policy_dtype, stored_quantization(adapter)
    digest = hashlib.sha256(str(content).encode()).hexdigest()
    return cached(config.cache / "models", f"merged-{digest[:16]}-{MERGED_VERSION}", merge)


def merged_model(config: Config, adapter: Path) -> PreTrainedModel:
    """Return what `adapter` lies on with the adapter added to its weights, on the CPU.

    Weights that were quantised when the adapter was trained are quantised, and then taken back to model.policy_dtype:
    that is what it was trained for.
    """
    base = _base_of(config, adapter, local_folder(config.model.name_or_path, config.cache))
    stored = stored_quantization(adapter)[1]
    trained_on = replace(config, adapter=replace(config.adapter, quantization=stored))
    model: Any = _read_model(trained_on, base, None, None, torch.device("cpu"))
    if trained_on.adapter.quantization:
        model = model.dequantize(getattr(torch, config.model.policy_dtype))
    return adapters.merged(model, adapter)


def _read_model(
    config: Config,
    source: str | Path,
    archive: Archive | None,
    sharding: parallel.Sharding | None,
    device: torch.device,
) -> PreTrainedModel:
    """Return the model of `source`, with the weights of `archive` if there is one."""
    state = archive.state if archive is not None else None
    folder = archive.path if archive is not None and state is None else source
    options: dict[str, Any] = {"dtype": getattr(torch, config.model.policy_dtype), "output_loading_info": True}
    options |= _own_code(config)
    if config.adapter.quantization:
        reading = quantization.loading(config.adapter.quantization, config.compute_dtype)
        options |= {"quantization_config": reading, "device_map": {"": device}}
    if archive is None or state is None:
        with refusing(f"no model could be read from {folder}"):
            model, info = _from_pretrained(config, folder, None, options, sharding)
            _check_complete(info, f"the weights of {folder}", "is the folder complete, and of a causal language model?")
        return quantization.compute_alike(model, config.compute_dtype) if config.adapter.quantization else model
    with refusing(f"model.archive={archive.path} is of another architecture"):
        state = {name: tensor for name, tensor in state.items() if not name.endswith(OLD_BUFFERS)}
        model, info = _from_pretrained(config, folder, state, options, sharding)
        missing, unknown = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
        if missing or unknown:
            raise ValueError(f"it lacks {missing[:2] or 'nothing'} and has the unknown {unknown[:2] or 'nothing'}")
    return model


def _from_pretrained(
    config: Config,
    source: str | Path,
    state: dict[str, Tensor] | None,
    options: dict[str, Any],
    sharding: parallel.Sharding | None,
) -> Any:
    """Return transformers' `(model, loading info)`, with weights from `source`, or `state` if it is given."""
    model_class: Any = AutoModelForCausalLM
    if sharding is not None or state is not None:
        options["config"] = AutoConfig.from_pretrained(source, **_own_code(config))
        model_class = patches.class_of(options["config"])
    if sharding is not None:
        model_class = patches.sharded(model_class, sharding)
        options |= patches.sharded_options()
    elif config.model.device_map:
        options["device_map"] = config.model.device_map
    if state is None:
        return model_class.from_pretrained(source, **options)
    return model_class.from_pretrained(None, state_dict=state, **options)


def _check_complete(info: dict[str, Any], weights: str, advice: str) -> None:
    """Raise UserError if tensors are missing (transformers initialises them at random) or unknown (it skips them)."""
    missing = sorted(info["missing_keys"])
    unknown = sorted(name for name in info["unexpected_keys"] if not name.endswith(OLD_BUFFERS))
    for names, problem in (
        (missing, "lack {} tensors that the model needs"),
        (unknown, "have {} tensors unknown to it"),
    ):
        if names:
            raise UserError(f"{weights} {problem.format(len(names))}, such as {visible(names[0])}; {advice}")


def _check_same_architecture(config: Config, source: str | Path, archive: Archive) -> None:
    """Raise UserError unless the archive's config.json describes the same network as `source`'s."""
    if archive.state is not None:
        return
    configs = []
    for key, place in (("name_or_path", source), ("archive", archive.path)):
        with refusing(f"model.{key}={place}: its config cannot be read"):
            configs.append(AutoConfig.from_pretrained(place, **_own_code(config)))
    for key in ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        wanted, given = (getattr(found, key, None) for found in configs)
        if wanted != given:
            raise UserError(
                f"model.archive={archive.path} is of another architecture than "
                f"model.name_or_path={config.model.name_or_path}: {key} is {given} there and {wanted} here; "
                "set model= to the model it was trained from"
            )


def local_folder(name: str, cache: Path) -> str | Path:
    """Return `name` itself, or the folder that a .gguf file is converted to. Raises UserError for a missing path."""
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
        given: dict[str, Any] = {"gguf_file": path.name, "trust_remote_code": False}
        options: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True}
        with refusing(f"{path} could not be read as a GGUF model"):
            tokenizer = AutoTokenizer.from_pretrained(path.parent, **given)
            loaded: Any = AutoModelForCausalLM.from_pretrained(path.parent, **options, **given)
            model, info = loaded
            info["unexpected_keys"] = patches.unknown_gguf_tensors(path, model)
        _check_complete(info, str(path), "is the file complete, and of a model that transformers can read from GGUF?")
        patches.forget_quantization(model)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return cached(cache / "models", f"{path.stem}-{file_hash_once(path)[:16]}-{GGUF_VERSION}", convert)
