"""The fused attentions of a GPU, on the CPU: PyTorch's operators with the contracts of their CUDA kernels.

A contract says which arguments a kernel takes and refuses, what it returns in which shape, and what it leaves
unwritten: NaN here. So a result that reads such memory shows. The numbers are those of PyTorch's attention on
the CPU, one document after the other.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_aten = torch.ops.aten


@contextmanager
def fused_attentions() -> Iterator[None]:
    """Within it, PyTorch's flash and memory-efficient attention run on tensors of the CPU."""
    library = torch.library.Library("aten", "IMPL")
    for name, function in EMULATED.items():
        library.impl(name, function, "CPU")
    try:
        yield
    finally:
        library._destroy()


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


# ---- what they compute -------------------------------------------------------------------------------------


def _documents(cumulative: Tensor, longest: int) -> Iterator[slice]:
    """Where each document's tokens lie. A kernel starts as many blocks as the longest has, and no more."""
    ends = cumulative.tolist()
    for start, end in zip(ends, ends[1:], strict=False):
        yield slice(start, min(end, start + longest))


def _mask(length: int, window: int | None, dtype: torch.dtype) -> Tensor | None:
    if window is None:
        return None
    hidden = torch.ones(length, length, dtype=torch.bool).tril(-window)
    return torch.zeros(length, length, dtype=dtype).masked_fill_(hidden, -math.inf)


def _heads(x: Tensor, rows: slice, heads: int) -> Tensor:
    """One document: (N, G, K) -> (1, H, n, K)."""
    return x[rows].repeat_interleave(heads // x.shape[1], dim=1).transpose(0, 1).unsqueeze(0)


def _forward(q, k, v, cumulative, longest, window) -> tuple[Tensor, list[Tensor]]:
    """The output (N, H, K), and each document's log-sum-exps (H, n)."""
    y, log_sum_exps = torch.full_like(q, math.nan), []
    for rows in _documents(cumulative, longest):
        tensors = [_heads(t, rows, q.shape[1]) for t in (q, k, v)]
        mask = _mask(tensors[0].shape[2], window, q.dtype)
        found, log_sum_exp = _aten._scaled_dot_product_flash_attention_for_cpu(
            *tensors, is_causal=True, attn_mask=mask
        )
        y[rows] = found[0].transpose(0, 1)
        log_sum_exps.append(log_sum_exp[0])
    return y, log_sum_exps


def _backward(dy, q, k, v, y, log_sum_exps, cumulative, longest, window) -> list[Tensor]:
    gradients = [torch.full_like(t, math.nan) for t in (q, k, v)]
    for rows, log_sum_exp in zip(_documents(cumulative, longest), log_sum_exps, strict=True):
        tensors = [_heads(t, rows, q.shape[1]) for t in (dy, q, k, v, y)]
        mask = _mask(tensors[0].shape[2], window, q.dtype)
        found = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *tensors, log_sum_exp.unsqueeze(0), 0.0, True, attn_mask=mask
        )
        for gradient, part in zip(gradients, found, strict=True):
            gradient[rows] = part[0].transpose(0, 1).unflatten(1, (gradient.shape[1], -1)).sum(2)
    return gradients


# ---- flash attention: what it takes, and what it returns ---------------------------------------------------


def _flash_window(is_causal: bool, left: int | None, right: int | None) -> int | None:
    left, right = (-1 if side is None else side for side in (left, right))
    _check(is_causal or right == 0, "this emulation knows causal attention alone")
    return None if left < 0 else left + 1


def _check_flash(q, k, v, cum_seq_q, cum_seq_k, dropout_p) -> None:
    _check(torch.cuda.get_device_capability() >= (8, 0), "FlashAttention only supports Ampere GPUs or newer.")
    _check(q.dtype in (torch.float16, torch.bfloat16), "FlashAttention only support fp16 and bf16 data type")
    _check(q.dtype == k.dtype == v.dtype, "query, key and value must have the same dtype")
    _check(q.dim() == k.dim() == v.dim() == 3, "with cumulative lengths, tensors are (tokens, heads, size)")
    _check(q.stride(-1) == k.stride(-1) == v.stride(-1) == 1, "Input tensor must have contiguous last dim")
    _check(q.shape[-1] % 8 == 0 and q.shape[-1] <= 256, "head size must be a multiple of 8, at most 256")
    _check(q.shape[1] % k.shape[1] == 0 and k.shape == v.shape, "heads of queries must be a multiple")
    _check(dropout_p == 0.0, "this emulation knows no dropout")
    _check_lengths(q, cum_seq_q, cum_seq_k)


def _check_lengths(q: Tensor, *cumulative: Tensor) -> None:
    for lengths in cumulative:
        _check(lengths.dtype == torch.int32, "cumulative lengths must have dtype int32")
        _check(lengths.device == q.device, "cumulative lengths must be on the GPU of the queries")
        _check(lengths.is_contiguous() and lengths.dim() == 1 and len(lengths) > 1, "one list of lengths")


def _flash(
    query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *,
    scale=None, window_size_left=None, window_size_right=None, seqused_k=None, alibi_slopes=None,
    block_table=None, num_splits=None,
):  # fmt: skip
    _check_flash(query, key, value, cum_seq_q, cum_seq_k, dropout_p)
    window = _flash_window(is_causal, window_size_left, window_size_right)
    y, log_sum_exps = _forward(query, key, value, cum_seq_q, max_q, window)
    log_sum_exp = query.new_full((query.shape[1], len(query)), math.nan, dtype=torch.float32)
    for rows, found in zip(_documents(cum_seq_q, max_q), log_sum_exps, strict=True):
        log_sum_exp[:, rows] = found
    random, unused = torch.zeros(2, dtype=torch.uint64), torch.empty((), dtype=torch.uint64)
    return y, log_sum_exp, random, unused, query.new_empty(0)


def _flash_backward(
    grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal,
    rng_state, unused, *, scale=None, window_size_left=None, window_size_right=None,
):  # fmt: skip
    _check_flash(query, key, value, cum_seq_q, cum_seq_k, dropout_p)
    _check(grad_out.dtype == out.dtype == query.dtype, "query and dout must have the same dtype")
    _check(grad_out.shape == out.shape == query.shape, "dout must have the shape of out")
    _check(logsumexp.shape == (query.shape[1], len(query)), "log-sum-exps must be (heads, tokens)")
    _check(logsumexp.dtype == torch.float32, "log-sum-exps must be float32")
    window = _flash_window(is_causal, window_size_left, window_size_right)
    log_sum_exps = [logsumexp[:, rows] for rows in _documents(cum_seq_q, max_q)]
    return tuple(_backward(grad_out, query, key, value, out, log_sum_exps, cum_seq_q, max_q, window))


# ---- memory-efficient attention ----------------------------------------------------------------------------


def _check_efficient(query, key, value, bias, cu_seqlens_q, cu_seqlens_k, max_q, dropout_p, mask, window):
    _check(query.dim() == key.dim() == value.dim() == 4, "tensors are (batch, tokens, heads, size)")
    _check(query.shape == key.shape == value.shape, "the kernel knows no grouped heads")
    _check(query.dtype == key.dtype == value.dtype, "query, key and value must have the same dtype")
    modern = torch.cuda.get_device_capability() >= (8, 0)
    _check(
        query.dtype in (torch.float16, torch.float32) or (modern and query.dtype == torch.bfloat16),
        "cutlassF: no kernel found to launch!",
    )
    _check(all(t.stride(-1) == 1 for t in (query, key, value)), "the last dimension must be contiguous")
    _check(all(t.stride(2) % 8 == 0 for t in (query, key, value)), "cutlassF: no kernel found to launch!")
    _check(bias is None, "cu seqlen + bias not supported")
    _check(dropout_p == 0.0 and mask == 1, "this emulation knows causal attention without dropout alone")
    _check(window is None or window > 0, "a window holds a token")
    _check(len(query) == 1, "cu_seqlen only supports batch_size=1")
    _check(0 < max_q <= query.shape[1], "Invalid max_seqlen_q")
    _check_lengths(query, cu_seqlens_q, cu_seqlens_k)


def _efficient(
    query, key, value, bias, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
    custom_mask_type, compute_log_sumexp=False, *, scale=None, seqlen_k=None, window_size=None,
):  # fmt: skip
    _check_efficient(query, key, value, bias, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, dropout_p,
                     custom_mask_type, window_size)  # fmt: skip
    y, found = _forward(query[0], key[0], value[0], cu_seqlens_q, max_seqlen_q, window_size)
    width = -(-max_seqlen_q // 32) * 32 if compute_log_sumexp else 0
    log_sum_exp = query.new_full((len(found), query.shape[2], width), math.nan, dtype=torch.float32)
    for row, part in zip(log_sum_exp, found if compute_log_sumexp else (), strict=compute_log_sumexp):
        row[:, : part.shape[1]] = part
    seed, offset = (torch.empty((), dtype=torch.int64) for _ in range(2))
    return y.unsqueeze(0), log_sum_exp, seed, offset, max_seqlen_q, max_seqlen_k


def _efficient_backward(
    grad_out_, query, key, value, bias, out, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
    logsumexp, dropout_p, philox_seed, philox_offset, custom_mask_type, bias_requires_grad, *, scale=None,
    num_splits_key=None, window_size=None, shared_storage_dqdkdv=False,
):  # fmt: skip
    _check_efficient(query, key, value, bias, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, dropout_p,
                     custom_mask_type, window_size)  # fmt: skip
    documents = len(cu_seqlens_q) - 1
    _check(grad_out_.shape == query.shape == out.shape, "the gradient must have the shape of the output")
    _check(out.is_contiguous(), "the output must be contiguous")
    _check(logsumexp.shape == (documents, query.shape[2], -(-max_seqlen_q // 32) * 32),
           "log-sum-exps must be (documents, heads, longest length rounded up to 32)")  # fmt: skip
    lengths = cu_seqlens_q.diff().tolist()
    log_sum_exps = [row[:, :n] for row, n in zip(logsumexp, lengths, strict=True)]
    tensors = [t[0] for t in (grad_out_, query, key, value, out)]
    gradients = _backward(*tensors, log_sum_exps, cu_seqlens_q, max_seqlen_q, window_size)
    return *(g.unsqueeze(0) for g in gradients), query.new_empty(0)


EMULATED = {
    "_flash_attention_forward": _flash,
    "_flash_attention_backward": _flash_backward,
    "_efficient_attention_forward": _efficient,
    "_efficient_attention_backward": _efficient_backward,
}
