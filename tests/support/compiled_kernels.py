"""Triton kernels compiled ahead of time, for cards that need not be here."""

import inspect
import os
import re
import subprocess
from contextlib import contextmanager

import torch
from triton import compile as triton_compile
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

CARDS = {"T4": 75, "A100": 80, "H100": 90}  # compute capability
POINTER = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
POINTER |= {torch.uint8: "*u8", torch.int64: "*i64"}


def compile_ahead(
    kernel,
    signature: dict[str, str],
    constants: dict,
    capability: int,
    aligned: tuple[str, ...] = (),
    **options,
):
    """Compile a kernel; return it, and what the assembler says of it.

    `aligned` names arguments that 16 divides, which Triton finds out by itself when a kernel is launched.
    """
    divisible = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constants, divisible)
    compiled = triton_compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    for_capability = [capability] if inspect.signature(get_ptxas).parameters else []  # from Triton 3.6 on
    assembler = get_ptxas(*for_capability)
    ptxas = assembler[0] if isinstance(assembler, tuple) else assembler.path  # up to 3.6: path, version
    arch = f"sm_{capability}a" if capability >= 90 else f"sm_{capability}"
    verbose = [ptxas, "-v", f"--gpu-name={arch}", "-o", os.devnull, "/dev/stdin"]
    report = subprocess.run(verbose, input=compiled.asm["ptx"], capture_output=True, text=True)
    assert report.returncode == 0, report.stderr
    return compiled, report.stderr


class CompiledLaunch:
    """Stands in for a kernel: compiles it as a launch with these arguments would, and computes nothing.

    It fails where registers spill, or where a program needs more shared memory than a card of this kind has.
    """

    def __init__(self, kernel, capability: int):
        self.kernel, self.capability, self.ptx = kernel, capability, ""
        self.registers = self.shared = 0

    def __getitem__(self, grid) -> "CompiledLaunch":
        return self

    def __call__(self, *arguments, **options):
        given = dict(zip(self.kernel.arg_names, arguments, strict=False)) | options
        options = {name: given.pop(name) for name in set(given) - set(self.kernel.arg_names)}
        given = {name: given[name] for name in self.kernel.arg_names}
        signature, constants, aligned = variant(self.kernel, given)
        compiled, report = compile_ahead(
            self.kernel, signature, constants, self.capability, aligned, **options
        )
        assert re.findall(r"(\d+) bytes spill", report) == ["0", "0"], report
        self.registers, self.shared = int(re.search(r"(\d+) registers", report)[1]), compiled.metadata.shared
        assert self.shared <= (64 if self.capability < 80 else 99) * 1024  # of a T4, of an RTX 3090
        self.ptx, self.compiled = compiled.asm["ptx"], compiled
        if torch.bfloat16 not in {t.dtype for t in given.values() if isinstance(t, torch.Tensor)}:
            assert "bf16" not in self.ptx  # which a T4 does not know

    def instructions(self) -> int:
        """Return how many of the card's own instructions the kernel has, up to its end; those of a loop once."""
        words = [line.split("\t")[-1] for line in self.compiled.asm["sass"].splitlines() if ";" in line]
        return max(i for i, word in enumerate(words, 1) if word.startswith("EXIT"))


def variant(kernel, given: dict) -> tuple[dict[str, str], dict, tuple[str, ...]]:
    """Return the types, the constants and the aligned arguments that Triton sees in a launch's arguments."""
    free = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
    signature, constants, aligned = {}, {}, []
    for name, value in given.items():
        if isinstance(value, torch.Tensor):
            signature[name] = POINTER[value.dtype]
            aligned.append(name)
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif name.isupper() and len(name) > 1 or value is None or (value == 1 and name not in free):
            constants[name] = value
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0 and name not in free:
                aligned.append(name)
    return signature, constants, tuple(aligned)


@contextmanager
def compiled_launches(module, capability: int):
    """Within it, a module's functions compile their kernels in place of launching them; yields them by name."""
    names = [name for name in vars(module) if name.endswith("_kernel")]
    kernels = {name: getattr(module, name) for name in names}
    launches = {name: CompiledLaunch(kernel, capability) for name, kernel in kernels.items()}
    try:
        for name, launch in launches.items():
            setattr(module, name, launch)
        yield launches
    finally:
        for name, kernel in kernels.items():
            setattr(module, name, kernel)
