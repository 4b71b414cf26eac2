"""scripts/prepare.py: every row is checked, saved rows train as the original ones, and a failure writes nothing."""

import errno
import json
import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.project import adapter, metrics

from minilora import load_tokenizer
from minilora.data.chat import load_chat_template
from minilora.data.examples import tokenize
from minilora.data.mask_view import highlight_learned, readable
from minilora.data.prepared import load_tokens, save_tokens, tokens_file, tokens_key
from minilora.data.rows import Row, read_rows, to_record

SETTINGS = dict(cutoff_len=64, train_on_prompt=False, mask_history=False)


@pytest.fixture
def prepare(call, monkeypatch, model_dir, tmp_path):
    """Run `prepare.py ARGUMENTS` on the tiny model, in tmp_path: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    return partial(call, "prepare", "--model", model_dir)


@pytest.fixture
def write(tmp_path):
    """Write rows as JSONL; a row may be any text."""

    def lines(*rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text(
            "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows),
            encoding="utf-8",
        )
        return path

    return lines


# ---- rows ------------------------------------------------------------------------------------------------------------------

texts = st.text(st.characters(codec="utf-8"), max_size=12)
ROLES = ("user", "assistant")
turns = st.lists(st.tuples(texts, texts), min_size=1, max_size=3)
chats = turns.map(
    lambda turns: [{"role": role, "content": turn[i]} for turn in turns for i, role in enumerate(ROLES)]
)
records = st.one_of(
    st.fixed_dictionaries({"prompt": texts, "completion": texts}),
    st.fixed_dictionaries({"instruction": texts, "output": texts}, optional={"input": texts}),
    st.fixed_dictionaries({"messages": chats}),
    st.fixed_dictionaries({"text": texts}),
)


@given(record=records)
def test_a_row_that_is_saved_is_read_back_as_the_same_row(tmp_path_factory, record):
    path = tmp_path_factory.mktemp("rows") / "a.jsonl"
    path.write_text(json.dumps(record))
    rows = read_rows(path)
    path.write_text(json.dumps(to_record(rows[0])))
    assert read_rows(path) == rows


# ---- tokens ----------------------------------------------------------------------------------------------------------------

ROWS = [Row("say:", "the old fox"), Row(None, "a young owl " * 20), Row("say this: ", "")]
CHATS = [
    Row("hi", "the owl", ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "the owl"}))
]


def equal(one, other) -> bool:
    alike = (len(one), one.truncated, one.uncut_lengths) == (len(other), other.truncated, other.uncut_lengths)
    return alike and all(
        np.array_equal(a.input_ids, b.input_ids) and np.array_equal(a.loss_mask, b.loss_mask) and a[2] == b[2]
        for a, b in zip(one.examples, other.examples, strict=True)
    )


@given(parts=st.lists(st.tuples(texts, texts), min_size=1, max_size=5), cutoff_len=st.integers(2, 9))
def test_loaded_tokens_are_those_that_were_saved(model_dir, tmp_path_factory, parts, cutoff_len):
    tokenizer = load_tokenizer(model_dir)
    dataset = tokenize([Row(*part) for part in parts], tokenizer, cutoff_len)
    if dataset.examples:
        path = tmp_path_factory.mktemp("tokens") / "a.safetensors"
        save_tokens(path, dataset, "key")
        assert equal(load_tokens(path, dataset.rows, "key"), dataset)
        assert load_tokens(path, dataset.rows, "another key") is None


def test_the_key_changes_with_everything_that_changes_tokens(model_dir, tmp_path):
    tokenizer = load_tokenizer(model_dir)
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    other, chatml = load_tokenizer(tmp_path), load_chat_template("plain", tokenizer)
    alpaca = load_chat_template("alpaca", tokenizer)
    keys = [
        tokens_key(ROWS, tokenizer, None, SETTINGS),
        tokens_key(ROWS[::-1], tokenizer, None, SETTINGS),
        tokens_key(ROWS[:2], tokenizer, None, SETTINGS),
        tokens_key([replace(ROWS[0], completion="the old fix"), *ROWS[1:]], tokenizer, None, SETTINGS),
        tokens_key([Row("say", ":the old fox"), *ROWS[1:]], tokenizer, None, SETTINGS),
        tokens_key(ROWS, other, None, SETTINGS),
        tokens_key(CHATS, tokenizer, chatml, SETTINGS),
        tokens_key(CHATS, tokenizer, alpaca, SETTINGS),
        *(
            tokens_key(ROWS, tokenizer, None, SETTINGS | change)
            for change in (dict(cutoff_len=65), dict(mask_history=True))
        ),
    ]
    assert len(set(keys)) == len(keys)
    assert keys[0] == tokens_key(
        [replace(row, location="elsewhere") for row in ROWS], load_tokenizer(model_dir), None, SETTINGS
    )


def test_a_file_that_holds_other_data_is_ignored(tmp_path):
    path = tokens_file(tmp_path / "train.jsonl")
    assert path == tmp_path / "train.safetensors" and load_tokens(path, ROWS, "key") is None
    path.write_bytes(b"something else")
    assert load_tokens(path, ROWS, "key") is None


# ---- the mask, shown -------------------------------------------------------------------------------------------------------


@given(row=st.tuples(st.none() | texts, texts))
def test_the_text_between_the_brackets_is_the_learned_text(model_dir, row):
    tokenizer = load_tokenizer(model_dir)
    for example in tokenize([Row(*row)], tokenizer, 64).examples:
        shown = highlight_learned(example, tokenizer, colours=False)
        inside = "".join(part.partition("⟧")[0] for part in shown.split("⟦")[1:])
        if not {"⟦", "⟧"} & set("".join(filter(None, row))):
            assert inside.count("</s>") == (example.input_ids[-1] == tokenizer.eos_id) + row[1].count("</s>")
        assert not set(shown) & {chr(i) for i in (*range(10), *range(11, 32), 127)} - {"\t"}, (
            "control characters are written out"
        )


def test_an_example_is_shown_with_its_special_tokens_and_its_line_ends(model_dir):
    tokenizer = load_tokenizer(model_dir)
    example = tokenize([Row("the old\nfox", " the\n owl")], tokenizer, 64).examples[0]
    assert highlight_learned(example, tokenizer, colours=False) == "<s>the old↵\nfox⟦  the↵\n owl</s>⟧"
    coloured = highlight_learned(example, tokenizer, colours=True)
    assert coloured == "\x1b[7m<s>\x1b[27mthe old↵\nfox\x1b[32m  the↵\n owl\x1b[7m</s>\x1b[27m\x1b[39m"


def test_a_cut_example_ends_where_it_was_cut_with_the_number_of_lost_tokens(model_dir):
    tokenizer = load_tokenizer(model_dir)
    (example,) = tokenize([Row("the old", " fox")], tokenizer, 64).examples
    cut = example._replace(input_ids=example.input_ids[:-1], loss_mask=example.loss_mask[:-1])
    assert highlight_learned(cut, tokenizer, colours=False, lost=1) == "<s>the old⟦  fox⟧ ✂ 1 token cut off"
    assert highlight_learned(cut, tokenizer, colours=True, lost=1200).endswith(
        " \x1b[7m✂ 1,200 tokens cut off\x1b[27m"
    )


def test_the_text_of_ids_is_readable_with_its_special_tokens_and_without_marks(model_dir):
    tokenizer = load_tokenizer(model_dir)
    ids = [*tokenizer.encode("the old\nfox"), tokenizer.eos_id]
    assert readable(ids, tokenizer) == "<s>the old\nfox</s>"


# ---- the script ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [None, "alpaca"])
def test_a_training_on_prepared_data_ends_with_the_bits_of_one_on_the_original(
    prepare, run_trainer, write, model_dir, template
):
    rows = [
        {"instruction": f"say {i}", "input": "it" * (i % 2), "output": "the old fox " * (1 + i % 5)}
        for i in range(24)
    ]
    keys = ("--dataset", write(*rows), "--val_size", 4, "--cutoff_len", 200, "--seed", 3)
    keys += ("--learning_rate", 1e-2, "--max_steps", 4, "--lora_dropout", 0.1)
    keys += ("--template", template) if template else ()
    code, out, err = prepare(*keys)
    assert code == 0, err
    assert "rows                                      20             4" in out
    assert run_trainer("--model", model_dir, *keys, "--output_dir", "alone")[0] == 0
    code, out, err = run_trainer("--config", "prepared/train.yaml", "--output_dir", "ready")
    assert code == 0, err
    assert (
        "tokens     lie ready in prepared/train.safetensors" in out
        and "ready in prepared/validation.safetensors" in out
    )
    one, other = adapter(tmp := write().parent / "alone"), adapter(tmp.with_name("ready"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    losses = [
        [r["eval_loss"] for r in metrics(tmp.with_name(name)) if "eval_loss" in r]
        for name in ("alone", "ready")
    ]
    assert losses[0] == losses[1] and losses[0]


def test_tokens_of_other_settings_are_encoded_again(prepare, run_trainer, dataset):
    assert prepare("--dataset", dataset)[0] == 0
    code, out, err = run_trainer(
        "--config", "prepared/train.yaml", "--max_steps", 1, "--cutoff_len", 40, "--output_dir", "out"
    )
    assert code == 0, err
    assert (
        "tokens     of prepared/train.safetensors are of other rows or settings" in out
        and "cut at cutoff_len" in out
    )


def test_the_figures_are_those_of_the_rows(prepare, write, model_dir):
    words = [
        "the old fox",
        "the old fox",
        "a young owl live by the river in a small blue house",
        " ",
        "the mill",
    ]
    rows = [{"prompt": f"say {i % 4}:", "completion": text} for i, text in enumerate(words)] + [
        {"prompt": "x" * 99, "completion": "y"}
    ]
    rows[1] = rows[0]
    held_out = write(rows[0], {"prompt": "new", "completion": "one"}, name="held_out.jsonl")
    code, out, err = prepare("--dataset", write(*rows), "--eval_dataset", held_out, "--cutoff_len", 20)
    assert code == 0, err
    found = json.loads((held_out.parent / "prepared" / "statistics.json").read_text())
    whole = tokenize([Row(**row) for row in rows[:5]], load_tokenizer(model_dir), 10**6).examples
    lengths = sorted(len(example.input_ids) for example in whole)
    cut = [min(length, 20) for length in lengths]
    assert found["train"] == {
        "rows": 5, "examples": 5, "tokens": sum(cut), "supervised_tokens": sum(e.supervised for e in whole) - sum(lengths) + sum(cut),
        "median_length": lengths[2], "p95_length": lengths[-1], "longest": lengths[-1],
        "longer_than_cutoff": sum(length > 20 for length in lengths), "dropped": 1, "empty_answers": 1, "repeated": 1,
        "lost_tokens": sum(lengths) - sum(cut), "lost_thoughts": 0,
    }  # fmt: skip
    assert found["validation"]["also_in_training"] == 1 and found["validation"]["rows"] == 2
    assert (held_out.parent / "prepared" / "lengths.png").read_bytes().startswith(b"\x89PNG")


def test_show_says_of_each_row_whether_and_where_cutoff_len_cut_it(prepare, write, model_dir):
    rows = [{"prompt": "the old", "completion": text} for text in ("fox", "fox and a young owl")]
    tokenizer = load_tokenizer(model_dir)
    short, long = tokenize([Row(*row.values()) for row in rows], tokenizer, 64).uncut_lengths
    assert short < long
    code, out, err = prepare("--dataset", write(*rows), "--show", 2, "--cutoff_len", short)
    assert code == 0, err
    first, second, *_ = re.findall(r"--- .*\n.*", out)
    assert f"{short} tokens" in first and "cut" not in first and "✂" not in first
    assert f"; cut at cutoff_len, from {long}\n" in second
    assert second.endswith(f" ✂ {long - short} tokens cut off")


def test_examples_are_shown_from_all_over_the_set(prepare, dataset, examples):
    code, out, _ = prepare("--dataset", dataset, "--show", 3)
    shown = [line for line in out.splitlines() if line.startswith("--- ")]
    assert code == 0 and [line.split(":")[0] for line in shown] == [
        f"--- {dataset}, line {i}" for i in (1, 9, 17)
    ]
    assert f"<s>{examples[8]['prompt']}⟦ {examples[8]['completion']}</s>⟧" in out


def test_every_wrong_row_is_listed_and_nothing_is_saved(prepare, write, tmp_path):
    good = {"prompt": "a", "completion": "b"}
    path = write(good, "{oops", good, {"prompt": 3, "completion": "b"}, "[1]", {"prompt": "a"}, good)
    code, out, err = prepare("--dataset", path)
    *listed, last = err.splitlines()
    assert (
        code == 2
        and out == ""
        and [line.split(":")[0] for line in listed] == [f"{path}, line {i}" for i in (2, 4, 5, 6)]
    )
    assert last == f"error: 4 rows are wrong in {path}; correct them, or skip them with --skip_invalid"
    assert not (tmp_path / "prepared").exists()
    code, out, err = prepare("--dataset", path, "--skip_invalid")
    assert code == 0 and f"skipped    4 wrong rows; the first: {path}, line 2" in out
    assert len((tmp_path / "prepared" / "train.jsonl").read_text().splitlines()) == 3


def test_a_row_with_half_a_character_is_saved_as_it_was(prepare, write, tmp_path):
    rows = [{"prompt": "é \U0001f600", "completion": "\ud800 \U0001f600"}, {"prompt": "ü", "completion": "b"}]
    path = write(*rows)
    assert prepare("--dataset", path)[0] == 0
    saved = tmp_path / "prepared" / "train.jsonl"
    assert read_rows(saved) == read_rows(path) and '"ü"' in saved.read_text(encoding="utf-8")


def test_validation_files_of_an_earlier_preparation_are_removed(prepare, dataset, tmp_path):
    assert prepare("--dataset", dataset, "--val_size", 4)[0] == 0
    assert (tmp_path / "prepared" / "validation.safetensors").exists()
    assert prepare("--dataset", dataset, "--overwrite_output_dir")[0] == 0
    assert not list((tmp_path / "prepared").glob("validation.*"))


def test_held_out_rows_that_are_all_wrong_leave_a_set_without_them(prepare, write, tmp_path):
    wrong = write({"prompt": 3, "completion": "b"}, name="held_out.jsonl")
    code, out, err = prepare(
        "--dataset", write({"prompt": "a", "completion": "b"}), "--eval_dataset", wrong, "--skip_invalid"
    )
    assert code == 0, err
    assert "skipped    1 wrong row; the first: " in out and not list(
        (tmp_path / "prepared").glob("validation.*")
    )
    assert "eval_dataset" not in (tmp_path / "prepared" / "train.yaml").read_text()


def test_of_many_wrong_rows_the_first_ones_are_listed(prepare, write):
    code, _, err = prepare("--dataset", write({"prompt": "a", "completion": "b"}, *["{"] * 99))
    *listed, last = err.splitlines()
    assert code == 2 and len(listed) == 20 and ", line 2: " in listed[0] and ", line 21: " in listed[-1]
    assert "99 rows are wrong" in last and "20 of them listed above" in last


def test_rows_that_no_template_can_word_are_wrong_rows(prepare, write):
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    code, _, err = prepare("--dataset", write(chat, chat))
    assert code == 2 and err.count("the tokenizer has no chat template") == 2 and "2 rows are wrong" in err
    code, _, err = prepare(
        "--dataset", write(chat, {"messages": chat["messages"][1:]}), "--template", "llama2", "--skip_invalid"
    )
    assert code == 0, err


def test_files_are_overwritten_only_with_overwrite_output_dir(prepare, dataset, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "train.jsonl").write_text("my own work")
    (mine / "notes.txt").write_text("mine too")
    code, _, err = prepare("--dataset", dataset, "--output", mine)
    assert (
        code == 2
        and "already holds train.jsonl" in err
        and (mine / "train.jsonl").read_text() == "my own work"
    )
    assert prepare("--dataset", dataset, "--output", mine, "--overwrite_output_dir")[0] == 0
    assert (mine / "notes.txt").read_text() == "mine too" and (mine / "train.jsonl").read_text().startswith(
        '{"prompt"'
    )


def test_a_full_disk_is_one_line_and_leaves_nothing(prepare, dataset, tmp_path, monkeypatch):
    import prepare as script

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "prepared")

    monkeypatch.setattr(script, "save_tokens", full)
    before = set(tmp_path.iterdir())
    code, _, err = prepare("--dataset", dataset)
    assert (
        code == 2
        and err == "error: prepared: No space left on device\n"
        and set(tmp_path.iterdir()) == before
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--show", "-1"), "--show must be at least 0, not -1"),
        (("--to", "elsewhere"), "--to = 'elsewhere' is no address; write it as s3://bucket/folder"),
        (("--to", "s3://me:secret@[::1/x"), "--to = 's3://[::1/x' is no address"),
        (("--to", "s3://me:secret@bucket/x"), "--to = s3://bucket/x holds a password"),
        (("--output", "a/b"), "is not a writable directory"),
        (("--output", "rows.jsonl"), "--output rows.jsonl is a file"),
        (("--cutoff_len", "999"), "cutoff_len = 999 is more than the 256 positions of the model"),
        (("--cutof_len", "9"), "unknown key 'cutof_len'"),
        (("--dataset", "nowhere.jsonl"), "dataset nowhere.jsonl does not exist"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(prepare, write, tmp_path, arguments, said):
    path = write({"prompt": "a", "completion": "b"})
    code, _, err = (
        prepare("--dataset", path, *arguments) if "--dataset" not in arguments else prepare(*arguments)
    )
    assert code == 2 and said in err and err.count("\n") == 1 and "secret" not in err
    assert [entry.name for entry in tmp_path.iterdir()] == ["rows.jsonl"]
