"""Which layers should a given number of trained parameters go to?

Expected. Many layers at a low rank, rather than few layers at a high one. Hu et al. 2021 (arXiv:2106.09685,
section 7.1) adapt attention alone, and find q v at rank 4 better than q at rank 8. Dettmers et al. 2023
(arXiv:2305.14314, section 4) need LoRA on all linear layers to match full training. Schulman et al. 2025
("LoRA Without Regret") find it worse on attention alone than on the feed-forward layers alone, at equal
numbers of parameters.

Each set of layers gets the rank that spends the budget, and its own best learning rate. The update is scaled
by alpha / r, so the rates are comparable. The output head stays frozen in every set.
"""

from minilora.config import LoraConfig
from studies.drawing import BLUE, GREY
from studies.small_world import held_out_loss, load, rate_search, within

SETS = {  # name: layers, and the ranks that spend about 27,000 and about 108,000 parameters
    "q v": (("q_proj", "v_proj"), (11, 42)),
    "q k v o": (("q_proj", "k_proj", "v_proj", "o_proj"), (5, 21)),
    "gate up down": (("gate_proj", "up_proj", "down_proj"), (3, 13)),
    "all seven": ("all-linear", (2, 8)),
}
STEPS, SEEDS = 60, (1, 2)
RATES = (2e-3, 4e-3, 8e-3)


def measure(quick: bool) -> dict:
    steps, seeds, rates = (4, SEEDS[:2], RATES[:2]) if quick else (STEPS, SEEDS, RATES)
    rows = []
    for budget in range(1 if quick else 2):
        for name, (layers, ranks) in SETS.items():
            config = LoraConfig(r=ranks[budget], lora_alpha=16, target_modules=layers)
            title, start = f"{name}, r {config.r}", lambda seed, config=config: load(config, seed)
            search = dict(steps=steps, seeds=seeds)
            if quick:
                search["measured"] = lambda model: held_out_loss(model, 64)
            row = dict(layers=name, r=config.r, budget=budget)
            rows.append(row | rate_search(title, start, rates, **search))
    return dict(steps=steps, schedule="linear", seeds=list(seeds), alpha=16, rows=rows)


def draw(figure, figures: dict) -> None:
    figure.set_size_inches(7.6, 3.8)
    axes, names = figure.subplots(), list(SETS)
    for row in figures["rows"]:
        colour, side = ((GREY, -0.13), (BLUE, 0.13))[row["budget"]]
        place, losses = names.index(row["layers"]) + side, row["seed_losses"]
        mean = sum(losses) / len(losses)
        axes.plot([place] * len(losses), losses, "o", color=colour, markersize=5, alpha=0.6)
        axes.plot([place - 0.09, place + 0.09], [mean, mean], color=colour, linewidth=2)
        above = dict(textcoords="offset points", ha="center", color=colour)
        axes.annotate(f"r {row['r']}", (place, max(losses)), (0, 6), **above)
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel(f"held-out loss after {figures['steps']} steps (nats)")
    axes.set_ylim(0, 1.25 * max(max(row["seed_losses"]) for row in figures["rows"]))
    for y, colour, budget in ((0.93, GREY, 0), (0.86, BLUE, 1)):
        sizes = [row["parameters"] for row in figures["rows"] if row["budget"] == budget]
        if sizes:
            text = f"{min(sizes):,} to {max(sizes):,} parameters"
            axes.text(0.98, y, text, color=colour, ha="right", transform=axes.transAxes)
    axes.grid(axis="y", alpha=0.25)


def table(figures: dict) -> str:
    lines = ["| layers | rank | parameters | best rate | held-out loss there |", "|---|---:|---:|---:|---:|"]
    for row in figures["rows"]:
        cells = row["layers"], str(row["r"]), f"{row['parameters']:,}", f"{row['best_rate']:.2g}"
        lines.append(f"| {' | '.join(cells)} | {within(row['seed_losses'])} |")
    return "\n".join(lines)
