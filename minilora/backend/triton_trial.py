"""Do the Triton kernels run on this GPU? One of them tries, once, and its bits are compared.

Triton compiles a kernel when it is first launched, with the user's C compiler and driver. There are many ways
in which that fails: no compiler in a slim container, a driver that is too old, a cache that cannot be
written. None of them may end a run that PyTorch's own operations can do, so the kernel gets a trial first, as
the C functions do (native.py). If it fails, one line says why, and the definitions run.
"""

from collections.abc import Callable
from functools import lru_cache
from types import SimpleNamespace

import torch
from torch import Tensor

from minilora.backend import native_trial
from minilora.backend.library import warn
from minilora.system.device import triton_problem
from minilora.system.errors import one_line


@lru_cache
def passed(device: torch.device) -> bool:
    """Whether the kernels can be used on this GPU."""
    problem = triton_problem(device) or _problem_of_a_launch(device)
    if problem:
        warn(f"4-bit weights and 8-bit AdamW are slower here, without the Triton kernels: {problem}")
    return not problem


def _problem_of_a_launch(device: torch.device) -> str:
    """Dequantize a few blocks. Return '' if the bits are the definition's, else what happened."""
    try:
        values = native_trial.dequantize_trial(_dequantize_on(device), torch.float32)
    except Exception as error:  # whatever a compiler, a driver or an installation may raise
        return f"{type(error).__name__}: {one_line(str(error))}"
    right = native_trial.digest(values) == native_trial.KNOWN_BITS["dequantize_fp32"]
    return "" if right else "a trial gave other bits than PyTorch"


def _dequantize_on(device: torch.device) -> Callable[[SimpleNamespace, Tensor], None]:
    from minilora.kernels import nf4

    def dequantize(q: SimpleNamespace, out: Tensor) -> None:
        parts = {n: part.to(device) if isinstance(part, Tensor) else part for n, part in vars(q).items()}
        parts = {"nested_code": None, "offset": None} | parts
        there = torch.empty_like(out, device=device)
        nf4.dequantize(SimpleNamespace(**parts), there)
        out.copy_(there)

    return dequantize
