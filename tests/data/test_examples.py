"""Loss masks, collation, and the order of the examples."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.pretended_gpu import PretendedGpu
from support.tiny import small_model

from minilora import UserError
from minilora.backend.choice import padded_length
from minilora.backend.documents import PADDING, positions_in_documents
from minilora.data.chat import load_chat_template
from minilora.data.examples import (
    Example,
    Order,
    batch_for,
    collate,
    count_supervised,
    document_ids,
    prompt_ids,
    split,
    tokenize,
)
from minilora.data.rows import Row
from minilora.data.tokenizer import load_tokenizer
from minilora.inference.evaluation import evaluate_loss
from minilora.lora import trainable_parameters
from minilora.loss import IGNORE_INDEX, causal_lm_loss


@given(prompt=st.text(max_size=20), completion=st.text(max_size=20))
def test_exactly_the_completion_and_its_eos_are_supervised(model_dir, prompt, completion):
    tokenizer = load_tokenizer(model_dir)
    (example,) = tokenize([Row(prompt, completion)], tokenizer, cutoff_len=1000).examples
    input_ids, labels = collate([example], tokenizer.pad_id)
    loss_mask = labels[0][labels[0] != IGNORE_INDEX].tolist()
    assert (
        loss_mask == tokenizer.encode(completion, bos=False, eos=True) and loss_mask[-1] == tokenizer.eos_id
    )
    assert input_ids[0].tolist() == tokenizer.encode(prompt) + loss_mask
    assert input_ids[0].tolist().count(tokenizer.bos_id) == 1
    assert count_supervised(labels) == example.supervised == len(loss_mask)


def test_all_plain_text_is_learned_and_the_prompt_too_if_requested(model_dir):
    tokenizer = load_tokenizer(model_dir)
    text, both = tokenize(
        [Row(None, "the fox"), Row("the", "fox")], tokenizer, 100, train_on_prompt=True
    ).examples
    for example in (text, both):
        _, labels = collate([example], tokenizer.pad_id)
        assert (labels[0, 1:] == torch.from_numpy(example.input_ids[1:]).long()).all() and labels[
            0, 0
        ] == IGNORE_INDEX


QUESTION, ANSWER = {"role": "user", "content": "the old fox"}, {"role": "assistant", "content": "lives here"}
CONVERSATION = Row("the old fox", "lives here", (QUESTION, ANSWER, QUESTION, ANSWER), "a.jsonl, line 7")


def test_the_template_decides_which_tokens_of_a_conversation_are_learned(model_dir):
    tokenizer = load_tokenizer(model_dir)
    template = load_chat_template("plain", tokenizer)
    answer = tokenizer.encode("the old foxlives here", bos=False, eos=True)[
        len(tokenizer.encode("the old fox", bos=False)) :
    ]
    for mask_history, count in ((False, 2), (True, 1)):
        (example,) = tokenize(
            [CONVERSATION], tokenizer, 100, template=template, mask_history=mask_history
        ).examples
        input_ids, labels = collate([example], tokenizer.pad_id)
        assert input_ids[0].tolist() == template.encode(CONVERSATION.messages)[0].tolist()
        assert labels[0][labels[0] != IGNORE_INDEX].tolist() == answer * count
    (example,) = tokenize([CONVERSATION], tokenizer, 100, train_on_prompt=True, template=template).examples
    assert example.supervised == len(example.input_ids) - 1
    assert document_ids(tokenize([CONVERSATION], tokenizer, 100, template=template).examples) is None


def test_an_example_begins_with_the_prompt_of_its_row(model_dir):
    tokenizer = load_tokenizer(model_dir)
    template = load_chat_template("llama2", tokenizer)
    for row in (Row("the old", "fox"), CONVERSATION):
        (example,) = tokenize([row], tokenizer, 100, template=template, mask_history=True).examples
        assert prompt_ids(row, tokenizer, template) == example.input_ids[: example.prompt_length].tolist()


def test_a_conversation_without_a_template_or_refused_by_one_is_reported_with_its_location(model_dir):
    tokenizer = load_tokenizer(model_dir)
    with pytest.raises(
        UserError,
        match="a.jsonl, line 7: the tokenizer has no chat template .*; choose one of alpaca, llama2",
    ):
        tokenize([CONVERSATION], tokenizer, 100)
    alone = Row("", "a", (ANSWER,), "a.jsonl, line 9")
    with pytest.raises(
        UserError, match="a.jsonl, line 9: the chat template llama2 says: roles must alternate"
    ):
        tokenize([CONVERSATION, alone], tokenizer, 100, template=load_chat_template("llama2", tokenizer))


def test_padding_is_never_learned_even_if_its_id_occurs_in_the_text(model_dir):
    tokenizer = load_tokenizer(model_dir)
    rows = [Row("a", "b"), Row("the old fox", "and a young owl live")]
    examples = tokenize(rows, tokenizer, 100).examples
    eos = int(examples[0].input_ids[-1])
    _, labels = collate(examples, pad_id=eos)  # the worst id for padding: it occurs in the text
    assert [count_supervised(labels[i : i + 1]) for i in range(2)] == [e.supervised for e in examples]
    assert labels[0, len(examples[0].input_ids) :].eq(IGNORE_INDEX).all()


def test_long_examples_are_cut_and_counted_and_dropped_if_nothing_is_left(model_dir):
    tokenizer = load_tokenizer(model_dir)
    prompt_length = len(tokenizer.encode("the old fox"))
    rows = [
        Row("the old fox", "lives"),
        Row("the old fox", "and a young owl live by the river"),
        Row("the old fox " * 5, "x"),
    ]
    dataset = tokenize(rows, tokenizer, cutoff_len=prompt_length + 4)
    assert (len(dataset), dataset.truncated, dataset.dropped) == (2, 1, 1)
    assert dataset.examples[1].supervised == 4 and tokenizer.eos_id not in dataset.examples[1].input_ids
    assert dataset.rows == rows[:2]
    assert (
        "cut at cutoff_len: 1 (33.3%), 12 tokens lost; dropped with nothing left to learn: 1 (33.3%)"
        in dataset.summary()
    )


def test_every_token_of_a_long_text_is_learned_exactly_once(model_dir):
    tokenizer = load_tokenizer(model_dir)
    row, short = Row(None, "the old fox lives by the river " * 40), Row(None, "owl")
    ids = tokenizer.encode(row.completion, eos=True)
    for cutoff_len in (2, 3, 16, 17, len(ids) - 1, len(ids), len(ids) + 1):
        dataset = tokenize([row, short, row], tokenizer, cutoff_len)
        assert dataset.rows == [row, short, row] and dataset.dropped == dataset.lost_tokens == 0
        first = [e for e, i in zip(dataset.examples, dataset.row_indices, strict=True) if i == 0]
        assert all(2 <= len(e.input_ids) <= cutoff_len for e in first)
        learned = np.concatenate([e.input_ids[e.loss_mask] for e in first])
        assert learned.tolist() == ids[1:]  # all but BOS, which no token predicts
        assert [*dataset.row_indices] == sorted(dataset.row_indices) and {*dataset.row_indices} == {0, 1, 2}
    assert "split into" not in dataset.summary()
    assert "3 examples" in (text := tokenize([row, short, row], tokenizer, 17).summary())
    assert f"split into {2 * -(-(len(ids) - 1) // 16) + 1} pieces" in text


def test_an_answer_with_train_false_is_read_and_not_learned(model_dir):
    tokenizer = load_tokenizer(model_dir)
    template = load_chat_template("plain", tokenizer)
    silent = Row("q", "a", (QUESTION, ANSWER | {"train": False}, QUESTION, ANSWER))
    (every,), (one,) = (
        tokenize([row], tokenizer, 100, template=template).examples for row in (CONVERSATION, silent)
    )
    (last,) = tokenize([CONVERSATION], tokenizer, 100, template=template, mask_history=True).examples
    assert one.input_ids.tolist() == every.input_ids.tolist()
    assert one.loss_mask.tolist() == last.loss_mask.tolist() != every.loss_mask.tolist()
    other = Row("q", "a", (QUESTION, ANSWER, QUESTION, ANSWER | {"train": False}))
    (first,) = tokenize([other], tokenizer, 100, template=template).examples
    assert (first.loss_mask ^ last.loss_mask).tolist() == every.loss_mask.tolist()
    dataset = tokenize([other], tokenizer, 100, template=template, mask_history=True)
    assert (len(dataset), dataset.dropped) == (0, 1)


def test_a_template_words_prompts_and_instructions_as_it_words_conversations(model_dir):
    tokenizer = load_tokenizer(model_dir)
    template = load_chat_template("llama2", tokenizer)
    pair, chat = Row("the old fox", "lives here"), Row("", "", (QUESTION, ANSWER))
    one, two = (tokenize([row], tokenizer, 100, template=template).examples[0] for row in (pair, chat))
    assert one.input_ids.tolist() == two.input_ids.tolist() and one.supervised == two.supervised > 0
    assert prompt_ids(pair, tokenizer, template) == prompt_ids(chat, tokenizer, template)


orders = st.builds(
    lambda count, *settings: Order([i * 7 % 13 for i in range(count)], *settings),
    st.integers(1, 40),
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(0, 2**31),
    st.booleans(),
)


@given(orders)
def test_every_epoch_is_a_permutation_cut_into_steps(order):
    steps = order.steps_per_epoch
    for epoch in range(2):
        batches = [b for step in range(epoch * steps, (epoch + 1) * steps) for b in order.batches(step)]
        assert sorted(i for batch in batches for i in batch) == list(range(len(order.lengths)))
        assert all(1 <= len(batch) <= order.batch_size for batch in batches)


@given(orders)
def test_a_step_holds_the_same_examples_however_it_is_accumulated(order):
    whole = replace(order, batch_size=order.examples_per_step, accumulation=1)
    one, other = order.batches(1), whole.batches(1)
    assert [i for batch in one for i in batch] == [i for batch in other for i in batch]


def test_epochs_and_seeds_give_different_orders_and_a_step_never_depends_on_earlier_ones():
    lengths = [1] * 50  # Within a step, examples are sorted by (length, index).
    epochs = [Order(lengths, 50, 1, seed).batches(epoch)[0] for seed in (1, 2) for epoch in (0, 1)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    steps = {(seed, step): Order(lengths, 5, 1, seed).batches(step)[0] for seed in (1, 2) for step in (0, 10)}
    assert len({tuple(batch) for batch in steps.values()}) == 4
    assert Order(lengths, 5, 1, 2).batches(10)[0] == steps[2, 10]


def test_batches_grouped_by_length_hold_less_padding_and_come_in_no_order_of_length():
    plain = Order([1 + i * 37 % 101 for i in range(400)], 4, 2, seed=1)
    grouped = replace(plain, group_by_length=True)
    # 50 steps hold every length several times; one step holds 8 neighbours of them.
    assert grouped.padding_share(padding_free=False) < 0.05 < plain.padding_share(padding_free=False)
    assert grouped.padding_share() == plain.padding_share() == 0
    longest = [max(plain.lengths[i] for batch in grouped.batches(n) for i in batch) for n in range(50)]
    assert sorted(longest) != longest and sorted(longest, reverse=True) != longest
    assert grouped.batches(3) != grouped.batches(53)  # Another epoch, another order.


@given(orders, st.booleans(), st.booleans())
@settings(max_examples=40, deadline=None)
def test_the_share_of_padding_equals_that_of_the_tensors(order, rounded, padding_free):
    order = replace(order, lengths=[1 + length for length in order.lengths])
    examples = [example(length) for length in order.lengths]
    batches = [batch for step in range(order.steps_per_epoch) for batch in order.batches(step)]
    numbers = sum(
        batch_for(CPU, [examples[i] for i in batch], 0, rounded, padding_free)[0].numel() for batch in batches
    )
    share = order.padding_share(rounded, padding_free)
    assert share == pytest.approx(1 - sum(order.lengths) / numbers)
    assert rounded or not padding_free or share == 0


@given(orders)
def test_no_micro_batch_has_more_tokens_than_the_largest(order):
    largest = order.largest_batch()
    totals = [
        sum(order.lengths[i] for i in batch)
        for step in range(2 * order.steps_per_epoch)
        for batch in order.batches(step)
    ]
    assert max(totals) <= sum(largest) and len(largest) <= order.batch_size
    assert replace(order, batch_size=len(order.lengths)).largest_batch() == sorted(order.lengths)


# ---- micro-batches without padding -------------------------------------------------------------------------

CPU = torch.device("cpu")


def example(*lengths: int, seed: int = 0) -> Example:
    """So many tokens, none like another's neighbour, in documents of these lengths with a prompt of one or two."""
    learned = [np.arange(length) > length % 2 for length in lengths]
    ids = np.arange(sum(lengths), dtype=np.int32) + 1000 * seed
    return Example(ids, np.concatenate(learned), lengths)


some_examples = st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=4), min_size=1, max_size=6).map(
    lambda rows: [example(*lengths, seed=i) for i, lengths in enumerate(rows)]
)


@given(some_examples, st.booleans())
@settings(max_examples=50, deadline=None)
def test_end_to_end_every_token_comes_once_in_its_order_and_padding_is_behind_all(examples, rounded):
    input_ids, labels, documents = batch_for(CPU, examples, 9, rounded)
    N = sum(len(e.input_ids) for e in examples)
    assert input_ids.shape == labels.shape and len(input_ids) == 1
    assert input_ids.shape[1] == (padded_length(N) if rounded else N)
    assert input_ids[0, :N].tolist() == [token for e in examples for token in e.input_ids]
    learned = np.concatenate([np.where(e.loss_mask, e.input_ids, IGNORE_INDEX) for e in examples])
    assert labels[0, :N].tolist() == learned.tolist()
    assert input_ids[0, N:].eq(9).all() and labels[0, N:].eq(IGNORE_INDEX).all()
    assert count_supervised(labels) == sum(e.supervised for e in examples)
    lengths = [length for e in examples for length in e.document_lengths]
    if len(lengths) == 1:
        assert documents is None  # plain causality: what is behind, no token sees
        return
    assert documents.shape == labels.shape and documents[0, N:].eq(PADDING).all()
    assert documents[0, :N].tolist() == [i for i, length in enumerate(lengths) for _ in range(length)]
    positions = positions_in_documents(documents)[0, :N].tolist()
    assert positions == [place for length in lengths for place in range(length)]
    assert all(labels[0, i] == IGNORE_INDEX for i in range(N) if positions[i] == 0)


@given(some_examples)
@settings(max_examples=20, deadline=None)
def test_with_padding_each_example_has_a_row_as_before(examples):
    input_ids, labels, documents = batch_for(CPU, examples, 9, padding_free=False)
    expected, expected_labels = collate(examples, 9)
    assert torch.equal(input_ids, expected) and torch.equal(labels, expected_labels)
    assert len(input_ids) == len(examples)
    ids = document_ids(examples)
    assert documents is ids is None or torch.equal(documents, ids)


def losses_and_gradients(model, examples, order, **layout):
    """Of one step: the loss of each micro-batch, and the gradients."""
    model.zero_grad(set_to_none=True)
    losses = []
    for batch in order.batches(0):
        loss = causal_lm_loss(model, *batch_for(CPU, [examples[i] for i in batch], 0, **layout))
        loss.backward()
        losses.append(loss.item())
    return losses, {name: p.grad for name, p in trainable_parameters(model).items()}


@given(data=st.data(), rounded=st.booleans())
@settings(max_examples=15, deadline=None)
def test_training_end_to_end_has_the_losses_and_gradients_of_training_with_padding(data, rounded):
    """Within 1e-5: float32 sums of some 100 places and 64 features in another order, each rounded by 6e-8.

    Gradients relative to their tensor's, or to a hundredth of all where that is more: a query with one key to
    see has none at all.
    """
    model = small_model(layers=2, dropout=0.0)
    rows = data.draw(st.lists(st.lists(st.integers(2, 20), min_size=1, max_size=3), min_size=2, max_size=6))
    examples = [example(*lengths) for lengths in rows]
    examples = [e._replace(input_ids=(e.input_ids * 7 + i) % 97) for i, e in enumerate(examples)]
    order = Order([len(e.input_ids) for e in examples], 3, 2, seed=0)
    losses, gradients = losses_and_gradients(model, examples, order, padding_free=False)
    found, found_gradients = losses_and_gradients(model, examples, order, rounded=rounded)
    assert found == pytest.approx(losses, rel=1e-5)
    whole = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
    for name, gradient in gradients.items():
        assert (found_gradients[name] - gradient).norm() <= 1e-5 * max(gradient.norm(), whole / 100), name


def test_held_out_examples_end_to_end_have_the_loss_that_they_have_with_padding():
    model = small_model(layers=2)
    examples = [example(length) for length in (3, 9, 9, 17, 4)]
    examples = [e._replace(input_ids=e.input_ids % 97) for e in examples]
    losses = [
        evaluate_loss(model, examples, size, padding_free=free) for size in (1, 3) for free in (True, False)
    ]
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-5)  # as above


@given(st.integers(2, 60), st.floats(0.05, 0.95), st.integers(0, 100))
def test_a_split_divides_the_rows_and_depends_only_on_the_seed(count, share, seed):
    rows = [Row("p", str(i)) for i in range(count)]
    expected = round(count * share)
    if not 0 < expected < count:
        with pytest.raises(UserError, match="val_size"):
            split(rows, share, seed)
        return
    train, held_out = split(rows, share, seed)
    assert len(held_out) == expected and sorted(map(str, train + held_out)) == sorted(map(str, rows))
    assert (
        split(rows, share, seed)
        == (train, held_out)
        == split(rows, float(expected) if expected > 0 else share, seed)
    )


@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_a_batch_for_the_gpu_is_that_of_the_cpu_with_all_but_its_ids_left_there_and_nothing_waits(
    packed, padding_free
):
    lengths = [(3, 4), (5,)] if packed else [(7,), (5,)]
    examples = [Example(np.arange(sum(n), dtype=np.int32), np.arange(sum(n)) > 1, n) for n in lengths]
    with PretendedGpu() as gpu:
        ids, labels, documents = batch_for(torch.device("cuda", 0), examples, 0, padding_free=padding_free)
        assert ids.is_cuda and not labels.is_cuda
        assert not documents.is_cuda if packed or padding_free else documents is None
        assert not gpu.waits and not gpu.faults
    on_cpu = batch_for(CPU, examples, 0, padding_free=padding_free)
    for found, expected in zip((ids, labels, documents), on_cpu, strict=True):
        assert found is expected is None or torch.equal(found, expected)
