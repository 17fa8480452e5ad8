"""Patches of transformers 5.23, and uses of its internals. Check each of them before another version is used."""

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, modeling_gguf_pytorch_utils
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES
from transformers.distributed.tensor_parallel import ColwiseParallel, TensorParallelLayer
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
    read_field,
)
from transformers.modeling_outputs import BaseModelOutputWithPast

from dpo import parallel
from dpo.utils import progress


def quiet_transformers() -> None:
    """Show transformers' errors only. Its warnings and its bars of loading and saving weights repeat what we log."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    modeling_gguf_pytorch_utils.tqdm = progress  # transformers 5.23: a bar of its own, which ignores the line above


def class_of(config: PreTrainedConfig) -> Any:
    """Return the class that AutoModelForCausalLM loads for `config`. It has no public way to ask."""
    return AutoModelForCausalLM._model_mapping[type(config)]


def sharded(model_class: type[PreTrainedModel], sharding: parallel.Sharding) -> type[PreTrainedModel]:
    """Return a subclass whose `from_pretrained` shards the model on the meta device, then reads only its own shards.

    It replaces the two steps of transformers' distributed loading that build a mesh and apply FSDP, since these have
    no settings for copies, offloading, tied embeddings or sums of gradients.
    """
    manager = SimpleNamespace(get_mesh=lambda names: sharding.mesh)

    def prepare_distribute_model(cls: Any, config: Any, device_map: Any = None) -> Any:
        return config, sharding.device, manager

    def maybe_distribute_model(model: PreTrainedModel, config: Any, mesh: Any) -> PreTrainedModel:
        return parallel.shard_model(model, sharding)

    steps = {
        "__module__": model_class.__module__,  # transformers derives the names in model files from the module
        "prepare_distribute_model": classmethod(prepare_distribute_model),
        "maybe_distribute_model": staticmethod(maybe_distribute_model),
    }
    return type(model_class.__name__, (model_class,), steps)


def sharded_options() -> dict[str, Any]:
    """Return the argument that makes `from_pretrained` of a `sharded` class take these steps."""
    return {"distributed_config": DistributedConfig()}


class _SharedByHeads(TensorParallelLayer):
    """Tensor-parallel style of a norm that every rank applies to its own heads, with one weight for all.

    transformers' own style sums `.grad` over ranks after each backward pass, which is wrong if gradients accumulate.
    """

    @contextlib.contextmanager
    def context_around_forward(self, module: Any, mesh: Any) -> Iterator[None]:
        parameters = dict(module._parameters)
        for name, weight in parameters.items():
            module._parameters[name] = parallel.with_summed_gradient(weight, mesh)
        try:
            yield
        finally:
            module._parameters.update(parameters)


# A head whose logits stay sharded over the vocabulary, which transformers has no name for.
ALL_PARALLEL_STYLES.register("vocabulary_parallel", ColwiseParallel(use_local_output=False))  # type: ignore[arg-type]
ALL_PARALLEL_STYLES.register("shared_by_heads", _SharedByHeads())  # type: ignore[arg-type]


class _Output(BaseModelOutputWithPast):
    def __getattr__(self, name: str) -> None:
        """Return None for outputs that do not exist without a cache, such as cross-attentions or router logits."""


class _Given:
    """Stands in for a model's body: returns given hidden states."""

    def __init__(self, hidden: Tensor):
        self.output = _Output(last_hidden_state=hidden)

    def __call__(self, *inputs: Any, **more: Any) -> _Output:
        return self.output

    def __getattr__(self, name: str) -> "_Given":
        return self


def logits_of(model: PreTrainedModel, forward: Callable[..., Any], hidden: Tensor) -> Tensor:
    """Return the logits [n, vocabulary] of hidden states [n, size]: the model's `forward` with its body replaced.

    transformers has no function for the head alone, and some models scale or cap their logits after it.
    """
    name = model.base_model_prefix
    body = model._modules[name]
    model._modules[name] = _Given(hidden[None])  # type: ignore[assignment]
    try:
        return forward(use_cache=False).logits.squeeze(0)
    finally:
        model._modules[name] = body


def unknown_gguf_tensors(path: Path, model: PreTrainedModel) -> list[str]:
    """Return the tensors of a GGUF file that transformers skips without a warning.

    Experts' tensors are split or merged while they are read. If one of them is skipped, others are missing.
    """
    from gguf import GGUFReader

    reader = GGUFReader(path)
    architecture = str(read_field(reader, "general.architecture")[0])
    known = get_gguf_hf_weights_map(model, TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config={}))
    return [t.name for t in reader.tensors if t.name not in known and not re.search("_exps|_shexp", t.name)]


def forget_quantization(model: PreTrainedModel) -> None:
    """Let a model of dequantised weights be saved: transformers refuses it if its config names a quantisation."""
    del model.config.quantization_config
    model.hf_quantizer = None  # type: ignore[assignment]
