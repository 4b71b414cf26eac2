"""Models of random weights, made on the card layer by layer, and steps that train them.

No file is read: 7B weights take seconds to draw and minutes to download. Their values do not matter to time
and memory. `random_weights` draws the same ones for minilora and for the usual stack, so that both compute
the same loss.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from gpu_sections.card import Card, empty_memory
from minilora.config import LoraConfig, ModelConfig
from minilora.data.examples import Example, batch_for, count_supervised
from minilora.formats.config_json import parse_config
from minilora.linear import Linear4bit
from minilora.lora import add_lora, trainable_parameters
from minilora.loss import causal_lm_loss
from minilora.loss_scale import LossScale
from minilora.model import CausalLM
from minilora.optim import make_optimizer
from minilora.quantization import quantize_4bit
from minilora.targets import OUTPUT_HEAD

MISTRAL_7B = dict(
    model_type="mistral",
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=32768,
    sliding_window=None,
)
TINY = MISTRAL_7B | dict(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
LORA = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear")
ENOUGH = 5.0  # seconds of steps, on a card that takes seconds for one
OPTIMIZER = dict(lr=1e-4, weight_decay=0.0)


def random_weights(config: ModelConfig, card: Card) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter's name, which is Hugging Face's, and its value, one at a time.

    A linear layer keeps the size of its inputs: its weights are normal with a deviation of 1 / sqrt(in).
    """
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in CausalLM(config).named_parameters()}
    generator = torch.Generator(card.device).manual_seed(0)
    for name, shape in shapes.items():
        if len(shape) == 1:
            yield name, torch.ones(shape, dtype=card.dtype, device=card.device)
        else:
            values = torch.randn(shape, generator=generator, device=card.device)
            yield name, values.mul_(shape[1] ** -0.5).to(card.dtype)


def random_model(sizes: dict, card: Card) -> CausalLM:
    """Return a model of these sizes, its linear layers in NF4."""
    config = parse_config(sizes)
    with torch.device("meta"):
        model = CausalLM(config)
    for name, value in random_weights(config, card):
        parent, _, leaf = name.rpartition(".")
        layer = model.get_submodule(parent)
        if isinstance(layer, nn.Linear) and parent != OUTPUT_HEAD:
            model.set_submodule(parent, Linear4bit(quantize_4bit(value)))
        else:
            setattr(layer, leaf, nn.Parameter(value, requires_grad=False))
    return model.eval()


def random_ids(sizes: dict, batch: int, length: int, seed: int = 0) -> Tensor:
    """Return token ids, (Bt, T), on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, sizes["vocab_size"], (batch, length), generator=generator)


def random_rows(sizes: dict, batch: int, length: int, documents: int = 1) -> list[Example]:
    """Return rows of `length` tokens, each of so many packed examples of equal length, all to be learned."""
    lengths = (length // documents,) * documents
    learned = np.arange(length) % lengths[0] > 0  # all but the first tokens, which nothing predicts
    ids = random_ids(sizes, batch, length).to(torch.int32).numpy()
    return [Example(row, learned, lengths) for row in ids]


def mean_loss(model: CausalLM, ids: Tensor, labels: Tensor, documents: Tensor | None) -> Tensor:
    """Return the mean loss of the supervised tokens, () float32."""
    return causal_lm_loss(model, ids, labels, documents) / count_supervised(labels)


@dataclass(frozen=True)
class Side:
    """A model ready to train: ours, or the usual stack's."""

    loss_of: Callable[..., Tensor]  # ids, labels, documents, each (Bt, T) -> the mean loss
    trainable: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    scale: LossScale
    device: torch.device
    padding_free: bool = True  # its batches are one row, of examples end to end

    def step(self, rows: list[Example]) -> tuple[float, float]:
        """Take a step as scripts/train.py does. Returns the loss, and the host's seconds before it waits."""
        began = time.perf_counter()
        loss = self.loss_of(*batch_for(self.device, rows, pad_id=0, padding_free=self.padding_free))
        self.scale.backward(loss)
        host = time.perf_counter() - began
        self.scale.unscale(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.trainable, 1.0)
        value, _ = self.scale.step(self.optimizer, loss.detach(), norm)
        self.optimizer.zero_grad(set_to_none=True)
        return value, host


def our_side(model: CausalLM, card: Card) -> Side:
    """Return minilora's side, with a new adapter on the model."""
    torch.manual_seed(1)
    add_lora(model, LORA)
    named = trainable_parameters(model.train())
    optimizer = make_optimizer("adamw_8bit", named, **OPTIMIZER)
    return Side(partial(mean_loss, model), list(named.values()), optimizer, loss_scale(card), card.device)


def loss_scale(card: Card) -> LossScale:
    return LossScale(card.device, enabled=card.dtype == torch.float16)


@dataclass(frozen=True)
class Measured:
    """A training step."""

    loss: float  # of the first step
    seconds: float
    host_seconds: float  # until forward and backward are queued
    allocated: int  # bytes, the peak
    reserved: int


def measure(side: Side, rows: list[Example], repeat: int) -> Measured | None:
    """Return the median step of at most `repeat`, after one that warms up; None if memory runs out."""
    empty_memory()
    times = []
    try:
        loss, _ = side.step(rows)
        while len(times) < repeat and sum(seconds for seconds, _ in times) < ENOUGH:
            times.append(_timed(side, rows))
    except torch.OutOfMemoryError:
        times = []  # The error holds the activations, until this block ends.
    side.optimizer.zero_grad(set_to_none=True)
    if not times:
        empty_memory()
        return None
    seconds, host = (statistics.median(column) for column in zip(*times, strict=True))
    peaks = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return Measured(loss, seconds, host, *peaks)


def _timed(side: Side, rows: list[Example]) -> tuple[float, float]:
    """Return the seconds of a step, and the host's."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    _, host = side.step(rows)
    torch.cuda.synchronize()
    return time.perf_counter() - began, host
