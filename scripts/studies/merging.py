"""Into which weights should a trained adapter be merged?

Expected. An adapter fits the weights that its training saw. One that was trained beside W belongs into W. One
that was trained on NF4(W), as in QLoRA (arXiv:2305.14314), has also learned to mend rounding errors, so it
belongs into dequantize(NF4(W)), where it loses nothing. W itself lies NF4's rounding error away from there;
but W is the better model, so who wins is open. To quantize the sum again in NF4 makes a new rounding error
that no training has seen; int8 and bfloat16 should cost next to nothing.

Every adapter is merged into every weight, of two bases: the one of assets/, which was pretrained under noise
as large as NF4's error, and the same function with outliers in its weights (stored_bits.py), which NF4 hurts.
The merged models compute in float32, so that nothing differs but the weights. `merge.py --into` has the first
two choices, `--quantize` the last.
"""

import torch
from torch import Tensor

from minilora.int8 import quantize_int8
from minilora.linear import Linear4bit
from minilora.lora import add_lora, lora_layers
from minilora.model import CausalLM
from minilora.quantization import quantize_4bit
from studies.drawing import BLUE, GREY, ORANGE, plain_log_ticks
from studies.small_world import figure_of, held_out_loss, linear_layers, right_answers, train, within
from studies.stored_bits import LEARNING_RATE, LORA, PLAIN, SPIKED, load_plain, load_spiked

STEPS, SEEDS, ASKED = 120, (1, 2), 200  # the last: questions that are answered
SAW = ("float32", "bfloat16", "NF4")  # the weights that training saw; in bfloat16 it also computed in it
FACTORS = (1 / 64, 1 / 16, 1 / 4, 1)  # that make an update smaller
MERGES = {  # how the base is kept before the sum, and how the sum is kept
    "not merged": None,
    "W": (None, None),
    "W, in bfloat16": (None, "bfloat16"),
    "W, then NF4": (None, "NF4"),
    "dequantized": ("NF4", None),
    "dequantized, in bfloat16": ("NF4", "bfloat16"),
    "dequantized, then int8": ("NF4", "int8"),
    "dequantized, then NF4": ("NF4", "NF4"),
}


def measure(quick: bool) -> dict:
    steps, seeds, count, asked = (2, SEEDS[:1], 8, 2) if quick else (STEPS, SEEDS, None, ASKED)
    rows, sizes, survival = [], [], []
    for base, start in {PLAIN: load_plain, SPIKED: load_spiked}.items():
        for saw in SAW:
            models = [trained(start(), saw, steps, seed) for seed in seeds]
            updates = [updates_of(model) for model in models]
            sizes.append(dict(base=base, saw=saw) | relative_sizes(start(), updates[0]))
            if saw == "NF4":
                survival += [dict(base=base) | survives(start(), updates[0], f) for f in FACTORS]
            for name, kept in MERGES.items():
                judged = models if kept is None else [merged(start(), update, *kept) for update in updates]
                losses = [held_out_loss(model, count) for model in judged]
                right = [right_answers(model, asked) for model in judged]
                rows.append(dict(base=base, saw=saw, merged=name, losses=losses, right=right))
                print(f"  {base}: trained on {saw}, {name}: {losses} {right}", flush=True)
    settings = dict(r=LORA.r, lora_alpha=LORA.lora_alpha, steps=steps, learning_rate=LEARNING_RATE)
    return settings | dict(schedule="linear", seeds=list(seeds), rows=rows, sizes=sizes, survival=survival)


def trained(model: CausalLM, saw: str, steps: int, seed: int) -> CausalLM:
    """Return the model with an adapter trained on weights as training saw them."""
    if saw == "bfloat16":
        model.bfloat16()
    if saw == "NF4":
        for name, layer in linear_layers(model).items():
            model.set_submodule(name, Linear4bit(quantize_4bit(layer.weight)))
    torch.manual_seed(seed)
    add_lora(model, LORA)
    train(model, LEARNING_RATE, steps, seed)
    return model


def updates_of(model: CausalLM) -> dict[str, Tensor]:
    """Return full name -> scaling * B A, float32 (out, in)."""
    return {name: layer.delta_weight("default").detach() for name, layer in lora_layers(model).items()}


@torch.no_grad()
def merged(model: CausalLM, updates: dict[str, Tensor], base: str | None, kept: str | None) -> CausalLM:
    """Return the model with weights that hold the updates. A layer without an update is rounded only once."""
    for name, layer in linear_layers(model).items():
        W = rounded(layer.weight, base)
        if name in updates:
            W = W + updates[name]
        layer.weight.copy_(W if kept == base and name not in updates else rounded(W, kept))
    return model


def rounded(weight: Tensor, kind: str | None) -> Tensor:
    """Return the float32 values of a weight, (out, in), that is kept in a format; None: float32."""
    match kind:
        case "bfloat16":
            return weight.bfloat16().float()
        case "int8":
            return quantize_int8(weight).dequantize()
        case "NF4":
            return quantize_4bit(weight).dequantize()
    return weight


@torch.no_grad()
def relative_sizes(model: CausalLM, updates: dict[str, Tensor]) -> dict[str, float]:
    """Return the norms of the update and of roundings, over the norm of W, of all adapted layers together."""
    squares: dict[str, float] = {}
    for name, update in updates.items():
        W = linear_layers(model)[name].weight
        parts = dict(W=W, update=update, NF4=rounded(W, "NF4") - W)
        parts |= {kind: rounded(W + update, kind) - (W + update) for kind in ("bfloat16", "int8")}
        for part, values in parts.items():
            squares[part] = squares.get(part, 0.0) + values.double().square().sum().item()
    return {
        part: figure_of((square / squares["W"]) ** 0.5) for part, square in squares.items() if part != "W"
    }


@torch.no_grad()
def survives(model: CausalLM, updates: dict[str, Tensor], factor: float) -> dict[str, float]:
    """Return which part of the update, made smaller, NF4 keeps of a sum: the projection on the update.

    1: all of it, and 0: none, of an update added to W, and added to dequantize(NF4(W)).
    """
    kept, whole, weights = {"W": 0.0, "dequantized": 0.0}, 0.0, 0.0
    for name, update in updates.items():
        W, small = linear_layers(model)[name].weight, update * factor
        stored = rounded(W, "NF4")
        for key, base in (("W", W), ("dequantized", stored)):
            kept[key] += ((rounded(base + small, "NF4") - stored) * small).double().sum().item()
        whole += small.double().square().sum().item()
        weights += W.double().square().sum().item()
    shares = {key: figure_of(part / whole) for key, part in kept.items()}
    return dict(factor=factor, size=figure_of((whole / weights) ** 0.5)) | shares


# ---- picture and table -------------------------------------------------------------------------------------


def draw(figure, figures: dict) -> None:
    figure.set_size_inches(9.6, 4.4)
    panels, colours = (
        figure.subplots(1, 2, sharex=True, sharey=True),
        dict(zip(SAW, (BLUE, GREY, ORANGE), strict=True)),
    )
    for axes, base in zip(panels, (PLAIN, SPIKED), strict=True):
        for y, name in enumerate(MERGES):
            for shift, saw in zip((-0.22, 0, 0.22), SAW, strict=True):
                losses = row_of(figures, base, saw, name)["losses"]
                axes.plot(losses, [y + shift] * len(losses), "o", color=colours[saw], markersize=4.5,
                          alpha=0.8, label=saw if y == 0 else None)  # fmt: skip
            if y:
                axes.axhline(y - 0.5, color=GREY, linewidth=0.4, alpha=0.5)
        axes.set(xscale="log", xlabel="held-out loss (nats)", ylim=(len(MERGES) - 0.5, -0.5))
        axes.set_title(f"the base {base}", color=BLUE, fontsize=11)
        plain_log_ticks(axes.xaxis, (1, 1.5, 2, 3, 5, 7))
        axes.grid(axis="x", alpha=0.25)
    panels[0].set_yticks(range(len(MERGES)), [n if n == "not merged" else f"into {n}" for n in MERGES])
    panels[1].legend(title="training saw", frameon=False, loc="upper left", bbox_to_anchor=(1, 1))


def row_of(figures: dict, base: str, saw: str, name: str) -> dict:
    wanted = dict(base=base, saw=saw, merged=name)
    return next(row for row in figures["rows"] if wanted.items() <= row.items())


def table(figures: dict) -> str:
    lines = ["| base | merged into | " + " | ".join(f"trained on {saw}" for saw in SAW) + " |"]
    lines.append("|---|---|" + "---:|" * len(SAW))
    for base in (PLAIN, SPIKED):
        for name in MERGES:
            rows = [row_of(figures, base, saw, name) for saw in SAW]
            cells = [f"{within(row['losses'])}, {mean(row['right']):.1%}" for row in rows]
            lines.append(f"| {base} | {name} | {' | '.join(cells)} |")
    lines += ["", f"Norms over the norm of W, of the adapted layers, seed {figures['seeds'][0]}:", ""]
    lines += [
        "| base | trained on | update | NF4's error | bfloat16's | int8's |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in figures["sizes"]:
        cells = [f"{row[key]:.2%}" for key in ("update", "NF4", "bfloat16", "int8")]
        lines.append(f"| {row['base']} | {row['saw']} | {' | '.join(cells)} |")
    lines += ["", "The part of the update that NF4 keeps of a sum, for smaller updates:", ""]
    lines += ["| base | update, over W | of W + update | of dequantized + update |", "|---|---:|---:|---:|"]
    for row in figures["survival"]:
        cells = [f"{row[key]:.0%}" for key in ("W", "dequantized")]
        lines.append(f"| {row['base']} | {row['size']:.2%} | {' | '.join(cells)} |")
    return "\n".join(lines)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)
