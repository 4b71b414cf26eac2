"""The environment, and which of PyTorch's fused attentions runs for what minilora asks.

Training calls one of two kernels itself, by card, dtype and head size (backend/attention.py). They are not
part of PyTorch's documented interface, so their results are compared with the definition here. Decoding
leaves the choice to PyTorch. A kernel may need time for each length that it has not seen: batches of ever new
lengths then pay for it at every step.
"""

import os
import shutil
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gpu_sections.card import Card, Stopwatch
from gpu_sections.gradients import relative_difference
from gpu_sections.section import Check
from minilora import ops
from minilora.backend.attention import fused_form
from minilora.backend.choice import form_for
from minilora.backend.documents import Documents, documents_of_ids, documents_of_rows

PACKAGES = "torch triton transformers peft bitsandbytes".split()
NEW_LENGTHS = 10
ERROR = 4  # roundings; float32 may be multiplied in TF32, of 11 significand bits


def environment(check: Check) -> None:
    """What the other figures depend on, and the two rates that they are compared with."""
    stopwatch, card = Stopwatch(check.tiny), check.card
    free, total = torch.cuda.mem_get_info()
    check.row(fact="compute capability", value=".".join(map(str, card.capability)))
    check.row(fact="memory, free of all, GiB", value=f"{free / 2**30:.2f} of {total / 2**30:.2f}")
    check.row(fact="driver", value=_driver())
    check.row(fact="CUDA, cuDNN", value=f"{torch.version.cuda}, {torch.backends.cudnn.version()}")
    check.row(
        fact="C compiler, which Triton needs", value=shutil.which("cc") or shutil.which("gcc") or "none"
    )
    check.row(fact="CPU cores", value=os.cpu_count())
    x = torch.ones(1, device=card.device, dtype=card.dtype)
    check.row(fact="form of the 4-bit operations", value=form_for(x, "dequantize"))
    check.row(rate="copy, GB/s read and written", value=stopwatch.copy_rate() / 1e9)
    for dtype in dtypes(card):
        check.row(rate=f"large {name_of(dtype)} product, TFLOP/s", value=stopwatch.product_rate(dtype) / 1e12)


def _driver() -> str:
    """Return the driver's version, as nvidia-smi tells it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "nvidia-smi does not tell"
    return done.stdout.split("\n")[0] or "nvidia-smi does not tell"


def versions() -> str:
    """Return the versions of the packages that matter, for people."""
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"no {name}")
    return ", ".join(found)


def dtypes(card: Card) -> list[torch.dtype]:
    """Return the dtypes in which models train on the card, its own 16-bit one first."""
    modern = card.capability >= (8, 0) and not card.emulates_t4
    return [card.dtype, *(torch.float16,) * modern, torch.float32]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def attention(check: Check) -> None:
    """Which attention runs for each dtype, how near its results are, and what a new length costs."""
    length = 64 if check.tiny else 1024
    for dtype in dtypes(check.card):
        name, bound = name_of(dtype), ERROR * max(torch.finfo(dtype).eps, 2**-11)
        q, k, v = _queries_keys_values(check, length, dtype)
        for rows, documents in _documents(q).items():
            form, error = fused_form(q[0], k[0], ops.DEFINITION), _error(q, k, v, documents)
            check.row(dtype=name, rows=rows, attention=form.name, error=error)
            check.claim(f"attention computes its definition in {name}, {rows}", error <= bound)
            if dtype == check.card.dtype:
                check.claim(f"attention is fused in {name}, {rows}", form != ops.DEFINITION)
        q, k, v = (t.transpose(1, 2) for t in (q[:, -1:], k, v))
        check.row(dtype=name, rows="decoding", attention=chosen_attention(q, k, v, None))
    first, again = _cost_of_new_lengths(check, length)
    check.row(lengths="never seen before, forward and backward, ms", slowest=max(first), fastest=min(first))
    check.row(lengths="seen before, forward and backward, ms", slowest=max(again), fastest=min(again))


def _documents(q: Tensor) -> dict[str, Documents]:
    """Return the documents of rows like q's, by the name of their kind."""
    Bt, T = q.shape[:2]
    ids = torch.arange(T).expand(Bt, -1) // (T // 4)
    packed, causal = documents_of_ids(ids, q.device), documents_of_rows(Bt, T, q.device)
    return {"causal": causal, "packed": packed, "windowed": causal.within(T // 8)}


def _queries_keys_values(check: Check, length: int, dtype: torch.dtype) -> list[Tensor]:
    """Return random q (Bt, T, H, K) and k, v (Bt, T, G, K) of Mistral-7B's shape that need gradients."""
    batch, heads, groups, size = (1, 4, 2, 16) if check.tiny else (4, 32, 8, 128)
    like = dict(device=check.card.device, dtype=dtype, requires_grad=True)
    return [torch.randn(batch, length, n, size, **like) for n in (heads, groups, groups)]


def _error(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> float:
    """Return the largest difference of output and gradients from the definition's in float32, by norms."""
    dy, found = torch.randn_like(q), ops.document_attention(q, k, v, documents)
    found = [found, *torch.autograd.grad(found, (q, k, v), dy)]
    rows = [documents.take(t.detach()).float() for t in (q, k, v, dy)]
    y, lse = ops.DEFINITION.forward(*rows[:3], documents)
    expected = [y, *ops.DEFINITION.backward(rows[3], *rows[:3], y, lse, documents)]
    pairs = zip(map(documents.take, found), expected, strict=True)
    return max(relative_difference(a.detach().float(), b) for a, b in pairs)


def chosen_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> str:
    """Return PyTorch's name of the fused attention that it takes, or 'not fused'."""
    with _Names() as names:
        ops.attention(q, k, v, mask)
    fused = [name for name in names.seen if name.startswith("_scaled_dot_product_") and "math" not in name]
    return fused[0].removeprefix("_scaled_dot_product_") if fused else "not fused"


class _Names(TorchDispatchMode):
    """Collect the names of the operations below autograd."""

    def __init__(self):
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        self.seen.append(operation.overloadpacket.__name__)
        return operation(*arguments, **(options or {}))


def _cost_of_new_lengths(check: Check, length: int) -> tuple[list[float], list[float]]:
    """Return the milliseconds of each of ten new lengths: the first time, and the second."""
    _forward_and_backward(check, length)
    lengths = range(length - NEW_LENGTHS - 1, length - 1)
    return tuple([_forward_and_backward(check, n) for n in lengths] for _ in range(2))


def _forward_and_backward(check: Check, length: int) -> float:
    """Return the milliseconds of attention over so many tokens, as the host sees them."""
    q, k, v = _queries_keys_values(check, length, check.card.dtype)
    torch.cuda.synchronize()
    began = time.perf_counter()
    ops.document_attention(q, k, v, documents_of_rows(*q.shape[:2], q.device)).sum().backward()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - began)
