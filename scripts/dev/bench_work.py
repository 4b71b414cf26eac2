"""The work of a benchmark: the examples of every step, and the time of its matrix products alone.

Examples are random rows of one length, or a data file's own: ragged, in the order of scripts/train.py. A
token is useful if it is an example's. Padding takes time and is not counted.

No step is faster than its matrix products. They are timed alone, with PyTorch and with weights that are not
quantized, at the step's own sizes. W of each layer has shape (out, in), and frozen weights need no gradient:

    forward       (rows, in)  (in, out)    and again where the policy recomputes the layer
    backward      (rows, out) (out, in)
    output head   both, for the rows whose next token is learned

Attention and the thin products of LoRA are not among them. So a step cannot reach 100 %, except with a
product of its own that is faster than PyTorch's.
"""

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from minilora import ModelConfig, load_tokenizer
from minilora.backend.choice import product_dtype
from minilora.data.chat import load_chat_template
from minilora.data.examples import Example, Order
from minilora.data.rows import read_rows
from minilora.quantization import quantize_4bit
from minilora.run.datasets import tokenize_rows
from minilora.system.device import Placement

# ---- the examples of every step ----------------------------------------------------------------------------


def steps_of(options: argparse.Namespace, config: ModelConfig) -> list[list[Example]]:
    """Return the micro-batch of every step."""
    if options.data is None:
        return [random_rows(options, config, step) for step in range(options.steps)]
    tokenizer = load_tokenizer(options.tokenizer or options.model)
    template = load_chat_template(None, tokenizer)
    settings = dict(cutoff_len=options.tokens)
    rows = read_rows(options.data)
    examples = tokenize_rows(rows, options.data, settings, config, tokenizer, template).examples
    order = Order([len(e.input_ids) for e in examples], options.batch, accumulation=1, seed=0)
    return [[examples[i] for i in order.batches(step)[0]] for step in range(options.steps)]


def random_rows(options: argparse.Namespace, config: ModelConfig, step: int) -> list[Example]:
    """Return rows of random tokens, all of them learned but the first, which nothing predicts."""
    generator, shape = torch.Generator().manual_seed(step), (options.batch, options.tokens)
    ids = torch.randint(0, config.vocab_size, shape, generator=generator).to(torch.int32).numpy()
    return [Example(row, np.arange(len(row)) > 0, (len(row),)) for row in ids]


def useful_tokens(examples: Sequence[Example]) -> int:
    """Return the tokens of the examples, without padding."""
    return sum(len(e.input_ids) for e in examples)


def longest(examples: Sequence[Example]) -> int:
    """Return the tokens of the longest example."""
    return max(len(e.input_ids) for e in examples)


def describe_steps(steps: list[list[Example]]) -> str:
    """One line on the examples of all steps."""
    lengths = [len(e.input_ids) for examples in steps for e in examples]
    padded = sum(len(examples) * longest(examples) for examples in steps)
    if padded == sum(lengths):
        return f"{len(lengths)} examples of {lengths[0]} tokens"
    text = f"{len(lengths)} examples of {min(lengths)} to {max(lengths)} tokens, {sum(lengths):,} in all"
    return f"{text}, {padded:,} when padded to the longest of each step"


# ---- the matrix products of a step, alone ------------------------------------------------------------------


def layer_shapes(config: ModelConfig) -> list[tuple[int, int]]:
    """Return (out, in) of the linear layers of one decoder layer: q k v o gate up down."""
    D, F, K = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_attention_heads * K, config.num_key_value_heads * K
    return [(queries, D), (keys, D), (keys, D), (D, queries), (F, D), (F, D), (D, F)]


class Product(NamedTuple):
    """A product of activations and a frozen weight."""

    direction: str  # "forward": x W^T, or "backward": dy W
    rows: int
    shape: tuple[int, int]  # (out, in) of W


def products_of(config: ModelConfig, policy: str, examples: list[Example]) -> Counter[Product]:
    """Return how often a step computes each product. `policy`: what is recomputed."""
    rows, learned = useful_tokens(examples), sum(e.supervised for e in examples)
    products, layers = Counter(), config.num_hidden_layers
    for i, shape in enumerate(layer_shapes(config)):
        is_qkv, is_down = i < 3, i == 6
        # Nothing in backward needs the output of down_proj, so no policy computes it again.
        products[Product("forward", rows, shape)] += layers * (1 if policy == "off" or is_down else 2)
        # The embeddings are frozen, so the first layer's q, k and v pass no gradient on.
        products[Product("backward", rows, shape)] += layers - is_qkv
    head = config.vocab_size, config.hidden_size
    return products + Counter([Product("forward", learned, head), Product("backward", learned, head)])


def time_products(
    steps: list[list[Example]], config: ModelConfig, policy: str, placement: Placement
) -> list[float]:
    """Return the seconds of each step's products alone. A product of several steps is timed once."""
    counts = [products_of(config, policy, examples) for examples in steps]
    seconds = {product: product_seconds(product, placement) for product in set().union(*counts)}
    return [sum(times * seconds[product] for product, times in count.items()) for count in counts]


def product_seconds(product: Product, placement: Placement) -> float:
    """Return the time of one product of random matrices, in the dtype that minilora multiplies in."""
    dtype, device = multiplied_dtype(placement), placement.device
    weight = torch.randn(product.shape, device=device).to(dtype)
    weight = weight.T if product.direction == "forward" else weight
    x = torch.randn(product.rows, weight.shape[0], device=device).to(dtype)
    y = torch.empty(product.rows, weight.shape[1], dtype=dtype, device=device)
    return median_seconds(lambda: torch.mm(x, weight, out=y), device, calls=5)


def multiplied_dtype(placement: Placement) -> torch.dtype:
    """Return the dtype of minilora's products there."""
    return product_dtype(torch.empty(0, dtype=placement.dtype, device=placement.device))


def dequantized_bytes_per_second(config: ModelConfig, placement: Placement) -> float:
    """Return the rate at which a layer's largest weight is dequantized, in bytes read and written."""
    device, shape = placement.device, (config.intermediate_size, config.hidden_size)
    q = quantize_4bit(torch.randn(shape, device=device).to(placement.dtype))
    weight = torch.empty(shape, dtype=multiplied_dtype(placement), device=device)
    return (q.nbytes + weight.nbytes) / median_seconds(lambda: q.dequantize(out=weight), device)


# ---- clocks ------------------------------------------------------------------------------------------------


def median_seconds(function: Callable, device: torch.device, calls: int = 10) -> float:
    """Return the median time of some calls, after two that warm up.

    On a GPU events take the time there. A kernel of 55 microseconds takes less than to wait for it.
    """
    for _ in range(2):
        function()
    if device.type == "cuda":
        return statistics.median(event_seconds(function, device, calls))
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def event_seconds(function: Callable, device: torch.device, calls: int) -> list[float]:
    """Return the time of each call on the GPU. The host waits once, at the end."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * calls)]
    with torch.cuda.device(device):
        for start, end in zip(events[::2], events[1::2], strict=True):
            start.record()
            function()
            end.record()
        torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1000 for start, end in zip(events[::2], events[1::2], strict=True)]
