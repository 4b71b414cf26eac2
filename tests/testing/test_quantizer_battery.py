"""The battery names the fault of every wrong quantizer, and finds none in the right ones."""

import textwrap

import pytest
import torch
from hypothesis import strategies as st
from testing.wrong_quantizers import CODE, WRONG, dequantize, quantize

import minilora.testing
from minilora.int8 import quantize_int8
from minilora.quantization import QUANT_TYPES, dequantize_4bit, four_bit_code, quantize_4bit
from minilora.testing import DTYPES, Recipe, check_quantizer

try:
    import bitsandbytes.functional as bnb
except ImportError:
    bnb = None

needs_bitsandbytes = pytest.mark.skipif(bnb is None, reason="bitsandbytes, another library, is not installed")
quiet = pytest.mark.filterwarnings("ignore:::(torch|bitsandbytes|torchao).*")
INT8 = torch.arange(-127, 128) / 127


def check(quantize, dequantize, **options):
    settings = dict(code=CODE, ties="smaller", nonfinite="kept", max_examples=25) | options
    return check_quantizer(quantize, dequantize, **settings)


# Faults of one property: it alone is reported.
NARROW = ["ties to the larger", "keeps the weight", "reads the storage", "always float32", "flat result", "one buffer", "NaN becomes 0"]  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_every_wrong_quantizer_is_reported_by_the_name_of_its_fault_and_a_narrow_fault_by_no_other(name):
    quantize, dequantize, expected = WRONG[name]
    report = check(quantize, dequantize, shrink=False)
    assert set(report.failures) == expected if name in NARROW else set(report.failures) >= expected
    with pytest.raises(AssertionError, match=f"FAILED   {next(iter(report.failures))}"):
        report.raise_for_failures()


def test_a_right_quantizer_written_in_ten_lines_passes():
    report = check(quantize, dequantize)
    report.raise_for_failures()
    assert len(report.passed) == 21 and set(report.skipped) == {"sign symmetry", "empty"}


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_ours_has_every_property(quant_type, double_quant):
    report = check(
        lambda weight: quantize_4bit(weight, quant_type, double_quant=double_quant),
        dequantize_4bit,
        code=four_bit_code(quant_type),
        scale_error=0.01 * double_quant,  # the dynamic code's widest gap is 0.9 / 64: half of it is 0.007
        nonfinite="refused",
        empty="refused",
    )
    report.raise_for_failures()
    assert ("sign symmetry" in report.skipped) == (quant_type == "nf4")
    assert ("ties" in report.skipped) == double_quant


def test_int8_has_every_property():
    report = check(
        quantize_int8,
        lambda q: q.dequantize(),
        code=INT8,
        blocksize=None,
        smallest=1e-36,  # the floor under its scales
        ties="any",  # round() takes the even one
        nonfinite="refused",
        empty="refused",
    )
    report.raise_for_failures()


def by_bitsandbytes(quant_type, **options):
    return check(
        lambda weight: bnb.quantize_4bit(weight, quant_type=quant_type),
        lambda q: bnb.dequantize_4bit(*q),
        code=bnb.get_4bit_type(quant_type, device="cpu"),
        nonfinite=None,
        **options,
    )


@quiet
@needs_bitsandbytes
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_bitsandbytes_has_every_property_on_whole_rows_of_blocks(quant_type):
    matrices = st.tuples(st.integers(1, 5), st.sampled_from([64, 128]))
    by_bitsandbytes(quant_type, shape=matrices).raise_for_failures()


@quiet
@needs_bitsandbytes
def test_bitsandbytes_turns_weights_of_two_values_and_fails_on_three_dimensions_of_one():
    # Packed, such a weight is one byte, (1, 1); bitsandbytes takes a packed weight of one row for a transposed
    # one.
    report = by_bitsandbytes("nf4", shape=st.sampled_from([(2,), (1, 1, 1)]))
    assert {"shape", "nearest code"} <= set(report.failures)
    assert report.failures["shape"] == "Recipe(shape=(2,)).tensor()"
    assert "the result has shape (2, 1), the weight (2,)" in report.reasons["shape"]
    assert "t() expects a tensor with <= 2 dimensions" in report.reasons["nearest code"]


def by_torchao(**options):
    nf4 = pytest.importorskip("torchao.quantization", reason="torchao, another library")
    return check(
        nf4.to_nf4,
        lambda q: q.get_original_weight(),
        code=nf4.to_nf4(torch.ones(16384)).nf4,  # rounded to four digits
        scale_error=0.01,  # its scales have 8 even bits: half a step is 1/256 of the largest distance
        nonfinite=None,
        **options,
    )


TORCHAO_SHAPES = st.sampled_from([(16384,), (128, 128), (256, 128)])  # 256 scales at a time, in blocks of 64


@quiet
def test_torchao_has_every_property_in_float32_but_that_blocks_of_zeros_do_not_stay_zero():
    report = by_torchao(dtypes=DTYPES[:1], shape=TORCHAO_SHAPES, max_examples=20)
    assert set(report.failures) == {"zero block"}
    weight = eval(report.failures["zero block"], dict(Recipe=Recipe, torch=torch, code=CODE))
    assert (weight.view(-1, 64).abs().amax(1) == 0).any() and weight.any()


def test_the_example_of_the_room_runs_and_names_its_bug(capsys):
    example = minilora.testing.__doc__.split("\n\n")[1:3]
    exec(textwrap.dedent("\n\n".join(example)), {})
    printed = capsys.readouterr().out
    assert "FAILED   outliers stay in their block" in printed and "ok       shape" in printed


def test_a_counterexample_is_a_line_of_python_with_few_plain_numbers():
    report = check(*WRONG["floor instead of nearest"][:2])
    weight = eval(report.failures["nearest code"], dict(Recipe=Recipe, torch=torch, code=CODE))
    assert weight.numel() == 2 and "seed" not in report.failures["nearest code"]
    q = WRONG["floor instead of nearest"][0](weight)
    assert not torch.equal(q.symbols, quantize(weight).symbols)


def test_a_report_is_the_same_every_time():
    first, second = (check(*WRONG["signed maximum"][:2], max_examples=10) for _ in range(2))
    assert first == second


def test_the_random_state_of_pytorch_is_as_before():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    check(*WRONG["random rounding"][:2], max_examples=3, shrink=False)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(ties="larger"), "ties is 'larger'; choose one of 'any', 'smaller'"),
        (dict(nonfinite="lost"), "nonfinite is 'lost'; choose one of None, 'refused', 'kept'"),
        (dict(skip=("nearest",)), "skip is 'nearest'; choose one of 'nearest code', "),
    ],
)
def test_a_choice_that_does_not_exist_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        check(quantize, dequantize, **options)
