"""How many bits does a frozen weight need, if an adapter is trained on it?

Expected. The rounding error of W grows as bits are saved: int8, then NF4 in small blocks, NF4 in large
blocks, FP4. But an adapter that is trained on the rounded weights can make up for part of the error (QLoRA,
arXiv:2305.14314, section 4, finds no loss at all). So the held-out loss should depend on the bits less than
the error does, and less than where the adapter was trained in 16 bits and W is rounded afterwards.

The base of assets/ was pretrained under noise as large as NF4's error, so it is harder to hurt than others.
Therefore the study stores a second base, too: the same function to the last bit, with outliers in its
weights. A power of two is moved from the norms into two input columns of q, k, v, gate and up. Large models
have such channels, in activations (LLM.int8, arXiv:2208.07339) and in weights. SmoothQuant
(arXiv:2211.10438) moves factors through norms in the same way, to the opposite end.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from minilora.config import LoraConfig
from minilora.int8 import quantize_int8
from minilora.lora import add_lora
from minilora.model import CausalLM
from minilora.quantization import quantize_4bit
from studies.drawing import BLUE, GREY, ORANGE, plain_log_ticks
from studies.small_world import figure_of, held_out_loss, linear_layers, load, right_answers, train, within

LORA = LoraConfig(r=8, lora_alpha=16)
STEPS, LEARNING_RATE, SEEDS = 120, 4e-3, (1, 2, 3)
OUTLIER, CHANNELS = 16.0, (40, 150)  # the factor, and the two of 192 input columns
FORMATS = {  # how every linear layer of the decoder is stored, and whether an adapter is trained on it
    "bfloat16": (None, True),
    "int8 rows": (lambda w: quantize_int8(w), True),
    "NF4, blocks of 32": (lambda w: quantize_4bit(w, "nf4", 32), True),
    "NF4, blocks of 64": (lambda w: quantize_4bit(w, "nf4", 64), True),
    "NF4, blocks of 64, single": (lambda w: quantize_4bit(w, "nf4", 64, double_quant=False), True),
    "NF4, blocks of 128": (lambda w: quantize_4bit(w, "nf4", 128), False),
    "NF4, blocks of 256": (lambda w: quantize_4bit(w, "nf4", 256), False),
    "NF4, blocks of 512": (lambda w: quantize_4bit(w, "nf4", 512), True),
    "FP4, blocks of 64": (lambda w: quantize_4bit(w, "fp4", 64), True),
    "FP4, blocks of 512": (lambda w: quantize_4bit(w, "fp4", 512), True),
}
PLAIN, SPIKED = "as it is", "with outliers"


def measure(quick: bool) -> dict:
    steps, seeds, count = (2, SEEDS[:1], 8) if quick else (STEPS, SEEDS, None)
    rows = []
    for base, start in {PLAIN: load_plain, SPIKED: load_spiked}.items():
        ready_made = [update_of(trained(start(), steps, seed)) for seed in seeds]
        for name, (stored, is_trained) in FORMATS.items():
            row = dict(base=base, format=name) | sizes(start(), stored)
            row["put_on"] = [held_out_loss(put_on(start, stored, update), count) for update in ready_made]
            if is_trained and not (quick and "NF4" in name):
                models = [trained(round_weights(start(), stored), steps, seed) for seed in seeds]
                row["trained_on"] = [held_out_loss(model, count) for model in models]
                row["right"] = [right_answers(model, count) for model in models]
            print(f"  {base}: {name}: {row}", flush=True)
            rows.append(row)
    settings = dict(r=LORA.r, lora_alpha=LORA.lora_alpha, steps=steps, learning_rate=LEARNING_RATE)
    return settings | dict(schedule="linear", seeds=list(seeds), outlier=OUTLIER, rows=rows)


# ---- bases and formats -------------------------------------------------------------------------------------


def load_plain() -> CausalLM:
    return load()


@torch.no_grad()
def load_spiked() -> CausalLM:
    """Return the small model with outliers in its weights: the same function, to the bit."""
    model = load()
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        readers = [attention.q_proj, attention.k_proj, attention.v_proj], [mlp.gate_proj, mlp.up_proj]
        norms = layer.input_layernorm, layer.post_attention_layernorm
        for norm, linears in zip(norms, readers, strict=True):
            for channel in CHANNELS:
                norm.weight[channel] /= OUTLIER
                for linear in linears:
                    linear.weight[:, channel] *= OUTLIER
    return model


@torch.no_grad()
def round_weights(model: CausalLM, stored: Callable | None) -> CausalLM:
    """Give every linear layer of the decoder the float32 values that a format keeps of its weight."""
    for layer in linear_layers(model).values():
        if stored is not None:
            layer.weight.copy_(stored(layer.weight).dequantize(torch.float32))
    return model


def sizes(model: CausalLM, stored: Callable | None) -> dict[str, float | None]:
    """Return bits a weight, scales counted, and the relative error of all weights, and of the worst layer."""
    if stored is None:
        return dict(bits=16.0, error=0.0, worst=0.0)
    wrong, whole, nbytes, count, worst = 0.0, 0.0, 0, 0, 0.0
    for layer in linear_layers(model).values():
        W, q = layer.weight.detach(), stored(layer.weight.detach())
        parts = [t.double().square().sum().item() for t in (q.dequantize(torch.float32) - W, W)]
        wrong, whole, worst = wrong + parts[0], whole + parts[1], max(worst, parts[0] / parts[1])
        nbytes, count = nbytes + q.nbytes, count + W.numel()
    return dict(
        bits=figure_of(8 * nbytes / count),
        error=figure_of((wrong / whole) ** 0.5),
        worst=figure_of(worst**0.5),
    )


# ---- adapters ----------------------------------------------------------------------------------------------


def trained(model: CausalLM, steps: int, seed: int) -> CausalLM:
    torch.manual_seed(seed)
    add_lora(model, LORA)
    train(model, LEARNING_RATE, steps, seed)
    return model


def update_of(model: CausalLM) -> dict[str, Tensor]:
    """Return the adapter's tensors by name."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def put_on(start: Callable[[], CausalLM], stored: Callable | None, adapter: dict[str, Tensor]) -> CausalLM:
    """Return a base in a format with an adapter that was trained beside the weights in 16 bits."""
    model = round_weights(start(), stored)
    add_lora(model, LORA)
    model.load_state_dict(adapter, strict=False)
    return model.eval()


# ---- picture and table -------------------------------------------------------------------------------------


def draw(figure, figures: dict) -> None:
    figure.set_size_inches(9.6, 4.6)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, base in zip(panels, (PLAIN, SPIKED), strict=True):
        rows = [row for row in figures["rows"] if row["base"] == base]
        for y, row in enumerate(rows):
            for key, colour, shift in (("put_on", ORANGE, -0.15), ("trained_on", BLUE, 0.15)):
                losses = row.get(key, [])
                axes.plot(losses, [y + shift] * len(losses), "o", color=colour, markersize=5, alpha=0.8)
            axes.text(1.02, y, f"{row['error']:.1%}", color=GREY, va="center",
                      transform=axes.get_yaxis_transform())  # fmt: skip
        axes.set(
            xscale="log",
            xlabel="held-out loss (nats)",
            ylim=(len(rows) - 0.5, -0.5),
            xlim=limits(figures, base),
        )
        axes.set_title(f"the base {base}", fontsize=11)
        axes.text(1.02, -0.62, "error of W", color=GREY, fontsize=9, transform=axes.get_yaxis_transform())
        plain_log_ticks(axes.xaxis)
        axes.grid(axis="x", alpha=0.25)
    panels[0].set_yticks(range(len(rows)), [f"{row['format']}\n{row['bits']:.2f} bits" for row in rows])
    axes.plot([], [], "o", color=ORANGE, label="adapter trained beside 16 bits, put on the stored base")
    axes.plot([], [], "o", color=BLUE, label="adapter trained on the stored base")
    figure.legend(frameon=False, loc="outside lower center", ncols=2)


def limits(figures: dict, base: str) -> tuple[float, float]:
    """Return the ends of the axis of losses: at least a factor of 3 apart, so that noise looks small."""
    rows = [row for row in figures["rows"] if row["base"] == base]
    losses = [loss for row in rows for loss in row["put_on"] + row.get("trained_on", [])]
    middle, factor = (min(losses) * max(losses)) ** 0.5, (max(losses) / min(losses)) ** 0.5
    return middle / max(3**0.5, 1.1 * factor), middle * max(3**0.5, 1.1 * factor)


def table(figures: dict) -> str:
    lines = [
        "| base | stored as | bits a weight | error of W | loss, put on | loss, trained on | right answers |"
    ]
    lines.append("|---|---|---:|---:|---:|---:|---:|")
    for row in figures["rows"]:
        cells = [
            row["base"],
            row["format"],
            f"{row['bits']:.2f}",
            f"{row['error']:.1%}",
            within(row["put_on"]),
        ]
        cells.append(within(row["trained_on"]) if "trained_on" in row else "")
        cells.append(f"{sum(row['right']) / len(row['right']):.1%}" if "right" in row else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
