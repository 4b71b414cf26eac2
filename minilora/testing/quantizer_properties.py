"""What a blockwise quantizer owes: one function a property, given a quantizer and the recipe of a weight.

With absmax a block's largest magnitude and code the values of the symbols,

    value = dequantize(quantize(weight))        |value - weight| <= min |code * absmax - weight| + rounding

is the first of them, and says most. The others exist because a bug is found faster by its name.
"""

import torch
from hypothesis import strategies as st
from torch import Tensor

from minilora.testing.battery import Battery, expect_close, expect_same
from minilora.testing.quantizer_oracles import ROUNDING, largest_half_gap, nearest_codes, smallest_errors
from minilora.testing.quantizer_subject import Case, Quantizer
from minilora.testing.recipes import LAYOUTS, NONFINITE

QUANTIZER = Battery()
EXACT = ("zero block", "outliers")  # flaws under which factors of two stay exact


# ---- why a property does not concern a quantizer; None: it does -------------------------------------------


def float32_only(q: Quantizer) -> str | None:
    return None if torch.float32 in q.dtypes and q.out_dtype in (None, torch.float32) else "16 bits round it"


def every_shape(q: Quantizer) -> str | None:
    return None if q.shape is None else "it takes other shapes"


def needs_zero(q: Quantizer) -> str | None:
    return None if (q.code == 0).any() else "the code has no 0"


def needs_symmetry(q: Quantizer) -> str | None:
    return None if q.is_symmetric else "the code is not symmetric"


def needs_ones(q: Quantizer) -> str | None:
    return None if q.holds_ones else "the code does not hold both 1 and -1"


def dtypes_of_16_bits(q: Quantizer) -> tuple[torch.dtype, ...]:
    """Those that the quantizer takes; none: the property of 16 bits does not concern it."""
    return tuple(dtype for dtype in q.dtypes if dtype.itemsize == 2)


def exact_scales_only(q: Quantizer) -> str | None:
    return "scales are rounded" if q.scale_error else float32_only(q)


@QUANTIZER.add("nearest code", Quantizer.cases)
def _(q: Quantizer, case: Case) -> None:
    weight = case.tensor()
    values, expected = q.values(weight), weight.double().reshape(-1)
    bound = smallest_errors(weight, q.code, q.blocksize) + q.rounding(weight, values)
    expect_close(values, expected, bound, "the weight")


@QUANTIZER.add("error bound", Quantizer.cases)
def _(q: Quantizer, case: Case) -> None:
    weight = case.tensor()
    values = q.values(weight)
    bound = largest_half_gap(q.code) * q.absmax(weight) + q.rounding(weight, values)
    expect_close(values, weight.double().reshape(-1), bound, "the weight")


@QUANTIZER.add("scale", Quantizer.cases, needs_ones)
def _(q: Quantizer, case: Case) -> None:
    """The largest value of a block comes back."""
    weight = case.tensor()
    values, expected = q.values(weight), weight.double().reshape(-1)
    largest = expected.abs() == q.absmax(weight)
    bound = q.rounding(weight, values)
    expect_close(values[largest], expected[largest], bound[largest], "the largest of its block")


@QUANTIZER.add(
    "idempotence",
    lambda q: q.cases(flaws=("zero block", "ties", "outliers"), dtypes=(torch.float32,)),
    lambda q: exact_scales_only(q) or needs_ones(q),
)
def _(q: Quantizer, case: Case) -> None:
    weight = case.tensor()
    first = q.dequantize(q.quantize(weight))
    bound = ROUNDING * q.absmax(weight) + q.smallest
    expect_close(q.values(first), first.reshape(-1), bound, "before quantizing it again it")


@QUANTIZER.add("power of two", lambda q: q.cases(flaws=EXACT, dtypes=(torch.float32,)), float32_only)
def _(q: Quantizer, case: Case) -> None:
    """A factor of a power of two goes into the scale and changes no symbol."""
    weight = case.tensor()
    for factor in (2.0**-7, 2.0**5):
        same_range = (q.absmax(weight) * factor > 2 * q.smallest) & (q.absmax(weight) > 2 * q.smallest)
        found, expected = q.values(weight * factor), q.values(weight) * factor
        expect_same(found[same_range], expected[same_range], f"{factor} times the result without the factor")


@QUANTIZER.add("sign symmetry", Quantizer.cases, needs_symmetry)
def _(q: Quantizer, case: Case) -> None:
    """Minus the weight gives minus the values, but for ties."""
    weight = case.tensor()
    _, margin = nearest_codes(weight, q.code, q.blocksize)
    unique = margin > 4 * ROUNDING
    values, negated = q.values(weight)[unique], q.values(-weight)[unique]
    expect_close(negated, -values, q.rounding(weight, q.values(weight))[unique], "minus the result")


@QUANTIZER.add(
    "ties",
    lambda q: q.cases(flaws=("ties",), dtypes=(torch.float32,)),
    lambda q: "either code may be right, by choice" if q.ties == "any" else exact_scales_only(q),
)
def _(q: Quantizer, case: Case) -> None:
    """A value in the middle of two codes, as float32 computes the middle, takes the smaller one."""
    weight, code = case.tensor(), q.code.float().sort().values
    absmax = q.absmax(weight)
    scaled = (weight.double().reshape(-1) / absmax.masked_fill(absmax == 0, 1)).float()
    middles = (code[:-1] + code[1:]) / 2
    exact = absmax.frexp().mantissa == 0.5  # of a power of two: no quotient is rounded
    at = exact & torch.isin(scaled, middles)
    smaller = code[torch.bucketize(scaled[at], middles)].double() * absmax[at]
    expect_close(q.values(weight)[at], smaller, ROUNDING * absmax[at], "the smaller of two codes")


@QUANTIZER.add("zero block", lambda q: q.cases(flaws=("zero block",)), needs_zero)
def _(q: Quantizer, case: Case) -> None:
    weight = case.tensor()
    zero = q.absmax(weight) == 0
    values = q.values(weight)[zero]
    expect_same(values, torch.zeros_like(values), "a value of a block of zeros")


@QUANTIZER.add("negative zeros", lambda q: q.cases(flaws=("negative zeros",)))
def _(q: Quantizer, case: Case) -> None:
    weight = case.tensor()
    expect_same(q.values(weight), q.values(weight + 0.0), "the result with 0 in place of -0")


@QUANTIZER.add("subnormals", lambda q: q.cases(flaws=("subnormals",)))
def _(q: Quantizer, case: Case) -> None:
    """Blocks of next to nothing stay finite, and as small."""
    weight = case.tensor()
    tiny = q.absmax(weight) < q.smallest
    values = q.values(weight)
    off = q.rounding(weight, values) + q.smallest
    expect_close(values[tiny], torch.zeros_like(values[tiny]), off[tiny], "next to nothing: 0")


@QUANTIZER.add(
    "outliers stay in their block",
    lambda q: q.cases(blocks=2, dtypes=q.dtypes[:1]),
    lambda q: "scales share a scale" if q.scale_error else None,
)
def _(q: Quantizer, case: Case) -> None:
    weight = case.tensor().clone()
    before = q.values(weight)
    first = weight.shape[-1] if q.blocksize is None else q.blocksize
    weight.view(-1)[0] = 2.0**10 * (weight.abs().max() + 1)
    expect_same(q.values(weight)[first:], before[first:], "before an outlier came into the first block it")


@QUANTIZER.add("shape", lambda q: q.cases(flaws=()))
def _(q: Quantizer, case: Case) -> None:
    weight = case.tensor()
    shape = tuple(q.dequantize(q.quantize(weight)).shape)
    assert shape == tuple(weight.shape), f"the result has shape {shape}, the weight {tuple(weight.shape)}"


@QUANTIZER.add("one value", lambda q: q.cases(shape=st.just((1,))), every_shape)
def _(q: Quantizer, case: Case) -> None:
    _check_error(q, case.tensor())


@QUANTIZER.add(
    "short last block",
    lambda q: q.cases(shape=st.integers(1, q.blocksize - 1).map(lambda n: (q.blocksize + n,))),
    lambda q: "each row is a block" if q.blocksize is None else every_shape(q),
)
def _(q: Quantizer, case: Case) -> None:
    _check_error(q, case.tensor(), start=q.blocksize)


@QUANTIZER.add(
    "16 bits",
    lambda q: q.cases(dtypes=dtypes_of_16_bits(q)),
    lambda q: None if dtypes_of_16_bits(q) else "not taken",
)
def _(q: Quantizer, case: Case) -> None:
    """A 16-bit weight gives what the same numbers in float32 give, rounded once."""
    weight = case.tensor()
    values = q.values(weight)
    wide = smallest_errors(weight, q.code, q.blocksize) + q.rounding(weight, values)
    expect_close(values, weight.reshape(-1), wide, "the weight")


@QUANTIZER.add("output dtype", lambda q: q.cases(flaws=()))
def _(q: Quantizer, case: Case) -> None:
    weight = case.tensor()
    found, expected = q.dequantize(q.quantize(weight)).dtype, q.out_dtype or weight.dtype
    assert found == expected, f"the result is {found}, not {expected}"


@QUANTIZER.add("not contiguous", lambda q: q.cases(flaws=(), layouts=LAYOUTS[1:]))
def _(q: Quantizer, case: Case) -> None:
    weight = case.tensor()
    expect_same(q.values(weight), q.values(weight.contiguous()), "the result of a contiguous copy")


@QUANTIZER.add("requires grad", lambda q: q.cases(flaws=(), requires_grad=True))
def _(q: Quantizer, case: Case) -> None:
    weight = case.tensor()
    expect_same(q.values(weight), q.values(weight.detach()), "the result without requires_grad")


@QUANTIZER.add("input unchanged", Quantizer.cases)
def _(q: Quantizer, case: Case) -> None:
    weight = case.tensor()
    q.values(weight)
    expect_same(weight, case.tensor(), "before quantizing it")


@QUANTIZER.add("no shared memory", lambda q: q.cases(flaws=()))
def _(q: Quantizer, case: Case) -> None:
    """Writing to the weight or to a result changes no later result, and no later result an earlier one."""
    weight = case.tensor()
    stored = q.quantize(weight)
    expected = q.dequantize(stored).detach().clone()
    weight.fill_(-1)
    expect_same(q.dequantize(stored), expected, "before the weight was written to it")
    first = q.dequantize(stored).detach()
    q.values(torch.full_like(weight, -1))
    expect_same(first, expected, "before another weight was dequantized it")
    first.fill_(-1)
    expect_same(q.dequantize(stored), expected, "before a result was written to it")


@QUANTIZER.add("deterministic", Quantizer.cases)
def _(q: Quantizer, case: Case) -> None:
    expect_same(q.values(case.tensor()), q.values(case.tensor()), "the first time it")


@QUANTIZER.add(
    "not finite",
    lambda q: q.cases(flaws=NONFINITE).filter(lambda case: not case.tensor().isfinite().all()),
    lambda q: "not promised" if q.nonfinite is None else None,
)
def _(q: Quantizer, case: Case) -> None:
    """NaN and infinity raise, or spoil no other block than theirs and stay not finite."""
    weight = case.tensor()
    if q.nonfinite == "refused":
        return _check_refused(q, weight)
    values, lost = q.values(weight), ~weight.isfinite().reshape(-1)
    assert not values[lost].isfinite().any(), "a value that was NaN or infinite became a finite one"
    sound = q.absmax(weight).isfinite()
    alone = q.values(weight.nan_to_num(0, 0, 0))
    expect_same(values[sound], alone[sound], "without NaN and infinity in other blocks it")


@QUANTIZER.add(
    "empty",
    lambda q: q.cases(shape=st.sampled_from([(0,), (0, 4), (3, 0)]), flaws=()),
    lambda q: "not promised" if q.empty is None else None,
)
def _(q: Quantizer, case: Case) -> None:
    weight = case.tensor()
    if q.empty == "refused":
        return _check_refused(q, weight)
    shape = tuple(q.dequantize(q.quantize(weight)).shape)
    assert shape == tuple(weight.shape), f"the result has shape {shape}, the weight {tuple(weight.shape)}"


def _check_error(q: Quantizer, weight: Tensor, start: int = 0) -> None:
    values = q.values(weight)
    assert len(values) == weight.numel(), f"{len(values)} values came back of {weight.numel()}"
    bound = largest_half_gap(q.code) * q.absmax(weight) + q.rounding(weight, values)
    expect_close(values[start:], weight.reshape(-1)[start:], bound[start:], "the weight")


def _check_refused(q: Quantizer, weight: Tensor) -> None:
    try:
        q.quantize(weight)
    except Exception:
        return
    raise AssertionError("it was quantized without an exception")
