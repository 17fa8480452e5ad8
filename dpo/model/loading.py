"""Load policy and tokenizer; log-probabilities of a batch's responses."""

import contextlib
import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
    read_field,
)
from transformers.modeling_outputs import BaseModelOutputWithPast

from dpo import parallel
from dpo.data.batching import Batch, Tree
from dpo.data.cache import cached
from dpo.model.layouts import Rows, lay_out, model_inputs, set_attention
from dpo.parallel import Sharding
from dpo.run.config import Config
from dpo.run.weights import Archive, find_archive, resolve_archive
from dpo.utils import UserError, file_hash, is_passing, log, visible

# Buffers in a policy.pt of older versions of transformers, which today's models compute: causal masks and frequencies.
OLD_BUFFERS = (".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias", "rotary_emb.inv_freq")
LOGITS_AT_ONCE = 2**25
"""Logits (positions x vocabulary) that exist at a time: 128 MiB in float32."""
GGUF_VERSION = 2
"""Of the folders that GGUF files are converted to: raise it if the conversion changes."""
# Names of attributes that are probabilities or sizes of noise in training: of dropout, layer drop, stochastic depth and
# routers. Jitter may have a part in evaluation too.
_NOISE, _JITTER = re.compile("drop|jitter|stochastic|noise"), re.compile("jitter|noise")
_SEEDS = range(1, 5)


@contextlib.contextmanager
def refusing(message: str) -> Iterator[None]:
    """Turn an exception that a model or tokenizer causes into a UserError: `message` and the exception's first line.

    Want of memory, and the end of another process, stay what they are.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # files, configurations and code of models raise what they like
        if is_passing(error):
            raise
        raise UserError(f"{message}: {_first_line(error)}") from error


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
    """The tokenizer that model.tokenizer_name_or_path names, else the archive's, else the model's.

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
        with contextlib.suppress(Exception):  # it is not needed
            if different := tokenizer_differences(tokenizer, _read_tokenizer(others[0], config)):
                log(f"the tokenizer is that of {name}; that of {others[0]} differs in its {', '.join(different)}")
    return tokenizer


def _read_tokenizer(name: str, config: Config) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(local_folder(name, config.cache), **_own_code(config))


def _archive_tokenizer(config: Config) -> str | None:
    """The folder of model.archive if it has a tokenizer."""
    path = find_archive(config.model.archive) if config.model.archive else None
    files = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")
    return str(path) if path is not None and any((path / file).is_file() for file in files) else None


def tokenizer_differences(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> list[str]:
    """In what two tokenizers differ; empty if they give any text the same ids."""

    def facts(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        rules = json.loads(backend.to_str()) if backend is not None else {}
        return {
            "vocabulary": tokenizer.get_vocab(),
            "special tokens": tokenizer.special_tokens_map,
            "chat template": tokenizer.chat_template,
            "rules": {key: rules.get(key) for key in ("normalizer", "pre_tokenizer", "post_processor", "model")},
        }

    ours, theirs = facts(one), facts(other)
    return [name for name, value in ours.items() if value != theirs[name]]


def load_policy(
    config: Config,
    device: torch.device,
    sharding: Sharding | None = None,
    archive: str | None = None,
    trains: bool = True,
    compiled: bool = True,
) -> PreTrainedModel:
    """The model, in model.policy_dtype, without dropout, with the weights of `archive` where one is given.

    Activation checkpointing is for a model that `trains`: it makes the embeddings require a gradient. `compiled`: if
    the configuration says so. With `sharding` each process holds and reads only its shards. Raises UserError for a
    name, folder or archive that cannot be read or does not fit.
    """
    source = local_folder(config.model.name_or_path, config.cache)
    found = resolve_archive(archive) if archive else None
    if found is not None:
        _check_same_architecture(config, source, found)
        if trains and archive == config.model.archive:
            log(f"starting from the weights of {found.path}{found.describe()}")
    folder = found.path if found is not None and found.state is None else source
    state = found.state if found is not None else None
    where = f"no model could be read from {folder}"
    if found is not None and state is not None:
        where = f"model.archive={found.path} is of another architecture"
    if Path(folder, "adapter_config.json").is_file():
        raise UserError(f"{folder} holds an adapter, which would be left out; merge it into the model's weights first")
    with refusing(where):
        model = _from_pretrained(folder, state, _loading_options(config, device, sharding), sharding)
    disable_dropout(model)
    if device.type == "cpu" or sharding is not None:
        # On CPUs weights are views of their files: one that is overwritten during the run would change the model.
        model._apply(lambda tensor: tensor.clone() if tensor.device.type == "cpu" else tensor)
    if trains and config.activation_checkpointing:
        with refusing("activation_checkpointing=true"):
            model.activation_checkpointing_enable({"use_reentrant": False}, config.activation_checkpointing_every)
    with refusing(f"{type(model).__name__} is not supported"):
        add_token_logps(model)
    if config.compile and compiled:
        for block in parallel.blocks(model, config.model.block_name or config.model.block):
            block.compile(dynamic=True)
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
    options |= _own_code(config)
    if sharding is not None:
        return options | parallel.loading_options()
    return options | ({"device_map": config.model.device_map} if config.model.device_map else {})


def _own_code(config: Config) -> dict[str, Any]:
    """Whether code of a model's folder may run; without an answer transformers would ask the terminal."""
    return {"trust_remote_code": config.model.trust_remote_code}


def check_fits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: Config) -> None:
    """Raise UserError where token ids or positions would lie outside the model's tables."""
    with refusing(f"{type(model).__name__} is not supported"):
        weight = model.get_input_embeddings().weight
        assert isinstance(weight, Tensor)
    if len(tokenizer) > len(weight):
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens but the model embeds {len(weight)}: "
            "is model.tokenizer_name_or_path that of this model?"
        )
    most, reason = positions(model.config)
    if most is not None and config.max_length > most:
        raise UserError(f"max_length={config.max_length} is more than the {most} positions {reason}; lower it")


def positions(config: PreTrainedConfig) -> tuple[int | None, str]:
    """How many tokens a row may have (None: any number), and the reason, for a message.

    LongRoPE takes other frequencies for all rows of a batch if its longest row passes a limit, so a longer row would
    change the log-probabilities of the shorter ones beside it.
    """
    text = config.get_text_config()
    most, reason = getattr(text, "max_position_embeddings", None), "of the model"
    most = None if most is not None and most < 0 else most  # XLNet's way to say that there is no limit
    rope = getattr(text, "rope_parameters", None) or {}
    for kind in (rope, *(kind for kind in rope.values() if isinstance(kind, dict))):
        limit = kind.get("original_max_position_embeddings")
        switches = kind.get("rope_type") == "longrope" and kind.get("long_factor") != kind.get("short_factor")
        if switches and limit and (most is None or limit < most):
            most, reason = limit, "up to which the model's LongRoPE computes all rows alike"
    return most, reason


def _from_pretrained(
    source: str | Path, state: dict[str, Tensor] | None, options: dict[str, Any], sharding: Sharding | None
) -> PreTrainedModel:
    """The model of `source`, with its weights or with those of `state`: a policy.pt of the original code."""
    model_class: Any = AutoModelForCausalLM
    if sharding is not None or state is not None:
        options["config"] = AutoConfig.from_pretrained(source, trust_remote_code=options["trust_remote_code"])
        model_class = AutoModelForCausalLM._model_mapping[type(options["config"])]
    if sharding is not None:
        model_class = parallel.sharded(model_class, sharding)
    if state is None:
        model, info = model_class.from_pretrained(source, **options)
    else:
        # Old transformers saved buffers that today's models compute.
        state = {name: tensor for name, tensor in state.items() if not name.endswith(OLD_BUFFERS)}
        model, info = model_class.from_pretrained(None, state_dict=state, **options)
    if state is None:
        _check_complete(info, f"the weights of {source}", "is the folder complete, and of a causal language model?")
    else:
        missing, unknown = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
        if missing or unknown:
            raise ValueError(f"it lacks {missing[:2] or 'nothing'} and has the unknown {unknown[:2] or 'nothing'}")
    return model


def _check_complete(info: dict[str, Any], weights: str, advice: str) -> None:
    """Raise UserError if tensors are missing, which would be made up at random, or unknown, which would be left out."""
    missing = sorted(info["missing_keys"])
    unknown = sorted(name for name in info["unexpected_keys"] if not name.endswith(OLD_BUFFERS))
    for names, what in ((missing, "lack {} tensors that the model needs"), (unknown, "have {} tensors unknown to it")):
        if names:
            raise UserError(f"{weights} {what.format(len(names))}, such as {visible(names[0])}; {advice}")


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
        given: dict[str, Any] = {"gguf_file": path.name, "trust_remote_code": False}
        options: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True}
        with refusing(f"{path} could not be read as a GGUF model"):
            tokenizer = AutoTokenizer.from_pretrained(path.parent, **given)
            loaded: Any = AutoModelForCausalLM.from_pretrained(path.parent, **options, **given)
            model, info = loaded
            info["unexpected_keys"] = _unknown_gguf_tensors(path, model)
        _check_complete(info, str(path), "is the file complete, and of a model that transformers can read from GGUF?")
        # The weights are no longer quantised; transformers refuses to save a model that says they are.
        del model.config.quantization_config
        model.hf_quantizer = None  # type: ignore[assignment]
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return cached(cache / "models", f"{path.stem}-{file_hash(path)[:16]}-{GGUF_VERSION}", convert)


def _unknown_gguf_tensors(path: Path, model: PreTrainedModel) -> list[str]:
    """The file's tensors that transformers passes over without a word.

    Experts' are cut up or put together on the way: one that is not used leaves others missing.
    """
    from gguf import GGUFReader

    reader = GGUFReader(path)
    architecture = str(read_field(reader, "general.architecture")[0])
    known = get_gguf_hf_weights_map(model, TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config={}))
    return [t.name for t in reader.tensors if t.name not in known and not re.search("_exps|_shexp", t.name)]


def disable_dropout(model: torch.nn.Module) -> None:
    """Set every probability of dropout, layer drop and stochastic depth, and every jitter of routers, to 0, so that
    policy and reference compute the same function. What was not 0 is remembered for `check_noise`."""
    switched_off: list[tuple[torch.nn.Module, str, float]] = []
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and value and _NOISE.search(name.lower()):
                switched_off.append((module, name, value))
    for module, name, _ in switched_off:
        setattr(module, name, 0.0)
    vars(model)["switched_off"] = switched_off


def _first_line(error: BaseException) -> str:
    message = visible((str(error).strip() or type(error).__name__).splitlines()[0][:300])
    if "trust_remote_code" in message or "custom code" in message:
        return "it needs code of its own; where you trust that as a program of yours, set model.trust_remote_code=true"
    return message


@dataclass(frozen=True)
class TokenLogps:
    """log p(token | all before it) in nats, float32 [responses, longest response]; `mask` is true where one exists and
    counts (see `batching.Tree`)."""

    logps: Tensor
    mask: Tensor

    def of(self, batch: Batch) -> "TokenLogps":
        """The same, without tokens of `batch` that do not count."""
        counted = batch.counted(self.mask.shape[1])
        return (
            self
            if counted is None
            else TokenLogps(self.logps, self.mask & torch.from_numpy(counted).to(self.mask.device))
        )

    def to(self, device: torch.device) -> "TokenLogps":
        """The same on `device`."""
        return TokenLogps(self.logps.to(device), self.mask.to(device))


class _Output(BaseModelOutputWithPast):
    def __getattr__(self, name: str) -> None:
        """Some models ask for more than there is without a cache: cross-attentions, logits of a router."""


class _Given:
    """Stands in for a model's body: gives hidden states that are there already."""

    def __init__(self, hidden: Tensor):
        self.output = _Output(last_hidden_state=hidden)

    def __call__(self, *inputs: Any, **more: Any) -> _Output:
        return self.output

    def __getattr__(self, name: str) -> "_Given":
        return self


def add_token_logps(model: PreTrainedModel) -> PreTrainedModel:
    """Let `model(sources=..., targets=..., **inputs)` return log p(targets) [n], read at the slots `sources` [n];
    without targets, of every token: [n, vocabulary].

    Logits for targets exist only for these slots, LOGITS_AT_ONCE of them at a time, and are computed again in backward.
    They come from the model's own forward with its body replaced, so that one that scales or caps them still does.
    As a part of the model's forward, this finds the weights that FSDP has gathered for it.
    """
    own, body = model.forward, model.base_model_prefix
    step = max(LOGITS_AT_ONCE // model.config.get_text_config().vocab_size, 1)

    def logits(hidden: Tensor) -> Tensor:
        module = model._modules[body]
        model._modules[body] = _Given(hidden[None])  # type: ignore[assignment]
        try:
            return own(use_cache=False).logits
        finally:
            model._modules[body] = module

    def logps(hidden: Tensor, targets: Tensor) -> Tensor:
        return parallel.label_logps(logits(hidden), targets[None].to(hidden.device))[0]

    @functools.wraps(own)
    def forward(*args: Any, sources: Tensor | None = None, targets: Tensor | None = None, **inputs: Any) -> Any:
        if sources is None:
            return own(*args, **inputs)
        states = model.get_decoder()(*args, use_cache=False, **inputs).last_hidden_state.flatten(0, 1)
        states = states[sources.to(states.device)]
        if targets is None:
            return parallel.full(logits(states))[0].float().log_softmax(-1)
        chunks = zip(states.split(step), targets.split(step), strict=True)
        return torch.cat([checkpoint(logps, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks])

    model.forward = forward  # type: ignore[method-assign]
    return model


@dataclass(frozen=True)
class Computation:
    """How log-probabilities are computed: the type of matrix products, and how trees are laid on rows."""

    dtype: torch.dtype
    layout: str = "padded"
    flex: bool = False
    """Whether a packed row's attention is computed by FlexAttention, not with a mask of all pairs of tokens."""
    tolerance: float = 1e-4
    """By how much two ways of computing the same may differ, as the mean over tokens in nats: rounding of `dtype`."""


def pick_computation(model: PreTrainedModel, config: Config) -> Computation:
    """What the configuration asks for: layout `auto` is `packed` on CUDA, else `tree`, for every model that computes
    it as it does `padded`.

    They are compared on made-up trees as long as the data's can be, so that a window or a learned position that is
    counted along the row shows. Raises UserError where the layout that is asked for differs.
    """
    dtype = config.compute_dtype
    cuda = input_device(model).type == "cuda"
    exact = dtype == torch.float32 and not (cuda and config.allow_tf32)
    padded = Computation(dtype, tolerance=1e-4 if exact else 0.1)
    _check_supported(model, padded, config)
    return _pick_layout(model, config, padded)


def _check_supported(model: PreTrainedModel, padded: Computation, config: Config) -> None:
    """Raise UserError unless rows are computed causally, each for itself, and to what the model's own logits say."""
    who, per_token = f"{type(model).__name__} is not supported", "nats per token"
    try:
        with refusing(f"{who}: its forward pass failed"):
            head = head_difference(model, padded.dtype)
            company, ahead = company_differences(model, padded, config.max_length)
    except UserError as error:
        if isinstance(error.__cause__, TorchDynamoException):
            reason = _first_line(error.__cause__)
            raise UserError(f"compile=true: the blocks cannot be compiled here: {reason}") from error
        raise
    if not math.isfinite(head):
        raise UserError(
            f"the log-probabilities of {type(model).__name__} are not finite: its weights hold NaN or infinity, or "
            f"{padded.dtype} is too small for them; look at the weights, or compute in float32 (mixed_precision=null)"
        )
    if not company <= padded.tolerance:
        raise UserError(
            f"{who}: log-probabilities of short rows differ by {company:.2g} {per_token} if a row of "
            f"max_length={config.max_length} tokens is computed with them; lower max_length"
        )
    if not ahead <= padded.tolerance:
        raise UserError(
            f"{who}: it is not causal; log-probabilities of a row's first tokens differ by {ahead:.2g} {per_token} if "
            "others follow (set is_decoder to true in its config.json if it has that key)"
        )
    if head > padded.tolerance:
        raise UserError(
            f"{who}: its log-probabilities, computed a part at a time, differ by {head:.2g} {per_token} from those of "
            "its own logits"
        )


def _pick_layout(model: PreTrainedModel, config: Config, padded: Computation) -> Computation:
    """The first of the layouts that `config` allows which gives what `padded` gives."""
    cuda = input_device(model).type == "cuda"
    wanted = [config.layout] if config.layout != "auto" else ["packed", "tree"] if cuda else ["tree"]
    for layout in wanted if config.layout != "padded" else []:
        how = dataclasses.replace(padded, layout=layout, flex=cuda and layout == "packed")
        try:
            found = layout_difference(model, how, config.max_prompt_length, config.max_length)
            if found <= how.tolerance:
                return how
            reason = f"log-probabilities differ by {found:.2g} nats per token, more than {how.tolerance}"
        except Exception as error:  # models and compilers refuse in many ways
            reason = _first_line(error)
        if layout == config.layout:
            raise UserError(f"layout={layout} is not exact for {type(model).__name__}: {reason}; set layout=padded")
        log(f"not layout={layout}: {type(model).__name__} does not compute it exactly ({reason})")
    return padded


@torch.no_grad()
def head_difference(model: PreTrainedModel, dtype: torch.dtype) -> float:
    """Mean absolute difference of `response_logps` from the log-softmax of the model's own logits, nats per token."""
    ids = list(range(8))
    found = response_logps(model, Batch([Tree(ids[:1], [ids[1:]])], [], None), Computation(dtype))
    device = input_device(model)
    with autocast(model, dtype):
        logits = model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits
    own = parallel.label_logps(logits[:, :-1], torch.tensor([ids[1:]], device=logits.device))
    return float((found.logps - own).abs().mean())


@torch.no_grad()
def layout_difference(model: PreTrainedModel, how: Computation, prompt_length: int, length: int) -> float:
    """Mean absolute difference of `how`'s log-probabilities from `padded` ones on trees of random tokens, in nats per
    token."""
    ids = _random_ids(model, 2 * length)
    long, short = ids[prompt_length:length], ids[length : length + max((length - prompt_length) // 2, 1)]
    batch = Batch([Tree(ids[:prompt_length], [long, short, long[::-1]]), Tree(ids[:1], [short])], [], None)
    found, padded = (response_logps(model, batch, way) for way in (how, Computation(how.dtype)))
    return float((found.logps - padded.logps)[padded.mask].abs().mean())


@torch.no_grad()
def company_differences(model: PreTrainedModel, how: Computation, length: int) -> tuple[float, float]:
    """By how much log-probabilities change, at most, as the mean over a row's tokens in nats: of short rows if one of
    `length` tokens is computed with them, as some models choose what they compute by the longest row; and of the same
    tokens if others follow in the row, as in models that are not causal."""
    ids = _random_ids(model, length + 1)
    trees = [Tree(ids[:1], [ids[1 : 1 + n]]) for n in (length, length // 4 + 1, 8)]
    long, *together = response_logps(model, Batch(trees, [], None), how).logps
    company, ahead = [], []
    for tree, beside in zip(trees[1:], together, strict=True):
        alone = response_logps(model, Batch([tree], [], None), how).logps[0]
        company.append((beside[: len(alone)] - alone).abs().mean())
        ahead.append((long[: len(alone)] - beside[: len(alone)]).abs().mean())
    return float(torch.stack(company).max()), float(torch.stack(ahead).max())


@torch.no_grad()
def check_noise(model: PreTrainedModel, how: Computation) -> None:
    """Raise UserError unless the model computes in training what it computes in evaluation, each time.

    If two passes with the same random numbers differ, as on some GPUs, the others may differ by rounding, too.
    """
    ids, training, who = _random_ids(model, 24), model.training, type(model).__name__
    batch, device = Batch([Tree(ids[:4], [ids[4:], ids[:-4]])], [], None), input_device(model)

    def logps(seed: int, train: bool = True) -> Tensor:
        torch.manual_seed(seed)
        return response_logps(model.train(train), batch, how).logps

    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        evaluated, first = logps(0, train=False), logps(0)
        exact = torch.equal(first, logps(0))
        noise = float(torch.stack([(logps(seed) - first).abs().mean() for seed in _SEEDS]).max())
        jitter = [
            (module, name, value) for module, name, value in vars(model).get("switched_off", []) if _JITTER.search(name)
        ]
        for module, name, value in jitter:
            setattr(module, name, value)
        needs_jitter = jitter and not torch.equal(evaluated, logps(0, train=False))
        for module, name, _ in jitter:
            setattr(module, name, 0.0)
    model.train(training)
    if needs_jitter:
        names = ", ".join(sorted({f"{name}={value}" for _, name, value in jitter}))
        raise UserError(f"{who} is not supported: {names} is noise in training and has a part in evaluation, too")
    if not noise <= (0.0 if exact else how.tolerance):
        config = model.config.get_text_config().to_dict().items()
        keys = [f"{key}={value}" for key, value in config if value and isinstance(value, float) and _NOISE.search(key)]
        advice = f"set {', '.join(keys)} to 0 in its config.json" if keys else "it cannot be switched off"
        raise UserError(f"{who} computes with noise in training, of {noise:.2g} nats per token: {advice}")
    if not (difference := float((first - evaluated).abs().mean())) <= how.tolerance:
        raise UserError(
            f"{who} is not supported: it computes other log-probabilities in training than in evaluation, by "
            f"{difference:.2g} nats per token"
        )


def _random_ids(model: PreTrainedModel, n: int) -> list[int]:
    """`n` made-up token ids, always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.get_text_config().vocab_size, (n,), generator=generator).tolist()


def response_logps(model: PreTrainedModel, batch: Batch, how: Computation) -> TokenLogps:
    """Log-probability of each token of the batch's responses, in the order of its trees.

    The log-softmax is float32 whatever the model's type. The first token of a response has none where there is neither
    prompt nor BOS before it.
    """
    rows, inputs = _inputs(model, batch, how)
    with autocast(model, how.dtype):
        found = model(**inputs, sources=rows.sources, targets=rows.targets)
    places = rows.places.to(found.device)
    logps = found.new_zeros(rows.shape).flatten().index_put((places,), found)
    mask = torch.zeros(logps.shape, dtype=torch.bool, device=found.device).index_fill(0, places, True)
    return TokenLogps(logps.view(rows.shape), mask.view(rows.shape)).of(batch)


def next_token_logps(model: PreTrainedModel, batch: Batch, how: Computation) -> tuple[Tensor, Rows]:
    """log p(token | all before it) of every token of the vocabulary, float32 [n, vocabulary], where the batch's rows
    (which come with it) have a response token: n of them. All exist at once: for few rows."""
    rows, inputs = _inputs(model, batch, how)
    with autocast(model, how.dtype):
        return model(**inputs, sources=rows.sources), rows


def _inputs(model: PreTrainedModel, batch: Batch, how: Computation) -> tuple[Rows, dict[str, Any]]:
    """The rows of a batch, and what the model needs to compute them."""
    set_attention(model, how.flex)
    rows = lay_out(batch, how.layout).to(input_device(model))
    return rows, model_inputs(rows, how.layout, model.config.get_text_config(), how.dtype, how.flex)


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
