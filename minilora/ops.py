"""The operations of the decoder between its matrix products: RMSNorm, RoPE, SwiGLU, attention.

These functions say what the numbers are. They run on a CPU, and the Triton kernels in kernels/ are tested
against them. Statistics are taken in float32 whatever the dtype of the activations, as in Hugging Face's
models. RMSNorm and SwiGLU have hand-written backwards, because PyTorch's autograd would keep several tensors
of each, some in float32.

Legend, here and everywhere: B batch, T tokens, S keys (cached ones included), D model width, H query heads, G
key/value heads, K head size, F feed-forward width, V vocabulary, r rank.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minilora.backend.choice import form_for


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension (Zhang & Sennrich 2019, arXiv:1910.07467, equation 4).

    x: (..., D), weight: (D,) -> (..., D) in x's dtype. The root mean square is taken in float32. The kernel
    has no gradient for the weight, which LoRA keeps frozen; training from scratch takes the definition.
    """
    if form_for(x, "rms_norm") == "triton" and not weight.requires_grad:
        from minilora.kernels.rms_norm import rms_norm as kernel

        return kernel(x, weight, eps)
    return _RmsNorm.apply(x, weight, eps)


class _RmsNorm(torch.autograd.Function):
    """Keeps x and one number a row, where PyTorch's autograd would keep x, x / rms(x) and more in float32.

    With n = x / rms(x) and g = w dy:  dx = (g - n mean(n g)) / rms(x),  dw = the sum of n dy over the rows.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)  # (..., 1)
        ctx.save_for_backward(x, weight, inverse)
        return weight * (x.float() * inverse).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        normed, dy = x.float() * inverse, dy.float()
        g = dy * weight.float()
        dx = g.sub_(normed * (normed * g).mean(-1, keepdim=True)).mul_(inverse)
        dw = None
        if ctx.needs_input_grad[1]:
            dw = (normed * dy).reshape(-1, len(weight)).sum(0).to(weight.dtype)
        return dx.to(x.dtype), dw, None


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_{i + K/2}) of every head by the angle of its position (arXiv:2104.09864,
    3.2.2).

    x: (B, heads, T, K); cos, sin: (B or 1, 1, T, K), both halves of K alike -> (B, heads, T, K).
    """
    left, right = x.chunk(2, dim=-1)  # (B, heads, T, K/2) each
    return x * cos + torch.cat((-right, left), dim=-1) * sin


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020, arXiv:2002.05202, equation 6). gate, up: (..., F) -> (..., F)."""
    return _SwiGLU.apply(gate, up)


class _SwiGLU(torch.autograd.Function):
    """Keeps gate and up, but not silu(gate), which is cheap to compute again."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(dy * up, gate), F.silu(gate).mul_(dy)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(K)) v with grouped keys and values, through PyTorch's fused kernels.

    q: (B, H, T, K); k, v: (B, G, S, K); mask: (B or 1, 1, T, S), True where a query sees a key, or numbers to
    add to the scores (see backend/attention_mask.py) -> (B, H, T, K). With `mask=None` every query sees the
    keys up to its own position. That needs T = S, or T = 1 as the last of S.
    """
    # The memory-efficient kernel, the only fused one on a T4, knows no groups: heads are repeated in memory.
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # (B, H, S, K)
    v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)  # (B, H, S, K)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and q.shape[2] > 1)


def attention_reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """`attention`, written out (Vaswani et al. 2017, arXiv:1706.03762, equation 1), for tests and readers."""
    B, H, T, K = q.shape
    G, S = k.shape[1], k.shape[2]
    q = q.view(B, G, H // G, T, K)  # head h reads key/value head h // (H/G)
    scores = torch.einsum("bghtk,bgsk->bghts", q.float(), k.float()) / K**0.5
    if mask is None:
        mask = torch.ones(1, 1, T, S, dtype=torch.bool, device=q.device).tril(diagonal=S - T)
    scores = scores.masked_fill(~mask.unsqueeze(2), float("-inf"))  # (B, G, H/G, T, S)
    y = torch.einsum("bghts,bgsk->bghtk", scores.softmax(-1), v.float())
    return y.reshape(B, H, T, K).to(v.dtype)
