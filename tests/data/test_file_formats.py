"""Data files that hang a reader or fill the memory end in one line; all others are read as before."""

import gzip
import io
import json
import os
import re
import socket
import subprocess
import sys
from decimal import Decimal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.project import PROGRAM_ENVIRONMENT, ROOT

from minilora import UserError
from minilora.data import file_formats, rows
from minilora.data.file_formats import FORMATS
from minilora.data.readers import read_records
from minilora.data.rows import read_rows

GOOD = b'{"text": "a"}\n'


def test_what_is_no_file_is_not_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo.jsonl")
    os.symlink("/dev/zero", "zero.csv")
    os.symlink("/dev/stdin", "stdin.txt")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("socket.json")
        for name in ("fifo.jsonl", "zero.csv", "socket.json", "/dev/zero"):
            with pytest.raises(UserError, match=f"dataset {name} is no file, but a pipe or a device"):
                read_records(name)
    os.symlink("loop.json", "loop.json")
    for name in ("loop.json", "a\0b.jsonl"):
        with pytest.raises(UserError, match="does not exist"):
            read_records(name)


LIMITED = """
import resource, sys
from minilora import UserError
from minilora.data.rows import read_rows
used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + 2**28, used + 2**28))  # 256 MiB more than now
for path in sys.argv[1:]:
    try:
        print(len(read_rows(path)), "rows")
    except UserError as error:
        print(error)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a limit of memory that Linux keeps")
def test_files_of_a_gigabyte_need_little_memory(tmp_path):
    block = b"\n" * 2**20
    for name in ("newlines.jsonl", "newlines.json", "newlines.csv", "newlines.txt"):
        with open(tmp_path / name, "wb") as file:
            file.write(GOOD if name.endswith("l") else b"prompt,completion\n" if name.endswith("v") else b"")
            file.writelines(block for _ in range(4))
            file.truncate(2**30)  # the rest is a hole of zeros, which takes no room on the disk
    with open(tmp_path / "short.jsonl", "wb") as file:  # many lines, of which memory holds one
        file.writelines(b"\n" * 10 + b" " * 2**20 + b"\n" + GOOD for _ in range(1000))
    paths = [str(path) for path in sorted(tmp_path.iterdir())]
    words = [sys.executable, "-c", LIMITED, *paths]
    run = subprocess.run(words, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    lines = run.stdout.splitlines()
    assert run.returncode == 0 and len(lines) == 5, run.stderr
    for line, name in zip(lines[:4], ("csv", "json", "jsonl", "txt"), strict=True):
        assert re.search(rf"newlines.{name}: 1,000,0\d1 of its first 1,000,0\d\d lines are blank$", line)
    assert lines[4] == "1000 rows"


@pytest.fixture
def small_limits(monkeypatch):
    monkeypatch.setattr(file_formats, "LONGEST_LINE", 1000)
    monkeypatch.setattr(file_formats._lines, "__defaults__", ("\n", 1000))
    monkeypatch.setattr(file_formats, "LONGEST_DOCUMENT", 5000)
    monkeypatch.setattr(file_formats, "LONGEST_CELL", 500)
    monkeypatch.setattr(file_formats, "MOST_BLANK_LINES", 50)
    monkeypatch.setattr(file_formats, "EXPANDS_FREELY", 10_000)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", GOOD + b"\n" * 61, "a.jsonl: 61 of its first 62 lines are blank"),
        ("a.csv", b"text\n" + b"\r\n" * 61, "a.csv: 61 of its first 62 lines are blank"),
        ("a.txt", b"a\r" + b" \r" * 61, "a.txt: 61 of its first 62 lines are blank"),
        ("a.json", b" \n" * 51 + b"[]", "a.json: 51 of its first 51 lines are blank"),
        ("a.jsonl", GOOD + b" " * 1001, "a.jsonl, line 2 has more than 1,000 characters"),
        ("a.txt", b"\0" * 1001, "a.txt, line 1 has more than 1,000 characters"),
        ("a.csv", b'text\n"' + b"a" * 600, "a.csv, line 2: not valid CSV: field larger than field limit"),
        ("a.json", b"[" + b" " * 5001, "a.json, line 1 has more than 5,000 characters"),
        ("a.json", b"[\n" + b'{"text": "a"},\n' * 400, "write an object per line into a .jsonl file"),
        ("a.jsonl.gz", gzip.compress(GOOD * 100_000), "expands to more than 200 times its size"),
        (
            "a.csv.gz",
            gzip.compress(b"a" * 10**6),
            "expands to more than 200 times its size|more than 1,000 char",
        ),
        ("a.parquet.gz", gzip.compress(b"\0" * 10**7), "expands to more than 200 times its size"),
        ("a.jsonl.gz", gzip.compress(GOOD) + b"garbage", "is not a whole gzip file: Not a gzipped file"),
        ("a.jsonl.gz", b"", "is empty"),
        ("a.parquet.gz", gzip.compress(b"PAR1"), "is not a whole Parquet file"),
        ("a.jsonl", b'{"a": ' * 101 + b"1" + b"}" * 101, "a.jsonl, line 1: nested too deeply"),
        ("a.json", b'[{"a": ' + b"[" * 101 + b"]" * 101 + b"}]", "a.json, item 1: nested too deeply"),
        (
            "a.csv",
            ",".join(f"column{i}" for i in range(100)).encode() + b"\n" + b"," * 99 + b"\n",
            "and .* more; name yours",
        ),
        (
            "a.json",
            json.dumps({f"k{i}": [1] for i in range(99)}).encode()[:-1] + b"\n}",
            "and 91 more; write that list",
        ),
    ],
)
def test_a_file_beyond_a_limit_is_one_short_line(small_limits, tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said) as error:
        read_rows(tmp_path / name)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600 + len(str(tmp_path))


def test_blank_lines_in_a_cell_and_between_rows_are_kept_or_skipped(small_limits, tmp_path):
    (tmp_path / "a.csv").write_text('text\n\n\n"a\n\n\nb"\n\n')
    assert [record for _, record in read_records(tmp_path / "a.csv")] == [{"text": "a\n\n\nb"}]


def test_an_invalid_byte_is_found_at_its_place_in_a_long_file(tmp_path):
    for name, before in (
        ("a.jsonl", GOOD * 5000),
        ("a.csv", b"text\n" + "é\n".encode() * 9000),
        ("a.txt", b"\xef\xbb\xbf" + b"a\n" * 9000),
    ):
        content = before + b"\xff"
        (tmp_path / name).write_bytes(content)
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
        for path in (tmp_path / name, tmp_path / f"{name}.gz"):
            with pytest.raises(
                UserError, match=f"is not UTF-8 text: invalid start byte at byte {len(before)}$"
            ):
                read_records(path)


def test_a_file_in_which_everything_is_wrong_is_given_up(monkeypatch, tmp_path):
    monkeypatch.setattr(rows, "MOST_ERRORS", 10)
    (tmp_path / "a.jsonl").write_bytes(GOOD + b"{\n" * 50)
    errors = []
    with pytest.raises(UserError, match="a.jsonl: over 10 records are wrong, as .*line 12: not valid JSON"):
        read_rows(tmp_path / "a.jsonl", on_error=errors.append)
    assert len(errors) == 11


def test_the_first_wrong_row_ends_the_reading(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"{\n" + GOOD * 5000 + b"\xff\n")
    with pytest.raises(UserError, match="line 1: not valid JSON"):  # not the byte behind it
        read_records(tmp_path / "a.jsonl")


# ---- the same records as before ----


def documents_by_regex(text: str) -> list[str]:
    """The definition of a document: what lies between blank lines."""
    text = re.sub(r"\r\n?", "\n", text)
    return [part.strip("\n") for part in re.split(r"\n(?:[^\S\n]*\n)+", text) if part.strip()]


@given(st.text(alphabet="ab \n\r\t\xa0\u2028", max_size=30))
@settings(max_examples=500, deadline=None)
def test_documents_lie_between_blank_lines(text):
    parsed = FORMATS[".txt"]("a", io.BytesIO(text.encode()))
    assert [record["text"] for _, record in parsed] == documents_by_regex(text)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
columns = st.sampled_from(
    (
        "prompt completion instruction input context output response system system_prompt history messages "
        "conversations text tools"
    ).split()
)
turns = st.lists(
    st.dictionaries(
        st.sampled_from("role content from value tool_calls weight train type text more".split()),
        values | st.sampled_from(["user", "assistant", "gpt"]),
    )
    | values,
    max_size=3,
)
records = st.dictionaries(columns | st.text(max_size=3), values | turns, max_size=4)


@given(st.lists(records | values, min_size=1, max_size=3), st.sampled_from([".jsonl", ".json"]))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_json_values_are_rows_or_one_line_each(tmp_path, written, suffix):
    text = (
        json.dumps(written) if suffix == ".json" else "".join(json.dumps(value) + "\n" for value in written)
    )
    (tmp_path / f"a{suffix}").write_text(text)
    try:
        for row in read_rows(tmp_path / f"a{suffix}"):
            assert isinstance(row.completion, str)
            json.dumps(rows.to_record(row))
    except UserError as error:
        assert "\n" not in str(error) and f"a{suffix}" in str(error)


@given(st.binary(max_size=60), st.sampled_from([*FORMATS]), st.booleans())
@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_records_or_one_line(tmp_path, data, suffix, is_compressed):
    path = tmp_path / (f"a{suffix}.gz" if is_compressed else f"a{suffix}")
    path.write_bytes(data)
    try:
        read_records(path)
    except UserError as error:
        assert "\n" not in str(error)


# ---- Parquet ----


@pytest.fixture
def write_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="an extra: reads Parquet")
    from pyarrow import parquet

    def write(columns: dict, **options):
        parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet", **options)
        return tmp_path / "a.parquet"

    return write


def test_parquet_that_expands_without_end_is_refused_before_it_is_decoded(write_parquet):
    pyarrow = pytest.importorskip("pyarrow")
    path = write_parquet({"text": pyarrow.array(["a" * 10_000]).take(pyarrow.array([0] * 20_000))})
    assert path.stat().st_size < 100_000
    with pytest.raises(UserError, match="a.parquet expands to more than 200 times its size"):
        read_records(path)
    path = write_parquet({"text": pyarrow.nulls(30_000_000, pyarrow.string())})
    with pytest.raises(UserError, match="a.parquet claims 30,000,000 rows in"):
        read_records(path)


def test_values_that_only_parquet_has_are_no_text_and_no_keys_of_messages(write_parquet):
    import datetime

    moment = datetime.datetime(2024, 1, 2)
    path = write_parquet(
        {"prompt": ["a"], "completion": ["b"], "at": [moment], "cost": [Decimal("1.5")], "raw": [b"\xff"]}
    )
    assert [row.completion for row in read_rows(path)] == ["b"]
    with pytest.raises(UserError, match="the column completion holds datetime.datetime"):
        read_rows(write_parquet({"prompt": ["a"], "completion": [moment]}))
    turn = {"role": "assistant", "content": "a", "at": moment}
    with pytest.raises(UserError, match="message 1: a key beside role and content is no JSON value"):
        read_rows(write_parquet({"messages": [[turn]]}))


def test_text_in_parquet_that_is_not_utf8_and_times_that_python_lacks_are_one_line(write_parquet):
    pyarrow = pytest.importorskip("pyarrow")
    bad = pyarrow.StringArray.from_buffers(
        1, pyarrow.array([0, 1], pyarrow.int32()).buffers()[1], pyarrow.py_buffer(b"\xff")
    )
    with pytest.raises(UserError, match="is not a whole Parquet file"):
        read_records(write_parquet({"text": bad}))
    with pytest.raises(UserError, match="is not a whole Parquet file"):
        read_records(write_parquet({"text": ["a"], "at": pyarrow.array([2**62], pyarrow.timestamp("us"))}))


COUNT_THREADS = """
import os, sys
import pyarrow.parquet
from minilora.data.readers import read_records

before = len(os.listdir("/proc/self/task"))
records = read_records(sys.argv[1])
print(len(records), len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads as Linux lists them")
def test_parquet_is_read_without_a_thread_that_could_outlive_the_script(write_parquet):
    columns = {name: [f"{name} {i}" for i in range(2000)] for name in ("prompt", "completion", "source")}
    path = write_parquet(columns, row_group_size=500)
    command = [sys.executable, "-c", COUNT_THREADS, path]
    done = subprocess.run(command, env=PROGRAM_ENVIRONMENT, capture_output=True, text=True)
    assert done.stdout == "2000 0\n", done.stderr


def test_a_script_that_ends_as_soon_as_it_has_read_parquet_exits_with_its_own_code(write_parquet, tmp_path):
    path = write_parquet({"text": [b"no text"]})
    command = [sys.executable, ROOT / "scripts" / "prepare.py", "--dataset", path]
    command += ["--output", tmp_path / "out"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=PROGRAM_ENVIRONMENT)
    runs = [subprocess.Popen([*map(str, command)], **pipes) for _ in range(6)]
    for run in runs:
        _, err = run.communicate(timeout=300)
        assert run.returncode == 2 and "b'no text'" in err, err
