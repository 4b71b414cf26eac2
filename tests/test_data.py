"""Reading rows, masks built from structure, collation, and the order of the data."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minilora import UserError
from minilora.data import Row, collate, read_rows, split, step_batches, steps_per_epoch, tokenize
from minilora.loss import IGNORE, count_supervised
from minilora.tokenizer import load_tokenizer


def write(path, *objects, indent=None):
    if path.suffix == ".json":
        path.write_text(json.dumps(list(objects), indent=indent))
    else:
        path.write_text("".join(json.dumps(entry) + "\n" for entry in objects))
    return path


@pytest.mark.parametrize("name", ["data.jsonl", "data.json"])
def test_prompt_and_completion_are_read_under_their_own_names_and_under_others(tmp_path, name):
    path = write(tmp_path / name, {"prompt": "a", "completion": "b"}, {"prompt": "", "completion": "c", "more": 1})
    assert read_rows(path) == [Row("a", "b"), Row("", "c")]
    path = write(tmp_path / name, {"question": "a", "answer": "b"})
    assert read_rows(path, "question", "answer") == [Row("a", "b")]


def test_alpaca_rows_get_alpacas_prompt_with_and_without_an_input(tmp_path):
    path = write(
        tmp_path / "data.json",
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Sing.", "input": "", "output": "la"},
        {"instruction": "Sing.", "output": "la"},
    )
    with_input, without, absent = read_rows(path)
    assert (
        with_input.prompt.endswith("### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n") and with_input.completion == "3"
    )
    assert without == absent and "### Input" not in without.prompt


def test_plain_text_comes_from_a_column_or_from_a_file_with_blank_lines(tmp_path):
    assert read_rows(write(tmp_path / "a.jsonl", {"text": "one\n\ntwo"})) == [Row(None, "one\n\ntwo")]
    (tmp_path / "a.txt").write_text("one\nstill one\n\n\n\ntwo\n")
    assert read_rows(tmp_path / "a.txt") == [Row(None, "one\nstill one"), Row(None, "two")]


def test_a_byte_order_mark_windows_line_ends_and_a_json_file_of_lines_are_read(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "a", "completion": "b"}\r\n\r\n{"prompt": "c", "completion": "d"}')
    assert read_rows(tmp_path / "a.jsonl") == [Row("a", "b"), Row("c", "d")]
    (tmp_path / "a.json").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": "d"}\n')
    assert read_rows(tmp_path / "a.json") == [Row("a", "b"), Row("c", "d")]


GOOD = '{"prompt": "a", "completion": "b"}\n'


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("a.jsonl", GOOD * 2 + "{oops\n", "a.jsonl, line 3: not valid JSON"),
        ("a.json", '[{"prompt": "a"},\n oops]', "a.json, line 2: not valid JSON"),
        ("a.jsonl", GOOD + "[1, 2]\n", "a.jsonl, line 2: expected an object with columns, found list"),
        ("a.jsonl", GOOD + '{"prompt": "a"}\n', "a.jsonl, line 2: the column completion is missing"),
        ("a.jsonl", GOOD + '{"prompt": "a", "completion": 3}\n', "line 2: the column completion holds 3, not text"),
        ("a.json", '[{"instruction": "a", "output": "b", "input": 5}]', "item 1: the column input holds 5"),
        (
            "a.jsonl",
            '{"question": "a", "answer": "b"}\n',
            "it has question, answer; say which with prompt_column and completion_column",
        ),
        ("a.jsonl", "\n\n", "is empty"),
        ("a.json", "[]", "is empty"),
        ("a.txt", " \n\n ", "is empty"),
        ("a.csv", "a,b", "ends in '.csv'; supported"),
    ],
)
def test_malformed_data_names_the_file_the_line_and_the_column(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as error:
        read_rows(tmp_path / name)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_data_that_is_missing_a_directory_or_not_text_is_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_rows(tmp_path / "nowhere.jsonl")
    with pytest.raises(UserError, match="is a directory"):
        read_rows(tmp_path)
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(UserError, match="not UTF-8 text: .* at byte 12"):
        read_rows(tmp_path / "a.jsonl")


@given(prompt=st.text(max_size=20), completion=st.text(max_size=20))
def test_exactly_the_completion_and_its_eos_are_supervised(model_dir, prompt, completion):
    tokenizer = load_tokenizer(model_dir)
    (example,) = tokenize([Row(prompt, completion)], tokenizer, cutoff_len=1000).examples
    input_ids, labels = collate([example], tokenizer.pad_id)
    learnt = labels[0][labels[0] != IGNORE].tolist()
    assert learnt == tokenizer.encode(completion, bos=False, eos=True) and learnt[-1] == tokenizer.eos_id
    assert input_ids[0].tolist() == tokenizer.encode(prompt) + learnt
    assert input_ids[0].tolist().count(tokenizer.bos_id) == 1
    assert count_supervised(labels) == example.supervised == len(learnt)


def test_plain_text_is_learnt_whole_and_the_prompt_too_where_asked(model_dir):
    tokenizer = load_tokenizer(model_dir)
    text, both = tokenize([Row(None, "the fox"), Row("the", "fox")], tokenizer, 100, train_on_prompt=True).examples
    for example in (text, both):
        _, labels = collate([example], tokenizer.pad_id)
        assert (labels[0, 1:] == torch.from_numpy(example.input_ids[1:]).long()).all() and labels[0, 0] == IGNORE


def test_padding_is_never_learnt_even_where_its_id_occurs_in_the_text(model_dir):
    tokenizer = load_tokenizer(model_dir)
    rows = [Row("a", "b"), Row("the old fox", "and a young owl live")]
    examples = tokenize(rows, tokenizer, 100).examples
    eos = int(examples[0].input_ids[-1])
    _, labels = collate(examples, pad_id=eos)  # the worst id that padding could have
    assert [count_supervised(labels[i : i + 1]) for i in range(2)] == [e.supervised for e in examples]
    assert labels[0, len(examples[0].input_ids) :].eq(IGNORE).all()


def test_long_examples_are_cut_and_counted_and_dropped_where_nothing_is_left(model_dir):
    tokenizer = load_tokenizer(model_dir)
    prompt_length = len(tokenizer.encode("the old fox"))
    rows = [Row("the old fox", "lives"), Row("the old fox", "and a young owl live by the river"), Row("the old fox " * 5, "x")]
    dataset = tokenize(rows, tokenizer, cutoff_len=prompt_length + 4)
    assert (len(dataset), dataset.truncated, dataset.dropped) == (2, 1, 1)
    assert dataset.examples[1].supervised == 4 and tokenizer.eos_id not in dataset.examples[1].input_ids
    assert dataset.rows == rows[:2]
    assert "cut at cutoff_len: 1 (33.3%), dropped with nothing left to learn: 1 (33.3%)" in dataset.summary()


sizes = st.integers(1, 40), st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**31)


@given(*sizes)
def test_every_epoch_is_a_permutation_cut_into_steps(count, batch_size, accumulation, seed):
    lengths = [i * 7 % 13 for i in range(count)]
    steps = steps_per_epoch(count, batch_size, accumulation)
    for epoch in range(2):
        batches = [b for s in range(steps) for b in step_batches(lengths, epoch * steps + s, batch_size, accumulation, seed)]
        assert sorted(i for batch in batches for i in batch) == list(range(count))
        assert all(1 <= len(batch) <= batch_size for batch in batches)


@given(*sizes)
def test_a_step_holds_the_same_examples_however_it_is_accumulated(count, batch_size, accumulation, seed):
    lengths = [i * 7 % 13 for i in range(count)]
    one = step_batches(lengths, 1, batch_size, accumulation, seed)
    other = step_batches(lengths, 1, batch_size * accumulation, 1, seed)
    assert [i for batch in one for i in batch] == [i for batch in other for i in batch]


def test_epochs_and_seeds_give_different_orders_and_a_step_never_depends_on_earlier_ones():
    lengths = [1] * 50
    orders = [tuple(step_batches(lengths, epoch, 50, 1, seed)[0]) for seed in (1, 2) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(50)) for order in orders)  # sorted by (length, index): all alike within a step
    steps = {(seed, step): step_batches(lengths, step, 5, 1, seed)[0] for seed in (1, 2) for step in (0, 10)}
    assert len({tuple(batch) for batch in steps.values()}) == 4
    assert step_batches(lengths, 10, 5, 1, 2)[0] == steps[2, 10]


@given(st.integers(2, 60), st.floats(0.05, 0.95), st.integers(0, 100))
def test_a_split_divides_the_rows_and_depends_only_on_the_seed(count, share, seed):
    rows = [Row("p", str(i)) for i in range(count)]
    expected = round(count * share)
    if not 0 < expected < count:
        with pytest.raises(UserError, match="val_size"):
            split(rows, share, seed)
        return
    train, held_out = split(rows, share, seed)
    assert len(held_out) == expected and sorted(train + held_out) == sorted(rows)
    assert split(rows, share, seed) == (train, held_out) == split(rows, float(expected) if expected > 0 else share, seed)
