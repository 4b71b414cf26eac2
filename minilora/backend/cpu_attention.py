"""Attention in C on a CPU with AMX: causal, over the documents of one row, see attention.c.

    attention           y = softmax(q k^T / sqrt(K)) v, and the logarithm of each softmax's denominator
    attention_backward  dq, dk, dv

PyTorch's fused attention of the same step takes longer for four reasons. It wants every key/value head
repeated and each head's tokens side by side, so q, k, v and their gradients are copied. It compiles its
products anew for each length and never drops them, 8 MB a length. It knows no documents: it computes all
scores of a row and adds a mask. And its backward multiplies small float32 blocks.

Here a document is as far as a query can see, so a row of short documents costs their squares and not the
row's. Rows need no padding, and a head's gradient for its keys is summed over the group in float32.

What C needs beside its operands it finds in the shared buffer (scratch.py): forward 4 G K bytes a token for
K and V in the order of the products, backward 6 G K, and 8 K bytes a token for each four query heads, the
float32 sums of dK and dV. Each thread has 70 KiB of its stack for 64 numbers a head, 450 at most.
"""

import ctypes
from functools import lru_cache

import torch
from torch import Tensor

from minilora.backend import native
from minilora.backend.scratch import scratch

_SQUARE = 32  # rows of a block
_HEADS = 4  # query heads of a part
_LARGEST = 256  # numbers of a head


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
    rest = *map(native._at, (y, lse, document, tiles)), _threads(q)
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
    rest = *map(native._at, (dq, dk, dv, document, tiles, sums)), _threads(q)
    native._functions()["attention_backward_bf16"](
        *map(native._at, (dy, q, k, v, y, lse, ends)), *sizes, *rest
    )


def _sizes(q: Tensor, k: Tensor, ends: Tensor, window: int | None) -> tuple[int, ...]:
    N, H, K = q.shape
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


def _threads(q: Tensor) -> int:
    return max(1, min(torch.get_num_threads(), q.numel() // 2**14))
