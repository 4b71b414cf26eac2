"""The pictures of the notes on DoRA, templates, packing, attention and RoPE, for scripts/dev/pictures.py.

Each function fills one figure of matplotlib. Its numbers come from minilora's own functions, on the small
model and the rows of assets/.
"""

import torch
from torch import Tensor, nn

from minilora import (
    LoraConfig,
    add_lora,
    load_model,
    load_tokenizer,
    merge_lora,
    remove_lora,
    trainable_parameters,
)
from minilora.data.examples import collate, tokenize
from minilora.data.rows import read_rows
from minilora.loss import causal_lm_loss
from minilora.system.assets import EMBEDDED_MODEL

BLUE, ORANGE, GREY, PALE = "#3b6ea5", "#d1662f", "#707070", "#e4e4e4"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def draw_dora(figure) -> None:
    figure.set_size_inches(8.6, 3.4)
    panels = figure.subplots(1, 3, sharey=True)
    methods = {"full training": 1e-3, "LoRA": 4e-3, "DoRA": 4e-3}  # name: learning rate
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
    train = tokenize(read_rows(EMBEDDED_MODEL.parent / "train.jsonl"), tokenizer, cutoff_len=64).examples
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


NOTE_PICTURES = (draw_dora,)
