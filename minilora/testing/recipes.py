"""A tensor in one line of text, so that a counterexample can be printed and made again.

    Recipe(shape=(65,), values={64: 1.0}).tensor()          zeros, but for the last one
    Recipe(shape=(130,), seed=7, exponent=-3, flaws=("zero block",)).tensor()

Hypothesis draws recipes rather than tensors: a recipe has few parts, so tensors of thousands of values are
drawn quickly, and shrink towards small ones of zeros and ones.
"""

import math
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

FLAWS = ("zero block", "ties", "outliers", "subnormals", "constant block", "tiny block", "negative zeros")
NONFINITE = ("nan", "infinity")
LAYOUTS = ("contiguous", "strided", "transposed")


@dataclass(frozen=True, repr=False)
class Recipe:
    """How to make a tensor. `repr` is a line of Python that makes the recipe again."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    values: dict[int, float] = field(default_factory=dict, hash=False)  # place in memory order -> value
    seed: int | None = None  # of normal numbers; None: zeros
    exponent: int = 0  # everything is multiplied by 2^exponent
    flaws: tuple[str, ...] = ()  # of FLAWS and NONFINITE, each in one block, whose place the seed chooses
    blocksize: int = 64
    layout: str = "contiguous"  # strided: every second number of a buffer; transposed: first and last axis
    requires_grad: bool = False

    def tensor(self, code: Tensor | None = None) -> Tensor:
        """Return the tensor. code: (codes,), of a quantizer; the flaw "ties" puts values between its codes.

        Ties are exact in the scaled value: the block's absmax is a power of two. Without a code they lie
        between 17 even steps. Raises ValueError for unknown flaws and layouts.
        """
        n, scale = math.prod(self.shape), 2.0**self.exponent
        generator = torch.Generator().manual_seed(self.seed or 0)
        flat = torch.zeros(n) if self.seed is None else torch.randn(n, generator=generator) * scale
        for place, value in self.values.items():
            flat[place] = value * scale
        limit = torch.finfo(self.dtype).max
        for flaw in self.flaws if n else ():
            start = int(torch.randint(-(-n // self.blocksize), (), generator=generator)) * self.blocksize
            _spoil(flat[start : start + self.blocksize], flaw, code, scale, generator)
            if flaw not in NONFINITE:
                flat.clamp_(-limit, limit)
        tensor = _laid_out(flat.clamp(-limit, limit) if not self.flaws else flat, self.shape, self.layout)
        return tensor.to(self.dtype).requires_grad_(self.requires_grad)

    def __repr__(self) -> str:
        parts = (
            f"{each.name}={getattr(self, each.name)!r}"
            for each in fields(self)
            if each.name == "shape" or getattr(self, each.name) != _DEFAULTS[each.name]
        )
        return f"Recipe({', '.join(parts)})"


_DEFAULTS = {each.name: {} if each.name == "values" else each.default for each in fields(Recipe)}


def _laid_out(flat: Tensor, shape: tuple[int, ...], layout: str) -> Tensor:
    """Return the values in this shape, contiguous or not. flat: (n,)"""
    tensor = flat.view(shape)
    if layout == "strided":
        return torch.stack([tensor, tensor + 1], dim=-1)[..., 0]
    if layout == "transposed":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1) if shape else tensor
    if layout != "contiguous":
        raise ValueError(f"unknown layout {layout!r}; known: {', '.join(LAYOUTS)}")
    return tensor


def _spoil(block: Tensor, flaw: str, code: Tensor | None, scale: float, generator: torch.Generator) -> None:
    """Give one block of a tensor a flaw, in place."""
    place = int(torch.randint(len(block), (), generator=generator))
    if flaw == "zero block":
        block.zero_()
    elif flaw == "constant block":
        block.fill_(-scale)
    elif flaw == "negative zeros":
        block[::2] = -0.0
    elif flaw == "outliers":
        block[place] = 1000 * scale
    elif flaw == "tiny block":
        block.mul_(2.0**-20)
    elif flaw == "subnormals":
        block.mul_(2.0**-120).mul_(2.0**-15 / scale)
    elif flaw == "nan":
        block[place] = math.nan
    elif flaw == "infinity":
        block[place] = math.inf
    elif flaw == "ties":
        places = (torch.linspace(-1, 1, 17) if code is None else code.float()).sort().values
        middles = (places[:-1] + places[1:]) / 2
        block.copy_(middles[torch.randint(len(middles), (len(block),), generator=generator)] * scale)
        block[0] = scale  # the block's absmax
    else:
        raise ValueError(f"unknown flaw {flaw!r}; known: {', '.join(FLAWS + NONFINITE)}")
