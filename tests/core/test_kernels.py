"""Triton kernels without a GPU: interpreted against their definitions, and compiled ahead of time for the
cards that matter.
"""

import ast
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from support.project import ROOT

triton = pytest.importorskip("triton", reason="Triton is not installed (it exists for Linux only)")

from minilora import ops, optim  # noqa: E402
from minilora.backend import triton_trial  # noqa: E402
from minilora.quantization import (  # noqa: E402
    dynamic_code,
    four_bit_code,
    nearest_code_bounds,
    nearest_of_steps,
    quantize_4bit,
)

POINTER = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
# Before 3.6, Triton's correctly rounded quotients and roots take subnormal numbers for zero.
FTZ = ".ftz" if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6) else ""
CARDS = {"T4": 75, "A100": 80, "H100": 90}  # compute capability


def test_kernels_equal_their_definitions_under_the_interpreter():
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/support/interpreted_kernels.py"],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "1", "MINILORA_BACKEND": "torch"},
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert re.search(r"\d+ passed", run.stdout)


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


def compile_ahead(
    kernel,
    signature: dict[str, str],
    constants: dict,
    capability: int,
    aligned: tuple[str, ...] = (),
    **options,
):
    """Compile a kernel for a card that need not be here; the compiled kernel and what the assembler says of
    it.

    `aligned` names arguments that 16 divides, which Triton finds out by itself when a kernel is launched.
    """
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource

    divisible = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constants, divisible)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    for_capability = [capability] if inspect.signature(get_ptxas).parameters else []  # from Triton 3.6 on
    assembler = get_ptxas(*for_capability)
    ptxas = assembler[0] if isinstance(assembler, tuple) else assembler.path  # up to 3.6: path, version
    arch = f"sm_{capability}a" if capability >= 90 else f"sm_{capability}"
    verbose = [ptxas, "-v", f"--gpu-name={arch}", "-o", os.devnull, "/dev/stdin"]
    report = subprocess.run(verbose, input=compiled.asm["ptx"], capture_output=True, text=True)
    assert report.returncode == 0, report.stderr
    return compiled, report.stderr


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("dtype", POINTER)
@pytest.mark.parametrize("D", [128, 4096, 8192])
def test_rms_norm_compiles_for_every_card_without_spills(card, dtype, D):
    from minilora.kernels import rms_norm as module

    block = triton.next_power_of_2(D)
    float_pointers = dict.fromkeys(("x_ptr", "weight_ptr", "y_ptr", "dy_ptr", "dx_ptr"), POINTER[dtype])
    types = float_pointers | {"inv_rms_ptr": "*fp32", "D": "i32", "eps": "fp32"}
    for kernel in (module.rms_norm_forward_kernel, module.rms_norm_backward_kernel):
        signature = {name: types[name] for name in kernel.arg_names if name != "BLOCK"}
        compiled, report = compile_ahead(
            kernel, signature, {"BLOCK": block}, CARDS[card], num_warps=module.warps(block)
        )
        assert re.findall(r"(\d+) bytes spill", report) == ["0", "0"], report
        assert compiled.metadata.shared <= 64 * 1024  # all that a T4 has
        if card == "T4" and dtype == torch.float16:
            assert "bf16" not in compiled.asm["ptx"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", POINTER)
def test_rms_norm_on_the_gpu_equals_the_definition(dtype, monkeypatch):
    x = torch.randn(33, 4096, device="cuda", dtype=dtype, requires_grad=True)
    weight, dy = (
        torch.randn(4096, device="cuda", dtype=dtype),
        torch.randn(33, 4096, device="cuda", dtype=dtype),
    )
    results = {}
    for backend in ("torch", "triton"):
        monkeypatch.setenv("MINILORA_BACKEND", backend)
        y = ops.rms_norm(x, weight, 1e-5)
        results[backend] = y, *torch.autograd.grad(y, x, dy)
    u = torch.finfo(dtype).eps / 2
    for one, other in zip(
        results["torch"], results["triton"], strict=True
    ):  # bounds as in tests/support/interpreted_kernels.py
        assert (one - other).abs().max() <= (6 * u + 2**-20) * one.abs().max()


class CompiledLaunch:
    """Stands in for a kernel of nf4.py: compiles it as a launch with these arguments would, for a card that
    need not be here.
    """

    def __init__(self, kernel, capability: int):
        self.kernel, self.capability, self.ptx = kernel, capability, ""

    def __getitem__(self, grid) -> "CompiledLaunch":
        return self

    def __call__(self, *arguments, **options):
        given = dict(zip(self.kernel.arg_names, arguments, strict=False)) | options
        options = {name: given.pop(name) for name in set(given) - set(self.kernel.arg_names)}
        signature, constants, aligned = {}, {}, []
        for name, value in given.items():  # as Triton sees arguments: a one and None are constants
            if isinstance(value, torch.Tensor):
                signature[name] = (POINTER | {torch.uint8: "*u8"})[value.dtype]
            elif name.isupper() or value is None or value == 1:
                constants[name] = value
                continue
            else:
                signature[name] = "i32" if value < 2**31 else "i64"
            if isinstance(value, torch.Tensor) or value % 16 == 0:
                aligned.append(name)
        compiled, report = compile_ahead(
            self.kernel, signature, constants, self.capability, tuple(aligned), **options
        )
        assert re.findall(r"(\d+) bytes spill", report) == ["0", "0"], report
        assert compiled.metadata.shared <= 64 * 1024  # all that a T4 has
        self.ptx = compiled.asm["ptx"]
        if self.capability < 80 and torch.float16 in {
            t.dtype for t in given.values() if isinstance(t, torch.Tensor)
        }:
            assert "bf16" not in self.ptx


@pytest.fixture
def compile_4bit(monkeypatch):
    """A function that returns the PTX that quantize, dequantize or gemv launch for a weight of some shape."""
    from minilora.kernels import nf4

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

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
@pytest.mark.parametrize("dtype", POINTER)
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
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", POINTER)
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
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", POINTER)
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
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
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
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
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
