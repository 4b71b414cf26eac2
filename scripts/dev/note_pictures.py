"""The pictures of the notes on DoRA, templates, packing, attention and RoPE, for scripts/dev/pictures.py.

Each function fills one figure of matplotlib. Its numbers come from minilora's own functions, on the small
model and the rows of assets/.
"""

from dataclasses import replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from matplotlib.patches import Rectangle
from numpy import ndarray
from studies.drawing import BLUE, GREY, ORANGE, PALE
from torch import Tensor, nn

from minilora import (
    LoraConfig,
    add_lora,
    generate,
    load_model,
    load_tokenizer,
    merge_lora,
    remove_lora,
    trainable_parameters,
)
from minilora.backend.documents import PADDING, positions_in_documents
from minilora.config import RopeConfig
from minilora.data.chat import load_chat_template
from minilora.data.examples import collate, tokenize
from minilora.data.messages import message
from minilora.data.new_tokens import add_new_tokens
from minilora.data.rows import read_rows
from minilora.data.tokenizer import Tokenizer
from minilora.loss import causal_lm_loss
from minilora.model import CausalLM, attention_mask
from minilora.rope import frequencies_at, rope_frequencies, yarn_attention_factor
from minilora.system.assets import ASSETS, EMBEDDED_MODEL

GREEN = "#4f8a4b"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def draw_dora(figure) -> None:
    figure.set_size_inches(8.6, 3.4)
    panels = figure.subplots(1, 3, sharey=True)
    methods = {
        "full training": 2.4e-3,
        "LoRA": 4e-3,
        "DoRA": 4e-3,
    }  # rows turn equally far
    for axes, (method, lr), colour in zip(panels, methods.items(), (GREY, ORANGE, BLUE), strict=True):
        stretched, turned = changes_of_rows(method, lr)
        both = torch.corrcoef(torch.stack((stretched, turned)))[0, 1]
        axes.plot(100 * turned, 100 * stretched, ".", color=colour, markersize=3, alpha=0.35, mew=0)
        axes.set_title(method, color=colour, fontsize=12)
        axes.text(0.97, 0.93, f"correlation {both:.2f}", transform=axes.transAxes, ha="right", color=colour)
        axes.set(xlabel="turn of a row: 1 - cosine (%)", xlim=(0, 15), ylim=(0, 25))
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("change of its length (%)")


def changes_of_rows(method: str, lr: float) -> tuple[Tensor, Tensor]:
    """Train the small model for 40 steps. Return how much each row of its attention's weights changed its
    length, as a share, and how far it turned, 1 - cosine: two of (rows,).
    """
    tokenizer = load_tokenizer(EMBEDDED_MODEL)
    train = tokenize(read_rows(ASSETS / "train.jsonl"), tokenizer, cutoff_len=64).examples
    torch.manual_seed(0)
    model = load_model(EMBEDDED_MODEL, dtype=torch.float32)
    before = projections(model)
    if method == "full training":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.split(".")[-2] in PROJECTIONS)
    else:
        add_lora(model, LoraConfig(r=8, lora_alpha=16, target_modules=PROJECTIONS, use_dora=method == "DoRA"))
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=lr, weight_decay=0)
    for start in range(0, 16 * 40, 16):
        ids, labels = collate(train[start : start + 16], tokenizer.pad_id)
        (causal_lm_loss(model, ids, labels) / (labels >= 0).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    if method != "full training":
        merge_lora(model)
        remove_lora(model)
    pairs = list(zip(before, projections(model), strict=True))
    stretched = torch.cat([(w.norm(dim=1) / v.norm(dim=1) - 1).abs() for v, w in pairs])
    return stretched, torch.cat([1 - torch.cosine_similarity(v, w) for v, w in pairs])


def projections(model: nn.Module) -> list[Tensor]:
    """Return copies of the attention's weights, (out, in) each."""
    return [p.detach().clone() for n, p in model.named_parameters() if n.split(".")[-2] in PROJECTIONS]


def draw_chat(figure) -> None:
    figure.set_size_inches(8.6, 3.9)
    axes, place = figure.subplots(), [0.0, 0.0]  # columns of characters, lines
    ids, learned, tokenizer = conversation()
    for i, is_learned in zip(map(int, ids), learned, strict=True):
        text = tokenizer.token(i).replace("<0x0A>", "↵")
        width = len(text) + 0.7
        special, edge = tokenizer.is_special(i), BLUE if is_learned else GREY
        filling, colour = (BLUE, "white") if is_learned else ("white" if special else PALE, "black")
        box = Rectangle(place, width, 1, facecolor=filling, edgecolor=edge, linewidth=0.8)
        axes.add_patch(box)
        small = dict(fontsize=9, family="monospace", ha="center", va="center", color=colour)
        axes.text(place[0] + width / 2, place[1] + 0.48, text, **small)
        place = [0.0, place[1] + 1.45] if text.endswith("↵") else [place[0] + width + 0.25, place[1]]
    notes = {"read": PALE, "read, a mark of the template": "white", "read and learned": BLUE}
    for row, (note, filling) in enumerate(notes.items()):
        at = (54, 6.1 + 1.35 * row)
        axes.add_patch(Rectangle(at, 2.2, 1, facecolor=filling, edgecolor=GREY, linewidth=0.8))
        axes.text(at[0] + 3, at[1] + 0.48, note, va="center", fontsize=10)
    axes.set(xlim=(-0.5, 84), ylim=(place[1] - 0.2, -0.5))
    axes.axis("off")


def conversation() -> tuple[ndarray, ndarray, Tokenizer]:
    """Return the ids of a conversation in ChatML (T,), its mask (T,), and a tokenizer with its marks."""
    with TemporaryDirectory() as directory:
        marks = ["<|im_start|>", "<|im_end|>"]
        tokenizer = add_new_tokens(load_tokenizer(EMBEDDED_MODEL), [], marks, Path(directory))
    talk = [
        message("system", "Answer in one sentence."),
        message("user", "Where does Orybelle Ashwood live?"),
    ]
    talk += [message("assistant", "She lives in Lanternsea."), message("user", "Which animal has she?")]
    talk.append(message("assistant", "She has a peacock."))
    return *load_chat_template("chatml", tokenizer).encode(talk), tokenizer


def draw_packing(figure) -> None:
    figure.set_size_inches(8.2, 4.8)
    lengths = (7, 4, 5)
    grid = figure.add_gridspec(3, 2, width_ratios=(1, 2.4))
    for row, n in enumerate(lengths):
        padded = torch.tensor([[0] * n + [PADDING] * (max(lengths) - n)])
        draw_mask(figure.add_subplot(grid[row, 0]), padded)
    whole = figure.add_subplot(grid[:, 1])
    draw_mask(whole, torch.arange(3).repeat_interleave(torch.tensor(lengths)).view(1, -1))
    tokens, scores = sum(lengths), sum(n * (n + 1) // 2 for n in lengths)
    padding = 3 * max(lengths) - tokens
    figure.axes[0].set_title(f"padded rows:\n{3 * max(lengths)} tokens, {padding} of padding", fontsize=11)
    whole.set_title(
        f"one row, end to end: {tokens} tokens,\n{scores} of {tokens**2} scores are computed", fontsize=11
    )
    whole.set(xlabel="key", ylabel="query")
    notes = {"the query sees\nthe key": BLUE, "padding": ORANGE, "not seen": GREY}
    for row, (note, colour) in enumerate(notes.items()):
        whole.text(16.2, 0.4 + 2 * row, note, color=colour, va="center", fontsize=11)
    whole.text(16.2, 13, "The numbers\nare positions.", va="center")


def draw_mask(axes, document_ids: Tensor) -> None:
    """Draw which query sees which key, a square each, and the positions. document_ids: (1, T)."""
    T = document_ids.shape[1]
    mask = attention_mask(T, T, None, document_ids, torch.device("cpu"))
    seen = torch.ones(T, T, dtype=torch.bool).tril() if mask is None else mask[0, 0]
    is_padding = document_ids[0] == PADDING
    for i, j in product(range(T), range(T)):
        colour = ORANGE if is_padding[i] or is_padding[j] else BLUE if seen[i, j] else PALE
        axes.add_patch(Rectangle((j - 0.46, i - 0.46), 0.92, 0.92, facecolor=colour, linewidth=0))
    positions = positions_in_documents(document_ids)[0].tolist()
    names = ["" if pad else str(p) for p, pad in zip(positions, is_padding, strict=True)]
    axes.set(xlim=(-0.6, T - 0.4), ylim=(T - 0.4, -0.6), aspect="equal")
    axes.set_xticks(range(T), names, fontsize=8)
    axes.set_yticks(range(T), names, fontsize=8)
    axes.tick_params(length=0, pad=1)
    axes.spines[["left", "bottom"]].set_visible(False)


def draw_attention(figure) -> None:
    figure.set_size_inches(8.6, 3.9)
    arrows, curves = figure.subplots(1, 2, width_ratios=(1.25, 1))
    K, positions = 32, torch.arange(21)
    shown = range(0, K // 2, 2)
    frequencies = rope_frequencies(RopeConfig(), K)  # (K/2,)
    for line, pair in enumerate(shown):
        angles = positions * frequencies[pair]
        size = dict(color=BLUE, pivot="mid", scale=25, width=0.004, headwidth=5, headlength=5)
        arrows.quiver(positions, torch.full_like(positions, line), angles.cos(), angles.sin(), **size)
    arrows.set_yticks(range(len(shown)), [f"pair {pair}" for pair in shown])
    limits = dict(xlim=(-0.8, 20.8), ylim=(len(shown) - 0.5, -0.5))
    arrows.set(xlabel="position", xticks=range(0, 21, 5), **limits)
    arrows.set_title("how RoPE turns pairs, head size 32", fontsize=11)
    arrows.tick_params(length=0)
    arrows.spines[["left", "bottom"]].set_visible(False)
    distances = torch.arange(257)
    for theta, colour in ((1e4, BLUE), (1e6, ORANGE)):
        angles = distances[:, None] * rope_frequencies(RopeConfig(theta=theta), 128)  # (257, 64)
        curves.plot(distances, angles.cos().mean(1), color=colour, linewidth=1.2)
    curves.text(250, 0.14, "theta 10,000", color=BLUE, ha="right")
    curves.text(250, 0.72, "theta 1,000,000", color=ORANGE, ha="right")
    curves.set(xlabel="distance in tokens", xlim=(0, 256), ylim=(0, 1.02), xticks=range(0, 257, 64))
    curves.set_title("product of a vector with itself, K = 128", fontsize=11)
    curves.grid(alpha=0.25)


def draw_rope(figure) -> None:
    figure.set_size_inches(8.6, 3.9)
    divided, losses = figure.subplots(1, 2)
    colours = {"as it is": "black", "linear": GREY, "llama3": GREEN, "dynamic": ORANGE, "yarn": BLUE}
    model = load_model(EMBEDDED_MODEL, dtype=torch.float32)
    start, draws = torch.full((48, 1), model.config.bos_token_id), torch.Generator().manual_seed(0)
    options = dict(max_new_tokens=249, temperature=1.0, eos_token_ids=(), generator=draws)
    texts = generate(model, start, **options).flatten()[: 12 * 960].view(12, 960)
    old = rope_frequencies(model.config.rope, model.config.head_dim)  # (K/2,)
    for kind, colour in colours.items():
        rope = stretched_to_1024(kind) if kind != "as it is" else model.config.rope
        by = old / frequencies_at(rope, model.config.head_dim, 1024)
        divided.plot(by, "o-", color=colour, markersize=3, linewidth=1.2, label=kind)
        each = loss_at_positions(model, rope, texts)  # (959,)
        means = each[:930].view(31, 30).mean(1)
        losses.plot(torch.arange(31) * 30 + 15, means, color=colour, linewidth=1.4)
    divided.set(xlabel="pair, fast to slow", ylabel="its frequency is divided by", ylim=(0, 8.5))
    divided.legend(frameon=False)
    losses.axvline(256, color=GREY, linewidth=0.8, linestyle=":")
    losses.text(262, 2.95, "256: context of training", color=GREY, fontsize=9)
    losses.set(xlabel="position in a row of 960 tokens", ylabel="loss a token", ylim=(0.8, 3.1))
    for axes in (divided, losses):
        axes.grid(alpha=0.25)


def stretched_to_1024(kind: str) -> RopeConfig:
    """Return a config that makes 256 tokens four times as many."""
    factor = yarn_attention_factor(4.0) if kind == "yarn" else 1.0
    stretch = dict(factor=4.0, original_max_position_embeddings=256)
    return RopeConfig(rope_type=kind, attention_factor=factor, **stretch)


@torch.no_grad()
def loss_at_positions(model: CausalLM, rope: RopeConfig, ids: Tensor) -> Tensor:
    """Return the mean loss of each token but the first with these angles. ids: (rows, T) -> (T - 1,)."""
    model.model.config = replace(model.config, rope=rope)
    logs = model(ids)[:, :-1].log_softmax(-1)  # (rows, T - 1, V)
    return -logs.gather(2, ids[:, 1:, None]).squeeze(-1).mean(0)


NOTE_PICTURES = (draw_dora, draw_chat, draw_packing, draw_attention, draw_rope)
