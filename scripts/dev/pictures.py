"""Draw the pictures of the documents.

    python scripts/dev/pictures.py                 rewrites docs/pictures/, in a minute
    python scripts/dev/pictures.py --output DIR    another directory of the files

    codes.png     the sixteen values of three 4-bit codes, among the weights           docs/quantization.md
    error.png     error against bits per weight, both measured                         docs/quantization.md
    lora.png      trainable parameters of Mistral-7B against rank, counted             docs/lora.md
    memory.png    the bytes of a training step of Mistral-7B, by recompute policy      docs/memory.md
    larger_models.png   the bytes of each process that trains Llama-2-70B              docs/larger_models.md
    starts.png    how far a 4-bit layer starts from W, by start and rank               docs/initialization.md

    segments dynamic_code loss_scaling                idea_pictures.py: checkpointing, Adam, float16
    kernel_grid segmented_grid                        the same: programs of kernels
    dora chat packing attention rope                  note_pictures.py: the notes of these subjects
    *.svg                                             diagrams.py: layers and bytes

minilora's own functions compute every number while the script draws: on a seeded weight, on PyTorch's meta
device, which has no memory, or on the small model of assets/.
"""

if __name__ == "__main__":
    import minilora.system.interrupts  # noqa: F401, I001  first, for Ctrl-C during the other imports

    import sys
    from pathlib import Path

    from minilora.system.early_help import answer_help

    answer_help(__doc__)
    sys.path.append(str(Path(__file__).resolve().parents[1]))  # for memory.py and studies/

import math
from functools import partial
from types import SimpleNamespace

import matplotlib
import torch
from diagrams import DIAGRAMS, MISTRAL_7B
from idea_pictures import IDEA_PICTURES
from memory import SHAPES, draw_bars
from note_pictures import NOTE_PICTURES
from studies.drawing import BLUE, GREY, ORANGE, PALE, picture_of
from torch import Tensor

from minilora import (
    PRESETS,
    LoraConfig,
    QuantConfig,
    add_lora,
    quantize_4bit,
    trainable_parameters,
)
from minilora.formats.config_json import parse_config
from minilora.initialize import initialize
from minilora.memory.ledger import CUDA_CONTEXT, MARGIN, memory_ledger
from minilora.memory.ranks import rank_ledger
from minilora.model import CausalLM
from minilora.quantization import (
    dequantize_definition,
    four_bit_code,
    nearest_code_bounds,
    quantize_definition,
)
from minilora.recompute import POLICIES
from minilora.system.errors import ArgumentParser, local_path, run_script
from minilora.system.files import make_folder, write_whole

WEIGHT = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))


def main() -> None:
    parser = ArgumentParser(help_text=__doc__)
    parser.add_argument("--output", type=local_path, default="docs/pictures")
    directory = parser.parse_args().output
    make_folder("--output", directory)
    matplotlib.use("Agg")
    own = draw_codes, draw_error, draw_larger_models, draw_lora, draw_memory, draw_starts
    for draw in (*own, *IDEA_PICTURES, *NOTE_PICTURES, *DIAGRAMS):
        kind = "svg" if draw in DIAGRAMS else "png"
        path = directory / f"{draw.__name__.removeprefix('draw_')}.{kind}"
        write_whole(path, picture_of(draw, kind))
        print(path)


def relative_error(approximation: Tensor, expected: Tensor) -> float:
    """Return rms(approximation - expected) / rms(expected), where rms is the root mean square."""
    exact = expected.double()
    return float((approximation.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())


def error_of_code(code: Tensor, blocksize: int = 64) -> float:
    """Return the relative error of a normal weight that is stored in any 16 values, with float32 scales."""
    n = WEIGHT.numel()
    packed, absmax = torch.empty((n + 1) // 2, dtype=torch.uint8), torch.empty(-(-n // blocksize))
    quantize_definition(WEIGHT.view(-1), *nearest_code_bounds(code), blocksize, packed, absmax)
    q = SimpleNamespace(packed=packed, absmax=absmax, code=code, blocksize=blocksize, nested_absmax=None)
    stored = torch.empty_like(WEIGHT)
    dequantize_definition(q, stored)
    return relative_error(stored, WEIGHT)


def density_in_blocks(x: Tensor, blocksize: int = 64) -> Tensor:
    """Return the density at x of w / m: w a normal weight, m the absmax of its block, and |w| < m.

    Given m, w is normal and cut off at m, so w / m has the density phi(x m) m / P(|w| < m). m has the density
    of the largest of `blocksize` magnitudes. The function integrates over m on a grid.
    """
    m = torch.linspace(0.5, 7, 2000, dtype=torch.float64)  # (grid,)

    def phi(t: Tensor) -> Tensor:
        return torch.exp(-t * t / 2) / math.sqrt(2 * math.pi)

    inside = torch.erf(m / math.sqrt(2))  # P(|w| < m)
    weight_of_m = blocksize * inside ** (blocksize - 1) * 2 * phi(m)
    given_m = phi(x.double()[:, None] * m) * m / inside  # (x, grid)
    return torch.trapezoid(given_m * weight_of_m, m, dim=1)


def draw_codes(figure) -> None:
    figure.set_size_inches(7.6, 5.6)
    rows = {"NF4": four_bit_code("nf4"), "FP4": four_bit_code("fp4"), "uniform": torch.linspace(-1, 1, 16)}
    notes = ("normal quantiles, and 0", "a float: ±0.005 and 0 twice", "equal steps, no 0")
    x = torch.linspace(-1, 1, 401)
    density = density_in_blocks(x)
    panels = figure.subplots(3, 1, sharex=True)
    for axes, (name, code), note in zip(panels, rows.items(), notes, strict=True):
        axes.fill_between(x, density, color=PALE, linewidth=0)
        axes.vlines(code, 0, density_in_blocks(code), color=BLUE, linewidth=1.2)
        axes.plot(code, torch.zeros(16), "o", color=BLUE, markersize=4.5, clip_on=False, zorder=3)
        bounds, _ = nearest_code_bounds(code)
        axes.vlines(bounds, -0.2, -0.1, color=GREY, linewidth=0.8)
        axes.set(ylim=(-0.22, 1.12), yticks=[], xlim=(-1.05, 1.05))
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.tick_params(length=0)
        axes.text(-1.02, 0.92, name, color=BLUE, fontsize=13, fontweight="bold")
        axes.text(-1.02, 0.72, note, color=GREY)
        axes.text(1.02, 0.92, f"error {error_of_code(code):.1%}", color=ORANGE, ha="right", fontsize=12)
    panels[0].text(1.02, 0.72, "of the weights' size (rms)", color=GREY, ha="right")
    panels[0].text(1.02, 0.24, "1 weight of 64\nis at ±1", color=GREY, ha="right")
    panels[0].text(-1.02, 0.24, "grey: density of\n63 weights of 64", color=GREY)
    panels[2].set_xticks([-1, -0.5, 0, 0.5, 1], ["-1", "-0.5", "0", "0.5", "1"])
    panels[2].set_xlabel(
        "weight / absmax of its block of 64; the short ticks are where the nearest code changes"
    )


def draw_error(figure) -> None:
    figure.set_size_inches(7.6, 4.6)
    axes, sizes = figure.subplots(), (32, 64, 128, 256, 512)
    for quant_type, colour in (("nf4", BLUE), ("fp4", ORANGE)):
        for double in (True, False):
            stored = [quantize_4bit(WEIGHT, quant_type, size, double) for size in sizes]
            bits = [q.bits_per_weight for q in stored]
            errors = [100 * relative_error(q.dequantize(), WEIGHT) for q in stored]
            style, filling = ("o-", colour) if double else ("o--", "white")
            axes.plot(bits, errors, style, color=colour, markerfacecolor=filling, linewidth=1.4, markersize=5)
            for size, b, e in zip(sizes, bits, errors, strict=True):
                text = f"blocks of {size}" if (size, double) == (512, False) else size
                offset, side = ((-4, -11), "right") if double else ((5, 4), "left")
                small = dict(textcoords="offset points", fontsize=9, color=GREY)
                axes.annotate(text, (b, e), offset, ha=side, **small)
            name = f"{quant_type.upper()}, " + ("double quantization" if double else "scales in float32")
            axes.text(*((4.28, errors[0] - 0.1) if double else (4.62, errors[1] + 0.1)), name, color=colour)
    axes.set(xlabel="bits a weight, scales counted", xlim=(3.92, 5.06))
    axes.set(ylabel="relative error (%)", ylim=(8, 15))
    axes.grid(alpha=0.25)


def draw_lora(figure) -> None:
    figure.set_size_inches(7.6, 4.6)
    axes, ranks = figure.subplots(), [2**k for k in range(8)]
    targets = {"all seven": "aggressive_r16_all", "q k v o": "standard_r8_qkvo", "q v": "minimal_r4_qv"}
    for label, preset in targets.items():
        per_rank = count_trained(LoraConfig(r=1, target_modules=PRESETS[preset].target_modules))
        axes.plot(ranks, [r * per_rank for r in ranks], color=BLUE, linewidth=1.4)
        axes.text(ranks[-1] * 1.08, ranks[-1] * per_rank, label, color=BLUE, va="center")
    far = (60, -60)
    for (name, config), offset in zip(PRESETS.items(), ((8, -26), far, (-10, 6), (-10, 6)), strict=True):
        count, side = count_trained(config), "left" if offset[0] > 0 else "right"
        line = dict(arrowstyle="-", color=ORANGE, linewidth=0.7) if offset == far else None
        axes.plot(config.r, count, "o", color=ORANGE, markersize=7)
        label = dict(textcoords="offset points", color=ORANGE, ha=side, arrowprops=line)
        axes.annotate(f"{name}\n{count:,}", (config.r, count), offset, **label)
    axes.set(xscale="log", xlabel="rank r", xlim=(0.9, 215))
    axes.set(yscale="log", ylabel="trainable parameters of Mistral-7B")
    axes.set_xticks(ranks, map(str, ranks))
    axes.minorticks_off()
    axes.set_yticks([1e6, 1e7, 1e8], ["1 million", "10 million", "100 million"])
    axes.grid(alpha=0.25)


def draw_memory(figure) -> None:
    figure.set_size_inches(8.6, 4.6)
    kind = dict(batch_size=4, length=1024, dtype=torch.float16, optim="adamw_8bit")
    mistral, lora = parse_config(MISTRAL_7B), PRESETS["standard_r8_qkvo"]
    ledger_of = partial(memory_ledger, mistral, lora, QuantConfig(), **kind)
    ledgers = {policy: ledger_of(recompute=policy) for policy in POLICIES}
    draw_bars(figure.subplots(), ledgers, {"fits a T4": (16e9 - CUDA_CONTEXT) / MARGIN})


def draw_larger_models(figure) -> None:
    figure.set_size_inches(8.6, 4.6)
    kind = dict(batch_size=1, length=1024, dtype=torch.bfloat16, recompute="full")
    model = SHAPES["llama-2-70b"], PRESETS["aggressive_r16_all"], QuantConfig()
    ledger_of = partial(rank_ledger, *model, **kind)
    ledgers = {"ddp\nany number": ledger_of(processes=2)}
    ledgers |= {f"fsdp\n{n} GPUs": ledger_of(processes=n, parallel="fsdp") for n in (2, 4, 8)}
    ledgers["fsdp, 2 GPUs\noffloaded"] = ledger_of(processes=2, parallel="fsdp", offload=True)
    draw_bars(figure.subplots(), ledgers, {"fits 24 GB": (24e9 - CUDA_CONTEXT) / MARGIN})


def draw_starts(figure) -> None:
    figure.set_size_inches(7.6, 4.2)
    axes, ranks = figure.subplots(), (2, 4, 8, 16, 32, 64)
    left, right = (torch.linalg.qr(WEIGHT[:256, i : i + 256]).Q for i in (0, 256))
    weight = (
        left @ torch.diag(0.95 ** torch.arange(256)) @ right
    )  # singular values that fall, as trained ones do
    kinds = [
        ("true", 1, GREY),
        ("olora", 1, ORANGE),
        ("loftq", 1, BLUE),
        ("loftq", 5, BLUE),
        ("pissa", 1, ORANGE),
    ]
    for (kind, iterations, color), style in zip(kinds, "- -- -- - -".split(), strict=True):
        errors = []
        for r in ranks:
            A, B, base = initialize(kind, weight, r, 1.0, quantize_4bit, loftq_iter=iterations)
            base = quantize_4bit(weight) if base is None else base  # the start leaves W alone
            errors.append(100 * relative_error(base.dequantize(torch.float32) + B @ A, weight))
        name = kind + f", {iterations} iterations" * (iterations > 1)
        axes.plot(ranks, errors, style, color=color, linewidth=1.4, label=name)
    axes.legend(frameon=False, loc="lower left")
    axes.set(xscale="log", xlabel="rank r of a 256 x 256 weight")
    axes.set(ylabel="base in NF4 + B A: distance from W (%)", ylim=(0, None))
    axes.set_xticks(ranks, map(str, ranks))
    axes.minorticks_off()
    axes.grid(alpha=0.25)


def count_trained(config: LoraConfig) -> int:
    """Count the parameters of Mistral-7B that an adapter trains, on PyTorch's meta device."""
    with torch.device("meta"):
        model = CausalLM(parse_config(MISTRAL_7B))
    add_lora(model, config)
    return sum(p.numel() for p in trainable_parameters(model).values())


if __name__ == "__main__":
    run_script(main)
