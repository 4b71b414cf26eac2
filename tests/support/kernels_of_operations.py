"""The kernels of the decoder's operations against their definitions.

Collected by test_kernels.py in processes of their own: Triton's interpreter runs them on the CPU if
TRITON_INTERPRET is set, and else a GPU does.
"""

import os

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minilora import loss, ops
from minilora.backend import dropout, kernel_trial, segmented
from minilora.kernels import dropped_products, operations
from support import kernel_tests
from support.kernel_tests import ROUNDING, bfloat16_as_on_a_gpu, bits

INTERPRETED = "TRITON_INTERPRET" in os.environ
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
TENSOR_CORES = INTERPRETED or torch.cuda.get_device_capability() >= (8, 0)
__all__ = ["bfloat16_as_on_a_gpu"]
pytestmark = [pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")]  # numpy's: exp(104)
pytestmark += [pytest.mark.usefixtures("bfloat16_as_on_a_gpu")] if INTERPRETED else []
needs_tensor_cores = pytest.mark.skipif(not TENSOR_CORES, reason="needs compute capability 8.0")

DRAW = dict(seed=2**40 + 12345, stream=7, threshold=20000)  # three in ten are dropped
SIXTEEN_BITS = (torch.bfloat16, torch.float16)

# Two float32 sums of the same numbers in other orders. PyTorch, numpy and a GPU all add strands of at most 32
# terms and then the strands in pairs, at most 2^13 of them: 45 roundings of 2^-24 each, less than 2^-18.
SUM = 2**-18
# exp, log, roots and quotients: an argument of at most 104 is off by a rounding, the rest by a few units.
FUNCTIONS = 2**-17
# Tensor cores cut off what they add, where other units round it to the nearest.
ADDED = 2**-23


def randn(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return kernel_tests.randn(*shape, dtype=dtype, seed=seed).to(DEVICE)


def smallest(dtype: torch.dtype) -> float:
    """The spacing of subnormal numbers: no result is rounded more finely."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


def assert_close(result: torch.Tensor, expected: torch.Tensor, bound: torch.Tensor) -> None:
    """Assert that |result - expected| <= bound everywhere."""
    assert result.dtype == expected.dtype and result.shape == expected.shape
    excess = (result.double() - expected.double()).abs() - (bound.double() + smallest(expected.dtype))
    assert (excess <= 0).all(), excess.max()


def assert_rounded_alike(result: torch.Tensor, expected: torch.Tensor) -> None:
    """Assert that 16-bit numbers are mostly the same: that no rounding is left out, which would change a third.

    What float32 gets wrong, 2^-17 at most, moves a number over a rounding's border once in 2^5 cases.
    """
    if expected.element_size() == 2 and expected.numel() >= 100:
        assert (result == expected).float().mean() > 1 - 2**-4


def same_bits(results, expected) -> bool:
    return all(torch.equal(bits(one), bits(two)) for one, two in zip(results, expected, strict=True))


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("operation", operations.__all__)
def test_a_kernel_passes_its_own_trial(operation, dtype):
    """A trial that gives a kernel what no caller does takes it out of every run."""
    if operation == "cross_entropy" and dtype != torch.float32:
        pytest.skip("its logits are float32")
    if "product" in operation and not (dtype in SIXTEEN_BITS and TENSOR_CORES):
        pytest.skip("its products are taken in 16 bits, in tensor cores")
    name = f"{operation}_definition"
    definition = next(
        getattr(module, name) for module in (ops, dropout, loss, segmented) if hasattr(module, name)
    )
    kernel, trial = getattr(operations, operation), kernel_trial.TRIALS[operation]
    assert kernel_trial._problem(trial, kernel, definition, DEVICE, dtype) == ""


SHAPES = [(1, 1), (3, 1), (6, 64), (5, 100), (2, 1000), (3, 4097)]  # powers of two, and one past one
SHAPES = SHAPES if INTERPRETED else SHAPES[1::2]  # a GPU compiles each anew


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("summed", [False, True])
def test_add_norm_is_the_definition(shape, dtype, summed):
    x, weight = 3 * randn(*shape, dtype=dtype, seed=1), randn(shape[-1], dtype=dtype, seed=2)
    y = randn(*shape, dtype=dtype, seed=3) if summed else None
    h, n, inverse = operations.add_norm(x, y, weight, 1e-5)
    expected_h, expected_n, expected_inverse = ops.add_norm_definition(x, y, weight, 1e-5)
    assert same_bits([h], [expected_h]) and (summed or h is x)
    assert_close(inverse, expected_inverse, SUM * expected_inverse)
    # Both round twice in the same places; what differs before a rounding may go to the next number, 2 u off.
    assert_close(n, expected_n, (5 * ROUNDING[dtype] + SUM) * expected_n.abs().double())
    assert_rounded_alike(n, expected_n)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("summed", [False, True])
def test_the_gradient_of_add_norm_is_the_definition(shape, dtype, summed):
    h, dn = 3 * randn(*shape, dtype=dtype, seed=1), randn(*shape, dtype=dtype, seed=3)
    weight = randn(shape[-1], dtype=dtype, seed=2)
    dh = randn(*shape, dtype=dtype, seed=4) if summed else None
    inverse = ops.add_norm_definition(h, None, weight, 1e-5)[2]
    given = h, weight, inverse, dn, dh
    dx, expected = operations.add_norm_backward(*given), ops.add_norm_backward_definition(*given)
    # Both compute in float32 and round once. The gradient is a difference, zero for D = 1: the error of
    # float32 is relative to what is subtracted.
    g, normed = (weight.float() * dn.float()).abs(), (h.float() * inverse[:, None]).abs()
    terms = inverse[:, None] * (g + normed * (normed * g).mean(-1, keepdim=True))
    terms = terms if dh is None else terms + dh.float().abs()
    assert_close(dx, expected, 2 * ROUNDING[dtype] * expected.abs() + SUM * terms)


LAYOUTS = {
    "contiguous": lambda x: x,
    "heads before tokens": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "a part of a wide product": lambda x: torch.cat([x, x], dim=2)[:, :, : x.shape[2]],
    "K with gaps": lambda x: torch.stack([x, x], dim=-1)[..., 0],
}


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 3, 4, 2, 8), (1, 2, 3, 3, 20), (2, 1, 33, 1, 64)])
def test_rope_is_the_definition_to_the_bit(shape, layout, dtype):
    B, T, H, G, K = shape
    q, k = (LAYOUTS[layout](randn(B, T, heads, K, dtype=dtype, seed=heads)) for heads in (H, G))
    for batches, back in ((1, False), (B, True)):
        angles = 3 * torch.randn(batches, T, K // 2, generator=torch.Generator().manual_seed(1)).repeat(
            1, 1, 2
        )
        cos, sin = angles.cos().to(DEVICE, dtype), angles.sin().to(DEVICE, dtype)
        turned = operations.rope(q, k, cos, sin, back=back)
        assert all(x.is_contiguous() for x in turned)
        assert same_bits(turned, ops.rope_definition(q, k, cos, sin, back=back))


def gates(n: int, dtype: torch.dtype) -> torch.Tensor:
    """Gates of every size: exp(-gate) underflows, overflows, and is in between."""
    gate = 4 * randn(n, dtype=dtype, seed=1)
    gate[:8] = torch.tensor([0.0, -0.0, 20, -20, 90, -90, -1.2785, -104])[:n]
    return gate


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("n", [1, 17, 2048, 4133])
def test_swiglu_is_the_definition(n, dtype):
    gate, up = gates(n, dtype), randn(n, dtype=dtype, seed=2)
    expected = ops.swiglu_definition(gate, up)
    # Two roundings in the same places, as in add_norm. Where silu is subnormal, up enlarges the spacing.
    bound = (5 * ROUNDING[dtype] + FUNCTIONS) * expected.abs() + smallest(dtype) * up.abs()
    y = operations.swiglu(gate, up)
    assert_close(y, expected, bound)
    assert_rounded_alike(y, expected)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("n", [1, 17, 2048, 4133])
def test_the_gradients_of_swiglu_are_the_definition(n, dtype):
    gate, up, dy = gates(n, dtype), randn(n, dtype=dtype, seed=2), randn(n, dtype=dtype, seed=3)
    dgate, dup = operations.swiglu_backward(dy, gate, up)
    expected_dgate, expected_dup = ops.swiglu_backward_definition(dy, gate, up)
    s, g = gate.double().sigmoid(), gate.double().abs()
    terms = (dy * up).double().abs() * s * (1 + g * (1 - s))  # a difference for gates below 0
    assert_close(dgate, expected_dgate, 2 * ROUNDING[dtype] * expected_dgate.abs() + FUNCTIONS * terms)
    bound = (5 * ROUNDING[dtype] + FUNCTIONS) * expected_dup.abs() + smallest(dtype) * dy.abs()
    assert_close(dup, expected_dup, bound)
    assert_rounded_alike(dup, expected_dup)
    assert_rounded_alike(dgate, expected_dgate)


def test_swiglu_gives_what_is_not_finite_as_the_definition_does():
    gate = torch.tensor([float("inf"), float("-inf"), float("nan"), 1.0, 2.0], device=DEVICE)
    up = torch.tensor([1.0, 1.0, 1.0, float("inf"), float("nan")], device=DEVICE)
    dy = torch.ones(5, device=DEVICE)
    pairs = [(operations.swiglu(gate, up), ops.swiglu_definition(gate, up))]
    pairs += zip(
        operations.swiglu_backward(dy, gate, up), ops.swiglu_backward_definition(dy, gate, up), strict=True
    )
    for result, expected in pairs:
        assert torch.equal(result.isnan(), expected.isnan()) and torch.equal(result.isinf(), expected.isinf())


@pytest.mark.parametrize(("n", "V"), [(1, 1), (3, 2), (2, 4096), (3, 4097), (2, 9000)])
def test_cross_entropy_is_the_definition(n, V):
    logits = 8 * randn(n, V, dtype=torch.float32, seed=V)
    targets = torch.arange(n, device=DEVICE) * (V - 1) // max(1, n - 1)  # the first and the last among them
    behind = torch.full((n * V + 1,), 99.0, device=DEVICE)
    mine = behind[:-1].view(n, V).copy_(logits)
    losses = operations.cross_entropy(mine, targets)
    spread = logits.amax(1) - logits.amin(1)
    expected_gradient = logits.clone()
    expected = loss.cross_entropy_definition(expected_gradient, targets)
    # exp's relative error grows with its argument, which is rounded: |z - max| 2^-24.
    relative = SUM + FUNCTIONS + spread.amax() * 2**-24
    assert_close(losses, expected, relative + 2**-22 * spread)
    softmax = logits.double().softmax(1)
    assert_close(mine, expected_gradient, relative * softmax + 2**-23)
    assert behind[-1] == 99


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_cross_entropy_shows_logits_that_are_not_finite(bad):
    logits = randn(2, 5000, dtype=torch.float32, seed=1)
    logits[1, 4999] = bad
    losses = operations.cross_entropy(logits, torch.tensor([0, 1], device=DEVICE))
    assert losses[0].isfinite() and losses[1].isnan()
    assert logits[0].isfinite().all() and logits[1].isnan().all()


def test_a_token_that_cannot_be_has_probability_zero():
    logits = torch.tensor([[1.0, float("-inf"), 2.0]], device=DEVICE)
    losses = operations.cross_entropy(logits, torch.tensor([2], device=DEVICE))
    assert losses.isfinite().all() and logits[0, 1] == 0


MATRICES = [(1, 1), (3, 5), (2, 8), (4, 13), (2, 2056), (3, 4099)]  # within a group of 8, and past a block


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("shape", MATRICES)
def test_dropout_is_the_definition_to_the_bit(shape, dtype):
    x, y = randn(*shape, dtype=dtype, seed=1), randn(*shape, dtype=dtype, seed=2)
    expected = dropout.dropout_definition(x, **DRAW)
    out = torch.full_like(x, 99)
    assert operations.dropout(x, **DRAW, out=out) is out
    assert same_bits([out, operations.dropout(x, **DRAW)], [expected] * 2)
    summed = x.clone()
    dropout.add_dropped_definition(summed, y, **DRAW)
    operations.add_dropped(x, y, **DRAW)
    assert same_bits([x], [summed])


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 70),
    seed=st.integers(0, 2**63 - 1),
    stream=st.integers(0, 2**31 - 1),
    threshold=st.integers(0, 65535),
)
@example(rows=3, columns=40, seed=0, stream=0, threshold=0)
@example(rows=3, columns=40, seed=1, stream=1, threshold=1)
@example(rows=3, columns=40, seed=2**31, stream=1, threshold=40000)
@example(rows=3, columns=40, seed=2**63 - 1, stream=2**31 - 1, threshold=65535)
def test_every_draw_drops_what_the_definition_drops(rows, columns, seed, stream, threshold):
    x = torch.ones(rows, columns, device=DEVICE)
    expected = dropout.dropout_definition(x, seed, stream, threshold)
    assert torch.equal(operations.dropout(x, seed, stream, threshold), expected)


def test_a_nan_that_is_dropped_is_still_seen():
    x = torch.full((1, 16), float("nan"), device=DEVICE)
    assert operations.dropout(x, seed=1, stream=0, threshold=65535).isnan().all()


PRODUCTS = [  # rows, columns, r: within a tile, past one, past the largest part of r
    (1, 1, 1), (3, 100, 5), (70, 136, 16), (33, 264, 20), (40, 72, 130),
]  # fmt: skip


def kept(shape: tuple[int, int]) -> torch.Tensor:
    return dropout.kept(*shape, **DRAW, device=DEVICE)


@needs_tensor_cores
@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
@pytest.mark.parametrize("shape", PRODUCTS)
def test_products_with_dropout_inside_are_those_of_the_dropped_matrix(shape, dtype):
    rows, columns, r = shape
    x, A, g = (
        randn(*size, dtype=dtype, seed=i) for i, size in enumerate([(rows, columns), (r, columns), (rows, r)])
    )
    seen, u = x.double() * kept(x.shape), ROUNDING[dtype]
    narrow = operations.dropped_product(x, A, **DRAW)
    expected, terms = seen @ A.double().T, seen.abs() @ A.double().T.abs()
    assert narrow.dtype == dtype
    assert_close(narrow.double(), expected, u * expected.abs() + (1 + u) * columns * ADDED * terms)
    dA = operations.product_with_dropped(g, x, **DRAW)
    expected, terms = g.double().T @ seen, g.double().T.abs() @ seen.abs()
    assert dA.dtype == torch.float32 and dA.shape == (r, columns)
    assert_close(dA.double(), expected, rows * ADDED * terms)


@needs_tensor_cores
@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
@pytest.mark.parametrize("shape", PRODUCTS)
def test_the_dropped_product_that_is_added_is_rounded_once(shape, dtype):
    rows, columns, r = shape
    dx, A, g = (
        randn(*size, dtype=dtype, seed=i) for i, size in enumerate([(rows, columns), (r, columns), (rows, r)])
    )
    expected = dx.double() + kept(dx.shape) * (g.double() @ A.double())
    terms = dx.double().abs() + g.double().abs() @ A.double().abs()
    operations.add_dropped_product(dx, g, A, **DRAW)
    u = ROUNDING[dtype]
    assert_close(dx.double(), expected, u * expected.abs() + (1 + u) * (r + 1) * ADDED * terms)


@needs_tensor_cores
def test_a_sum_over_many_rows_is_that_of_its_parts(monkeypatch):
    monkeypatch.setattr(dropped_products, "PART", 64)
    g, x = randn(150, 3, dtype=torch.float16, seed=1), randn(150, 20, dtype=torch.float16, seed=2)
    seen = x.double() * kept(x.shape)
    terms = g.double().T.abs() @ seen.abs()
    result = operations.product_with_dropped(g, x, **DRAW)
    assert_close(result.double(), g.double().T @ seen, 150 * ADDED * terms)


@pytest.mark.skipif(INTERPRETED, reason="takes the interpreter minutes")
@needs_tensor_cores
@pytest.mark.parametrize("r", [16, 64, 256])
def test_products_of_a_large_layer_are_the_same_in_every_run(r):
    x, g = randn(4100, 4096, dtype=torch.bfloat16, seed=1), randn(4100, r, dtype=torch.bfloat16, seed=2)
    A = randn(r, 4096, dtype=torch.bfloat16, seed=3)
    seen = x.double() * kept(x.shape)
    narrow, dA = operations.dropped_product(x, A, **DRAW), operations.product_with_dropped(g, x, **DRAW)
    expected, u = seen @ A.double().T, ROUNDING[torch.bfloat16]
    terms = seen.abs() @ A.double().T.abs()
    assert_close(narrow.double(), expected, u * expected.abs() + (1 + u) * 4096 * ADDED * terms)
    assert_close(dA.double(), g.double().T @ seen, 4100 * ADDED * (g.double().T.abs() @ seen.abs()))
    for _ in range(3):
        again = operations.dropped_product(x, A, **DRAW), operations.product_with_dropped(g, x, **DRAW)
        assert torch.equal(narrow, again[0]) and torch.equal(dA, again[1])
