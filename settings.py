"""The configuration's types, and the one place that checks it. Nothing here edits a value the user gave."""

import hashlib
import importlib.util
import inspect
import json
import math
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from datetime import datetime
from operator import attrgetter
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.override_parser.types import ChoiceSweep, Override
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, MissingMandatoryValue, OmegaConfBaseException

from dpo.data.rows import COLUMNS
from dpo.hints import meant, parsed
from dpo.utils import ROOT, UserError, default_cache, get_local_dir, get_local_run_dir
from losses import LOSSES, Loss
from preference_datasets import REGISTRY, DataSettings

CHOICES = {
    "trainer": ("BasicTrainer", "FSDPTrainer", "TensorParallelTrainer"),
    "layout": ("auto", "packed", "tree", "padded"),
    "reference.mode": ("stored", "live"),
    "lr_schedule": ("constant", "linear", "cosine"),
    "chat_format": ("auto", "template", "hh"),
    "sft_turns": ("last", "all"),
    "checkpoint_check": ("fast", "full"),
    "on_nonfinite": ("stop", "skip"),
    "mixed_precision": ("float32", "bfloat16", "float16"),
    "model.policy_dtype": ("float32", "bfloat16"),  # float16 weights overflow
    "model.device_map": ("balanced",),
    "loss.name": tuple(LOSSES),
    "optimizer": tuple(  # but for those that are abstract, in need of a closure, and for sparse gradients
        name for name in dir(torch.optim) if name[0].isupper() and name not in ("Optimizer", "LBFGS", "SparseAdam")
    ),
}
# What evaluations measure, which keep_best can name.
MEASURED = ["loss/eval", "logps_eval/chosen"]
MEASURED_OF_PAIRS = [f"rewards_eval/{name}" for name in ("accuracies", "margins", "chosen", "rejected")]
MEASURED_OF_PAIRS += ["logps_eval/rejected", "logratios_per_token_eval/chosen", "logratios_per_token_eval/rejected"]
LONGEST_NAME = 120
LONGEST_WARMUP = 150  # updates, the original's; of one that is not given
CONFIG_DIR = ROOT / "config"


@dataclass
class ModelConfig:
    """config/model; the meaning of each key stands in blank_model.yaml."""

    name_or_path: str = ""
    block_name: str | None = None
    block: str | None = None
    tokenizer_name_or_path: str | None = None
    archive: str | None = None
    policy_dtype: str = "float32"
    fsdp_policy_mp: str | None = None
    reference_dtype: str | None = None
    device_map: str | None = None
    trust_remote_code: bool = False

    @property
    def start(self) -> str:
        """What training starts from."""
        return self.archive or self.name_or_path


@dataclass
class LossConfig:
    """config/loss. A key that the chosen loss does not have is None and cannot be set."""

    name: str = "sft"
    beta: float | None = None
    label_smoothing: float | None = None
    reference_free: bool | None = None
    robust: bool | None = None
    average_log_prob: bool | None = None
    alpha: float | None = None

    def build(self) -> Loss:
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "name"}
        return LOSSES[self.name](**{key: value for key, value in given.items() if value is not None})


@dataclass
class ReferenceConfig:
    """How the reference's log-probabilities come about; see config.yaml."""

    mode: str = ""


@dataclass
class WandbConfig:
    enabled: bool = True
    entity: str | None = None
    project: str = ""


@dataclass
class Config:
    """config/config.yaml, where every key is explained. Values come from there: the defaults here are only types."""

    seed: int = 0
    exp_name: str = ""
    batch_size: int = 0
    eval_batch_size: int = 0
    debug: bool = False
    fsdp_port: int | None = None
    datasets: list[str] = field(default_factory=list)
    dataset_sources: dict[str, str | None] = field(default_factory=dict)
    dataset_weights: list[float] | None = None
    chat_format: str = ""
    chat_date: str = ""
    columns: dict[str, str | None] = field(default_factory=dict)
    sft_turns: str = ""
    max_pairs_per_prompt: int = 0
    max_row_mb: float = 0.0
    holdout_fraction: float | None = None
    drop_bad_rows: bool = False
    num_proc: int = 0
    cache_dir: str | None = None
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    tensorboard: bool = False
    local_dirs: list[str] = field(default_factory=list)
    local_run_dir: str = ""
    sample_during_eval: bool = True
    n_eval_model_samples: int = 0
    n_eval_samples_per_prompt: int = 1
    kl_during_eval: bool | None = None
    do_first_eval: bool = True
    do_final_eval: bool = True
    lr: float = 0.0
    lr_schedule: str = ""
    lr_min_ratio: float = 0.0
    warmup_steps: int | None = None
    gradient_accumulation_steps: int = 1
    microbatch_tokens: int | None = None
    layout: str = ""
    compile: bool = False
    max_grad_norm: float = 0.0
    max_length: int = 0
    max_prompt_length: int = 0
    n_epochs: int | None = None
    n_examples: int | None = None
    n_eval_examples: int = 0
    trainer: str = ""
    device: str = ""
    mixed_precision: str | None = None
    allow_tf32: bool = True
    optimizer: str = ""
    optimizer_kwargs: dict[str, Any] = field(default_factory=dict)
    weight_decay: float | None = None
    decay_norms_and_biases: bool = True
    activation_checkpointing: bool = False
    activation_checkpointing_every: int = 1
    nproc: int | None = None
    tensor_parallel_size: int | None = None
    fsdp_replicate_size: int = 1
    fsdp_reshard_after_forward: bool = True
    fsdp_cpu_offload: bool = False
    resume: str | None = None
    resume_allow_changes: bool = False
    eval_every: int = 0
    save_every: int | None = None
    keep_last_n: int | None = None
    keep_optimizer_last_n: int | None = None
    save_weights_only: bool = False
    keep_best: str | None = None
    async_save: bool = False
    save_patience: int = 0
    checkpoint_check: str = ""
    max_runtime: float | None = None
    on_nonfinite: str = ""
    warn_loss_spike: float | None = None
    warn_chosen_drop: float | None = None
    minimum_log_interval_secs: float = 0.0
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Type of matrix products: mixed_precision, else that of the weights."""
        return getattr(torch, self.mixed_precision or self.model.policy_dtype)

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint that the run goes on from."""
        return Path(self.resume) if self.resume not in (None, "auto") else None

    def warmup(self, updates: int) -> int:
        """Updates of warm-up of a run of so many."""
        return min(LONGEST_WARMUP, updates // 10) if self.warmup_steps is None else self.warmup_steps

    @property
    def optimizer_arguments(self) -> dict[str, Any]:
        """What the optimizer's class is called with."""
        decay = {} if self.weight_decay is None else {"weight_decay": self.weight_decay}
        return {"lr": self.lr, **self.optimizer_kwargs, **decay}

    @property
    def needs_group(self) -> bool:
        """Whether the trainer works in a group of processes."""
        return self.trainer != "BasicTrainer"

    @property
    def cache(self) -> Path:
        """The folder of tokenised data, stored reference log-probabilities and converted models."""
        return Path(self.cache_dir) if self.cache_dir else default_cache()


GROUPS = {"model": ModelConfig, "loss": LossConfig, "wandb": WandbConfig, "reference": ReferenceConfig}
KEYS = [f.name for f in fields(Config)] + [f"{group}.{f.name}" for group, kind in GROUPS.items() for f in fields(kind)]


def register_resolvers() -> None:
    """Make the functions that config/*.yaml interpolates known to OmegaConf."""
    OmegaConf.register_new_resolver(  # a name may look like a number
        "get_local_run_dir", lambda name, dirs: get_local_run_dir(str(name), tuple(dirs)), replace=True
    )
    OmegaConf.register_new_resolver("project", lambda name: str(ROOT / name), replace=True)
    OmegaConf.register_new_resolver("last_local_dir", lambda dirs: str(get_local_dir(list(dirs))), replace=True)
    OmegaConf.register_new_resolver("package_file", _package_file, replace=True)
    OmegaConf.register_new_resolver("run_name", _run_name, replace=True)


def _package_file(package: str, file: str) -> str:
    """Path of a data file inside an installed package, found without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise UserError(
            f"the package {package}, which holds the embedded model {file}, is not installed: run `make setup`, "
            "or choose another model= (see config/model)"
        )
    return str(Path(spec.origin).parent / file)


def _run_name(swept: str) -> str:
    """What a sweep calls the folder of a run, from its overrides, such as loss.beta-0.1_seed-2. Signs that do not suit
    the name of a folder, or an override that names it, are replaced; a hash then keeps names apart."""
    name = re.sub(r"[^\w.+-]", "_", swept)[:LONGEST_NAME]
    if not swept:
        return "run"
    return name if name == swept else f"{name}-{hashlib.sha256(swept.encode()).hexdigest()[:8]}"


def quoted(value: Any) -> str:
    """As the value of an override: text stands for itself, whatever signs it has."""
    if isinstance(value, list | tuple):
        return f"[{','.join(map(quoted, value))}]"
    if not isinstance(value, str | Path):
        return json.dumps(value)
    escaped = re.sub(r'(\\*)("|\Z)', lambda m: m[1] * 2 + (r"\"" if m[2] else ""), literal(str(value)))
    return f'"{escaped}"'


def literal(value: Any) -> Any:
    """`value` with its texts as OmegaConf has to be given them to leave each ${...} in them as it stands."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    if isinstance(value, Mapping):
        return {key: literal(entry) for key, entry in value.items()}
    return [literal(entry) for entry in value] if isinstance(value, list | tuple) else value


def load_config(overrides: list[str], values: Mapping[str, Any] | None = None) -> Config:
    """Compose config/ with command-line `overrides`, for scripts and tests, then set `values`: dotted key -> value,
    which is taken as it stands. Raises UserError."""
    register_resolvers()
    with hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        try:
            composed = hydra.compose("config", overrides)
            for key, value in (values or {}).items():
                OmegaConf.update(composed, key, literal(value))
            return build_config(composed)
        except (OmegaConfBaseException, hydra.errors.HydraException, ValueError) as error:
            raise UserError(str(error)) from error


def build_config(composed: DictConfig) -> Config:
    """Turn Hydra's composed configuration into typed dataclasses and validate them.

    Raises UserError with every problem found: missing values, unknown keys, wrong types, or else what `validate` lists.
    """
    typed = OmegaConf.structured(Config)
    groups = [group for group in GROUPS if OmegaConf.is_dict(composed.get(group))]
    names = [str(key) for key in composed if key not in groups]
    names += [f"{group}.{key}" for group in groups for key in composed[group]]
    problems = [problem for name in names if (problem := _copy(composed, typed, name))]
    config: Any = OmegaConf.to_object(typed)
    if problems := problems or validate(config):
        raise UserError("\n".join(problems))
    return config


def _copy(composed: DictConfig, typed: DictConfig, name: str) -> str | None:
    """Set the key `name` of `typed` from `composed`. Returns what is wrong with it, if anything."""
    if name not in KEYS:
        return f"{name}: no such key{meant(name, KEYS)}"
    value = None
    try:
        value = OmegaConf.select(composed, name, throw_on_missing=True)
        if OmegaConf.is_config(value):
            value = OmegaConf.to_container(value, resolve=True)
        OmegaConf.update(typed, name, literal(value))
    except MissingMandatoryValue:
        return f"{name} is missing: pass {name}=<value>"
    except InterpolationToMissingValueError:  # the key that is missing is named itself
        return None
    except OmegaConfBaseException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from error
        given = name if value is None else f"{name}={value}"
        return f"{given}: {str(error).splitlines()[0]}"
    return None


def validate(c: Config) -> list[str]:
    """Every contradiction or impossible value in the configuration, one message each; empty where it is sound."""
    values = {key: attrgetter(key)(c) for key in CHOICES}
    return [
        *_number_problems(c),
        *(
            f"{key}={value} is not known; choose from: {', '.join(CHOICES[key])}"
            for key, value in values.items()
            if value is not None and value not in CHOICES[key]
        ),
        *filter(None, [name_problem(c.exp_name)]),
        *_loss_problems(c.loss),
        *_length_problems(c),
        *_optimizer_problems(c),
        *_data_problems(c),
        *_device_problems(c),
        *_group_problems(c),
    ]


def _number_problems(c: Config) -> Iterator[str]:
    rules: list[tuple[str, str, Callable[[float], bool]]] = [
        ("batch_size eval_batch_size gradient_accumulation_steps microbatch_tokens", "at least 1", lambda v: v >= 1),
        ("max_length max_prompt_length n_epochs n_examples eval_every save_every", "at least 1", lambda v: v >= 1),
        (
            "keep_last_n keep_optimizer_last_n nproc tensor_parallel_size fsdp_replicate_size",
            "at least 1",
            lambda v: v >= 1,
        ),
        ("n_eval_samples_per_prompt activation_checkpointing_every", "at least 1", lambda v: v >= 1),
        ("max_pairs_per_prompt", "at least 1", lambda v: v >= 1),
        ("max_row_mb", "more than 0, and at most 1024", lambda v: 0 < v <= 1024),
        ("n_eval_examples n_eval_model_samples warmup_steps num_proc", "0 or more", lambda v: v >= 0),
        ("weight_decay save_patience lr minimum_log_interval_secs", "0 or more", lambda v: 0 <= v < math.inf),
        ("seed", "at least 0 and less than 2^63", lambda v: 0 <= v < 2**63),
        ("fsdp_port", "between 1 and 65535", lambda v: 0 < v < 2**16),
        ("max_grad_norm max_runtime warn_chosen_drop", "more than 0", lambda v: v > 0),
        ("warn_loss_spike", "more than 1", lambda v: v > 1),
        ("lr_min_ratio loss.alpha", "between 0 and 1", lambda v: 0 <= v <= 1),
        ("holdout_fraction", "at least 0 and less than 1", lambda v: 0 <= v < 1),
        ("loss.beta", "a number above 0; 0.1 to 0.5 is a good start", lambda v: 0 < v < math.inf),
        ("loss.label_smoothing", "at least 0 and less than 0.5, the share of flipped pairs", lambda v: 0 <= v < 0.5),
    ]
    for keys, allowed, fits in rules:
        for key in keys.split():
            value = attrgetter(key)(c)
            if value is not None and not fits(value):
                yield f"{key}={value} must be {allowed}"


def _loss_problems(loss: LossConfig) -> Iterator[str]:
    if loss.robust and not loss.label_smoothing:
        yield "loss.robust=true needs loss.label_smoothing: the rate at which labels are flipped"
    try:
        if loss.name in LOSSES:
            loss.build()
    except TypeError as error:  # a key that is null, or another loss's
        yield f"loss={loss.name}: {error}"


def _length_problems(c: Config) -> Iterator[str]:
    """How long the run is, how it is cut, and when it is evaluated."""
    if c.n_epochs is None and c.n_examples is None:
        yield "n_epochs and n_examples are both null: the run would never end; set one of them"
    steps = c.gradient_accumulation_steps
    if steps >= 1 and c.batch_size % steps:
        division = f"{c.batch_size} / {steps} = {c.batch_size / steps:.2f}"
        yield f"batch_size={c.batch_size} is not divisible by gradient_accumulation_steps={steps}: {division}"
    if c.max_prompt_length >= c.max_length:
        yield f"max_prompt_length={c.max_prompt_length} must be less than max_length={c.max_length}"
    if c.keep_best is not None and not c.n_eval_examples:
        yield f"keep_best={c.keep_best} needs evaluations: set n_eval_examples"
    pairs = c.loss.name in LOSSES and getattr(LOSSES[c.loss.name], "needs_pairs", True)
    measured = MEASURED + MEASURED_OF_PAIRS * pairs
    if c.keep_best is not None and c.keep_best not in measured:
        yield f"keep_best={c.keep_best} is not measured; choose from: {', '.join(measured)}"
    if c.save_weights_only and c.keep_optimizer_last_n is not None:
        yield f"keep_optimizer_last_n={c.keep_optimizer_last_n} and save_weights_only=true exclude each other"
    if c.kl_during_eval and not (c.sample_during_eval and c.n_eval_model_samples and c.n_eval_examples):
        yield "kl_during_eval=true: it needs sample_during_eval=true, n_eval_model_samples and n_eval_examples"
    if c.activation_checkpointing_every != 1 and not c.activation_checkpointing:
        yield f"activation_checkpointing_every={c.activation_checkpointing_every} needs activation_checkpointing=true"


def name_problem(name: str) -> str | None:
    """What is wrong with an exp_name; None: nothing. It is part of a path, and stays inside local_dirs."""
    if name.isprintable() and all(part not in ("", ".", "..") for part in name.split("/")):
        return None
    return f"exp_name={name!r} must be a name, or several with / between (team/run1), and no part may be . or .."


def _optimizer_problems(c: Config) -> Iterator[str]:
    """What the optimizer's class says of its arguments."""
    if c.optimizer not in CHOICES["optimizer"]:
        return
    arguments = {**c.optimizer_arguments, "lr": max(c.lr, 0.0)}  # which is checked above
    try:
        getattr(torch.optim, c.optimizer)([torch.nn.Parameter(torch.zeros(1, 1))], **arguments)
    except (TypeError, ValueError) as error:
        yield f"optimizer={c.optimizer} refuses its arguments {arguments}: {error}"
    except RuntimeError:  # of a device
        return


def _data_problems(c: Config) -> Iterator[str]:
    if not c.datasets:
        yield "datasets is empty: name at least one, such as datasets=[hh]"
    weights = c.dataset_weights
    if weights is not None and len(weights) != len(c.datasets):
        yield f"dataset_weights={weights} must have one number for each of datasets={c.datasets}"
    if weights is not None and not all(0 <= weight < math.inf for weight in weights):
        yield f"dataset_weights={weights} must be numbers of 0 or more"
    for column in sorted(c.columns.keys() - set(COLUMNS)):
        yield f"columns.{column} is no column that a row has a use for; choose from: {', '.join(COLUMNS)}"
    try:
        datetime.fromisoformat(c.chat_date)
    except ValueError:
        yield f"chat_date={c.chat_date} must be a date, such as 2024-07-26"
    for name in sorted(c.dataset_sources.keys() - REGISTRY.keys()):
        yield f"dataset_sources.{name} is no built-in data set; choose from: {', '.join(REGISTRY)}"


def _device_problems(c: Config) -> Iterator[str]:
    """Devices and the types of numbers."""
    kind, _, index = c.device.partition(":")
    n_gpus = torch.cuda.device_count()
    there = {"auto": True, "cpu": True, "cuda": n_gpus > 0, "mps": torch.backends.mps.is_available()}
    numbered = kind == "cuda" and index.isdigit() and int(index) < n_gpus
    if not there.get(c.device, numbered):
        yield f"device={c.device} is not available here; choose auto, cpu, cuda, cuda:<number> or mps"
    if c.model.device_map and c.device != "auto":
        yield f"model.device_map={c.model.device_map} places the layers itself; leave device={c.device} out"
    weights = f"model.policy_dtype={c.model.policy_dtype}"
    if c.model.reference_dtype not in (None, c.model.policy_dtype):
        reference = f"model.reference_dtype={c.model.reference_dtype}"
        yield f"{reference} differs from {weights}: the margin before the first update would not be 0; leave it null"
    if c.model.policy_dtype != "float32" and c.mixed_precision not in (None, c.model.policy_dtype):
        yield f"mixed_precision={c.mixed_precision} needs float32 weights, but {weights}"
    if c.model.block and c.model.block_name and c.model.block != c.model.block_name:
        yield f"model.block={c.model.block} and model.block_name={c.model.block_name} differ; set one of them"


def _group_problems(c: Config) -> Iterator[str]:
    """What contradicts the trainer: keys that it would ignore, and what it cannot do."""
    gpus = torch.cuda.device_count() if c.device != "cpu" else 0
    if c.needs_group:
        if c.device not in ("auto", "cpu", "cuda"):
            yield f"device={c.device} is one device; trainer={c.trainer} gives each process its own: leave it out"
        if c.model.device_map:
            yield f"model.device_map={c.model.device_map} is for BasicTrainer; {c.trainer} places the model"
        if c.mixed_precision == "float16":
            yield f"mixed_precision=float16 needs loss scaling, which trainer={c.trainer} lacks; take bfloat16"
        if c.nproc is not None and 0 < gpus < c.nproc:
            yield f"nproc={c.nproc} is more than the {gpus} GPUs of this machine"
        if c.fsdp_cpu_offload and not gpus:
            yield "fsdp_cpu_offload=true moves weights between a GPU and host memory, and there is no GPU"
    else:
        without = {"nproc": (None, 1), "fsdp_replicate_size": (1,)}
        without |= {"fsdp_reshard_after_forward": (True,), "fsdp_cpu_offload": (False,)}
        for key, values in without.items():
            if getattr(c, key) not in values:
                nothing = f"{key}={getattr(c, key)} does nothing with trainer={c.trainer}"
                yield f"{nothing}, which is one process; set trainer=FSDPTrainer or leave it out"
    if c.trainer != "TensorParallelTrainer" and c.tensor_parallel_size is not None:
        yield f"tensor_parallel_size={c.tensor_parallel_size} needs trainer=TensorParallelTrainer"


def data_settings(config: Config) -> DataSettings:
    """What of the configuration the data depends on."""
    return DataSettings(
        names=tuple(config.datasets),
        sources=config.dataset_sources,
        sft=not config.loss.build().needs_pairs,
        max_length=config.max_length,
        max_prompt_length=config.max_prompt_length,
        chat_format=config.chat_format,
        chat_date=config.chat_date,
        columns=config.columns,
        sft_turns=config.sft_turns,
        max_pairs_per_prompt=config.max_pairs_per_prompt,
        max_row_mb=config.max_row_mb,
        holdout_fraction=config.holdout_fraction,
        drop_bad_rows=config.drop_bad_rows,
        cache_dir=str(config.cache),
        num_proc=config.num_proc,
    )


def check_keys(overrides: list[str]) -> None:
    """Raise UserError for a misspelt key among command-line overrides, with the key that was probably meant."""
    for override in overrides:
        key, equals, _ = override.partition("=")
        free = key.partition(".")[0] in ("hydra", "optimizer_kwargs", "dataset_sources", "columns")
        if equals and key[:1].isalpha() and "/" not in key and not free and key not in KEYS:
            where = "config/config.yaml, config/model/blank_model.yaml and config/loss"
            raise UserError(f"there is no key {key!r}{meant(key, KEYS)} (every key stands in {where})")


def check_command(overrides: list[str]) -> list[Override]:
    """train.py's settings, as Hydra understands them.

    Raises UserError, which says what to write, for those that Hydra does not understand, for a key or a model that is
    not known, and for a key of a loss that was not chosen.
    """
    check_keys(overrides)
    found = [parsed(override) for override in overrides]
    given = {override.key_or_group: _values(override) for override in found if not override.is_delete()}
    for name in given.get("model", []):
        if name not in (options := sorted(path.stem for path in CONFIG_DIR.glob("model/*.yaml"))):
            raise UserError(
                f"model={name} is none of {', '.join(options)} (config/model). Any other model: model=blank_model "
                f"model.name_or_path={name}"
            )
    for name in given.get("experiment", []):
        if name not in (recipes := sorted(path.stem for path in CONFIG_DIR.glob("experiment/*.yaml"))):
            raise UserError(f"+experiment={name} is none of {', '.join(recipes)} (config/experiment)")
    losses = given.get("loss", [] if "experiment" in given else ["sft"])  # a recipe may choose another loss
    for key in (key for key in given if key.startswith("loss.")):
        name = key.removeprefix("loss.")
        have = [loss for loss, kind in LOSSES.items() if name in inspect.signature(kind).parameters]
        if losses and have and all(loss in LOSSES and loss not in have for loss in losses):
            chosen = f"loss={','.join(losses)}" + ("" if "loss" in given else ", the default")
            theirs = " or ".join(f"loss={loss}" for loss in have)
            raise UserError(f"{key} is for {theirs}, and this run has {chosen}: add loss={have[0]}")
    return found


def _values(override: Override) -> list[str]:
    """The value, or those that are swept."""
    value = override.value()
    return [str(v) for v in value.list] if isinstance(value, ChoiceSweep) else [str(value)]


def command_line() -> str:
    """The command that started this process, as one would type it."""
    return shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
