"""A layer's frozen weight in parts: how it is cut into rows, and the layers that compute with all of them.

Each rank keeps about 1/N of every weight, cut along the first dimension as `fully_shard` cuts a parameter of
M rows: ceil(M / N) rows for each rank, fewer or none for the last ones.

    plain       (out, in) in the compute dtype                  a row: an output
    8 bits      data (out, in) int8, absmax (out,) float32      a row: an output, with its scale
    4 bits      packed (M, 128 b) uint8, absmax (M, 256),       a row: 256 blocks of b weights in memory
                nested_absmax (M,) float32                      order, one block of double quantization

M = ceil(n / 256 b) for n weights: 16,384 weights a row for the usual blocks of 64.

So a rank quantizes its rows alone: no block of weights, and no block of scales, lies on two ranks. The last
row of a 4-bit weight is filled up with zeros that nobody reads. Double quantization's offset, one number a
layer, is on every rank.

In PyTorch 2.6 to 2.11, `fully_shard` asks for gradients of all its parameters, if only for a moment, and only
floating dtypes have any. So whole numbers lie in float32, four bytes in each: copied, never computed with.

While a weight is whole, it is a `QuantizedTensor`, an `Int8Tensor` or a tensor whose memory belongs to
`fully_shard`. The tensors stay the same when the memory is freed and filled again. So what an autograd
function keeps for backward is valid again as soon as the layer is gathered again.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from minilora.int8 import Int8Tensor
from minilora.linear import Linear4bit, Linear8bit, QuantizedLinear, Weight
from minilora.quantization import NESTED_BLOCK_SIZE, QuantizedTensor

META = torch.device("meta")
WORD = torch.float32  # holds whole numbers


@dataclass(frozen=True)
class Layout:
    """A weight's shape, how it is stored, and which of its rows a rank keeps."""

    shape: torch.Size  # (out, in)
    dtype: torch.dtype  # in the files; the compute dtype of a plain weight
    quant_type: str = ""  # nf4, fp4 or int8; empty: plain
    blocksize: int = 0  # of 4 bits
    double_quant: bool = False

    @property
    def in_4_bits(self) -> bool:
        return self.blocksize > 0

    @property
    def row(self) -> int:
        """Weights in a row."""
        return NESTED_BLOCK_SIZE * self.blocksize if self.in_4_bits else self.shape[1]

    @property
    def rows(self) -> int:
        return -(-self.shape.numel() // self.row)

    def rows_of(self, rank: int, count: int) -> tuple[int, int]:
        """Return the first row of a rank and the one behind its last."""
        size = -(-self.rows // count)
        return min(rank * size, self.rows), min((rank + 1) * size, self.rows)

    def parameters(self) -> dict[str, Tensor]:
        """Return the tensors to shard, on the meta device."""
        if not self.in_4_bits:
            plain = torch.int8 if self.quant_type else self.dtype
            values = {"values": torch.empty(self.shape, dtype=plain, device=META)}
            scales = {"absmax": torch.empty(self.shape[0], dtype=torch.float32, device=META)}
            return values | scales if self.quant_type else values
        kind = torch.uint8 if self.double_quant else torch.float32
        bytes_ = torch.empty(self.rows, self.row // 2, dtype=torch.uint8, device=META)
        found = {
            "packed": bytes_,
            "absmax": torch.empty(self.rows, NESTED_BLOCK_SIZE, dtype=kind, device=META),
        }
        if self.double_quant:
            found["nested_absmax"] = torch.empty(self.rows, dtype=torch.float32, device=META)
        return found

    def weight(self, parts: dict[str, Tensor], offset: Tensor | None) -> Weight:
        """Return the weight that these tensors hold, all rows of them, without a copy."""
        if not self.in_4_bits:
            return Int8Tensor(*parts.values(), self.dtype) if self.quant_type else parts["values"]
        n = math.prod(self.shape)
        kind = dict(quant_type=self.quant_type, blocksize=self.blocksize, offset=offset)
        return QuantizedTensor(
            packed=parts["packed"].view(-1)[: -(-n // 2)],
            absmax=parts["absmax"].view(-1)[: -(-n // self.blocksize)],
            nested_absmax=parts.get("nested_absmax"),
            shape=self.shape,
            dtype=self.dtype,
            **kind,
        )


class Shards(nn.Module):
    """The sharded parameters of a weight. A module, because `fully_shard` asks for modules."""

    def __init__(self, layout: Layout):
        super().__init__()
        self.layout = layout
        self.offset: Tensor | None = None  # () float32, on every rank
        self.whole: Weight | None = None  # set once it has been gathered; its memory comes and goes
        self.dtypes: dict[str, torch.dtype] = {}
        for name, tensor in layout.parameters().items():
            self.dtypes[name] = tensor.dtype
            held = tensor if tensor.is_floating_point() else tensor.view(WORD)
            self.register_parameter(name, nn.Parameter(held, requires_grad=False))

    def own(self, name: str) -> Tensor:
        """Return this rank's rows of a tensor, to be written to."""
        return getattr(self, name).to_local().view(self.dtypes[name])

    @property
    def nbytes(self) -> int:
        """Bytes that this rank keeps."""
        return sum(p.to_local().nbytes for p in self.parameters())

    def set_whole(self) -> None:
        """Build the weight, when its parameters are gathered for the first time."""
        # Detached, since nn.Module would count parameters.
        parts = {name: p.detach().view(self.dtypes[name]) for name, p in self.named_parameters()}
        self.whole = self.layout.weight(parts, self.offset)


class Opener(Protocol):
    """The part of `gathering.Gathering` that a layer asks."""

    reading: bool

    def open(self, i: int) -> None: ...


class Sharded:
    """What the layers below share: the weight is whole while its unit is gathered (see gathering.py).

    Its shape, dtype and device can always be asked for, its values only in between.
    """

    shards: Shards
    gathering: Opener
    unit: int

    @property
    def weight(self) -> Weight:
        if self.gathering.reading:
            self.gathering.open(self.unit)
        return self.shards.whole


class _ShardedQuantized(Sharded, QuantizedLinear):
    """A linear layer in 4 or 8 bits. Its shards are no submodule: like the weight of any quantized layer."""

    def __init__(self, shards: Shards, bias: nn.Parameter | None):
        nn.Module.__init__(self)
        object.__setattr__(self, "shards", shards)
        self.bias = bias
        self.out_features, self.in_features = shards.layout.shape


class Sharded4bit(_ShardedQuantized, Linear4bit):
    """NF4 or FP4."""


class Sharded8bit(_ShardedQuantized, Linear8bit):
    """Row-wise int8."""


class ShardedPlain(Sharded, nn.Linear):
    """A linear layer in the compute dtype; the output head is one."""

    def __init__(self, shards: Shards, bias: nn.Parameter | None):
        nn.Module.__init__(self)
        self.shards, self.bias = shards, bias
        self.out_features, self.in_features = shards.layout.shape


class ShardedEmbedding(Sharded, nn.Embedding):
    """The embedding. It gathers its own table, because nothing runs before it."""

    def __init__(self, shards: Shards):
        nn.Module.__init__(self)
        self.shards = shards
        self.num_embeddings, self.embedding_dim = shards.layout.shape
        self.padding_idx = self.max_norm = None
        self.norm_type, self.scale_grad_by_freq, self.sparse = 2.0, False, False

    def forward(self, ids: Tensor) -> Tensor:
        self.gathering.open(self.unit)
        return super().forward(ids)


def sharded_linear(shards: Shards, bias: nn.Parameter | None) -> nn.Module:
    """Return the linear layer with these shards."""
    if shards.layout.in_4_bits:
        return Sharded4bit(shards, bias)
    return Sharded8bit(shards, bias) if shards.layout.quant_type else ShardedPlain(shards, bias)
