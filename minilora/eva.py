"""EVA: A starts with the directions in which a layer's inputs vary most (Paischer et al. 2024,
arXiv:2410.07170, section 3).

    X - mean(X) = U S V^T        A = V[:, :r]^T        B = 0             X: (tokens, in), some batches of data

No other r rows keep more of the inputs' variance in x A^T. X is never held: the r directions found so far,
each as long as its singular value, stand for all earlier rows. That is incremental PCA, and it drops only
what lay below the r-th singular value.

PEFT's EVA also moves ranks from layers with little variance to layers with much, unless `rho` is 1. Here all
layers keep rank r. Then every number is PEFT's, from the same batches.
"""

import math
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn

from minilora.system.errors import UserError

Batch = TypeVar("Batch")


class InputDirections:
    """The r directions in which a layer's inputs vary most, updated batch by batch.

    Each update decomposes three things together: the directions so far, as long as their singular values; the
    batch, centred; and the shift of the mean between the two (Ross et al. 2008, section 2.1).
    """

    def __init__(self, r: int, tau: float = 0.99):
        self.r, self.tau, self.seen = r, tau, 0
        self.directions: Tensor | None = None  # (r, in), orthonormal rows
        self.converged = False  # in the last update no direction turned by a cosine below `tau`

    def update(self, x: Tensor) -> None:
        """Take the inputs of one batch, (N, in); skip one of fewer rows than r, as PEFT does."""
        x, n, before = x.float(), len(x), self.directions
        if n < self.r:
            return
        mean = x.mean(0, dtype=torch.float64)
        centred = (x - mean).float()
        if before is not None:
            shift = math.sqrt(self.seen / (self.seen + n) * n) * (self.mean - mean)
            centred = torch.vstack([self.lengths.view(-1, 1) * before, centred, shift])
            mean = (self.mean * self.seen + mean * n) / (self.seen + n)
        with torch.random.fork_rng():  # the same directions whatever was drawn before
            torch.manual_seed(42)
            _, S, V = torch.svd_lowrank(centred, q=min(2 * self.r, *centred.shape), niter=4)
        directions = V.T[: self.r]
        largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
        self.directions, self.lengths = directions * largest.sign(), S[: self.r]
        self.mean, self.seen = mean, self.seen + n
        if before is not None:
            self.converged = bool((torch.cosine_similarity(self.directions, before) >= self.tau).all())


@torch.no_grad()
def input_directions(
    layers: dict[str, nn.Module],
    r: int,
    batches: Iterable[Batch],
    forward: Callable[[Batch], object],  # runs the model that holds the layers
    tau: float = 0.99,
) -> dict[str, Tensor]:
    """Return each layer's `InputDirections.directions`, (r, in), after running a model on batches.

    It stops when all have converged: `batches` may be endless. A layer that has converged is not updated
    again, as in PEFT. Raises UserError if no batch had r rows.
    """
    found = {name: InputDirections(r, tau) for name in layers}

    def watch(directions: InputDirections) -> Callable[[nn.Module, tuple], None]:
        return lambda _, inputs: None if directions.converged else directions.update(inputs[0].flatten(0, -2))

    handles = [layer.register_forward_pre_hook(watch(found[name])) for name, layer in layers.items()]
    try:
        for batch in batches:
            forward(batch)
            if all(directions.converged for directions in found.values()):
                break
    finally:
        for handle in handles:
            handle.remove()
    if unseen := [name for name, directions in found.items() if not directions.seen]:
        raise UserError(f"init_lora_weights 'eva': no batch has {r} tokens for {unseen[0]}; lower lora_rank")
    return {name: directions.directions.float() for name, directions in found.items()}
