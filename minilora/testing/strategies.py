"""Hypothesis strategies: the tensors that break quantizers, and the shapes of LoRA layers.

They draw what goes wrong: blocks of zeros, values in the middle between two codes, one outlier that flattens
its block, subnormals, sizes that no block divides. What is drawn shrinks towards float32, zeros and ones,
small shapes and no flaw.
"""

import math

import torch
from hypothesis import strategies as st
from torch import Tensor

from minilora.testing.recipes import FLAWS, Recipe

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def shapes(max_size: int = 5000, max_dims: int = 3, min_size: int = 1) -> st.SearchStrategy[tuple[int, ...]]:
    """Shapes of 1 to `max_dims` dimensions and at most `max_size` elements; odd sizes, and those just beside
    a power of two. min_size 0: empty shapes, too.
    """
    edges = [2**k + d for k in range(5, 13) for d in (-1, 0, 1) if 2**k + d <= max_size]
    size = st.integers(min_size, 70) | st.sampled_from(edges)
    return (
        st.lists(size, min_size=1, max_size=max_dims)
        .map(tuple)
        .filter(lambda shape: math.prod(shape) <= max_size)
    )


def lora_shapes(max_features: int = 96, max_rank: int = 16) -> st.SearchStrategy[tuple[int, int, int]]:
    """(in, out, r): any widths, with r from 1 to beyond both, which is allowed though wasteful."""
    features = st.integers(1, max_features)
    return st.tuples(features, features, st.integers(1, max_rank))


@st.composite
def recipes(
    draw: st.DrawFn,
    shape: st.SearchStrategy[tuple[int, ...]] | None = None,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    flaws: tuple[str, ...] = FLAWS,
    blocksize: int = 64,
    layouts: tuple[str, ...] = ("contiguous",),
    requires_grad: bool = False,
) -> Recipe:
    """Recipes of tensors: zeros with a few plain values, or normal numbers at some scale; up to four flaws.

    Finite, unless `flaws` names those of recipes.NONFINITE. The first of `dtypes` and `layouts` is the
    simplest, and the first dtype is drawn most. `blocksize` is of the quantizer under test: a flaw fills one
    block.
    """
    size = draw(shapes() if shape is None else shape)
    last, seeds = math.prod(size) - 1, st.integers(0, 2**32 - 1)
    plain = st.dictionaries(st.integers(0, last), st.floats(-2, 2, width=32), max_size=4)
    return Recipe(
        shape=size,
        dtype=draw(st.sampled_from((dtypes[0], *dtypes))),
        values=draw(plain) if last >= 0 else {},
        seed=draw(st.none() | seeds | seeds),
        exponent=draw(st.integers(-12, 4) | st.integers(-30, 14)),  # float16 overflows at 2^16
        flaws=tuple(sorted(draw(st.sets(st.sampled_from(flaws), max_size=4)))) if flaws else (),
        blocksize=blocksize if flaws else 64,  # it matters to flaws alone
        layout=draw(st.sampled_from(layouts)),
        requires_grad=requires_grad,
    )


def weights(
    shape: st.SearchStrategy[tuple[int, ...]] | None = None,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    flaws: tuple[str, ...] = FLAWS,
    code: Tensor | None = None,
    blocksize: int = 64,
    **options,
) -> st.SearchStrategy[Tensor]:
    """Return the tensors of `recipes`, which has the options.

    code, blocksize: of the quantizer under test, for the flaws that aim at it.
    """
    drawn = recipes(shape, dtypes, flaws, blocksize, **options)
    return drawn.map(lambda recipe: recipe.tensor(code))


@st.composite
def factors(
    draw: st.DrawFn, shape: st.SearchStrategy[tuple[int, int, int]] | None = None
) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r), float32, both of plain or normal numbers; B may be 0, as at the start."""
    in_features, out_features, r = draw(lora_shapes() if shape is None else shape)
    A, B = ((r, in_features), (out_features, r))
    options = dict(dtypes=DTYPES[:1], flaws=())
    return draw(weights(st.just(A), **options)), draw(weights(st.just(B), **options))
