"""Files appear completely or not at all, and a full disk is reported in one line."""

import errno
import json
import os
import re
import resource
import shutil
import subprocess
import sys

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from support.project import ROOT

from minilora.system.errors import UserError, run_script, suggestion, summarize
from minilora.system.files import check_writable, read_json, to_json, write_whole

SCRIPTS = sorted(
    path.stem for path in (ROOT / "scripts").rglob("*.py") if "ArgumentParser" in path.read_text()
)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_whole(path, "old")

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, b"new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_text_about_a_file_whose_name_is_no_utf8_is_written_with_escapes(tmp_path):
    name = os.fsdecode(b"gr\xf6\xdfe")
    write_whole(tmp_path / "text", f"größe or {name}")
    assert (tmp_path / "text").read_text(encoding="utf-8") == "größe or gr\\udcf6\\udcdfe"


@pytest.mark.parametrize("write", [lambda old, new: write_whole(new, old.read_bytes()), shutil.copyfile])
def test_a_full_disk_is_one_line_that_names_the_file_to_be_written(tmp_path, capsys, write):
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_bytes(bytes(5000))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(SystemExit) as end:
            run_script(lambda: write(old, new))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert end.value.code == 2 and capsys.readouterr().err == f"error: {new}: File too large\n"


def test_a_path_that_cannot_be_written_is_refused_early(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "directory").mkdir()
    for path, parents, said in (
        ("directory", False, "--output .*/directory exists and is no file"),
        ("none/new", False, r"--output .*/none/new: cannot write to .*/none \(No such file"),
        ("file/new", False, r"--output .*/file/new: cannot write to .*/file \(Not a directory"),
        ("file/none/new", True, "--output .*/file/none/new: cannot write to .*/file"),
    ):
        with pytest.raises(UserError, match=said):
            check_writable("--output", tmp_path / path, parents)
    for path, parents in (("file", False), ("directory/new", False), ("none/none/new", True)):
        check_writable("--output", tmp_path / path, parents)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["directory", "file"]


@pytest.mark.parametrize(
    "content, said",
    [
        (b'{"a": 1', "a.json is not valid JSON: Expecting ',' delimiter, column 8"),
        (b'{"a":\n\n oops}', "a.json is not valid JSON: Expecting value, line 3 column 2"),
        (b"\xff", "a.json is not valid JSON: 'utf-8' codec can't decode"),
        (b"[" * 100_000, "a.json is nested too deeply"),
        (b"9" * 5000, "a.json is more than can be read: a whole number in it has over 4300 digits"),
        (b"[" * 101 + b"]" * 101, "a.json is nested too deeply"),
        (b'{"a": {"b": 1, "c": 2, "b": 1}}', "a.json is ambiguous: it holds the field 'b' twice"),
        (b" " * (1 << 20) + b"[]", "a.json is larger than 1 MiB, the most that is read of such a file"),
    ],
)
def test_json_that_cannot_be_read_is_one_line_that_names_the_file(tmp_path, content, said):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError) as error:
        read_json(tmp_path / "a.json", max_bytes=1 << 20)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_only_a_regular_file_is_read_and_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "directory.json").mkdir()
    (tmp_path / "device.json").symlink_to("/dev/zero")
    for name in ("pipe", "directory", "device"):
        with pytest.raises(UserError, match=f"{name}.json is not a regular file"):
            read_json(tmp_path / f"{name}.json")
    with pytest.raises(UserError, match="absent.json is missing"):
        read_json(tmp_path / "absent.json")


def test_a_file_as_deep_and_as_large_as_allowed_is_read(tmp_path):
    (tmp_path / "a.json").write_text("[" * 100 + "]" * 100 + " " * ((1 << 20) - 200))
    assert str(read_json(tmp_path / "a.json", max_bytes=1 << 20)) == "[" * 100 + "]" * 100


@pytest.mark.parametrize(
    "error, code, said",
    [
        (UserError("lora_rank must be above 0"), 2, "error: lora_rank must be above 0\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "out/a"),
            2,
            "error: out/a: No space left on device\n",
        ),
        (OSError(errno.ENAMETOOLONG, "File name too long", "xx"), 2, "error: xx: File name too long\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
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


@pytest.mark.parametrize("count", [1, 10**6])  # written at the end, and while the script runs
def test_a_closed_pipe_ends_a_script_silently(count):
    code = f"from minilora.system.errors import run_script; run_script(lambda: print('x' * {count}))"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 141


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_option_that_no_script_knows_is_one_line(call, name):
    required = {
        "combine": ["--adapter", "a:1", "--output", "b"],
        "compare": ["a"],
        "convert": ["--model", "a", "--output", "b"],
        "extract": ["--base", "a", "--tuned", "c", "--output", "b"],
        "lint_adapter": ["a"],
        "merge": ["--adapter", "a", "--output", "b"],
        "share": ["--adapter", "a"],
        "sweep": ["--config", "a"],
        "train_together": ["a"],
    }
    code, out, err = call(name, *required.get(name, []), "--no-such-option")
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert "no-such-option" in err.replace("_", "-")


def test_bugs_of_the_program_keep_their_traceback():
    def main():
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        run_script(main)


def test_messages_name_the_nearest_name_or_all_and_list_many_problems_in_one_line():
    assert suggestion("v_porj", ["q_proj", "v_proj"]) == "; nearest: 'v_proj'"
    assert suggestion("zzz", ["b", "a"]) == "; known: a, b"
    assert summarize([str(i) for i in range(11)]) == "0; 1; 2; 3; 4; 5; 6; 7; and 3 more"


@given(st.text(st.characters(codec=None)))  # halves of surrogate pairs too
def test_any_text_survives_json_and_stays_readable_if_it_can_be_written_as_utf8(text):
    assume(
        not re.search("[\ud800-\udbff][\udc00-\udfff]", text)
    )  # two halves side by side are one character to JSON
    written = to_json({"text": text}).encode()
    assert json.loads(written) == {"text": text}
    assert "é" not in text or re.search("[\ud800-\udfff]", text) or "é".encode() in written
