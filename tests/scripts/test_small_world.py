"""What the studies of scripts/experiments.py share: data, training, the search for a rate, the cut of an update."""

import math
from itertools import islice

import pytest
import torch
from studies import small_world
from studies.singular_values import keep_largest, updates
from studies.small_world import (
    batches,
    figure_of,
    held_out_loss,
    linear_layers,
    load,
    load_to_train_all,
    rate_search,
    texts,
    tokenizer,
    train,
    within,
)
from world import documents, people

from minilora.config import LoraConfig
from minilora.lora import trainable_parameters


def test_an_epoch_asks_every_question_once_and_each_seed_has_another_order():
    epoch = 3000 // 16  # whole steps; the 8 questions that are left have no step in this epoch
    first = [id(example) for step in batches(seed=0, steps=epoch) for example in step]
    both = [id(example) for step in batches(seed=0, steps=2 * epoch) for example in step]
    other = [id(example) for step in batches(seed=1, steps=epoch) for example in step]
    assert len(first) == len(set(first)) == len(set(both[len(first) :])) == 16 * epoch
    assert both[: len(first)] == first and both[len(first) :] != first != other


def test_the_texts_of_the_perplexity_are_not_among_those_of_pretraining():
    read = set(islice(documents(people(), seed=0), 60_000))  # of some 120 tokens; it read 7.4 million
    assert sum(len(tokenizer().encode(text)) for text in islice(read, 300)) / 300 * len(read) > 7.4e6 / 2
    unread = list(islice(documents(people(), seed=1), 200))
    assert not read & set(unread)
    for example, text in zip(texts(200), unread, strict=True):
        assert tokenizer().decode(example.input_ids.tolist()) == text or len(example.input_ids) == 128
        assert example.supervised == len(example.input_ids) - 1  # nothing predicts the first token


def test_training_all_of_a_kind_trains_the_28_linear_layers_or_every_weight():
    linear, everything = load_to_train_all("_proj.weight"), load_to_train_all()
    assert len(trainable_parameters(linear)) == 28 == len(linear_layers(linear))
    assert all(p.requires_grad for p in everything.parameters()) and not trainable_parameters(load())


def test_training_lowers_the_held_out_loss_and_tells_each_step():
    model, steps = load(LoraConfig(r=2, lora_alpha=4)), []
    before = held_out_loss(model, 32)
    train(model, 4e-3, 6, after=steps.append)
    assert held_out_loss(model, 32) < before and steps == [1, 2, 3, 4, 5, 6]


def test_training_stops_where_the_loss_is_not_finite():
    model, steps = load(LoraConfig(r=2, lora_alpha=4)), []
    next(iter(trainable_parameters(model).values())).data.fill_(math.inf)
    train(model, 1e-3, 3, after=steps.append)
    assert steps == [] and held_out_loss(model, 8) is None


def test_a_rate_is_chosen_by_seed_0_and_judged_by_the_others(monkeypatch):
    losses = {(0.1, 0): 3.0, (0.2, 0): 1.0, (0.4, 0): None, (0.2, 1): 1.5, (0.2, 2): 1.25}
    asked = []

    def pretend_to_train(model, rate, steps, seed):
        asked.append((rate, seed))

    monkeypatch.setattr(small_world, "train", pretend_to_train)
    model = torch.nn.Linear(3, 4)
    found = rate_search("x", lambda seed: model, (0.1, 0.2, 0.4), 1, (1, 2), lambda model: losses[asked[-1]])
    assert found == dict(
        parameters=16, rates=[0.1, 0.2, 0.4], losses=[3.0, 1.0, None], best_rate=0.2, seed_losses=[1.5, 1.25]
    )


def test_an_update_cut_to_rank_2_is_its_two_largest_terms():
    model, generator = load(), torch.Generator().manual_seed(0)
    before = {name: layer.weight.clone() for name, layer in linear_layers(model).items()}
    two_terms = {}
    for name, layer in linear_layers(model).items():
        out, width = layer.weight.shape
        U, _ = torch.linalg.qr(torch.randn(out, 3, generator=generator))
        V, _ = torch.linalg.qr(torch.randn(width, 3, generator=generator))
        two_terms[name] = (U * torch.tensor([3.0, 2.0, 0.0])) @ V.T
        layer.weight.data += (U * torch.tensor([3.0, 2.0, 1.0])) @ V.T
    parts = updates(model)
    assert keep_largest(model, parts, 2) == pytest.approx((9 + 4) / (9 + 4 + 1), abs=1e-4)  # four digits
    for name, layer in linear_layers(model).items():
        assert parts[name][1][:3].tolist() == pytest.approx([3, 2, 1], rel=1e-4)
        # float32: numbers of about 1, and a product of two matrices
        assert torch.allclose(layer.weight, before[name] + two_terms[name], atol=1e-5)


def test_a_figure_has_four_digits_and_a_number_that_is_not_finite_has_none():
    assert (figure_of(0.123456), figure_of(123456.0)) == (0.1235, 123500.0)
    assert figure_of(math.nan) is None and figure_of(math.inf) is None
    assert within([0.1, 0.2, 0.6]) == "0.300 ± 0.250"
