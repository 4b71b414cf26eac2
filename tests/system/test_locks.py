"""One process at a time writes a directory, and a process that has died holds nothing."""

import errno
import os
import signal
import subprocess
import sys

import pytest
from support.project import PROGRAM_ENVIRONMENT

from minilora.system import locks
from minilora.system.errors import UserError
from minilora.system.locks import check_unlocked, locked

HOLD = """
import sys, time
from pathlib import Path
from minilora.system.locks import locked
with locked("output_dir", Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""
# Ten processes try at once, and whoever gets the lock must be alone in the directory.
CONTEND = """
import os, sys
from pathlib import Path
from minilora.system.errors import UserError
from minilora.system.locks import locked
place, won = Path(sys.argv[1]), 0
for _ in range(100):
    try:
        with locked("output_dir", place):
            (place / "alone").mkdir()
            (place / "alone").rmdir()
            won += 1
    except UserError:
        pass
print(won)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of tmp_path."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, env=PROGRAM_ENVIRONMENT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_held_lock_is_one_line_that_names_the_process(holder, tmp_path):
    for attempt in (
        lambda: locked("output_dir", tmp_path).__enter__(),
        lambda: check_unlocked("output_dir", tmp_path),
    ):
        with pytest.raises(UserError) as error:
            attempt()
        assert str(error.value) == (
            f"output_dir {tmp_path} is used by process {holder.pid}, which is still running; "
            "wait for it, stop it, or choose another output_dir"
        )


def test_the_lock_of_a_killed_process_is_free_and_its_file_goes_with_the_next_holder(holder, tmp_path):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / ".lock").read_text() == str(holder.pid)
    check_unlocked("output_dir", tmp_path)
    with locked("output_dir", tmp_path):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())
    assert not list(tmp_path.iterdir())


def test_a_check_leaves_no_trace(tmp_path):
    check_unlocked("output_dir", tmp_path)
    check_unlocked("output_dir", tmp_path / "none")
    assert not list(tmp_path.iterdir())


def test_of_many_processes_only_one_is_ever_inside(tmp_path):
    command = [sys.executable, "-c", CONTEND, str(tmp_path)]
    options = dict(env=PROGRAM_ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    processes = [subprocess.Popen(command, **options) for _ in range(4)]
    ended = [process.communicate() for process in processes]
    assert not any(err for _, err in ended), ended
    assert sum(int(out) for out, _ in ended) > 0 and not list(tmp_path.iterdir())


def test_a_file_that_its_holder_removes_between_opening_and_locking_does_not_count(tmp_path, monkeypatch):
    (tmp_path / ".lock").touch()
    try_lock, calls = locks._try_lock, []

    def removed_first(descriptor):
        calls.append(descriptor)
        if len(calls) == 1:
            (tmp_path / ".lock").unlink()
        return try_lock(descriptor)

    monkeypatch.setattr(locks, "_try_lock", removed_first)
    with locked("output_dir", tmp_path):
        monkeypatch.undo()
        with pytest.raises(UserError, match=f"is used by process {os.getpid()}"):
            check_unlocked("output_dir", tmp_path)
    assert len(calls) == 2


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic links"), locked("output_dir", tmp_path / "out"):
        pass
    assert (tmp_path / "precious").read_text() == "mine"


@pytest.mark.parametrize("text", ["", "no number", "9" * 5000])
def test_a_lock_whose_holder_has_not_written_its_number_is_one_line_too(tmp_path, text):
    with locked("output_dir", tmp_path):
        (tmp_path / ".lock").write_text(text)
        with pytest.raises(UserError) as error:
            check_unlocked("output_dir", tmp_path)
        assert len(str(error.value)) < 300 + len(str(tmp_path))


@pytest.mark.parametrize("system", ["file system without locks", "Windows"])
def test_without_flock_a_run_goes_on_without_a_lock(tmp_path, monkeypatch, system):
    def unsupported(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    if system == "Windows":
        monkeypatch.setattr(locks, "fcntl", None)
    else:
        monkeypatch.setattr(locks.fcntl, "flock", unsupported)
    with locked("output_dir", tmp_path), locked("output_dir", tmp_path):
        check_unlocked("output_dir", tmp_path)
