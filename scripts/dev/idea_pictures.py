"""Pictures of ideas beside LoRA itself: checkpointing, 8-bit moments, loss scaling, kernels.

`pictures.py` draws them with its own. Each function fills a figure, from numbers that it computes meanwhile.
"""

import math
from collections.abc import Callable, Sequence

import torch
from matplotlib.patches import Rectangle
from studies.drawing import BLUE, GREY, ORANGE, PALE
from torch import Tensor, nn

from minilora import LoraConfig, add_lora, load_model, load_tokenizer, trainable_parameters
from minilora.backend.documents import documents_of_rows
from minilora.data.examples import collate, tokenize
from minilora.data.rows import read_rows
from minilora.formats.config_json import parse_config
from minilora.loss import causal_lm_loss
from minilora.memory.activations import layer_bytes, widths_of
from minilora.model import CausalLM
from minilora.quantization import dynamic_code, nearest_of_steps
from minilora.recompute import checkpoint
from minilora.rope import rope_angles
from minilora.system.assets import EMBEDDED_MODEL
from minilora.testing import peak_memory

TILE = 4096  # numbers of a weight that a program of kernels/nf4.py dequantizes; importing it needs Triton
SMALL = dict(model_type="llama", vocab_size=100, hidden_size=64, intermediate_size=224)
SMALL |= dict(num_hidden_layers=32, num_attention_heads=4, num_key_value_heads=1)  # Mistral's proportions


# ---- segments.png ------------------------------------------------------------------------------------------


def draw_segments(figure) -> None:
    """Peak memory of layers that are checkpointed in segments of k: measured points on L / k + a k + c."""
    figure.set_size_inches(9.2, 4.2)
    left, right = figure.subplots(1, 2)
    draw_peaks(left, *tanh_layers(), 64, "64 layers that keep one tensor each")
    draw_peaks(right, *decoder_layers(), 32, "32 decoder layers with LoRA on q, k, v, o")
    left.set_ylabel("peak of a step, in sizes of a layer's input")


def draw_peaks(axes, measured: dict[int, float], a: float, rest: float, L: int, title: str) -> None:
    """measured: k -> peak; a: tensors that one of L layers keeps; rest: those that no k changes."""
    top = 1.05 * max(measured.values())
    lengths = [2 ** (i / 20) for i in range(20 * int(math.log2(L)) + 1)]
    axes.plot(lengths, [L / k + a * k + rest for k in lengths], color=BLUE, linewidth=1.4, label="derived")
    axes.plot(measured.keys(), measured.values(), "o", color=ORANGE, markersize=7, label="measured")
    best = math.sqrt(L / a)
    axes.axvline(best, color=GREY, linewidth=1, linestyle="--")
    text = rf"$\sqrt{{L}}$ = {best:.0f}" if a == 1 else rf"$\sqrt{{L / a}}$ = {best:.1f}, with a = {a:.1f}"
    axes.text(best * 1.07, top * 0.1, text, color=GREY)
    axes.set(xscale="log", xlabel="layers in a segment, k", ylim=(0, top))
    axes.set_xticks(*[[2**i for i in range(int(math.log2(L)) + 1)]] * 2)  # places and labels
    axes.minorticks_off()
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="lower right")


def tanh_layers() -> tuple[dict[int, float], float, float]:
    """Peaks of 64 layers x -> tanh(W x). Beside what is kept: a gradient that arrives, one that leaves."""
    layers = [nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(64)]
    return peaks_of(layers, (1, 2, 4, 8, 16, 32, 64), torch.randn(4096, 64)), 1.0, 2.0


def decoder_layers() -> tuple[dict[int, float], float, float]:
    """Peaks of a small decoder's layers, beside what minilora's ledger says that they keep and make."""
    config, tokens = parse_config(SMALL), 256
    model, lora = CausalLM(config), LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    model.init_weights()
    add_lora(model, lora)
    documents = documents_of_rows(1, tokens, torch.device("cpu"))
    angles = rope_angles(config, documents.positions, tokens)
    x = torch.randn(tokens, config.hidden_size)
    measured = peaks_of(model.model.layers, (1, 2, 4, 8), x, *angles, documents)
    widths = widths_of(config, torch.float32, "cpu")
    layer = layer_bytes(config, lora, frozenset(lora.target_modules), tokens, widths)
    return measured, 1 + layer.kept / layer.input, layer.backward / layer.input


def peaks_of(layers: Sequence[nn.Module], lengths: tuple[int, ...], x: Tensor, *others) -> dict[int, float]:
    """k -> peak memory of a forward and a backward in segments of k layers, over the size of x."""
    x.requires_grad_()

    def step(k: int) -> Callable[[], None]:
        def run() -> None:
            y = x
            for i in range(0, len(layers), k):
                y = checkpoint(Segment(layers[i : i + k]), y, *others)
            y.sum().backward()
            x.grad = None
            for layer in layers:
                layer.zero_grad()

        return run

    step(1)()  # scratch buffers are there before anything is measured
    return {k: peak_memory(step(k)) / (x.numel() * x.element_size()) for k in lengths}


class Segment(nn.ModuleList):
    """Layers, one after the other."""

    def forward(self, x: Tensor, *others) -> Tensor:
        for layer in self:
            x = layer(x, *others)
        return x


# ---- dynamic_code.png --------------------------------------------------------------------------------------


def draw_dynamic_code(figure) -> None:
    """The values of two 8-bit codes for numbers from 0 to 1, and the largest relative error against size."""
    figure.set_size_inches(9.2, 4.2)
    left, right = figure.subplots(1, 2)
    codes = {"equal steps": torch.linspace(0, 1, 256), "dynamic": dynamic_code(signed=False)}
    for (name, code), colour in zip(codes.items(), (ORANGE, BLUE), strict=True):
        left.plot(range(1, 256), code[1:], ".", color=colour, markersize=2.5)
        sizes, errors = largest_errors(code)
        right.plot(sizes, errors, color=colour, linewidth=1.4, label=name)
    sizes, errors = largest_errors(codes["dynamic"], by_steps=True)
    right.plot(sizes, errors, color=BLUE, linewidth=1.4, linestyle=":", label="dynamic, as it is computed")
    left.text(8, 0.4, "equal steps", color=ORANGE)
    left.text(75, 8e-3, "dynamic", color=BLUE)
    left.set(xlabel="index, a byte", ylabel="value / largest of the block", yscale="log", ylim=(1e-7, 2))
    right.set(xlabel="v / largest of the block", ylabel="largest relative error", xscale="log", yscale="log")
    right.set(xlim=(1e-7, 1), ylim=(1e-3, 300))
    right.axhline(1, color=GREY, linewidth=1, linestyle="--")
    right.text(0.8, 1.2, "as large as v itself", color=GREY, ha="right")
    right.legend(frameon=False, loc="upper right")
    for axes in (left, right):
        axes.grid(alpha=0.25)


def largest_errors(code: Tensor, by_steps: bool = False) -> tuple[list[float], list[float]]:
    """Return sizes from 1e-7 to 1, and the largest relative error of the nearest value of a code around each.

    by_steps: the value that the optimizer finds, by one of 65,536 equal steps.
    """
    sizes = torch.logspace(-7, 0, 7 * 400, dtype=torch.float64)
    steps = ((sizes + 1) / 2 * 65535 + 0.5).int()
    found = nearest_of_steps(code)[steps].int() if by_steps else (sizes[:, None] - code).abs().argmin(1)
    errors = (code[found] - sizes).abs() / sizes
    return sizes.view(-1, 50).amax(1).tolist(), errors.view(-1, 50).amax(1).tolist()


# ---- loss_scaling.png --------------------------------------------------------------------------------------


def draw_loss_scaling(figure) -> None:
    """Gradients of the small model's layers beside float16's range, and the adapter's error against S."""
    figure.set_size_inches(9.2, 4.2)
    left, right = figure.subplots(1, 2)
    exact, at_layers = adapter_gradient(torch.float32)
    magnitudes = at_layers[at_layers != 0].abs().log2()
    bins = torch.arange(-40, 18).tolist()
    for S, colour in ((0, GREY), (16, BLUE)):
        left.hist((magnitudes + S).tolist(), bins, color=colour, alpha=0.75, label=f"S = {2**S}")
    left.axvspan(-40, -25, color=ORANGE, alpha=0.15, linewidth=0)
    left.axvspan(math.log2(65504), 18, color=ORANGE, alpha=0.15, linewidth=0)
    left.text(-39.5, left.get_ylim()[1], "becomes 0", color=ORANGE)
    left.text(18, left.get_ylim()[1], "infinite", color=ORANGE, ha="right")
    left.set(xlabel="S times the gradient's magnitude", xlim=(-40, 18))
    left.set(ylabel="gradients of the layers' outputs")
    left.set_xticks(range(-40, 20, 10), [f"$2^{{{i}}}$" for i in range(-40, 20, 10)])
    left.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, 0.95))

    for dtype, colour, scales in (
        (torch.bfloat16, GREY, (-16, 22)),
        (torch.float16, BLUE, range(-16, 23, 2)),
    ):
        errors = {i: error_at_scale(exact, dtype, 2.0**i) for i in scales}
        finite = {i: error for i, error in errors.items() if math.isfinite(error)}
        right.plot(finite.keys(), finite.values(), color=colour, linewidth=1.4, label=str(dtype)[6:])
    right.axvspan(max(finite) + 1, 22, color=ORANGE, alpha=0.15, linewidth=0)
    right.axvline(16, color=GREY, linewidth=1, linestyle="--")
    right.text(15.6, 0.3, "the first S", color=GREY, ha="right")
    right.text(22, 2.1, "infinite", color=ORANGE, ha="right")
    right.set(xlabel="S", ylabel="relative error of the adapter's gradient", yscale="log", xlim=(-16, 22))
    right.set(ylim=(5e-4, 2))
    right.set_xticks(range(-16, 24, 8), [f"$2^{{{i}}}$" for i in range(-16, 24, 8)])
    right.legend(frameon=False, loc="center", bbox_to_anchor=(0.5, 0.55))
    right.grid(alpha=0.25)


def error_at_scale(exact: Tensor, dtype: torch.dtype, S: float) -> float:
    """Return the relative error of the adapter's gradient, scaled up and down again."""
    found, _ = adapter_gradient(dtype, S)
    return ((found - exact).norm() / exact.norm()).item()


def adapter_gradient(dtype: torch.dtype, S: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return the gradients of an adapter and of the layers' outputs: the small model's, of 8 questions.

    The first is divided by S again, in float64; the second is as backward has it.
    """
    torch.manual_seed(0)
    model, tokenizer = load_model(EMBEDDED_MODEL, dtype=dtype), load_tokenizer(EMBEDDED_MODEL)
    add_lora(model, LoraConfig(r=8))
    trained = trainable_parameters(model)
    for name, parameter in trained.items():
        if "lora_B" in name:  # as if it had learned: zeros would stop the gradients of A
            nn.init.normal_(parameter, std=1e-2)
    outputs: list[Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, inputs, y: (y.retain_grad(), outputs.append(y))[0])
    rows = read_rows(EMBEDDED_MODEL.parent / "train.jsonl")[:8]
    ids, labels = collate(tokenize(rows, tokenizer, cutoff_len=64).examples, tokenizer.pad_id)
    (S * causal_lm_loss(model, ids, labels) / (labels >= 0).sum()).backward()
    flat = torch.cat([p.grad.flatten().double() / S for p in trained.values()])
    return flat, torch.cat([y.grad.flatten().float() for y in outputs])


# ---- kernel_grid.png ---------------------------------------------------------------------------------------


def draw_kernel_grid(figure) -> None:
    """How programs of the NF4 kernel share a weight: programs, blocks, groups, and the bytes of a group."""
    figure.set_size_inches(9.2, 5.0)
    axes = figure.subplots()
    axes.set(xlim=(0, 100), ylim=(0, 52))
    axes.axis("off")
    D, blocksize, size = 4096, 64, 2  # of a weight (D, D), and of a 16-bit number
    group, programs = 16 // size, D * D // TILE
    names = ["program 0", "program 1", "program 2", "...", f"program {programs - 1}"]
    caption(
        axes, 50, f"a weight of {D} x {D}, row by row in memory: {programs:,} programs, {TILE:,} numbers each"
    )
    cells(axes, 43, names, [BLUE, PALE, PALE, "white", PALE])
    zoom(axes, 43, 0, len(names), 37)
    blocks = TILE // blocksize
    caption(
        axes,
        37,
        f"a program: {blocks} blocks of {blocksize} numbers, {TILE // 2:,} bytes and {blocks} scales",
    )
    cells(axes, 30, [""] * blocks, [BLUE] + [PALE] * (blocks - 1))
    zoom(axes, 30, 0, blocks, 24)
    groups = blocksize // group
    caption(
        axes,
        24,
        f"a block: {groups} groups of {group} numbers, {blocksize // 2} bytes and one scale of a byte",
    )
    cells(axes, 17, [f"group {i}" for i in range(groups)], [BLUE] + [PALE] * (groups - 1))
    zoom(axes, 17, 0, groups, 11)
    caption(
        axes,
        11,
        "a group, in one thread: one load of 4 bytes, 8 look-ups times the scale, one store of 16 bytes",
    )
    cells(axes, 3, [f"byte {i}" for i in range(group // 2)], [ORANGE] * 4, right=32)
    axes.annotate("", (49, 5.5), (33.5, 5.5), arrowprops=dict(arrowstyle="->", color=GREY))
    axes.text(41, 6.2, "code[symbol]\n", ha="center", va="center", fontsize=8, color=GREY)
    axes.text(41, 3.9, "x scale", ha="center", va="center", fontsize=8, color=GREY)
    cells(axes, 3, [f"value {i}" for i in range(group)], [BLUE] * group, left=50)


def caption(axes, y: float, text: str) -> None:
    axes.text(0.8, y, text, va="center", fontsize=10)


def cells(axes, y: float, texts: list[str], colours: list[str], left: float = 0, right: float = 100) -> None:
    """Draw a row of equal boxes with a text in each, 5 high, from y upwards."""
    width = (right - left) / len(texts)
    for i, (text, colour) in enumerate(zip(texts, colours, strict=True)):
        box = dict(facecolor=colour, edgecolor="white", linewidth=1.5 if len(texts) < 32 else 0.7)
        axes.add_patch(Rectangle((left + i * width, y), width, 5, **box))
        dark = colour in (BLUE, ORANGE)
        middle = left + (i + 0.5) * width, y + 2.5
        axes.text(*middle, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")


def zoom(axes, y: float, i: int, count: int, to: float) -> None:
    """Draw two lines from the lower edge of box i of `count` to the whole width of the row below."""
    for start, end in ((i, 0), (i + 1, 100)):
        axes.plot([start * 100 / count, end], [y - 0.3, to - 1.8], color=GREY, linewidth=0.7, linestyle=":")


# ---- segmented_grid.png ------------------------------------------------------------------------------------


def draw_segmented_grid(figure) -> None:
    """Which programs take which rows of a batch with two adapters: shrink by ranks, expand by columns."""
    figure.set_size_inches(9.2, 5.0)
    axes = figure.subplots()
    axes.set(xlim=(0, 100), ylim=(0, 52))
    axes.axis("off")
    owners, ranks, colours = (
        ["b", "", "a", "b", "a", "", "a", "b"],
        {"a": 8, "b": 4},
        {"a": BLUE, "b": ORANGE},
    )
    order = sorted(range(len(owners)), key=lambda i: owners[i] or "c")
    width, columns, ranks_at_once = 4096, 128, 4  # of y; of a program of expand; of one of shrink
    words = [f"row {i}: {owner or 'base'}" for i, owner in enumerate(owners)]
    fills = [colours.get(owner, PALE) for owner in owners]
    caption(
        axes,
        50,
        f"{len(owners)} rows: adapter a of rank {ranks['a']}, b of rank {ranks['b']}, or the base model",
    )
    cells(axes, 43, words, fills)
    caption(axes, 27.8, "by segments: a table says where each row lies, and no row is moved")
    cells(axes, 30.5, [words[i] for i in order], [fills[i] for i in order])
    one = 100 / len(owners)
    for place, i in enumerate(order):
        ends = [(i + 0.5) * one, (place + 0.5) * one]
        axes.plot(ends, [42.6, 35.9], color=colours.get(owners[i], GREY), linewidth=1)
    caption(axes, 21.5, f"shrink: a program for {ranks_at_once} ranks of a row")
    per_row = width // columns
    caption(
        axes,
        9.5,
        f"expand: a program for {columns} columns of a row, {per_row} of them for a width of {width}",
    )
    for place, i in enumerate(order):
        if owners[i]:
            span = dict(left=place * one + 0.3, right=(place + 1) * one - 0.3)
            firsts = range(0, ranks[owners[i]], ranks_at_once)
            texts = [f"{first}-{first + ranks_at_once - 1}" for first in firsts]
            cells(axes, 14.5, texts, [fills[i]] * len(texts), **span)
            cells(axes, 1.5, [""] * per_row, [fills[i]] * per_row, **span)
        else:
            for y in (17, 4):
                axes.text((place + 0.5) * one, y, "none", ha="center", va="center", fontsize=8, color=GREY)


IDEA_PICTURES = (draw_segments, draw_dynamic_code, draw_loss_scaling, draw_kernel_grid, draw_segmented_grid)
