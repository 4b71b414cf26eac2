"""Where the bytes of a training step go: a ledger, predicted from a configuration alone, without a weight.

Some bytes stay: packed weights and their scales, embeddings, head and norms, the adapter with its gradients
and optimizer states, the scratch buffer that layers dequantize into. The others are activations
(`activations.py` says which), and recompute policies differ in what of them forward leaves for backward:
`off` all, `full` the layers' inputs, `selective` the inputs and attention's outputs, `offload` nothing on the
GPU.

The peak is not the sum of everything, for it is not there at the same time. It is the largest of these
moments:

    loss             what forward left; hidden states and a chunk of logits
    backward         what forward left; the last layer, run again or not; gradients of earlier micro-batches
    optimizer step   no activations
    evaluation       one layer, or the loss, at a batch size of its own; nothing left, no gradients
    answers          one layer, or one new token a row; keys and values of all tokens so far

What is not a tensor is assumed, not predicted: see MARGIN and CUDA_CONTEXT.
`docs/memory.md` reads the ledger of a 7B model line by line.
"""

import math
import os
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from minilora.backend import native
from minilora.backend.choice import form_for, product_dtype
from minilora.config import LoraConfig, ModelConfig, QuantConfig
from minilora.lora import OUTPUT_HEAD, add_lora, lora_layers, trainable_parameters
from minilora.memory.activations import (
    LayerBytes,
    LossBytes,
    Widths,
    answer_bytes,
    layer_bytes,
    loss_bytes,
    mask_bytes,
    widths_of,
)
from minilora.memory.allocator import HEAP_HOLES, compiled_kernel_bytes, compiles_kernels
from minilora.model import CausalLM
from minilora.optim import MOMENT_BLOCK_SIZE, OPTIMIZERS
from minilora.quantization import NESTED_BLOCK_SIZE
from minilora.recompute import POLICIES
from minilora.system.device import memory_used

# Assumed, as nothing predicts them. Free memory must be at least MARGIN times the predicted peak: blocks of
# different sizes leave holes, so PyTorch reserves more of a GPU than it uses.
MARGIN = 1.1
# What a process takes of a GPU beside tensors: the context, the code of kernels, the libraries' workspaces.
# Public guides say 0.3 to 1 GB. CUDA_LATER is the part of it that comes after the free memory was asked for.
CUDA_CONTEXT, CUDA_LATER = 500_000_000, 100_000_000
CATEGORIES = (
    "process",  # the program itself, on a CPU
    "linear weights",
    "scales",
    "embeddings, head, norms",
    "adapter",
    "gradients",
    "optimizer states",
    "scratch",
    "compiled kernels",  # on a CPU with bfloat16 instructions
    "layer inputs",
    "kept activations",  # beside the inputs
    "attention masks",  # of packed rows, windows or padding on the left
    "live layer",
    "hidden and logits",
    "keys and values",  # of answers
    "heap holes",  # on a CPU, unless freed memory is returned at once
)


class Answers(NamedTuple):
    """Prompts that are answered together, in tokens a row."""

    batch_size: int
    prompt: int
    new: int


@dataclass(frozen=True)
class Ledger:
    """Predicted bytes, by moment and category, of one choice of settings."""

    moments: dict[str, dict[str, int]]  # each with all of CATEGORIES, in their order
    batch_size: int
    length: int
    recompute: str  # the policy in effect
    flop_per_token: float  # of a training step: policies differ in it too

    @property
    def moment(self) -> str:
        """The name of the moment with the peak."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def bytes(self) -> dict[str, int]:
        """Bytes by category at the peak."""
        return self.moments[self.moment]

    @property
    def peak(self) -> int:
        return sum(self.bytes.values())

    def fits(self, memory: float) -> bool:
        """Whether the run will fit into so many free bytes, with a margin."""
        return MARGIN * self.peak <= memory


def memory_ledger(
    model_config: ModelConfig,
    lora: LoraConfig,
    quant: QuantConfig | None,
    *,
    batch_size: int,
    length: int,
    dtype: torch.dtype,
    recompute: str,
    optim: str = "adamw_torch",
    device: str = "cuda",
    eval_batch_size: int = 0,  # 0: nothing is evaluated
    eval_length: int = 0,  # of the longest held-out row; 0: the same length
    answers: Answers | None = None,  # after the training
    packing: bool = False,  # rows hold several examples
    process: int = 0,  # bytes in use before the model is loaded: see `process_memory`
    lengths: int = 1,  # how many different lengths rows have: on some CPUs each has compiled kernels
    heap_holes: bool = False,  # on a CPU, unless `allocator.return_freed_memory` was called
) -> Ledger:
    """Predict training on batches of (batch_size, length) tokens. Allocates no weight and draws no random
    number.

    Raises UserError for an adapter that names layers which the model does not have.
    """
    assert recompute in POLICIES and device in ("cuda", "cpu")
    recompute = "full" if recompute == "offload" and device == "cpu" else recompute  # as `set_recompute` does
    counts, widths = _count(model_config, lora), widths_of(dtype, device)
    staying = {"process": process} | _staying_bytes(counts, widths, quant, optim, device)
    packed_weights = quant is not None and quant.bits == 4 and _multiplies_packed(dtype, device)
    if packed_weights:
        prompts = answers.batch_size * answers.prompt if answers else 0
        rows = max(batch_size * length, eval_batch_size * (eval_length or length), prompts)
        staying["scratch"] = _tile_bytes(counts.shapes, rows, lora.use_dora)
    if compiles_kernels(dtype, device):
        staying["compiled kernels"] = compiled_kernel_bytes(lengths, packed_weights)
    sizes = partial(_Sizes, model_config, lora, counts, widths)
    moments = _training_moments(sizes(batch_size, length, packing), recompute)
    if device == "cpu" and widths.product == 4:  # MKL packs about half of the head's weight for its product
        head = model_config.vocab_size * model_config.hidden_size
        moments["loss"]["scratch"] = staying["scratch"] + 2 * head
    if eval_batch_size:
        held_out = sizes(eval_batch_size, eval_length or length, False)
        moments["evaluation"] = {"gradients": 0} | _evaluation_bytes(held_out)
    if answers:
        prompts = sizes(answers.batch_size, answers.prompt, answers.batch_size > 1)
        moments["answers"] = {"gradients": 0} | _answer_bytes(prompts, answers)
    for held in moments.values():
        if heap_holes:
            activations = (size for name, size in held.items() if name not in staying)
            held["heap holes"] = int(HEAP_HOLES * sum(activations))
    return Ledger(
        {name: dict.fromkeys(CATEGORIES, 0) | staying | held for name, held in moments.items()},
        batch_size,
        length,
        recompute,
        _flop_per_token(model_config, counts, length, recompute),
    )


def _staying_bytes(
    counts: "_Counts", widths: Widths, quant: QuantConfig | None, optim: str, device: str
) -> dict[str, int]:
    """Return the bytes that are there from the first step to the last."""
    stored = {shape: _stored_bytes(shape, quant, widths.number) for shape in counts.shapes}
    # A weight is dequantized before it is multiplied, int8 by way of float32; a plain one may be widened.
    scratch_number = widths.wide if quant is None else widths.product + (4 if quant.bits == 8 else 0)
    return {
        "linear weights": sum(count * stored[shape][0] for shape, count in counts.shapes.items()),
        "scales": sum(count * stored[shape][1] for shape, count in counts.shapes.items()),
        "embeddings, head, norms": counts.rest * widths.number,
        "adapter": 4 * counts.adapter,
        "gradients": 4 * sum(counts.trainable),
        "optimizer states": sum(_state_bytes(n, optim, device) for n in counts.trainable),
        "scratch": scratch_number * max(map(math.prod, counts.shapes)),
    }


def _multiplies_packed(dtype: torch.dtype, device: str) -> bool:
    """Whether 4-bit weights are dequantized in a CPU's cache: see `linear._multiplies_packed`."""
    like = torch.empty(0, dtype=dtype, device="cpu")
    return device == "cpu" and form_for(like.to(product_dtype(like)), "matmul") == "c"


def _tile_bytes(shapes: Iterable[tuple[int, int]], rows: int, use_dora: bool) -> int:
    """Return the bytes of the scratch buffer where weights are dequantized in the cache.

    It holds tiles. Only weights of other shapes, and with DoRA's norms all, are dequantized into it.
    """
    numbers = [math.prod(shape) for shape in shapes if use_dora or not native.multiplies(shape)]
    for shape in filter(native.multiplies, shapes):
        numbers += [native.tile_numbers(shape, rows, backward)[0] for backward in (False, True)]
    return 2 * max(numbers)


@dataclass(frozen=True)
class _Sizes:
    """Bytes of activations for batches of one size."""

    model_config: ModelConfig
    lora: LoraConfig
    counts: "_Counts"
    widths: Widths
    batch_size: int
    length: int
    separated: bool  # rows hold several documents, or padding on the left

    @property
    def layers(self) -> list[LayerBytes]:
        fixed = self.batch_size, self.length, self.widths
        return [layer_bytes(self.model_config, self.lora, adapted, *fixed) for adapted in self.counts.adapted]

    @property
    def masks(self) -> int:
        return mask_bytes(self.model_config, self.separated, self.batch_size, self.length, self.widths)

    @property
    def loss(self) -> LossBytes:
        head_is_adapted = self.counts.head_is_adapted
        return loss_bytes(self.model_config, head_is_adapted, self.batch_size, self.length, self.widths)


def _training_moments(sizes: _Sizes, recompute: str) -> dict[str, dict[str, int]]:
    """Return moment -> category -> bytes of activations."""
    loss, layers = sizes.loss, sizes.layers
    D = layers[-1].input
    learning = layers[sizes.counts.first_adapted :]  # below the first adapter nothing is kept
    inputs, kept = [layer.input for layer in learning], []
    # A layer that runs again has its output once more.
    live = [layer.kept + layer.backward + D for layer in learning]
    match recompute:
        case "off":
            kept, live = [layer.kept for layer in learning], [layer.backward for layer in learning]
        case "selective":
            kept = [layer.attention for layer in learning]
            live = [size - attention for size, attention in zip(live, kept, strict=True)]
        case "offload":
            inputs = inputs[:2]  # on the GPU: one in use, one on its way
    held = {"layer inputs": sum(inputs), "kept activations": sum(kept), "attention masks": sizes.masks}
    return {
        "loss": held | {"layer inputs": sum(inputs) + D, "hidden and logits": loss.peak},
        "backward": held | {"live layer": max(live, default=0), "hidden and logits": loss.d_hidden},
        "optimizer step": {},
    }


def _evaluation_bytes(sizes: _Sizes) -> dict[str, int]:
    layer, logits = max(layer.alone for layer in sizes.layers) + sizes.masks, sizes.loss.alone
    if layer > logits:
        return {"live layer": layer - sizes.masks, "attention masks": sizes.masks}
    return {"hidden and logits": logits}


def _answer_bytes(prompts: _Sizes, answers: Answers) -> dict[str, int]:
    """Return category -> bytes: the pass over the prompts, or a later one over a single token a row."""
    layer, masks = max(layer.alone for layer in prompts.layers), prompts.masks
    tokens = answers.prompt + answers.new
    cache, token = answer_bytes(prompts.model_config, answers.batch_size, tokens, prompts.widths)
    held = {"keys and values": cache}
    if layer + masks > token:
        return held | {"live layer": layer, "attention masks": masks}
    return held | {"hidden and logits": token}


def choose_recompute(memory: float | None, ledger_of: Callable[..., Ledger]) -> tuple[str, str]:
    """The fastest policy that fits into so many free bytes, and why. `ledger_of(recompute=...)`: all else is
    decided.

    Where none fits, the most frugal one: a prediction is no reason not to try.
    """
    if memory is None:
        return "full", "this system does not tell how much memory is free"
    needs, free = [], f"{memory / 2**30:.2f} GiB are free"
    for policy in POLICIES:
        ledger = ledger_of(recompute=policy)
        needs.append(f"{ledger.recompute} needs {ledger.peak / 2**30:.2f} GiB")
        if ledger.fits(memory):
            return ledger.recompute, f"{', '.join(needs)}; {free}"
    return ledger.recompute, f"even {needs[-1]}; {free}, and a tenth should be left"


def advise(memory: float, ledger_of: Callable[..., Ledger], batch_size: int, length: int) -> list[Ledger]:
    """Settings that fit into so many free bytes. `ledger_of(batch_size=..., length=..., recompute=...)`: all
    else is decided.

    First the largest micro-batch that fits: all of the batch or, as accumulation makes that the same step, an
    even part of it, with the fastest policy possible. Then smaller ones, where they are faster. If not one
    example fits: one, cut to as many times 64 tokens as do.
    """

    def fastest(size: int, tokens: int) -> Ledger | None:
        ledgers = (ledger_of(batch_size=size, length=tokens, recompute=policy) for policy in POLICIES)
        return next((ledger for ledger in ledgers if ledger.fits(memory)), None)

    found: list[Ledger] = []
    for size in (n for n in range(batch_size, 0, -1) if batch_size % n == 0):
        ledger = fastest(size, length)
        if ledger is not None and not (found and found[-1].flop_per_token <= ledger.flop_per_token):
            found.append(ledger)
    lengths = range(64, length, 64)
    fitting = bisect_left(
        lengths, True, key=lambda tokens: fastest(1, tokens) is None
    )  # a longer row needs more
    return found or [fastest(1, tokens) for tokens in lengths[:fitting][-1:]]


def available_memory(device: torch.device) -> int | None:
    """Bytes of the GPU's or the main memory that are free for tensors. None: the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] - CUDA_LATER
    meminfo, limit = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")
    if not meminfo.is_file():  # macOS tells how much there is, Windows nothing
        return (
            os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2 if hasattr(os, "sysconf") else None
        )
    free = 1024 * int(re.search(r"^MemAvailable:\s*(\d+) kB", meminfo.read_text(), re.MULTILINE).group(1))
    text = limit.read_text().strip() if limit.is_file() else "max"  # of a container
    return free if text == "max" else min(free, int(text))


def process_memory() -> int:
    """Bytes of this process on a CPU before it holds a model, with what PyTorch loads at the first backward
    and optimizer step.
    """
    parameter = nn.Parameter(torch.zeros(64, 64))
    (parameter @ parameter).sum().backward()
    torch.optim.AdamW([parameter], lr=0.0, fused=True).step()
    return memory_used(torch.device("cpu"))


class _Counts(NamedTuple):
    """How many numbers there are of everything."""

    shapes: Counter[tuple[int, int]]  # of the decoder's linear layers: how many have which (out, in)
    rest: int  # embeddings, head, norms, biases
    adapter: int
    trainable: list[int]  # of every tensor of it that learns
    adapted: list[frozenset[str]]  # of every decoder layer, the products that have an adapter
    first_adapted: int  # the first decoder layer that has any
    head_is_adapted: bool
    not_rerun: int  # weights of linear layers that a second run skips (see `recompute.py`)


@lru_cache
def _count(model_config: ModelConfig, lora: LoraConfig) -> _Counts:
    """Built on the meta device, where tensors have shapes and no memory."""
    with torch.device("meta"):
        model = CausalLM(model_config)
    weights = {
        name: m.weight
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and name != OUTPUT_HEAD
    }
    rest = sum(p.numel() for p in model.parameters()) - sum(w.numel() for w in weights.values())
    add_lora(model, lora)
    layers = lora_layers(model)
    paths = [name.split(".") for name in layers]  # model.layers.N.self_attn.q_proj
    adapted = [
        frozenset(path[-1] for path in paths if path[1:3] == ["layers", str(i)])
        for i in range(len(model.model.layers))
    ]
    with_values = layers if lora.use_dora else ()
    return _Counts(
        shapes=Counter(tuple(w.shape) for w in weights.values()),
        rest=rest,
        adapter=sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name),
        trainable=[p.numel() for p in trainable_parameters(model).values()],
        adapted=adapted,
        first_adapted=next((i for i, products in enumerate(adapted) if products), len(adapted)),
        head_is_adapted=OUTPUT_HEAD in layers,
        not_rerun=sum(
            w.numel() for name, w in weights.items() if name.endswith("down_proj") and name not in with_values
        ),
    )


def _stored_bytes(shape: tuple[int, int], quant: QuantConfig | None, number: int) -> tuple[int, int]:
    """Return a linear layer's bytes: weight and scales. number: bytes of one weight that is not quantized."""
    n = math.prod(shape)
    if quant is None:
        return n * number, 0
    if quant.bits == 8:
        return n, 4 * shape[0]
    blocks = -(-n // quant.blocksize)
    nested_blocks = -(-blocks // NESTED_BLOCK_SIZE)
    scales = blocks + 4 * nested_blocks + 4 if quant.double_quant else 4 * blocks
    return (n + 1) // 2, scales


def _state_bytes(n: int, optim: str, device: str) -> int:
    """Return the bytes of the two moments of n numbers (see `minilora.optim`)."""
    assert optim in OPTIMIZERS, f"the ledger does not know the moments of {optim}"
    if optim == "adamw_torch":
        return 8 * n + 4  # and a step
    if n < 4096:
        return 8 * n
    scales = 2 * 4 * -(-n // MOMENT_BLOCK_SIZE)
    paged = optim == "paged_adamw_8bit" and device == "cuda" and n >= 100_000
    return scales if paged else 2 * n + scales


def _flop_per_token(c: ModelConfig, counts: _Counts, length: int, recompute: str) -> float:
    """Return floating-point operations a token; a multiplication and an addition are two.

    Frozen matrices are multiplied in forward and for dx, an adapter's also for its own gradient. Attention's
    backward has five products to its forward's two.
    """
    linear = 2 * sum(n * math.prod(shape) for shape, n in counts.shapes.items())
    head = 2 * c.vocab_size * c.hidden_size
    adapter, learning = 2 * counts.adapter, 2 * sum(counts.trainable)
    windows = (min(window or length, length) for window in c.layer_windows)
    keys = sum(w * (1 - w / (2 * length)) for w in windows)  # that a query sees, on average
    attention = 4 * keys * c.num_attention_heads * c.head_dim
    once_more = linear - 2 * counts.not_rerun + adapter
    again = {"off": 0, "selective": once_more}.get(recompute, once_more + attention)
    return 2 * linear + 2 * head + 2 * adapter + learning + 3.5 * attention + again
