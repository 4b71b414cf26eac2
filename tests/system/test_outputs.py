"""An output appears whole or not at all, whenever its writer is killed, and the user's files stay."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.killing import tree
from support.project import PROGRAM_ENVIRONMENT

from minilora.system import outputs
from minilora.system.errors import UserError
from minilora.system.locks import locked
from minilora.system.outputs import check_output, whole_output

# Write the folder `out` with other contents every time, each time killed one operation later, until nothing is
# left to kill. Prints what was found in `out` after each kill, and how many times `out.part` was left.
KILLED = """
import json, os, signal, sys
from pathlib import Path
from minilora.system import outputs
from support.killing import FILE_OPERATIONS, Killer

place = Path(sys.argv[1])
if sys.argv[2] == "two steps":
    outputs._exchange = lambda *_: False

def write(generation, count):
    Killer(count, [*FILE_OPERATIONS, (outputs, "_exchange")])
    with outputs.whole_output("--output", place / "out", replaced=("a", "b")) as part:
        part.mkdir()
        for name in "ab"[: 1 + generation % 2]:
            (part / name).write_text(str(generation))

found, ended = [], -9
while ended == -9:
    pid = os.fork()
    if not pid:
        write(len(found) + 1, len(found) + 1)
        os._exit(0)
    ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    out = place / "out"
    texts = {str(path.relative_to(out)): path.read_text() for path in out.rglob("*") if path.is_file()}
    found.append((texts, (place / "out.part").exists(), out.exists()))
print(json.dumps(found))
"""


def write(output: Path, *arguments, **texts: str) -> None:
    with whole_output("--output", output, *arguments) as part:
        part.mkdir()
        for name, text in texts.items():
            (part / name).write_text(text)


@pytest.fixture(params=["one step", "two steps"])
def steps(request, monkeypatch):
    """Exchange names as Linux does, and as other systems must."""
    if request.param == "two steps":
        monkeypatch.setattr(outputs, "_exchange", lambda *_: False)
    return request.param


def test_a_new_folder_and_a_new_file_appear_with_the_folders_above_them(tmp_path):
    write(tmp_path / "deep" / "out", a="1")
    with whole_output("--output", tmp_path / "model.gguf") as part:
        part.write_text("2")
    assert tree(tmp_path).keys() == {"deep/out/a", "model.gguf"}


def test_in_a_folder_only_the_replaced_files_change_and_the_users_stay(steps, tmp_path):
    out = tmp_path / "out"
    write(out, a="1", b="1")
    (out / "notes.txt").write_text("mine")
    (out / "deep").mkdir()
    (out / "deep" / "a").write_text("mine too")
    (out / "link").symlink_to("notes.txt")
    write(out, ("a", "b"), a="2")
    assert {str(p.relative_to(out)): p.read_text() for p in out.rglob("*") if p.is_file()} == {
        "a": "2", "notes.txt": "mine", "deep/a": "mine too", "link": "mine",
    }  # fmt: skip
    assert (out / "link").is_symlink() and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_users_files_are_copied_where_a_file_system_has_no_hard_links(tmp_path, monkeypatch):
    write(tmp_path / "out", a="1")
    (tmp_path / "out" / "notes.txt").write_text("mine")

    def unsupported(*_, **__):
        raise PermissionError("no hard links")

    monkeypatch.setattr(os, "link", unsupported)
    write(tmp_path / "out", ("a",), a="2")
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_a_file_of_the_user_is_never_replaced_by_one_that_was_not_announced(tmp_path):
    write(tmp_path / "out", a="mine")
    with pytest.raises(UserError, match="out cannot be replaced: .*File exists"):
        write(tmp_path / "out", (), a="2")
    assert (tmp_path / "out" / "a").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt(), UserError("wrong")]
)
def test_an_exception_leaves_the_old_output_and_nothing_else(tmp_path, error):
    write(tmp_path / "out", a="1")
    with pytest.raises(type(error)), whole_output("--output", tmp_path / "out", ("a",)) as part:
        part.mkdir()
        (part / "a").write_text("2")
        raise error
    assert {path.name for path in tmp_path.rglob("*")} == {"out", "a"}
    assert (tmp_path / "out" / "a").read_text() == "1"


@pytest.mark.parametrize("steps", ["one step", "two steps"])
@pytest.mark.parametrize("old", [False, True])
def test_whenever_a_writer_is_killed_the_output_is_absent_or_old_or_new_and_the_next_one_ends(
    tmp_path, steps, old
):
    kept = {"notes.txt": "mine"} if old else {}
    if old:
        write(tmp_path / "out", a="0", **kept)
    command = [sys.executable, "-c", KILLED, str(tmp_path), steps]
    done = subprocess.run(command, env=PROGRAM_ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) > 15  # so many operations there are, at least
    before = {"a": "0"} | kept if old else {}
    absent = 0
    for generation, (texts, _, exists) in enumerate(found, start=1):
        new = dict.fromkeys("ab"[: 1 + generation % 2], str(generation)) | kept
        absent += not exists
        assert texts in (before, new) or not exists
        before = texts if exists else new  # The next run finishes that swap first.
    assert texts == new and [path.name for path in tmp_path.iterdir()] == ["out"]
    assert any(part for _, part, _ in found)  # some kills have left something to remove
    if old:  # between two steps, and only there, the output is absent for a moment
        assert absent == (steps == "two steps")


def test_a_link_stays_and_its_target_is_replaced(steps, tmp_path):
    write(tmp_path / "elsewhere" / "target", a="1")
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere" / "target")
    write(tmp_path / "out", ("a",), a="2")
    assert (tmp_path / "out").is_symlink() and (tmp_path / "elsewhere" / "target" / "a").read_text() == "2"
    assert {path.name for path in tmp_path.rglob("*")} == {"elsewhere", "target", "a", "out"}


def test_an_output_that_a_living_process_writes_is_refused_by_its_number(tmp_path):
    (tmp_path / "out.part").mkdir()
    with locked("--output", tmp_path / "out.part"):
        for attempt in (
            lambda: check_output("--output", tmp_path / "out"),
            lambda: write(tmp_path / "out", a="1"),
        ):
            with pytest.raises(UserError, match=f"is used by process {os.getpid()}, which is still running"):
                attempt()


@pytest.mark.parametrize(
    "case, said",
    [
        ("here", "holds the working directory, which cannot be replaced"),
        ("above", "holds the working directory, which cannot be replaced"),
        ("mount", "is a mount point; choose a folder in it"),
        ("theirs", "out.part is in the way; move it, or choose another --output"),
        ("file", "out.part is in the way; move it, or choose another --output"),
        ("link", "out.part is in the way; move it, or choose another --output"),
    ],
)
def test_a_place_where_nothing_can_be_swapped_is_refused_early_and_unchanged(
    tmp_path, monkeypatch, case, said
):
    out, part = tmp_path / "out", tmp_path / "out.part"
    write(out, a="1")
    if case in ("here", "above"):
        monkeypatch.chdir(out)
        out = Path("." if case == "here" else "..")
    elif case == "mount":
        monkeypatch.setattr(os.path, "ismount", lambda path: path == out)
    elif case == "theirs":
        write(part, precious="mine")
    elif case == "file":
        part.write_text("mine")
    else:
        part.symlink_to("out")
    before = tree(tmp_path)
    for attempt in (lambda: check_output("--output", out), lambda: write(out, ("a",), a="2")):
        with pytest.raises(UserError, match=said):
            attempt()
    assert tree(tmp_path) == before


def test_folders_that_were_made_for_an_output_that_fails_are_removed(tmp_path):
    with pytest.raises(RuntimeError), whole_output("--output", tmp_path / "a" / "b" / "out") as part:
        part.mkdir()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_place_below_a_file_names_the_option(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "file" / "out")
    for output in (tmp_path / "file" / "out", tmp_path / "link"):
        with (
            pytest.raises(UserError, match="--output .* cannot be written"),
            whole_output("--output", output),
        ):
            pass
