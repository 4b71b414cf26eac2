"""How fast each kernel is: bytes a second, beside the rate at which this card copies memory.

All of them are bound by memory, so the share of the copy rate says what is left to gain. Where bitsandbytes
is installed, its kernel does the same work on the same numbers. The PyTorch definition shows what a kernel
is for.
"""

import os
from collections.abc import Callable
from contextlib import contextmanager
from importlib import import_module

import torch
from torch import Tensor, nn

from gpu_sections.card import Stopwatch
from gpu_sections.models import MISTRAL_7B, OPTIMIZER, TINY
from gpu_sections.operation_calls import operation_calls
from gpu_sections.section import Check
from minilora.backend.choice import form_for
from minilora.optim import AdamW8bit
from minilora.quantization import gemv_4bit, quantize_4bit

Call = Callable[[], object]
Calls = dict[str, tuple[Call, int, Call | None]]  # ours, the bytes that it moves, bitsandbytes'


def kernel_rates(check: Check) -> None:
    """Time each kernel on the largest weight, or the activations, of a layer of Mistral-7B."""
    sizes, rows = (TINY, 64) if check.tiny else (MISTRAL_7B, 4096)
    shape = sizes["intermediate_size"], sizes["hidden_size"]
    stopwatch = Stopwatch(check.tiny)
    copy_rate = stopwatch.copy_rate()
    form = form_for(torch.empty(0, device=check.card.device), "dequantize")
    check.note(f"this card copies {copy_rate / 1e9:,.0f} GB/s, read and written; our form is {form}")
    peer = bitsandbytes_or_none(check)
    found = weight_calls(check, shape, peer)
    found |= {title: (*call, None) for title, call in operation_calls(check, sizes, rows).items()}
    for title, (ours, moved, theirs) in found.items():
        ms = stopwatch(ours)
        rate = moved / ms * 1e3  # bytes a second
        row = {"kernel": title, "ms": ms, "GB/s": rate / 1e9, "share of copy": rate / copy_rate}
        with backend("torch"):
            row["definition, ms"] = stopwatch(ours)
        if theirs is not None:
            row["bitsandbytes, ms"] = stopwatch(theirs)
        check.row(**row)


def bitsandbytes_or_none(check: Check):
    """Return bitsandbytes if it works on this card; else None, with the reason in the report."""
    try:
        package = import_module("bitsandbytes")
        package.functional.quantize_4bit(torch.ones(4096, device=check.card.device), quant_type="nf4")
        return package
    except Exception as error:  # It fails in many ways, such as without a library for this CUDA.
        check.note(f"bitsandbytes was not timed: {type(error).__name__}: {error}")


@contextmanager
def backend(name: str):
    """Within it, operations take this form."""
    before = os.environ.get("MINILORA_BACKEND")
    os.environ["MINILORA_BACKEND"] = name
    try:
        yield
    finally:
        os.environ.pop("MINILORA_BACKEND")
        if before is not None:
            os.environ["MINILORA_BACKEND"] = before


def weight_calls(check: Check, shape: tuple[int, int], peer) -> Calls:
    """Return the calls on a weight of this shape, and of an optimizer."""
    weight = torch.randn(shape, device=check.card.device).to(check.card.dtype)
    return four_bit_calls(weight, peer) | optimizer_call(weight.numel() // 8, check.card.device, peer)


def four_bit_calls(weight: Tensor, peer) -> Calls:
    """Return the calls on a weight (out, in): to 4 bits, back, and times a vector."""
    q, dense, x = quantize_4bit(weight), torch.empty_like(weight), torch.randn_like(weight[0])
    theirs: dict[str, Call | None] = dict.fromkeys(("quantize", "dequantize", "gemv"))
    if peer is not None:
        f, how = peer.functional, dict(blocksize=64, quant_type="nf4", compress_statistics=True)
        packed, state = f.quantize_4bit(weight, **how)
        theirs["quantize"] = lambda: f.quantize_4bit(weight, **how)
        theirs["dequantize"] = lambda: f.dequantize_4bit(packed, state)
        theirs["gemv"] = lambda: f.gemv_4bit(x.view(1, -1), packed, state=state)
    return {
        "quantize": (lambda: quantize_4bit(weight), weight.nbytes + q.nbytes, theirs["quantize"]),
        "dequantize": (lambda: q.dequantize(out=dense), q.nbytes + dense.nbytes, theirs["dequantize"]),
        "times a vector": (lambda: gemv_4bit(q, x), q.nbytes, theirs["gemv"]),
    }


def optimizer_call(n: int, device: torch.device, peer) -> Calls:
    """Return the call of an AdamW step with 8-bit moments on eight tensors of n / 8 numbers each."""

    def steps(make: Callable) -> Call:
        parameters = [nn.Parameter(torch.randn(n // 8, device=device)) for _ in range(8)]
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        return make(parameters, **OPTIMIZER).step

    theirs = None if peer is None else steps(peer.optim.AdamW8bit)
    return {"AdamW, moments in 8 bits": (steps(AdamW8bit), 16 * (n // 8) * 8, theirs)}
