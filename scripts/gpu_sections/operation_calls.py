"""The operations between the matrix products, as calls to be timed, and the bytes that each must move."""

from collections.abc import Callable

import torch
from torch import Tensor

from gpu_sections.section import Check
from minilora import loss, ops
from minilora.backend import dropout, segmented
from minilora.backend.choice import fastest
from minilora.backend.segments import Segments

Call = Callable[[], object]
Moving = dict[str, tuple[Call, int]]  # a call, and the bytes that it reads and writes
DRAW = dict(seed=1, stream=0, threshold=dropout.threshold_of(0.05))
RANK = 16


def operation_calls(check: Check, sizes: dict, rows: int) -> Moving:
    """Return the operations of a model with these sizes, on so many tokens.

    Each asks `fastest` in every call, so that MINILORA_BACKEND=torch times the definition.
    """

    def draw(*shape: int, dtype: torch.dtype = check.card.dtype) -> Tensor:
        return torch.randn(shape, device=check.card.device).to(dtype)

    hidden, feed_forward = draw(rows, sizes["hidden_size"]), draw(rows, sizes["intermediate_size"])
    logits = draw(min(rows, 512), sizes["vocab_size"], dtype=torch.float32)
    return (
        norm_calls(hidden, draw(sizes["hidden_size"]))
        | rope_call(draw, sizes, rows)
        | swiglu_calls(feed_forward, torch.randn_like(feed_forward))
        | cross_entropy_call(logits)
        | dropout_calls(hidden, torch.randn_like(hidden))
        | product_calls(hidden, draw(RANK, hidden.shape[1]), draw(rows, RANK))
        | segmented_calls(hidden[:16].clone(), 16, "16 rows, 16 adapters")
        | segmented_calls(hidden, 4, f"{rows} rows, 4 adapters")
    )


def norm_calls(x: Tensor, weight: Tensor) -> Moving:
    y, inverse = torch.randn_like(x), ops.add_norm_definition(x, None, weight, 1e-5)[2]
    forward = fastest_call("add_norm", x, ops.add_norm_definition, y, weight, eps=1e-5)
    backward = fastest_call("add_norm_backward", x, ops.add_norm_backward_definition, weight, inverse, y, y)
    return {"sum and RMSNorm": (forward, 4 * x.nbytes), "its backward": (backward, 4 * x.nbytes)}


def rope_call(draw: Callable[..., Tensor], sizes: dict, rows: int) -> Moving:
    heads, groups = sizes["num_attention_heads"], sizes["num_key_value_heads"]
    size = sizes["hidden_size"] // heads
    q, k, angle = draw(1, rows, heads, size), draw(1, rows, groups, size), draw(1, rows, size)
    call = fastest_call("rope", q, ops.rope_definition, k, angle, angle)
    return {"RoPE": (call, 2 * (q.nbytes + k.nbytes + angle.nbytes))}


def swiglu_calls(gate: Tensor, up: Tensor) -> Moving:
    forward = fastest_call("swiglu", gate, ops.swiglu_definition, up)
    backward = fastest_call("swiglu_backward", gate, ops.swiglu_backward_definition, gate, up)
    return {"SwiGLU": (forward, 3 * gate.nbytes), "SwiGLU, backward": (backward, 5 * gate.nbytes)}


def cross_entropy_call(logits: Tensor) -> Moving:
    targets = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    call = fastest_call("cross_entropy", logits, loss.cross_entropy_definition, targets)
    return {"cross-entropy": (call, 3 * logits.nbytes)}


def dropout_calls(x: Tensor, y: Tensor) -> Moving:
    dropped = fastest_call("dropout", x, dropout.dropout_definition, **DRAW)
    added = fastest_call("add_dropped", x, dropout.add_dropped_definition, y, **DRAW)
    return {"dropout": (dropped, 2 * x.nbytes), "dropout, added": (added, 3 * x.nbytes)}


def product_calls(x: Tensor, A: Tensor, g: Tensor) -> Moving:
    """LoRA's thin products. Without tensor cores, dropout and cuBLAS in their place."""
    narrow = fastest_call("dropped_product", x, dropout.dropped_product_definition, A, **DRAW)
    added = fastest_call("add_dropped_product", x, dropout.add_dropped_product_definition, g, A, **DRAW)
    dA = fastest_call("product_with_dropped", g, dropout.product_with_dropped_definition, x, **DRAW)
    once = x.nbytes + A.nbytes + g.nbytes
    return {
        "dropout(x) A^T": (narrow, once),
        "dx += dropout(g A)": (added, x.nbytes + once),
        "g^T dropout(x)": (dA, once),
    }


def segmented_calls(x: Tensor, adapters: int, title: str) -> Moving:
    """Each adapter has as many rows, in any order, and is read once. The definition takes them in turn."""
    order = torch.randperm(len(x)).to(x.device)
    segments = Segments(order, tuple(range(0, len(x) + 1, len(x) // adapters)))
    n = torch.randn(len(x), RANK, device=x.device).to(x.dtype)
    As, y = [torch.randn(RANK, x.shape[1], device=x.device) for _ in range(adapters)], torch.zeros_like(x)
    Bs, once = [A.T.contiguous() for A in As], x.nbytes + n.nbytes + adapters * As[0].nbytes
    return {
        f"shrink, {title}": (lambda: segmented.shrink(x, As, [1.0] * adapters, segments), once),
        f"expand, {title}": (lambda: segmented.expand(y, n, Bs, segments), once + x.nbytes),
    }


def fastest_call(operation: str, x: Tensor, definition: Callable, *arguments: Tensor, **options) -> Call:
    """Return a call of an operation on x and the arguments."""
    return lambda: fastest(operation, x, definition)(x, *arguments, **options)
