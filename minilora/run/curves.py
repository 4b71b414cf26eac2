"""The learning rate curves of transformers that have settings, which are in `lr_scheduler_kwargs`.

    cosine_with_min_lr     min_lr or min_lr_rate: half a cosine down to this rate, or this share of the peak
    cosine_with_restarts   num_cycles (1): so many halves of a cosine, each from the peak to 0
    warmup_stable_decay    num_decay_steps, min_lr_ratio (0): the peak until the last so many steps, then half
                           a cosine down to this share of the peak; the warm-up begins there, too

The curves without settings are those of `minilora.optim.Schedule`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from minilora.optim import SCHEDULES, Schedule
from minilora.system.errors import UserError, suggestion
from minilora.system.schema import shown

SETTINGS = {  # curve: {its setting: the lowest and the highest value}
    "cosine_with_min_lr": {"min_lr": (0, math.inf), "min_lr_rate": (0, 1)},
    "cosine_with_restarts": {"num_cycles": (1, 1_000_000)},
    "warmup_stable_decay": {"num_decay_steps": (1, 1_000_000_000), "min_lr_ratio": (0, 1)},
}
CURVES = (*SCHEDULES, *SETTINGS)
_WHOLE = ("num_cycles", "num_decay_steps")


@dataclass(frozen=True)
class Curve:
    """The learning rate of every step, as `minilora.optim.Schedule` has it."""

    name: str  # one of SETTINGS
    peak: float
    total_steps: int
    warmup_steps: int
    settings: Mapping[str, float]

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of step `step`, counted from 0."""
        low = self.settings.get("min_lr_ratio", 0.0)
        if step < self.warmup_steps:
            return self.peak * (low + (1 - low) * step / self.warmup_steps)
        t = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        match self.name:
            case "cosine_with_min_lr":
                low = self.settings.get("min_lr_rate", self.settings.get("min_lr", 0.0) / self.peak)
            case "cosine_with_restarts":
                t = 1.0 if t >= 1 else self.settings.get("num_cycles", 1) * t % 1.0
            case "warmup_stable_decay":
                decay = int(self.settings["num_decay_steps"])
                t = min(1.0, max(0, step - self.total_steps + decay) / decay)
        return self.peak * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * t)))


def make_curve(
    name: str, peak: float, total_steps: int, warmup_steps: int, settings: Mapping[str, float] | None
) -> Schedule | Curve:
    """Return the learning rates of a training. Raises UserError for a decay that does not fit in it."""
    if name in SCHEDULES:
        return Schedule(name, peak, total_steps, warmup_steps)
    decay = (settings or {}).get("num_decay_steps", 0)
    if decay > total_steps - warmup_steps:
        raise UserError(
            f"lr_scheduler_kwargs: num_decay_steps = {decay:g} is more than the {total_steps - warmup_steps} "
            "steps after the warm-up"
        )
    return Curve(name, peak, total_steps, warmup_steps, settings or {})


def check_settings(name: str, peak: float, settings: Mapping[str, float] | None) -> None:
    """Raise UserError for a setting that the curve does not have, lacks, or cannot use."""
    settings, known = settings or {}, SETTINGS.get(name, {})
    for key, value in settings.items():
        if not known:
            raise UserError(f"lr_scheduler_kwargs names {key}, but the {name} curve has no settings")
        if key not in known:
            raise UserError(f"lr_scheduler_kwargs names {shown(key)} for {name}{suggestion(key, known)}")
        low, high = known[key]
        high = peak if key == "min_lr" else high
        if not low <= value <= high or (key in _WHOLE and value != int(value)):
            whole = "a whole number " if key in _WHOLE else ""
            raise UserError(
                f"lr_scheduler_kwargs: {key} must be {whole}from {low:g} to {high:g}, not {value:g}"
            )
    if name == "cosine_with_min_lr" and len(settings) != 1:
        raise UserError("cosine_with_min_lr needs lr_scheduler_kwargs: {min_lr_rate: 0.1}, or min_lr")
    if name == "warmup_stable_decay" and "num_decay_steps" not in settings:
        raise UserError("warmup_stable_decay needs lr_scheduler_kwargs: {num_decay_steps: 100}")
