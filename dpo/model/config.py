"""Configuration keys of models, of how they are computed, and of the processes that hold them.

Keys of the group `model` are explained in config/model/blank_model.yaml, those of `adapter` in
config/adapter/none.yaml, the others in config/config.yaml.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from dpo.config import AboveZero, Component, Count, Inherited, MayChange, NotNegative, Positive
from dpo.utils import UserError, default_cache


@dataclass(kw_only=True)
class ModelConfig(Component):
    """The model, and the weights that training starts from."""

    name_or_path: str
    block_name: Annotated[str | None, MayChange]
    block: Annotated[str | None, MayChange]
    tokenizer_name_or_path: str | None
    archive: str | None
    policy_dtype: Literal["float32", "bfloat16"]  # float16 weights overflow
    fsdp_policy_mp: str | None
    reference_dtype: str | None
    device_map: Annotated[Literal["balanced"] | None, MayChange]
    trust_remote_code: Annotated[bool, MayChange]
    hub_id: Annotated[str | None, MayChange]
    license: Annotated[str | None, MayChange]

    @property
    def start(self) -> str:
        """The weights that training starts from."""
        return self.archive or self.name_or_path

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.reference_dtype not in (None, self.policy_dtype):
            both = f"model.reference_dtype={self.reference_dtype} differs from model.policy_dtype={self.policy_dtype}"
            yield f"{both}: the margin before the first update would not be 0; leave it null"
        if self.block and self.block_name and self.block != self.block_name:
            yield f"model.block={self.block} and model.block_name={self.block_name} differ; set one of them"


@dataclass(kw_only=True)
class ReferenceConfig(Component):
    """How the log-probabilities of the reference are obtained."""

    mode: Annotated[Literal["stored", "live"], MayChange, Inherited]
    archive: str | None


# Initialisations of an adapter that take something out of the frozen weights, and put it into the adapter.
MUTATING = ("pissa", "olora")


@dataclass(kw_only=True)
class AdapterConfig(Component):
    """The adapter that is trained instead of the model's own weights, if there is one."""

    peft_type: str | None
    rank: Positive | None
    alpha: AboveZero | None
    dropout: NotNegative
    target_modules: str | list[str] | None
    layers: list[Count] | None
    modules_to_save: list[str] | None
    init: bool | str | None
    dora: bool
    rslora: bool
    peft_kwargs: dict[str, Any]
    quantization: Literal["nf4", "int8"] | None
    stack: bool

    @classmethod
    def none(cls) -> "AdapterConfig":
        """Return what configurations mean that were made before there were adapters."""
        off: dict[str, Any] = dict.fromkeys(field.name for field in fields(cls))
        return cls(**off | {"dropout": 0.0, "dora": False, "rslora": False, "peft_kwargs": {}, "stack": False})

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        for field in fields(self):
            if self.peft_type is None and (value := getattr(self, field.name)):
                frozen = ": quantised weights cannot be trained" if field.name == "quantization" else ""
                yield f"adapter.{field.name}={value} needs an adapter{frozen}; choose one, such as adapter=lora"
        if self.dropout:
            yield (
                f"adapter.dropout={self.dropout}: policy and reference would differ by noise; leave it 0, and hold the "
                "policy closer by loss.beta, adapter.rank or fewer epochs"
            )
        if isinstance(self.init, str) and not re.fullmatch(r"gaussian|olora|pissa(_niter_\d+)?", self.init):
            yield f"adapter.init={self.init} is not known; choose from: true, gaussian, pissa, pissa_niter_<n>, olora"
        if self.layers and not isinstance(self.target_modules, list):
            named = f"adapter.layers={self.layers} needs names of matrices"
            yield f"{named}: adapter.target_modules is {self.target_modules}, and may be [q_proj,v_proj]"
        if self.quantization and str(self.init).startswith(MUTATING):
            yield f"adapter.init={self.init} changes the weights, and adapter.quantization rounds them; leave one out"
        if self.quantization and find_spec("bitsandbytes") is None:
            yield f"adapter.quantization={self.quantization} needs the package: pip install bitsandbytes"


@dataclass(kw_only=True)
class ComputeConfig(Component):
    """How log-probabilities are computed."""

    model: ModelConfig
    adapter: Annotated[AdapterConfig, Inherited]
    reference: ReferenceConfig
    cache_dir: Annotated[str | None, MayChange]
    device: Annotated[str, MayChange]
    mixed_precision: Annotated[Literal["float32", "bfloat16", "float16"] | None, Inherited]
    allow_tf32: bool
    layout: Annotated[Literal["auto", "packed", "tree", "padded"], Inherited, MayChange]
    compile: Annotated[bool, MayChange]
    microbatch_tokens: Annotated[Positive | Literal["auto"] | None, MayChange]
    activation_checkpointing: Annotated[bool, MayChange]
    activation_checkpointing_every: Annotated[Positive, MayChange]

    @property
    def compute_dtype(self) -> Any:
        """torch's type of matrix products: mixed_precision, or that of the weights."""
        import torch

        return getattr(torch, self.mixed_precision or self.model.policy_dtype)

    @property
    def token_limit(self) -> int | None:
        """microbatch_tokens as a number, or None. Raise UserError if it is still to be planned."""
        if self.microbatch_tokens == "auto":
            raise UserError("microbatch_tokens=auto is for train.py and scripts/plan.py: set a number")
        return self.microbatch_tokens

    @property
    def cache(self) -> Path:
        """The folder of tokenised data, stored reference log-probabilities and converted models."""
        return Path(self.cache_dir) if self.cache_dir else default_cache()

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from self.model.problems()
        yield from self.adapter.problems()
        kind, _, index = self.device.partition(":")
        if self.device not in ("auto", "cpu", "cuda", "mps") and not (kind == "cuda" and index.isdigit()):
            yield f"device={self.device} is not known; choose auto, cpu, cuda, cuda:<number> or mps"
        if self.model.device_map and self.device != "auto":
            yield f"model.device_map={self.model.device_map} places the layers itself; leave device={self.device} out"
        if self.model.policy_dtype != "float32" and self.mixed_precision not in (None, self.model.policy_dtype):
            weights = f"model.policy_dtype={self.model.policy_dtype}"
            yield f"mixed_precision={self.mixed_precision} needs float32 weights, but {weights}"
        if self.activation_checkpointing_every != 1 and not self.activation_checkpointing:
            every = f"activation_checkpointing_every={self.activation_checkpointing_every}"
            yield f"{every} needs activation_checkpointing=true"


@dataclass(kw_only=True)
class ParallelConfig(ComputeConfig):
    """The trainer, and how processes share the model."""

    trainer: Annotated[Literal["BasicTrainer", "FSDPTrainer", "TensorParallelTrainer"], MayChange]
    nproc: Annotated[Positive | None, MayChange]
    tensor_parallel_size: Annotated[Positive | None, MayChange]
    fsdp_port: Annotated[Annotated[int, Field(gt=0, lt=2**16)] | None, MayChange]
    fsdp_replicate_size: Annotated[Positive, MayChange]
    fsdp_reshard_after_forward: Annotated[bool, MayChange]
    fsdp_reduce_once: Annotated[bool | None, MayChange]
    fsdp_cpu_offload: Annotated[bool, MayChange]

    @property
    def needs_group(self) -> bool:
        """Whether the trainer works in a group of processes."""
        return self.trainer != "BasicTrainer"

    @property
    def may_reduce_once(self) -> bool:
        """Whether fsdp_reduce_once=true can be set."""
        return self.trainer == "FSDPTrainer" and not self.adapter.peft_type and not self.fsdp_cpu_offload

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.trainer != "TensorParallelTrainer" and self.tensor_parallel_size is not None:
            yield f"tensor_parallel_size={self.tensor_parallel_size} needs trainer=TensorParallelTrainer"
        yield from self._group_problems() if self.needs_group else self._single_problems()

    def _sharded_adapter_problems(self) -> Iterator[str]:
        if self.adapter.peft_type and self.trainer == "TensorParallelTrainer":
            yield (
                "trainer=TensorParallelTrainer cannot train an adapter: its processes hold parts of the matrices that "
                "the adapter adds to; use trainer=FSDPTrainer"
            )
        if self.adapter.peft_type and str(self.adapter.init).startswith(MUTATING):
            yield (
                f"adapter.init={self.adapter.init} changes the weights, of which each process of {self.trainer} holds "
                "a part: use trainer=BasicTrainer, or another init"
            )
        if self.adapter.peft_type and self.fsdp_reduce_once:
            yield "fsdp_reduce_once=true is not for adapters: their gradients are summed once an update; leave it out"
        if self.adapter.peft_type and self.fsdp_cpu_offload:
            yield "fsdp_cpu_offload=true is not for adapters, which lie whole on each GPU; leave it out"
        other_type = self.mixed_precision not in (None, self.model.policy_dtype)
        if self.adapter.modules_to_save and other_type:
            yield (
                f"adapter.modules_to_save={self.adapter.modules_to_save} and mixed_precision={self.mixed_precision}: "
                f"with {self.trainer} these modules would have another type than their input; leave one of them out"
            )
        if self.adapter.quantization:
            yield (
                f"adapter.quantization={self.adapter.quantization} is for trainer=BasicTrainer: quantised weights "
                f"cannot be sharded; leave it null with trainer={self.trainer}"
            )

    def _group_problems(self) -> Iterator[str]:
        yield from self._sharded_adapter_problems()
        if self.fsdp_reduce_once and self.fsdp_cpu_offload:
            yield "fsdp_reduce_once=true keeps whole gradients on the GPU, which fsdp_cpu_offload=true is to spare"
        if self.device not in ("auto", "cpu", "cuda"):
            yield f"device={self.device} is one device; trainer={self.trainer} gives each process its own: leave it out"
        if self.model.device_map:
            yield f"model.device_map={self.model.device_map} is for BasicTrainer; {self.trainer} places the model"
        if self.mixed_precision == "float16":
            yield f"mixed_precision=float16 needs loss scaling, which trainer={self.trainer} lacks; take bfloat16"

    def _single_problems(self) -> Iterator[str]:
        without: dict[str, tuple[Any, ...]] = {"nproc": (None, 1), "fsdp_replicate_size": (1,)}
        without |= {
            "fsdp_reshard_after_forward": (True,),
            "fsdp_reduce_once": (None, False),
            "fsdp_cpu_offload": (False,),
        }
        for key, values in without.items():
            if getattr(self, key) not in values:
                nothing = f"{key}={getattr(self, key)} does nothing with trainer={self.trainer}"
                yield f"{nothing}, which is one process; set trainer=FSDPTrainer or leave it out"

    def device_problems(self) -> Iterator[str]:
        """Yield what this machine lacks for the configuration. Imports torch."""
        import torch

        gpus = torch.cuda.device_count()
        kind, _, index = self.device.partition(":")
        missing = kind == "cuda" and int(index or 0) >= gpus
        if missing or (kind == "mps" and not torch.backends.mps.is_available()):
            yield f"device={self.device} is not available here; choose auto, cpu, cuda, cuda:<number> or mps"
        gpus = gpus if self.device != "cpu" else 0
        if self.needs_group and self.nproc is not None and 0 < gpus < self.nproc:
            yield f"nproc={self.nproc} is more than the {gpus} GPUs of this machine"
        if self.needs_group and self.fsdp_cpu_offload and not gpus:
            yield "fsdp_cpu_offload=true moves weights between a GPU and host memory, and there is no GPU"
