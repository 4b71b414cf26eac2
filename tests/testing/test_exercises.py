"""A check in a notebook says in one line what is wrong, in the words of the check or of the error."""

import pytest

from minilora.testing.exercises import NotYet, check


def message_of(name: str, code) -> str:
    with pytest.raises(NotYet) as caught, check(name):
        code()
    (line,) = caught.value._render_traceback_()  # what IPython shows
    assert line == str(caught.value) and caught.value.__cause__ is None
    return line


def failing(text: str):
    raise AssertionError(text)


def test_code_that_holds_is_called_right(capsys):
    with check("the sum"):
        assert 1 + 1 == 2
    assert capsys.readouterr().out == "right: the sum\n"


def test_a_failed_assertion_is_told_in_its_own_words(capsys):
    assert message_of("shapes", lambda: failing("A is (2, 3)")) == "not yet: shapes: A is (2, 3)"
    assert "right" not in capsys.readouterr().out


def test_an_error_of_the_code_is_named_with_the_first_line_of_its_text():
    line = message_of("a step", lambda: int("x\ny"))
    assert line.startswith("not yet: a step: ValueError: invalid literal for int()")


def test_a_function_that_is_not_written_yet_is_suspected_where_a_value_is_none_or_an_ellipsis():
    for value in (None, ...):
        line = message_of("packing", lambda value=value: value + 1)
        assert line.startswith("not yet: packing: something is None: is the cell above filled in?")
        assert "TypeError" in line


def test_an_interrupt_is_no_failed_check():
    with pytest.raises(KeyboardInterrupt), check("a loop"):
        raise KeyboardInterrupt
