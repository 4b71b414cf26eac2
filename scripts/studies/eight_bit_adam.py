"""Are eight bits enough for AdamW's moments, and does it matter which 256 values they stand for?

Expected. In the dynamic code (arXiv:2110.02861, section 2), whose steps grow with the value, nothing should
be lost: not with LoRA, and not where all weights are trained. In a code of equal steps the second moment
should go wrong. v spans many decades within a block of 256, and everything below 1/510 of the block's largest
becomes 0. Then m / (sqrt(v) + eps) divides by eps = 1e-8 alone: the step is as large as m / eps.

Every tensor has its moments in 8 bits here, also those below 4096 numbers that `AdamW8bit` would keep in
float32: on this model that is most of an adapter. m is in the signed dynamic code in all of these runs; only
v's code differs.
"""

import torch
from torch import Tensor

from minilora.config import LoraConfig
from minilora.data.examples import collate
from minilora.lora import trainable_parameters
from minilora.loss import causal_lm_loss
from minilora.model import CausalLM
from minilora.optim import MOMENT_BLOCK_SIZE, adamw, adamw_8bit_definition
from minilora.quantization import dequantize_dynamic, dynamic_code, quantize_dynamic
from studies.drawing import BLUE, GREY, ORANGE
from studies.small_world import batches, figure_of, held_out_loss, load, load_to_train_all, tokenizer

LORA = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
STEPS, SEEDS = 60, (0, 1, 2)
RATES = {"LoRA": 4e-3, "all weights": 1e-3}
BETAS, EPS = (0.9, 0.999), 1e-8
UNIFORM = torch.linspace(0, 1, 256)  # v is never negative
CODES = {"32 bits": None, "8 bits, dynamic": dynamic_code(False), "8 bits, equal steps for v": UNIFORM}
# What `quantize_dynamic` makes of 0 in a block whose largest value is 1: see docs/adam8bit.md.
FLOOR = dequantize_dynamic(
    *quantize_dynamic(torch.tensor([0.0, 1.0]), dynamic_code(False), 2), dynamic_code(False), 2
)[0]
EDGES = [k / 2 for k in range(-20, 1)]  # of the histogram: log10 of v over the largest of its block


def measure(quick: bool) -> dict:
    steps, seeds, count = (3, SEEDS[:1], 16) if quick else (STEPS, SEEDS, None)
    runs, spread = [], []
    for trained, rate in RATES.items():
        for moments, code in CODES.items():
            results = [train(start(trained, seed), rate, steps, seed, code, count) for seed in seeds]
            losses, held_out = ([r[key] for r in results] for key in ("losses", "held_out_loss"))
            runs.append(dict(trained=trained, moments=moments, losses=losses, held_out_loss=held_out))
            print(f"  {trained}, {moments}: {held_out}", flush=True)
            if code is None:
                spread.append(dict(trained=trained) | spread_of(results[0]["second_moments"]))
    settings = dict(r=LORA.r, rates=RATES, betas=BETAS, eps=EPS, steps=steps, schedule="constant")
    return settings | dict(seeds=list(seeds), edges=EDGES, runs=runs, spread=spread)


def start(trained: str, seed: int) -> CausalLM:
    return load(LORA, seed) if trained == "LoRA" else load_to_train_all()


def train(
    model: CausalLM, rate: float, steps: int, seed: int, code: Tensor | None, count: int | None
) -> dict:
    """Train with moments in float32 (code None), or in 8 bits with this code for v.

    Returns the loss of every step, the loss of `count` held-out questions, and float32 second moments.
    """
    parameters = list(trainable_parameters(model).values())
    moments = [zeros(p) if code is None else quantized_zeros(p) for p in parameters]
    losses = []
    model.train()
    for step, examples in enumerate(batches(seed, steps), start=1):
        ids, labels = collate(examples, tokenizer().pad_id)
        loss = causal_lm_loss(model, ids, labels) / (labels >= 0).sum()
        losses.append(figure_of(loss.item()))
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            tensors = [(p, g, *m) for p, g, m in zip(parameters, gradients, moments, strict=True)]
            settings = rate, BETAS, EPS, 0.0, step
            if code is None:
                adamw(*map(list, zip(*tensors, strict=True)), *settings)
            else:
                adamw_8bit_definition(tensors, (dynamic_code(True), code), *settings)
    second = [m[1] for m in moments] if code is None else None
    return dict(losses=losses, held_out_loss=held_out_loss(model.eval(), count), second_moments=second)


def zeros(parameter: Tensor) -> tuple[Tensor, Tensor]:
    """Return m and v in float32."""
    return torch.zeros_like(parameter), torch.zeros_like(parameter)


def quantized_zeros(parameter: Tensor) -> tuple[Tensor, ...]:
    """Return the indices and the scales of m, and those of v."""
    n = parameter.numel()
    blocks = -(-n // MOMENT_BLOCK_SIZE)
    return tuple(make for _ in "mv" for make in (torch.zeros(n, dtype=torch.uint8), torch.zeros(blocks)))


def spread_of(second_moments: list[Tensor]) -> dict:
    """Return how v lies below the largest of its block, and which share of it each code makes 0."""
    blocks = [b for v in second_moments for b in v.flatten().split(MOMENT_BLOCK_SIZE) if b.max() > 0]
    share = torch.cat([block / block.max() for block in blocks])
    logs = share[share > 0].log10()
    counts = torch.histogram(logs, torch.tensor(EDGES)).hist / len(share)
    zero = {
        name: figure_of(sum(count_zeros(block, code) for block in blocks) / len(share))
        for name, code in CODES.items()
        if code is not None
    }
    return dict(shares=[figure_of(c) for c in counts.tolist()], zero=zero)


def count_zeros(block: Tensor, code: Tensor) -> int:
    """Count the values above 0 that come back as 0 from a code."""
    stored = dequantize_dynamic(*quantize_dynamic(block, code, len(block)), code, len(block))
    return int(((block > 0) & (stored == 0)).sum())


# ---- picture and table -------------------------------------------------------------------------------------


def draw(figure, figures: dict) -> None:
    figure.set_size_inches(8.0, 6.0)
    top, middle, bottom = figure.subfigures(3, 1, height_ratios=(1, 1.25, 1.9))
    draw_codes(top.subplots())
    for axes, spread in zip(middle.subplots(1, 2, sharey=True), figures["spread"], strict=True):
        lows = figures["edges"][:-1]
        axes.bar(lows, [100 * s for s in spread["shares"]], width=0.46, align="edge", color=BLUE)
        floors = (
            (FLOOR, "dynamic: below\nis rounded up", BLUE, 35),
            (UNIFORM[1] / 2, "equal:\nbelow is 0", ORANGE, 22),
        )
        for floor, text, colour, height in floors:
            end = floor.log10().item()
            axes.axvline(end, color=colour, linewidth=1.2, linestyle="--")
            axes.text(end - 0.1, height, text, color=colour, ha="right", va="top", fontsize=9)
        axes.set_title(f"second moments, {spread['trained']}", fontsize=10)
        axes.set_xticks([-10, -8, -6, -4, -2, 0], [f"1e{k}" for k in (-10, -8, -6, -4, -2)] + ["1"])
        axes.set(xlabel="v / the largest v of its block", ylim=(0, 36))
    middle.axes[0].set_ylabel("% of all v")
    for axes, trained in zip(bottom.subplots(1, 2, sharey=True), RATES, strict=True):
        for run in (run for run in figures["runs"] if run["trained"] == trained):
            draw_losses(axes, run)
        axes.set(yscale="log", xlabel="step", ylim=(0.05, 300))
        axes.set_title(f"{trained}, learning rate {figures['rates'][trained]:g}", fontsize=10)
        axes.grid(alpha=0.25)
        axes.set_yticks([0.1, 1, 10, 100], ["0.1", "1", "10", "100"])
        axes.minorticks_off()
    bottom.axes[0].set_ylabel("training loss (nats)")
    bottom.axes[0].legend(frameon=False, fontsize=9, loc="upper right")


def draw_codes(axes) -> None:
    """Draw the 256 values of three codes, on an axis of decades on both sides of 0."""
    codes = {
        "dynamic, signed (m)": dynamic_code(True),
        "dynamic (v)": dynamic_code(False),
        "equal steps": UNIFORM,
    }
    colours = GREY, BLUE, ORANGE
    for y, (code, colour) in enumerate(zip(codes.values(), colours, strict=True)):
        axes.plot(code, [y] * len(code), "|", color=colour, markersize=16, markeredgewidth=0.6)
    axes.set_xscale("symlog", linthresh=1e-7, linscale=0.4)
    ticks = [-1, -1e-2, -1e-4, -1e-6, 0, 1e-6, 1e-4, 1e-2, 1]
    axes.set_xticks(ticks, ["-1", "-1e-2", "-1e-4", "-1e-6", "0", "1e-6", "1e-4", "1e-2", "1"])
    axes.xaxis.minorticks_off()
    axes.set_yticks(range(3), codes)
    axes.set(ylim=(2.6, -0.6), xlim=(-1.3, 1.3))
    axes.set_title("the 256 values of each code, times the largest of a block", fontsize=10)


def draw_losses(axes, run: dict) -> None:
    """Draw the curves of all seeds in one colour; a run that is no longer finite ends."""
    looks = dict(zip(CODES, ((BLUE, "-"), (GREY, "--"), (ORANGE, "-")), strict=True))
    colour, line = looks[run["moments"]]
    for i, losses in enumerate(run["losses"]):
        finite = [loss if loss is not None else float("nan") for loss in losses]
        label = run["moments"] if i == 0 else None
        axes.plot(range(1, len(losses) + 1), finite, line, color=colour, linewidth=1.0, label=label)


def table(figures: dict) -> str:
    zero = {row["trained"]: row["zero"] for row in figures["spread"]}
    lines = [
        "| trained | moments | held-out loss, each seed | v that becomes 0 |",
        "|---|---|---|---:|",
    ]
    for run in figures["runs"]:
        losses = ", ".join("not finite" if loss is None else f"{loss:.3g}" for loss in run["held_out_loss"])
        share = zero[run["trained"]].get(run["moments"])
        lost = "" if share is None else f"{share:.2%}"
        lines.append(f"| {run['trained']} | {run['moments']} | {losses} | {lost} |")
    return "\n".join(lines)
