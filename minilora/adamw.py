"""The PyTorch definition of AdamW with moments in 8 bits, and the choice between it, the compiled CPU pass
and the Triton kernel.

What `ops.py` is for the model's operations, this is for the optimizer's; `optim.py` holds the optimizer
itself.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from minilora.ops import dequantize_8bit, native_for, nearest_of_steps, quantize_8bit, use_triton

MOMENT_BLOCK_SIZE = 256  # of AdamW's 8-bit moments


def adamw(
    parameters: list[Tensor],
    gradients: list[Tensor],
    exp_avgs: list[Tensor],  # m
    exp_avg_sqs: list[Tensor],  # v
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,  # t, from 1
) -> None:
    """One step of AdamW on many tensors, in place (Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2):

        m <- beta1 m + (1 - beta1) g        v <- beta2 v + (1 - beta2) g^2
        p <- (1 - lr weight_decay) p - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

    All in float32. Parameters and moments are written to.
    """
    beta1, beta2 = betas
    torch._foreach_mul_(exp_avgs, beta1)
    torch._foreach_add_(exp_avgs, gradients, alpha=1 - beta1)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, gradients, gradients, value=1 - beta2)
    # Through float64, because PyTorch's float32 square root on a CPU is MKL's, which is now and then off by
    # the last bit.
    denominators = [v.double().sqrt_().float() for v in exp_avg_sqs]
    torch._foreach_div_(denominators, math.sqrt(1 - beta2**step))
    torch._foreach_add_(denominators, eps)
    torch._foreach_mul_(parameters, 1 - lr * weight_decay)
    torch._foreach_addcdiv_(parameters, exp_avgs, denominators, value=-lr / (1 - beta1**step))


def adamw_8bit(
    tensors: list[
        tuple[Tensor, ...]
    ],  # each: parameter, gradient, places and absmax of m, places and absmax of v
    codes: tuple[Tensor, Tensor],  # (256,) float32 each: of m and of v
    nearest: tuple[Tensor, Tensor],  # (65536,) uint8 each: `nearest_of_steps` of the codes
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    """`adamw` with moments in 8 bits, in place: dequantized, updated, used and quantized again
    (arXiv:2110.02861, section 2).

    A tensor of n elements, (n,) float32 as is its gradient, has of each moment places (n,) uint8 and absmax
    (ceil(n / 256),) float32, zeros at first. The moments are to the bit those of bitsandbytes on a CPU.

    An adapter is hundreds of small tensors. The kernels take all of them at once, as a table of addresses,
    (tensors, 7) int64: each row is where the six parts of a tensor begin, and n.
    """
    for parts in tensors:
        _check_adamw_8bit(*parts)
    settings = lr, betas, eps, weight_decay, step
    kernel_arguments = tensors, codes, nearest, _adamw_scalars(*settings)
    if use_triton(tensors[0][0]):
        from minilora.kernels.adamw_8bit import adamw_8bit as kernel

        return kernel(*kernel_arguments)
    if (native := native_for(tensors[0][0], _native_adamw_agrees)) and native.adamw_8bit(*kernel_arguments):
        return None
    return _adamw_8bit_definition(tensors, codes, *settings)


def _check_adamw_8bit(parameter: Tensor, gradient: Tensor, *moments: Tensor) -> None:
    """Behind each address lies what the kernels take for granted."""
    n = len(parameter)
    blocks = -(-n // MOMENT_BLOCK_SIZE)
    expected = [(parameter, n, torch.float32), (gradient, n, torch.float32)]
    expected += zip(moments, (n, blocks) * 2, (torch.uint8, torch.float32) * 2, strict=True)
    for part, size, dtype in expected:
        assert (
            part.shape == (size,)
            and part.dtype == dtype
            and part.is_contiguous()
            and part.device == parameter.device
        )


def _adamw_scalars(
    lr: float, betas: tuple[float, float], eps: float, weight_decay: float, step: int
) -> tuple[float, ...]:
    """The eight numbers that depend on neither tensor nor element, in the order in which the kernels take
    them.
    """
    beta1, beta2 = betas
    second_correction = math.sqrt(1 - beta2**step)
    return (
        beta1,
        1 - beta1,
        beta2,
        1 - beta2,
        second_correction,
        eps,
        1 - lr * weight_decay,
        -lr / (1 - beta1**step),
    )


def _adamw_8bit_definition(tensors, codes, lr, betas, eps, weight_decay, step) -> None:
    for parameter, gradient, *moments in tensors:
        states = [(*moments[:2], codes[0]), (*moments[2:], codes[1])]
        m, v = (
            dequantize_8bit(places, absmax, code, MOMENT_BLOCK_SIZE) for places, absmax, code in states
        )  # (n,) each
        adamw([parameter], [gradient], [m], [v], lr, betas, eps, weight_decay, step)
        for moment, (places, absmax, code) in zip((m, v), states, strict=True):
            torch._foreach_copy_([places, absmax], quantize_8bit(moment, code, MOMENT_BLOCK_SIZE))


@lru_cache
def _native_adamw_agrees() -> bool:
    """Whether a compiled AdamW gives the definition's bits. On CPUs without FMA, PyTorch rounds a product
    before it is added.
    """
    from minilora.backend import native

    place = dict(dtype=torch.float32, device="cpu")
    code = torch.linspace(-1, 1, 256, **place).pow(3)
    codes = code, code.abs().sort().values
    nearest = nearest_of_steps(codes[0]), nearest_of_steps(codes[1])
    sizes = (3 * MOMENT_BLOCK_SIZE + 7, 2 * MOMENT_BLOCK_SIZE)  # whole blocks and a tail
    results = []
    for compiled in (False, True):
        tensors = []
        for n in sizes:
            x = torch.linspace(-1, 1, n, **place)
            places, absmax = (
                torch.zeros_like(x, dtype=torch.uint8),
                torch.zeros(-(-n // MOMENT_BLOCK_SIZE), **place),
            )
            tensors.append((x, x.pow(3).roll(5), places, absmax, places.clone(), absmax.clone()))
        for step in (1, 2, 3):
            settings = 1e-3, (0.9, 0.999), 1e-8, 0.01, step
            if not compiled:
                _adamw_8bit_definition(tensors, codes, *settings)
            elif not native.adamw_8bit(tensors, codes, nearest, _adamw_scalars(*settings)):
                return False
        results.append([part for parts in tensors for part in parts])
    return all(torch.equal(one, other) for one, other in zip(*results, strict=True))
