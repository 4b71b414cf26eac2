"""A smaller counterexample after the smallest: numbers in place of a seed, and plain ones.

Hypothesis shrinks to a short recipe, such as Recipe(shape=(63,), seed=0). A reader would rather see the two
numbers that matter: Recipe(shape=(63,), values={0: 1.0, 7: 0.7}).
"""

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from minilora.testing.recipes import Recipe

MOST_VALUES = 400  # a tensor of more keeps its seed


def simplest(recipe: Recipe, code: torch.Tensor | None, fails: Callable[[Recipe], bool]) -> Recipe:
    """Return a recipe with explicit values that `fails` as well, as few and as plain as can be found.

    Values are left out in ever smaller groups; those that remain become 1, -1 or a number of few digits if
    the recipe still fails. Returns the recipe given where its tensor is large, or fails only as it is.
    """
    n = math.prod(recipe.shape)
    if n > MOST_VALUES:
        return recipe
    flat = recipe.tensor(code).detach().float().reshape(-1).tolist()
    values = {place: value for place, value in enumerate(flat) if value or math.copysign(1, value) < 0}
    plain = replace(recipe, values=values, seed=None, exponent=0, flaws=(), blocksize=64)
    if not fails(plain):
        return recipe
    plain = _fewer(plain, fails)
    for place, value in plain.values.items():
        for candidate in (1.0, -1.0, round(value, 1), round(value, 2)):
            shorter = replace(plain, values=plain.values | {place: candidate})
            if len(repr(candidate)) < len(repr(plain.values[place])) and fails(shorter):
                plain = shorter
    return plain


def _fewer(recipe: Recipe, fails: Callable[[Recipe], bool]) -> Recipe:
    """Leave out values, halves first and single ones last, as long as the recipe fails."""
    size = len(recipe.values)
    while size:
        places = list(recipe.values)
        for start in range(0, len(places), size):
            group = places[start : start + size]
            less = replace(recipe, values={p: v for p, v in recipe.values.items() if p not in group})
            if fails(less):
                recipe = less
        size //= 2
    return recipe
