"""Diagrams of the documents: boxes, arrows, and the shape and dtype on every arrow. pictures.py draws them.

    lora_layer.svg           a frozen weight and its adapter                           docs/lora.md
    qlora_path.svg           forward and backward of a 4-bit layer with an adapter     docs/quantization.md
    nf4_block.svg            the bytes of 64 weights                                   docs/quantization.md
    checkpointed_layer.svg   what each recompute policy keeps of a layer               docs/memory.md
    mixed_batch.svg          rows of one batch that meet different adapters            docs/many_adapters.md

A drawing's coordinates are tenths of an inch, from the lower left. Colours differ in brightness too, for
print: blue is trained, grey is frozen, orange is a gradient.
"""

import torch
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Polygon, Rectangle
from studies.drawing import BLUE, GREY, ORANGE, PALE

from minilora import quantize_4bit
from minilora.formats.config_json import parse_config
from minilora.testing import unpack_symbols

INK = "#222222"
TRAINED, GRADIENT = "#cfe0f2", "#f7d9c4"
MISTRAL_7B = dict(model_type="mistral", vocab_size=32000, hidden_size=4096, intermediate_size=14336)
MISTRAL_7B |= dict(num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8)


def canvas(figure, width: float, height: float):
    """Return axes that fill the figure, in tenths of an inch."""
    figure.set_size_inches(width / 10, height / 10)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return axes


def write(axes, x: float, y: float, words: str, **style) -> None:
    axes.text(x, y, words, **dict(ha="center", va="center", color=INK, fontsize=10, linespacing=1.35) | style)


def box(axes, x: float, y: float, width: float, height: float, words: str, fill=PALE, edge=GREY) -> None:
    """Draw a rounded box around a centre, with words in it."""
    corner = x - width / 2, y - height / 2
    shape = FancyBboxPatch(corner, width, height, boxstyle="round,pad=0,rounding_size=0.8")
    shape.set(facecolor=fill, edgecolor=edge, linewidth=1.2)
    axes.add_patch(shape)
    write(axes, x, y, words)


def funnel(axes, x: float, y: float, width: float, left: float, right: float, words: str) -> None:
    """Draw a trained matrix as a trapezoid: its left side is as high as its inputs are many."""
    near, far = x - width / 2, x + width / 2
    corners = [(near, y - left / 2), (near, y + left / 2), (far, y + right / 2), (far, y - right / 2)]
    axes.add_patch(Polygon(corners, facecolor=TRAINED, edgecolor=BLUE, linewidth=1.2))
    write(axes, x, y, words)


def arrow(axes, *points: tuple[float, float], words: str = "", color=INK, lift: float = 1.6, **style) -> None:
    """Draw an arrow through points; the words stand above the middle of its last piece."""
    for start, end in zip(points[:-2], points[1:-1], strict=True):
        axes.plot(*zip(start, end, strict=True), color=color, linewidth=1.2, solid_capstyle="round")
    start, end = points[-2:]
    head = dict(arrowstyle="-|>", mutation_scale=10, shrinkA=0, shrinkB=0, linewidth=1.2, color=color)
    axes.add_patch(FancyArrowPatch(start, end, **head))
    x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + lift
    write(axes, x, y, words, **dict(fontsize=9, color=color) | style)


def plus(axes, x: float, y: float, color=INK) -> None:
    axes.plot(x, y, "o", color="white", markeredgecolor=color, markersize=15, zorder=3)
    write(axes, x, y, "+", fontsize=13, color=color, zorder=4)


# ---- LoRA --------------------------------------------------------------------------------------------------


def draw_lora_layer(figure) -> None:
    axes = canvas(figure, 86, 34.5)
    axes.set_ylim(-1.5, 33)  # room for the last line
    write(axes, 3.5, 24, "x", fontsize=13)
    arrow(axes, (5, 24), (28, 24), words="(N, in)  bfloat16")
    box(axes, 36, 24, 16, 9, "W  (out, in)\nfrozen\n16, 8 or 4 bits")
    arrow(axes, (44, 24), (73.6, 24), words="x Wᵀ  (N, out)  bfloat16")
    arrow(axes, (8, 24), (8, 8), (11, 8))
    box(axes, 15.5, 8, 9, 6, "dropout\nin training", fill="white")
    arrow(axes, (20, 8), (29.5, 8), words="(N, in)\nbfloat16", lift=2.6)
    funnel(axes, 33.5, 8, 8, 11, 4, "A\n(r, in)")
    arrow(axes, (37.5, 8), (46, 8), words="(N, r)\nbfloat16", lift=2.6)
    funnel(axes, 50, 8, 8, 4, 11, "B\n(out, r)")
    arrow(axes, (54, 8), (62, 8), words="(N, out)\nbfloat16", lift=2.6)
    box(axes, 66.5, 8, 9, 6, "times s\n= alpha / r", fill="white")
    arrow(axes, (71, 8), (75, 8), (75, 22.6))
    plus(axes, 75, 24)
    arrow(axes, (76.4, 24), (83, 24))
    write(axes, 84.3, 24, "y", fontsize=13)
    write(axes, 41.75, 30.5, "frozen: no gradient, no optimizer state", color=GREY)
    write(axes, 41.75, 0.9, "trained, float32: A random at the start, B zero", color=BLUE)


# ---- QLoRA -------------------------------------------------------------------------------------------------


def draw_qlora_path(figure) -> None:
    axes = canvas(figure, 86, 70)
    axes.plot((1, 85), (38.5, 38.5), color=PALE, linewidth=1.2)
    _qlora_forward(axes, 54)
    _qlora_backward(axes, 23)
    write(axes, 1.5, 5, "kept from forward to backward:  x,  n = x Aᵀ,  A and B in bfloat16", ha="left")
    write(axes, 1.5, 2, "there all the time:  the packed bytes", ha="left")
    write(axes, 84.5, 5, "not kept:  W in bfloat16,  x Wᵀ,  n Bᵀ", ha="right", color=GREY)
    write(axes, 84.5, 2, "never made:  a gradient of W", ha="right", color=GREY)


def _stored_weight(axes, y: float) -> None:
    """Draw the packed bytes, and the weight that they become, above a product at y."""
    box(axes, 16, y + 11.5, 24, 5.5, "W packed, with its scales\nuint8, frozen")
    arrow(axes, (28, y + 11.5), (37.5, y + 11.5), words="dequantize")
    box(axes, 47, y + 11.5, 19, 5.5, "W  (out, in)  bfloat16\nin a shared buffer", fill="white")


def _qlora_forward(axes, y: float) -> None:
    write(axes, 84.5, y + 13, "FORWARD", ha="right", fontweight="bold")
    _stored_weight(axes, y)
    arrow(axes, (47, y + 8.7), (47, y + 2.8))
    write(axes, 3, y, "x", fontsize=13)
    arrow(axes, (4.5, y), (39, y), words="(N, in)  bfloat16")
    box(axes, 47, y, 16, 5, "x Wᵀ", fill="white")
    arrow(axes, (55, y), (73.6, y), words="(N, out)  bfloat16")
    plus(axes, 75, y)
    arrow(axes, (76.4, y), (82.5, y))
    write(axes, 84, y, "y", fontsize=13)
    arrow(axes, (8, y), (8, y - 10), (22, y - 10), words="bfloat16")
    funnel(axes, 27, y - 10, 10, 8, 4, "A  float32")
    arrow(axes, (32, y - 10), (50, y - 10), words="n  (N, r)  bfloat16")
    funnel(axes, 55, y - 10, 10, 4, 8, "B  float32")
    arrow(axes, (60, y - 10), (75, y - 10), (75, y - 1.4))
    write(axes, 67.5, y - 8.4, "times s, bfloat16", fontsize=9)


def _qlora_backward(axes, y: float) -> None:
    write(axes, 84.5, y + 13, "BACKWARD", ha="right", fontweight="bold", color=ORANGE)
    _stored_weight(axes, y)
    arrow(axes, (47, y + 8.7), (47, y + 2.8))
    write(axes, 84, y, "g", fontsize=13, color=ORANGE)
    arrow(axes, (82.5, y), (55, y), words="dL/dy  (N, out)  bfloat16", color=ORANGE)
    box(axes, 47, y, 16, 5, "g W", fill="white", edge=ORANGE)
    arrow(axes, (39, y), (9.4, y), words="(N, in)  bfloat16", color=ORANGE)
    plus(axes, 8, y, color=ORANGE)
    arrow(axes, (6.6, y), (4.8, y), color=ORANGE)
    write(axes, 2.6, y, "dx", fontsize=13, color=ORANGE)
    arrow(axes, (79, y), (79, y - 8), (60, y - 8), words="times s", color=ORANGE)
    funnel(axes, 55, y - 8, 10, 4, 8, "B")
    arrow(axes, (50, y - 8), (32, y - 8), words="(N, r)  bfloat16", color=ORANGE)
    funnel(axes, 27, y - 8, 10, 8, 4, "A")
    arrow(axes, (22, y - 8), (8, y - 8), (8, y - 1.4), color=ORANGE)
    write(axes, 55, y - 13.6, "dB = s gᵀ n, float32", fontsize=9, color=ORANGE)
    write(axes, 27, y - 13.6, "dA = s (g B)ᵀ x, float32", fontsize=9, color=ORANGE)


# ---- the bytes of a block ----------------------------------------------------------------------------------


def draw_nf4_block(figure) -> None:
    axes = canvas(figure, 86, 35)
    weight = torch.randn(256, 64, generator=torch.Generator().manual_seed(2))
    q = quantize_4bit(weight)  # 256 blocks, as many as share a scale of scales
    symbols, scale, nested = (t.nbytes / 256 for t in (q.packed, q.absmax, q.nested_absmax))
    byte = 82 / (64 * torch.bfloat16.itemsize)  # the width of a byte

    def cells(y: float, count: int, left: float, fill: str, edge: str, size: float = 1) -> float:
        for i in range(count):
            cell = (left + i * size * byte, y), size * byte, 3.2
            axes.add_patch(Rectangle(*cell, facecolor=fill, edgecolor=edge, linewidth=0.5))
        return left + count * size * byte

    write(axes, 2, 32.5, f"64 weights in bfloat16: {64 * torch.bfloat16.itemsize} bytes", ha="left")
    cells(27.5, 64, 2, PALE, GREY, torch.bfloat16.itemsize)
    total = symbols + scale + nested
    words = f"in NF4 with double quantization: {total:.4f} bytes, {8 * total / 64:.3f} bits a weight"
    write(axes, 2, 23.5, words, ha="left")
    end = cells(18.5, int(symbols), 2, TRAINED, BLUE)
    after = cells(18.5, int(scale), end, GRADIENT, ORANGE)
    cells(18.5, 1, after, INK, INK, nested)
    write(axes, (2 + end) / 2, 16.8, f"{symbols:.0f} bytes of symbols", fontsize=9, color=BLUE)
    note = f"{scale:.0f} byte: which of 256 codes the scale is"
    arrow(axes, (28, 20.1), (after + 0.4, 20.1), color=ORANGE)
    write(axes, 28.7, 20.1, note, ha="left", fontsize=9, color="#a84a1a")
    note = f"{nested:.4f} bytes: its share of a float32 that scales 256 such scales"
    arrow(axes, (28, 17.6), (after + 0.1, 17.6), (after + 0.1, 18.4))
    write(axes, 28.7, 17.6, note, ha="left", fontsize=9)
    first, code = unpack_symbols(q.packed[:1], 2).tolist(), q.code.tolist()
    write(axes, 2, 12, "One byte holds two weights, the first in the high half:", ha="left")
    for i, symbol in enumerate(first):
        box(axes, 8.2 + 12.4 * i, 7.3, 12, 4.4, f"{symbol:04b}", fill=TRAINED, edge=BLUE)
        words = f"symbol {symbol}\ncode {code[symbol]:+.4f}"
        write(axes, 8.2 + 12.4 * i, 2.4, words, fontsize=9)
    absmax, found = weight[0].abs().max().item(), q.dequantize()[0, :2].tolist()
    write(axes, 32, 7.6, f"times the block's scale {found[0] / code[first[0]]:.4f}", ha="left")
    write(axes, 32, 4.9, f"gives {found[0]:+.4f} and {found[1]:+.4f}", ha="left")
    were = f"they were {weight[0, 0]:+.4f} and {weight[0, 1]:+.4f}, and the scale {absmax:.4f}"
    write(axes, 32, 2.2, were, ha="left", color=GREY)


# ---- checkpointing -----------------------------------------------------------------------------------------


def layer_tensors() -> dict[str, float]:
    """Return what Mistral-7B's layer keeps for backward with LoRA on q, k, v and o, in units of D numbers a
    token, in the order of computation. `docs/memory.md` says what reads each.
    """
    c = parse_config(MISTRAL_7B)
    D, HK, GK = c.hidden_size, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    sizes = dict(x=D, norm=D, q=HK, k=GK, v=GK, attention=HK, sum=D, gate=c.intermediate_size)
    return {name: size / D for name, size in (sizes | dict(up=c.intermediate_size)).items()}


KEPT = dict(off=set(layer_tensors()), selective={"x", "attention"}, full={"x"}, offload=set())


def draw_checkpointed_layer(figure) -> None:
    axes = canvas(figure, 86, 36)
    tensors = layer_tensors()
    unit, left, names = 58 / sum(tensors.values()), 12, dict(norm="normed\nx", attention="attn\nout")
    names |= dict(sum="x +\nattn")
    title = "one layer of Mistral-7B, LoRA on q, k, v and o: forward, from left to right"
    write(axes, left, 33.7, title, ha="left")
    for row, (policy, kept) in enumerate(KEPT.items()):
        x, y = left, 24 - 5.5 * row
        write(axes, 11, y + 1.6, policy, ha="right", family="monospace")
        for name, size in tensors.items():
            moved = policy == "offload" and name == "x"
            cell(axes, x, y, size * unit, 3.2, TRAINED if moved else BLUE if name in kept else "none")
            if row == 0:
                write(axes, x + size * unit / 2, y + 5.4, names.get(name, name), fontsize=8.5, linespacing=1)
            x += size * unit
        total = sum(tensors[name] for name in kept)
        write(axes, x + 1, y + 1.6, f"{total:g} D a token", ha="left")
    legend = {BLUE: "kept for backward", TRAINED: "kept in CPU memory", "none": "computed again in backward"}
    for i, (fill, meaning) in enumerate(legend.items()):
        cell(axes, left + 20 * i, 1.4, 2.4, 1.8, fill)
        write(axes, left + 20 * i + 3.2, 2.3, meaning, ha="left", fontsize=9)


def cell(axes, x: float, y: float, width: float, height: float, fill: str) -> None:
    """Draw a tensor that is kept, in a colour, or is not: dashed."""
    line = (
        dict(edgecolor=GREY, linestyle=(0, (2, 2)), linewidth=0.7)
        if fill == "none"
        else dict(edgecolor="white")
    )
    axes.add_patch(Rectangle((x, y), width, height, facecolor=fill, **line))


# ---- a mixed batch -----------------------------------------------------------------------------------------

WHO = "acab-a"  # the adapter of each row; -: none
SHADES = {"a": "#1f5fa8", "b": "#7fb0dd", "c": "#cfe0f2", "-": "white"}
RANKS = {"a": 4, "b": 8, "c": 2}


def draw_mixed_batch(figure) -> None:
    axes = canvas(figure, 86, 39)
    rows = sorted(range(len(WHO)), key=lambda i: "abc-".index(WHO[i]))
    write(axes, 8, 34.3, "x  (rows, in)")
    _batch(axes, 4, 30, range(len(WHO)))
    arrow(axes, (14, 27.4), (30, 27.4), words="all rows at once")
    box(axes, 38, 27.4, 14, 9, "W  (out, in)\nfrozen, one copy")
    arrow(axes, (45, 27.4), (74.6, 27.4), words="x Wᵀ  (rows, out)")
    plus(axes, 76, 27.4)
    arrow(axes, (77.4, 27.4), (82.5, 27.4))
    write(axes, 84, 27.4, "y", fontsize=13)
    arrow(axes, (8, 18.6), (8, 15.2))
    write(axes, 9, 17.1, "sorted by adapter", ha="left", fontsize=9)
    _batch(axes, 4, 12.6, rows)
    for name, r in RANKS.items():
        places = [12.6 - 2.2 * k + 1.1 for k, i in enumerate(rows) if WHO[i] == name]
        y = sum(places) / len(places)
        _factors(axes, name, r, {"a": 12.8, "b": 7.2, "c": 1.6}[name], y)
    arrow(axes, (70, 7.2), (76, 7.2), (76, 26))
    write(axes, 63, 16.2, "each row's update,\nin its own place", fontsize=9)
    write(axes, 31, 17.6, "shrink: s A, of rank r", fontsize=9, color=BLUE)
    write(axes, 51, 17.6, "expand: B", fontsize=9, color=BLUE)
    write(axes, 8.8, -0.4, "rows without an adapter\nare W's alone", fontsize=9, color=GREY)
    axes.set_ylim(-2.5, 36.5)


def _batch(axes, x: float, top: float, rows) -> None:
    """Draw rows of a batch in their adapters' shades, from the top down."""
    for k, i in enumerate(rows):
        y, name = top - 2.2 * k, WHO[i]
        shape = Rectangle((x, y), 8, 2, facecolor=SHADES[name], edgecolor=GREY, linewidth=0.6)
        axes.add_patch(shape)
        ink = "white" if name == "a" else INK
        write(axes, x + 4, y + 0.9, "none" if name == "-" else name, fontsize=8, color=ink)


def _factors(axes, name: str, r: int, y: float, from_y: float) -> None:
    """Draw the two thin products of an adapter's rows."""
    arrow(axes, (12.4, from_y), (27.5, y))
    for x, sides in ((31, (4.4, 0.8 + r / 4)), (51, (0.8 + r / 4, 4.4))):
        near, far = x - 3.5, x + 3.5
        left, right = sides[0] / 2, sides[1] / 2
        corners = [(near, y - left), (near, y + left), (far, y + right), (far, y - right)]
        axes.add_patch(Polygon(corners, facecolor=SHADES[name], edgecolor=BLUE, linewidth=1.2))
        write(axes, x, y, name, fontsize=9, color="white" if name == "a" else INK)
    arrow(axes, (34.5, y), (47.5, y), words=f"n, r = {r}", lift=1.2)
    arrow(axes, (54.5, y), (70, 7.2))


DIAGRAMS = (draw_lora_layer, draw_qlora_path, draw_nf4_block, draw_checkpointed_layer, draw_mixed_batch)
