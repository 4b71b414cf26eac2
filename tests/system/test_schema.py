"""A table decides what a JSON object may hold: exact values come back, or one line that names the field."""

import json
import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from minilora.system.errors import UserError
from minilora.system.schema import Field, read_fields, read_object, shown, shown_name

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)
TABLE = {
    "size": Field(int, "a size", required=True, low=1, high=100),
    "rate": Field(float, "a rate", default=0.5, low=0, below=1),
    "scale": Field((int, float), "a scale", default=2, above=0),
    "flag": Field(bool, "a flag", default=False),
    "name": Field(str, "a name", nullable=True, longest=10, one_line=True),
    "kind": Field(str, "a kind", default="a", choices=("a", "b")),
    "ids": Field((int, list), "ids", nullable=True, items=int, low=0, high=9, longest=3),
    "rest": Field(dict, "the rest", nullable=True),
}


def allowed_by_hand(name: str, value: object) -> bool:
    """The rules of TABLE, written down a second time."""
    kind = type(value)
    number = kind in (int, float) and -math.inf < value < math.inf and abs(value) <= 1.7976931348623157e308
    match name:
        case "size":
            return kind is int and 1 <= value <= 100
        case "rate":
            return number and 0 <= value < 1
        case "scale":
            return number and value > 0
        case "flag":
            return kind is bool
        case "name":
            return value is None or kind is str and len(value) <= 10 and value.isprintable()
        case "kind":
            return kind is str and value in ("a", "b")
        case "ids":
            single = kind is int and 0 <= value <= 9
            several = kind is list and len(value) <= 3 and all(type(i) is int and 0 <= i <= 9 for i in value)
            return value is None or single or several
        case "rest":
            return value is None or kind is dict


@given(st.sampled_from([*TABLE]), JSON)
@example("rate", 10**400)
@example("scale", 10**400)
@example("rate", 0)
@example("size", True)
@example("ids", [True])
@example("ids", [1, 2, 3, 4])
@example("kind", ["a"])
@example("name", "\u2028")
def test_a_value_comes_back_as_it_is_or_its_field_is_named_in_one_line(name, value):
    raw = {"size": 1} | {name: value}
    if allowed_by_hand(name, value):
        read = read_fields(raw, TABLE)[name]
        assert read == value and type(read) is (float if name == "rate" else type(value))
    else:
        with pytest.raises(UserError, match=rf"^(the key )?{name} ") as error:
            read_fields(raw, TABLE)
        assert str(error.value).isprintable() and len(str(error.value)) <= 250


def test_absent_fields_have_their_defaults_and_null_is_no_absence():
    assert read_fields({"size": 7}, TABLE) == dict(
        size=7, rate=0.5, scale=2, flag=False, name=None, kind="a", ids=None, rest=None
    )
    for raw in ({}, {"size": None}):
        with pytest.raises(UserError, match="^the key size is missing$"):
            read_fields(raw, TABLE)
    with pytest.raises(UserError, match="^flag must be true or false, not None$"):
        read_fields({"size": 1, "flag": None}, TABLE)


def test_what_is_allowed_is_said_in_words():
    assert {name: field.allowed() for name, field in TABLE.items()} == dict(
        size="a whole number from 1 to 100",
        rate="a number of at least 0 and below 1",
        scale="a number above 0",
        flag="true or false",
        name="text in one line of at most 10 characters or null",
        kind="'a' or 'b'",
        ids="a whole number or a list of whole numbers from 0 to 9 or null",
        rest="an object or null",
    )


def test_an_infinity_is_allowed_only_where_the_table_names_it():
    table = {"loss": Field(float, "a loss", high=math.inf)}
    assert read_fields({"loss": math.inf}, table) == {"loss": math.inf}
    for value in (-math.inf, math.nan, 10**400):
        with pytest.raises(UserError, match="loss must be a number"):
            read_fields({"loss": value}, table)


def test_names_within_an_object_are_whole_in_messages():
    for raw, said in (
        ({"size": 0}, "outer.size must be"),
        ({}, "outer.size is missing"),
        ([], "outer must hold"),
    ):
        with pytest.raises(UserError, match=said):
            read_fields(raw, TABLE, "outer.")


@pytest.mark.parametrize("text", ["[]", "null", '"a"', "3"])
def test_a_file_without_an_object_is_named(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match="a.json must hold a JSON object, not "):
        read_object(tmp_path / "a.json")


@given(JSON)
@example("\x1b[2J\n")
def test_any_value_and_any_name_is_shown_in_80_printable_characters(value):
    assert len(shown(value)) <= 80 and shown(value).isprintable()
    name = shown(value)
    assert len(shown_name(name * 3)) <= 80 and shown_name("\n" + name).isprintable()


@pytest.mark.parametrize("value", [["x" * 10**6] * 10**4, json.loads("[" * 900 + "]" * 900), 10**4000])
def test_a_value_of_any_size_and_depth_is_shown_in_80_characters(value):
    assert len(shown(value)) <= 80
