"""Triton kernels without a GPU: interpreted against their definitions, and compiled ahead of time for the
cards that matter.
"""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from support.project import ROOT

triton = pytest.importorskip("triton", reason="Triton is not installed (it exists for Linux only)")

from support.compiled_kernels import (  # noqa: E402
    CARDS,
    CompiledLaunch,
    compile_ahead,
    compiled_launches,
)
from support.pretended_gpu import PretendedGpu  # noqa: E402

from minilora import ops, optim  # noqa: E402
from minilora.backend import dropout, triton_trial  # noqa: E402
from minilora.backend.choice import fastest  # noqa: E402
from minilora.backend.segments import Segments  # noqa: E402
from minilora.quantization import (  # noqa: E402
    dynamic_code,
    four_bit_code,
    nearest_code_bounds,
    nearest_of_steps,
    quantize_4bit,
)

# Before 3.6, Triton's correctly rounded quotients and roots take subnormal numbers for zero.
FTZ = ".ftz" if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6) else ""
OPERATIONS = "tests/support/kernels_of_operations.py", "tests/support/segmented_kernels.py"
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def run_tests_of_kernels(*arguments: str, **environment: str) -> None:
    """Run tests in a process of their own: TRITON_INTERPRET must be set before Triton is first imported."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"MINILORA_BACKEND": "torch"} | environment,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert re.search(r"\d+ passed", run.stdout)


def test_kernels_equal_their_definitions_under_the_interpreter():
    files = "tests/support/interpreted_kernels.py", *OPERATIONS
    run_tests_of_kernels(*files, TRITON_INTERPRET="1")


@pytest.mark.gpu
@needs_gpu
def test_kernels_of_operations_equal_their_definitions_on_the_gpu():
    shared = ["-n", "4", "-p", "no:benchmark"] if importlib.util.find_spec("xdist") else []
    run_tests_of_kernels("-W", "default", *shared, *OPERATIONS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run here")
def test_where_kernels_do_not_run_the_trial_says_what_happened():
    problem = triton_trial._problem_of_a_launch(torch.device("cpu"))
    assert re.match(r"\w+Error: .*driver", problem) and "\n" not in problem


def launches(tree: ast.AST, entered: bool = False) -> Iterator[tuple[str, bool]]:
    """Every launch in a module: the kernel, and whether the device of a tensor is entered for it."""
    if isinstance(tree, ast.With):
        entered = any(ast.unparse(item).startswith("torch.cuda.device_of(") for item in tree.items)
    if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Subscript):
        yield ast.unparse(tree.func.value), entered
    for child in ast.iter_child_nodes(tree):
        yield from launches(child, entered)


def test_every_launch_enters_the_device_of_its_tensors():
    """Triton launches on the current device: with cuda:0 current, tensors on cuda:1 are not there."""
    found = {}
    for path in (ROOT / "kernels").glob("*.py"):
        found |= dict(launches(ast.parse(path.read_text())))
    kernels = {
        n
        for path in (ROOT / "kernels").glob("*.py")
        for n in re.findall(r"def (\w+_kernel)\(", path.read_text())
    }
    assert found.keys() == kernels and all(found.values()), found
    assert list(launches(ast.parse("kernel[(1,)](x)"))) == [("kernel", False)]


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


TOKENS, WIDTH, FEED_FORWARD, HEADS = 4096, 4096, 14336, 128  # of a layer of Mistral-7B
DRAW = dict(seed=2**40, stream=3, threshold=3277)
EVERYWHERE = {  # on every card, of activations of a dtype
    "add_norm": lambda x: (x(TOKENS, WIDTH), x(TOKENS, WIDTH), x(WIDTH), 1e-5),
    "add_norm_backward": lambda x: (
        x(TOKENS, WIDTH),
        x(WIDTH),
        empty(TOKENS),
        x(TOKENS, WIDTH),
        x(TOKENS, WIDTH),
    ),
    "rope": lambda x: (x(4, 1024, 32, HEADS), x(4, 1024, 8, HEADS), x(1, 1024, HEADS), x(1, 1024, HEADS)),
    "swiglu": lambda x: (x(TOKENS, FEED_FORWARD), x(TOKENS, FEED_FORWARD)),
    "swiglu_backward": lambda x: (x(TOKENS, FEED_FORWARD),) * 3,
    "dropout": lambda x: (x(TOKENS, WIDTH), *DRAW.values()),
    "add_dropped": lambda x: (x(TOKENS, WIDTH), x(TOKENS, WIDTH), *DRAW.values()),
}
ON_TENSOR_CORES = {  # from compute capability 8.0 on, for a rank
    "dropped_product": lambda x, r: (x(TOKENS, WIDTH), x(r, WIDTH), *DRAW.values()),
    "add_dropped_product": lambda x, r: (x(TOKENS, WIDTH), x(TOKENS, r), x(r, WIDTH), *DRAW.values()),
    "product_with_dropped": lambda x, r: (x(TOKENS, r), x(TOKENS, WIDTH), *DRAW.values()),
}


def compiled_operation(operation: str, arguments: tuple, card: str) -> CompiledLaunch:
    """The kernel that an operation launches for such arguments, compiled for a card."""
    from minilora.kernels import operations

    function = getattr(operations, operation)
    with compiled_launches(sys.modules[function.__module__], CARDS[card]) as launches:
        function(*arguments)
    launch = launches[f"{operation}_kernel"]
    assert launch.ptx
    return launch


def draws_a_number(launch: CompiledLaunch, numbers: int, threads: int = 128) -> float:
    """How many wide products Philox does in a thread for each of the numbers that a program holds at a time."""
    return len(re.findall(r"mul\.hi\.u32", launch.ptx)) * threads / numbers


USUAL = [("T4", torch.float16), ("T4", torch.float32), ("A100", torch.bfloat16), ("H100", torch.bfloat16)]


@pytest.mark.parametrize(("card", "dtype"), USUAL)
@pytest.mark.parametrize("operation", EVERYWHERE)
def test_operations_compile_for_every_card_with_loads_and_stores_of_16_bytes(operation, dtype, card):
    """Without spills, as CompiledLaunch asserts."""
    launch = compiled_operation(operation, EVERYWHERE[operation](partial(empty, dtype=dtype)), card)
    stores = set(re.findall(r"st\.global\S*", launch.ptx))
    assert stores - {"st.global.b32"} == {"st.global.v4.b32"}  # a single number is 1 / rms
    assert len(re.findall(r"ld\.global\.v4", launch.ptx)) >= len(re.findall(r"st\.global\.v4", launch.ptx))
    assert launch.shared <= 2048 and "mma" not in launch.ptx
    if operation == "rope" and card != "A100":  # which adds bfloat16 with FMAs by 1: one rounding too
        assert "fma" not in launch.ptx  # each product is rounded
    if "swiglu" in operation:
        assert "ex2.approx" in launch.ptx
    if "drop" in operation:  # 20 products give 8 numbers their bits, and no thread draws what another draws
        assert draws_a_number(launch, 8 * 256) <= 20 / 8


@pytest.mark.parametrize("card", ["T4", "H100"])
@pytest.mark.parametrize(("operation", "expected"), [("swiglu", 18), ("dropout", 17)])
def test_a_kernel_has_as_many_instructions_a_number_as_the_documents_say(operation, expected, card):
    dtype = torch.float16 if card == "T4" else torch.bfloat16
    launch = compiled_operation(operation, EVERYWHERE[operation](partial(empty, dtype=dtype)), card)
    numbers = 16  # of a thread: 2048 of a program, whose threads are 128
    # Another compiler may take a few other instructions for addresses: the documents round to whole numbers.
    assert launch.instructions() / numbers == pytest.approx(expected, abs=0.5)


def test_dequantizing_takes_11_6_instructions_an_element_on_a_t4():
    from minilora.kernels import nf4

    q = quantize_4bit(torch.zeros(64, 256))
    with compiled_launches(nf4, CARDS["T4"]) as launches:
        nf4.dequantize(q, torch.empty(64, 256, dtype=torch.float16))
    elements = nf4.TILE / 128  # of a thread
    assert launches["dequantize_kernel"].instructions() / elements == pytest.approx(11.6, abs=0.1)


@pytest.mark.parametrize("card", CARDS)
def test_cross_entropy_compiles_for_every_card(card):
    rows = empty(512, 32000), empty(512, dtype=torch.int64)
    launch = compiled_operation("cross_entropy", rows, card)
    assert set(re.findall(r"[sl][td]\.global\.v\S*", launch.ptx)) == {"ld.global.v4.b32", "st.global.v4.b32"}
    compiled_operation("cross_entropy", (empty(64, 2**18), empty(64, dtype=torch.int64)), card)


@pytest.mark.parametrize("D", [128, 5120, 16384])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_norms_of_every_width_compile_without_spills(D, dtype):
    x = partial(empty, dtype=dtype)
    rows = x(TOKENS, D)
    compiled_operation("add_norm", (rows, None if D == 128 else rows, x(D), 1e-5), "T4")
    compiled_operation(
        "add_norm_backward", (rows, x(D), empty(TOKENS), rows, None if D == 128 else rows), "T4"
    )


@pytest.mark.parametrize("card", ["A100", "H100"])
@pytest.mark.parametrize("r", [16, 64, 256])
@pytest.mark.parametrize("operation", ON_TENSOR_CORES)
def test_products_with_dropout_inside_use_tensor_cores(operation, r, card):
    dtype = torch.float16 if r == 16 else torch.bfloat16
    launch = compiled_operation(operation, ON_TENSOR_CORES[operation](partial(empty, dtype=dtype), r), card)
    assert re.search(r"\b(wg)?mma\S*\.f32\.b?f16\.b?f16", launch.ptx)  # sums in float32
    tile = 32 * 8 * (16 if r == 16 else 8) if operation == "dropped_product" else 64 * 64
    assert draws_a_number(launch, tile) <= 20 / 8
    assert not re.search(r"\b(atom|red)\.", launch.ptx)  # whose order changes from run to run


SEGMENTED = ("shrink", "expand")


def segmented_launch(operation: str, rows: int, r: int, transposed: bool, dtype, card: str) -> CompiledLaunch:
    """The kernel of a mixture of two adapters and the base model, compiled for a card."""
    from minilora.kernels import segmented

    segments = Segments(empty(rows, dtype=torch.int64), (0, rows // 2, rows - 1, rows))
    x, factor = empty(rows, WIDTH, dtype=dtype), empty(WIDTH, r).T if transposed else empty(r, WIDTH)
    with compiled_launches(segmented, CARDS[card]) as launches:
        if operation == "shrink":
            segmented.shrink(x, [factor, None, factor], [1.0] * 3, segments)
        else:
            segmented.expand(x, empty(rows, r, dtype=dtype), [factor.T, None, factor.T], segments)
    (launch,) = (launch for launch in launches.values() if launch.ptx)
    return launch


@pytest.mark.parametrize(("card", "dtype"), [*USUAL, ("A100", torch.float32)])
@pytest.mark.parametrize("r", [1, 16, 64])
@pytest.mark.parametrize("operation", SEGMENTED)
def test_short_segments_compile_for_every_card_without_tensor_cores(operation, r, dtype, card):
    """Without spills, as CompiledLaunch asserts; and factors are read 16 bytes at a time."""
    for transposed in (False, True):
        ptx = segmented_launch(operation, 4, r, transposed, dtype, card).ptx
        assert "mma" not in ptx and "fma.rn.f32" in ptx and not re.search(r"\b(atom|red)\.", ptx)
        assert len(re.findall(r"ld\.global\.v4\.b32", ptx)) >= 4
    assert segmented_launch(operation, 4, 3, True, dtype, card).ptx  # a rank that 16 bytes do not divide


@pytest.mark.parametrize("card", ["A100", "H100"])
@pytest.mark.parametrize("r", [1, 16, 64, 200])
@pytest.mark.parametrize("operation", SEGMENTED)
def test_long_segments_use_tensor_cores(operation, r, card):
    for transposed in (False, True):
        for dtype in (torch.float16, torch.bfloat16):
            ptx = segmented_launch(operation, 256, r, transposed, dtype, card).ptx
            assert re.search(r"\bmma\S*\.f32\.b?f16\.b?f16", ptx)  # sums in float32
            assert not re.search(r"\b(atom|red)\.", ptx)  # whose order changes from run to run
            assert "cp.async.cg.shared.global" in ptx  # which takes 16 bytes


def test_only_the_products_with_dropout_inside_and_long_segments_need_tensor_cores():
    """So nothing that a T4 runs has a `tl.dot`, for which Triton has no tensor cores there."""
    from minilora.kernels import operations

    assert {*operations.__all__} == {*EVERYWHERE, *ON_TENSOR_CORES, *SEGMENTED, "cross_entropy"}
    text = "".join(path.read_text() for path in (ROOT / "kernels").glob("*.py"))
    functions = re.findall(r"^def (\w+)\(((?:.*\n)+?)(?=\n\n\S|\Z)", text, re.MULTILINE)
    assert {name for name, body in functions if "tl.dot(" in body} == {
        f"{name}_kernel" for name in (*ON_TENSOR_CORES, *(f"{name}_tiles" for name in SEGMENTED))
    }


def test_a_t4_and_float32_take_the_definitions_of_products_with_dropout_inside():
    from minilora.kernels import operations

    for capability, dtype, fused in (
        ((7, 5), torch.float16, False), ((8, 0), torch.float32, False), ((8, 0), torch.bfloat16, True),
    ):  # fmt: skip
        with PretendedGpu(capability):
            x = torch.ones(4, dtype=dtype, device="cuda")
            for operation in ON_TENSOR_CORES:
                definition = getattr(dropout, f"{operation}_definition")
                expected = getattr(operations, operation) if fused else definition
                assert fastest(operation, x, definition) is expected
            assert fastest("swiglu", x, ops.swiglu_definition) is operations.swiglu
            other = torch.add  # what the kernel does not agree with is what runs
            assert fastest("swiglu", x, other) is other
            assert fastest("swiglu", x.double(), print) is print
            assert fastest("an operation without a kernel", x, print) is print


@pytest.fixture
def compile_4bit(monkeypatch):
    """A function that returns the PTX that quantize, dequantize or gemv launch for a weight of some shape."""
    from minilora.kernels import nf4

    def compile_launch(
        operation: str, shape: tuple[int, int], dtype, card: str, blocksize=64, double_quant=False, rank=0
    ) -> str:
        n = shape[0] * shape[1]
        blocks = -(-n // blocksize)
        packed, absmax = (
            empty((n + 1) // 2, dtype=torch.uint8),
            empty(blocks, dtype=torch.uint8 if double_quant else torch.float32),
        )
        nested = (empty(-(-blocks // 256)), empty(256), empty()) if double_quant else (None, None, None)
        q = SimpleNamespace(packed=packed, absmax=absmax, code=empty(16), blocksize=blocksize, shape=shape)
        q.nested_absmax, q.nested_code, q.offset = nested
        launch = CompiledLaunch(getattr(nf4, f"{operation}_kernel"), CARDS[card])
        with monkeypatch.context() as patch:
            patch.setattr(nf4, f"{operation}_kernel", launch)
            if operation == "quantize":
                symbols = empty(16, dtype=torch.uint8)
                nf4.quantize(empty(n, dtype=dtype), empty(15), symbols, blocksize, packed, absmax)
            elif operation == "dequantize":
                nf4.dequantize(q, empty(n, dtype=dtype))
            else:
                x, out, bias = (empty(n, dtype=dtype) for n in (shape[1], shape[0], shape[0]))
                update = (empty(rank), empty(shape[0], rank)) if rank else None
                nf4.gemv(q, x, out, bias if rank else None, update)
        assert launch.ptx
        return launch.ptx

    return compile_launch


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_4bit_kernels_compile_for_every_card_without_spills(card, dtype, compile_4bit):
    group = 4 if dtype == torch.float32 else 8
    for double_quant in (False, True):
        ptx = compile_4bit("dequantize", (4096, 4096), dtype, card, double_quant=double_quant)
        assert set(re.findall(r"st\.global\S*", ptx)) == {"st.global.v4.b32"}  # 16 bytes a thread, always
        assert f"ld.global.b{4 * group}" in ptx  # and the bytes of their symbols in one load
        assert "fma" not in ptx  # a scale is rounded twice
    ptx = compile_4bit("quantize", (4096, 4096), dtype, card)
    assert set(re.findall(r"div\S*f32", ptx)) == {f"div.rn{FTZ}.f32"}  # correctly rounded
    assert "fma" not in ptx
    ptx = compile_4bit("gemv", (4096, 4096), dtype, card, double_quant=True)
    assert "ld.global.v4.b32" in ptx  # of x
    compile_4bit("gemv", (5, 4097), dtype, card)
    assert compile_4bit("gemv", (4096, 4096), dtype, card, double_quant=True, rank=16)


@pytest.mark.parametrize("blocksize", [32, 4096])
@pytest.mark.parametrize(
    "shape", [(1, 1), (2**20, 2**13 + 16)]
)  # ones are constants to Triton; the second has over 2^33 elements
def test_4bit_kernels_compile_for_the_smallest_and_the_largest_weights(shape, blocksize, compile_4bit):
    for operation in ("quantize", "dequantize", "gemv"):
        assert compile_4bit(operation, shape, torch.float16, "T4", blocksize)
    assert compile_4bit("gemv", shape, torch.float16, "T4", blocksize, rank=1 if shape == (1, 1) else 100)


@pytest.mark.parametrize("card", CARDS)
def test_8bit_adamw_compiles_for_every_card_without_spills(card):
    from minilora.kernels import adamw_8bit as module

    pointers = dict(
        tensors_ptr="*i64", code_m_ptr="*fp32", code_v_ptr="*fp32", nearest_m_ptr="*u8", nearest_v_ptr="*u8"
    )
    kernel = module.adamw_8bit_kernel
    signature = {name: pointers.get(name, "fp32") for name in kernel.arg_names if name != "BLOCK"}
    compiled, report = compile_ahead(
        kernel,
        signature,
        {"BLOCK": module.BLOCK},
        CARDS[card],
        aligned=tuple(pointers),
        enable_fp_fusion=False,
    )
    assert re.findall(r"(\d+) bytes spill", report) == ["0", "0"], report
    assert compiled.metadata.shared <= 64 * 1024  # all that a T4 has
    ptx = compiled.asm["ptx"]
    for operation in ("div", "sqrt"):  # correctly rounded
        assert set(re.findall(rf"{operation}\.\S*f32", ptx)) == {f"{operation}.rn{FTZ}.f32"}
    assert FTZ or "ftz" not in ptx  # subnormals are kept
    assert len(re.findall(r"fma\.rn\.f32", ptx)) == 4 * 256 // 128  # two moments, two steps an element


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
@pytest.mark.parametrize("n", [1, 4097, 1024 * 4096])
def test_4bit_round_trip_on_the_gpu_is_the_definition_to_the_bit(
    n, blocksize, quant_type, dtype, monkeypatch
):
    from minilora.kernels import nf4

    monkeypatch.setenv("MINILORA_BACKEND", "torch")
    x = torch.randn(n).to(dtype)
    x[n // 2 : n // 2 + blocksize] = 0
    code = four_bit_code(quant_type)
    expected = quantize_4bit(x, quant_type, blocksize, double_quant=False)
    packed, absmax = (torch.empty_like(t, device="cuda") for t in (expected.packed, expected.absmax))
    bounds, symbols = (t.cuda() for t in nearest_code_bounds(code))
    nf4.quantize(x.cuda(), bounds, symbols, blocksize, packed, absmax)
    assert torch.equal(packed.cpu(), expected.packed) and torch.equal(absmax.cpu(), expected.absmax)
    for double_quant in (False, True):
        q = quantize_4bit(x, quant_type, blocksize, double_quant)
        out = torch.empty(n, dtype=dtype, device="cuda")
        nf4.dequantize(q.to("cuda"), out)
        assert torch.equal(out.cpu(), q.dequantize())


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (1024, 4096), (4096, 14336), (33, 4097)])
def test_4bit_matrix_vector_product_on_the_gpu_is_the_dequantized_one(shape, dtype, monkeypatch):
    from minilora.kernels import nf4

    monkeypatch.setenv("MINILORA_BACKEND", "torch")
    q, x = quantize_4bit(torch.randn(shape)), torch.randn(shape[1]).to(dtype)
    weight = q.dequantize().double()
    out = torch.empty(shape[0], dtype=dtype, device="cuda")
    nf4.gemv(q.to("cuda"), x.cuda(), out)
    expected, terms = weight @ x.double(), weight.abs() @ x.double().abs()
    bound = (31 + shape[1] / 2048) * 2**-24 * terms + torch.finfo(
        dtype
    ).eps / 2 * expected.abs()  # see interpreted_kernels.py
    assert ((out.cpu().double() - expected).abs() <= bound).all()


@pytest.mark.gpu
@needs_gpu
def test_4bit_dequantization_on_the_gpu_reaches_past_2_to_the_31_elements():
    from minilora.kernels import nf4

    n = 2**31 + 4096 + 3
    if torch.cuda.mem_get_info()[0] < 8 * 2**30:
        pytest.skip("needs 8 GB of GPU memory")
    packed = torch.full(((n + 1) // 2,), 0x5F, dtype=torch.uint8, device="cuda")
    absmax, out = torch.ones(-(-n // 64), device="cuda"), torch.zeros(n, dtype=torch.float16, device="cuda")
    q = SimpleNamespace(packed=packed, absmax=absmax, code=torch.arange(16.0, device="cuda"), blocksize=64)
    q.nested_absmax = q.nested_code = q.offset = None
    nf4.dequantize(q, out)
    assert (out[0::2] == 5).all() and (out[1::2] == 15).all()


@pytest.mark.gpu
@needs_gpu
def test_8bit_adamw_on_the_gpu_is_the_definition_to_the_bit(monkeypatch):
    from minilora.kernels.adamw_8bit import adamw_8bit

    monkeypatch.setenv("MINILORA_BACKEND", "torch")
    codes = dynamic_code(True), dynamic_code(False)
    nearest = tuple(map(nearest_of_steps, codes))
    sides = [], []
    for n in (1, 4099, 32768, 1_000_003):
        p = torch.randn(n)
        for tensors, device in zip(sides, ("cpu", "cuda"), strict=True):
            moments = [
                torch.zeros(size, dtype=dtype)
                for size, dtype in ((n, torch.uint8), (-(-n // 256), torch.float32)) * 2
            ]
            tensors.append(tuple(part.to(device, copy=True) for part in (p, torch.zeros(n), *moments)))
    on_gpu = [tuple(t.cuda() for t in pair) for pair in (codes, nearest)]
    for step in range(1, 11):
        settings = 1e-2 / step, (0.9, 0.999), 1e-8, 0.1, step
        for i, (mine, other) in enumerate(zip(*sides, strict=True)):
            mine[1].normal_().mul_(10.0 ** (-3 * i))[512:600] = 0
            other[1].copy_(mine[1])
        optim.adamw_8bit(sides[0], *settings)
        adamw_8bit(sides[1], *on_gpu, optim._scalars(*settings))
    for mine, other in zip(*sides, strict=True):
        assert all(torch.equal(one, two.cpu()) for one, two in zip(mine, other, strict=True))
