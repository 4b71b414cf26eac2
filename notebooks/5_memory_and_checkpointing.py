# %% [markdown]
# # 5. Memory and checkpointing
#
# You measure what backward keeps in memory, write gradient checkpointing in 20 lines, and get the same
# gradients to the bit, with dropout too. Then you choose how many layers belong into one checkpoint.
#
# A cell with `...  # your code here` is an exercise, and the cell behind it checks your code.
# %%
import os
from collections.abc import Callable

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from minilora import LoraConfig, add_lora, load_model, set_recompute
from minilora.loss import causal_lm_loss
from minilora.system.assets import EMBEDDED_MODEL
from minilora.testing import peak_memory
from minilora.testing.exercises import check

os.environ["KINETO_LOG_LEVEL"] = "99"  # peak_memory asks PyTorch's profiler, which would write lines
FAST = "MINILORA_FAST" in os.environ  # the tests of this notebook are in a hurry
DEPTH, WIDTH, TOKENS = (16, 16, 64) if FAST else (64, 64, 4096)


# %% [markdown]
# ## What backward keeps
#
# Forward computes values that backward reads again. PyTorch keeps them in between. For $y = x W^\top$
# backward needs $x$ (for the gradient of $W$) and $W$ (for the gradient of $x$). For $z = \tanh(y)$ it
# needs $z$, since $\tanh' = 1 - z^2$.
#
# `torch.autograd.graph.saved_tensors_hooks(pack, unpack)` calls `pack` with each tensor that is kept.
#
# **Exercise.** Return the number of values that `function(x)` makes PyTorch keep, without the parameters,
# which are there anyway. Count no tensor twice: `t.data_ptr()` says where it lies. `pack` returns what is
# kept, and `unpack` gives it back, so let both return their argument.
# %%
def kept_numbers(function: nn.Module, x: Tensor) -> int:
    parameters = {p.data_ptr() for p in function.parameters()}
    sizes = {}  # data_ptr of a kept tensor -> its numbers

    # solution: begin
    def pack(t: Tensor) -> Tensor:
        if t.data_ptr() not in parameters:
            sizes[t.data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function(x)
    # solution: end
    return sum(sizes.values())


# %%
with check("what backward keeps"):
    x = torch.randn(5, 4, requires_grad=True)
    linear = nn.Linear(4, 3)
    found = kept_numbers(linear, x)
    assert found == 20, f"a linear layer keeps its input, 5 x 4 = 20 numbers; you count {found}"
    found = kept_numbers(nn.Sequential(linear, nn.Tanh()), x)
    assert found == 35, f"a tanh behind it keeps its output, 15 numbers more: 35; you count {found}"


# %%
def layers(dropout: float = 0.0) -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Dropout(dropout)) for _ in range(DEPTH)]


x = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))
found = kept_numbers(nn.Sequential(*layers()), x)
print(f"{DEPTH} layers keep {found:,} numbers, {found / x.numel():.0f} times their input")


# %% [markdown]
# ## A checkpoint
#
# A checkpointed function keeps its input alone. When backward arrives, it runs the function again, this
# time with a graph, and goes back through that.
#
# - `forward` of a `torch.autograd.Function` runs without a graph. So nothing of it is kept but what you
#   pass to `ctx.save_for_backward`.
# - `backward` gets the gradient of the output, and returns one gradient for each argument of `forward`;
#   None for those that have none.
# - The parameters are arguments, too. They would get no gradient otherwise.
#
# **Exercise.** Fill in both. In backward: `x.detach().requires_grad_()` is a new leaf, `with
# torch.enable_grad():` switches the graph on, and `torch.autograd.grad(y, (x, *parameters), dy)` returns
# the gradients.
# %%
class Checkpoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function: Callable, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.function = function
        # solution: begin
        ctx.save_for_backward(x, *parameters)
        return function(x)
        # solution: end

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple:
        # solution: begin
        x, *parameters = ctx.saved_tensors
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.function(x)
        return None, *torch.autograd.grad(y, (x, *parameters), dy)
        # solution: end


def in_segments(parts: list[nn.Module], k: int, x: Tensor, kind: type = Checkpoint) -> Tensor:
    """Run the layers, k of them in one checkpoint; 0: without checkpoints."""
    for i in range(0, len(parts), k or len(parts)):
        segment = nn.Sequential(*parts[i : i + (k or len(parts))])
        x = kind.apply(segment, x, *segment.parameters()) if k else segment(x)
    return x


def gradients(k: int, dropout: float = 0.0, kind: type = Checkpoint) -> list[Tensor]:
    parts = layers(dropout)
    in_segments(parts, k, x, kind).square().mean().backward()
    return [p.grad for part in parts for p in part.parameters()]


# %%
with check("a checkpoint"):
    part = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    y = Checkpoint.apply(part, torch.ones(2, 3, requires_grad=True), *part.parameters())
    assert isinstance(y, Tensor), "forward gives no tensor"
    assert torch.equal(y, part(torch.ones(2, 3))), "forward's value is another than the function's"
    mine, expected = gradients(4), gradients(0)
    assert all(g is not None for g in mine), "a parameter gets no gradient"
    equal = sum(map(torch.equal, mine, expected))
    assert equal == len(expected), f"{equal} of {len(expected)} gradients are equal to the bit"

# %% [markdown]
# ## The same bits, with dropout
#
# Try it with dropout: the gradients are wrong. The second run draws another mask, so it differentiates a
# network that nobody ran.
# %%
mine, expected = gradients(4, dropout=0.1), gradients(0, dropout=0.1)
print(f"{sum(map(torch.equal, mine, expected))} of {len(expected)} gradients are equal")


# %% [markdown]
# **Exercise.** Save the state of the random generator in forward, before the function runs, and set it in
# backward. `torch.get_rng_state()` and `torch.set_rng_state(state)` do that. Whoever draws random numbers
# after backward should not notice it: `with torch.random.fork_rng(devices=[]):` puts the old state back at
# its end.
# %%
class SameDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function: Callable, x: Tensor, *parameters: Tensor) -> Tensor:
        # solution: begin
        ctx.function, ctx.random = function, torch.get_rng_state()
        ctx.save_for_backward(x, *parameters)
        return function(x)
        # solution: end

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple:
        # solution: begin
        x, *parameters = ctx.saved_tensors
        x = x.detach().requires_grad_()
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.set_rng_state(ctx.random)
            y = ctx.function(x)
        return None, *torch.autograd.grad(y, (x, *parameters), dy)
        # solution: end


# %%
with check("the same bits with dropout"):
    y = SameDropout.apply(nn.Tanh(), torch.ones(2, 3))
    assert isinstance(y, Tensor), "forward gives no tensor"
    mine, after = gradients(4, 0.1, SameDropout), torch.rand(())
    expected, after_expected = gradients(0, 0.1), torch.rand(())
    equal = sum(map(torch.equal, mine, expected))
    assert equal == len(expected), f"{equal} of {len(expected)} gradients are equal to the bit"
    assert torch.equal(after, after_expected), "backward changes the random numbers that are drawn after it"


# %% [markdown]
# ## How long should a segment be?
#
# Cut $L$ layers into segments of $k$. The inputs of all segments are kept: $L / k$ tensors. In backward one
# segment is live, with $k$ tensors. Together $M(k) = L / k + k$.
#
# **Exercise.** Which k makes $M$ smallest? Return it as a function of L, rounded to a whole number.
# %%
def best_segment(L: int) -> int:
    # solution: begin
    return round(L**0.5)
    # solution: end


# %%
with check("the best segment"):
    for L in (4, 16, 64, 100):
        k, best = best_segment(L), min(range(1, L + 1), key=lambda k: L / k + k)
        assert k, "best_segment gives None"
        assert L / k + k <= L / best + best, f"{L} layers: {k} holds {L / k + k:.1f} tensors, {best} fewer"


# %% [markdown]
# Now measure. `peak_memory` counts the bytes of PyTorch's own allocations, exactly.
# %%
def peak(k: int) -> float:
    """Return the peak of forward and backward, in units of the input."""
    parts = layers()
    return peak_memory(lambda: in_segments(parts, k, x).square().mean().backward()) / x.nbytes


sizes = [2**i for i in range(DEPTH.bit_length())]
measured = [peak(k) for k in sizes]
plt.figure(figsize=(6, 3))
plt.axhline(peak(0), color="grey", linestyle="--", label="no checkpoints")
plt.plot(sizes, measured, "o-", label="measured")
plt.plot(sizes, [DEPTH / k + k for k in sizes], label="L / k + k")
plt.xscale("log", base=2)
plt.xlabel("layers a segment")
plt.ylabel("peak / input")
plt.legend()
plt.show()

# %% [markdown]
# Measured lies a little above the formula: the gradients that arrive at a layer and leave it are there as
# well, and the parameters' gradients.
#
# ## On a language model
#
# A decoder layer keeps about a dozen tensors of its input's size, so one layer a segment is a good choice.
# `set_recompute(model, "full")` does that.
# %%
model = load_model(EMBEDDED_MODEL, dtype=torch.float32)
add_lora(model, LoraConfig(r=8, lora_alpha=16, lora_dropout=0.1, target_modules="all-linear"))
torch.manual_seed(0)
ids = torch.randint(3, 1500, (2, 32) if FAST else (8, 128))


def step() -> None:
    torch.manual_seed(1)
    causal_lm_loss(model.train(), ids, ids).backward()


peaks, found = {}, {}
for policy in ("off", "selective", "full"):
    set_recompute(model, policy)
    step()  # the first step allocates buffers that stay
    model.zero_grad()
    peaks[policy] = peak_memory(step)
    found[policy] = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
with check("policies of minilora"):
    assert peaks["full"] < peaks["off"]
    for policy in ("selective", "full"):
        assert all(map(torch.equal, found[policy], found["off"])), f"{policy} changes a bit of a gradient"
for policy, bytes_ in peaks.items():
    print(f"{policy:<10} {bytes_ / 2**20:6.1f} MiB at the peak")

# %% [markdown]
# ## Turn a knob
#
# - Give each layer four operations in place of two, so that it keeps a = 2 tensors. Where is the best k
#   now?
# - Checkpoint recursively: a segment that checkpoints its own halves. How does the peak grow with L, and
#   the work?
# - Freeze all weights of `layers()` but the last. What does `kept_numbers` count, and why?
#
# [docs/checkpointing.md](../docs/checkpointing.md) derives all of it, and `minilora/recompute.py` is the
# real one.
