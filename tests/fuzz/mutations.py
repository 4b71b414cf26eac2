"""Good files changed at random, but by their structure: strategies of Hypothesis, from bytes to bytes.

Random bytes end in the first line of any parser. So a file is taken apart first: a JSON value is replaced
somewhere in its tree by another one, dropped, repeated, or put into a list; a safetensors header is such a
tree, behind a length that may lie; a template loses and gains pieces of Jinja. Only then, and not always, are
bytes cut, flipped or doubled.
"""

import copy
import json
import math
from collections.abc import Callable

import yaml
from hypothesis import strategies as st

from fuzz.edits import join_safetensors, split_safetensors

NUMBERS = (
    0, -1, 1, 2, 255, 2**31, 2**63, 2**64, 10**18, -(10**18), 10**30, 0.5, -0.0, 1e-320, 1e308, math.nan,
    math.inf, -math.inf,
)  # fmt: skip
TEXTS = (
    "", " ", "0", "false", "none", "nan", "\x1b[2J", "\0", "a\nb\r", "../x", "/dev/zero", "https://u:p@h/x", "(",
    "(a+)+$", "x" * 10_000, "\ud800", "q_proj", "🦊",
)  # fmt: skip
SCALARS = (
    st.none() | st.booleans() | st.sampled_from(NUMBERS) | st.integers() | st.floats()
    | st.sampled_from(TEXTS) | st.text(max_size=12)
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(TEXTS), inner, max_size=3),
    max_leaves=5,
)
JINJA = (
    "{{", "}}", "{%", "%}", "{% if messages %}", "{% endif %}", "{% for i in range(9) %}", "{% endfor %}",
    "{% generation %}", "{% endgeneration %}", "{{ messages }}", "{{ messages[0].content }}", "{{ bos_token }}",
    "{{ 1 // 0 }}", "{{ nothing.x }}", "{{ messages | tojson }}", "{% break %}", "{% set x = messages %}",
    "{{ raise_exception('no') }}", "| upper", "| trim", "loop.index", "'", '"', "\x1b[2J", "\0", "#}", "{#",
    "{{ strftime_now('%Y') }}", "{{ 'a' * 10**9 }}", "{{ ''.__class__ }}", "{% macro f() %}", "{% endmacro %}",
)  # fmt: skip
YAML_PIECES = (
    "a: &a [*a]\n", "&b ", "*b", "!!python/name:os.system ", "!!binary ", "!!set {a}", "---\n", "? [a]\n: 1\n",
    "\t", "<<: ", "{", "]", "'", "|\n", "seed: 1\n", "2024-02-30", "1e400", ".nan", "\0", "%YAML 9.9\n", "\ufeff",
)  # fmt: skip


# ---- trees: the values of JSON ----


def _places(tree: object) -> list[tuple]:
    """(container, key) of every value within a tree of lists and dicts."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [place for key, value in items for place in ((tree, key), *_places(value))]


def _replace(draw: Callable, container, key) -> None:
    container[key] = draw(VALUES)


def _drop(draw: Callable, container, key) -> None:
    del container[key]


def _add(draw: Callable, container, key) -> None:
    if isinstance(container, dict):
        container[draw(st.sampled_from(TEXTS))] = draw(VALUES)
    else:
        container.insert(key, draw(VALUES))


def _wrap(draw: Callable, container, key) -> None:
    for _ in range(draw(st.sampled_from([1, 1, 2, 60]))):  # deeper, and these functions end before the reader
        container[key] = [container[key]]


def _copy_from_elsewhere(draw: Callable, container, key) -> None:
    values = list(container.values()) if isinstance(container, dict) else container
    container[key] = copy.deepcopy(draw(st.sampled_from(values)))


CHANGES = (_replace, _replace, _replace, _drop, _add, _wrap, _copy_from_elsewhere)


@st.composite
def changed(draw: Callable, tree: object) -> object:
    """The tree with one to three changes somewhere in it."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        if places := _places(tree):
            draw(st.sampled_from(CHANGES))(draw, *draw(st.sampled_from(places)))
    return tree


def _as_json(tree: object) -> bytes:
    """JSON as Python writes it, with NaN; half a surrogate pair stays escaped."""
    return json.dumps(tree).encode()


# ---- bytes ----


@st.composite
def broken(draw: Callable, data: bytes) -> bytes:
    """Bytes that were cut, flipped, doubled or filled up in one place."""
    where = draw(st.integers(0, max(0, len(data) - 1)))
    length = draw(st.sampled_from([1, 2, 8, 100]))
    middle = draw(
        st.sampled_from([b"", bytes(length), data[where : where + length] * 2, b"\xff" * length])
        | st.binary(max_size=8)
    )
    return data[:where] + middle + (data[where + length :] if draw(st.booleans()) else b"")


def _perhaps_broken(data: bytes) -> st.SearchStrategy[bytes]:
    return st.integers(0, 9).flatmap(lambda n: broken(data) if n == 0 else st.just(data))


# ---- files ----


def json_files(data: bytes) -> st.SearchStrategy[bytes]:
    return (
        changed([json.loads(data)])
        .map(lambda tree: tree[0] if tree else None)
        .map(_as_json)
        .flatmap(_perhaps_broken)
    )


def json_lines(data: bytes) -> st.SearchStrategy[bytes]:
    rows = [json.loads(line) for line in data.splitlines()]
    lines = changed(rows).map(lambda tree: b"".join(_as_json(row) + b"\n" for row in tree))
    return lines.flatmap(_perhaps_broken)


def yaml_files(data: bytes) -> st.SearchStrategy[bytes]:
    """A JSON object as YAML with changed values, into which pieces of YAML may be put."""
    texts = changed([json.loads(data)]).map(
        lambda tree: yaml.safe_dump(tree[0] if tree else None, sort_keys=False)
    )
    return texts.flatmap(lambda text: _with_pieces(text, YAML_PIECES)).map(_encoded).flatmap(_perhaps_broken)


def templates(data: bytes) -> st.SearchStrategy[bytes]:
    return _with_pieces(data.decode(), JINJA, least=1).map(_encoded).flatmap(_perhaps_broken)


@st.composite
def _with_pieces(draw: Callable, text: str, pieces: tuple[str, ...], least: int = 0) -> str:
    """The text with some pieces put in, each perhaps in place of some characters."""
    for _ in range(draw(st.integers(least, 3))):
        where, lost = draw(st.integers(0, len(text))), draw(st.sampled_from([0, 0, 1, 10, 40]))
        text = text[:where] + draw(st.sampled_from(pieces)) + text[where + lost :]
    return text


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


@st.composite
def safetensors_files(draw: Callable, data: bytes) -> bytes:
    """A file whose header was changed, or whose length of the header lies, or whose numbers end too early."""
    header, numbers = split_safetensors(data)
    header = draw(changed([header]))
    text = _as_json(header[0] if header else None)
    lie = draw(st.sampled_from([None] * 6 + [0, 1, len(text) - 1, len(text) + 1, 10**8, 2**63, 2**64 - 1]))
    numbers = draw(
        st.sampled_from([numbers] * 6 + [b"", numbers[:-1], numbers + b"\0", b"\xff" * len(numbers)])
    )
    return draw(_perhaps_broken(join_safetensors(text, numbers, lie)))
