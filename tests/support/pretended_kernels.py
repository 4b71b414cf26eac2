"""Triton launches on a pretended GPU: the variant that would be compiled, and the numbers it would compute.

The numbers come from the kernel's PyTorch definition, which is as exact and a hundred times faster than
Triton's interpreter. The interpreter runs kernels that have none here, or all of them on request.
"""

import ctypes
import warnings
from types import SimpleNamespace

import torch

from minilora import ops
from minilora.quantization import (
    dequantize_definition,
    dequantize_dynamic,
    quantize_definition,
    quantize_dynamic,
)


def signature_of(arguments: tuple, options: dict) -> tuple:
    """Return what Triton compiles one variant of a kernel for.

    Of a tensor: its dtype, and whether 16 divides its address. Of a whole number: its width, whether it is 1
    and whether 16 divides it. Of a float: nothing. Constants and options are themselves.
    """
    return *map(_kind, arguments), *sorted((name, str(value)) for name, value in options.items())


def _kind(value) -> object:
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, float):
        return "float"
    if isinstance(value, int) and not isinstance(value, bool):
        return "one" if value == 1 else ("64 bits" if value >= 2**31 else "32 bits", value % 16 == 0)
    return value


def run_kernel(kernel, grid, arguments: tuple, options: dict, interpreted: bool) -> None:
    """Do what a launch would do."""
    definition = DEFINITIONS.get(kernel.fn.__name__)
    if interpreted or definition is None:
        run_interpreted(kernel, grid, arguments, options)
    else:
        given = dict(zip(kernel.arg_names, arguments, strict=False)) | options
        with torch.no_grad():
            definition(SimpleNamespace(**given))


def run_interpreted(kernel, grid, arguments: tuple, options: dict) -> None:
    """Interpret a kernel although Triton was imported without TRITON_INTERPRET, and the functions it calls."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    call = JITFunction.__call__
    JITFunction.__call__ = lambda function, *a, **k: InterpretedFunction(function.fn)(*a, **k)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the interpreter's own: infinity times zero, conversions
            InterpretedFunction(kernel.fn)[grid](*arguments, **options)
    finally:
        JITFunction.__call__ = call


# ---- the kernels, by what they were given ------------------------------------------------------------------


def _weight(given) -> SimpleNamespace:
    """The quantized tensor that a kernel was given in parts."""
    names = "packed absmax code nested_absmax nested_code offset".split()
    return SimpleNamespace(
        blocksize=given.BLOCKSIZE, **{name: getattr(given, f"{name}_ptr") for name in names}
    )


def _dequantize(given) -> None:
    dequantize_definition(_weight(given), given.out_ptr)


def _quantize(given) -> None:
    results = given.packed_ptr, given.absmax_ptr
    quantize_definition(given.x_ptr, given.bounds_ptr, given.symbols_ptr, given.BLOCKSIZE, *results)


def _gemv(given) -> None:
    weight = torch.empty(given.out_features, given.in_features)
    dequantize_definition(_weight(given), weight)
    y = weight @ given.x_ptr.float()
    y = y if given.narrow_ptr is None else y + given.update_ptr @ given.narrow_ptr
    given.out_ptr.copy_(y if given.bias_ptr is None else y + given.bias_ptr.float())


def _rms_norm_forward(given) -> None:
    saved = []
    context = SimpleNamespace(save_for_backward=lambda *tensors: saved.extend(tensors))
    given.y_ptr.copy_(ops._RmsNorm.forward(context, given.x_ptr, given.weight_ptr, given.eps))
    given.inv_rms_ptr.copy_(saved[2].view(-1))


def _rms_norm_backward(given) -> None:
    inverse = given.inv_rms_ptr.view(*given.x_ptr.shape[:-1], 1)
    saved = given.x_ptr, given.weight_ptr, inverse
    context = SimpleNamespace(saved_tensors=saved, needs_input_grad=(True, False, False))
    given.dx_ptr.copy_(ops._RmsNorm.backward(context, given.dy_ptr)[0])


def _adamw_8bit(given) -> None:
    codes = given.code_m_ptr, given.code_v_ptr
    for *addresses, n in given.tensors_ptr.tolist():
        sizes, types = (n, n, *(n, -(-n // given.BLOCK)) * 2), ("f", "f", *("B", "f") * 2)
        p, g, *moments = map(_at, addresses, sizes, types)
        states = [(*moments[:2], codes[0]), (*moments[2:], codes[1])]
        m, v = (dequantize_dynamic(*state, given.BLOCK) for state in states)
        m.mul_(given.beta1).add_(g, alpha=given.rest1)
        v.mul_(given.beta2).addcmul_(g, g, value=given.rest2)
        denominator = v.double().sqrt_().float().div_(given.correction2).add_(given.eps)
        p.mul_(given.decay).addcdiv_(m, denominator, value=given.rate)
        for moment, (indices, absmax, code) in zip((m, v), states, strict=True):
            torch._foreach_copy_([indices, absmax], quantize_dynamic(moment, code, given.BLOCK))


def _at(address: int, count: int, kind: str) -> torch.Tensor:
    """The tensor at an address, which on a pretended GPU is the CPU's."""
    item, dtype = {"f": (ctypes.c_float, torch.float32), "B": (ctypes.c_uint8, torch.uint8)}[kind]
    return torch.frombuffer((item * count).from_address(address), dtype=dtype)


DEFINITIONS = {
    "dequantize_kernel": _dequantize,
    "quantize_kernel": _quantize,
    "gemv_kernel": _gemv,
    "rms_norm_forward_kernel": _rms_norm_forward,
    "rms_norm_backward_kernel": _rms_norm_backward,
    "adamw_8bit_kernel": _adamw_8bit,
}
