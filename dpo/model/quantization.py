"""Frozen weights of 4 or 8 bits, as bitsandbytes 0.50 stores them.

Its own layers take other kernels without gradients than with them, and in evaluation than in training. For 8 bits they
round activations too, by columns of the whole batch. So policy and reference, or a row alone and beside others, would
differ. Here a layer's weights are taken back to the compute type each time, in the backward pass again.
"""

import functools
import importlib
from typing import Any

import torch
from torch import Tensor
from transformers import BitsAndBytesConfig, PreTrainedModel


def loading(quantization: str, compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return what makes transformers quantise the weights that it reads: `nf4`, double quantisation included, or
    `int8`, one scale for each row of a matrix."""
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def compute_alike(model: PreTrainedModel, compute_dtype: torch.dtype) -> PreTrainedModel:
    """Let the quantised layers of `model` compute the same whatever the mode and the batch."""
    bnb: Any = importlib.import_module("bitsandbytes")
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt):
            module.forward = functools.partial(_forward, module, compute_dtype)
    return model


def _forward(module: Any, compute_dtype: torch.dtype, x: Tensor) -> Tensor:
    return _Product.apply(x.to(compute_dtype), module).to(x.dtype)


def _weights(module: Any, dtype: torch.dtype) -> Tensor:
    """Return a quantised layer's weights, [out, in]."""
    functional: Any = importlib.import_module("bitsandbytes.functional")
    weight = module.weight
    if hasattr(weight, "quant_state"):
        return functional.dequantize_4bit(weight.data, weight.quant_state).to(dtype)
    return functional.int8_vectorwise_dequant(weight.data, weight.SCB).to(dtype)


class _Product(torch.autograd.Function):
    """x W' + b, with a gradient for x only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: Any) -> Tensor:
        ctx.module = module
        bias = module.bias.to(x.dtype) if module.bias is not None else None
        return torch.nn.functional.linear(x, _weights(module, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad @ _weights(ctx.module, grad.dtype), None
