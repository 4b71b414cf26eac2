"""Text of strangers is shown on a terminal, and steers nothing there."""

import io
import time
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.system.terminal import printable, progress_bar, visible

DIRECTIONS = {
    "LRE",
    "RLE",
    "PDF",
    "LRO",
    "RLO",
    "LRI",
    "RLI",
    "FSI",
    "PDI",
}  # Unicode's bidirectional controls


@given(st.text() | st.text("\x1b[2Jm\r\x07\u202e\u2066\ud800\u2028\x9b\x7f"))
def test_what_steers_a_terminal_is_escaped_and_everything_can_be_printed(text):
    for shown in (visible(text), printable(text)):
        shown.encode()
        steering = (c for c in shown if unicodedata.category(c) in ("Cc", "Zl", "Zp"))
        assert set(steering) <= {"\n", "\t"}
        assert not DIRECTIONS & {unicodedata.bidirectional(c) for c in shown}


@given(st.text())
def test_a_message_is_one_line_of_characters_with_a_shape(text):
    assert printable(text).isprintable()


@pytest.mark.parametrize(
    "text",
    [
        "two\nlines\tand a tab",
        "日本語　全角",
        "10\u00a0000 €",
        "می\u200cخواهم",
        "👩\u200d🚀 🏴\U000e0067\U000e007f",
        "क्\u200dष",
    ],
)
def test_answers_in_any_script_stay_as_they_are(text):
    assert visible(text) == text


def test_escapes_say_what_was_there():
    assert visible("a\x1b[2J\r\u202eb") == "a\\x1b[2J\\r\\u202eb"
    assert printable("a\nb\u00a0c") == "a\\nb\\xa0c"


@pytest.mark.parametrize("terminal, seconds", [(True, 2), (True, 0), (False, 2)])
def test_a_bar_is_shown_on_a_terminal_after_a_moment(monkeypatch, terminal, seconds):
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    monkeypatch.setattr("sys.stderr", stream)
    with progress_bar(4, "answers", "base") as bar:
        bar.start_t = bar.last_print_t = time.time() - seconds
        bar.set_postfix_str("token 3", refresh=False)
        bar.update(0)  # as between two batches
    shown = "base:   0%" in stream.getvalue() and "token 3" in stream.getvalue()
    assert shown == (terminal and seconds > 1) and bool(stream.getvalue()) == shown
