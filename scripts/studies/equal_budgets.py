"""Which layers should a given number of trained parameters go to?

Expected. Many layers at a low rank, rather than few layers at a high one. Hu et al. 2021 (arXiv:2106.09685,
section 7.1) adapt attention alone, and find q v at rank 4 better than q at rank 8. Dettmers et al. 2023
(arXiv:2305.14314, section 4) need LoRA on all linear layers to match full training. Schulman et al. 2025
("LoRA Without Regret") find it worse on attention alone than on the feed-forward layers alone, at equal
numbers of parameters.

Each set of layers gets the rank that spends the budget, and its own best learning rate. The update is scaled
by alpha / r, so the rates are comparable. The output head stays frozen in every set.
"""

from functools import partial

from minilora.config import LoraConfig
from studies.drawing import BLUE, GREY, ORANGE, shades
from studies.small_world import held_out_loss, load, rate_search, within

SETS = {  # name: the layers, and the rank that spends 107,520 to 109,824 parameters on them
    "q v": (("q_proj", "v_proj"), 42),
    "q k v o": (("q_proj", "k_proj", "v_proj", "o_proj"), 21),
    "gate up down": (("gate_proj", "up_proj", "down_proj"), 13),
    "all seven": ("all-linear", 8),
}
STEPS, SEEDS = 60, (1, 2)
RATES = (4e-3, 8e-3, 1.6e-2, 3.2e-2)


def measure(quick: bool) -> dict:
    steps, seeds, rates = (4, SEEDS, RATES[1:3]) if quick else (STEPS, SEEDS, RATES)
    loss, rows = partial(held_out_loss, count=64 if quick else None), []
    for name, (layers, r) in SETS.items():
        config = LoraConfig(r, lora_alpha=16, target_modules=layers)
        title, start = f"{name}, r {r}", lambda seed, config=config: load(config, seed)
        found = rate_search(title, start, rates, steps, seeds, loss)
        rows.append(dict(layers=name, r=r) | found)
    return dict(steps=steps, schedule="linear", seeds=list(seeds), alpha=16, rows=rows)


def draw(figure, figures: dict) -> None:
    figure.set_size_inches(9, 3.9)
    by_rate, by_set = figure.subplots(1, 2, sharey=True, width_ratios=[1, 1])
    colours = dict(zip(SETS, (shades(3)[0], BLUE, ORANGE, GREY), strict=True))
    for place, row in enumerate(figures["rows"]):
        colour, losses = colours[row["layers"]], row["seed_losses"]
        name = f"{row['layers']}, r = {row['r']}"
        by_rate.plot(row["rates"], row["losses"], "o-", color=colour, linewidth=1.4, markersize=4, label=name)
        mean = sum(losses) / len(losses)
        by_set.plot([place] * len(losses), losses, "o", color=colour, markersize=6)
        by_set.plot([place - 0.2, place + 0.2], [mean, mean], color=colour, linewidth=2)
    rates = figures["rows"][0]["rates"]
    by_rate.set(xscale="log", yscale="log", xlabel="learning rate, seed 0")
    by_rate.set_xticks(rates, [f"{rate:g}" for rate in rates])
    by_rate.set_yticks([0.1, 0.2, 0.5, 1, 2, 4], ["0.1", "0.2", "0.5", "1", "2", "4"])
    by_rate.set_ylabel(f"held-out loss after {figures['steps']} steps (nats)")
    by_rate.legend(frameon=False, fontsize=9)
    by_set.set_xticks(range(len(figures["rows"])), [row["layers"] for row in figures["rows"]], fontsize=9)
    by_set.set(xlabel="at the best rate, other seeds", xlim=(-0.6, 3.6))
    for axes in (by_rate, by_set):
        axes.minorticks_off()
        axes.grid(alpha=0.25)


def table(figures: dict) -> str:
    lines = ["| layers | rank | parameters | best rate | held-out loss there |", "|---|---:|---:|---:|---:|"]
    for row in figures["rows"]:
        cells = row["layers"], str(row["r"]), f"{row['parameters']:,}", f"{row['best_rate']:.2g}"
        lines.append(f"| {' | '.join(cells)} | {within(row['seed_losses'])} |")
    return "\n".join(lines)
