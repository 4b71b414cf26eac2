"""Optimizers by name, and learning-rate schedules as plain functions of the step.

The schedules are transformers' to the last digit: linear warm-up from 0, then

    constant      1                              linear        1 - t
    cosine        (1 + cos(pi t)) / 2            polynomial    1 - t, ending at 1e-7 instead of 0

with t the share of the steps after warm-up that are done.
"""

import math
from collections.abc import Iterable

import torch
from torch import nn

SCHEDULES = ("cosine", "linear", "constant", "polynomial")
OPTIMIZERS = ("adamw_torch",)

_POLYNOMIAL_END = 1e-7


def learning_rate(step: int, total_steps: int, warmup_steps: int, base: float, schedule: str) -> float:
    """The learning rate of step `step`, counted from 0."""
    if step < warmup_steps:
        return base * step / warmup_steps
    t = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    match schedule:
        case "constant":
            return base
        case "linear":
            return base * max(0.0, 1.0 - t)
        case "cosine":
            return base * 0.5 * (1.0 + math.cos(math.pi * t))
        case "polynomial":
            return _POLYNOMIAL_END if t > 1 else (base - _POLYNOMIAL_END) * (1.0 - t) + _POLYNOMIAL_END
    raise ValueError(f"schedule {schedule!r} is not one of {SCHEDULES}")


def make_optimizer(name: str, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """An optimizer by its name in Hugging Face's TrainingArguments."""
    parameters = list(parameters)
    if name == "adamw_torch":
        # One fused pass over all tensors: an adapter is hundreds of small ones, and a loop over them would cost more than the sums.
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=True)
    raise ValueError(f"optimizer {name!r} is not one of {OPTIMIZERS}")
