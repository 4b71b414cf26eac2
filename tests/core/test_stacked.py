"""Few rows of several adapters on a CPU: stacked factors give each row its own adapter's update."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.families import relative_error
from support.tiny import ids, randomize, tiny_model

from minilora import LoraConfig, add_lora, set_adapter
from minilora.backend import stacked
from minilora.backend.fused_lora import Adapter
from minilora.mixed import adapters
from minilora.mixed_layer import Mixed

IN, OUT = 12, 7


def adapters_of(ranks, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        Adapter(torch.randn(r, IN, generator=generator), torch.randn(OUT, r, generator=generator), 0.5 + i, 0)
        for i, r in enumerate(ranks)
    ]


@settings(max_examples=60, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    owners=st.lists(st.integers(-1, 4), min_size=1, max_size=12),
)
def test_every_row_gets_its_own_adapters_update_and_rows_without_one_none(ranks, owners):
    names = [f"a{i}" for i in range(len(ranks))]
    whose = [f"a{i}" if 0 <= i < len(ranks) else None for i in owners]
    grid = stacked.grid_of(whose, names)
    most = max(whose.count(name) for name in names)
    assert (grid is None) == (len(names) * most > stacked.WASTE * len(owners))
    if grid is None:
        return
    found = adapters_of(ranks)
    x, y = torch.randn(len(owners), IN), torch.randn(len(owners), OUT)
    expected = y.double()
    for i, name in enumerate(whose):
        if name is not None:
            A, B, scaling, _ = found[names.index(name)]
            expected[i] += scaling * (B.double() @ (A.double() @ x[i].double()))
    stacked.add_stacked(y, x, stacked.stack_of(names, found), grid)
    assert relative_error(y, expected) <= 1e-6  # sums of 12 and 9 float32 numbers


def test_a_stack_larger_than_the_most_is_not_made(monkeypatch):
    monkeypatch.setattr(stacked, "MOST_NUMBERS", 3 * 8 * (IN + OUT))
    assert stacked.stack_of("abc", adapters_of([8, 1, 2])) is not None
    assert stacked.stack_of("abcd", adapters_of([8, 1, 2, 2])) is None


def mixed_model():
    model = tiny_model()
    for i, use_dora in enumerate([False, False, True]):
        config = LoraConfig(r=3 + 2 * i, target_modules="all-linear", use_dora=use_dora)
        add_lora(model, config, name=f"dora{i}" if use_dora else f"lora{i}")
    randomize(model)
    return model.eval()


@pytest.fixture
def used(monkeypatch):
    """How often stacks were made and used."""
    counts = {"stack_of": 0, "add_stacked": 0}
    for name in counts:
        original = getattr(stacked, name)

        def counted(*arguments, name=name, original=original):
            counts[name] += 1
            return original(*arguments)

        monkeypatch.setattr(f"minilora.mixed_layer.{name}", counted)
    return counts


@torch.no_grad()
def test_tokens_of_decoding_use_stacks_and_a_stack_outlives_the_choice(used):
    model = mixed_model()
    with adapters(model, ["lora0", "lora1"]) as mixture:
        mixed = model(ids(2, 1))
        made = used["stack_of"]
        assert made == used["add_stacked"] == 14  # of the linear layers of two layers
        mixture.choose(["lora1", "lora0"])
        model(ids(2, 1))
        assert used["stack_of"] == made and used["add_stacked"] == 2 * made
        model(ids(2, 3))  # a prompt is another matter
        assert used["add_stacked"] == 2 * made
    set_adapter(model, "lora0")
    assert relative_error(mixed[0], model(ids(2, 1)[:1])[0]) <= 1e-6


@torch.no_grad()
def test_an_adapter_that_is_written_to_is_stacked_again(used):
    model = mixed_model()
    with adapters(model, ["lora0", "lora1"]):
        model(ids(2, 1))
        for layer in model.modules():
            if isinstance(layer, Mixed):
                layer.base_layer.lora_B["lora0"].mul_(-3)
        mixed = model(ids(2, 1))
    set_adapter(model, "lora0")
    assert relative_error(mixed[0], model(ids(2, 1)[:1])[0]) <= 1e-6


def test_neither_training_nor_other_kinds_use_stacks(used):
    model = mixed_model()
    with torch.no_grad(), adapters(model, ["lora0", "dora2"]):
        model(ids(2, 1))
    with adapters(model, ["lora0", "lora1"]):
        model(ids(2, 1))
    assert used["add_stacked"] == 0
