"""Triton launches on a pretended GPU: the variant that would be compiled, and the numbers it would compute.

The numbers come from the kernel's PyTorch definition, which is as exact and a hundred times faster than
Triton's interpreter. The interpreter runs kernels that have none here, or all of them on request.
"""

import ctypes
import struct
import warnings
from types import SimpleNamespace

import torch

from minilora import loss, ops
from minilora.backend import dropout
from minilora.quantization import (
    dequantize_definition,
    dequantize_dynamic,
    quantize_definition,
    quantize_dynamic,
)


def signature_of(kernel, arguments: tuple, options: dict) -> tuple:
    """Return what Triton compiles one variant of a kernel for.

    Of a tensor: its dtype, and whether 16 divides its address. Of a whole number: its width, and unless the
    kernel says `do_not_specialize`, whether it is 1 and whether 16 divides it. Of a float: nothing. Constants
    and options are themselves.
    """
    kinds = (
        _kind(value, parameter.do_not_specialize)
        for value, parameter in zip(arguments, kernel.params, strict=False)
    )
    return *kinds, *sorted((name, str(value)) for name, value in options.items())


def _kind(value, any_value: bool) -> object:
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, float):
        return "float"
    if isinstance(value, int) and not isinstance(value, bool):
        width = "64 bits" if value >= 2**31 else "32 bits"
        return width if any_value else "one" if value == 1 else (width, value % 16 == 0)
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


def _add_norm(given) -> None:
    h, n, inverse = ops.add_norm_definition(given.x_ptr, given.y_ptr, given.weight_ptr, given.eps)
    given.n_ptr.copy_(n)
    given.inverse_ptr.copy_(inverse)
    if given.y_ptr is not None:
        given.h_ptr.copy_(h)


def _add_norm_backward(given) -> None:
    saved = given.h_ptr, given.weight_ptr, given.inverse_ptr
    given.dx_ptr.copy_(ops.add_norm_backward_definition(*saved, given.dn_ptr, given.dh_ptr))


def _rope(given) -> None:
    angles = given.cos_ptr, given.sin_ptr
    q, k = ops.rope_definition(given.q_ptr, given.k_ptr, *angles, back=given.BACK)
    given.q_out_ptr.copy_(q)
    given.k_out_ptr.copy_(k)


def _swiglu(given) -> None:
    given.y_ptr.copy_(ops.swiglu_definition(given.gate_ptr, given.up_ptr))


def _swiglu_backward(given) -> None:
    dgate, dup = ops.swiglu_backward_definition(given.dy_ptr, given.gate_ptr, given.up_ptr)
    given.dgate_ptr.copy_(dgate)
    given.dup_ptr.copy_(dup)


def _cross_entropy(given) -> None:
    given.losses_ptr.copy_(loss.cross_entropy_definition(given.logits_ptr, given.targets_ptr))


def _dropped(x: torch.Tensor, given) -> torch.Tensor:
    return dropout.dropout_definition(x, given.seed, given.stream, given.threshold)


def _dropout(given) -> None:
    given.out_ptr.copy_(_dropped(given.x_ptr, given))


def _add_dropped(given) -> None:
    given.x_ptr.add_(_dropped(given.y_ptr, given))


def _dropped_product(given) -> None:
    given.out_ptr.copy_(_dropped(given.x_ptr, given) @ given.a_ptr.T)


def _add_dropped_product(given) -> None:
    product = given.g_ptr.float() @ given.a_ptr.float()  # the sum is rounded once
    given.dx_ptr.copy_(given.dx_ptr.float() + _dropped(product, given))


def _product_with_dropped(given) -> None:
    dropped = _dropped(given.x_ptr, given).float()
    for part, rows in zip(given.parts_ptr, range(0, given.rows, given.PART), strict=True):
        here = slice(rows, rows + given.PART)
        part.copy_(given.g_ptr[here].float().T @ dropped[here])


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
    item, dtype = {
        "f": (ctypes.c_float, torch.float32), "B": (ctypes.c_uint8, torch.uint8),
        "fp16": (ctypes.c_uint16, torch.float16), "bf16": (ctypes.c_uint16, torch.bfloat16),
    }[kind]  # fmt: skip
    return torch.frombuffer((item * count).from_address(address), dtype=dtype)


def _tiles(given):
    """Yield of each program: its rows of n, the same rows of x or y, its factor in float32, its scaling."""
    kind = {"fp32": "f"}.get(str(given.FLOAT), str(given.FLOAT))
    factors = given.factors_ptr.tolist()
    for i, start, end in given.tiles_ptr.tolist():
        address, per_rank, per_column, r, bits = factors[i]
        end = end if hasattr(given, "ROWS") else start + 1
        rows = torch.arange(start, end) if given.order_ptr is None else given.order_ptr[start:end]
        count = (r - 1) * per_rank + (given.width - 1) * per_column + 1
        factor = _at(address, count, kind).as_strided((r, given.width), (per_rank, per_column))
        yield slice(start, end), rows, factor.float(), struct.unpack("f", struct.pack("i", bits))[0]


def _shrink(given) -> None:
    for here, rows, F, scaling in _tiles(given):
        given.n_ptr[here, : len(F)] = given.x_ptr[rows].float() @ F.T * scaling


def _expand(given) -> None:
    for here, rows, F, _ in _tiles(given):
        update = given.n_ptr[here, : len(F)].float() @ F
        given.y_ptr[rows] = (given.y_ptr[rows].float() + update).to(given.y_ptr.dtype)


DEFINITIONS = {
    "dequantize_kernel": _dequantize,
    "quantize_kernel": _quantize,
    "gemv_kernel": _gemv,
    "add_norm_kernel": _add_norm,
    "add_norm_backward_kernel": _add_norm_backward,
    "rope_kernel": _rope,
    "swiglu_kernel": _swiglu,
    "swiglu_backward_kernel": _swiglu_backward,
    "cross_entropy_kernel": _cross_entropy,
    "dropout_kernel": _dropout,
    "add_dropped_kernel": _add_dropped,
    "dropped_product_kernel": _dropped_product,
    "add_dropped_product_kernel": _add_dropped_product,
    "product_with_dropped_kernel": _product_with_dropped,
    "adamw_8bit_kernel": _adamw_8bit,
    "shrink_rows_kernel": _shrink,
    "shrink_tiles_kernel": _shrink,
    "expand_rows_kernel": _expand,
    "expand_tiles_kernel": _expand,
}
