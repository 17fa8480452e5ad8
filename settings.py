"""The configuration's types, and the one place that checks it. Nothing here edits a value the user gave."""

import difflib
import hashlib
import importlib.util
import json
import math
import re
import shlex
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from losses import LOSSES, Loss
from preference_datasets import REGISTRY, DataSettings
from utils import UserError, get_local_dir, get_local_run_dir

# Abstract, in need of a closure, and for sparse gradients.
NOT_OPTIMIZERS = ("Optimizer", "LBFGS", "SparseAdam")
TRAINERS = ("BasicTrainer", "FSDPTrainer", "TensorParallelTrainer")
DTYPES = ("float32", "bfloat16", "float16")
WEIGHT_DTYPES = ("float32", "bfloat16")  # float16 weights overflow; mixed_precision=float16 keeps float32 weights
LR_SCHEDULES = ("constant", "linear", "cosine")
LAYOUTS = ("auto", "packed", "tree", "padded")
REFERENCE_MODES = ("stored", "live")
CHAT_FORMATS = ("auto", "template", "hh")
CHECKS = ("fast", "full")
NONFINITE = ("stop", "skip")
LONGEST_NAME = 120
CONFIG_DIR = Path(__file__).parent / "config"


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
    holdout_fraction: float = 0.0
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
    warmup_steps: int = 0
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

    @property
    def needs_group(self) -> bool:
        """Whether the trainer works in a group of processes."""
        return self.trainer != "BasicTrainer"

    @property
    def cache(self) -> Path:
        return Path(self.cache_dir) if self.cache_dir else get_local_dir(self.local_dirs)


GROUPS = {"model": ModelConfig, "loss": LossConfig, "wandb": WandbConfig, "reference": ReferenceConfig}


def register_resolvers() -> None:
    """Make the functions that config/*.yaml interpolates known to OmegaConf."""
    OmegaConf.register_new_resolver(
        "get_local_run_dir", lambda name, dirs: get_local_run_dir(name, tuple(dirs)), replace=True
    )
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
    """As the value of an override, whatever signs it has."""
    return json.dumps(str(value) if isinstance(value, Path) else value, ensure_ascii=False)


def load_config(overrides: list[str]) -> Config:
    """Compose config/ with command-line `overrides`, for scripts and tests. Raises UserError."""
    register_resolvers()
    with hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        try:
            return build_config(hydra.compose("config", overrides))
        except (OmegaConfBaseException, hydra.errors.HydraException, ValueError) as error:
            raise UserError(str(error)) from error


def build_config(composed: DictConfig) -> Config:
    """Turn Hydra's composed configuration into typed dataclasses and validate them.

    Raises UserError with every problem found: missing values, unknown keys, wrong types, and what `validate` lists.
    """
    missing = [
        prefix + str(key)
        for node, prefix in ((composed, ""), (composed.model, "model."), (composed.loss, "loss."))
        for key in node
        if OmegaConf.is_missing(node, key)
    ]
    if missing:
        raise UserError("\n".join(f"{key} is missing: pass {key}=<value>" for key in missing))
    problems: list[str] = []
    typed = OmegaConf.structured(Config)
    for key in composed:
        _copy(composed, typed, [str(key)], problems)
    if problems:
        raise UserError("\n".join(problems))
    config = OmegaConf.to_object(typed)
    assert isinstance(config, Config)
    problems = validate(config)
    if problems:
        raise UserError("\n".join(problems))
    return config


def _copy(composed: DictConfig, typed: DictConfig, path: list[str], problems: list[str]) -> None:
    """Set `path` of `typed` from `composed`, leaf by leaf, so that each bad key gives its own line in `problems`."""
    dotted = ".".join(path)
    try:
        value = OmegaConf.select(composed, dotted, throw_on_resolution_failure=True)
    except OmegaConfBaseException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from error
        problems.append(f"{dotted}: {str(error).splitlines()[0]}")
        return
    known = OmegaConf.select(typed, ".".join(path[:-1])) if path[1:] else typed
    if path[-1] not in known and OmegaConf.get_type(known) is not dict:
        close = difflib.get_close_matches(path[-1], [str(key) for key in known], 1)
        problems.append(f"{dotted}: no such key{f'; did you mean {close[0]}?' if close else ''}")
    elif isinstance(value, DictConfig) and OmegaConf.get_type(known, path[-1]) is not dict:
        for key in value:
            _copy(composed, typed, [*path, str(key)], problems)
    else:
        nested = isinstance(value, DictConfig | ListConfig)
        plain: Any = OmegaConf.to_container(value, resolve=True) if nested else value
        try:
            OmegaConf.update(typed, dotted, plain)
        except OmegaConfBaseException as error:
            problems.append(f"{dotted}={plain}: {str(error).splitlines()[0]}")


def validate(config: Config) -> list[str]:
    """Every contradiction or impossible value in `config`, one message each; empty where it is sound."""
    return [
        *_number_problems(config),
        *_choice_problems(config),
        *_loss_problems(config.loss),
        *_group_problems(config),
        *_other_problems(config),
    ]


def _number_problems(c: Config) -> list[str]:
    at_least_1 = (
        *("batch_size", "eval_batch_size", "gradient_accumulation_steps", "max_length", "max_prompt_length"),
        *("eval_every", "n_epochs", "n_examples", "nproc", "tensor_parallel_size", "fsdp_replicate_size"),
        "n_eval_samples_per_prompt",
        *("activation_checkpointing_every", "microbatch_tokens", "save_every", "keep_last_n"),
    )
    at_least_0 = (
        *("seed", "n_eval_examples", "n_eval_model_samples", "warmup_steps", "num_proc", "weight_decay"),
        *("save_patience", "lr", "minimum_log_interval_secs"),
    )
    rules = [
        *((key, lambda v: v >= 1, "at least 1") for key in at_least_1),
        *((key, lambda v: 0 <= v < math.inf, "0 or more") for key in at_least_0),
        ("seed", lambda v: v < 2**63, "less than 2^63"),
        ("fsdp_port", lambda v: 0 < v < 2**16, "between 1 and 65535"),
        *((key, lambda v: v > 0, "more than 0") for key in ("max_grad_norm", "max_runtime", "warn_chosen_drop")),
        ("warn_loss_spike", lambda v: v > 1, "more than 1"),
        ("lr_min_ratio", lambda v: 0 <= v <= 1, "between 0 and 1"),
        ("holdout_fraction", lambda v: 0 <= v < 1, "at least 0 and less than 1"),
    ]
    values = [(key, getattr(c, key), ok, allowed) for key, ok, allowed in rules]
    return [f"{key}={v} must be {allowed}" for key, v, ok, allowed in values if v is not None and not ok(v)]


def _choice_problems(c: Config) -> list[str]:
    choices: list[tuple[str, str | None, tuple[str, ...]]] = [
        ("trainer", c.trainer, TRAINERS),
        ("layout", c.layout, LAYOUTS),
        ("reference.mode", c.reference.mode, REFERENCE_MODES),
        ("lr_schedule", c.lr_schedule, LR_SCHEDULES),
        ("chat_format", c.chat_format, CHAT_FORMATS),
        ("checkpoint_check", c.checkpoint_check, CHECKS),
        ("on_nonfinite", c.on_nonfinite, NONFINITE),
        ("mixed_precision", c.mixed_precision, DTYPES),
        ("model.policy_dtype", c.model.policy_dtype, WEIGHT_DTYPES),
        ("model.device_map", c.model.device_map, ("balanced",)),
        ("loss.name", c.loss.name, tuple(LOSSES)),
    ]
    return [
        f"{key}={value} is not known; choose from: {', '.join(known)}"
        for key, value, known in choices
        if value is not None and value not in known
    ]


def _loss_problems(loss: LossConfig) -> list[str]:
    problems = []
    if loss.name in ("dpo", "ipo") and (loss.beta is None or not 0 < loss.beta < float("inf")):
        problems.append(f"loss.beta={loss.beta} must be a number above 0; 0.1 to 0.5 is a good start")
    if loss.label_smoothing is not None and not 0 <= loss.label_smoothing < 0.5:
        problems.append(
            f"loss.label_smoothing={loss.label_smoothing} must be at least 0 and less than 0.5: it is the fraction of "
            "pairs assumed to be flipped"
        )
    if loss.robust and not loss.label_smoothing:
        problems.append("loss.robust=true needs loss.label_smoothing: the rate at which labels are flipped")
    if loss.name == "unlikelihood" and (loss.alpha is None or not 0 <= loss.alpha <= 1):
        problems.append(f"loss.alpha={loss.alpha} must be between 0 and 1")
    return problems


def _group_problems(c: Config) -> list[str]:
    """What contradicts the trainer: keys that it would ignore, and what it cannot do."""
    problems = []
    if not c.needs_group:
        ignored = {
            "nproc": c.nproc not in (None, 1),
            "fsdp_replicate_size": c.fsdp_replicate_size != 1,
            "fsdp_reshard_after_forward": not c.fsdp_reshard_after_forward,
            "fsdp_cpu_offload": c.fsdp_cpu_offload,
        }
        problems += [
            f"{key}={getattr(c, key)} does nothing with trainer={c.trainer}, which is one process; "
            "set trainer=FSDPTrainer or leave it out"
            for key, given in ignored.items()
            if given
        ]
    if c.trainer != "TensorParallelTrainer" and c.tensor_parallel_size is not None:
        problems.append(f"tensor_parallel_size={c.tensor_parallel_size} needs trainer=TensorParallelTrainer")
    if c.needs_group and c.device not in ("auto", "cpu", "cuda"):
        problems.append(
            f"device={c.device} is one device; trainer={c.trainer} gives each process its own: leave it out"
        )
    if c.needs_group and c.model.device_map:
        problems.append(f"model.device_map={c.model.device_map} is for BasicTrainer; {c.trainer} places the model")
    if c.needs_group and c.mixed_precision == "float16":
        problems.append(f"mixed_precision=float16 needs loss scaling, which trainer={c.trainer} lacks; take bfloat16")
    gpus = torch.cuda.device_count() if c.device != "cpu" else 0
    if c.nproc is not None and gpus and c.nproc > gpus:
        problems.append(f"nproc={c.nproc} is more than the {gpus} GPUs of this machine")
    if c.fsdp_cpu_offload and not gpus:
        problems.append("fsdp_cpu_offload=true moves weights between a GPU and host memory, and there is no GPU")
    if c.activation_checkpointing_every != 1 and not c.activation_checkpointing:
        every = c.activation_checkpointing_every
        problems.append(f"activation_checkpointing_every={every} needs activation_checkpointing=true")
    return problems


def _other_problems(c: Config) -> list[str]:
    problems = []
    if c.n_epochs is None and c.n_examples is None:
        problems.append("n_epochs and n_examples are both null: the run would never end; set one of them")
    if c.gradient_accumulation_steps >= 1 and c.batch_size % c.gradient_accumulation_steps:
        problems.append(
            f"batch_size={c.batch_size} is not divisible by "
            f"gradient_accumulation_steps={c.gradient_accumulation_steps}: "
            f"{c.batch_size} / {c.gradient_accumulation_steps} = {c.batch_size / c.gradient_accumulation_steps:.2f}"
        )
    if c.kl_during_eval and not (c.sample_during_eval and c.n_eval_model_samples and c.n_eval_examples):
        problems.append(
            "kl_during_eval=true is estimated on samples: it needs sample_during_eval=true, n_eval_model_samples and "
            "n_eval_examples"
        )
    if c.keep_best is not None and not c.n_eval_examples:
        problems.append(f"keep_best={c.keep_best} needs evaluations: set n_eval_examples")
    if c.max_prompt_length >= c.max_length:
        problems.append(f"max_prompt_length={c.max_prompt_length} must be less than max_length={c.max_length}")
    if not c.datasets:
        problems.append("datasets is empty: name at least one, such as datasets=[hh]")
    if c.dataset_weights is not None and len(c.dataset_weights) != len(c.datasets):
        problems.append(f"dataset_weights={c.dataset_weights} must have one number for each of datasets={c.datasets}")
    if c.dataset_weights is not None and not all(0 <= weight < math.inf for weight in c.dataset_weights):
        problems.append(f"dataset_weights={c.dataset_weights} must be numbers of 0 or more")
    unknown = [name for name in c.dataset_sources if name not in REGISTRY]
    if unknown:
        problems.append(f"dataset_sources.{unknown[0]} is no built-in data set; choose from: {', '.join(REGISTRY)}")
    if not _device_exists(c.device):
        problems.append(f"device={c.device} is not available here; choose auto, cpu, cuda, cuda:<number> or mps")
    known = [name for name in dir(torch.optim) if name[0].isupper() and name not in NOT_OPTIMIZERS]
    if c.optimizer not in known:
        problems.append(f"optimizer={c.optimizer} is not known; choose from: {', '.join(known)}")
    if c.model.reference_dtype not in (None, c.model.policy_dtype):
        problems.append(
            f"model.reference_dtype={c.model.reference_dtype} differs from model.policy_dtype={c.model.policy_dtype}: "
            "the margin before the first update would not be 0; leave it null"
        )
    if c.model.policy_dtype != "float32" and c.mixed_precision not in (None, c.model.policy_dtype):
        problems.append(
            f"mixed_precision={c.mixed_precision} needs float32 weights, but model.policy_dtype={c.model.policy_dtype}"
        )
    if c.model.device_map and c.device != "auto":
        problems.append(f"model.device_map={c.model.device_map} places the layers itself; leave device={c.device} out")
    if c.model.block and c.model.block_name and c.model.block != c.model.block_name:
        problems.append(
            f"model.block={c.model.block} and model.block_name={c.model.block_name} differ; set one of them"
        )
    return problems


def _device_exists(device: str) -> bool:
    kind, _, index = device.partition(":")
    if kind == "cuda":
        return torch.cuda.is_available() and (not index or (index.isdigit() and int(index) < torch.cuda.device_count()))
    return device in ("auto", "cpu") or (device == "mps" and torch.backends.mps.is_available())


def data_settings(config: Config) -> DataSettings:
    """What of the configuration the data depends on."""
    return DataSettings(
        names=tuple(config.datasets),
        sources=config.dataset_sources,
        sft=not config.loss.build().needs_pairs,
        max_length=config.max_length,
        max_prompt_length=config.max_prompt_length,
        chat_format=config.chat_format,
        holdout_fraction=config.holdout_fraction,
        drop_bad_rows=config.drop_bad_rows,
        cache_dir=str(config.cache),
        num_proc=config.num_proc,
    )


def check_keys(overrides: list[str]) -> None:
    """Raise UserError for a misspelt key among command-line overrides, with the key that was probably meant."""
    top = {f.name for f in fields(Config)}
    known = {*top, "hydra", *(f"{group}.{f.name}" for group, kind in GROUPS.items() for f in fields(kind))}
    for override in overrides:
        key = override.partition("=")[0]
        inside = key.partition(".")[0]
        free = inside in ("hydra", "optimizer_kwargs", "dataset_sources") or not key[:1].isalpha() or "/" in key
        if "=" in override and not free and key not in known:
            close = difflib.get_close_matches(key, sorted(known), 1)
            raise UserError(
                f"there is no key {key!r}{f'; did you mean {close[0]!r}?' if close else ''} "
                "Every key stands in config/config.yaml, config/model/blank_model.yaml and config/loss"
            )


def command_line() -> str:
    """The command that started this process, as one would type it."""
    return shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
