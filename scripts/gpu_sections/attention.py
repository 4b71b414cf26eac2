"""The environment, and which of PyTorch's attentions it chooses for what minilora asks.

PyTorch has three fused attentions and a slow one of plain products. It chooses by card, dtype, mask and
length, and its choice decides speed, memory, and whether gradients repeat to the bit. cuDNN's makes a plan
for each length that it has not seen: batches of ever new lengths then pay for it at every step.
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
from gpu_sections.section import Check
from minilora import ops
from minilora.backend.attention_mask import additive
from minilora.backend.choice import form_for
from minilora.model import attention_mask

PACKAGES = "torch triton transformers peft bitsandbytes".split()
NEW_LENGTHS = 10


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
    """Which attention is chosen for each dtype and mask; what a new length costs."""
    length = 64 if check.tiny else 1024
    for dtype in dtypes(check.card):
        for mask, tensors in _cases(check, length, dtype).items():
            chosen = chosen_attention(*tensors)
            check.row(dtype=name_of(dtype), mask=mask, attention=chosen)
            if dtype == check.card.dtype and mask != "decoding":
                check.claim(f"attention is fused in {name_of(dtype)}, {mask}", chosen != "not fused")
    first, again = _cost_of_new_lengths(check, length)
    check.row(lengths="never seen before, forward and backward, ms", slowest=max(first), fastest=min(first))
    check.row(lengths="seen before, forward and backward, ms", slowest=max(again), fastest=min(again))


def _cases(check: Check, length: int, dtype: torch.dtype) -> dict[str, tuple[Tensor | None, ...]]:
    """Return queries, keys, values and mask of Mistral-7B's shape, by the name of the mask."""
    q, k, v = _queries_keys_values(check, length, dtype)
    documents = torch.arange(length, device=check.card.device).expand(len(q), -1) // (length // 4)
    packed = additive(attention_mask(length, length, None, documents, check.card.device), q)
    return {"causal": (q, k, v, None), "packed": (q, k, v, packed), "decoding": (q[:, :, -1:], k, v, None)}


def _queries_keys_values(check: Check, length: int, dtype: torch.dtype) -> list[Tensor]:
    """Return random q (B, H, T, K) and k, v (B, G, T, K) that need gradients."""
    batch, heads, groups, size = (1, 4, 2, 16) if check.tiny else (4, 32, 8, 128)
    like = dict(device=check.card.device, dtype=dtype, requires_grad=True)
    return [torch.randn(batch, n, length, size, **like) for n in (heads, groups, groups)]


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
    ops.attention(q, k, v, None).sum().backward()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - began)
