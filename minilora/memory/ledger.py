"""Where the bytes of a training step go: a ledger, predicted from a configuration alone, without a weight.

Some bytes stay: packed weights and their scales, embeddings, head and norms, the adapter with its gradients
and optimizer states, the scratch buffer that layers dequantize into. The others are activations
(`activations.py` says which), and recompute policies differ in what of them forward leaves for backward:
`off` all, `full` the layers' inputs, `selective` the inputs and attention's outputs, `offload` nothing on the
GPU. Each layer may have a policy of its own: `planner.py` chooses them.

The peak is not the sum of everything, for it is not there at the same time. It is the largest of these
moments:

    loss             what forward left; hidden states and a chunk of logits
    backward         what forward left and backward has not used yet; the layer at work, run again or not;
                     gradients of earlier micro-batches
    optimizer step   no activations
    evaluation       one layer, or the loss, at a batch size of its own; nothing left, no gradients
    answers          one layer, or one new token a row; keys and values of all tokens so far

Backward frees the layers from the last to the first. With one policy for all, its first layer is the worst.

What is not a tensor is assumed, not predicted: see MARGIN and CUDA_CONTEXT.
`docs/memory.md` reads the ledger of a 7B model line by line.
"""

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from minilora import starts
from minilora.adapted import TrainedCopy
from minilora.backend.choice import form_for, product_dtype
from minilora.config import LoraConfig, ModelConfig, QuantConfig
from minilora.lora import add_lora, lora_layers, trainable_parameters
from minilora.loss import _HEAD_ROWS
from minilora.memory.activations import (
    LayerBytes,
    LossBytes,
    Widths,
    answer_bytes,
    attention_buffer_bytes,
    dropped_bytes,
    layer_bytes,
    loss_bytes,
    mask_bytes,
    widths_of,
)
from minilora.memory.allocator import HEAP_HOLES, compiled_kernel_bytes, compiles_kernels
from minilora.memory.stored_layers import InFiles, StoredLayer, dequantized_bytes, stored_layers
from minilora.model import CausalLM
from minilora.optim import MOMENT_BLOCK_SIZE, OPTIMIZERS
from minilora.recompute import POLICIES
from minilora.system.device import memory_used
from minilora.targets import EMBEDDING, OUTPUT_HEAD
from minilora.wrapping import adapted_layers, plain_name

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
    "gathered weights",  # of processes that share one model: see ranks.py
    "summed gradients",  # of several processes
    "scratch",
    "compiled kernels",  # on a CPU with bfloat16 instructions
    "layer inputs",
    "kept activations",  # beside the inputs
    "attention masks",  # of windows on a CPU, and of padding on the left
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
    policies: tuple[str, ...]  # in effect, one a layer
    flop_per_token: float  # of a training step: policies differ in it too

    @property
    def recompute(self) -> str:
        """The policies in words: `off`, or `off in 14 layers, full in 8`."""
        counts = {policy: self.policies.count(policy) for policy in POLICIES if policy in self.policies}
        if len(counts) == 1:
            return self.policies[0]
        (first, layers), *others = counts.items()
        text = f"{first} in {layers} layer{'s' * (layers > 1)}"
        return ", ".join([text, *(f"{policy} in {count}" for policy, count in others)])

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
    recompute: str | Sequence[str],  # a policy, or one for each layer
    tokens: int = 0,  # of a batch of examples of different lengths, `length` of the longest; 0: of equal ones
    optim: str = "adamw_torch",
    device: str = "cuda",
    eval_batch_size: int = 0,  # 0: nothing is evaluated
    eval_length: int = 0,  # of the longest held-out row; 0: the same length
    answers: Answers | None = None,  # after the training
    process: int = 0,  # bytes in use before the model is loaded: see `process_memory`
    row_lengths: int = 1,  # how many different ones: on some CPUs each has compiled kernels
    document_lengths: int = 1,  # the same, of documents within the rows
    heap_holes: bool = False,  # on a CPU, unless `allocator.return_freed_memory` was called
    in_files: Mapping[str, InFiles] | None = None,  # layers that the author quantized, instead of `quant`
) -> Ledger:
    """Predict training on batches of `batch_size` examples of `length` tokens, with no padding between them.
    Allocates no weight and draws no random number.

    Raises UserError for an adapter that names layers which the model does not have.
    """
    policies = _policies_in_effect(recompute, model_config.num_hidden_layers, device)
    widths = widths_of(model_config, dtype, device)
    counts = _count(model_config, lora, OUTPUT_HEAD in (in_files or ()))
    tokens, rows = tokens or batch_size * length, None
    if _multiplies_packed(dtype, device):
        prompts = answers.batch_size * answers.prompt if answers else 0
        rows = max(tokens, eval_batch_size * (eval_length or length), prompts)
    layers = stored_layers(counts.shapes, quant, in_files, widths.number)
    staying = {"process": process} | _staying_bytes(counts, layers, widths, optim, device)
    sizes = partial(_Sizes, model_config, starts.in_files(lora), counts, widths, device)  # a start doubles r
    batch = sizes(batch_size, length, tokens)
    staying["scratch"] = _scratch_bytes(batch, dequantized_bytes(layers, widths, rows, lora.use_dora))
    if compiles_kernels(dtype, device):
        attention_lengths = 0 if widths.groups else document_lengths  # a kernel of our own is none of these
        packed_weights = rows is not None and all(layer.bits == 4 for layer in layers)
        staying["compiled kernels"] = compiled_kernel_bytes(row_lengths, attention_lengths, packed_weights)
    moments = _training_moments(batch, policies)
    if eval_batch_size:
        held_out = sizes(eval_batch_size, eval_length or length)
        moments["evaluation"] = {"gradients": 0} | _evaluation_bytes(held_out)
    if answers:
        prompts = sizes(answers.batch_size, answers.prompt)
        moments["answers"] = {"gradients": 0} | _answer_bytes(prompts, answers)
    for held in moments.values() if heap_holes else ():
        activations = (size for name, size in held.items() if name not in staying)
        held["heap holes"] = int(HEAP_HOLES * sum(activations))
    return Ledger(
        {name: dict.fromkeys(CATEGORIES, 0) | staying | held for name, held in moments.items()},
        batch_size,
        length,
        policies,
        _flop_per_token(model_config, counts, length, policies),
    )


def _policies_in_effect(recompute: str | Sequence[str], layers: int, device: str) -> tuple[str, ...]:
    """Return one policy a layer, as `set_recompute` does."""
    policies = (recompute,) * layers if isinstance(recompute, str) else tuple(recompute)
    assert device in ("cuda", "cpu") and len(policies) == layers and set(policies) <= set(POLICIES)
    return tuple("full" if policy == "offload" and device == "cpu" else policy for policy in policies)


def _staying_bytes(
    counts: "_Counts", layers: Sequence[StoredLayer], widths: Widths, optim: str, device: str
) -> dict[str, int]:
    """Return the bytes that are there from the first step to the last."""
    return {
        "linear weights": sum(layer.weight for layer in layers),
        "scales": sum(layer.scales for layer in layers),
        "embeddings, head, norms": counts.rest * widths.number,
        "adapter": 4 * counts.adapter,
        "gradients": 4 * sum(counts.trainable),
        "optimizer states": sum(_state_bytes(n, optim, device) for n in counts.trainable),
    }


def _multiplies_packed(dtype: torch.dtype, device: str) -> bool:
    """Whether 4-bit weights are dequantized in a CPU's cache: see `linear._multiplies_packed`."""
    like = torch.empty(0, dtype=dtype, device="cpu")
    return device == "cpu" and form_for(like.to(product_dtype(like)), "matmul") == "c"


@dataclass(frozen=True)
class _Sizes:
    """Bytes of activations for batches of one size."""

    model_config: ModelConfig
    lora: LoraConfig
    counts: "_Counts"
    widths: Widths
    device: str
    batch_size: int
    length: int
    uneven: int = 0  # tokens, if the examples are not all of that length

    @property
    def tokens(self) -> int:
        return self.uneven or self.batch_size * self.length

    @property
    def layers(self) -> list[LayerBytes]:
        kinds = list(zip(self.counts.adapted, self.counts.copied, strict=True))
        sizes = {
            (adapted, copied): layer_bytes(
                self.model_config, self.lora, adapted, self.tokens, self.widths, copied
            )
            for adapted, copied in set(kinds)
        }
        return [sizes[kind] for kind in kinds]

    @property
    def masks(self) -> int:
        """Of training and evaluation: a GPU's kernels and the C one know windows."""
        if self.device == "cuda" or self.widths.groups:
            return 0
        return mask_bytes(self.model_config, 0, self.length, self.widths)

    @property
    def prompt_masks(self) -> int:
        """Of prompts, padded on the left."""
        rows = self.batch_size if self.batch_size > 1 else 0
        return mask_bytes(self.model_config, rows, self.length, self.widths)

    @property
    def loss(self) -> LossBytes:
        supervised = self.tokens - self.batch_size  # all but the first token of each example
        adapted, trained = not self.counts.head_is_plain, OUTPUT_HEAD in self.counts.whole
        return loss_bytes(self.model_config, adapted, supervised, self.widths, trained)

    @property
    def embedding(self) -> int:
        """Of backward's end: the gradient of an embedding that is trained whole, before it is added up."""
        c, trained = self.model_config, EMBEDDING in self.counts.whole
        return 4 * (c.vocab_size + 2 * self.tokens) * c.hidden_size if trained else 0


def _scratch_bytes(batch: _Sizes, dequantized: int) -> int:
    """Return the bytes of the buffers that layers share: one for a dequantized weight, an input with its
    zeros and what attention packs, one after the other; and what comes beside it.
    """
    c, on_cpu, beside = batch.model_config, batch.device == "cpu", 0
    largest = [dequantized]
    if batch.lora.lora_dropout and not batch.lora.use_dora:
        largest.append(dropped_bytes(c, batch.counts.adapted, batch.tokens, batch.widths))
    if on_cpu and batch.widths.groups:
        packed, beside = attention_buffer_bytes(c, batch.tokens)
        largest.append(packed)
    if on_cpu and batch.widths.product == 4:  # MKL packs about half of what the head multiplies at a time
        beside += 2 * (min(c.vocab_size, _HEAD_ROWS) if batch.widths.wide else c.vocab_size) * c.hidden_size
    return max(largest) + beside


def _training_moments(sizes: _Sizes, policies: Sequence[str]) -> dict[str, dict[str, int]]:
    """Return moment -> category -> bytes of activations."""
    loss, layers, first = sizes.loss, sizes.layers, sizes.counts.first_adapted
    D, masks = layers[-1].input, sizes.masks
    in_flight = D * min(2, policies[first:].count("offload"))  # on the GPU: one in use, one on its way
    worst = held = {"layer inputs": in_flight, "kept activations": 0, "live layer": 0}
    for layer, policy in zip(layers[first:], policies[first:], strict=True):  # below, nothing is kept
        kept, live = _kept_and_live(layer, policy)
        held = {
            "layer inputs": held["layer inputs"] + (layer.input if policy != "offload" else 0),
            "kept activations": held["kept activations"] + kept,
            "live layer": live,
        }
        worst = max(worst, held, key=lambda moment: sum(moment.values()))
    ends = {"layer inputs": in_flight, "kept activations": 0, "live layer": sizes.embedding}
    worst = max(worst, ends, key=lambda moment: sum(moment.values()))
    left = {"layer inputs": held["layer inputs"] + D, "kept activations": held["kept activations"]}
    return {
        "loss": left | {"attention masks": masks, "hidden and logits": loss.peak},
        "backward": worst | {"attention masks": masks, "hidden and logits": loss.d_hidden},
        "optimizer step": {},
    }


def _kept_and_live(layer: LayerBytes, policy: str) -> tuple[int, int]:
    """Return what a layer's forward keeps beside its input, and what its backward adds to that."""
    if policy == "off":
        return layer.kept, layer.backward
    kept = layer.attention if policy == "selective" else 0
    # Run again, it has its output once more.
    return kept, layer.kept - kept + layer.backward + layer.input + layer.gradients


def _evaluation_bytes(sizes: _Sizes) -> dict[str, int]:
    layer, logits = max(layer.alone for layer in sizes.layers) + sizes.masks, sizes.loss.alone
    if layer > logits:
        return {"live layer": layer - sizes.masks, "attention masks": sizes.masks}
    return {"hidden and logits": logits}


def _answer_bytes(prompts: _Sizes, answers: Answers) -> dict[str, int]:
    """Return category -> bytes: the pass over the prompts, or a later one over a single token a row."""
    layer, masks = max(layer.alone for layer in prompts.layers), prompts.prompt_masks
    tokens = answers.prompt + answers.new
    sizes = answers.batch_size, tokens, answers.new
    cache, token = answer_bytes(prompts.model_config, *sizes, prompts.widths)
    held = {"keys and values": cache}
    if layer + masks > token:
        return held | {"live layer": layer, "attention masks": masks}
    return held | {"hidden and logits": token}


def available_memory(device: torch.device) -> int | None:
    """Bytes of the GPU's or the main memory that are free for tensors. None: the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] - CUDA_LATER
    meminfo, limit = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")
    if not meminfo.is_file():  # macOS tells how much there is, Windows nothing
        return (
            os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2 if hasattr(os, "sysconf") else None
        )
    free = 1024 * int(
        re.search(r"^MemAvailable:\s*(\d+) kB", meminfo.read_text(encoding="utf-8"), re.MULTILINE).group(1)
    )
    text = limit.read_text(encoding="utf-8").strip() if limit.is_file() else "max"  # of a container
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

    shapes: dict[str, tuple[int, int]]  # (out, in) of the decoder's linear layers, and of a quantized head
    rest: int  # embeddings, head, norms, biases
    adapter: int
    trainable: list[int]  # of every tensor of it that learns
    adapted: list[frozenset[str]]  # of every decoder layer, the products with an adapter or a trained copy
    copied: list[int]  # of every decoder layer, the numbers of weights that are trained whole
    first_adapted: int  # the first decoder layer that backward reaches
    head_is_plain: bool  # no update, not quantized: the loss never computes its logits twice
    whole: frozenset[str]  # of the embedding and the head, those that are trained whole
    not_rerun: int  # weights of linear layers that a second run skips (see `recompute.py`)


@lru_cache
def _count(model_config: ModelConfig, lora: LoraConfig, head_is_quantized: bool) -> _Counts:
    """Built on the meta device, where tensors have shapes and no memory."""
    with torch.device("meta"):
        model = CausalLM(model_config)
    weights = {
        name: m.weight
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and (name != OUTPUT_HEAD or head_is_quantized)
    }
    rest = sum(p.numel() for p in model.parameters()) - sum(w.numel() for w in weights.values())
    add_lora(model, lora)
    layers = {plain_name(name): layer for name, layer in lora_layers(model).items()}
    changed = adapted_layers(model)
    copies = {plain_name(name): m for name, m in changed.items() if isinstance(m, TrainedCopy)}
    copies = {name: m for name, m in copies.items() if "default" in m.saved_weight}
    products = [*layers, *(name for name in copies if name in weights)]
    paths = [name.split(".") for name in products]  # model.layers.N.self_attn.q_proj
    adapted = [
        frozenset(path[-1] for path in paths if path[1:3] == ["layers", str(i)])
        for i in range(len(model.model.layers))
    ]
    with_values = layers if lora.use_dora else copies
    parts = {id(p): p.numel() for layer in changed.values() for p in layer.parts("default").values()}
    return _Counts(
        shapes={name: tuple(weight.shape) for name, weight in weights.items()},
        rest=rest,
        adapter=sum(parts.values())
        + sum(p.numel() for name, p in model.named_parameters() if ".frozen_" in name),
        trainable=[p.numel() for p in trainable_parameters(model).values()],
        adapted=adapted,
        copied=[
            sum(m.weight.numel() for name, m in copies.items() if name.startswith(f"model.layers.{i}."))
            for i in range(len(adapted))
        ],
        first_adapted=min(_first_layer(plain_name(name), len(adapted)) for name in changed),
        head_is_plain=isinstance(model.lm_head, (nn.Linear, TrainedCopy)) and not head_is_quantized,
        whole=frozenset({EMBEDDING, OUTPUT_HEAD} & copies.keys()),
        not_rerun=sum(
            w.numel() for name, w in weights.items() if name.endswith("down_proj") and name not in with_values
        ),
    )


def _first_layer(name: str, layers: int) -> int:
    """Return the first decoder layer that backward must reach for the sake of a module."""
    path = name.split(".")
    if name == EMBEDDING:
        return 0
    return int(path[2]) if path[1:2] == ["layers"] else layers


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


def _flop_per_token(c: ModelConfig, counts: _Counts, length: int, policies: Sequence[str]) -> float:
    """Return floating-point operations a token; a multiplication and an addition are two.

    Frozen matrices are multiplied in forward and for dx, an adapter's also for its own gradient. Attention's
    backward has five products to its forward's two.
    """
    linear = 2 * sum(math.prod(shape) for name, shape in counts.shapes.items() if name != OUTPUT_HEAD)
    head = 2 * c.vocab_size * c.hidden_size
    adapter, learning = 2 * counts.adapter, 2 * sum(counts.trainable)
    windows = [min(window or length, length) for window in c.layer_windows]
    keys = [w * (1 - w / (2 * length)) for w in windows]  # that a query sees, on average
    attention = [4 * count * c.num_attention_heads * c.head_dim for count in keys]  # of each layer
    products = (linear - 2 * counts.not_rerun + adapter) / len(policies)  # of a layer that runs again
    again = {"off": (0, 0), "selective": (1, 0), "full": (1, 1), "offload": (1, 1)}
    runs = [again[policy] for policy in policies]
    repeated = sum(a * products + b * one for (a, b), one in zip(runs, attention, strict=True))
    return 2 * linear + 2 * head + 2 * adapter + learning + 3.5 * sum(attention) + repeated
