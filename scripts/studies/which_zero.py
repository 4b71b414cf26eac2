"""Which of A and B should start at zero?

The update B A must start at zero, and one zero factor is enough. With B = 0 only B has a gradient at first,
B's being scaling * dy (x A^T); with A = 0 only A has one. Expected: Hayou et al. 2024 (arXiv:2406.08447) find
that A random, B = 0 ("Init[A]") allows larger learning rates than A = 0, B random ("Init[B]"), and is better
on average. The study also starts with both zero, where no gradient is left and nothing can be learned, and
with both random and small, where the model's function is changed before the first step.

A random A is U(-1/sqrt(in), 1/sqrt(in)), PEFT's and minilora's. A random B is drawn by the same rule, from its
own input, the rank: U(-1/sqrt(r), 1/sqrt(r)), so that both starts keep the size of what passes through. Both
small: a tenth of each.
"""

import math

import torch
from torch import nn

from minilora.config import LoraConfig
from minilora.lora import lora_layers
from minilora.model import CausalLM
from studies.drawing import BLUE, GREY, ORANGE
from studies.small_world import held_out_loss, load, train

LORA = LoraConfig(r=8, lora_alpha=16)
STEPS, SEEDS = 40, (0, 1, 2)
RATES = (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2)
STARTS = {"B = 0": (1.0, 0.0), "A = 0": (0.0, 1.0), "both small": (0.1, 0.1), "both zero": (0.0, 0.0)}


def measure(quick: bool) -> dict:
    """Train from each start at each rate; also measure the model before the first step."""
    steps, seeds, count = (4, SEEDS[:2], 16) if quick else (STEPS, SEEDS, None)
    rates = RATES[1:3] if quick else RATES
    curves = []
    for name, factors in STARTS.items():
        tried = rates[:1] if name == "both zero" else rates
        begun, losses = held_out_loss(start(*factors, seed=0), count), []
        for rate in tried:
            losses.append([loss_after(factors, rate, steps, seed, count) for seed in seeds])
            print(f"  {name}: rate {rate:.1e}: {losses[-1]}", flush=True)
        curves.append(dict(start=name, before=begun, rates=list(tried), losses=losses))
    settings = dict(r=LORA.r, lora_alpha=LORA.lora_alpha, steps=steps, schedule="linear", seeds=list(seeds))
    return settings | dict(curves=curves)


def loss_after(factors, rate: float, steps: int, seed: int, count: int | None) -> float | None:
    model = start(*factors, seed)
    train(model, rate, steps, seed)
    return held_out_loss(model, count)


@torch.no_grad()
def start(of_A: float, of_B: float, seed: int) -> CausalLM:
    """Return the small model with an adapter whose factors are random, each times a number."""
    model = load(LORA, seed)
    for layer in lora_layers(model).values():
        A, B = layer.factors("default")
        nn.init.kaiming_uniform_(B, a=math.sqrt(5))  # U(-1/sqrt(r), 1/sqrt(r)): B's input is r wide
        A.mul_(of_A)
        B.mul_(of_B)
    return model
