"""A quantizer under test, and the weights that it is tried on."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from minilora.testing.quantizer_oracles import ROUNDING, absmax_of
from minilora.testing.recipes import FLAWS, Recipe
from minilora.testing.simplify import simplest
from minilora.testing.strategies import recipes


@dataclass(frozen=True)
class Quantizer:
    """A quantizer and what is promised of it; `check_quantizer` explains the fields."""

    quantize: Callable[[Tensor], Any]
    dequantize: Callable[[Any], Tensor]
    code: Tensor  # (codes,) float64
    blocksize: int | None
    dtypes: tuple[torch.dtype, ...]
    out_dtype: torch.dtype | None
    smallest: float
    scale_error: float
    ties: str
    nonfinite: str | None
    empty: str | None
    shape: st.SearchStrategy[tuple[int, ...]] | None

    def values(self, weight: Tensor) -> Tensor:
        """Return dequantize(quantize(weight)), flat: (n,) float64."""
        return self.dequantize(self.quantize(weight)).detach().double().reshape(-1)

    def absmax(self, weight: Tensor) -> Tensor:
        """Return the scale of each value: (n,) float64."""
        return absmax_of(weight, self.blocksize)

    def rounding(self, weight: Tensor, values: Tensor) -> Tensor:
        """Return how far values may be off for other reasons than the code: (n,) float64."""
        limits = torch.finfo(self.out_dtype or weight.dtype)
        off = ROUNDING * self.absmax(weight) + self.smallest + limits.tiny * limits.eps
        if limits.dtype != "float32":
            off = off + limits.eps / 2 * values.abs()  # rounded once more
        return off + self.scale_error * weight.detach().double().abs().amax()

    @property
    def first_dtype(self) -> tuple[torch.dtype, ...]:
        return self.dtypes[:1]

    @property
    def holds_ones(self) -> bool:
        """Whether a block's largest value, of either sign, has a code."""
        return bool((self.code == 1).any() and (self.code == -1).any())

    @property
    def is_symmetric(self) -> bool:
        return torch.equal(self.code.sort().values + 0.0, (-self.code).sort().values + 0.0)

    def shapes(self, blocks: int = 1) -> st.SearchStrategy[tuple[int, ...]]:
        """Shapes of at least so many blocks: sizes about a block's, in one dimension and in more."""
        if self.shape is not None:
            return self.shape
        b = self.blocksize or 8
        row = st.sampled_from([1, 2, 3, b - 1, b, b + 1, 2 * b, 2 * b + 1, 3 * b + 5])
        rows = st.tuples(st.integers(blocks if self.blocksize is None else 1, 5), row)
        deep = st.tuples(st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 5, b // 2]))
        long = row.map(lambda n: (n,))
        if self.blocksize is None:
            return rows if blocks > 1 else long | rows | deep
        return (long | rows | deep).filter(lambda shape: torch.Size(shape).numel() > (blocks - 1) * b)

    def cases(
        self, *, flaws=FLAWS, dtypes=None, shape=None, blocks=1, **options
    ) -> st.SearchStrategy["Case"]:
        """Weights to try a property on, as `strategies.recipes` draws them."""
        shape, dtypes = self.shapes(blocks) if shape is None else shape, dtypes or self.dtypes
        drawn = recipes(shape, dtypes, flaws, self.blocksize or 8, **options)
        return drawn.map(partial(Case, code=self.code))


@dataclass(frozen=True, repr=False)
class Case:
    """A recipe. Its `repr` makes the tensor, given the quantizer's `code`."""

    recipe: Recipe
    code: Tensor

    def tensor(self) -> Tensor:
        return self.recipe.tensor(self.code)

    def simplest(self, fails: Callable[["Case"], bool]) -> "Case":
        """Return a case that fails as well and is easier to read."""
        return Case(
            simplest(self.recipe, self.code, lambda recipe: fails(Case(recipe, self.code))), self.code
        )

    def __repr__(self) -> str:
        return f"{self.recipe!r}.tensor({'code' if 'ties' in self.recipe.flaws else ''})"
