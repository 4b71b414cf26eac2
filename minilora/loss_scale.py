"""Training in float16: the loss is scaled up, so that small gradients do not vanish (arXiv:1710.03740).

    (S * loss).backward()        gradients S times as large: float16 has none below 6e-8
    g = g / S                    in float32, before the norm is taken and clipped
    g has an inf or a nan?       S was too large: skip this step, S <- S / 2
    2000 steps without one?      S <- 2 S

So S finds its value by itself, from 65536 down or up. A run often skips its first steps for that. Every
skipped step is counted and shown. As in the usual stack, it does not advance the learning rate's schedule.

When S falls below 1, gradients overflow without being scaled up at all. Then training has diverged, and every
later step would be skipped too. From 65536 that takes 17 steps, during which the adapter does not change. A
loss that is not finite itself is another matter, which no S can mend: see run/divergence.py.

bfloat16 has float32's range. There, and in float32, nothing is scaled, and the first step that is not finite
is a divergence.
"""

import math

import torch
from torch import Tensor

from minilora.backend.copies import read_numbers


class LossScale:
    """S, and how often a step was skipped. Where it is not `enabled`, S is 1."""

    def __init__(self, device: torch.device, enabled: bool):
        self._scaler = torch.amp.GradScaler(device.type, enabled=enabled)
        # Creates S: a rank without a micro-batch will unscale without having scaled.
        self._one = torch.ones((), device=device)
        self.scale = self._scaler.scale(self._one).item()  # S, as the host knows it
        self.enabled = enabled
        self.skipped = 0  # steps skipped so far
        self.skipped_in_a_row = 0

    @property
    def diverged(self) -> bool:
        """Whether every later step would be skipped too: see above."""
        return self.scale < 1 if self.enabled else self.skipped > 0

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of S * loss to the parameters' gradients."""
        self._scaler.scale(loss).backward()

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by S: once a step, before anyone reads them."""
        self._scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer, loss: Tensor | float, norm: Tensor) -> list[float]:
        """Take the optimizer's step, or skip it if the loss or a gradient is not finite; adjust S.

        Returns loss and norm as numbers. They are read with S: the host waits for a GPU once a step, here.
        """
        before = self.scale
        self._scaler.update()  # S falls exactly when a gradient overflowed
        loss, norm, self.scale = read_numbers(loss, norm, self._scaler.scale(self._one))
        skipped = self.scale < before if self.enabled else not math.isfinite(loss + norm)
        if not skipped:
            optimizer.step()
        self.skipped += skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        return [loss, norm]

    def summary(self) -> str:
        """Return a remark for people if steps were skipped, else an empty text."""
        return f"; {self.skipped} skipped, with numbers beyond float16's range" if self.skipped else ""

    def state_dict(self) -> dict:
        """Return what a resumed run needs, as JSON."""
        return {
            "scaler": self._scaler.state_dict(),
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue from a `state_dict`."""
        self._scaler.load_state_dict(state["scaler"])
        self.scale = self._scaler.get_scale()
        self.skipped, self.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]
