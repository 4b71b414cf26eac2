"""The three fused attentions of a GPU, on the CPU: PyTorch's own operators with the contracts of their CUDA
kernels, and `scaled_dot_product_attention` as it calls them once one is chosen.

A contract is what the kernel returns: which values, in which memory layout, and the log-sum-exps only where
they were asked for. The numbers are the definition's, computed in float32.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

KERNELS = ("efficient", "flash", "cudnn")
_aten = torch.ops.aten


@contextmanager
def fused_attention(choose: Callable[[bool], str]) -> Iterator[list[str]]:
    """Within it, attention runs in the kernel `choose(needs_gradient)`. Yields the kernels' calls, in order.

    As in PyTorch, flash attention takes no mask: the efficient kernel runs instead.
    """
    calls: list[str] = []
    library = torch.library.Library("aten", "IMPL")
    for kernel in KERNELS:
        forward, backward = globals()[f"_{kernel}"], globals()[f"_{kernel}_backward"]
        name = f"_scaled_dot_product_{kernel}_attention"
        library.impl(name, _noted(calls, kernel, forward), "CPU")
        library.impl(f"{name}_backward", _noted(calls, f"{kernel} backward", backward), "CPU")
    original, F.scaled_dot_product_attention = F.scaled_dot_product_attention, _dispatcher(choose)
    try:
        yield calls
    finally:
        F.scaled_dot_product_attention = original
        library._destroy()


def _noted(calls: list[str], name: str, function: Callable) -> Callable:
    def call(*arguments, **options):
        calls.append(name)
        return function(*arguments, **options)

    return call


def _dispatcher(choose: Callable[[bool], str]) -> Callable:
    def scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False):
        asks = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
        bias = attn_mask
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            bias = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill_(~attn_mask, -math.inf)
        kernel = choose(asks)
        if kernel == "flash" and bias is None:
            return _aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, False)[0]
        if kernel == "cudnn":
            arguments = (q, k, v, bias, asks, dropout_p, is_causal, False)
            return _aten._scaled_dot_product_cudnn_attention(*arguments)[0]
        bias = None if bias is None else bias.expand(*q.shape[:3], k.shape[2])
        return _aten._scaled_dot_product_efficient_attention(q, k, v, bias, asks, dropout_p, is_causal)[0]

    return scaled_dot_product_attention


# ---- what they compute -------------------------------------------------------------------------------------


def _scores(q: Tensor, k: Tensor, bias: Tensor | None, is_causal: bool) -> Tensor:
    scores = q.float() @ k.float().transpose(-1, -2) / math.sqrt(q.shape[-1])  # (B, H, T, S)
    if bias is not None:
        scores = scores + bias.float()
    if is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
    return scores


def _forward(q, k, v, bias, is_causal) -> tuple[Tensor, Tensor]:
    """The output (B, H, T, K) and the log-sum-exps (B, H, T)."""
    scores = _scores(q, k, bias, is_causal)
    return (scores.softmax(-1) @ v.float()).to(q.dtype), scores.logsumexp(-1)


def _backward(dy, q, k, v, bias, y, log_sum_exp, is_causal) -> tuple[Tensor, Tensor, Tensor]:
    p = (_scores(q, k, bias, is_causal) - log_sum_exp.reshape(*q.shape[:3], 1)).exp()
    dy = dy.float()
    ds = (
        p
        * (dy @ v.float().transpose(-1, -2) - (dy * y.float()).sum(-1, keepdim=True))
        / math.sqrt(q.shape[-1])
    )
    dq, dk, dv = ds @ k.float(), ds.transpose(-1, -2) @ q.float(), p.transpose(-1, -2) @ dy
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _by_tokens(y: Tensor) -> Tensor:
    """The same values, in memory as (B, T, H, K)."""
    return y.transpose(1, 2).contiguous().transpose(1, 2)


def _number() -> Tensor:
    return torch.zeros((), dtype=torch.long)


# ---- and what they return ----------------------------------------------------------------------------------


def _efficient(q, k, v, bias, asks, dropout_p=0.0, is_causal=False, *, scale=None):
    y, log_sum_exp = _forward(q, k, v, bias, is_causal)
    return _by_tokens(y), log_sum_exp if asks else q.new_empty(*q.shape[:2], 0), _number(), _number()


def _efficient_backward(dy, q, k, v, bias, y, log_sum_exp, s, o, p, mask, is_causal=False, *, scale=None):
    if log_sum_exp.numel() == 0:
        raise RuntimeError("the efficient kernel's backward reads log-sum-exps that nobody asked for")
    return *_backward(dy, q, k, v, bias, y, log_sum_exp, is_causal), None


def _flash(q, k, v, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
    y, log_sum_exp = _forward(q, k, v, None, is_causal)
    random, unused = torch.zeros(2, dtype=torch.uint64), torch.empty(0, dtype=torch.uint64)
    return _by_tokens(y), log_sum_exp, None, None, q.shape[2], k.shape[2], random, unused, q.new_empty(0)


def _flash_backward(dy, q, k, v, y, log_sum_exp, cq, ck, mq, mk, p, is_causal, s, o, *, scale=None):
    return _backward(dy, q, k, v, None, y, log_sum_exp, is_causal)


def _cudnn(q, k, v, bias, asks, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
    y, log_sum_exp = _forward(q, k, v, bias, is_causal)
    log_sum_exp = log_sum_exp.unsqueeze(-1) if asks else None
    return y, log_sum_exp, None, None, q.shape[2], k.shape[2], _number(), _number(), None


def _cudnn_backward(dy, q, k, v, y, log_sum_exp, s, o, bias, cq, ck, mq, mk, p, is_causal, *, scale=None):
    if log_sum_exp is None:
        raise RuntimeError("cuDNN's backward reads log-sum-exps that nobody asked for")
    return _backward(dy, q, k, v, bias, y, log_sum_exp, is_causal)
