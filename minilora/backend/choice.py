"""In which form an operation runs: as a Triton kernel on a GPU, as compiled C on a CPU, or as its PyTorch
definition.

All three compute the same numbers. The definition says what they are, and the other two are tested against
it. MINILORA_BACKEND=torch or =triton overrides the choice.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from minilora.backend import elementwise, elementwise_trial, kernel_trial, native_trial, triton_trial
from minilora.system.device import cpu_bfloat16_feature, requested_backend

_fused = True


def set_fused(on: bool) -> None:
    """Choose for this process whether operations may run in fused forms, or only in their plain ones."""
    global _fused
    _fused = on


def form_for(x: Tensor, operation: str) -> str:
    """Return 'triton', 'c' or 'torch' for one of the operations of native_trial.TRIALS or elementwise.FORMS.

    Raises UserError for a MINILORA_BACKEND that is unknown or cannot run there.
    """
    if backend := requested_backend(x.device):
        return backend
    if x.is_cuda:
        return "triton" if triton_trial.passed(x.device) else "torch"
    trials = elementwise_trial if operation in elementwise.FORMS else native_trial
    return "c" if x.is_cpu and trials.is_trusted(operation, x.dtype) else "torch"


def fastest(operation: str, x: Tensor, definition: Callable) -> Callable:
    """Return the function to run an operation of `minilora.ops` on tensors like x: its definition, or another
    form.
    """
    if not _fused:
        return definition
    if x.is_cpu and operation not in elementwise.FORMS and requested_backend(x.device) != "triton":
        return definition
    match form_for(x, operation):
        case "c":
            return elementwise.form_of(operation, definition)
        case "triton" if _triton_computes(operation, x):
            from minilora.kernels import operations

            form = getattr(operations, operation, None)
            usable = form and kernel_trial.passed(operation, form, definition, x.device, x.dtype)
            return form if usable else definition
        case _:
            return definition


def _triton_computes(operation: str, x: Tensor) -> bool:
    """Whether the kernel is for tensors like x. Products with dropout inside need tensor cores."""
    if operation in ("dropped_product", "add_dropped_product", "product_with_dropped"):
        return has_tensor_cores(x)
    return x.dtype != torch.float64


def has_tensor_cores(x: Tensor) -> bool:
    """Whether a Triton kernel multiplies tensors like x on tensor cores: 16 bits, capability 8.0 or newer."""
    tensor_cores = x.is_cuda and torch.cuda.get_device_capability(x.device) >= (8, 0)
    return tensor_cores and x.element_size() == 2


def fusing(x: Tensor) -> bool:
    """Whether LoRA runs inside its products for x, (..., in). One row is decoding, with forms of its own."""
    return _fused and x.numel() > x.shape[-1]


def decoding(x: Tensor) -> bool:
    """Whether x, (..., in), is one row without a gradient: a token of decoding at batch 1."""
    return _fused and x.numel() == x.shape[-1] and not torch.is_grad_enabled()


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which a matrix product with x is fastest and at least as exact: nearly always x's
    own.

    The exception is bfloat16 on a CPU without bfloat16 instructions. PyTorch multiplies it there more slowly
    than float32, so the operands are widened and the product is rounded once.
    """
    if x.device.type == "cpu" and x.dtype == torch.bfloat16 and not _cpu_multiplies_bfloat16():
        return torch.float32
    return x.dtype


@lru_cache
def _cpu_multiplies_bfloat16() -> bool:
    return cpu_bfloat16_feature() is not None


def padded_length(tokens: int) -> int:
    """Round a number of tokens up: to multiples of 16 up to 256, of 32 up to 512, of 64 up to 1024, and so
    on.

    Padding is at most a sixteenth of a long row, and up to 1024 tokens there are 32 different lengths.
    """
    multiple = max(16, (1 << (tokens - 1).bit_length()) // 16)
    return -(-tokens // multiple) * multiple
