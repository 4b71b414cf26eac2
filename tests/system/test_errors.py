"""A mistake is one line for a terminal, whatever the values in it hold."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora import UserError
from minilora.system.errors import ArgumentParser, local_path, one_line


@given(st.text(max_size=3000))
def test_a_mistake_is_one_printable_line_of_at_most_500_characters(value):
    for text in (value, f"dataset {value!r} does not exist", f"{value} in {value}; known: {[value] * 20}"):
        shown = str(UserError(text))
        assert len(shown) <= 500 and shown.isprintable()


@given(st.text(st.characters(categories=["L", "N", "P", "Zs"]), min_size=84, max_size=1000))
def test_a_quoted_value_is_cut_after_80_characters_and_the_remedy_stays(value):
    shown = one_line(f"template = {value!r} is not known; nearest: 'alpaca'")
    assert shown.endswith("is not known; nearest: 'alpaca'")
    assert len(shown) <= len("template = '' is not known; nearest: 'alpaca'...") + 80 * len("\\U00012345")


@pytest.mark.parametrize("quote", ["'", '"'])
def test_the_cut_keeps_the_first_80_characters(quote):
    assert one_line(f"x = {quote}{'ab' * 50}{quote}; y") == f"x = {quote}{'ab' * 40}...{quote}; y"


@pytest.mark.parametrize(
    "text",
    [
        "the adapter's configuration names a rank that the model's layers, of which there are many, do not have; the user's choice",
        "lora_target names 'v_porj', which no layer is called; nearest: 'v_proj'",
        "/a/rather/long/path/to/a/model/directory/that/is/still/shorter/than/two/hundred/characters/config.json: x",
        "dataset 大きな.jsonl does not exist: é, Ω, 😀",
    ],
)
def test_ordinary_messages_are_not_touched(text):
    assert one_line(text) == text


@pytest.mark.parametrize("control", ["\x1b[2J", "\r", "\x07", "\x9b", "\u202e", "\u2066", "\x00", "\u200f"])
def test_a_value_cannot_move_the_cursor_or_turn_the_text_around(control):
    assert control not in one_line(f"model {control}x does not exist") or control == "\r"
    assert "\r" not in one_line(f"model {control}x does not exist")


def test_the_end_of_a_long_message_stays_because_the_remedy_stands_there():
    shown = one_line("wrong: " + "; ".join(f"layer {i}" for i in range(1000)) + "; correct config.json")
    assert (
        shown.startswith("wrong: layer 0") and shown.endswith("; correct config.json") and len(shown) <= 500
    )


@pytest.mark.parametrize(
    "words", [["--name", ""], ["--name="], ["--path", ""], ["--name", "a", ""], ["", "--name", "a"]]
)
def test_an_empty_option_names_itself(words):
    parser = ArgumentParser()
    parser.add_argument("--name")
    parser.add_argument("--path")
    with pytest.raises(UserError, match="is empty"):
        parser.parse_known_args(words)


@given(st.lists(st.text(min_size=1), max_size=3))
def test_options_hide_the_secrets_of_addresses_in_lists_too(names):
    parser = ArgumentParser()
    parser.add_argument("--one")
    parser.add_argument("--many", action="append")
    secret = "https://me:QQSECRETQQ@host/"
    words = ["--one", secret, *(w for name in names for w in (f"--many={name}", f"--many={secret}"))]
    options, _ = parser.parse_known_args(words)
    assert not re.search("QQSECRETQQ", repr(options))


def test_an_option_that_is_given_twice_names_itself_and_lists_and_switches_may_be_repeated():
    parser = ArgumentParser()
    parser.add_argument("--one", "--first")
    parser.add_argument("--many", action="append")
    parser.add_argument("--switch", action="store_true")
    for words in (["--one", "a", "--one", "b"], ["--one=a", "--first", "b"]):
        with pytest.raises(UserError, match="--one is given twice"):
            parser.parse_known_args(words)
    options, _ = parser.parse_known_args(["--many", "a", "--many", "b", "--switch", "--switch", "--one", "c"])
    assert (options.many, options.switch, options.one) == (["a", "b"], True, "c")


@pytest.mark.parametrize(
    "address", ["s3://key:QQSECRETQQ@bucket/a", "https://host/a?sig=QQSECRETQQ", "file:///a"]
)
def test_an_option_for_a_path_takes_no_address_and_repeats_no_secret(address):
    parser = ArgumentParser()
    parser.add_argument("--output", type=local_path)
    with pytest.raises(UserError, match="--output.* is an address; name a path on this machine") as error:
        parser.parse_known_args(["--output", address])
    assert "QQSECRETQQ" not in str(error.value)


@pytest.mark.parametrize(
    "words, replaced",
    [
        (["--overwrite_it"], True),
        (["--overwrite-it"], True),
        (["--overwrite_it", "true"], True),
        (["--overwrite-it=True"], True),
        (["--overwrite_it", "false"], False),
        (["--overwrite_it=false"], False),
        ([], False),
    ],
)
def test_a_switch_is_written_as_the_trainers_keys_are(words, replaced):
    parser = ArgumentParser()
    parser.add_argument("--overwrite_it", action="store_true")
    parser.add_argument("--cut-at")
    options, rest = parser.parse_known_args([*words, "--max-steps", "3", "--cut-at", "a-b"])
    assert (options.overwrite_it, options.cut_at, rest) == (replaced, "a-b", ["--max-steps", "3"])


def test_a_switch_takes_no_other_word():
    parser = ArgumentParser()
    parser.add_argument("--overwrite_it", action="store_true")
    assert parser.parse_known_args(["--overwrite_it", "maybe"])[1] == ["maybe"]
    with pytest.raises(UserError, match="--overwrite_it: ignored explicit argument 'maybe'"):
        parser.parse_known_args(["--overwrite_it=maybe"])
