# %% [markdown]
# # 4. QLoRA and merging
#
# The frozen model is stored in 4 bits, and the adapter is trained on top of it. You write the frozen layer
# with its backward, train, and merge the adapter in three ways. One of them loses small changes, and you
# measure when.
#
# A cell with `...  # your code here` is an exercise, and the cell behind it checks your code. Notebook 1
# explains LoRA, and notebook 3 the 4 bits.
# %%
import math
import os

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora import QuantizedTensor, load_model, load_tokenizer, quantize_4bit
from minilora.data.examples import collate, tokenize
from minilora.data.rows import read_rows
from minilora.inference.evaluation import evaluate_loss
from minilora.loss import causal_lm_loss
from minilora.system.assets import ASSETS, EMBEDDED_MODEL
from minilora.testing.exercises import check

FAST = "MINILORA_FAST" in os.environ  # the tests of this notebook are in a hurry
STEPS, HELD_OUT = (4, 16) if FAST else (40, 128)


# %% [markdown]
# ## A frozen layer in 4 bits
#
# `quantize_4bit(W)` returns a QuantizedTensor: packed bytes and scales. `q.dequantize(torch.float32)`
# returns $\hat W$, (out, in). The layer computes
#
# $$y = x \hat W^\top \qquad\text{and backward}\qquad \bar x = \bar y\, \hat W.$$
#
# There is no gradient of $\hat W$: it is frozen. If you left backward to autograd, it would keep $\hat W$
# of every layer from forward to backward, and the whole model would lie in memory again, in 32 bits. So
# write it by hand, keep `q` alone, and dequantize a second time.
#
# **Exercise.** Fill in both methods. Something that is no tensor can be kept as an attribute of `ctx`.
# %%
class FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, q: QuantizedTensor) -> Tensor:
        # solution: begin
        ctx.q = q
        return x @ q.dequantize(x.dtype).T  # (..., out)
        # solution: end

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple:
        # solution: begin
        return dy @ ctx.q.dequantize(dy.dtype), None  # (..., in)
        # solution: end


# %%
with check("the frozen product"):
    torch.manual_seed(0)
    x, W = torch.randn(2, 3, 6, requires_grad=True), torch.randn(5, 6)
    q, kept = quantize_4bit(W), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = FrozenProduct.apply(x, q)
    assert isinstance(y, Tensor), "forward gives no tensor"
    W_hat = q.dequantize(torch.float32)
    assert torch.allclose(y, x @ W_hat.T, atol=1e-5), "y is not x times the transposed, dequantized W"
    assert not kept, f"autograd keeps a tensor of the shape {tuple(kept[0].shape)}; nothing need be kept"
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert torch.allclose(dx, dy @ W_hat, atol=1e-5), "dx is not dy times the dequantized W"


# %% [markdown]
# ## With an adapter
#
# **Exercise.** Fill in `forward`: the frozen product, and LoRA's update $s\, x A^\top B^\top$ beside it.
# %%
class QLoraLinear(nn.Module):
    def __init__(self, base: nn.Linear, r: int, lora_alpha: float):
        super().__init__()
        self.q, self.scaling = quantize_4bit(base.weight), lora_alpha / r
        bound = 1 / math.sqrt(base.in_features)
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features).uniform_(-bound, bound))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r))

    def forward(self, x: Tensor) -> Tensor:
        # solution: begin
        return FrozenProduct.apply(x, self.q) + self.scaling * F.linear(F.linear(x, self.lora_A), self.lora_B)
        # solution: end

    def change(self) -> Tensor:
        return self.scaling * self.lora_B @ self.lora_A  # (out, in)


# %%
with check("the layer with an adapter"):
    layer, x = QLoraLinear(nn.Linear(6, 5, bias=False), r=2, lora_alpha=4), torch.randn(3, 6)
    assert isinstance(layer(x), Tensor), "forward gives no tensor"
    assert torch.allclose(layer(x), FrozenProduct.apply(x, layer.q)), (
        "with B = 0 only the frozen product counts"
    )
    nn.init.normal_(layer.lora_B)
    expected = x @ (layer.q.dequantize(torch.float32) + layer.change()).T
    assert torch.allclose(layer(x), expected, atol=1e-4), "y is not x (W + s B A)^T"
    layer(x).sum().backward()
    assert layer.lora_A.grad is not None and layer.lora_B.grad is not None, "A or B gets no gradient"

# %% [markdown]
# ## Training
#
# All linear layers of the small model become 4-bit layers with an adapter. The loop is that of notebook 1.
# %%
tokenizer = load_tokenizer(EMBEDDED_MODEL)
train, held_out = (
    tokenize(read_rows(str(ASSETS / f"{name}.jsonl")), tokenizer, cutoff_len=64).examples
    for name in ("train", "test")
)


def plain_model() -> nn.Module:
    return load_model(EMBEDDED_MODEL, dtype=torch.float32).requires_grad_(False)


def loss_of(model: nn.Module) -> float:
    return evaluate_loss(model, held_out[:HELD_OUT])


torch.manual_seed(0)
model, original = plain_model(), {}
for name, layer in list(model.model.named_modules()):
    if isinstance(layer, nn.Linear):
        original[f"model.{name}"] = layer.weight
        model.model.set_submodule(name, QLoraLinear(layer, r=8, lora_alpha=16))
layers = {name: model.get_submodule(name) for name in original}
before = sum(W.nbytes for W in original.values()) / 2  # they are stored in bfloat16
after = sum(layer.q.nbytes for layer in layers.values())
print(f"{len(layers)} layers: {before / 2**20:.2f} MiB in bfloat16, {after / 2**20:.2f} MiB in 4 bits")

optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=4e-3)
losses = []
for start in range(0, 16 * STEPS, 16):
    ids, labels = collate(train[start : start + 16], tokenizer.pad_id)
    loss = causal_lm_loss(model, ids, labels) / (labels >= 0).sum()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
trained = loss_of(model)

plt.figure(figsize=(6, 3))
plt.plot(range(1, STEPS + 1), losses)
plt.xlabel("step")
plt.ylabel("loss of an answer's token (nats)")
plt.show()
print(f"held-out loss: {loss_of(plain_model()):.2f} of the base model, {trained:.2f} with the adapter")


# %% [markdown]
# ## Three ways to merge
#
# Training saw $\hat W$, the dequantized weight, and learned the change $s B A$ beside it. Into which weight
# should the change go?
#
# - **dequantized**: $\hat W + s B A$, stored in 16 or 32 bits. The model that was trained, but with the
#   rounding of the 4 bits in it.
# - **original**: $W + s B A$. A better base, but the adapter was not trained for it.
# - **requantized**: $\hat W + s B A$, rounded to 4 bits again. As small as the model was before.
#
# Say what you expect before you go on: which has the lowest loss? What will the third do?
#
# **Exercise.** Return the merged weight, float32.
# %%
def merged_weight(way: str, W: Tensor, q: QuantizedTensor, change: Tensor) -> Tensor:
    """way: dequantized, original or requantized"""
    # solution: begin
    if way == "original":
        return W + change
    sum_ = q.dequantize(torch.float32) + change
    return sum_ if way == "dequantized" else quantize_4bit(sum_).dequantize()
    # solution: end


# %%
with check("merged weights"):
    W, change = torch.linspace(-1, 1, 64).view(8, 8), torch.full((8, 8), 0.01)
    q = quantize_4bit(W)
    results = {way: merged_weight(way, W, q, change) for way in ("dequantized", "original", "requantized")}
    assert all(isinstance(result, Tensor) for result in results.values()), "one of the three gives no tensor"
    assert torch.allclose(results["original"], W + change), "original is W + change"
    in_dequantized = q.dequantize() + change
    assert torch.allclose(results["dequantized"], in_dequantized), "dequantized is the dequantized W + change"
    assert results["requantized"].unique().numel() <= 16, (
        "requantized has more than sixteen values in a block"
    )
    assert torch.allclose(results["requantized"], quantize_4bit(in_dequantized).dequantize()), "not that sum"

# %%
WAYS = ("dequantized", "original", "requantized")


@torch.no_grad()
def merge(way: str) -> tuple[nn.Module, float]:
    """Return a plain model with the adapter merged, and how much of the change survives."""
    merged, along, squares = plain_model(), 0.0, 0.0
    for name, layer in layers.items():
        W = merged_weight(way, original[name], layer.q, layer.change())
        base = original[name] if way == "original" else layer.q.dequantize(torch.float32)
        merged.get_submodule(name).weight.copy_(W)
        along += float(((W - base) * layer.change()).sum())
        squares += float(layer.change().square().sum())
    return merged, along / squares


ids = torch.tensor([tokenizer.encode("Question: What is Bridith Oldworth's animal called?\nAnswer:")])
table, losses_of_ways = {}, {}
with torch.no_grad():
    expected = model(ids)
    for way in WAYS:
        merged, survives = merge(way)
        losses_of_ways[way] = loss_of(merged)
        table[way] = (merged(ids) - expected).norm() / expected.norm(), survives
print(f"{'':<12} {'held-out loss':>14} {'logits off by':>14} {'change left':>12}")
print(f"{'as trained':<12} {trained:>14.3f}")
for way, (off, survives) in table.items():
    print(f"{way:<12} {losses_of_ways[way]:>14.3f} {off:>14.1e} {survives:>12.0%}")

# %%
with check("what merging does"):
    off, left = zip(*table.values(), strict=True)
    # float32 sums of some hundred terms: 1e-5. NF4 moves the logits by some percent.
    assert off[0] < 1e-5, "merged into the dequantized weights, the model must be the trained one"
    assert off[2] > 1e-3, "rounding to 4 bits must show in the logits"


# %% [markdown]
# All three work here: this training changed the weights much, with a high rate and a small model. Usually
# the change is a far smaller part of the weight. How small may it be before 4 bits swallow it?
#
# **Exercise.** For one layer, round $\hat W + c\, s B A$ to 4 bits, for a factor c. Return two numbers: how
# large the change is beside the weight, $\lVert c\, s B A\rVert / \lVert \hat W\rVert$, and how much of it
# is left: with $\Delta = c\, s B A$ and $R$ the rounded sum, $\langle R - \hat W, \Delta\rangle /
# \langle\Delta, \Delta\rangle$.
# %%
@torch.no_grad()
def left_after_rounding(layer: QLoraLinear, c: float) -> tuple[float, float]:
    # solution: begin
    W_hat, change = layer.q.dequantize(torch.float32), c * layer.change()
    rounded = quantize_4bit(W_hat + change).dequantize()
    left = ((rounded - W_hat) * change).sum() / change.square().sum()
    return float(change.norm() / W_hat.norm()), float(left)
    # solution: end


# %%
some_layer = layers["model.layers.1.mlp.up_proj"]
with check("what is left"):
    size, left = left_after_rounding(some_layer, 1.0)
    ratio = float((some_layer.change().norm() / some_layer.q.dequantize(torch.float32).norm()).detach())
    assert abs(size - ratio) < 1e-4, f"the change is {ratio:.3f} times as large as the weight, not {size:.3f}"
    tiny = left_after_rounding(some_layer, 1e-4)[1]
    assert abs(tiny) < 0.5, (
        f"of a ten-thousandth of the change {tiny:.0%} is left? It should be almost nothing"
    )

factors = [2.0**-i for i in range(12)]
for name in ("model.layers.1.mlp.up_proj", "model.layers.1.self_attn.q_proj"):
    plt.plot(*zip(*(left_after_rounding(layers[name], c) for c in factors), strict=True), "o-", label=name)
plt.xscale("log")
plt.xlabel("size of the change / size of the weight")
plt.ylabel("part of it that is left")
plt.ylim(-0.05, 1.1)
plt.grid(alpha=0.3)
plt.legend(fontsize=8)
plt.gcf().set_size_inches(6, 3)
plt.show()

# %% [markdown]
# The dequantized weights lie exactly on the codes. A change smaller than half a step rounds back to where
# it started, and is gone without a trace. So minilora refuses to merge into 4-bit weights, and
# `scripts/merge.py` writes 16 bits, `--into dequantized` or `--into original`.
#
# ## Turn a knob
#
# - At which size of the change is half of it left? Is it the same with `quant_type="fp4"`?
# - Train with a tenth of the learning rate for ten times the steps. How much of the change survives now?
# - Quantize with `blocksize=1024`. Which of the first two ways suffers?
# - Store the merged weights in bfloat16. Is its rounding smaller than that of 4 bits, and than the change?
#
# [docs/lora.md](../docs/lora.md) has a section on both bases, and
# [docs/quantization.md](../docs/quantization.md) the arithmetic.
