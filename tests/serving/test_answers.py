"""minilora/serving/answers.py: the text of an answer ends before a stop string, however it comes in pieces."""

from hypothesis import given
from hypothesis import strategies as st
from support.serving import TOKENIZER, request_for

from minilora.inference.assistant import GenerationSettings
from minilora.serving.answers import Answer, UntilStop


def cut(text: str, stops: list[str]) -> str:
    """The definition: the first character behind which a stop string stands; of several there, the longest."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))]
    return text


LETTERS = st.text("ab", max_size=12)


@given(st.lists(LETTERS, max_size=8), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_stop_string_that_is_complete_first(pieces, stops):
    until = UntilStop(stops)
    given_out = ""
    for piece in pieces:
        given_out += until.feed(piece)
        assert cut("".join(pieces), stops).startswith(given_out)  # nothing has to be taken back
    assert given_out + until.flush() == cut("".join(pieces), stops)


@given(st.text("ab", max_size=20), st.lists(st.text("ab", min_size=2, max_size=4), max_size=3))
def test_only_text_that_may_begin_a_stop_string_waits(text, stops):
    until = UntilStop(stops)
    waiting = len(text) - len(until.feed(text))
    if not until.ended:
        assert waiting == max(
            (n for stop in stops for n in range(len(stop)) if text.endswith(stop[:n])), default=0
        )


def test_pieces_are_the_decoded_text_with_characters_of_many_tokens_whole():
    ids = TOKENIZER.encode(
        "the fox 🦊 and ü",
    )
    request = request_for([1], None, GenerationSettings(max_new_tokens=99))
    answer = Answer(request, limit=len(ids))
    pieces = [answer.add(token) for token in ids]
    assert "".join(piece.text for piece in pieces) == TOKENIZER.decode(ids)
    assert all("\ufffd" not in piece.text for piece in pieces)
    assert [piece.finish_reason for piece in pieces] == [None] * (len(ids) - 1) + ["length"]


def test_the_end_token_is_counted_and_is_no_text():
    answer = Answer(request_for([1], None, end_ids=(2,)), limit=9)
    (first, last) = (answer.add(token) for token in (TOKENIZER.encode("fox")[-1], 2))
    assert (last.tokens, last.finish_reason) == (2, "stop") and not first.is_last
