"""Codes, bytes and scales equal bitsandbytes' to the bit; what bitsandbytes cannot vouch for follows from the
definition.
"""

import json
import math
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minilora import quantization
from minilora.backend import native, native_trial
from minilora.formats.bnb import from_bitsandbytes, to_bitsandbytes
from minilora.int8 import quantize_int8
from minilora.quantization import (
    BLOCK_SIZES,
    QUANT_TYPES,
    dequantize_4bit,
    dequantize_dynamic,
    dynamic_code,
    four_bit_code,
    quantize_4bit,
    quantize_dynamic,
)
from minilora.system.errors import UserError
from minilora.testing import (
    DTYPES,
    blocks_of,
    dequantize_reference,
    largest_half_gap,
    nearest_codes,
    shapes,
    unpack_symbols,
    weights,
)

try:
    import bitsandbytes.functional as bnb
except ImportError:
    bnb = None

needs_bitsandbytes = pytest.mark.skipif(bnb is None, reason="bitsandbytes, the oracle, is not installed")
# For odd widths bitsandbytes calls torch.compile, once a shape, and PyTorch warns of that.
quiet = pytest.mark.filterwarnings("ignore:::(torch|bitsandbytes).*")
fuzz = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
quant_types, blocksizes = st.sampled_from(QUANT_TYPES), st.sampled_from(BLOCK_SIZES)

PUBLISHED_NF4 = (  # QLoRA, appendix E
    "-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 -0.18477343022823334 "
    "-0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224 "
    "0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0"
)


@pytest.fixture(params=["compiled", "definition"])
def path(request, monkeypatch):
    """Both ways to compute on a CPU."""
    if request.param == "definition":
        monkeypatch.setenv("MINILORA_BACKEND", "torch")
    elif not native_trial.is_trusted("quantize"):
        pytest.skip("no C compiler: the definition is all there is")
    return request.param


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the last bit: -0 differs from 0."""
    word = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(
        a.contiguous().view(-1).view(word), b.contiguous().view(-1).view(word)
    )


def by_bitsandbytes(weight, quant_type, blocksize, double_quant):
    return bnb.quantize_4bit(
        weight, quant_type=quant_type, blocksize=blocksize, compress_statistics=double_quant
    )


def hard_weight(dtype: torch.dtype, quant_type: str, blocksize: int, n: int = 20_001) -> torch.Tensor:
    """Every flaw at once, in blocks of their own: the fuzzers below combine them at random."""
    weight = torch.randn(n, generator=torch.Generator().manual_seed(n + blocksize)) * 0.02
    code = four_bit_code(quant_type).sort().values
    ties = ((code[:-1] + code[1:]) / 2).repeat(blocksize)[:blocksize]
    ties[0] = 1.0
    for i, block in enumerate(
        [torch.zeros(blocksize), ties, ties * 2.0**-10, -ties, ties * 3e-39, torch.full((blocksize,), 1e-5)]
    ):
        if (i + 2) * blocksize < n:
            weight[i * blocksize : (i + 1) * blocksize] = block
    weight[-1] = 3.0  # the tail has an outlier
    return weight.to(dtype)


# --- codebooks


def test_nf4_derived_from_normal_quantiles_is_the_published_table():
    assert [float(x) for x in PUBLISHED_NF4.split()] == four_bit_code("nf4").tolist()


def test_nf4_symbols_of_normal_weights_carry_more_information_than_fp4s():
    # Codes that are used equally often carry 4 bits each. NF4 is not quite there: quantiles would be equal in
    # use for values divided by one fixed number, and a block's absmax is a random one.
    weight = torch.randn(2**16, generator=torch.Generator().manual_seed(0))
    bits = {}
    for quant_type in QUANT_TYPES:
        counts = unpack_symbols(quantize_4bit(weight, quant_type).packed, 2**16).bincount(minlength=16)
        bits[quant_type] = torch.distributions.Categorical(probs=counts.double()).entropy().item() / math.log(
            2
        )
    assert bits["fp4"] < bits["nf4"] < 4 and bits["nf4"] > 3.8


@needs_bitsandbytes
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_four_bit_codes_are_those_of_bitsandbytes(quant_type):
    assert same_bits(four_bit_code(quant_type), bnb.get_4bit_type(quant_type, device="cpu"))


@needs_bitsandbytes
@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_codes_are_those_of_bitsandbytes(signed):
    assert same_bits(dynamic_code(signed), bnb.create_dynamic_map(signed))


def test_signed_dynamic_code_is_symmetric_but_for_its_one():
    code = dynamic_code()
    assert code[-1] == 1 and torch.equal(
        code[:127], -code[128:255].flip(0)
    )  # 127 below zero, zero, 127 above, and 1


# --- the same bits as bitsandbytes


@quiet
@needs_bitsandbytes
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocksize", BLOCK_SIZES)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_packed_bytes_scales_and_values_are_those_of_bitsandbytes(path, quant_type, blocksize, dtype):
    weight = hard_weight(dtype, quant_type, blocksize)
    check_against_bitsandbytes(weight, quant_type, blocksize)


@quiet
@needs_bitsandbytes
@fuzz
@given(data=st.data(), quant_type=quant_types, blocksize=blocksizes)
def test_any_tensor_is_quantized_to_the_bits_of_bitsandbytes(data, quant_type, blocksize):
    check_against_bitsandbytes(
        data.draw(weights(code=four_bit_code(quant_type), blocksize=blocksize)), quant_type, blocksize
    )


@quiet
@needs_bitsandbytes
@fuzz
@given(data=st.data(), quant_type=quant_types, blocksize=blocksizes)
def test_the_definition_gives_the_bits_of_bitsandbytes(data, quant_type, blocksize):
    weight = data.draw(weights(code=four_bit_code(quant_type), blocksize=blocksize))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINILORA_BACKEND", "torch")
        check_against_bitsandbytes(weight, quant_type, blocksize)


def check_against_bitsandbytes(weight, quant_type, blocksize):
    for double_quant in (False, True):
        packed, state = by_bitsandbytes(weight, quant_type, blocksize, double_quant)
        q = quantize_4bit(weight, quant_type, blocksize, double_quant)
        assert same_bits(q.packed, packed)
        assert same_bits(q.absmax, state.absmax)
        if double_quant:
            assert same_bits(q.nested_absmax, state.state2.absmax) and same_bits(q.offset, state.offset)
        # As one row bitsandbytes gives every block its own scale. `+ 0.0` turns -0 into 0: its FP4 symbol 8
        # is either, by width.
        state.shape = torch.Size((1, weight.numel()))
        for dtype in DTYPES:
            state.dtype = dtype
            ours, theirs = (
                q.dequantize(dtype).view(-1) + 0.0,
                bnb.dequantize_4bit(packed, state).view(-1) + 0.0,
            )
            if (
                dtype == torch.bfloat16
            ):  # a CPU's instruction for it, VCVTNEPS2BF16, takes subnormals for zero
                ours = ours.masked_fill((theirs == 0) & (ours.abs() < 2**-126), 0)
            assert same_bits(ours, theirs)


@quiet
@needs_bitsandbytes
@pytest.mark.parametrize("shape", [(128, 256), (3, 5, 128), (7, 9), (4096,)])
def test_dequantized_shapes_and_signs_of_zero_are_those_of_bitsandbytes(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    for quant_type in QUANT_TYPES:
        packed, state = by_bitsandbytes(weight, quant_type, 64, True)
        values, expected = quantize_4bit(weight, quant_type).dequantize(), bnb.dequantize_4bit(packed, state)
        if (
            quant_type == "fp4"
        ):  # its second zero is -0 in bitsandbytes on a CPU without AVX-512, and here 0 everywhere
            assert not values[values == 0].signbit().any()
            expected = expected + 0.0
        assert values.shape == shape and same_bits(values, expected)


def test_blocks_that_cross_rows_keep_their_scales():
    # bitsandbytes 0.50 on a CPU with AVX-512 counts row * (width // blocksize) blocks before a row, so it
    # takes others' scales.
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(2))
    for blocksize in BLOCK_SIZES:
        q = quantize_4bit(weight, blocksize=blocksize, double_quant=False)
        expected = dequantize_reference(
            unpack_symbols(q.packed, weight.numel()), q.absmax, four_bit_code("nf4"), blocksize
        )
        assert torch.equal(q.dequantize(), expected.float().view(64, 96))


@needs_bitsandbytes
@pytest.mark.parametrize("signed", [True, False])
@fuzz
@given(weight=weights(dtypes=(torch.float32,), blocksize=256))
def test_8bit_blocks_are_those_of_bitsandbytes(signed, weight):
    x, code = weight.view(-1) if signed else weight.view(-1).abs(), dynamic_code(signed)
    indices, absmax = quantize_dynamic(x, code, 256)
    expected, state = bnb.quantize_blockwise(x, code=code.clone(), blocksize=256)
    assert same_bits(indices, expected) and same_bits(absmax, state.absmax)
    values = dequantize_dynamic(indices, absmax, code, 256)
    assert same_bits(values, bnb.dequantize_blockwise(expected, state))


@pytest.mark.parametrize("shape", [(4096, 64), (1_000_001,)])
def test_compiled_and_plain_paths_give_the_same_bits_with_threads(shape, monkeypatch):
    if not native_trial.is_trusted("quantize"):
        pytest.skip("no C compiler: the definition is all there is")
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    for dtype in DTYPES:
        results = []
        for backend in ("", "torch"):
            monkeypatch.setenv("MINILORA_BACKEND", backend)
            q = quantize_4bit(weight.to(dtype))
            results.append((q.packed, q.absmax, q.dequantize()))
        assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


@pytest.fixture
def first_use():
    """The state of a new process: nothing built, no table made."""
    caches = [
        native._functions,
        native_trial.is_trusted,
        quantization.nearest_of_steps,
        four_bit_code,
        dynamic_code,
    ]
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize("compiler", ["/nonexistent/cc", "false", "cc '"])  # absent, failing, misspelt
def test_without_a_compiler_the_definition_runs(first_use, monkeypatch, tmp_path, compiler):
    expected = quantize_4bit(torch.linspace(-1, 1, 4097))
    native._functions.cache_clear()
    native_trial.is_trusted.cache_clear()
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    q = quantize_4bit(torch.linspace(-1, 1, 4097))
    assert not native._functions() and not list(tmp_path.glob("minilora/native/*"))
    assert same_bits(q.packed, expected.packed) and same_bits(q.dequantize(), expected.dequantize())


def test_a_compiled_library_with_other_bits_is_not_used(first_use, monkeypatch, tmp_path):
    if not native_trial.is_trusted("quantize"):
        pytest.skip("no C compiler: the definition is all there is")
    spoilt = tmp_path / "native.c"
    for included in native._INCLUDED:
        shutil.copy(included, tmp_path)
    spoilt.write_text(native._SOURCE.read_text().replace("1.0f / floored", "0.9f / floored"))
    assert spoilt.read_text() != native._SOURCE.read_text()
    monkeypatch.setattr(native, "_SOURCE", spoilt)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native._functions.cache_clear()
    native_trial.is_trusted.cache_clear()
    x = torch.randn(4096, generator=torch.Generator().manual_seed(11))
    q = quantize_4bit(x)
    assert native._functions() and not native_trial.is_trusted("quantize")
    monkeypatch.setenv("MINILORA_BACKEND", "torch")
    assert same_bits(q.packed, quantize_4bit(x).packed)


def test_defaults_of_dtype_and_device_do_not_reach_the_tables(path, first_use):
    # Loaders build models under torch.device("meta") and with a default dtype of bfloat16; the tables are
    # made on first use.
    x = torch.linspace(-1, 1, 1025)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            q = quantize_4bit(x)
            values = q.dequantize()
    finally:
        torch.set_default_dtype(torch.float32)
    plain = quantize_4bit(x)
    assert same_bits(q.packed, plain.packed) and same_bits(values, plain.dequantize())


# --- properties


@fuzz
@given(data=st.data(), quant_type=quant_types, blocksize=blocksizes)
def test_every_symbol_is_the_nearest_code(data, quant_type, blocksize):
    code = four_bit_code(quant_type)
    weight = data.draw(weights(code=code, blocksize=blocksize))
    q = quantize_4bit(weight, quant_type, blocksize)
    symbols = unpack_symbols(q.packed, weight.numel())
    expected, margin = nearest_codes(weight, code, blocksize)
    # The scaled value is off by two float32 roundings, 2^-23, and so is its midpoint: a margin of 2^-21
    # decides for certain. Below an absmax of 1e-38 blocks count as about zero.
    certain = (margin > 2**-21) & (
        torch.cat([b.abs().amax().expand(len(b)) for b in blocks_of(weight, blocksize)]) > 1e-38
    )
    assert torch.equal(code[symbols][certain], code[expected][certain])


@fuzz
@given(data=st.data(), quant_type=quant_types, blocksize=blocksizes)
def test_error_is_at_most_half_the_largest_gap_of_the_code(data, quant_type, blocksize):
    code = four_bit_code(quant_type)
    weight = data.draw(weights(code=code, blocksize=blocksize))
    values = quantize_4bit(weight, quant_type, blocksize, double_quant=False).dequantize(torch.float32)
    for block, back in zip(blocks_of(weight, blocksize), blocks_of(values, blocksize), strict=True):
        # Above it, roundings of the scaled value, the midpoint and the product, 2^-23 each at most; and the
        # floor of 1e-38.
        bound = block.abs().max() * (largest_half_gap(code) + 3 * 2**-23) + 1e-38
        assert (back - block).abs().max() <= bound


@fuzz
@given(data=st.data(), quant_type=quant_types, blocksize=blocksizes)
def test_quantizing_a_dequantized_tensor_changes_nothing(data, quant_type, blocksize):
    # In float32: absmax is among the values to the bit, for its code is +-1, and every value is a code away
    # from the midpoints. FP4 has two zeros, of which only one is chosen again, so values are compared.
    # Subnormal blocks lose bits of their products.
    weight = data.draw(
        weights(flaws=("zero block", "ties", "outliers"), code=four_bit_code(quant_type), blocksize=blocksize)
    )
    first = quantize_4bit(weight, quant_type, blocksize, double_quant=False).dequantize(torch.float32)
    second = quantize_4bit(first, quant_type, blocksize, double_quant=False).dequantize()
    assert same_bits(first + 0.0, second + 0.0)


@fuzz
@given(
    weight=weights(dtypes=(torch.float32,), flaws=("zero block", "outliers")),
    k=st.integers(-20, 20),
    quant_type=quant_types,
)
def test_scaling_by_a_power_of_two_scales_the_result_exactly(weight, k, quant_type):
    a, b = (quantize_4bit(w, quant_type, double_quant=False) for w in (weight, weight * 2.0**k))
    assert torch.equal(a.packed, b.packed)
    whole = weight.numel() // 64  # the scale of a shorter last block of zeros is 1e-38 whatever the factor
    assert torch.equal(a.absmax[:whole] * 2.0**k, b.absmax[:whole])


@fuzz
@given(weight=weights(flaws=("zero block", "outliers", "tiny block", "negative zeros")), blocksize=blocksizes)
def test_fp4_negates_with_its_input(weight, blocksize):
    # NF4 does not: its negative codes are others. Ties are excluded: they go to the smaller code, on either
    # side of zero.
    a, b = (
        quantize_4bit(w, "fp4", blocksize, double_quant=False).dequantize(torch.float32)
        for w in (weight, -weight)
    )
    _, margin = nearest_codes(weight, four_bit_code("fp4"), blocksize)
    assert torch.equal(a.view(-1)[margin > 2**-21], -b.view(-1)[margin > 2**-21])


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_larger_blocks_are_less_exact_on_average(quant_type):
    # The expected largest of b normal numbers grows with b, and the error with it: by > 3 % from one block
    # size to the next, where the mean over 2^20 weights is known to 0.1 %.
    weight = torch.randn(2**20, generator=torch.Generator().manual_seed(4))
    errors = [
        (quantize_4bit(weight, quant_type, b).dequantize() - weight).abs().mean().item() for b in BLOCK_SIZES
    ]
    assert errors == sorted(errors)


def test_nf4_is_more_exact_than_fp4_on_normal_weights():
    weight = torch.randn(2**20, generator=torch.Generator().manual_seed(5))
    nf4, fp4 = ((quantize_4bit(weight, t).dequantize() - weight).square().mean() for t in QUANT_TYPES)
    assert nf4 < fp4


def test_doubly_quantized_nf4_takes_4_127_bits_a_weight():
    weight = torch.zeros(2**12, 2**11)
    assert quantize_4bit(weight).bits_per_weight == pytest.approx(
        4 + 8 / 64 + 32 / (64 * 256), abs=1e-5
    )  # 4 bytes of offset more
    assert quantize_4bit(weight, double_quant=False).bits_per_weight == 4.5
    assert quantize_int8(weight).bits_per_weight == 8 + 32 / 2**11


def test_double_quantization_moves_scales_by_less_than_a_hundredth_of_their_spread():
    # The dynamic code's widest gap, in its top decade, is 0.9 / 64; half of it, times the largest distance
    # from the mean.
    weight = torch.randn(2**18, generator=torch.Generator().manual_seed(6))
    plain, double = (quantize_4bit(weight, double_quant=d) for d in (False, True))
    scales = dequantize_dynamic(double.absmax, double.nested_absmax, dynamic_code(), 256) + double.offset
    spread = (plain.absmax - double.offset).abs().max()
    assert (scales - plain.absmax).abs().max() <= 0.01 * spread


# --- the interface


def test_dequantize_fills_the_buffer_given(path):
    q = quantize_4bit(torch.randn(33, 65, generator=torch.Generator().manual_seed(7)))
    for dtype in DTYPES:
        out = torch.empty(33, 65, dtype=dtype)
        assert dequantize_4bit(q, out=out) is out and torch.equal(out, q.dequantize(dtype))


@pytest.mark.parametrize(
    "out",
    [
        torch.empty(65, 33),
        torch.empty(33, 65, dtype=torch.float16),
        torch.empty(65, 33).t(),
        torch.empty(33, 65, device="meta"),
    ],
)
def test_a_buffer_that_does_not_fit_is_refused(out):
    q = quantize_4bit(torch.ones(33, 65))
    with pytest.raises(UserError, match="out is .* it must be contiguous"):
        q.dequantize(torch.float32, out)


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_weight_that_requires_a_gradient_is_quantized_without_a_graph(path, double_quant):
    weight = torch.randn(33, 65, generator=torch.Generator().manual_seed(8))
    q, plain = (quantize_4bit(w, double_quant=double_quant) for w in (torch.nn.Parameter(weight), weight))
    assert same_bits(q.packed, plain.packed) and same_bits(q.absmax, plain.absmax)
    assert not q.absmax.requires_grad and not q.dequantize().requires_grad


def test_strided_weights_are_quantized_in_their_logical_order():
    weight = torch.randn(64, 66, generator=torch.Generator().manual_seed(8))
    a, b = quantize_4bit(weight.t()), quantize_4bit(weight.t().contiguous())
    assert torch.equal(a.packed, b.packed) and torch.equal(
        quantize_int8(weight.t()).data, quantize_int8(weight.t().contiguous()).data
    )


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", [0, 100, 129])  # whole blocks and the tail
def test_infinities_and_nan_are_refused(path, bad, dtype, place):
    weight = torch.ones(130, dtype=dtype)
    weight[place] = bad
    for quantize in (quantize_4bit, quantize_int8):
        with pytest.raises(UserError, match="1 of its 130 values are infinite or NaN"):
            quantize(weight)


def test_scales_whose_mean_overflows_are_refused_only_doubly():
    weight = torch.full((256,), 3e38)
    assert quantize_4bit(weight, double_quant=False).dequantize().eq(weight).all()
    with pytest.raises(UserError, match="overflow double quantization"):
        quantize_4bit(weight)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((torch.ones(64), "nf5"), "quant_type 'nf5' is not known; choose nf4 or fp4"),
        ((torch.ones(64), "nf4", 48), "blocksize 48 is not supported; choose one of 32, 64, "),
        ((torch.ones(64), "nf4", 8192), "blocksize 8192 is not supported"),
        ((torch.ones(64, dtype=torch.float64),), "cannot quantize torch.float64"),
        ((torch.ones(64, dtype=torch.int8),), "cannot quantize torch.int8"),
        ((torch.ones(0, 4),), r"shape \(0, 4\): it is empty"),
    ],
)
def test_mistakes_name_value_and_mend(arguments, message):
    with pytest.raises(UserError, match=message):
        quantize_4bit(*arguments)


# --- bitsandbytes' state dicts


@quiet
@needs_bitsandbytes
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@fuzz
@given(data=st.data(), blocksize=blocksizes)
def test_state_dict_entries_are_those_of_bitsandbytes_and_come_back(
    quant_type, double_quant, data, blocksize
):
    weight = data.draw(weights(shape=shapes(max_size=2000)))
    packed, state = by_bitsandbytes(weight, quant_type, blocksize, double_quant)
    expected = {"weight": packed} | {f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}
    q = quantize_4bit(weight, quant_type, blocksize, double_quant)
    ours = to_bitsandbytes(q)
    assert ours.keys() == expected.keys()
    assert all(ours[k].shape == v.shape and same_bits(ours[k], v) for k, v in expected.items())
    read = from_bitsandbytes(
        {"layer." + k: v for k, v in expected.items()} | {"other": weight}, "layer.weight"
    )
    assert read.shape == q.shape and read.dtype == q.dtype
    assert all(same_bits(v, to_bitsandbytes(read)[k]) for k, v in expected.items())
    theirs = bnb.QuantState.from_dict({k[7:]: v for k, v in ours.items() if k != "weight"}, device="cpu")
    assert theirs == state


def entries(**changes) -> dict:
    """A sound doubly quantized 64 x 100 weight, with values of its JSON changed."""
    sound = to_bitsandbytes(quantize_4bit(torch.randn(64, 100, generator=torch.Generator().manual_seed(9))))
    key = "weight.quant_state.bitsandbytes__nf4"
    state = json.loads(bytes(sound[key].tolist())) | changes
    text = json.dumps({k: v for k, v in state.items() if v is not None})
    return sound | {key: torch.tensor(list(text.encode()), dtype=torch.uint8)}


@pytest.mark.parametrize("suffix", ["", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"])
def test_a_missing_or_truncated_entry_is_refused_by_name(suffix):
    sound = entries()
    name = "weight" + suffix
    with pytest.raises(UserError, match=f"{name}(,|$| |\\.)"):
        from_bitsandbytes({k: v for k, v in sound.items() if k != name})
    with pytest.raises(UserError, match=f"weight cannot be read: {name} has "):
        from_bitsandbytes(sound | {name: sound[name][:-1]})
    with pytest.raises(UserError, match=f"weight cannot be read: {name} has "):
        from_bitsandbytes(sound | {name: sound[name].int()})


@pytest.mark.parametrize(
    "changes",
    [
        {"quant_type": "fp4"}, {"quant_type": None}, {"blocksize": 48}, {"blocksize": "64"}, {"blocksize": [64]},
        {"dtype": "float64"}, {"dtype": []}, {"shape": None}, {"shape": [64, -100]}, {"shape": [64, 0]}, {"shape": "64"},
        {"shape": [2**40, 2**40]}, {"shape": [True, 64]}, {"nested_offset": True},
        {"nested_blocksize": 48}, {"nested_offset": None}, {"nested_offset": float("nan")}, {"nested_dtype": "float16"},
    ],
)  # fmt: skip
def test_a_state_that_contradicts_itself_is_refused_by_name(changes):
    with pytest.raises(UserError, match=f"bitsandbytes__nf4 cannot be honoured: {next(iter(changes))} = "):
        from_bitsandbytes(entries(**changes))


def test_a_state_that_contradicts_the_tensors_is_refused():
    with pytest.raises(
        UserError,
        match="weight has 3200 bytes of torch.uint8, 6464 weights need 3232; weight.absmax has 100 values",
    ):
        from_bitsandbytes(entries(shape=[64, 101]))
    with pytest.raises(UserError, match="weight.absmax has 100 values of torch.uint8, not 50 of"):
        from_bitsandbytes(entries(blocksize=128))
    sound = entries()
    with pytest.raises(UserError, match="weight.quant_map is not the nf4 code"):
        from_bitsandbytes(sound | {"weight.quant_map": four_bit_code("fp4")})
    with pytest.raises(UserError, match="weight.nested_quant_map is not the dynamic code"):
        from_bitsandbytes(sound | {"weight.nested_quant_map": dynamic_code(False)})
    with pytest.raises(UserError, match="weight.nested_absmax holds infinities or NaN"):
        from_bitsandbytes(sound | {"weight.nested_absmax": torch.full((1,), float("nan"))})
    plain = entries(nested_blocksize=None, nested_dtype=None, nested_offset=None)
    with pytest.raises(
        UserError,
        match="weight.nested_absmax, weight.nested_quant_map are there, but .* names no nested_blocksize",
    ):
        from_bitsandbytes(plain)


@pytest.mark.parametrize("keep", [0, 1, 40])
def test_a_truncated_state_is_refused(keep):
    sound = entries()
    key = "weight.quant_state.bitsandbytes__nf4"
    with pytest.raises(UserError, match="bitsandbytes__nf4 is truncated or corrupt: .*; download again"):
        from_bitsandbytes(sound | {key: sound[key][:keep]})
    with pytest.raises(UserError, match="weight needs exactly one entry"):
        from_bitsandbytes({k: v for k, v in sound.items() if k != key})
    with pytest.raises(UserError, match="weight needs exactly one entry"):
        from_bitsandbytes(sound | {key.replace("nf4", "fp4"): sound[key]})


def test_packed_bytes_stored_as_another_dtype_are_read():
    # quant_storage of bitsandbytes: the same bytes called bfloat16, so that FSDP can shard them.
    sound = entries()
    read = from_bitsandbytes(sound | {"weight": sound["weight"].view(-1).view(torch.bfloat16).view(-1, 1)})
    assert torch.equal(read.packed, sound["weight"].view(-1))


# --- 8 bits


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_rows_are_those_of_bitsandbytes(dtype):
    weight = torch.randn(300, 100, generator=torch.Generator().manual_seed(10)).to(dtype)
    q = quantize_int8(weight)
    rows, absmax, _ = bnb.int8_vectorwise_quant(weight)
    assert torch.equal(q.data, rows) and torch.equal(q.absmax, absmax)
    assert torch.equal(q.dequantize(torch.float32), bnb.int8_vectorwise_dequant(rows, absmax))


@fuzz
@given(weight=weights())
def test_int8_error_is_at_most_half_a_step(weight):
    q = quantize_int8(weight)
    absmax = weight.double().abs().amax(-1, keepdim=True)
    error = (q.dequantize(torch.float32).double() - weight.double()).abs()
    # Half a step, and the roundings of the scale and of both products, 2^-22 of absmax at most; and the floor
    # under tiny rows.
    assert (error <= absmax * (0.5 / 127 + 2**-22) + 1e-36).all()


def test_int8_refuses_what_has_no_rows():
    with pytest.raises(UserError, match="has no rows"):
        quantize_int8(torch.tensor(1.0))


def test_int8_keeps_zero_rows():
    weight = torch.tensor([[0.0, -0.0], [1.0, -0.5]])
    assert quantize_int8(weight).dequantize().tolist() == [[0, 0], [1, pytest.approx(-0.5, abs=0.5 / 127)]]
