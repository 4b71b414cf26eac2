"""How small are the gradients that float16 must hold, and what does the loss scale do about it?

Expected. float16 has no number between 0 and 6e-8, and few digits below 6.1e-5. The loss is a mean over the
tokens of a step, so gradients of activations are small, and smaller in a larger batch; those of A and B are
sums over tokens, and larger. Rounded to float16, part of the activations' gradients should vanish. Times
S = 65536 hardly any should, and none should overflow (Micikevicius et al. 2017, arXiv:1710.03740, section
3.2). S then doubles every so often until something overflows, loses one step, and is halved: a saw.

The gradients are measured in float32 and then rounded to float16, so each is compared with its true value.
Then the model trains in float16 itself, on the CPU: with minilora/loss_scale.py, with S = 1, and with S =
2^-10, which stands for a step of 1,024 times the tokens. S may double after 4 steps without an overflow, not
2,000, so that the saw shows.
"""

import math

import torch
from torch import Tensor, nn

from minilora.config import LoraConfig
from minilora.data.examples import collate
from minilora.formats.weights import load_model
from minilora.lora import add_lora, lora_layers, trainable_parameters
from minilora.loss import causal_lm_loss
from minilora.loss_scale import LossScale
from minilora.model import CausalLM
from minilora.optim import make_optimizer
from minilora.system.assets import EMBEDDED_MODEL
from studies.drawing import BLUE, GREY, ORANGE, plain_log_ticks
from studies.small_world import batches, figure_of, held_out_loss, load, tokenizer, train

LORA = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
LEARNING_RATE, SEED = 4e-3, 0
TRAINED, STEPS, GROWTH = 40, 40, 4  # steps before the gradients are taken; of a run; until S doubles
FLOOR, NORMAL, MOST = 2.0**-24, 2.0**-14, 65504.0  # of float16: smallest, smallest normal, largest number
SCALES = [2.0**k for k in range(-16, 25, 2)]
EDGES = [k / 2 for k in range(-28, 5)]  # of the histogram, log10
KINDS = "activations", "A", "B"
S_OF = {
    "float32": None,
    "float16, S adjusted": 65536.0,
    "float16, S = 1": 1.0,
    "float16, S = 2^-10": 2.0**-10,
}


def measure(quick: bool) -> dict:
    trained_steps, steps, count = (2, 3, 8) if quick else (TRAINED, STEPS, None)
    gradients = gradients_of(trained_steps)
    found = []
    for kind, values in gradients.items():
        logs = values.abs().log10()
        counts = torch.histogram(logs, torch.tensor(EDGES)).hist / len(values)
        rounded = [dict(scale=s) | losses_at(values, s) for s in SCALES]
        found.append(
            dict(kind=kind, count=len(values), shares=list(map(figure_of, counts.tolist())), scales=rounded)
        )
        print(f"  {kind}: {len(values):,} gradients, at S = 1 {losses_at(values, 1.0)}", flush=True)
    runs = [dict(name=name) | train_scaled(scale, steps, count) for name, scale in S_OF.items()]
    settings = dict(r=LORA.r, learning_rate=LEARNING_RATE, seed=SEED, trained=trained_steps, steps=steps)
    return settings | dict(growth=GROWTH, edges=EDGES, gradients=found, runs=runs)


def gradients_of(steps: int) -> dict[str, Tensor]:
    """Return the gradients of one step, float32 without zeros, after some steps of training.

    Activations are the outputs of linear layers and of decoder layers.
    """
    model, seen = load(LORA, SEED), []
    train(model, LEARNING_RATE, steps, SEED, schedule="constant")
    for layer in (*lora_layers(model).values(), *model.model.layers):
        layer.register_forward_hook(
            lambda _, __, y: y.register_hook(lambda g: seen.append(g.flatten())) and None
        )
    loss_of(model, list(batches(SEED, steps + 1))[-1]).backward()
    of_factors = {
        kind: torch.cat(
            [p.grad.flatten() for n, p in trainable_parameters(model).items() if f"lora_{kind}" in n]
        )
        for kind in "AB"
    }
    gradients = {"activations": torch.cat(seen)} | of_factors
    return {kind: values[values != 0] for kind, values in gradients.items()}


def loss_of(model: CausalLM, examples: list) -> Tensor:
    """Return the mean loss of a step's answers."""
    ids, labels = collate(examples, tokenizer().pad_id)
    return causal_lm_loss(model, ids, labels) / (labels >= 0).sum()


def losses_at(gradients: Tensor, scale: float) -> dict[str, float]:
    """Return the shares of gradients that float16 makes 0, keeps with fewer digits, and makes infinite."""
    rounded = (gradients * scale).half().abs().float()
    parts = dict(zero=rounded == 0, few_digits=(rounded > 0) & (rounded < NORMAL), infinite=rounded > MOST)
    return {name: figure_of(part.float().mean().item()) for name, part in parts.items()}


def train_scaled(scale: float | None, steps: int, count: int | None) -> dict:
    """Train in float32 (scale None), or in float16 with a loss scale that starts so and moves if above 1.

    Returns the loss of every step, S after it, the skipped steps, and the loss of `count` held-out questions.
    """
    model = load_model(EMBEDDED_MODEL, dtype=torch.float32 if scale is None else torch.float16)
    torch.manual_seed(SEED)
    add_lora(model, LORA)
    parameters = trainable_parameters(model)
    optimizer = make_optimizer("adamw_torch", parameters, LEARNING_RATE, weight_decay=0.0)
    optimizer.param_groups[0]["lr"] = LEARNING_RATE
    loss_scale = LossScale(torch.device("cpu"), enabled=scale is not None)
    if scale is not None:
        set_scale(loss_scale, scale, GROWTH if scale > 1 else 10 * steps)
    losses, scales = [], []
    model.train()
    for examples in batches(SEED, steps):
        loss = loss_of(model, examples)
        loss_scale.backward(loss)
        loss_scale.unscale(optimizer)
        norm = nn.utils.clip_grad_norm_(parameters.values(), math.inf)
        loss, _ = loss_scale.step(optimizer, loss.detach(), norm)
        optimizer.zero_grad()
        losses.append(figure_of(loss))
        scales.append(loss_scale.scale)
    return dict(
        losses=losses, scales=scales, skipped=loss_scale.skipped, held_out_loss=held_out_loss(model, count)
    )


def set_scale(loss_scale: LossScale, scale: float, growth_interval: int) -> None:
    state = loss_scale.state_dict()
    state["scaler"] |= dict(scale=scale, growth_interval=growth_interval)
    loss_scale.load_state_dict(state)


# ---- picture and table -------------------------------------------------------------------------------------


def draw(figure, figures: dict) -> None:
    figure.set_size_inches(8.8, 6.6)
    (histogram, lost), (losses, scale) = figure.subplots(2, 2)
    colours = dict(zip(KINDS, (BLUE, GREY, ORANGE), strict=True))
    for found in figures["gradients"]:
        colour = colours[found["kind"]]
        percent = [100 * share for share in found["shares"]]
        histogram.stairs(percent, [10.0**e for e in figures["edges"]], color=colour, linewidth=1.5)
        at = [row["scale"] for row in found["scales"]]
        lost.plot(at, [100 * row["zero"] for row in found["scales"]], color=colour, linewidth=1.4)
        lost.plot(at, [100 * row["infinite"] for row in found["scales"]], "--", color=colour, linewidth=1.4)
    for x, text in ((FLOOR / 2, "to the left: 0"), (NORMAL, "fewer digits")):
        histogram.axvline(x, color=GREY, linewidth=1, linestyle="--")
        histogram.text(x * 0.7, 49, text, color=GREY, ha="right", va="top", fontsize=9)
    histogram.set(xscale="log", xlim=(1e-11, 1), ylim=(0, 50), xlabel="magnitude of a gradient (S = 1)")
    histogram.set(ylabel="% of the gradients")
    for y, kind in ((20, "activations"), (26, "A"), (32, "B")):
        histogram.text(4e-11, y, kind, color=colours[kind], fontweight="bold")
    lost.set(xscale="log", xlabel="loss scale S", ylabel="% of the gradients", ylim=(-2, 102))
    lost.set_xscale("log", base=2)
    lost.axvline(65536, color=GREY, linewidth=1, linestyle="--")
    lost.text(40000, 60, "65536", color=GREY, ha="right", fontsize=9)
    lost.text(2.0**-2, 92, "line: become 0\ndashes: infinite", color=GREY, fontsize=9, va="top")
    looks = ((GREY, "-"), (BLUE, "--"), (ORANGE, "--"), (ORANGE, "-"))
    for run, (colour, line) in zip(figures["runs"], looks, strict=True):
        steps = range(1, len(run["losses"]) + 1)
        losses.plot(steps, run["losses"], line, color=colour, linewidth=1.2, label=run["name"])
        if run["name"].endswith("adjusted"):
            scale.step(steps, run["scales"], where="post", color=BLUE, linewidth=1.4)
            pairs = zip(steps, [65536.0, *run["scales"]], run["scales"], strict=False)
            skipped = [(step, after) for step, before, after in pairs if after < before]
            scale.plot(*zip(*skipped, strict=True) if skipped else ([], []), "o", color=ORANGE, markersize=5)
    losses.set(yscale="log", xlabel="step", ylabel="training loss (nats)")
    plain_log_ticks(losses.yaxis)
    losses.legend(frameon=False, fontsize=9)
    scale.set(xlabel="step", ylabel="loss scale S")
    scale.set_yscale("log", base=2)
    scale.set_title("a dot: an overflow, and a step that is skipped", color=ORANGE, fontsize=10)
    for axes in (histogram, lost, losses, scale):
        axes.grid(alpha=0.25)


def table(figures: dict) -> str:
    lines = ["| gradients of | S | become 0 | have fewer digits | infinite |", "|---|---:|---:|---:|---:|"]
    for found in figures["gradients"]:
        for row in found["scales"]:
            if row["scale"] in SHOWN:
                cells = [percent(row[key]) for key in ("zero", "few_digits", "infinite")]
                lines.append(f"| {found['kind']} | {SHOWN[row['scale']]} | {' | '.join(cells)} |")
    lines += ["", "| run | held-out loss | steps skipped | last S |", "|---|---:|---:|---:|"]
    for run in figures["runs"]:
        cells = f"{run['held_out_loss']:.3f}", str(run["skipped"]), f"{run['scales'][-1]:g}"
        lines.append(f"| {run['name']} | {' | '.join(cells)} |")
    return "\n".join(lines)


SHOWN = {2.0**-10: "2^-10", 1.0: "1", 65536.0: "65536", 2.0**24: "2^24"}


def percent(share: float) -> str:
    """Return a share with two digits, such as 4.5%, 0.17% or 0."""
    return f"{100 * share:.2g}%" if share else "0"
