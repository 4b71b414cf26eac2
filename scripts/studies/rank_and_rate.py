"""Which learning rate does each rank want, and is LoRA's rate ten times the rate of full training?

Expected. A rank that is large enough learns as well as all weights, each at its own best rate (Schulman et
al. 2025, "LoRA Without Regret", thinkingmachines.ai/blog/lora). They find LoRA's best rate to be ten times
that of full training. They also find that it hardly depends on the rank, under Adam and with alpha / r:
Adam's first step moves every entry of B by the learning rate, so s B A x grows with s r, which alpha / r
keeps constant. With alpha / sqrt(r) it grows with sqrt(r), so the best rate should fall with 1 / sqrt(r).

LoRA is on all linear layers. Full training moves all weights, embeddings and norms included. The two scalings
agree at r = 8, where both are 2.
"""

from minilora.config import LoraConfig
from studies.drawing import BLUE, GREY, ORANGE, shades
from studies.small_world import held_out_loss, load, load_to_train_all, rate_search, within

RANKS = {"alpha / r": (1, 2, 4, 8, 16, 32, 64), "alpha / sqrt(r)": (1, 4, 8, 16, 64)}
ALPHA, EQUAL_AT = 16, 8  # the rank at which both scalings are ALPHA / EQUAL_AT
STEPS, SEEDS = 60, (1, 2, 3)
LORA_RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
FULL_RATES = (1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)
RATE_NAMES = ("0.0005", "0.002", "0.008", "0.032")  # of ticks of the picture
FULL = "all weights"


def measure(quick: bool) -> dict:
    steps, seeds = (4, SEEDS[:2]) if quick else (STEPS, SEEDS)
    lora_rates, full_rates = (rates[2:4] if quick else rates for rates in (LORA_RATES, FULL_RATES))
    search = dict(
        steps=steps, seeds=seeds, measured=lambda model: held_out_loss(model, 64 if quick else None)
    )
    curves = [dict(kind=FULL, **rate_search(FULL, lambda _: load_to_train_all(), full_rates, **search))]
    for kind, ranks in RANKS.items():
        use_rslora = "sqrt" in kind
        for r in (1, EQUAL_AT) if quick else ranks:
            if use_rslora and r == EQUAL_AT:
                same = next(curve for curve in curves if curve.get("r") == r)
                curves.append(same | {"kind": kind})
                continue
            config = LoraConfig(r, alpha_of(use_rslora), 0.0, "all-linear", use_rslora)
            name, start = f"r {r}, {kind}", lambda seed, config=config: load(config, seed)
            found = rate_search(name, start, lora_rates, **search)
            curves.append(dict(kind=kind, r=r, scaling=config.scaling, **found))
    return dict(steps=steps, schedule="linear", seeds=list(seeds), curves=curves)


def alpha_of(use_rslora: bool) -> float:
    return ALPHA / EQUAL_AT**0.5 if use_rslora else ALPHA


def draw(figure, figures: dict) -> None:
    figure.set_size_inches(9.6, 4.2)
    panels = figure.subplots(1, 2, sharey=True)
    full = next(curve for curve in figures["curves"] if curve["kind"] == FULL)
    ranks = RANKS["alpha / r"]
    colours = dict(zip(ranks, shades(len(ranks)), strict=True))
    for axes, kind in zip(panels, RANKS, strict=True):
        curves = [curve for curve in figures["curves"] if curve["kind"] == kind]
        for curve in curves:
            plot(axes, curve, colours[curve["r"]], f"r = {curve['r']}")
        plot(axes, full, ORANGE, FULL)
        axes.set(xscale="log", yscale="log", xlabel="learning rate", ylim=(0.08, 5))
        axes.set_title(f"LoRA, scaled by {kind}", color=BLUE, fontsize=11)
        axes.set_yticks([0.1, 0.2, 0.5, 1, 2, 4], ["0.1", "0.2", "0.5", "1", "2", "4"])
        axes.set_xticks([float(name) for name in RATE_NAMES], RATE_NAMES)
        axes.minorticks_off()
        axes.grid(alpha=0.25)
    panels[0].set_ylabel(f"held-out loss after {figures['steps']} steps (nats)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    panels[0].text(0.02, 0.02, "a dot: the best rate", transform=panels[0].transAxes, color=GREY)


def plot(axes, curve: dict, colour, label: str) -> None:
    """Draw a curve of losses, and a dot at the best rate."""
    losses = [loss if loss is not None else 10 for loss in curve["losses"]]
    axes.plot(curve["rates"], losses, color=colour, linewidth=1.4, label=label)
    axes.plot(curve["best_rate"], min(losses), "o", color=colour, markersize=5)


def table(figures: dict) -> str:
    lines = [
        "| trained | scaling | parameters | best rate | held-out loss there |",
        "|---|---|---:|---:|---:|",
    ]
    for curve in figures["curves"]:
        scaling = f"{curve['kind']} = {curve['scaling']:.3g}" if "r" in curve else ""
        name = f"LoRA, r = {curve['r']}" if "r" in curve else FULL
        cells = name, scaling, f"{curve['parameters']:,}", f"{curve['best_rate']:.2g}"
        lines.append(f"| {' | '.join(cells)} | {within(curve['seed_losses'])} |")
    return "\n".join(lines)
