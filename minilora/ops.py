"""The operations of the decoder between its matrix products: RMSNorm, RoPE, SwiGLU, attention.

Each is an autograd function with a backward by hand, because PyTorch's autograd would keep several tensors of
each, some in float32. Forward and backward themselves are the plain functions `..._definition`: they say what
the numbers are. C and Triton have the same functions, one pass over memory each, and `fastest` takes them
where they agree with the definition (backend/choice.py). Statistics are taken in float32 whatever the dtype
of the activations, as in Hugging Face's models.

Legend, here and everywhere: Bt batch, T tokens, S keys (cached ones included), D model width, H query heads,
G key/value heads, K head size, F feed-forward width, V vocabulary, r rank.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minilora.backend.attention import Form, KeptAttention, fused_form, repeat_heads, sum_heads
from minilora.backend.choice import fastest
from minilora.backend.documents import Documents

# ---- RMSNorm, with the sum before it -----------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension (Zhang & Sennrich 2019, arXiv:1910.07467, equation 4).

    x: (..., D), weight: (D,) -> (..., D) in x's dtype. The root mean square is taken in float32.
    """
    return _AddNorm.apply(x, None, weight, eps)[1]


def add_norm(x: Tensor, y: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return h = x + y and rms_norm(h). Without y, h is x: backward then adds up the gradients of both.

    x, y: (..., D), weight: (D,) -> two of (..., D).
    """
    return _AddNorm.apply(x, y, weight, eps)


def add_norm_definition(
    x: Tensor, y: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x, y: (rows, D), weight: (D,) -> h, its norm, and 1 / rms(h), (rows,) float32."""
    h = x if y is None else x + y
    inverse = torch.rsqrt(h.float().pow(2).mean(-1, keepdim=True) + eps)  # (rows, 1)
    return h, weight * (h.float() * inverse).to(h.dtype), inverse.squeeze(-1)


def add_norm_backward_definition(
    h: Tensor, weight: Tensor, inverse: Tensor, dn: Tensor, dh: Tensor | None
) -> Tensor:
    """With n = h / rms(h) and g = w dn:  dx = dh + (g - n mean(n g)) / rms(h).

    h, dn, dh: (rows, D), weight: (D,), inverse: (rows,) -> (rows, D). It is x's gradient, and y's.
    """
    inverse = inverse.unsqueeze(-1)
    normed, g = h.float() * inverse, dn.float() * weight.float()
    dx = g.sub_(normed * (normed * g).mean(-1, keepdim=True)).mul_(inverse)
    return (dx if dh is None else dx.add_(dh)).to(h.dtype)


class _AddNorm(torch.autograd.Function):
    """Keeps h and one number a row."""

    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        form = fastest("add_norm", x, add_norm_definition)
        h, normed, inverse = form(_rows(x), None if y is None else _rows(y), weight, eps)
        if x.dim() != 2:
            h, normed = h.view_as(x), normed.view_as(x)
        ctx.save_for_backward(h, weight, inverse)
        ctx.set_materialize_grads(False)
        return x if y is None else h, normed

    @staticmethod
    @once_differentiable
    def backward(ctx, dh: Tensor | None, dn: Tensor | None) -> tuple[Tensor | None, ...]:
        h, weight, inverse = ctx.saved_tensors
        needs_dx, needs_dy, needs_dw, _ = ctx.needs_input_grad
        if dn is None:
            return dh, dh if needs_dy else None, None, None
        dx = dw = None
        if needs_dx or needs_dy:
            form = fastest("add_norm_backward", h, add_norm_backward_definition)
            dx = form(_rows(h), weight, inverse, _rows(dn), None if dh is None else _rows(dh))
            dx = dx if h.dim() == 2 else dx.view_as(h)
        if needs_dw:
            normed = _rows(h).float() * inverse.unsqueeze(-1)
            dw = (normed * _rows(dn).float()).sum(0).to(weight.dtype)
        return dx, dx if needs_dy else None, dw, None


def _rows(x: Tensor) -> Tensor:
    return (x if x.dim() == 2 else x.reshape(-1, x.shape[-1])).contiguous()


# ---- RoPE --------------------------------------------------------------------------------------------------


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate the pairs (x_i, x_{i + K/2}) of every head by the angle of its position (arXiv:2104.09864,
    3.2.2).

    q: (Bt, T, H, K), k: (Bt, T, G, K); cos, sin: (Bt or 1, T, K), both halves of K alike -> q and k, rotated.
    """
    return _Rope.apply(q, k, cos, sin)


def rope_definition(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, back: bool = False
) -> tuple[Tensor, Tensor]:
    """`rope`; with `back` by the opposite angles, which is its backward."""
    cos, sin = cos.unsqueeze(2), (-sin if back else sin).unsqueeze(2)  # (Bt or 1, T, 1, K)

    def rotated(x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-right, left), dim=-1) * sin

    return rotated(q), rotated(k)


class _Rope(torch.autograd.Function):
    """A rotation. Its gradient is rotated back, and reads neither q nor k."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return fastest("rope", q, rope_definition)(q, k, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx, dq: Tensor, dk: Tensor) -> tuple[Tensor, Tensor, None, None]:
        return *fastest("rope", dq, rope_definition)(dq, dk, *ctx.saved_tensors, back=True), None, None


# ---- SwiGLU ------------------------------------------------------------------------------------------------


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020, arXiv:2002.05202, equation 6). gate, up: (..., F) -> (..., F)."""
    return _SwiGLU.apply(gate, up)


def swiglu_definition(gate: Tensor, up: Tensor) -> Tensor:
    """silu(x) = x / (1 + exp(-x))."""
    return F.silu(gate).mul_(up)


def swiglu_backward_definition(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """With s = 1 / (1 + exp(-gate)):  dgate = dy up s (1 + gate (1 - s))   dup = dy gate s."""
    return torch.ops.aten.silu_backward(dy * up, gate), F.silu(gate).mul_(dy)


class _SwiGLU(torch.autograd.Function):
    """Keeps gate and up, but not silu(gate), which is cheap to compute again."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return fastest("swiglu", gate, swiglu_definition)(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor]:
        form = fastest("swiglu_backward", dy, swiglu_backward_definition)
        return form(dy.contiguous(), *ctx.saved_tensors)


# ---- attention over documents ------------------------------------------------------------------------------


def document_attention(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, kept: KeptAttention | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(K)) v, where a token sees the tokens of its document up to its own position, and
    at most the window of them (Vaswani et al. 2017, arXiv:1706.03762, equation 1).

    q: (Bt, T, H, K); k, v: (Bt, T, G, K): head h reads key/value head h // (H / G) -> (Bt, T, H, K), zeros at
    padding. `kept` lets a second run return what the first one computed.
    """
    return _DocumentAttention.apply(q, k, v, documents, kept)


def document_attention_definition(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents
) -> tuple[Tensor, Tensor]:
    """q: (N, H, K); k, v: (N, G, K), one document after the other -> y (N, H, K), and the log-sum-exp of each
    row of scores, (N, H) float32.
    """
    y, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
    for rows in documents.slices():
        scores = _scores(q[rows], k[rows], documents.window)  # (H, n, n)
        lse[rows] = scores.logsumexp(-1).T
        y[rows] = (scores.softmax(-1) @ _by_heads(v[rows], q.shape[1])).transpose(0, 1)
    return y, lse


def document_attention_backward_definition(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, documents: Documents
) -> tuple[Tensor, Tensor, Tensor]:
    """With p = exp(s - lse) and ds = p (dy v^T - dy . y):  dq = ds k   dk = ds^T q   dv = p^T dy, the first
    two divided by sqrt(K). A key/value head sums over the query heads that read it.
    """
    (_, H, K), G = q.shape, k.shape[1]
    dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
    for rows in documents.slices():
        p = (_scores(q[rows], k[rows], documents.window) - lse[rows].T.unsqueeze(2)).exp()  # (H, n, n)
        qs, ks, vs, ys, dys = (_by_heads(t[rows], H) for t in (q, k, v, y, dy))  # (H, n, K) each
        ds = p * (dys @ vs.mT - (dys * ys).sum(-1, keepdim=True)) / K**0.5
        dq[rows] = (ds @ ks).transpose(0, 1)
        dk[rows] = sum_heads((ds.mT @ qs).transpose(0, 1), G)
        dv[rows] = sum_heads((p.mT @ dys).transpose(0, 1), G)
    return dq, dk, dv


def _scores(q: Tensor, k: Tensor, window: int | None) -> Tensor:
    """Return the scores of one document, -inf where a query does not see a key: (H, n, n) float32."""
    n, H, K = q.shape
    seen = torch.ones(n, n, dtype=torch.bool, device=q.device).tril()
    if window is not None:
        seen = seen.triu(1 - window)
    scores = _by_heads(q, H) @ _by_heads(k, H).mT / K**0.5
    return scores.masked_fill(~seen, -torch.inf)


def _by_heads(x: Tensor, heads: int) -> Tensor:
    """(n, H or G, K) -> (H, n, K) float32."""
    return repeat_heads(x, heads).transpose(0, 1).float()


DEFINITION = Form("definition", document_attention_definition, document_attention_backward_definition)


class _DocumentAttention(torch.autograd.Function):
    """Keeps q, k, v, the output and the log-sum-exps, without padding."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, documents: Documents, kept) -> Tensor:
        rows = [documents.take(t) for t in (q, k, v)]

        def compute() -> tuple[Form, Tensor, Tensor]:
            form = fused_form(*rows[:2], DEFINITION) if documents.tokens else DEFINITION
            return form, *form.forward(*rows, documents)

        ctx.form, y, lse = compute() if kept is None else kept.get(compute)
        ctx.documents, ctx.shape = documents, q.shape[:2]
        ctx.save_for_backward(*rows, y, lse)
        return documents.put(y, *ctx.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.form.backward(ctx.documents.take(dy.contiguous()), *ctx.saved_tensors, ctx.documents)
        return *(ctx.documents.put(g, *ctx.shape) for g in gradients), None, None


# ---- attention over a cache --------------------------------------------------------------------------------


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(K)) v with grouped keys and values, through PyTorch's fused kernels.

    q: (Bt, H, T, K); k, v: (Bt, G, S, K); mask: (Bt or 1, 1, T, S), True where a query sees a key, or numbers
    to add to the scores (see backend/attention_mask.py) -> (Bt, H, T, K). With `mask=None` every query sees
    the keys up to its own position. That needs T = S, or T = 1 as the last of S.
    """
    # The memory-efficient kernel, the only fused one on a T4, knows no groups: heads are repeated in memory.
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # (Bt, H, S, K)
    v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)  # (Bt, H, S, K)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and q.shape[2] > 1)


def attention_reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """`attention`, written out (Vaswani et al. 2017, arXiv:1706.03762, equation 1), for tests and readers."""
    Bt, H, T, K = q.shape
    G, S = k.shape[1], k.shape[2]
    q = q.view(Bt, G, H // G, T, K)  # head h reads key/value head h // (H/G)
    scores = torch.einsum("bghtk,bgsk->bghts", q.float(), k.float()) / K**0.5
    if mask is None:
        mask = torch.ones(1, 1, T, S, dtype=torch.bool, device=q.device).tril(diagonal=S - T)
    scores = scores.masked_fill(~mask.unsqueeze(2), float("-inf"))  # (Bt, G, H/G, T, S)
    y = torch.einsum("bghts,bgsk->bghtk", scores.softmax(-1), v.float())
    return y.reshape(Bt, H, T, K).to(v.dtype)
