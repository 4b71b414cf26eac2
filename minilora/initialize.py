"""Where A and B start, and which weight stays frozen beside them (docs/initialization.md).

LoRA starts with B = 0, so that the first step begins at the base model. Other starts put part of W into A and
B. They take that part out of the frozen weight, so that the layer still computes W x:

    W  =  base + scaling * B A            W: (out, in)   A: (r, in)   B: (out, r)

    kind              scaling * B A                                    base
    true              0: A uniform (the paper: normal), B zero         W
    gaussian          0: A normal with deviation 1/r, B zero           W
    orthogonal        0: B's row space is orthogonal to A's columns    W
    eva               0: A has the main directions of the inputs       W
    pissa             W's r largest singular values, exactly           W - scaling * B A
    pissa_niter_N     the same by N subspace iterations, much faster   W - scaling * B A
    olora             the first r columns of W = Q R                   W - scaling * B A
    loftq             the r largest of W - base                        4 bits of W - scaling * B A

An adapter that started from the second group means nothing beside the original W. `adapters/arithmetic.py`
rewrites it as plain LoRA.

Every number is PEFT's, draws included, with one exception: PEFT's LoftQ forgets the scaling, so its layer is
near W x only if scaling = 1. Draws come from PyTorch's generator on the CPU; pissa_niter_N draws on W's
device.
"""

import math
import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from minilora.int8 import Int8Tensor
from minilora.quantization import QuantizedTensor, quantize_4bit
from minilora.system.errors import UserError, suggestion

Quantized = QuantizedTensor | Int8Tensor
Start = tuple[Tensor, Tensor, Tensor | Quantized | None]  # A (r, in), B (out, r), base (out, in); None: W
KEEP_THE_BASE = ("true", "gaussian", "orthogonal", "eva")
CHANGE_THE_BASE = ("pissa", "pissa_niter_N", "olora", "loftq")
REPEATABLE = ("pissa", "olora", "loftq")  # they read W alone: whoever has W can make A, B and base again
_REFUSED = {
    "corda": "it needs the covariance of every layer's inputs",
    "lora_ga": "it needs a gradient of the whole weight",
    "mica": "it trains A alone",
}
_HERE = dict(dtype=torch.float32, device="cpu")  # whatever PyTorch's defaults are
_PISSA_NITER = re.compile(r"pissa_niter_(\d{1,4})", re.ASCII)


def check_kind(kind: bool | str) -> str:
    """Return the kind's name. Raises UserError for one that `initialize` does not know."""
    name = "true" if kind is True else str(kind)
    if name in _REFUSED:
        raise UserError(
            f"init_lora_weights {name!r} is not supported, since {_REFUSED[name]}; choose 'pissa'"
        )
    known = KEEP_THE_BASE + CHANGE_THE_BASE
    if (name not in known or name == "pissa_niter_N") and not _PISSA_NITER.fullmatch(name):
        raise UserError(f"init_lora_weights {name!r} is not known{suggestion(name, known)}")
    return name


def takes_part_of_base(kind: bool | str) -> bool:
    """Whether a kind takes its B A out of W, as PiSSA and OLoRA do. LoftQ's is part of what 4 bits lost."""
    return kind in ("pissa", "olora") or bool(_PISSA_NITER.fullmatch(str(kind)))


def check_rank(kind: str, r: int, shape: tuple[int, ...]) -> None:
    """Raise UserError for a rank that a kind cannot fill, of a weight of this shape, (out, in)."""
    if kind == "orthogonal" and r % 2:
        raise UserError(f"init_lora_weights 'orthogonal' needs an even lora_rank, not {r}")
    if kind not in KEEP_THE_BASE and r > min(shape):
        raise UserError(
            f"lora_rank {r} exceeds a side of a {tuple(shape)} weight, which {kind!r} cannot fill; lower it"
        )


@torch.no_grad()
def initialize(
    kind: bool | str,
    W: Tensor,  # (out, in) float32
    r: int,
    scaling: float,
    quantize: Callable[[Tensor], Quantized] | None = None,  # how frozen weights are stored; None: as they are
    loftq_iter: int = 1,
    directions: Tensor | None = None,  # eva: (r, in), of `eva.input_directions`
) -> Start:
    """Return A (r, in) and B (out, r), float32, and the weight to freeze: None leaves W, or what it was.

    The weight is float32, or what `quantize` makes of it. LoftQ without `quantize` takes NF4 and returns the
    dequantized weight, as PEFT does. Raises UserError for kinds that are not known and ranks that do not fit.
    """
    name = check_kind(kind)
    assert W.dtype == torch.float32 and W.dim() == 2
    check_rank(name, r, W.shape)
    if name in KEEP_THE_BASE:
        A, B = _drawn(name, W.shape, r, directions)
        return A.to(W.device), B.to(W.device), None
    if name == "loftq":
        return loftq(W, r, scaling, quantize, loftq_iter)
    A, B = olora(W, r) if name == "olora" else pissa(name, W, r, scaling)
    base = residual(W, A, B, scaling)
    return A, B, base if quantize is None else quantize(base)


def residual(W: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """W - scaling * B A, (out, in): PiSSA's and OLoRA's base. A later run makes it from A and B of step 0."""
    return W - scaling * B @ A


# ---- starts with B A = 0 -----------------------------------------------------------------------------------


def _drawn(name: str, shape: torch.Size, r: int, directions: Tensor | None) -> tuple[Tensor, Tensor]:
    """A and B of a kind that reads nothing of W but its shape."""
    out_features, in_features = shape
    A, B = torch.empty(r, in_features, **_HERE), torch.zeros(out_features, r, **_HERE)
    match name:
        case "true":
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))  # U(-1/sqrt(in), 1/sqrt(in))
        case "gaussian":
            nn.init.normal_(A, std=1 / r)
        case "orthogonal":
            return _orthogonal(in_features, out_features, r)
        case "eva":
            if directions is None:
                raise UserError("init_lora_weights 'eva' needs the directions of this layer's inputs")
            A.copy_(directions)
    return A, B


def _orthogonal(in_features: int, out_features: int, r: int) -> tuple[Tensor, Tensor]:
    """Random A and B with B A = 0: alternate rows of one orthogonal matrix stand between them
    (https://datta0.github.io/posts/rethink-lora-init).
    """
    Q = torch.linalg.qr(torch.randn(r, r, **_HERE))[0]
    A = (torch.randn(in_features, r // 2, **_HERE) @ Q[0::2]).T / 10.0  # (r, in)
    B = torch.randn(r // 2, out_features, **_HERE).T @ Q[1::2] / 10.0  # (out, r)
    return A.contiguous(), B.contiguous()


# ---- starts with a part of W -------------------------------------------------------------------------------


def pissa(name: str, W: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A = sqrt(S/scaling) V^T and B = U sqrt(S/scaling) of W ~ U S V^T (PiSSA, arXiv:2404.02948, 3).

    S: the r largest singular values. `pissa_niter_N` finds them by N subspace iterations from a random start
    (Halko et al. 2011, arXiv:0909.4061, algorithm 4.4).
    """
    if iterations := _PISSA_NITER.fullmatch(name):
        U, S, V = torch.svd_lowrank(W, r, niter=int(iterations[1]))
        return _shared(U, S / scaling, V.T)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return _shared(U[:, :r], S[:r] / scaling, Vh[:r])


def olora(W: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """A = R[:r] and B = Q[:, :r] of W = Q R (Büyükakyüz 2024, arXiv:2406.01775, 3.2). B is orthonormal."""
    Q, R = torch.linalg.qr(W)
    return R[:r].contiguous(), Q[:, :r].contiguous()


def loftq(
    W: Tensor, r: int, scaling: float, quantize: Callable[[Tensor], Quantized] | None, iterations: int
) -> Start:
    """Alternate: quantize what the adapter leaves of W, fit the adapter to what quantization loses of W
    (Li et al. 2023, arXiv:2310.08659, algorithm 1).

    After one iteration base is quantize(W), QLoRA's own weight.
    """
    if iterations < 1:
        raise UserError(f"loftq_iter must be at least 1, not {iterations}")
    store, product = quantize or _plain_nf4, 0.0
    for _ in range(iterations):
        base = store(W - product)
        lost = W - base.dequantize(torch.float32)
        U, S, Vh = torch.linalg.svd(lost, full_matrices=False)
        A, B = _shared(U[:, :r], S[:r], Vh[:r])
        product = B @ A
    root = math.sqrt(scaling)
    return A / root, B / root, base if quantize else base.dequantize(torch.float32)


def _plain_nf4(weight: Tensor) -> QuantizedTensor:
    return quantize_4bit(weight, "nf4", double_quant=False)


def _shared(U: Tensor, S: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) with B A = U S V^T; each takes the root of every singular value."""
    root = S.sqrt()
    return (root.view(-1, 1) * Vh).contiguous(), (U * root).contiguous()
