# %% [markdown]
# # 6. Find the bug
#
# Three quantizers and two LoRA layers are broken, one line each. You find the lines with *property tests*:
# tests that state what must hold for every input, and let a program search for an input with which it does
# not. Then you write such a test yourself, and it catches a sixth bug.
#
# A cell with `...  # your code here` is an exercise, and the cell behind it checks your code.
# %%
import math
import os

import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from minilora.testing import Report, check_lora_layer, check_quantizer, factors
from minilora.testing.exercises import check

FAST = "MINILORA_FAST" in os.environ  # the tests of this notebook are in a hurry
EXAMPLES = 4 if FAST else 40
PHASES = (Phase.generate,) if FAST else (Phase.generate, Phase.shrink)

# %% [markdown]
# ## A quantizer that is right
#
# It cuts a weight into blocks of 64, divides each by its largest magnitude, and takes the nearest of
# fifteen evenly spaced codes. Read it once; the broken ones replace one of its methods. Notebook 3 builds
# such a quantizer step by step.
# %%
CODE, BLOCK = torch.arange(-7, 8) / 7, 64


class Quantizer:
    def blocks(self, weight: Tensor) -> Tensor:
        flat = weight.detach().float().reshape(-1)
        return F.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)

    def scales(self, blocks: Tensor) -> Tensor:
        return blocks.abs().amax(dim=1, keepdim=True)  # (n, 1)

    def symbols(self, blocks: Tensor, absmax: Tensor) -> Tensor:
        scaled = blocks / absmax.clamp(min=1e-38)
        return torch.bucketize(scaled, (CODE[1:] + CODE[:-1]) / 2)

    def quantize(self, weight: Tensor) -> tuple:
        blocks = self.blocks(weight)
        absmax = self.scales(blocks)
        return self.symbols(blocks, absmax), absmax, weight.shape, weight.dtype

    def dequantize(self, stored: tuple) -> Tensor:
        symbols, absmax, shape, dtype = stored
        return (CODE[symbols] * absmax).flatten()[: shape.numel()].view(shape).to(dtype)


def battery(quantizer: Quantizer) -> Report:
    options = dict(code=CODE, blocksize=BLOCK, max_examples=EXAMPLES, subject=type(quantizer).__name__)
    return check_quantizer(quantizer.quantize, quantizer.dequantize, **options)


print(battery(Quantizer()))


# %% [markdown]
# Each line is a property. `nearest code` says that no other code would have been closer, `outliers stay in
# their block` that a huge value spoils no other block, and so on. A property has no expected output: it
# holds for every weight. So a program can try weights without end, and choose the nasty ones.
#
# ## Three broken quantizers
# %%
class First(Quantizer):
    def scales(self, blocks: Tensor) -> Tensor:
        return blocks.amax(dim=1, keepdim=True)


class Second(Quantizer):
    def scales(self, blocks: Tensor) -> Tensor:
        return blocks.abs().amax(dim=1, keepdim=True).bfloat16().float()  # saves two bytes a block


class Third(Quantizer):
    scratch = torch.empty(1 << 16)

    def dequantize(self, stored: tuple) -> Tensor:
        symbols, absmax, shape, dtype = stored
        values = self.scratch[: symbols.numel()].view(symbols.shape)  # saves the time to allocate memory
        torch.mul(CODE[symbols], absmax, out=values)
        return values.flatten()[: shape.numel()].view(shape).to(dtype)


# %% [markdown]
# This is the test that most people write first: random numbers, and a bound on the mean error. It passes
# for all three.
# %%
for kind in (Quantizer, First, Second, Third):
    torch.manual_seed(0)
    weight = torch.randn(64, 64)
    error = (kind().dequantize(kind().quantize(weight)) - weight).abs().mean()
    assert error < 0.1
    print(f"{kind.__name__:<10} mean error {error:.3f}")


# %% [markdown]
# The battery finds all three. Read a report from the top: the property that failed, the reason, and the
# smallest weight with which it fails, as a line of Python.
# %%
def show(report: Report) -> None:
    """Print a report without the properties that hold."""
    print(
        "\n".join(line for line in str(report).splitlines() if " ok " not in line and "skipped" not in line)
    )
    print()


for kind in (First, Second, Third):
    report = battery(kind())
    assert report.failures
    show(report)


# %% [markdown]
# **Exercise.** In which circumstances would each bug have cost you a day? Then mend each line. The second
# may keep its two bytes a block only if the battery agrees; it does not.
# %%
class FirstMended(First):
    def scales(self, blocks: Tensor) -> Tensor:
        # solution: begin
        return blocks.abs().amax(dim=1, keepdim=True)
        # solution: end


# %%
with check("the first one"):
    assert FirstMended().scales(-torch.ones(1, 64)) is not None, "scales gives None"
    battery(FirstMended()).raise_for_failures()


# %%
class SecondMended(Second):
    def scales(self, blocks: Tensor) -> Tensor:
        # solution: begin
        return blocks.abs().amax(dim=1, keepdim=True)
        # solution: end


# %%
with check("the second one"):
    assert SecondMended().scales(-torch.ones(1, 64)) is not None, "scales gives None"
    battery(SecondMended()).raise_for_failures()


# %%
class ThirdMended(Third):
    def dequantize(self, stored: tuple) -> Tensor:
        symbols, absmax, shape, dtype = stored
        # solution: begin
        return (CODE[symbols] * absmax).flatten()[: shape.numel()].view(shape).to(dtype)
        # solution: end


# %%
with check("the third one"):
    third = ThirdMended()
    assert third.dequantize(third.quantize(torch.ones(2))) is not None, "dequantize gives None"
    battery(third).raise_for_failures()


# %% [markdown]
# ## Two broken LoRA layers
#
# The right one first. $y = x W^\top + s\, \mathrm{dropout}(x) A^\top B^\top$ with $s = \alpha / r$;
# notebook 1 builds it.
# %%
class Lora(nn.Module):
    def __init__(self, base: nn.Linear, r: int, lora_alpha: float, lora_dropout: float):
        super().__init__()
        self.base, self.p, self.scaling = base.requires_grad_(False), lora_dropout, lora_alpha / r
        bound, self.merged = 1 / math.sqrt(base.in_features), False
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features).uniform_(-bound, bound))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r))

    def dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p, self.training)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if self.merged:
            return y
        update = F.linear(F.linear(self.dropped(x).float(), self.lora_A), self.lora_B)
        return y + (self.scaling * update).to(y.dtype)

    def change(self) -> Tensor:
        return self.scaling * self.lora_B @ self.lora_A

    @torch.no_grad()
    def merge(self) -> None:
        if not self.merged:
            self.base.weight.copy_(self.base.weight.float() + self.change())
            self.merged = True


class Fourth(Lora):
    def dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p)


class Fifth(Lora):
    def change(self) -> Tensor:
        return self.lora_B @ self.lora_A


for kind in (Lora, Fourth, Fifth):
    report = check_lora_layer(kind, max_examples=EXAMPLES, subject=kind.__name__)
    assert bool(report.failures) == (kind is not Lora)
    show(report)


# %% [markdown]
# Whoever tests with `lora_dropout=0` never sees the fourth bug, and whoever tests with alpha = r never sees
# the fifth. A program that draws both does.
#
# **Exercise.** Mend both.
# %%
class FourthMended(Fourth):
    def dropped(self, x: Tensor) -> Tensor:
        # solution: begin
        return F.dropout(x, self.p, self.training)
        # solution: end


class FifthMended(Fifth):
    def change(self) -> Tensor:
        # solution: begin
        return self.scaling * self.lora_B @ self.lora_A
        # solution: end


# %%
with check("both LoRA layers"):
    for kind in (FourthMended, FifthMended):
        layer = kind(nn.Linear(2, 2), 1, 1.0, 0.0)
        assert layer.dropped(torch.ones(2)) is not None, f"dropped of {kind.__name__} gives None"
        assert layer.change() is not None, f"change of {kind.__name__} gives None"
        check_lora_layer(kind, max_examples=EXAMPLES, subject=kind.__name__).raise_for_failures()

# %% [markdown]
# ## A test of your own
#
# Several adapters can be combined into one: with weights $w_i$, its change is $\sum_i w_i B_i A_i$. Stack
# all $A_i$ below each other and all $B_i$ beside each other, and multiply with the weights somewhere. Here
# are three ways. One of them is right.
# %%
Factors = tuple[Tensor, Tensor]  # A (r, in), B (out, r)


def combine_1(adapters: list[Factors], weights: list[float]) -> Factors:
    A = torch.cat([A * abs(w) ** 0.5 for (A, _), w in zip(adapters, weights, strict=True)], dim=0)
    B = torch.cat([B * abs(w) ** 0.5 for (_, B), w in zip(adapters, weights, strict=True)], dim=1)
    return A, B


def combine_2(adapters: list[Factors], weights: list[float]) -> Factors:
    A = torch.cat([A for A, _ in adapters], dim=0)
    B = torch.cat([B * w for (_, B), w in zip(adapters, weights, strict=True)], dim=1)
    return A, B


def combine_3(adapters: list[Factors], weights: list[float]) -> Factors:
    A = torch.cat([A for A, _ in adapters], dim=0)
    B = torch.cat([B * w / sum(weights) for (_, B), w in zip(adapters, weights, strict=True)], dim=1)
    return A, B


# %% [markdown]
# Hypothesis draws the inputs. `@given(...)` names a *strategy* for each argument, and calls the function
# with many draws. `factors(st.just((in, out, r)))` of `minilora.testing` draws A and B of this shape, and
# `st.floats(-2, 2)` a number. When the function raises, Hypothesis looks for a smaller input that fails,
# too.
#
# **Exercise.** State the property in `holds`: raise an AssertionError unless the combined B A equals the
# sum, up to rounding. Compute both in float64, and allow 1e-5 of the largest magnitude of all that is
# added, plus 1e-30. Then choose the strategy of the weights, so that both wrong ways are caught.
# %%
SHAPE = st.just((3, 4, 2))
# solution: begin
WEIGHTS = st.floats(-2, 2)
# solution: end


def find_a_failure(combine) -> None:
    """Raise an error if there is an input for which `combine` is wrong."""

    @settings(max_examples=100, phases=PHASES, deadline=None, database=None, derandomize=True)
    @given(factors(SHAPE), factors(SHAPE), WEIGHTS, WEIGHTS)
    def holds(first: Factors, second: Factors, w1: float, w2: float) -> None:
        # solution: begin
        A, B = combine([first, second], [w1, w2])
        terms = [w * B.double() @ A.double() for (A, B), w in ((first, w1), (second, w2))]
        size = sum(term.abs() for term in terms).max()
        assert (B.double() @ A.double() - sum(terms)).abs().max() <= 1e-5 * size + 1e-30
        # solution: end

    holds()


# %%
def verdict(combine) -> str:
    try:
        find_a_failure(combine)
    except Exception as error:  # a division by zero counts as caught, too
        return f"caught by {type(error).__name__}"
    return "passes"


with check("your own test"):
    assert "WEIGHTS" in globals(), "WEIGHTS is not chosen yet"
    verdicts = {combine.__name__: verdict(combine) for combine in (combine_1, combine_2, combine_3)}
    assert verdicts["combine_2"] == "passes", (
        f"combine_2 is right, and your test says: {verdicts['combine_2']}"
    )
    for name in ("combine_1", "combine_3"):
        assert verdicts[name] != "passes", f"{name} is wrong, and your test does not notice"
for name, found in verdicts.items():
    print(f"{name}: {found}")

# %% [markdown]
# Let Hypothesis show you its smallest input: call `find_a_failure(combine_1)` in a cell of its own, and
# read the last lines. Which strategy for the weights would have missed that bug?
#
# ## Turn a knob
#
# - Break `Quantizer` in a way that no property notices. If you find one, the battery lacks a property.
# - Run `check_quantizer` on a quantizer of a library that you use, and `check_lora_layer` on its LoRA
#   layer.
# - Lower `max_examples` to 1. Which bugs are still found, and why?
#
# `minilora/testing/__init__.py` lists all that the kit has.
