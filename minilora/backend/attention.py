"""Causal attention over documents in the fused kernels that are at hand, each as a forward and a backward.

For every query i of a document, over the keys j <= i of the same document (and j > i - window):

    s_ij = q_i . k_j / sqrt(K)      lse_i = log sum_j exp(s_ij)      y_i = sum_j exp(s_ij - lse_i) v_j

    forward     (q, k, v, documents) -> y, lse                    q, y: (N, H, K); k, v: (N, G, K)
    backward    (dy, q, k, v, y, lse, documents) -> dq, dk, dv    lse: in the form's own layout

PyTorch's `scaled_dot_product_attention` hides lse, and wants a dense mask for documents. The operators below
it do neither:

    flash        GPUs from capability 8.0 on, 16 bits: takes cumulative lengths and grouped heads
    efficient    the other GPUs (a T4), and float32: takes cumulative lengths; heads are repeated in memory
    C            CPUs with AMX, bfloat16 (cpu_attention.py)
    PyTorch's    other CPUs: one call for documents of one length; heads are repeated

Where none of them can be used, the definition runs. A GPU's kernels get a trial first (attention_trial.py).
k and v are kept as they come, and repeated once more in backward: 2 (H - G) K fewer numbers a token between
the two.

On a CPU with bfloat16 instructions PyTorch compiles its kernel for every new length, and never
drops one. There documents are computed at rounded lengths. The rows added to a document come after it, so no
token sees them, and their own gradient is zero.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from minilora.backend import cpu_attention
from minilora.backend.attention_trial import Form, passed
from minilora.backend.choice import padded_length, product_dtype
from minilora.backend.documents import Documents
from minilora.system.device import requested_backend

FLASH_HEAD_SIZE = 192  # beyond it flash attention's backward does not run on every card
aten = torch.ops.aten


def fused_form(q: Tensor, k: Tensor, definition: Form) -> Form:
    """Return the fused kernel for tensors like q, (N, H, K), and k, (N, G, K), or the definition."""
    if q.is_cuda:
        form = _gpu_form(q.device, q.dtype, q.shape[-1])
        usable = form is not None and passed(form, definition, q.device, q.dtype, q.shape[-1])
        return form if usable else definition
    if q.device.type != "cpu":
        return definition
    if not requested_backend(q.device) and cpu_attention.takes(q, k):
        return Form("C", _c_forward, _c_backward)
    return Form("PyTorch's of a CPU", _cpu_forward, _cpu_backward)


def _gpu_form(device: torch.device, dtype: torch.dtype, head_size: int) -> Form | None:
    if head_size % 8:  # rows begin at multiples of 16 bytes
        return None
    modern = torch.cuda.get_device_capability(device) >= (8, 0)
    if dtype in (torch.float16, torch.bfloat16) and head_size <= FLASH_HEAD_SIZE and modern and _has_flash():
        return Form("flash", _flash_forward, _flash_backward)
    if dtype in (torch.float16, torch.float32) or (modern and dtype == torch.bfloat16):
        return Form("efficient", _efficient_forward, _efficient_backward)
    return None


def _has_flash() -> bool:
    """Whether PyTorch was built with flash attention, and nobody has switched it off."""
    return torch.backends.cuda.is_flash_attention_available() and torch.backends.cuda.flash_sdp_enabled()


class KeptAttention:
    """First run: keep what attention gives. Second run: return that without computing (policy `selective`).

    The form is kept with its results, so that backward reads lse in the layout that it was written in.
    """

    def __init__(self, kept: Iterable[tuple[Form, Tensor, Tensor]] | None = None):
        self.outputs: list[tuple[Form, Tensor, Tensor]] = []  # of the first run
        self.kept = None if kept is None else iter(kept)

    def get(self, compute: Callable[[], tuple[Form, Tensor, Tensor]]) -> tuple[Form, Tensor, Tensor]:
        """Return the form, y and lse of the next attention."""
        if self.kept is not None:
            return next(self.kept)
        self.outputs.append(compute())
        return self.outputs[-1]


# ---- heads -------------------------------------------------------------------------------------------------


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """Return each head of x as often as query heads read it: (N, G, ...) -> (N, H, ...)."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def sum_heads(dx: Tensor, groups: int) -> Tensor:
    """Return the gradient of the heads that were repeated: (N, H, ...) -> (N, G, ...)."""
    return dx if dx.shape[1] == groups else dx.unflatten(1, (groups, -1)).sum(2)


# ---- GPU: flash attention ----------------------------------------------------------------------------------


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> tuple[Tensor, Tensor]:
    lengths, sight = _flash_arguments(documents)
    y, lse, *_ = aten._flash_attention_forward(
        q, k, v, *lengths, 0.0, documents.window is None, False, **sight
    )
    return y, lse  # lse: (H, N)


def _flash_backward(dy, q, k, v, y, lse, documents: Documents) -> tuple[Tensor, Tensor, Tensor]:
    lengths, sight = _flash_arguments(documents)
    random = torch.empty(2, dtype=torch.uint64, device=q.device)  # read by dropout alone, and there is none
    return aten._flash_attention_backward(
        dy, q, k, v, y, lse, *lengths, 0.0, documents.window is None, random, random, **sight
    )


def _flash_arguments(documents: Documents) -> tuple[tuple, dict]:
    """Return where documents begin, of queries and keys, and how far a query sees to the left and right."""
    lengths = documents.cumulative, documents.cumulative, documents.longest, documents.longest
    left = -1 if documents.window is None else documents.window - 1  # -1: all of its document
    return lengths, dict(window_size_left=left, window_size_right=0)


# ---- GPU: memory-efficient attention -----------------------------------------------------------------------

_CAUSAL = 1  # its custom_mask_type


def _efficient_forward(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> tuple[Tensor, Tensor]:
    rows = (t.unsqueeze(0) for t in (q, repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])))
    lengths = documents.cumulative, documents.cumulative, documents.longest, documents.longest
    y, lse, *_ = aten._efficient_attention_forward(
        *rows, None, *lengths, 0.0, _CAUSAL, compute_log_sumexp=True, window_size=documents.window
    )
    return y.squeeze(0), lse  # lse: (documents, H, the longest length, rounded up)


def _efficient_backward(dy, q, k, v, y, lse, documents: Documents) -> tuple[Tensor, Tensor, Tensor]:
    k, v, G = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1]), k.shape[1]
    dy, q, k, v, y = (t.unsqueeze(0) for t in (dy, q, k, v, y))
    lengths = documents.cumulative, documents.cumulative, documents.longest, documents.longest
    random = torch.empty((), dtype=torch.int64, device="cpu")  # read by dropout alone, and there is none
    dq, dk, dv, _ = aten._efficient_attention_backward(
        dy, q, k, v, None, y, *lengths, lse, 0.0, random, random, _CAUSAL, False, window_size=documents.window
    )
    return dq.squeeze(0), sum_heads(dk.squeeze(0), G), sum_heads(dv.squeeze(0), G)


# ---- CPU: C ------------------------------------------------------------------------------------------------


def _c_forward(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> tuple[Tensor, Tensor]:
    rows = [t.contiguous() for t in (q, k, v)]
    y, lse = torch.empty_like(rows[0]), q.new_empty(q.shape[1], len(q), dtype=torch.float32)
    cpu_attention.attention(*rows, documents.ends, documents.window, y, lse)
    return y, lse  # lse: (H, N)


def _c_backward(dy, q, k, v, y, lse, documents: Documents) -> tuple[Tensor, Tensor, Tensor]:
    rows = [t.contiguous() for t in (q, k, v)]
    gradients = [torch.empty_like(t) for t in rows]
    cpu_attention.attention_backward(
        dy.contiguous(), *rows, y, lse, documents.ends, documents.window, *gradients
    )
    return tuple(gradients)


# ---- CPU: PyTorch's kernel, for documents of one length at a time ------------------------------------------


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> tuple[Tensor, Tensor]:
    outputs = []
    for piece in _pieces(q, documents):
        y, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            *piece.take_heads(q, k, v), is_causal=True, attn_mask=piece.mask(q.dtype)
        )
        outputs.append((piece.rows(y), piece.rows(lse)))
    y, lse = map(_joined, zip(*outputs, strict=True))
    return y, lse  # lse: (N, H)


def _cpu_backward(dy, q, k, v, y, lse, documents: Documents) -> tuple[Tensor, Tensor, Tensor]:
    gradients, G = [], k.shape[1]
    for piece in _pieces(q, documents):
        tensors = piece.take(dy), *piece.take_heads(q, k, v), piece.take(y), piece.take(lse)
        dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *tensors, 0.0, True, attn_mask=piece.mask(q.dtype)
        )
        gradients.append(map(piece.rows, (dq, sum_heads(dk, G), sum_heads(dv, G))))
    return tuple(map(_joined, zip(*gradients, strict=True)))


class _Piece(NamedTuple):
    """Documents that follow each other, and are computed at one length."""

    start: int
    lengths: tuple[int, ...]
    length: int  # at which they are computed
    window: int | None

    def take(self, x: Tensor) -> Tensor:
        """Return the documents' tokens: (N, H, ...) -> (documents, H, length, ...), with zeros in between."""
        x = x[self.start : self.start + sum(self.lengths)]
        if self._is_full():
            return x.unflatten(0, (-1, self.length)).transpose(1, 2)
        padded = x.new_zeros(len(self.lengths), self.length, *x.shape[1:])
        for row, document in zip(padded, x.split(self.lengths), strict=True):
            row[: len(document)] = document
        return padded.transpose(1, 2)

    def take_heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the documents' queries, keys and values, these for all heads."""
        return self.take(q), repeat_heads(self.take(k), q.shape[1]), repeat_heads(self.take(v), q.shape[1])

    def rows(self, x: Tensor) -> Tensor:
        """Return the tokens of the documents in a list: (documents, H, length, ...) -> (tokens, H, ...)."""
        x = x.transpose(1, 2)
        if self._is_full():
            return x.flatten(0, 1)
        return torch.cat([row[:n] for row, n in zip(x, self.lengths, strict=True)])

    def mask(self, dtype: torch.dtype) -> Tensor | None:
        """Return what to add to the scores of documents that are longer than the window: (length, length)."""
        if self.window is None or self.window >= self.length:
            return None
        hidden = torch.ones(self.length, self.length, dtype=torch.bool).tril(-self.window)
        return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)

    def _is_full(self) -> bool:
        return sum(self.lengths) == len(self.lengths) * self.length


def _pieces(q: Tensor, documents: Documents) -> Iterator[_Piece]:
    compiled = q.dtype == torch.bfloat16 and product_dtype(q) == torch.bfloat16
    start = 0
    for length, group in groupby(documents.lengths, padded_length if compiled else None):
        piece = _Piece(start, tuple(group), length, documents.window)
        yield piece
        start += sum(piece.lengths)


def _joined(parts: tuple[Tensor, ...]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
