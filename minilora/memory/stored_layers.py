"""Frozen linear layers as they are stored, and the buffer that they are dequantized into, in bytes.

All layers of the decoder are stored alike, as the settings say, unless the model's author quantized it: then
each is stored as it is in the files.
"""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from minilora.backend import native
from minilora.config import QuantConfig
from minilora.memory.activations import Widths
from minilora.quantization import NESTED_BLOCK_SIZE

Shape = tuple[int, int]  # (out, in)


class InFiles(NamedTuple):
    """What the headers of files tell about a quantized layer."""

    bits: int
    scales: int  # bytes


class StoredLayer(NamedTuple):
    """A layer's weight in memory."""

    shape: Shape
    bits: int  # 4 or 8; 0: not quantized
    weight: int  # bytes
    scales: int  # bytes


def stored_layers(
    shapes: Mapping[str, Shape],  # full name of a layer -> (out, in)
    quant: QuantConfig | None,
    in_files: Mapping[str, InFiles] | None,  # quantized layers of an author's; then `quant` does not apply
    number: int,  # bytes of a number that is not quantized
) -> list[StoredLayer]:
    """Return the layers as `load_model` stores them."""
    layers = []
    for name, shape in shapes.items():
        if in_files is None:
            bits, scales = (quant.bits, scale_bytes(shape, quant)) if quant else (0, 0)
        else:
            bits, scales = in_files.get(name, (0, 0))
        numbers = math.prod(shape)
        layers.append(StoredLayer(shape, bits, -(-numbers * bits // 8) or numbers * number, scales))
    return layers


def scale_bytes(shape: Shape, quant: QuantConfig) -> int:
    """Return the bytes of a weight's scales: a float32 a row, or one a block, which may be quantized too."""
    if quant.bits == 8:
        return 4 * shape[0]
    blocks = -(-math.prod(shape) // quant.blocksize)
    nested_blocks = -(-blocks // NESTED_BLOCK_SIZE)
    return blocks + 4 * nested_blocks + 4 if quant.double_quant else 4 * blocks


def dequantized_bytes(layers: Iterable[StoredLayer], widths: Widths, rows: int | None, use_dora: bool) -> int:
    """Return the bytes of the scratch buffer for one layer's weight at a time, as large as the largest needs.

    rows: that are multiplied at once where 4-bit weights are dequantized in a CPU's cache; None elsewhere.
    """
    # A weight is dequantized before it is multiplied, int8 by way of float32; a plain one may be widened.
    numbers = {0: widths.wide, 4: widths.product, 8: widths.product + 4}
    in_cache = {layer.shape for layer in layers if layer.bits == 4 and rows is not None}
    sizes = [_tile_bytes(in_cache, rows, use_dora)] if in_cache else []
    for layer in layers:
        if layer.bits != 4 or rows is None:
            sizes.append(numbers[layer.bits] * math.prod(layer.shape))
    return max(sizes)


def _tile_bytes(shapes: Iterable[Shape], rows: int, use_dora: bool) -> int:
    """Return the bytes of the scratch buffer where weights are dequantized in the cache.

    It holds tiles. Only weights of other shapes, and with DoRA's norms all, are dequantized into it.
    """
    numbers = [math.prod(shape) for shape in shapes if use_dora or not native.multiplies(shape)]
    for shape in filter(native.multiplies, shapes):
        numbers += [native.tile_numbers(shape, rows, backward)[0] for backward in (False, True)]
    return 2 * max(numbers)
