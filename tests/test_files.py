"""Files appear whole or not at all, and a full disk is one line."""

import errno
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.errors import UserError, describe, nearest, run_script
from minilora.files import read_json, write_whole


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_whole(path, "old")

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, b"new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "content, said",
    [
        (b'{"a": 1', "a.json is not valid JSON: Expecting ',' delimiter, column 8"),
        (b'{"a":\n\n oops}', "a.json is not valid JSON: Expecting value, line 3 column 2"),
        (b"\xff", "a.json is not valid JSON: 'utf-8' codec can't decode"),
        (b"[" * 100_000, "a.json is nested too deeply"),
        (b"9" * 5000, "a.json is more than can be read: a whole number in it has over 4300 digits"),
    ],
)
def test_json_that_cannot_be_read_is_one_line_that_names_the_file(tmp_path, content, said):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError) as error:
        read_json(tmp_path / "a.json")
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "error, code, said",
    [
        (UserError("lora_rank must be above 0"), 2, "error: lora_rank must be above 0\n"),
        (OSError(errno.ENOSPC, "No space left on device", "out/a"), 2, "error: out/a: No space left on device\n"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "xx"), 2, "error: xx: File name too long\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_mistakes_and_interruptions_have_their_exit_codes_and_one_line(error, code, said, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        run_script(main)
    assert end.value.code == code and capsys.readouterr().err == said


@given(st.text(alphabet="a \r\n\v\f\x1c\x1d\x1e\x85\u2028\u2029"))
def test_a_mistake_is_one_line_whatever_line_ends_its_value_has(value):
    assert len(str(UserError(f"dataset {value} does not exist")).splitlines()) == 1


def test_faults_of_the_program_keep_their_traceback():
    def main():
        raise ValueError("a fault")

    with pytest.raises(ValueError, match="a fault"):
        run_script(main)


def test_messages_name_the_nearest_or_all_and_list_many_problems_in_one_line():
    assert nearest("v_porj", ["q_proj", "v_proj"]) == "; nearest: 'v_proj'"
    assert nearest("zzz", ["b", "a"]) == "; known: a, b"
    assert describe([str(i) for i in range(11)]) == "0; 1; 2; 3; 4; 5; 6; 7; and 3 more"
