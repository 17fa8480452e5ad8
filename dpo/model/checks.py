"""Whether a model computes what training assumes: the same in every mode, row and layout. Else it is refused."""

import contextlib
import math
import re
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from dpo import parallel
from dpo.data.batching import Batch, Tree
from dpo.model.logps import Computation, TokenLogps, autocast, input_device, response_logps
from dpo.model.verdicts import Verdict, structure
from dpo.run.config import Config
from dpo.utils import UserError, is_passing, log, visible

# Names of attributes that are probabilities or sizes of noise in training: of dropout, layer drop, stochastic depth and
# routers. Jitter may act in evaluation too.
_NOISE, _JITTER = re.compile("drop|jitter|stochastic|noise"), re.compile("jitter|noise")
_SEEDS = range(1, 5)


@contextlib.contextmanager
def refusing(message: str) -> Iterator[None]:
    """Turn an exception that a model or tokenizer causes into a UserError: `message` and the exception's first line.

    Lack of memory, and the end of another process, keep their exceptions.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # files, configurations and code of models raise exceptions of any class
        if is_passing(error):
            raise
        raise UserError(f"{message}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    message = visible((str(error).strip() or type(error).__name__).splitlines()[0][:300])
    if "trust_remote_code" in message or "custom code" in message:
        return "it needs code of its own; if you trust that code like a program, set model.trust_remote_code=true"
    return message


def check_fits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: Config) -> None:
    """Raise UserError if token ids or positions can lie outside the model's tables."""
    with refusing(f"{type(model).__name__} is not supported"):
        n_embedded = len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
    if len(tokenizer) > n_embedded:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens but the model embeds {n_embedded}: "
            "is model.tokenizer_name_or_path that of this model?"
        )
    most, reason = positions(model.config)
    if most is not None and config.max_length > most:
        raise UserError(f"max_length={config.max_length} is more than the {most} positions {reason}; lower it")


def positions(config: PreTrainedConfig) -> tuple[int | None, str]:
    """Return how many tokens a row may have (None: no limit), and the reason, for a message.

    If the longest row of a batch passes LongRoPE's limit, all its rows get other frequencies. So a longer row would
    change the log-probabilities of shorter ones beside it.
    """
    text = config.get_text_config()
    most, reason = getattr(text, "max_position_embeddings", None), "of the model"
    most = None if most is not None and most < 0 else most  # XLNet has no limit, and says so by -1
    rope = getattr(text, "rope_parameters", None) or {}
    for kind in (rope, *(kind for kind in rope.values() if isinstance(kind, dict))):
        limit = kind.get("original_max_position_embeddings")
        switches = kind.get("rope_type") == "longrope" and kind.get("long_factor") != kind.get("short_factor")
        if switches and limit and (most is None or limit < most):
            most, reason = limit, "up to which the model's LongRoPE computes all rows alike"
    return most, reason


def disable_dropout(model: torch.nn.Module) -> None:
    """Set dropout, layer drop, stochastic depth and router jitter to 0, so that policy and reference are one function.

    `model.switched_off` keeps (module, attribute, value) of each that was not 0, for `check_noise`.
    """
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


@torch.no_grad()
def check_noise(model: PreTrainedModel, how: Computation) -> None:
    """Raise UserError unless the model computes the same in training as in evaluation, every time.

    If two passes with one seed differ, as on some GPUs, passes with other seeds may differ by rounding, too.
    """
    ids, was_training, who = _random_ids(model, 24), model.training, type(model).__name__
    batch, device = Batch([Tree(ids[:4], [ids[4:], ids[:-4]])], [], None), input_device(model)

    def logps(seed: int, train: bool = True) -> Tensor:
        torch.manual_seed(seed)
        return response_logps(model.train(train), batch, how).logps

    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        evaluated, first = logps(0, train=False), logps(0)
        allowed = 0.0 if torch.equal(first, logps(0)) else how.tolerance
        noise = _largest(_distance(logps(seed), first) for seed in _SEEDS)
        jitter = [entry for entry in vars(model).get("switched_off", []) if _JITTER.search(entry[1])]
        for module, name, value in jitter:
            setattr(module, name, value)
        needs_jitter = jitter and not torch.equal(evaluated, logps(0, train=False))
        for module, name, _ in jitter:
            setattr(module, name, 0.0)
    model.train(was_training)
    if needs_jitter:
        names = ", ".join(sorted({f"{name}={value}" for _, name, value in jitter}))
        raise UserError(f"{who} is not supported: {names} is noise in training and acts in evaluation, too")
    if not noise <= allowed:
        config = model.config.get_text_config().to_dict().items()
        keys = [f"{key}={value}" for key, value in config if value and isinstance(value, float) and _NOISE.search(key)]
        advice = f"set {', '.join(keys)} to 0 in its config.json" if keys else "it cannot be switched off"
        raise UserError(f"{who} computes with noise in training, of {noise:.2g} nats per token: {advice}")
    if not (difference := _distance(first, evaluated)) <= how.tolerance:
        raise UserError(
            f"{who} is not supported: it computes other log-probabilities in training than in evaluation, by "
            f"{difference:.2g} nats per token"
        )


def _distance(one: Tensor, other: Tensor) -> float:
    """Return the mean absolute difference of log-probabilities, in nats per token."""
    return float((one - other).abs().mean())


def _largest(values: Iterable[float]) -> float:
    """Return the largest value, NaN if any is NaN."""
    return float(torch.tensor([*values]).max())


def _random_ids(model: PreTrainedModel, n: int) -> list[int]:
    """Return `n` made-up token ids, the same each time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.get_text_config().vocab_size, (n,), generator=generator).tolist()


def _logps(model: PreTrainedModel, how: Computation, *trees: Tree) -> TokenLogps:
    return response_logps(model, Batch([*trees], [], None), how)


def checked_computation(model: PreTrainedModel, config: Config, trains: bool) -> Computation:
    """Return `pick_computation`, after `check_noise` if the model `trains`, or what an earlier start found on the same
    architecture, code, machine and settings (see `verdicts`). With these weights it is checked on a short tree.

    Only what passed at once is kept: a layout that `auto` had to give up is tried again. A collective.
    """
    verdict = Verdict.of(config.cache, "layout", structure(model, config), trains)
    if (layout := verdict.read()) is not None:
        how = computation_of(config, input_device(model), layout)
        if all(parallel.gather(_is_exact(model, how))):
            return how
    how = pick_computation(model, config)
    if trains:
        check_noise(model, how)
    if how.layout == layouts_to_try(config, input_device(model))[0]:
        verdict.keep(how.layout)
    return how


def _is_exact(model: PreTrainedModel, how: Computation) -> bool:
    """Return whether log-probabilities of short rows are finite, and the same in both layouts."""
    try:
        return layout_difference(model, how, 4, 16) <= how.tolerance  # false for NaN
    except Exception:  # models and compilers raise exceptions of any class; the whole check tells what it is
        if parallel.active():  # the other processes may not have failed
            raise
        return False


def computation_of(config: Config, device: torch.device, layout: str) -> Computation:
    """Return how log-probabilities are computed in a layout on `device`."""
    on_gpu = _on_gpu(device)
    exact = config.compute_dtype == torch.float32 and not (on_gpu and config.allow_tf32)
    flex = on_gpu and layout == "packed"
    return Computation(config.compute_dtype, layout, flex, tolerance=1e-4 if exact else 0.1)


def layouts_to_try(config: Config, device: torch.device) -> list[str]:
    """Return the layouts that the configuration allows on `device`, the fastest first."""
    if config.layout != "auto":
        return [config.layout]
    return ["packed", "tree"] if _on_gpu(device) else ["tree"]


def _on_gpu(device: torch.device) -> bool:
    """Return whether FlexAttention and TF32 are there: on CUDA, or if a plan pretends to be on it."""
    return device.type not in ("cpu", "mps")


def pick_computation(model: PreTrainedModel, config: Config) -> Computation:
    """Return how to compute log-probabilities. The layout `auto` is `packed` on CUDA and else `tree`, if it is exact.

    Layouts are compared on made-up trees as long as the data's may be, so that a window or learned position that is
    counted along the row shows. Raises UserError if the model, or the layout that `config` names, is not exact.
    """
    device = input_device(model)
    padded = computation_of(config, device, "padded")
    _check_supported(model, padded, config)
    for layout in layouts_to_try(config, device) if config.layout != "padded" else []:
        how = computation_of(config, device, layout)
        try:
            difference = layout_difference(model, how, config.max_prompt_length, config.max_length)
            if difference <= how.tolerance:
                return how
            reason = f"log-probabilities differ by {difference:.2g} nats per token, more than {how.tolerance}"
        except Exception as error:  # models and compilers raise exceptions of any class
            reason = _first_line(error)
        if layout == config.layout:
            raise UserError(f"layout={layout} is not exact for {type(model).__name__}: {reason}; set layout=padded")
        log(f"not layout={layout}: {type(model).__name__} does not compute it exactly ({reason})")
    return padded


def _check_supported(model: PreTrainedModel, padded: Computation, config: Config) -> None:
    """Raise UserError unless rows are computed causally, each for itself, and agree with the model's own logits."""
    who, per_token = f"{type(model).__name__} is not supported", "nats per token"
    try:
        with refusing(f"{who}: its forward pass failed"):
            head = head_difference(model, padded.dtype)
            batched, ahead = batch_differences(model, padded, config.max_length)
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
    if not batched <= padded.tolerance:
        raise UserError(
            f"{who}: log-probabilities of short rows differ by {batched:.2g} {per_token} if a row of "
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


@torch.no_grad()
def head_difference(model: PreTrainedModel, dtype: torch.dtype) -> float:
    """Return the distance of `response_logps` from the log-softmax of the model's own logits, in nats per token."""
    ids = list(range(8))
    found = _logps(model, Computation(dtype), Tree(ids[:1], [ids[1:]])).logps
    with autocast(model, dtype):
        # As many tokens as the row above has: matrix products of another shape round otherwise, which models amplify.
        logits = model(input_ids=torch.tensor([ids[:-1]], device=input_device(model)), use_cache=False).logits
    return _distance(found, parallel.label_logps(logits, torch.tensor([ids[1:]], device=logits.device)))


@torch.no_grad()
def layout_difference(model: PreTrainedModel, how: Computation, prompt_length: int, length: int) -> float:
    """Return the distance of `how` from layout `padded` on trees of random tokens, in nats per token."""
    ids = _random_ids(model, 2 * length)
    long, short = ids[prompt_length:length], ids[length : length + max((length - prompt_length) // 2, 1)]
    trees = Tree(ids[:prompt_length], [long, short, long[::-1]]), Tree(ids[:1], [short])
    found, padded = (_logps(model, way, *trees) for way in (how, Computation(how.dtype)))
    return _distance(found.logps[padded.mask], padded.logps[padded.mask])


@torch.no_grad()
def batch_differences(model: PreTrainedModel, how: Computation, length: int) -> tuple[float, float]:
    """Return the largest change of log-probabilities, as the mean over a row's tokens in nats, in two cases.

    First of short rows if one of `length` tokens is computed with them: some models choose by the longest row. Then of
    a row's first tokens if others follow, as in models that are not causal.
    """
    ids = _random_ids(model, length + 1)
    trees = [Tree(ids[:1], [ids[1 : 1 + n]]) for n in (length, length // 4 + 1, 8)]
    long, *together = _logps(model, how, *trees).logps
    batched, ahead = [], []
    for tree, beside in zip(trees[1:], together, strict=True):
        alone = _logps(model, how, tree).logps[0]
        batched.append(_distance(beside[: len(alone)], alone))
        ahead.append(_distance(long[: len(alone)], beside[: len(alone)]))
    return _largest(batched), _largest(ahead)
