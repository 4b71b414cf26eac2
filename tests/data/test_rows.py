"""Rows of every form, conversations among them; and several datasets mixed by weight."""

import json
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora import UserError
from minilora.data.mixing import mix_rows, parse_datasets
from minilora.data.rows import ColumnNames, Row, parse_columns, read_rows, to_record


def write(path, *objects):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in objects))
    return path


def said(*turns: str) -> tuple[dict, ...]:
    """Messages from texts: the user's, the assistant's, the user's, ..."""
    return tuple({"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns))


def test_prompt_and_completion_are_read_under_their_own_names_and_under_others(tmp_path):
    path = write(
        tmp_path / "a.jsonl", {"prompt": "a", "completion": "b"}, {"prompt": "", "completion": "c", "more": 1}
    )
    assert read_rows(path) == [Row("a", "b"), Row("", "c")]
    assert [row.conversation for row in read_rows(path)] == [said("a", "b"), said("", "c")]
    assert [row.location for row in read_rows(path)] == [f"{path}, line 1", f"{path}, line 2"]
    path = write(tmp_path / "a.jsonl", {"question": "a", "answer": "b"})
    assert read_rows(path, ColumnNames("question", "answer")) == [Row("a", "b")]


def asked(instruction: str, context: str = "") -> dict:
    """A question of Alpaca's form, with its parts for the alpaca template."""
    content = f"{instruction}\n{context}" if context else instruction
    return {"role": "user", "content": content, "instruction": instruction, "input": context}


@pytest.mark.parametrize("output", ["output", "response"])
@pytest.mark.parametrize("context", ["input", "context"])
def test_rows_of_alpacas_and_dollys_form_are_conversations(tmp_path, context, output):
    path = write(
        tmp_path / "data.jsonl",
        {"instruction": "Add.", context: "1 2", output: "3"},
        {"instruction": "Sing.", context: "", output: "la"},
        {"instruction": "Sing.", output: "la"},
    )
    with_input, without, absent = read_rows(path)
    assert with_input == Row("Add.\n1 2", "3", (asked("Add.", "1 2"), {"role": "assistant", "content": "3"}))
    assert without == absent == Row("Sing.", "la", (asked("Sing."), {"role": "assistant", "content": "la"}))
    assert with_input.is_instruction


@pytest.mark.parametrize("system", ["system", "system_prompt"])
def test_system_and_history_of_an_alpaca_row_come_before_its_question(tmp_path, system):
    row = {
        "instruction": "Add.",
        "input": "1 2",
        "output": "3",
        system: "Be brief.",
        "history": [["a", "b"], ["c", "d"]],
    }
    (read,) = read_rows(write(tmp_path / "a.jsonl", row))
    first, answer = {"role": "system", "content": "Be brief."}, {"role": "assistant", "content": "3"}
    assert read == Row("Add.\n1 2", "3", (first, *said("a", "b", "c", "d"), asked("Add.", "1 2"), answer))


def test_trls_conversational_prompts_are_conversations_whose_completions_are_learned(tmp_path):
    turns = list(said("a", "b", "c", "d"))
    row = {"prompt": turns[:3], "completion": turns[3:], "system": "s"}
    (read,) = read_rows(write(tmp_path / "a.jsonl", row))
    assert read.messages == (
        {"role": "system", "content": "s"},
        turns[0],
        turns[1] | {"train": False},
        *turns[2:],
    )
    assert (read.prompt, read.completion) == ("c", "d")


def test_conversations_of_all_forms_are_the_same_rows(tmp_path):
    turns = [
        ("system", "s"),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c"),
        ("assistant", "d"),
        ("user", "never answered"),
    ]
    sharegpt = {"user": "human", "assistant": "gpt", "system": "system"}
    messages = [{"role": role, "content": text} for role, text in turns]
    conversations = [{"from": sharegpt[role], "value": text} for role, text in turns]
    row = Row("c", "d", tuple(messages[:-1]))
    parts = [m | {"content": [{"type": "text", "text": t} for t in m["content"]]} for m in messages]
    others = {"user": "human", "assistant": "model", "system": "developer"}
    records = (
        {"messages": messages},
        {"messages": json.dumps(messages)},
        {"messages": parts},
        {"messages": [{"role": others[role], "value": text} for role, text in turns]},
        {"conversations": conversations, "id": 1},
        {"conversations": conversations[1:], "system": "s"},
        {"conversations": conversations[1:], "system_prompt": "s"},
        {"conversations": conversations, "system": "not this"},
    )
    for record in records:
        assert read_rows(write(tmp_path / "a.jsonl", record)) == [row]


def test_other_keys_of_a_message_are_kept_for_the_template(tmp_path):
    messages = [
        {"role": "user", "content": "a", "name": None},
        {"role": "assistant", "content": "b", "reasoning_content": "c"},
    ]
    (row,) = read_rows(write(tmp_path / "a.jsonl", {"messages": messages}))
    assert row.messages == ({"role": "user", "content": "a"}, messages[1])


def test_empty_tools_and_weights_do_not_refuse_a_row(tmp_path):
    nothing = {"tool_calls": [], "function_call": None}
    row = {
        "messages": [A | nothing | {"weight": 0}, B | nothing | {"weight": 1}],
        "tools": "[]",
        "functions": None,
    }
    (read,) = read_rows(write(tmp_path / "a.jsonl", row))
    assert read.completion == "b" and len(read.messages) == 2


def test_a_column_that_the_settings_name_is_preferred_to_all_others(tmp_path):
    messages = list(said("said", "there"))
    row = {
        "prompt": "p",
        "completion": "c",
        "instruction": "i",
        "output": "o",
        "messages": messages,
        "chat": messages,
        "text": "t",
    }
    path = write(tmp_path / "a.jsonl", row)
    cases = [
        ({}, "i"),
        ({"prompt_column": "text"}, "t"),
        ({"messages_column": "chat"}, "said"),
        ({"messages_column": "no"}, "i"),
        ({"text_column": "output"}, None),
    ]
    for columns, prompt in cases:
        names = ColumnNames(**{key.removesuffix("_column"): name for key, name in columns.items()})
        assert [row.prompt for row in read_rows(path, names)] == [prompt]


def test_plain_text_is_a_row_without_a_prompt(tmp_path):
    path = write(tmp_path / "a.jsonl", {"text": "one\n\ntwo"})
    assert read_rows(path) == [Row(None, "one\n\ntwo")]
    assert read_rows(path, ColumnNames(text="text")) == read_rows(path)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"prompt": "a"}, "the column completion is missing"),
        ({"prompt": "a", "completion": 3}, "the column completion holds 3, not text"),
        ({"prompt": "a", "completion": None}, "the column completion holds None, not text"),
        (
            {"prompt": ["x" * 200], "completion": ""},
            "the column prompt holds ['" + "x" * 75 + "..., not text",
        ),
    ],
)
def test_a_row_that_lacks_a_column_is_refused_with_file_and_line(tmp_path, second, message):
    path = write(tmp_path / "a.jsonl", {"prompt": "a", "completion": "b"}, second)
    with pytest.raises(UserError) as error:
        read_rows(path)
    assert str(error.value) == f"{path}, line 2: {message}"


A, B = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"question": "a", "answer": "b"},
            "it has question, answer; name yours with prompt_column and completion_column",
        ),
        ({}, "it has none; name yours"),
        ({"instruction": "a", "output": "b", "input": 5}, "the column input holds 5, not text"),
        (
            {"instruction": "a", "output": "b", "history": [["a"]]},
            "the column history holds [['a']], not a list of [question, answer]",
        ),
        ({"instruction": "a", "output": "b", "history": "a"}, "the column history holds 'a', not a list"),
        (
            {"instruction": "a", "output": "b", "input": "c", "context": "d"},
            "input and context both hold text; rename the one that is not meant",
        ),
        ({"messages": "[{]"}, "the column messages is not valid JSON"),
        (
            {"prompt": [A], "completion": "b"},
            "the column prompt holds [{'role': 'user', 'content': 'a'}], not text",
        ),
        ({"messages": "hello"}, "the column messages holds 'hello', not a list of messages"),
        ({"messages": []}, "the conversation has no message of the assistant"),
        (
            {"messages": [A, B | {"role": "tool"}, B]},
            "the role 'tool' is not known; known: system, developer, user, human, assistant, gpt, model, bot; tools",
        ),
        ({"messages": [A, B | {"content": [{"type": "image"}]}]}, "content holds a part of type 'image'"),
        ({"conversations": [A, A]}, "the conversation has no message of the assistant"),
        ({"messages": [A, "b"]}, "message 2: expected an object with role and content, found str"),
        ({"messages": [A, {"role": "assistant"}]}, "message 2: the column content is missing"),
        (
            {"messages": [A, B | {"content": [{"type": "text"}]}]},
            "message 2: content holds a part of type 'text'; only parts of type text are read",
        ),
        (
            {"messages": [A, B | {"role": "robot"}]},
            "the role 'robot' is not known; known: system, developer, user, human, assistant",
        ),
        ({"conversations": [{"from": "human"}, B]}, "message 1: the column value is missing"),
        (
            {"messages": [A, B | {"content": "", "tool_calls": [{"id": "1"}]}]},
            "tool_calls holds [{'id': '1'}], not empty",
        ),
        (
            {"messages": [A, B | {"content": None, "function_call": {"name": "f"}}]},
            "message 2: function_call holds {'name': 'f'}",
        ),
        (
            {"messages": [A, B], "tools": [{"type": "function"}]},
            "tools holds [{'type': 'function'}], not empty, and tools are not",
        ),
        (
            {"conversations": [A, B], "functions": [1]},
            "functions holds [1], not empty, and tools are not supported; leave",
        ),
        (
            {"messages": [A, B | {"weight": 0.5}, A, B]},
            "message 2: the answer has weight 0.5; it can be 1, learned, or 0, not learned",
        ),
    ],
)
def test_a_row_of_no_form_and_a_broken_conversation_are_refused_with_file_and_line(tmp_path, row, message):
    path = write(tmp_path / "a.jsonl", row)
    with pytest.raises(UserError) as error:
        read_rows(path)
    assert (
        str(error.value).startswith(f"{path}, line 1")
        and message in str(error.value)
        and "\n" not in str(error.value)
    )


@pytest.mark.parametrize("flag", [{"train": False}, {"training": False}, {"weight": 0}, {"loss_weight": 0.0}])
def test_an_answer_that_a_flag_takes_out_is_kept_and_not_learned(tmp_path, flag):
    (row,) = read_rows(write(tmp_path / "a.jsonl", {"messages": [A, B | flag, A, B]}))
    assert row.messages == (A, B | {"train": False}, A, B)
    on = {key: type(value)(1) for key, value in flag.items()}
    assert read_rows(write(tmp_path / "a.jsonl", {"messages": [A, B | on]}))[0].messages == (A, B)
    assert read_rows(write(tmp_path / "a.jsonl", to_record(row))) == [row]


@pytest.mark.parametrize(
    ("columns", "renamed"),
    [
        (None, {}),
        ("instruction=task, output=solution", {"task": "instruction", "solution": "output"}),
        (["instruction=task", "instruction=q,a"], {"task": "instruction", "q,a": "instruction"}),
        ("system=a=b", {"a=b": "system"}),
    ],
)
def test_other_names_of_columns_are_parsed(columns, renamed):
    assert parse_columns(columns) == renamed


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (
            "task",
            "'task' must be NAME=COLUMN, where NAME is one of instruction, input, output, system, history",
        ),
        ("prompt=task", "'prompt=task' must be NAME=COLUMN"),
        ("output=", "'output=' must be NAME=COLUMN"),
        ("output=a,input=a", "the column 'a' two meanings, output and input"),
    ],
)
def test_a_name_of_a_column_that_means_nothing_is_refused(columns, said):
    with pytest.raises(UserError) as error:
        parse_columns(columns)
    assert said in str(error.value)


def test_a_renamed_column_takes_the_place_of_one_that_has_its_name(tmp_path):
    names = ColumnNames(renamed={"task": "instruction", "solution": "output"})
    path = write(tmp_path / "a.jsonl", {"task": "a", "solution": "b", "output": "c", "instruction": "d"})
    (row,) = read_rows(path, names, unread=(unread := {}))
    assert (row.prompt, row.completion) == ("a", "b") and unread == {"output": 1, "instruction": 1}
    (row,) = read_rows(write(tmp_path / "a.jsonl", {"instruction": "d", "output": "c"}), names)
    assert (row.prompt, row.completion) == ("d", "c")


FORMS = [
    {"prompt": "a", "completion": "b", "system": "s"},
    {"instruction": "a", "input": "c", "output": "b", "system": "s", "history": [["d", "e"]]},
    {"instruction": "a", "context": "c", "response": "b"},
    {"messages": [A, B], "system_prompt": "s"},
    {"conversations": [A, B], "tools": []},
    {"text": "a"},
]


@pytest.mark.parametrize("record", FORMS)
def test_columns_that_are_not_read_are_named_and_counted_and_no_others(tmp_path, record):
    unread = {}
    more = [{"extra": "x", "empty": "", "none": None}, {"extra": ["x"]}, {"empty": [], "late": 1}]
    path = write(tmp_path / "a.jsonl", *({**record, **entry} for entry in more))
    rows = read_rows(path, unread=unread)
    assert len(rows) == 3 and unread == {"extra": 2, "late": 1}


# Several datasets


def test_datasets_are_parsed_with_and_without_weights():
    half = Fraction(1, 2)
    assert parse_datasets("a.jsonl") == [("a.jsonl", None)]
    assert parse_datasets("a.jsonl, s3://b/c.json") == [("a.jsonl", None), ("s3://b/c.json", None)]
    assert parse_datasets("https://h:80/a.jsonl:.5,me/mine:3") == [
        ("https://h:80/a.jsonl", half),
        ("me/mine", Fraction(3)),
    ]
    assert parse_datasets("a\nb.jsonl:.5") == [("a\nb.jsonl", half)]
    assert parse_datasets(["a,b.jsonl:0.5", "c.json:1.0"]) == [("a,b.jsonl", half), ("c.json", Fraction(1))]


@pytest.mark.parametrize(
    ("datasets", "message"),
    [
        ("a.jsonl:1,b.json", "only some datasets have a weight; give one to all of them"),
        ("a.jsonl:1,b.json:0", "a weight is 0"),
        ("a.jsonl,,b.json", "names nothing between two commas; remove one of them"),
        ("", "names nothing"),
    ],
)
def test_datasets_with_half_given_weights_are_refused(datasets, message):
    with pytest.raises(UserError, match=message):
        parse_datasets(datasets)


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    weights=st.lists(st.integers(1, 20), min_size=4, max_size=4),
    seed=st.integers(0, 2**31),
)
def test_a_mixture_has_the_proportions_of_the_weights_and_no_row_twice(sizes, weights, seed):
    parts = [[Row(str(i), str(j)) for j in range(size)] for i, size in enumerate(sizes)]
    weights = [Fraction(weight, 10) for weight in weights[: len(parts)]]
    mixed = mix_rows(parts, weights, seed)
    assert mix_rows(parts, weights, seed) == mixed and len(set(map(str, mixed))) == len(mixed)
    total = min(size * sum(weights) / weight for size, weight in zip(sizes, weights, strict=True))
    counts = [sum(row.prompt == str(i) for row in mixed) for i in range(len(parts))]
    assert any(count == size for count, size in zip(counts, sizes, strict=True))  # one is used up
    for count, weight in zip(counts, weights, strict=True):
        assert count == 1 or 0 <= total * weight / sum(weights) - count < 1


def test_the_seed_chooses_the_rows_of_a_mixture_and_none_is_left_out_without_weights():
    parts = [[Row("a", str(j)) for j in range(30)], [Row("b", str(j)) for j in range(10)]]
    even = [Fraction(1), Fraction(1)]
    first, second = mix_rows(parts, even, seed=1), mix_rows(parts, even, seed=2)
    assert len(first) == len(second) == 20 and first != second and first[10:] == second[10:] == parts[1]
    assert mix_rows(parts, [None, None], seed=1) == parts[0] + parts[1]


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("a:0.7", ("a", Fraction(7, 10))),
        ("a:b:.5", ("a:b", Fraction(1, 2))),
        ("a:3.", ("a", Fraction(3))),
        (":0.7", (":0.7", None)),
        ("a:0.7x", ("a:0.7x", None)),
        ("a:" + "1" * 5000, ("a:" + "1" * 5000, None)),  # Python converts no such number
        ("a:" + "1" * 100_000 + "x", ("a:" + "1" * 100_000 + "x", None)),  # in linear time
    ],
)
def test_a_weight_is_a_short_number_behind_the_last_colon(entry, expected):
    assert parse_datasets(entry) == [expected]
