"""Packed examples learn what they learn alone, and rows are filled as best fit decreasing fills them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora import LoraConfig, add_lora, load_model, load_tokenizer, trainable_parameters
from minilora.backend.documents import PADDING, positions_in_documents
from minilora.data.chat import load_chat_template
from minilora.data.examples import Dataset, Example, Order, collate, count_supervised, document_ids, tokenize
from minilora.data.packing import best_fit, pack
from minilora.data.rows import Row
from minilora.loss import IGNORE_INDEX, causal_lm_loss

lengths_strategy = st.lists(st.integers(1, 20), max_size=60)


@given(lengths=lengths_strategy, more=st.integers(0, 30), seed=st.integers(0, 2**31))
def test_every_example_lies_in_one_row_that_it_fits(lengths, more, seed):
    capacity = max(lengths, default=1) + more
    groups = best_fit(lengths, capacity, seed)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in group) <= capacity for group in groups)
    assert best_fit(lengths, capacity, seed) == groups


@given(lengths=lengths_strategy, more=st.integers(0, 30), seed=st.integers(0, 2**31))
def test_rows_are_those_of_a_search_through_all_rows_for_the_fullest_that_fits(lengths, more, seed):
    """And so their number depends on no seed. The fewest rows are at least the tokens divided by the
    capacity.
    """
    capacity = max(lengths, default=1) + more
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else capacity) - length)
    groups = best_fit(lengths, capacity, seed)
    assert sorted(capacity - sum(lengths[i] for i in group) for group in groups) == sorted(rooms)
    assert len(groups) <= 11 / 9 * len(rooms) + 1 and sum(lengths) <= capacity * len(groups)


def test_the_seed_chooses_who_meets_whom():
    lengths = [5] * 40 + [3] * 40
    assert best_fit(lengths, 11, seed=1) != best_fit(lengths, 11, seed=2)


def test_short_examples_fill_rows_nearly_whole():
    lengths = np.random.default_rng(0).geometric(1 / 100, size=2000).clip(1, 1024).tolist()
    groups = best_fit(lengths, 1024, seed=0)
    assert sum(lengths) / (1024 * len(groups)) > 0.99


def example(*ids: int, prompt: int = 1) -> Example:
    return Example(np.array(ids, dtype=np.int32), np.arange(len(ids)) >= prompt, (len(ids),))


def test_packed_rows_are_examples_one_after_the_other_and_their_first_tokens_are_no_labels():
    dataset = Dataset([], [example(1, 2, 3), example(4, 5, prompt=1), example(6, 7, 8, 9, prompt=2)])
    packed = pack(dataset, 6, seed=0)
    assert [e.document_lengths for e in packed.examples] == [(4, 2), (3,)]
    input_ids, labels = collate(packed.examples, pad_id=0)
    assert input_ids.tolist() == [[6, 7, 8, 9, 4, 5], [1, 2, 3, 0, 0, 0]]
    no = IGNORE_INDEX
    assert labels.tolist() == [[no, no, 8, 9, no, 5], [no, 2, 3, no, no, no]]
    ids = document_ids(packed.examples)
    assert ids.tolist() == [[0, 0, 0, 0, 1, 1], [0, 0, 0, PADDING, PADDING, PADDING]]
    assert positions_in_documents(ids).tolist() == [[0, 1, 2, 3, 0, 1], [0, 1, 2, 0, 1, 2]]
    assert document_ids(dataset.examples) is None
    assert count_supervised(labels) == sum(e.supervised for e in dataset.examples)
    assert packed.examples[0].supervised == 3


def test_an_example_longer_than_a_row_is_a_fault_of_the_caller():
    with pytest.raises(AssertionError):
        pack(Dataset([], [example(1, 2, 3)]), 2, seed=0)


@pytest.fixture(scope="module")
def lora_model(model_dir):
    """The tiny model in float32 with an adapter whose B is not zero, so that every gradient is alive."""
    torch.manual_seed(0)
    model = load_model(model_dir, dtype=torch.float32)
    add_lora(model, LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear"))
    for parameter in trainable_parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def loss_and_gradients(model, examples, batch_size: int) -> tuple[float, dict]:
    """Of a step over all examples: the sum of the losses, divided once by the supervised tokens."""
    model.zero_grad()
    total, supervised = 0.0, sum(e.supervised for e in examples)
    for start in range(0, len(examples), batch_size):
        batch = examples[start : start + batch_size]
        loss = causal_lm_loss(model, *collate(batch, pad_id=0), document_ids(batch)) / supervised
        loss.backward()
        total += loss.item()
    return total, {name: parameter.grad.clone() for name, parameter in trainable_parameters(model).items()}


@given(data=st.data(), capacity=st.integers(40, 90), batch_size=st.integers(1, 3), chat=st.booleans())
@settings(max_examples=20, deadline=None)
def test_packed_training_has_the_loss_and_gradients_of_unpacked(
    lora_model, model_dir, data, capacity, batch_size, chat
):
    """Within 1e-5: float32 sums of some 60 places and 128 features in another order, each rounded by 6e-8.

    Gradients relative to their tensor's, or to a hundredth of all where that is more: a query with one key to
    see has none at all.
    """
    tokenizer = load_tokenizer(model_dir)
    texts = st.text("the oldfx .é", max_size=12)
    turn = st.tuples(texts, texts)
    if chat:
        rows = [
            Row(
                "",
                "",
                tuple(
                    {"role": role, "content": text}
                    for q, a in turns
                    for role, text in (("user", q), ("assistant", a))
                ),
            )
            for turns in data.draw(st.lists(st.lists(turn, min_size=1, max_size=2), min_size=2, max_size=7))
        ]
    else:
        rows = [Row(*pair) for pair in data.draw(st.lists(turn, min_size=2, max_size=7))]
    dataset = tokenize(rows, tokenizer, 40, template=load_chat_template("llama2", tokenizer))
    if not dataset.examples:  # a system of long prompts, all cut before their answers
        return
    packed = pack(dataset, capacity, seed=0)
    loss, gradients = loss_and_gradients(lora_model, dataset.examples, batch_size=1)
    packed_loss, packed_gradients = loss_and_gradients(lora_model, packed.examples, batch_size)
    assert packed_loss == pytest.approx(loss, rel=1e-5)
    whole = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
    for name, gradient in gradients.items():
        assert (packed_gradients[name] - gradient).norm() <= 1e-5 * max(gradient.norm(), whole / 100), name


def test_without_document_ids_a_packed_row_learns_something_else(lora_model, model_dir):
    """So the test above would see contamination."""
    tokenizer = load_tokenizer(model_dir)
    dataset = tokenize([Row("the old", "fox"), Row("a young", "owl lives")], tokenizer, 40)
    batch = pack(dataset, 80, seed=0).examples
    apart, _ = loss_and_gradients(lora_model, dataset.examples, 1)
    together = causal_lm_loss(lora_model, *collate(batch, 0)).item() / sum(e.supervised for e in batch)
    assert len(batch) == 1 and abs(together - apart) > 1e-3 * apart


def test_a_packed_dataset_goes_through_the_same_order_and_says_so(model_dir):
    tokenizer = load_tokenizer(model_dir)
    rows = [Row("the", "fox " * (i % 5)) for i in range(20)]
    dataset = tokenize(rows, tokenizer, 40)
    packed = pack(dataset, 40, seed=0)
    assert f"20 examples, {sum(len(e.input_ids) for e in dataset.examples):,} tokens" in packed.summary()
    assert f"packed into {len(packed)} rows" in packed.summary() and "packed" not in dataset.summary()
    lengths = [len(e.input_ids) for e in packed.examples]
    first, second = (Order(lengths, 1, 1, seed=0).batches(epoch * len(packed)) for epoch in (0, 1))
    assert first != second
