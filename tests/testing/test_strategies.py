"""Strategies draw what they say, shrink to plain things, and a recipe makes its tensor again."""

import math

import pytest
import torch
from hypothesis import find, given, settings
from hypothesis import strategies as st

from minilora import CausalLM
from minilora.testing import (
    FLAWS,
    LAYOUTS,
    NONFINITE,
    Recipe,
    conversations,
    document_lengths,
    masks,
    model_configs,
    recipes,
    shapes,
    weights,
)
from minilora.testing.simplify import simplest

few = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@few
@given(recipes(flaws=FLAWS + NONFINITE, layouts=LAYOUTS))
def test_the_repr_of_a_recipe_makes_the_same_tensor(recipe):
    again = eval(repr(recipe), dict(Recipe=Recipe, torch=torch))
    assert again == recipe
    torch.testing.assert_close(again.tensor(), recipe.tensor(), rtol=0, atol=0, equal_nan=True)


@few
@given(weights())
def test_weights_are_finite_unless_asked_and_contiguous(weight):
    assert weight.isfinite().all() and weight.is_contiguous() and not weight.requires_grad and weight.numel()


def first(strategy, wanted):
    options = settings(max_examples=3000, derandomize=True, database=None, deadline=None)
    return find(strategy, wanted, settings=options)


@pytest.mark.parametrize(
    "wanted",
    [
        lambda w: w.isnan().any(),
        lambda w: w.isinf().any(),
        lambda w: not w.is_contiguous(),
        lambda w: w.numel() == 0,
        lambda w: (w == 0).all() and w.signbit().any(),
        lambda w: w.abs().max() < 2**-126 and w.any() if w.numel() else False,
        lambda w: w.dtype == torch.float16 and w.abs().max() > 1000 if w.numel() else False,
    ],
    ids=["nan", "infinity", "not contiguous", "empty", "negative zero", "subnormal", "large float16"],
)
def test_each_kind_of_trouble_is_drawn_when_it_is_asked_for(wanted):
    drawn = weights(shapes(300, min_size=0), flaws=FLAWS + NONFINITE, layouts=LAYOUTS)
    assert wanted(first(drawn, lambda w: bool(wanted(w))))


def test_gradients_are_asked_for():
    assert first(weights(requires_grad=True), lambda w: True).requires_grad


def test_what_fails_shrinks_to_one_value_in_float32_that_is_zero():
    assert repr(first(recipes(), lambda recipe: True)) == "Recipe(shape=(1,))"
    assert first(recipes(), lambda recipe: recipe.tensor().numel() >= 3).shape in ((3,), (1, 3), (3, 1))


def test_a_counterexample_of_a_seed_becomes_one_of_the_values_that_matter():
    def fails(recipe):
        """Two values are above 1."""
        return int((recipe.tensor() > 1).sum()) >= 2

    plain = simplest(Recipe(shape=(50,), seed=3), None, fails)
    assert fails(plain) and plain.seed is None and len(plain.values) == 2
    assert all(len(repr(value)) <= 4 for value in plain.values.values())


def test_a_counterexample_that_numbers_cannot_say_keeps_its_recipe():
    recipe = Recipe(shape=(500,), seed=3)
    assert simplest(recipe, None, lambda other: True) is recipe  # too many numbers to print
    small = Recipe(shape=(5,), seed=3)
    assert simplest(small, None, lambda other: other.seed == 3) is small


@pytest.mark.parametrize("mistake", [dict(flaws=("tie",)), dict(layout="sparse")])
def test_an_unknown_flaw_or_layout_is_refused(mistake):
    with pytest.raises(ValueError, match="unknown .*; known: "):
        Recipe(shape=(3, 3), **mistake).tensor()


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(model_configs(), st.integers(1, 6))
def test_every_config_makes_a_model_that_runs(config, tokens):
    model = CausalLM(config).eval()
    model.init_weights(std=0.1)
    logits = model(torch.zeros(1, tokens, dtype=torch.long))
    assert logits.shape == (1, tokens, config.vocab_size) and logits.isfinite().all()


@few
@given(conversations())
def test_conversations_take_turns_and_end_with_an_answer(messages):
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    assert turns == ["user", "assistant"] * (len(turns) // 2) and turns
    assert all(message["content"].strip() for message in messages)


@few
@given(document_lengths(32), masks())
def test_documents_fit_their_row_and_every_row_of_a_mask_has_a_token(lengths, mask):
    assert min(lengths) >= 1 and sum(lengths) <= 32
    assert mask.dtype == torch.int64 and set(mask.unique().tolist()) <= {0, 1} and (mask.sum(1) > 0).all()


def test_shapes_lie_beside_powers_of_two_and_respect_their_limits():
    drawn = first(shapes(200, 1), lambda shape: shape[0] > 128)
    assert drawn == (129,)
    with_limits = first(shapes(50, 2), lambda shape: len(shape) == 2)
    assert math.prod(with_limits) <= 50
