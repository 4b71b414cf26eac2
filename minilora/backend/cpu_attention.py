"""Attention in C on a CPU with AMX: causal, over the documents of one row, see attention.c.

    attention           y = softmax(q k^T / sqrt(K)) v, and the logarithm of each softmax's denominator
    attention_backward  dq, dk, dv

PyTorch's fused attention wants every key/value head repeated and the tokens of each head side by side, so
q, k, v and their gradients are copied. It compiles its products anew for each length and keeps them. And it
knows no documents: it computes all scores of a row and adds a mask.

Here a row of short documents costs their squares and not the row's. Documents need no padding. A key/value
head's gradient is summed over its query heads in float32.

C finds its memory in the shared buffers (scratch.py). Forward takes 4 G K bytes a token, for K and V in the
order of the products. Backward takes 6 G K, and 8 K bytes a token for each part of up to four query heads:
the float32 sums of dK and dV. Each thread has 100 KB of its stack forward and 450 KB backward.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from minilora.backend import native, native_trial
from minilora.backend.scratch import scratch

_SQUARE = 32  # rows and columns
_HEADS = 4  # query heads of a part
_LARGEST = 256  # numbers of a head
_WORK = 8  # a number of q costs at least as much as so many values of the other operations


def takes(q: Tensor, k: Tensor) -> bool:
    """Whether the functions below take queries (N, H, K) and keys (N, G, K)."""
    (_, H, K), G = q.shape, k.shape[1]
    return q.dtype == torch.bfloat16 and H % G == 0 and K % 32 == 0 and K <= _LARGEST and is_trusted()


def attention(
    q: Tensor, k: Tensor, v: Tensor, ends: Tensor, window: int | None, y: Tensor, lse: Tensor
) -> None:
    """Fill y, (N, H, K), and lse, (H, N) float32: a token sees `window` tokens of its document, itself the
    last.

    q: (N, H, K); k, v: (N, G, K) bfloat16; ends: (documents,) int64, the token after each document's last,
    ascending. Tokens after the last document get zeros.
    """
    document, tiles, _ = _buffers(q, k, ends, 2)
    sizes = _sizes(q, k, ends, window)
    rest = *map(native._at, (y, lse, document, tiles)), native._threads(_WORK * q.numel())
    native._functions()["attention_bf16"](*map(native._at, (q, k, v, ends)), *sizes, *rest)


def attention_backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    lse: Tensor,
    ends: Tensor,
    window: int | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """Fill dq, (N, H, K), and dk, dv, (N, G, K), from dy and from what `attention` was given and gave."""
    document, tiles, sums = _buffers(q, k, ends, 3)
    sizes = _sizes(q, k, ends, window)
    rest = *map(native._at, (dq, dk, dv, document, tiles, sums)), native._threads(_WORK * q.numel())
    native._functions()["attention_backward_bf16"](
        *map(native._at, (dy, q, k, v, y, lse, ends)), *sizes, *rest
    )


def _sizes(q: Tensor, k: Tensor, ends: Tensor, window: int | None) -> tuple[int, ...]:
    N, H, K = q.shape
    lengths = ends.diff(prepend=ends.new_zeros(1), append=ends.new_tensor([N]))
    assert int(lengths.min()) >= 0, f"documents end in order, within the row of {N}: {ends.tolist()}"
    return len(ends), N, H, k.shape[1], K, window or N


def _buffers(q: Tensor, k: Tensor, ends: Tensor, matrices: int) -> tuple[Tensor, ...]:
    """Return room for the documents, for packed matrices of k's size, and for the sums of dk and dv."""
    (N, H, K), G = q.shape, k.shape[1]
    rows = _SQUARE * (N // _SQUARE + len(ends))  # each document begins a block
    document = scratch((3 * len(ends),), torch.int64, q.device)
    tiles = scratch((matrices * G * K * rows,), torch.bfloat16, q.device)
    parts = G * -(-H // G // _HEADS)
    sums = scratch((2 * parts * K * rows,), torch.float32, q.device) if matrices == 3 else None
    return document, tiles, sums


# ---- a compiler is not trusted blindly: known bits on trial tensors ----------------------------------------

KNOWN_BITS = "326a950f5789676c"  # of exact sums: tests/core/test_cpu_attention.py


@lru_cache
def is_trusted() -> bool:
    """Whether this CPU has AMX, and the compiled functions give the known bits."""
    if "attention_bf16" not in native._functions():
        return False
    if native_trial.digest(trial(attention, attention_backward)) != KNOWN_BITS:
        native._warn_once("its attention gives other bits than exact sums; set CC to another C compiler")
        return False
    return True


def trial(forward: Callable, backward: Callable) -> list[Tensor]:
    """Return y, dq, dk and dv of documents of 150 and 20 tokens, and 10 tokens of none, with a window of 64.

    The result is exact, though the C compiler's exponentials are not. A key has 128 at one of 64 numbers, its
    token modulo 64. A query has -128 at all of them but two, its own and the next. So a score is 0, or so low
    that its weight is 0. Of the keys with score 0 a query sees itself and the one 63 tokens before; the key
    after it and the one 64 before are hidden. The weights are 1, or 1/2 and 1/2.
    """
    N, H, G, K = 180, 5, 1, 96
    token, number = torch.arange(N, device="cpu"), torch.arange(64, device="cpu")
    after = (number - token.view(N, 1)) % 64  # (N, 64)
    q, k, v, dy = (_small(N, heads, K, step) for heads, step in ((H, 5), (G, 7), (G, 11), (H, 13)))
    q[..., :64] = torch.where(after > 1, -128, 0).unsqueeze(1)
    k[..., :64] = torch.where(after == 0, 128, 0).unsqueeze(1)
    q[..., 80:], k[..., 64:80] = 0, 0  # where one has numbers, the other has zeros
    ends = torch.tensor([150, 170], device="cpu")
    y, dq, dk, dv = (torch.empty_like(x) for x in (q, q, k, v))
    lse = torch.empty(H, N, dtype=torch.float32, device="cpu")
    forward(q, k, v, ends, 64, y, lse)
    backward(dy, q, k, v, y, lse, ends, 64, dq, dk, dv)
    return [y, dq, dk, dv]


def _small(N: int, heads: int, K: int, step: int) -> Tensor:
    """Return (N, heads, K) numbers -1, 0 and 1, seldom other than 0: differences of dP have few bits."""
    n = torch.arange(N * heads * K, device="cpu") * step % 101
    return ((n == 3).int() - (n == 58).int() + (n == 77).int()).view(N, heads, K).bfloat16()
