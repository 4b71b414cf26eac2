"""Which of A and B should start at zero?

The update B A must start at zero, and one zero factor is enough. With B = 0 only B has a gradient at first,
B's being scaling * dy (x A^T); with A = 0 only A has one. Expected: Hayou et al. 2024 (arXiv:2406.08447) find
that A random, B = 0 ("Init[A]") allows larger learning rates than A = 0, B random ("Init[B]"), and is better
on average. The study also starts with both zero, where no gradient is left and nothing can be learned, and
with both random and small, where the model's function is changed before the first step.

A random A is U(-1/sqrt(in), 1/sqrt(in)), PEFT's and minilora's. A random B is drawn by the same rule, from
its own input, the rank: U(-1/sqrt(r), 1/sqrt(r)), so that both starts keep the size of an activation. Both
small: a tenth of each.
"""

import math

import torch
from torch import nn

from minilora.config import LoraConfig
from minilora.lora import lora_layers
from minilora.model import CausalLM
from studies.drawing import BLUE, GREY, ORANGE, plain_log_ticks
from studies.small_world import held_out_loss, load, train, within

LORA = LoraConfig(r=8, lora_alpha=16)
STEPS, SEEDS, ASKED = 40, (0, 1, 2), 250  # the last: held-out questions of a loss
RATES = (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2)
STARTS = {"B = 0": (1.0, 0.0), "A = 0": (0.0, 1.0), "both small": (0.1, 0.1), "both zero": (0.0, 0.0)}
LABELS = {"B = 0": "A random, B = 0", "A = 0": "A = 0, B random", "both small": "both random, a tenth"}


def measure(quick: bool) -> dict:
    """Train from each start at each rate; also measure the model before the first step."""
    steps, seeds, count = (4, SEEDS[:2], 16) if quick else (STEPS, SEEDS, ASKED)
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


def loss_after(factors, rate: float, steps: int, seed: int, count: int) -> float | None:
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


# ---- picture and table -------------------------------------------------------------------------------------


def draw(figure, figures: dict) -> None:
    figure.set_size_inches(7.6, 4.4)
    axes = figure.subplots()
    for curve, colour in zip(figures["curves"], (BLUE, ORANGE, GREY, GREY), strict=True):
        if curve["start"] == "both zero":
            axes.axhline(mean(curve["losses"][0]), color=GREY, linewidth=1, linestyle="--")
            axes.text(min(curve["rates"]), 0.88 * mean(curve["losses"][0]), "both zero", color=GREY)
            continue
        means = [mean(losses) for losses in curve["losses"]]
        axes.plot(curve["rates"], means, color=colour, linewidth=1.4, label=LABELS[curve["start"]])
        for rate, losses in zip(curve["rates"], curve["losses"], strict=True):
            axes.plot([rate] * len(losses), list(map(worst, losses)), "o", color=colour, markersize=3.5)
    axes.set(xscale="log", yscale="log", xlabel="learning rate")
    axes.set(ylabel=f"held-out loss after {figures['steps']} steps (nats)")
    rates = figures["curves"][0]["rates"]
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.xaxis.minorticks_off()
    plain_log_ticks(axes.yaxis)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)


def worst(loss: float | None) -> float:
    """Return a loss to draw: 10 for one that is not finite."""
    return 10.0 if loss is None else loss


def mean(losses: list[float | None]) -> float:
    return sum(map(worst, losses)) / len(losses)


def table(figures: dict) -> str:
    rates = figures["curves"][0]["rates"]
    lines = [f"| start | loss at step 0 | {' | '.join(f'{rate:g}' for rate in rates)} |"]
    lines.append("|---|---:|" + "---:|" * len(rates))
    for curve in figures["curves"]:
        found = dict(zip(curve["rates"], curve["losses"], strict=True))
        cells = [spread(found[rate]) if rate in found else "" for rate in rates]
        lines.append(f"| {curve['start']} | {curve['before']:.3f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(losses: list[float | None]) -> str:
    return "not finite" if None in losses else within(losses)
