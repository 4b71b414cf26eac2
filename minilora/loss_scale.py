"""Training in float16: the loss is scaled up, so that small gradients do not vanish (Micikevicius et al.
2018, arXiv:1710.03740).

    (S * loss).backward()        gradients S times as large: float16 has none below 6e-8, and activation gradients are smaller
    g = g / S                    in float32, before the norm is taken and clipped
    g has an inf or a nan?       S was too large: leave this step out, S <- S / 2
    2000 steps without one?      S <- 2 S

So S finds its place by itself, from 65536 down or up. The first steps of a run may well be left out; that is
how S gets there, and every step left out is counted and shown. As in the usual stack, it does not move the
learning rate along its schedule.

When S has fallen below 1 something else is wrong: gradients overflow without being scaled up at all. Then
training has diverged, and going on would leave out every step to come. From 65536 that takes 17 steps, during
which the adapter does not change.

bfloat16 has float32's range. There, and in float32, nothing is scaled, and the first step that is not finite
is a divergence.
"""

import torch
from torch import Tensor


class LossScale:
    """S, and how often a step was left out. Not `enabled`, S is 1."""

    def __init__(self, device: torch.device, enabled: bool):
        self._scaler = torch.amp.GradScaler(device.type, enabled=enabled)
        self._scaler.scale(
            torch.zeros((), device=device)
        )  # makes S; a rank without a micro-batch will unscale and not scale
        self.enabled = enabled
        self.skipped = 0  # steps left out so far
        self.skipped_in_a_row = 0

    @property
    def scale(self) -> float:
        """S."""
        return self._scaler.get_scale()

    @property
    def diverged(self) -> bool:
        """Whether there is no use in going on: see above."""
        return self.scale < 1 if self.enabled else self.skipped > 0

    def backward(self, loss: Tensor) -> None:
        """Gradients of S * loss, added to those that are there."""
        self._scaler.scale(loss).backward()

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by S: once a step, before they are looked at."""
        self._scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer, finite: bool) -> None:
        """Take the optimizer's step, or leave it out where loss or gradients are not `finite`; adjust S."""
        before = self.scale
        if self.enabled or finite:
            self._scaler.step(optimizer)  # looks at every gradient by itself
            self._scaler.update()
        skipped = (
            self.scale < before if self.enabled else not finite
        )  # S falls where, and only where, a step is left out
        self.skipped += skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0

    def summary(self) -> str:
        """For people, where there is anything to say."""
        return f"; {self.skipped} left out, with gradients beyond float16's range" if self.skipped else ""

    def state_dict(self) -> dict:
        """What a resumed run needs, as JSON."""
        return {
            "scaler": self._scaler.state_dict(),
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on from what `state_dict` gave."""
        self._scaler.load_state_dict(state["scaler"])
        self.skipped, self.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]
