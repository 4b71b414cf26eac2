"""Which device to compute on, and in which dtype, with the reason.

    NVIDIA, compute capability >= 8 (Ampere and newer)    bfloat16
    NVIDIA, older (a T4 is 7.5)                            float16   bfloat16 is emulated there, several times slower
    CPU with AVX512_BF16 or AMX                            bfloat16
    any other CPU                                          float32   and never float16, for which CPUs have no fast products

`torch.cuda.is_bf16_supported()` is not asked: it counts emulation and says yes on a T4.
"""

import platform
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from minilora.system.errors import UserError


@dataclass(frozen=True)
class Placement:
    """Where the computing happens, in which dtype, and why."""

    device: torch.device
    dtype: torch.dtype
    reason: str  # for people, printed once

    def __str__(self) -> str:
        return f"{self.device.type}, {str(self.dtype).removeprefix('torch.')} ({self.reason})"


def choose_placement(bf16: bool = False, fp16: bool = False) -> Placement:
    """The first GPU if there is one, else the CPU, and the dtype that is fast there unless `bf16` or `fp16`
    asks for one.

    Raises UserError for both at once, and for float16 on a CPU.
    """
    if bf16 and fp16:
        raise UserError("bf16 and fp16 are both set; choose one")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and fp16:
        raise UserError(
            "fp16 needs a GPU: a CPU computes float16 ten times slower than float32; leave it out"
        )
    if bf16 or fp16:
        return Placement(
            device, torch.bfloat16 if bf16 else torch.float16, "as asked by " + ("bf16" if bf16 else "fp16")
        )
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        name = f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}"
        if major >= 8:
            return Placement(device, torch.bfloat16, name)
        return Placement(device, torch.float16, name + ", which only emulates bfloat16")
    if feature := cpu_bfloat16_feature():
        return Placement(device, torch.bfloat16, f"no GPU; the CPU has {feature}")
    return Placement(device, torch.float32, "no GPU; the CPU has no bfloat16 instructions")


def cpu_bfloat16_feature() -> str | None:
    """The name of the CPU's instructions for bfloat16 products, if it has any. Linux only: elsewhere float32
    is the safe answer.
    """
    cpuinfo = Path("/proc/cpuinfo")
    if platform.system() != "Linux" or not cpuinfo.is_file():
        return None
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo.read_text(), re.MULTILINE)
    found = set(flags.group(1).split()) if flags else set()
    return next(
        (name for flag, name in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX512_BF16")) if flag in found), None
    )


def memory_used(device: torch.device) -> int:
    """Peak bytes so far: of PyTorch's allocator on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():  # Linux; unlike getrusage's, this figure does not begin with the parent process's
        return 1024 * int(re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(), re.MULTILINE).group(1))
    import resource  # macOS, in bytes; there is none on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
