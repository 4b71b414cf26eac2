# %% [markdown]
# # 1. LoRA in 30 lines
#
# You write a LoRA layer, put it on a small language model, compare it with PEFT's, and train it. It takes
# half an hour, and the CPU of a laptop. You know PyTorch; you need to know nothing of LoRA.
#
# A cell with `...  # your code here` is an exercise. The cell behind it checks your code, and says in a
# line what is still wrong. The notebook with `_solution` in its name has the answers.
# %%
import copy
import math
import os
import warnings

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

from minilora import generate, load_model, load_tokenizer
from minilora.data.examples import collate, tokenize
from minilora.data.rows import read_rows
from minilora.inference.evaluation import evaluate_loss
from minilora.loss import causal_lm_loss
from minilora.system.assets import ASSETS, EMBEDDED_MODEL
from minilora.testing import check_lora_layer
from minilora.testing.exercises import check

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # those of its own imports
    import peft

FAST = "MINILORA_FAST" in os.environ  # the tests of this notebook are in a hurry
STEPS, EXAMPLES = (4, 3) if FAST else (40, 30)


# %% [markdown]
# ## The idea
#
# A linear layer computes $y = x W^\top$, with $W$ of shape (out, in). To fine-tune it would mean to change
# all of $W$. LoRA leaves $W$ as it is, and learns a *change* of low rank beside it:
#
# $$y = x W^\top + \frac{\alpha}{r}\, x A^\top B^\top$$
#
# $A$ has the shape (r, in) and $B$ the shape (out, r). The rank r is small, such as 8. So $B A$ is as large
# as $W$, but it is made of few numbers.
#
# **Exercise.** How many numbers does LoRA train for one layer? How many does $W$ have?
# %%
def trained_numbers(in_features: int, out_features: int, r: int) -> int:
    # solution: begin
    return r * (in_features + out_features)
    # solution: end


def all_numbers(in_features: int, out_features: int) -> int:
    # solution: begin
    return in_features * out_features
    # solution: end


# %%
with check("numbers of one layer"):
    assert trained_numbers(2, 3, 1) == 5, (
        f"A (1, 2) and B (3, 1) hold 5 numbers, not {trained_numbers(2, 3, 1)}"
    )
    assert all_numbers(2, 3) == 6, f"W (3, 2) holds 6 numbers, not {all_numbers(2, 3)}"
    share = trained_numbers(4096, 4096, 8) / all_numbers(4096, 4096)
print(f"a layer of Mistral-7B, 4096 x 4096, with r = 8: {share:.2%} of its numbers are trained")


# %% [markdown]
# ## The layer
#
# Four things to decide:
#
# - **Where does it start?** At the base model: the change must be zero. But if A *and* B were zero, no
#   gradient would ever reach them. So B is zero, and A is random: uniform within $\pm 1/\sqrt{in}$.
# - **What is frozen?** The base layer: weight and bias.
# - **Where is dropout?** On the input of A alone. The base layer sees all of x.
# - **Which dtype?** A and B are float32, whatever the model has. The update is cast to the output's dtype.
#
# **Exercise.** Fill in both methods. `F.dropout(x, p, self.training)` and `F.linear(x, W)`, which is $x
# W^\top$, will help.
# %%
class LoraLinear(nn.Module):
    """x: (..., in) -> (..., out)"""

    def __init__(self, base: nn.Linear, r: int, lora_alpha: float, lora_dropout: float = 0.0):
        super().__init__()
        self.base, self.p, self.merged = base, lora_dropout, False
        # Freeze the base. Then make self.scaling, self.lora_A (r, in) and self.lora_B (out, r).
        # solution: begin
        base.requires_grad_(False)
        self.scaling = lora_alpha / r
        bound = 1 / math.sqrt(base.in_features)
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features).uniform_(-bound, bound))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r))
        # solution: end

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)
        if self.merged:
            return y
        # solution: begin
        narrow = F.linear(F.dropout(x, self.p, self.training).float(), self.lora_A)  # (..., r)
        return y + (F.linear(narrow, self.lora_B) * self.scaling).to(y.dtype)
        # solution: end


# %%
with check("the layer at its start"):
    layer, x = LoraLinear(nn.Linear(6, 5), r=2, lora_alpha=4), torch.randn(3, 6)
    assert hasattr(layer, "lora_A") and hasattr(layer, "lora_B"), "the layer has no lora_A or no lora_B yet"
    assert layer(x) is not None, "forward gives None"
    assert torch.equal(layer(x), layer.base(x)), "with B = 0 the output must be the base layer's"

# %% [markdown]
# The next check is a *battery*: a list of properties that every LoRA layer owes. Each is tried on layers of
# many shapes, and the report shows the smallest example with which one of them fails. Break your layer on
# purpose (forget the scaling, drop x before the base layer) and see which property notices.
# %%
with check("every property of a LoRA layer"):
    report = check_lora_layer(LoraLinear, max_examples=EXAMPLES)
    report.raise_for_failures()
print(report)


# %% [markdown]
# ## Merging
#
# After training, the change can be added into the weight. Then the layer costs nothing more than before:
#
# $$W' = W + \frac{\alpha}{r} B A$$
#
# **Exercise.** Write both verbs. Merged twice, nothing may be added the second time. Compute in float32,
# and let `copy_` round to W's dtype. A subclass saves you from writing the layer again.
# %%
class MergingLora(LoraLinear):
    @torch.no_grad()
    def merge(self) -> None:
        # solution: begin
        if not self.merged:
            self.base.weight.copy_(self.base.weight.float() + self.scaling * self.lora_B @ self.lora_A)
            self.merged = True
        # solution: end

    @torch.no_grad()
    def unmerge(self) -> None:
        # solution: begin
        if self.merged:
            self.base.weight.copy_(self.base.weight.float() - self.scaling * self.lora_B @ self.lora_A)
            self.merged = False
        # solution: end


# %%
with check("merging"):
    layer = MergingLora(nn.Linear(6, 5), r=2, lora_alpha=4)
    nn.init.normal_(layer.lora_B)
    W = layer.base.weight.clone()
    layer.merge()
    assert layer.merged, "merge must set self.merged to True"
    assert not torch.equal(layer.base.weight, W), "merge leaves the weight as it was"
    check_lora_layer(MergingLora, max_examples=EXAMPLES).raise_for_failures()

# %% [markdown]
# ## On a model
#
# The model comes with minilora. It is a Llama of 1.9 million parameters that has read texts about an
# invented world, and has never seen a question.
#
# **Exercise.** Freeze the model, and replace each linear layer whose name ends in one of `targets` by
# `MergingLora(layer, r, lora_alpha)`. `model.named_modules()` gives names and layers. Go through a list of
# it, since you change the model while you go. `model.set_submodule(name, new_layer)` replaces a layer.
# %%
tokenizer = load_tokenizer(EMBEDDED_MODEL)
QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")


def add_my_lora(model: nn.Module, targets: tuple[str, ...], r: int, lora_alpha: float) -> nn.Module:
    # solution: begin
    model.requires_grad_(False)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name.endswith(targets):
            model.set_submodule(name, MergingLora(layer, r, lora_alpha))
    return model
    # solution: end


# %%
with check("layers on the model"):
    torch.manual_seed(0)
    model = add_my_lora(load_model(EMBEDDED_MODEL, dtype=torch.float32), QKVO, r=8, lora_alpha=16)
    assert model is not None, "add_my_lora gives None: let it return the model"
    adapted = [layer for layer in model.modules() if isinstance(layer, MergingLora)]
    assert len(adapted) == 16, f"4 layers x q, k, v, o are 16 adapted layers, not {len(adapted)}"
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    numbers = sum(p.numel() for p in trained.values())
    assert numbers == 40_960, f"{numbers:,} numbers are trainable; A and B of the 16 layers are 40,960"

# %% [markdown]
# ## The same as PEFT
#
# PEFT is the library that most people use. The same A and B must give the same logits and the same
# gradients. Only the rounding of float32 may differ, so the difference is measured in units of the largest
# value.
# %%
torch.manual_seed(1)
ids = torch.randint(3, tokenizer.vocab_size, (2, 24))
mine = copy.deepcopy(model)
theirs = load_model(EMBEDDED_MODEL, dtype=torch.float32)
theirs = peft.inject_adapter_in_model(peft.LoraConfig(r=8, lora_alpha=16, target_modules=list(QKVO)), theirs)
pairs = []  # my parameter, PEFT's parameter
for name, layer in mine.named_modules():
    if isinstance(layer, MergingLora):
        other = theirs.get_submodule(name)
        nn.init.normal_(layer.lora_B, std=0.02)  # B = 0 would hide almost every mistake
        pairs.append((layer.lora_A, other.lora_A["default"].weight))
        pairs.append((layer.lora_B, other.lora_B["default"].weight))
with torch.no_grad():
    for my_factor, their_factor in pairs:
        their_factor.copy_(my_factor)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().abs().max() / b.detach().abs().max())


with check("the same as PEFT"):
    logits, expected = mine(ids), theirs(ids)
    logits.square().mean().backward()
    expected.square().mean().backward()
    in_logits, in_gradients = difference(logits, expected), max(difference(a.grad, b.grad) for a, b in pairs)
    print(f"largest difference: logits {in_logits:.1e}, gradients {in_gradients:.1e}")
    assert in_logits < 1e-6, f"the logits differ by {in_logits:.1e}"
    assert in_gradients < 1e-5, f"the gradients differ by {in_gradients:.1e}"

# %% [markdown]
# ## Training
#
# The data are questions with answers. Only the answers are learned: `labels` holds -100 elsewhere.
# `causal_lm_loss` returns the *sum* over the learned tokens, so we divide by their number.
#
# **Exercise.** Write one step: gradients, the optimizer's step, and gradients back to nothing.
# %%
train, held_out = (
    tokenize(read_rows(str(ASSETS / f"{name}.jsonl")), tokenizer, cutoff_len=64) for name in ("train", "test")
)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=4e-3)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, examples: list) -> float:
    """Train on the examples. Returns the mean loss of a learned token, before the step."""
    ids, labels = collate(examples, tokenizer.pad_id)  # (16, T)
    loss = causal_lm_loss(model, ids, labels) / (labels >= 0).sum()
    # solution: begin
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()
    # solution: end


# %%
with check("a step"):
    twin = copy.deepcopy(model)
    trial = torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], lr=4e-3)
    first, second = (step(twin, trial, train.examples[:16]) for _ in range(2))
    assert first is not None, "step gives None: let it return the loss as a number"
    assert second < first, f"the loss does not fall: {first:.3f}, then {second:.3f}"
    left = [name for name, p in twin.named_parameters() if p.grad is not None and p.grad.any()]
    assert not left, f"gradients are left after the step, such as of {left[0]}"
    still = all(
        torch.equal(twin.state_dict()[n], w) for n, w in model.state_dict().items() if "lora" not in n
    )
    assert still, "a step has changed a weight of the base model"


# %%
def answer(question: str) -> str:
    prompt = torch.tensor([tokenizer.encode(question)])
    out = generate(model, prompt, max_new_tokens=16, eos_token_ids=[tokenizer.eos_id])
    return tokenizer.decode(out[0, prompt.shape[1] :].tolist()).strip()


row = held_out.rows[0]
before, loss_before = answer(row.prompt), evaluate_loss(model, held_out.examples[:64])
losses = [step(model, optimizer, train.examples[16 * i : 16 * i + 16]) for i in range(STEPS)]
after, loss_after = answer(row.prompt), evaluate_loss(model, held_out.examples[:64])

plt.figure(figsize=(6, 3))
plt.plot(range(1, STEPS + 1), losses)
plt.xlabel("step")
plt.ylabel("loss of an answer's token (nats)")
plt.show()
print(f"held-out loss: {loss_before:.2f} before, {loss_after:.2f} after\n")
print(f"{row.prompt}\n  before    {before}\n  after     {after}\n  expected  {row.completion}")

# %% [markdown]
# ## Turn a knob
#
# Train again from the start with one thing changed, and say before you look what you expect:
#
# - r = 1: an eighth of the numbers. How much worse is it?
# - `targets` = `("q_proj",)` with r = 32, which has *more* numbers than all four with r = 8.
# - `lora_alpha` = 1, and 256.
# - A = 0 and B random, in place of the reverse.
#
# [docs/lora.md](../docs/lora.md) has the answers, and the reasons. Notebook 2 turns rank and learning rate.
