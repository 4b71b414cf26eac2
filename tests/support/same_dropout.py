"""PEFT with the dropout of minilora: the same seeds, so that both drop the same elements."""

import torch
from torch import Tensor, nn

from minilora.backend.dropout import draw_seed, gain_of, kept, threshold_of

GROUPS = [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]


class SameDraws(nn.Module):
    """Dropout of a PEFT layer by one stream of its group's seed, which the group's first layer draws."""

    def __init__(self, p: float, group: dict, stream: int):
        super().__init__()
        self.threshold, self.group, self.stream = threshold_of(p), group, stream

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        if self.stream == min(self.group["streams"]):
            self.group["seed"] = draw_seed()
        rows = x.shape[:-1].numel()
        mask = kept(rows, x.shape[-1], self.group["seed"], self.stream, self.threshold, x.device)
        return x * mask.view(x.shape) * gain_of(self.threshold)


def draw_as_we_do(theirs: nn.Module, p: float) -> nn.Module:
    """Replace the dropout of every layer of a PEFT model. Returns the model."""
    if p == 0:
        return theirs
    groups = {}
    for name, module in theirs.named_modules():
        leaf = name.rpartition(".")[2]
        found = next((group for group in GROUPS if leaf in group), None)
        if found is None or not hasattr(module, "lora_dropout"):
            continue
        group = groups.setdefault((name.rpartition(".")[0], found), {"streams": set()})
        group["streams"].add(found.index(leaf))
        module.lora_dropout["default"] = SameDraws(p, group, found.index(leaf))
    assert groups
    return theirs


def mask_of(x: Tensor, p: float, stream: int = 0) -> Tensor:
    """Draw as one layer would: its mask times 1 / (1 - p), float64 (..., in)."""
    if p == 0:
        return torch.ones(x.shape, dtype=torch.float64)
    threshold = threshold_of(p)
    mask = kept(x.shape[:-1].numel(), x.shape[-1], draw_seed(), stream, threshold, x.device)
    return mask.view(x.shape).double() * gain_of(threshold)
