"""In which form an operation runs: as a Triton kernel on a GPU, as compiled C on a CPU, or as its PyTorch
definition.

All three compute the same numbers. The definition says what they are, and the other two are tested against
it. MINILORA_BACKEND=torch or =triton overrides the choice.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from minilora.backend import native, triton_trial
from minilora.system.device import cpu_bfloat16_feature, requested_backend


def form_for(x: Tensor, operation: str) -> str:
    """Return 'triton', 'c' or 'torch'. operation: quantize, dequantize, adamw_8bit; others have no C form.

    Raises UserError for a MINILORA_BACKEND that is unknown or cannot run there.
    """
    if backend := requested_backend(x.device):
        return backend
    if x.is_cuda:
        return "triton" if triton_trial.passed(x.device) else "torch"
    return "c" if x.device.type == "cpu" and native.is_trusted(operation, x.dtype) else "torch"


def fastest(operation: str, x: Tensor, definition: Callable) -> Callable:
    """Return the function to run an operation of `minilora.ops` on tensors like x: its definition, or another
    form.
    """
    return definition


_fused = True


def set_fused(on: bool) -> None:
    """Choose for this process whether operations may run in fused forms, or only in their plain ones."""
    global _fused
    _fused = on


def fusing(x: Tensor) -> bool:
    """Whether LoRA runs inside its products for x, (..., in). One row is decoding, with forms of its own."""
    return _fused and x.numel() > x.shape[-1]


def decoding(x: Tensor) -> bool:
    """Whether x, (..., in), is one row without a gradient: a token of decoding at batch 1."""
    return _fused and x.numel() == x.shape[-1] and not torch.is_grad_enabled()


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which a matrix product with x is fastest and at least as exact: nearly always x's
    own.

    The exception is bfloat16 on a CPU without bfloat16 instructions. PyTorch multiplies it there at a quarter
    of float32's speed, so the operands are widened and the product is rounded once.
    """
    if x.device.type == "cpu" and x.dtype == torch.bfloat16 and not _cpu_multiplies_bfloat16():
        return torch.float32
    return x.dtype


@lru_cache
def _cpu_multiplies_bfloat16() -> bool:
    return cpu_bfloat16_feature() is not None
