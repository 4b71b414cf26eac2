# %% [markdown]
# # 3. NF4 by hand
#
# You store a weight in 4 bits, as QLoRA does: sixteen codes, blocks of 64, two codes a byte, and scales
# that are stored in 8 bits themselves. At the end your bytes equal those of bitsandbytes.
#
# A cell with `...  # your code here` is an exercise, and the cell behind it checks your code.
# %%
import os
import warnings
from statistics import NormalDist

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor

from minilora import load_model, quantize_4bit
from minilora.quantization import dynamic_code, four_bit_code
from minilora.system.assets import EMBEDDED_MODEL
from minilora.testing import check_quantizer, is_nearest
from minilora.testing.exercises import check

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # those of its own imports
    import bitsandbytes.functional as bnb

FAST = "MINILORA_FAST" in os.environ  # the tests of this notebook are in a hurry
EXAMPLES = 3 if FAST else 40

# %% [markdown]
# ## Sixteen codes
#
# Four bits name sixteen values. Where should they lie? The weights of a trained layer look like normal
# numbers: many are small, few are large.
# %%
weight = load_model(EMBEDDED_MODEL, dtype=torch.float32).model.layers[1].mlp.gate_proj.weight.detach()
plt.figure(figsize=(7, 2.5))
plt.hist((weight / weight.std()).flatten().numpy(), bins=100, density=True, label="a layer's weights")
x = torch.linspace(-4, 4, 200)
plt.plot(x, (-x.square() / 2).exp() / (2 * torch.pi) ** 0.5, label="the normal distribution")
plt.xlabel("weight, in standard deviations")
plt.legend(fontsize=8)
plt.show()


# %% [markdown]
# So NF4 puts its codes at *quantiles*: between two neighbours lie about equally many weights. Three
# details:
#
# - Zero has a code of its own, for padding and pruned weights. That leaves fifteen: seven negative, eight
#   positive.
# - The outermost quantile is not 1, whose place is infinity. It is 0.9677083, the mean of 1 - 1/30 and 1 -
#   1/32.
# - All codes are divided by the largest, so that they lie in [-1, 1].
#
# For the positive side: take nine probabilities, evenly spaced from 0.9677083 down to 0.5, without the last
# one. Their quantiles are `NormalDist().inv_cdf(p)`. For the negative side: eight, without the last one,
# and the sign turned around.
#
# **Exercise.** Return the sixteen codes, ascending, as float32. `torch.linspace(a, b, n)` spaces evenly.
# %%
def nf4_code() -> Tensor:
    # solution: begin
    def quantiles(n: int) -> list[float]:
        return [NormalDist().inv_cdf(p) for p in torch.linspace(0.9677083, 0.5, n + 1)[:-1].tolist()]

    code = torch.tensor([-q for q in quantiles(7)] + [0.0] + quantiles(8)[::-1])
    return code / code.max()
    # solution: end


# %%
with check("the sixteen codes"):
    code = nf4_code()
    assert code.shape == (16,), f"the shape is {tuple(code.shape)}, not (16,)"
    assert bool((code.diff() > 0).all()), "the codes do not ascend"
    assert code[7] == 0, f"the eighth code is {code[7]:.3f}, not 0"
    off = (code - four_bit_code("nf4")).abs().max()
    assert off < 1e-6, (
        f"they differ from minilora's by {off:.2g}: -1 ... 0 ... 1, seven below and eight above"
    )
print(" ".join(f"{value:.3f}" for value in code.tolist()))

# %% [markdown]
# ## Blocks
#
# Each block of 64 weights is divided by its largest magnitude, its *absmax*. So every block uses the whole
# range of the codes, and one outlier makes only its own block coarse.
#
# **Exercise.** Cut a weight of any shape into blocks, in memory order, and pad the last one with zeros.
# Return the blocks, (n, 64), and absmax, (n, 1), both float32. `F.pad(flat, (0, how_many))` pads.
# %%
BLOCK = 64


def blocks_of(weight: Tensor) -> tuple[Tensor, Tensor]:
    # solution: begin
    flat = weight.detach().float().reshape(-1)
    blocks = F.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    return blocks, blocks.abs().amax(dim=1, keepdim=True)
    # solution: end


# %%
with check("blocks"):
    blocks, absmax = blocks_of(torch.arange(-70.0, 0).bfloat16().view(2, 35))
    assert blocks.shape == (2, 64), f"70 values make blocks of the shape {tuple(blocks.shape)}, not (2, 64)"
    assert blocks.dtype == torch.float32, f"blocks are {blocks.dtype}, not float32"
    assert absmax.tolist() == [[70.0], [6.0]], f"absmax is {absmax.tolist()}, not [[70.0], [6.0]]"


# %% [markdown]
# ## The nearest code
#
# A *symbol* is a number from 0 to 15. **Exercise.** Return the symbol of the nearest code for each scaled
# value in [-1, 1]. Do not build the distances to all sixteen codes: for a large weight they need sixteen
# times its memory. `torch.bucketize(values, bounds)` counts how many bounds are below each value. Which
# fifteen bounds?
# %%
def nearest(scaled: Tensor, code: Tensor) -> Tensor:
    # solution: begin
    return torch.bucketize(scaled, (code[1:] + code[:-1]) / 2)
    # solution: end


# %%
with check("nearest codes"):
    values = torch.linspace(-1, 1, 1001)
    symbols = nearest(values, code)
    assert symbols.shape == values.shape, f"the shape is {tuple(symbols.shape)}, not {tuple(values.shape)}"
    right = is_nearest(symbols, values, code, blocksize=1001)
    assert right.all(), (
        f"{values[~right][0]:.3f} gets the code {code[symbols[~right][0]]:.3f}: not the nearest"
    )


# %% [markdown]
# ## Two symbols a byte
#
# The first symbol of a pair takes the high four bits, the second the low four.
#
# **Exercise.** Write `pack`, from an even number of symbols to bytes (uint8), and `unpack`, the way back.
# `a << 4`, `a | b`, `a >> 4` and `a & 15` work on tensors of integers.
# %%
def pack(symbols: Tensor) -> Tensor:
    # solution: begin
    pairs = symbols.reshape(-1, 2).to(torch.uint8)
    return pairs[:, 0] << 4 | pairs[:, 1]
    # solution: end


def unpack(packed: Tensor) -> Tensor:
    # solution: begin
    return torch.stack([packed >> 4, packed & 15], dim=1).view(-1).long()
    # solution: end


# %%
with check("packing"):
    packed = pack(torch.tensor([1, 2, 15, 0]))
    assert packed.dtype == torch.uint8, f"bytes are uint8, not {packed.dtype}"
    assert packed.tolist() == [0x12, 0xF0], f"1, 2, 15, 0 become {packed.tolist()}, not [18, 240]"
    assert unpack(packed).tolist() == [1, 2, 15, 0], f"they come back as {unpack(packed).tolist()}"


# %% [markdown]
# ## The quantizer
#
# **Exercise.** Put it together. A block of zeros must not be divided by zero: use `absmax.clamp(min=1e-38)`
# there. `dequantize` gives back the shape and the dtype.
# %%
def quantize(weight: Tensor) -> tuple:
    """Return packed (uint8), absmax (float32), and what dequantize needs besides."""
    # solution: begin
    blocks, absmax = blocks_of(weight)
    symbols = nearest(blocks * (1 / absmax.clamp(min=1e-38)), code)
    return pack(symbols), absmax, weight.shape, weight.dtype
    # solution: end


def dequantize(stored: tuple) -> Tensor:
    # solution: begin
    packed, absmax, shape, dtype = stored
    values = code[unpack(packed)].view(-1, BLOCK) * absmax
    return values.flatten()[: shape.numel()].view(shape).to(dtype)
    # solution: end


# %%
with check("the quantizer"):
    assert quantize(torch.zeros(2, 3)) is not None, "quantize gives None"
    back = dequantize(quantize(torch.zeros(2, 3)))
    assert back.shape == (2, 3), f"a weight of the shape (2, 3) comes back as {tuple(back.shape)}"
    report = check_quantizer(quantize, dequantize, code=code, blocksize=BLOCK, max_examples=EXAMPLES)
    report.raise_for_failures()
print(report)


# %% [markdown]
# The report is a *battery* of properties, each tried on the weights that break quantizers: zero blocks,
# outliers, numbers in the middle between two codes, sizes that 64 does not divide. Break something on
# purpose and see which property notices, such as a swapped pair of symbols, or `absmax` of the whole
# tensor.
#
# ## What do normal codes buy?
#
# Compare with sixteen evenly spaced codes, for several block sizes.
# %%
def error(codes: Tensor, blocksize: int) -> float:
    """Return the root mean square error, in units of the weights' standard deviation."""
    blocks = weight.flatten()[: weight.numel() // blocksize * blocksize].view(-1, blocksize)
    absmax = blocks.abs().amax(1, keepdim=True)
    return float(
        (codes[torch.bucketize(blocks / absmax, (codes[1:] + codes[:-1]) / 2)] * absmax - blocks).std()
    )


sizes = [16, 32, 64, 128, 256, 512, 1024]
plt.figure(figsize=(6, 3))
for name, codes in {"NF4": four_bit_code("nf4"), "evenly spaced": torch.linspace(-1, 1, 16)}.items():
    plt.plot(sizes, [error(codes, size) / float(weight.std()) for size in sizes], "o-", label=name)
plt.xscale("log", base=2)
plt.xlabel("weights a block")
plt.ylabel("error / standard deviation")
plt.legend()
plt.show()

# %% [markdown]
# The larger the block, the more the even codes waste on the rare large values. But small blocks cost
# memory: a float32 scale for 64 weights is half a bit a weight.
#
# ## Double quantization
#
# So the scales are quantized too, in 8 bits:
#
# 1. Subtract the mean of all absmax, the *offset*. What remains has both signs.
# 2. Cut it into blocks of 256, and divide each by its largest magnitude.
# 3. Take the nearest of 256 codes. `dynamic_code()` has them, ascending: dense near 0, coarse far from it.
#
# **Exercise.** Return `indices` (uint8, one for each absmax), `nested_absmax` (float32, one for 256 of
# them) and `offset`; and restore absmax from them. `nearest` works with 256 codes as well.
# %%
DYNAMIC = dynamic_code()


def quantize_scales(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # solution: begin
    absmax = absmax.flatten()
    offset = absmax.mean()
    blocks = F.pad(absmax - offset, (0, -len(absmax) % 256)).view(-1, 256)
    nested_absmax = blocks.abs().amax(1, keepdim=True)
    indices = nearest(blocks * (1 / nested_absmax), DYNAMIC).to(torch.uint8)
    return indices.flatten()[: len(absmax)], nested_absmax.flatten(), offset
    # solution: end


def restore_scales(indices: Tensor, nested_absmax: Tensor, offset: Tensor) -> Tensor:
    # solution: begin
    return DYNAMIC[indices.long()] * nested_absmax.repeat_interleave(256)[: len(indices)] + offset
    # solution: end


# %%
with check("double quantization"):
    absmax = quantize(weight)[1].flatten()
    indices, nested_absmax, offset = quantize_scales(absmax)
    assert indices.dtype == torch.uint8, f"indices are uint8, not {indices.dtype}"
    assert len(indices) == len(absmax), f"{len(absmax)} scales have {len(indices)} indices"
    expected = -(-len(absmax) // 256)
    assert len(nested_absmax) == expected, f"there are {len(nested_absmax)} scales of scales, not {expected}"
    restored = restore_scales(indices, nested_absmax, offset)
    # Half of the code's largest gap, in units of the largest distance from the mean, and float32's rounding.
    bound = (DYNAMIC.diff().max() / 2 + 1e-6) * nested_absmax.max()
    off = (restored - absmax).abs().max()
    assert off <= bound, f"a scale is off by {off:.2g}, and {bound:.2g} is allowed"

# %% [markdown]
# ## The same bytes
#
# Now compare with minilora, and with bitsandbytes, whose format QLoRA checkpoints have.
# %%
packed, absmax, *_ = quantize(weight)
ours = quantize_4bit(weight, double_quant=False)
theirs, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
ours_double = quantize_4bit(weight)
_, state_double = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)

with check("the same bytes as bitsandbytes"):
    for name, bytes_, scales in (
        ("minilora", ours.packed, ours.absmax),
        ("bitsandbytes", theirs.flatten(), state.absmax),
    ):
        different = int((packed != bytes_).sum())
        assert not different, f"{different} of {len(packed)} bytes differ from {name}'s"
        assert torch.equal(absmax.flatten(), scales), f"scales differ from {name}'s"
    equal = (indices == state_double.absmax).float().mean()
    print(f"indices of scales equal to bitsandbytes': {equal:.1%}")
    step = (indices.int() - state_double.absmax.int()).abs().max()
    assert step <= 1, f"an index of a scale is {step} codes away from bitsandbytes'"
    assert torch.equal(ours_double.absmax, state_double.absmax), "minilora and bitsandbytes differ"


# %% [markdown]
# Not every index of a scale need be equal. bitsandbytes first rounds to one of 65,536 even steps, and looks
# the code up in a table. So a value close to the middle between two codes may get the other one. minilora
# does the same, so that checkpoints agree to the bit.
#
# **Exercise.** How many bits is a weight, with its share of the scales? Without double quantization a block
# of 64 has a float32 scale. With it, a block has 8 bits, and 256 blocks share a float32.
# %%
def bits_per_weight(double_quant: bool) -> float:
    # solution: begin
    return 4 + (8 / 64 + 32 / (64 * 256) if double_quant else 32 / 64)
    # solution: end


# %%
with check("bits of a weight"):
    for double, expected in ((False, ours), (True, ours_double)):
        # Its count includes the one offset of 32 bits, and a last block of scales that is not full.
        mine, counted = bits_per_weight(double), expected.bits_per_weight
        assert abs(mine - counted) < 0.01, (
            f"double quantization {double}: {mine} bits, and {counted:.3f} counted"
        )
print(f"{bits_per_weight(False):.3f} bits without double quantization, {bits_per_weight(True):.3f} with it")

# %% [markdown]
# ## Turn a knob
#
# - Put one value of 100 into the weight. How many values does it spoil? And with blocks of 1024?
# - Quantize uniform numbers in place of normal ones: which codes are better?
# - Leave out the offset in double quantization. By how much do the restored scales get worse, and why?
#
# [docs/quantization.md](../docs/quantization.md) has the reasons. Notebook 4 trains on top of such a
# weight.
