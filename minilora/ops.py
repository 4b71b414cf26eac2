"""The PyTorch definition of every element-wise and reduction kernel, and the choice between the two.

These functions say what the numbers are. They are what runs on a CPU and what a kernel in `kernels/` is tested against. Statistics
are taken in float32 whatever the dtype of the activations, as Hugging Face's models do. On a GPU with Triton installed the kernel
runs instead; MINILORA_BACKEND=torch or =triton overrides the choice.

Legend, here and everywhere: B batch, T tokens, S keys (cached ones included), D model width, H query heads, G key/value heads,
K head size, F feed-forward width, V vocabulary, r rank.
"""

import importlib.util
import os
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from minilora.errors import UserError


def use_triton(x: Tensor) -> bool:
    """Whether an operation on `x` runs as a Triton kernel. Raises UserError for an unknown MINILORA_BACKEND."""
    backend = os.environ.get("MINILORA_BACKEND", "")
    if backend not in ("", "torch", "triton"):
        raise UserError(f"MINILORA_BACKEND = {backend!r} is not known; choose torch or triton, or unset it")
    return backend == "triton" or (backend == "" and x.is_cuda and _triton_is_installed())


@lru_cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension (Zhang & Sennrich 2019, arXiv:1910.07467, equation 4).

    x: (..., D), weight: (D,) -> (..., D) in x's dtype. The root mean square is taken in float32. The kernel has no gradient for the
    weight, which LoRA keeps frozen; training from scratch takes the definition.
    """
    if use_triton(x) and not weight.requires_grad:
        from minilora.kernels.rms_norm import rms_norm as kernel

        return kernel(x, weight, eps)
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_{i + K/2}) of every head by the angle of its position (arXiv:2104.09864, section 3.2.2).

    x: (B, heads, T, K); cos, sin: (B or 1, 1, T, K), both halves of the last dimension alike -> (B, heads, T, K).
    """
    left, right = x.chunk(2, dim=-1)  # (B, heads, T, K/2) each
    return x * cos + torch.cat((-right, left), dim=-1) * sin


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020, arXiv:2002.05202, equation 6). gate, up: (..., F) -> (..., F)."""
    return F.silu(gate) * up


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(K)) v with grouped keys and values, through PyTorch's fused kernels.

    q: (B, H, T, K); k, v: (B, G, S, K); mask: bool (B or 1, 1, T, S), True where a query sees a key -> (B, H, T, K).
    With `mask=None` every query sees the keys up to its own place, which needs T = S, or T = 1 as the last of S.

    The key/value heads are repeated in memory: the memory-efficient kernel, the only fused one on a T4, knows no groups.
    """
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # (B, H, S, K)
    v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)  # (B, H, S, K)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and q.shape[2] > 1)


def attention_reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """`attention`, written out (Vaswani et al. 2017, arXiv:1706.03762, equation 1): what the fused kernels are tested against."""
    B, H, T, K = q.shape
    G, S = k.shape[1], k.shape[2]
    q = q.view(B, G, H // G, T, K)  # head h reads key/value head h // (H/G)
    scores = torch.einsum("bghtk,bgsk->bghts", q.float(), k.float()) / K**0.5
    if mask is None:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(diagonal=S - T)
        mask = mask.view(1, 1, T, S)
    scores = scores.masked_fill(~mask.unsqueeze(2), float("-inf"))  # (B, G, H/G, T, S)
    y = torch.einsum("bghts,bgsk->bghtk", scores.softmax(-1), v.float())
    return y.reshape(B, H, T, K).to(v.dtype)
