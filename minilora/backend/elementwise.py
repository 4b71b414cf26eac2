"""The C forms of the decoder's operations between its matrix products: RMSNorm, RoPE, SwiGLU, cross-entropy,
dropout.

On a CPU these are limited by memory. A definition in PyTorch is a chain of operations, and each of them reads
and writes whole tensors, most of them in float32: RMSNorm's backward in bfloat16 moves 50 bytes a number. C
reads each operand once and writes each result once, 8 bytes a number: elementwise.c says what that takes.

Each function here has the signature and the meaning of its definition in ops.py, loss.py or dropout.py, and
rounds where the definition rounds. RoPE and dropout give its bits. In the others a sum has another order, or
exp is another polynomial: the results differ by a few units of float32 before they are rounded.

The C forms run for tensors of every size, so that a token's numbers do not change with the size of its batch.
A call costs less than the definition's chain of operations. SwiGLU's definition is the exception: it is two
operations, and faster for few numbers.
"""

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from minilora.backend import native

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # the numbers that elementwise.c gives them


def add_norm(x: Tensor, y: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x, y: (rows, D), weight: (D,) -> h = x + y, its norm, and 1 / rms(h), (rows,) float32."""
    x, y, weight = _contiguous(x, y, weight)
    h = x if y is None else torch.empty_like(x)
    normed, inverse = torch.empty_like(x), x.new_empty(len(x), dtype=torch.float32)
    _run("add_norm", x, *x.shape, *_at(x, y, weight), eps, *_at(h, normed, inverse))
    return h, normed, inverse


def add_norm_backward(h: Tensor, weight: Tensor, inverse: Tensor, dn: Tensor, dh: Tensor | None) -> Tensor:
    """h, dn, dh: (rows, D), weight: (D,), inverse: (rows,) -> the gradient of x, (rows, D)."""
    operands = _contiguous(h, weight, inverse, dn, dh)
    dx = torch.empty_like(operands[0])
    _run("add_norm_backward", h, *h.shape, *_at(*operands, dx))
    return dx


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, back: bool = False) -> tuple[Tensor, Tensor]:
    """q: (Bt, T, H, K), k: (Bt, T, G, K), any strides; cos, sin: (Bt or 1, T, K) -> q and k, rotated."""
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    cos, sin = _contiguous(cos, sin)
    Bt, T, _, K = q.shape
    rotated = tuple(x.new_empty(x.shape) for x in (q, k))
    operands = q.data_ptr(), _heads(q), k.data_ptr(), _heads(k), *_at(cos, sin)
    angle_stride, sign = 0 if len(cos) == 1 else T * K, -1.0 if back else 1.0
    _run("rope", q, Bt, T, K, *operands, angle_stride, sign, *_at(*rotated))
    return rotated


def _heads(x: Tensor) -> ctypes.Array:
    """Return what C asks of (Bt, T, heads, K): the number of heads, and the strides of Bt, T and heads."""
    return (ctypes.c_int64 * 4)(x.shape[2], *x.stride()[:3])


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    gate, up = _contiguous(gate, up)
    y = torch.empty_like(gate)
    _run("swiglu", gate, gate.numel(), *_at(gate, up, y))
    return y


def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of gate and up."""
    operands = _contiguous(dy, gate, up)
    dgate, dup = torch.empty_like(operands[1]), torch.empty_like(operands[2])
    _run("swiglu_backward", gate, gate.numel(), *_at(*operands, dgate, dup))
    return dgate, dup


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return each row's loss, (n,); the logits, (n, V) contiguous float32, become their gradient."""
    n, V = logits.shape
    if n and not 0 <= int(targets.min()) <= int(targets.max()) < V:
        raise IndexError(f"a target is none of {V} classes: {int(targets.min())} to {int(targets.max())}")
    losses, targets = logits.new_empty(n), targets.contiguous()
    native.call("cross_entropy", logits.numel(), n, V, *_at(logits, targets, losses))
    return losses


def dropout(x: Tensor, seed: int, stream: int, threshold: int, out: Tensor | None = None) -> Tensor:
    """Return x, (rows, columns), where it is kept, else 0; in `out`, which may be x, if given."""
    (x,) = _contiguous(x)
    out = torch.empty_like(x) if out is None else out
    _run("dropout", x, *x.shape, *_at(x), seed, stream, threshold, *_at(out))
    return out


def add_dropped(x: Tensor, y: Tensor, seed: int, stream: int, threshold: int) -> None:
    """x += dropout(y). x, y: (rows, columns), x contiguous."""
    (y,) = _contiguous(y)
    _run("add_dropped", x, *x.shape, *_at(x, y), seed, stream, threshold)


# Each function, and the operands that must have one dtype.
FORMS = {
    "add_norm": (add_norm, (0, 1, 2)),
    "add_norm_backward": (add_norm_backward, (0, 1, 3, 4)),
    "rope": (rope, (0, 1, 2, 3)),
    "swiglu": (swiglu, (0, 1)),
    "swiglu_backward": (swiglu_backward, (0, 1, 2)),
    "cross_entropy": (cross_entropy, (0,)),
    "dropout": (dropout, (0,)),
    "add_dropped": (add_dropped, (0, 1)),
}


def form_of(operation: str, definition: Callable) -> Callable:
    """Return the C function of an operation, which leaves operands of different dtypes to the definition."""
    function, alike = FORMS[operation]

    def form(*operands, **options):
        dtypes = {operands[i].dtype for i in alike if operands[i] is not None}
        return (function if len(dtypes) == 1 else definition)(*operands, **options)

    return form


def _run(operation: str, x: Tensor, *arguments) -> None:
    native.call(operation, x.numel(), _DTYPES[x.dtype], *arguments)


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def _at(*tensors: Tensor | None) -> list[int | None]:
    return [None if t is None else native._at(t) for t in tensors]
