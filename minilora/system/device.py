"""Choose the device and the dtype to compute in, and give the reason.

    NVIDIA, compute capability >= 8 (Ampere and newer)   bfloat16
    NVIDIA, older (a T4 is 7.5)                          float16    bfloat16 is emulated, several times slower
    CPU with AVX512_BF16 or AMX                          bfloat16
    any other CPU                                        float32    CPUs have no fast products in float16

The keys `bf16` and `fp16` override this table. On a CPU, the environment variable MINILORA_CPU_DTYPE sets the
dtype of every run that requests none. MINILORA_BACKEND=torch or =triton chooses the form of the operations
(backend/choice.py). An empty variable counts as none.

This module does not call `torch.cuda.is_bf16_supported()`: it counts emulation and says yes on a T4.

The Triton kernels need compute capability 7.5 and Triton 3.4. Older cards compute with PyTorch's operations,
if PyTorch was built for them; if it was not, nothing runs there, and the GPU is refused at once.
"""

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from minilora.system.errors import UserError

TRITON = (3, 4)  # the first version with tl.gather for every layout, which the 4-bit kernels use
CAPABILITY = (7, 5)  # the first that Triton compiles for: Turing, a T4
CPU_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # the values of MINILORA_CPU_DTYPE


@dataclass(frozen=True)
class Placement:
    """The device, the dtype to compute in, and why."""

    device: torch.device
    dtype: torch.dtype
    reason: str  # for people, printed once

    def __str__(self) -> str:
        return f"{self.device.type}, {str(self.dtype).removeprefix('torch.')} ({self.reason})"


def choose_placement(bf16: bool | None = None, fp16: bool = False) -> Placement:
    """Choose the first GPU if there is one, else the CPU; and the requested dtype, else the fast one there.

    `bf16` and `fp16` mean what they mean in Hugging Face's TrainingArguments: True requests that dtype, and
    bf16=False without fp16 requests float32. With bf16=None and no fp16 the hardware decides; on a CPU
    MINILORA_CPU_DTYPE (float32 or bfloat16) overrides it.

    Raises UserError for bf16 and fp16 together, for float16 on a CPU, for an unknown MINILORA_CPU_DTYPE, for
    a GPU that PyTorch was not built for, and for a MINILORA_BACKEND that cannot run on this device: here,
    because a run comes here first.
    """
    dtype = requested_dtype(bf16, fp16)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        check_gpu(device)
    requested_backend(device)
    if device.type == "cpu" and dtype == torch.float16:
        raise UserError("fp16 needs a GPU: a CPU computes float16 more slowly than float32; leave it out")
    if dtype is not None:
        key = "fp16" if fp16 else "bf16"
        return Placement(device, dtype, f"requested by {key}" if fp16 or bf16 else "requested by bf16: false")
    return _fastest_on_gpu(device) if device.type == "cuda" else _fastest_on_cpu(device)


def requested_dtype(bf16: bool | None, fp16: bool) -> torch.dtype | None:
    """Return the dtype that the keys `bf16` and `fp16` request, or None where the hardware is to decide."""
    if bf16 and fp16:
        raise UserError("bf16 and fp16 are both set; choose one")
    if fp16:
        return torch.float16
    return {True: torch.bfloat16, False: torch.float32, None: None}[bf16]


def requested_backend(device: torch.device) -> str:
    """Return 'torch' or 'triton' if MINILORA_BACKEND says so, else ''. Raises UserError if it cannot be."""
    backend = os.environ.get("MINILORA_BACKEND", "")
    if not backend:
        return ""
    if backend not in ("torch", "triton"):
        raise UserError(f"MINILORA_BACKEND = {backend!r} is not known; choose torch or triton, or unset it")
    if backend == "triton" and (problem := triton_problem(device)):
        raise UserError(f"MINILORA_BACKEND = 'triton', but {problem}; unset it")
    interprets = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on")
    if backend == "triton" and device.type == "cpu" and not interprets:
        raise UserError(
            "MINILORA_BACKEND = 'triton' needs a GPU, and this is computed on the CPU; unset it, or set "
            "TRITON_INTERPRET=1 to run the kernels in Triton's interpreter"
        )
    return backend


def triton_problem(device: torch.device) -> str:
    """Return why the Triton kernels cannot be compiled for this device, or ''."""
    try:
        from triton import __version__ as version
    except ImportError:
        return "Triton is not installed"
    if tuple(int(number) for number in re.findall(r"\d+", version)[:2]) < TRITON:
        needed = ".".join(map(str, TRITON))
        return f"Triton {version} does not compile them, only {needed} or newer, which comes with PyTorch 2.8"
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else CAPABILITY
    if capability < CAPABILITY:
        return f"Triton does not compile for compute capability {_dotted(capability)}, only from 7.5 on"
    return ""


def check_gpu(device: torch.device) -> None:
    """Raise UserError if PyTorch was built without kernels for this GPU.

    sm_75 is machine code for capability 7.5 and for higher minor versions of 7. compute_75 is text that the
    driver compiles for any GPU from 7.5 on.
    """
    built = torch.cuda.get_arch_list()
    kinds = [(kind, int(number)) for kind, number in re.findall(r"(sm|compute)_(\d+)", " ".join(built))]
    major, minor = capability = torch.cuda.get_device_capability(device)
    here = 10 * major + minor
    if kinds and not any(n <= here and (kind == "compute" or n // 10 == major) for kind, n in kinds):
        raise UserError(
            f"{torch.cuda.get_device_name(device)} has compute capability {_dotted(capability)}, for which "
            f"this PyTorch was not built ({' '.join(built)}); install a PyTorch that was, or set "
            "CUDA_VISIBLE_DEVICES=-1 to compute on the CPU"
        )


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def _fastest_on_gpu(device: torch.device) -> Placement:
    """Return bfloat16 where the GPU has it in hardware, else float16."""
    capability = torch.cuda.get_device_capability(device)
    name = f"{torch.cuda.get_device_name(device)}, compute capability {_dotted(capability)}"
    if capability >= (8, 0):
        return Placement(device, torch.bfloat16, name)
    return Placement(device, torch.float16, name + ", which only emulates bfloat16")


def _fastest_on_cpu(device: torch.device) -> Placement:
    """Return the dtype that MINILORA_CPU_DTYPE names, else bfloat16 where the CPU has it, else float32.

    The variable chooses a dtype, it does not change the hardware: a CPU without bfloat16 instructions keeps
    bfloat16 activations, and multiplies them in float32 (backend/choice.py).
    """
    if name := os.environ.get("MINILORA_CPU_DTYPE"):
        if name not in CPU_DTYPES:
            choices = " or ".join(CPU_DTYPES)
            raise UserError(f"MINILORA_CPU_DTYPE = {name!r} is not known; choose {choices}, or unset it")
        return Placement(device, CPU_DTYPES[name], "no GPU; MINILORA_CPU_DTYPE says so")
    if feature := cpu_bfloat16_feature():
        return Placement(device, torch.bfloat16, f"no GPU; the CPU has {feature}")
    return Placement(device, torch.float32, "no GPU; the CPU has no bfloat16 instructions")


def cpu_bfloat16_feature() -> str | None:
    """Return the name of the CPU's instructions for bfloat16 products, or None if it has none.

    Only Linux can be asked. Elsewhere the answer is None, because float32 is right everywhere. Where the
    variable ONEDNN_MAX_CPU_ISA keeps PyTorch from using them, the CPU counts as one without them.
    """
    cap = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()
    if not re.search("ALL|DEFAULT|BF16|FP16|AMX|AVX10|VNNI_2", cap):
        return None
    cpuinfo = Path("/proc/cpuinfo")
    if platform.system() != "Linux" or not cpuinfo.is_file():
        return None
    line = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo.read_text(encoding="utf-8"), re.MULTILINE)
    flags = set(line.group(1).split()) if line else set()
    names = {"amx_bf16": "AMX", "avx512_bf16": "AVX512_BF16"}
    return next((name for flag, name in names.items() if flag in flags), None)


def memory_used(device: torch.device) -> int:
    """Return the peak bytes so far: of PyTorch's allocator on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():  # Linux. getrusage's figure would begin with the parent process's peak.
        return 1024 * int(
            re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(encoding="utf-8"), re.MULTILINE).group(1)
        )
    import resource  # macOS, where the figure is in bytes; Windows has no such module

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def memory_reserved(device: torch.device) -> int | None:
    """Return the peak bytes that PyTorch has taken of a GPU: in use, and holes between. On a CPU None."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None
