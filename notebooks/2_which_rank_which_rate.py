# %% [markdown]
# # 2. Which rank, which rate
#
# Two numbers decide most of a LoRA training: the rank r and the learning rate. You run a small experiment
# that compares them fairly, plot it, and find out which differences are noise. A run takes seconds.
#
# A cell with `...  # your code here` is an exercise, and the cell behind it checks your code. Notebook 1
# explains LoRA.
# %%
import math
import os

import matplotlib.pyplot as plt
import torch

from minilora import CausalLM, LoraConfig, add_lora, load_model, load_tokenizer, trainable_parameters
from minilora.data.examples import collate, tokenize
from minilora.data.rows import read_rows
from minilora.inference.evaluation import evaluate_loss
from minilora.loss import causal_lm_loss
from minilora.system.assets import ASSETS, EMBEDDED_MODEL
from minilora.testing.exercises import check

FAST = "MINILORA_FAST" in os.environ  # the tests of this notebook are in a hurry
STEPS, HELD_OUT, SEEDS = (4, 16, (1, 2)) if FAST else (40, 128, (1, 2, 3))
RANKS = (1, 8) if FAST else (1, 8, 64)
RATES = (4e-3, 1.6e-2) if FAST else (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)


# %% [markdown]
# ## Two questions
#
# 1. Does a higher rank learn better? It has more numbers: r (in + out) a layer.
# 2. Does each rank need a rate of its own?
#
# LoRA scales its update by $s = \alpha / r$. Adam moves every entry of $B$ by about the rate in its first
# step, whatever r is. So the update $s B A x$, a sum over r columns, grows with $s\, r = \alpha$ and not
# with r. If that is so, the best rate should hardly depend on r, as long as $\alpha$ stays the same.
# **Write down your answers before you run anything.**
#
# ## One run
#
# Everything but r and the rate must be equal: the model, the data, their order, the number of steps. The
# seed decides the start of A.
#
# **Exercise.** Write `start`: load the model (`load_model(EMBEDDED_MODEL, dtype=torch.float32)`), set
# PyTorch's seed, and put LoRA on all linear layers: `LoraConfig(r=r, lora_alpha=16,
# target_modules="all-linear")`. Load the model before you set the seed.
# %%
def start(r: int, seed: int) -> CausalLM:
    # solution: begin
    model = load_model(EMBEDDED_MODEL, dtype=torch.float32)
    torch.manual_seed(seed)
    add_lora(model, LoraConfig(r=r, lora_alpha=16, target_modules="all-linear"))
    return model
    # solution: end


# %%
def trained_numbers(model: CausalLM) -> int:
    return sum(p.numel() for p in trainable_parameters(model).values())


with check("the start"):
    model, again, other = start(1, seed=0), start(1, seed=0), start(1, seed=1)
    assert model is not None, "start gives None: let it return the model"
    assert trained_numbers(model) == 13_568, f"r = 1 trains 13,568 numbers, not {trained_numbers(model):,}"
    A, same, different = (next(iter(trainable_parameters(m).values())) for m in (model, again, other))
    assert torch.equal(A, same), "the same seed gives another A"
    assert not torch.equal(A, different), "another seed gives the same A"

# %% [markdown]
# **Exercise.** Fill in the loop of `run`. Step i (from 0) has the rate `rate * (1 - i / STEPS)`: it falls
# in a line to zero, so that the last steps are small. `optimizer.param_groups[0]["lr"] = ...` sets it. Then
# train on `batch(i, seed)`, as in notebook 1.
# %%
tokenizer = load_tokenizer(EMBEDDED_MODEL)
train, held_out = (
    tokenize(read_rows(str(ASSETS / f"{name}.jsonl")), tokenizer, cutoff_len=64).examples
    for name in ("train", "test")
)


def batch(i: int, seed: int) -> list:
    """Return the 16 examples of step i, in an order of the seed."""
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
    return [train[j] for j in order[16 * i : 16 * i + 16]]


def loss_of(model: CausalLM, examples: list) -> torch.Tensor:
    """Return the mean loss of a learned token."""
    ids, labels = collate(examples, tokenizer.pad_id)
    return causal_lm_loss(model, ids, labels) / (labels >= 0).sum()


def run(r: int, rate: float, seed: int = 0) -> float:
    """Train, and return the loss on held-out questions; infinity if it is not finite."""
    model = start(r, seed)
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=rate, weight_decay=0.0)
    for i in range(STEPS):
        # solution: begin
        optimizer.param_groups[0]["lr"] = rate * (1 - i / STEPS)
        loss_of(model, batch(i, seed)).backward()
        optimizer.step()
        optimizer.zero_grad()
        # solution: end
    loss = evaluate_loss(model, held_out[:HELD_OUT])
    return loss if math.isfinite(loss) else math.inf


# %%
with check("one run"):
    untrained = evaluate_loss(load_model(EMBEDDED_MODEL, dtype=torch.float32), held_out[:HELD_OUT])
    loss = run(8, 4e-3)
    assert loss < untrained - 0.5, f"the loss is {loss:.2f} after training, and {untrained:.2f} before"
    assert run(8, 4e-3) == loss, "the same run gives another loss: is everything drawn from the seed?"
    model = start(8, 0)
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=4e-3, weight_decay=0.0)
    for i in range(STEPS):
        loss_of(model, batch(i, 0)).backward()
        optimizer.step()
        optimizer.zero_grad()
    constant = evaluate_loss(model, held_out[:HELD_OUT])
    assert abs(constant - loss) > 1e-6, "the rate does not fall: set it in each step"
print(f"{untrained:.2f} before, {loss:.2f} after {STEPS} steps")

# %% [markdown]
# ## The grid
#
# Every rank at every rate. This takes a minute or two.
# %%
losses = {r: [] for r in RANKS}
for r in RANKS:
    for rate in RATES:
        losses[r].append(run(r, rate))
    print(
        f"r {r:<3} {trained_numbers(start(r, 0)):>9,} numbers   " + "  ".join(f"{x:.3f}" for x in losses[r])
    )

# %%
plt.figure(figsize=(6, 3.5))
for r in RANKS:
    plt.plot(RATES, [min(loss, 10) for loss in losses[r]], "o-", label=f"r = {r}")
plt.xscale("log")
plt.yscale("log")
plt.xlabel("learning rate")
plt.ylabel(f"held-out loss after {STEPS} steps")
plt.xticks(RATES, [str(rate) for rate in RATES])
plt.yticks([0.2, 0.5, 1, 2, 4], ["0.2", "0.5", "1", "2", "4"])
plt.minorticks_off()
plt.grid(alpha=0.3)
plt.legend()
plt.show()


# %% [markdown]
# ## Compare fairly
#
# A comparison of ranks at *one* rate says which rank likes that rate. So each rank is compared at its own
# best rate.
#
# **Exercise.** Return the rate with the lowest loss.
# %%
def best_rate(rates: tuple[float, ...], losses: list[float]) -> float:
    # solution: begin
    return rates[losses.index(min(losses))]
    # solution: end


# %%
with check("the best rate"):
    found = best_rate((1.0, 2.0, 4.0), [0.3, 0.2, math.inf])
    assert found == 2.0, (
        f"of the losses 0.3, 0.2 and infinity the second is the lowest, at rate 2, not {found}"
    )
for r in RANKS:
    print(f"r {r:<3} best rate {best_rate(RATES, losses[r]):.1e}, loss {min(losses[r]):.3f}")


# %% [markdown]
# ## Noise
#
# Another seed draws another A and another order of the data. How much does the loss move by that alone?
# Only a difference that is larger says something about the rank.
#
# Seed 0 chose the best rate, as the lowest of several losses. So its loss is too low, and does not count.
#
# **Exercise.** Return True if the two lists of losses, of several seeds each, do not overlap: all of one
# are below all of the other.
# %%
def apart(first: list[float], second: list[float]) -> bool:
    # solution: begin
    return max(first) < min(second) or max(second) < min(first)
    # solution: end


# %%
with check("noise"):
    assert apart([0.1, 0.2], [0.3, 0.4]) is True, "0.1, 0.2 and 0.3, 0.4 do not overlap"
    assert apart([0.3, 0.4], [0.1, 0.2]) is True, "the order of the two lists does not matter"
    assert apart([0.1, 0.3], [0.2, 0.4]) is False, "0.1, 0.3 and 0.2, 0.4 overlap"

# %%
by_seed = {r: [run(r, best_rate(RATES, losses[r]), seed) for seed in SEEDS] for r in RANKS}
for r, found in by_seed.items():
    print(f"r {r:<3} mean {sum(found) / len(found):.3f}, from {min(found):.3f} to {max(found):.3f}")
for first, second in zip(RANKS, RANKS[1:], strict=False):
    verdict = "a difference" if apart(by_seed[first], by_seed[second]) else "noise"
    print(f"r {first} and r {second}: {verdict}")

# %% [markdown]
# ## Questions
#
# 1. How far apart are the best rates of the smallest and the largest rank? Was your prediction right?
# 2. Which rank would you take, if every trained number costs memory?
# 3. Someone compares r = 1 and r = 64 at a rate of 1e-3 and finds a difference. What does it say?
# 4. Only a few steps are trained here. Why could more steps change the answer to the second question?
#
# [docs/experiments.md](../docs/experiments.md) repeats this experiment with more ranks, more steps, and the
# training of all weights beside it: `python scripts/experiments.py rank_and_rate`. Do your answers agree?
#
# ## Turn a knob
#
# - `use_rslora=True` scales by $\alpha / \sqrt r$. In which direction do the best rates move now?
# - Double `lora_alpha`, and halve the rate. Is that the same training? Why not quite?
# - Train twice as many steps. Does the best rate stay?
