"""RMSNorm of a frozen weight: forward and the gradient of the input, one row a program.

    forward     inv_rms = 1 / sqrt(mean(x^2) + eps)          y = w * (x * inv_rms)
    backward    g = w * dy,  n = x * inv_rms                 dx = inv_rms * (g - n * mean(g * n))

In PyTorch this is six passes over the activations; here each value is read once and written once. Statistics
are float32, and the normed value is rounded to the activations' dtype before the weight is applied, as in the
definition (`minilora.ops.rms_norm`). The weight is frozen under LoRA, so it gets no gradient.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def rms_norm_forward_kernel(
    x_ptr,  # (rows, D)
    weight_ptr,  # (D,)
    y_ptr,  # (rows, D)
    inv_rms_ptr,  # (rows,) float32
    D,
    eps,
    BLOCK: tl.constexpr,  # a power of two >= D
):
    """y = w * (x / rms(x)) of one row."""
    row = tl.program_id(0).to(tl.int64)  # rows * D may pass 2^31
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    x = tl.load(x_ptr + row * D + columns, mask=inside, other=0.0).to(tl.float32)
    inv_rms = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / D + eps)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0)
    normed = (x * inv_rms).to(y_ptr.dtype.element_ty).to(tl.float32)  # rounded as the definition rounds it
    tl.store(
        y_ptr + row * D + columns, (weight.to(tl.float32) * normed).to(y_ptr.dtype.element_ty), mask=inside
    )
    tl.store(inv_rms_ptr + row, inv_rms)


@triton.jit
def rms_norm_backward_kernel(
    x_ptr,  # (rows, D)
    weight_ptr,  # (D,)
    inv_rms_ptr,  # (rows,) float32
    dy_ptr,  # (rows, D)
    dx_ptr,  # (rows, D)
    D,
    BLOCK: tl.constexpr,
):
    """dx of one row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    x = tl.load(x_ptr + row * D + columns, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * D + columns, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    inv_rms = tl.load(inv_rms_ptr + row)
    normed, g = x * inv_rms, weight * dy
    dx = inv_rms * (g - normed * (tl.sum(g * normed, axis=0) / D))
    tl.store(dx_ptr + row * D + columns, dx.to(dx_ptr.dtype.element_ty), mask=inside)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        D = x.shape[-1]
        x = x.contiguous()
        y = torch.empty_like(x)
        inv_rms = torch.empty(x.numel() // D, dtype=torch.float32, device=x.device)  # (rows,)
        block = triton.next_power_of_2(D)
        with torch.cuda.device_of(x):
            rms_norm_forward_kernel[(len(inv_rms),)](
                x, weight, y, inv_rms, D, eps, BLOCK=block, num_warps=warps(block)
            )
        ctx.save_for_backward(x, weight, inv_rms)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, None]:
        x, weight, inv_rms = ctx.saved_tensors
        D, dy = x.shape[-1], dy.contiguous()
        dx = torch.empty_like(x)
        block = triton.next_power_of_2(D)
        with torch.cuda.device_of(x):
            rms_norm_backward_kernel[(len(inv_rms),)](
                x, weight, inv_rms, dy, dx, D, BLOCK=block, num_warps=warps(block)
            )
        return dx, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x: (..., D), frozen weight: (D,) -> (..., D) in x's dtype. See `minilora.ops.rms_norm`."""
    return _RMSNorm.apply(x, weight, eps)


def warps(block: int) -> int:
    """Enough warps that a thread holds at most 16 values of a row, so that nothing spills."""
    return max(1, min(16, block // 512))
