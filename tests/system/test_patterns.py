"""Patterns from files mean what `re` says, and end in bounded time."""

import re
import time
import warnings

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minilora import UserError
from minilora.system import patterns
from minilora.system.patterns import match_names

NAMES = [
    "",
    "model.layers.0.self_attn.q_proj",
    "model.layers.10.mlp.up_proj",
    "lm_head",
    "\ud800",
    "a\nb",
    "aaaa",
]
PATTERNS = [
    ".*q_proj",
    r"model\.layers\.\d\..*",
    "(?i)LM_HEAD",
    "",
    "a+",
    "[^.]*",
    r"(a)\1\1\1",
    "^lm",
    "(?!lm).*d",
]


@pytest.mark.parametrize("whole, method", [(True, re.fullmatch), (False, re.match)])
def test_the_same_names_match_as_in_re(whole, method):
    expected = [[name for name in NAMES if method(pattern, name)] for pattern in PATTERNS]
    assert match_names(PATTERNS, NAMES, whole) == expected


@settings(max_examples=50)
@given(st.text("ab.*+?()[]|{1,}\\^$\n", max_size=8))
@example("[[")
def test_any_text_matches_as_in_re_or_is_refused(pattern):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # "[[" may mean something else one day
            expected = [[name for name in NAMES if re.fullmatch(pattern, name)]]
    except re.error:
        with pytest.raises(UserError, match="is not a regular expression"):
            match_names([pattern], NAMES)
    else:
        assert match_names([pattern], NAMES) == expected


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|a)*$", "(a?){40}a{20}b", "a*" * 30 + "$"])
def test_a_pattern_that_would_take_years_is_stopped(monkeypatch, pattern):
    monkeypatch.setattr(patterns, "SECONDS", 0.5)
    start = time.monotonic()
    with pytest.raises(UserError, match="takes more than 0.5 seconds to match; list the names"):
        match_names([pattern], ["a" * 50 + "!"])
    assert time.monotonic() - start < 60


@pytest.mark.parametrize(
    "pattern", ["(", "*", "(" * 100_000, "a{99999999999999999999}", "(?P<n>a)(?P<n>b)", "[" + "a" * 100_000]
)
def test_what_is_no_regular_expression_is_refused_in_one_short_line(pattern):
    with pytest.raises(UserError, match="is not a regular expression") as error:
        match_names([pattern], NAMES)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_no_pattern_starts_no_process(monkeypatch):
    monkeypatch.setattr(patterns.subprocess, "run", lambda *_, **__: pytest.fail("a process is started"))
    assert match_names([], NAMES) == []
