"""Do the C forms of elementwise.py give the numbers of their definitions? Each tries once, and its bits are
compared.

A trial must give the same bits by every right way of computing. Where a sum may have any order, its terms are
whole numbers. Where exp may be off by a unit, results are rounded to bfloat16, and none of them lies so
near to the middle between two numbers of bfloat16 that the unit could decide.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from minilora.backend import elementwise, native, native_trial
from minilora.backend.native_trial import trial_values

_ROWS, _WIDTH = 3, 1063  # 1024 + 32 + 7: a section, a few lanes, and a tail


@lru_cache
def is_trusted(operation: str, dtype: torch.dtype) -> bool:
    """Whether the C form of an operation exists for a dtype, and gives known bits."""
    known = KNOWN_BITS[operation].get(dtype)
    if known is None or operation not in native._functions():
        return False
    form, _ = elementwise.FORMS[operation]
    if native_trial.digest(TRIALS[operation](form, dtype)) != known:
        native._warn_once("it gives other bits than PyTorch; set CC to another C compiler")
        return False
    return True


def whole_numbers(most: int, *shape: int) -> Tensor:
    """Return whole numbers from -most to most, float32."""
    n = torch.Size(shape).numel()
    return ((torch.arange(n, device="cpu") * 37) % (2 * most + 1) - most).float().view(shape)


def add_norm_trial(add_norm: Callable, dtype: torch.dtype) -> list[Tensor]:
    """Add and normalize rows of whole numbers, and rows without a second summand."""
    x, y = whole_numbers(7, _ROWS, _WIDTH).to(dtype), whole_numbers(5, _ROWS, _WIDTH).to(dtype)
    weight = trial_values(_WIDTH).to(dtype)
    return [*add_norm(x, y, weight, 0.25), *add_norm(x, None, weight, 1e-5)]


def add_norm_backward_trial(backward: Callable, dtype: torch.dtype) -> list[Tensor]:
    """Take the gradient of rows of whole numbers; 1 / rms is a power of two, so that products stay exact."""
    h, dn, dh = (whole_numbers(most, _ROWS, _WIDTH).to(dtype) for most in (7, 5, 3))
    weight, inverse = whole_numbers(3, _WIDTH).to(dtype), torch.tensor([0.5, 0.25, 1.0], device="cpu")
    return [backward(h, weight, inverse, dn, dh), backward(h, weight, inverse, dn, None)]


def rope_trial(rope: Callable, dtype: torch.dtype) -> list[Tensor]:
    """Rotate heads in two layouts, forward with angles for each example, and back with one for both."""
    Bt, T, H, G, K = 2, 5, 3, 1, 70
    q = trial_values(Bt * H * T * K).view(Bt, H, T, K).transpose(1, 2).to(dtype)
    k = trial_values(Bt * T * G * K).view(Bt, T, G, K).to(dtype)
    cos = trial_values(Bt * T * K // 2).view(Bt, T, K // 2).to(dtype)
    sin = cos.roll(1, dims=-1)
    cos, sin = (t.repeat(1, 1, 2) for t in (cos, sin))  # Both halves are alike: a form may read one.
    return [*rope(q, k, cos, sin), *rope(q, k, cos[:1], sin[:1], back=True)]


def gates(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return gate, up and dy of the trials: from -11 to 11, and where exp is 0 or infinite."""
    gate = trial_values(101).roll(3) * 11
    gate[:5] = torch.tensor([0.0, -200.0, 200.0, -60.0, 60.0])
    return gate.to(dtype), trial_values(101).to(dtype), trial_values(101).roll(7).to(dtype)


def swiglu_trial(swiglu: Callable, dtype: torch.dtype) -> list[Tensor]:
    """Gate 101 values."""
    gate, up, _ = gates(dtype)
    return [swiglu(gate, up).bfloat16()]


def swiglu_backward_trial(backward: Callable, dtype: torch.dtype) -> list[Tensor]:
    """Take the gradient at 101 values."""
    gate, up, dy = gates(dtype)
    return [gradient.bfloat16() for gradient in backward(dy, gate, up)]


def cross_entropy_trial(cross_entropy: Callable, _: torch.dtype) -> list[Tensor]:
    """Take the losses of rows with one class that is impossible, and their gradients."""
    logits = trial_values(_ROWS * _WIDTH).view(_ROWS, _WIDTH) * 8
    logits[:, 5] = -torch.inf
    losses = cross_entropy(logits, torch.tensor([0, 700, _WIDTH - 1], device="cpu"))
    return [losses.bfloat16(), logits.bfloat16()]


def dropout_trial(dropout: Callable, dtype: torch.dtype) -> list[Tensor]:
    """Drop 3 elements of 10, from a seed of more than 32 bits."""
    x = trial_values(_ROWS * 301).view(_ROWS, 301).to(dtype)
    return [dropout(x, 0x123456789ABCDEF0, 3, 19661)]


def add_dropped_trial(add_dropped: Callable, dtype: torch.dtype) -> list[Tensor]:
    """Add what dropout leaves to what is there."""
    x = trial_values(_ROWS * 301).view(_ROWS, 301).to(dtype)
    y = x.roll(1, dims=-1)
    add_dropped(x, y, 0x123456789ABCDEF0, 3, 19661)
    return [x]


TRIALS = {
    "add_norm": add_norm_trial,
    "add_norm_backward": add_norm_backward_trial,
    "rope": rope_trial,
    "swiglu": swiglu_trial,
    "swiglu_backward": swiglu_backward_trial,
    "cross_entropy": cross_entropy_trial,
    "dropout": dropout_trial,
    "add_dropped": add_dropped_trial,
}


def _by_dtype(*digests: str) -> dict[torch.dtype, str]:
    return dict(zip((torch.float32, torch.bfloat16, torch.float16), digests, strict=False))


# Digests of what the definitions compute, in float32, bfloat16 and float16; tests/core/test_elementwise.py
# compares them.
KNOWN_BITS = {
    "add_norm": _by_dtype("51cff0a315b4ea30", "61dc565d1411ec9a", "4313583b804f905f"),
    "add_norm_backward": _by_dtype("d5cd9d5354e4a479", "11979d799e9a26bf", "7ca0a4a636f54e01"),
    "rope": _by_dtype("0e3613b57c2cded5", "13f4e85e631e8dba", "cf5ddbb3cc52cf93"),
    "swiglu": _by_dtype("250f25bc74de47eb", "66fc415310713467", "2f46a317b050db97"),
    "swiglu_backward": _by_dtype("ef169db419b6bec4", "8dcd3ee2a41dd8ef", "9f20f10b25370d61"),
    "cross_entropy": _by_dtype("4e530a680ed7d228"),
    "dropout": _by_dtype("3e27a9cb9d39ccc8", "a74759cc7c694944", "07f3fbcc1f79039f"),
    "add_dropped": _by_dtype("092575aa3b826ead", "240f97453e933a65", "2cb495183cec9b69"),
}
