"""How many directions does an update of all weights need, and how many does LoRA need?

Expected. Few. Aghajanyan et al. 2020 (arXiv:2012.13255) fine-tune language models well in a few hundred
random directions. Hu et al. 2021 (arXiv:2106.09685, section 7.2) find that LoRA of rank 1 nearly suffices. An
update of all weights has no low rank by itself: Adam moves every entry in each step by about the learning
rate, also where the gradient is noise. But its largest singular values should carry what lowers the loss.

The study trains the weights of all linear layers and takes each update apart: dW = sum of s_i u_i v_i^T. It
keeps the k largest terms of each layer, the best approximation of rank k, and asks the model again. Beside
it, LoRA is trained in k directions from the start, for as many steps.
"""

import torch
from torch import Tensor

from minilora.config import LoraConfig
from minilora.model import CausalLM
from studies.drawing import BLUE, GREY, ORANGE
from studies.small_world import (
    figure_of,
    held_out_loss,
    linear_layers,
    load,
    load_to_train_all,
    right_answers,
    train,
    within,
)

STEPS, SEEDS = 60, (0, 1)
FULL_RATE, LORA_RATE = 1e-3, 4e-3  # the best ones of rank_and_rate
RANKS = (1, 2, 4, 8, 16, 32, 64)
CUTS = (*RANKS, 128, 192)


def measure(quick: bool) -> dict:
    steps, seeds, ranks, cuts, count = STEPS, SEEDS, RANKS, CUTS, None
    if quick:
        steps, seeds, ranks, cuts, count = 4, SEEDS[:2], (1, 4), (1, 192), 32
    cut = [dict(r=k, losses=[], right=[], kept=[]) for k in cuts]
    lora = [dict(r=r, losses=[], right=[]) for r in ranks]
    values = {}
    for seed in seeds:
        model = load_to_train_all("_proj.weight")
        train(model, FULL_RATE, steps, seed)
        parts = updates(model)
        values = values or {name: [figure_of(s) for s in parts[name][1].tolist()] for name in parts}
        for row in cut:
            row["kept"].append(keep_largest(model, parts, row["r"]))
            ask(model, row, count, f"dW cut to rank {row['r']}, seed {seed}")
        for row in lora:
            model = load(LoraConfig(row["r"], lora_alpha=16, target_modules="all-linear"), seed)
            train(model, LORA_RATE, steps, seed)
            ask(model, row, count, f"LoRA of rank {row['r']}, seed {seed}")
    settings = dict(steps=steps, schedule="linear", seeds=list(seeds), rates=[FULL_RATE, LORA_RATE])
    return settings | dict(singular_values=values, cut=cut, lora=lora)


def updates(model: CausalLM) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Return name -> U (out, k), S (k,), V^T (k, in) of what training added to each linear layer."""
    before = linear_layers(load())
    after = linear_layers(model)
    return {
        name: torch.linalg.svd((after[name].weight - before[name].weight).detach(), full_matrices=False)
        for name in after
    }


@torch.no_grad()
def keep_largest(model: CausalLM, parts: dict[str, tuple[Tensor, Tensor, Tensor]], k: int) -> float:
    """Cut every update to rank k. Returns the share of its sum of squares that is left, of all layers."""
    before = linear_layers(load())
    for name, layer in linear_layers(model).items():
        U, S, Vt = parts[name]
        layer.weight.copy_(before[name].weight + (U[:, :k] * S[:k]) @ Vt[:k])  # (out, k) (k, in)
    left, whole = (sum(float(S[:n].square().sum()) for _, S, _ in parts.values()) for n in (k, None))
    return figure_of(left / whole)


def ask(model: CausalLM, row: dict, count: int | None, name: str) -> None:
    """Append the loss and the right answers of a model to a row of figures."""
    row["losses"].append(held_out_loss(model, count))
    row["right"].append(right_answers(model, count))
    print(f"  {name}: loss {row['losses'][-1]}, right answers {row['right'][-1]:.1%}", flush=True)


def draw(figure, figures: dict) -> None:
    figure.set_size_inches(9, 3.4)
    spectrum, loss, right = figure.subplots(1, 3)
    for name, values in figures["singular_values"].items():
        colour, order = (ORANGE, 3) if ".mlp." in name else (BLUE, 2)
        spectrum.plot(range(1, len(values) + 1), values, color=colour, linewidth=0.8, alpha=0.7, zorder=order)
    spectrum.set(xscale="log", yscale="log", xlabel="number i", ylim=(3e-3, None))
    spectrum.set_title("singular values of dW, each layer", fontsize=10)
    spectrum.text(0.05, 0.14, "attention", color=BLUE, transform=spectrum.transAxes)
    spectrum.text(0.05, 0.06, "feed-forward", color=ORANGE, transform=spectrum.transAxes)
    for axes, key, title in ((loss, "losses", "held-out loss (nats)"), (right, "right", "right answers")):
        for kind, colour, name in (
            ("cut", GREY, "dW cut to rank k"),
            ("lora", BLUE, "LoRA trained at rank k"),
        ):
            ranks = [row["r"] for row in figures[kind]]
            mean = [sum(row[key]) / len(row[key]) for row in figures[kind]]
            low, high = ([edge(row[key]) for row in figures[kind]] for edge in (min, max))
            axes.fill_between(ranks, low, high, color=colour, alpha=0.2, linewidth=0)
            axes.plot(ranks, mean, "o-", color=colour, linewidth=1.4, markersize=4, label=name)
        axes.set(xscale="log", xlabel="rank k")
        axes.set_title(title, fontsize=10)
        axes.set_xticks([1, 4, 16, 64, 192], ["1", "4", "16", "64", "192"])
    loss.set(yscale="log")
    losses = [loss for kind in ("cut", "lora") for row in figures[kind] for loss in row["losses"]]
    ticks = [0.15, 0.2, 0.3, 0.5, 0.7, 1, 2, 4]
    loss.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    loss.set_ylim(0.9 * min(losses), 1.1 * max(losses))
    right.set_yticks([0, 0.2, 0.4, 0.6, 0.8], ["0%", "20%", "40%", "60%", "80%"])
    loss.legend(frameon=False, fontsize=9, loc="upper right")
    spectrum.set_xticks([1, 4, 16, 64, 192], ["1", "4", "16", "64", "192"])
    for axes in (spectrum, loss, right):
        axes.minorticks_off()
        axes.grid(alpha=0.25)


def table(figures: dict) -> str:
    lines = ["| rank | kept of dW² | loss, dW cut | right, dW cut | loss, LoRA | right, LoRA |"]
    lines.append("|---:|---:|---:|---:|---:|---:|")
    lora = {row["r"]: row for row in figures["lora"]}
    for row in figures["cut"]:
        kept = sum(row["kept"]) / len(row["kept"])
        cells = [str(row["r"]), f"{kept:.0%}", within(row["losses"]), percent(row["right"])]
        trained = lora.get(row["r"])
        cells += [within(trained["losses"]), percent(trained["right"])] if trained else ["", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def percent(shares: list[float]) -> str:
    return f"{100 * sum(shares) / len(shares):.0f}%"
