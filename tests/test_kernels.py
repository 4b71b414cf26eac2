"""Triton kernels without a GPU: interpreted against their definitions, and compiled ahead of time for the cards that matter."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed (it exists for Linux only)")

from minilora import ops  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
POINTER = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
CARDS = {"T4": 75, "A100": 80, "H100": 90}  # compute capability


def test_kernels_equal_their_definitions_under_the_interpreter():
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/interpreted_kernels.py"],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "1", "MINILORA_BACKEND": "torch"},
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert re.search(r"\d+ passed", run.stdout)


def compile_ahead(kernel, signature: dict[str, str], constants: dict, capability: int, **options):
    """Compile a kernel for a card that need not be here; the compiled kernel and what the assembler says of it."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource

    source = ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assembler = get_ptxas(capability)
    ptxas = assembler[0] if isinstance(assembler, tuple) else assembler.path  # Triton 3.6 gives (path, version)
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
        compiled, report = compile_ahead(kernel, signature, {"BLOCK": block}, CARDS[card], num_warps=module.warps(block))
        assert re.findall(r"(\d+) bytes spill", report) == ["0", "0"], report
        assert compiled.metadata.shared <= 64 * 1024  # all that a T4 has
        if card == "T4" and dtype == torch.float16:
            assert "bf16" not in compiled.asm["ptx"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", POINTER)
def test_rms_norm_on_the_gpu_equals_the_definition(dtype, monkeypatch):
    x = torch.randn(33, 4096, device="cuda", dtype=dtype, requires_grad=True)
    weight, dy = torch.randn(4096, device="cuda", dtype=dtype), torch.randn(33, 4096, device="cuda", dtype=dtype)
    results = {}
    for backend in ("torch", "triton"):
        monkeypatch.setenv("MINILORA_BACKEND", backend)
        y = ops.rms_norm(x, weight, 1e-5)
        results[backend] = y, *torch.autograd.grad(y, x, dy)
    u = torch.finfo(dtype).eps / 2
    for one, other in zip(results["torch"], results["triton"], strict=True):  # bounds as in tests/interpreted_kernels.py
        assert (one - other).abs().max() <= (6 * u + 2**-20) * one.abs().max()
